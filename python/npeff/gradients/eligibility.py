"""Refusing models that have no per-example gradients as they stand."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.parameter import is_lazy

from npeff.errors import ModelError


def check_initialised(model: nn.Module) -> None:
    """Refuse lazy parameters, which have no shape before the model was called.

    Raises:
        ModelError: Naming them.
    """
    tensors = chain(model.named_parameters(), model.named_buffers())
    lazy = [name for name, tensor in tensors if is_lazy(tensor)]
    if lazy:
        raise ModelError(
            f"model: {', '.join(lazy[:5])}{' …' if len(lazy) > 5 else ''} "
            f"{'have' if len(lazy) > 1 else 'has'} no shape yet (lazy modules); call the model once on a batch of "
            "inputs, then load its weights if there are any"
        )


def check_eligible(model: nn.Module) -> None:
    """Refuse layers that mix examples, or that are random.

    Raises:
        ModelError: Naming the modules and the remedy.
    """
    check_initialised(model)
    problems = [
        f"{name or type(module).__name__} ({problem})"
        for name, module in model.named_modules()
        for problem in _problems(module)
    ]
    if problems:
        shown = "; ".join(problems[:5]) + (f"; and {len(problems) - 5} more" if len(problems) > 5 else "")
        raise ModelError(f"model: per-example gradients do not exist as it stands: {shown}")


def _problems(module: nn.Module) -> Iterator[str]:
    kind = type(module).__name__
    origin = type(module).__module__.split(".")
    if kind.endswith("PackedParams"):  # of a quantised module, which is named itself
        return
    if (origin[0] == "torch" and "quantized" in origin) or any(
        tensor.is_quantized for tensor in chain(module.parameters(False), module.buffers(False)) if not is_lazy(tensor)
    ):
        yield f"{kind} is quantised, so no gradient passes through it: take the model as it was before quantisation"
    elif isinstance(module, _InstanceNorm):
        if module.training and module.track_running_stats:
            yield f"{kind} in training mode updates its running statistics: call model.eval()"
    elif isinstance(module, _BatchNorm):
        if module.running_mean is None:
            yield (
                f"{kind} without running statistics normalises by the batch: "
                "build it with track_running_stats=True, or use GroupNorm"
            )
        elif module.training:
            yield f"{kind} in training mode normalises by the batch: call model.eval()"
    elif isinstance(module, _DropoutNd):
        if module.training and module.p > 0:
            yield f"{kind} is active, so gradients are random: call model.eval()"
    elif isinstance(module, (nn.RNNBase, nn.MultiheadAttention)):
        if module.training and module.dropout > 0:
            yield f"{kind} has active dropout, so gradients are random: call model.eval()"
    elif isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.max_norm is not None:
        yield (
            f"{kind} with max_norm rewrites its weight in every forward pass: renormalise it once and set max_norm=None"
        )
