"""The objectives of both kinds: low-rank ``A_iᵀA_i ≈ Σ_j W_ij g_j g_jᵀ``, diagonal ``f_i ≈ Σ_j W_ij h_j``."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from npeff import kernels
from npeff.decomposition.objective import Objective, State, coordinate_descent, sum_float64
from npeff.decomposition.spaces import FactorSpace
from npeff.errors import ArgumentError
from npeff.fishers.scaling import ScaledRows

MOST_NOISE = 1e-3
"""Share of a vector's squared norm that may be rounding; a vector with more is set to zero."""

HALVINGS = 30
"""Step lengths tried where the quartic is a model only."""

FIRST_BETA, GROWTH, CEILING_GROWTH, RETREAT = 0.5, 1.05, 1.01, 1.5
"""Extrapolation: β at first, its growth and that of its ceiling after a fall, its division after a rise."""


class LowRank(Objective):
    """The low-rank objective over a space, ``A_iᵀA_i ≈ Σ_j W_ij g_j g_jᵀ``.

    ``L = Σ_i ‖A_iA_iᵀ‖² − 2⟨W, cross⟩ + ⟨WᵀW, gram⟩`` with ``cross_ij = ‖A_i g_j‖²`` and ``gram = (GGᵀ)∘²``
    (Matena & Raffel 2023, equation of the LRM-NPEFF objective, expanded).

    Args:
        space: Where the vectors live.
        scaled: The rows that the space was built from.
        orthogonality: λ ≥ 0 of the penalty ``λ·n·Σ_{j≠k} cos²(g_j, g_k)``, or ``"hard"`` for orthonormal vectors.
        frozen: Coordinates of vectors that stay as they are, ``(f, …)``.
        frozen_W: ``(n, f)`` coefficients of the frozen vectors to keep as well, or None to fit them.
    """

    sweeps = 3

    def __init__(
        self,
        space: FactorSpace,
        scaled: ScaledRows,
        orthogonality: float | str = 0.0,
        frozen: Tensor | None = None,
        frozen_W: Tensor | None = None,
    ) -> None:
        super().__init__(space, scaled, frozen, frozen_W)
        self.row_offsets = torch.tensor(np.asarray(scaled.row_offsets)).to(space.device)
        self.orthogonality = orthogonality
        self._weight = 0.0 if isinstance(orthogonality, str) else float(orthogonality) * self.n_all_examples

    # ---- statistics ----------------------------------------------------------------------------------------

    def cross(self, P: Tensor) -> Tensor:
        """Compute ``cross_ij = Σ_{rows of i} P²``, ``(n, r)``; rows of anchors belong to no example."""
        return kernels.cross(P[: self.space.n_rows], self.row_offsets)

    def spread(self, W: Tensor, P: Tensor) -> Tensor:
        """Compute ``W∘P``: every row of P times its example's coefficients, ``(rows, r)``."""
        return kernels.spread_multiply(W, P[: self.space.n_rows], self.row_offsets)

    def gram(self, Q: Tensor) -> Tensor:
        """Compute ``(GGᵀ)∘²``."""
        return Q * Q

    def penalty(self, Q: Tensor) -> float:
        """Compute ``λ·n·Σ_{j≠k} cos²(g_j, g_k)``."""
        if not self._weight:
            return 0.0
        return self._weight * float(Q.double().square().sum() - Q.double().diagonal().square().sum())

    # ---- states --------------------------------------------------------------------------------------------

    def random_coords(self, r: int, generator: torch.Generator) -> Tensor:
        """Draw random vectors in the row space."""
        return self.space.random(r, generator)

    def unit(self, state: State) -> State:
        """Scale vectors to length one; those that have cancelled down to rounding become zero.

        ``‖g‖²`` is computed with an error of about ε·norm_bound·‖coords‖². Where K is singular, duplicate components
        can leave of each other's coordinates a part that K does not see; scaled up to length one, it would be noise
        that the loss takes for a gain.
        """
        computed = state.Q.double().diagonal()
        sizes = state.coords.flatten(1).double().square().sum(1) * self.space.norm_bound
        return unit(state, alive=computed * MOST_NOISE > torch.finfo(state.coords.dtype).eps * sizes)

    def refresh(self, state: State) -> State:
        """Compute P and Q from the coordinates, against drift."""
        P = self.space.project(state.coords)
        fresh = self.unit(replace(state, P=P, Q=self.space.inner(state.coords, state.coords, P)))
        return replace(fresh, W=state.W)

    # ---- the step ------------------------------------------------------------------------------------------

    def step(self, state: State) -> State:
        """Move G along the fixed-point direction to the minimum of the exact quartic in t; then improve W.

        ``D = M⁻¹ (W∘P)ᵀA − G`` with ``M = WᵀW ∘ Q`` solves the stationarity equation for G while M and W∘P are held
        fixed; frozen vectors keep D = 0 and their share moves to the right-hand side.
        """
        if self.orthogonality == "hard":
            return self.solve_W(self._rotate(state), self.sweeps)
        W, coords, P, Q, f = state.W, state.coords, state.P, state.Q, self.n_frozen
        B, off_diagonal = self.comm.sum(W.T @ W).double(), 1 - torch.eye(state.r, dtype=torch.float64, device=W.device)
        M = (B + self._weight) * Q.double()  # positive semi-definite, as B + weight·(1 − I) would not be
        B = B + self._weight * off_diagonal
        ridge = (
            1e-6 * M.diagonal().mean().clamp_min(1e-30) * torch.eye(state.r - f, dtype=torch.float64, device=W.device)
        )
        inverse = torch.linalg.inv(M[f:, f:] + ridge)
        spread = self.spread(W, P)
        D = self.space.combine(spread[:, f:] @ inverse.to(P))
        if f or self._weight:
            # ∇/4 = M G − (W∘P)ᵀA; with the penalty on cosines, less the part of it that only shortens vectors.
            shortening = torch.diag((off_diagonal * Q.double().square()).sum(1))
            true_M = B * Q.double() - self._weight * shortening
            D = D - (inverse @ true_M[f:]).to(coords) @ coords
            D = torch.cat([torch.zeros_like(coords[:f]), D])
        else:
            D = D - coords
        # The ridge biases the fixed point by 1e-6; the line search below is exact all the same.
        PD = self.space.project(D)
        cross_term = self.space.inner(coords, D, PD).double()
        Q1, Q2 = cross_term + cross_term.T, self.space.inner(D, D, PD).double()
        quartic = self._quartic(W, B, spread, PD, Q.double(), Q1, Q2)
        t = minimise_quartic(quartic)
        for _ in range(HALVINGS):
            moved = self.unit(
                replace(state, coords=coords + t * D, P=P + t * PD, Q=(Q.double() + t * Q1 + t * t * Q2).to(Q))
            )
            if not self._weight or self.relative_loss(moved.W, self.cross(moved.P), moved.Q) <= state.loss:
                return self.solve_W(moved, self.sweeps)
            t /= 2  # With a penalty on cosines the quartic is a model, exact at t = 0 only.
        return self.solve_W(state, self.sweeps)

    def _quartic(
        self, W: Tensor, B: Tensor, spread: Tensor, PD: Tensor, Q: Tensor, Q1: Tensor, Q2: Tensor
    ) -> list[float]:
        """Compute the coefficients c₀…c₄ of L(coords + tD) − L(coords), float64.

        ``−2⟨W, ‖A(g + td)‖²⟩ + ⟨B, (Q + tQ₁ + t²Q₂)∘²⟩``.
        """
        sums = [sum_float64(spread * PD[: self.space.n_rows]), sum_float64(W * self.cross(PD))]
        linear, square = self.comm.sum(torch.tensor(sums, dtype=torch.float64)).tolist()

        def pair(a: Tensor, b: Tensor) -> float:
            return float((B * a * b).sum())

        return [
            0.0,
            -4 * linear + 2 * pair(Q, Q1),
            -2 * square + pair(Q1, Q1) + 2 * pair(Q, Q2),
            2 * pair(Q1, Q2),
            pair(Q2, Q2),
        ]

    # ---- orthonormal vectors -------------------------------------------------------------------------------

    def _rotate(self, state: State) -> State:
        """Set ``G ← polar((W∘P)ᵀA)``.

        With orthonormal rows W = cross is optimal and L = const − Σ cross², so that minimising L maximises a convex
        function of G over the Stiefel manifold: its linearisation's maximiser, the polar factor, never lowers it
        (generalised power method, Journée et al. 2010). A multiple of G is added, the gradient of a convex function
        too, so that a vector that no example uses any more stays where it is.
        """
        coords = self.space.combine(self.spread(self.cross(state.P), state.P))
        P = self.space.project(coords)
        Q = self.space.inner(coords, coords, P)
        shift = 1e-3 * Q.diagonal().max().sqrt()
        coords, P = coords + shift * state.coords, P + shift * state.P
        coords, P, Q = self.admissible(coords, P, self.space.inner(coords, coords, P))
        return replace(state, coords=coords, P=P, Q=Q)

    def admissible(self, coords: Tensor, P: Tensor, Q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Apply ``Q^{-1/2}`` with ``orthogonality="hard"``, which gives the nearest orthonormal vectors.

        Raises:
            ArgumentError: The vectors are not linearly independent.
        """
        if self.orthogonality != "hard":
            return coords, P, Q
        for _ in range(2):  # twice: the first pass leaves float32 error of the condition number's size
            values, basis = torch.linalg.eigh((Q.double() + Q.double().T) / 2)
            if not values.min() > 1e-7 * values.max():
                raise ArgumentError(
                    f"orthogonality: 'hard' needs {len(Q)} linearly independent vectors, but the Fishers' rows span "
                    "fewer directions; ask for fewer components"
                )
            root = (basis * values.rsqrt()) @ basis.T
            coords, P = root.to(coords) @ coords, P @ root.to(P)
            Q = self.space.inner(coords, coords, P)
        return coords, P, Q

    # ---- new components ------------------------------------------------------------------------------------

    def new_vectors(self, state: State, examples: list[tuple[int, int]], count: int, residual: bool) -> Tensor:
        """Make the top eigenvectors of examples, or of their residuals."""
        S = torch.zeros(self.space.n_rows, count, dtype=torch.float64)
        for column, i in examples:
            rows = slice(*self.scaled.row_offsets[i : i + 2].tolist())
            S[rows, column] = self._top_direction(i, rows, state, residual)
        return self.space.combine(S.to(state.P))

    def _top_direction(self, i: int, rows: slice, state: State, residual: bool) -> Tensor:
        """Find the weights on example i's rows that give the top eigenvector of its Fisher, or of its residual.

        With ``A_iA_iᵀ = V Λ Vᵀ`` the rows of ``U = Λ^{-1/2} Vᵀ A_i`` are orthonormal and the residual in that basis is
        ``Λ − Σ_j W_ij (U g_j)(U g_j)ᵀ``.
        """
        values, V = np.linalg.eigh(self.scaled.rows.gram(rows.start, rows.stop))
        alive = values > 1e-6 * max(float(values.max(initial=0.0)), 1e-300)  # below, float32 rows are noise
        to_basis = V[:, alive] / np.sqrt(values[alive])
        target = np.diag(values[alive])
        if residual:
            p = to_basis.T @ state.P[rows].double().cpu().numpy()
            target -= (p * state.W[i].double().cpu().numpy()) @ p.T
        top = np.linalg.eigh(target)[1][:, -1] if alive.any() else np.zeros(0)
        return torch.from_numpy(to_basis @ top)


@dataclass(frozen=True)
class Trail:
    """The last step, which the next one extrapolates.

    Attributes:
        W: ``(n, r)`` coefficients before the last step.
        H: ``(r, n_columns)`` vectors as the last step found them, before they were extrapolated.
        beta: Length of the extrapolation, as a share of the last step.
        ceiling: Upper bound of β.
        before: β before its last growth; the next ceiling if the loss rises.
    """

    W: Tensor
    H: Tensor
    beta: float = FIRST_BETA
    ceiling: float = 1.0
    before: float = FIRST_BETA

    def grown(self) -> tuple[float, float, float]:
        """Return β, its ceiling, and β before, after a step that lowered the loss."""
        return min(self.ceiling, GROWTH * self.beta), min(1.0, CEILING_GROWTH * self.ceiling), self.beta

    def shrunk(self) -> tuple[float, float, float]:
        """Return β, its ceiling, and β before, after a step that would have raised the loss."""
        return self.beta / RETREAT, self.before, self.beta / RETREAT


class Diagonal(Objective):
    """The diagonal objective ``f_i ≈ Σ_j W_ij h_j`` with W, H ≥ 0: non-negative matrix factorisation.

    ``L = Σ_i ‖f_i‖² − 2⟨W, F Hᵀ⟩ + ⟨WᵀW, H Hᵀ⟩``, minimised by hierarchical alternating least squares with cached Gram
    matrices (Cichocki & Phan 2009; Gillis & Glineur 2012): each pass over F is followed by several sweeps, which are
    cheap beside it. Steps are extrapolated (Ang & Gillis 2019): each half-step starts from a point further along the
    last one, by a share that grows as long as the loss falls; where the loss would rise, a plain step is taken instead.

    Coordinates are H itself, ``(r, n_columns)``, ≥ 0.
    """

    sweeps = 8
    """Sweeps over W, and over H, per pass over the data: they are cheap beside it."""

    def cross(self, P: Tensor) -> Tensor:
        """Return ``F Hᵀ``."""
        return P

    def gram(self, Q: Tensor) -> Tensor:
        """Return ``H Hᵀ``."""
        return Q

    def random_coords(self, r: int, generator: torch.Generator) -> Tensor:
        """Multiply every entry of the mean diagonal by a random number.

        Mixtures of examples would be smoother, and too much alike: descents from them end far higher.
        """
        noise = torch.randn(r, self.scaled.rows.n_columns, generator=generator).abs()
        ones = torch.ones(self.space.n_rows, 1, dtype=torch.float64)
        H = self.space.embed(noise)
        return H * self.space.combine(ones.to(H))

    def refresh(self, state: State) -> State:
        """Compute P and Q from H, against drift; extrapolation begins anew."""
        H = state.coords
        return replace(state, P=self.space.project(H), Q=H @ H.T, trail=None)

    def step(self, state: State) -> State:
        """Take an extrapolated step on H, then W; a plain one where that would raise the loss."""
        trail: Trail = state.trail or Trail(state.W, state.coords)
        W = (state.W + trail.beta * (state.W - trail.W)).clamp_min(0)
        H = self._improve_H(W, state.coords)
        extrapolated = (H + trail.beta * (H - trail.H)).clamp_min(0)
        moved = self._fit(replace(state, W=W), extrapolated)
        if moved.loss < state.loss or not trail.beta:
            return self.unit(replace(moved, trail=Trail(state.W, H, *trail.grown())))
        H = self._improve_H(state.W, state.coords)
        plain = self._fit(state, H)
        return self.unit(replace(plain, trail=Trail(state.W, H, *trail.shrunk())))

    def _improve_H(self, W: Tensor, H: Tensor) -> Tensor:
        """Improve H by coordinate descent with ``WᵀW`` and ``WᵀF`` cached."""
        frozen = None if self.frozen is None else self.frozen.T
        return coordinate_descent(
            self.comm.sum(W.T @ W), self.space.combine(W).T, H.T, self.sweeps, frozen
        ).T.contiguous()

    def _fit(self, state: State, H: Tensor) -> State:
        """Take these vectors, and improve W by coordinate descent with ``HHᵀ`` and ``FHᵀ`` cached."""
        return self.solve_W(replace(state, coords=H, P=self.space.project(H), Q=H @ H.T), self.sweeps)

    def new_vectors(self, state: State, examples: list[tuple[int, int]], count: int, residual: bool) -> Tensor:
        """Return examples, or the positive parts of their residuals."""
        pick = torch.zeros(self.space.n_rows, count, dtype=state.P.dtype, device=state.P.device)
        for column, i in examples:
            pick[i, column] = 1
        fresh = self.space.combine(pick)
        return (fresh - self.comm.sum(pick.T @ state.W) @ state.coords).clamp_min(0) if residual else fresh

    def unit(self, state: State) -> State:
        """Scale vectors to ``‖h_j‖ = 1``, the scale moved into W; those of the last step likewise."""
        norm = state.Q.double().diagonal().sqrt()
        scale = torch.where(norm > 1e-30, 1 / norm.clamp_min(1e-30), torch.zeros_like(norm))
        found, trail = _scaled(state, scale, norm), state.trail
        if trail is None:
            return found
        W, H = trail.W * norm.to(state.W), trail.H * scale.to(state.P)[:, None]
        return replace(found, trail=replace(trail, W=W, H=H))


def unit(state: State, alive: Tensor | None = None) -> State:
    """Scale vectors to ``‖g_j‖ = 1``, the scale moved into W; vectors that are not ``alive`` become zero."""
    q = state.Q.double().diagonal()
    alive = q > 1e-30 if alive is None else alive & (q > 1e-30)
    q = torch.where(alive, q, torch.zeros_like(q))
    return _scaled(state, torch.where(alive, q.clamp_min(1e-30).rsqrt(), q), q)


def _scaled(state: State, scale: Tensor, weight: Tensor) -> State:
    """Multiply vectors by ``scale`` and coefficients by ``weight``, both ``(r,)`` float64."""
    s, Q = scale.to(state.P), state.Q.double() * scale * scale[:, None]
    return replace(
        state, W=state.W * weight.to(state.W), coords=state.coords * s[:, None], P=state.P * s, Q=Q.to(state.Q)
    )


def minimise_quartic(c: list[float]) -> float:
    """Find the t that minimises ``Σ c_i tⁱ`` (c₄ ≥ 0): the best real root of the derivative, or 0."""
    roots = np.roots([4 * c[4], 3 * c[3], 2 * c[2], c[1]])
    real = [float(z.real) for z in roots if abs(z.imag) <= 1e-6 * max(1.0, abs(z))]
    return min([*real, 0.0], key=lambda t: sum(ci * t**i for i, ci in enumerate(c)))
