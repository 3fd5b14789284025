"""Matrix products: y = x Wᵀ + b with any middle dimensions, and y = x W as in transformers' Conv1D."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from typing_extensions import override

from npeff.gradients.graph import Use
from npeff.gradients.layout import Layout, layouts_of_rows
from npeff.gradients.rules.base import (
    Scratch,
    SmallRule,
    StackedRule,
    Unsupported,
    saved,
    saved_tensor,
    working,
)


class MatrixProduct(StackedRule):
    """The weight of ``mm(x, W)`` or ``addmm(b, x, W)``; per example ∂/∂W = Σ_t x_t δ_tᵀ.

    W is either the parameter (in, out), or its transpose: then the gradient is made as (out, in).
    """

    name = "linear"

    def __init__(self, use: Use, layout: Layout, scratch: Scratch) -> None:
        by_rows = use.value.untransposed is not None
        if use.value.untransposed is not None:
            use = replace(use, value=use.value.untransposed)
        super().__init__(use, layout, scratch)
        self._by_rows = by_rows
        addmm = use.node.name() == "AddmmBackward0"
        if addmm and saved(use, "alpha") != 1:
            raise Unsupported("addmm with alpha ≠ 1")
        self._input = self.split(working(saved_tensor(use, "mat1" if addmm else "self")))

    @classmethod
    @override
    def layouts(cls, use: Use, n_examples: int) -> list[Layout]:
        return layouts_of_rows(use.output_shape[0], n_examples)

    @override
    def block(self, examples: slice, rows: slice) -> Tensor:
        inputs = self._input[examples]
        if not self._by_rows:
            return torch.matmul(inputs[:, :, rows].transpose(1, 2).unsqueeze(1), self.stacked(examples, 1))
        delta = self.stacked(examples, 2)[..., rows]
        b, t, r, out = delta.shape
        if t == 1:
            target = self.scratch.take("product", (b, r, out, inputs.shape[2]), delta)
            return torch.mul(delta[:, 0, :, :, None], inputs[:, 0, None, None, :], out=target)
        target = self.scratch.take("product", (b, r * out, inputs.shape[2]), delta)
        return torch.bmm(delta.reshape(b, t, r * out).transpose(1, 2), inputs, out=target).view(b, r, out, -1)

    @override
    def pair_sizes(self) -> tuple[int, int, int] | None:
        return self.layout.positions, self.use.output_shape[-1], self._input.shape[2]

    @override
    def pairs(self, examples: slice) -> tuple[Tensor, Tensor, bool] | None:
        return self.stacked(examples, 2), self._input[examples], not self._by_rows

    @override
    def kronecker_form(self) -> tuple[int, bool] | None:
        return 1, not self._by_rows

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
        if self.layout.positions > 1 or not self._by_rows:
            return None
        delta = self.stacked(examples, 2)[:, 0, :, rows].square().sum(dim=1)
        return delta[:, :, None] * self._input[examples].square()


class MatrixBias(SmallRule):
    """The bias of ``addmm(b, x, W)``: Σ_t δ_t."""

    name = "bias"

    @classmethod
    @override
    def layouts(cls, use: Use, n_examples: int) -> list[Layout]:
        if use.value.shape != use.output_shape[-1:] or saved(use, "beta") != 1:
            return []
        return layouts_of_rows(use.output_shape[0], n_examples)

    @override
    def reduce(self, delta: Tensor) -> Tensor:
        return delta[:, 0] if delta.shape[1] == 1 else delta.sum(dim=1)
