"""The options of a decomposition, the progress that its callback receives, and the choice of the space.

``space="auto"`` takes the space that needs least time among those that fit into memory.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import torch

from npeff.decomposition.subspace import DIMENSIONS
from npeff.errors import ArgumentError, check_choice, check_integers, check_number
from npeff.fishers.block_weights import BlockWeights
from npeff.fishers.dense_rows import PART_BYTES
from npeff.fishers.rows import Rows
from npeff.fishers.scaling import DEVICE_PART_BYTES, Normalize
from npeff.kernels.sparse import DENSE_BYTES
from npeff.models import devices
from npeff.models.devices import available_bytes, format_bytes, parse_bytes
from npeff.short_repr import short_repr

Array = npt.NDArray[Any]
Algorithm = Literal["npeff", "published"]
SpaceName = Literal["auto", "gram", "rows", "streamed"]

WITHOUT_EFFECT = ("init", "checkpoint", "callback", "progress", "device")
"""Options that a record of the result leaves out: they say where and how to compute, or are arrays."""

GRAM_BYTES = 4 << 30
"""Largest K that ``space="auto"`` builds."""

DENSE_RATE, SPARSE_RATE, SCATTER_RATE = 100e9, 10e9, 5e9
"""Operations per second of dense products, of sparse times dense, and of sparse Gram matrices: ratios matter."""

POLISH_STEPS = 12
"""Steps over all rows, two products each, assumed for a polish: three rounds that widen the subspace."""

COLUMN_BYTES = 20
"""Bytes per stored column of sparse rows: how often it occurs, where it went, its factor."""

LEAST_PART = 1 << 20
"""Bytes of rows below which reading by parts makes no sense."""


@dataclass(frozen=True)
class Progress:
    """The progress that a callback receives after every iteration.

    Attributes:
        stage: ``"start"``, ``"replacement"``, ``"polish"``, or ``"published"``.
        unit: Number of the start or replacement within its stage.
        iteration: Iterations done so far, over all stages.
        loss: Relative loss of the present factorisation.
        best: Relative loss of the best factorisation so far.
        seconds: Time since the search began or was resumed.
    """

    stage: str
    unit: int
    iteration: int
    loss: float
    best: float
    seconds: float

    __repr__ = short_repr


Callback = Callable[[Progress], Any]


@dataclass(frozen=True)
class PublishedOptions:
    """Options of the published algorithm.

    Attributes:
        learning_rate: Fixed rate of the gradient steps on G.
        g_only: Steps on G before W moves.
        joint: Steps on both.
        log_every: Iterations between losses in the curve.
    """

    learning_rate: float = 1e-3
    g_only: int = 50
    joint: int = 500
    log_every: int = 10

    def __post_init__(self) -> None:
        check_number("learning_rate", self.learning_rate)
        check_integers(self, {"g_only": 0, "joint": 0, "log_every": 1})


@dataclass(frozen=True)
class DecomposeOptions:
    """The arguments of :func:`npeff.decompose` beside the Fishers, checked. Its docstring says what they mean."""

    n_components: int
    seed: int = 0
    algorithm: Algorithm = "npeff"
    space: SpaceName = "auto"
    n_init: int = 3
    n_replacements: int = 40
    patience: int = 15
    max_iterations: int = 500
    tolerance: float = 1e-6
    block_weights: BlockWeights = "energy"
    normalize: Normalize = "stored"
    orthogonality: float | Literal["hard"] = 0.0
    min_nonzero_per_column: int = 1
    dtype: Literal["float32", "float64"] = "float32"
    published: PublishedOptions | None = None
    init: tuple[Array, Array] | None = None
    checkpoint: str | Path | None = None
    callback: Callback | None = None
    progress: bool = True
    device: str | torch.device = "cpu"
    memory: int | str | None = None

    def __post_init__(self) -> None:
        least = {"n_components": 1, "seed": 0, "n_init": 1, "n_replacements": 0, "patience": 1, "max_iterations": 1}
        check_integers(self, least | {"min_nonzero_per_column": 1})
        if self.seed >= 2**63:
            raise ArgumentError(f"seed: expected an integer below 2⁶³, got {self.seed}")
        check_choice("algorithm", self.algorithm, ("npeff", "published"))
        check_choice("dtype", self.dtype, ("float32", "float64"))
        check_number("tolerance", self.tolerance, zero=True)
        if not isinstance(self.orthogonality, str):
            check_number("orthogonality", self.orthogonality, zero=True)
        elif self.orthogonality != "hard":
            raise ArgumentError(f"orthogonality: expected a finite number ≥ 0 or 'hard', got {self.orthogonality!r}")
        if self.memory is not None:
            parse_bytes(self.memory)
        if not isinstance(self.published, PublishedOptions | None):
            raise ArgumentError(f"published: expected PublishedOptions, got {self.published!r}")
        if self.published is not None and self.algorithm != "published":
            raise ArgumentError("published: these options belong to algorithm='published'")
        if self.callback is not None and not callable(self.callback):
            raise ArgumentError(f"callback: expected a callable, got {type(self.callback).__name__}")
        if self.init is not None:
            object.__setattr__(self, "init", _float32_pair(self.init))
        if self.algorithm == "published":
            for name, unused in (("init", None), ("orthogonality", 0.0), ("checkpoint", None)):
                if getattr(self, name) != unused:
                    raise ArgumentError(f"{name}: the published algorithm has no use for it; leave it out")
            if self.space == "gram":
                raise ArgumentError("space: the published algorithm works on the rows, got 'gram'")

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype of the solver's products."""
        return torch.float64 if self.dtype == "float64" else torch.float32

    @property
    def memory_bytes(self) -> int | None:
        """The ceiling of memory in bytes, or None."""
        return None if self.memory is None else parse_bytes(self.memory)

    def record(self) -> dict[str, Any]:
        """Return the options that determine the result, for provenance and checkpoints."""
        found = {one.name: getattr(self, one.name) for one in fields(self) if one.name not in WITHOUT_EFFECT}
        return {**found, "published": asdict(self.published or PublishedOptions())}


def _float32_pair(init: object) -> tuple[Array, Array]:
    """Make two float32 arrays of what is given as ``init``.

    Raises:
        ArgumentError: It is something else.
    """
    try:
        W, G = (np.asarray(array, np.float32) for array in init)  # type: ignore[attr-defined]
    except (TypeError, ValueError, RuntimeError) as error:
        raise ArgumentError(f"init: expected a pair of arrays (W, G), got {type(init).__name__} ({error})") from error
    return W, G


@dataclass(frozen=True)
class SpaceChoice:
    """The space of a decomposition, and how it uses memory.

    Attributes:
        space: ``"gram"`` (K in memory), ``"rows"`` (the rows in memory) or ``"streamed"`` (rows streamed).
        reason: Why.
        stream: Leave the rows on disk.
        part_bytes: Bytes of stored rows that a pass takes at a time.
        subspace_bytes: Most bytes for a subspace: its basis, and the rows' coordinates in it.
    """

    space: Literal["gram", "rows", "streamed"]
    reason: str
    stream: bool
    part_bytes: int
    subspace_bytes: int


def choose_space(
    rows: Rows,
    n_examples: int,
    choice: SpaceName,
    n_components: int,
    *,
    memory: int | None = None,
    low_rank: bool = True,
    dtype: str = "float32",
    device: torch.device | None = None,
    least_per_column: int = 1,
) -> SpaceChoice:
    """Choose by the operations of each space, at typical rates, and the memory that each takes.

    The spaces serve the search's subspace (about five products with d vectors; over the rows its basis, d vectors of
    their width, is turned once) and the polish (two products with r vectors a step; over K one). K has to be built
    first.

    Args:
        rows: The rows as stored.
        n_examples: Their examples.
        choice: The space that the user named, or ``"auto"``.
        n_components: r.
        memory: Ceiling in bytes. None: the memory of the machine or of the device; a space that the user named is
            then taken even if it exceeds this, but ``"rows"`` that exceed a CUDA device's memory are streamed to it.
        low_rank: Whether K would do in place of the rows.
        dtype: Of the solver's products.
        device: Where the products take place; None: the processor.
        least_per_column: Columns with fewer entries are dropped.

    Raises:
        ArgumentError: ``choice`` is unknown, cannot serve these rows, or does not fit under the ceiling.
    """
    check_choice("space", choice, get_args(SpaceName))
    if rows.products_only and choice not in ("auto", "gram"):
        raise ArgumentError(
            f"space: Fishers of inner products alone (GramOnly) have no rows for {choice!r}; use 'gram', or compute "
            "Fishers with rows"
        )
    number = 8 if dtype == "float64" else 4
    r, R, width = n_components + n_components // 2 + 8, rows.n_rows, rows.n_columns
    counts = rows.column_counts(PART_BYTES if memory is None else max(LEAST_PART, min(PART_BYTES, memory // 8)))
    if counts is not None:
        counts = counts[counts >= max(1, least_per_column)].astype(np.float64)
        width = len(counts)
    state = number * r * (6 * R + 6 * n_examples)  # P, its change, W∘P, W and copies of them
    if counts is not None:
        state += COLUMN_BYTES * rows.n_columns
    coords = 5 * number * n_components * width
    gram = number * R * R
    held = rows.nbytes if rows.products_only else rows.nbytes * (number // 4) * (2 if counts is not None else 1)
    there = device is not None and devices.has_own_memory(device)
    ceiling = memory if memory is not None else available_bytes(device) * 4 // 5

    # To build K, sparse rows are scaled, their columns sorted by how many rows share them, and some of them made dense.
    for_gram = 2 * rows.nbytes + DENSE_BYTES if counts is not None and not there else 0

    dimensions = max(DIMENSIONS, 4 * n_components)
    basis = 2 * number * dimensions * width if low_rank else 0

    def fits(*needs: int) -> bool:
        return state + sum(needs) <= ceiling

    def chosen(space: Literal["gram", "rows", "streamed"], reason: str) -> SpaceChoice:
        taken = {"gram": gram + for_gram, "rows": held + coords, "streamed": coords}[space]
        held_for_gram = 0 if there else rows.nbytes  # rows come to a device by blocks
        stream = space == "streamed" or (space == "gram" and counts is None and not fits(gram, held_for_gram))
        left = ceiling - state - taken
        if memory is not None and left < 4 * LEAST_PART:
            raise ArgumentError(
                f"memory: {format_bytes(memory)} does not hold what {n_components} components of {R:,} rows need in "
                f"the space {space!r}, {format_bytes(state + taken + 4 * LEAST_PART)}; allow so much, or fewer "
                "components" + ("" if space == "streamed" else ", or space='streamed'")
            )
        part = int(min(DEVICE_PART_BYTES if there else PART_BYTES, max(LEAST_PART, left // 6)))
        return SpaceChoice(space, reason, stream and not rows.products_only, part, max(0, left // 2))

    if rows.products_only:
        return chosen("gram", "inner products are all there is")
    # Coordinates are as long wherever the rows are; a search without its subspace is possible, but slow.
    rows_fit = fits(held, coords) or (memory is None and fits(held))
    if choice == "rows" and there and not rows_fit:
        return chosen("streamed", f"asked for the rows, and {_exceeds(held)}: they are streamed")
    if choice != "auto":
        return chosen(choice, "asked for")
    if not low_rank:
        what = "the diagonal kind always works on the rows"
        return (
            chosen("rows", what) if rows_fit else chosen("streamed", f"{what}, and they stay on disk: {_exceeds(held)}")
        )
    gram_fits = gram <= GRAM_BYTES and fits(gram + gram // 4) and fits(gram, for_gram)
    if not gram_fits:
        why = f"K of {R:,} rows would take {gram / 2**30:.1f} GiB"
        return chosen("rows", why) if rows_fit else chosen("streamed", f"{why}, and {_exceeds(held)}")
    products = 5 * dimensions + 2 * POLISH_STEPS * n_components
    if counts is not None:
        building = min(np.square(counts).sum() / SCATTER_RATE, R**2 * width / DENSE_RATE)
        over_rows = counts.sum() * 2 * products / SPARSE_RATE
    else:
        building = R**2 * width / DENSE_RATE
        over_rows = 2 * R * width * products / DENSE_RATE
    over_rows += 4 * width * dimensions**2 / DENSE_RATE
    over_gram = building + 2 * R**2 * products / DENSE_RATE
    if not rows_fit:
        return chosen("gram", f"{_exceeds(held)}, and K of {R:,} rows does not")
    if not fits(held, coords, basis):
        what = f"a basis of {dimensions} directions over {width:,} columns"
        return chosen("gram", f"{what} would exceed the memory allowed, and K of {R:,} rows does not")
    found = f"estimated {over_gram:.2g} s over K of {R:,} rows, {over_rows:.2g} s over the rows themselves"
    return chosen("gram" if over_gram < over_rows else "rows", found)


def _exceeds(held: int) -> str:
    return f"the rows, {format_bytes(held)}, exceed the memory allowed"
