"""The low-rank form: ``A_iᵀA_i ≈ Σ_j W_ij g_j g_jᵀ``.

``L = Σ_i ‖A_iA_iᵀ‖² − 2⟨W, cross⟩ + ⟨WᵀW, gram⟩`` with ``cross_ij = ‖A_i g_j‖²`` and ``gram = (GGᵀ)∘²``
(Matena & Raffel 2023, equation of the LRM-NPEFF objective, expanded).
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from npeff import kernels
from npeff.decomposition.forms import State, draw_examples, improve, total
from npeff.decomposition.place import place_of
from npeff.decomposition.spaces import FactorSpace
from npeff.errors import ArgumentError
from npeff.fishers.scaling import ScaledRows

SWEEPS = 3
"""Coordinate-descent sweeps over W in a step."""

MOST_NOISE = 1e-3
"""Share of a vector's squared norm that may be rounding; beyond, the vector is given up."""


class LowRank:
    """The low-rank objective over a space.

    Args:
        space: Where the vectors live.
        scaled: The rows that the space was built from.
        orthogonality: λ ≥ 0 of the penalty ``λ·n·Σ_{j≠k} cos²(g_j, g_k)``, or ``"hard"`` for orthonormal vectors.
        frozen: Coordinates of vectors that stay as they are, ``(f, …)``.
        frozen_W: ``(n, f)`` coefficients of the frozen vectors to keep as well, or None to fit them.
    """

    def __init__(
        self,
        space: FactorSpace,
        scaled: ScaledRows,
        orthogonality: float | str = 0.0,
        frozen: Tensor | None = None,
        frozen_W: Tensor | None = None,
    ) -> None:
        self.space = space
        self.n_examples = scaled.n_examples
        self.row_offsets = torch.tensor(np.asarray(scaled.row_offsets)).to(space.device)
        self.energies = torch.from_numpy(scaled.fisher_norms**2).to(space.device)
        self.place = place_of(space, self.n_examples)
        self.comm = self.place.comm
        self.const = self.comm.number(float(self.energies.sum())) or 1.0
        self.hard = orthogonality == "hard"
        self.penalty = 0.0 if isinstance(orthogonality, str) else float(orthogonality) * self.place.n_examples
        self.frozen, self.frozen_W = frozen, frozen_W
        self._scaled = scaled

    # ---- statistics ----------------------------------------------------------------------------------------

    def cross(self, P: Tensor) -> Tensor:
        """``cross_ij = Σ_{rows of i} P²``, ``(n, r)``; rows of anchors belong to no example."""
        return kernels.cross(P[: self.space.n_rows], self.row_offsets)

    def spread(self, W: Tensor, P: Tensor) -> Tensor:
        """``(W∘P)``: every row of P times its example's coefficients, ``(rows, r)``."""
        return kernels.spread_multiply(W, P[: self.space.n_rows], self.row_offsets)

    def gram(self, state: State) -> Tensor:
        """``(GGᵀ)∘²``."""
        return state.Q * state.Q

    def reconstruction(self, W: Tensor, cross: Tensor, Q: Tensor) -> float:
        """L, accumulated in float64."""
        fit = total(W * cross)
        return self.const + self.comm.number(float(((W.T @ W).double() * Q.double().square()).sum() - 2 * fit))

    def objective(self, W: Tensor, cross: Tensor, Q: Tensor) -> float:
        """(L + penalty) / const for unit vectors."""
        loss = self.reconstruction(W, cross, Q)
        if self.penalty:
            loss += self.penalty * float(Q.double().square().sum() - Q.double().diagonal().square().sum())
        return self.comm.agreed(loss / self.const)

    # ---- states --------------------------------------------------------------------------------------------

    def start(self, r: int, generator: torch.Generator) -> State:
        """Random vectors in the row space, W fitted to them."""
        coords = self.space.random(r - self._n_frozen, generator)
        return self.from_vectors(coords if self.frozen is None else torch.cat([self.frozen, coords]))

    def from_vectors(self, coords: Tensor, W: Tensor | None = None) -> State:
        """A state with the given vectors; W fitted when it is not given."""
        P = self.space.project(coords)
        Q = self.space.inner(coords, coords, P)
        if self.hard:
            coords, P, Q = self._orthonormal(coords, P, Q)
        given = W is not None
        W = torch.zeros(self.n_examples, len(coords), dtype=P.dtype, device=P.device) if W is None else W.to(P)
        state = self._unit(State(W, coords, P, Q, frozen=self._n_frozen))
        if self.frozen_W is not None:
            state.W[:, : self._n_frozen] = self.frozen_W.to(P)
        if not given:
            return self.solve_W(state, 10)
        return replace(state, loss=self.objective(state.W, self.cross(state.P), state.Q))

    def _unit(self, state: State) -> State:
        """Unit vectors, those that have cancelled down to rounding set to zero.

        ``‖g‖²`` is computed with an error of about ε·stretch·‖coords‖². Where K is singular, duplicate components
        can leave of each other's coordinates a part that K does not see; scaled up to length one, it would be noise
        that the loss takes for a gain.
        """
        seen = state.Q.double().diagonal()
        sizes = state.coords.flatten(1).double().square().sum(1) * self.space.stretch
        return unit(state, alive=seen * MOST_NOISE > torch.finfo(state.coords.dtype).eps * sizes)

    @property
    def _n_frozen(self) -> int:
        return 0 if self.frozen is None else len(self.frozen)

    def refresh(self, state: State) -> State:
        """P and Q from the coordinates, against drift."""
        P = self.space.project(state.coords)
        fresh = self._unit(replace(state, P=P, Q=self.space.inner(state.coords, state.coords, P)))
        return replace(fresh, W=state.W)

    def solve_W(self, state: State, sweeps: int) -> State:
        """Coordinate descent on W; frozen coefficients stay."""
        cross = self.cross(state.P)
        W = improve(self.gram(state), cross, state.W, sweeps, self.frozen_W)
        return replace(state, W=W, loss=self.objective(W, cross, state.Q))

    # ---- the step ------------------------------------------------------------------------------------------

    def step(self, state: State) -> State:
        """Preconditioned direction, exact line search, unit norms, then W."""
        moved = self._rotate(state) if self.hard else self._line_search(state)
        return self.solve_W(moved, SWEEPS)

    def _line_search(self, state: State) -> State:
        """Move G along the fixed-point direction to the minimum of the exact quartic in t.

        ``D = M⁻¹ (W∘P)ᵀA − G`` with ``M = WᵀW ∘ Q`` solves the stationarity equation for G while M and W∘P stand
        still; frozen vectors keep D = 0 and their share moves to the right-hand side.
        """
        W, coords, P, Q, f = state.W, state.coords, state.P, state.Q, self._n_frozen
        B, off_diagonal = self.comm.sum(W.T @ W).double(), 1 - torch.eye(state.r, dtype=torch.float64, device=W.device)
        M = (B + self.penalty) * Q.double()  # positive semi-definite, as B + penalty·(1 − I) would not be
        B = B + self.penalty * off_diagonal
        ridge = (
            1e-6 * M.diagonal().mean().clamp_min(1e-30) * torch.eye(state.r - f, dtype=torch.float64, device=W.device)
        )
        inverse = torch.linalg.inv(M[f:, f:] + ridge)
        spread = self.spread(W, P)
        D = self.space.combine(spread[:, f:] @ inverse.to(P))
        if f or self.penalty:
            # ∇/4 = M G − (W∘P)ᵀA; with the penalty on cosines, less the part of it that only shortens vectors.
            shortening = torch.diag((off_diagonal * Q.double().square()).sum(1))
            true_M = B * Q.double() - self.penalty * shortening
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
        for _ in range(30):
            moved = self._unit(
                replace(state, coords=coords + t * D, P=P + t * PD, Q=(Q.double() + t * Q1 + t * t * Q2).to(Q))
            )
            if not self.penalty or self.objective(moved.W, self.cross(moved.P), moved.Q) <= state.loss:
                return moved
            t /= 2  # With a penalty on cosines the quartic is a model, exact at t = 0 only.
        return state

    def _quartic(
        self, W: Tensor, B: Tensor, spread: Tensor, PD: Tensor, Q: Tensor, Q1: Tensor, Q2: Tensor
    ) -> list[float]:
        """Coefficients c₀…c₄ of L(coords + tD) − L(coords), float64.

        ``−2⟨W, ‖A(g + td)‖²⟩ + ⟨B, (Q + tQ₁ + t²Q₂)∘²⟩``.
        """
        sums = [total(spread * PD[: self.space.n_rows]), total(W * self.cross(PD))]
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
        """``G ← polar((W∘P)ᵀA)``.

        With orthonormal rows W = cross is optimal and L = const − Σ cross², so that minimising L maximises a convex
        function of G over the Stiefel manifold: its linearisation's maximiser, the polar factor, never lowers it
        (generalised power method, Journée et al. 2010). Nor does it with a multiple of G added, which is the gradient
        of a convex function too: so a vector that no example uses any more stays where it is.
        """
        coords = self.space.combine(self.spread(self.cross(state.P), state.P))
        P = self.space.project(coords)
        Q = self.space.inner(coords, coords, P)
        shift = 1e-3 * Q.diagonal().max().sqrt()
        coords, P = coords + shift * state.coords, P + shift * state.P
        coords, P, Q = self._orthonormal(coords, P, self.space.inner(coords, coords, P))
        return replace(state, coords=coords, P=P, Q=Q)

    def _orthonormal(self, coords: Tensor, P: Tensor, Q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``Q^{-1/2}`` applied to the vectors: the nearest orthonormal ones.

        Raises:
            ArgumentError: They are not linearly independent.
        """
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

    def residuals(self, state: State) -> Tensor:
        """``‖F_i − Σ_j W_ij g_j g_jᵀ‖²`` per example, ``(n,)`` float64."""
        W = state.W.double()
        fit = self.cross(state.P).double()
        return (self.energies.to(W) - 2 * (W * fit).sum(1) + ((W @ self.gram(state).double()) * W).sum(1)).clamp_min(0)

    def candidates(self, state: State, count: int, generator: torch.Generator) -> State:
        """Append the top eigenvectors of examples, or of their residuals."""
        drawn, residual = draw_examples(self.comm.gathered(self.residuals(state)), count, generator)
        S = torch.zeros(self.space.n_rows, len(drawn), dtype=torch.float64)
        for column, i in self.place.own(drawn, self.n_examples):
            rows = slice(*self._scaled.row_offsets[i : i + 2].tolist())
            S[rows, column] = self._top_direction(i, rows, state, residual)
        fresh = self.space.combine(S.to(state.P))
        coords = torch.cat([state.coords, fresh])
        P_new = self.space.project(fresh)
        across = self.space.inner(state.coords, fresh, P_new)
        Q = torch.cat(
            [torch.cat([state.Q, across], 1), torch.cat([across.T, self.space.inner(fresh, fresh, P_new)], 1)]
        )
        W = torch.cat([state.W, state.W.new_zeros(len(state.W), len(drawn))], 1)
        P = torch.cat([state.P, P_new], 1)
        if self.hard:
            try:
                coords, P, Q = self._orthonormal(coords, P, Q)
            except ArgumentError:
                return state  # no room for more directions
        return self.solve_W(self._unit(replace(state, W=W, coords=coords, P=P, Q=Q)), 5)

    def _top_direction(self, i: int, rows: slice, state: State, residual: bool) -> Tensor:
        """Weights on example i's rows that give the top eigenvector of its Fisher, or of its residual.

        With ``A_iA_iᵀ = V Λ Vᵀ`` the rows of ``U = Λ^{-1/2} Vᵀ A_i`` are orthonormal and the residual in that basis is
        ``Λ − Σ_j W_ij (U g_j)(U g_j)ᵀ``.
        """
        values, V = np.linalg.eigh(self._scaled.rows.gram(rows.start, rows.stop))
        alive = values > 1e-6 * max(float(values.max(initial=0.0)), 1e-300)  # below, float32 rows are noise
        to_basis = V[:, alive] / np.sqrt(values[alive])
        target = np.diag(values[alive])
        if residual:
            p = to_basis.T @ state.P[rows].double().cpu().numpy()
            target -= (p * state.W[i].double().cpu().numpy()) @ p.T
        top = np.linalg.eigh(target)[1][:, -1] if alive.any() else np.zeros(0)
        return torch.from_numpy(to_basis @ top)


def unit(state: State, alive: Tensor | None = None) -> State:
    """The same factorisation with ``‖g_j‖ = 1``, the scale moved into W; vectors that are not ``alive`` become zero."""
    q = state.Q.double().diagonal()
    alive = q > 1e-30 if alive is None else alive & (q > 1e-30)
    q = torch.where(alive, q, torch.zeros_like(q))
    scale = torch.where(alive, q.clamp_min(1e-30).rsqrt(), q)
    s = scale.to(state.P)
    Q = state.Q.double() * scale * scale[:, None]
    return replace(
        state,
        W=state.W * q.to(state.W),
        coords=state.coords * s.view(-1, *[1] * (state.coords.ndim - 1)),
        P=state.P * s,
        Q=Q.to(state.Q),
    )


def minimise_quartic(c: list[float]) -> float:
    """The t that minimises ``Σ c_i tⁱ`` (c₄ ≥ 0): the best real root of the derivative, or 0."""
    roots = np.roots([4 * c[4], 3 * c[3], 2 * c[2], c[1]])
    real = [float(z.real) for z in roots if abs(z.imag) <= 1e-6 * max(1.0, abs(z))]
    return min([*real, 0.0], key=lambda t: sum(ci * t**i for i, ci in enumerate(c)))
