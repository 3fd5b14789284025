"""The options of a decomposition, and what its callback is told."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from npeff.decomposition.space_choice import SpaceName
from npeff.errors import ArgumentError
from npeff.fishers.block_weights import BlockWeights
from npeff.fishers.scaling import Normalize
from npeff.models.memory import parse_bytes
from npeff.short_repr import short_repr

Array = npt.NDArray[Any]
Algorithm = Literal["npeff", "published"]

WITHOUT_EFFECT = ("init", "checkpoint", "callback", "progress", "device")
"""Options that a record of the result leaves out: they say where and how to compute, or are arrays."""


@dataclass(frozen=True)
class Progress:
    """What a callback is told after every iteration.

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
        if not (self.learning_rate > 0 and math.isfinite(self.learning_rate)):
            raise ArgumentError(f"learning_rate: expected a positive number, got {self.learning_rate}")
        for name, least in (("g_only", 0), ("joint", 0), ("log_every", 1)):
            if getattr(self, name) < least:
                raise ArgumentError(f"{name}: expected at least {least}, got {getattr(self, name)}")


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
        if not isinstance(self.published, PublishedOptions | None):
            raise ArgumentError(f"published: expected PublishedOptions, got {self.published!r}")
        if self.published is not None and self.algorithm != "published":
            raise ArgumentError("published: these options belong to algorithm='published'")
        if self.callback is not None and not callable(self.callback):
            raise ArgumentError(f"callback: expected a callable, got {type(self.callback).__name__}")
        if self.init is not None and len(self.init) != 2:
            raise ArgumentError("init: expected a pair (W, G)")

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype of the solver's products."""
        return torch.float64 if self.dtype == "float64" else torch.float32

    @property
    def memory_bytes(self) -> int | None:
        """The ceiling of memory in bytes, or None."""
        return None if self.memory is None else parse_bytes(self.memory)

    def record(self) -> dict[str, Any]:
        """The options that determine the result, for provenance and checkpoints."""
        found = {one.name: getattr(self, one.name) for one in fields(self) if one.name not in WITHOUT_EFFECT}
        return {**found, "published": asdict(self.published or PublishedOptions())}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value >= 0
