"""Stage 4a of the pipeline: move the weights along components, and measure what changes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from tqdm import tqdm

from npeff.components.components import Components
from npeff.components.strategies import Strategy
from npeff.errors import ArgumentError
from npeff.fishers.options import Likelihood
from npeff.perturbation.directions import (
    ComponentDirections,
    Target,
    needed_vectors,
    random_direction,
    target_of,
)
from npeff.perturbation.effect import CONTROLS, Control, Curve, Effect
from npeff.perturbation.evaluate import Evaluator, evaluator_for
from npeff.perturbation.figures import ExampleSets, Measured, mean_figure, perplexity
from npeff.perturbation.options import FLOOR, Combine, Forward, PerturbOptions, Reject, Signs
from npeff.perturbation.steps import DirectionSteps, search_steps
from npeff.perturbation.weights import TensorsByName

Array = npt.NDArray[Any]

NEAR_ZERO = 0.01
"""A coefficient up to this share of the top examples' mean counts as none."""


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
    lam: float | Sequence[float] | None = None,
    fisher: Mapping[str, torch.Tensor] | Array | None = None,
    floor: float = FLOOR,
    n_random: int = 8,
    curve: int = 8,
    unrelated: Iterable[Any] | None = None,
    prompts: int | str | Sequence[str] | None = None,
    n_tokens: int = 20,
    confidence: float = 0.95,
    n_resamples: int = 999,
    forward: Forward | None = None,
    likelihood: Likelihood | None = None,
    device: torch.device | str | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Effect:
    """Move the model's weights along a component, and measure what this does to its outputs.

    Low-rank: ``θ ± δ g_j`` with g_j of unit norm, in the Fisher's own space. Diagonal: the Fisher-weighted
    interpolation between θ and ``θ ± δ·sign(∇)``, see :func:`npeff.perturbation.interpolation`. A component that
    stands for a behaviour of the model changes the outputs on its own top examples more than on others, and more
    than a random direction does (Matena & Raffel 2023, §4; docs/perturbation).

    The model is used in place and left bit for bit as it was, also after an exception: weights, buffers, training
    mode, gradient flags.

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
        lam: λ of a diagonal interpolation, or several; by default 0.1, 0.3, 0.5, 0.7, 0.9. Of those that reach
            the target the one that moves the weights least is kept.
        fisher: f̄ of a diagonal interpolation: parameter-shaped tensors from :func:`npeff.mean_fisher`, or
            ``(m,)``; by default the mean over the measured examples.
        floor: Least value of f̄ at unit norm, 1e-6.
        n_random: Random directions per control, 8.
        curve: Points per sign of KL against the magnitude, 8, from a quarter to twice the magnitude found.
        unrelated: Data that has nothing to do with the component: batches with labels, or, where ``data`` has a
            tokenizer, texts (a list, or the path of a file), whose every next token is a label. Its perplexity is
            measured at every step, beside that of the model's own weights.
        prompts: A text, or several, that a language model continues with the component as it is, turned down and
            turned up; or how many of the top examples' texts. The data has the tokenizer, as
            :class:`npeff.language.Places` does.
        n_tokens: Tokens of a continuation at most, 20.
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
        ArgumentError: An option has a wrong value, the model does not have the components' parameters, or there is
            no such component.
        DataError: The data is not that of the Fishers, or too short, or the outputs are not finite.
        ModelError: The model fails, or is in training mode with layers whose outputs depend on the mode.
    """
    options = PerturbOptions.checked(components, PerturbOptions.among(locals()))
    (target,), rows = _targets(model, data, components, [j], options)
    with (
        evaluator_for(model, data, components, rows, options) as evaluator,
        tqdm(total=1, desc="Perturb", disable=not progress) as bar,
    ):
        effect = measure_effect(evaluator, ComponentDirections(components), target, options)
        bar.update()
    return effect


def perturb_all(
    model: nn.Module,
    data: Iterable[Any],
    components: Components,
    which: Iterable[int | Strategy] | None = None,
    **options: Any,
) -> list[Effect]:
    """Perturb many components as :func:`perturb` does, with one reading of the data and one baseline.

    Args:
        model: As for :func:`perturb`.
        data: As for :func:`perturb`.
        components: A decomposition.
        which: Components or strategies; by default all components that have coefficients.
        **options: As for :func:`perturb`.

    Returns:
        An effect per component, in order.

    Raises:
        ArgumentError: As for :func:`perturb`.
        DataError: As for :func:`perturb`.
        ModelError: As for :func:`perturb`.
    """
    checked = PerturbOptions.checked(components, options)
    if which is None:
        which = [j for j in range(components.n_components) if (components.coefficients[:, j] > 0).any()]
    targets, rows = _targets(model, data, components, which, checked)
    with evaluator_for(model, data, components, rows, checked) as evaluator:
        directions = ComponentDirections(components)
        bar = tqdm(targets, desc="Perturb", disable=not checked.progress)
        return [measure_effect(evaluator, directions, target, checked) for target in bar]


def _targets(
    model: nn.Module,
    data: Iterable[Any],
    components: Components,
    which: Iterable[int | Strategy],
    options: PerturbOptions,
) -> tuple[list[Target], Array]:
    """The targets, their vectors recovered, and the rows of their top examples and of the baseline."""
    targets = [target_of(components, j) for j in which]
    needed = needed_vectors(components, targets, options.reject)
    how = {name: getattr(options, name) for name in ("forward", "device", "progress")}
    components.ensure_vectors(needed, model, data, **how)
    tops = [options.top_rows(target.coefficient) for target in targets]
    return targets, np.concatenate([options.baseline_rows(len(components.coefficients)), *tops])


def measure_effect(
    evaluator: Evaluator, directions: ComponentDirections, target: Target, options: PerturbOptions
) -> Effect:
    """Perturb along one component or group: both signs, random controls, curve, figures.

    Args:
        evaluator: Of the top examples and the baseline.
        directions: Of all components.
        target: The component or group.
        options: As for :func:`perturb`.

    Raises:
        ArgumentError: There is no direction, or the outputs are not finite at the magnitude asked for.
    """
    components = directions.components
    sets = _example_sets(evaluator, components, target, options)
    slices = evaluator.examples.subset(sets.top)
    found = search_steps(evaluator, directions, target, options, slices, sets.baseline)
    used = found[:1] if components.kind == "diagonal" else found
    steps, kept = zip(*(_measured(evaluator, one, sets) for one in used), strict=True)
    shares, own = [step.direction.share for step in steps], evaluator.own
    measured = Measured.average(kept, shares)
    if not np.isfinite(measured.kl).all():
        raise ArgumentError(
            f"magnitude: {int((~np.isfinite(measured.kl)).sum())} examples have outputs that are not finite at "
            f"{steps[0].magnitude:.3g}; choose a smaller magnitude, or a smaller target_kl"
        )
    fishers = [evaluator.fisher_along(evaluator.tensors(step.direction)) for step in steps]
    along = [float(fisher[sets.baseline].mean()) for fisher in fishers]
    figures = sets.figures(measured).items()
    bootstrap = options.confidence, options.n_resamples
    accuracy = {"top": sets.top, "baseline": sets.baseline, "all": np.arange(len(sets.coefficient))}
    combine = "weighted sum" if components.kind == "diagonal" else options.combine
    return Effect(
        components=target.members,
        kind=components.kind,
        combine=None if len(target.members) == 1 else combine if isinstance(combine, str) else "weights",
        magnitude=float(np.dot(shares, [step.magnitude for step in steps])),
        sign=steps[0].sign if len(steps) == 1 else 0,
        target_kl=None if options.magnitude is not None else options.target_range,
        reached=all(step.results[step.sign].reached for step in steps),
        figures={name: f.interval(*bootstrap, options.seed + i) for i, (name, f) in enumerate(figures)},
        local_ratio=sets.ratio(np.tensordot(shares, fishers, 1)),
        accuracy={
            name: (mean_figure(own.correct[which]).value, mean_figure(measured.correct[which]).value)
            for name, which in accuracy.items()
        },
        perplexity=(float(perplexity(own.unrelated)), float(perplexity(measured.unrelated))),
        controls=_controls(evaluator, steps, along, options, sets) if options.n_random else {},
        sign_results=tuple(result for one in (*found[len(used) :], *steps) for result in one.results.values()),
        curve=_curve(evaluator, steps, options, sets) if options.curve else None,
        ids=evaluator.examples.ids,
        coefficient=sets.coefficient,
        kl=measured.kl,
        flipped=measured.flipped,
        label_before=own.label,
        label_after=measured.label,
        top=sets.top,
        baseline=sets.baseline,
        disjoint=sets.disjoint,
        predictions=evaluator.predictions(slices, [(step.direction, step.sign * step.magnitude) for step in steps]),
        continuations=evaluator.writer.continued(
            evaluator.weights,
            _moves(evaluator, steps, measured, sets) if options.prompts else (),
            sets.top[np.argsort(-sets.coefficient[sets.top], kind="stable")],
            evaluator.examples.ids,
            slices,
        ),
        details={
            "likelihood": evaluator.likelihood,
            "fisher_norm": float(np.dot(shares, along)),
            "fisher_norm_found_by": evaluator.derivative.method,
            "rounding": min(
                evaluator.weights.realised(evaluator.tensors(step.direction), step.sign * step.magnitude)
                for step in steps
            ),
            "directions": [
                {name: getattr(step.direction, name) for name in ("component", "share", "explained", "rejection")}
                for step in steps
            ],
            "n_random": options.n_random,
            "confidence": options.confidence,
            "seed": options.seed,
            "components_digest": components.digest,
        },
    )


def _example_sets(evaluator: Evaluator, components: Components, target: Target, options: PerturbOptions) -> ExampleSets:
    coefficient = target.coefficient[evaluator.rows]
    top = evaluator.indices(options.top_rows(target.coefficient))
    baseline = evaluator.indices(options.baseline_rows(len(target.coefficient)))
    without = coefficient[baseline] <= NEAR_ZERO * coefficient[top].mean()
    disjoint = np.setdiff1d(baseline[without], top)
    norms = components.norms[evaluator.rows].astype(np.float64)
    return ExampleSets(top, baseline, disjoint, coefficient, norms, evaluator.own.unrelated)


def _measured(evaluator: Evaluator, one: DirectionSteps, sets: ExampleSets) -> tuple[DirectionSteps, Measured]:
    """The steps along a direction with what was measured, and the measurement of the sign with the larger KL ratio."""
    tensors = evaluator.tensors(one.direction)
    measured = {sign: evaluator.measure(tensors, sign * found.magnitude) for sign, found in one.results.items()}
    kept = _larger(measured, sets)
    results = {
        sign: replace(
            one.results[sign],
            kl_top=float(of.kl[sets.top].mean()),
            kl_baseline=float(of.kl[sets.baseline].mean()),
            ratio=sets.ratio(of.kl),
            kept=sign == kept,
            label_top=mean_figure(of.label[sets.top]).value,
            perplexity=float(perplexity(of.unrelated)),
        )
        for sign, of in measured.items()
    }
    return DirectionSteps(one.direction, results, kept), measured[kept]


def _larger(measured: dict[int, Measured], sets: ExampleSets) -> int:
    """The sign with the larger KL ratio."""
    return max(measured, key=lambda sign: np.nan_to_num(sets.ratio(measured[sign].kl), nan=-np.inf, posinf=-np.inf))


def _controls(
    evaluator: Evaluator,
    steps: Sequence[DirectionSteps],
    along: Sequence[float],
    options: PerturbOptions,
    sets: ExampleSets,
) -> dict[str, Control]:
    """Measure random directions at the component's step; of each, keep the sign with the larger KL ratio.

    Each random direction is drawn once, and serves all controls.

    Args:
        evaluator: Of the examples.
        steps: The component's steps, or those of a strategy's members.
        along: The mean Fisher of the baseline along each direction.
        options: As for :func:`perturb`.
        sets: The examples that are compared.
    """
    shares, n = [step.direction.share for step in steps], options.n_random
    norms = [_tensor_norms(evaluator, step) for step in steps]
    sizes = {name: np.tile([step.magnitude for step in steps], (n, 1)) for name in CONTROLS}
    values: dict[str, dict[str, list[float]]] = {name: {} for name in CONTROLS}
    for draw in range(n):
        found: dict[str, list[Measured]] = {name: [] for name in CONTROLS}
        for q, fisher in enumerate(along):
            number = draw * len(steps) + q
            vector = random_direction(evaluator.parameters.n_parameters, options.seed, number)
            tensors = evaluator.placed(vector)
            del vector
            own = float(evaluator.random_fisher(options.seed, number, tensors)[sets.baseline].mean())
            sizes["equal_fisher_norm"][draw, q] *= np.sqrt(fisher / own) if own > 0 else 1.0
            for name in CONTROLS:  # the last one changes the direction
                for key, part in tensors.items() if name == "equal_tensor_norms" else ():
                    part.mul_(norms[q].get(key, 0.0) / (float(part.double().norm()) or 1.0))
                both = {sign: evaluator.measure(tensors, sign * sizes[name][draw, q]) for sign in options.signs}
                found[name].append(both[_larger(both, sets)])
        for name, several in found.items():
            for figure, of in sets.figures(Measured.average(several, shares)).items():
                values[name].setdefault(figure, []).append(of.value)
    bootstrap = options.confidence, options.n_resamples, options.seed
    return {
        name: Control(
            {figure: np.asarray(drawn) for figure, drawn in own.items()},
            {figure: mean_figure(drawn).interval(*bootstrap) for figure, drawn in own.items()},
            sizes[name] @ shares,
        )
        for name, own in values.items()
    }


def _tensor_norms(evaluator: Evaluator, step: DirectionSteps) -> dict[str, float]:
    """Norm of each tensor of a direction that is not zero."""
    return {name: float(part.double().norm()) for name, part in evaluator.tensors(step.direction).items()}


def _curve(evaluator: Evaluator, steps: Sequence[DirectionSteps], options: PerturbOptions, sets: ExampleSets) -> Curve:
    factors = np.geomspace(0.25, 2.0, options.curve) if options.curve > 1 else np.ones(1)
    shares = [step.direction.share for step in steps]
    sizes = np.array([[f * step.results[sign].magnitude for sign in options.signs for f in factors] for step in steps])
    signs = np.repeat(options.signs, len(factors))
    measured = [
        [
            evaluator.measure(evaluator.tensors(step.direction), sign * size)
            for sign, size in zip(signs, own, strict=True)
        ]
        for step, own in zip(steps, sizes, strict=True)
    ]
    means = np.full((5, len(signs)), np.nan)
    for p, of in enumerate(zip(*measured, strict=True)):
        average = Measured.average(of, shares)
        for i, which in enumerate((sets.top, sets.baseline, sets.disjoint)):
            if len(which):
                means[i, p] = average.kl[which].mean()
        means[3:, p] = mean_figure(average.label[sets.top]).value, perplexity(average.unrelated)
    shape = len(options.signs), len(factors)
    return Curve((shares @ sizes).reshape(shape), options.signs, *means.reshape(5, *shape))


def _moves(
    evaluator: Evaluator, steps: Sequence[DirectionSteps], measured: Measured, sets: ExampleSets
) -> list[tuple[TensorsByName, float] | None]:
    """The moves down and up, as :class:`Continuation` has them; None for one that was not asked for.

    Along the directions of a strategy the weights move together, each by its share of its own step.
    """

    def together(signs: Sequence[int]) -> tuple[TensorsByName, float]:
        sizes = [sign * step.results[sign].magnitude for sign, step in zip(signs, steps, strict=True)]
        if len(steps) == 1:
            return evaluator.tensors(steps[0].direction), sizes[0]
        total = np.zeros(evaluator.parameters.n_parameters)
        for size, step in zip(sizes, steps, strict=True):
            total += step.direction.share * size * step.direction.vector
        return evaluator.placed(total), 1.0

    signs = list(steps[0].results)
    if len(signs) == 2:
        up = [-1 if step.results[-1].label_top > step.results[1].label_top else 1 for step in steps]
        return [together([-sign for sign in up]), together(up)]
    before, after = (mean_figure(of.label[sets.top]).value for of in (evaluator.own, measured))
    rises = after > before or (math.isnan(after) and signs[0] == 1)
    only = together(signs * len(steps))
    return [None, only] if rises else [only, None]
