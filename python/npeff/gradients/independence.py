"""Whether the logits of an example depend on the rest of its batch; if so, why, and what to do."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from npeff.batches.batches import Batch
from npeff.errors import ModelError, NpeffError
from npeff.gradients.fallback import TOLERANCE

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
