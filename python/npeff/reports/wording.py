"""Numbers and classes as a reader wants them."""

from __future__ import annotations

from collections.abc import Sequence


class ClassNames:
    """Names of classes, numbers where none are given."""

    def __init__(self, names: Sequence[str] | None) -> None:
        self._names = [str(name) for name in names] if names is not None else []

    def __getitem__(self, index: int) -> str:
        if index < 0:
            return "no label"
        return self._names[index] if index < len(self._names) else str(index)


def percent(share: float) -> str:
    """A share as a percentage with two significant digits."""
    if share < 0:
        return f"−{percent(-share)}"
    value = 100 * share
    if value >= 9.95 or value == 0:
        return f"{value:.0f} %"
    return f"{value:.1f} %" if value >= 0.1 else "< 0.1 %"


def number(value: int) -> str:
    """A whole number with thin spaces between thousands."""
    return f"{value:,}".replace(",", "\u2009")


def coefficient(value: float) -> str:
    """A coefficient with two significant digits or decimals."""
    return f"{value:.2f}" if value >= 0.095 else f"{value:.2g}"


def plain(value: float) -> str:
    """A number with three significant digits, without an exponent where it needs none."""
    return f"{value:.3g}" if not 100 <= abs(value) < 1e6 else f"{value:.0f}"
