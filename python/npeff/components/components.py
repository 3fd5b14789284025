"""The components of a decomposition: coefficients, parameter-space vectors, and what they say about the examples."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from npeff.components.adapters import write_adapter
from npeff.components.encoding import Encoded, solve, statistics
from npeff.components.factorisation import OPTIONAL, Factorisation
from npeff.components.recovery import check_rank, ensure_vectors, recover
from npeff.components.saving import save_components, write_state_dict
from npeff.components.strategies import Strategy, response_similarity, strategy_tree
from npeff.errors import ArgumentError
from npeff.fishers.fishers import Fishers
from npeff.fishers.options import sketch_of
from npeff.fishers.scaling import ScaledRows, scale
from npeff.models.parameters import Parameters

__all__ = ["Components", "Encoded", "statistics"]

Array = npt.NDArray[Any]


@dataclass(frozen=True, eq=False)
class Components(Factorisation):
    """``F_i ≈ Σ_j W_ij g_j g_jᵀ`` (low-rank) or ``f_i ≈ Σ_j W_ij h_j`` (diagonal), every F_i scaled to unit norm.

    Made by :func:`npeff.decompose`; opened from a file by :func:`npeff.load`.
    :class:`npeff.components.factorisation.Factorisation` describes its arrays.
    """

    def __repr__(self) -> str:
        size = f"{len(self.coefficients)} examples, {self.n_parameters:,} parameters"
        if self.compression in ("sketch", "gram"):
            size += f", {self.n_components - len(self.not_recovered)} vectors in parameter space"
        return f"Components({self.n_components} {self.kind}, {size}, loss {self.loss:.4f})"

    def recover(
        self,
        model: nn.Module,
        data: Iterable[Any],
        js: Sequence[int] | None = None,
        *,
        rank: int | None = None,
        **options: Any,
    ) -> Components:
        """Recover vectors in parameter space, where the Fishers kept sketches or inner products alone.

        Every vector is a combination of the examples' rows, ``g_j = Σ c_row a_row``. One pass over the data serves all
        components asked for; those that are known already are not computed again.

        Args:
            model: The model of the Fishers, with the same weights.
            data: The data of the Fishers, in the same order, in batches of any size.
            js: Which components; None: all.
            rank: Keep every matrix of a vector as factors of this rank, ``(n + k) · rank`` numbers in place of
                ``n · k``, found without ever forming the matrix; :attr:`factored_lost` holds what that loses, measured.
                None: whole vectors.
            **options: ``forward``, ``device`` and ``progress``, as for :func:`npeff.compute_fishers`.

        Returns:
            Components whose :meth:`vector` and :meth:`state_dict` know ``js``, and what was known before.

        Raises:
            ArgumentError: Nothing needs recovering, ``js`` names no component, or the components were expanded.
            DataError: The data is not that of the Fishers.
            ModelError: The model is not that of the Fishers.
        """
        self.verify()
        chosen = None if js is None else [self._component(j) for j in js]
        return recover(self, model, data, chosen, rank=rank, **options)

    def state_dict(
        self, j: int, model: nn.Module | None = None, data: Iterable[Any] | None = None, **options: Any
    ) -> dict[str, torch.Tensor]:
        """Cut component j's vector into parameter-shaped tensors: a direction that can be added to the model.

        Args:
            j: A component.
            model: The model of the Fishers, to recover the vector with where it is not known (:meth:`recover`). It is
                then kept: in these components, and in the file that they came from.
            data: Likewise, the data of the Fishers.
            **options: ``forward``, ``device`` and ``progress``, as for :func:`npeff.compute_fishers`.

        Returns:
            Float32 tensors by parameter name, of unit norm together.

        Raises:
            ArgumentError: ``j`` is not a component, or its vector has to be recovered and ``model`` and ``data`` are
                not given.
            DataError: The data is not that of the Fishers.
            ModelError: The model is not that of the Fishers.
        """
        ensure_vectors(self, [self._component(j)], model, data, **options)
        return {
            name: torch.from_numpy(block.copy()) for name, block in self.parameters.unflatten(self.vector(j)).items()
        }

    def save_state_dict(
        self,
        j: int,
        path: str | Path,
        model: nn.Module | None = None,
        data: Iterable[Any] | None = None,
        **options: Any,
    ) -> Path:
        """Write :meth:`state_dict` as a safetensors file, provenance in its metadata.

        Args:
            j: A component.
            path: The file.
            model: As for :meth:`state_dict`.
            data: As for :meth:`state_dict`.
            **options: As for :meth:`state_dict`.

        Raises:
            ArgumentError: As for :meth:`state_dict`, or ``path`` is no path.
            DataError: As for :meth:`state_dict`.
            ModelError: As for :meth:`state_dict`.
            StorageError: Fishers or Components are there, or the file cannot be written.
        """
        ensure_vectors(self, [self._component(j)], model, data, **options)
        return write_state_dict(self, self._component(j), path)

    def to_peft(
        self,
        j: int,
        path: str | Path,
        model: nn.Module,
        data: Iterable[Any] | None = None,
        *,
        rank: int = 8,
        scale: float = 1.0,
        **options: Any,
    ) -> float:
        """Write component j as a LoRA adapter, which ``peft.PeftModel.from_pretrained(model, path)`` loads.

        With the adapter the weight of every linear layer is ``W + scale · Ĝ``, Ĝ the best approximation of rank
        ``rank`` of the layer's block of the unit vector g_j: nearly the model at ``θ + scale · g_j``
        (:func:`npeff.perturb` finds a step). GPT-2's ``Conv1D`` counts as a linear layer. Embeddings, norms and biases
        stay as they are; choose ``parameters=`` of the Fishers so that they hold nothing.

        Args:
            j: A component.
            path: Folder for ``adapter_config.json`` and ``adapter_model.safetensors``.
            model: The model of the Fishers.
            data: The data of the Fishers, where the vector has to be recovered; its factors are then kept, as with
                :meth:`state_dict`.
            rank: Rank of the adapter.
            scale: How far the weights move, with a sign.
            **options: As for :meth:`state_dict`.

        Returns:
            The share of ‖g_j‖² that the adapter holds.

        Raises:
            ArgumentError: ``j`` is not a component, an argument has a wrong value, the vector has to be recovered and
                ``data`` is not given, or no parameter is the weight of a linear layer.
            DataError: The data is not that of the Fishers.
            ModelError: The model is not that of the Fishers.
            StorageError: The folder cannot be written.
        """
        check_rank(rank)
        ensure_vectors(self, [self._component(j)], model, data, rank=rank, **options)
        return write_adapter(self, self._component(j), path, model, rank, scale)

    def block_energy(self, j: int) -> dict[str, float]:
        """Compute the share of ``‖g_j‖²`` in each parameter (they sum to 1)."""
        vector = self.vector(j).astype(np.float64)
        return {p.name: float(np.square(vector[p.slice]).sum()) for p in self.parameters}

    # ---- what they respond to ------------------------------------------------------------------------------

    def top_examples(self, j: int, k: int = 16) -> Array:
        """Find the k examples with the largest coefficients on component j, descending, ties by lower index.

        Returns indices into ``coefficients``; ``ids`` translates them to positions in the data.

        Raises:
            ArgumentError: ``j`` is not a component, or k is negative.
        """
        if not isinstance(k, int | np.integer) or k < 0:
            raise ArgumentError(f"k: expected a number ≥ 0, got {k}")
        order = np.argsort(-self.coefficients[:, self._component(j)], kind="stable")
        return order[: min(k, len(order))].astype(np.int64)

    def class_distribution(self, j: int, of: str = "predictions") -> Array:
        """Compute how component j's coefficient mass is spread over classes.

        Args:
            j: A component.
            of: ``"predictions"`` or ``"labels"``.

        Returns:
            ``(C,)`` float64 that sums to 1 (all 0 for a component without coefficients).
            Unlabelled examples are left out.

        Raises:
            ArgumentError: ``j`` or ``of`` is invalid.
        """
        if of not in ("predictions", "labels"):
            raise ArgumentError(f"of: expected 'predictions' or 'labels', got {of!r}")
        classes = self.predictions if of == "predictions" else self.labels
        known = classes >= 0
        n_classes = max(int(self.logits.shape[1]), int(self.labels.max(initial=-1)) + 1)
        weights = self.coefficients[known, self._component(j)].astype(np.float64)
        mass = np.bincount(classes[known], weights, minlength=n_classes)
        return np.asarray(mass / mass.sum() if mass.sum() else mass)

    def strategies(self, n: int | None = None) -> Strategy:
        """Group components into a tree: average linkage on the similarity of what they respond to.

        Two components are alike when a move along either changes the same examples
        (:mod:`npeff.components.strategies`).

        Args:
            n: Cut the tree into this many strategies below the root; by default the full binary tree.
                :func:`npeff.trust.stability` says which number comes back best from halves of the examples
                (``n_strategies``).

        Returns:
            The root; every node has its components, summed ``coefficient`` and ``top_examples``.

        Raises:
            ArgumentError: ``n`` is not between 1 and the number of components.
        """
        return strategy_tree(response_similarity(self), self.coefficients, n)

    # ---- new examples, new components ----------------------------------------------------------------------

    def encode(self, fishers: Fishers, tolerance: float = 1e-8) -> Encoded:
        """Solve for the coefficients of other examples' Fishers on these components.

        Solves ``min_{w ≥ 0} ‖F_i − Σ_j w_j g_j g_jᵀ‖²`` per example, a convex problem, to optimality in float64.

        Args:
            fishers: Fishers of the same kind and the same parameters.
            tolerance: Relative KKT residual at which an example counts as solved.

        Raises:
            ArgumentError: Kind or parameters differ from those of the components.
        """
        self.check_compatible(fishers)
        theirs, ours = (p.get("model_digest") for p in (fishers.provenance, self.provenance.get("fishers", {})))
        if theirs and ours and theirs != ours:
            warnings.warn("fishers: they are of another model than the components (other weights)", stacklevel=2)
        return solve(self.kind, self._scale(fishers), self.vectors, tolerance)

    def _scale(self, fishers: Fishers, columns: Array | None = None) -> ScaledRows:
        return scale(
            fishers,
            self.block_weights or "energy",
            self.provenance.get("normalize", "stored"),
            columns if columns is not None else self.columns,
        )

    def check_compatible(self, fishers: Fishers) -> None:
        """Check that Fishers can be encoded on these components, or the components be expanded by them.

        Raises:
            ArgumentError: Kind, compression or parameters differ.
            StorageError: A file that they are mapped from is damaged.
        """
        self.verify()
        fishers.verify()
        if fishers.rows.products_only or self.compression == "gram":
            raise ArgumentError(
                "fishers: inner products alone (GramOnly) say nothing about other examples; compute Fishers with "
                "compress=None, TopK(k) or Sketch(d) for that (npeff fishers --exact, --top-k or --sketch)"
            )
        if sketch_of(self.provenance.get("fishers", {})) != fishers.sketch:
            ours = sketch_of(self.provenance.get("fishers", {}))
            raise ArgumentError(
                f"fishers: expected the compression of the components ({ours or 'no sketch'}), got "
                f"{fishers.sketch or 'no sketch'}; compute them as the components' own, or decompose these"
            )
        if fishers.kind != self.kind:
            raise ArgumentError(f"fishers: expected {self.kind} Fishers like the components, got {fishers.kind} ones")
        if fishers.parameters != self.parameters:
            raise ArgumentError(
                f"fishers: expected the parameters of the components ({len(self.parameters)} tensors, "
                f"{self.n_parameters:,} elements), "
                f"got {len(fishers.parameters)} tensors with {fishers.n_parameters:,} elements; compute them "
                "with the same model and the same selection"
            )

    # ---- storage -------------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> Path:
        """Write to an HDF5 file (see :mod:`npeff.storage`).

        An existing file is replaced only once the new one is whole. Vectors that are recovered later, on the way, are
        added to the file (:attr:`path`).
        """
        object.__setattr__(self, "path", save_components(self, path))
        assert self.path is not None
        return self.path

    @classmethod
    def from_parts(cls, arrays: Mapping[str, Array], meta: Mapping[str, Any]) -> Components:
        """Make Components of what :meth:`to_arrays` and :meth:`meta` gave."""
        names = ("coefficients", "vectors", "labels", "logits", "ids", "norms", "loss_curve")
        own: dict[str, Any] = {name: arrays[name] for name in (*names, *OPTIONAL[1:]) if name in arrays}
        return cls(
            kind=meta["kind"],
            block_weights=meta["block_weights"],
            parameters=Parameters.from_json(meta["parameters"]),
            loss=float(meta["loss"]),
            provenance=dict(meta["provenance"]),
            columns=arrays.get("columns"),
            rank=meta.get("rank"),
            **own,
        )
