"""How a search goes: what it remembers between its units, what it tells, and the curve of its losses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from npeff.decomposition.forms import State
from npeff.short_repr import short_repr


@dataclass(frozen=True)
class Progress:
    """What a callback is told after every iteration.

    Attributes:
        stage: ``"start"``, ``"move"`` or ``"polish"``.
        unit: Number of the start or move within its stage.
        iteration: Iterations done so far, over all stages.
        loss: Relative loss of the factorisation at hand.
        best: Relative loss of the best one so far.
        seconds: Since the search began (or was resumed).
    """

    stage: str
    unit: int
    iteration: int
    loss: float
    best: float
    seconds: float

    __repr__ = short_repr


Callback = Callable[[Progress], Any]


class Stopped(Exception):
    """The callback asked for an end."""


@dataclass
class Memory:
    """All that a search must remember between units.

    Attributes:
        unit: Units finished.
        failures: Moves since the last that helped.
        iteration: Iterations done.
        best: The best factorisation.
        curve: Its losses: those of its start, then of every improvement.
        kept: Moves that helped.
    """

    unit: int = 0
    failures: int = 0
    iteration: int = 0
    best: State | None = None
    curve: list[float] = field(default_factory=list)
    kept: int = 0

    def note(self, curve: list[float]) -> None:
        """Continue the curve by losses on the way to the best state's, which ends it."""
        assert self.best is not None
        self.curve += [loss for loss in curve if loss < self.curve[-1]]
        end_at(self.curve, self.best.loss)


def end_at(curve: list[float], loss: float) -> None:
    """Have a falling curve end at a loss, without what lies below it."""
    while curve and curve[-1] <= loss:
        curve.pop()
    curve.append(loss)


def _note(memory: Memory, curve: list[float]) -> None:
    """Continue the search's curve by losses on the way to the best state's, which ends it."""
    assert memory.best is not None
    memory.curve += [loss for loss in curve if loss < memory.curve[-1]]
    end_at(memory.curve, memory.best.loss)
