"""Explanations of predictions by training examples (Gradient Rollback, the base of others), and a check of them.

The check leaves explanations out of the training, trains again, and compares the predictions.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from tqdm import tqdm

from npeff.companions.rollback.factor_models import FactorModel
from npeff.companions.rollback.record import Record
from npeff.companions.rollback.training import run_epochs
from npeff.components.components import Components
from npeff.errors import ArgumentError, check_integer
from npeff.short_repr import short_repr

Array = npt.NDArray[Any]
Retrain = Callable[[Array], FactorModel]

CHUNK_BYTES = 64 << 20
"""Size of the scores of candidates that are held at a time."""
SIDE_BY_SIDE_BYTES = 512 << 20
"""Size of the tables of the models that are trained side by side."""


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


class Explainer(ABC):
    """A method that finds the training examples behind a prediction; a subclass gives :meth:`support`.

    Args:
        model: The trained model.
        record: The record of its training.

    Raises:
        ArgumentError: The model is not the one that the record ended with.
    """

    def __init__(self, model: FactorModel, record: Record) -> None:
        record.check_model(model)
        self.model, self.record = model, record
        self._tables = _tables_of(model)
        self._columns = np.ascontiguousarray(np.asarray(record.examples).T)

    def target(self, target: Array | Tensor | list[int]) -> Array:
        """Check one target:  ``(m + 1,)`` int64.

        Raises:
            ArgumentError: It is no example of the model.
        """
        return self.model.check_examples(np.asarray(target)[None], "target")[0]

    def candidates(self, target: Array | Tensor | list[int]) -> Array:
        """Find the training examples that share a row of any table with the target: positions, int64."""
        shares = np.zeros(len(self.record), bool)
        for table, row in zip(self.model.columns, self.target(target).tolist(), strict=True):
            for other, rows in zip(self.model.columns, self._columns, strict=True):
                if other == table:
                    shares |= rows == row
        return np.flatnonzero(shares)

    @torch.no_grad()
    def probabilities(self, targets: Array | Tensor, tables: Mapping[str, Tensor] | None = None) -> Array:
        """Compute P(a | c) for the contexts of examples ``(n, m + 1)``: ``(n, n_answers)`` float64.

        Args:
            targets: Supply the contexts.
            tables: ``(rows, width)`` float64 by name; by default the model's own.
        """
        targets = self.model.check_examples(targets, "targets")
        tables = self._tables if tables is None else tables
        scores = self.model.queries(targets, tables) @ tables[self.model.answers].T
        return np.asarray(torch.softmax(scores, 1).numpy())

    def known(self, targets: Array | Tensor) -> Array:
        """Mark the answers that the training examples give to the targets' contexts: ``(n, n_answers)`` bool."""
        targets = self.model.check_examples(targets, "targets")
        given: dict[tuple[int, ...], list[int]] = {}
        for *context, answer in np.asarray(self.record.examples).tolist():
            given.setdefault(tuple(context), []).append(answer)
        mask = np.zeros((len(targets), self.model.n_answers), bool)
        for i, (*context, _) in enumerate(targets.tolist()):
            mask[i, given.get(tuple(context), [])] = True
        return mask

    def predictions(self, targets: Array | Tensor, *, filtered: bool = True) -> Array:
        """Replace the answers of targets ``(n, m + 1)`` by the most probable ones.

        Args:
            targets: Supply the contexts.
            filtered: Leave out answers that a training example gives, which are memorised rather than predicted.
                Contexts that have no other answers keep theirs.
        """
        found = self.model.check_examples(targets, "targets").copy()
        scores = self.probabilities(found)
        if filtered:
            known = self.known(found)
            scores[known & ~known.all(1, keepdims=True)] = -1
        found[:, -1] = scores.argmax(1)
        return found

    def influence(self, target: Array | Tensor | list[int], candidates: Array | None = None) -> Array:
        """Compute how much each training example supports a prediction.

        Args:
            target: ``(m + 1,)`` context and answer.
            candidates: ``(c,)`` positions of training examples; by default :meth:`candidates`.

        Returns:
            ``(c,)`` float64, positive for support.

        Raises:
            ArgumentError: The target is no example of the model, or a candidate no training example.
        """
        target = self.target(target)
        given = self.candidates(target) if candidates is None else candidates
        with torch.no_grad():
            return self.support(target, _positions(given, "candidates", len(self.record)))

    @abstractmethod
    def support(self, target: Array, candidates: Array) -> Array:
        """Compute the influence of candidates ``(c,)`` on a target ``(m + 1,)``, both checked: ``(c,)`` float64."""

    def explain(self, target: Array | Tensor | list[int], k: int = 10) -> Explanation:
        """Find the k candidates of the largest influence, without those of influence below 0.

        Args:
            target: ``(m + 1,)`` context and answer.
            k: At most so many.

        Raises:
            ArgumentError: The target is no example of the model, or k is below 1.
        """
        check_integer("k", k)
        target = self.target(target)
        candidates = self.candidates(target)
        influences = self.influence(target, candidates)
        order = np.argsort(-influences, kind="stable")[: int(k)]
        order = order[influences[order] >= 0]
        probability = float(self.probabilities(target[None])[0, target[-1]])
        return Explanation(target, probability, candidates[order], influences[order], len(candidates))


class GradientRollback(Explainer):
    """``I(d) = P(a | c; θ) − P(a | c; θ − γ[d])`` (Lawrence, Sztyler, Niepert 2021, arXiv 2010.05516).

    P is the softmax over all answers, γ[d] the sum of the updates that example d made during training. Candidates are
    the training examples that share a row (an entity or a relation; a user or an item) with the target: the numerator
    of P contains no rows of the others. Arguments as for :class:`Explainer`.
    """

    def support(self, target: Array, candidates: Array) -> Array:
        """Compute the probability that the target loses when each candidate's updates are subtracted.

        All candidates at once: only the rows of the context, and the scores of answers with updates, are recomputed.
        """
        A = self._tables[self.model.answers]
        context = [
            self._tables[table][row] for table, row in zip(self.model.columns, target[:-1].tolist(), strict=False)
        ]
        q = self.model.query(context)
        base = A @ q
        probability = float(torch.softmax(base, 0)[target[-1]])
        step = max(1, CHUNK_BYTES // (8 * len(A)))
        parts = [
            self._rolled_back(target, context, base, candidates[start : start + step])
            for start in range(0, len(candidates), step)
        ]
        return probability - (np.concatenate(parts) if parts else np.empty(0))

    def _rolled_back(self, target: Array, context: list[Tensor], base: Tensor, candidates: Array) -> Array:
        """Compute P of the target without each candidate's updates: ``(c,)``."""
        model, n = self.model, len(candidates)
        entries = {table: self.record.updates[table].of(candidates) for table in set(model.columns)}
        rows = [row.expand(n, -1).clone() for row in context]
        changed = np.zeros(n, bool)
        for j, table in enumerate(model.columns[:-1]):
            owner, updated, values = entries[table]
            here = np.flatnonzero(updated == target[j])  # at most one entry per candidate
            rows[j][owner[here]] -= torch.from_numpy(values[here].astype(np.float64))
            changed[owner[here]] = True
        queries = model.query([row.T for row in rows]).T
        scores = base.expand(n, -1).clone()
        where = torch.from_numpy(np.flatnonzero(changed))
        scores[where] = queries[where] @ self._tables[model.answers].T
        owner, updated, values = entries[model.answers]
        change = (queries[owner] * torch.from_numpy(values.astype(np.float64))).sum(1)
        scores[owner, updated] -= change
        log_p = scores[:, target[-1]] - torch.logsumexp(scores, 1)
        return np.asarray(log_p.exp().numpy())


@dataclass(frozen=True, eq=False)
class ComponentRollback:
    """The support of each training example for the model's answers on a component's top examples.

    Attributes:
        j: The component.
        influence: ``(n_train,)`` float64, the mean over the top examples of the explainer's influence; 0 where an
            example is a candidate of none, or is itself among them.
        examples: ``(k,)`` int64 the component's top examples: indices of ``components.coefficients``.
        record: The record of the training.
    """

    by: ClassVar[str] = "probability that its top examples lose when the example's updates are taken back, on average"

    j: int
    influence: Array
    examples: Array
    record: Record = field(repr=False)

    __repr__ = short_repr

    def made_by(self, k: int = 16) -> Array:
        """List the k training examples with the largest support: positions, int64, ties by position."""
        order = np.argsort(-self.influence, kind="stable")[:k]
        return order[self.influence[order] > 0]

    def pairs(self, k: int = 16) -> list[tuple[int, float]]:
        """List ``(position, influence)`` of :meth:`made_by`, for a report."""
        return [(int(d), float(self.influence[d])) for d in self.made_by(k)]

    def text(self, position: int) -> str | None:
        """Get the names in a training example; None where the record has none."""
        return self.record.text(position)


def component_rollback(
    explainer: Explainer, components: Components, j: int, examples: Array | Tensor, k: int = 16
) -> ComponentRollback:
    """Find the training examples that support the model's answers on a component's top examples.

    Each of the k top examples is a target; the explainer's influence of every candidate on it, such as the probability
    that it loses by rollback, is averaged over them. A top example that is itself a training example is left out,
    since it supports itself.

    Args:
        explainer: For the model that the components are of, such as :class:`GradientRollback`.
        components: A decomposition of the model's Fishers.
        j: Which component.
        examples: ``(n, m + 1)`` context and answer of the examples whose Fishers were computed, in their order.
        k: How many of its top examples.

    Returns:
        An influence per training example.

    Raises:
        ArgumentError: There is no such component, it has no top example, or ``examples`` do not reach to them.
    """
    model, record = explainer.model, explainer.record
    targets = model.check_examples(np.asarray(examples), "examples")
    tops = components.top_examples(int(j), k)
    tops = tops[components.coefficients[tops, j] > 0]
    if not len(tops):
        raise ArgumentError(f"j: component {j} has no example with a positive coefficient; choose another")
    ids = np.asarray(components.ids)[tops]
    if ids.max() >= len(targets):
        raise ArgumentError(
            f"examples: {len(targets)} were given, and component {j} has number {ids.max()} among its top ones; pass "
            "all those whose Fishers were computed, in their order"
        )
    train = np.asarray(record.examples)
    total = np.zeros(len(record))
    for target in targets[ids]:
        candidates = explainer.candidates(target)
        total[candidates] += explainer.influence(target, candidates)
    own = {tuple(row) for row in targets[ids].tolist()}
    total[[tuple(row) in own for row in train.tolist()]] = 0
    return ComponentRollback(int(j) % components.n_components, total / len(ids), tops, record)


@dataclass(frozen=True, eq=False)
class Faithfulness:
    """Targets before and after their explanations were left out of the training.

    Unpacks as ``pd, tc``.

    Attributes:
        before: ``(n,)`` P(target), trained on everything.
        after: ``(n,)`` P(target), trained without the target's explanation.
        top_before: ``(n,)`` most probable answer before.
        top_after: ``(n,)`` and after.
        explanations: The explanation that was left out, per target.
    """

    before: Array
    after: Array
    top_before: Array
    top_after: Array
    explanations: list[Explanation]

    __repr__ = short_repr

    @property
    def pd(self) -> float:
        """PD%: targets whose probability fell."""
        return 100 * float(np.mean(self.after < self.before))

    @property
    def tc(self) -> float:
        """TC%: targets whose most probable answer changed."""
        return 100 * float(np.mean(self.top_after != self.top_before))

    @property
    def drop(self) -> float:
        """Mean fall of P(target)."""
        return float(np.mean(self.before - self.after))

    def __iter__(self) -> Iterator[float]:
        return iter((self.pd, self.tc))


def faithfulness(
    method: Explainer,
    k: int,
    targets: Array,
    *,
    filtered: bool = True,
    retrain_without: Retrain | None = None,
    progress: bool = True,
) -> Faithfulness:
    """Delete explanations, train again with the same beginning, seed, order and negatives, and compare.

    Args:
        method: Explains each target.
        k: At most so many examples per explanation.
        targets: ``(n, m + 1)``; see :meth:`Explainer.predictions` for those that the model predicts.
        filtered: The most probable answer is looked for among the target's own and those that no training example
            gives to its context, so that leaving out a memorised example does not count as a changed prediction.
        retrain_without: Given positions of training examples, the model trained without them; needed only where the
            record has no recipe, because something else than :func:`fit` trained.
        progress: Show a progress bar.

    Raises:
        ArgumentError: No targets, or no way to train again.
    """
    targets = method.model.check_examples(targets, "targets", least=1)
    explanations = [method.explain(target, k) for target in tqdm(targets, disable=not progress, desc="explaining")]
    removed = [found.positions for found in explanations]
    after, before = trained_without(method, targets, removed, retrain_without=retrain_without, progress=progress)
    at = np.arange(len(targets)), targets[:, -1]
    hidden = np.zeros(before.shape, bool)
    if filtered:
        hidden = method.known(targets)
        hidden[at] = False
    tops = [np.where(hidden, -1, p).argmax(1) for p in (before, after)]
    return Faithfulness(before[at], after[at], tops[0], tops[1], explanations)


def trained_without(
    method: Explainer,
    targets: Array,
    removed: list[Array],
    *,
    retrain_without: Retrain | None = None,
    progress: bool = True,
) -> tuple[Array, Array]:
    """Compute P(· | context) of every target, trained without its set of examples; and trained on everything.

    Args:
        method: Supplies model and record.
        targets: ``(n, m + 1)``.
        removed: n arrays of positions of training examples.
        retrain_without: See :func:`faithfulness`.
        progress: Show a progress bar.

    Returns:
        Two ``(n, n_answers)`` float64 arrays, computed in the same arithmetic.

    Raises:
        ArgumentError: No way to train again.
    """
    model, record = method.model, method.record
    if retrain_without is not None:
        again = [_tables_of(retrain_without(positions)) for positions in removed]
        after = [method.probabilities(target[None], tables)[0] for target, tables in zip(targets, again, strict=True)]
        return np.array(after), method.probabilities(targets)
    # the tables, and at most two of their size for the averages of an optimiser
    step = max(1, SIDE_BY_SIDE_BYTES // (3 * sum(table.nbytes for table in record.initial.values())))
    found = []
    for start in tqdm(range(0, len(targets), step), disable=not progress or len(targets) <= step, desc="retraining"):
        # the last model is trained on all examples, for the comparison in the same arithmetic
        sets = [*removed[start : start + step], np.empty(0, np.int64)]
        stacked = retrain(model, record, sets, progress=progress and len(targets) <= step)
        *without, whole = (
            {name: torch.from_numpy(table[..., r].astype(np.float64)) for name, table in stacked.items()}
            for r in range(len(sets))
        )
        for target, tables in zip(targets[start : start + step], without, strict=True):
            found.append([method.probabilities(target[None], trained)[0] for trained in (tables, whole)])
    after, before = np.moveaxis(np.array(found), 1, 0)
    return after, before


def retrain(
    model: FactorModel, record: Record, removed: Sequence[Array], *, progress: bool = False
) -> dict[str, Array]:
    """Train once per set of removed examples, all from the same beginning, in the same order, with the same negatives.

    The models are trained side by side: a step acts on all of them at once, but for those that leave its example out.

    Args:
        model: Supplies the score; its weights are neither used nor changed.
        record: Supplies the tables at the beginning, the training examples and the recipe.
        removed: R arrays of positions of training examples.
        progress: Show a progress bar.

    Returns:
        By table ``(rows, width, R)``, as large as R models: :func:`trained_without` splits many sets.

    Raises:
        ArgumentError: A removed position is no example, or the record has no recipe.
        ModelError: The model has no ``query_gradient``.
    """
    if record.recipe is None:
        raise ArgumentError(
            "record: it has no recipe (something else than fit trained); pass retrain_without=, a function of the "
            "positions to leave out that returns the model trained without them"
        )
    kept = np.ones((len(record), len(removed)), bool)
    for r, positions in enumerate(removed):
        kept[_positions(positions, "removed", len(record)), r] = False
    tables = {name: np.repeat(table[..., None], len(removed), axis=2) for name, table in record.initial.items()}
    run_epochs(model, tables, np.asarray(record.examples), record.recipe, kept=kept, progress=progress)
    return tables


def _positions(given: Any, name: str, n: int) -> Array:
    """Check positions of training examples: ``(c,)`` int64.

    Raises:
        ArgumentError: They are none.
    """
    positions = np.asarray(given)
    if positions.ndim != 1 or (positions.size and positions.dtype.kind not in "iu"):
        raise ArgumentError(f"{name}: expected positions (c,), got {positions.dtype} of shape {positions.shape}")
    if positions.size and (positions.min() < 0 or positions.max() >= n):
        raise ArgumentError(f"{name}: expected positions below {n}, got {positions.tolist()[:5]}…")
    return positions.astype(np.int64)


def _tables_of(model: FactorModel) -> dict[str, Tensor]:
    return {name: table.detach().double().cpu() for name, table in model.tables.items()}
