"""The k entries of largest |value|: of the rows of a matrix at once, or of rows that come in blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from npeff.errors import ArgumentError, DataError
from npeff.kernels import arrays, dispatch, reference
from npeff.kernels.arrays import A, Array, Operand, accepts_cupy
from npeff.kernels.block_rows import BlockRows
from npeff.kernels.cuda_topk import DeviceTopK, plan_rows
from npeff.kernels.transfers import to_host

FLOATS = ("float32", "float64", "float16", "bfloat16")
Selections = tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.float32]]
MOST_ROWS = 1 << 40
"""Selectors that one object may hold."""
MOST_K = 1 << 40
"""Entries that a selector may keep."""
CHUNK = 1 << 20
"""Columns converted to float32 at a time."""


class NonFiniteError(DataError):
    """A value is NaN or infinite.

    Attributes:
        row: Row of the block (or of the matrix) that holds it.
        index: Its flat index: the row's ``base`` plus its column.
    """

    def __init__(self, row: int, index: int) -> None:
        super().__init__(f"row {row} holds a NaN or infinite value at index {index}; nothing can be ranked against it")
        self.row = row
        self.index = index


@accepts_cupy
def topk(x: A, k: int, order: Literal["index", "magnitude"] = "index") -> tuple[A, A]:
    """The k entries of largest |x| in every row, exactly; ties go to the lower index.

    Args:
        x: ``(rows, cols)`` or ``(cols,)``; float32, or another float, compared as float32. Any strides.
        k: Entries per row, 1 … cols.
        order: By ascending index, or by descending |value| (ties by index).

    Returns:
        values float32 and indices int64, each ``(rows, k)`` (or ``(k,)``), of the kind and device of x.

    Raises:
        ArgumentError: x is no float matrix, k is out of range, or the order is unknown.
        NonFiniteError: x holds NaN or infinite values.
    """
    _check_order(order)
    matrix = matrix_of(x)
    n_rows, n_columns = matrix.shape
    k = arrays.integer(k, "k", 1, n_columns)
    native = dispatch.native()
    if isinstance(matrix, torch.Tensor) and dispatch.cuda(matrix.device):
        selection = DeviceTopK(n_rows, k, True, matrix.device)
        selection.push(for_device(matrix), plan_rows(np.zeros(n_rows, np.int64), None, n_rows, matrix.device))
        _, found, best = selection.finish(order == "magnitude")
        row, index = selection.take_status().tolist()
        if row >= 0:
            raise NonFiniteError(row, index)
        return arrays.like(x, best.reshape(*x.shape[:-1], k)), arrays.like(x, found.reshape(*x.shape[:-1], k))
    if native is None or arrays.device_of(matrix).type != "cpu":
        values, indices = _reference_topk(matrix, k, order)
        return arrays.like(x, values.reshape(*x.shape[:-1], k)), arrays.like(x, indices.reshape(*x.shape[:-1], k))
    if arrays.dtype_name(matrix) == "float32" and _rows_contiguous(matrix):
        out = np.empty((n_rows, k), np.float32)
        at = np.empty((n_rows, k), np.int64)
        bad = native.topk(matrix, at, out, order == "magnitude", dispatch.num_threads())
        if bad is not None:
            raise NonFiniteError(*bad)
    else:
        stream = StreamingTopK(n_rows, k, keep_zeros=True)
        for base, block in _blocks(matrix):
            stream.push(block, base)
        _, at, out = stream.finish(order)
    shape = (*x.shape[:-1], k)
    return arrays.like(x, out.reshape(shape)), arrays.like(x, at.reshape(shape))


class StreamingTopK:
    """Per row, a running selection of the k entries of largest |value| among all that is pushed.

    Exact, in one pass, for blocks in any order; ties go to the lower flat index; exact zeros are never kept.
    It may be used again after :meth:`finish`. One thread at a time.

    Where the first block lies decides where the selections live: on a CUDA device that npeff's kernels serve, pushes
    wait for nothing and a non-finite value is refused at :meth:`finish`; blocks on other devices are copied.

    Args:
        n_rows: Number of selectors.
        k: Most entries that each keeps.
        keep_zeros: Keep exact zeros, too, where there is nothing larger.

    Raises:
        ArgumentError: n_rows or k is out of range.
    """

    def __init__(self, n_rows: int, k: int, *, keep_zeros: bool = False) -> None:
        self.n_rows = arrays.integer(n_rows, "n_rows", 0, MOST_ROWS)
        self.k = arrays.integer(k, "k", 1, MOST_K)
        self._keep_zeros = arrays.flag(keep_zeros, "keep_zeros")
        self._device: DeviceTopK | None = None
        native = dispatch.native()
        self._native = None if native is None else native.Selectors(self.n_rows, self.k, self._keep_zeros)
        self._reference = reference.Selectors(self.n_rows, self.k, self._keep_zeros) if native is None else None
        self._pushed = False

    def push(self, block: Operand, base: int | Operand | BlockRows = 0, rows: Array | None = None) -> None:
        """Take in a block of values.

        Args:
            block: ``(b, width)`` float32 (other floats are converted); any strides.
            base: Flat index of the block's first column; a scalar, or ``(b,)`` int64 for each row its own.
                Flat indices must not repeat within a selector. A tensor on the block's CUDA device is taken
                unseen: looking at it would mean waiting. :class:`BlockRows` say where all rows go.
            rows: ``(b,)`` int64, the selector of each row of the block; several rows may share one. None: row
                i feeds selector i.

        Raises:
            ArgumentError: Shapes or dtypes do not fit, or a selector does not exist.
            NonFiniteError: The block holds NaN or infinite values; start over with :meth:`reset`.
        """
        array: Any = block
        values = arrays.check(array, "block", FLOATS, (None, None))
        arrays.same_device(block=values)
        n = values.shape[0]
        planned = base if isinstance(base, BlockRows) else None
        bases: Operand
        targets: Array | None
        if isinstance(base, BlockRows):
            base.check(n, self.n_rows)
            bases, targets = base.bases, base.targets
        else:
            bases = bases_of(base, n)
            targets = None if rows is None else arrays.on_host(arrays.check(rows, "rows", ("int64",), (n,)))
        if isinstance(values, torch.Tensor) and (self._device or not self._pushed) and dispatch.cuda(values.device):
            if planned is None:
                self._check(n, bases, targets)
            if self._device is None:
                self._device = DeviceTopK(self.n_rows, self.k, self._keep_zeros, values.device)
            there = self._device.device
            plan = planned.there(there) if planned else plan_rows(bases, targets, self.n_rows, there)
            self._device.push(for_device(values), plan)
            return
        if self._device is not None:
            raise ArgumentError(f"block: expected a CUDA tensor as before, got one on {arrays.device_of(values)}")
        self._pushed = True
        bases = arrays.on_host(bases) if isinstance(bases, torch.Tensor) else bases
        if arrays.device_of(values).type != "cpu":
            values = values.cpu()
        if arrays.dtype_name(values) == "float32" and _rows_contiguous(values):
            self._push(values, bases, targets)
        else:
            for start, chunk in _blocks(values):
                self._push(chunk, bases + start, targets)

    def push_outer(
        self, delta: Operand, inputs: Operand, first: int, base: int, column_stride: int, turned: bool = False
    ) -> None:
        """Take in outer products without forming the rows that hold nothing large enough.

        Entry (i, j) of ``delta[e, c] ⊗ inputs[e]`` goes to selector ``first + e`` with the flat index
        ``base + c·column_stride + i·k + j``; turned, entry (j, i) with ``… + j·n + i``.

        Args:
            delta: ``(b, columns, n)`` float32 (other floats are converted).
            inputs: ``(b, k)``, likewise.
            first: Selector of the first example.
            base: Flat index of the first column's first entry.
            column_stride: Distance of two columns' flat indices.
            turned: The products are ``inputs[e] ⊗ delta[e, c]``.

        Raises:
            ArgumentError: Shapes or dtypes do not fit, or a selector does not exist.
            NonFiniteError: A product is NaN or infinite; start over with :meth:`reset`.
        """
        turned = arrays.flag(turned, "turned")
        first = arrays.integer(first, "first", 0, self.n_rows)
        base = arrays.integer(base, "base", 0, arrays.MOST_INDEX)
        column_stride = arrays.integer(column_stride, "column_stride", 0, arrays.MOST_INDEX)
        factors: tuple[Any, Any] = (delta, inputs)
        d = arrays.as_tensor(arrays.check(factors[0], "delta", FLOATS, (None, None, None)))
        a = arrays.as_tensor(arrays.check(factors[1], "inputs", FLOATS, (d.shape[0], None)))
        arrays.same_device(delta=d, inputs=a)
        if first + len(d) > self.n_rows:
            raise ArgumentError(f"first: expected at most {self.n_rows - len(d)} before {len(d)} examples, got {first}")
        size = d.shape[2] * a.shape[1]
        if d.shape[1] > 1 and column_stride < size:
            raise ArgumentError(f"column_stride: expected ≥ {size}, the size of a product, got {column_stride}")
        end = base + column_stride * d.shape[1] + size
        if end > arrays.MOST_INDEX:
            raise ArgumentError(f"base, column_stride: expected flat indices up to 2^62, got some up to {end}")
        if self._native is not None and d.device.type == a.device.type == "cpu":
            d, a = d.float().contiguous(), a.float().contiguous()
            bad = self._native.push_outer(d, a, first, base, column_stride, turned, dispatch.num_threads())
            if bad is not None:
                raise NonFiniteError(*bad)
            self._pushed = True
            return
        starts = base + column_stride * np.arange(d.shape[1], dtype=np.int64)
        for e in range(len(d)):
            formed = torch.einsum("cn,k->ckn" if turned else "cn,k->cnk", d[e], a[e]).flatten(1)
            self.push(formed, starts, np.full(len(starts), first + e, np.int64))

    def thresholds(self) -> npt.NDArray[np.float32]:
        """``(n_rows,)``: values smaller in magnitude are not among the k largest, whatever follows."""
        out = np.zeros(self.n_rows, np.float32)
        if self._native is not None and self._device is None:
            self._native.thresholds(out)
        return out

    def _push(self, block: Operand, bases: Array, targets: Array | None) -> None:
        if self._native is not None:
            bad = self._native.push(
                block,
                np.ascontiguousarray(bases),
                None if targets is None else np.ascontiguousarray(targets),
                dispatch.num_threads(),
            )
        else:
            assert self._reference is not None
            self._check(block.shape[0], bases, targets)
            bad = self._reference.push(arrays.as_tensor(block), bases, targets)
        if bad is not None:
            raise NonFiniteError(*bad)

    def _check(self, n: int, bases: Operand, targets: Array | None) -> None:
        """What the native selectors check by themselves.

        Raises:
            ArgumentError: A selector does not exist, or a flat index is negative.
        """
        if targets is None and n > self.n_rows:
            raise ArgumentError(f"block: expected at most {self.n_rows} rows, one per selector, got {n}")
        if targets is not None and not ((targets >= 0) & (targets < self.n_rows)).all():
            raise ArgumentError(f"rows: expected numbers from 0 to {self.n_rows - 1}, got {targets}")
        if isinstance(bases, np.ndarray) and ((bases < 0) | (bases > arrays.MOST_INDEX)).any():
            raise ArgumentError(f"base: expected flat indices from 0 to 2^62, got {bases.min()} … {bases.max()}")

    def finish(self, order: Literal["index", "magnitude"] = "index") -> Selections:
        """The selections, rows end to end; the selectors are empty afterwards.

        Args:
            order: Within a row, by ascending index, or by descending |value| (ties by index).

        Returns:
            counts ``(n_rows,)`` int64, at most k each; indices ``(sum of counts,)`` int64; values, float32.

        Raises:
            NonFiniteError: A block pushed on a CUDA device held NaN or infinite values.
        """
        return self.finish_later(order)()

    def finish_later(self, order: Literal["index", "magnitude"] = "index") -> Callable[[], Selections]:
        """As :meth:`finish`, but it does not wait for a CUDA device: the selections are on their way to the host.

        Args:
            order: As for :meth:`finish`.

        Returns:
            What waits for them and gives them, once; any thread may call it. The selectors are empty already.
        """
        _check_order(order)
        if self._device is not None:
            under_way = to_host(*self._device.finish(order == "magnitude"), self._device.take_status())
            return lambda: _unpadded(*under_way.wait())
        self._pushed = False
        found = self._finish_here(order)
        return lambda: found

    def _finish_here(self, order: str) -> Selections:
        if self._native is None:
            assert self._reference is not None
            return self._reference.finish(order == "magnitude")
        counts = np.empty(self.n_rows, np.int64)
        self._native.finish(counts, dispatch.num_threads())
        total = int(counts.sum())
        indices, values = np.empty(total, np.int64), np.empty(total, np.float32)
        self._native.take(indices, values, order == "magnitude", dispatch.num_threads())
        return counts, indices, values

    def reset(self) -> None:
        """Forget all that was pushed."""
        self._pushed = False
        if self._device is not None:
            self._device.reset()
            return
        selectors = self._native if self._native is not None else self._reference
        assert selectors is not None
        selectors.reset()


def bases_of(base: int | Operand, n: int, name: str = "base") -> Operand:
    """``(n,)`` int64 flat indices of the rows' first columns: an array, or the tensor that was given.

    Raises:
        ArgumentError: They are no such thing.
    """
    given: Any = base
    if not isinstance(base, torch.Tensor | np.ndarray):
        return np.full(n, arrays.integer(base, name, 0, arrays.MOST_INDEX), np.int64)
    return arrays.check(given, name, ("int64",), (n,))


def for_device(x: torch.Tensor) -> torch.Tensor:
    """X with contiguous rows, float32 or 16 bits."""
    x = x.float() if x.dtype == torch.float64 else x
    return x if x.shape[1] <= 1 or x.stride(1) == 1 else x.contiguous()


def _unpadded(counts: Array, indices: Array, values: Array, status: Array) -> Selections:
    if status[0] >= 0:
        raise NonFiniteError(int(status[0]), int(status[1]))
    kept = np.less(np.arange(indices.shape[1]), counts[:, None])
    return counts, indices[kept], values[kept]


def matrix_of(x: Any) -> Any:
    """X itself or, of one dimension, as one row: a matrix of floats.

    Raises:
        ArgumentError: It is none.
    """
    if not isinstance(x, torch.Tensor | np.ndarray):
        raise ArgumentError(f"x: expected a (rows, cols) or (cols,) tensor or array, got {type(x).__name__}")
    nested = isinstance(x, torch.Tensor) and x.is_nested  # asking for its dimensions may raise
    shape: tuple[None, ...] = (None, None) if nested or x.ndim != 1 else (None,)
    given: Any = x
    matrix = arrays.check(given, "x", FLOATS, shape)
    arrays.same_device(x=matrix)
    return matrix.reshape(1, -1) if matrix.ndim == 1 else matrix


def _check_order(order: object) -> None:
    if not isinstance(order, str) or order not in {"index", "magnitude"}:
        raise ArgumentError(f"order: expected 'index' or 'magnitude', got {order!r}")


def _rows_contiguous(x: Operand) -> bool:
    step = x.stride(1) if isinstance(x, torch.Tensor) else x.strides[1] / x.itemsize
    row = x.stride(0) if isinstance(x, torch.Tensor) else x.strides[0] / x.itemsize
    native_order = isinstance(x, torch.Tensor) or x.dtype.isnative
    return (x.shape[1] <= 1 or step == 1) and row == int(row) and native_order


def _blocks(x: Operand) -> Iterator[tuple[int, Operand]]:
    """Column blocks of x as contiguous float32, with the column each begins at."""
    for start in range(0, x.shape[1], CHUNK):
        block = x[:, start : start + CHUNK]
        if isinstance(block, torch.Tensor):
            yield start, block.float().contiguous()
        else:
            yield start, np.ascontiguousarray(block, np.float32)


def _reference_topk(x: Operand, k: int, order: str) -> tuple[torch.Tensor, torch.Tensor]:
    t = arrays.as_tensor(x).float()
    finite = torch.isfinite(t)
    if not bool(finite.all()):
        row, index = (int(i) for i in torch.nonzero(~finite)[0])
        raise NonFiniteError(row, index)
    return reference.topk(t, k, order == "magnitude")
