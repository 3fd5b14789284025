"""How a training goes: its options, the order of the examples and their negatives, and the steps of its optimiser.

All are the same at every repetition. The optimisers change only rows with a gradient, and act on the tables of one
model, or of many models side by side.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from npeff.errors import ArgumentError

Array = npt.NDArray[Any]
Rows = Any  # an integer, or different integers
Optimizer = Literal["sgd", "adagrad", "adam"]

_CHUNK = 1 << 22  # random keys at a time


@dataclass(frozen=True)
class Recipe:
    """Training at batch size 1 on the softmax over an example's answer and its negatives.

    The loss of example d = (c, a) with negatives N is ``−log(exp s(c, a) / Σ_{a' ∈ {a} ∪ N} exp s(c, a'))``. Order and
    negatives depend on ``seed``, the epoch and the number of examples alone: a training that leaves examples out
    keeps those of the others.

    Attributes:
        epochs: Passes over the examples.
        negatives: Different answers drawn per step, other than the example's own; all others where there are no more.
        learning_rate: Of the optimiser.
        optimizer: ``"sgd"``; ``"adagrad"``; ``"adam"``, in the form that changes only rows with a gradient
            (``torch.optim.SparseAdam``).
        seed: Decides order and negatives.
    """

    epochs: int = 10
    negatives: int = 13
    learning_rate: float = 0.1
    optimizer: Optimizer = "sgd"
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("epochs", 1), ("negatives", 1), ("seed", 0)):
            value = getattr(self, name)
            if not isinstance(value, int | np.integer) or value < least:
                raise ArgumentError(f"{name}: expected a number ≥ {least}, got {value!r}")
        if not 0 < self.learning_rate < float("inf"):
            raise ArgumentError(f"learning_rate: expected a finite number > 0, got {self.learning_rate!r}")
        if self.optimizer not in get_args(Optimizer):
            known = ", ".join(map(repr, get_args(Optimizer)))
            raise ArgumentError(
                f"optimizer: expected one of {known}, got {self.optimizer!r}; RollbackRecorder records any torch "
                "optimiser"
            )

    def schedule(self, epoch: int, answers: Array, n_answers: int) -> tuple[Array, Array]:
        """One epoch.

        Args:
            epoch: From 0.
            answers: ``(n,)`` the answer of every example.
            n_answers: Rows of the answers' table.

        Returns:
            The order ``(n,)``, and for example d (not step d) the candidates ``(n, 1 + N)``: its answer, then its
            negatives, all different.
        """
        rng = np.random.default_rng([self.seed, epoch])
        order = rng.permutation(len(answers))
        others = _distinct(rng, len(answers), min(self.negatives, n_answers - 1), n_answers - 1)
        others += others >= answers[:, None]  # skip the answer
        return order, np.concatenate([answers[:, None], others], axis=1)


def _distinct(rng: np.random.Generator, n: int, k: int, size: int) -> Array:
    """``(n, k)`` int64: rows of k different numbers below ``size``, uniform."""
    if k == size:
        return np.tile(np.arange(size), (n, 1))
    if k * k > size:  # collisions are likely: take the smallest of random keys
        rows = max(1, _CHUNK // size)
        parts = [
            np.argpartition(rng.random((min(rows, n - start), size)), k - 1, axis=1)[:, :k]
            for start in range(0, n, rows)
        ]
        return np.concatenate(parts) if parts else np.empty((0, k), np.int64)
    drawn = rng.integers(size, size=(n, k))
    while True:
        ordered = np.sort(drawn, axis=1)
        again = np.flatnonzero((ordered[:, 1:] == ordered[:, :-1]).any(axis=1))
        if not len(again):
            return drawn
        drawn[again] = rng.integers(size, size=(len(again), k))


class StepRule(ABC):
    """How an optimiser changes rows, given their gradients.

    Args:
        tables: ``(rows, width)``, or ``(rows, width, R)`` for R models side by side; for their shapes.
        learning_rate: η.
    """

    def __init__(self, tables: Mapping[str, Array], learning_rate: float) -> None:
        self._rate = learning_rate
        self._active: Array | None = None

    def begin(self, active: Array | None) -> None:
        """Begin a step, which changes rows of every table.

        Args:
            active: ``(R,)`` bool, the models that take the step; None for all.
        """
        self._active = active

    @abstractmethod
    def update(self, table: str, rows: Rows, gradient: Array) -> Array:
        """The change of a row, or of several different rows, of a table; the shape of ``gradient``.

        Args:
            table: Its name.
            rows: One row, or k rows, that have no update in this step yet.
            gradient: ``(width,)`` or ``(k, width)``; with R models a last axis of R.
        """


class SGD(StepRule):
    """``−η g``, as ``torch.optim.SGD``."""

    def update(self, table: str, rows: Rows, gradient: Array) -> Array:
        """See :class:`StepRule`."""
        change = -self._rate * gradient
        return change if self._active is None else change * self._active


class Adagrad(StepRule):
    """``S += g²; −η g / (√S + 1e-10)``, as ``torch.optim.Adagrad``."""

    def __init__(self, tables: Mapping[str, Array], learning_rate: float) -> None:
        super().__init__(tables, learning_rate)
        self._sums = {name: np.zeros_like(table) for name, table in tables.items()}

    def update(self, table: str, rows: Rows, gradient: Array) -> Array:
        """See :class:`StepRule`."""
        if self._active is not None:
            gradient = gradient * self._active
        sums = self._sums[table][rows] + gradient * gradient
        self._sums[table][rows] = sums
        return np.asarray(-self._rate * gradient / (np.sqrt(sums) + 1e-10))


class Adam(StepRule):
    """Adam whose averages of a row do not change while it has no gradient, as ``torch.optim.SparseAdam``.

    ``m += (1−β₁)(g−m); v += (1−β₂)(g²−v); −η √(1−β₂ᵗ)/(1−β₁ᵗ) · m/(√v + ε)``; t counts the steps.
    """

    BETAS, EPSILON = (0.9, 0.999), 1e-8

    def __init__(self, tables: Mapping[str, Array], learning_rate: float) -> None:
        super().__init__(tables, learning_rate)
        self._means = {name: np.zeros_like(table) for name, table in tables.items()}
        self._squares = {name: np.zeros_like(table) for name, table in tables.items()}
        self._steps = np.zeros(next(iter(tables.values())).shape[2:])  # per model

    def begin(self, active: Array | None) -> None:
        """See :class:`StepRule`."""
        super().begin(active)
        self._steps = self._steps + (1 if active is None else active)
        b1, b2 = self.BETAS
        t = np.maximum(self._steps, 1)
        self._size = self._rate * np.sqrt(1 - b2**t) / (1 - b1**t)

    def update(self, table: str, rows: Rows, gradient: Array) -> Array:
        """See :class:`StepRule`."""
        (b1, b2), active = self.BETAS, self._active
        mean, square = self._means[table][rows], self._squares[table][rows]
        new_mean = mean + (1 - b1) * (gradient - mean)
        new_square = square + (1 - b2) * (gradient * gradient - square)
        change = -self._size.astype(gradient.dtype) * new_mean / (np.sqrt(new_square) + self.EPSILON)
        if active is not None:
            new_mean, new_square = np.where(active, new_mean, mean), np.where(active, new_square, square)
            change = change * active
        self._means[table][rows], self._squares[table][rows] = new_mean, new_square
        return np.asarray(change)


STEP_RULES: dict[str, type[StepRule]] = {"sgd": SGD, "adagrad": Adagrad, "adam": Adam}
"""By the name of the optimiser in recipes."""
