"""The diagonal objective: ``f_i ≈ Σ_j W_ij h_j`` with W, H ≥ 0, non-negative matrix factorisation.

``L = Σ_i ‖f_i‖² − 2⟨W, F Hᵀ⟩ + ⟨WᵀW, H Hᵀ⟩``, minimised by hierarchical alternating least squares with cached Gram
matrices (Cichocki & Phan 2009; Gillis & Glineur 2012): each pass over F is followed by several sweeps, which
are cheap beside it. Steps are extrapolated (Ang & Gillis 2019): each half-step starts from a point further along the
last one, by a share that grows as long as the loss falls; where the loss would rise, a plain step is taken instead.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from npeff.decomposition.objective import Objective, State, coordinate_descent

FIRST_BETA, GROWTH, CEILING_GROWTH, RETREAT = 0.5, 1.05, 1.01, 1.5
"""Extrapolation: β at first, its growth and that of its ceiling after a fall, its division after a rise."""


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
        """Give β, its ceiling, and β before, after a step that lowered the loss."""
        return min(self.ceiling, GROWTH * self.beta), min(1.0, CEILING_GROWTH * self.ceiling), self.beta

    def shrunk(self) -> tuple[float, float, float]:
        """Give the same after a step that would have raised the loss."""
        return self.beta / RETREAT, self.before, self.beta / RETREAT


class Diagonal(Objective):
    """The diagonal objective. Coordinates are H itself, ``(r, n_columns)``, ≥ 0."""

    sweeps = 8
    """Sweeps over W, and over H, per pass over the data: they are cheap beside it."""

    def cross(self, P: Tensor) -> Tensor:
        """Give ``F Hᵀ``."""
        return P

    def gram(self, Q: Tensor) -> Tensor:
        """Give ``H Hᵀ``."""
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
        """Give examples, or the positive parts of their residuals."""
        pick = torch.zeros(self.space.n_rows, count, dtype=state.P.dtype, device=state.P.device)
        for column, i in examples:
            pick[i, column] = 1
        fresh = self.space.combine(pick)
        return (fresh - self.comm.sum(pick.T @ state.W) @ state.coords).clamp_min(0) if residual else fresh

    def unit(self, state: State) -> State:
        """Scale vectors to ``‖h_j‖ = 1``, the scale moved into W."""
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
