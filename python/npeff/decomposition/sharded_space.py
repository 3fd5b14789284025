"""A space of which every process holds a block of rows: products with rows stay at home, sums over rows are added up.

P and W, which have a row or an entry per example, are spread; coordinates and inner products, which have not, are the
same in every process. So an all-reduce of r·d numbers a step is all that vectors need, however many examples there are.
"""

from __future__ import annotations

import torch
from torch import Tensor

from npeff.decomposition.place import Place
from npeff.decomposition.sketch_space import SketchSpace
from npeff.decomposition.spaces import SparseSpace


class ShardedSpace:
    """The rows of all processes, of which ``own`` are here.

    Args:
        own: This process's rows.
        place: Where they lie among all.
    """

    stretch = 1.0

    def __init__(self, own: SparseSpace | SketchSpace, place: Place) -> None:
        self.own, self.place = own, place
        self.name = f"{own.name}, {place.comm.size} processes"
        self.n_rows, self.n_columns, self.dtype = own.n_rows, own.n_columns, own.dtype
        self.step_bytes, self.device = own.step_bytes, own.device

    def random(self, r: int, generator: torch.Generator) -> Tensor:
        """Random combinations of the rows of all processes: those that one process would draw."""
        weights = self.place.normal(r, self.n_rows, generator).T.contiguous()
        return self.combine(self.own.embed(weights))

    def embed(self, vectors: Tensor) -> Tensor:
        """The vectors."""
        return self.own.embed(vectors)

    def project(self, coords: Tensor) -> Tensor:
        """``A Gᵀ`` for the rows that are here, ``(n_rows, r)``."""
        return self.own.project(coords)

    def combine(self, S: Tensor) -> Tensor:
        """``Sᵀ A``, summed over the rows of all processes, for the rows of S that are here."""
        return self.place.comm.sum(self.own.combine(S))

    def inner(self, a: Tensor, b: Tensor, P_b: Tensor) -> Tensor:
        """``G_a G_bᵀ``."""
        return self.own.inner(a, b, P_b)

    def vectors(self, coords: Tensor) -> Tensor:
        """The coordinates."""
        return self.own.vectors(coords)
