"""Gradient Rollback: take back what a training example moved, and look at the prediction again."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from npeff.companions.rollback.explaining import Explainer

Array = npt.NDArray[Any]

_CHUNK_BYTES = 64 << 20  # scores of candidates held at a time


class GradientRollback(Explainer):
    """``I(d) = P(a | c; θ) − P(a | c; θ − γ[d])`` (Lawrence, Sztyler, Niepert 2021, arXiv 2010.05516).

    P is the softmax over all answers, γ[d] what example d moved during training. Candidates are the training examples
    that share a row (an entity or a relation; a user or an item) with the target: no other one's own rows enter P's
    numerator.

    Args:
        model: The trained model.
        record: Of its training.

    Raises:
        ArgumentError: The model is not the one that the record ended with.
    """

    @torch.no_grad()
    def influence(self, target: Array | Tensor | list[int], candidates: Array | None = None) -> Array:
        """How much probability the target loses when each candidate's moves are taken back.

        All candidates at once: only the rows of the context, and the scores of answers that moved, are recomputed.

        Args:
            target: ``(m + 1,)`` context and answer.
            candidates: ``(c,)`` positions of training examples; by default :meth:`candidates`.

        Returns:
            ``(c,)`` float64 influences, in probability.

        Raises:
            ArgumentError: The target is no example of the model, or a candidate no training example.
        """
        target, candidates = self._chosen(target, candidates)
        A = self._tables[self.model.answers]
        context = [
            self._tables[table][row] for table, row in zip(self.model.columns, target[:-1].tolist(), strict=False)
        ]
        q = self.model.query([row[None] for row in context])[0]
        base = A @ q
        probability = float(torch.softmax(base, 0)[target[-1]])
        step = max(1, _CHUNK_BYTES // (8 * len(A)))
        parts = [
            self._rolled_back(target, context, base, candidates[start : start + step])
            for start in range(0, len(candidates), step)
        ]
        return probability - (np.concatenate(parts) if parts else np.empty(0))

    def _rolled_back(self, target: Array, context: list[Tensor], base: Tensor, candidates: Array) -> Array:
        """P of the target without each candidate's moves: ``(c,)``."""
        model, n = self.model, len(candidates)
        entries = {table: self.record.moves[table].of(candidates) for table in set(model.columns)}
        rows = [row.expand(n, -1).clone() for row in context]
        changed = np.zeros(n, bool)
        for j, table in enumerate(model.columns[:-1]):
            owner, moved, values = entries[table]
            here = np.flatnonzero(moved == target[j])  # at most one entry per candidate
            rows[j][owner[here]] -= torch.from_numpy(values[here].astype(np.float64))
            changed[owner[here]] = True
        queries = model.query(rows)
        scores = base.expand(n, -1).clone()
        where = torch.from_numpy(np.flatnonzero(changed))
        scores[where] = queries[where] @ self._tables[model.answers].T
        owner, moved, values = entries[model.answers]
        change = (queries[owner] * torch.from_numpy(values.astype(np.float64))).sum(1)
        scores[owner, moved] -= change
        log_p = scores[:, target[-1]] - torch.logsumexp(scores, 1)
        return np.asarray(log_p.exp().numpy())
