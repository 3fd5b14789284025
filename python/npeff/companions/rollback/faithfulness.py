"""A check of explanations: leave them out of the training, train again, and compare the predictions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from npeff.companions.rollback.explain import Explainer, Explanation
from npeff.companions.rollback.factor_models import FactorModel
from npeff.companions.rollback.record import Record
from npeff.companions.rollback.training import run_epochs
from npeff.errors import ArgumentError
from npeff.short_repr import short_repr

Array = npt.NDArray[Any]
Retrain = Callable[[Array], FactorModel]

SIDE_BY_SIDE_BYTES = 512 << 20
"""Size of the tables of the models that are trained side by side."""


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
        after = [
            _softmax(_scores(model, {n: t[..., None] for n, t in again.numpy_tables().items()}, target[None])[:, 0])
            for target, again in zip(targets, map(retrain_without, removed), strict=True)
        ]
        return np.array(after), method.probabilities(targets)
    # the tables, and at most two of their size for the averages of an optimiser
    step = max(1, SIDE_BY_SIDE_BYTES // (3 * sum(table.nbytes for table in record.initial.values())))
    after_parts, before_parts = [], []
    for start in tqdm(range(0, len(targets), step), disable=not progress or len(targets) <= step, desc="retraining"):
        some, without = targets[start : start + step], removed[start : start + step]
        # the last model is trained on all examples, for the comparison in the same arithmetic
        sets = [*without, np.empty(0, np.int64)]
        tables = retrain(model, record, sets, progress=progress and len(targets) <= step)
        whole = {name: np.repeat(table[..., -1:], len(some), axis=2) for name, table in tables.items()}
        after_parts.append(_softmax(_scores(model, {n: t[..., :-1] for n, t in tables.items()}, some)).T)
        before_parts.append(_softmax(_scores(model, whole, some)).T)
    return np.concatenate(after_parts), np.concatenate(before_parts)


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
        positions = np.asarray(positions, np.int64)
        if len(positions) and (positions.min() < 0 or positions.max() >= len(record)):
            raise ArgumentError(f"removed: expected positions below {len(record)}, got {positions.tolist()}")
        kept[positions, r] = False
    tables = {name: np.repeat(table[..., None], len(removed), axis=2) for name, table in record.initial.items()}
    run_epochs(model, tables, np.asarray(record.examples), record.recipe, kept=kept, progress=progress)
    return tables


def _scores(model: FactorModel, tables: dict[str, Array], targets: Array) -> Array:
    """Target i under model i of ``(rows, width, n)`` tables: ``(n_answers, n)`` float64."""
    index = np.arange(len(targets))
    context = [
        tables[table][targets[:, j], :, index].T.astype(np.float64) for j, table in enumerate(model.columns[:-1])
    ]
    q = model.query(context)
    return np.asarray(np.einsum("ndr,dr->nr", tables[model.answers].astype(np.float64), q))


def _softmax(scores: Array) -> Array:
    p = np.exp(scores - scores.max(0))
    return np.asarray(p / p.sum(0))
