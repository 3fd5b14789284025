"""Recording a training loop of one's own, with any torch optimiser whose steps can be told apart."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.optim import Optimizer

from npeff.companions.rollback.models import MODELS, FactorModel
from npeff.companions.rollback.record import Record, finish_record, open_accumulators
from npeff.errors import ArgumentError, ModelError

Array = npt.NDArray[Any]


class RollbackRecorder:
    """Records ``γ[d, w] += w_{k+1} − w_k`` over every step that training example d makes, at batch size 1.

    ::

        with RollbackRecorder(optimizer, touched=model, examples=triples) as recorder:
            for d in order:
                optimizer.zero_grad()
                loss(model, triples[d]).backward()
                recorder.step(d)          # in place of optimizer.step()
        record = recorder.record

    The difference of the rows is taken, whatever the optimiser made of the gradient. An optimiser with momentum,
    Adam's averages or weight decay also moves rows that have no gradient in a step; those moves belong to earlier
    examples. It is refused, unless ``momentum="accept"``: then the example's own rows are recorded with what earlier
    steps left in them, and moves of other rows go to no example.

    Args:
        optimizer: Of the training loop; its parameters must include the tables.
        touched: The model, whose tables are recorded.
        examples: ``(n, m + 1)`` training examples.
        negatives: Record every row that moved, not only those of the example. Compares whole tables at every step.
        momentum: ``"refuse"`` or ``"accept"`` an optimiser that moves rows without a gradient.
        out: Stream the record to this HDF5 file; by default it stays in memory.
        names: Names of the rows, by table, kept in the record.

    Attributes:
        record: The :class:`Record`, once the ``with`` block has ended well; None before.

    Raises:
        ArgumentError: The examples do not fit the model, the optimiser lacks a table, or an option is none.
        ModelError: The optimiser moves rows without a gradient, or cannot be probed.
        StorageError: No record can be written at ``out``.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        touched: FactorModel,
        examples: Array,
        *,
        negatives: bool = False,
        momentum: Literal["refuse", "accept"] = "refuse",
        out: str | Path | None = None,
        names: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        if not isinstance(touched, FactorModel):
            raise ArgumentError(
                "touched: expected a FactorModel (DistMult, ComplEx, MatrixFactorization, or a subclass of your "
                f"own), got {type(touched).__name__}"
            )
        if momentum not in ("refuse", "accept"):
            raise ArgumentError(f"momentum: expected 'refuse' or 'accept', got {momentum!r}")
        self._model, self._optimizer, self._negatives = touched, optimizer, negatives
        self._examples = touched.check_examples(examples, least=1)
        groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
        for name, table in touched.tables.items():
            if id(table) not in groups:
                raise ArgumentError(
                    f"optimizer: does not hold the table {name!r} of the model; pass model.parameters() to it"
                )
            if momentum == "refuse":
                check_optimizer(optimizer, groups[id(table)])
        self._names = {table: list(given) for table, given in (names or {}).items()}
        self._out = out
        self._initial: dict[str, Array] | None = None
        self.record: Record | None = None

    def __enter__(self) -> RollbackRecorder:
        self._initial = self._model.numpy_tables()
        self.record = None
        sizes = {name: tuple(table.shape) for name, table in self._initial.items()}
        self._sums, self._path = open_accumulators(sizes, len(self._examples), self._out)
        return self

    def step(self, example: int, closure: Any = None) -> Any:
        """``optimizer.step()`` for one training example, recorded.

        Args:
            example: Its position in ``examples``; the gradients must be of its loss alone.
            closure: Passed on to the optimiser.

        Returns:
            What the optimiser returned.

        Raises:
            ArgumentError: There is no such example.
            ModelError: Outside the ``with`` block; or the weights are no longer finite.
        """
        if self._initial is None:
            raise ModelError("RollbackRecorder.step: call it inside 'with RollbackRecorder(…) as recorder:'")
        if not isinstance(example, int | np.integer) or not 0 <= example < len(self._examples):
            raise ArgumentError(f"example: expected a position below {len(self._examples)}, got {example!r}")
        example = int(example)
        rows = {name: self._own(example, name) for name in self._model.tables}
        before = {name: self._read(name, rows[name]) for name in rows}
        result = self._optimizer.step(closure)
        for name, given in rows.items():
            change = self._read(name, given) - before[name]
            if not torch.isfinite(change).all():
                raise ModelError(
                    f"training diverged at example {example}: table {name!r} is not finite; lower the learning rate"
                )
            at = torch.arange(len(change)) if given is None else given
            moved = torch.nonzero(change.any(1)).flatten()
            self._sums[name].add_rows(example, at[moved].tolist(), change[moved].numpy())
        return result

    def _own(self, example: int, table: str) -> Tensor | None:
        """Rows to compare: the example's own, or (None) all."""
        if self._negatives:
            return None
        return torch.tensor(
            sorted(
                {
                    int(row)
                    for row, name in zip(self._examples[example], self._model.columns, strict=True)
                    if name == table
                }
            )
        )

    def _read(self, table: str, rows: Tensor | None) -> Tensor:
        values = self._model.tables[table].detach()
        return values.clone().cpu() if rows is None else values[rows.to(values.device)].cpu()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        initial, self._initial = self._initial, None
        assert initial is not None
        if error is not None:
            for sums in self._sums.values():
                sums.close()
            return
        made = Record(
            examples=self._examples,
            columns=tuple(self._model.columns),
            moves={},
            initial=initial,
            final=self._model.numpy_tables(),
            model_kind=next((name for name, cls in MODELS.items() if type(self._model) is cls), None),
            model_options=self._model.options,
            names=self._names,
            negatives=self._negatives,
        )
        self.record = finish_record(made, self._sums, self._path)


def check_optimizer(optimizer: Optimizer, group: Mapping[str, Any] | None = None) -> None:
    """Make sure that an optimiser leaves rows without a gradient where they are.

    Tried out: an optimiser of the same class and options takes two steps on a parameter of its own, the second one
    with a gradient in one of two rows.

    Args:
        optimizer: Is not touched.
        group: The parameter group whose options count; by default the first.

    Raises:
        ModelError: It moves them, or cannot be tried out.
    """
    name = type(optimizer).__name__
    group = optimizer.param_groups[0] if group is None else group
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
            "whether it moves rows without a gradient; pass momentum='accept' if it does not, or if that may be"
        ) from error
    if bool((probe.detach() != before)[0]):
        raise ModelError(
            f"optimizer: {name} with these options moves rows that have no gradient (momentum, running averages or "
            "weight decay), so that a step's moves are not its example's alone; use SGD without momentum and weight "
            "decay, Adagrad, or SparseAdam with sparse gradients; or pass momentum='accept' to record the example's "
            "own rows all the same"
        )
