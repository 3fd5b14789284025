"""The direction of a diagonal component: a Fisher-weighted interpolation towards a signed gradient step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from npeff.components.components import Components
from npeff.errors import ArgumentError, DataError
from npeff.gradients.engine import PerExampleGradients
from npeff.models.forward import call_model
from npeff.models.parameters import Parameters
from npeff.perturbation.directions import Direction, Target
from npeff.perturbation.evaluate import Evaluator
from npeff.perturbation.examples import BatchSlice
from npeff.perturbation.options import FLOOR, PerturbOptions
from npeff.perturbation.outputs import surprise

Array = npt.NDArray[Any]


def interpolation(component: Array, data: Array, lam: float, floor: float = FLOOR) -> Array:
    """How far each weight goes from θ towards the moved θ′, ρ.

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
    """
    h = np.asarray(component, np.float64)
    f = np.asarray(data, np.float64)
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
    """The directions of a diagonal target, one per λ.

    For each λ the merged weights are ``θ ± δ ρ(λ)∘sign(∇)``: a direction, along which δ is searched for. Many pairs
    (δ, λ) reach the same KL. The pair that changes the weights least in the Euclidean norm (mean over the signs) is
    used: a choice that does not depend on the ratio that is measured afterwards.

    Args:
        evaluator: Of the examples.
        components: Diagonal components.
        target: h, or the group whose weighted sum of h is used.
        options: As for :func:`npeff.perturb`.
        slices: The top examples.
        baseline: Indices of the examples whose mean Fisher is f̄, unless it is given.

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
        fisher = evaluator.mean_fisher(baseline)
    signs = _gradient_signs(evaluator, slices)
    found = []
    for lam in options.lambdas if options.magnitude is None or options.lam is not None else (0.5,):
        change = interpolation(h / norm, fisher, lam, options.floor) * signs
        scale = float(np.linalg.norm(change))
        if scale > 0:
            component = None if len(H) > 1 else target.members[0]
            found.append(Direction(change / scale, component, lam=lam, scale=scale))
    if not found:
        raise ArgumentError("j: the component and the top examples' gradient have no parameter in common")
    return found


def _gradient_signs(evaluator: Evaluator, slices: Sequence[BatchSlice]) -> Array:
    """Signs of the gradient of the summed ``−log p(ŷ|x)`` over examples, ŷ the model's own prediction.

    Returns:
        ``(m,)`` float64 of −1, 0 and 1: moving along them makes the predictions less certain.

    Raises:
        DataError: The gradient vanishes or is not finite.
    """
    forward, likelihood, parameters = evaluator.forward, evaluator.likelihood, evaluator.parameters
    engine = PerExampleGradients(
        evaluator.model, parameters, lambda inner, batch: call_model(inner, forward, batch, likelihood)
    )
    total = np.zeros(parameters.n_parameters)
    for one in slices:
        with engine.recording():
            loss = surprise(engine.forward(one.batch)[one.rows].double(), likelihood).sum()
            gradients = torch.autograd.grad(loss, list(engine.tensors.values()), allow_unused=True)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            if gradient is not None:
                total[parameter.slice] += gradient.detach().to_dense().double().reshape(-1).cpu().numpy()
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
        parts = [np.asarray(fisher[p.name], np.float64) for p in parameters]
        for p, part in zip(parameters, parts, strict=True):
            if part.shape != p.shape:
                raise ArgumentError(f"fisher: {p.name} has shape {p.shape} in the components, got {part.shape}")
        fisher = np.concatenate([part.reshape(-1) for part in parts])
    flat = np.asarray(fisher, np.float64)
    if flat.shape != (parameters.n_parameters,):
        raise ArgumentError(f"fisher: expected tensors by name or shape ({parameters.n_parameters},), got {flat.shape}")
    if not np.isfinite(flat).all() or flat.min() < 0 or not flat.any():
        raise ArgumentError("fisher: expected finite values ≥ 0, not all 0: the mean diagonal Fisher of a data set")
    return flat
