"""Whether a model has per-example gradients: no layer and no computation may mix examples or be random."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.parameter import is_lazy

from npeff.batches.batches import Batch
from npeff.errors import ModelError, NpeffError
from npeff.gradients.fallback import TOLERANCE


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


_RANDOM = (
    "model: two passes over the same batch give different logits; make it deterministic (model.eval() switches dropout "
    "off)"
)


def check_independence(run: Callable[[Batch], Tensor], batch: Batch, logits: Tensor, precision: torch.dtype) -> None:
    """The first and the last example alone must have the logits that they have in the batch.

    A batch that cannot be cut is called again as it is.

    Args:
        run: Runs the model on a batch: ``(b, C)`` logits.
        batch: The batch.
        logits: ``(b, C)`` its logits.
        precision: The coarsest dtype in the graph.

    Raises:
        ModelError: They do not.
    """
    logits = logits.detach()
    if batch.places is not None and batch.n_sequences < batch.n_examples:
        some = batch.one_each()
        batch, logits = batch.take(some), logits[some]
    if batch.n_examples == 1 or not batch.sliceable:
        if differ(run(batch).detach(), logits, precision):
            raise ModelError(_RANDOM)
        return
    for example in (0, batch.n_examples - 1):
        alone = _alone(run, batch, example)
        if alone is not None and differ(alone, logits[example : example + 1], precision):
            raise ModelError(_explain(run, batch, logits, example, alone, precision))


def differ(one: Tensor, other: Tensor, dtype: torch.dtype) -> bool:
    """Whether logits differ by more than rounding in a dtype.

    Raises:
        ModelError: Their shapes differ.
    """
    if one.shape != other.shape:
        raise ModelError(
            f"model: the same examples have logits of shape {tuple(other.shape)} within their batch and "
            f"{tuple(one.shape)} when called again; make their number independent of the batch, or choose them "
            "in forward=callable(model, batch) -> logits"
        )
    one, other = one.to(torch.float64), other.to(torch.float64)
    finite = torch.isfinite(one) & torch.isfinite(other)
    gap = torch.where(finite, one - other, 0.0).abs()
    size = torch.where(finite, other, 0.0).abs().max().clamp_min(1.0)
    return bool((gap > 5 * TOLERANCE.get(dtype, 2e-4) * size).any())


def _alone(run: Callable[[Batch], Tensor], batch: Batch, example: int) -> Tensor | None:
    """The example's logits ``(1, C)`` in a batch of its own.

    A model that cannot be called on one example, as with ``.squeeze()``, is called on this one and another; None where
    that would be the batch itself.
    """
    one = batch.take(torch.tensor([example]))
    try:
        return run(one).detach()
    except NpeffError:
        if batch.n_examples == 2:
            return None
        two = batch.take(torch.tensor([example, (example + 1) % batch.n_examples]))
        return run(two).detach()[:1]


def _explain(
    run: Callable[[Batch], Tensor], batch: Batch, logits: Tensor, example: int, alone: Tensor, precision: torch.dtype
) -> str:
    if differ(run(batch).detach(), logits, precision):
        return _RANDOM
    gap = float((alone - logits[example : example + 1]).abs().max())
    said = f"model: example {example} of a batch has other logits when it is alone (largest difference {gap:.3g})"
    try:
        twice = run(batch.take(torch.tensor([example, example]))).detach()[:1]
    except NpeffError:
        twice = alone
    if gap < float(logits.abs().max().clamp_min(1.0)) and precision in (torch.bfloat16, torch.float16):
        return (
            f"{said}, computed in {str(precision).removeprefix('torch.')}: too much for rounding, too little to "
            "tell why; compute in float32, without autocast"
        )
    if differ(twice, alone, precision):
        return (
            f"{said}, and others again in a batch of twice itself: examples influence each other by their number, as "
            "through a sum over the batch, or the batch is cut wrongly; remove that dependence in forward=, or pass "
            f"batches of one example. To take it, {batch.how_cut()}"
        )
    return (
        f"{said}, but not in a batch of twice itself: examples influence each other, as through a mean over the batch, "
        "or the batch is cut wrongly; use model.eval(), remove that dependence in forward=, or pass batches of one "
        f"example. To take it, {batch.how_cut()}"
    )
