"""The recipe of a training: its options, the order of the examples and their negatives, the steps of its optimiser.

All are the same at every repetition. The optimisers change only rows with a gradient, and act on the tables of one
model, or of many models side by side.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
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
        """Draw one epoch.

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
    """Draw ``(n, k)`` int64: rows of k different numbers below ``size``, uniform."""
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


def _sgd(gradient: Array, rate: float, step: Array) -> tuple[Array, ...]:
    """Take a step of ``−η g``, as ``torch.optim.SGD``."""
    return (-rate * gradient,)


def _adagrad(gradient: Array, rate: float, step: Array, sums: Array) -> tuple[Array, ...]:
    """Take a step of ``−η g / (√S + 1e-10)`` after ``S += g²``, as ``torch.optim.Adagrad``."""
    sums = sums + gradient * gradient
    return -rate * gradient / (np.sqrt(sums) + 1e-10), sums


def _adam(gradient: Array, rate: float, step: Array, mean: Array, square: Array) -> tuple[Array, ...]:
    """Take a step of ``−η √(1−β₂ᵗ)/(1−β₁ᵗ) · m/(√v + ε)``, as ``torch.optim.SparseAdam``.

    Before it ``m += (1−β₁)(g−m)`` and ``v += (1−β₂)(g²−v)``; t counts the steps.
    """
    b1, b2, epsilon = 0.9, 0.999, 1e-8
    t = np.maximum(step, 1)
    size = (rate * np.sqrt(1 - b2**t) / (1 - b1**t)).astype(gradient.dtype)
    mean = mean + (1 - b1) * (gradient - mean)
    square = square + (1 - b2) * (gradient * gradient - square)
    return -size * mean / (np.sqrt(square) + epsilon), mean, square


_RULES: dict[str, tuple[int, Callable[..., tuple[Array, ...]]]] = {
    "sgd": (0, _sgd),
    "adagrad": (1, _adagrad),
    "adam": (2, _adam),
}
"""By optimiser: the number of its averages, and its function from a gradient and them to a change and new averages."""


class RowOptimizer:
    """The steps of an optimiser that changes only rows with a gradient.

    Args:
        name: ``"sgd"``, ``"adagrad"`` or ``"adam"``.
        tables: ``(rows, width)``, or ``(rows, width, R)`` for R models side by side; for their shapes.
        learning_rate: η.
    """

    def __init__(self, name: Optimizer, tables: Mapping[str, Array], learning_rate: float) -> None:
        n_averages, self._rule = _RULES[name]
        self._rate = learning_rate
        self._averages = {name: [np.zeros_like(table) for _ in range(n_averages)] for name, table in tables.items()}
        self._step = np.zeros(next(iter(tables.values())).shape[2:])  # per model
        self._active: Array | None = None

    def begin(self, active: Array | None) -> None:
        """Begin a step, which changes rows of every table.

        Args:
            active: ``(R,)`` bool, the models that take the step; None for all.
        """
        self._active = active
        self._step = self._step + (1 if active is None else active)

    def update(self, table: str, rows: Rows, gradient: Array) -> Array:
        """Compute the change of one or several different rows of a table; the shape of ``gradient``.

        Args:
            table: Its name.
            rows: One row, or k rows, that have no update in this step yet.
            gradient: ``(width,)`` or ``(k, width)``; with R models a last axis of R.
        """
        averages = self._averages[table]
        change, *after = self._rule(gradient, self._rate, self._step, *[average[rows] for average in averages])
        if self._active is not None:
            change = change * self._active
            after = [np.where(self._active, new, old[rows]) for new, old in zip(after, averages, strict=True)]
        for index, values in enumerate(after):
            averages[index][rows] = values
        return change
