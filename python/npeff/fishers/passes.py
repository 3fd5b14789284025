"""The passes of a model over a batch: forward, finite check, factorise, cut by bytes, backward, blocks.

Per-example Fishers, the mean Fisher, inner products and recovery all take their gradients from :meth:`Run.passes`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from npeff.batches.batches import OWN_BATCH, Batch, read_batches
from npeff.errors import ArgumentError, DataError
from npeff.fishers.factors import Factors, check_meaning, cotangent_bytes, factorise
from npeff.fishers.options import FisherOptions, Sketch, TopK
from npeff.gradients.budget import Budget
from npeff.gradients.engine import PerExampleGradients, Prepared
from npeff.gradients.rules import Rule
from npeff.gradients.selection import left_out
from npeff.gradients.tiles import Block, Pairs
from npeff.models.forward import call_model
from npeff.models.memory import parse_bytes
from npeff.models.parameters import Parameter, Parameters
from npeff.storage.container import package_version

Ids = npt.NDArray[np.int64]


@dataclass
class Pass:
    """Examples of one batch that go forward and backward together; released when the next pass is asked for.

    Attributes:
        run: The model and the options.
        batch: The examples.
        ids: ``(b,)`` their positions in the data.
        logits: ``(b, C)`` with their graph.
        factors: Their cotangents.
        prepared: The rules that the graph calls for; None where no per-example gradients are wanted.
    """

    run: Run
    batch: Batch
    ids: Ids
    logits: Tensor
    factors: Factors
    prepared: Prepared | None

    @property
    def n_columns(self) -> int:
        """Cotangents per example, R; examples with fewer have zeros."""
        return self.factors.columns.shape[2]

    def blocks(
        self,
        paired: Callable[[Parameter, list[Rule]], bool] | None = None,
        among: Iterable[str] | None = None,
        gathered: bool = False,
    ) -> Iterator[Block | Pairs]:
        """Run the backward passes; yield the per-example gradients, Σ of their squares for diagonal Fishers.

        Args:
            paired: Decides for which parameters the factors are yielded in place of their products.
            among: The parameters wanted; None: all.
            gathered: Small neighbouring parameters may come in one block.
        """
        assert self.prepared is not None, "per-example gradients were asked for"
        if among is not None:
            wanted, prepared = set(among), self.prepared
            prepared.rules = {name: rules for name, rules in prepared.rules.items() if name in wanted}
            prepared.others = [name for name in prepared.others if name in wanted]
        options = self.run.options
        return self.run.engine.blocks(
            self.prepared,
            self.factors.columns,
            squared=options.kind == "diagonal",
            paired=paired,
            last_first=isinstance(options.compress, TopK),
            gathered=gathered,
        )

    def stored_labels(self) -> Ids:
        """``(b,)`` classes, −1 where unknown."""
        labels, over_classes = self.run.labels(self.batch), self.run.options.over_classes
        n = self.batch.n_examples
        if labels is None or (not over_classes and (labels.is_floating_point() or labels.numel() != n)):
            return np.full(n, -1, np.int64)
        stored = _as_classes(labels, n).cpu().numpy().astype(np.int64)
        return np.where(stored < 0, -1, stored)


@dataclass
class Run:
    """A model and the options of a call: what stays the same from batch to batch.

    Attributes:
        model: The model, on ``device``.
        device: Where batches are computed.
        parameters: The selected parameters' places in the flat vector.
        options: The options, checked.
    """

    model: nn.Module
    device: torch.device
    parameters: Parameters
    options: FisherOptions
    _meaning_checked: bool = False

    @cached_property
    def engine(self) -> PerExampleGradients:
        """The per-example gradients of the model."""
        forward, likelihood = self.options.forward, self.options.likelihood
        return PerExampleGradients(
            self.model, self.parameters, lambda model, batch: call_model(model, forward, batch, likelihood)
        )

    @cached_property
    def budget(self) -> Budget:
        """How many examples of a batch are taken at a time."""
        memory = self.options.memory
        return Budget(self.engine, None if memory is None else parse_bytes(memory))

    def batches(self, data: Iterable[Any]) -> Iterator[Batch]:
        """The data as batches on the model's device, the last one cut where ``max_examples`` ends.

        Raises:
            ArgumentError: It ends within a batch that cannot be cut.
        """
        left = self.options.max_examples
        given = read_batches(data, self.device, self.options.forward is not None, self.options.over_classes)
        for number, batch in enumerate(given):
            if left is not None and batch.n_examples > left:
                if not batch.sliceable:
                    raise ArgumentError(
                        f"max_examples: it ends within batch {number}, which cannot be cut; choose a "
                        f"multiple of the batch size, or {OWN_BATCH}"
                    )
                batch = batch.take(slice(0, left))
            yield batch.apart()
            if left is not None:
                left -= batch.n_examples
                if left == 0:
                    return

    def choose_rules(self, batch: Batch) -> Tensor:
        """Choose the gradient rules on the first examples of the first batch.

        Work that resumes after this batch chooses them on it as well, so that an interruption changes nothing.

        Returns:
            The logits of these examples, on the CPU.
        """
        if not self.budget.unbounded:
            batch = batch.take(slice(0, self.budget.examples_at_once(batch)))
        with self.engine.recording():
            logits = self._forward(batch)
            self.engine.prepare(batch, logits)
            return logits.detach().cpu()

    def passes(
        self,
        batch: Batch,
        ids: Ids,
        *,
        per_example: bool = True,
        replace_logits: Callable[[Tensor, Ids], Tensor] | None = None,
    ) -> Iterator[Pass]:
        """The passes over a batch: one, or several over parts of it that keep within the memory allowed.

        To be used within ``engine.recording()``.

        Args:
            batch: The batch.
            ids: ``(b,)`` positions of its examples in the data.
            per_example: Per-example gradients will be asked for (:meth:`Pass.blocks`).
            replace_logits: ``replace_logits(logits, ids)`` gives the logits that are factorised in place of those
                that the model gives.

        Raises:
            DataError: Logits are not finite, or labels are missing.
            ModelError: Examples influence each other.
        """
        most = self.budget.examples_at_once(batch)
        if most == batch.n_examples:
            one = self._pass(batch, ids, per_example, replace_logits)
            if isinstance(one, Pass):
                yield one
                del one.logits, one.factors, one.prepared
                return
            most = one
        for cut in self.budget.pieces(batch, most):
            yield from self.passes(batch.take(cut), ids[cut], per_example=per_example, replace_logits=replace_logits)

    def _pass(
        self, batch: Batch, ids: Ids, per_example: bool, replace_logits: Callable[[Tensor, Ids], Tensor] | None
    ) -> Pass | int:
        """The whole batch in one pass, or how many of its examples fit into one."""
        logits = self._forward(batch)
        self._check_logits(logits.detach(), ids)
        targets = self._targets(batch, logits.shape[1], ids)
        shown = logits if replace_logits is None else replace_logits(logits.detach(), ids)
        cotangents = cotangent_bytes(shown, self.options)
        if (most := self.budget.examples_after(batch, cotangents)) < batch.n_examples:
            return most
        factors = factorise(shown, self.options, targets, ids)
        if not per_example:
            return Pass(self, batch, ids, logits, factors, None)
        prepared, n_columns = self.engine.prepare(batch, logits), factors.columns.shape[2]
        kept = prepared.kept_bytes(n_columns)
        if isinstance(self.options.compress, Sketch):
            kept += 12 * self.options.compress.d * batch.n_examples * n_columns
        if (most := self.budget.examples_after(batch, max(kept, cotangents))) < batch.n_examples:
            return most
        return Pass(self, batch, ids, logits, factors, prepared)

    def _forward(self, batch: Batch) -> Tensor:
        logits = self.engine.forward(batch)
        if not self._meaning_checked or self.options.likelihood == "probabilities":
            check_meaning(logits, self.options.likelihood)
            self._meaning_checked = True
        return logits

    def _check_logits(self, logits: Tensor, ids: Ids) -> None:
        """Refuse logits that are not finite.

        Raises:
            DataError: Naming the example.
        """
        finite = torch.isfinite(logits)
        if not bool(finite.all()):
            bad = int((~finite.all(dim=1)).to(torch.uint8).argmax())
            raise DataError(
                f"logits: example {ids[bad]} has the logits {logits[bad, :8].tolist()}; find what "
                "overflows in the model on it, or leave it out of the data"
            )

    def _targets(self, batch: Batch, n_outputs: int, ids: Ids) -> Tensor | None:
        """The batch's labels, checked where they are classes.

        Raises:
            DataError: There is no such class.
        """
        labels = self.labels(batch)
        if labels is None or not self.options.over_classes:
            return labels
        classes = _as_classes(labels, batch.n_examples)
        beyond = classes >= n_outputs
        if bool(beyond.any()):
            first = int(beyond.to(torch.uint8).argmax())
            raise DataError(
                f"labels: example {ids[first]}{batch.describe(first)} has label {int(classes[first])}; expected "
                f"0 ≤ label < {n_outputs}, "
                "the number of logits, or a negative label where it is unknown"
            )
        return classes

    def labels(self, batch: Batch) -> Tensor | None:
        """The batch's labels, unless its second item is something else that ``forward=``, or ``take``, understands."""
        options = self.options
        own = options.forward is not None or batch.cut_by_user
        wanted = options.labels == "true" or not options.over_classes
        if own and not wanted and batch.labels is not None and batch.labels.numel() != batch.n_examples:
            return None
        return batch.labels

    def coverage(self) -> list[dict[str, str]]:
        """Per parameter, the rule that serves it, and why; those that have no Fisher too."""
        return self.engine.coverage() + left_out(self.model)

    def header(self, digest: str, n_outputs: int) -> dict[str, Any]:
        """What decides the result, for files: kind, parameters, provenance."""
        return {
            "kind": self.options.kind,
            "parameters": self.parameters.to_json(),
            "provenance": {
                "model": type(self.model).__name__,
                "model_digest": digest,
                "options": self.options.describe(self.parameters, n_outputs),
                "versions": {"npeff": package_version(), "torch": torch.__version__},
            },
        }


def _as_classes(labels: Tensor, n: int) -> Tensor:
    if labels.dim() == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    whole = labels.is_floating_point() and bool(((labels == labels.round()) & (labels.abs() < 2**63)).all())
    if labels.shape != (n,) or labels.is_complex() or (labels.is_floating_point() and not whole):
        raise DataError(
            f"labels: expected ({n},) integer classes, got {tuple(labels.shape)} {labels.dtype}; leave them "
            "out of the batch, or turn them into classes"
        )
    classes = labels.to(torch.int64)
    if labels.dtype == torch.uint64 and bool((classes < 0).any()):
        raise DataError("labels: expected integer classes below 2⁶³")
    return classes
