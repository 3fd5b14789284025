"""Look-ups: the gradient touches only the rows that an example looks up."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.graph import Node
from typing_extensions import override

from npeff.gradients.graph import Use
from npeff.gradients.layout import Layout, layouts_of_rows
from npeff.gradients.rules.base import Scratch, StackedRule, Unsupported
from npeff.models import devices


class Embedding(StackedRule):
    """Per example ∂/∂E[v] = Σ δ_t over the positions t that look up v; none for ``padding_idx``."""

    name = "embedding"

    def __init__(self, use: Use, nodes: Sequence[Node], layout: Layout, scratch: Scratch) -> None:
        super().__init__(use, nodes, layout, scratch)
        if self.saved("scale_grad_by_freq"):
            raise Unsupported("embedding with scale_grad_by_freq, which counts over the batch")
        self._tokens = self.split(self.saved_tensor("indices").reshape(-1))  # (b, t)
        padding = int(self.saved("padding_idx"))
        self._padding = None if padding < 0 else self._tokens == padding

    @classmethod
    @override
    def layouts(cls, use: Use, n_examples: int) -> list[Layout]:
        return layouts_of_rows(math.prod(use.output_shape[:-1]), n_examples)

    @override
    def split(self, delta: Tensor) -> Tensor:
        return self.layout.split(delta if delta.dim() == 1 else delta.reshape(-1, delta.shape[-1]))

    def _stored(self, examples: slice) -> Tensor:
        delta = self.stacked(examples, 1)
        return delta if self._padding is None else delta.masked_fill(self._padding[examples][:, None, :, None], 0.0)

    @override
    def block(self, examples: slice, rows: slice) -> Tensor:
        delta, tokens = self._stored(examples), self._tokens[examples]
        start, stop, _ = rows.indices(self.value.shape[0])
        inside = (tokens >= start) & (tokens < stop)
        return self._sum(delta * inside[:, None, :, None], (tokens - start).clamp(0, stop - start - 1), stop - start)

    def looked_up(self, examples: slice) -> tuple[Tensor, Tensor, Tensor]:
        """The gradient on the rows looked up alone.

        Returns:
            ``(b', R, u, d)`` values, ``(b', u)`` rows of the table, and ``(b', u)`` which of them count. Examples with
            fewer rows are filled up with their first row again, and zero values, which do not count.
        """
        delta, tokens = self._stored(examples), self._tokens[examples]
        ordered, order = tokens.sort(dim=1)
        new = torch.ones_like(ordered)
        new[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
        slot = new.cumsum(dim=1) - 1
        # To know how many rows there are at most would mean waiting for a device.
        width = tokens.shape[1] if devices.has_own_memory(tokens.device) else int(slot[:, -1].max()) + 1
        table_rows = ordered[:, :1].repeat(1, width).scatter_(1, slot, ordered)
        counts = torch.arange(width, device=tokens.device) <= slot[:, -1:]
        return self._sum(delta, torch.zeros_like(slot).scatter_(1, order, slot), width), table_rows, counts

    @staticmethod
    def _sum(delta: Tensor, slot: Tensor, width: int) -> Tensor:
        b, r, t, d = delta.shape
        base = torch.arange(b * r, device=slot.device).view(b, r, 1) * width
        target = delta.new_zeros((b * r * width, d))
        target.index_add_(0, (base + slot[:, None, :]).reshape(-1), delta.reshape(b * r * t, d))
        return target.view(b, r, width, d)
