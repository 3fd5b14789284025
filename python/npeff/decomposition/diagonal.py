"""The diagonal form: ``f_i ≈ Σ_j W_ij h_j`` with W, H ≥ 0, non-negative matrix factorisation.

``L = Σ_i ‖f_i‖² − 2⟨W, F Hᵀ⟩ + ⟨WᵀW, H Hᵀ⟩``, minimised by hierarchical alternating least squares with cached Gram
matrices (Cichocki & Phan 2009; Gillis & Glineur 2012): each pass over F is followed by several sweeps that cost
nothing of it. Steps are extrapolated (Ang & Gillis 2019): each half-step starts from where the last one was heading,
further along as long as the loss falls; where it would rise, a plain step is taken instead.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from npeff.decomposition.forms import State, draw_examples, improve, total
from npeff.decomposition.place import place_of
from npeff.decomposition.sketch_space import SketchSpace
from npeff.decomposition.spaces import SparseSpace
from npeff.fishers.scaling import ScaledRows

SWEEPS = 8
"""Coordinate-descent sweeps over W, and over H, per pass over the data: they cost little of it."""

BOLDNESS, GROWTH, CEILING_GROWTH, RETREAT = 0.5, 1.05, 1.01, 1.5
"""Extrapolation: β at first, its growth and that of its ceiling after a fall, its division after a rise."""


@dataclass(frozen=True)
class Trail:
    """What extrapolation remembers.

    Attributes:
        W: ``(n, r)`` coefficients before the last step.
        H: ``(r, n_columns)`` vectors as the last step found them, before they were extrapolated.
        beta: How far to go on, as a share of the last step.
        ceiling: What β must not exceed.
        before: β before its last growth: the next ceiling, should the loss rise.
    """

    W: Tensor
    H: Tensor
    beta: float = BOLDNESS
    ceiling: float = 1.0
    before: float = BOLDNESS

    def grown(self) -> tuple[float, float, float]:
        """β, its ceiling, and β as it was, after a step that lowered the loss."""
        return min(self.ceiling, GROWTH * self.beta), min(1.0, CEILING_GROWTH * self.ceiling), self.beta

    def shrunk(self) -> tuple[float, float, float]:
        """The same after a step that would have raised it."""
        return self.beta / RETREAT, self.before, self.beta / RETREAT


class Diagonal:
    """The diagonal objective. Coordinates are H itself, ``(r, n_columns)``, ≥ 0.

    Args:
        space: The diagonals.
        scaled: The rows that the space was built from.
        frozen: ``(f, n_columns)`` vectors that stay as they are.
        frozen_W: ``(n, f)`` coefficients of the frozen vectors to keep as well, or None to fit them.
    """

    def __init__(
        self,
        space: SparseSpace | SketchSpace,
        scaled: ScaledRows,
        frozen: Tensor | None = None,
        frozen_W: Tensor | None = None,
    ) -> None:
        self.space = space
        self.n_examples = scaled.n_examples
        self.energies = torch.from_numpy(scaled.fisher_norms**2).to(space.device)
        self.place = place_of(space, self.n_examples)
        self.comm = self.place.comm
        self.const = self.comm.number(float(self.energies.sum())) or 1.0
        self.frozen, self.frozen_W = None if frozen is None else space.embed(frozen), frozen_W
        self._n_frozen = 0 if frozen is None else len(frozen)

    def gram(self, state: State) -> Tensor:
        """``H Hᵀ``."""
        return state.Q

    def objective(self, W: Tensor, P: Tensor, Q: Tensor) -> float:
        """L / const, accumulated in float64."""
        fit = total(W * P)
        rest = self.comm.number(float(((W.T @ W).double() * Q.double()).sum() - 2 * fit))
        return self.comm.agreed((self.const + rest) / self.const)

    def start(self, r: int, generator: torch.Generator) -> State:
        """H from the mean diagonal, every entry of it times a random number, W fitted to them.

        Mixtures of examples would be smoother, and too much alike: descents from them end far higher.
        """
        noise = self.space.embed(torch.randn(r - self._n_frozen, self.space.n_columns, generator=generator).abs())
        H = noise * self.space.combine(torch.ones(self.space.n_rows, 1, dtype=noise.dtype, device=noise.device))
        return self.from_vectors(H if self.frozen is None else torch.cat([self.frozen, H]))

    def from_vectors(self, H: Tensor, W: Tensor | None = None) -> State:
        """A state with the given vectors; W fitted when it is not given."""
        P = self.space.project(H)
        given = W is not None
        W = torch.zeros_like(P) if W is None else W.to(P)
        state = self._unit(State(W, H, P, H @ H.T, frozen=self._n_frozen))
        if self.frozen_W is not None:
            state.W[:, : self._n_frozen] = self.frozen_W
        return replace(state, loss=self.objective(state.W, state.P, state.Q)) if given else self.solve_W(state, 10)

    def refresh(self, state: State) -> State:
        """P and Q from H, against drift; extrapolation begins anew."""
        return replace(state, P=self.space.project(state.coords), Q=state.coords @ state.coords.T, trail=None)

    def solve_W(self, state: State, sweeps: int) -> State:
        """Coordinate descent on W; frozen coefficients stay."""
        W = improve(state.Q, state.P, state.W, sweeps, self.frozen_W)
        return replace(state, W=W, loss=self.objective(W, state.P, state.Q))

    def step(self, state: State) -> State:
        """One extrapolated step on H, then W; a plain one where that would raise the loss."""
        trail: Trail = state.trail or Trail(state.W, state.coords)
        W = (state.W + trail.beta * (state.W - trail.W)).clamp_min(0)
        H = self._improved_H(W, state.coords)
        bold = (H + trail.beta * (H - trail.H)).clamp_min(0)
        moved = self._with_H(replace(state, W=W), bold)
        if moved.loss < state.loss or not trail.beta:
            return self._unit(replace(moved, trail=Trail(state.W, H, *trail.grown())))
        H = self._improved_H(state.W, state.coords)
        plain = self._with_H(state, H)
        return self._unit(replace(plain, trail=Trail(state.W, H, *trail.shrunk())))

    def _improved_H(self, W: Tensor, H: Tensor) -> Tensor:
        """H by coordinate descent with ``WᵀW`` and ``WᵀF`` cached."""
        frozen = None if self.frozen is None else self.frozen.T
        return improve(self.comm.sum(W.T @ W), self.space.combine(W).T, H.T, SWEEPS, frozen).T.contiguous()

    def _with_H(self, state: State, H: Tensor) -> State:
        """These vectors, and W by coordinate descent with ``HHᵀ`` and ``FHᵀ`` cached."""
        return self.solve_W(replace(state, coords=H, P=self.space.project(H), Q=H @ H.T), SWEEPS)

    def residuals(self, state: State) -> Tensor:
        """``‖f_i − Σ_j W_ij h_j‖²`` per example, ``(n,)`` float64."""
        W = state.W.double()
        return (
            self.energies.to(W) - 2 * (W * state.P.double()).sum(1) + ((W @ state.Q.double()) * W).sum(1)
        ).clamp_min(0)

    def candidates(self, state: State, count: int, generator: torch.Generator) -> State:
        """Append examples, or the positive parts of their residuals."""
        drawn, residual = draw_examples(self.comm.gathered(self.residuals(state)), count, generator)
        pick = torch.zeros(self.space.n_rows, len(drawn), dtype=state.P.dtype, device=state.P.device)
        for column, i in self.place.own(drawn, self.n_examples):
            pick[i, column] = 1
        fresh = self.space.combine(pick)
        if residual:
            fresh = (fresh - self.comm.sum(pick.T @ state.W) @ state.coords).clamp_min(0)
        H = torch.cat([state.coords, fresh])
        W = torch.cat([state.W, state.W.new_zeros(len(state.W), len(drawn))], 1)
        P = torch.cat([state.P, self.space.project(fresh)], 1)
        return self.solve_W(self._unit(replace(state, W=W, coords=H, P=P, Q=H @ H.T, trail=None)), 5)

    def _unit(self, state: State) -> State:
        """The same factorisation with ``‖h_j‖ = 1``, the scale moved into W."""
        norm = state.Q.double().diagonal().sqrt()
        scale = torch.where(norm > 1e-30, 1 / norm.clamp_min(1e-30), torch.zeros_like(norm))
        Q = state.Q.double() * scale * scale[:, None]
        s = scale.to(state.P)
        trail = state.trail and replace(
            state.trail, W=state.trail.W * norm.to(state.W), H=state.trail.H * s[:, None].to(state.coords)
        )
        return replace(
            state,
            W=state.W * norm.to(state.W),
            coords=state.coords * s[:, None],
            P=state.P * s,
            Q=Q.to(state.Q),
            trail=trail,
        )
