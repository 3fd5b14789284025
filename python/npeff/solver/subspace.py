"""A small subspace that holds nearly all of the rows: the search happens in it, only the polish outside.

With V an orthonormal basis of d directions and ``B = A Vᵀ``, vectors ``G = G' V`` have ``A Gᵀ = B G'ᵀ`` and
``G Gᵀ = G'G'ᵀ``: the loss over G' is the exact loss of vectors restricted to the subspace, at d numbers per row in
place of all columns. V comes from a randomised range finder with one power iteration (Halko, Martinsson & Tropp 2011).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from npeff.distributed.communicator import Communicator
from npeff.distributed.place import comm_of
from npeff.solver.spaces import FactorSpace

DIMENSIONS = 256
"""Dimensions tried first; at least four per component."""

MOST_DIMENSIONS = 1024
"""Dimensions at which doubling stops."""

ENOUGH = 0.95
"""Share of Σ‖row‖² that is worth stopping at."""


@dataclass(frozen=True)
class Subspace:
    """An orthonormal basis and the rows in it.

    Attributes:
        basis: Coordinates in the full space, ``(d₀, …)``, of vectors that span the subspace.
        turn: ``(d, d₀)``: V is ``turn @ basis``, never formed, since the full space may be wide.
        rows: ``B = A Vᵀ``, ``(n_rows, d)``.
        kept: ``Σ‖B‖² / Σ‖A‖²``.
        given: ``(f, d)`` coordinates, in the basis, of the vectors it was asked to contain.
    """

    basis: Tensor
    turn: Tensor
    rows: Tensor
    kept: float
    given: Tensor | None

    def lift(self, coords: Tensor) -> Tensor:
        """Full-space coordinates of vectors given in the basis, ``(r, d)`` → ``(r, …)``."""
        return (coords.to(self.basis) @ self.turn) @ self.basis


def find_subspace(
    space: FactorSpace,
    energy: float,
    r: int,
    generator: torch.Generator,
    given: Tensor | None = None,
    most: int | None = None,
) -> Subspace | None:
    """Find a subspace for r components.

    Args:
        space: The rows.
        energy: ``Σ‖row‖²`` of the rows.
        r: Number of components.
        generator: Of the range finder's random matrix.
        given: Coordinates of vectors that the subspace must contain, ``(f, …)``.
        most: Dimensions that fit into memory; None: any number.

    Returns:
        The subspace, or None where it would save nothing (as many dimensions as rows) or does not fit into memory.
    """
    d = max(DIMENSIONS, 4 * r)
    comm = comm_of(space)
    n_rows = int(comm.number(space.n_rows))
    while 2 * d <= n_rows and (most is None or d <= most):
        found = _range(space, d, energy, generator, given)
        if found.kept >= ENOUGH or 2 * d > max(MOST_DIMENSIONS, 4 * r) or (most is not None and 2 * d > most):
            return found
        d *= 2
    return None


def _range(space: FactorSpace, d: int, energy: float, generator: torch.Generator, given: Tensor | None) -> Subspace:
    coords = space.random(d if given is None else d - len(given), generator)
    Y = space.project(coords)[: space.n_rows]
    comm = comm_of(space)
    Q = torch.from_numpy(np.linalg.qr(Y.cpu().numpy())[0]).to(Y) if comm.size == 1 else _whitened(Y, comm)
    coords, weights = space.combine(Q), Q
    if given is not None:
        coords, weights = torch.cat([given, coords]), None
    elif comm.number(space.n_rows) > coords.shape[1]:
        weights = None
    coords, turn, P = _orthonormal(space, coords, weights)
    rows = P[: space.n_rows] @ turn.T
    kept = comm.number(float(torch.sum(rows * rows, dtype=torch.float64))) / max(energy, 1e-300)
    inside = None if given is None else space.inner(given, coords, P) @ turn.T
    return Subspace(coords, turn, rows, kept, inside)


def _whitened(Y: Tensor, comm: Communicator) -> Tensor:
    """``Y (YᵀY)^{-1/2}`` for rows spread over processes: columns as orthonormal as what follows needs them."""
    values, vectors = torch.linalg.eigh(comm.sum(Y.double().T @ Y.double()))
    return (Y.double() @ (vectors * values.clamp_min(1e-14 * values.max()).rsqrt())).to(Y)


def _orthonormal(space: FactorSpace, coords: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """An orthonormal basis V of the span, without the directions that are lost in rounding.

    Twice: what the first pass made of rounding errors alone does not come out with norm 1 in the second. Where the
    vectors are combinations ``Sᵀ A`` of known weights, their inner products are ``Sᵀ (A Gᵀ)``: for fewer rows than
    columns that is less work than G Gᵀ.

    Args:
        space: The rows.
        coords: ``(d, …)``.
        weights: S ``(n_rows, d)`` of these coordinates, or None.

    Returns:
        Coordinates ``(d₀, …)`` of some G, T ``(d, d₀)`` with V = T·G, and ``A Gᵀ``.
    """
    comm = comm_of(space)
    turn = torch.eye(len(coords), dtype=coords.dtype, device=coords.device)
    for least, most in ((1e-6, torch.inf), (0.9, 1.1)):
        coords = turn @ coords if most != torch.inf else coords
        P = space.project(coords)
        own = P[: space.n_rows]
        gram = (space.inner(coords, coords, P) if weights is None else comm.sum(weights.T @ own)).double()
        gram = (gram + gram.T) / 2
        values, vectors = (torch.from_numpy(a).to(P.device) for a in np.linalg.eigh(gram.cpu().numpy()))
        scale = values.max() if most == torch.inf else 1.0
        alive = (values > least * scale) & (values < most * scale)
        root = (vectors[:, alive] * values[alive].rsqrt()).to(P)
        turn = root.T
        weights = None if weights is None else weights @ root
    return coords, turn, P
