"""The k entries of largest |value|: of the rows of a matrix at once, or of rows that come in blocks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from npeff.errors import ArgumentError
from npeff.kernels import arrays, dispatch, reference
from npeff.kernels.arrays import A, Array, Operand, accepts_cupy
from npeff.kernels.streams import FLOATS, BlockRows, BlockStream, NonFiniteError, matrix_of, rows_contiguous, to_host

Selections = tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.float32]]
MOST_K = 1 << 40
"""Entries that a selector may keep."""


@accepts_cupy
def topk(x: A, k: int, order: Literal["index", "magnitude"] = "index") -> tuple[A, A]:
    """Select the k entries of largest |x| in every row, exactly; ties go to the lower index.

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
    if n_columns == 0:
        raise ArgumentError(f"x: expected at least one column to select from, got shape {tuple(x.shape)}")
    k = arrays.integer(k, "k", 1, n_columns)
    kernels = dispatch.compiled(matrix, *FLOATS)
    values: Operand
    indices: Operand
    if kernels is None:
        values, indices = _reference_topk(matrix, k, order)
    elif not kernels.on_device and arrays.dtype_name(matrix) == "float32" and rows_contiguous(matrix):
        values, indices = np.empty((n_rows, k), np.float32), np.empty((n_rows, k), np.int64)
        bad = kernels("topk", x=matrix, indices=indices, values=values, by_magnitude=order == "magnitude")
        if bad is not None:
            raise NonFiniteError(*bad)
    else:
        stream = StreamingTopK(n_rows, k, keep_zeros=True)
        stream.push(matrix)
        _, indices, values = stream.finish_there(order)
    shape = (*x.shape[:-1], k)
    return arrays.like(x, values.reshape(shape)), arrays.like(x, indices.reshape(shape))


class StreamingTopK(BlockStream):
    """A running selection, per row, of the k entries of largest |value| among all that is pushed.

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
        super().__init__(n_rows)
        self.k = arrays.integer(k, "k", 1, MOST_K)
        self._keep_zeros = arrays.flag(keep_zeros, "keep_zeros")
        native = dispatch.native()
        make: Any = reference.Selectors if native is None else native.Selectors
        self._here = make(n_rows=self.n_rows, k=self.k, keep_zeros=self._keep_zeros)
        self._native = native is not None
        self._memory: Tensor | None = None

    def _begin(self) -> None:
        if self._device is None or self._memory is not None:
            return
        n_bytes = dispatch.cuda(self._device).topk_bytes(n=self.n_rows, k=self.k)  # type: ignore[union-attr]
        self._memory = torch.zeros(n_bytes, dtype=torch.uint8, device=self._device)

    def _there(self, kernel: str, **arguments: Any) -> None:
        """Call a kernel of the selections on a device."""
        kernels = self._kernels
        assert kernels is not None
        kernels(kernel, memory=self._memory, n=self.n_rows, k=self.k, keep_zeros=self._keep_zeros, **arguments)

    def _natively(self, method: str, **arguments: Any) -> Any:
        """Call a method of the selections on the processor."""
        return dispatch.Compiled(self._here, {"threads": dispatch.num_threads()}, False)(method, **arguments)

    def _push(self, block: Operand, start: int, where: BlockRows) -> None:
        if self._device is not None:
            plan = where.on(self._device)
            bases = plan.bases + start if start else plan.bases
            rows = {"targets": plan.targets, "bases": bases, "order": plan.order, "starts": plan.starts}
            self._there("topk_push", block=block, **rows)
            return
        if self._native:
            plan = where.on(None)
            bases = plan.bases + start if start else plan.bases
            bad = self._natively("push", block=block, bases=bases, order=plan.order, starts=plan.starts)
        else:
            bad = self._here.push(arrays.as_tensor(block), where.bases + start, where.targets)
        if bad is not None:
            raise NonFiniteError(*bad)

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
        device = arrays.same_device(delta=d, inputs=a)
        if first + len(d) > self.n_rows:
            raise ArgumentError(f"first: expected at most {self.n_rows - len(d)} before {len(d)} examples, got {first}")
        size = d.shape[2] * a.shape[1]
        if d.shape[1] > 1 and column_stride < size:
            raise ArgumentError(f"column_stride: expected ≥ {size}, the size of a product, got {column_stride}")
        end = base + column_stride * d.shape[1] + size
        if end > arrays.MOST_INDEX:
            raise ArgumentError(f"base, column_stride: expected flat indices up to 2^62, got some up to {end}")
        if self._native and device.type == "cpu" and self._device is None:
            self._begun = True
            factors = (d.float().contiguous(), a.float().contiguous())
            places = {"first": first, "base": base, "column_stride": column_stride, "turned": turned}
            bad = self._natively("push_outer", delta=factors[0], inputs=factors[1], **places)
            if bad is not None:
                raise NonFiniteError(*bad)
            return
        starts = base + column_stride * np.arange(d.shape[1], dtype=np.int64)
        for e in range(len(d)):
            formed = torch.einsum("cn,k->ckn" if turned else "cn,k->cnk", d[e], a[e]).flatten(1)
            self.push(formed, starts, np.full(len(starts), first + e, np.int64))

    def thresholds(self) -> npt.NDArray[np.float32]:
        """Return thresholds ``(n_rows,)``: smaller magnitudes are not among the k largest, whatever follows."""
        out = np.zeros(self.n_rows, np.float32)
        if self._native and self._device is None:
            self._here.thresholds(thresholds=out)
        return out

    def finish(self, order: Literal["index", "magnitude"] = "index") -> Selections:
        """Return the selections, rows end to end; the selectors are empty afterwards.

        Args:
            order: Within a row, by ascending index, or by descending |value| (ties by index).

        Returns:
            counts ``(n_rows,)`` int64, at most k each; indices ``(sum of counts,)`` int64; values, float32.

        Raises:
            NonFiniteError: A block pushed on a CUDA device held NaN or infinite values.
        """
        return self.finish_later(order)()

    def finish_later(self, order: Literal["index", "magnitude"] = "index") -> Callable[[], Selections]:
        """Finish as :meth:`finish`, but do not wait for a CUDA device: the selections are on their way to the host.

        Args:
            order: As for :meth:`finish`.

        Returns:
            What waits for them and gives them, once; any thread may call it. The selectors are empty already.
        """
        _check_order(order)
        if self._device is not None:
            under_way = to_host(*self._padded(order))
            return lambda: _unpadded(*under_way.wait())
        found = self._finish_here(order)
        return lambda: found

    def finish_there(self, order: Literal["index", "magnitude"] = "index") -> tuple[Operand, Operand, Operand]:
        """Finish as :meth:`finish`, but leave the selections where they live.

        On a CUDA device the result is ``(n_rows, k)``, with −1 and 0 behind the last entry of a row.

        Raises:
            NonFiniteError: A block pushed on a CUDA device held NaN or infinite values.
        """
        if self._device is None:
            return self.finish(order)
        counts, indices, values = self._padded(order)
        _check_finite(indices, values)
        return counts, indices, values

    def _padded(self, order: str) -> tuple[Tensor, Tensor, Tensor]:
        """Selections on a device, ``(n_rows, k)``, what is not finite among them."""
        assert self._memory is not None
        counts = torch.empty(self.n_rows, dtype=torch.int64, device=self._device)
        indices = torch.empty(self.n_rows, self.k, dtype=torch.int64, device=self._device)
        values = torch.empty(self.n_rows, self.k, dtype=torch.float32, device=self._device)
        self._there("topk_finish", counts=counts, indices=indices, values=values)
        if order == "magnitude":
            there = torch.arange(self.k, device=self._device) < counts[:, None]
            sizes = torch.where(there, values.abs(), -1)
            by_size = sizes.sort(dim=1, descending=True, stable=True).indices
            indices, values = indices.gather(1, by_size), values.gather(1, by_size)
        return counts, indices, values

    def _finish_here(self, order: str) -> Selections:
        self._begun = False
        if not self._native:
            return self._here.finish(order == "magnitude")
        counts = np.empty(self.n_rows, np.int64)
        self._natively("finish", counts=counts)
        total = int(counts.sum())
        indices, values = np.empty(total, np.int64), np.empty(total, np.float32)
        self._natively("take", indices=indices, values=values, by_magnitude=order == "magnitude")
        return counts, indices, values

    def reset(self) -> None:
        """Forget all that was pushed."""
        if self._memory is not None and self._device is not None:
            self._memory.zero_()
            return
        self._begun = False
        self._here.reset()


def _check_finite(indices: Tensor, values: Tensor) -> None:
    """Refuse padded selections that hold a non-finite value, which is larger than all others.

    Raises:
        NonFiniteError: They do; its row is that of the selector.
    """
    finite = torch.isfinite(values)
    if not bool(finite.all()):
        row = int((~finite.all(1)).to(torch.uint8).argmax())
        raise NonFiniteError(row, int(indices[row][~finite[row]].min()))


def _unpadded(counts: Array, indices: Array, values: Array) -> Selections:
    _check_finite(torch.from_numpy(indices), torch.from_numpy(values))
    kept = np.less(np.arange(indices.shape[1]), counts[:, None])
    return counts, indices[kept], values[kept]


def _check_order(order: object) -> None:
    if not isinstance(order, str) or order not in {"index", "magnitude"}:
        raise ArgumentError(f"order: expected 'index' or 'magnitude', got {order!r}")


def _reference_topk(x: Operand, k: int, order: str) -> tuple[Tensor, Tensor]:
    t = arrays.as_tensor(x).float()
    finite = torch.isfinite(t)
    if not bool(finite.all()):
        row, index = (int(i) for i in torch.nonzero(~finite)[0])
        raise NonFiniteError(row, index)
    return reference.topk(t, k, order == "magnitude")
