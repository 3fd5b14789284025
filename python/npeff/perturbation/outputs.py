"""Compare a model's outputs on an example, for each likelihood: KL, Fisher of the outputs, predictions."""

from __future__ import annotations

import torch
from torch import Tensor

from npeff.fishers.options import Likelihood


def divergence(new: Tensor, old: Tensor, likelihood: Likelihood) -> Tensor:
    """Compute ``KL(new ‖ old)`` of every example's predictive distributions, in nats.

    ``Σ_y p′_y (log p′_y − log p_y)`` for categorical logits; the sum of that over independent yes/no questions
    for Bernoulli ones; ``½‖new − old‖²`` for Gaussian means of unit variance.

    Args:
        new: ``(b, C)`` outputs of the changed model, any floating dtype.
        old: ``(b, C)`` outputs of the model itself.
        likelihood: Likelihood of the outputs.

    Returns:
        ``(b,)`` float64 ≥ 0; not finite where ``new`` is not.
    """
    new, old = new.double(), old.double()
    if likelihood == "gaussian":
        return (new - old).square().sum(1) / 2
    if likelihood == "bernoulli":
        terms = torch.sigmoid(new) * (_log_sigmoid(new) - _log_sigmoid(old))
        terms = terms + torch.sigmoid(-new) * (_log_sigmoid(-new) - _log_sigmoid(-old))
        return terms.sum(1).clamp_min(0)
    log_new, log_old = torch.log_softmax(new, 1), torch.log_softmax(old, 1)
    return (log_new.exp() * (log_new - log_old)).sum(1).clamp_min(0)


def curvature(logits: Tensor, change: Tensor, likelihood: Likelihood) -> Tensor:
    """Compute ``uᵀ S u`` with S the Fisher of the outputs and u their change: twice the KL to second order.

    Args:
        logits: ``(b, C)`` outputs.
        change: ``(b, C)`` u, for example ``J_i v``.
        likelihood: Likelihood of the outputs; S is ``diag p − ppᵀ``, ``diag p(1−p)`` or the identity.

    Returns:
        ``(b,)`` float64 ≥ 0.
    """
    logits, u = logits.double(), change.double()
    if likelihood == "gaussian":
        return u.square().sum(1)
    if likelihood == "bernoulli":
        return (torch.sigmoid(logits) * torch.sigmoid(-logits) * u.square()).sum(1)
    p = torch.softmax(logits, 1)
    centred = u - (p * u).sum(1, keepdim=True)
    return (p * centred.square()).sum(1)


def flipped(new: Tensor, old: Tensor, likelihood: Likelihood) -> Tensor:
    """``(b,)`` float64: 1 where the predicted class changed; Bernoulli: share of answers that did; Gaussian: nan."""
    if likelihood == "gaussian":
        return torch.full((len(new),), torch.nan, dtype=torch.float64, device=new.device)
    if likelihood == "bernoulli":
        return ((new > 0) != (old > 0)).double().mean(1)
    return (new.argmax(1) != old.argmax(1)).double()


def correct(logits: Tensor, labels: Tensor, likelihood: Likelihood) -> Tensor:
    """``(b,)`` float64: 1 where the prediction is the label, 0 where not, nan where there is no class to compare.

    Args:
        logits: ``(b, C)`` outputs.
        labels: ``(b,)`` int64 classes, negative where unknown.
        likelihood: Likelihood of the outputs; Bernoulli outputs count when there is one per example.
    """
    if likelihood == "gaussian" or (likelihood == "bernoulli" and logits.shape[1] != 1):
        return torch.full((len(logits),), torch.nan, dtype=torch.float64, device=logits.device)
    predicted = (logits[:, 0] > 0).long() if likelihood == "bernoulli" else logits.argmax(1)
    return torch.where(labels < 0, torch.nan, (predicted == labels).double())


def surprise(logits: Tensor, likelihood: Likelihood) -> Tensor:
    """``(b,)`` −log p(ŷ|x) of the prediction ŷ, with its graph: the diagonal perturbation follows its gradient.

    For Gaussian outputs ŷ is the mean itself and the gradient would vanish; ½‖outputs‖² is used instead, whose
    gradient is the direction in which the outputs grow.
    """
    if likelihood == "gaussian":
        return logits.square().sum(1) / 2
    if likelihood == "bernoulli":
        return -torch.nn.functional.logsigmoid(logits.abs()).sum(1)
    return -torch.log_softmax(logits, 1).amax(1)


def _log_sigmoid(x: Tensor) -> Tensor:
    return torch.nn.functional.logsigmoid(x)
