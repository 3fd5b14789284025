"""Sketches by the flat map on a CUDA device."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from npeff.kernels import cuda
from npeff.kernels.cuda_topk import RowPlan


class DeviceSketch:
    """Sums of sketches in device memory, float64; see ``kernels.StreamingSketch``. The same bits every time.

    Within a stretch of a row (at least 32·d entries) sums are float32, so that results equal the CPU's to about 1e-6
    of the row's norm, not to the last bit.

    Args:
        n_rows: Number of sketches.
        d: Length of each, a multiple of 16·nonzeros.
        seed: Which transform.
        nonzeros: Buckets per parameter.
        device: A CUDA device.
    """

    def __init__(self, n_rows: int, d: int, seed: int, nonzeros: int, device: torch.device) -> None:
        self.d, self.seed, self.nonzeros = d, seed, nonzeros
        self.sums = torch.zeros(n_rows, d, dtype=torch.float64, device=device)
        self._cuda = cuda.module(self.sums)
        self._workspace = torch.empty(0, device=device)

    def push(self, block: Tensor, plan: RowPlan) -> None:
        """Add ``block`` (b, width), float32, float16 or bfloat16, its rows contiguous; waits for nothing."""
        dtype = str(block.dtype).removeprefix("torch.")
        need = self._cuda.sketch_workspace(cuda.index_of(block), dtype, self.d, self.nonzeros, *block.shape)
        if len(self._workspace) < need:
            self._workspace = torch.empty(need, device=block.device)
        self._cuda.sketch_rows(
            self.d,
            self.nonzeros,
            self.seed,
            block,
            plan.bases,
            plan.order,
            plan.starts,
            self._workspace,
            self.sums,
            cuda.stream(block),
        )

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
