"""Scale and shift of the normalisation layers: δ times the normalised input, and δ, summed over positions."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.graph import Node
from typing_extensions import override

from npeff.gradients.graph import Use
from npeff.gradients.layout import Layout, layouts_of_rows
from npeff.gradients.rules.base import Scratch, SmallRule, Unsupported, working


class _LastDimensions(SmallRule):
    """Layers that normalise the last dimensions: all the others are rows."""

    @classmethod
    @override
    def layouts(cls, use: Use, n_examples: int) -> list[Layout]:
        return layouts_of_rows(math.prod(use.output_shape[: -len(use.value.shape)]), n_examples)

    @override
    def split(self, delta: Tensor) -> Tensor:
        return self.layout.split(delta.reshape(-1, *self.value.shape))


class _Channels(SmallRule):
    """Layers with one number per channel of ``(n, channels, *space)``."""

    @classmethod
    @override
    def layouts(cls, use: Use, n_examples: int) -> list[Layout]:
        return layouts_of_rows(use.output_shape[0], n_examples)

    @staticmethod
    def over_space(product: Tensor) -> Tensor:
        """Sum ``(b, t, channels, *space)`` to ``(b, channels)``."""
        return product.flatten(3).sum(dim=(1, 3)) if product.dim() > 3 else product.sum(dim=1)


class LayerNormWeight(_LastDimensions):
    """δ · (x − mean) · rstd."""

    name = "layer_norm"

    def __init__(self, use: Use, nodes: Sequence[Node], layout: Layout, scratch: Scratch) -> None:
        super().__init__(use, nodes, layout, scratch)
        mean, rstd = working(self.saved_tensor("result1")), working(self.saved_tensor("result2"))
        self._normalised = self.split((working(self.saved_tensor("input")) - mean) * rstd)

    @override
    def reduce(self, delta: Tensor) -> Tensor:
        return (delta * self._normalised).sum(dim=1)


class FusedRMSNormWeight(_LastDimensions):
    """δ · x · rrms."""

    name = "rms_norm"

    def __init__(self, use: Use, nodes: Sequence[Node], layout: Layout, scratch: Scratch) -> None:
        super().__init__(use, nodes, layout, scratch)
        self._normalised = self.split(working(self.saved_tensor("input")) * working(self.saved_tensor("result1")))

    @override
    def reduce(self, delta: Tensor) -> Tensor:
        return (delta * self._normalised).sum(dim=1)


class LayerNormBias(_LastDimensions):
    """δ."""

    name = "layer_norm"

    @override
    def reduce(self, delta: Tensor) -> Tensor:
        return delta.sum(dim=1)


class _ChannelWeight(_Channels):
    def __init__(self, use: Use, nodes: Sequence[Node], layout: Layout, scratch: Scratch) -> None:
        super().__init__(use, nodes, layout, scratch)
        self._normalised = self.split(self.normalised(working(self.saved_tensor("input"))))

    @abstractmethod
    def normalised(self, inputs: Tensor) -> Tensor:
        """The input as it was before scale and shift."""

    @override
    def reduce(self, delta: Tensor) -> Tensor:
        return self.over_space(delta * self._normalised)


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


class ChannelBias(_Channels):
    """δ."""

    name = "bias"

    @override
    def reduce(self, delta: Tensor) -> Tensor:
        return self.over_space(delta)
