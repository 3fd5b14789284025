"""What determines a decomposition besides the data; and the Fishers, checked and scaled as it says."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from npeff.decomposition.choice import Plan, SpaceName, choose_space
from npeff.decomposition.published_algorithm import PublishedOptions
from npeff.errors import ArgumentError, DataError
from npeff.fishers.fishers import Fishers
from npeff.fishers.scaling import BlockWeights, Normalize, ScaledRows, scale
from npeff.models.memory import parse_bytes
from npeff.storage.files import forget

Array = npt.NDArray[Any]
Algorithm = Literal["npeff", "published"]


@dataclass(frozen=True)
class Options:
    """What determines the result, besides the data."""

    n_components: int
    seed: int = 0
    algorithm: Algorithm = "npeff"
    space: SpaceName = "auto"
    starts: int = 3
    moves: int = 40
    patience: int = 15
    max_iterations: int = 500
    tolerance: float = 1e-6
    block_weights: BlockWeights = "energy"
    normalize: Normalize = "stored"
    orthogonality: float | Literal["hard"] = 0.0
    min_nonzero_per_column: int = 1
    dtype: Literal["float32", "float64"] = "float32"
    published: PublishedOptions = field(default_factory=PublishedOptions)
    memory: int | str | None = None

    def __post_init__(self) -> None:
        least = {"n_components": 1, "seed": 0, "starts": 1, "moves": 0, "patience": 1, "max_iterations": 1}
        for name, smallest in (least | {"min_nonzero_per_column": 1}).items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | np.integer) or not smallest <= value < 2**63:
                raise ArgumentError(f"{name}: expected an integer ≥ {smallest}, got {value!r}")
        for name, choices in (("algorithm", ("npeff", "published")), ("dtype", ("float32", "float64"))):
            if getattr(self, name) not in choices:
                raise ArgumentError(f"{name}: expected {' or '.join(map(repr, choices))}, got {getattr(self, name)!r}")
        if not _is_number(self.tolerance):
            raise ArgumentError(f"tolerance: expected a finite number ≥ 0, got {self.tolerance!r}")
        if self.orthogonality != "hard" and not _is_number(self.orthogonality):
            raise ArgumentError(f"orthogonality: expected a finite number ≥ 0 or 'hard', got {self.orthogonality!r}")
        if self.memory is not None:
            parse_bytes(self.memory)
        if not isinstance(self.published, PublishedOptions):
            raise ArgumentError(f"published: expected PublishedOptions, got {self.published!r}")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value >= 0


def checked_and_scaled(
    fishers: Fishers, options: Options, columns: Array | None, device: torch.device, *, block: bool = False
) -> tuple[ScaledRows, Plan]:
    """Check the Fishers, plan the use of memory, and scale them.

    Args:
        fishers: The Fishers.
        options: The options.
        columns: Parameter indices to keep; None: those that hold entries.
        device: Where the products take place.
        block: They are the block of one of several processes: it may lack what all of them together must have, and
            inner products with the rows of others cannot be had.

    Raises:
        DataError: See :func:`decompose`.
        ArgumentError: More components than rows, or a space that does not serve them or does not fit.
    """
    if not isinstance(fishers, Fishers):
        raise ArgumentError(f"fishers: expected Fishers, got {type(fishers).__name__}; open a file with npeff.load")
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
    if not block and options.n_components > fishers.rows.n_rows:
        raise ArgumentError(
            f"n_components: expected at most the {fishers.rows.n_rows} rows of the {len(fishers)} Fishers, "
            f"got {options.n_components}"
        )
    plan = choose_space(
        fishers.rows,
        len(fishers),
        "sparse" if options.algorithm == "published" else options.space,
        options.n_components,
        memory=None if options.memory is None else parse_bytes(options.memory),
        low_rank=fishers.kind == "low_rank" and not block,
        dtype=options.dtype,
        device=device,
        least_per_column=options.min_nonzero_per_column,
    )
    scaled = scale(
        fishers, options.block_weights, options.normalize, columns, options.min_nonzero_per_column,
        stream=plan.stream, part_bytes=plan.part_bytes,
    )  # fmt: skip
    if not block and scaled.rows.n_columns == 0 and fishers.norms.any():
        raise DataError(
            f"fishers: no parameter has {options.min_nonzero_per_column} non-zero entries; lower min_nonzero_per_column"
        )
    if not block and not scaled.fisher_norms.any():
        raise DataError(
            f"fishers: all {len(fishers)} are zero (the model is certain of every example, or every block has "
            "weight 0): nothing to decompose"
        )
    return scaled, plan


def _first_non_finite(values: Array) -> int | None:
    """The first index, along the first dimension, of a value that is not finite; read part by part."""
    step = max(1, (16 << 20) // max(1, values.itemsize * math.prod(values.shape[1:])))
    for start in range(0, len(values), step):
        finite = np.isfinite(values[start : start + step])
        forget(values)
        if not finite.all():
            return start + int(np.argwhere(~finite)[0][0])
    return None
