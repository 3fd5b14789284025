"""Products of rows with vectors and with each other, whatever form the rows have."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from npeff import kernels
from npeff.fishers.rows import DenseRows, GramRows, Rows, SparseRows
from npeff.fishers.streamed_rows import StreamedRows
from npeff.kernels.cuda import checked
from npeff.kernels.sparse import check_structure
from npeff.kernels.transfers import to_device
from npeff.models import devices


def sparse_tensors(
    rows: SparseRows, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> tuple[Tensor, Tensor, Tensor]:
    """``(indptr, indices, values)`` as torch tensors; those on a CUDA device are known to be sound there.

    Raises:
        ArgumentError: An index is out of range.
    """
    device = torch.device(device)
    there = devices.has_own_memory(device)
    if there:
        here = torch.device("cpu")
        check_structure(to_device(rows.indptr, here), to_device(rows.indices, here), rows.n_columns, ascending=True)
    indptr, indices = (to_device(a, device) for a in (rows.indptr, rows.indices))
    if there:
        checked.record(indptr, indices, extent=rows.n_columns)
    return indptr, indices, to_device(rows.values, device, dtype)


def dense_tensor(rows: DenseRows, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu") -> Tensor:
    """The rows as a torch tensor; shared memory where dtype and device allow it."""
    return to_device(rows.values, torch.device(device), dtype)


def project_rows(rows: Rows | StreamedRows, vectors: Tensor) -> Tensor:
    """``A Gᵀ`` for G ``(r, n_columns)``: ``(rows, r)`` in G's dtype."""
    if isinstance(rows, StreamedRows):
        parts = [project_rows(part, vectors) for _, _, part in rows.parts()]
        return torch.cat(parts) if parts else vectors.new_zeros(0, len(vectors))
    if isinstance(rows, SparseRows):
        return kernels.spmm(*sparse_tensors(rows, vectors.dtype), vectors.T.contiguous())
    parts = [
        torch.from_numpy(rows.dense(i, min(i + 4096, rows.n_rows))).to(vectors.dtype) @ vectors.T
        for i in range(0, rows.n_rows, 4096)
    ]
    return torch.cat(parts) if parts else vectors.new_zeros(0, len(vectors))


def combine_rows(rows: Rows | StreamedRows, S: Tensor) -> Tensor:
    """``Sᵀ A`` for S ``(rows, r)``: ``(r, n_columns)`` in S's dtype."""
    if isinstance(rows, StreamedRows):
        out = S.new_zeros(S.shape[1], rows.n_columns)
        for start, stop, part in rows.parts():
            out += combine_rows(part, S[start:stop])
        return out
    if isinstance(rows, SparseRows):
        return kernels.spmm(
            *kernels.csr_transpose(*sparse_tensors(rows, S.dtype), rows.n_columns), S.contiguous()
        ).T.contiguous()
    out = S.new_zeros(S.shape[1], rows.n_columns)
    for i in range(0, rows.n_rows, 4096):
        stop = min(i + 4096, rows.n_rows)
        out += S[i:stop].T @ torch.from_numpy(rows.dense(i, stop)).to(S.dtype)
    return out


def row_gram(rows: Rows | StreamedRows, dtype: torch.dtype = torch.float32) -> Tensor:
    """``K = A Aᵀ``, ``(rows, rows)``; only one triangle is computed."""
    if isinstance(rows, GramRows):
        return torch.from_numpy(np.array(rows.values)).to(dtype)
    if isinstance(rows, StreamedRows):
        return _streamed_gram(rows, dtype) if isinstance(rows.stored, DenseRows) else row_gram(rows.whole(), dtype)
    if isinstance(rows, SparseRows) and dtype == torch.float32:
        return kernels.sparse_gram(*sparse_tensors(rows), rows.n_columns)
    if isinstance(rows, SparseRows):
        rows = DenseRows(rows.dense(0, rows.n_rows))
    K = torch.empty(rows.n_rows, rows.n_rows, dtype=dtype)
    A = torch.from_numpy(np.ascontiguousarray(rows.values))
    edges = range(0, rows.n_rows, max(512, -(-rows.n_rows // 8)))
    for i in edges:
        block = A[i : i + edges.step].to(dtype)
        below = A[i:].to(dtype) @ block.T
        K[i:, i : i + edges.step] = below
        K[i : i + edges.step, i:] = below.T
    return K


def _streamed_gram(rows: StreamedRows, dtype: torch.dtype) -> Tensor:
    """K by stretches of columns, so that every number is read once."""
    K = torch.zeros(rows.n_rows, rows.n_rows, dtype=dtype)
    width = max(64, rows.part_bytes // max(1, 4 * rows.n_rows))
    edges = range(0, rows.n_rows, max(512, -(-rows.n_rows // 8)))
    for start in range(0, rows.n_columns, width):
        A = torch.from_numpy(rows.stretch(start, min(start + width, rows.n_columns))).to(dtype)
        for i in edges:
            K[i:, i : i + edges.step] += A[i:] @ A[i : i + edges.step].T
    for i in edges:
        K[i : i + edges.step, i + edges.step :] = K[i + edges.step :, i : i + edges.step].T
    return K
