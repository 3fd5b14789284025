"""Per-example gradients of convolution kernels; inner products of matrices' gradients, which are never formed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from npeff.errors import ArgumentError
from npeff.kernels import arrays, dispatch, reference
from npeff.kernels.arrays import A, Operand

Pair = tuple[int, int]
MOST = (1 << 31) - 1
"""Largest size, stride or dilation of a kernel."""


def convolution_gradients(
    inputs: A,
    delta: Sequence[A],
    kernel: Pair,
    *,
    stride: Pair = (1, 1),
    dilation: Pair = (1, 1),
    groups: int = 1,
    turns: int = 1,
    channels: Pair | None = None,
    squared: bool = False,
    out: A | None = None,
) -> A:
    """Compute ``G_br = Σ_positions δ_r ⊗ patch`` per example b and column r, or ``Σ_r G_br²``.

    With C output channels and I input channels, per group ``C/groups`` and ``I/groups`` of them:
    ``G[b, r, o, i, ky, kx] = Σ_{t, y, x} δ_r[b·T + t, o, y, x] · inputs[b·T + t, i, y·s + ky·d, x·s + kx·d]``. The
    patches are never written down: every input is read where it lies, and sums over positions stay in registers.

    Args:
        inputs: ``(b·T, I, height, width)`` float32, with their padding.
        delta: One ``(b·T, C, H, W)`` per column: gradients with respect to the convolution's output.
        kernel: Its size.
        stride: Of the convolution.
        dilation: Of the convolution.
        groups: Of the channels.
        turns: T, uses per example that are summed.
        channels: Start and end of the output channels of each group that are wanted; all by default.
        squared: Sum the squares over the columns.
        out: Where to write the result, C-contiguous; fresh memory by default.

    Returns:
        ``(b, R, C', I/groups, *kernel)``, or ``(b, C', I/groups, *kernel)`` with ``squared``; of the kind of inputs.
        Native for float32 on the CPU, plain torch otherwise.

    Raises:
        ArgumentError: Shapes, dtypes or devices do not fit.
    """
    if not isinstance(delta, list | tuple) or len(delta) == 0:
        raise ArgumentError("delta: expected at least one column, in a list, got none")
    inputs = arrays.check(inputs, "inputs", ("float32", "float64"), (None,) * 4)
    dtype = (arrays.dtype_name(inputs),)
    shape = tuple(arrays.check(delta[0], "delta", dtype, (None,) * 4).shape)
    columns = [arrays.check(column, "delta", dtype, shape) for column in delta]
    for column in columns:
        device = arrays.same_device(inputs=inputs, delta=column)
    inputs, columns = arrays.contiguous(inputs), [arrays.contiguous(column) for column in columns]
    squared = arrays.flag(squared, "squared")
    kernel, stride, dilation = (
        _pair(pair, name) for name, pair in (("kernel", kernel), ("stride", stride), ("dilation", dilation))
    )
    groups, turns = (arrays.integer(n, name, 1, MOST) for name, n in (("groups", groups), ("turns", turns)))
    _check(tuple(inputs.shape), shape, kernel, stride, dilation, groups, turns)
    first, end = (0, shape[1] // groups) if channels is None else _pair(channels, "channels", 0)
    if not 0 <= first < end <= shape[1] // groups:
        raise ArgumentError(f"channels: expected a range within {shape[1] // groups} channels, got ({first}, {end})")
    kernels = dispatch.on_host() if device.type == "cpu" and dtype == ("float32",) else None
    if kernels is None:
        tensors = [arrays.as_tensor(column) for column in columns]
        formed = reference.convolution_gradients(
            arrays.as_tensor(inputs), tensors, kernel, stride, dilation, groups, turns, slice(first, end)
        )
        formed = formed.square().sum(1) if squared else formed
        if out is None:
            return arrays.like(inputs, formed)
        arrays.check_output(out, "out", dtype[0], tuple(formed.shape))
        arrays.same_device(inputs=inputs, out=out)
        arrays.as_tensor(out).copy_(formed)
        return out
    own: tuple[int, ...] = (int(inputs.shape[1]) // groups, *kernel)
    whole = (shape[0] // turns, *(() if squared else (len(delta),)), groups * (end - first), *own)
    if out is None:
        out = arrays.like(inputs, np.empty(whole, np.float32))
    apart = {f"delta[{i}]": column for i, column in enumerate(columns)}
    checked = arrays.check_output(out, "out", dtype[0], whole, inputs=inputs, **apart)
    arrays.same_device(inputs=inputs, out=out)
    flat = checked.reshape(*whole[:-3], math.prod(own))
    kernels(
        "convolution_gradients",
        inputs=inputs,
        delta=[np.asarray(column) for column in columns],
        turns=turns,
        groups=groups,
        kernel=kernel,
        stride=stride,
        dilation=dilation,
        channels=(first, end),
        squared=squared,
        out=flat,
    )
    return out


def outer_gram(delta: Operand, inputs: Operand, n_slots: int = 1) -> tuple[Any, Any]:
    """``⟨G_r, G_s⟩`` of the gradients ``G_r = Σ_t delta_tr ⊗ inputs_t`` of each example, without forming them.

    ``Σ_tu (inputs_t · inputs_u) (delta_tr · delta_us)``: where the terms cancel, their rounding is not small beside the
    sum.

    Args:
        delta: ``(b, T, K·R, n)``: R columns of each of K examples, which share their inputs.
        inputs: ``(b, T, k)``, same dtype and device.
        n_slots: K.

    Returns:
        ``(b·K, R, R)`` inner products, and ``(b·K,)`` bounds of the sums of the terms' sizes; tensors, float64 on the
        CPU. Native for float32 on the CPU, plain torch otherwise.

    Raises:
        ArgumentError: Shapes, dtypes or devices do not fit.
    """
    given: tuple[Any, Any] = (delta, inputs)
    left = arrays.as_tensor(arrays.check(given[0], "delta", ("float32", "float64"), (None,) * 4))
    b, t, columns, _ = left.shape
    right = arrays.as_tensor(arrays.check(given[1], "inputs", (arrays.dtype_name(left),), (b, t, None)))
    device = arrays.same_device(delta=left, inputs=right)
    n_slots = arrays.integer(n_slots, "n_slots", 1, MOST)
    if columns % n_slots:
        raise ArgumentError(f"n_slots: expected a divisor of {columns} columns, got {n_slots}")
    kernels = dispatch.on_host() if device.type == "cpu" and left.dtype == torch.float32 else None
    if kernels is None:
        return reference.outer_gram(left, right, n_slots)
    gram = torch.empty(b, columns, columns // n_slots, dtype=torch.float64)
    size = torch.empty(b, n_slots if columns else 0, dtype=torch.float64)
    kernels("outer_gram", delta=left.contiguous(), input=right.contiguous(), gram=gram, size=size)
    n = columns // n_slots
    return gram.view(b * n_slots, n, n), size.flatten() if columns else gram.new_zeros(b * n_slots)


def _pair(pair: Any, name: str, least: int = 1) -> Pair:
    if not isinstance(pair, tuple | list) or len(pair) != 2:
        raise ArgumentError(f"{name}: expected two numbers of at least {least}, got {pair}")
    try:
        first, second = (arrays.integer(size, name, least, MOST) for size in pair)
    except ArgumentError:
        raise ArgumentError(f"{name}: expected two numbers of at least {least}, got {pair}") from None
    return first, second


def _check(
    inputs: tuple[int, ...], delta: tuple[int, ...], kernel: Pair, stride: Pair, dilation: Pair, groups: int, turns: int
) -> None:
    if inputs[1] % groups or delta[1] % groups:
        raise ArgumentError(f"groups: expected a divisor of {inputs[1]} and {delta[1]} channels, got {groups}")
    if inputs[0] != delta[0]:
        raise ArgumentError(f"delta: expected {inputs[0]} rows, as inputs have, got {delta[0]}")
    if inputs[0] % turns:
        raise ArgumentError(f"turns: expected a divisor of {inputs[0]} rows, got {turns}")
    reach = [(n - 1) * s + (k - 1) * d + 1 for n, s, k, d in zip(delta[2:], stride, kernel, dilation, strict=True)]
    if min(delta[2:]) < 1 or any(size < needed for size, needed in zip(inputs[2:], reach, strict=True)):
        raise ArgumentError(f"inputs: expected at least {tuple(reach)} positions, got {inputs[2:]}; pad them first")
