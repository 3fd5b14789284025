"""The arrays of a decomposition, and the quantities that follow from them directly."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from npeff.components.factored import MatrixFactors, assemble, slots, squared_norm, truncated
from npeff.errors import ArgumentError
from npeff.fishers.block_weights import column_factors
from npeff.fishers.file_format import LOGITS, PLACES, example_arrays
from npeff.fishers.logits import Logits
from npeff.fishers.rows import Kind
from npeff.models.parameters import Parameter, Parameters
from npeff.storage.checks import FLOAT, INT, Field

Array = npt.NDArray[Any]

COMPONENTS = (
    Field("coefficients", FLOAT, ("n_examples", "n_components"), least=0),
    Field("vectors", FLOAT, ("n_components", "n_columns")),
    Field("columns", INT, ("n_columns",), least=0, below="n_parameters", ascending_in="", optional=True),
    Field("labels", INT, ("n_examples",), least=-1, below="n_classes"),
    *LOGITS,
    Field("ids", INT, ("n_examples",), least=0),
    PLACES,
    Field("norms", FLOAT, ("n_examples",), least=0, nan=True),
    Field("loss_curve", FLOAT, ("n_losses",)),
    Field("row_offsets", INT, ("n_examples + 1",), ascends_to="n_rows", optional=True),
    Field("row_weights", FLOAT, ("n_rows", "n_components"), optional=True),
    Field("recovered", INT, ("n_recovered",), least=0, below="n_components", ascending_in="", optional=True),
    Field("recovered_vectors", FLOAT, ("n_recovered", "n_parameters"), optional=True),
    Field("factored", INT, ("n_factored",), least=0, below="n_components", ascending_in="", optional=True),
    Field("factored_vectors", FLOAT, ("n_factored", "n_factors"), optional=True),
    Field("factored_lost", FLOAT, ("n_factored", "n_tensors"), least=0, optional=True),
)
"""The arrays of a file, under ``arrays/``."""

OPTIONAL = tuple(field.name for field in COMPONENTS if field.optional and field not in (*LOGITS, PLACES))
"""Arrays that not all components have."""


@dataclass(frozen=True, eq=False)
class Factorisation:
    """Coefficients and vectors of r components of n examples, and their provenance.

    Attributes:
        kind: ``"low_rank"`` or ``"diagonal"``.
        coefficients: W, ``(n, r)`` float32 ≥ 0, of the unit-norm Fishers.
        vectors: G (or H), ``(r, n_kept)`` float32 with unit rows, on the kept columns, block weights applied; of
            sketched Fishers ``(r, d)``; of inner products ``(r, r)`` with the right inner products.
        columns: ``(n_kept,)`` int64 parameter index of each kept column; None when all are kept.
        block_weights: Weight per parameter name that the Fisher's blocks were multiplied by; None for 1.
        parameters: The parameters that the columns stand for.
        labels: ``(n,)`` int64 true classes, −1 where unknown.
        logits: Outputs of the model, :class:`~npeff.fishers.logits.Logits`: an array ``(n, C)`` float32, or, of more
            than 1,024 classes, the 32 largest of each example; no columns where the file that they are from has none.
        ids: ``(n,)`` int64 positions of the examples in their data.
        norms: ``(n,)`` float32 norms of the uncompressed Fishers.
        places: ``(n, 2)`` int64: sequence in the data and position in it, where examples are places; None elsewhere.
        loss_curve: Relative loss per iteration, L / Σ‖A_iA_iᵀ‖², float64.
        loss: Relative loss of this factorisation.
        provenance: How it was made: the Fishers' provenance and the options and history of the decomposition.
        row_weights: ``(Σ rank, r)`` float32: vectors are these combinations of the stored rows; kept where those are
            no parameter-space rows.
        row_offsets: ``(n + 1,)`` int64: example i has ``row_weights[row_offsets[i]:row_offsets[i + 1]]``.
        recovered: ``(k,)`` int64 components whose vectors in parameter space are known, where ``vectors`` are others.
        recovered_vectors: ``(k, n_parameters)`` float32, unit rows.
        factored: ``(k,)`` int64 components whose vectors are known with matrices as factors of low rank.
        factored_vectors: ``(k, p)`` float32, laid out as :func:`npeff.components.factored.slots` says; of unit norm
            with what the factors lose.
        factored_lost: ``(k, n_tensors)`` float32: the share of ‖g_j‖² that the factors of each parameter lose.
        rank: Rank of these factors; None without them.
        path: The file that holds these components; None where there is none. Vectors that are recovered on the way
            are kept there.
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
    logits: Logits
    ids: Array
    norms: Array
    loss_curve: Array
    loss: float
    provenance: dict[str, Any] = field(default_factory=dict)
    row_weights: Array | None = None
    row_offsets: Array | None = None
    recovered: Array | None = None
    recovered_vectors: Array | None = None
    factored: Array | None = None
    factored_vectors: Array | None = None
    factored_lost: Array | None = None
    rank: int | None = None
    path: Path | None = field(default=None, repr=False)
    seconds: dict[str, float] = field(default_factory=dict)
    check: Callable[[], None] | None = field(default=None, repr=False)
    places: Array | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "logits", Logits.of(self.logits))

    def __getstate__(self) -> dict[str, Any]:
        self.verify()
        return {**self.__dict__, "check": None}

    def __len__(self) -> int:
        return self.n_components

    def verify(self) -> None:
        """Check that arrays mapped from a large file are what was written, before all of them are used.

        As :meth:`npeff.Fishers.verify`; ``encode``, ``expand``, ``recover``, ``cosines`` and ``save`` call this.

        Raises:
            StorageError: The file is damaged.
        """
        if self.check is not None:
            self.check()

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
        return self.logits.predicted

    @property
    def zero(self) -> Array:
        """``(n,)`` bool: examples whose Fisher vanished; their coefficients are 0."""
        return np.asarray(self.norms == 0)

    @property
    def compression(self) -> str | None:
        """The compression of the Fishers' rows: ``"topk"``, ``"sketch"``, ``"gram"``, or None for exact rows."""
        options = (self.provenance.get("fishers") or {}).get("options") or {}
        method = (options.get("compress") or {}).get("method")
        return None if method is None else str(method)

    @property
    def digest(self) -> str:
        """The digest of the decomposition: blake2b over the kind, the coefficients and the examples' positions.

        A file of recovered vectors has the digest of the components that they were recovered for.
        """
        W = np.ascontiguousarray(self.coefficients, np.float32)
        digest = hashlib.blake2b(f"{self.kind} {W.shape}".encode(), digest_size=16)
        digest.update(W.data)
        digest.update(np.ascontiguousarray(self.ids, np.int64).data)
        return digest.hexdigest()

    @property
    def not_recovered(self) -> list[int]:
        """Components whose vectors in parameter space are not known: those of sketches, or of inner products alone."""
        if self.compression not in ("sketch", "gram"):
            return []
        known = {j for found in (self.recovered, self.factored) if found is not None for j in found.tolist()}
        return [j for j in range(self.n_components) if j not in known]

    def check_recovered(self, js: Sequence[int]) -> None:
        """Check that some components' vectors in parameter space are known.

        Args:
            js: The components in question.

        Raises:
            ArgumentError: Some are not; the message says how they are recovered.
        """
        unknown = set(self.not_recovered)
        if not (missing := [j for j in dict.fromkeys(js) if j in unknown]):
            return
        kept = "sketches of rows" if self.compression == "sketch" else "inner products of rows"
        named = ",".join(map(str, missing[:8])) + (",…" if len(missing) > 8 else "")
        few = len(missing) < self.n_components
        raise ArgumentError(
            f"component{'s' if len(missing) > 1 else ''} {named}: the vector in parameter space is not known, because "
            f"the Fishers were kept as {kept}. One pass over the data recovers it: on the command line with npeff "
            f"recover COMPONENTS MODEL DATA{f' --component {named}' if few else ''} --out RECOVERED, in Python with "
            f"components = components.recover(model, data{f', js=[{named}]' if few else ''}); then use "
            "what that gives. Where there are arguments model= and data= (npeff export: --model and --data), give "
            "them: what is needed is then recovered on the way"
        )

    def _component(self, j: int) -> int:
        whole = isinstance(j, int | np.integer) and not isinstance(j, bool)
        if not whole or not -self.n_components <= j < self.n_components:
            raise ArgumentError(f"j: expected a component below {self.n_components}, got {j!r}")
        return int(j) % self.n_components

    def vector(self, j: int) -> Array:
        """Return component j's pseudo-Fisher vector in parameter space.

        Block weights are undone, so that the vector belongs to the Fisher itself.

        Of a vector that is known as factors alone (:attr:`factored`), that is what the factors hold.

        Returns:
            ``(n_parameters,)`` float32, unit norm; its sign is arbitrary for the low-rank kind, ≥ 0 for the diagonal.

        Raises:
            ArgumentError: ``j`` is not a component, or its vector has to be recovered first (:meth:`recover`, or
                ``npeff recover`` on the command line).
        """
        j = self._component(j)
        if self.compression in ("sketch", "gram"):
            self.check_recovered([j])
            if self.known_as_factors_alone(j):
                vector = assemble(self.parameters, *self.factored_vector(j))
                return np.asarray(vector / np.float32(max(float(np.linalg.norm(vector)), 1e-30)))
            return np.array(self._recovered_row(j))
        entries = self.unweighted(j)
        norm = float(np.linalg.norm(entries))
        vector = np.zeros(self.n_parameters, np.float32)
        vector[slice(None) if self.columns is None else self.columns] = entries / norm if norm else entries
        return vector

    def unweighted(self, js: int | slice = slice(None)) -> Array:
        """Return some of ``vectors``, float64 on the kept columns, with block weights undone; not of unit norm."""
        entries = self.vectors[js].astype(np.float64)
        if self.block_weights is None:
            return entries
        columns = slice(None) if self.columns is None else self.columns
        factor = column_factors(self.parameters, self.block_weights, self.kind)[columns]
        return np.divide(entries, factor, out=np.zeros_like(entries), where=factor > 0)

    def blocks(self, j: int) -> Iterator[tuple[Parameter, Array, Array | None]]:
        """Yield component j's pseudo-Fisher vector, which :meth:`vector` returns whole, parameter by parameter.

        What is known as factors stays factors, and vectors that were recovered whole are not copied.

        Yields:
            The parameter, and its block of the unit vector as a matrix of ``n`` rows: the block itself ``(n, k)`` and
            None, or factors ``(n, r)`` and ``(r, k)`` whose product it is. Float32.

        Raises:
            ArgumentError: As :meth:`vector`.
        """
        j = self._component(j)
        self.check_recovered([j])
        if not self.known_as_factors_alone(j):
            yield from self._stored_blocks(j)
            return
        held = np.float32(self.held_norm(j))
        for parameter, left, right in self._stored_blocks(j):
            yield parameter, left / held, right

    def held_norm(self, j: int) -> float:
        """Return the norm of what is known of component j's unit vector: below 1 where factors alone are known."""
        if not self.known_as_factors_alone(j):
            return 1.0
        return max(squared_norm(self.parameters, *self.factored_vector(j)) ** 0.5, 1e-30)

    def _stored_blocks(self, j: int) -> Iterator[tuple[Parameter, Array, Array | None]]:
        """Yield the blocks of component j's vector; one that is known as factors alone has the norm of these, not 1."""
        rank, vector = None, self._recovered_row(j)
        if self.known_as_factors_alone(j):
            rank, vector = self.factored_vector(j)
        vector = self.vector(j) if vector is None else vector
        for slot in slots(self.parameters, rank):
            if slot.rank is None:
                yield slot.parameter, vector[slot.offset : slot.offset + slot.numel].reshape(slot.size), None
            else:
                yield slot.parameter, *slot.factors(vector)

    def recovered_entries(self, j: int, entries: slice) -> Array:
        """Return neighbouring entries of component j's recovered vector, float32, without making all of them.

        A vector that is known as factors alone has the norm of what the factors hold, not 1.

        Raises:
            ArgumentError: As :meth:`vector`.
        """
        self.check_recovered([j])
        row = self._recovered_row(j)
        return assemble(self.parameters, *self.factored_vector(j), entries) if row is None else row[entries]

    def _recovered_row(self, j: int) -> Array | None:
        """Component j's recovered vector, not copied; None where ``vectors`` has it, or it is known as factors."""
        if self.compression not in ("sketch", "gram") or self.recovered is None or j not in self.recovered:
            return None
        assert self.recovered_vectors is not None
        return np.asarray(self.recovered_vectors[int(np.flatnonzero(self.recovered == j)[0])], np.float32)

    def known_as_factors_alone(self, j: int) -> bool:
        """Say whether component j's vector was recovered as factors, and not as a whole."""
        whole = self.recovered is not None and j in self.recovered
        return not whole and self.factored is not None and j in self.factored

    def factored_vector(self, j: int) -> tuple[int, Array]:
        """Return the rank, and component j's factored vector ``(p,)``, of norm 1 with what the factors lose."""
        assert self.factored is not None and self.factored_vectors is not None and self.rank is not None
        return self.rank, self.factored_vectors[int(np.flatnonzero(self.factored == j)[0])]

    def matrix_factors(self, j: int, rank: int) -> Iterator[MatrixFactors]:
        """Iterate over the best factors of every matrix of component j's vector, of rank ``rank`` or less."""
        for parameter, left, right in self._stored_blocks(j):
            if len(parameter.shape) != 2:
                continue
            if right is None:
                whole = torch.from_numpy(left.astype(np.float64))[None]
                left, right = (factor[0].float().numpy() for factor in truncated(whole, rank))
            yield parameter, left[:, :rank], right[:rank]  # by descending singular value

    def cosines(self) -> Array:
        """Compute the ``(r, r)`` |cos| between the vectors, as factorised."""
        self.verify()
        unit = self.vectors / np.maximum(np.linalg.norm(self.vectors, axis=1, keepdims=True), 1e-30)
        return np.asarray(np.abs(unit @ unit.T))

    def to_arrays(self) -> dict[str, Array]:
        """Return the arrays of the container format by name."""
        arrays = {name: getattr(self, name) for name in ("coefficients", "vectors", "loss_curve")} | example_arrays(
            self
        )
        optional = {name: getattr(self, name) for name in OPTIONAL}
        return arrays | {name: array for name, array in optional.items() if array is not None}

    def meta(self) -> dict[str, Any]:
        """Return everything but the arrays, JSON-able."""
        same = {name: getattr(self, name) for name in ("kind", "block_weights", "loss", "provenance")}
        rank = {} if self.rank is None else {"rank": self.rank}
        return {**same, **rank, "parameters": self.parameters.to_json()}
