"""Sketches of rows that come block by block; what a sketch is says :mod:`npeff.kernels.sketch`."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from npeff.errors import ArgumentError
from npeff.kernels import arrays, cuda, dispatch, reference
from npeff.kernels.arrays import Array, Operand
from npeff.kernels.block_rows import BlockRows
from npeff.kernels.cuda_sketch import DeviceSketch, Side
from npeff.kernels.cuda_topk import RowPlan, plan_rows
from npeff.kernels.topk import FLOATS, MOST_ROWS, NonFiniteError, _blocks, _rows_contiguous, bases_of, for_device
from npeff.kernels.transfers import to_device, to_host

LANES = 16
"""Parameters per block: those of a block never share a bucket."""
NONZEROS = 1
"""Non-zeros per parameter."""


def check_map(d: int, seed: int, nonzeros: int) -> None:
    """Refuse what is no sketch.

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


class StreamingSketch:
    """Per row, the sketch of all that is pushed, block by block.

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
        n_rows = arrays.integer(n_rows, "n_rows", 0, MOST_ROWS)
        self.n_rows, self.d, self.seed, self.nonzeros = n_rows, int(d), int(seed), int(nonzeros)
        self._device: DeviceSketch | None = None

    @cached_property
    def _sums(self) -> npt.NDArray[np.float64]:
        """Where nothing lies on a device."""
        return np.zeros((self.n_rows, self.d), np.float64)

    def push(self, block: Operand, base: int | Operand | BlockRows = 0, rows: Array | None = None) -> None:
        """Add a block of values.

        Args:
            block: ``(b, width)`` float32 (other floats are converted); any strides.
            base: Flat index of the block's first column; a scalar, or ``(b,)`` int64 for each row its own. A tensor on
                the block's CUDA device is taken unseen: looking at it would mean waiting. :class:`BlockRows` say
                where all rows go.
            rows: ``(b,)`` int64, the sketch that each row of the block belongs to; several may share one. None:
                row i belongs to sketch i.

        Raises:
            ArgumentError: Shapes or dtypes do not fit, or a sketch does not exist.
        """
        array: Any = block
        values = arrays.check(array, "block", FLOATS, (None, None))
        n = values.shape[0]
        there = self._on_device(values)
        if there is None:
            _ = self._sums  # where they do not fit, nothing else is begun
        if there is not None and isinstance(base, torch.Tensor):
            bases, targets = bases_of(base, n), self._targets(rows, n)
            there.push(for_device(values), plan_rows(bases, targets, self.n_rows, there.device))
            return
        where = self._where(base, rows, n)
        if where.last > arrays.MOST_INDEX - values.shape[1]:
            raise ArgumentError(
                f"base: expected flat indices up to 2⁶², got {where.last} and {values.shape[1]} columns"
            )
        if there is not None:
            there.push(for_device(values), where.there(there.device))
            return
        for start, chunk in _as_float32(values):
            self._push(chunk, where.bases + start if start else where.bases, where.targets)

    def _where(self, base: int | Operand | BlockRows, rows: Array | None, n: int, name: str = "base") -> BlockRows:
        """Where the n rows of a block go, checked.

        Raises:
            ArgumentError: Shapes or dtypes do not fit, a sketch does not exist, or a base is out of range.
        """
        if isinstance(base, BlockRows):
            base.check(n, self.n_rows)
            return base
        targets, bases = self._targets(rows, n), arrays.on_host(bases_of(base, n, name))
        if n and not 0 <= int(bases.min()) <= int(bases.max()) <= arrays.MOST_INDEX:
            raise ArgumentError(f"{name}: expected flat indices from 0 to 2⁶², got {bases.min()} … {bases.max()}")
        return BlockRows(bases, targets, self.n_rows)

    def _targets(self, rows: Array | None, n: int) -> Array:
        if rows is None:
            if n > self.n_rows:
                raise ArgumentError(f"block: expected at most {self.n_rows} rows, one per sketch, got {n}")
            return np.arange(n, dtype=np.int64)
        rows = arrays.on_host(arrays.check(rows, "rows", ("int64",), (n,)))
        if n and not 0 <= int(rows.min()) <= int(rows.max()) < self.n_rows:
            raise ArgumentError(f"rows: expected numbers from 0 to {self.n_rows - 1}, got {rows.min()} … {rows.max()}")
        return rows

    def _on_device(self, values: Operand) -> DeviceSketch | None:
        """Where sums live on a device, or are to live from now on; None: here.

        Raises:
            ArgumentError: They live on a device, and the values do not.
        """
        arrays.same_device(block=values)
        started = self._device is not None or "_sums" in self.__dict__
        if isinstance(values, torch.Tensor) and (self._device or not started) and dispatch.cuda(values.device):
            if self._device is None:
                self._device = DeviceSketch(self.n_rows, self.d, self.seed, self.nonzeros, values.device)
        elif self._device is not None:
            raise ArgumentError(f"block: expected a CUDA tensor as before, got one on {arrays.device_of(values)}")
        return self._device

    def _push(self, block: Operand, bases: Array, targets: Array) -> None:
        native = dispatch.native()
        if native is not None:
            native.sketch_rows(block, bases, targets, self.seed, self.nonzeros, self._sums, dispatch.num_threads())
            return
        values = arrays.as_tensor(block).numpy()
        for i in np.lexsort((bases, targets)):
            indices = bases[i] + np.arange(values.shape[1], dtype=np.int64)
            reference.add_to_sketch(self._sums, targets[i], indices, values[i], self.seed, self.nonzeros)

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
        there = self._on_device(values)
        if width % shape[1]:
            raise ArgumentError(f"block: expected whole rows of {shape[1]} columns, got width {width}")
        p = width // shape[1]
        if there is not None and isinstance(first, torch.Tensor):
            unseen = arrays.contiguous(arrays.check(first, "first", ("int64",), (n,)))
            targets = self._targets(rows, n)
            plan: RowPlan | None = plan_rows(unseen, targets, self.n_rows, there.device)
        else:
            where = self._where(first, rows, n, "first")
            if n and where.last + p > shape[0]:
                raise ArgumentError(
                    f"first: expected rows of a {shape} matrix, got {where.first} … {where.last + p - 1}"
                )
            plan = None if there is None else where.there(there.device)
        if there is not None and plan is not None:
            down, right = (self._side(there, offset, side, shape[side]).places for side in (0, 1))
            there.push_matrix(for_device(values), down, right, plan)
            return
        begins, targets = where.bases, where.targets
        own, across = self.places(offset, 0, shape[0]), self.places(offset, 1, shape[1])
        values = values.cpu() if isinstance(values, torch.Tensor) else values
        if not (arrays.dtype_name(values) == "float32" and _rows_contiguous(values)):
            values = arrays.as_tensor(values).float().contiguous()
        native, weight = dispatch.native(), math.sqrt(self.nonzeros)
        if native is not None:
            sums, threads = self._sums, dispatch.num_threads()
            native.sketch_matrix(values, shape[1], own, across, targets, begins, weight, sums, threads)
            return
        entries = weight * arrays.as_tensor(values).numpy().astype(np.float64)
        for i in np.lexsort((begins, targets)):
            both = own[begins[i] : begins[i] + p, None] ^ across
            np.add.at(self._sums[targets[i]], both.reshape(-1) >> 1, entries[i] * (1 - 2 * (both.reshape(-1) & 1)))

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
        there = self._on_device(left)
        if there is not None:
            one, other = self._side(there, offset, int(turned), n), self._side(there, offset, int(not turned), k)
            there.push_outer(left, right, one, other, rows)
            return
        left, right = left.cpu().float().contiguous(), right.cpu().float().contiguous()
        by_delta = self.places(offset, int(turned), n)
        by_input = self.places(offset, int(not turned), k)
        sums = self._sums[rows].reshape(left.shape[0], left.shape[2], self.d)
        native, weight = dispatch.native(), math.sqrt(self.nonzeros)
        if native is not None:
            native.sketch_outer(left, right, by_delta, by_input, weight, sums, dispatch.num_threads())
            return
        product = reference.sketch_outer(left, right, by_delta, by_input, self.d)
        sums += weight * product.reshape(sums.shape).numpy()

    def places(self, offset: int, side: int, n: int) -> Array:
        """``(n,)`` int32: bucket·2 + (1 where the sign is −) of the rows (side 0) or columns (1) of a matrix.

        Raises:
            ArgumentError: d is no power of two.
        """
        if self.d & (self.d - 1):
            raise ArgumentError(f"d: two-sided maps need a power of two, got {self.d}")
        return _places(self.seed, self.d, offset, side, n)

    def _side(self, there: DeviceSketch, offset: int, side: int, n: int) -> Side:
        self.places(offset, side, 0)  # refuses a d that is no power of two
        return _side(self.seed, self.d, offset, side, n, there.device, cuda.stream(there.sums))

    # ---- results -------------------------------------------------------------------------------------------

    def finish(self) -> npt.NDArray[np.float32]:
        """The sketches ``(n_rows, d)``; empty afterwards.

        Raises:
            NonFiniteError: A sketch is not finite: what was pushed into it was not, or overflows float32. The index
                is that of its first such bucket.
        """
        return self.finish_later()()

    def finish_later(self) -> Callable[[], npt.NDArray[np.float32]]:
        """As :meth:`finish`, but it does not wait for a CUDA device: the sketches are on their way to the host.

        Returns:
            What waits for them and gives them, once; any thread may call it. The sums are zero already.
        """
        if self._device is not None:
            under_way = to_host(*self._device.finish())
            return lambda: _checked(*under_way.wait())
        out, bad = finished(self._sums, self.nonzeros)
        self.reset()
        return lambda: _checked(out, bad if bad >= 0 else cuda.ALL_FINITE)

    def finish_there(self) -> Operand:
        """As :meth:`finish`, but where the sums live: a tensor, on a CUDA device.

        Raises:
            NonFiniteError: As for :meth:`finish`.
        """
        if self._device is None:
            return self.finish()
        out, bad = self._device.finish()
        if int(bad) != cuda.ALL_FINITE:
            _checked(out.cpu().numpy(), bad.cpu().numpy())
        return out

    def reset(self) -> None:
        """Forget all that was pushed."""
        if self._device is not None:
            self._device.sums.zero_()
        elif "_sums" in self.__dict__:
            self._sums[:] = 0


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
    native = dispatch.native()
    if native is None:
        return reference.sketch_places(seed, offset, side, d, n)
    places = np.empty(n, np.int32)
    native.sketch_places(seed, offset, side, d, places)
    return places


@functools.lru_cache(maxsize=256)
def _side(seed: int, d: int, offset: int, side: int, n: int, device: torch.device, stream: int) -> Side:
    """Make the map of one side of a matrix; once per stream, so that no call waits for another stream."""
    return Side(to_device(_places(seed, d, offset, side, n), device), d)


def _checked(out: npt.NDArray[np.float32], bad: Any) -> npt.NDArray[np.float32]:
    if (row := int(np.asarray(bad).item())) != cuda.ALL_FINITE:
        raise NonFiniteError(row, int(np.argmin(np.isfinite(out[row]))))
    return out


def finished(sums: npt.NDArray[np.float64], nonzeros: int) -> tuple[npt.NDArray[np.float32], int]:
    """Float32 sketches of float64 sums, and the first row that is not finite, or −1."""
    native, scale = dispatch.native(), 1 / math.sqrt(nonzeros)
    out = np.empty(sums.shape, np.float32)
    if native is not None:
        return out, int(native.sketch_finish(sums, scale, out, dispatch.num_threads()))
    with np.errstate(over="ignore"):
        np.multiply(sums, scale, out=out, casting="same_kind")
    finite = np.isfinite(out).all(axis=1)
    return out, -1 if finite.all() else int(np.argmin(finite))


def _as_float32(values: Any) -> list[tuple[int, Operand]]:
    """The block itself where it is float32 with contiguous rows on the CPU, else converted pieces of it."""
    values = values.cpu() if isinstance(values, torch.Tensor) else values
    if arrays.dtype_name(values) == "float32" and _rows_contiguous(values):
        return [(0, values)]
    return list(_blocks(values))
