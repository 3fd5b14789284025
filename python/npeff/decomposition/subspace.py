"""A small subspace that holds nearly all of the rows: the search happens in it, and only the polish in the full space.

With V an orthonormal basis of d directions and ``B = A Vᵀ``, vectors ``G = G' V`` have ``A Gᵀ = B G'ᵀ`` and
``G Gᵀ = G'G'ᵀ``: the loss over G' is the exact loss of vectors restricted to the subspace, at d numbers per row in
place of all columns. V comes from a randomised range finder with one power iteration (Halko, Martinsson & Tropp 2011).

After the search, one step of the full problem is taken. Its r vectors are added to the basis and the cheap descent goes
on in the wider subspace; a few such rounds do what many full steps would (as Krylov methods enlarge their subspace by
residuals; Saad 2011, ch. 6).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from npeff.decomposition.kinds import LowRank
from npeff.decomposition.objective import State
from npeff.decomposition.processes import Processes
from npeff.decomposition.spaces import FactorSpace, RowSpace
from npeff.fishers.rows import DenseRows

DIMENSIONS = 256
"""Dimensions tried first; at least four per component."""

MOST_DIMENSIONS = 1024
"""Dimensions at which doubling stops."""

LEAST = 1e-6
"""Energy of a direction, as a share of the strongest one's, below which it is dropped: rounding would show."""

LEAST_NEW = 1e-3
"""The same for directions that widen a subspace; the next round finds the directions that were left out."""

LEAST_LACKING = 1e-9
"""Squared length outside the subspace, of a unit vector, that is more than rounding."""

WHITENED_ROWS = 1 << 14
"""Rows that are whitened at a time, in float64."""

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

    def to_full_space(self, coords: Tensor) -> Tensor:
        """Turn coordinates in the basis into coordinates of the full space, ``(r, d)`` → ``(r, …)``."""
        return (coords.to(self.basis) @ self.turn) @ self.basis


def restricted(full: LowRank, subspace: Subspace) -> LowRank:
    """Restrict the low-rank objective to vectors in a subspace."""
    rows = DenseRows(subspace.rows.cpu().numpy())
    space = RowSpace(rows, subspace.rows.dtype, subspace.rows.device, full.comm)
    within = replace(full.scaled, rows=rows, columns=None)
    return LowRank(space, within, full.orthogonality, subspace.given, full.frozen_W)


def to_full_space(full: LowRank, subspace: Subspace, state: State) -> State:
    """Turn a factorisation in the subspace into one in the full space, its loss computed there."""
    coords = subspace.to_full_space(state.coords)
    if full.frozen is not None:
        coords[: len(full.frozen)] = full.frozen
    return full.from_vectors(coords, state.W)


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
    comm = space.comm
    n_rows = int(comm.number(space.n_rows))
    while 2 * d <= n_rows and (most is None or d <= most):
        found = _range(space, d, energy, generator, given)
        if found.kept >= ENOUGH or 2 * d > max(MOST_DIMENSIONS, 4 * r) or (most is not None and 2 * d > most):
            return found
        d *= 2
    return None


def most_dimensions(available: int, n_rows: int, width: int, number: int) -> int:
    """Compute the most dimensions of a subspace that is found, and widened, in given memory.

    Per direction and row: products with the rows, and beside them the rows in the subspace, or earlier some products in
    float64. Per direction and column: the basis, which is there twice while it is made. Beside them eigenvectors of
    d × d matrices in float64, and what finding these takes.

    Args:
        available: Bytes.
        n_rows: Rows that are here.
        width: Length of a vector's coordinates in the space.
        number: Bytes of a number in the solver's precision.
    """
    linear = number * n_rows + max(number * n_rows, 16 * min(n_rows, WHITENED_ROWS)) + 2 * number * width
    square = 64
    return int((math.sqrt(linear**2 + 4.0 * square * available) - linear) / (2 * square))


def widen(space: FactorSpace, subspace: Subspace, coords: Tensor, P: Tensor) -> tuple[Subspace, Tensor] | None:
    """Widen a subspace to contain some vectors of the full space.

    Args:
        space: The rows.
        subspace: The subspace.
        coords: Full-space coordinates of unit vectors X, ``(r, …)``; first those that the subspace had to contain.
        P: ``A Xᵀ``.

    Returns:
        The wider subspace and the coordinates of X in it; None where the subspace contains X up to rounding.
    """
    inside = _within(space, subspace, coords, P)
    rest = coords - subspace.to_full_space(inside)
    P_rest = space.project(rest)
    squares = space.inner(rest, rest, P_rest).double().diagonal()
    noise = torch.finfo(P.dtype).eps * space.norm_bound * rest.double().square().sum(1)
    lacking = (squares > LEAST_LACKING) & (squares > 1e3 * noise)
    if not bool(lacking.any()):
        return None
    scale = squares[lacking].rsqrt().to(P)
    rest, P_rest = rest[lacking] * scale[:, None], P_rest[:, lacking] * scale
    # A small remainder of X has lost digits to the subtraction: repeating it once is enough (Giraud et al. 2005).
    rest = rest - subspace.to_full_space(_within(space, subspace, rest, P_rest))
    P_rest = space.project(rest)
    turn = _turn(space.inner(rest, rest, P_rest).double(), LEAST_NEW).to(P)
    outside = (turn @ space.inner(rest, coords, P)).T
    wider = Subspace(
        torch.cat([subspace.basis, rest]),
        torch.cat(
            [
                torch.nn.functional.pad(subspace.turn, (0, turn.shape[1])),
                torch.nn.functional.pad(turn, (subspace.turn.shape[1], 0)),
            ]
        ),
        torch.cat([subspace.rows, P_rest[: space.n_rows] @ turn.T], 1),
        subspace.kept,
        None if subspace.given is None else torch.nn.functional.pad(subspace.given, (0, len(turn))),
    )
    found = torch.cat([inside, outside], 1)
    return wider, found if wider.given is None else torch.cat([wider.given, found[len(wider.given) :]])


def _within(space: FactorSpace, subspace: Subspace, coords: Tensor, P: Tensor) -> Tensor:
    """Compute the coordinates in the subspace of full-space vectors' projections on it, ``(r, d)``."""
    return (subspace.turn @ space.inner(subspace.basis, coords, P)).T


def _range(space: FactorSpace, d: int, energy: float, generator: torch.Generator, given: Tensor | None) -> Subspace:
    coords = space.random(d if given is None else d - len(given), generator)
    comm = space.comm
    weights: Tensor | None = _whiten(space.project(coords)[: space.n_rows], comm)
    assert weights is not None
    coords = space.combine(weights)
    if given is not None:
        coords = torch.cat([given, coords])
    if given is not None or comm.number(space.n_rows) > coords.shape[1]:
        weights = None
    turn, P = _orthonormal(space, coords, weights)
    rows = P[: space.n_rows] @ turn.T
    squares = sum(float(torch.sum(part * part, dtype=torch.float64)) for part in torch.split(rows, WHITENED_ROWS))
    kept = comm.number(squares) / max(energy, 1e-300)
    inside = None if given is None else space.inner(given, coords, P) @ turn.T
    return Subspace(coords, turn, rows, kept, inside)


def _whiten(Y: Tensor, comm: Processes) -> Tensor:
    """Compute ``Y (YᵀY)^{-1/2}`` in the place of Y: nearly orthonormal columns, for less work than QR."""
    gram = torch.zeros(Y.shape[1], Y.shape[1], dtype=torch.float64, device=Y.device)
    parts = torch.split(Y, WHITENED_ROWS)
    for part in parts:
        gram += part.double().T @ part.double()
    values, vectors = _eigh(comm.sum(gram))
    root = vectors * values.clamp_min(1e-14 * values.max()).rsqrt()
    for part in parts:
        part.copy_(part.double() @ root)
    return Y


def _eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    values, vectors = np.linalg.eigh(matrix.cpu().numpy())
    return torch.from_numpy(values).to(matrix.device), torch.from_numpy(vectors).to(matrix.device)


def _orthonormal(space: FactorSpace, coords: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    """Compute an orthonormal basis V of the span, without the directions that are lost in rounding.

    Where the vectors are combinations ``Sᵀ A`` of known weights, their inner products are ``Sᵀ (A Gᵀ)``: for fewer rows
    than columns that is less work than G Gᵀ.

    Args:
        space: The rows.
        coords: ``(d₀, …)`` of some G.
        weights: S ``(n_rows, d₀)`` of these coordinates, or None.

    Returns:
        T ``(d, d₀)`` with V = T·G, and ``A Gᵀ``.
    """
    P = space.project(coords)
    if weights is None:
        gram = space.inner(coords, coords, P).double()
    else:
        gram = space.comm.sum(weights.T @ P[: space.n_rows]).double()
    return _turn(gram).to(P), P


def _turn(gram: Tensor, least: float = LEAST) -> Tensor:
    """Compute T ``(d, d₀)`` that makes vectors with these inner products orthonormal, less what is lost in rounding."""
    values, vectors = _eigh((gram + gram.T) / 2)
    alive = values > least * values.max()
    return (vectors[:, alive] * values[alive].rsqrt()).T
