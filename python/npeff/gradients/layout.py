"""Which rows of an activation belong to which example."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

Order = Literal["examples first", "positions first", "examples second"]


@dataclass(frozen=True)
class Layout:
    """How a tensor's leading rows are shared out among examples.

    Attributes:
        examples: Number of examples, b.
        positions: Rows per example, T (1 for a plain batch; time steps, patches, frames …).
        order: ``"examples first"``: row = example·T + position; ``"positions first"``: row = position·b +
            example; ``"examples second"``: the examples are dimension 1, positions dimension 0.
    """

    examples: int
    positions: int
    order: Order = "examples first"

    def split(self, tensor: Tensor) -> Tensor:
        """View ``(b·T, …)`` (or ``(T, b, …)`` for ``"examples second"``) as ``(b, T, …)``."""
        if self.order == "examples second":
            return tensor.movedim(1, 0)
        if self.order == "positions first":
            return tensor.reshape(self.positions, self.examples, *tensor.shape[1:]).transpose(0, 1)
        return tensor.reshape(self.examples, self.positions, *tensor.shape[1:])


def layouts_of_rows(n_rows: int, n_examples: int) -> list[Layout]:
    """The ways in which ``n_rows`` rows can belong to ``n_examples``, likeliest first.

    None when they do not divide.
    """
    if n_rows == 0 or n_rows % n_examples:
        return []
    positions = n_rows // n_examples
    orders: tuple[Order, ...] = (
        ("examples first",) if positions == 1 or n_examples == 1 else ("examples first", "positions first")
    )
    return [Layout(n_examples, positions, order) for order in orders]
