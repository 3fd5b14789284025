"""Rules for what is linear between kinks: the gate, or the selection, found at the point."""

from __future__ import annotations

import torch
from torch import Tensor

from npeff.companions.linearize.rules import Affine, Call, Outcome, rule
from npeff.errors import ModelError


def _gated(
    call: Call, open_: Tensor, slope: float | Tensor = 0.0, shift: Tensor | None = None, inner: float = 1.0
) -> Affine:
    """inner·z where the gate is open, slope·z where it is closed, plus a shift."""

    def function(z: Tensor) -> Tensor:
        passed = z if inner == 1.0 else z * inner
        leaky = isinstance(slope, Tensor) or slope != 0
        passed = torch.where(open_, passed, z * slope) if leaky else passed * open_
        return passed if shift is None else passed + shift

    return Affine(function, (call.args[0],), shift is not None, (open_,))


@rule("relu")
def relu(call: Call) -> Outcome:
    """max(v, 0)."""
    return _gated(call, call.args[0] > 0)


@rule("leaky_relu")
def leaky_relu(call: Call) -> Outcome:
    """V, or a fraction of it below 0."""
    return _gated(call, call.args[0] > 0, float(call.argument(1, "negative_slope", 0.01)))


@rule("_prelu_kernel", "prelu")
def prelu(call: Call) -> Outcome:
    """V, or below 0 a learned fraction."""
    return _gated(call, call.args[0] > 0, call.fixed(1, "weight"))


@rule("rrelu_with_noise")
def rrelu(call: Call) -> Outcome:
    """In evaluation mode a leaky ReLU with the mean slope."""
    lower, upper = call.argument(2, "lower", 0.125), call.argument(3, "upper", 1 / 3)
    return _gated(call, call.args[0] > 0, (lower + upper) / 2)


@rule("threshold")
def threshold(call: Call) -> Outcome:
    """V above the threshold, a constant below."""
    above = call.args[0] > call.argument(1, "threshold")
    return _gated(call, above, shift=torch.where(above, 0, call.output))


@rule("hardtanh", "clamp", "clamp_min", "clamp_max")
def clamp(call: Call) -> Outcome:
    """V between the bounds, the bound outside; ReLU6 is one."""
    v = call.args[0]
    inside = torch.ones_like(v, dtype=torch.bool)
    first, second = ("min_val", "max_val") if call.name == "hardtanh" else ("min", "max")
    lower = None if call.name == "clamp_max" else call.fixed(1, first)
    upper = None if call.name == "clamp_min" else call.fixed(1 if call.name == "clamp_max" else 2, second)
    if call.name == "hardtanh":
        lower, upper = (-1.0 if lower is None else lower), (1.0 if upper is None else upper)
    strict = call.name == "hardtanh"  # at the bounds themselves as autograd has it
    if lower is not None:
        inside = inside & (v > lower if strict else v >= lower)
    if upper is not None:
        inside = inside & (v < upper if strict else v <= upper)
    return _gated(call, inside, shift=torch.where(inside, 0, call.output))


@rule("hardsigmoid")
def hardsigmoid(call: Call) -> Outcome:
    """V/6 + 1/2 between −3 and 3, 0 or 1 outside."""
    v = call.args[0]
    inside = (v > -3) & (v < 3)
    return _gated(call, inside, shift=torch.where(inside, 0.5, call.output), inner=1 / 6)


@rule("softshrink")
def softshrink(call: Call) -> Outcome:
    """V moved towards 0 by λ, 0 within λ."""
    v, width = call.args[0], float(call.argument(1, "lambd", 0.5))
    outside = v.abs() > width
    return _gated(call, outside, shift=-width * v.sign() * outside)


@rule("hardshrink")
def hardshrink(call: Call) -> Outcome:
    """V, 0 within λ."""
    return _gated(call, call.args[0].abs() > float(call.argument(1, "lambd", 0.5)))


@rule("abs")
def absolute(call: Call) -> Outcome:
    """±v."""
    v = call.args[0]
    side = v.sign()
    return Affine(lambda z: z * side, (v,), pattern=(side,))


@rule("nan_to_num")
def finite(call: Call) -> Outcome:
    """V, as long as it is finite."""
    v = call.args[0]
    return _gated(call, torch.isfinite(v), shift=torch.where(torch.isfinite(v), 0, call.output))


@rule("maximum", "minimum", "fmax", "fmin")
def extremum(call: Call) -> Outcome:
    """The larger (smaller) of two tensors, entry by entry."""
    a, b = call.args[0], call.args[1]
    first = a >= b if call.name in ("maximum", "fmax") else a <= b
    inputs = tuple(tensor for tensor in (a, b) if call.depends(tensor))
    one, other = (None if call.depends(tensor) else call.constant(tensor) for tensor in (a, b))

    def function(*values: Tensor) -> Tensor:
        left = values[0] if one is None else one
        right = values[-1] if other is None else other
        return torch.where(first, left, right)

    return Affine(function, inputs, len(inputs) < 2, (first,))


@rule("max", "min", "amax", "amin")
def largest(call: Call) -> Outcome | tuple[Outcome, ...]:
    """The largest (smallest) of all entries, or along dimensions; the mean over ties, as autograd has it."""
    if not isinstance(call.output, Tensor):
        return selected(call)
    v, dims, keep = call.args[0], call.argument(1, "dim", ()), bool(call.argument(2, "keepdim", False))
    dims = tuple(dims) or tuple(range(v.dim()))
    extreme = call.output if keep or not v.dim() else _unsqueezed(call.output, v.dim(), dims)
    weight = (v == extreme).to(v.dtype)
    weight = weight / weight.sum(dims, keepdim=True)
    return Affine(lambda z: (z * weight).sum(dims, keepdim=keep), (v,), pattern=(weight,))


@rule("sort", "topk", "median", "nanmedian", "kthvalue", "mode", "cummax", "cummin")
def selected(call: Call) -> Outcome | tuple[Outcome, ...]:
    """Entries chosen along a dimension, whose positions come with them.

    Raises:
        ModelError: They do not.
    """
    if isinstance(call.output, Tensor):
        raise ModelError(f"model: {call.where} computes {call.name} of a whole tensor; give it a dimension")
    v, index = call.args[0], call.output[1]
    named = {"sort": (1, -1), "topk": (2, -1), "kthvalue": (2, -1)}
    position, default = named.get(call.name, (1, -1))
    dim = call.kwargs.get("dim", call.argument(position, "dim", default))
    keeps = index.dim() == v.dim()

    def function(z: Tensor) -> Tensor:
        return z.gather(dim, index) if keeps else z.gather(dim, index.unsqueeze(dim)).squeeze(dim)

    return Affine(function, (v,), pattern=(index,)), None


@rule("max_pool2d_with_indices", "adaptive_max_pool2d", "max_pool3d_with_indices", "adaptive_max_pool3d")
def max_pool(call: Call) -> tuple[Outcome, ...]:
    """The entry that was largest in each window."""
    v, index = call.args[0], call.output[1]
    kept = 2 if "2d" in call.name else 3
    shape = index.shape
    flat = index.flatten(-kept)
    return Affine(lambda z: z.flatten(-kept).gather(-1, flat).reshape(shape), (v,), pattern=(index,)), None


def _unsqueezed(tensor: Tensor, n_dims: int, dims: tuple[int, ...]) -> Tensor:
    for dim in sorted(d % n_dims for d in dims):
        tensor = tensor.unsqueeze(dim)
    return tensor
