"""Components of inner products alone, compared and applied: all are combinations of the same rows.

With K = A Aᵀ and vectors ``g_j = Σ_row c_row,j a_row``, everything that rows would be needed for follows from K: inner
products of vectors are ``cᵀ K c'``, those of rows with vectors ``K c``.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from npeff import kernels
from npeff.components.components import Components
from npeff.errors import ArgumentError
from npeff.fishers.fishers import Fishers
from npeff.fishers.scaling import scale

Array = npt.NDArray[Any]


class InnerProducts:
    """All examples' inner products, and the components made of all or of some of them.

    Args:
        fishers: Fishers that keep inner products alone.
        components: Of them.

    Raises:
        ArgumentError: The components are not of these Fishers, or do not say which combinations of rows they are.
    """

    def __init__(self, fishers: Fishers, components: Components) -> None:
        assert fishers.rows.products_only
        if components.compression != "gram" or not np.array_equal(components.ids, fishers.ids):
            raise ArgumentError(
                "fishers: inner products alone (GramOnly) say nothing about other examples; expected those that the "
                "components were made from"
            )
        self.K, self.offsets = fishers.rows.values, np.array(fishers.row_offsets)  # torch wants it writable
        scaled = scale(fishers, "energy", components.provenance.get("normalize", "stored"))
        self.factors, self.norms = scaled.row_factors, scaled.fisher_norms
        self.weights = self.combinations(components, np.arange(len(fishers)))

    def combinations(self, components: Components, examples: Array) -> Array:
        """``(n_rows, r)`` float64 c, of components made of some of the examples.

        Raises:
            ArgumentError: They do not hold them.
        """
        if components.row_weights is None:
            raise ArgumentError(
                "components: they do not hold the combinations of rows that their vectors are, because they were "
                "expanded; decompose all at once"
            )
        rows = np.concatenate([np.arange(self.offsets[i], self.offsets[i + 1]) for i in examples])
        c = np.zeros((len(self.K), components.n_components))
        c[rows] = components.row_weights
        return c

    def cosines(self, c: Array) -> Array:
        """``(r, r')`` float64 |cos| between the components and those with the combinations c."""
        ours, theirs = self._times(self.weights), self._times(c)
        products = np.abs(self.weights.T @ theirs)
        squares = [np.einsum("ij,ij->j", w, k) for w, k in ((self.weights, ours), (c, theirs))]
        return np.asarray(np.minimum(products / np.sqrt(np.maximum(np.outer(*squares), 1e-60)), 1.0))

    def coefficients(self, c: Array) -> Array:
        """``(n, r')`` float32 coefficients of all examples on the components with the combinations c."""
        Kc = self._times(c)
        P = torch.from_numpy(Kc * self.factors[:, None])
        gram = torch.from_numpy(c.T @ Kc) ** 2
        return np.asarray(
            kernels.nnls(gram, kernels.cross(P, torch.from_numpy(self.offsets)), exact=True).w.float().numpy()
        )

    def explained(self) -> Array:
        """``(n,)`` float64 ``1 − ‖F_i − Σ_j w_ij C_j‖² / ‖F_i‖²`` with the best w_ij ≥ 0."""
        Kc = self._times(self.weights)
        cross = kernels.cross(torch.from_numpy(Kc * self.factors[:, None]), torch.from_numpy(self.offsets))
        gram = torch.from_numpy(self.weights.T @ Kc) ** 2
        w = kernels.nnls(gram, cross, exact=True).w
        told = (2 * (w * cross).sum(1) - ((w @ gram) * w).sum(1)).numpy()
        return np.asarray(told / np.maximum(self.norms**2, 1e-30))

    def _times(self, c: Array) -> Array:
        """``K c`` in float64, some rows of K at a time."""
        parts = np.array_split(np.arange(len(self.K)), max(1, len(self.K) * len(self.K) >> 24))
        return np.concatenate([self.K[part].astype(np.float64) @ c for part in parts])
