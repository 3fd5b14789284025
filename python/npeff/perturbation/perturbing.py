"""Stage 4a of the pipeline: move the weights along a component, and measure what changes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from tqdm import tqdm

from npeff.components.components import Components
from npeff.components.strategies import Strategy
from npeff.gradients.factors import Likelihood
from npeff.perturbation.directions import Reject
from npeff.perturbation.effect import Effect
from npeff.perturbation.experiment import experiment
from npeff.perturbation.merging import FLOOR
from npeff.perturbation.opening import checked_options, opened
from npeff.perturbation.options import Combine, Options, Signs, baseline_rows, top_rows
from npeff.perturbation.session import Forward
from npeff.perturbation.subjects import needed_vectors, subject_of

Array = npt.NDArray[Any]


def perturb(
    model: nn.Module,
    data: Iterable[Any],
    components: Components,
    j: int | Strategy,
    *,
    magnitude: float | None = None,
    target_kl: float | tuple[float, float] = 0.1,
    sign: Signs = "both",
    combine: Combine = "each",
    reject: Reject | None = None,
    max_sim: float | None = None,
    top: int | Sequence[int] | Array = 32,
    baseline: int | Literal["all"] | Sequence[int] | Array = 4096,
    mix: float | Sequence[float] | None = None,
    fisher: Mapping[str, torch.Tensor] | Array | None = None,
    floor: float = FLOOR,
    n_random: int = 8,
    curve: int = 8,
    confidence: float = 0.95,
    n_resamples: int = 999,
    forward: Forward | None = None,
    likelihood: Likelihood | None = None,
    device: torch.device | str | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Effect:
    """Move the model's weights along a component, and measure what that does to its outputs.

    Low-rank: ``θ ± δ g_j`` with g_j of unit norm, in the Fisher's own space. Diagonal: the Fisher-weighted
    interpolation between θ and ``θ ± δ·sign(∇)``, see :func:`npeff.perturbation.interpolation`. A component that
    is about a behaviour of the model changes its outputs on its own top examples more than on others, and more
    so than a random direction does (Matena & Raffel 2023, §4; docs/perturbation).

    The model is used as it is, and left bit for bit as it was, whatever happens: weights, buffers, training
    mode, gradients' flags.

    Args:
        model: The model that the components are of.
        data: The data that the Fishers were computed from, in the same order; it may hold more.
        components: A decomposition.
        j: A component, or a strategy of ``components.strategies()``.
        magnitude: Norm of the change of the weights; None searches for it.
        target_kl: Mean KL on the top examples to search for, 0.1 nats: a number (± 2 %) or ``(low, high)``.
        sign: ``"both"``: each sign is taken to the target, and the one with the larger KL ratio kept;
            or ``1`` or ``-1``. For diagonal components +1 makes the top examples' predictions less certain.
        combine: How a strategy's directions are used. ``"each"``: one by one, and the outcomes averaged with
            weights w_k, each member's share of the strategy's coefficients; to second order this measures
            ``½δ² tr(F_i Σ_k w_k g_k g_kᵀ)``, the group's own pseudo-Fisher, whatever the arbitrary signs of its
            vectors. ``"principal"``: the top eigenvector of ``Σ_k w_k g_k g_kᵀ``, the best single direction.
            Numbers: ``Σ_k a_k g_k``. Diagonal strategies use ``Σ_k w_k h_k``, which has no signs to choose.
        reject: ``"span"``: the orthogonal projection onto the complement of the other components' span;
            ``"sequential"``: the others one after the other, as published.
        max_sim: Reject only components with ``|cos|`` up to this; 1 for the span, 0.1 for the sequential form.
        top: The 32 examples with the largest coefficients, another number, or rows of ``components.coefficients``.
        baseline: What they are compared with: a random sample of 4096 examples (all, where there are fewer),
            another number, ``"all"``, or rows of ``components.coefficients``.
        mix: λ of a diagonal interpolation, or several; by default 0.1, 0.3, 0.5, 0.7, 0.9. Of those that reach
            the target the one that moves the weights least is kept.
        fisher: f̄ of a diagonal interpolation: parameter-shaped tensors from :func:`npeff.mean_fisher`, or
            ``(m,)``; by default the mean over the measured examples.
        floor: Least value of f̄ at unit norm, 1e-6.
        n_random: Random directions per control, 8.
        curve: Points per sign of KL against the magnitude, 8, from a quarter to twice the magnitude found.
        confidence: Level of the intervals, 0.95.
        n_resamples: Bootstrap resamples, 999; 0 for no intervals.
        forward: ``forward(model, batch) -> logits``, as for :func:`npeff.compute_fishers`.
        likelihood: What the outputs mean; by default what the Fishers were computed with.
        device: Where to compute; the model's own device by default.
        seed: Decides the sample, the random directions and the resamples.
        progress: Show a progress bar.

    Returns:
        The effect: figures with intervals, the same for random directions of equal norm and of equal Fisher norm
        ``vᵀF̄v`` (F̄ the mean Fisher of the baseline), curve, and KL of each example.

    Raises:
        ArgumentError: An option has a wrong value, the model has not the components' parameters, or there is no
            such component.
        DataError: The data is not that of the Fishers, or too short, or the outputs are not finite.
        ModelError: The model fails, or is in training mode with layers to which that matters.
    """
    given = dict(locals())
    options = {name: given[name] for name in Options.__dataclass_fields__}
    where = {name: given[name] for name in ("forward", "likelihood", "device", "progress")}
    return perturb_all(model, data, components, [j], **where, **options)[0]


def perturb_all(
    model: nn.Module,
    data: Iterable[Any],
    components: Components,
    which: Iterable[int | Strategy] | None = None,
    *,
    forward: Forward | None = None,
    likelihood: Likelihood | None = None,
    device: torch.device | str | None = None,
    progress: bool = True,
    **options: Any,
) -> list[Effect]:
    """:func:`perturb` for many components, with one reading of the data and one baseline.

    Args:
        model: As for :func:`perturb`.
        data: As for :func:`perturb`.
        components: A decomposition.
        which: Components or strategies; all components by default, those without coefficients left out.
        forward: As for :func:`perturb`.
        likelihood: As for :func:`perturb`.
        device: As for :func:`perturb`.
        progress: As for :func:`perturb`.
        **options: As for :func:`perturb`.

    Returns:
        An effect per component, in order.

    Raises:
        ArgumentError: As for :func:`perturb`.
        DataError: As for :func:`perturb`.
        ModelError: As for :func:`perturb`.
    """
    asked = checked_options(components, options)
    if which is None:
        which = [j for j in range(components.n_components) if (components.coefficients[:, j] > 0).any()]
    subjects = [subject_of(components, j) for j in which]
    components.check_recovered(needed_vectors(components, subjects, asked.reject))
    tops = [top_rows(subject.coefficient, asked.top) for subject in subjects]
    baseline = baseline_rows(len(components.coefficients), asked.baseline, asked.seed)
    digest = components.digest
    with opened(model, data, components, np.concatenate([baseline, *tops]), likelihood, forward, device) as (
        session,
        places,
    ):
        effects = []
        for subject, top in zip(tqdm(subjects, desc="Perturb", disable=not progress), tops, strict=True):
            effect = experiment(session, components, subject, asked, places, top, baseline)
            effect.details["components_digest"] = digest
            effects.append(effect)
    return effects
