"""The components of a decomposition: coefficients, parameter-space vectors, and what they say about the examples."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from npeff.compress import sketch_of
from npeff.encoding import Encoded, solve, statistics
from npeff.errors import ArgumentError
from npeff.fishers import Fishers, Kind
from npeff.parameter_vectors import parameter_vector, write_state_dict
from npeff.parameters import Parameters
from npeff.rows import GramRows
from npeff.solver.scaling import ScaledRows, scale
from npeff.strategies import Strategy, response_similarity, strategy_tree

__all__ = ["Components", "Encoded", "statistics"]

Array = npt.NDArray[Any]

OPTIONAL = ("columns", "row_weights", "row_offsets", "recovered", "recovered_vectors")
"""Arrays that not all components have."""


@dataclass(frozen=True, eq=False)
class Components:
    """``F_i ≈ Σ_j W_ij g_j g_jᵀ`` (low-rank) or ``f_i ≈ Σ_j W_ij h_j`` (diagonal), every F_i scaled to unit norm.

    Made by :func:`npeff.decompose`; opened from a file by :func:`npeff.load`.

    Attributes:
        kind: ``"low_rank"`` or ``"diagonal"``.
        coefficients: W, ``(n, r)`` float32 ≥ 0, of the unit-norm Fishers.
        vectors: G (or H), ``(r, n_kept)`` float32 with unit rows, on the kept columns, block weights applied; of
            sketched Fishers ``(r, d)``; of inner products ``(r, r)`` with the right inner products.
        columns: ``(n_kept,)`` int64 parameter index of each kept column; None when all are kept.
        block_weights: Weight per parameter name that the Fisher's blocks were multiplied by; None for 1.
        parameters: The parameters that the columns stand for.
        labels: ``(n,)`` int64 true classes, −1 where unknown.
        logits: ``(n, C)`` float32.
        ids: ``(n,)`` int64 positions of the examples in their data.
        norms: ``(n,)`` float32 norms of the uncompressed Fishers.
        loss_curve: Relative loss per iteration, L / Σ‖A_iA_iᵀ‖², float64.
        loss: Relative loss of this factorisation.
        provenance: How it was made: the Fishers' provenance and the options and course of the decomposition.
        row_weights: ``(Σ rank, r)`` float32: vectors are these combinations of the stored rows; kept where those are
            no parameter-space rows.
        row_offsets: ``(n + 1,)`` int64: example i has ``row_weights[row_offsets[i]:row_offsets[i + 1]]``.
        recovered: ``(k,)`` int64 components with known vectors in parameter space, where ``vectors`` are none.
        recovered_vectors: ``(k, n_parameters)`` float32, unit rows.
        seconds: Wall-clock seconds that ``"building"`` the space and ``"solving"`` took; empty where a file was opened:
            files of the same run are equal byte for byte.
        check: Checks arrays that were too large to be checked when the file was opened, once; None where nothing is
            left to check.
    """

    kind: Kind
    coefficients: Array
    vectors: Array
    columns: Array | None
    block_weights: dict[str, float] | None
    parameters: Parameters
    labels: Array
    logits: Array
    ids: Array
    norms: Array
    loss_curve: Array
    loss: float
    provenance: dict[str, Any] = field(default_factory=dict)
    row_weights: Array | None = None
    row_offsets: Array | None = None
    recovered: Array | None = None
    recovered_vectors: Array | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    check: Callable[[], None] | None = field(default=None, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        self.verify()
        return {**self.__dict__, "check": None}

    def __len__(self) -> int:
        return self.n_components

    def __repr__(self) -> str:
        size = f"{len(self.coefficients)} examples, {self.n_parameters:,} parameters"
        if self.compression in ("sketch", "gram"):
            size += f", {0 if self.recovered is None else len(self.recovered)} vectors in parameter space"
        return f"Components({self.n_components} {self.kind}, {size}, loss {self.loss:.4f})"

    def verify(self) -> None:
        """Make sure that arrays mapped from a large file are what was written, before all of them are used.

        As :meth:`npeff.Fishers.verify`; ``encode``, ``expand``, ``recover``, ``cosines`` and ``save`` call this.

        Raises:
            StorageError: The file is damaged.
        """
        if self.check is not None:
            self.check()

    # ---- what they are -------------------------------------------------------------------------------------

    @property
    def n_components(self) -> int:
        """Number of components, r."""
        return int(self.coefficients.shape[1])

    @property
    def n_parameters(self) -> int:
        """Length of the flat parameter vector, m."""
        return self.parameters.n_parameters

    @property
    def predictions(self) -> Array:
        """``(n,)`` int64 arg-max of the logits; −1 where the file that this came from holds no logits."""
        if not self.logits.shape[1]:
            return np.full(len(self.logits), -1, np.int64)
        return np.asarray(np.argmax(self.logits, axis=1), np.int64)

    @property
    def zero(self) -> Array:
        """``(n,)`` bool: examples whose Fisher vanished; their coefficients are 0."""
        return np.asarray(self.norms == 0)

    @property
    def compression(self) -> str | None:
        """How the Fishers' rows were kept: ``"topk"``, ``"sketch"``, ``"gram"``, or None for exact rows."""
        options = (self.provenance.get("fishers") or {}).get("options") or {}
        method = (options.get("compress") or {}).get("method")
        return None if method is None else str(method)

    @property
    def digest(self) -> str:
        """Which decomposition this is: blake2b over the kind, the coefficients and the examples' positions.

        A file of recovered vectors has the digest of the components that they were recovered for.
        """
        W = np.ascontiguousarray(self.coefficients, np.float32)
        digest = hashlib.blake2b(f"{self.kind} {W.shape}".encode(), digest_size=16)
        digest.update(W.data)
        digest.update(np.ascontiguousarray(self.ids, np.int64).data)
        return digest.hexdigest()

    def _component(self, j: int) -> int:
        if not isinstance(j, int | np.integer) or not -self.n_components <= j < self.n_components:
            raise ArgumentError(f"j: expected a component below {self.n_components}, got {j!r}")
        return int(j) % self.n_components

    def vector(self, j: int) -> Array:
        """Component j's pseudo-Fisher vector in parameter space.

        Block weights are undone, so that the vector belongs to the Fisher itself.

        Returns:
            ``(n_parameters,)`` float32, unit norm; its sign is arbitrary for the low-rank kind, ≥ 0 for the diagonal.

        Raises:
            ArgumentError: ``j`` is not a component, or its vector has to be recovered first (:meth:`recover`, or
                ``npeff recover`` on the command line).
        """
        return parameter_vector(self, self._component(j))

    def recover(
        self, model: nn.Module, data: Iterable[Any], js: Sequence[int] | None = None, **options: Any
    ) -> Components:
        """These components with vectors in parameter space, where the Fishers kept sketches or inner products alone.

        Every vector is a combination of the examples' rows, ``g_j = Σ c_row a_row``: one backward pass per batch and
        component asked for, and no per-example gradient.

        Args:
            model: The model of the Fishers, with the same weights.
            data: The data of the Fishers, in the same order, in batches of any size.
            js: Which components; None: all.
            **options: ``forward``, ``device`` and ``progress``, as for :func:`npeff.compute_fishers`.

        Returns:
            Components whose :meth:`vector` and :meth:`state_dict` know ``js``, and what was known before.

        Raises:
            ArgumentError: Nothing needs recovering, ``js`` names no component, or the components were expanded.
            DataError: The data is not that of the Fishers.
            ModelError: The model is not that of the Fishers.
        """
        from npeff.recovery import recover

        self.verify()
        return recover(self, model, data, None if js is None else [self._component(j) for j in js], **options)

    def state_dict(self, j: int) -> dict[str, torch.Tensor]:
        """Component j's vector cut into parameter-shaped tensors: a direction that can be added to the model."""
        return {
            name: torch.from_numpy(block.copy()) for name, block in self.parameters.unflatten(self.vector(j)).items()
        }

    def save_state_dict(self, j: int, path: str | Path) -> Path:
        """Write :meth:`state_dict` as a safetensors file, provenance in its metadata.

        Raises:
            ArgumentError: ``j`` is not a component, or ``path`` no path.
            StorageError: Fishers or Components are there, or the file cannot be written.
        """
        return write_state_dict(self, self._component(j), path)

    def block_energy(self, j: int) -> dict[str, float]:
        """Share of ``‖g_j‖²`` in each parameter (they sum to 1)."""
        vector = self.vector(j).astype(np.float64)
        return {p.name: float(np.square(vector[p.slice]).sum()) for p in self.parameters}

    # ---- what they respond to ------------------------------------------------------------------------------

    def top_examples(self, j: int, k: int = 16) -> Array:
        """Indices of the k examples with the largest coefficients on component j, descending, ties by lower index.

        They index ``coefficients``; ``ids`` translates them to positions in the data.

        Raises:
            ArgumentError: ``j`` is not a component, or k is negative.
        """
        if not isinstance(k, int | np.integer) or k < 0:
            raise ArgumentError(f"k: expected a number ≥ 0, got {k}")
        order = np.argsort(-self.coefficients[:, self._component(j)], kind="stable")
        return order[: min(k, len(order))].astype(np.int64)

    def class_distribution(self, j: int, of: str = "predictions") -> Array:
        """How component j's coefficient mass is spread over classes.

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

    def cosines(self) -> Array:
        """``(r, r)`` |cos| between the vectors, as factorised."""
        self.verify()
        unit = self.vectors / np.maximum(np.linalg.norm(self.vectors, axis=1, keepdims=True), 1e-30)
        return np.asarray(np.abs(unit @ unit.T))

    def strategies(self, n: int | None = None, *, fishers: Fishers | None = None, **options: Any) -> Strategy:
        """The tree of component groups: average linkage on the similarity of what they respond to.

        Two components are alike when a move along either changes the same examples (:mod:`npeff.strategies`).

        Args:
            n: Cut the tree into this many strategies below the root; by default the full binary tree.
            fishers: The Fishers that the components were made from: n is then the number of strategies that comes
                back best from halves of the examples (:func:`npeff.trust.stability`).
            **options: As for :func:`npeff.trust.stability`.

        Returns:
            The root; every node has its components, summed ``coefficient`` and ``top_examples``.

        Raises:
            ArgumentError: ``n`` is not between 1 and the number of components, or is given with ``fishers``.
        """
        if fishers is not None:
            from npeff.trust import stability

            if n is not None:
                raise ArgumentError("n: give the number of strategies or the Fishers to choose it by, not both")
            n = stability(fishers, self, **options).n_strategies
        elif options:
            raise ArgumentError(f"fishers: {', '.join(options)} are options of the choice by stability, which needs it")
        return strategy_tree(response_similarity(self), self.coefficients, n)

    # ---- new examples, new components ----------------------------------------------------------------------

    def encode(self, fishers: Fishers, tolerance: float = 1e-8) -> Encoded:
        """Coefficients of other examples' Fishers on these components.

        Solves ``min_{w ≥ 0} ‖F_i − Σ_j w_j g_j g_jᵀ‖²`` per example, a convex problem, to optimality in float64.

        Args:
            fishers: Fishers of the same kind and the same parameters.
            tolerance: Relative KKT residual at which an example counts as solved.

        Raises:
            ArgumentError: Kind or parameters differ from those of the components.
        """
        self._check_compatible(fishers)
        theirs, ours = (p.get("model_digest") for p in (fishers.provenance, self.provenance.get("fishers", {})))
        if theirs and ours and theirs != ours:
            warnings.warn("fishers: they are of another model than the components (other weights)", stacklevel=2)
        return solve(self.kind, self._scale(fishers), self.vectors, tolerance)

    def expand(self, fishers: Fishers, n: int, *, keep_coefficients: bool = False, **options: Any) -> Components:
        """These components, frozen, plus n new ones fitted to ``fishers``.

        Args:
            fishers: Fishers of the same kind and parameters, of the same examples or of others.
            n: Number of new components.
            keep_coefficients: Keep the coefficients of the frozen components too (same examples only);
                otherwise they are fitted along with the new ones.
            **options: As for :func:`npeff.decompose`.

        Returns:
            Components whose first ``n_components`` are these.

        Raises:
            ArgumentError: Kind or parameters differ, or n is not positive.
        """
        from npeff.decomposition import expand

        self._check_compatible(fishers)
        return expand(self, fishers, n, keep_coefficients=keep_coefficients, **options)

    def _scale(self, fishers: Fishers, columns: Array | None = None) -> ScaledRows:
        return scale(
            fishers,
            self.block_weights or "energy",
            self.provenance.get("normalize", "stored"),
            columns if columns is not None else self.columns,
        )

    def _check_compatible(self, fishers: Fishers) -> None:
        self.verify()
        fishers.verify()
        if isinstance(fishers.rows, GramRows) or self.compression == "gram":
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

        An existing file is replaced only once the new one is whole.
        """
        from npeff.storage import save_components

        return save_components(self, path)

    def to_arrays(self) -> dict[str, Array]:
        """The arrays of the container format."""
        arrays = {
            name: getattr(self, name)
            for name in ("coefficients", "vectors", "labels", "logits", "ids", "norms", "loss_curve")
        }
        optional = {name: getattr(self, name) for name in OPTIONAL}
        return arrays | {name: array for name, array in optional.items() if array is not None}

    def meta(self) -> dict[str, Any]:
        """Everything else, JSON-able."""
        same = {name: getattr(self, name) for name in ("kind", "block_weights", "loss", "provenance")}
        return {**same, "parameters": self.parameters.to_json()}

    @classmethod
    def from_parts(cls, arrays: Mapping[str, Array], meta: Mapping[str, Any]) -> Components:
        """The inverse of :meth:`to_arrays` and :meth:`meta`."""
        names = ("coefficients", "vectors", "labels", "logits", "ids", "norms", "loss_curve")
        own: dict[str, Any] = {name: arrays[name] for name in (*names, *OPTIONAL[1:]) if name in arrays}
        return cls(
            kind=meta["kind"],
            block_weights=meta["block_weights"],
            parameters=Parameters.from_json(meta["parameters"]),
            loss=float(meta["loss"]),
            provenance=dict(meta["provenance"]),
            columns=arrays.get("columns"),
            **own,
        )
