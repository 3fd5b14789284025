"""One run of compute_fishers: batch after batch, checked, compressed and written."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from tqdm import tqdm

from npeff.batches.batch_order import FixedOrder, Repeats
from npeff.batches.batches import OWN_BATCH, Batch, batch_digest, call_model, read_batches
from npeff.errors import ArgumentError, DataError, ResumeError
from npeff.fishers.collect import Collector
from npeff.fishers.compress import Compression, GramOnly, Sketch, TopK
from npeff.fishers.fishers import Fishers
from npeff.fishers.pipeline import Course, UnderWay
from npeff.fishers.rows import Kind
from npeff.fishers.shards import FisherWriter
from npeff.gradients.budget import Budget
from npeff.gradients.eligibility import differ
from npeff.gradients.engine import PerExampleGradients
from npeff.gradients.factors import FactorOptions, check_meaning, cotangent_bytes, factorise
from npeff.gradients.selection import left_out
from npeff.kernels.transfers import to_host
from npeff.models import devices
from npeff.models.digests import ModelWatch
from npeff.models.parameters import Parameters

Forward = Callable[[Any, Any], Any]


class EmptyShareError(DataError):
    """No batch falls to a share: there are more shares than batches."""


@dataclass
class Run:
    """One call of compute_fishers: everything that stays the same from batch to batch."""

    model: nn.Module
    device: torch.device
    parameters: Parameters
    kind: Kind
    compress: Compression | None
    options: FactorOptions
    forward: Forward | None
    share: tuple[int, int] | None = None
    memory: int | None = None

    @cached_property
    def engine(self) -> PerExampleGradients:
        """The per-example gradients of the model."""
        return PerExampleGradients(
            self.model,
            self.parameters,
            lambda model, batch: call_model(model, self.forward, batch, self.options.likelihood),
        )

    @cached_property
    def budget(self) -> Budget:
        """How much of a batch is taken at a time."""
        return Budget(self.engine, self.memory)

    def over(
        self, data: Iterable[Any], out: Path | None, max_examples: int | None, progress: bool, patterns: Any
    ) -> Fishers:
        """All batches, one after the other; resumed where ``out`` holds part of them.

        Raises:
            DataError: The data is empty, or gives non-finite logits or gradients.
            EmptyShareError: No batch falls to this share.
        """
        watch = ModelWatch(self.model)
        self.engine  # noqa: B018  a model without per-example gradients is refused before its data are touched
        order, repeats = FixedOrder(data, lambda: self.batches(data, max_examples)), Repeats(data)
        batches = self.batches(data, max_examples)
        first = next(batches, None)
        if first is None:
            raise DataError(
                "data: it yielded no batches; if it is a generator it may be used up: pass a DataLoader or a list"
            )
        order.check(first)
        with self.engine.recording():
            # Rules are chosen on the first batch, also when work resumes after it: a kill changes nothing.
            head = first if self.budget.unbounded else first.take(slice(0, self.budget.examples_at_once(first)))
            logits = self.engine.forward(head)
            n_outputs = logits.shape[1]
            check_meaning(logits, self.options.likelihood)
            self.engine.prepare(head, logits)
            first_logits = logits.detach().cpu()
            del logits
        header = self.header(watch.digest, n_outputs, max_examples, patterns)
        try:
            total = len(data)  # type: ignore[arg-type]
        except TypeError:
            total = None
        if total is not None and max_examples is not None:
            total = min(total, -(-max_examples // first.n_examples))
        if total is not None and self.share is not None:
            total = len(range(self.share[0], total, self.share[1]))
        done = 0
        course = Course(self.begin, watch, deferred=devices.has_own_memory(self.device))
        bar = tqdm(total=total, desc="Fishers", unit="batch", disable=not progress, smoothing=0.05)
        with bar, FisherWriter(out, header, validate=course.validate) as writer:
            with course.writing(writer):
                for number, batch in enumerate(chain([first], batches)):
                    if self.share is not None and number % self.share[1] != self.share[0]:
                        done += batch.n_examples
                        continue
                    digest = batch_digest(batch)
                    repeats.add(digest)
                    if writer.skip(digest, batch.n_examples):
                        if done == 0:
                            _check_function(writer.stored_logits(batch.n_examples), first_logits, out)
                        _pass_over(bar)
                    else:
                        course.add(batch, np.arange(done, done + batch.n_examples, dtype=np.int64), digest)
                        bar.update(1)
                    done += batch.n_examples
                    bar.set_postfix(examples=done, refresh=False)
                repeats.end()
            watch.check(thorough=True)
            if self.share is not None and not writer.examples_done:
                raise EmptyShareError("share: {} of {}: the data has fewer batches".format(*self.share))
            return writer.finish(self.coverage())

    def read(self, data: Iterable[Any]) -> Iterator[Batch]:
        """The data as batches on the model's device."""
        return read_batches(data, self.device, self.forward is not None)

    def coverage(self) -> list[dict[str, str]]:
        """Per parameter, the rule that serves it, and why; those that have no Fisher too."""
        return self.engine.coverage() + left_out(self.model)

    def batches(self, data: Iterable[Any], max_examples: int | None) -> Iterator[Batch]:
        """The batches, the last one cut where ``max_examples`` ends.

        Raises:
            ArgumentError: It ends within a batch that cannot be cut.
        """
        left = max_examples
        for number, batch in enumerate(self.read(data)):
            if left is not None and batch.n_examples > left:
                if not batch.sliceable:
                    raise ArgumentError(
                        f"max_examples: it ends within batch {number}, which cannot be cut; choose a "
                        f"multiple of the batch size, or {OWN_BATCH}"
                    )
                batch = batch.take(slice(0, left))
            yield batch
            if left is not None:
                left -= batch.n_examples
                if left == 0:
                    return

    def begin(self, batch: Batch, ids: npt.NDArray[np.int64], at_once: bool = True) -> UnderWay:
        """Compute the Fishers of one batch; in pieces when the backward passes would keep too much at once.

        Args:
            batch: The batch.
            ids: ``(b,)`` positions of its examples.
            at_once: Refuse gradients that are not finite here; otherwise a device is not waited for, and
                :meth:`UnderWay.finite` tells.

        Raises:
            DataError: Logits or gradients are not finite, or labels are missing.
        """
        most = self.budget.examples_at_once(batch)
        if most < batch.n_examples:
            return self._in_pieces(batch, ids, at_once, most)
        squared = self.kind == "diagonal"
        with self.engine.recording():
            logits = self.engine.forward(batch)
            detached = logits.detach().to(torch.float64)
            self.check_logits(detached, ids)
            targets = self.targets(batch, logits.shape[1], ids)
            cotangents = cotangent_bytes(logits, self.options)
            most = self.budget.examples_after(batch, cotangents)
            if most == batch.n_examples:
                factors = factorise(logits, self.options, targets, ids)
                prepared = self.engine.prepare(batch, logits)
                kept = prepared.kept_bytes(factors.columns.shape[2])
                if isinstance(self.compress, Sketch):
                    kept += 12 * self.compress.d * batch.n_examples * factors.columns.shape[2]
                most = self.budget.examples_after(batch, max(kept, cotangents))
                if most == batch.n_examples:
                    collector = Collector(self.parameters, factors, ids, squared, self.compress, at_once)
                    for block in self.engine.blocks(
                        prepared,
                        factors.columns,
                        squared=squared,
                        paired=collector.paired,
                        last_first=isinstance(self.compress, TopK),
                        gathered=self.compress is not None,
                    ):
                        collector.add(block)
                    shown = to_host(detached.to(torch.float32))
                    return UnderWay([(collector.finish(), shown, self.stored_labels(batch), ids)])
                del prepared, factors
        del logits, detached
        return self._in_pieces(batch, ids, at_once, most)

    def _in_pieces(self, batch: Batch, ids: npt.NDArray[np.int64], at_once: bool, most: int) -> UnderWay:
        cuts = self.budget.pieces(batch, most)
        return UnderWay([part for cut in cuts for part in self.begin(batch.take(cut), ids[cut], at_once).parts])

    def check_logits(self, logits: Tensor, ids: npt.NDArray[np.int64]) -> None:
        """Refuse logits that are not finite.

        Raises:
            DataError: Naming the example.
        """
        if self.options.likelihood == "probabilities":
            check_meaning(logits, "probabilities")
        finite = torch.isfinite(logits).all(dim=1)
        if not bool(finite.all()):
            bad = int((~finite).to(torch.uint8).argmax())
            raise DataError(
                f"logits: example {ids[bad]} has the logits {logits[bad, :8].tolist()}; find what "
                "overflows in the model on it, or leave it out of the data"
            )

    def targets(self, batch: Batch, n_outputs: int, ids: npt.NDArray[np.int64]) -> Tensor | None:
        """The batch's labels, checked where they are classes.

        Raises:
            DataError: There is no such class.
        """
        labels = self._labels(batch)
        if labels is None or not self.options.over_classes:
            return labels
        classes = _as_classes(labels, batch.n_examples)
        beyond = classes >= n_outputs
        if bool(beyond.any()):
            first = int(beyond.to(torch.uint8).argmax())
            raise DataError(
                f"labels: example {ids[first]} has label {int(classes[first])}; expected 0 ≤ label < {n_outputs}, "
                "the number of logits, or a negative label where it is unknown"
            )
        return classes

    def _labels(self, batch: Batch) -> Tensor | None:
        """The batch's labels, unless its second item is something else that ``forward=``, or ``take``, understands."""
        own = self.forward is not None or batch.cut_by_user
        wanted = self.options.labels == "true" or not self.options.over_classes
        if own and not wanted and batch.labels is not None and batch.labels.numel() != batch.n_examples:
            return None
        return batch.labels

    def stored_labels(self, batch: Batch) -> npt.NDArray[np.int64]:
        """``(b,)`` classes, −1 where unknown."""
        labels = self._labels(batch)
        if labels is None or (
            not self.options.over_classes and (labels.is_floating_point() or labels.numel() != batch.n_examples)
        ):
            return np.full(batch.n_examples, -1, np.int64)
        stored = _as_classes(labels, batch.n_examples).cpu().numpy().astype(np.int64)
        return np.where(stored < 0, -1, stored)

    def header(self, digest: str, n_outputs: int, max_examples: int | None, patterns: Any) -> dict[str, Any]:
        """What decides the result, for files: kind, parameters, provenance."""
        return _header_of(self, digest, n_outputs, max_examples, patterns)


def _pass_over(bar: tqdm[Any]) -> None:
    """Count a batch that an earlier run did: it says nothing about the speed of this one."""
    bar.update(1)
    if not bar.disable:
        bar.initial = bar.n
        bar.start_t = bar.last_print_t = time.time()


def _check_function(stored: npt.NDArray[np.float32] | None, logits: Tensor, out: Path | None) -> None:
    """Refuse to continue work with a model that computes something else with the same weights.

    Raises:
        ResumeError: The first batch has other logits than it had.
    """
    if stored is None:
        return
    before = torch.from_numpy(np.array(stored))[: len(logits)]
    if before.shape != logits.shape or not bool(torch.isfinite(logits).all()) or differ(logits, before, logits.dtype):
        raise ResumeError(
            f"the model gives other logits than those that {out} was computed from, although its weights are the "
            "same: its code or forward= changed. Use them as they were, choose another out, or remove it "
            "to start anew."
        )


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


def _header_of(run: Run, digest: str, n_outputs: int, max_examples: int | None, patterns: Any) -> dict[str, Any]:
    """What decides the result, for files: kind, parameters, provenance."""
    return {
        "kind": run.kind,
        "parameters": run.parameters.to_json(),
        "provenance": {
            "model": type(run.model).__name__,
            "model_digest": digest,
            "options": _described(run, n_outputs, max_examples, patterns),
            "versions": {"npeff": _version(), "torch": torch.__version__},
        },
    }


def _described(run: Run, n_outputs: int, max_examples: int | None, patterns: Any) -> dict[str, Any]:
    options = {name: getattr(run.options, name) for name in FactorOptions.__dataclass_fields__}
    described = {"kind": run.kind, **options, "max_examples": max_examples}
    described["parameters"] = [patterns] if isinstance(patterns, str) else None if patterns is None else list(patterns)
    if run.share is not None:
        described["share"] = list(run.share)
    described["compress"] = None
    if isinstance(run.compress, Sketch):
        n_two_sided = sum(run.compress.two_sided(p.shape) for p in run.parameters)
        if run.compress.d >= run.parameters.n_parameters:
            warnings.warn(
                f"Sketch(d={run.compress.d}): the model has {run.parameters.n_parameters} parameters, so exact "
                "rows (compress=None) are no longer than sketches, and exact",
                stacklevel=6,
            )
        described["compress"] = {**run.compress.describe(), "two_sided_parameters": n_two_sided}
    elif isinstance(run.compress, GramOnly):
        described["compress"] = run.compress.describe()
    elif run.compress is not None:
        rows = 1 if run.kind == "diagonal" else run.options.most_rows(n_outputs)
        possible = max(1, rows) * run.parameters.n_parameters
        if run.compress.k > possible:
            warnings.warn(
                f"TopK(k={run.compress.k}): an example has at most {possible} entries; k is {possible}",
                stacklevel=6,
            )
        described["compress"] = {
            "method": "topk",
            "k": run.compress.k,
            "k_effective": min(run.compress.k, possible),
        }
    return described


def _version() -> str:
    try:
        return version("npeff")
    except PackageNotFoundError:
        return "0"
