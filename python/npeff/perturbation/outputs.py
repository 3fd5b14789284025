"""A model's outputs: compared for each likelihood (KL, Fisher, predictions), and their derivative along a direction."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp
from torch.nn.attention import SDPBackend, sdpa_kernel

from npeff.batches.batches import Batch
from npeff.fishers.options import Likelihood
from npeff.gradients.fallback import CalledModel
from npeff.models.devices import is_out_of_memory
from npeff.perturbation.examples import BatchSlice
from npeff.perturbation.weights import TensorsByName, Weights

DIFFERENCE = {torch.float64: 1e-5, torch.float32: 2e-2, torch.bfloat16: 0.3, torch.float16: 0.1}
"""Change of the outputs relative to their size, per dtype of the weights, at which central differences err least."""

MOST_NUMBERS = 1 << 24
"""Outputs that are compared at a time: of a large vocabulary each float64 copy of them takes 128 MB."""

Comparison = Callable[[Tensor, Tensor, Likelihood], Tensor]


def _some_rows_at_a_time(compare: Comparison) -> Comparison:
    """Make a comparison of rows take as many at a time as memory should hold."""

    @functools.wraps(compare)
    def in_parts(first: Tensor, second: Tensor, likelihood: Likelihood) -> Tensor:
        rows = max(1, MOST_NUMBERS // first.shape[1])
        if len(first) <= rows:
            return compare(first, second, likelihood)
        pairs = zip(torch.split(first, rows), torch.split(second, rows), strict=True)
        return torch.cat([compare(a, b, likelihood) for a, b in pairs])

    return in_parts


def _by_question(outputs: Tensor, likelihood: Likelihood) -> Tensor:
    """View outputs that are not Gaussian as independent questions of several classes, ``(b, questions, classes)``.

    Categorical outputs answer one question. Each Bernoulli output z answers one of its own, with the logits 0 and z.
    """
    if likelihood == "bernoulli":
        return torch.stack([torch.zeros_like(outputs), outputs], 2)
    return outputs[:, None]


@_some_rows_at_a_time
def divergence(new: Tensor, old: Tensor, likelihood: Likelihood) -> Tensor:
    """Compute ``KL(new ‖ old)`` of every example's predictive distributions, in nats.

    ``Σ_y p′_y (log p′_y − log p_y)`` for categorical logits; the sum of that over independent yes/no questions
    for Bernoulli ones; ``½‖new − old‖²`` for Gaussian means of unit variance. Outputs are ``(b, C)`` of any floating
    dtype, the KL ``(b,)`` float64 ≥ 0; it is not finite where ``new`` is not.
    """
    new, old = new.double(), old.double()
    if likelihood == "gaussian":
        return (new - old).square().sum(1) / 2
    log_new, log_old = (torch.log_softmax(_by_question(outputs, likelihood), 2) for outputs in (new, old))
    return (log_new.exp() * (log_new - log_old)).sum((1, 2)).clamp_min(0)


@_some_rows_at_a_time
def curvature(logits: Tensor, change: Tensor, likelihood: Likelihood) -> Tensor:
    """Compute ``uᵀ S u`` with S the Fisher of the outputs and u their change: twice the KL to second order.

    S is ``diag p − ppᵀ``, ``diag p(1−p)`` or the identity. Logits and change, for example ``J_i v``, are ``(b, C)``,
    the result ``(b,)`` float64 ≥ 0.
    """
    logits, u = logits.double(), change.double()
    if likelihood == "gaussian":
        return u.square().sum(1)
    p, u = torch.softmax(_by_question(logits, likelihood), 2), _by_question(u, likelihood)
    return (p * (u - (p * u).sum(2, keepdim=True)).square()).sum((1, 2))


def surprise(logits: Tensor, likelihood: Likelihood) -> Tensor:
    """Compute −log p(ŷ|x) ``(b,)`` of the prediction ŷ, with its graph: the diagonal perturbation follows its gradient.

    For Gaussian outputs ŷ is the mean itself and the gradient would vanish; ½‖outputs‖² is used instead, whose
    gradient is the direction in which the outputs grow.
    """
    if likelihood == "gaussian":
        return logits.square().sum(1) / 2
    return -torch.log_softmax(_by_question(logits, likelihood), 2).amax(2).sum(1)


def flipped(new: Tensor, old: Tensor, likelihood: Likelihood) -> Tensor:
    """Mark with 1 where the predicted class changed, ``(b,)`` float64.

    Bernoulli outputs give the share of answers that changed, Gaussian outputs nan.
    """
    if likelihood == "gaussian":
        return _unknown(new)
    before, after = (_by_question(outputs, likelihood).argmax(2) for outputs in (old, new))
    return (before != after).double().mean(1)


def _unknown(outputs: Tensor) -> Tensor:
    return torch.full((len(outputs),), torch.nan, dtype=torch.float64, device=outputs.device)


# ---- predictions and labels --------------------------------------------------------------------------------------


def n_classes(n_outputs: int, likelihood: Likelihood) -> int | None:
    """Return the number of classes that a label chooses from; None where a label is no class.

    Categorical outputs are one class each. One Bernoulli output stands for two, 0 and 1; several Bernoulli outputs, and
    Gaussian ones, have no single class for each example.
    """
    if likelihood == "bernoulli":
        return 2 if n_outputs == 1 else None
    return None if likelihood == "gaussian" else n_outputs


def correct(logits: Tensor, labels: Tensor, likelihood: Likelihood) -> Tensor:
    """Mark with 1 where the prediction is the label, else 0, ``(b,)`` float64; nan where there is no class to compare.

    Labels ``(b,)`` are negative where they are unknown.
    """
    if n_classes(logits.shape[1], likelihood) is None:
        return _unknown(logits)
    predicted = _by_question(logits, likelihood)[:, 0].argmax(1)
    return torch.where(labels < 0, torch.nan, (predicted == labels).double())


@_some_rows_at_a_time
def log_probability(logits: Tensor, labels: Tensor, likelihood: Likelihood) -> Tensor:
    """Compute the log-probability of the label, ``(b,)`` float64; nan where it is unknown or no class."""
    n = n_classes(logits.shape[1], likelihood)
    if n is None:
        return _unknown(logits)
    known = (labels >= 0) & (labels < n)
    log_p = torch.log_softmax(_by_question(logits.double(), likelihood)[:, 0], 1)
    return torch.where(known, log_p.gather(1, torch.where(known, labels, 0)[:, None])[:, 0], torch.nan)


# ---- the derivative along a direction --------------------------------------------------------------------------


class Derivative:
    """The change of a model's outputs along a direction in parameter space, ``u = J v``.

    One Jacobian-vector product in forward mode, exact. If an operation of the model has no forward-mode derivative, a
    central difference of the outputs, ``(f(θ+εv) − f(θ−εv)) / 2ε``, with ε chosen so that the outputs change by a small
    share of their size.

    Attributes:
        method: ``"forward mode"`` or ``"central differences"``.
    """

    def __init__(self, model: nn.Module, weights: Weights, call: Callable[[nn.Module, Batch], Tensor]) -> None:
        self._model, self._weights, self._call = model, weights, call
        self._called = CalledModel(model, call)
        self.method = "forward mode"

    def along(self, direction: TensorsByName, slices: Iterable[BatchSlice]) -> Iterator[tuple[BatchSlice, Tensor]]:
        """Compute u on the whole batch of each slice, ``(b, C)``."""
        step = 0.0
        for one in slices:
            change = self._forward_mode(one.batch, direction) if self.method == "forward mode" else None
            if change is None:
                self.method = "central differences"
                step = step or self._difference_step(one.batch, direction)
                change = self._difference(one.batch, direction, step)
            yield one, change

    def _outputs(self, batch: Batch) -> Tensor:
        with torch.no_grad():
            return self._call(self._model, batch).detach()

    def _forward_mode(self, batch: Batch, direction: TensorsByName) -> Tensor | None:
        """``J v`` of a batch, or None if the model has no forward-mode derivative.

        Raises:
            RuntimeError: The memory does not suffice.
        """
        tensors = dict(self._model.named_parameters(remove_duplicate=False))
        at = {f"model.{name}": tensors[name].detach() for name in direction}
        along = {f"model.{name}": part.to(tensors[name].dtype) for name, part in direction.items()}
        try:
            # The other kernels of attention have no forward-mode derivative.
            with sdpa_kernel(SDPBackend.MATH), warnings.catch_warnings(), torch.inference_mode(False), torch.no_grad():
                warnings.simplefilter("ignore", DeprecationWarning)  # torch's own, about torch.jit
                return jvp(lambda moved: functional_call(self._called, moved, (batch,)), (at,), (along,))[1].detach()
        except (NotImplementedError, RuntimeError) as error:  # ModelError is a RuntimeError too
            if is_out_of_memory(error):
                raise
            return None

    def _difference(self, batch: Batch, direction: TensorsByName, step: float) -> Tensor:
        with self._weights.at(direction, step):
            ahead = self._outputs(batch).double()
        with self._weights.at(direction, -step):
            return (ahead - self._outputs(batch).double()) / (2 * step)

    def _difference_step(self, batch: Batch, direction: TensorsByName) -> float:
        own = self._outputs(batch)
        share = DIFFERENCE.get(next(iter(self._model.parameters())).dtype, 2e-2)
        aim = share * max(1e-3, float(own.double().square().mean().sqrt()))
        step = 1e-3
        for _ in range(12):
            size = float((self._difference(batch, direction, step) * step).square().mean().sqrt())
            if not np.isfinite(size):
                step /= 100
            elif size == 0:
                step *= 100
            elif 0.2 < size / aim < 5:
                return step
            else:
                step *= float(np.clip(aim / size, 1e-3, 1e3))
        return step
