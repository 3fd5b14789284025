"""Embeddings, and scale and shift of normalisation layers."""

from __future__ import annotations

import math
from abc import abstractmethod

import torch
from torch import Tensor
from typing_extensions import override

from npeff.gradients.graph import Use
from npeff.gradients.rules.base import Layout, SmallRule, StackedRule, Unsupported, layouts_of_rows, working
from npeff.models import devices


class Embedding(StackedRule):
    """Per example ∂/∂E[v] = Σ δ_t over the positions t that look up v; none for ``padding_idx``."""

    name = "embedding"

    @override
    def begin(self) -> None:
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
        """Compute the gradient on the looked-up rows alone.

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


class _LastDimensions(SmallRule):
    """Layers that normalise the last dimensions: all the others are rows."""

    @classmethod
    @override
    def layouts(cls, use: Use, n_examples: int) -> list[Layout]:
        return layouts_of_rows(math.prod(use.output_shape[: -len(use.value.shape)]), n_examples)

    @override
    def split(self, delta: Tensor) -> Tensor:
        return self.layout.split(delta.reshape(-1, *self.value.shape))


class LayerNormBias(_LastDimensions):
    """δ."""

    name = "layer_norm"

    @override
    def reduce(self, delta: Tensor) -> Tensor:
        return delta.sum(dim=1)


class LayerNormWeight(LayerNormBias):
    """δ · (x − mean) · rstd."""

    @override
    def begin(self) -> None:
        mean, rstd = working(self.saved_tensor("result1")), working(self.saved_tensor("result2"))
        self._normalised = self.split((working(self.saved_tensor("input")) - mean) * rstd)

    @override
    def reduce(self, delta: Tensor) -> Tensor:
        return super().reduce(delta * self._normalised)


class FusedRMSNormWeight(LayerNormWeight):
    """δ · x · rrms."""

    name = "rms_norm"

    @override
    def begin(self) -> None:
        self._normalised = self.split(working(self.saved_tensor("input")) * working(self.saved_tensor("result1")))


class ChannelBias(SmallRule):
    """δ, of layers with one number per channel of ``(n, channels, *space)``: convolutions too."""

    name = "bias"

    @override
    def reduce(self, delta: Tensor) -> Tensor:
        return delta.flatten(3).sum(dim=(1, 3)) if delta.dim() > 3 else delta.sum(dim=1)


class _ChannelWeight(ChannelBias):
    @override
    def begin(self) -> None:
        self._normalised = self.split(self.normalised(working(self.saved_tensor("input"))))

    @abstractmethod
    def normalised(self, inputs: Tensor) -> Tensor:
        """Return the input as it was before scale and shift."""

    @override
    def reduce(self, delta: Tensor) -> Tensor:
        return super().reduce(delta * self._normalised)


class GroupNormWeight(_ChannelWeight):
    """δ · (x − mean of the group) · rstd of the group."""

    name = "group_norm"

    @override
    def normalised(self, inputs: Tensor) -> Tensor:
        mean, rstd = working(self.saved_tensor("result1")), working(self.saved_tensor("result2"))
        grouped = inputs.reshape(*mean.shape, -1)
        return ((grouped - mean[..., None]) * rstd[..., None]).reshape(inputs.shape)


class BatchNormWeight(_ChannelWeight):
    """δ · (x − running mean) / √(running variance + eps): evaluation mode only."""

    name = "batch_norm"

    @override
    def normalised(self, inputs: Tensor) -> Tensor:
        if self.saved("training"):
            raise Unsupported("batch normalisation by the batch's own statistics")
        mean, variance = (
            working(self.saved_tensor("running_mean")),
            working(self.saved_tensor("running_var")),
        )
        shape = (1, -1, *(1,) * (inputs.dim() - 2))
        return (inputs - mean.view(shape)) * torch.rsqrt(variance + self.saved("eps")).view(shape)
