"""Streaming exact top-k on a CUDA device."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from npeff.kernels import cuda
from npeff.kernels.transfers import to_device

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class RowPlan:
    """Where the rows of a block go, on the device; int64. To be made once and used for every block of that form.

    Attributes:
        targets: ``(b,)`` selector (or sketch) of each row.
        bases: ``(b,)`` flat index of each row's first column.
        order: ``(b,)`` rows by target, within a target by base.
        starts: ``(targets + 1,)`` where each target's rows begin in ``order``.
        scratch: ``(b,)``.
    """

    targets: Tensor
    bases: Tensor
    order: Tensor
    starts: Tensor
    scratch: Tensor


def plan_rows(bases: Array | Tensor, rows: Array | None, n_targets: int, device: torch.device) -> RowPlan:
    """The plan for a block's rows, on the device; nothing is waited for.

    Blocks of one form come again with every batch: a plan from numpy arrays is made once per stream.

    Args:
        bases: ``(b,)`` int64; a tensor on the device stays there.
        rows: ``(b,)`` int64 in ``[0, n_targets)``; None: row i goes to target i.
        n_targets: Number of selectors or sketches.
        device: Where to.

    Returns:
        The plan.
    """
    targets = np.arange(len(bases), dtype=np.int64) if rows is None else rows
    if isinstance(bases, Tensor):
        return _plan_there(bases, to_device(np.ascontiguousarray(targets), device), n_targets)
    here = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    return _plan_here(bases.tobytes(), targets.tobytes(), n_targets, device, int(here))


@functools.lru_cache(maxsize=4096)
def _plan_here(bases: bytes, rows: bytes, n_targets: int, device: torch.device, stream: int) -> RowPlan:
    base, targets = np.frombuffer(bases, np.int64), np.frombuffer(rows, np.int64)
    b, order = len(base), np.lexsort((base, targets))
    starts = np.searchsorted(targets[order], np.arange(n_targets + 1))
    there = to_device(np.concatenate([targets, base, order, starts]).astype(np.int64, copy=False), device)
    scratch = torch.empty(b, dtype=torch.int64, device=device)
    return RowPlan(there[:b], there[b : 2 * b], there[2 * b : 3 * b], there[3 * b :], scratch)


def _plan_there(bases: Tensor, targets: Tensor, n_targets: int) -> RowPlan:
    by_base = torch.argsort(bases, stable=True)
    order = by_base[torch.argsort(targets[by_base], stable=True)]
    edges = torch.arange(n_targets + 1, dtype=torch.int64, device=bases.device)
    starts = torch.searchsorted(targets[order], edges)
    return RowPlan(targets, bases, order, starts, torch.empty_like(bases))


def ordered_by_magnitude(counts: Tensor, indices: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Indices and values ``(n, k)``, ordered by index, in the order of descending |value|; ties by index."""
    there = torch.arange(indices.shape[1], device=counts.device) < counts[:, None]
    order = torch.where(there, values.abs(), -1).sort(dim=1, descending=True, stable=True).indices
    return indices.gather(1, order), values.gather(1, order)


class DeviceTopK:
    """Running selections of the k largest |value|, in device memory; see ``kernels.StreamingTopK``.

    Pushes wait for nothing; a non-finite value is found out by :meth:`take_status`.

    Args:
        n_rows: Number of selectors.
        k: Most entries that each keeps.
        keep_zeros: Keep exact zeros, too.
        device: A CUDA device.
    """

    def __init__(self, n_rows: int, k: int, keep_zeros: bool, device: torch.device) -> None:
        self.n_rows, self.k, self.keep_zeros, self.device = n_rows, k, keep_zeros, device
        probe = torch.empty(0, device=device)
        self._cuda = cuda.module(probe)
        self._memory = torch.empty(self._cuda.topk_bytes(n_rows, k), dtype=torch.uint8, device=device)
        self._status = self._memory[:16].view(torch.int64)
        self.reset()

    @property
    def _selectors(self) -> tuple[Tensor, int, int, bool]:
        return self._memory, self.n_rows, self.k, self.keep_zeros

    def reset(self) -> None:
        """Empty the selectors."""
        self._cuda.topk_reset(*self._selectors, cuda.stream(self._memory))

    def push(self, block: Tensor, plan: RowPlan) -> None:
        """Take in ``block`` (b, width), float32, float16 or bfloat16, its rows contiguous."""
        self._cuda.topk_push(
            *self._selectors,
            block,
            plan.targets,
            plan.bases,
            plan.order,
            plan.starts,
            plan.scratch,
            cuda.stream(self._memory),
        )

    def finish(self, by_magnitude: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Counts ``(n_rows,)``, indices and values ``(n_rows, k)`` with −1 and 0 behind the last of a row.

        The selectors are empty afterwards. Waits for nothing.

        Args:
            by_magnitude: Order by descending |value|, ties by index, instead of by index.
        """
        counts = torch.empty(self.n_rows, dtype=torch.int64, device=self.device)
        indices = torch.empty(self.n_rows, self.k, dtype=torch.int64, device=self.device)
        values = torch.empty(self.n_rows, self.k, dtype=torch.float32, device=self.device)
        self._cuda.topk_finish(*self._selectors, counts, indices, values, cuda.stream(self._memory))
        return counts, *(ordered_by_magnitude(counts, indices, values) if by_magnitude else (indices, values))

    def take_status(self) -> Tensor:
        """``(2,)`` int64: row and flat index of the first non-finite value pushed since the last call, or row −1.

        Waits for nothing.
        """
        status = self._status.clone()
        self._status.fill_(-1)
        return status
