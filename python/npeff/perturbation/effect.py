"""The result of a perturbation: figures beside random controls, curve, and what changed on each example."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from npeff.perturbation.figures import FIGURES, Interval
from npeff.short_repr import several, short_repr
from npeff.storage.container import refuse_npeff_file
from npeff.storage.files import atomic, path_of

Array = npt.NDArray[Any]

CONTROLS = {
    "equal_norm": "random, equal norm",
    "equal_fisher_norm": "random, equal Fisher norm",
    "equal_tensor_norms": "random, equal norm per tensor",
}
"""The random directions that a component is compared with."""


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
        label_top: Mean probability of the label on the top examples; nan without labels.
        perplexity: On unrelated data; nan without it.
    """

    component: int | None
    sign: int
    magnitude: float
    reached: bool
    kl_top: float
    kl_baseline: float = math.nan
    ratio: float = math.nan
    kept: bool = False
    lam: float | None = None
    step: float | None = None
    label_top: float = math.nan
    perplexity: float = math.nan


@dataclass(frozen=True)
class Control:
    """The figures of the effect for random directions; of each direction, the sign with the larger ratio.

    Attributes:
        values: ``(n_random,)`` per figure.
        figures: Mean over the draws, without those where it is not finite, and its interval.
        magnitudes: ``(n_random,)`` norms of the changes of the weights (mean over a strategy's directions).
    """

    values: dict[str, Array]
    figures: dict[str, Interval]
    magnitudes: Array

    __repr__ = short_repr

    def share_at_least(self, name: str, value: float) -> float:
        """Compute ``(1 + draws with at least that value) / (1 + draws)``: a permutation-like p-value, one-sided."""
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
        label_top: ``(s, p)`` mean probability of the label on the top examples; nan without labels.
        perplexity: ``(s, p)`` perplexity on unrelated data; nan without it.
    """

    magnitudes: Array
    signs: tuple[int, ...]
    top: Array
    baseline: Array
    disjoint: Array
    label_top: Array
    perplexity: Array

    __repr__ = short_repr


@dataclass(frozen=True)
class Prediction:
    """The predictions of a model for one example before and after its weights move.

    Attributes:
        id: Position of the example in the data.
        classes: ``(p,)`` int64: those that are most probable before or after, the most probable first.
        before: ``(p,)`` their probabilities at the model's own weights.
        after: ``(p,)`` the same at the moved weights; over several directions, the mean.
    """

    id: int
    classes: Array
    before: Array
    after: Array

    __repr__ = short_repr


@dataclass(frozen=True)
class Continuation:
    """The greedy continuations of a text by a language model.

    Attributes:
        id: Position in the data of the example whose text it is; None for a text that was given.
        prompt: The text.
        base: Its continuation at the model's own weights.
        down: With the weights moved to the sign that makes the labels of the top examples less probable, or to −1 where
            labels are unknown; None where that sign was not asked for.
        up: The same for the other sign.
    """

    id: int | None
    prompt: str
    base: str
    down: str | None
    up: str | None

    __repr__ = short_repr


class Result:
    """The base class of :class:`Effect` and :class:`npeff.Trace`: name and JSON."""

    components: tuple[int, ...]

    @property
    def name(self) -> str:
        """``"component 3"``, ``"components 1, 4, 7"``."""
        return self._named(len(self.components))

    def _named(self, most: int = 6) -> str:
        return f"component{'s' if len(self.components) > 1 else ''} {several(self.components, most)}"

    def to_json(self) -> dict[str, Any]:
        """Convert all fields to numbers, strings, lists and dicts; None for what is not finite."""
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
    """The effect on the model's outputs of moving the weights along a component, or a group of components.

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
        perplexity: ``(before, after)`` on unrelated data; nan without it.
        controls: The same figures for random directions: ``equal_norm``, ``equal_fisher_norm``, ``equal_tensor_norms``.
        sign_results: Every direction and sign that was tried.
        curve: KL against the magnitude, or None.
        ids: ``(n,)`` int64 positions of the measured examples.
        coefficient: ``(n,)`` coefficients.
        kl: ``(n,)`` KL, float64 nats.
        flipped: ``(n,)`` 1 where the prediction changed.
        label_before: ``(n,)`` probability of the label at the model's own weights; nan where it is unknown.
        label_after: ``(n,)`` the same at the moved weights.
        top: ``(k,)`` indices of the top examples in ``ids``.
        baseline: ``(b,)`` indices of the baseline.
        disjoint: ``(d,)`` indices of the disjoint baseline.
        predictions: For each of the top examples, the largest coefficient first; none where outputs are no classes.
        continuations: Of the prompts.
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
    perplexity: tuple[float, float]
    controls: dict[str, Control]
    sign_results: tuple[SignResult, ...]
    curve: Curve | None
    ids: Array
    coefficient: Array
    kl: Array
    flipped: Array
    label_before: Array
    label_after: Array
    top: Array
    baseline: Array
    disjoint: Array
    predictions: tuple[Prediction, ...] = ()
    continuations: tuple[Continuation, ...] = ()
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
        """Write the figures as text, beside those of the random directions; below: magnitude, KL, labels and texts."""
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
        label = [
            np.nanmean(p[self.top]) for p in (self.label_before, self.label_after) if np.isfinite(p[self.top]).any()
        ]
        if label:
            lines.append(f"probability of the label on the top examples: {label[0]:.3f} → {label[1]:.3f}")
        if not math.isnan(self.perplexity[0]):
            lines.append(f"perplexity on unrelated data: {self.perplexity[0]:.4g} → {self.perplexity[1]:.4g}")
        known = {where: pair for where, pair in self.accuracy.items() if not math.isnan(pair[1])}
        if known:
            changes = ", ".join(f"{where} {before:.1%} → {after:.1%}" for where, (before, after) in known.items())
            lines.append(f"accuracy: {changes}")
        for c in self.continuations:
            told = (("as it is", c.base), ("down", c.down), ("up", c.up))
            lines += [repr(c.prompt), *(f"  {name}: {text!r}" for name, text in told if text is not None)]
        return "\n".join([text_table(rows), *lines])


def text_table(rows: Sequence[Sequence[str]]) -> str:
    """Write rows of cells as lines of text with aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)


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
    """Convert a value for JSON: arrays to lists, dataclasses to dicts, what is not finite to None."""
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
