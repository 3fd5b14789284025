"""The direction of a diagonal component: a Fisher-weighted interpolation towards a signed gradient step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from npeff.errors import DataError
from npeff.gradients.engine import PerExampleGradients
from npeff.gradients.factors import Likelihood
from npeff.models.forward import call_model
from npeff.models.parameters import Parameters
from npeff.perturbation.examples import Piece
from npeff.perturbation.outputs import surprise

Array = npt.NDArray[Any]

MIXES = (0.1, 0.3, 0.5, 0.7, 0.9)
"""λ that are tried when none is given."""
FLOOR = 1e-6
"""Of the data's Fisher at unit norm: keeps the interpolation defined where neither Fisher sees a parameter."""


def interpolation(component: Array, data: Array, mix: float, floor: float = FLOOR) -> Array:
    """How far each weight goes from θ towards the moved θ′, ρ.

    Merging θ (weighted by the data's Fisher) and θ′ (weighted by the component) parameter by parameter [Matena &
    Raffel: Merging models with Fisher-weighted averaging, 2022]::

        θ_new = (λ h ∘ θ′ + (1−λ) max(f̄, floor) ∘ θ) / (λ h + (1−λ) max(f̄, floor)) = θ + ρ ∘ (θ′ − θ).

    Args:
        component: h, ``(m,)`` ≥ 0, of unit norm.
        data: f̄, ``(m,)`` ≥ 0; scaled to unit norm here, so that λ weighs like against like.
        mix: λ, between 0 and 1.
        floor: Least value of f̄ at unit norm.

    Returns:
        ρ, ``(m,)`` float64 in [0, 1].
    """
    h = np.asarray(component, np.float64)
    f = np.asarray(data, np.float64)
    f = f / (np.linalg.norm(f) or 1.0)
    return np.asarray(mix * h / (mix * h + (1 - mix) * np.maximum(f, floor)))


def signed_gradient(
    model: nn.Module, parameters: Parameters, pieces: Sequence[Piece], likelihood: Likelihood, forward: Any
) -> Array:
    """Signs of the gradient of the summed ``−log p(ŷ|x)`` over examples, ŷ the model's own prediction.

    Args:
        model: The model at its own weights.
        parameters: The flat vector's layout.
        pieces: The examples.
        likelihood: What the outputs mean.
        forward: As for :func:`npeff.compute_fishers`.

    Returns:
        ``(m,)`` float64 of −1, 0 and 1: moving along it makes the predictions less certain.

    Raises:
        DataError: The gradient vanishes or is not finite.
    """
    engine = PerExampleGradients(model, parameters, lambda inner, batch: call_model(inner, forward, batch, likelihood))
    total = np.zeros(parameters.n_parameters)
    tensors: list[Tensor] = list(engine.tensors.values())
    for piece in pieces:
        with engine.recording():
            loss = surprise(engine.forward(piece.batch)[piece.rows].double(), likelihood).sum()
            gradients = torch.autograd.grad(loss, tensors, allow_unused=True)
        for place, gradient in zip(parameters, gradients, strict=True):
            if gradient is not None:
                total[place.slice] += gradient.detach().to_dense().double().reshape(-1).cpu().numpy()
    if not np.isfinite(total).all() or not total.any():
        what = "is zero" if np.isfinite(total).all() else "is not finite"
        raise DataError(
            f"top: the gradient over the top examples {what}, so there is no way to move; take other examples with top="
        )
    return np.sign(total)
