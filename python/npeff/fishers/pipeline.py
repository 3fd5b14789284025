"""Batches on their way: computed, checked, and written by a thread, so that a device does not wait for the disk."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt

from npeff.batches.batches import Batch
from npeff.fishers.factors import Factors
from npeff.fishers.fishers import FisherBlock
from npeff.fishers.logits import Logits, largest
from npeff.fishers.options import FisherOptions, Sketch, TopK
from npeff.fishers.passes import Ids, Run
from npeff.fishers.shards import FisherWriter
from npeff.fishers.sinks import DenseSink, Sink, SketchSink
from npeff.fishers.topk_sink import TopKSink
from npeff.kernels import NonFiniteError
from npeff.kernels.transfers import InOrder
from npeff.models import devices
from npeff.models.digests import ModelWatch
from npeff.models.parameters import Parameters

Array = npt.NDArray[Any]


def sink_for(parameters: Parameters, factors: Factors, ids: Ids, options: FisherOptions, at_once: bool = True) -> Sink:
    """The sink that keeps what ``options.compress`` says; see :class:`~npeff.fishers.sinks.Sink`."""
    given = (parameters, factors, ids, options.kind == "diagonal", at_once)
    if isinstance(options.compress, TopK):
        return TopKSink(*given, options.compress.k)
    if isinstance(options.compress, Sketch):
        return SketchSink(*given, options.compress)
    return DenseSink(*given)


class PendingBatch:
    """The Fishers of a batch, on their way to the host.

    Args:
        run: The model and the options.
        batch: The batch, whose passes are run here.
        ids: ``(b,)`` positions of its examples.
        at_once: Refuse gradients that are not finite here; otherwise a device is not waited for, and :meth:`finite`
            tells.

    Raises:
        DataError: Logits or gradients are not finite, or labels are missing.
    """

    def __init__(self, run: Run, batch: Batch, ids: Ids, at_once: bool = True) -> None:
        self._pieces = []
        with run.engine.recording():
            for one in run.passes(batch, ids):
                sink = sink_for(run.parameters, one.factors, one.ids, run.options, at_once)
                for block in one.blocks(sink.paired, gathered=run.options.compress is not None):
                    sink.add(block)
                kept, n_outputs = largest(one.logits, run.options.over_classes), one.logits.shape[1]
                self._pieces.append((*sink.finish(kept), n_outputs, one.stored_labels(), one.ids))

    def finite(self) -> bool:
        """Whether all gradients were finite; waits for the batch's work on the device."""
        return all([np.isfinite(numbers.wait()[0]).all() for numbers, *_ in self._pieces])

    def block(self) -> FisherBlock:
        """The Fishers, once they are on the host; any thread may wait for them."""
        blocks = []
        while self._pieces:
            numbers, rows, n_outputs, labels, ids = self._pieces.pop(0)
            norms, counts, scale, *kept = numbers.wait()
            logits = Logits.kept(kept, n_outputs)
            blocks.append(FisherBlock(rows(counts, scale), counts, norms.astype(np.float32), logits, labels, ids))
        return FisherBlock.joined(blocks)


class BatchPipeline:
    """The order in which batches are computed, checked and written.

    A batch is computed without a look at its gradients; one with a gradient that is not finite is computed again, to
    name the example and the parameter. On a device a batch is checked when the next one has been given to it, so that
    the device always has work.

    Args:
        run: The model and the options.
        watch: Notices changes to the model.
    """

    def __init__(self, run: Run, watch: ModelWatch) -> None:
        self._run, self._watch, self._deferred = run, watch, devices.has_own_memory(run.device)
        self._computing = threading.Lock()  # the model is checked while it does not run
        self._waiting: deque[tuple[Batch, Ids, str, PendingBatch]] = deque()

    def validate(self) -> None:
        """Refuse a model that changed; called between batches, from any thread.

        Raises:
            ModelError: The model changed.
        """
        with self._computing:
            self._watch.check(thorough=True)

    @contextmanager
    def writing(self, writer: FisherWriter) -> Iterator[None]:
        """Within it, batches go to the writer, on a thread of its own; at its end all have been written.

        Raises:
            BaseException: The error that the writer raised.
        """
        with InOrder[tuple[PendingBatch, str]](
            lambda item: writer.append(item[0].block(), item[1]), waiting=1
        ) as thread:
            self._thread = thread
            yield
            self._settle(0)

    def add(self, batch: Batch, ids: Ids, digest: str) -> None:
        """Compute a batch, and hand finished batches to the writer; waits while the writer has enough to do.

        Raises:
            DataError: Logits or gradients of the batch, or of the batch before it, are not finite.
            ModelError: The model changed.
        """
        with self._computing:
            try:
                pending = PendingBatch(self._run, batch, ids, at_once=False)
            except NonFiniteError:
                pending = PendingBatch(self._run, batch, ids)
            self._watch.check()
        self._waiting.append((batch, ids, digest, pending))
        self._settle(1 if self._deferred else 0)

    def _settle(self, left: int) -> None:
        while len(self._waiting) > left:
            batch, ids, digest, pending = self._waiting.popleft()
            if not pending.finite():
                with self._computing:
                    pending = PendingBatch(self._run, batch, ids)
            self._thread.put((pending, digest))
