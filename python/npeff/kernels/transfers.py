"""Copies of results from a device to pinned memory, and a thread that stores them in order.

The device never waits for the disk::

    with InOrder(lambda item: writer.append(item[0](), item[1]), waiting=2) as background:
        for batch in data:
            indices, values = compute(batch)                   # on the device
            host = to_host(indices, values)                    # starts copying
            background.put((lambda: block(*host.wait()), digest))
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from npeff.errors import ArgumentError

T = TypeVar("T")
Array = npt.NDArray[Any]

PINNED = True
"""Whether memory that is copied from or to a device is pinned."""

_streams: dict[torch.device, torch.cuda.Stream] = {}


class HostCopy:
    """Copies under way. The tensors must not be written to until :meth:`wait` returns.

    Args:
        tensors: On one device.
    """

    def __init__(self, *tensors: Tensor) -> None:
        self._sources: tuple[Tensor, ...] = tensors
        self._done: torch.cuda.Event | None = None
        device = next((t.device for t in tensors if t.is_cuda), None)
        if device is None:
            self._targets = [t.detach() for t in tensors]
            return
        # A stream of its own, behind what the caller's has been given so far: later work overtakes the copies.
        stream = _streams.setdefault(device, torch.cuda.Stream(device))  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            self._targets = [torch.empty(t.shape, dtype=t.dtype, pin_memory=PINNED) for t in tensors]
            for target, source in zip(self._targets, tensors, strict=True):
                target.copy_(source.detach(), non_blocking=True)
                source.record_stream(stream)
            self._done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._done.record(stream)

    def wait(self) -> list[Array]:
        """The arrays, as soon as they are here. Any thread may wait; the device goes on meanwhile."""
        if self._done is not None:
            self._done.synchronize()
            self._done = None
        self._sources = ()
        return [np.asarray(t.numpy()) for t in self._targets]


def to_host(*tensors: Tensor) -> HostCopy:
    """Start copying tensors to pinned memory, behind the caller's current work; CPU tensors are passed on."""
    return HostCopy(*tensors)


def to_device(array: Array, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """The array on a device, as that dtype there; a CUDA device is sent a pinned copy and not waited for.

    On the processor memory is shared where that can be.
    """
    array = np.ascontiguousarray(array)
    if device.type != "cuda":
        return torch.from_numpy(array if array.flags.writeable else array.copy()).to(device, dtype)
    pinned = torch.empty(array.shape, dtype=torch.from_numpy(np.empty(0, array.dtype)).dtype, pin_memory=PINNED)
    pinned.numpy()[...] = array
    return pinned.to(device, non_blocking=True).to(dtype or pinned.dtype)


class InOrder(Generic[T]):
    """A thread that takes items in the order in which they were put, a bounded number of them waiting.

    An error of the taker is raised by the next :meth:`put` or at the end; later items are then dropped. On an error
    within the ``with`` block, what was put is still taken, unless the taker itself failed.

    Args:
        take: Called with each item, on the thread.
        waiting: Most items that wait; :meth:`put` blocks beyond.

    Raises:
        ArgumentError: ``waiting`` is below 1.
    """

    def __init__(self, take: Callable[[T], object], waiting: int = 2) -> None:
        if waiting < 1:
            raise ArgumentError(f"waiting: expected ≥ 1, got {waiting}")
        self._take = take
        self._items: queue.Queue[tuple[T] | None] = queue.Queue(waiting)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="npeff-in-order", daemon=True)

    def __enter__(self) -> InOrder[T]:
        self._thread.start()
        return self

    def put(self, item: T) -> None:
        """Hand over an item.

        Raises:
            BaseException: Whatever the taker raised on an item before.
        """
        if self._error is not None:
            raise self._error
        self._items.put((item,))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._items.put(None)
        self._thread.join()
        if error is None and self._error is not None:
            raise self._error

    def _work(self) -> None:
        while (found := self._items.get()) is not None:
            if self._error is not None:
                continue  # drained, so that put() never blocks for good
            try:
                self._take(found[0])
            except BaseException as error:
                self._error = error
            found = None  # its memory is free before the next one comes
