"""How a training goes: its options, the order of the examples and their negatives, the same at every repetition."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from npeff.errors import ArgumentError

Array = npt.NDArray[Any]
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
        optimizer: ``"sgd"``; ``"adagrad"``; ``"adam"``, in the form that moves only rows with a gradient
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

    def to_json(self) -> dict[str, Any]:
        """The options."""
        return asdict(self)

    def generator(self, epoch: int) -> np.random.Generator:
        """The randomness of one epoch."""
        return np.random.default_rng([self.seed, epoch])

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
        rng = self.generator(epoch)
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
