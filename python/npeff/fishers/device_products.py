"""Products on a device of rows that lie on the host: a stretch of columns at a time, so that they never have to fit.

``A = [A_1 A_2 …]`` by columns: ``A Aᵀ = Σ A_s A_sᵀ``, ``A Gᵀ = Σ A_s G_sᵀ`` and ``Sᵀ A = [Sᵀ A_1 Sᵀ A_2 …]``. While the
device works on one stretch, a thread makes the next.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from npeff import kernels
from npeff.fishers.row_products import sparse_tensors
from npeff.fishers.rows import DenseRows, SparseRows
from npeff.fishers.streamed_rows import StreamedRows, column_counts
from npeff.kernels.sparse_gram import DEVICE_DENSE_BYTES, add_gram_, mirror_
from npeff.kernels.transfers import to_device

Array = npt.NDArray[Any]
T = TypeVar("T")
HostRows = SparseRows | DenseRows | StreamedRows

ENTRY_BYTES = 64
"""Device memory that a sparse entry takes while its stretch is worked on: itself, its row, its place in a transpose."""


def row_gram(rows: HostRows, dtype: torch.dtype, device: torch.device, room: int) -> Tensor:
    """``K = A Aᵀ`` on the device, ``(rows, rows)``.

    Args:
        rows: The rows.
        dtype: float32 or float64.
        device: Where K is to be.
        room: Bytes there for a stretch of the rows, beside K.
    """
    K = torch.zeros(rows.n_rows, rows.n_rows, dtype=dtype, device=device)
    for first, last, part in _stretches(rows, room, 0):
        if isinstance(part, DenseRows):
            _add_square(K, to_device(part.values, device, dtype))
        elif dtype == torch.float32:
            add_gram_(K, *sparse_tensors(part, dtype, device), last - first, min(DEVICE_DENSE_BYTES, room))
        else:
            for block in _dense_blocks(part, room):
                _add_square(K, to_device(block, device, dtype))
    return mirror_(K)


def project_rows(rows: HostRows, vectors: Tensor, device: torch.device, room: int) -> Tensor:
    """``A Gᵀ`` on the device for G ``(r, n_columns)`` on the host: ``(rows, r)`` in G's dtype."""
    out = torch.zeros(rows.n_rows, len(vectors), dtype=vectors.dtype, device=device)
    for first, last, part in _stretches(rows, room, 2 * len(vectors) * vectors.element_size()):
        G = to_device(vectors[:, first:last].T.numpy(), device)
        if isinstance(part, DenseRows):
            out.addmm_(to_device(part.values, device, vectors.dtype), G)
        else:
            out += kernels.spmm(*sparse_tensors(part, vectors.dtype, device), G)
    return out


def combine_rows(rows: HostRows, S: Tensor, room: int) -> Tensor:
    """``Sᵀ A`` on the host, ``(r, n_columns)``, for S ``(rows, r)`` on the device, in its dtype."""
    out = torch.empty(S.shape[1], rows.n_columns, dtype=S.dtype)
    S = S.contiguous()
    for first, last, part in _stretches(rows, room, 2 * S.shape[1] * S.element_size()):
        if isinstance(part, DenseRows):
            here = S.T @ to_device(part.values, S.device, S.dtype)
        else:
            turned = kernels.csr_transpose(*sparse_tensors(part, S.dtype, S.device), last - first)
            here = kernels.spmm(*turned, S).T
        out[:, first:last] = here.cpu()
    return out


def ahead(items: Iterable[T]) -> Iterator[T]:
    """The items, each made by a thread while the one before it is in use."""
    made = iter(items)
    with ThreadPoolExecutor(1) as pool:
        following = pool.submit(lambda: next(made, None))
        while (item := following.result()) is not None:
            following = pool.submit(lambda: next(made, None))
            yield item


def _stretches(rows: HostRows, room: int, per_column: int) -> Iterator[tuple[int, int, SparseRows | DenseRows]]:
    """First column, column after the last, and the rows on these columns, which take at most ``room`` bytes there."""
    if isinstance(rows, StreamedRows) and isinstance(rows.stored, SparseRows):
        rows = rows.whole()
    if isinstance(rows, SparseRows):
        return ahead(_sparse_stretches(rows, room, per_column))
    return ahead(_dense_stretches(rows, room, per_column))


def _dense_stretches(
    rows: DenseRows | StreamedRows, room: int, per_column: int
) -> Iterator[tuple[int, int, DenseRows]]:
    width = max(1, room // (16 * rows.n_rows + per_column + 1))  # as stored, float64, and a copy that is under way
    for first in range(0, rows.n_columns, width):
        last = min(first + width, rows.n_columns)
        values = rows.stretch(first, last) if isinstance(rows, StreamedRows) else rows.values[:, first:last]
        yield first, last, DenseRows(np.ascontiguousarray(values, np.float32))


def _sparse_stretches(rows: SparseRows, room: int, per_column: int) -> Iterator[tuple[int, int, SparseRows]]:
    counts: Array = np.zeros(rows.n_columns, np.int64)
    found = column_counts(rows)
    counts[: len(found)] = found
    edges = _edges(ENTRY_BYTES * counts + per_column + 8, room)
    if len(edges) <= 2:
        yield 0, rows.n_columns, rows
        return
    # Indices ascend within a row: where each stretch begins in it.
    bounds: Array = np.zeros((rows.n_rows, len(edges)), np.int64)
    for i, (low, high) in enumerate(pairwise(np.asarray(rows.indptr).tolist())):
        bounds[i] = low + np.searchsorted(rows.indices[low:high], edges)
    for s, (first, last) in enumerate(pairwise(edges.tolist())):
        lows, highs = bounds[:, s].tolist(), bounds[:, s + 1].tolist()
        indptr = np.concatenate([[0], np.cumsum(bounds[:, s + 1] - bounds[:, s])]).astype(np.int64)
        indices, values = np.empty(indptr[-1], rows.indices.dtype), np.empty(indptr[-1], rows.values.dtype)
        for at, low, high in zip(indptr.tolist(), lows, highs, strict=False):
            np.subtract(rows.indices[low:high], first, out=indices[at : at + high - low], casting="same_kind")
            values[at : at + high - low] = rows.values[low:high]
        yield first, last, SparseRows(indptr, indices, values, last - first)


def _edges(costs: Array, room: int) -> Array:
    """Where stretches begin and end that cost at most ``room`` each, or are a single column."""
    total = np.cumsum(costs)
    chosen = [0]
    while chosen[-1] < len(costs):
        before = total[chosen[-1] - 1] if chosen[-1] else 0
        chosen.append(max(chosen[-1] + 1, int(np.searchsorted(total, before + room, "right"))))
    return np.array(chosen)


def _dense_blocks(part: SparseRows, room: int) -> Iterator[Array]:
    """The columns that have entries, densely, some at a time."""
    present, places = np.unique(part.indices, return_inverse=True)
    row = np.repeat(np.arange(part.n_rows), np.diff(part.indptr))
    width = max(1, room // (16 * part.n_rows + 1))
    for first in range(0, len(present), width):
        here = (places >= first) & (places < first + width)
        block = np.zeros((part.n_rows, min(width, len(present) - first)), np.float32)
        block[row[here], places[here] - first] = part.values[here]
        yield block


def _add_square(K: Tensor, A: Tensor) -> None:
    """The lower triangle of ``K += A Aᵀ``, by eight strips."""
    step = max(512, -(-len(K) // 8))
    for top in range(0, len(K), step):
        bottom = min(top + step, len(K))
        K[top:bottom, :bottom].addmm_(A[top:bottom], A[:bottom].T)
