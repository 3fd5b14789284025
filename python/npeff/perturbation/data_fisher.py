"""The diagonal Fisher of a data set: the mean of the examples' diagonals, computed in one pass."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from tqdm import tqdm

from npeff.batches.batches import Batch, check_data, read_batches
from npeff.errors import ArgumentError, DataError
from npeff.fishers.options import FisherOptions, Likelihood
from npeff.fishers.passes import Run
from npeff.gradients.blocks import Block
from npeff.gradients.selection import placed, select_parameters
from npeff.models.parameters import Parameters

Array = npt.NDArray[Any]


def mean_fisher(
    model: nn.Module,
    data: Iterable[Any],
    *,
    parameters: str | Sequence[str] | None = None,
    likelihood: Likelihood = "categorical",
    forward: Any = None,
    device: torch.device | str | None = None,
    max_examples: int | None = None,
    progress: bool = True,
) -> dict[str, torch.Tensor]:
    """Compute ``f̄ = (1/n) Σ_i diag F_i``, the diagonal Fisher of a data set, unnormalised.

    It is exact, from the same per-example gradients as :func:`npeff.compute_fishers`, summed at once.

    Args:
        model: As for :func:`npeff.compute_fishers`; left as it was.
        data: Iterable of batches.
        parameters: Name patterns; None takes all.
        likelihood: Likelihood of the outputs.
        forward: ``forward(model, batch) -> logits``.
        device: Where to compute.
        max_examples: Stop after the batch that reaches this number.
        progress: Show a progress bar.

    Returns:
        Parameter-shaped float32 tensors by name, on the CPU: ``fisher=`` of :func:`npeff.perturb`.

    Raises:
        ArgumentError: An argument has a wrong value.
        DataError: The data is empty, or gives outputs or gradients that are not finite.
        ModelError: The model has no per-example gradients.
    """
    options = FisherOptions(likelihood=likelihood)
    options.check()
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    inner = getattr(model, "_orig_mod", model)

    def batches() -> Iterator[Batch]:
        done = 0
        bar = tqdm(check_data(data), desc="Mean Fisher", disable=not progress)
        for batch in read_batches(bar, place, forward is not None, options.over_classes):
            yield batch
            done += batch.n_examples
            if max_examples is not None and done >= max_examples:
                return

    with placed(inner, device) as place:
        selected = select_parameters(inner, parameters)
        total, count = summed_fisher(inner, selected, ((b, None) for b in batches()), likelihood, forward)
    if not count:
        raise DataError("data: it yielded no batches; if it is a generator it may be used up: pass a list")
    mean = (total / count).astype(np.float32)
    return {name: torch.from_numpy(part.copy()) for name, part in selected.unflatten(mean).items()}


def summed_fisher(
    model: nn.Module,
    parameters: Parameters,
    batches: Iterable[tuple[Batch, Array | None]],
    likelihood: Likelihood,
    forward: Any = None,
) -> tuple[Array, int]:
    """Compute ``Σ_i diag F_i`` over examples, and count them.

    Args:
        model: On the batches' device.
        parameters: The flat vector's layout.
        batches: Each with the rows to sum over, or None for all.
        likelihood: Likelihood of the outputs.
        forward: As for :func:`npeff.compute_fishers`.

    Returns:
        ``(m,)`` float64 and the number of examples.

    Raises:
        DataError: Outputs or gradients are not finite.
    """
    run = Run(
        model,
        next(model.parameters()).device,
        parameters,
        FisherOptions("diagonal", likelihood=likelihood, forward=forward),
    )
    total, count, position = np.zeros(parameters.n_parameters), 0, 0
    for batch, rows in batches:
        counted = np.ones(batch.n_examples, bool)
        if rows is not None:
            counted = np.isin(np.arange(batch.n_examples), rows)
        with run.engine.recording():
            for one in run.passes(batch, np.arange(position, position + batch.n_examples)):
                scale = one.factors.scale.square().cpu().numpy()
                scale[one.filled] *= counted[one.ids - position]
                assert one.prepared is not None
                for block in run.engine.blocks(one.prepared, one.factors.columns, slots=one.slots, squared=True):
                    assert isinstance(block, Block)  # factors come only to those who ask for them
                    _add(block, scale[block.examples], total)
        count, position = count + int(counted.sum()), position + batch.n_examples
    if not np.isfinite(total).all():
        raise DataError("gradients: the diagonal Fisher of the data is not finite; find what overflows in the model")
    return total, count


def _add(block: Block, scale: Array, total: Array) -> None:
    """Add Σ over the block's examples of their squared gradients, each multiplied by its ``scale``."""
    values = block.values[:, 0].to("cpu", torch.float64).numpy()
    values = np.where((scale > 0)[:, None, None], values, 0.0) * scale[:, None, None]  # 0 · ∞ of certain examples
    if isinstance(block.starts, int):
        total[block.starts : block.starts + values.shape[2]] += values[:, 0].sum(0)
        return
    assert isinstance(block.starts, torch.Tensor), "small parameters were not to be gathered"
    places = block.starts.cpu().numpy()[:, :, None] + np.arange(values.shape[2])
    np.add.at(total, places, values)
