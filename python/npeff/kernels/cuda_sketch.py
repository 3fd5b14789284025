"""Sketches on a CUDA device."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from npeff.kernels import arrays, cuda
from npeff.kernels.cuda_topk import RowPlan
from npeff.kernels.transfers import to_device


class DeviceSketch:
    """Sums of sketches in device memory, float64; see ``kernels.StreamingSketch``. The same bits every time.

    Within a stretch of a row (at least 4096 or 8·d entries) sums are float32, so that results equal the CPU's to about
    1e-6 of the row's norm, not to the last bit.

    Args:
        n_rows: Number of sketches.
        d: Length of each, a multiple of 16·nonzeros.
        seed: Which transform.
        nonzeros: Buckets per parameter.
        device: A CUDA device.
    """

    def __init__(self, n_rows: int, d: int, seed: int, nonzeros: int, device: torch.device) -> None:
        self.d, self.seed, self.nonzeros, self.device = d, seed, nonzeros, device
        self.sums = torch.zeros(n_rows, d, dtype=torch.float64, device=device)
        self._cuda = cuda.module(self.sums)
        self._workspace = torch.empty(0, device=device)

    def push(self, block: Tensor, plan: RowPlan) -> None:
        """Add ``block`` (b, width), float32, float16 or bfloat16, its rows contiguous; waits for nothing."""
        need = self._cuda.sketch_workspace(
            cuda.index_of(block), arrays.dtype_name(block), self.d, self.nonzeros, *block.shape
        )
        self._cuda.sketch_rows(
            self.d,
            self.nonzeros,
            self.seed,
            block,
            plan.bases,
            plan.order,
            plan.starts,
            self._space(need),
            self.sums,
            cuda.stream(block),
        )

    def push_matrix(self, block: Tensor, down: Tensor, across: Tensor, plan: RowPlan) -> None:
        """Add rows of a matrix by its two-sided map, for d a power of two; waits for nothing.

        Args:
            block: ``(b, p·columns)`` float32, float16 or bfloat16, its rows contiguous.
            down: int32 places of the matrix's rows; those that the block touches are taken unseen.
            across: ``(columns,)`` int32 places of its columns.
            plan: Of the rows; ``bases`` are the matrix rows that they begin with.
        """
        need = self._cuda.sketch_matrix_workspace(cuda.index_of(block), arrays.dtype_name(block), self.d, *block.shape)
        self._cuda.sketch_matrix(
            self.d,
            math.sqrt(self.nonzeros),
            block,
            down,
            across,
            plan.bases,
            plan.order,
            plan.starts,
            self._space(need),
            self.sums,
            cuda.stream(block),
        )

    def push_outer(self, left: Tensor, right: Tensor, left_side: Side, right_side: Side, rows: slice) -> None:
        """Add ``Σ_t left_t ⊗ right_t`` by a two-sided map, by Walsh–Hadamard transforms; waits for nothing.

        Args:
            left: ``(b, T, R, n)``.
            right: ``(b, T, k)``.
            left_side: The map of left's side.
            right_side: Of right's.
            rows: The b·R sketches, without a step.
        """
        b, t, r, n = left.shape
        if not left.numel() or not right.numel():
            return
        by_left = hadamard(cuda.spmm(*left_side.scatter, left.reshape(-1, n).T.float().contiguous()))
        by_right = hadamard(cuda.spmm(*right_side.scatter, right.reshape(b * t, -1).T.float().contiguous()))
        product = (by_left.view(self.d, b, t, r) * by_right.view(self.d, b, t, 1)).sum(dim=2)
        back = hadamard(product.view(self.d, b * r)).T.double()
        self.sums[rows].add_(back, alpha=math.sqrt(self.nonzeros) / self.d)

    def push_csr(self, indptr: Tensor, indices: Tensor, values: Tensor, n_columns: int) -> None:
        """Add CSR rows, row i to sketch i: as integers of 2⁻³⁸ of a row's largest entry, in no order."""
        where = cuda.stream(values)
        self._cuda.sketch_csr(self.d, self.nonzeros, self.seed, indptr, indices, values, n_columns, self.sums, where)

    def finish(self) -> tuple[Tensor, Tensor]:
        """The sketches ``(n_rows, d)`` float32, and ``(1,)`` int64: the first that is not finite (or 2⁶³ − 1).

        The sums are zero afterwards. Waits for nothing.
        """
        out = torch.empty(self.sums.shape, dtype=torch.float32, device=self.sums.device)
        bad = torch.full((1,), cuda.ALL_FINITE, dtype=torch.int64, device=self.sums.device)
        self._cuda.sketch_finish(self.sums, 1 / math.sqrt(self.nonzeros), out, bad, cuda.stream(self.sums))
        self.sums.zero_()
        return out, bad

    def _space(self, need: int) -> Tensor:
        if len(self._workspace) < need:
            self._workspace = torch.empty(need, device=self.device)
        return self._workspace


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
    def scatter(self) -> tuple[Tensor, Tensor, Tensor]:
        """``(d, n)`` CSR with the sign of i at ``[bucket(i), i]``: the sketch of this side as a product."""
        buckets, order = torch.sort(self.places >> 1, stable=True)
        edges = torch.arange(self.d + 1, dtype=buckets.dtype, device=buckets.device)
        signs = 1 - 2 * (self.places & 1)
        return torch.searchsorted(buckets, edges), order.to(torch.int32), signs[order].to(torch.float32)


def hadamard(x: Tensor) -> Tensor:
    """The Walsh–Hadamard transform of every column of x ``(d, n)``, d a power of two: ``H_d x``.

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
    return _made_signs(d, like.dtype, like.device, cuda.stream(like) if like.is_cuda else 0)


@functools.lru_cache(maxsize=64)
def _made_signs(d: int, dtype: torch.dtype, device: torch.device, stream: int) -> Tensor:
    rows = np.arange(d)
    ones = sum(((rows[:, None] & rows) >> bit) & 1 for bit in range(d.bit_length()))
    return to_device(1.0 - 2.0 * (np.asarray(ones) & 1), device, dtype)
