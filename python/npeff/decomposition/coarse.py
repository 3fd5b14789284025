"""The search in a subspace, and its way back: vectors of the full space, and a subspace that has room for their step.

What the full space still asks for, after a search in a subspace, is one step of the full problem. Its r vectors are
added to the basis and the cheap descent goes on in the wider subspace; a few such rounds do what many full steps
would (as Krylov methods enlarge their subspace by residuals; Saad 2011, ch. 6).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from npeff.decomposition.forms import State
from npeff.decomposition.low_rank import LowRank
from npeff.decomposition.spaces import SparseSpace
from npeff.decomposition.subspace import Subspace, widen
from npeff.fishers.rows import DenseRows
from npeff.fishers.scaling import ScaledRows


class Coarse:
    """A low-rank form over a subspace of another's space.

    Args:
        fine: The form over the full space.
        scaled: The rows that it was built from.
        orthogonality: As in ``fine``.
        subspace: Where to search.
        shared: Turns a space of this process's rows into one of the rows of all processes.
        most: Dimensions up to which the subspace may be widened.
    """

    def __init__(
        self, fine: LowRank, scaled: ScaledRows, orthogonality: float | str, subspace: Subspace,
        shared: Callable[[Any], Any], most: int,
    ) -> None:  # fmt: skip
        self.fine, self.subspace = fine, subspace
        self._rest = (scaled, orthogonality, shared, most)
        rows = DenseRows(subspace.rows.cpu().numpy())
        space = shared(SparseSpace(rows, subspace.rows.dtype, subspace.rows.device))
        within = replace(scaled, rows=rows, columns=None)
        self.form = LowRank(space, within, orthogonality, subspace.given, fine.frozen_W)

    def lift(self, state: State) -> State:
        """The same factorisation in the full space, its loss computed there."""
        coords = self.subspace.lift(state.coords)
        if self.fine.frozen is not None:
            coords[: len(self.fine.frozen)] = self.fine.frozen
        return self.fine.from_vectors(coords, state.W)

    def widened(self, state: State) -> tuple[Coarse, State] | None:
        """A subspace that holds a state of the full space as well, and that state in it.

        Returns:
            None where the state lies in the subspace already, or no wider one is allowed.
        """
        scaled, orthogonality, shared, most = self._rest
        if self.subspace.rows.shape[1] + state.r > most:
            return None
        wider = widen(self.fine.space, self.subspace, state.coords, state.P)
        if wider is None:
            return None
        subspace, coords = wider
        if subspace.given is not None:
            coords = torch.cat([subspace.given, coords[len(subspace.given) :]])
        coarse = Coarse(self.fine, scaled, orthogonality, subspace, shared, most)
        return coarse, coarse.form.from_vectors(coords, state.W)
