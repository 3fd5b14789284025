"""Stage 4a of the pipeline: move the weights along components, and measure what changes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
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
from npeff.perturbation.directions import ComponentDirections, Target, random_direction
from npeff.perturbation.effect import CONTROLS, Control, Curve, Effect
from npeff.perturbation.evaluate import Evaluator
from npeff.perturbation.figures import ExampleSets, Measured, interval, mean_known, perplexity
from npeff.perturbation.options import FLOOR, Combine, Forward, PerturbOptions, Reject, Signs, among
from npeff.perturbation.steps import DirectionSteps, check_kl, experiment, search_steps
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
        j: A component, or a strategy: a group of ``components.strategies(n)``. Its root, which holds all
            components, gives a warning.
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
        baseline: What they are compared with: a random sample of 4096 of all examples, top ones among them (all,
            where there are fewer), another number, ``"all"``, or rows of ``components.coefficients``.
        lam: λ of a diagonal interpolation, or several; by default 0.1, 0.3, 0.5, 0.7, 0.9. Of those that reach
            the target the one that moves the weights least is kept. Where the magnitude is given, 0.5 by default.
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
    options = PerturbOptions.checked(components, among(PerturbOptions, locals()))
    with (
        experiment(model, data, components, [j], options) as (evaluator, (target,)),
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
    if isinstance(which, Strategy) or not isinstance(which, Iterable):
        raise ArgumentError(
            f"which: expected a list of components or strategies, got {which!r}; for the groups of a tree, "
            "list(components.strategies(n))"
        )
    with experiment(model, data, components, which, checked) as (evaluator, targets):
        directions = ComponentDirections(components)
        bar = tqdm(targets, desc="Perturb", disable=not checked.progress)
        return [measure_effect(evaluator, directions, target, checked) for target in bar]


@dataclass(frozen=True, eq=False)
class DirectionEffect(DirectionSteps):
    """The effect of moving along one direction.

    Attributes:
        sign: The sign with the larger KL ratio.
        measured: With that sign.
        fisher: ``(n,)`` vᵀF_i v of every example.
        tensor_norms: Norm of the direction's part in each tensor that it touches.
        rounding: Norm of the change of the weights after rounding to their dtype, over the norm asked for.
        sizes: ``(s · p,)`` the magnitudes of the curve, those of one sign after those of the other.
        curve: At these magnitudes.
    """

    sign: int
    measured: Measured
    fisher: Array
    tensor_norms: dict[str, float]
    rounding: float
    sizes: Array
    curve: list[Measured]

    @property
    def magnitude(self) -> float:
        """The step of the chosen sign."""
        return self.results[self.sign].magnitude


def measure_effect(
    evaluator: Evaluator, directions: ComponentDirections, target: Target, options: PerturbOptions
) -> Effect:
    """Perturb along one component or group: both signs, random controls, curve, figures."""
    components = directions.components
    sets = _example_sets(evaluator, components, target, options)
    slices = evaluator.examples.subset(sets.top)
    largest_first = sets.top[np.argsort(-sets.coefficient[sets.top], kind="stable")]
    found = search_steps(evaluator, directions, target, options, slices, sets.baseline)
    used = found[:1] if components.kind == "diagonal" else found
    moves = [_along(evaluator, one, options, sets) for one in used]
    shares, own = [move.direction.share for move in moves], evaluator.own
    measured = Measured.average([move.measured for move in moves], shares)
    check_kl(measured.kl, moves[0].magnitude)
    levels = options.confidence, options.n_resamples, options.seed
    accuracy = {"top": sets.top, "baseline": sets.baseline, "all": np.arange(len(sets.coefficient))}
    combine = "weighted sum" if components.kind == "diagonal" else options.combine
    return Effect(
        components=target.members,
        kind=components.kind,
        combine=None if len(target.members) == 1 else combine if isinstance(combine, str) else "weights",
        magnitude=float(np.dot(shares, [move.magnitude for move in moves])),
        sign=moves[0].sign if len(moves) == 1 else 0,
        target_kl=None if options.magnitude is not None else options.target_range,
        reached=all(move.results[move.sign].reached for move in moves),
        figures=sets.figures(measured, levels),
        local_ratio=sets.ratio(np.tensordot(shares, [move.fisher for move in moves], 1)),
        accuracy={
            name: (mean_known(own.correct[which]), mean_known(measured.correct[which]))
            for name, which in accuracy.items()
        },
        perplexity=(float(perplexity(own.unrelated)), float(perplexity(measured.unrelated))),
        controls=_controls(evaluator, moves, options, sets) if options.n_random else {},
        sign_results=tuple(result for one in (*found[len(used) :], *moves) for result in one.results.values()),
        curve=_curve(moves, options, sets) if options.curve else None,
        ids=evaluator.examples.ids,
        coefficient=sets.coefficient,
        kl=measured.kl,
        flipped=measured.flipped,
        label_before=own.label,
        label_after=measured.label,
        top=sets.top,
        baseline=sets.baseline,
        disjoint=sets.disjoint,
        predictions=evaluator.predictions(
            largest_first, slices, [(move.direction, move.sign * move.magnitude) for move in moves]
        ),
        continuations=evaluator.writer.continued(
            evaluator.weights,
            _changes(evaluator, moves, measured, sets) if options.prompts else (),
            largest_first,
            evaluator.examples.ids,
            slices,
        ),
        details={
            "likelihood": evaluator.likelihood,
            "fisher_norm": float(np.dot(shares, [move.fisher[sets.baseline].mean() for move in moves])),
            "fisher_norm_found_by": evaluator.derivative.method,
            "rounding": min(move.rounding for move in moves),
            "directions": [
                {name: getattr(move.direction, name) for name in ("component", "share", "explained", "rejection")}
                for move in moves
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


def _along(evaluator: Evaluator, one: DirectionSteps, options: PerturbOptions, sets: ExampleSets) -> DirectionEffect:
    """Measure the effect along one direction, with each sign and at each point of the curve."""
    tensors, steps = evaluator.tensors(one.direction), {sign: found.magnitude for sign, found in one.results.items()}
    measured = {sign: evaluator.measure(tensors, sign * step) for sign, step in steps.items()}
    kept = _larger(measured, sets)
    results = {
        sign: replace(
            one.results[sign],
            kl_top=float(of.kl[sets.top].mean()),
            kl_baseline=float(of.kl[sets.baseline].mean()),
            ratio=sets.ratio(of.kl),
            kept=sign == kept,
            label_top=mean_known(of.label[sets.top]),
            perplexity=float(perplexity(of.unrelated)),
        )
        for sign, of in measured.items()
    }
    factors = np.geomspace(0.25, 2.0, options.curve) if options.curve != 1 else np.ones(1)
    points = [(sign, factor * step) for sign, step in steps.items() for factor in factors]
    return DirectionEffect(
        direction=one.direction,
        results=results,
        sign=kept,
        measured=measured[kept],
        fisher=evaluator.fisher_along(tensors),
        tensor_norms={name: float(part.double().norm()) for name, part in tensors.items()},
        rounding=evaluator.weights.realised(tensors, kept * steps[kept]),
        sizes=np.array([size for _, size in points]),
        curve=[evaluator.measure(tensors, sign * size) for sign, size in points],
    )


def _larger(measured: Mapping[int, Measured], sets: ExampleSets) -> int:
    """The sign with the larger KL ratio."""
    return max(measured, key=lambda sign: np.nan_to_num(sets.ratio(measured[sign].kl), nan=-np.inf, posinf=-np.inf))


def _controls(
    evaluator: Evaluator, moves: Sequence[DirectionEffect], options: PerturbOptions, sets: ExampleSets
) -> dict[str, Control]:
    """Measure random directions at the component's step; of each, keep the sign with the larger KL ratio.

    Each random direction is drawn once, and serves all controls.
    """
    shares, n = [move.direction.share for move in moves], options.n_random
    sizes = {name: np.tile([move.magnitude for move in moves], (n, 1)) for name in CONTROLS}
    values: dict[str, dict[str, list[float]]] = {name: {} for name in CONTROLS}
    for draw in range(n):
        found: dict[str, list[Measured]] = {name: [] for name in CONTROLS}
        for q, move in enumerate(moves):
            number = draw * len(moves) + q
            tensors = evaluator.placed(random_direction(evaluator.parameters.n_parameters, options.seed, number))
            own = float(evaluator.random_fisher(options.seed, number, tensors)[sets.baseline].mean())
            sizes["equal_fisher_norm"][draw, q] *= np.sqrt(move.fisher[sets.baseline].mean() / own) if own > 0 else 1.0
            for name in CONTROLS:  # the last one changes the direction
                for key, part in tensors.items() if name == "equal_tensor_norms" else ():
                    part.mul_(move.tensor_norms.get(key, 0.0) / (float(part.double().norm()) or 1.0))
                both = {sign: evaluator.measure(tensors, sign * sizes[name][draw, q]) for sign in options.signs}
                found[name].append(both[_larger(both, sets)])
        for name, several in found.items():
            for figure, of in sets.figures(Measured.average(several, shares)).items():
                values[name].setdefault(figure, []).append(of.value)
    levels = options.confidence, options.n_resamples, options.seed
    return {
        name: Control(
            {figure: np.asarray(drawn) for figure, drawn in own.items()},
            {figure: interval(np.mean, _finite(drawn), levels=levels) for figure, drawn in own.items()},
            sizes[name] @ shares,
        )
        for name, own in values.items()
    }


def _finite(values: Sequence[float]) -> Array:
    return np.asarray(values)[np.isfinite(values)]


def _curve(moves: Sequence[DirectionEffect], options: PerturbOptions, sets: ExampleSets) -> Curve:
    shares, shape = [move.direction.share for move in moves], (len(options.signs), options.curve)
    means = np.full((5, len(moves[0].sizes)), np.nan)
    for p, of in enumerate(zip(*(move.curve for move in moves), strict=True)):
        average = Measured.average(of, shares)
        for i, which in enumerate((sets.top, sets.baseline, sets.disjoint)):
            if len(which):
                means[i, p] = average.kl[which].mean()
        means[3:, p] = mean_known(average.label[sets.top]), perplexity(average.unrelated)
    sizes = np.tensordot(shares, [move.sizes for move in moves], 1)
    return Curve(sizes.reshape(shape), options.signs, *means.reshape(5, *shape))


def _changes(
    evaluator: Evaluator, moves: Sequence[DirectionEffect], measured: Measured, sets: ExampleSets
) -> list[tuple[TensorsByName, float] | None]:
    """The changes down and up, as :class:`Continuation` has them; None for one that was not asked for.

    Along the directions of a strategy the weights move together, each by its share of its own step.
    """

    def together(signs: Sequence[int]) -> tuple[TensorsByName, float]:
        if len(moves) == 1:
            return evaluator.tensors(moves[0].direction), signs[0] * moves[0].results[signs[0]].magnitude
        total = np.zeros(evaluator.parameters.n_parameters)
        for sign, move in zip(signs, moves, strict=True):
            total += move.direction.share * sign * move.results[sign].magnitude * move.direction.vector()
        return evaluator.placed(total), 1.0

    signs = list(moves[0].results)
    if len(signs) == 2:
        up = [-1 if move.results[-1].label_top > move.results[1].label_top else 1 for move in moves]
        return [together([-sign for sign in up]), together(up)]
    before, after = (mean_known(of.label[sets.top]) for of in (evaluator.own, measured))
    rises = after > before or (math.isnan(after) and signs[0] == 1)
    only = together(signs * len(moves))
    return [None, only] if rises else [only, None]
