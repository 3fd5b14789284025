"""A decomposition to be solved: the Fishers checked and scaled, a space over them, and the objective."""

from __future__ import annotations

import hashlib
import json
import math
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from npeff.decomposition.kinds import Diagonal, LowRank
from npeff.decomposition.objective import State
from npeff.decomposition.options import DecomposeOptions, SpaceChoice, choose_space
from npeff.decomposition.processes import LOCAL, Processes
from npeff.decomposition.spaces import FactorSpace, GramSpace, RowSpace
from npeff.errors import ArgumentError, DataError
from npeff.fishers.file_format import example_arrays, example_fields
from npeff.fishers.fishers import Fishers
from npeff.fishers.scaling import ScaledRows, resolve_block_weights, scale
from npeff.models.devices import usable_device
from npeff.storage.files import forget

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Problem:
    """One decomposition to be solved.

    Attributes:
        fishers: The Fishers of all processes.
        own: The block of this process; with one process, ``fishers``.
        scaled: The rows of ``own`` as they are factorised.
        options: The options.
        objective: The objective, over a space.
        choice: The space that was chosen, and why.
        seconds: Time that building the space took.
        given: Arrays that the search starts from, or keeps: those of ``init``, frozen vectors and coefficients.
    """

    fishers: Fishers
    own: Fishers
    scaled: ScaledRows
    options: DecomposeOptions
    objective: LowRank | Diagonal
    choice: SpaceChoice
    seconds: float
    given: Sequence[Array] = ()

    def initial_state(self) -> State | None:
        """Make the state from which ``init`` asks to descend; None without ``init``."""
        if self.options.init is None:
            return None
        W, G = self.options.init
        kept = G[:, slice(None) if self.scaled.columns is None else self.scaled.columns]
        coords = self.objective.space.embed(torch.from_numpy(kept.copy()))
        return self.objective.from_vectors(coords, torch.from_numpy(W.copy()))

    def digest(self) -> str:
        """Identify the data, and what was given beside them.

        The data by the rows; where processes share them, by everything but the rows.
        """
        if self.objective.comm.size > 1:
            return _digest_without_rows(self.fishers)
        return _digest("", [self.scaled.row_offsets, *self.scaled.rows.deciding(), *self.given])

    def row_weights(self, state: State, norms: torch.Tensor) -> Array | None:
        """Express the unit vectors as combinations of the stored rows, ``(n_rows, r)``, for the rows of this process.

        Over K these are the coordinates. Elsewhere they follow from stationarity, ``G = M⁻¹ (W∘P)ᵀ A`` with
        ``M = WᵀW ∘ Q``.

        Args:
            state: The factorisation.
            norms: ``(r,)`` norms of its vectors, which are divided out.

        Returns:
            None where the rows are in parameter space, so that the vectors say everything, or some vectors are frozen.
        """
        if self.own.in_parameter_space or state.frozen:
            return None
        objective = self.objective
        assert isinstance(objective, LowRank)
        if isinstance(objective.space, GramSpace):
            weights = state.coords[:, : objective.space.n_rows].T.double()
        else:
            M = objective.comm.sum(state.W.T @ state.W).double() * state.Q.double()
            ridge = 1e-9 * M.diagonal().mean().clamp_min(1e-30) * torch.eye(len(M), dtype=M.dtype, device=M.device)
            weights = objective.spread(state.W, state.P).double() @ torch.linalg.inv(M + ridge)
        weights = weights.cpu() / norms
        return np.asarray(weights.numpy() * self.scaled.row_factors[:, None], np.float32)


def _digest(text: str, arrays: list[Array]) -> str:
    digest = hashlib.blake2b(text.encode(), digest_size=16)
    for array in arrays:
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def _digest_without_rows(fishers: Fishers) -> str:
    text = json.dumps(fishers.provenance, sort_keys=True, default=str)
    return _digest(text, [fishers.row_offsets, fishers.ids, fishers.norms, *fishers.logits.arrays().values()])


def prepare(
    fishers: Fishers,
    options: DecomposeOptions,
    comm: Processes = LOCAL,
    *,
    columns: Array | None = None,
    frozen: Array | None = None,
    frozen_W: Array | None = None,
) -> Problem:
    """Check and scale the Fishers, and build the objective over the space that the options ask for.

    Args:
        fishers: The Fishers; every process gives all of them, and takes its block.
        options: The options.
        comm: The processes.
        columns: Parameter indices to keep; None: those that hold entries.
        frozen: ``(f, n_parameters)`` float32 vectors that stay as they are.
        frozen_W: ``(n, f)`` coefficients of the frozen vectors to keep as well, or None to fit them.

    Raises:
        ArgumentError: An option is out of range for these Fishers, or does not go with several processes.
        DataError: There are no examples, every Fisher is zero, or a stored value is not finite.
    """
    if not isinstance(fishers, Fishers):
        raise ArgumentError(f"fishers: expected Fishers, got {type(fishers).__name__}; open a file with npeff.load")
    device = comm.together(lambda: usable_device(options.device))
    if comm.size > 1:
        own, scaled, choice = _scaled_block(fishers, options, comm, device)
    else:
        own, n_frozen = fishers, 0 if frozen is None else len(frozen)
        scaled, choice = _checked_and_scaled(fishers, options, columns, device, n_frozen=n_frozen)
    if options.init is not None:
        _check_init(*options.init, fishers, options.n_components)
        if choice.space == "gram":
            choice = replace(choice, space="rows", reason="given vectors need not lie in the row space")
    low_rank = fishers.kind == "low_rank"
    if options.orthogonality and not low_rank:
        raise ArgumentError("orthogonality: only for the low-rank kind; leave it at 0 for diagonal Fishers")
    anchors = None
    if frozen is not None:
        anchors = torch.from_numpy(frozen if scaled.columns is None else frozen[:, scaled.columns])
    began = time.perf_counter()
    space: FactorSpace
    if choice.space == "gram" and low_rank:
        space = GramSpace(scaled.rows, anchors, options.torch_dtype, device, choice.part_bytes)
    else:
        space = RowSpace(scaled.rows, options.torch_dtype, device, comm, stream=choice.stream)
    kept = None if anchors is None else space.embed(anchors)
    kept_W = None if frozen_W is None else torch.from_numpy(frozen_W)
    if low_rank:
        objective: LowRank | Diagonal = LowRank(space, scaled, options.orthogonality, kept, kept_W)
    else:
        objective = Diagonal(space, scaled, kept, kept_W)
    given = [*(options.init or ()), *(array for array in (frozen, frozen_W) if array is not None)]
    return Problem(fishers, own, scaled, options, objective, choice, time.perf_counter() - began, given)


def _check_init(W: Array, G: Array, fishers: Fishers, r: int) -> None:
    """Check given coefficients ``(n, r)`` and vectors ``(r, n_parameters)``.

    Raises:
        ArgumentError: A shape is wrong, or a value; or the Fishers have no rows.
    """
    for name, array, shape in (("W", W, (len(fishers), r)), ("G", G, (r, fishers.rows.n_columns))):
        if np.shape(array) != shape:
            raise ArgumentError(f"init: expected {name} of shape {shape}, got {np.shape(array)}")
        if not np.isfinite(array).all():
            raise ArgumentError(f"init: expected finite values, got some in {name} that are not")
    if np.min(W) < 0 or not np.any(G, axis=1).all():
        raise ArgumentError("init: expected W ≥ 0 and no vector of G that is all zero")
    if fishers.rows.products_only:
        raise ArgumentError("init: Fishers of inner products alone (GramOnly) cannot take given vectors")


# ---- checking and scaling ----------------------------------------------------------------------------------


def _checked_and_scaled(
    fishers: Fishers,
    options: DecomposeOptions,
    columns: Array | None,
    device: torch.device,
    *,
    n_frozen: int = 0,
    block: bool = False,
) -> tuple[ScaledRows, SpaceChoice]:
    """Check the Fishers, choose the space, and scale the rows.

    With ``block``, they are one of several processes' block: the block may lack what all blocks together must have,
    and inner products with the rows of others cannot be had.

    Raises:
        ArgumentError: There are more components than rows, or the space does not serve the Fishers or does not fit.
        DataError: There is nothing to decompose, or a stored value is not finite.
    """
    if len(fishers) == 0:
        raise DataError("fishers: there are no examples to decompose")
    fishers.verify()
    bad = _first_non_finite(fishers.rows.values)
    if bad is not None:
        rows = fishers.rows
        row = int(np.searchsorted(rows.starts(np.arange(rows.n_rows + 1)), bad, "right")) - 1
        example = int(np.searchsorted(fishers.row_offsets, row, "right")) - 1
        raise DataError(
            f"fishers: example {example} (id {fishers.ids[example]}) has a value that is not finite; compute "
            "its Fisher again"
        )
    if not block:
        _check_number(fishers, options, n_frozen)
    choice = choose_space(
        fishers.rows,
        len(fishers),
        "rows" if options.algorithm == "published" and options.space == "auto" else options.space,
        options.n_components,
        memory=options.memory_bytes,
        low_rank=fishers.kind == "low_rank" and not block,
        dtype=options.dtype,
        device=device,
        least_per_column=options.min_nonzero_per_column,
    )
    scaled = scale(
        fishers, options.block_weights, options.normalize, columns, options.min_nonzero_per_column,
        stream=choice.stream, part_bytes=choice.part_bytes,
    )  # fmt: skip
    if not block and scaled.rows.n_columns == 0 and fishers.norms.any():
        raise DataError(_no_columns(options))
    if not block and not scaled.fisher_norms.any():
        raise DataError(
            f"fishers: all {len(fishers)} are zero (the model is certain of every example, or every block has "
            "weight 0): nothing to decompose"
        )
    return scaled, choice


def _check_number(fishers: Fishers, options: DecomposeOptions, n_frozen: int = 0) -> None:
    """Check the number of components that are to be found; warn of more than there are Fishers.

    Raises:
        ArgumentError: There are more of them than rows.
    """
    n, rows = options.n_components - n_frozen, fishers.rows.n_rows
    name, known = "n" if n_frozen else "n_components", int((~fishers.zero).sum())
    if known < n <= rows:
        warnings.warn(
            f"{name}: {n} components of {known} Fishers other than zero: as many components as rows ({rows}) give the "
            "rows themselves, with loss 0. What examples share shows with far fewer components than examples",
            stacklevel=5,
        )
    if n > rows:
        raise ArgumentError(f"{name}: expected at most the {rows} rows of the {len(fishers)} Fishers, got {n}")


def _no_columns(options: DecomposeOptions) -> str:
    return f"fishers: no parameter has {options.min_nonzero_per_column} non-zero entries; lower min_nonzero_per_column"


def _first_non_finite(values: Array) -> int | None:
    """Find the first index, along the first dimension, of a value that is not finite; reads part by part."""
    step = max(1, (16 << 20) // max(1, values.itemsize * math.prod(values.shape[1:])))
    for start in range(0, len(values), step):
        finite = np.isfinite(values[start : start + step])
        forget(values)
        if not finite.all():
            return start + int(np.argwhere(~finite)[0][0])
    return None


# ---- blocks of several processes ---------------------------------------------------------------------------


def _scaled_block(
    fishers: Fishers, options: DecomposeOptions, comm: Processes, device: torch.device
) -> tuple[Fishers, ScaledRows, SpaceChoice]:
    """Take this process's block of examples, and scale it as one process would scale it.

    Raises:
        ArgumentError: An option does not go with several processes, or there are more components than rows.
        DataError: There is nothing to decompose.
    """
    if options.algorithm != "npeff" or options.space == "gram":
        what = "algorithm: the published algorithm" if options.algorithm != "npeff" else "space: 'gram'"
        raise ArgumentError(f"{what} cannot be shared out among processes; use one, or leave the option out")
    _check_same(fishers, options, comm)
    _check_number(fishers, options)
    cuts = block_edges(fishers, comm.size)
    own = _block(fishers, cuts[comm.rank], cuts[comm.rank + 1])
    # Read by process 0 alone: the energies are sums over all rows, and the same bits must reach every process.
    weights = comm.objects(
        comm.together(lambda: resolve_block_weights(fishers, options.block_weights) if comm.rank == 0 else None)
    )[0]
    columns = None
    if (found := own.rows.column_counts()) is not None:
        counts = torch.zeros(own.rows.n_columns, dtype=torch.int64)
        counts[: len(found)] = torch.from_numpy(found)
        columns = (comm.sum(counts) >= max(1, options.min_nonzero_per_column)).nonzero()[:, 0].numpy()
        if not len(columns):
            raise DataError(_no_columns(options))
    resolved = replace(options, block_weights="energy" if weights is None else weights)
    scaled, choice = comm.together(lambda: _checked_and_scaled(own, resolved, columns, device, block=True))
    if not comm.number(float(np.abs(scaled.fisher_norms).sum())):
        raise DataError(f"fishers: all {len(fishers)} are zero: nothing to decompose")
    choice = replace(choice, reason=f"{comm.size} processes hold a block of rows each")
    return own, replace(scaled, block_weights=weights), choice


def _check_same(fishers: Fishers, options: DecomposeOptions, comm: Processes) -> None:
    """Compare the options and the Fishers of all processes; the memory may differ.

    Raises:
        ArgumentError: An option differs.
        DataError: The Fishers differ.
    """
    told = comm.objects(({**options.record(), "memory": None}, _digest_without_rows(fishers)))
    first, digest = told[0]
    for rank, (theirs, other) in enumerate(told):
        for name in first:
            if theirs[name] != first[name]:
                raise ArgumentError(
                    f"{name}: rank {rank} was given {theirs[name]!r}, and rank 0 {first[name]!r}; give every process "
                    "the same options"
                )
        if other != digest:
            raise DataError(f"fishers: rank {rank} has other Fishers than rank 0; open the same file in every process")


def block_edges(fishers: Fishers, size: int) -> list[int]:
    """Cut the examples into blocks of about as many entries: ``size + 1`` ascending example numbers.

    Raises:
        ArgumentError: There are fewer examples than processes.
    """
    n = len(fishers)
    if n < size:
        raise ArgumentError(f"distributed: {size} processes cannot share {n} examples; start fewer")
    rows = np.asarray(fishers.row_offsets)
    at = fishers.rows.starts(rows)
    cuts = [0]
    for k in range(1, size):
        cut = int(np.searchsorted(at, at[-1] * k / size))
        cuts.append(min(max(cut, cuts[-1] + 1), n - size + k))
    return [*cuts, n]


def _block(fishers: Fishers, start: int, stop: int) -> Fishers:
    """Take examples ``start … stop − 1``; rows that are mapped from a file stay mapped.

    Raises:
        ArgumentError: There are inner products alone.
    """
    first, last = int(fishers.row_offsets[start]), int(fishers.row_offsets[stop])
    if fishers.rows.products_only:
        raise ArgumentError(
            "fishers: inner products alone (GramOnly) cannot be shared out; decompose them in one process, or compute "
            "Fishers with TopK(k) or Sketch(d)"
        )
    part = fishers.rows.part(first, last)
    fields = example_fields(example_arrays(fishers), slice(start, stop))
    if fishers.check is not None:  # every process checks its own rows
        fishers.check(part)
    offsets = np.asarray(fishers.row_offsets[start : stop + 1]) - first
    return replace(fishers, rows=part, row_offsets=offsets, path=None, check=None, **fields)
