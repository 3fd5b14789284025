"""How much of an example's Fisher the components account for."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from npeff.components.components import Components
from npeff.fishers.fishers import Fishers
from npeff.trust.inner_products import InnerProducts

Array = npt.NDArray[Any]


def explained(components: Components, fishers: Fishers) -> Array:
    """``1 − ‖F_i − Σ_j w_ij C_j‖² / ‖F_i‖²`` with the best w_ij ≥ 0, C_j = g_j g_jᵀ (or h_j).

    Args:
        components: A decomposition.
        fishers: Fishers of the same parameters, of the decomposed examples or of others; where they keep inner products
            alone, those that the components were made from.

    Returns:
        ``(n,)`` float64 in [0, 1]: 1 when the components say all, 0 when they say nothing; NaN for a zero Fisher.

    Raises:
        ArgumentError: Kind or parameters differ.
    """
    if fishers.rows.products_only:
        share = InnerProducts(fishers, components).explained()
    else:
        share = 1 - components.encode(fishers).unexplained
    share[fishers.zero] = np.nan
    return np.asarray(np.clip(share, 0, 1))
