"""What perturbing along a component did: the result of an experiment, for people and for programs."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from npeff.perturbation.measures import FIGURES, Interval
from npeff.short_repr import several, short_repr
from npeff.storage.files import atomic, path_of
from npeff.storage.recognition import refuse_npeff_file

Array = npt.NDArray[Any]

CONTROLS = {
    "equal_norm": "random, equal norm",
    "equal_fisher_norm": "random, equal Fisher norm",
    "equal_tensor_norms": "random, equal norm per tensor",
}
COMPARED = (
    "ratio",
    "disjoint_ratio",
    "normalised_ratio",
    "local_ratio",
    "rank_correlation",
    "normalised_rank_correlation",
)
"""Figures that can be held against those of random directions whatever the size of the effect."""


@dataclass(frozen=True)
class Side:
    """One direction, one sign.

    Attributes:
        component: The component; None for the combination of several.
        sign: +1 or −1. For the diagonal kind +1 makes the predictions of the top examples less certain.
        magnitude: Norm of the change of the weights.
        reached: Whether the wanted KL was reached; True where the magnitude was given.
        kl_top: Mean KL on the top examples.
        kl_baseline: Mean KL on the baseline.
        ratio: Their quotient.
        kept: Whether the effect's figures are of this side.
        mix: λ of a diagonal component's interpolation.
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
    mix: float | None = None
    step: float | None = None


@dataclass(frozen=True)
class Control:
    """The same figures for random directions, each taken both ways like the component.

    Attributes:
        values: ``(n_random,)`` per figure.
        figures: Mean over the draws and its interval.
        magnitudes: ``(n_random,)`` norms of their changes of the weights (mean over a strategy's directions).
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
        magnitudes: ``(p,)`` ascending, for each sign in ``signs``: ``(s, p)``.
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


@dataclass(frozen=True, eq=False)
class Effect:
    """What moving the weights along a component, or a group of them, did to the model's outputs.

    Arrays per example cover the examples that were measured, by ascending position in the data.

    Attributes:
        components: The component, or those of the strategy.
        kind: ``"low_rank"`` or ``"diagonal"``.
        combine: How a strategy's directions were used; None for one component.
        magnitude: Norm of the change of the weights, of the sign kept (mean over a strategy's directions).
        sign: The sign kept; 0 where several directions each have their own.
        target_kl: Range that the mean KL on the top examples was to lie in; None where the magnitude was given.
        reached: Whether it does.
        figures: Every figure of ``npeff.perturbation.FIGURES`` with its interval.
        before: Accuracy at the model's own weights: ``top``, ``baseline``, ``all``; nan without labels.
        controls: The same for random directions: ``equal_norm``, ``equal_fisher_norm`` and ``equal_tensor_norms``.
        sides: Every direction and sign that was tried.
        curve: KL against the magnitude, or None.
        ids: ``(n,)`` int64 positions of the measured examples.
        coefficient: ``(n,)`` their coefficients.
        kl: ``(n,)`` their KL, float64 nats.
        flipped: ``(n,)`` 1 where the prediction changed.
        top: ``(k,)`` places of the top examples in ``ids``.
        baseline: ``(b,)`` places of the baseline.
        disjoint: ``(d,)`` places of the disjoint baseline.
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
    before: dict[str, float]
    controls: dict[str, Control]
    sides: tuple[Side, ...]
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
        about = f"component{'s' if len(self.components) > 1 else ''} {several(self.components)}"
        return f"Effect({about}, KL ratio {ratio.value:.3g} [{ratio.low:.3g}, {ratio.high:.3g}]{beside})"

    @property
    def name(self) -> str:
        """``"component 3"``, ``"components 1, 4, 7"``."""
        several = "s" if len(self.components) > 1 else ""
        return f"component{several} {', '.join(map(str, self.components))}"

    @property
    def ratio(self) -> float:
        """The published KL ratio: mean KL on the top examples over that on the baseline, larger of ±."""
        return self.figures["ratio"].value

    def to_json(self) -> dict[str, Any]:
        """Everything as numbers, strings, lists and dicts; None for what is not finite."""
        return plain({name: getattr(self, name) for name in self.__dataclass_fields__})

    def save(self, path: str | Path) -> Path:
        """Write :meth:`to_json` as a JSON file.

        Raises:
            ArgumentError: ``path`` is no path.
            StorageError: Fishers or Components are there, or the file cannot be written.
        """
        return write_json(self.to_json(), path)

    def table(self) -> str:
        """The figures as text, beside those of the random directions."""
        rows = [("", self.name, *(CONTROLS[name] for name in self.controls))]
        for name, what in FIGURES.items():
            if name not in self.figures or math.isnan(self.figures[name].value):
                continue
            own = [c.figures.get(name) for c in self.controls.values()]
            rows.append((what, _shown(self.figures[name]), *(_shown(i) if i else "" for i in own)))
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)


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


def _shown(interval: Interval) -> str:
    if math.isnan(interval.value):
        return "–"
    ends = "" if math.isnan(interval.low) else f" [{interval.low:.3g}, {interval.high:.3g}]"
    return f"{interval.value:.3g}{ends}"


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
