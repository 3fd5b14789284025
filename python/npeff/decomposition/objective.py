"""The objective that the search lowers: the state it moves through, and the operations on it.

Both kinds of factorisation minimise ``L = const − 2⟨W, cross⟩ + ⟨WᵀW, gram⟩`` over W ≥ 0 and the vectors. They differ
in ``cross``, in ``gram`` and in the step on the vectors: see :mod:`npeff.decomposition.kinds`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from npeff import kernels
from npeff.decomposition.spaces import FactorSpace
from npeff.errors import ArgumentError
from npeff.fishers.scaling import ScaledRows


@dataclass(frozen=True)
class State:
    """A factorisation during the search.

    Attributes:
        W: ``(n, r)`` coefficients, ≥ 0.
        coords: ``(r, …)`` the vectors, in the space's coordinates.
        P: ``(rows, r)`` projections A Gᵀ, kept in step with ``coords``.
        Q: ``(r, r)`` inner products G Gᵀ, unit diagonal.
        loss: L / const.
        frozen: The first ``frozen`` vectors never change and are never dropped.
        trail: The steps before, for objectives that extrapolate; None at the beginning of a descent.
    """

    W: Tensor
    coords: Tensor
    P: Tensor
    Q: Tensor
    loss: float = float("inf")
    frozen: int = 0
    trail: Any = None

    @property
    def r(self) -> int:
        """Number of components."""
        return self.W.shape[1]

    def keep(self, which: Tensor) -> State:
        """Keep the components in ``which`` (boolean or indices) alone; the loss is no longer known."""
        return replace(
            self,
            W=self.W[:, which].contiguous(),
            coords=self.coords[which],
            P=self.P[:, which],
            Q=self.Q[which][:, which],
            loss=float("inf"),
            trail=None,
        )


class Objective(ABC):
    """One kind of factorisation of given rows. Making one is a collective operation of the space's processes.

    Args:
        space: Where the vectors live.
        scaled: The rows that the space was built from.
        frozen: Coordinates of vectors that stay as they are, ``(f, …)``.
        frozen_W: ``(n, f)`` coefficients of the frozen vectors to keep as well, or None to fit them.

    Attributes:
        n_examples: Examples of this process.
        energies: ``(n,)`` float64 squared Fisher norms.
        const: Their sum over all processes.
    """

    sweeps: int
    """Coordinate-descent sweeps over W in a step."""

    def __init__(
        self, space: FactorSpace, scaled: ScaledRows, frozen: Tensor | None = None, frozen_W: Tensor | None = None
    ) -> None:
        self.space, self.scaled, self.comm = space, scaled, space.comm
        self.n_examples = scaled.n_examples
        counts = self.comm.objects(self.n_examples)
        self.first_example, self.n_all_examples = sum(counts[: self.comm.rank]), sum(counts)
        self.energies = torch.from_numpy(scaled.fisher_norms**2).to(space.device)
        self.const = self.comm.number(float(self.energies.sum())) or 1.0
        self.frozen, self.frozen_W = frozen, frozen_W
        self.n_frozen = 0 if frozen is None else len(frozen)

    # ---- what the kinds differ in --------------------------------------------------------------------------

    @abstractmethod
    def cross(self, P: Tensor) -> Tensor:
        """Compute the inner product of every example with every component, ``(n, r)``, from projections."""

    @abstractmethod
    def gram(self, Q: Tensor) -> Tensor:
        """Compute the Gram matrix of the components as Fishers, ``(r, r)``, from that of their vectors."""

    @abstractmethod
    def random_coords(self, r: int, generator: torch.Generator) -> Tensor:
        """Draw the coordinates of r vectors to start from."""

    @abstractmethod
    def unit(self, state: State) -> State:
        """Scale vectors to length one; the scale moves into W."""

    @abstractmethod
    def refresh(self, state: State) -> State:
        """Compute P and Q anew from the coordinates, against drift."""

    @abstractmethod
    def step(self, state: State) -> State:
        """Take one descent step on the vectors and on W; the new state's loss is set."""

    @abstractmethod
    def new_vectors(self, state: State, examples: list[tuple[int, int]], count: int, residual: bool) -> Tensor:
        """Make coordinates of new vectors from examples.

        Args:
            state: The factorisation.
            examples: Pairs (position among the new vectors, example of this process).
            count: New vectors of all processes.
            residual: Use what the factorisation leaves of the examples, rather than all of them.
        """

    def admissible(self, coords: Tensor, P: Tensor, Q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Change vectors to satisfy the objective's constraints.

        Raises:
            ArgumentError: No such vectors exist.
        """
        return coords, P, Q

    def penalty(self, Q: Tensor) -> float:
        """Compute what is added to the loss for unit vectors with inner products Q."""
        return 0.0

    # ---- what they share -----------------------------------------------------------------------------------

    def relative_loss(self, W: Tensor, cross: Tensor, Q: Tensor) -> float:
        """Compute (L + penalty) / const for unit vectors, accumulated in float64; the same in every process."""
        fit = sum_float64(W * cross)
        rest = self.comm.number(float(((W.T @ W).double() * self.gram(Q.double())).sum() - 2 * fit))
        return self.comm.agreed((self.const + rest + self.penalty(Q)) / self.const)

    def start(self, r: int, generator: torch.Generator) -> State:
        """Make a random start with r components, W fitted to the vectors."""
        coords = self.random_coords(r - self.n_frozen, generator)
        return self.from_vectors(coords if self.frozen is None else torch.cat([self.frozen, coords]))

    def from_vectors(self, coords: Tensor, W: Tensor | None = None) -> State:
        """Make a state with the given vectors; W is fitted when it is not given."""
        P = self.space.project(coords)
        coords, P, Q = self.admissible(coords, P, self.space.inner(coords, coords, P))
        given = W is not None
        W = torch.zeros(self.n_examples, len(coords), dtype=P.dtype, device=P.device) if W is None else W.to(P)
        state = self.unit(State(W, coords, P, Q, frozen=self.n_frozen))
        if self.frozen_W is not None:
            state.W[:, : self.n_frozen] = self.frozen_W.to(P)
        if not given:
            return self.solve_W(state, 10)
        return replace(state, loss=self.relative_loss(state.W, self.cross(state.P), state.Q))

    def solve_W(self, state: State, sweeps: int) -> State:
        """Improve W by coordinate descent for the vectors as they are; frozen coefficients stay."""
        cross = self.cross(state.P)
        W = coordinate_descent(self.gram(state.Q), cross, state.W, sweeps, self.frozen_W)
        return replace(state, W=W, loss=self.relative_loss(W, cross, state.Q))

    def residuals(self, state: State) -> Tensor:
        """Compute ``‖F_i − Σ_j W_ij F_j‖²`` per example, ``(n,)`` float64; F_j is component j as a Fisher."""
        W = state.W.double()
        cross, gram = self.cross(state.P).double(), self.gram(state.Q).double()
        return (self.energies.to(W) - 2 * (W * cross).sum(1) + ((W @ gram) * W).sum(1)).clamp_min(0)

    def enlarged(self, state: State, count: int, generator: torch.Generator) -> State:
        """Append ``count`` components made from badly explained examples, W fitted to all of them."""
        drawn, residual = draw_examples(self.comm.gathered(self.residuals(state)), count, generator)
        own = [(at, i - self.first_example) for at, i in enumerate(drawn)]
        own = [(at, i) for at, i in own if 0 <= i < self.n_examples]
        fresh = self.new_vectors(state, own, len(drawn), residual)
        P = self.space.project(fresh)
        across = self.space.inner(state.coords, fresh, P)
        Q = torch.cat([torch.cat([state.Q, across], 1), torch.cat([across.T, self.space.inner(fresh, fresh, P)], 1)])
        W = torch.cat([state.W, state.W.new_zeros(len(state.W), len(drawn))], 1)
        try:
            coords, P, Q = self.admissible(torch.cat([state.coords, fresh]), torch.cat([state.P, P], 1), Q)
        except ArgumentError:
            return state  # no room for more orthonormal directions
        return self.solve_W(self.unit(replace(state, W=W, coords=coords, P=P, Q=Q, trail=None)), 5)

    def usefulness(self, state: State) -> Tensor:
        """Compute, to second order, how much the loss rises when a component is removed and W is fitted again.

        ``Σ_i W_ij² / (gram⁻¹)_jj``: the saliency of optimal brain surgeon (Hassibi & Stork 1993) for the quadratic
        in W, so that one of two duplicates counts as useless. Frozen components are infinitely useful.

        Returns:
            ``(r,)`` float64.
        """
        squares = self.comm.sum(state.W.double().square().sum(0))
        H = self.gram(state.Q).double()
        ridge = 1e-9 * H.diagonal().mean().clamp_min(1e-30)
        inverse = torch.linalg.inv(H + ridge * torch.eye(len(H), dtype=torch.float64, device=H.device))
        use = squares / inverse.diagonal().clamp_min(1e-30)
        use[: state.frozen] = torch.inf
        return use


def sum_float64(x: Tensor) -> float:
    """Sum a matrix: rows in its own dtype, their sums in float64; as exact as needed, and fast."""
    return float(x.sum(1).double().sum())


def coordinate_descent(gram: Tensor, cross: Tensor, W: Tensor, sweeps: int, fixed: Tensor | None = None) -> Tensor:
    """Lower ``½⟨WᵀW, gram⟩ − ⟨W, cross⟩`` over W ≥ 0 by some sweeps of coordinate descent.

    Args:
        gram: ``(r, r)``.
        cross: ``(n, r)``.
        W: ``(n, r)``, where to start.
        sweeps: How many sweeps.
        fixed: ``(n, f)`` values that the first f columns of W keep.

    Returns:
        A new ``(n, r)``.
    """
    if fixed is not None and fixed.shape[1]:
        f = fixed.shape[1]
        fixed = fixed.to(W)
        rest = coordinate_descent(gram[f:, f:], cross[:, f:] - fixed @ gram[:f, f:], W[:, f:], sweeps)
        return torch.cat([fixed, rest], 1)
    arrays = (gram.contiguous(), cross.contiguous(), W.contiguous())
    improved: Tensor = kernels.nnls(*arrays, max_sweeps=sweeps, tol=0.0, kkt=False).w
    return improved


def draw_examples(residuals: Tensor, count: int, generator: torch.Generator) -> tuple[list[int], bool]:
    """Draw examples to make new components from, and whether to use their residuals rather than all of them.

    A third of the time each: the residuals of badly explained examples, the whole of badly explained examples, the
    whole of any examples. Each kind alone is stuck in some local minima.
    """
    kind = int(torch.randint(3, (1,), generator=generator))
    residuals = residuals.cpu()
    if kind < 2 and bool((residuals > 0).any()):
        chance = residuals.square() / residuals.max().item() ** 2 + 1e-12
    else:
        chance = torch.ones(len(residuals), dtype=torch.float64)
    drawn = torch.multinomial(chance, min(count, len(chance)), generator=generator)
    return drawn.tolist(), kind == 0
