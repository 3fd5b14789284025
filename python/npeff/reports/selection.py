"""Which examples a component's page shows: the top, the middle, and some at random."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

ACTIVE = 0.1
"""An example counts as active from this share of the component's largest coefficient."""


def middle(w: Array, top: Array, m: int) -> Array:
    """The m examples around the median of the active ones that are not at the top.

    Args:
        w: ``(n,)`` coefficients.
        top: Indices that are shown already.
        m: How many.

    Returns:
        Indices by falling coefficient; fewer than m where fewer are active.
    """
    rest = _without(np.flatnonzero((w >= ACTIVE * w.max(initial=0)) & (w > 0)), top)
    order = rest[np.argsort(-w[rest], kind="stable")]
    start = max(0, (len(order) - m) // 2)
    return order[start : start + m]


def at_random(w: Array, shown: Array, m: int, seed: tuple[int, ...]) -> Array:
    """M random examples of those with a coefficient above zero that are not shown yet.

    Args:
        w: ``(n,)`` coefficients.
        shown: Indices that are shown already.
        m: How many.
        seed: Decides the choice.

    Returns:
        Indices by falling coefficient.
    """
    rest = _without(np.flatnonzero(w > 0), shown)
    if len(rest) > m:
        rest = np.random.default_rng(seed).choice(rest, m, replace=False)
    return rest[np.lexsort((rest, -w[rest]))]


def _without(indices: Array, shown: Array) -> Array:
    return indices[~np.isin(indices, shown)]
