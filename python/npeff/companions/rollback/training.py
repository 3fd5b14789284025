"""Training at batch size 1 under record: by gradients in closed form, or in your own loop with torch."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch.optim import Optimizer
from tqdm import tqdm

from npeff.companions.rollback.factor_models import FactorModel
from npeff.companions.rollback.record import OptimizerName, Recipe, Record, RecordBuilder
from npeff.errors import ArgumentError, ModelError

Array = npt.NDArray[Any]
Rows = Any  # an integer, or different integers


class RowOptimizer:
    """The steps of ``torch.optim.SGD``, ``Adagrad`` or ``SparseAdam``, which change only rows with a gradient.

    Tables are ``(rows, width)``, or ``(rows, width, R)`` for R models side by side.
    """

    def __init__(self, name: OptimizerName, tables: Mapping[str, Array], learning_rate: float) -> None:
        self._name, self._rate = name, learning_rate
        count = {"sgd": 0, "adagrad": 1, "adam": 2}[name]
        self._averages = {name: [np.zeros_like(table) for _ in range(count)] for name, table in tables.items()}
        self._step = np.zeros(next(iter(tables.values())).shape[2:])  # per model
        self._active: Array | None = None

    def begin(self, active: Array | None) -> None:
        """Begin a step of all models, or of those that are ``active (R,)``."""
        self._active = active
        self._step = self._step + (1 if active is None else active)

    def update(self, table: str, rows: Rows, gradient: Array) -> Array:
        """Compute the change of one or several different rows of a table, in the shape of their gradient.

        The rows have no update in this step yet.
        """
        averages = self._averages[table]
        change, *after = self._rule(gradient, *[average[rows] for average in averages])
        if self._active is not None:
            change = change * self._active
            after = [np.where(self._active, new, old[rows]) for new, old in zip(after, averages, strict=True)]
        for index, values in enumerate(after):
            averages[index][rows] = values
        return change

    def _rule(self, gradient: Array, *averages: Array) -> tuple[Array, ...]:
        """Compute the change and the new averages."""
        if self._name == "sgd":
            return (-self._rate * gradient,)
        if self._name == "adagrad":
            sums = averages[0] + gradient * gradient
            return -self._rate * gradient / (np.sqrt(sums) + 1e-10), sums
        b1, b2, t = 0.9, 0.999, np.maximum(self._step, 1)
        size = (self._rate * np.sqrt(1 - b2**t) / (1 - b1**t)).astype(gradient.dtype)
        mean = averages[0] + (1 - b1) * (gradient - averages[0])
        square = averages[1] + (1 - b2) * (gradient * gradient - averages[1])
        return -size * mean / (np.sqrt(square) + 1e-8), mean, square


def fit(
    model: FactorModel,
    examples: Array,
    recipe: Recipe | None = None,
    *,
    all_rows: bool = False,
    out: str | Path | None = None,
    names: Mapping[str, Sequence[str]] | None = None,
    progress: bool = True,
) -> Record:
    """Train a model in place, at batch size 1, and record the updates that every example makes.

    The gradients are in closed form: a step takes a few dozen microseconds where torch's autograd takes a
    millisecond; the weights are those of the same training with ``torch.optim`` up to rounding.

    Args:
        model: Its present weights are the beginning.
        examples: ``(n, m + 1)`` integers, one example per row.
        recipe: How to train; see :class:`Recipe`.
        all_rows: Record the updates of the negatives' rows too: the record grows by up to epochs · negatives rows per
            example, and the rollback of a single step of plain SGD is exact.
        out: Stream the record to this HDF5 file and map it; by default it stays in memory.
        names: Names of the rows, by table, kept in the record.
        progress: Show a progress bar.

    Returns:
        The record.

    Raises:
        ArgumentError: Examples that the model has no rows for, or none.
        ModelError: The model has no ``query_gradient``, or the training diverged; the model is left as it was.
        StorageError: The record cannot be written.
    """
    recipe = recipe or Recipe()
    examples = model.check_examples(examples, least=1)
    builder = RecordBuilder(model, examples, all_rows, names, out)
    tables = model.numpy_tables()
    run_epochs(model, tables, examples, recipe, builder=builder, all_rows=all_rows, progress=progress)
    bad = [name for name, table in tables.items() if not np.isfinite(table).all()]
    if bad:
        raise ModelError(
            f"training diverged: table {bad[0]!r} is not finite; lower learning_rate ({recipe.learning_rate}) or scale"
        )
    model.load_tables(tables)
    return builder.finish(recipe)


def run_epochs(
    model: FactorModel,
    tables: dict[str, Array],
    examples: Array,
    recipe: Recipe,
    *,
    kept: Array | None = None,
    builder: RecordBuilder | None = None,
    all_rows: bool = False,
    progress: bool = False,
) -> None:
    """Take all steps of a training, on tables ``(rows, width)``, in place; the model supplies the score alone.

    With ``kept (n, R)``, the examples that each of R models is trained on, tables are ``(rows, width, R)``.

    Raises:
        ModelError: The model has no ``query_gradient``.
    """
    if type(model).query_gradient is FactorModel.query_gradient:
        raise ModelError(
            f"{type(model).__name__} has no query_gradient, which fit needs; write it, or train with torch under "
            "RollbackRecorder"
        )
    rule = RowOptimizer(recipe.optimizer, tables, recipe.learning_rate)
    answers, A = model.answers, tables[model.answers]
    sums = builder.sums if builder else None
    contexts = [list(zip(model.columns, rows, strict=False)) for rows in examples[:, :-1].tolist()]
    full: Any = None if kept is None else kept.all(axis=1)
    with tqdm(total=recipe.epochs * len(examples), disable=not progress, desc="training", unit="step") as bar:
        for epoch in range(recipe.epochs):
            order, candidates = recipe.schedule(epoch, examples[:, -1], len(A))
            for step, d in enumerate(order.tolist()):
                active = None if kept is None or full[d] else kept[d]
                held = [tables[table][row] for table, row in contexts[d]]
                chosen = candidates[d]
                X = A.take(chosen, 0)  # a third of the time of A[chosen]
                q = model.query(held)
                p = X @ q if kept is None else np.einsum("ndr,dr->nr", X, q)
                p -= np.maximum.reduce(p)  # p.max(0), without its microsecond of Python
                np.exp(p, p)
                p /= np.add.reduce(p)
                p[0] -= 1  # now the gradient by the scores
                by_query = p @ X if kept is None else np.einsum("nr,ndr->dr", p, X)
                rows, by_rows = chosen.tolist(), p[:, None] * q
                own: list[int] = [0]  # positions of the example's rows among the candidates
                others: dict[tuple[str, int], Array] = {}  # gradients of its other rows
                for key, gradient in zip(contexts[d], model.query_gradient(held, by_query), strict=True):
                    if key[0] == answers and key[1] in rows:
                        own.append(rows.index(key[1]))
                        by_rows[own[-1]] += gradient
                    else:
                        others[key] = others[key] + gradient if key in others else gradient
                rule.begin(active)
                change = rule.update(answers, chosen, by_rows)
                changes = [(table, row, rule.update(table, row, gradient)) for (table, row), gradient in others.items()]
                A[chosen] = X + change
                for table, row, update in changes:
                    tables[table][row] += update
                if sums:
                    if all_rows:
                        sums[answers].add_rows(d, rows, change)
                    else:
                        for position in set(own):
                            sums[answers].add(d, rows[position], change[position])
                    for table, row, update in changes:
                        sums[table].add(d, row, update)
                if step % 256 == 255:
                    bar.update(256)
            bar.update(len(order) % 256)


class RollbackRecorder:
    """Records ``γ[d, w] += w_{k+1} − w_k`` over every step of training example d, at batch size 1, in a loop of torch.

    ::

        with RollbackRecorder(optimizer, touched=model, examples=triples) as recorder:
            for d in order:
                optimizer.zero_grad()
                loss(model, triples[d]).backward()
                recorder.step(d)          # in place of optimizer.step()
        record = recorder.record

    The difference of the rows is taken, whatever the optimiser made of the gradient. An optimiser with momentum,
    Adam's averages or weight decay also changes rows that have no gradient in a step, by gradients of earlier examples.
    Such an optimiser is refused.

    Args:
        optimizer: Of the training loop; its parameters must include the tables.
        touched: The model, whose tables are recorded.
        examples: ``(n, m + 1)`` training examples.
        all_rows: Record every row that changed, not only those of the example. Compares whole tables at every step.
        out: Stream the record to this HDF5 file; by default it stays in memory.
        names: Names of the rows, by table, kept in the record.

    Attributes:
        record: The :class:`Record`, once the ``with`` block has ended without an error; None before.

    Raises:
        ArgumentError: The examples do not fit the model, or the optimiser lacks a table.
        ModelError: The optimiser changes rows without a gradient, or cannot be probed.
        StorageError: No record can be written at ``out``.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        touched: FactorModel,
        examples: Array,
        *,
        all_rows: bool = False,
        out: str | Path | None = None,
        names: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        if not isinstance(touched, FactorModel):
            raise ArgumentError(
                "touched: expected a FactorModel (DistMult, ComplEx, MatrixFactorization, or a subclass of your "
                f"own), got {type(touched).__name__}"
            )
        self._model, self._optimizer, self._all_rows = touched, optimizer, all_rows
        self._examples = touched.check_examples(examples, least=1)
        groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
        for name, table in touched.tables.items():
            if id(table) not in groups:
                raise ArgumentError(
                    f"optimizer: does not hold the table {name!r} of the model; pass model.parameters() to it"
                )
            check_optimizer(optimizer, groups[id(table)])
        self._names, self._out = names, out
        self._builder: RecordBuilder | None = None
        self.record: Record | None = None

    def __enter__(self) -> RollbackRecorder:
        self.record = None
        self._builder = RecordBuilder(self._model, self._examples, self._all_rows, self._names, self._out)
        return self

    def step(self, example: int) -> None:
        """Call ``optimizer.step()`` for one training example, and record it.

        Args:
            example: Its position in ``examples``; the gradients must be of its loss alone.

        Raises:
            ArgumentError: There is no such example.
            ModelError: Outside the ``with`` block; or the weights are no longer finite.
        """
        if self._builder is None:
            raise ModelError("RollbackRecorder.step: call it inside 'with RollbackRecorder(…) as recorder:'")
        if not isinstance(example, int | np.integer) or not 0 <= example < len(self._examples):
            raise ArgumentError(f"example: expected a position below {len(self._examples)}, got {example!r}")
        tables = {name: table.detach() for name, table in self._model.tables.items()}
        own = list(zip(self._model.columns, self._examples[example].tolist(), strict=True))
        before = {}
        for name, table in tables.items():
            rows = range(len(table)) if self._all_rows else sorted({row for column, row in own if column == name})
            index = torch.tensor(rows, dtype=torch.long, device=table.device)
            before[name] = index, table[index]
        self._optimizer.step()
        for name, (index, old) in before.items():
            change = (tables[name][index] - old).cpu()
            if not torch.isfinite(change).all():
                raise ModelError(
                    f"training diverged at example {example}: table {name!r} is not finite; lower the learning rate"
                )
            changed = change.any(1)
            self._builder.sums[name].add_rows(int(example), index.cpu()[changed].tolist(), change[changed].numpy())

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        builder, self._builder = self._builder, None
        assert builder is not None
        if error is None:
            self.record = builder.finish()


def check_optimizer(optimizer: Optimizer, group: Mapping[str, Any]) -> None:
    """Make sure that an optimiser does not change rows without a gradient.

    An optimiser of the same class and the group's options takes two steps on a parameter of its own, the second step
    with a gradient in one of two rows.

    Raises:
        ModelError: It changes such rows, or cannot be tried out.
    """
    name = type(optimizer).__name__
    accepted = inspect.signature(type(optimizer)).parameters
    options = {key: value for key, value in group.items() if key in accepted and key != "params"}
    sparse = isinstance(optimizer, torch.optim.SparseAdam)
    try:
        probe = torch.nn.Parameter(torch.ones(2, 1))
        trial = type(optimizer)([probe], **options)
        for gradient in ([[1.0], [1.0]], [[0.0], [1.0]]):
            full = torch.tensor(gradient)
            probe.grad = full.to_sparse(1) if sparse else full
            before = probe.detach().clone()
            trial.step()
    except Exception as error:
        raise ModelError(
            f"optimizer: {name} could not be tried out ({type(error).__name__}: {error}), so that it is not known "
            "whether it changes rows without a gradient; its class must be made from parameters and the group's options"
        ) from error
    if bool((probe.detach() != before)[0]):
        raise ModelError(
            f"optimizer: {name} with these options changes rows that have no gradient (momentum, running averages or "
            "weight decay), so that the changes in a step are not due to its example alone; use SGD without momentum "
            "and weight decay, Adagrad, or SparseAdam with sparse gradients"
        )
