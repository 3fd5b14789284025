"""Where the rows of a block go: checked once, and used for every block of that form."""

from __future__ import annotations

from typing import Any

import numpy.typing as npt
import torch

from npeff.errors import ArgumentError
from npeff.kernels import arrays
from npeff.kernels.cuda_topk import RowPlan, plan_rows

Array = npt.NDArray[Any]


class BlockRows:
    """To which selector or sketch each row of a block belongs, and at which flat index it begins.

    Args:
        bases: ``(b,)`` int64 flat index of each row's first column.
        targets: ``(b,)`` int64 selector or sketch of each row.
        n_targets: Number of selectors or sketches.

    Raises:
        ArgumentError: Shapes do not fit, a target does not exist, or an index is out of range.
    """

    def __init__(self, bases: Array, targets: Array, n_targets: int) -> None:
        self.bases = arrays.on_host(arrays.check(bases, "bases", ("int64",), (None,)))
        self.targets = arrays.on_host(arrays.check(targets, "targets", ("int64",), self.bases.shape))
        self.n_targets = n_targets
        self.first, self.last = (int(self.bases.min()), int(self.bases.max())) if len(self.bases) else (0, 0)
        if not 0 <= self.first <= self.last <= arrays.MOST_INDEX:
            raise ArgumentError(f"bases: expected flat indices from 0 to 2⁶², got {self.first} … {self.last}")
        if len(targets) and not 0 <= int(targets.min()) <= int(targets.max()) < n_targets:
            raise ArgumentError(
                f"targets: expected numbers from 0 to {n_targets - 1}, got {targets.min()} … {targets.max()}"
            )
        self._there: dict[tuple[torch.device, int], RowPlan] = {}

    def check(self, n_rows: int, n_targets: int) -> None:
        """Refuse a block of another form.

        Raises:
            ArgumentError: It has another number of rows, or there are other targets.
        """
        if n_rows != len(self.bases):
            raise ArgumentError(f"block: expected {len(self.bases)} rows, as many as its bases, got {n_rows}")
        if n_targets != self.n_targets:
            raise ArgumentError(f"base: expected rows for {n_targets} selectors or sketches, got {self.n_targets}")

    def there(self, device: torch.device) -> RowPlan:
        """The plan on a device, made once per stream."""
        stream = int(torch.cuda.current_stream(device).cuda_stream) if device.type == "cuda" else 0
        key = (device, stream)
        if key not in self._there:
            self._there[key] = plan_rows(self.bases, self.targets, self.n_targets, device)
        return self._there[key]
