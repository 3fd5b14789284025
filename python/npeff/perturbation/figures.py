"""Figures of a perturbation: statistics of samples of examples, with bootstrap intervals."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

Levels = tuple[float, int, int]
"""Of bootstrap intervals: confidence, number of resamples (0: no interval), and seed."""

NO_INTERVAL: Levels = (0.95, 0, 0)

FIGURES = {
    "ratio": "KL on top / KL on baseline",
    "disjoint_ratio": "KL on top / KL on disjoint baseline",
    "normalised_ratio": "KL on top / KL on baseline, of KL / ‖F‖",
    "normalised_rank_correlation": "rank correlation, KL / ‖F‖ and coefficient",
    "flipped_top": "predictions flipped, top",
    "flipped_baseline": "predictions flipped, baseline",
    "label_top": "probability of the label, top",
    "label_baseline": "probability of the label, baseline",
    "perplexity_ratio": "perplexity on unrelated data, after / before",
}
"""Every figure of an effect, in the order of tables, and its meaning."""


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

    def text(self, form: str = ".3g") -> str:
        """Write ``value [low, high]`` in a number format; a dash if there is no value."""
        if math.isnan(self.value):
            return "–"
        return f"{self.value:{form}}" + ("" if math.isnan(self.low) else f" [{self.low:{form}}, {self.high:{form}}]")


@dataclass(frozen=True)
class Measured:
    """The effect of a change of the weights on each example, or the average over several changes.

    Attributes:
        kl: ``(n,)`` float64 KL(moved ‖ original) in nats; inf where the moved outputs are not finite.
        flipped: ``(n,)`` float64 1 where the prediction changed, nan where there is no prediction.
        correct: ``(n,)`` float64 1 where the prediction is the label, nan where the label is unknown.
        label: ``(n,)`` float64 probability of the label, nan where it is unknown.
        unrelated: ``(u,)`` float64 −log p of the label of every example of unrelated data; inf where it is not finite.
    """

    kl: Array
    flipped: Array
    correct: Array
    label: Array
    unrelated: Array

    @staticmethod
    def average(several: Sequence[Measured], shares: Sequence[float]) -> Measured:
        """Average with the given shares, which sum to 1."""
        if len(several) == 1:
            return several[0]
        names = [field.name for field in fields(Measured)]
        return Measured(*(sum(s * getattr(m, f) for m, s in zip(several, shares, strict=True)) for f in names))


@dataclass(frozen=True)
class ExampleSets:
    """The sets of examples that are compared, and what is known of each example.

    Attributes:
        top: ``(k,)`` indices of the examples with the largest coefficients.
        baseline: ``(b,)`` indices of the examples that they are compared with; may share examples with the top.
        disjoint: ``(d,)`` indices of baseline examples that are not in the top and have (nearly) no coefficient.
        coefficient: ``(n,)`` coefficients.
        norms: ``(n,)`` norms of the Fishers.
        unrelated: ``(u,)`` −log p of the label of every example of unrelated data, at the model's own weights.
    """

    top: Array
    baseline: Array
    disjoint: Array
    coefficient: Array
    norms: Array
    unrelated: Array

    def ratio(self, values: Array) -> float:
        """Divide the mean of values ``(n,)`` on the top examples by the mean on the baseline."""
        return float(mean_ratio(values[self.top], values[self.baseline]))

    def figures(self, measured: Measured, levels: Levels = NO_INTERVAL) -> dict[str, Interval]:
        """Compute every figure of :data:`FIGURES`."""
        kl, flipped, label = measured.kl, measured.flipped, measured.label
        relative = np.divide(kl, self.norms, out=np.full(len(kl), np.nan), where=self.norms > 0)
        usable = np.isfinite(relative)
        top, baseline = self.top, self.baseline
        samples: dict[str, tuple[Any, ...]] = {
            "ratio": (mean_ratio, kl[top], kl[baseline]),
            "disjoint_ratio": (mean_ratio, kl[top], kl[self.disjoint]),
            "normalised_ratio": (mean_ratio, relative[top], relative[baseline]),
            "normalised_rank_correlation": (_spearman, relative[usable], self.coefficient[usable]),
            "flipped_top": (np.mean, flipped[top]),
            "flipped_baseline": (np.mean, flipped[baseline]),
            "label_top": (np.mean, label[top]),
            "label_baseline": (np.mean, label[baseline]),
            "perplexity_ratio": (perplexity, measured.unrelated - self.unrelated),
        }
        confidence, n_resamples, seed = levels
        return {
            name: interval(*of, paired=of[0] is _spearman, levels=(confidence, n_resamples, seed + i))
            for i, (name, of) in enumerate(samples.items())
        }


def interval(
    statistic: Callable[..., Any], *samples: Array, paired: bool = False, levels: Levels = NO_INTERVAL
) -> Interval:
    """Compute a statistic of samples of examples, with a percentile bootstrap interval (``scipy.stats.bootstrap``).

    Args:
        statistic: Takes the samples and ``axis=``.
        *samples: One or two arrays ``(k,)``; with too few examples the statistic is nan.
        paired: The samples have the same examples, which are resampled together. Otherwise nan is left out.
        levels: Of the interval.
    """
    confidence, n_resamples, seed = levels
    samples = samples if paired else tuple(sample[~np.isnan(sample)] for sample in samples)
    fewest = min(map(len, samples))
    if fewest < (3 if statistic is _spearman else 1):
        return Interval(math.nan, math.nan, math.nan)
    with np.errstate(invalid="ignore"):
        value = float(statistic(*samples))
    if fewest < 2 or not n_resamples or not math.isfinite(value):
        return Interval(value, math.nan, math.nan)
    from scipy.stats import bootstrap

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # constant samples have an interval of width 0, which scipy warns about
        found = bootstrap(
            samples,
            statistic,
            n_resamples=n_resamples,
            batch=max(1, 2_000_000 // max(map(len, samples))),
            vectorized=True,
            paired=paired,
            confidence_level=confidence,
            method="percentile",
            random_state=np.random.default_rng(seed),
        ).confidence_interval
    return Interval(value, float(found.low), float(found.high))


def mean_known(values: Array) -> float:
    """Compute the mean of the values that are not nan; nan where there are none."""
    return interval(np.mean, values).value


def mean_ratio(top: Array, baseline: Array, axis: int = -1) -> Any:
    """Divide the mean of one sample by the mean of another."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.mean(top, axis=axis) / np.mean(baseline, axis=axis)


def perplexity(surprise: Array, axis: int = -1) -> Any:
    """Compute the exponential of the mean −log p of labels; nan where there are none."""
    with np.errstate(over="ignore", invalid="ignore"):
        return np.exp(np.mean(surprise, axis=axis)) if np.shape(surprise)[axis] else math.nan


def _spearman(a: Array, b: Array, axis: int = -1) -> Any:
    """Pearson's correlation of the ranks, ties sharing their mean rank; vectorised over leading axes."""
    from scipy.stats import rankdata

    ranks = [rankdata(x, axis=axis) for x in (a, b)]
    centred = [r - r.mean(axis=axis, keepdims=True) for r in ranks]
    norms = np.sqrt(np.square(centred[0]).sum(axis=axis) * np.square(centred[1]).sum(axis=axis))
    with np.errstate(divide="ignore", invalid="ignore"):
        return (centred[0] * centred[1]).sum(axis=axis) / norms
