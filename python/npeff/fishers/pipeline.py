"""Batches on their way: computed, looked at, and written by a thread, so that no device waits for the disk."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from npeff.batches.batches import Batch
from npeff.fishers.collect import Collected
from npeff.fishers.fishers import FisherBlock
from npeff.fishers.growing_rows import concatenate
from npeff.fishers.shards import FisherWriter
from npeff.kernels import NonFiniteError
from npeff.kernels.transfers import HostCopy, InOrder
from npeff.models.digests import ModelWatch

Array = npt.NDArray[Any]


@dataclass
class UnderWay:
    """The Fishers of a batch, on their way to the host.

    Attributes:
        parts: What was collected, the logits, labels and positions of some examples, in order.
    """

    parts: list[tuple[Collected, HostCopy, Array, Array]]

    def finite(self) -> bool:
        """Whether all gradients were finite; waits for the batch's work on the device."""
        return all([collected.finite() for collected, *_ in self.parts])

    def block(self) -> FisherBlock:
        """The Fishers, once they are there; any thread may wait for them."""
        blocks = []
        while self.parts:
            collected, logits, labels, ids = self.parts.pop(0)
            blocks.append(FisherBlock(*collected.take(), logits.wait()[0], labels, ids))
        if len(blocks) == 1:
            return blocks[0]
        names = ("row_counts", "norms", "logits", "labels", "ids")
        fields = {name: np.concatenate([getattr(block, name) for block in blocks]) for name in names}
        return FisherBlock(rows=concatenate([block.rows for block in blocks]), **fields)


class Course:
    """The order in which batches are computed, looked at and written.

    A batch is computed without a look at its gradients. One with a gradient that is not finite is computed again, to
    say where. On a device a batch is looked at when the next one has been given to it, so that the device is never
    idle.

    Args:
        begin: Begins the computation of a batch: ``begin(batch, ids, at_once)``.
        watch: Notices changes to the model.
        deferred: Look at a batch after the next one has begun.
    """

    def __init__(self, begin: Callable[..., UnderWay], watch: ModelWatch, deferred: bool) -> None:
        self._begin, self._watch, self._deferred = begin, watch, deferred
        self._computing = threading.Lock()  # the model is looked at while it does not run
        self._waiting: deque[tuple[Batch, Array, str, UnderWay]] = deque()

    def validate(self) -> None:
        """Refuse a model that changed; between batches, from whatever thread.

        Raises:
            ModelError: It did.
        """
        with self._computing:
            self._watch.check(thorough=True)

    @contextmanager
    def writing(self, writer: FisherWriter) -> Iterator[None]:
        """Within it, batches go to the writer, on a thread of its own; at its end all have.

        Raises:
            BaseException: What the writer raised.
        """
        with InOrder[tuple[UnderWay, str]](lambda item: writer.append(item[0].block(), item[1]), waiting=1) as thread:
            self._thread = thread
            yield
            self._settle(0)

    def add(self, batch: Batch, ids: Array, digest: str) -> None:
        """Compute a batch, and hand over what is whole; waits while the writer has enough to do.

        Raises:
            DataError: Its logits or gradients, or those of the batch before it, are not finite.
            ModelError: The model changed.
        """
        with self._computing:
            self._watch.check()
            try:
                under_way = self._begin(batch, ids, at_once=False)
            except NonFiniteError:
                under_way = self._begin(batch, ids, at_once=True)
            self._watch.check()
        self._waiting.append((batch, ids, digest, under_way))
        self._settle(1 if self._deferred else 0)

    def _settle(self, left: int) -> None:
        while len(self._waiting) > left:
            batch, ids, digest, under_way = self._waiting.popleft()
            if not under_way.finite():
                with self._computing:
                    under_way = self._begin(batch, ids)
            self._thread.put((under_way, digest))
