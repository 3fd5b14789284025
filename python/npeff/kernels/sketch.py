"""Random projections: long rows to d numbers whose inner products are, up to noise, those of the rows.

A sparse Johnson–Lindenstrauss transform (Charikar, Chen & Farach-Colton 2002; Nelson & Nguyễn 2013) without state:
the seed and a parameter's flat index alone decide its bucket and its sign. With ``nonzeros`` = s every parameter has
one bucket in each of s stretches of d/s buckets, with weight ±1/√s. Over seeds the inner product of two sketches has
the mean ⟨x, y⟩ and a variance of at most ``(‖x‖²‖y‖² + ⟨x, y⟩²) / d``, whatever s is.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from npeff.errors import ArgumentError
from npeff.kernels import arrays, dispatch, reference
from npeff.kernels.arrays import A, Array, Operand
from npeff.kernels.sparse import check_csr, check_structure
from npeff.kernels.topk import FLOATS, NonFiniteError, _blocks, _rows_contiguous

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


def sketch(x: A, d: int, seed: int = 0, base: int = 0, *, nonzeros: int = NONZEROS) -> A:
    """The sketches of the rows of a matrix.

    Args:
        x: ``(rows, cols)`` or ``(cols,)``; float32, or another float, rounded to float32. Any strides.
        d: Length of a sketch, a multiple of 16·nonzeros.
        seed: Which transform.
        base: Flat index of the first column: the sketch of a row is the sum of the sketches of its parts.
        nonzeros: Buckets per parameter.

    Returns:
        ``(rows, d)`` (or ``(d,)``) float32, of the kind and device of x. The same bits on any machine and for any
        number of threads.

    Raises:
        ArgumentError: x is no float matrix, or d, seed, base or nonzeros is out of range.
        NonFiniteError: x holds NaN or infinite values.
    """
    if not isinstance(x, torch.Tensor | np.ndarray) or x.ndim not in {1, 2}:
        raise ArgumentError("x: expected a (rows, cols) or (cols,) tensor or array")
    matrix: Any = x.reshape(1, -1) if x.ndim == 1 else x
    stream = StreamingSketch(int(matrix.shape[0]), d, seed, nonzeros=nonzeros)
    stream.push(matrix, base)
    try:
        out = stream.finish()
    except NonFiniteError:
        bad = torch.nonzero(~torch.isfinite(arrays.as_tensor(matrix)))
        if len(bad):
            raise NonFiniteError(int(bad[0, 0]), base + int(bad[0, 1])) from None
        raise
    result: Any = out.reshape(*x.shape[:-1], d)
    if isinstance(x, torch.Tensor):
        result = torch.from_numpy(result).to(x.device)
    return result


def sketch_csr(indptr: A, indices: A, values: A, d: int, seed: int = 0, *, nonzeros: int = NONZEROS) -> A:
    """The sketches of compressed sparse rows; the bits of :func:`sketch` where indices ascend within rows.

    Args:
        indptr: ``(R + 1,)`` int64.
        indices: ``(nnz,)`` int32 or int64, ≥ 0.
        values: ``(nnz,)`` float32.
        d: Length of a sketch, a multiple of 16·nonzeros.
        seed: Which transform.
        nonzeros: Buckets per parameter.

    Returns:
        ``(R, d)`` float32, of the kind of ``values``.

    Raises:
        ArgumentError: Shapes or dtypes do not fit, or d, seed or nonzeros is out of range.
        NonFiniteError: A value is NaN or infinite; the index is its place in ``values``.
    """
    check_map(d, seed, nonzeros)
    indptr, indices, values = check_csr(indptr, indices, values)
    n_columns = 1 + (int(indices.max()) if indices.shape[0] else 0)
    native = dispatch.native()
    sums = np.zeros((indptr.shape[0] - 1, d), np.float64)
    if native is None or arrays.device_of(values).type != "cpu":
        starts, columns, entries = (arrays.as_tensor(x).cpu() for x in (indptr, indices, values))
        check_structure(starts, columns, n_columns)
        rows = torch.repeat_interleave(torch.arange(len(sums)), starts.diff()).numpy()
        reference.add_to_sketch(sums, rows, columns.numpy(), entries.numpy(), seed, nonzeros)
    else:
        native.sketch_csr(indptr, indices, values, n_columns, seed, nonzeros, sums, dispatch.num_threads())
    out, bad = _finished(sums, nonzeros)
    if bad >= 0:
        at = int(np.argmin(np.isfinite(np.asarray(arrays.as_tensor(values).cpu()))))
        raise NonFiniteError(bad, at)
    return arrays.like(values, out)


class StreamingSketch:
    """Per row, the sketch of all that is pushed, block by block.

    Sums are kept in float64, each bucket's terms added in the order in which they come: blocks that come by ascending
    flat index give the same bits however the row is cut into blocks, whatever rows come with it, on any number of
    threads and any processor. Blocks in another order change a sum by rounding in float64, which a float32 result
    shows in a last bit once in some 10⁸ numbers.

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
        if n_rows < 0:
            raise ArgumentError(f"n_rows: expected ≥ 0, got {n_rows}")
        self.n_rows, self.d, self.seed, self.nonzeros = n_rows, int(d), int(seed), int(nonzeros)
        self._sums = np.zeros((n_rows, self.d), np.float64)
        self._places: dict[tuple[int, int, int], Array] = {}

    def push(self, block: Operand, base: int | Array = 0, rows: Array | None = None) -> None:
        """Add a block of values.

        Args:
            block: ``(b, width)`` float32 (other floats are converted); any strides.
            base: Flat index of the block's first column; a scalar, or ``(b,)`` int64 for each row its own.
            rows: ``(b,)`` int64, the sketch that each row of the block belongs to; several may share one. None:
                row i belongs to sketch i.

        Raises:
            ArgumentError: Shapes or dtypes do not fit, or a sketch does not exist.
        """
        array: Any = block
        values = arrays.check(array, "block", FLOATS, (None, None))
        n = values.shape[0]
        bases = (
            np.full(n, base, np.int64)
            if isinstance(base, int | np.integer)
            else arrays.check(base, "base", ("int64",), (n,))
        )
        targets = self._targets(rows, n)
        if len(bases) and not 0 <= int(bases.min()) <= int(bases.max()) <= 2**62 - values.shape[1]:
            raise ArgumentError(f"base: expected flat indices from 0 to 2⁶², got {bases.min()} … {bases.max()}")
        for start, chunk in _as_float32(values):
            self._push(chunk, np.ascontiguousarray(bases + start), targets)

    def _targets(self, rows: Array | None, n: int) -> Array:
        if rows is None:
            if n > self.n_rows:
                raise ArgumentError(f"block: expected at most {self.n_rows} rows, one per sketch, got {n}")
            return np.arange(n, dtype=np.int64)
        rows = np.ascontiguousarray(arrays.check(rows, "rows", ("int64",), (n,)))
        if n and not 0 <= int(rows.min()) <= int(rows.max()) < self.n_rows:
            raise ArgumentError(f"rows: expected numbers from 0 to {self.n_rows - 1}, got {rows.min()} … {rows.max()}")
        return rows

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
        self, block: Operand, offset: int, shape: tuple[int, int], first: Array, rows: Array | None = None
    ) -> None:
        """Add rows of a matrix by its two-sided map: ``bucket(i, j) = bucket(i) xor bucket(j)``, signs multiplied.

        Args:
            block: ``(b, p·columns)`` float32 (other floats are converted): p rows of the matrix each, end to end.
            offset: Flat index of the matrix's first element: together with the seed, it decides the map.
            shape: ``(rows, columns)`` of the whole matrix.
            first: ``(b,)`` int64, which row of the matrix each row of the block begins with.
            rows: ``(b,)`` int64, the sketch that each row of the block belongs to; None: sketch i.

        Raises:
            ArgumentError: Shapes or dtypes do not fit, d is no power of two, or a row does not exist.
        """
        array: Any = block
        values = arrays.check(array, "block", FLOATS, (None, None))
        targets = self._targets(rows, values.shape[0])
        first = np.ascontiguousarray(arrays.check(first, "first", ("int64",), (values.shape[0],)))
        own, across = self.places(offset, 0, shape[0]), self.places(offset, 1, shape[1])
        if values.shape[1] % shape[1]:
            raise ArgumentError(f"block: expected whole rows of {shape[1]} columns, got width {values.shape[1]}")
        p = values.shape[1] // shape[1]
        if len(first) and not 0 <= int(first.min()) <= int(first.max()) <= shape[0] - p:
            raise ArgumentError(f"first: expected rows of a {shape} matrix, got {first.min()} … {first.max() + p - 1}")
        values = values.cpu() if isinstance(values, torch.Tensor) else values
        if not (arrays.dtype_name(values) == "float32" and _rows_contiguous(values)):
            values = arrays.as_tensor(values).float().contiguous()
        native, weight = dispatch.native(), math.sqrt(self.nonzeros)
        if native is not None:
            sums, threads = self._sums, dispatch.num_threads()
            native.sketch_matrix(values, shape[1], own, across, targets, first, weight, sums, threads)
            return
        entries = weight * arrays.as_tensor(values).numpy().astype(np.float64)
        for i in np.lexsort((first, targets)):
            both = own[first[i] : first[i] + p, None] ^ across
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
        left: Any = arrays.as_tensor(delta).cpu().float().contiguous()
        right: Any = arrays.as_tensor(inputs).cpu().float().contiguous()
        n, k = shape[::-1] if turned else shape
        if left.dim() != 4 or left.shape[3] != n or right.shape != (*left.shape[:2], k):
            raise ArgumentError(
                f"delta, inputs: expected (b, T, R, {n}) and (b, T, {k}), got {tuple(left.shape)}, {tuple(right.shape)}"
            )
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
        key = (offset, side, n)
        if key not in self._places:
            native = dispatch.native()
            if native is None:
                self._places[key] = reference.sketch_places(self.seed, offset, side, self.d, n)
            else:
                self._places[key] = np.empty(n, np.int32)
                native.sketch_places(self.seed, offset, side, self.d, self._places[key])
        return self._places[key]

    # ---- results -------------------------------------------------------------------------------------------

    def finish(self) -> npt.NDArray[np.float32]:
        """The sketches ``(n_rows, d)``; empty afterwards.

        Raises:
            NonFiniteError: A sketch is not finite: what was pushed into it was not, or overflows float32. The index
                is that of its first such bucket.
        """
        out, bad = _finished(self._sums, self.nonzeros)
        self.reset()
        if bad >= 0:
            raise NonFiniteError(bad, int(np.argmin(np.isfinite(out[bad]))))
        return out

    def reset(self) -> None:
        """Forget all that was pushed."""
        self._sums[:] = 0


def _finished(sums: npt.NDArray[np.float64], nonzeros: int) -> tuple[npt.NDArray[np.float32], int]:
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
