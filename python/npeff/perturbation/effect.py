"""The result of a perturbation: figures with bootstrap intervals, random controls, curve, and KL per example."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from npeff.short_repr import several, short_repr
from npeff.storage.container import refuse_npeff_file
from npeff.storage.files import atomic, path_of

Array = npt.NDArray[Any]

FIGURES = {
    "ratio": "KL on top / KL on baseline",
    "disjoint_ratio": "KL on top / KL on disjoint baseline",
    "normalised_ratio": "KL on top / KL on baseline, of KL / ‖F‖",
    "normalised_rank_correlation": "rank correlation, KL / ‖F‖ and coefficient",
    "flipped_top": "predictions flipped, top",
    "flipped_baseline": "predictions flipped, baseline",
}
"""Every figure of an effect, in the order of tables, and its meaning."""

CONTROLS = {
    "equal_norm": "random, equal norm",
    "equal_fisher_norm": "random, equal Fisher norm",
    "equal_tensor_norms": "random, equal norm per tensor",
}
"""The random directions that a component is compared with."""


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
        """``value [low, high]`` in a number format; a dash if there is no value."""
        if math.isnan(self.value):
            return "–"
        return f"{self.value:{form}}" + ("" if math.isnan(self.low) else f" [{self.low:{form}}, {self.high:{form}}]")


@dataclass(frozen=True)
class SignResult:
    """The result of one direction and one sign.

    Attributes:
        component: The component; None for the combination of several.
        sign: +1 or −1. For the diagonal kind +1 makes the predictions of the top examples less certain.
        magnitude: Norm of the change of the weights.
        reached: Whether the wanted KL was reached; True where the magnitude was given.
        kl_top: Mean KL on the top examples.
        kl_baseline: Mean KL on the baseline.
        ratio: Their quotient.
        kept: Whether the effect's figures are of this sign.
        lam: λ of a diagonal component's interpolation.
        step: δ of a diagonal component's signed gradient step.
    """

    component: int | None
    sign: int
    magnitude: float
    reached: bool
    kl_top: float
    kl_baseline: float
    ratio: float
    kept: bool
    lam: float | None = None
    step: float | None = None


@dataclass(frozen=True)
class Control:
    """The same figures for random directions; of each, the sign with the larger ratio, as for the component.

    Attributes:
        values: ``(n_random,)`` per figure.
        figures: Mean over the draws and its interval.
        magnitudes: ``(n_random,)`` norms of the changes of the weights (mean over a strategy's directions).
    """

    values: dict[str, Array]
    figures: dict[str, Interval]
    magnitudes: Array

    __repr__ = short_repr

    def share_at_least(self, name: str, value: float) -> float:
        """``(1 + draws with at least that value) / (1 + draws)``: a permutation-like p-value, one-sided."""
        values = self.values[name]
        return float((1 + np.count_nonzero(values >= value)) / (1 + len(values)))


@dataclass(frozen=True)
class Curve:
    """Mean KL against the magnitude, both signs.

    Attributes:
        magnitudes: ``(s, p)`` ascending, for each sign in ``signs``.
        signs: +1 and −1, or the one asked for.
        top: ``(s, p)`` mean KL on the top examples; inf where the outputs are not finite.
        baseline: ``(s, p)`` on the baseline.
        disjoint: ``(s, p)`` on the disjoint baseline.
    """

    magnitudes: Array
    signs: tuple[int, ...]
    top: Array
    baseline: Array
    disjoint: Array

    __repr__ = short_repr


class Result:
    """What :class:`Effect` and :class:`npeff.Trace` share: name and JSON."""

    components: tuple[int, ...]

    @property
    def name(self) -> str:
        """``"component 3"``, ``"components 1, 4, 7"``."""
        return self._named(len(self.components))

    def _named(self, most: int = 6) -> str:
        return f"component{'s' if len(self.components) > 1 else ''} {several(self.components, most)}"

    def to_json(self) -> dict[str, Any]:
        """Everything as numbers, strings, lists and dicts; None for what is not finite."""
        return dict(plain(self))

    def save(self, path: str | Path) -> Path:
        """Write :meth:`to_json` as a JSON file.

        Raises:
            ArgumentError: ``path`` is no path.
            StorageError: Fishers or Components are there, or the file cannot be written.
        """
        return write_json(self.to_json(), path)


@dataclass(frozen=True, eq=False)
class Effect(Result):
    """What moving the weights along a component, or a group of components, did to the model's outputs.

    Arrays per example cover the examples that were measured, by ascending position in the data.

    Attributes:
        components: The component, or those of the strategy.
        kind: ``"low_rank"`` or ``"diagonal"``.
        combine: How a strategy's directions were used; None for one component.
        magnitude: Norm of the change of the weights, of the sign kept (mean over a strategy's directions).
        sign: The sign kept; 0 where several directions each have their own.
        target_kl: Range that the mean KL on the top examples was to lie in; None where the magnitude was given.
        reached: Whether the mean KL lies in that range.
        figures: Every figure of ``npeff.perturbation.FIGURES`` with its interval.
        local_ratio: Mean vᵀF_i v on the top examples over that on the baseline: the ratio's limit for small steps.
        accuracy: ``(before, after)`` on ``top``, ``baseline`` and ``all`` examples; nan without labels.
        controls: The same figures for random directions: ``equal_norm``, ``equal_fisher_norm``, ``equal_tensor_norms``.
        sign_results: Every direction and sign that was tried.
        curve: KL against the magnitude, or None.
        ids: ``(n,)`` int64 positions of the measured examples.
        coefficient: ``(n,)`` coefficients.
        kl: ``(n,)`` KL, float64 nats.
        flipped: ``(n,)`` 1 where the prediction changed.
        top: ``(k,)`` indices of the top examples in ``ids``.
        baseline: ``(b,)`` indices of the baseline.
        disjoint: ``(d,)`` indices of the disjoint baseline.
        details: Everything else: options, Fisher norm along the direction and how it was found, rejection.
    """

    components: tuple[int, ...]
    kind: str
    combine: str | None
    magnitude: float
    sign: int
    target_kl: tuple[float, float] | None
    reached: bool
    figures: dict[str, Interval]
    local_ratio: float
    accuracy: dict[str, tuple[float, float]]
    controls: dict[str, Control]
    sign_results: tuple[SignResult, ...]
    curve: Curve | None
    ids: Array
    coefficient: Array
    kl: Array
    flipped: Array
    top: Array
    baseline: Array
    disjoint: Array
    details: dict[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        ratio = self.figures["ratio"]
        beside = "".join(f", {name} {c.figures['ratio'].value:.3g}" for name, c in self.controls.items())
        return f"Effect({self._named()}, KL ratio {ratio.text()}{beside})"

    @property
    def ratio(self) -> float:
        """The published KL ratio: mean KL on the top examples over that on the baseline, larger of ±."""
        return self.figures["ratio"].value

    def table(self) -> str:
        """The figures as text, beside those of the random directions; below them magnitude, KL and accuracy."""
        rows = [("", self.name, *(CONTROLS[name] for name in self.controls))]
        for name, what in FIGURES.items():
            if not math.isnan(self.figures[name].value):
                beside = (control.figures[name].text() for control in self.controls.values())
                rows.append((what, self.figures[name].text(), *beside))
        kl = " and ".join(
            f"{self.kl[which].mean():.3g} on the {len(which)} {where}"
            for which, where in ((self.top, "top examples"), (self.baseline, "of the baseline"))
        )
        lines = [f"mean KL {kl} (nats) at magnitude {self.magnitude:.3g}"]
        known = {where: pair for where, pair in self.accuracy.items() if not math.isnan(pair[1])}
        if known:
            changes = ", ".join(f"{where} {before:.1%} → {after:.1%}" for where, (before, after) in known.items())
            lines.append(f"accuracy: {changes}")
        return "\n".join([text_table(rows), *lines])


def text_table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells as lines of text with aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)


# ---- figures -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ExampleSets:
    """The sets of examples that are compared, and what is known of each example.

    Attributes:
        top: ``(k,)`` indices of the examples with the largest coefficients.
        baseline: ``(b,)`` indices of the examples that they are compared with; may share examples with the top.
        disjoint: ``(d,)`` indices of baseline examples that are not in the top and have (nearly) no coefficient.
        coefficient: ``(n,)`` coefficients.
        norms: ``(n,)`` norms of the Fishers.
    """

    top: Array
    baseline: Array
    disjoint: Array
    coefficient: Array
    norms: Array

    def ratio(self, values: Array) -> float:
        """Mean of values ``(n,)`` on the top examples over the mean on the baseline."""
        return float(_ratio(values[self.top], values[self.baseline]))

    def figures(self, kl: Array, flipped: Array) -> dict[str, Figure]:
        """Every figure as the samples that it is a statistic of.

        Args:
            kl: ``(n,)`` KL of every example.
            flipped: ``(n,)`` 1 where the prediction changed, nan where there is none.
        """
        relative = np.divide(kl, self.norms, out=np.full(len(kl), np.nan), where=self.norms > 0)
        usable = np.isfinite(relative)
        top, baseline = self.top, self.baseline
        return {
            "ratio": Figure(_ratio, kl[top], kl[baseline]),
            "disjoint_ratio": Figure(_ratio, kl[top], kl[self.disjoint]),
            "normalised_ratio": Figure(_ratio, _known(relative[top]), _known(relative[baseline])),
            "normalised_rank_correlation": Figure(_spearman, relative[usable], self.coefficient[usable], paired=True),
            "flipped_top": Figure(_mean, _known(flipped[top])),
            "flipped_baseline": Figure(_mean, _known(flipped[baseline])),
        }


class Figure:
    """A statistic of one or two samples of examples.

    Args:
        statistic: Takes the samples and ``axis=``.
        *samples: Arrays ``(k,)``.
        paired: The samples have the same examples, which are resampled together.
    """

    def __init__(self, statistic: Callable[..., Any], *samples: Array, paired: bool = False) -> None:
        self._statistic, self._samples, self._paired = statistic, samples, paired

    @property
    def value(self) -> float:
        """The statistic; nan if there are too few examples."""
        if min(map(len, self._samples)) < (3 if self._statistic is _spearman else 1):
            return float("nan")
        with np.errstate(invalid="ignore"):
            return float(self._statistic(*self._samples))

    def interval(self, confidence: float = 0.95, n_resamples: int = 999, seed: int = 0) -> Interval:
        """The statistic with a percentile bootstrap interval over examples (``scipy.stats.bootstrap``)."""
        value = self.value
        if min(map(len, self._samples)) < 2 or not n_resamples or not np.isfinite(value):
            return Interval(value, float("nan"), float("nan"))
        from scipy.stats import bootstrap

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # constant samples have an interval of width 0, which scipy warns about
            found = bootstrap(
                self._samples,
                self._statistic,
                n_resamples=n_resamples,
                batch=max(1, 2_000_000 // max(map(len, self._samples))),
                vectorized=True,
                paired=self._paired,
                confidence_level=confidence,
                method="percentile",
                random_state=np.random.default_rng(seed),
            ).confidence_interval
        return Interval(value, float(found.low), float(found.high))


def mean_figure(values: Sequence[float] | Array) -> Figure:
    """The mean of the finite values."""
    known = np.asarray(values, np.float64)
    return Figure(_mean, known[np.isfinite(known)])


def ratio_figure(above: Array, below: Array) -> Figure:
    """The quotient of two means over the same examples."""
    return Figure(_ratio, above, below, paired=True)


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


# ---- JSON --------------------------------------------------------------------------------------------------------


def write_json(content: Any, path: str | Path) -> Path:
    """Write JSON, whole or not at all.

    Raises:
        ArgumentError: ``path`` is no path.
        StorageError: Fishers or Components are there, or the file cannot be written.
    """
    path = path_of(path)
    refuse_npeff_file(path)
    with atomic(path) as scratch:
        scratch.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    return path


def plain(value: Any) -> Any:
    """JSON-able: arrays as lists, dataclasses as dicts, None for what is not finite."""
    if hasattr(value, "__dataclass_fields__"):
        return {name: plain(getattr(value, name)) for name in value.__dataclass_fields__}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, np.generic):
        return plain(value.item())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if isinstance(value, (str, int, bool, type(None))) else str(value)
