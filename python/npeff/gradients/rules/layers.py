"""Matrix products ``y = x Wᵀ + b`` and ``y = x W``, broadcast parameters, embeddings, and normalisation layers."""

from __future__ import annotations

import math
from abc import abstractmethod

import torch
from torch import Tensor
from typing_extensions import override

from npeff.gradients.graph import Use
from npeff.gradients.rules.base import Layout, SmallRule, StackedRule, Unsupported, layouts_of_rows, working
from npeff.models import devices


class MatrixProduct(StackedRule):
    """The weight of ``mm(x, W)`` or ``addmm(b, x, W)``; per example ∂/∂W = Σ_t x_t δ_tᵀ.

    W is either the parameter (in, out), or its transpose: then the gradient is made as (out, in).

    Attributes:
        by_rows: W is the parameter's transpose.
    """

    name = "linear"

    @override
    def begin(self) -> None:
        self.by_rows = self.value.untransposed is not None
        self.value = self.value.untransposed or self.value
        addmm = self.use.operation == "AddmmBackward0"
        if addmm and self.saved("alpha") != 1:
            raise Unsupported("addmm with alpha ≠ 1")
        self._input = self.split(working(self.saved_tensor("mat1" if addmm else "self")))

    @override
    def block(self, examples: slice, rows: slice) -> Tensor:
        inputs = self._input[examples]
        if not self.by_rows:
            return torch.matmul(inputs[:, :, rows].transpose(1, 2).unsqueeze(1), self.stacked(examples, 1))
        delta = self.stacked(examples, 2)[..., rows]
        b, t, r, out = delta.shape
        if t == 1:
            target = self.scratch.take("product", (b, r, out, inputs.shape[2]), delta)
            return torch.mul(delta[:, 0, :, :, None], inputs[:, 0, None, None, :], out=target)
        target = self.scratch.take("product", (b, r * out, inputs.shape[2]), delta)
        return torch.bmm(delta.reshape(b, t, r * out).transpose(1, 2), inputs, out=target).view(b, r, out, -1)

    @override
    def pair_sizes(self) -> tuple[int, int, int]:
        return self.layout.positions, self.use.output_shape[-1], self._input.shape[2]

    @override
    def pairs(self, examples: slice) -> tuple[Tensor, Tensor, bool]:
        return self.stacked(examples, 2), self._input[examples], not self.by_rows

    @override
    def kronecker_form(self) -> tuple[int, bool] | None:
        return 1, not self.by_rows

    @override
    def kronecker_factors(self) -> tuple[Tensor, Tensor]:
        return self._input[:, None], self.stacked(slice(None), 2)[:, None].clone()

    @override
    def gram(self, examples: slice) -> Tensor | None:
        if self.layout.positions > 1:
            return None
        delta = self.stacked(examples, 2)[:, 0].to(torch.float64)
        return delta @ delta.mT * self._input[examples].to(torch.float64).square().sum(dim=(1, 2))[:, None, None]

    @override
    def square(self, examples: slice, rows: slice) -> Tensor | None:
        if self.layout.positions > 1 or not self.by_rows:
            return None
        delta = self.stacked(examples, 2)[:, 0, :, rows].square().sum(dim=1)
        return delta[:, :, None] * self._input[examples].square()


class MatrixBias(SmallRule):
    """The bias of ``addmm(b, x, W)``: Σ_t δ_t."""

    name = "bias"

    @override
    def begin(self) -> None:
        if self.saved("beta") != 1:
            raise Unsupported("addmm with beta ≠ 1")

    @classmethod
    @override
    def layouts(cls, use: Use, n_examples: int) -> list[Layout]:
        if use.value.shape != use.output_shape[-1:]:
            return []
        return layouts_of_rows(use.output_shape[0], n_examples)

    @override
    def reduce(self, delta: Tensor) -> Tensor:
        return delta[:, 0] if delta.shape[1] == 1 else delta.sum(dim=1)


class Broadcast(SmallRule):
    """δ, or δ times the other operand, summed over what the value was broadcast over, but examples."""

    name = "broadcast"

    @classmethod
    @override
    def layouts(cls, use: Use, n_examples: int) -> list[Layout]:
        output = use.output_shape
        if not output:
            return []
        operand = _aligned(use)
        found = layouts_of_rows(output[0], n_examples) if operand[0] == 1 else []
        if len(output) > 1 and output[1] == n_examples and operand[1] == 1:
            found.append(Layout(n_examples, output[0], "examples second"))
        return found

    def factor(self) -> Tensor | float:
        """Return what δ is multiplied by: a number, or a tensor of the output's shape."""
        return 1.0

    @override
    def reduce(self, delta: Tensor) -> Tensor:
        operand = _aligned(self.use)
        if self.layout.order == "examples second":
            operand = (operand[0], *operand[2:])
        over = [i + 1 for i, size in enumerate(operand) if size == 1 and delta.shape[i + 1] != 1]
        return delta.sum(dim=over) if over else delta

    @override
    def store(self, column: int, delta: Tensor) -> None:
        super().store(column, working(delta) * self.factor())


class Sum(Broadcast):
    """``x + alpha · value``."""

    @override
    def factor(self) -> Tensor | float:
        return float(self.saved("alpha")) if self.use.operand == 1 else 1.0


class Difference(Broadcast):
    """``x − alpha · value``, or ``value − alpha · x``."""

    @override
    def factor(self) -> Tensor | float:
        return -float(self.saved("alpha")) if self.use.operand == 1 else 1.0


class Product(Broadcast):
    """``x ∘ value``."""

    name = "scale"

    @override
    def begin(self) -> None:
        self._other = working(self.saved_tensor("self" if self.use.operand == 1 else "other"))
        if self._other.is_complex():
            raise Unsupported("complex product")

    @override
    def factor(self) -> Tensor | float:
        return self._other


class Slope(Broadcast):
    """PReLU's slope: ``min(x, 0)``."""

    name = "prelu"

    @override
    def begin(self) -> None:
        self._below = working(self.saved_tensor("self")).clamp_max(0.0)

    @override
    def factor(self) -> Tensor | float:
        return self._below


def _aligned(use: Use) -> tuple[int, ...]:
    """The operand's shape with ones in front, as many dimensions as the output."""
    return (1,) * (len(use.output_shape) - len(use.value.shape)) + use.value.shape


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


class _NormWeight(SmallRule):
    """A weight that scales what a layer has normalised: δ times that, summed as the gradient of its bias is."""

    @override
    def begin(self) -> None:
        self._normalised = self.split(self.normalised(working(self.saved_tensor("input"))))

    @abstractmethod
    def normalised(self, inputs: Tensor) -> Tensor:
        """Return the input as it was before scale and shift."""

    @override
    def reduce(self, delta: Tensor) -> Tensor:
        return super().reduce(delta * self._normalised)  # type: ignore[safe-super]  # the bias's rule, a base beside this


class LayerNormBias(_LastDimensions):
    """δ."""

    name = "layer_norm"

    @override
    def reduce(self, delta: Tensor) -> Tensor:
        return delta.sum(dim=1)


class LayerNormWeight(_NormWeight, LayerNormBias):
    """δ · (x − mean) · rstd."""

    @override
    def normalised(self, inputs: Tensor) -> Tensor:
        return (inputs - working(self.saved_tensor("result1"))) * working(self.saved_tensor("result2"))


class FusedRMSNormWeight(_NormWeight, LayerNormBias):
    """δ · x · rrms."""

    name = "rms_norm"

    @override
    def normalised(self, inputs: Tensor) -> Tensor:
        return inputs * working(self.saved_tensor("result1"))


class ChannelBias(SmallRule):
    """δ, of layers with one number per channel of ``(n, channels, *space)``: convolutions too."""

    name = "bias"

    @override
    def reduce(self, delta: Tensor) -> Tensor:
        return delta.flatten(3).sum(dim=(1, 3)) if delta.dim() > 3 else delta.sum(dim=1)


class GroupNormWeight(_NormWeight, ChannelBias):
    """δ · (x − mean of the group) · rstd of the group."""

    name = "group_norm"

    @override
    def normalised(self, inputs: Tensor) -> Tensor:
        mean, rstd = working(self.saved_tensor("result1")), working(self.saved_tensor("result2"))
        grouped = inputs.reshape(*mean.shape, -1)
        return ((grouped - mean[..., None]) * rstd[..., None]).reshape(inputs.shape)


class BatchNormWeight(_NormWeight, ChannelBias):
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
