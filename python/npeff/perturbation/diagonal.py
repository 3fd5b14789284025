"""Diagonal Fishers: that of a data set, and the direction of a diagonal component, which is an interpolation."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from tqdm import tqdm

from npeff.batches.batches import Batch
from npeff.batches.reading import check_data
from npeff.components.components import Components
from npeff.errors import ArgumentError, DataError
from npeff.fishers.options import FisherOptions, Likelihood
from npeff.fishers.passes import Run
from npeff.gradients.blocks import Block
from npeff.gradients.eligibility import placed, select_parameters
from npeff.models.parameters import Parameters
from npeff.perturbation.directions import Direction, Target
from npeff.perturbation.evaluate import Evaluator
from npeff.perturbation.examples import BatchSlice
from npeff.perturbation.options import FLOOR, PerturbOptions, as_numbers, check_share
from npeff.perturbation.outputs import surprise

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
        max_examples: Stop after so many examples.
        progress: Show a progress bar.

    Returns:
        Parameter-shaped float32 tensors by name, on the CPU: ``fisher=`` of :func:`npeff.perturb`.

    Raises:
        ArgumentError: An argument has a wrong value.
        DataError: The data is empty, or gives outputs or gradients that are not finite.
        ModelError: The model has no per-example gradients.
    """
    options = FisherOptions("diagonal", likelihood=likelihood, forward=forward, max_examples=max_examples)
    options.check()
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    inner = getattr(model, "_orig_mod", model)
    with placed(inner, device) as used_device:
        run = Run(inner, used_device, select_parameters(inner, parameters), options)
        batches = run.batches(tqdm(check_data(data), desc="Mean Fisher", disable=not progress))
        mean = _mean_of(run, ((batch, None) for batch in batches)).astype(np.float32)
    return {name: torch.from_numpy(part.copy()) for name, part in run.parameters.unflatten(mean).items()}


def _mean_of(run: Run, batches: Iterable[tuple[Batch, Array | None]]) -> Array:
    """Compute ``(1/n) Σ_i diag F_i``, ``(m,)`` float64, over some rows of each batch, or with None over all.

    Raises:
        DataError: There are no examples, or gradients are not finite.
    """
    total, count, position = np.zeros(run.parameters.n_parameters), 0, 0
    for batch, rows in batches:
        counted = np.ones(batch.n_examples, bool)
        if rows is not None:
            counted = np.isin(np.arange(batch.n_examples), rows)
        with run.engine.recording():
            for one in run.passes(batch, np.arange(position, position + batch.n_examples)):
                scale = one.factors.scale.square().cpu().numpy()
                scale[one.filled] *= counted[one.ids - position]
                for block in one.blocks(squared=True):
                    assert isinstance(block, Block)  # factors come only to those who ask for them
                    _add(block, scale[block.examples], total)
        count, position = count + int(counted.sum()), position + batch.n_examples
    if not count:
        raise DataError("data: it yielded no batches; if it is a generator it may be used up: pass a list")
    if not np.isfinite(total).all():
        raise DataError("gradients: the diagonal Fisher of the data is not finite; find what overflows in the model")
    return total / count


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


# ---- the direction of a diagonal component ----------------------------------------------------------------------


def interpolation(component: Array, data: Array, lam: float, floor: float = FLOOR) -> Array:
    """Compute ρ: how far each weight goes from θ towards the moved θ′.

    θ (weighted by the data's Fisher) and θ′ (weighted by the component) are merged parameter by parameter [Matena &
    Raffel: Merging models with Fisher-weighted averaging, 2022]::

        θ_new = (λ h ∘ θ′ + (1−λ) max(f̄, floor) ∘ θ) / (λ h + (1−λ) max(f̄, floor)) = θ + ρ ∘ (θ′ − θ).

    Args:
        component: h, ``(m,)`` ≥ 0, of unit norm.
        data: f̄, ``(m,)`` ≥ 0; scaled to unit norm here, so that λ weighs two vectors of equal norm.
        lam: λ, between 0 and 1.
        floor: Least value of f̄ at unit norm.

    Returns:
        ρ, ``(m,)`` float64 in [0, 1].

    Raises:
        ArgumentError: ``lam`` is beyond 0 and 1, or the shapes differ.
    """
    check_share("lam", lam)
    h, f = as_numbers("component", component), as_numbers("data", data)
    if h.shape != f.shape:
        raise ArgumentError(f"component, data: expected the same shape, got {h.shape} and {f.shape}")
    f = f / (np.linalg.norm(f) or 1.0)
    return np.asarray(lam * h / (lam * h + (1 - lam) * np.maximum(f, floor)))


def diagonal_directions(
    evaluator: Evaluator,
    components: Components,
    target: Target,
    options: PerturbOptions,
    slices: Sequence[BatchSlice],
    baseline: Array,
) -> list[Direction]:
    """Find the directions of a diagonal target, one per λ, from its own components and the top examples in ``slices``.

    For each λ the merged weights are ``θ ± δ ρ(λ)∘sign(∇)``: a direction, along which δ is searched for. Many pairs
    (δ, λ) reach the same KL. The pair that changes the weights least in the Euclidean norm (mean over the signs) is
    used: a choice that does not depend on the ratio that is measured afterwards. Unless f̄ is given, it is the mean
    Fisher of the examples whose indices are ``baseline``.

    Raises:
        ArgumentError: The component is zero, or has no parameter in common with the gradient.
    """
    H = [components.vector(k).astype(np.float64) for k in target.members]
    h = np.asarray(sum(w * v for w, v in zip(target.shares, H, strict=True)))
    norm = float(np.linalg.norm(h))
    if norm == 0:
        raise ArgumentError(f"j: component {list(target.members)} is zero, so there is nothing to move along")
    fisher = _given(components.parameters, options.fisher)
    if fisher is None:
        fisher = _mean_over(evaluator, baseline)
    signs = _gradient_signs(evaluator, slices)
    found = []
    for lam in options.lambdas if options.magnitude is None or options.lam is not None else (0.5,):
        change = partial(_change, h / norm, fisher, signs, lam, options.floor)
        scale = float(np.linalg.norm(change()))
        if scale > 0:
            component = None if len(H) > 1 else target.members[0]
            found.append(Direction(partial(change, scale), component, lam=lam, scale=scale))
    if not found:
        raise ArgumentError("j: the component and the top examples' gradient have no parameter in common")
    return found


def _change(component: Array, data: Array, signs: Array, lam: float, floor: float, scale: float = 1.0) -> Array:
    """The change of the weights for a unit signed step, over ``scale``."""
    return interpolation(component, data, lam, floor) * signs / scale


def _mean_over(evaluator: Evaluator, indices: Array) -> Array:
    """Mean diagonal Fisher ``(m,)`` of some of the evaluator's examples, computed once."""
    key = indices.tobytes()
    if key not in evaluator.mean_fishers:
        chosen = np.zeros(len(evaluator.examples), bool)
        chosen[indices] = True
        slices = (one.restricted(chosen) for one in evaluator.examples)
        batches = ((one.batch, one.rows.cpu().numpy()) for one in slices if len(one.indices))
        how = FisherOptions("diagonal", likelihood=evaluator.likelihood, forward=evaluator.checked.forward)
        run = Run(evaluator.model, evaluator.checked.device, evaluator.parameters, how)
        evaluator.mean_fishers[key] = _mean_of(run, batches)
    return evaluator.mean_fishers[key]


def _gradient_signs(evaluator: Evaluator, slices: Sequence[BatchSlice]) -> Array:
    """Signs ``(m,)`` float64 of the gradient of the summed ``−log p(ŷ|x)``, ŷ the model's own prediction.

    Moving along them makes the predictions less certain.

    Raises:
        DataError: The gradient vanishes or is not finite.
    """
    parameters, likelihood = evaluator.parameters, evaluator.likelihood
    _, gradient = evaluator.checked.gradient(slices, lambda _, logits: surprise(logits.double(), likelihood).sum())
    total = np.zeros(parameters.n_parameters)
    for name, part in gradient.items():
        total[parameters.block(name)] = part.double().reshape(-1).cpu().numpy()
    if not np.isfinite(total).all() or not total.any():
        what = "is zero" if np.isfinite(total).all() else "is not finite"
        raise DataError(
            f"top: the gradient over the top examples {what}, so there is no way to move; take other examples with top="
        )
    return np.sign(total)


def _given(parameters: Parameters, fisher: Any) -> Array | None:
    """A given Fisher of the data as a flat vector.

    Raises:
        ArgumentError: It does not fit the parameters, has negative or infinite values, or is zero.
    """
    if fisher is None:
        return None
    if isinstance(fisher, Mapping):
        if missing := [p.name for p in parameters if p.name not in fisher]:
            raise ArgumentError(f"fisher: expected every parameter of the components, but {missing[0]!r} is missing")
        parts = [as_numbers("fisher", fisher[p.name]) for p in parameters]
        for p, part in zip(parameters, parts, strict=True):
            if part.shape != p.shape:
                raise ArgumentError(f"fisher: {p.name} has shape {p.shape} in the components, got {part.shape}")
        fisher = np.concatenate([part.reshape(-1) for part in parts])
    flat = as_numbers("fisher", fisher)
    if flat.shape != (parameters.n_parameters,):
        raise ArgumentError(f"fisher: expected tensors by name or shape ({parameters.n_parameters},), got {flat.shape}")
    if not np.isfinite(flat).all() or flat.min() < 0 or not flat.any():
        raise ArgumentError("fisher: expected finite values ≥ 0, not all 0: the mean diagonal Fisher of a data set")
    return flat
