"""Training at batch size 1 by closed-form gradients: one model recorded, or many that each leave examples out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from npeff.companions.rollback.models import MODELS, FactorModel
from npeff.companions.rollback.moves import Accumulator
from npeff.companions.rollback.recipe import Recipe
from npeff.companions.rollback.record import Record, finish_record, open_accumulators
from npeff.companions.rollback.steps import RULES
from npeff.errors import ArgumentError, ModelError

Array = npt.NDArray[Any]

REPLICA_BYTES = 512 << 20  # tables of the models that are trained side by side


def fit(
    model: FactorModel,
    examples: Array,
    recipe: Recipe | None = None,
    *,
    negatives: bool = False,
    out: str | Path | None = None,
    names: Mapping[str, Sequence[str]] | None = None,
    record: bool = True,
    progress: bool = True,
) -> Record | None:
    """Train a model in place, at batch size 1, and record what every example moved.

    The gradients are written out, and a step costs a few dozen microseconds where torch's autograd costs a
    millisecond; the weights are those of the same training with ``torch.optim`` up to rounding.

    Args:
        model: Its present weights are the beginning.
        examples: ``(n, m + 1)`` integers, one example per row.
        recipe: How to train; see :class:`Recipe`.
        negatives: Record the moves of the negatives' rows too: the record grows by up to epochs · negatives rows per
            example, and the rollback of a single step of plain SGD is exact.
        out: Stream the record to this HDF5 file and map it; by default it stays in memory.
        names: Names of the rows, by table, kept in the record.
        record: With False, only train.
        progress: Show a progress bar.

    Returns:
        The record; None with ``record=False``.

    Raises:
        ArgumentError: Examples that the model has no rows for, or none.
        ModelError: The model has no ``query_gradient``, or the training diverged; the model is left as it was.
        StorageError: The record cannot be written.
    """
    recipe = recipe or Recipe()
    examples = model.check_examples(examples, least=1)
    initial = model.numpy_tables()
    sizes = {name: table.shape for name, table in initial.items()}
    accumulators, path = open_accumulators(sizes, len(examples), out) if record else ({}, None)
    try:
        tables = {name: table.copy() for name, table in initial.items()}
        run_epochs(model, tables, examples, recipe, None, accumulators, negatives, progress)
        bad = [name for name, table in tables.items() if not np.isfinite(table).all()]
        if bad:
            raise ModelError(
                f"training diverged: table {bad[0]!r} is not finite; lower learning_rate ({recipe.learning_rate}) or "
                "scale"
            )
    except BaseException:
        for sums in accumulators.values():
            sums.close()
        raise
    model.load_tables(tables)
    if not record:
        return None
    kind = next((name for name, cls in MODELS.items() if type(model) is cls), None)
    made = Record(
        examples=examples,
        columns=tuple(model.columns),
        moves={},
        initial=initial,
        final=tables,
        recipe=recipe,
        model_kind=kind,
        model_options=model.options,
        names={table: list(given) for table, given in (names or {}).items()},
        negatives=negatives,
    )
    return finish_record(made, accumulators, path)


def retrain(
    model: FactorModel,
    initial: Mapping[str, Array],
    examples: Array,
    recipe: Recipe,
    removed: Sequence[Array],
    *,
    progress: bool = False,
) -> dict[str, Array]:
    """Train once per set of removed examples, all from the same beginning, in the same order, with the same negatives.

    The models are trained side by side: a step acts on all of them at once, but for those that leave its example out.

    Args:
        model: Supplies the score; its weights are neither used nor changed.
        initial: The tables at the beginning.
        examples: ``(n, m + 1)`` training examples.
        recipe: How to train.
        removed: R arrays of positions in ``examples``.
        progress: Show a progress bar.

    Returns:
        By table ``(rows, width, R)``. Their size is R models: see :data:`REPLICA_BYTES` for how callers split.

    Raises:
        ArgumentError: A removed position is no example.
        ModelError: The model has no ``query_gradient``.
    """
    kept = np.ones((len(examples), len(removed)), bool)
    for r, positions in enumerate(removed):
        positions = np.asarray(positions, np.int64)
        if len(positions) and (positions.min() < 0 or positions.max() >= len(examples)):
            raise ArgumentError(f"removed: expected positions below {len(examples)}, got {positions.tolist()}")
        kept[positions, r] = False
    tables = {name: np.repeat(table[..., None], len(removed), axis=2) for name, table in initial.items()}
    run_epochs(model, tables, model.check_examples(examples), recipe, kept, {}, False, progress)
    return tables


def run_epochs(
    model: FactorModel,
    tables: dict[str, Array],
    examples: Array,
    recipe: Recipe,
    kept: Array | None,
    accumulators: Mapping[str, Accumulator],
    negatives: bool,
    progress: bool,
) -> None:
    """All steps, on tables ``(rows, width)`` or, with ``kept (n, R)``, ``(rows, width, R)``; in place.

    Raises:
        ModelError: The model has no ``query_gradient``.
    """
    if type(model).query_gradient is FactorModel.query_gradient:
        raise ModelError(
            f"{type(model).__name__} has no query_gradient, which fit needs; write it, or train with torch under "
            "RollbackRecorder"
        )
    answers = model.answers
    n_columns = len(model.columns) - 1
    own = [j for j, table in enumerate(model.columns[:-1]) if table == answers]
    rule = RULES[recipe.optimizer](tables, recipe.learning_rate)
    product, back = (_product_one, _back_one) if kept is None else (_product_many, _back_many)
    A = tables[answers]
    with tqdm(total=recipe.epochs * len(examples), disable=not progress, desc="training", unit="step") as bar:
        for epoch in range(recipe.epochs):
            order, candidates = recipe.schedule(epoch, examples[:, -1], len(A))
            # where a context row of the answers' table is itself among the candidates, −1 elsewhere
            places = {j: _places(candidates, examples[:, j]) for j in own}
            contexts = examples[:, :-1].tolist()
            full: Array | None = None if kept is None else np.asarray(kept.all(axis=1))
            for step, d in enumerate(order.tolist()):
                rows, context = candidates[d], contexts[d]
                alive = None if kept is None or full is None or full[d] else kept[d]
                held = [tables[model.columns[j]][context[j]] for j in range(n_columns)]
                X = A[rows]
                q = model.query(held, axis=0)
                p = product(X, q)
                p -= p.max(0)
                np.exp(p, p)
                p /= p.sum(0)
                p[0] -= 1  # now the gradient by the scores
                by_context = model.query_gradient(held, back(p, X), axis=0)
                by_rows = p[:, None] * q
                moved: list[tuple[str, int, Array]] = []
                rule.begin(alive)
                for j in range(n_columns):
                    place = places[j][d] if j in places else -1
                    if place >= 0:
                        by_rows[place] += by_context[j]
                    else:
                        _collect(moved, model.columns[j], context[j], by_context[j])
                moved = [(table, row, rule.move(table, row, gradient)) for table, row, gradient in moved]
                change = rule.move(answers, rows, by_rows)
                A[rows] = X + change
                for table, row, delta in moved:
                    tables[table][row] += delta
                if accumulators:
                    if negatives:
                        accumulators[answers].add_rows(d, rows.tolist(), change)
                    else:
                        for at in {0, *(int(places[j][d]) for j in own)} - {-1}:
                            accumulators[answers].add(d, int(rows[at]), change[at])
                    for table, row, delta in moved:
                        accumulators[table].add(d, row, delta)
                if step % 256 == 255:
                    bar.update(256)
            bar.update(len(order) % 256)


def _collect(moved: list[tuple[str, int, Array]], table: str, row: int, gradient: Array) -> None:
    """Append a row's gradient, or add it to that of the same row."""
    for i, (other, at, sum_) in enumerate(moved):
        if other == table and at == row:
            moved[i] = (table, row, sum_ + gradient)
            return
    moved.append((table, row, gradient))


def _places(candidates: Array, rows: Array) -> Array:
    same = candidates == rows[:, None]
    return np.where(same.any(axis=1), same.argmax(axis=1), -1)


def _product_one(X: Array, q: Array) -> Array:
    return np.asarray(X @ q)


def _back_one(p: Array, X: Array) -> Array:
    return np.asarray(p @ X)


def _product_many(X: Array, q: Array) -> Array:
    return np.asarray(np.einsum("ndr,dr->nr", X, q))


def _back_many(p: Array, X: Array) -> Array:
    return np.asarray(np.einsum("nr,ndr->dr", p, X))
