"""Copy results from a device and store them in order, and take in blocks of rows one after the other.

Results go to pinned memory, and a thread stores them. The device never waits for the disk::

    with InOrder(lambda item: writer.append(item[0](), item[1]), waiting=2) as background:
        for batch in data:
            indices, values = compute(batch)                   # on the device
            host = to_host(indices, values)                    # starts copying
            background.put((lambda: block(*host.wait()), digest))

Blocks of rows: what they may hold, and to which selector or sketch each row belongs.
"""

from __future__ import annotations

import functools
import queue
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

from npeff.errors import ArgumentError, DataError
from npeff.kernels import arrays, dispatch
from npeff.kernels.arrays import Array, Operand

T = TypeVar("T")

FLOATS = ("float32", "float64", "float16", "bfloat16")
CHUNK = 1 << 20
"""Columns converted to float32 at a time."""
MOST_ROWS = 1 << 40
"""Selectors or sketches that one object may hold."""

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
        """Return the arrays, as soon as they are here. Any thread may wait; the device goes on meanwhile."""
        if self._done is not None:
            self._done.synchronize()
            self._done = None
        self._sources = ()
        return [np.asarray(t.numpy()) for t in self._targets]


def to_host(*tensors: Tensor) -> HostCopy:
    """Start copying tensors to pinned memory, behind the caller's current work; CPU tensors are passed on."""
    return HostCopy(*tensors)


def to_device(array: Array, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """Copy the array to a device, as that dtype there; a CUDA device is sent a pinned copy and not waited for.

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


class NonFiniteError(DataError):
    """A value is NaN or infinite.

    Attributes:
        row: Row of the block (or of the matrix) that holds it; of selections on a CUDA device, their selector.
        index: Its flat index: the row's ``base`` plus its column.
    """

    def __init__(self, row: int, index: int) -> None:
        super().__init__(f"row {row} holds a NaN or infinite value at index {index}; nothing can be ranked against it")
        self.row = row
        self.index = index


@dataclass(frozen=True)
class RowPlan:
    """The destinations of a block's rows, as the kernels take them; int64, on the block's device or numpy arrays.

    Attributes:
        targets: ``(b,)`` selector (or sketch) of each row.
        bases: ``(b,)`` flat index of each row's first column.
        order: ``(b,)`` rows by target, within a target by base.
        starts: ``(targets + 1,)`` where each target's rows begin in ``order``.
    """

    targets: Any
    bases: Any
    order: Any
    starts: Any


class BlockRows:
    """The selector or sketch that each row of a block belongs to, and the flat index at which the row begins.

    Checked once, and used for every block of that form.

    Args:
        bases: ``(b,)`` int64 flat index of each row's first column. A tensor on a device that npeff's kernels serve is
            taken unseen: looking at it would mean waiting.
        targets: ``(b,)`` int64 selector or sketch of each row; None: row i belongs to number i.
        n_targets: Number of selectors or sketches.
        name: Of the argument that ``bases`` was given as.

    Raises:
        ArgumentError: Shapes do not fit, a target does not exist, or an index is out of range.
    """

    def __init__(self, bases: Operand, targets: Array | None, n_targets: int, name: str = "bases") -> None:
        given: Any = bases
        given = arrays.contiguous(arrays.check(given, name, ("int64",), (None,)))
        self.unseen = isinstance(given, Tensor) and dispatch.cuda(given.device) is not None
        self.bases = given if self.unseen else arrays.on_host(given)
        self.first = self.last = 0
        n = len(self.bases)
        if not self.unseen and n:
            self.first, self.last = int(self.bases.min()), int(self.bases.max())
        if not 0 <= self.first <= self.last <= arrays.MOST_INDEX:
            raise ArgumentError(f"{name}: expected flat indices from 0 to 2⁶², got {self.first} … {self.last}")
        if targets is None and n > n_targets:
            raise ArgumentError(f"block: expected at most {n_targets} rows, one per selector or sketch, got {n}")
        if targets is None:
            targets = np.arange(n, dtype=np.int64)
        self.targets = arrays.on_host(arrays.check(targets, "rows", ("int64",), (n,)))
        if n and not 0 <= int(self.targets.min()) <= int(self.targets.max()) < n_targets:
            raise ArgumentError(
                f"rows: expected numbers from 0 to {n_targets - 1}, got {self.targets.min()} … {self.targets.max()}"
            )
        self.n_targets = n_targets
        self._plans: dict[tuple[torch.device, int] | None, RowPlan] = {}

    def check(self, n_rows: int, n_targets: int) -> None:
        """Refuse a block of another form.

        Raises:
            ArgumentError: It has another number of rows, or there are other targets.
        """
        if n_rows != len(self.bases):
            raise ArgumentError(f"block: expected {len(self.bases)} rows, as many as its bases, got {n_rows}")
        if n_targets != self.n_targets:
            raise ArgumentError(f"base: expected rows for {n_targets} selectors or sketches, got {self.n_targets}")

    def on(self, device: torch.device | None) -> RowPlan:
        """Return the plan on a device, made once per stream, or here (None); nothing is waited for."""
        key = None if device is None else (device, dispatch.stream(device))
        if key not in self._plans:
            self._plans[key] = self._plan(device)
        return self._plans[key]

    def _plan(self, device: torch.device | None) -> RowPlan:
        edges = np.arange(self.n_targets + 1)
        if isinstance(self.bases, Tensor):
            assert device is not None
            targets = to_device(self.targets, device)
            by_base = torch.argsort(self.bases, stable=True)
            order = by_base[torch.argsort(targets[by_base], stable=True)]
            starts = torch.searchsorted(targets[order], to_device(edges, device))
            return RowPlan(targets, self.bases, order, starts)
        here = np.lexsort((self.bases, self.targets))
        begins = np.searchsorted(self.targets[here], edges)
        if device is None:
            return RowPlan(self.targets, self.bases, here, begins)
        b = len(here)
        there = to_device(np.concatenate([self.targets, self.bases, here, begins]).astype(np.int64, copy=False), device)
        return RowPlan(there[:b], there[b : 2 * b], there[2 * b : 3 * b], there[3 * b :])


class BlockStream(ABC):
    """A result per row that blocks of rows are pushed into.

    Where the first block lies decides where it lives: on a CUDA device that npeff's kernels serve, pushes wait for
    nothing; blocks on other devices are copied.

    Args:
        n_rows: Number of selectors or sketches.
    """

    def __init__(self, n_rows: int) -> None:
        self.n_rows = arrays.integer(n_rows, "n_rows", 0, MOST_ROWS)
        self._device: torch.device | None = None
        self._begun = False

    def push(self, block: Operand, base: int | Operand | BlockRows = 0, rows: Array | None = None) -> None:
        """Take in a block of values.

        Args:
            block: ``(b, width)`` float32 (other floats are converted); any strides.
            base: Flat index of the block's first column; a scalar, or ``(b,)`` int64 for each row its own. Flat indices
                must not repeat within a selector. A tensor on the block's CUDA device is taken unseen: looking at
                it would mean waiting. :class:`BlockRows` say where all rows go.
            rows: ``(b,)`` int64, the selector or sketch that each row of the block belongs to; several may share one.
                None: row i belongs to number i.

        Raises:
            ArgumentError: Shapes or dtypes do not fit, or a selector or sketch does not exist.
            NonFiniteError: The block holds NaN or infinite values that cannot be taken in; start over with ``reset``.
        """
        array: Any = block
        values = arrays.check(array, "block", FLOATS, (None, None))
        self._settle(values)
        n, offset = int(values.shape[0]), 0
        if rows is None and not isinstance(base, BlockRows | Tensor | np.ndarray):
            offset = arrays.integer(base, "base", 0, arrays.MOST_INDEX)
            where = _in_order(n, self.n_rows)
        else:
            where = self._rows(base, rows, n)
        if offset + where.last > arrays.MOST_INDEX - values.shape[1]:
            raise ArgumentError(
                f"base: expected flat indices up to 2⁶², got {offset + where.last} and {values.shape[1]} columns"
            )
        for start, chunk in self._chunks(values):
            self._push(chunk, offset + start, where)

    @abstractmethod
    def _push(self, block: Operand, start: int, where: BlockRows) -> None:
        """Take in values as :meth:`_chunks` gives them; flat indices begin ``start`` after the rows' bases."""

    @abstractmethod
    def _begin(self) -> None:
        """Take the memory that is needed."""

    @property
    def _kernels(self) -> dispatch.Compiled | None:
        """The compiled kernels that serve here."""
        return dispatch.on_host() if self._device is None else dispatch.on_device(self._device)

    def _settle(self, values: Operand) -> None:
        """Decide where everything lives, from now on.

        Raises:
            ArgumentError: On a device, and the values do not.
        """
        device = arrays.same_device(block=values)
        there = isinstance(values, Tensor) and dispatch.cuda(device) is not None
        if not self._begun:
            self._device = device if there else None
            self._begin()
            self._begun = True
        elif self._device is not None and not there:
            raise ArgumentError(f"block: expected a CUDA tensor as before, got one on {device}")

    def _rows(self, base: int | Operand | BlockRows, rows: Array | None, n: int, name: str = "base") -> BlockRows:
        if isinstance(base, BlockRows):
            base.check(n, self.n_rows)
            return base
        if not isinstance(base, Tensor | np.ndarray):
            base = np.full(n, arrays.integer(base, name, 0, arrays.MOST_INDEX), np.int64)
        given: Any = base
        given = arrays.check(given, name, ("int64",), (n,))
        return BlockRows(given if self._device else arrays.on_host(given), rows, self.n_rows, name)

    def _chunks(self, x: Any) -> Iterator[tuple[int, Operand]]:
        """The block as the kernels take it, with the column that each piece begins at.

        The whole block where its rows are contiguous, and float32 or on a device 16 bits; else converted pieces.
        """
        if self._device is not None or (arrays.dtype_name(x) == "float32" and rows_contiguous(x)):
            yield 0, self._whole(x)
            return
        for start in range(0, x.shape[1], CHUNK):
            yield start, self._whole(x[:, start : start + CHUNK])

    def _whole(self, x: Any) -> Operand:
        """Values as the kernels take them: float32 or on a device 16 bits, the entries of a row side by side."""
        if self._device is not None:
            x = x.float() if x.dtype == torch.float64 else x
            return x if x.shape[1] <= 1 or x.stride(1) == 1 else x.contiguous()
        if isinstance(x, np.ndarray):
            return x if rows_contiguous(x) and x.dtype == np.float32 else np.ascontiguousarray(x, np.float32)
        x = x.cpu()
        return x if rows_contiguous(x) and x.dtype == torch.float32 else x.float().contiguous()


@functools.lru_cache(maxsize=256)
def _in_order(n: int, n_targets: int) -> BlockRows:
    """Plan n rows, row i for target i, that begin at flat index 0."""
    return BlockRows(np.zeros(n, np.int64), None, n_targets)


def rows_contiguous(x: Operand) -> bool:
    """Say whether the rows lie as the native kernels read them: entries side by side, in native byte order."""
    step = x.stride(1) if isinstance(x, Tensor) else x.strides[1] / x.itemsize
    row = x.stride(0) if isinstance(x, Tensor) else x.strides[0] / x.itemsize
    native_order = isinstance(x, Tensor) or x.dtype.isnative
    return (x.shape[1] <= 1 or step == 1) and row == int(row) and native_order


def matrix_of(x: Any) -> Any:
    """Return x as a matrix of floats; an x of one dimension becomes one row.

    Raises:
        ArgumentError: x is no such matrix.
    """
    if not isinstance(x, Tensor | np.ndarray):
        raise ArgumentError(f"x: expected a (rows, cols) or (cols,) tensor or array, got {type(x).__name__}")
    nested = isinstance(x, Tensor) and x.is_nested  # asking for its dimensions may raise
    shape: tuple[None, ...] = (None, None) if nested or x.ndim != 1 else (None,)
    given: Any = x
    matrix = arrays.check(given, "x", FLOATS, shape)
    arrays.same_device(x=matrix)
    return matrix.reshape(1, -1) if matrix.ndim == 1 else matrix
