"""Random projections of long rows to d numbers whose inner products are, up to noise, those of the rows.

A sparse Johnson–Lindenstrauss transform (Charikar, Chen & Farach-Colton 2002; Nelson & Nguyễn 2013) without state:
the seed and a parameter's flat index alone decide its bucket and its sign. With ``nonzeros`` = s every parameter has
one bucket in each of s stretches of d/s buckets, with weight ±1/√s. Over seeds the inner product of two sketches has
the mean ⟨x, y⟩ and a variance of at most ``(‖x‖²‖y‖² + ⟨x, y⟩²) / d``, whatever s is.

On a CUDA device sums within a stretch of a row (at least 4096 or 8·d entries) are float32: results have the same bits
every time, and equal the CPU's to about 1e-6 of the row's norm.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from npeff.errors import ArgumentError
from npeff.kernels import arrays, dispatch, reference
from npeff.kernels.arrays import A, Array, Operand, accepts_cupy
from npeff.kernels.sparse import Csr
from npeff.kernels.streams import FLOATS, BlockRows, BlockStream, NonFiniteError, matrix_of, to_device, to_host

LANES = 16
"""Parameters per block: those of a block never share a bucket."""
NONZEROS = 1
"""Non-zeros per parameter."""


def check_map(d: int, seed: int, nonzeros: int) -> None:
    """Refuse a length, a seed and a number of nonzeros that make no sketch.

    Raises:
        ArgumentError: Naming the argument.
    """
    for name, value in (("d", d), ("seed", seed), ("nonzeros", nonzeros)):
        if isinstance(value, bool) or not isinstance(value, int | np.integer):
            raise ArgumentError(f"{name}: expected an integer, got {value!r}")
    if not 1 <= nonzeros <= 64:
        raise ArgumentError(f"nonzeros: expected 1 … 64, got {nonzeros}")
    if not 1 <= d <= 1 << 30 or d % (LANES * nonzeros):
        raise ArgumentError(f"d: expected a multiple of {LANES * nonzeros} (16·nonzeros) up to 2³⁰, got {d}")
    if not 0 <= seed < 1 << 63:
        raise ArgumentError(f"seed: expected an integer in [0, 2⁶³), got {seed}")


@accepts_cupy
def sketch(x: A, d: int, seed: int = 0, base: int = 0, *, nonzeros: int = NONZEROS) -> A:
    """Compute the sketches of the rows of a matrix.

    Args:
        x: ``(rows, cols)`` or ``(cols,)``; float32, or another float, rounded to float32. Any strides.
        d: Length of a sketch, a multiple of 16·nonzeros.
        seed: Which transform.
        base: Flat index of the first column: the sketch of a row is the sum of the sketches of its parts.
        nonzeros: Buckets per parameter.

    Returns:
        ``(rows, d)`` (or ``(d,)``) float32, of the kind and device of x. The same bits on any processor and for any
        number of threads; those of a CUDA device differ from them by rounding in float32.

    Raises:
        ArgumentError: x is no float matrix, or d, seed, base or nonzeros is out of range.
        NonFiniteError: x holds NaN or infinite values.
    """
    base = arrays.integer(base, "base", 0, arrays.MOST_INDEX)
    matrix = matrix_of(x)
    stream = StreamingSketch(int(matrix.shape[0]), d, seed, nonzeros=nonzeros)
    stream.push(matrix, base)
    try:
        out = stream.finish_there()
    except NonFiniteError:
        bad = torch.nonzero(~torch.isfinite(arrays.as_tensor(matrix)))
        if len(bad):
            raise NonFiniteError(int(bad[0, 0]), base + int(bad[0, 1])) from None
        raise
    result: Any = out.reshape(*x.shape[:-1], d)
    if isinstance(x, torch.Tensor):
        result = arrays.as_tensor(result).to(x.device)
    return result


@accepts_cupy
def sketch_csr(indptr: A, indices: A, values: A, d: int, seed: int = 0, *, nonzeros: int = NONZEROS) -> A:
    """Compute the sketches of compressed sparse rows; the bits of :func:`sketch` where indices ascend within rows.

    Args:
        indptr: ``(R + 1,)`` int64.
        indices: ``(nnz,)`` int32 or int64, ≥ 0.
        values: ``(nnz,)`` float32.
        d: Length of a sketch, a multiple of 16·nonzeros.
        seed: Which transform.
        nonzeros: Buckets per parameter.

    Returns:
        ``(R, d)`` float32, of the kind and device of ``values``; always computed on the processor, by numpy.

    Raises:
        ArgumentError: Shapes or dtypes do not fit, or d, seed or nonzeros is out of range.
        NonFiniteError: A value is NaN or infinite; the index is its place in ``values``.
    """
    check_map(d, seed, nonzeros)
    matrix: Csr[A] = Csr(indptr, indices, values, arrays.MOST_INDEX, "float32")
    starts, columns, entries = (arrays.on_host(x) for x in (matrix.indptr, matrix.indices, matrix.values))
    rows = np.repeat(np.arange(len(starts) - 1), np.diff(starts))
    finite = np.isfinite(entries)
    if not finite.all():
        first = int(finite.argmin())
        raise NonFiniteError(int(rows[first]), first)
    sums = np.zeros((len(starts) - 1, int(d)))
    reference.add_to_sketch(sums, rows, columns, entries, int(seed), int(nonzeros))
    sketches: Any = _checked(*(x.numpy() for x in _rounded(torch.from_numpy(sums), nonzeros)))
    return torch.from_numpy(sketches).to(values.device) if isinstance(values, Tensor) else sketches


class StreamingSketch(BlockStream):
    """The sketch, per row, of all that is pushed, block by block.

    Sums are kept in float64, each bucket's terms added in the order in which they come: blocks that come by ascending
    flat index give the same bits however the row is cut into blocks, whatever rows come with it, on any number of
    threads and any processor. Blocks in another order change a sum by rounding in float64, which a float32 result
    shows in a last bit once in some 10⁸ numbers.

    Where the first block lies decides where the sums live: on a CUDA device that npeff's kernels serve, pushes wait for
    nothing; blocks on other devices are copied.

    Args:
        n_rows: Number of sketches.
        d: Length of each, a multiple of 16·nonzeros.
        seed: Which transform.
        nonzeros: Buckets per parameter.

    Raises:
        ArgumentError: An argument is out of range.
    """

    def __init__(self, n_rows: int, d: int, seed: int = 0, *, nonzeros: int = NONZEROS) -> None:
        check_map(d, seed, nonzeros)
        super().__init__(n_rows)
        self.d, self.seed, self.nonzeros = int(d), int(seed), int(nonzeros)
        self._sums: Any = None  # (n_rows, d) float64, where this object lives
        self._flat = {"seed": self.seed, "copies": self.nonzeros}

    def _begin(self) -> None:
        if self._device is not None:
            self._sums = torch.zeros(self.n_rows, self.d, dtype=torch.float64, device=self._device)
        elif self._sums is None:  # where they do not fit, nothing else is begun
            self._sums = torch.from_numpy(np.zeros((self.n_rows, self.d)))

    def _push(self, block: Operand, start: int, where: BlockRows) -> None:
        if (kernels := self._kernels) is not None:
            plan = where.on(self._device)
            bases = plan.bases + start if start else plan.bases
            rows = {"order": plan.order, "starts": plan.starts, "sums": self._sums}
            kernels("sketch_rows", block=block, bases=bases, **self._flat, **rows)
            return
        values = arrays.as_tensor(block).numpy()
        for i in np.lexsort((where.bases, where.targets)):
            indices = int(where.bases[i]) + start + np.arange(values.shape[1], dtype=np.int64)
            reference.add_to_sketch(self._sums.numpy(), where.targets[i], indices, values[i], **self._flat)

    # ---- two-sided maps ------------------------------------------------------------------------------------

    def push_matrix(
        self,
        block: Operand,
        offset: int,
        shape: tuple[int, int],
        first: Operand | BlockRows,
        rows: Array | None = None,
    ) -> None:
        """Add rows of a matrix by its two-sided map: ``bucket(i, j) = bucket(i) xor bucket(j)``, signs multiplied.

        Args:
            block: ``(b, p·columns)`` float32 (other floats are converted): p rows of the matrix each, end to end.
            offset: Flat index of the matrix's first element: together with the seed, it decides the map.
            shape: ``(rows, columns)`` of the whole matrix.
            first: ``(b,)`` int64, which row of the matrix each row of the block begins with. A tensor on the block's
                CUDA device is taken unseen. :class:`BlockRows` say where all rows go.
            rows: ``(b,)`` int64, the sketch that each row of the block belongs to; None: sketch i.

        Raises:
            ArgumentError: Shapes or dtypes do not fit, d is no power of two, or a row does not exist.
        """
        array: Any = block
        values = arrays.check(array, "block", FLOATS, (None, None))
        offset, shape = _matrix(offset, shape)
        n, width = values.shape
        self._settle(values)
        if width % shape[1]:
            raise ArgumentError(f"block: expected whole rows of {shape[1]} columns, got width {width}")
        p = width // shape[1]
        where = self._rows(first, rows, n, "first")
        if n and where.last + p > shape[0]:
            raise ArgumentError(f"first: expected rows of a {shape} matrix, got {where.first} … {where.last + p - 1}")
        weight = math.sqrt(self.nonzeros)
        if (kernels := self._kernels) is None:
            down, across = (self.places(offset, side, shape[side]) for side in (0, 1))
            entries, sums = weight * arrays.as_tensor(values).cpu().double().numpy(), self._sums.numpy()
            for i in np.lexsort((where.bases, where.targets)):
                both = (down[where.bases[i] : where.bases[i] + p, None] ^ across).reshape(-1)
                np.add.at(sums[where.targets[i]], both >> 1, entries[i] * (1 - 2 * (both & 1)))
            return
        plan = where.on(self._device)
        make: Any = self.places if self._device is None else lambda *side: self._side(*side).places
        row_places, column_places = (make(offset, side, shape[side]) for side in (0, 1))
        kernels(
            "sketch_matrix",
            block=self._whole(values),
            row_places=row_places,
            column_places=column_places,
            first=plan.bases,
            order=plan.order,
            starts=plan.starts,
            weight=weight,
            sums=self._sums,
        )

    def push_outer(
        self, delta: Operand, inputs: Operand, offset: int, shape: tuple[int, int], rows: slice, turned: bool = False
    ) -> None:
        """Add ``Σ_t delta_t ⊗ inputs_t`` by the two-sided map of a matrix, without forming it.

        The sketch of an outer product is the dyadic convolution of the sketches of its factors (after Pham & Pagh's
        TensorSketch, 2013, with xor in the place of sums modulo d): a product of Walsh–Hadamard transforms. Equals
        :meth:`push_matrix` of the products up to rounding in float32.

        Args:
            delta: ``(b, T, R, n)``.
            inputs: ``(b, T, k)``.
            offset: Flat index of the matrix's first element.
            shape: Of the matrix: ``(n, k)``, or ``(k, n)`` when turned.
            rows: The b·R sketches that ``(b, R)`` belong to, in that order, without a step.
            turned: The matrix is ``Σ_t inputs_t ⊗ delta_t``.

        Raises:
            ArgumentError: Shapes or dtypes do not fit, or d is no power of two.
        """
        factors: tuple[Any, Any] = (delta, inputs)
        left = arrays.as_tensor(arrays.check(factors[0], "delta", FLOATS, (None,) * 4))
        right = arrays.as_tensor(arrays.check(factors[1], "inputs", FLOATS, (None,) * 3))
        arrays.same_device(delta=left, inputs=right)
        offset, shape = _matrix(offset, shape)
        turned = arrays.flag(turned, "turned")
        if not isinstance(rows, slice) or rows.step not in (None, 1):
            raise ArgumentError(f"rows: expected a slice without a step, got {rows}")
        if len(range(self.n_rows)[rows]) != left.shape[0] * left.shape[2]:
            raise ArgumentError(
                f"rows: expected {left.shape[0]}·{left.shape[2]} sketches out of {self.n_rows}, got {rows}"
            )
        n, k = shape[::-1] if turned else shape
        if left.shape[3] != n or right.shape != (*left.shape[:2], k):
            raise ArgumentError(
                f"delta, inputs: expected (b, T, R, {n}) and (b, T, {k}), got {tuple(left.shape)}, {tuple(right.shape)}"
            )
        self._settle(left)
        one, other = int(turned), int(not turned)
        weight = math.sqrt(self.nonzeros)
        sums = self._sums[rows]
        if self._device is not None:
            sides = self._side(offset, one, n), self._side(offset, other, k)
            if left.numel() and right.numel():
                sums.add_(_outer_sketches(left, right, *sides), alpha=weight / self.d)
            return
        left, right = left.cpu().float().contiguous(), right.cpu().float().contiguous()
        by_delta, by_input = self.places(offset, one, n), self.places(offset, other, k)
        if (kernels := self._kernels) is None:
            sums.add_(reference.sketch_outer(left, right, by_delta, by_input, self.d), alpha=weight)
            return
        kernels(
            "sketch_outer",
            delta=left,
            input=right,
            delta_places=by_delta,
            input_places=by_input,
            weight=weight,
            sums=sums.view(left.shape[0], left.shape[2], self.d),
        )

    def places(self, offset: int, side: int, n: int) -> Array:
        """Compute bucket·2 + (1 where the sign is −), ``(n,)`` int32, of the rows (side 0) or columns (1) of a matrix.

        Raises:
            ArgumentError: d is no power of two.
        """
        if self.d & (self.d - 1):
            raise ArgumentError(f"d: two-sided maps need a power of two, got {self.d}")
        return _places(self.seed, self.d, offset, side, n)

    def _side(self, offset: int, side: int, n: int) -> Side:
        self.places(offset, side, 0)  # refuses a d that is no power of two
        device = self._sums.device
        return _side(self.seed, self.d, offset, side, n, device, dispatch.stream(device))

    # ---- results -------------------------------------------------------------------------------------------

    def finish(self) -> npt.NDArray[np.float32]:
        """Return the sketches ``(n_rows, d)``; the sums are zero afterwards.

        Raises:
            NonFiniteError: A sketch is not finite: what was pushed into it was not, or overflows float32. The index
                is that of its first such bucket.
        """
        return self.finish_later()()

    def finish_later(self) -> Callable[[], npt.NDArray[np.float32]]:
        """Finish as :meth:`finish`, but do not wait for a CUDA device: the sketches are on their way to the host.

        Returns:
            What waits for them and gives them, once; any thread may call it. The sums are zero already.
        """
        under_way = to_host(*self._finished())
        return lambda: _checked(*under_way.wait())

    def finish_there(self) -> Operand:
        """Finish as :meth:`finish`, but leave the sketches where the sums live: a tensor, on a CUDA device.

        Raises:
            NonFiniteError: As for :meth:`finish`.
        """
        if self._device is None:
            return self.finish()
        out, totals = self._finished()
        if not bool(totals.isfinite().all()):
            _checked(out.cpu().numpy(), totals.cpu().numpy())
        return out

    def _finished(self) -> tuple[Tensor, Tensor]:
        """What :func:`_rounded` gives. The sums are zero afterwards; nothing is waited for."""
        if not self._begun:
            self._begin()
        found = _rounded(self._sums, self.nonzeros)
        self.reset()
        return found

    def reset(self) -> None:
        """Forget all that was pushed."""
        if self._sums is not None:
            self._sums.zero_()


def _matrix(offset: Any, shape: Any) -> tuple[int, tuple[int, int]]:
    """The arguments that say which matrix is meant, as integers.

    Raises:
        ArgumentError: They are none.
    """
    if not isinstance(shape, tuple | list | torch.Size) or len(shape) != 2:
        raise ArgumentError(f"shape: expected (rows, columns), got {shape}")
    rows, columns = (arrays.integer(size, "shape", 1, arrays.MOST_COLUMNS) for size in shape)
    return arrays.integer(offset, "offset", 0, arrays.MOST_INDEX), (rows, columns)


@functools.lru_cache(maxsize=1024)
def _places(seed: int, d: int, offset: int, side: int, n: int) -> Array:
    return reference.sketch_places(seed, offset, side, d, n)


@functools.lru_cache(maxsize=256)
def _side(seed: int, d: int, offset: int, side: int, n: int, device: torch.device, stream: int) -> Side:
    """Make the map of one side of a matrix; once per stream, so that no call waits for another stream."""
    return Side(to_device(_places(seed, d, offset, side, n), device), d)


def _rounded(sums: Tensor, nonzeros: int) -> tuple[Tensor, Tensor]:
    """The sketches ``(n, d)`` float32 of sums, which are overwritten, and ``(n,)`` the sum of each."""
    out = (sums.mul_(1 / math.sqrt(nonzeros)) if nonzeros > 1 else sums).float()
    return out, out.sum(dim=1)


def _checked(out: Array, totals: Array) -> Array:
    """The sketches, once they are known to be finite; a sum of finite numbers may overflow.

    Raises:
        NonFiniteError: One is not; the index is that of its first such bucket.
    """
    for row in np.flatnonzero(~np.isfinite(totals)):
        if not (finite := np.isfinite(out[row])).all():
            raise NonFiniteError(int(row), int(finite.argmin()))
    return out


@dataclass(frozen=True)
class Side:
    """One side of a matrix's two-sided map, on the device.

    Attributes:
        places: ``(n,)`` int32: bucket·2 + (1 where the sign is −).
        d: Number of buckets.
    """

    places: Tensor
    d: int

    @cached_property
    def _matrix(self) -> Any:
        """``(d, n)`` CSR with the sign of i at ``[bucket(i), i]``: the sketch of this side as a product."""
        buckets, order = torch.sort(self.places >> 1, stable=True)
        edges = torch.arange(self.d + 1, dtype=buckets.dtype, device=buckets.device)
        signs = 1 - 2 * (self.places & 1)
        parts = {"indptr": torch.searchsorted(buckets, edges), "indices": order.to(torch.int32)}
        parts["values"] = signs[order].to(torch.float32)
        return _there(self.places.device)("Csr", **parts, n_columns=len(order))

    def scatter(self, rows: Tensor) -> Tensor:
        """Compute the ``(d, rows)`` sketches of rows ``(rows, n)`` by this side."""
        out = torch.empty(self.d, len(rows), dtype=torch.float32, device=rows.device)
        _there(rows.device)("spmm", a=self._matrix, dense=rows.T.float().contiguous(), out=out)
        return out


def _there(device: torch.device) -> dispatch.Compiled:
    kernels = dispatch.on_device(device)
    assert kernels is not None
    return kernels


def _outer_sketches(left: Tensor, right: Tensor, left_side: Side, right_side: Side) -> Tensor:
    """``(b·R, d)`` float64: d times the two-sided sketches of ``Σ_t left_t ⊗ right_t``, on a device; waits for nothing.

    Args:
        left: ``(b, T, R, n)``.
        right: ``(b, T, k)``.
        left_side: The map of left's side.
        right_side: Of right's.
    """
    b, t, r, n = left.shape
    d = left_side.d
    by_left = hadamard(left_side.scatter(left.reshape(-1, n)))
    by_right = hadamard(right_side.scatter(right.reshape(b * t, -1)))
    product = (by_left.view(d, b, t, r) * by_right.view(d, b, t, 1)).sum(dim=2)
    return hadamard(product.view(d, b * r)).T.double()


def hadamard(x: Tensor) -> Tensor:
    """Compute the Walsh–Hadamard transform of every column of x ``(d, n)``, d a power of two: ``H_d x``.

    ``H_d`` is a Kronecker product of smaller ones: products with matrices of at most 64 rows.
    """
    d, n = x.shape
    done = 1
    while done < d:
        step = min(64, d // done)
        x = torch.matmul(_signs(step, x), x.reshape(-1, step, done * n)).view(d, n)
        done *= step
    return x


def _signs(d: int, like: Tensor) -> Tensor:
    """``H_d`` for small d, made once per stream."""
    return _made_signs(d, like.dtype, like.device, dispatch.stream(like.device))


@functools.lru_cache(maxsize=64)
def _made_signs(d: int, dtype: torch.dtype, device: torch.device, stream: int) -> Tensor:
    rows = np.arange(d)
    ones = sum(((rows[:, None] & rows) >> bit) & 1 for bit in range(d.bit_length()))
    return to_device(1.0 - 2.0 * (np.asarray(ones) & 1), device, dtype)
