"""Rules for what is not piecewise linear, held so that an affine map is left; refused unless asked for.

What is held, and what stays linear:

* a smooth activation f(v) = v·g(v): the gate g;
* softmax: its values, the attention pattern; log-softmax: its normaliser;
* a normalisation: the standard deviation, while the mean stays the linear function that it is;
* batch normalisation in evaluation mode is affine as it stands, and exact;
* any other smooth function: its value.
"""

from __future__ import annotations

import torch
from torch import Tensor

from npeff.companions.linearize.names import GATED, HELD, SOFTMAX
from npeff.companions.linearize.rules import Affine, Call, Held, Outcome, rule
from npeff.errors import ModelError

_SMALL = 1e-4
"""Where a gate f(v)/v is taken for v = 0."""


@rule(*GATED)
def gated(call: Call) -> Outcome:
    """z·g(v) with g(v) = f(v)/v."""
    v = call.args[0]
    rest = [call.fixed(i, f"{i + 1}th argument") for i in range(1, len(call.args))]
    at_zero = call.function(torch.full((), _SMALL, dtype=torch.float64), *rest, **call.kwargs) / _SMALL
    gate = torch.where(v == 0, at_zero.to(v), call.output / torch.where(v == 0, 1, v))
    return Affine(lambda z: z * gate, (v,), held="gate")


@rule("glu")
def gated_linear_unit(call: Call) -> Outcome:
    """The first half times σ of the second, which is held."""
    v, dim = call.args[0], call.argument(1, "dim", -1)
    gate = v.chunk(2, dim)[1].sigmoid()
    return Affine(lambda z: z.chunk(2, dim)[0] * gate, (v,), held="gate")


@rule(*HELD)
def held(call: Call) -> Outcome | tuple[Outcome, ...]:
    """Its value."""
    return Held() if isinstance(call.output, Tensor) else tuple(Held() for _ in call.output)


@rule(*SOFTMAX)
def softmax(call: Call) -> Outcome:
    """Its values."""
    return Held("attention pattern")


@rule("_log_softmax")
def log_softmax(call: Call) -> Outcome:
    """The difference z − log Σ exp v."""
    v = call.args[0]
    normaliser = v - call.output
    return Affine(lambda z: z - normaliser, (v,), offset=True, held="normaliser")


@rule("native_batch_norm", "cudnn_batch_norm", "miopen_batch_norm", "_native_batch_norm_legit",
      "_native_batch_norm_legit_no_training", "_batch_norm_no_update", "_batch_norm_with_update")  # fmt: skip
def batch_norm(call: Call) -> tuple[Outcome, ...]:
    """(z − μ)·γ/√(σ² + ε) + β with the running statistics.

    Raises:
        ModelError: It normalises by the batch.
    """
    v = call.args[0]
    parameters = [call.fixed(1, "weight"), call.fixed(2, "bias")]
    evaluation = call.name in ("_native_batch_norm_legit_no_training", "_batch_norm_no_update")
    others = (None,) * (len(call.output) - 1)
    if not evaluation and call.args[5]:
        if not call.kind.startswith("InstanceNorm") and v.shape[0] != 1:
            raise ModelError(
                f"model: {call.where} normalises by the batch, so that examples influence each other: call model.eval()"
            )
        dims = tuple(range(2, v.dim()))
        return _normalised(call, v, dims, float(call.args[7]), parameters), *others
    mean, variance = call.fixed(3, "running mean"), call.fixed(4, "running variance")
    weight, bias = parameters
    scale = (variance + float(call.args[-1])).rsqrt()
    scale = scale if weight is None else scale * weight
    shift = -mean * scale if bias is None else bias - mean * scale
    shape = (1, -1, *(1,) * (v.dim() - 2))
    scale, shift = scale.view(shape).to(v.dtype), shift.view(shape).to(v.dtype)
    return Affine(lambda z: torch.addcmul(shift, z, scale), (v,), offset=True), *others


@rule("native_layer_norm")
def layer_norm(call: Call) -> tuple[Outcome, ...]:
    """(z − mean z)·γ/σ(v) + β over the last dimensions."""
    v, shape = call.args[0], call.args[1]
    parameters = [call.fixed(2, "weight"), call.fixed(3, "bias")]
    return _normalised(call, v, tuple(range(-len(shape), 0)), float(call.args[4]), parameters, shape), None, None


@rule("native_group_norm")
def group_norm(call: Call) -> tuple[Outcome, ...]:
    """(z − mean z)·γ/σ(v) + β over groups of channels."""
    v, groups, eps = call.args[0], int(call.args[6]), float(call.args[7])
    parameters = [call.fixed(1, "weight"), call.fixed(2, "bias")]
    grouped = (v.shape[0], groups, -1)
    deviation = (v.reshape(grouped).var(-1, correction=0, keepdim=True) + eps).rsqrt()

    def function(z: Tensor) -> Tensor:
        parts = z.reshape(grouped)
        unit = ((parts - parts.mean(-1, keepdim=True)) * deviation).reshape(z.shape)
        return _affine(unit, parameters, (1, -1, *(1,) * (z.dim() - 2)))

    return Affine(function, (v,), offset=True, held="standard deviation"), None, None


@rule("_fused_rms_norm")
def rms_norm(call: Call) -> tuple[Outcome, ...]:
    """z·γ/rms(v)."""
    v, weight = call.args[0], call.fixed(2, "weight")
    scale = call.output[1] if weight is None else call.output[1] * weight
    return Affine(lambda z: z * scale, (v,), held="root mean square"), None


def _normalised(
    call: Call,
    v: Tensor,
    dims: tuple[int, ...],
    eps: float,
    parameters: list[Tensor | None],
    shape: tuple[int, ...] | list[int] | None = None,
) -> Affine:
    deviation = (v.var(dims, correction=0, keepdim=True) + eps).rsqrt()
    shape = tuple(shape) if shape is not None else (1, -1, *(1,) * (v.dim() - 2))

    def function(z: Tensor) -> Tensor:
        return _affine((z - z.mean(dims, keepdim=True)) * deviation, parameters, shape)

    return Affine(function, (v,), offset=True, held="standard deviation")


def _affine(unit: Tensor, parameters: list[Tensor | None], shape: tuple[int, ...]) -> Tensor:
    weight, bias = parameters
    if weight is not None:
        unit = unit * weight.view(shape)
    return unit if bias is None else unit + bias.view(shape)
