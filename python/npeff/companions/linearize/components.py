"""Contributions of the input to the effect of a component."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp

from npeff.batches.reading import examples_at
from npeff.companions.linearize.linear_map import Forward, linearize, model_output
from npeff.companions.linearize.recording import Frozen, plain_operations
from npeff.components.components import Components
from npeff.errors import ArgumentError, DataError
from npeff.fishers.factors import check_meaning
from npeff.fishers.options import Likelihood
from npeff.gradients.fallback import CalledModel
from npeff.perturbation.outputs import curvature
from npeff.short_repr import short_repr

TARGET = 0.05
"""Mean predicted divergence, in nats, of the default magnitude."""

Array = npt.NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class ComponentAttribution:
    """The contributions of n inputs to the change of outputs when the weights move by δ along component j.

    Attributes:
        component: j.
        magnitude: δ.
        maps: ``(n, *s)`` the contribution of each number of each input; with ``bias`` they sum to ``change``.
        bias: ``(n,)`` the contribution of the change of the constants.
        change: ``(n,)`` the change of the chosen output, or the size of the change of all outputs.
        outputs: ``(n, C)`` the change of each output, F(x; θ + δ·g_j) − F(x; θ).
        sensitivity: ``(n,)`` ‖A_i g_j‖, the same size per unit of δ for infinitesimal δ; the
            coefficient of example i on component j is fitted to its square.
        frozen: The parts that are not piecewise linear and were held, in either model; empty where all is exact.
    """

    component: int
    magnitude: float
    maps: Tensor
    bias: Tensor
    change: Tensor
    outputs: Tensor
    sensitivity: Tensor
    frozen: tuple[Frozen, ...]

    __repr__ = short_repr

    def residual(self) -> float:
        """Compute the largest |Σ maps + bias − change|, over the largest |change|."""
        total = self.maps.double().flatten(1).sum(1) + self.bias.double()
        largest = float(self.change.abs().max())
        gap = float((total - self.change.double()).abs().max())
        return gap / largest if largest else gap


def attribute_component(
    model: nn.Module,
    components: Components,
    j: int,
    inputs: Tensor,
    magnitude: float | None = None,
    output: int | None = None,
    *,
    data: Iterable[Any] | None = None,
    smooth: Literal["refuse", "freeze"] = "refuse",
    forward: Forward | None = None,
) -> ComponentAttribution:
    """Attribute the effect of moving the weights along component j to the inputs.

    With the affine maps W, b of the model at x and W', b' of the model with weights θ + δ·g_j at x, each with its own
    activation pattern,

        F(x; θ + δ·g_j) − F(x; θ) = (W' − W)·x + (b' − b),

    so the map is ``((W' − W)ᵀv) ∘ x`` and the bias part ``vᵀ(b' − b)``. By default v makes ``vᵀΔF`` the size of the
    change as the Fisher measures it, √(ΔFᵀ M ΔF), with M = diag p − ppᵀ for class probabilities p:
    v = M·ΔF / √(ΔFᵀ M ΔF).

    Args:
        model: The model that the components are of, in evaluation mode; left as it was.
        components: A decomposition.
        j: A component.
        inputs: ``(n, *s)`` floats, such as the component's top examples.
        magnitude: δ, either sign: the sign of g_j is arbitrary in the low-rank kind. By default positive, and such that
            the divergence from the model's predictions, ½δ²‖A_i g_j‖², has the mean 0.05 nats.
        output: Attribute the change of this output alone.
        data: The data of the Fishers, to recover the component's vector with where it is not known
            (:meth:`npeff.Components.state_dict`).
        smooth: As for :func:`npeff.companions.linearize.linearize`.
        forward: ``callable(model, inputs) -> (n, C)``, where ``model(inputs)`` is not enough.

    Returns:
        Maps, bias parts and changes.

    Raises:
        ArgumentError: The components are of another model, an argument is not as described, or the component's vector
            has to be recovered and ``data`` is not given.
        DataError: The component does not move the outputs on these inputs, or ``data`` is not that of the Fishers.
        ModelError: See :func:`npeff.companions.linearize.linearize`.
    """
    direction = _direction(model, components, j, data)
    if magnitude is not None and not (isinstance(magnitude, (int, float)) and math.isfinite(magnitude) and magnitude):
        raise ArgumentError(f"magnitude: expected a finite number other than 0, got {magnitude!r}")
    called = CalledModel(model, forward or (lambda model, x: model(x)))
    before = linearize(model, inputs, smooth=smooth, batched=True, forward=forward)
    if output is not None and not -before.output.shape[1] <= output < before.output.shape[1]:
        raise ArgumentError(f"output: expected a position below {before.output.shape[1]}, got {output!r}")
    likelihood = components.provenance.get("fishers", {}).get("options", {}).get("likelihood", "categorical")
    if likelihood == "probabilities":
        # The same Fisher in the logits, where forward= gives these.
        check_meaning(before.output, "categorical")
        likelihood = "categorical"
    slope = _directional_derivative(called, direction, before.x)
    _, sensitivity = _metric(before.output, slope, likelihood)
    if magnitude is None:
        mean = float(sensitivity.square().mean())
        if not mean > 0:
            raise DataError(f"inputs: component {j} does not move the outputs on any of them")
        magnitude = math.sqrt(2 * TARGET / mean)
    named = dict(model.named_parameters())
    moved = {f"model.{name}": named[name].detach() + magnitude * step for name, step in direction.items()}
    after = linearize(
        model, inputs, smooth=smooth, batched=True, forward=lambda _, x: functional_call(called, moved, (x,))
    )
    changes = after.output - before.output
    weighted, size = _metric(before.output, changes, likelihood)
    v = torch.where(size[:, None] > 0, weighted / size[:, None].clamp_min(1e-300), 0).to(changes)
    if output is not None:
        v = torch.zeros_like(changes)
        v[:, output] = 1
    return ComponentAttribution(
        component=int(j),
        magnitude=float(magnitude),
        maps=(after.rmatvec(v) - before.rmatvec(v)) * before.x,
        bias=(v * (after.b - before.b)).sum(1),
        change=(v * changes).sum(1),
        outputs=changes,
        sensitivity=sensitivity.to(changes),
        frozen=tuple(dict.fromkeys((*before.frozen, *after.frozen))),
    )


def attribute_top_examples(
    model: nn.Module,
    components: Components,
    data: Iterable[Any],
    which: Sequence[int] | None = None,
    k: int = 4,
    *,
    embed: Forward | None = None,
    forward: Forward | None = None,
    smooth: Literal["refuse", "freeze"] = "refuse",
) -> dict[tuple[int, int], Array]:
    """Attribute components to the inputs of their top examples, for ``attributions=`` of :func:`npeff.report`.

    :func:`attribute_component` on each component's k top examples: the contribution of each number of the input to the
    size of the outputs' change. Vectors that are not known are recovered first, in one pass over the data; for Fishers
    that had a ``forward`` of their own, call :meth:`npeff.Components.recover` beforehand.

    Args:
        model: The model that the components are of, in evaluation mode.
        components: A decomposition.
        data: The data whose Fishers were decomposed.
        which: Components; by default all.
        k: Top examples of each; those with a coefficient of 0 are left out.
        embed: ``callable(model, inputs) -> (1, t, d)`` floats for one example, where the inputs are tokens: then these
            are attributed, and summed over d, a number per token. The attribution covers the paths through
            ``forward``; a change of the embedding itself, where the components have one, is left out.
        forward: ``callable(model, inputs) -> (n, C)``; with ``embed`` its result takes the place of the inputs.
        smooth: As for :func:`npeff.companions.linearize.linearize`.

    Returns:
        ``(component, index of the example)`` → float32 array of the input's shape, or ``(t,)`` with ``embed``.

    Raises:
        ArgumentError: See :func:`attribute_component`; or ``embed`` without ``forward``.
        DataError: The data ends before the top examples; or see :func:`attribute_component`.
        ModelError: See :func:`npeff.companions.linearize.linearize`.
    """
    if embed is not None and forward is None:
        raise ArgumentError(
            "forward: embed= needs forward=callable(model, embedded) -> (1, C), what the model does next"
        )
    chosen = range(components.n_components) if which is None else which
    components.ensure_vectors([int(j) for j in chosen], model, data)
    W = components.coefficients
    tops = {int(j): [int(i) for i in components.top_examples(int(j), k) if W[i, int(j)] > 0] for j in chosen}
    wanted = sorted({i for indices in tops.values() for i in indices})
    device = next(iter(model.parameters())).device
    batches = examples_at(data, components.ids[wanted].tolist(), device)
    inputs = {i: _inputs(model, batch.inputs, embed) for i, batch in zip(wanted, batches, strict=True)}
    found: dict[tuple[int, int], Array] = {}
    for j, indices in tops.items():
        # examples of one shape together, so that a picture costs one pass; texts differ in length
        groups: dict[tuple[int, ...], list[int]] = {}
        for i in indices:
            groups.setdefault(tuple(inputs[i].shape), []).append(i)
        for members in groups.values():
            x = torch.cat([inputs[i] for i in members])
            maps = attribute_component(model, components, j, x, smooth=smooth, forward=forward).maps
            maps = maps.sum(-1) if embed is not None else maps
            found |= {(j, i): row.float().cpu().numpy() for i, row in zip(members, maps, strict=True)}
    return found


def _direction(model: nn.Module, components: Components, j: int, data: Iterable[Any] | None) -> dict[str, Tensor]:
    """Get g_j by parameter, on the model's device.

    Raises:
        ArgumentError: The model has no such parameters, or the vector is not known.
    """
    named = dict(model.named_parameters()) if isinstance(model, nn.Module) else {}
    direction = {}
    for name, step in components.state_dict(j, model, data).items():
        if name not in named or named[name].shape != step.shape:
            found = f"{tuple(named[name].shape)}" if name in named else "none of that name"
            raise ArgumentError(
                f"components: their parameter {name} has shape {tuple(step.shape)}, the model has {found}; pass the "
                "model that the Fishers were computed with"
            )
        direction[name] = step.to(named[name])
    return direction


def _directional_derivative(called: CalledModel, direction: dict[str, Tensor], x: Tensor) -> Tensor:
    """Compute J_i g for each example, ``(n, C)``, in forward mode."""
    named = dict(called.model.named_parameters())
    at = {f"model.{name}": named[name].detach() for name in direction}
    along = {f"model.{name}": step for name, step in direction.items()}

    def outputs(weights: dict[str, Tensor]) -> Tensor:
        run = lambda _, given: functional_call(called, weights, (given,))  # noqa: E731
        return model_output(called.model, x.clone(), run).flatten(1)

    with plain_operations(called.model):  # fused layers have no forward mode
        return jvp(outputs, (at,), (along,))[1]


def _metric(logits: Tensor, change: Tensor, likelihood: Likelihood) -> tuple[Tensor, Tensor]:
    """Compute M·ΔF ``(n, C)`` and √(ΔFᵀ M ΔF) ``(n,)`` in float64, M the Fisher of the outputs."""
    with torch.inference_mode(False), torch.enable_grad():
        u = change.detach().double().clone().requires_grad_()
        squared = curvature(logits.detach(), u, likelihood)
        half_gradient = torch.autograd.grad(squared.sum() / 2, u)[0]
    return half_gradient, squared.detach().clamp_min(0).sqrt()


def _inputs(model: nn.Module, given: Any, embed: Forward | None) -> Tensor:
    """Return the numbers of one example that are attributed to, ``(1, *s)`` floats.

    Raises:
        DataError: There is no floating-point tensor to attribute to.
    """
    if embed is not None:
        with torch.no_grad():
            given = embed(model, given)
    if isinstance(given, (tuple, list)) and len(given) == 1:
        given = given[0]
    if not isinstance(given, Tensor) or not given.is_floating_point():
        kind = str(given.dtype) if isinstance(given, Tensor) else type(given).__name__
        raise DataError(
            f"data: expected inputs that are a floating-point tensor, got {kind}; for tokens pass "
            "embed=callable(model, inputs) -> (1, t, d) and forward="
        )
    return given.detach()
