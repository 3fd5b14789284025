"""Parameters broadcast over the examples: added, multiplied or expanded (biases, scales, class tokens)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.autograd.graph import Node
from typing_extensions import override

from npeff.gradients.graph import Use
from npeff.gradients.layout import Layout, layouts_of_rows
from npeff.gradients.rules.base import Scratch, SmallRule, Unsupported, working


class Broadcast(SmallRule):
    """δ, or δ times the other operand, summed over what the value was broadcast over, but examples."""

    name = "broadcast"

    @classmethod
    @override
    def layouts(cls, use: Use, n_examples: int) -> list[Layout]:
        output = use.output_shape
        if not output:
            return []
        operand = _aligned(use)
        found = layouts_of_rows(output[0], n_examples) if operand[0] == 1 else []
        if len(output) > 1 and output[1] == n_examples and operand[1] == 1:
            found.append(Layout(n_examples, output[0], "examples second"))
        return found

    def factor(self) -> Tensor | float:
        """What δ is multiplied by: a number, or a tensor of the output's shape."""
        return 1.0

    @override
    def reduce(self, delta: Tensor) -> Tensor:
        operand = _aligned(self.use)
        if self.layout.order == "examples second":
            operand = (operand[0], *operand[2:])
        over = [i + 1 for i, size in enumerate(operand) if size == 1 and delta.shape[i + 1] != 1]
        return delta.sum(dim=over) if over else delta

    @override
    def store(self, column: int, delta: Tensor) -> None:
        super().store(column, working(delta) * self.factor())


class Sum(Broadcast):
    """``x + alpha · value``."""

    @override
    def factor(self) -> Tensor | float:
        return float(self.saved("alpha")) if self.use.operand == 1 else 1.0


class Difference(Broadcast):
    """``x − alpha · value``, or ``value − alpha · x``."""

    @override
    def factor(self) -> Tensor | float:
        return -float(self.saved("alpha")) if self.use.operand == 1 else 1.0


class Product(Broadcast):
    """``x ∘ value``."""

    name = "scale"

    def __init__(self, use: Use, nodes: Sequence[Node], layout: Layout, scratch: Scratch) -> None:
        super().__init__(use, nodes, layout, scratch)
        self._other = working(self.saved_tensor("self" if use.operand == 1 else "other"))
        if self._other.is_complex():
            raise Unsupported("complex product")

    @override
    def factor(self) -> Tensor | float:
        return self._other


class Slope(Broadcast):
    """PReLU's slope: ``min(x, 0)``."""

    name = "prelu"

    def __init__(self, use: Use, nodes: Sequence[Node], layout: Layout, scratch: Scratch) -> None:
        super().__init__(use, nodes, layout, scratch)
        self._below = working(self.saved_tensor("self")).clamp_max(0.0)

    @override
    def factor(self) -> Tensor | float:
        return self._below


def _aligned(use: Use) -> tuple[int, ...]:
    """The operand's shape with ones in front, as many dimensions as the output."""
    return (1,) * (len(use.output_shape) - len(use.value.shape)) + use.value.shape
