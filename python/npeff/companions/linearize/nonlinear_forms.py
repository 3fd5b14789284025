"""Affine forms of operations that are not linear: frozen at the gate or the selection found at the point.

Piecewise linear operations (ReLU, max-pooling, …) are exactly their form as long as the gate or selection is the same.
Of an operation that is not piecewise linear a part is held, so that an affine function is left; such models are
refused unless the user asks for it. What is held:

* a smooth activation f(v) = v·g(v): the gate g;
* softmax: its values, the attention pattern; log-softmax: its normaliser;
* a normalisation: the standard deviation, while the mean stays the linear function that it is;
* any other smooth function: its value.

Batch normalisation in evaluation mode is affine as it is, and exact.
"""

from __future__ import annotations

import torch
from torch import Tensor

from npeff.companions.linearize.affine_forms import Affine, Call, affine_form, names_in, tensors_in
from npeff.errors import ModelError


def _gated(call: Call, open_: Tensor, slope: float | Tensor = 0.0, shift: Tensor | None = None) -> Affine:
    """Freeze a gate: z where it is open, slope·z where it is closed, plus a shift."""

    def function(z: Tensor) -> Tensor:
        leaky = isinstance(slope, Tensor) or slope != 0
        passed = torch.where(open_, z, z * slope) if leaky else z * open_
        return passed if shift is None else passed + shift

    return Affine(function, (call.args[0],), (open_,) if shift is None else (open_, shift))


@affine_form("relu", "leaky_relu", "_prelu_kernel", "prelu", "rrelu_with_noise")
def rectifier(call: Call) -> Affine:
    """Pass v, or below 0 a fraction of v: none, given, learned, or the mean of a range (RReLU in evaluation mode)."""
    slope: float | Tensor = 0.0
    if call.name == "leaky_relu":
        slope = float(call.argument(1, "negative_slope", 0.01))
    elif call.name == "rrelu_with_noise":
        slope = (call.argument(2, "lower", 0.125) + call.argument(3, "upper", 1 / 3)) / 2
    elif call.name != "relu":
        slope = call.fixed(1, "weight")
    return _gated(call, call.args[0] > 0, slope)


@affine_form("threshold", "hardtanh", "clamp", "clamp_min", "clamp_max", "nan_to_num")
def passed(call: Call) -> Affine:
    """Pass v above the threshold, between the bounds (as ReLU6 does), or where v is finite; a constant elsewhere."""
    v = call.args[0]
    for i in range(1, len(call.args)):
        call.fixed(i, f"{i + 1}th argument")
    for name in call.kwargs:
        call.fixed(len(call.args), name)
    open_ = call.output == v
    if call.name == "threshold":
        open_ = v > call.argument(1, "threshold")
    elif call.name == "hardtanh":  # at the bounds themselves as autograd has it
        open_ = (v > call.argument(1, "min_val", -1.0)) & (v < call.argument(2, "max_val", 1.0))
    return _gated(call, open_, shift=torch.where(open_, 0, call.output))


@affine_form("hardsigmoid")
def hardsigmoid(call: Call) -> Affine:
    """Pass v/6 + 1/2 between −3 and 3, and 0 or 1 outside."""
    v = call.args[0]
    inside = (v > -3) & (v < 3)
    shift = torch.where(inside, 0.5, call.output)
    return Affine(lambda z: z * (1 / 6) * inside + shift, (v,), (inside, shift))


@affine_form("softshrink", "hardshrink")
def shrink(call: Call) -> Affine:
    """Pass v outside the interval from −λ to λ, unchanged or shrunk towards 0 by λ; pass 0 within the interval."""
    v, width = call.args[0], float(call.argument(1, "lambd", 0.5))
    outside = v.abs() > width
    return _gated(call, outside, shift=-width * v.sign() * outside if call.name == "softshrink" else None)


@affine_form("abs")
def absolute(call: Call) -> Affine:
    """Return the form of |v|: z times the sign of v."""
    v = call.args[0]
    side = v.sign()
    return Affine(lambda z: z * side, (v,), pattern=(side,))


@affine_form("maximum", "minimum", "fmax", "fmin")
def extremum(call: Call) -> Affine:
    """Select the larger (or smaller) of two tensors, entry by entry; of equal ones take the part that autograd does."""
    a, b = call.args[0], call.args[1]
    first = a >= b if call.name in ("maximum", "fmax") else a <= b
    tied = (a == b) & (call.name in ("maximum", "minimum"))  # half of each; fmax and fmin take the first
    inputs = tuple(tensor for tensor in (a, b) if call.depends(tensor))
    one, other = (None if call.depends(tensor) else call.constant(tensor) for tensor in (a, b))

    def function(*values: Tensor) -> Tensor:
        left = values[0] if one is None else one
        right = values[-1] if other is None else other
        return torch.where(tied, (left + right) / 2, torch.where(first, left, right))

    return Affine(function, inputs, (first, tied))


@affine_form("max", "min", "amax", "amin")
def largest(call: Call) -> Affine:
    """Select the largest (or smallest) of all entries, or along dimensions; average over ties, as autograd does."""
    if not isinstance(call.output, Tensor):
        return selected(call)
    v, dims, keep = call.args[0], call.argument(1, "dim", ()), bool(call.argument(2, "keepdim", False))
    dims = tuple(dims) or tuple(range(v.dim()))
    extreme = (v.amax if call.name in ("max", "amax") else v.amin)(dims, keepdim=True)
    weight = (v == extreme).to(v.dtype)
    weight = weight / weight.sum(dims, keepdim=True)
    return Affine(lambda z: (z * weight).sum(dims, keepdim=keep), (v,), pattern=(weight,))


@affine_form("sort", "topk", "median", "nanmedian", "kthvalue", "mode", "cummax", "cummin")
def selected(call: Call) -> Affine:
    """Select entries along a dimension, at the positions that the operation returns with its values.

    Raises:
        ModelError: The operation returns no positions.
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

    return Affine(function, (v,), pattern=(index,))


@affine_form("max_pool2d_with_indices", "adaptive_max_pool2d", "max_pool3d_with_indices", "adaptive_max_pool3d")
def max_pool(call: Call) -> Affine:
    """Select the entry that was largest in each window."""
    v, index = call.args[0], call.output[1]
    kept = 2 if "2d" in call.name else 3
    shape = index.shape
    flat = index.flatten(-kept)
    return Affine(lambda z: z.flatten(-kept).gather(-1, flat).reshape(shape), (v,), pattern=(index,))


# ---- operations that are not piecewise linear --------------------------------------------------------------

GATED = names_in("gelu silu mish hardswish tanh elu celu erf atan asinh sin tan expm1 log1p sinh")
"""Smooth functions of one number that are 0 at 0: written f(v) = v·g(v), and the gate g is held."""

HELD = names_in(
    """
    sigmoid softplus exp exp2 log log2 log10 sqrt rsqrt reciprocal pow square cos cosh acos asin acosh atanh atan2 erfc
    erfinv lgamma digamma logit log_sigmoid_forward norm linalg_vector_norm logsumexp logcumsumexp std var var_mean
    std_mean prod cumprod fmod remainder hypot cdist _cdist_forward _pdist_forward
    """
)
"""Smooth functions that are held at their value."""

_SMALL = 1e-4
"""The value of v at which a gate f(v)/v is computed where v = 0."""


@affine_form(*GATED)
def gated(call: Call) -> Affine:
    """Return the form z·g(v) of f(v), with the gate g(v) = f(v)/v held."""
    v = call.args[0]
    rest = [call.fixed(i, f"{i + 1}th argument") for i in range(1, len(call.args))]
    at_zero = call.function(torch.full((), _SMALL, dtype=torch.float64), *rest, **call.kwargs) / _SMALL
    gate = torch.where(v == 0, at_zero.to(v), call.output / torch.where(v == 0, 1, v))
    return Affine(lambda z: z * gate, (v,), held="gate")


@affine_form("glu")
def gated_linear_unit(call: Call) -> Affine:
    """Multiply the first half by σ of the second half, which is held."""
    v, dim = call.args[0], call.argument(1, "dim", -1)
    gate = v.chunk(2, dim)[1].sigmoid()
    return Affine(lambda z: z.chunk(2, dim)[0] * gate, (v,), held="gate")


@affine_form("_softmax", "_safe_softmax", *HELD)
def held(call: Call) -> tuple[Affine, ...]:
    """Hold the values of all outputs of the operation."""
    what = "attention pattern" if call.name.endswith("softmax") else "value"
    return tuple(Affine(held=what) for _ in tensors_in(call.output))


@affine_form("_log_softmax")
def log_softmax(call: Call) -> Affine:
    """Return the form z − log Σ exp v, with the normaliser held."""
    v = call.args[0]
    normaliser = v - call.output
    return Affine(lambda z: z - normaliser, (v,), held="normaliser")


@affine_form("native_batch_norm", "cudnn_batch_norm", "miopen_batch_norm", "_native_batch_norm_legit",
      "_native_batch_norm_legit_no_training", "_batch_norm_no_update", "_batch_norm_with_update")  # fmt: skip
def batch_norm(call: Call) -> Affine:
    """Return the form (z − μ)·γ/√(σ² + ε) + β with the running statistics.

    Raises:
        ModelError: The layer normalises by the batch.
    """
    v = call.args[0]
    parameters = [call.fixed(1, "weight"), call.fixed(2, "bias")]
    evaluation = call.name in ("_native_batch_norm_legit_no_training", "_batch_norm_no_update")
    if not evaluation and call.args[5]:
        if not call.kind.startswith("InstanceNorm") and v.shape[0] != 1:
            raise ModelError(
                f"model: {call.where} normalises by the batch, so that examples influence each other: call model.eval()"
            )
        dims = tuple(range(2, v.dim()))
        return _normalised(v, v.shape, dims, float(call.args[7]), parameters, _per_channel(v))
    mean, variance = call.fixed(3, "running mean"), call.fixed(4, "running variance")
    weight, bias = parameters
    scale = (variance + float(call.args[-1])).rsqrt()
    scale = scale if weight is None else scale * weight
    shift = -mean * scale if bias is None else bias - mean * scale
    shape = _per_channel(v)
    scale, shift = scale.view(shape).to(v.dtype), shift.view(shape).to(v.dtype)
    return Affine(lambda z: torch.addcmul(shift, z, scale), (v,))


@affine_form("native_layer_norm")
def layer_norm(call: Call) -> Affine:
    """Return the form (z − mean z)·γ/σ(v) + β over the last dimensions."""
    v, shape = call.args[0], call.args[1]
    parameters = [call.fixed(2, "weight"), call.fixed(3, "bias")]
    dims = tuple(range(-len(shape), 0))
    return _normalised(v, v.shape, dims, float(call.args[4]), parameters, tuple(shape))


@affine_form("native_group_norm")
def group_norm(call: Call) -> Affine:
    """Return the form (z − mean z)·γ/σ(v) + β over groups of channels."""
    v, grouped = call.args[0], (call.args[0].shape[0], int(call.args[6]), -1)
    parameters = [call.fixed(1, "weight"), call.fixed(2, "bias")]
    return _normalised(v, grouped, (-1,), float(call.args[7]), parameters, _per_channel(v))


@affine_form("_fused_rms_norm")
def rms_norm(call: Call) -> Affine:
    """Return the form z·γ/rms(v)."""
    v, weight = call.args[0], call.fixed(2, "weight")
    scale = call.output[1] if weight is None else call.output[1] * weight
    return Affine(lambda z: z * scale, (v,), held="root mean square")


def _per_channel(v: Tensor) -> tuple[int, ...]:
    return (1, -1, *(1,) * (v.dim() - 2))


def _normalised(
    v: Tensor,
    shape: tuple[int, ...],
    dims: tuple[int, ...],
    eps: float,
    parameters: list[Tensor | None],
    parameters_shape: tuple[int, ...],
) -> Affine:
    """Freeze (z − mean z)·γ/σ(v) + β, with mean and σ over some dimensions of v in another shape."""
    deviation = (v.reshape(shape).var(dims, correction=0, keepdim=True) + eps).rsqrt()
    weight, bias = (None if given is None else given.view(parameters_shape) for given in parameters)

    def function(z: Tensor) -> Tensor:
        parts = z.reshape(shape)
        unit = ((parts - parts.mean(dims, keepdim=True)) * deviation).reshape(z.shape)
        unit = unit if weight is None else unit * weight
        return unit if bias is None else unit + bias

    return Affine(function, (v,), held="standard deviation")
