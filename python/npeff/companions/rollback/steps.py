"""Optimisers that move only rows with a gradient, on tables of one model or of many side by side."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Rows = Any  # an integer, or different integers


class Rule(ABC):
    """How rows move, given their gradients. Called once per table and set of rows within a step.

    Args:
        tables: ``(rows, width)`` or ``(rows, width, R)``, for their shapes.
        learning_rate: η.
    """

    def __init__(self, tables: Mapping[str, Array], learning_rate: float) -> None:
        self._rate = learning_rate
        self._alive: Array | None = None

    def begin(self, alive: Array | None) -> None:
        """Begin a step. ``alive``: ``(R,)`` bool, the models that take it; None for all."""
        self._alive = alive

    @abstractmethod
    def move(self, table: str, rows: Rows, gradient: Array) -> Array:
        """The moves of some rows: same shape as ``gradient``, which may be overwritten."""


class SGD(Rule):
    """``−η g``, as ``torch.optim.SGD``."""

    def move(self, table: str, rows: Rows, gradient: Array) -> Array:
        """See :class:`Rule`."""
        gradient *= -self._rate
        if self._alive is not None:
            gradient *= self._alive
        return gradient


class Adagrad(Rule):
    """``S += g²; −η g / (√S + 1e-10)``, as ``torch.optim.Adagrad``."""

    def __init__(self, tables: Mapping[str, Array], learning_rate: float) -> None:
        super().__init__(tables, learning_rate)
        self._sums = {name: np.zeros_like(table) for name, table in tables.items()}

    def move(self, table: str, rows: Rows, gradient: Array) -> Array:
        """See :class:`Rule`."""
        if self._alive is not None:
            gradient *= self._alive
        sums = self._sums[table][rows] + gradient * gradient
        self._sums[table][rows] = sums
        return np.asarray(-self._rate * gradient / (np.sqrt(sums) + 1e-10))


class Adam(Rule):
    """Adam whose averages of a row stand still while it has no gradient, as ``torch.optim.SparseAdam``.

    ``m += (1−β₁)(g−m); v += (1−β₂)(g²−v); −η √(1−β₂ᵗ)/(1−β₁ᵗ) · m/(√v + ε)``; t counts the steps of the table.
    """

    BETAS, EPSILON = (0.9, 0.999), 1e-8

    def __init__(self, tables: Mapping[str, Array], learning_rate: float) -> None:
        super().__init__(tables, learning_rate)
        self._means = {name: np.zeros_like(table) for name, table in tables.items()}
        self._squares = {name: np.zeros_like(table) for name, table in tables.items()}
        first = next(iter(tables.values()))
        self._steps = {name: np.zeros(first.shape[2:]) for name in tables}  # per model
        self._counted: set[str] = set()

    def begin(self, alive: Array | None) -> None:
        """See :class:`Rule`."""
        super().begin(alive)
        self._counted.clear()

    def move(self, table: str, rows: Rows, gradient: Array) -> Array:
        """See :class:`Rule`."""
        b1, b2 = self.BETAS
        alive = self._alive
        if table not in self._counted:  # a step moves several rows of a table, and counts once
            self._counted.add(table)
            self._steps[table] += 1 if alive is None else alive
        mean, square = self._means[table][rows], self._squares[table][rows]
        new_mean = mean + (1 - b1) * (gradient - mean)
        new_square = square + (1 - b2) * (gradient * gradient - square)
        t = np.maximum(self._steps[table], 1)
        rate = (self._rate * np.sqrt(1 - b2**t) / (1 - b1**t)).astype(gradient.dtype)
        change = -rate * new_mean / (np.sqrt(new_square) + self.EPSILON)
        if alive is not None:
            new_mean, new_square = np.where(alive, new_mean, mean), np.where(alive, new_square, square)
            change = change * alive
        self._means[table][rows], self._squares[table][rows] = new_mean, new_square
        return np.asarray(change)


RULES: dict[str, type[Rule]] = {"sgd": SGD, "adagrad": Adagrad, "adam": Adam}
"""Rules by the name they have in recipes."""
