"""Numbers for one perturbation: ratios of mean KL, rank correlations, accuracies, flips; and their intervals."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from npeff.perturbation.session import Measured

Array = npt.NDArray[Any]

FIGURES = {
    "ratio": "KL on top / KL on baseline",
    "disjoint_ratio": "KL on top / KL on disjoint baseline",
    "normalised_ratio": "the same of KL / ‖F‖",
    "local_ratio": "vᵀFv on top / on baseline (δ → 0)",
    "rank_correlation": "rank correlation, KL and coefficient",
    "normalised_rank_correlation": "the same of KL / ‖F‖",
    "kl_top": "mean KL on top (nats)",
    "kl_baseline": "mean KL on baseline",
    "kl_disjoint": "mean KL on disjoint baseline",
    "flipped_top": "predictions flipped, top",
    "flipped_baseline": "predictions flipped, baseline",
    "flipped_all": "predictions flipped, all",
    "accuracy_top": "accuracy after, top",
    "accuracy_baseline": "accuracy after, baseline",
    "accuracy_all": "accuracy after, all",
    "accuracy_change_top": "change of accuracy, top",
    "accuracy_change_baseline": "change of accuracy, baseline",
    "accuracy_change_all": "change of accuracy, all",
}
"""Every figure of an effect, in the order of tables, and what it is."""


@dataclass(frozen=True)
class Interval:
    """A figure and its bootstrap confidence interval; nan where there is nothing to count.

    Attributes:
        value: The figure.
        low: Lower end.
        high: Upper end.
    """

    value: float
    low: float
    high: float

    def __float__(self) -> float:
        return self.value


@dataclass(frozen=True)
class Sets:
    """Which of the n examples play which part.

    Attributes:
        top: ``(k,)`` places of the examples with the largest coefficients.
        baseline: ``(b,)`` places of what they are compared with; may share examples with the top.
        disjoint: ``(d,)`` places of baseline examples that are not in the top and have (nearly) no coefficient.
        coefficient: ``(n,)`` coefficients of all.
        norms: ``(n,)`` norms of their Fishers.
        before: ``(n,)`` 1 where the model's own prediction is the label, nan where unknown.
    """

    top: Array
    baseline: Array
    disjoint: Array
    coefficient: Array
    norms: Array
    before: Array


def ratio_of(measured: Measured, sets: Sets) -> float:
    """The published ratio: mean KL on the top examples over mean KL on the baseline's."""
    return float(_ratio(measured.kl[sets.top], measured.kl[sets.baseline]))


def figures(measured: Measured, sets: Sets, curvature: Array | None = None) -> dict[str, float]:
    """Every figure, without intervals.

    Args:
        measured: What the perturbation did.
        sets: The parts that the examples play.
        curvature: ``(n,)`` vᵀF_i v, for ``local_ratio``.

    Returns:
        A number per name in ``FIGURES``; nan where it has no meaning.
    """
    return {
        name: _value(arrays, statistic) for name, (arrays, statistic) in _recipes(measured, sets, curvature).items()
    }


def intervals(
    measured: Measured,
    sets: Sets,
    curvature: Array | None = None,
    *,
    confidence: float = 0.95,
    n_resamples: int = 999,
    seed: int = 0,
) -> dict[str, Interval]:
    """Every figure with a percentile bootstrap interval over examples (``scipy.stats.bootstrap``).

    Top and baseline are resampled independently; pairs (KL and coefficient, before and after) stay together.
    """
    found = {}
    for number, (name, (arrays, statistic)) in enumerate(_recipes(measured, sets, curvature).items()):
        value = _value(arrays, statistic)
        paired = statistic is not _ratio
        ends = _bootstrap(arrays, statistic, paired, confidence, n_resamples, seed + number)
        found[name] = Interval(value, *ends)
    return found


def of_draws(values: Sequence[float], *, confidence: float = 0.95, n_resamples: int = 999, seed: int = 0) -> Interval:
    """The mean over random draws, and its bootstrap interval."""
    known = np.asarray([v for v in values if np.isfinite(v)])
    if not len(known):
        return Interval(np.nan, np.nan, np.nan)
    return Interval(float(known.mean()), *_bootstrap((known,), _mean, True, confidence, n_resamples, seed))


def ratio_with_interval(above: Array, below: Array, confidence: float, n_resamples: int, seed: int) -> Interval:
    """Quotient of two means over the same examples, resampled together."""
    value = _ratio(above, below)
    return Interval(float(value), *_bootstrap((above, below), _ratio, True, confidence, n_resamples, seed))


Statistic = Callable[..., Any]
Recipes = dict[str, tuple[tuple[Array, ...], Statistic]]


def _recipes(measured: Measured, sets: Sets, curvature: Array | None) -> Recipes:
    kl, t, b, d = measured.kl, sets.top, sets.baseline, sets.disjoint
    relative = np.divide(kl, sets.norms, out=np.full(len(kl), np.nan), where=sets.norms > 0)
    usable = np.isfinite(relative)
    change = measured.correct - sets.before
    parts: dict[str, Any] = {"top": t, "baseline": b, "all": slice(None)}
    recipes: Recipes = {
        "ratio": ((kl[t], kl[b]), _ratio),
        "disjoint_ratio": ((kl[t], kl[d]), _ratio),
        "normalised_ratio": ((_known(relative[t]), _known(relative[b])), _ratio),
        "rank_correlation": ((kl, sets.coefficient), _spearman),
        "normalised_rank_correlation": ((relative[usable], sets.coefficient[usable]), _spearman),
        "kl_top": ((kl[t],), _mean),
        "kl_baseline": ((kl[b],), _mean),
        "kl_disjoint": ((kl[d],), _mean),
    }
    if curvature is not None:
        recipes["local_ratio"] = (curvature[t], curvature[b]), _ratio
    for where, which in parts.items():
        recipes[f"flipped_{where}"] = (_known(measured.flipped[which]),), _mean
        recipes[f"accuracy_{where}"] = (_known(measured.correct[which]),), _mean
        recipes[f"accuracy_change_{where}"] = (_known(change[which]),), _mean
    return {name: recipes[name] for name in FIGURES if name in recipes}


def _known(values: Array) -> Array:
    return values[~np.isnan(values)]


def _mean(values: Array, axis: int = -1) -> Any:
    return np.mean(values, axis=axis)


def _ratio(top: Array, baseline: Array, axis: int = -1) -> Any:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.mean(top, axis=axis) / np.mean(baseline, axis=axis)


def _spearman(a: Array, b: Array, axis: int = -1) -> Any:
    """Pearson's correlation of the ranks, ties sharing their mean rank; vectorised over leading axes."""
    from scipy.stats import rankdata

    ranks = [rankdata(x, axis=axis) for x in (a, b)]
    centred = [r - r.mean(axis=axis, keepdims=True) for r in ranks]
    norms = np.sqrt(np.square(centred[0]).sum(axis=axis) * np.square(centred[1]).sum(axis=axis))
    with np.errstate(divide="ignore", invalid="ignore"):
        return (centred[0] * centred[1]).sum(axis=axis) / norms


def _value(arrays: tuple[Array, ...], statistic: Statistic) -> float:
    if any(len(array) == 0 for array in arrays) or (statistic is _spearman and len(arrays[0]) < 3):
        return float("nan")
    with np.errstate(invalid="ignore"):
        return float(statistic(*arrays))


def _bootstrap(
    arrays: tuple[Array, ...], statistic: Statistic, paired: bool, confidence: float, n_resamples: int, seed: int
) -> tuple[float, float]:
    if any(len(array) < 2 for array in arrays) or not n_resamples or not np.isfinite(_value(arrays, statistic)):
        return float("nan"), float("nan")
    from scipy.stats import bootstrap

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # constant samples have an interval of width 0, which scipy warns about
        found = bootstrap(
            arrays,
            statistic,
            n_resamples=n_resamples,
            batch=max(1, 2_000_000 // max(len(array) for array in arrays)),
            vectorized=True,
            paired=paired and len(arrays) > 1,
            confidence_level=confidence,
            method="percentile",
            random_state=np.random.default_rng(seed),
        ).confidence_interval
    return float(found.low), float(found.high)
