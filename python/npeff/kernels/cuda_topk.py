"""Streaming exact top-k on a CUDA device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from npeff.kernels import cuda

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


def plan_rows(bases: Array, rows: Array | None, n_targets: int, device: torch.device) -> RowPlan:
    """The plan for a block's rows, copied to the device without waiting for it.

    Args:
        bases: ``(b,)`` int64.
        rows: ``(b,)`` int64 in ``[0, n_targets)``; None: row i goes to target i.
        n_targets: Number of selectors or sketches.
        device: Where to.

    Returns:
        The plan.
    """
    b = len(bases)
    targets = np.arange(b, dtype=np.int64) if rows is None else rows
    order = np.lexsort((bases, targets))
    starts = np.searchsorted(targets[order], np.arange(n_targets + 1))
    packed = torch.from_numpy(np.concatenate([targets, bases, order, starts]).astype(np.int64, copy=False))
    if device.type == "cuda":
        packed = packed.pin_memory()
    there = packed.to(device, non_blocking=True)
    scratch = torch.empty(b, dtype=torch.int64, device=device)
    return RowPlan(there[:b], there[b : 2 * b], there[2 * b : 3 * b], there[3 * b :], scratch)


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
        """
        counts = torch.empty(self.n_rows, dtype=torch.int64, device=self.device)
        indices = torch.empty(self.n_rows, self.k, dtype=torch.int64, device=self.device)
        values = torch.empty(self.n_rows, self.k, dtype=torch.float32, device=self.device)
        self._cuda.topk_finish(*self._selectors, by_magnitude, counts, indices, values, cuda.stream(self._memory))
        return counts, indices, values

    def take_status(self) -> Tensor:
        """``(2,)`` int64: row and flat index of the first non-finite value pushed since the last call, or row −1.

        Waits for nothing.
        """
        status = self._status.clone()
        self._status.fill_(-1)
        return status
