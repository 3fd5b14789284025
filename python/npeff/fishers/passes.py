"""The passes of a model over a batch.

A forward pass, the check that logits are finite, the cotangents of each example, and the cut of a batch that would not
fit the memory. Per-example Fishers, the mean Fisher, inner products and recovery all take their gradients from
:meth:`Run.passes`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from npeff.batches.batches import Batch
from npeff.batches.reading import read_batches
from npeff.batches.tensor_trees import OWN_BATCH
from npeff.errors import ArgumentError, DataError, ModelError, NpeffError, OutOfMemoryError
from npeff.fishers.block_weights import PilotEnergy, WeightedBlocks, given_weights
from npeff.fishers.budget import Budget
from npeff.fishers.factors import Factors, check_meaning, cotangent_bytes, factorise, width
from npeff.fishers.options import FisherOptions, Sketch
from npeff.gradients.blocks import Block, Pairs
from npeff.gradients.eligibility import differ, left_out
from npeff.gradients.engine import PerExampleGradients, Prepared
from npeff.models.devices import parse_bytes
from npeff.models.forward import ThreadSettings, call_model
from npeff.models.parameters import Parameters
from npeff.storage.container import package_version

Ids = npt.NDArray[np.int64]

PILOT = 64
"""Most examples on which balanced block weights are measured."""

_CHOSEN_ON = 2
"""So many sequences of the first batch choose the rules."""


@dataclass
class Pass:
    """Examples of one batch that go backward together; released when the next pass is asked for.

    Where examples are places, the forward pass of a batch serves several passes, each of some places of every sequence.
    Such a pass has K slots per sequence; those of sequences with fewer places are empty, and their cotangents zero.

    Attributes:
        run: The model and the options.
        batch: What went forward.
        ids: ``(n,)`` positions of the examples in the data.
        logits: ``(n, C)`` with their graph.
        factors: Cotangents of the examples; with slots of every slot, zero where it is empty.
        prepared: The rules that the graph calls for.
        slots: ``(b, K)`` which example of the batch each slot holds, −1 for none; None where examples are no places.
    """

    run: Run
    batch: Batch
    ids: Ids
    logits: Tensor
    factors: Factors
    prepared: Prepared
    slots: Tensor | None = None

    @property
    def n_columns(self) -> int:
        """Cotangents per example, R; examples with fewer have zeros."""
        return self.factors.columns.shape[2]

    @cached_property
    def _in_slots(self) -> Ids:
        """Which example of the batch each slot holds, slot by slot; −1 for none. Without slots, the examples."""
        return np.arange(len(self.ids)) if self.slots is None else self.slots.cpu().numpy().reshape(-1)

    @cached_property
    def filled(self) -> Ids:
        """``(n,)`` indices of the examples among factors and blocks, which may hold empty slots."""
        return np.flatnonzero(self._in_slots >= 0)

    @property
    def slot_ids(self) -> Ids:
        """The examples' positions in the data, slot by slot; −1 where a slot is empty."""
        ids = np.full(len(self.factors.counts), -1, np.int64)
        ids[self.filled] = self.ids
        return ids

    @property
    def places(self) -> Ids | None:
        """``(n, 2)`` sequence in the data and position of each example; None where examples are no places."""
        if self.slots is None or self.batch.places_in_data is None:
            return None
        return self.batch.places_in_data.cpu().numpy()[self._in_slots[self.filled]]

    def blocks(self, columns: Tensor | None = None, **how: Any) -> Iterator[Block | Pairs]:
        """Yield the gradients; see :meth:`PerExampleGradients.blocks`, of other columns than the factors' if given."""
        given = self.factors.columns if columns is None else columns
        return self.run.engine.blocks(self.prepared, given, slots=self.slots, **how)

    def stored_labels(self) -> Ids:
        """Return the classes ``(n,)`` of the examples, −1 where unknown."""
        labels, over_classes = self.run.labels(self.batch), self.run.options.over_classes
        n = self.batch.n_examples
        if labels is None or (not over_classes and (labels.is_floating_point() or labels.numel() != n)):
            return np.full(len(self.ids), -1, np.int64)
        stored = _as_classes(labels, n).cpu().numpy().astype(np.int64)
        return np.where(stored < 0, -1, stored)[self._in_slots[self.filled]]


@dataclass
class Run:
    """A model and the options of a call, which stay the same from batch to batch.

    Attributes:
        model: The model, on ``device``.
        device: Where batches are computed.
        parameters: The selected parameters' places in the flat vector.
        options: The options, checked.
        about_data: What the data say of themselves, for the provenance; JSON-able.
        block_weights: The weight of each parameter's block by name; None when all are 1. Set beforehand where earlier
            work is continued.
    """

    model: nn.Module
    device: torch.device
    parameters: Parameters
    options: FisherOptions
    about_data: Mapping[str, Any] = field(default_factory=dict)
    block_weights: dict[str, float] | None = None
    _meaning_checked: bool = False
    _outputs: tuple[int, bool] | None = None  # how many, and whether examples are places
    _first: tuple[Batch, Tensor, ThreadSettings] | None = None  # the first examples, and their logits

    @cached_property
    def engine(self) -> PerExampleGradients:
        """The per-example gradients of the model."""
        forward, likelihood = self.options.forward, self.options.likelihood
        return PerExampleGradients(
            self.model, self.parameters, lambda model, batch: call_model(model, forward, batch, likelihood)
        )

    @cached_property
    def weighted(self) -> Callable[[Block | Pairs], Block | Pairs]:
        """The function that weighs a block of this run."""
        if self.block_weights is None:
            return lambda block: block
        return WeightedBlocks(self.parameters, self.block_weights, self.options.kind == "diagonal")

    @cached_property
    def budget(self) -> Budget:
        """The limit on the examples of a batch that are taken at a time."""
        memory = self.options.memory
        return Budget(self.engine, None if memory is None else parse_bytes(memory))

    def batches(self, data: Iterable[Any]) -> Iterator[Batch]:
        """Yield the data as batches on the model's device, and cut the last one where ``max_examples`` ends.

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
            yield batch.compact()
            if left is not None:
                left -= batch.n_examples
                if left == 0:
                    return

    def choose_rules(self, batch: Batch) -> Tensor:
        """Choose the gradient rules on the first examples of the first batch; return their logits, on the CPU.

        Work that resumes after this batch chooses them on it as well, so that an interruption changes nothing.
        """
        most = self.budget.sequences_at_once(batch)
        if batch.sliceable and most > _CHOSEN_ON:
            with suppress(NpeffError):  # an error is the whole batch's, so that it names what the data yields
                logits = self._chosen(batch.take(batch.of_sequences(0, _CHOSEN_ON)))
                self._meaning_checked = False
                return logits
        return self._chosen(batch.take(batch.of_sequences(0, most)))

    def _chosen(self, batch: Batch) -> Tensor:
        with self.engine.recording():
            logits = self._forward(batch)
            self.engine.prepare(batch, logits)
            return logits.detach().cpu()

    def choose_block_weights(self, batch: Batch) -> None:
        """Settle the block weights, from the first examples of the first batch where these are to be balanced.

        Raises:
            ArgumentError: Given weights do not fit the parameters.
            DataError: Logits are not finite, or labels are missing.
            ModelError: Examples influence each other.
        """
        choice = self.options.block_weights
        if choice == "energy":
            self.block_weights = None
        elif isinstance(choice, Mapping):
            weights = given_weights(self.parameters.names, choice)
            self.block_weights = weights if any(weight != 1 for weight in weights.values()) else None
        elif self.block_weights is None:
            self.block_weights = self._balanced(batch)

    def _balanced(self, batch: Batch) -> dict[str, float]:
        """The weights that balance the layers on the first examples."""
        if batch.sliceable and batch.n_examples > PILOT:
            batch = batch.take(slice(0, PILOT))
        energy = PilotEnergy(self.parameters)
        with self.engine.recording():
            for one in self.passes(batch, np.arange(batch.n_examples)):
                energy.add(one.blocks(paired=lambda *_: True, gathered=True), len(one.factors.columns))
        return energy.weights()

    def passes(
        self,
        batch: Batch,
        ids: Ids,
        replace_logits: Callable[[Tensor, Ids], Tensor] | None = None,
    ) -> Iterator[Pass]:
        """Yield the passes over a batch: one, or several over parts of it that keep within the memory allowed.

        A batch of places goes forward once, as far as its activations fit; its places then go backward some at a
        time. To be used within ``engine.recording()``.

        Args:
            batch: The batch.
            ids: ``(b,)`` positions of its examples in the data.
            replace_logits: ``replace_logits(logits, ids)`` gives the logits to factorise in place of the model's.

        Raises:
            DataError: Logits are not finite, or labels are missing.
            ModelError: Examples influence each other.
        """
        most = self.budget.sequences_at_once(batch)
        if most == batch.n_sequences:
            found = self._started(batch, ids, replace_logits)
            if not isinstance(found, int):
                for one in found:
                    yield one
                    del one.logits, one.factors, one.prepared
                return
            most = found
        for start, stop in self.budget.pieces(batch, most):
            cut = batch.of_sequences(start, stop)
            if cut.start < cut.stop:
                yield from self.passes(batch.take(cut), ids[cut], replace_logits)

    def _started(
        self, batch: Batch, ids: Ids, replace_logits: Callable[[Tensor, Ids], Tensor] | None
    ) -> Iterator[Pass] | int:
        """The passes over the whole batch, or how many of its sequences fit into a forward pass."""
        logits, n = self._forward(batch), batch.n_examples
        self._check_logits(logits.detach(), ids)
        targets = self._targets(batch, logits.shape[1], ids)
        shown = logits if replace_logits is None else replace_logits(logits.detach(), ids)
        cotangents = cotangent_bytes(shown, self.options) // n
        if (most := self.budget.sequences_after(batch, cotangents)) < batch.n_sequences:
            return most
        whole = factorise(shown, self.options, targets, ids) if batch.places is None else None
        prepared = self.engine.prepare(batch, logits)
        n_columns = width(shown, self.options) if whole is None else whole.columns.shape[2]
        kept = prepared.kept_bytes(n_columns) // batch.n_sequences
        if isinstance(self.options.compress, Sketch):
            kept += 12 * self.options.compress.d * n_columns
        if (most := self.budget.sequences_after(batch, max(kept, cotangents))) < batch.n_sequences:
            return most
        if whole is not None:
            return iter([Pass(self, batch, ids, logits, whole, prepared)])
        at_once = self.budget.places_at_once(max(kept, cotangents)) // batch.n_sequences
        return self._by_places(batch, ids, logits, shown.detach(), targets, prepared, max(1, at_once))

    def _by_places(
        self,
        batch: Batch,
        ids: Ids,
        logits: Tensor,
        shown: Tensor,
        targets: Tensor | None,
        prepared: Prepared,
        at_once: int,
    ) -> Iterator[Pass]:
        """The passes over a batch's places, so many of each sequence at a time."""
        every = batch.slots()
        for start in range(0, every.shape[1], at_once):
            slots = every[:, start : start + at_once]
            held = slots.reshape(-1)[slots.reshape(-1) >= 0]
            some = ids[held.cpu().numpy()]
            factors = factorise(shown[held], self.options, None if targets is None else targets[held], some)
            prepared = self.engine.again(prepared) if start else prepared
            factors = factors.spread((slots.reshape(-1) >= 0).nonzero()[:, 0], slots.numel())
            own = logits if len(held) == batch.n_examples else logits[held]
            yield Pass(self, batch, some, own, factors, prepared, slots)

    def _forward(self, batch: Batch) -> Tensor:
        logits = self.engine.forward(batch)
        found = logits.shape[1], batch.places is not None
        if found != (known := self._outputs or found):
            expected, got = (f"{n} {'of every place' if places else 'of an example'}" for n, places in (known, found))
            raise DataError(f"logits: expected {expected} as in the batches before, got {got}")
        self._outputs = found
        if not self._meaning_checked or self.options.likelihood == "probabilities":
            check_meaning(logits, self.options.likelihood)
            self._meaning_checked = True
        if self._first is None and batch.sliceable:
            some = batch.one_each()[:_CHOSEN_ON]
            shown = logits.detach()[some.to(logits.device)]
            self._first = batch.take(some), shown, ThreadSettings(self.device)
        return logits

    def check_function(self) -> None:
        """Check that the model gives the first examples the logits that it gave them at first; on any thread.

        Raises:
            ModelError: It does not.
        """
        if self._first is None:
            return
        batch, before, settings = self._first
        with suppress(OutOfMemoryError), self.engine.recording():
            again = settings.run(lambda: self.engine.run(batch).detach())
            if differ(again, before, self.engine.precision or before.dtype):
                raise ModelError(
                    "model: it gives the first examples other logits than at the beginning, with the same weights, so "
                    "it keeps something from call to call; reset that in forward=callable(model, batch) -> logits"
                )

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
        """Return the batch's labels; None if the second item is something else that ``forward=`` or ``take`` uses."""
        options = self.options
        own = options.forward is not None or batch.cut_by_user
        wanted = options.labels == "true" or not options.over_classes
        if own and not wanted and batch.labels is not None and batch.labels.numel() != batch.n_examples:
            return None
        return batch.labels

    def coverage(self) -> list[dict[str, str]]:
        """List the rule that serves each parameter, and why; include parameters that have no Fisher."""
        return self.engine.coverage() + left_out(self.model)

    def header(self, digest: str, n_outputs: int) -> dict[str, Any]:
        """Return what determines the result, for files: kind, parameters, provenance."""
        described = self.options.describe(self.parameters, n_outputs)
        if self.block_weights is not None:
            choice = self.options.block_weights
            chosen = choice if isinstance(choice, str) else "given"
            described["block_weights"] = {"choice": chosen, "weights": self.block_weights}
        return {
            "kind": self.options.kind,
            "parameters": self.parameters.to_json(),
            "provenance": {
                "model": type(self.model).__name__,
                "model_digest": digest,
                "options": described,
                "versions": {"npeff": package_version(), "torch": torch.__version__},
                **self.about_data,
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
