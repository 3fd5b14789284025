"""What every explanation shares: candidates, probabilities, the top k."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from npeff.companions.rollback.models import FactorModel
from npeff.companions.rollback.record import Record
from npeff.errors import ArgumentError
from npeff.short_repr import short_repr

Array = npt.NDArray[Any]


@dataclass(frozen=True, eq=False)
class Explanation:
    """Training examples behind one prediction.

    Attributes:
        target: ``(m + 1,)`` int64: context and answer.
        probability: P(answer | context) of the trained model.
        positions: ``(≤ k,)`` int64 positions in the training examples, most influential first.
        influences: ``(≤ k,)`` float64, descending, ≥ 0. In probability for rollback; each method has its own unit.
        n_candidates: How many training examples were considered.
    """

    target: Array
    probability: float
    positions: Array
    influences: Array
    n_candidates: int

    __repr__ = short_repr

    def __len__(self) -> int:
        return len(self.positions)

    def first(self, k: int) -> Explanation:
        """The same with at most k examples."""
        return replace(self, positions=self.positions[:k], influences=self.influences[:k])


class Explainer(ABC):
    """A way to find the training examples behind a prediction.

    Args:
        model: The trained model.
        record: Of its training: supplies the examples, and for :func:`faithfulness` beginning and recipe.

    Raises:
        ArgumentError: The model is not the one that the record ended with.
    """

    def __init__(self, model: FactorModel, record: Record) -> None:
        record.check_model(model)
        self.model, self.record = model, record
        self._tables = {name: table.detach().double().cpu() for name, table in model.tables.items()}
        self._sharing = _Index(record.examples, record.columns)

    def target(self, target: Array | Tensor | list[int]) -> Array:
        """One target as ``(m + 1,)`` int64.

        Raises:
            ArgumentError: It is no example of the model.
        """
        return self.model.check_examples(np.asarray(target)[None], "target")[0]

    def candidates(self, target: Array | Tensor | list[int]) -> Array:
        """Positions of the training examples that share a row of any table with the target, ascending, int64."""
        return self._sharing.of(self.target(target))

    @torch.no_grad()
    def probabilities(self, targets: Array | Tensor) -> Array:
        """``(n, n_answers)`` float64: P(a | c) of the trained model for the contexts of examples ``(n, m + 1)``."""
        targets = self.model.check_examples(targets, "targets")
        rows = [self._tables[table][targets[:, j]] for j, table in enumerate(self.model.columns[:-1])]
        scores = self.model.query(rows) @ self._tables[self.model.answers].T
        return np.asarray(torch.softmax(scores, 1).numpy())

    def known(self, targets: Array | Tensor) -> Array:
        """``(n, n_answers)`` bool: answers that the training examples give to the targets' contexts."""
        targets = self.model.check_examples(targets, "targets")
        given: dict[tuple[int, ...], list[int]] = {}
        for *context, answer in np.asarray(self.record.examples).tolist():
            given.setdefault(tuple(context), []).append(answer)
        mask = np.zeros((len(targets), self.model.n_answers), bool)
        for i, (*context, _) in enumerate(targets.tolist()):
            mask[i, given.get(tuple(context), [])] = True
        return mask

    def predictions(self, targets: Array | Tensor, *, filtered: bool = True) -> Array:
        """Targets ``(n, m + 1)`` with the most probable answer in place of the given one.

        Args:
            targets: Supply the contexts.
            filtered: Leave answers out that a training example gives: what is predicted, not what was learnt by heart.
                Contexts that have no other answers keep theirs.
        """
        found = self.model.check_examples(targets, "targets").copy()
        scores = self.probabilities(found)
        if filtered:
            known = self.known(found)
            scores[known & ~known.all(1, keepdims=True)] = -1
        found[:, -1] = scores.argmax(1)
        return found

    @abstractmethod
    def influence(self, target: Array | Tensor | list[int], candidates: Array | None = None) -> Array:
        """How much each training example supports a prediction.

        Args:
            target: ``(m + 1,)`` context and answer.
            candidates: ``(c,)`` positions of training examples; by default :meth:`candidates`.

        Returns:
            ``(c,)`` float64, positive for support.
        """

    def explain(self, target: Array | Tensor | list[int], k: int = 10) -> Explanation:
        """The k candidates of the largest influence, those with influence below 0 left out.

        Args:
            target: ``(m + 1,)`` context and answer.
            k: At most so many.

        Raises:
            ArgumentError: The target is no example of the model, or k is below 1.
        """
        if not isinstance(k, int | np.integer) or k < 1:
            raise ArgumentError(f"k: expected a number ≥ 1, got {k!r}")
        target = self.target(target)
        candidates = self.candidates(target)
        influences = self.influence(target, candidates)
        order = np.argsort(-influences, kind="stable")[: int(k)]
        order = order[influences[order] >= 0]
        probability = float(self.probabilities(target[None])[0, target[-1]])
        return Explanation(target, probability, candidates[order], influences[order], len(candidates))

    def _chosen(self, target: Array | Tensor | list[int], candidates: Array | None) -> tuple[Array, Array]:
        """The target and the candidates, checked.

        Raises:
            ArgumentError: A candidate is no training example.
        """
        target = self.target(target)
        if candidates is None:
            return target, self._sharing.of(target)
        candidates = np.asarray(candidates)
        if candidates.ndim != 1 or (candidates.size and candidates.dtype.kind not in "iu"):
            raise ArgumentError(
                f"candidates: expected positions (c,), got {candidates.dtype} of shape {candidates.shape}"
            )
        if candidates.size and (candidates.min() < 0 or candidates.max() >= len(self.record)):
            raise ArgumentError(
                f"candidates: expected positions below {len(self.record)}, got {candidates.tolist()[:5]}…"
            )
        return target, candidates.astype(np.int64)


class _Index:
    """Which examples have which rows: per table a list of examples per row."""

    def __init__(self, examples: Array, columns: tuple[str, ...]) -> None:
        self._columns = columns
        self._lists: dict[str, tuple[Array, Array]] = {}
        for table in set(columns):
            places = [j for j, name in enumerate(columns) if name == table]
            rows = np.asarray(examples)[:, places].T.reshape(-1)
            owners = np.tile(np.arange(len(examples)), len(places))
            order = np.argsort(rows, kind="stable")
            starts = np.searchsorted(rows[order], np.arange(rows.max(initial=-1) + 2))
            self._lists[table] = (starts, owners[order])

    def of(self, target: Array) -> Array:
        """Examples that share a row with the target, ascending."""
        found = [np.empty(0, np.int64)]
        for table, row in zip(self._columns, target.tolist(), strict=True):
            starts, owners = self._lists[table]
            if row + 1 < len(starts):
                found.append(owners[starts[row] : starts[row + 1]])
        return np.unique(np.concatenate(found))
