"""What can be asked of a perturbation, and what cannot."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from npeff.errors import ArgumentError
from npeff.perturbation.directions import Reject
from npeff.perturbation.merging import MIXES

Array = npt.NDArray[Any]
Combine = Literal["each", "principal"] | Sequence[float]
Signs = Literal["both", 1, -1]


@dataclass(frozen=True)
class Options:
    """Options of :func:`npeff.perturb`, where each is explained."""

    magnitude: float | None = None
    target_kl: float | tuple[float, float] = 0.1
    sign: Signs = "both"
    combine: Combine = "each"
    reject: Reject | None = None
    max_sim: float | None = None
    top: int | Sequence[int] | Array = 32
    baseline: int | Literal["all"] | Sequence[int] | Array = 4096
    mix: float | Sequence[float] | None = None
    fisher: Any = None
    floor: float = 1e-6
    n_random: int = 8
    curve: int = 8
    confidence: float = 0.95
    n_resamples: int = 999
    seed: int = 0

    @property
    def signs(self) -> tuple[int, ...]:
        """The signs to try."""
        return (1, -1) if self.sign == "both" else (int(self.sign),)

    def check(self, kind: str) -> None:
        """Refuse what means nothing.

        Raises:
            ArgumentError: Naming the option.
        """
        if self.magnitude is not None:
            _number("magnitude", self.magnitude, 0, math.inf)
        self._check_target()
        if self.sign not in ("both", 1, -1) or isinstance(self.sign, bool):
            raise ArgumentError(f"sign: expected 'both', 1 or -1, got {self.sign!r}")
        if self.reject not in (None, "span", "sequential"):
            raise ArgumentError(f"reject: expected None, 'span' or 'sequential', got {self.reject!r}")
        if self.max_sim is not None:
            if self.reject is None:
                raise ArgumentError("max_sim: it belongs to reject='span' or reject='sequential'; give that too")
            _number("max_sim", self.max_sim, 0, 1)
        if isinstance(self.combine, str) and self.combine not in ("each", "principal"):
            raise ArgumentError(f"combine: expected 'each', 'principal' or weights, got {self.combine!r}")
        if kind == "diagonal" and self.reject is not None:
            raise ArgumentError("reject: it belongs to low-rank components; diagonal ones have no direction to reject")
        if kind == "low_rank" and (self.mix is not None or self.fisher is not None):
            raise ArgumentError("mix, fisher: they belong to diagonal components; leave them out for low-rank ones")
        for value in [] if self.mix is None else self.mixes:
            _number("mix", value, 0, 1, open_ends=True)
        _number("floor", self.floor, 0, 1)
        for name, least in (("n_random", 0), ("curve", 0), ("n_resamples", 0), ("seed", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
                raise ArgumentError(f"{name}: expected an integer ≥ {least}, got {value!r}")
        _number("confidence", self.confidence, 0, 1, open_ends=True)
        if (
            self.top is None
            or (isinstance(self.top, int | np.integer) and self.top < 1)
            or isinstance(self.top, bool | str)
        ):
            raise ArgumentError(f"top: expected a number of examples ≥ 1, or their indices, got {self.top!r}")
        if isinstance(self.baseline, str) and self.baseline != "all":
            raise ArgumentError(f"baseline: expected a number of examples, 'all' or indices, got {self.baseline!r}")
        if isinstance(self.baseline, bool) or (isinstance(self.baseline, int | np.integer) and self.baseline < 1):
            raise ArgumentError(f"baseline: expected a number of examples ≥ 1, got {self.baseline!r}")

    def _check_target(self) -> None:
        target = self.target_kl
        ends = target if isinstance(target, (tuple, list)) else (target, target)
        if len(ends) != 2 or not all(isinstance(e, int | float | np.number) and not isinstance(e, bool) for e in ends):
            raise ArgumentError(f"target_kl: expected a number of nats, or (low, high), got {target!r}")
        if not 0 < float(ends[0]) <= float(ends[1]) < math.inf:
            raise ArgumentError(f"target_kl: expected 0 < low ≤ high, finite, got {target!r}")

    @property
    def mixes(self) -> tuple[float, ...]:
        """λ to try for a diagonal component."""
        if self.mix is None:
            return MIXES
        given = [self.mix] if np.ndim(self.mix) == 0 else self.mix
        return tuple(given)  # type: ignore[arg-type]


def _number(name: str, value: Any, low: float, high: float, open_ends: bool = False) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float | np.number) or not math.isfinite(float(value)):
        raise ArgumentError(f"{name}: expected a number, got {value!r}")
    value = float(value)
    inside = low < value < high if open_ends or high == math.inf else low <= value <= high
    if not inside:
        ends = f"> {low}" if high == math.inf else f"between {low} and {high}"
        raise ArgumentError(f"{name}: expected a number {ends}, got {value!r}")


def top_rows(coefficient: Array, top: Any) -> Array:
    """The examples with the largest coefficients, those without any left out; or the given ones.

    Raises:
        ArgumentError: Given ones are not there, or no example has a coefficient.
    """
    if not isinstance(top, int | np.integer):
        return given_rows("top", top, len(coefficient))
    order = np.argsort(-coefficient, kind="stable")[: int(top)]
    order = order[coefficient[order] > 0]
    if not len(order):
        raise ArgumentError("j: no example has a coefficient on it; choose another component, or give examples: top=")
    return order.astype(np.int64)


def baseline_rows(n: int, baseline: Any, seed: int) -> Array:
    """A random sample of the examples, all of them, or the given ones.

    Raises:
        ArgumentError: Given ones are not there.
    """
    if isinstance(baseline, str) or (isinstance(baseline, int | np.integer) and baseline >= n):
        return np.arange(n, dtype=np.int64)
    if isinstance(baseline, int | np.integer):
        generator = np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, 2, 0]))
        return np.sort(generator.choice(n, int(baseline), replace=False)).astype(np.int64)
    return given_rows("baseline", baseline, n)


def given_rows(name: str, rows: Any, n: int) -> Array:
    """Indices of examples that were given, each once.

    Raises:
        ArgumentError: They are none, or not below ``n``.
    """
    found = np.asarray(rows)
    if found.dtype == bool and found.shape == (n,):
        found = np.flatnonzero(found)
    if found.ndim != 1 or not len(found) or found.dtype.kind not in "iu":
        raise ArgumentError(f"{name}: expected indices of examples (rows of components.coefficients), got {rows!r}")
    if found.min() < 0 or found.max() >= n:
        raise ArgumentError(f"{name}: expected indices below {n}, got {int(found.min())} to {int(found.max())}")
    return np.asarray(list(dict.fromkeys(found.tolist())), np.int64)
