"""What the search needs to know of a factorisation: the state it moves through, and the operations on it.

Two forms share one search (:mod:`npeff.decomposition.search`): :class:`~npeff.decomposition.low_rank.LowRank` and
:class:`~npeff.decomposition.diagonal.Diagonal`.
Both minimise ``L = const − 2⟨W, cross⟩ + ⟨WᵀW, gram⟩`` over W ≥ 0 and the vectors.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from npeff import kernels
from npeff.decomposition.communicator import Communicator


@dataclass(frozen=True)
class State:
    """A factorisation on its way.

    Attributes:
        W: ``(n, r)`` coefficients, ≥ 0.
        coords: ``(r, …)`` the vectors, in the space's coordinates.
        P: ``(rows, r)`` projections A Gᵀ, kept in step with ``coords``.
        Q: ``(r, r)`` inner products G Gᵀ, unit diagonal.
        loss: L / const.
        frozen: The first ``frozen`` vectors never change and are never dropped.
        trail: Where the descent comes from, for forms that extrapolate; None at its beginning.
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
        """The components in ``which`` (boolean or indices) alone; the loss is no longer known."""
        return replace(
            self,
            W=self.W[:, which].contiguous(),
            coords=self.coords[which],
            P=self.P[:, which],
            Q=self.Q[which][:, which],
            loss=float("inf"),
            trail=None,
        )


class Form(Protocol):
    """One kind of factorisation, bound to its data."""

    n_examples: int
    space: Any
    comm: Communicator

    def start(self, r: int, generator: torch.Generator) -> State:
        """A random start with r components, its W already fitted."""
        ...

    def step(self, state: State) -> State:
        """One descent step on the vectors and on W; the new state's loss is set."""
        ...

    def refresh(self, state: State) -> State:
        """The same state with P and Q computed anew."""
        ...

    def solve_W(self, state: State, sweeps: int) -> State:
        """W improved by coordinate descent for the vectors as they are."""
        ...

    def gram(self, state: State) -> Tensor:
        """``(r, r)`` Gram matrix of the components as Fishers."""
        ...

    def candidates(self, state: State, count: int, generator: torch.Generator) -> State:
        """``state`` with ``count`` components appended, made from badly explained examples."""
        ...


def total(x: Tensor) -> float:
    """Σ of a matrix, rows summed in its own dtype and their sums in float64: as exact as needed, and fast."""
    return float(x.sum(1).double().sum())


def improve(gram: Tensor, cross: Tensor, W: Tensor, sweeps: int, fixed: Tensor | None = None) -> Tensor:
    """``W ≥ 0`` after some sweeps of coordinate descent on ``½⟨WᵀW, gram⟩ − ⟨W, cross⟩``.

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
        return torch.cat([fixed, improve(gram[f:, f:], cross[:, f:] - fixed @ gram[:f, f:], W[:, f:], sweeps)], 1)
    arrays = (gram.contiguous(), cross.contiguous(), W.contiguous())
    improved: Tensor = kernels.nnls(*arrays, max_sweeps=sweeps, tol=0.0, kkt=False).w
    return improved


def draw_examples(residuals: Tensor, count: int, generator: torch.Generator) -> tuple[list[int], bool]:
    """Examples to make new components from, and whether to use what is left of them rather than all of them.

    A third of the time each: the residuals of badly explained examples, the whole of badly explained examples, the
    whole of any examples: no one kind leaves every local minimum.
    """
    kind = int(torch.randint(3, (1,), generator=generator))
    alive = residuals.cpu() > 0
    chance = (
        residuals.cpu().square() / residuals.max().item() ** 2 + 1e-12
        if kind < 2 and alive.any()
        else torch.ones(len(residuals), dtype=torch.float64)
    )
    drawn = torch.multinomial(chance, min(count, len(chance)), generator=generator)
    return drawn.tolist(), kind == 0


def usefulness(state: State, gram: Tensor, squares: Tensor) -> Tensor:
    """How much the loss rises, to second order, when a component goes and the others make up for it.

    ``Σ_i W_ij² / (gram⁻¹)_jj``: the saliency of optimal brain surgeon (Hassibi & Stork 1993) for the quadratic
    in W, so that one of two duplicates counts as useless. Frozen components are infinitely useful.

    Args:
        state: The factorisation.
        gram: ``(r, r)`` of its components.
        squares: ``(r,)`` float64 ``Σ_i W_ij²``, over the examples of all processes.

    Returns:
        ``(r,)`` float64.
    """
    H = gram.double()
    ridge = 1e-9 * H.diagonal().mean().clamp_min(1e-30)
    inverse = torch.linalg.inv(H + ridge * torch.eye(len(H), dtype=torch.float64, device=H.device))
    use = squares / inverse.diagonal().clamp_min(1e-30)
    use[: state.frozen] = torch.inf
    return use
