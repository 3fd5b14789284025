"""How far to move along a direction until the outputs have changed by a wanted amount."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from npeff.perturbation.examples import Piece
from npeff.perturbation.options import Options
from npeff.perturbation.session import Session
from npeff.perturbation.weights import Direction

TOLERANCE = 0.02
"""Relative distance from a wanted KL at which it counts as reached."""
FARTHEST = 1e3
"""The search ends at this many times ‖θ‖."""


@dataclass(frozen=True)
class Found:
    """Where a search ended.

    Attributes:
        magnitude: The step.
        kl: The mean KL there.
        reached: Whether that is in the wanted range.
        evaluations: How many steps were tried.
    """

    magnitude: float
    kl: float
    reached: bool
    evaluations: int


def wanted_range(target: float | tuple[float, float]) -> tuple[float, float]:
    """The range of a target: given, or the number ± 2 %."""
    if isinstance(target, tuple):
        return target
    return target * (1 - TOLERANCE), target * (1 + TOLERANCE)


def find_magnitude(kl_at: Callable[[float], float], wanted: tuple[float, float], start: float, limit: float) -> Found:
    """The first step at which the mean KL lies in a range.

    From a small step on, the next is chosen as if KL grew with the square of the step, but at most four times as
    large, so that the first crossing is not jumped over; once it is bracketed, by false position between
    logarithms, safeguarded by bisection. KL need not be monotone, nor ever reach the range.

    Args:
        kl_at: Mean KL at a step > 0; not finite where the outputs are not.
        wanted: The range, ``0 < low ≤ high``.
        start: First step.
        limit: Largest step to try.

    Returns:
        What was found; where the range was not reached, the step that came nearest (in the logarithm).
    """
    low, high = wanted
    aim = math.log(math.sqrt(low * high))
    tried: list[tuple[float, float]] = []

    def at(x: float) -> float:
        y = kl_at(x)
        tried.append((x, y if math.isfinite(y) else math.inf))
        return tried[-1][1]

    def result(x: float, y: float) -> Found:
        return Found(x, y, low <= y <= high, len(tried))

    def nearest() -> Found:
        return result(*min(tried, key=lambda xy: abs(math.log(xy[1]) - aim) if 0 < xy[1] < math.inf else math.inf))

    x, y = start, at(start)
    while y > high and x > start * 1e-12:
        x, y = x / 8, at(x / 8)
    while y < low:
        before = x
        growth = math.sqrt(math.exp(aim) / y) if y > 1e-14 else 4.0
        x = before * min(4.0, max(1.15, growth))
        if x > limit:
            return nearest()
        y = at(x)
        if y > high:
            return _between(at, result, nearest, (before, x), wanted, tried)
    return result(x, y) if y <= high else nearest()


def _between(
    at: Callable[[float], float],
    result: Callable[[float, float], Found],
    nearest: Callable[[], Found],
    bracket: tuple[float, float],
    wanted: tuple[float, float],
    tried: list[tuple[float, float]],
) -> Found:
    low, high = wanted
    aim = math.log(math.sqrt(low * high))
    known = dict(tried)
    (left, f_left), (right, f_right) = ((math.log(x), _log(known[x]) - aim) for x in bracket)
    for turn in range(80):
        if right - left < 1e-9:
            break
        middle = (left + right) / 2
        if turn % 3 != 2 and math.isfinite(f_left) and math.isfinite(f_right):
            position = left + (right - left) * f_left / (f_left - f_right)
            margin = 0.02 * (right - left)
            middle = min(max(position, left + margin), right - margin)
        y = at(math.exp(middle))
        if low <= y <= high:
            return result(math.exp(middle), y)
        if y < low:
            left, f_left = middle, _log(y) - aim
        else:
            right, f_right = middle, _log(y) - aim
    return nearest()


def _log(value: float) -> float:
    return math.log(value) if 0 < value < math.inf else (math.inf if value > 0 else -math.inf)


def search(session: Session, direction: Direction, sign: int, options: Options, pieces: Sequence[Piece]) -> Found:
    """The magnitude that was given, or the one at which the mean KL of the examples in ``pieces`` is as wanted."""
    if options.magnitude is not None:
        return Found(float(options.magnitude), float("nan"), True, 0)

    def mean_kl(magnitude: float) -> float:
        return float(session.kl(pieces, direction, sign * magnitude).mean())

    return find_magnitude(mean_kl, wanted_range(options.target_kl), 1e-3 * session.size, FARTHEST * session.size)
