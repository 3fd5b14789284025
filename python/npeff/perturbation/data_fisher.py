"""The diagonal Fisher of a data set: the mean of the examples' diagonals, made in one pass, never stored apart."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from tqdm import tqdm

from npeff.batches.batches import Batch, call_model, check_data, read_batches
from npeff.errors import ArgumentError, DataError
from npeff.gradients.budget import Budget
from npeff.gradients.engine import KEPT_BYTES, PerExampleGradients
from npeff.gradients.factors import FactorOptions, Likelihood, check_meaning, cotangent_bytes, factorise
from npeff.gradients.selection import placed, select_parameters
from npeff.gradients.tiles import Block
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
    """``f̄ = (1/n) Σ_i diag F_i``, the diagonal Fisher of a data set, unnormalised.

    Exact, from the same per-example gradients as :func:`npeff.compute_fishers`, summed as they are made.

    Args:
        model: As for :func:`npeff.compute_fishers`; left as it was.
        data: Iterable of batches.
        parameters: Name patterns; None takes all.
        likelihood: What the outputs mean.
        forward: ``forward(model, batch) -> logits``.
        device: Where to compute.
        max_examples: Stop after the batch in which so many are reached.
        progress: Show a progress bar.

    Returns:
        Parameter-shaped float32 tensors by name, on the CPU: ``fisher=`` of :func:`npeff.perturb`.

    Raises:
        ArgumentError: An argument has a wrong value.
        DataError: The data is empty, or gives outputs or gradients that are not finite.
        ModelError: The model has no per-example gradients as it stands.
    """
    options = FactorOptions(likelihood=likelihood)
    options.check()
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    inner = getattr(model, "_orig_mod", model)

    def batches() -> Iterator[Batch]:
        done = 0
        bar = tqdm(check_data(data), desc="Mean Fisher", disable=not progress)
        for batch in read_batches(bar, place, forward is not None):
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
    """``Σ_i diag F_i`` over examples, and how many they are.

    Args:
        model: On the batches' device.
        parameters: The flat vector's layout.
        batches: Each with the rows that count, or None for all of them.
        likelihood: What the outputs mean.
        forward: As for :func:`npeff.compute_fishers`.

    Returns:
        ``(m,)`` float64 and the number of examples.

    Raises:
        DataError: Outputs or gradients are not finite.
    """
    engine = PerExampleGradients(model, parameters, lambda inner, batch: call_model(inner, forward, batch, likelihood))
    total, count = np.zeros(parameters.n_parameters), 0
    for batch, rows in batches:
        counted = np.ones(batch.n_examples, bool)
        if rows is not None:
            counted = np.isin(np.arange(batch.n_examples), rows)
        count += int(counted.sum())
        _add(engine, batch, counted, likelihood, total)
    if not np.isfinite(total).all():
        raise DataError("gradients: the diagonal Fisher of the data is not finite; find what overflows in the model")
    return total, count


def _add(engine: PerExampleGradients, batch: Batch, counted: Array, likelihood: Likelihood, total: Array) -> None:
    options = FactorOptions(likelihood=likelihood)
    with engine.recording():
        logits = engine.forward(batch)
        if not bool(torch.isfinite(logits).all()):
            raise DataError("logits: some are not finite; find what overflows in the model")
        if not total.any():  # the first batch
            check_meaning(logits, likelihood)
        whole = batch.n_examples == 1 or not batch.sliceable
        pieces = -(-cotangent_bytes(logits, options) // KEPT_BYTES)
        if pieces <= 1 or whole:
            factors = factorise(logits, options, None, np.arange(batch.n_examples))
            prepared = engine.prepare(batch, logits)
            pieces = -(-prepared.kept_bytes(factors.columns.shape[2]) // KEPT_BYTES)
            if pieces > 1 and not whole:
                del prepared, factors
        if pieces <= 1 or whole:
            scale = factors.scale.square().cpu().numpy() * counted
            for block in engine.blocks(prepared, factors.columns, squared=True):
                assert isinstance(block, Block)  # factors come only to those who ask for them
                own = scale[block.examples]
                values = block.values[:, 0].to("cpu", torch.float64).numpy()
                values = np.where((own > 0)[:, None, None], values, 0.0) * own[:, None, None]  # 0 · ∞ of the certain
                if isinstance(block.starts, int):
                    total[block.starts : block.starts + values.shape[2]] += values[:, 0].sum(0)
                    continue
                assert isinstance(block.starts, torch.Tensor), "small parameters were not to be gathered"
                places = block.starts.cpu().numpy()[:, :, None] + np.arange(values.shape[2])
                np.add.at(total, places, values)
            return
    del logits
    for cut in Budget(engine, None).pieces(batch, max(1, batch.n_examples // int(pieces))):
        _add(engine, batch.take(cut), counted[cut], likelihood, total)
