"""The components of a decomposition: coefficients, parameter-space vectors, and what they say about the examples."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import save as save_tensors
from torch import nn

from npeff import kernels
from npeff.components.factored import write_adapter
from npeff.components.factorisation import COMPONENTS, Factorisation
from npeff.components.recovery import recover
from npeff.components.strategies import Strategy, response_similarity, strategy_tree
from npeff.errors import ArgumentError, DataError, StorageError, check_integer
from npeff.fishers.file_format import check_saved, count_outputs
from npeff.fishers.fishers import Fishers
from npeff.fishers.options import sketch_of
from npeff.fishers.rows import Kind
from npeff.fishers.scaling import ScaledRows, scale
from npeff.language.places import check_same_outputs
from npeff.storage.container import check_replaceable, open_container, refuse_npeff_file
from npeff.storage.files import atomic, path_of
from npeff.storage.writing import Data, write_container

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Encoded:
    """Coefficients of examples on given components.

    Attributes:
        coefficients: ``(n, r)`` float32, the non-negative least-squares solution.
        kkt: ``(n,)`` float64 relative KKT residual of each example's solution: the largest violation of
            ``w ≥ 0, ∇ ≥ 0, w·∇ = 0`` over the largest |cross_ij|.
        unexplained: ``(n,)`` float64 share ``‖F_i − Σ_j w_j g_j g_jᵀ‖² / ‖F_i‖²`` that is left; 0 for a zero Fisher.
    """

    coefficients: Array
    kkt: Array
    unexplained: Array

    def __repr__(self) -> str:
        n, r = self.coefficients.shape
        left, worst = (float(np.median(self.unexplained)), float(self.kkt.max())) if n else (0.0, 0.0)
        return f"Encoded({n} examples, {r} components, unexplained: median {left:.0%}, KKT residual ≤ {worst:.1e})"

    def __len__(self) -> int:
        return len(self.coefficients)


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
        if isinstance(js, int | np.integer):
            raise ArgumentError(f"js: expected a list of components, got {js}; for one give [{js}]")
        chosen = None if js is None else [self._component(j) for j in js]
        return recover(self, model, data, chosen, rank=rank, **options)

    def ensure_vectors(
        self,
        js: Sequence[int],
        model: nn.Module | None,
        data: Iterable[Any] | None,
        *,
        rank: int | None = None,
        **options: Any,
    ) -> None:
        """Recover the vectors of some components that are not known yet, in place, and keep them in :attr:`path`.

        Nothing is written where the file holds other components by now; where it cannot be written, a warning says so.

        Args:
            js: Which; nothing happens where all are known.
            model: The model of the Fishers; None where there is none.
            data: The data of the Fishers, which will be read again; None where there are none.
            rank: Factors of at least this rank will do; None: so will any vector that is known.
            **options: As for :meth:`recover`.

        Raises:
            ArgumentError: Vectors are missing, and there is no model or no data to recover them with.
            DataError: The data can be read once only, or is not that of the Fishers.
            ModelError: The model is not that of the Fishers.
        """
        unknown = set(self.not_recovered)
        if rank is not None and self.rank is not None and self.rank < rank:
            unknown |= {j for j in js if self.known_as_factors_alone(j)}
        if not (missing := [j for j in dict.fromkeys(js) if j in unknown]):
            return
        if model is None or data is None:
            self.check_recovered(missing)
            raise ArgumentError(
                f"rank: component {missing[0]} is known as factors of rank {self.rank}, fewer than {rank}; give data= "
                "to recover more, or a lower rank"
            )
        if isinstance(data, Iterator):
            raise DataError(
                "data: it can be read once only, but vectors have to be recovered by a pass of their own; pass a list "
                "or a DataLoader, or call components.recover(model, data) beforehand"
            )
        found = self.recover(model, data, missing, rank=rank, **options)
        for name in ("recovered", "recovered_vectors", "rank", "factored", "factored_vectors", "factored_lost"):
            object.__setattr__(self, name, getattr(found, name))  # what the components are stays the same
        if self.path is None:
            return
        try:
            if np.array_equal(open_container(self.path).array("arrays/coefficients"), self.coefficients):
                self.save(self.path)
        except StorageError as error:
            warnings.warn(f"the vectors that were recovered could not be kept: {error}", stacklevel=3)

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
        self.ensure_vectors([self._component(j)], model, data, **options)
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
        j, path = self._component(j), path_of(path)
        refuse_npeff_file(path)
        tensors = self.state_dict(j, model, data, **options)
        about = {"component": j, "kind": self.kind, **self.provenance}
        content = save_tensors(tensors, {"npeff": json.dumps(about, default=str)})
        with atomic(path) as scratch:
            scratch.write_bytes(content)
        return path

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
        (:func:`npeff.perturb` finds a step). A vector that is known as factors alone is scaled to unit norm, as in
        :meth:`state_dict`, so that a step is as long with the adapter. GPT-2's ``Conv1D`` counts as a linear layer.
        Embeddings, norms and biases stay as they are; choose ``parameters=`` of the Fishers so that they hold nothing.

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
        rank = check_integer("rank", rank)
        j = self._component(j)
        self.ensure_vectors([j], model, data, rank=rank, **options)
        about = {"component": j, "digest": self.digest}
        return write_adapter(self.matrix_factors(j, rank), about, path, model, rank, scale, self.held_norm(j))

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
        order = np.argsort(-self.coefficients[:, self._component(j)], kind="stable")
        return order[: check_integer("k", k, 0)].astype(np.int64)

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
            n: Cut the tree into this many strategies, the groups below the root; by default the full binary tree.
                :func:`npeff.trust.stability` says which number comes back best from halves of the examples
                (``n_strategies``).

        Returns:
            The root, over all components. Iterate over it for the n groups: ``for group in components.strategies(3)``.
            Every node has its components, summed ``coefficient`` and ``top_examples``.

        Raises:
            ArgumentError: ``n`` is not between 1 and the number of components.
        """
        root = strategy_tree(response_similarity(self), self.coefficients, n)
        return replace(root, children=(root,)) if n == 1 and root.children else root

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
        scaled = self.scale(fishers)
        cross, gram = statistics(self.kind, scaled, torch.from_numpy(self.vectors).double())
        solution = kernels.nnls(gram, cross, tol=tolerance, exact=True)
        w = solution.w
        energy = torch.from_numpy(scaled.fisher_norms**2)
        left = energy - 2 * (w * cross).sum(1) + ((w @ gram) * w).sum(1)
        unexplained = torch.where(energy > 0, left.clamp_min(0) / energy.clamp_min(1e-30), torch.zeros_like(energy))
        return Encoded(w.float().numpy(), np.asarray(solution.kkt, np.float64), unexplained.numpy())

    def scale(self, fishers: Fishers) -> ScaledRows:
        """Scale other Fishers as those that were factorised."""
        return scale(fishers, **self.scaling_of(fishers), columns=self.columns)

    def scaling_of(self, fishers: Fishers) -> dict[str, Any]:
        """Return the options of :func:`npeff.decompose` that scale other Fishers as those that were factorised."""
        weights: Any = self.block_weights
        if weights is None:  # what the others were weighted by when they were computed is undone
            weights = "energy" if fishers.block_weights is None else dict.fromkeys(self.parameters.names, 1.0)
        return {"block_weights": weights, "normalize": self.provenance.get("normalize", "stored")}

    def made_from(self, fishers: Fishers) -> bool:
        """Whether these are Fishers of the examples of the coefficients, in their order: ids and known outputs."""
        same = np.array_equal(self.ids, fishers.ids)
        return same and (not self.logits.shape[1] or self.logits.same(fishers.logits))

    def check_compatible(self, fishers: Fishers) -> None:
        """Check that Fishers can be encoded on these components, or the components be expanded by them.

        A warning says where they were computed from another model, or with another likelihood.

        Raises:
            ArgumentError: Kind, compression or parameters differ.
            StorageError: A file that they are mapped from is damaged.
        """
        if not isinstance(fishers, Fishers):
            raise ArgumentError(f"fishers: expected Fishers, got {type(fishers).__name__}; open a file with npeff.load")
        self.verify()
        fishers.verify()
        if fishers.rows.products_only or self.compression == "gram":
            raise ArgumentError(
                "fishers: inner products alone (GramOnly) say nothing about other examples; compute Fishers with "
                "compress=None, TopK(k) or Sketch(d) for that (npeff fishers --exact, --top-k or --sketch)"
            )
        source = self.provenance.get("fishers") or {}
        if (ours := sketch_of(source)) != fishers.sketch:
            raise ArgumentError(
                f"fishers: expected the compression of the components ({ours or 'no sketch'}), got "
                f"{fishers.sketch or 'no sketch'}; compute them as the components' own, or decompose these"
            )
        if ours is not None and self.block_weights != fishers.block_weights:
            raise ArgumentError(
                f"fishers: expected sketches of the block weights of the components, {self.block_weights or 'none'}, "
                f"got {fishers.block_weights or 'none'}; compute them with the same block_weights="
            )
        check_same_outputs(fishers.provenance, source)
        if fishers.kind != self.kind:
            raise ArgumentError(f"fishers: expected {self.kind} Fishers like the components, got {fishers.kind} ones")
        if fishers.parameters != self.parameters:
            raise ArgumentError(
                f"fishers: expected the parameters of the components ({len(self.parameters)} tensors, "
                f"{self.n_parameters:,} elements), "
                f"got {len(fishers.parameters)} tensors with {fishers.n_parameters:,} elements; compute them "
                "with the same model and the same selection"
            )
        facts = [{**(p.get("options") or {}), "model": p.get("model_digest")} for p in (fishers.provenance, source)]
        words = {"model": "of another model (other weights)", "likelihood": "of another likelihood"}
        words["labels"] = "of other labels="
        told = [words[name] for name in words if len({f[name] for f in facts if f.get(name)}) > 1]
        if told:
            warnings.warn(f"fishers: they are {' and '.join(told)} than those of the components", stacklevel=3)

    # ---- storage -------------------------------------------------------------------------------------------

    def save(self, path: str | Path) -> Path:
        """Write to an HDF5 file: the arrays under ``arrays/`` and :meth:`meta` as JSON.

        The file appears whole or not at all. An existing file is replaced only if it, too, holds npeff Components.
        Vectors that are recovered on the way later are added to it (:attr:`path`).

        Returns:
            ``path``.

        Raises:
            ArgumentError: An array holds what no Components have, such as NaN; says which.
            StorageError: The file cannot be written there; what was there is untouched.
        """
        path = check_replaceable(path, "components")
        self.verify()
        source = self.provenance.get("fishers") or {}
        known = {"n_parameters": self.n_parameters, "n_logits": self.logits.values.shape[1]}
        count_outputs("components", known, source.get("options") or {}, self.logits.n_outputs)
        check_saved("components", self.to_arrays(), COMPONENTS, known)
        arrays = [Data.of(f"arrays/{name}", np.asarray(array)) for name, array in sorted(self.to_arrays().items())]
        sizes = {"n_examples": len(self.coefficients), "n_components": self.n_components}
        sizes["n_parameters"] = self.n_parameters
        attributes = {"kind": self.kind, **{name: np.int64(size) for name, size in sizes.items()}}
        with atomic(path) as scratch:
            write_container(scratch, "components", [Data.json("meta", self.meta()), *arrays], attributes)
        object.__setattr__(self, "path", path)
        return path


def statistics(kind: Kind, scaled: ScaledRows, vectors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute ``cross (n, r)`` and ``gram (r, r)`` of the least-squares problem for W, in the dtype of ``vectors``."""
    P, Q = scaled.rows.project(vectors), vectors @ vectors.T
    if kind == "diagonal":
        return P, Q
    return kernels.cross(P, torch.tensor(np.asarray(scaled.row_offsets))), Q * Q
