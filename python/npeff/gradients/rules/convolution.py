"""Convolutions in one, two and three dimensions; groups, stride, dilation and padding of every mode.

Padding other than zeros is an operation of its own before the convolution, so its result is what the
convolution kept.
"""

from __future__ import annotations

import math
from itertools import chain

import torch
from torch import Tensor
from typing_extensions import override

from npeff.gradients.rules.base import StackedRule, Unsupported, working
from npeff.kernels import convolution_gradients, dispatch


def patches(
    inputs: Tensor,
    kernel: tuple[int, ...],
    output: tuple[int, ...],
    stride: tuple[int, ...],
    dilation: tuple[int, ...],
) -> Tensor:
    """Return a view of padded inputs ``(n, channels, *space)`` under the kernel at every output position.

    Returns:
        ``(n, channels, *kernel, *output)`` that shares the inputs' memory.
    """
    step = inputs.stride()[2:]
    return inputs.as_strided(
        (*inputs.shape[:2], *kernel, *output),
        (
            *inputs.stride()[:2],
            *(s * d for s, d in zip(step, dilation, strict=True)),
            *(s * d for s, d in zip(step, stride, strict=True)),
        ),
        inputs.storage_offset(),
    )


EARLY = 64
"""δ at least so many times as large as the kernel: gradients are formed as soon as δ is there, to save memory."""


LONG_PATCH = 512
"""Elements of a patch from which on a batched product is as fast: measured 0.7 to 1 times the kernel's seconds from 576
on, 1 to 2 times up to 400."""


class ConvolutionWeight(StackedRule):
    """Per example ∂/∂K = Σ_positions δ ⊗ patch, tile by tile, all columns at once.

    On the CPU by :func:`npeff.kernels.convolution_gradients`, which reads δ and the inputs where they lie; with long
    patches, on devices, in float64 and in three dimensions by a batched product with the patches.

    A small kernel over many positions, as first layers have, is done early instead: column by column, while δ is in the
    cache, so that δ need not be kept.
    """

    name = "convolution"

    @override
    def begin(self) -> None:
        if self.saved("transposed"):
            raise Unsupported("transposed convolution")
        self._stride, self._dilation = tuple(self.saved("stride")), tuple(self.saved("dilation"))
        self._groups = int(self.saved("groups"))
        padding = tuple(self.saved("padding"))
        inputs = working(self.saved_tensor("input"))
        if any(padding):
            inputs = torch.nn.functional.pad(inputs, tuple(chain.from_iterable((p, p) for p in reversed(padding))))
        self._input = self.split(inputs)
        self._early: Tensor | None = None
        self._in_place = (
            len(self.value.shape) <= 4
            and math.prod(self.value.shape[2:]) > 1
            and math.prod(self.value.shape[1:]) <= LONG_PATCH
            and inputs.dtype == torch.float32
            and inputs.device.type == "cpu"
            and dispatch.native() is not None
        )

    @override
    def form_early(self) -> None:
        if self._saves_memory():
            shape = (self.layout.examples, len(self._kept), *self.value.shape)
            self._early = torch.empty(shape, dtype=self._input.dtype, device=self._input.device)
            if not self._in_place:
                self._under = self._by_groups(slice(None)).clone()  # what it is a view of is used again

    def _saves_memory(self) -> bool:
        positions = self.layout.positions * math.prod(self.use.output_shape[2:])
        delta = self.use.output_shape[1] * positions
        under = self._input.shape[2] * math.prod(self.value.shape[2:]) * positions
        return EARLY * math.prod(self.value.shape) <= delta and (self._in_place or under <= 2 * delta)

    @override
    def store(self, column: int, delta: Tensor) -> None:
        if self._early is None:
            super().store(column, delta)
            return
        if self._in_place:
            self._early[:, column] = self._summed([delta], slice(None), slice(0, self.value.shape[0]), squared=False)[
                :, 0
            ]
            return
        delta = working(self.split(delta))
        b, t, channels = delta.shape[:3]
        delta = delta.reshape(b, t, self._groups, channels // self._groups, -1).movedim(1, 3)  # (b, g, out/g, t, L)
        delta = delta.reshape(b * self._groups, delta.shape[2], -1)
        product = torch.bmm(self._under, delta.transpose(1, 2))
        self._early[:, column] = product.mT.reshape(b, *self.value.shape)

    def _summed(self, columns: list[Tensor], examples: slice, rows: slice, squared: bool) -> Tensor:
        """``(b', R, p, …)``, or without R: the kernel's sums over positions, where everything lies."""

        def in_two_dimensions(by_example: Tensor) -> Tensor:
            tensor = by_example[examples].flatten(0, 1)
            return tensor if tensor.dim() == 4 else tensor.unsqueeze(2)

        def both(sizes: tuple[int, ...]) -> tuple[int, int]:
            return (1, sizes[0]) if len(sizes) == 1 else (sizes[0], sizes[1])

        inputs = in_two_dimensions(self._input)
        deltas = [in_two_dimensions(working(self.split(column))) for column in columns]
        kernel = both(tuple(self.value.shape[2:]))
        # With groups, some rows are not the same channels of every group: all are made.
        channels = (rows.start, rows.stop) if self._groups == 1 else None
        wanted = rows.stop - rows.start if channels else self.value.shape[0]
        shape = (len(inputs) // self.layout.positions, *(() if squared else (len(deltas),)), wanted)
        out = self.scratch.take("product", (*shape, self.value.shape[1], *kernel), inputs)
        found = convolution_gradients(
            inputs, deltas, kernel, stride=both(self._stride), dilation=both(self._dilation), groups=self._groups,
            turns=self.layout.positions, channels=channels, squared=squared, out=out,
        )  # fmt: skip
        found = found.view(*shape, *self.value.shape[1:])
        return found if channels else found.narrow(len(shape) - 1, rows.start, rows.stop - rows.start)

    @override
    def square(self, examples: slice, rows: slice) -> Tensor | None:
        if not self._in_place or self._early is not None:
            return None
        return self._summed(self._kept, examples, rows, squared=True)

    def _by_groups(self, examples: slice) -> Tensor:
        """What lies under the kernel, ``(b'·g, in/g · kernel, t·L)``."""
        under = self._patches(examples)
        b, t = under.shape[:2]
        under = under.view(b, t, self._groups, -1, math.prod(self.use.output_shape[2:])).movedim(1, 3)
        return under.reshape(b * self._groups, under.shape[2], -1)

    def _patches(self, examples: slice) -> Tensor:
        """``(b', t, in, *kernel, *output)``."""
        inputs = self._input[examples]
        kernel, output = self.value.shape[2:], self.use.output_shape[2:]
        under = patches(inputs.flatten(0, 1), kernel, output, self._stride, self._dilation)
        under = self.scratch.take("patches", tuple(under.shape), under).copy_(under)
        return under.view(*inputs.shape[:2], *under.shape[1:])

    @override
    def block(self, examples: slice, rows: slice) -> Tensor:
        rows = slice(*rows.indices(self.value.shape[0]))
        if self._early is not None:
            return self._early[examples][:, :, rows]
        if self._in_place:
            return self._summed(self._kept, examples, rows, squared=False)
        groups = self._groups
        delta = self.stacked(examples, 2)
        b, t, r, channels = delta.shape[:4]
        delta = delta.reshape(b, t, r, groups, channels // groups, -1).permute(0, 3, 2, 4, 1, 5)
        if groups == 1:
            delta = delta[:, :, :, rows]
        out = delta.shape[3]  # (b, g, R, out/g, t, L)
        under = self._by_groups(examples)
        target = self.scratch.take("product", (b * groups, r * out, under.shape[1]), delta)
        product = torch.bmm(delta.reshape(b * groups, r * out, -1), under.transpose(1, 2), out=target)
        shape = (-1, *self.value.shape[1:])
        if groups == 1:
            return product.view(b, r, *shape)
        return product.view(b, groups, r, out, -1).transpose(1, 2).reshape(b, r, *shape)[:, :, rows]

    @override
    def pair_sizes(self) -> tuple[int, int, int] | None:
        if self._groups > 1:
            return None
        positions = self.layout.positions * math.prod(self.use.output_shape[2:])
        return positions, self.value.shape[0], math.prod(self.value.shape[1:])

    @override
    def pairs(self, examples: slice) -> tuple[Tensor, Tensor, bool] | None:
        delta = self.stacked(examples, 2).flatten(4)  # (b, t, R, out, L)
        under = self._patches(examples).flatten(2, -1 - len(self.use.output_shape[2:])).flatten(3)  # (b, t, k, L)
        return delta.permute(0, 1, 4, 2, 3).flatten(1, 2), under.transpose(2, 3).flatten(1, 2), False

    @override
    def kronecker_form(self) -> tuple[int, bool] | None:
        return self._groups, False

    @override
    def kronecker_factors(self) -> tuple[Tensor, Tensor]:
        b, groups = self.layout.examples, self._groups
        delta = self.stacked(slice(None), 2)  # (b, t, R, out, *space)
        delta = delta.reshape(*delta.shape[:3], groups, delta.shape[3] // groups, -1).permute(0, 3, 1, 5, 2, 4)
        under = self._by_groups(slice(None)).clone()
        return under.view(b, groups, *under.shape[1:]).mT, delta.flatten(2, 3).clone()
