"""Base classes of rules: a rule computes the per-example gradient of one use of a parameter in the autograd graph."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node
from typing_extensions import override

from npeff.gradients.graph import Unsupported, Use

__all__ = ["Layout", "Rule", "Scratch", "SmallRule", "StackedRule", "Unsupported", "layouts_of_rows", "working"]


def working(tensor: Tensor) -> Tensor:
    """Convert a tensor to the dtype in which gradients are multiplied: half precisions become float32."""
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.to(torch.float32)


Order = Literal["examples first", "positions first", "examples second"]


@dataclass(frozen=True)
class Layout:
    """The assignment of a tensor's leading rows to examples.

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
    """List the ways in which ``n_rows`` rows can belong to ``n_examples``, likeliest first.

    Empty when they do not divide.
    """
    if n_rows == 0 or n_rows % n_examples:
        return []
    positions = n_rows // n_examples
    orders: tuple[Order, ...] = (
        ("examples first",) if positions == 1 or n_examples == 1 else ("examples first", "positions first")
    )
    return [Layout(n_examples, positions, order) for order in orders]


class Scratch:
    """Memory that tiles use again and again: fresh memory costs more than the arithmetic done in it."""

    def __init__(self) -> None:
        self._held: dict[str, Tensor] = {}

    def take(self, name: str, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """Return a contiguous tensor of undefined contents, the same memory whenever the name is the same."""
        numel = math.prod(shape)
        held = self._held.get(name)
        if held is None or held.numel() < numel or held.dtype != like.dtype or held.device != like.device:
            held = self._held[name] = torch.empty(numel, dtype=like.dtype, device=like.device)
        return held[:numel].view(shape)


class Rule(ABC):
    """Per-example gradients of one use of one parameter.

    A rule is made anew for every batch. ``store`` is called once per cotangent column with δ, the gradient of
    that column's output with respect to the operation's output; then ``block`` is called tile by tile.

    Args:
        use: The use.
        nodes: The nodes of the batch's graph.
        layout: Which rows of δ belong to which example.
        scratch: Memory for tiles.

    Attributes:
        name: The name in the coverage report.
        value: The operand with respect to which the gradient is.
        edge: Where δ is taken.
    """

    name: ClassVar[str]

    def __init__(self, use: Use, nodes: Sequence[Node], layout: Layout, scratch: Scratch) -> None:
        self.use = use
        self.value = use.value
        self.layout = layout
        self.scratch = scratch
        self.edge = GradientEdge(nodes[use.node], 0)
        self._nodes = nodes
        self.begin()

    def begin(self) -> None:  # noqa: B027 — some rules need nothing but δ
        """Take what the rule needs of the operation, by :meth:`saved` and :meth:`saved_tensor`.

        Raises:
            Unsupported: The rule does not serve this use.
        """

    def saved(self, name: str) -> Any:
        """Return what the operation kept for its backward pass.

        Raises:
            Unsupported: The operation kept nothing under that name.
        """
        try:
            return getattr(self.edge.node, f"_saved_{name}")
        except (AttributeError, RuntimeError) as error:
            raise Unsupported(
                f"{self.use.operation} does not give its {name} ({str(error).splitlines()[0]})"
            ) from error

    def saved_tensor(self, name: str) -> Tensor:
        """Return a tensor that the operation must have kept, detached.

        Raises:
            Unsupported: There is none.
        """
        value = self.saved(name)
        if not isinstance(value, Tensor):
            raise Unsupported(f"{self.use.operation} kept no {name}")
        return value.detach()

    def zeros(self) -> Tensor:
        """Return δ of an output that the logits do not depend on."""
        made = self.edge.node._input_metadata[0]
        return torch.zeros(self.use.output_shape, dtype=made.dtype, device=made.device)

    @classmethod
    def layouts(cls, use: Use, n_examples: int) -> list[Layout]:
        """List the ways in which δ's rows can belong to the examples, likeliest first; none if the rule does not apply.

        By default the rows are the first dimension of the output.
        """
        return layouts_of_rows(use.output_shape[0], n_examples)

    def split(self, delta: Tensor) -> Tensor:
        """Return δ with the examples first and the positions second: ``(b, T, …)``."""
        return self.layout.split(delta)

    @abstractmethod
    def reserve(self, n_columns: int) -> None:
        """Make room for ``n_columns`` columns."""

    @abstractmethod
    def bytes_per_column(self) -> int:
        """Return the bytes that ``store`` keeps for the whole batch, per column."""

    def form_early(self) -> None:  # noqa: B027 — most rules have nothing to do
        """Let ``store`` form gradients: called after ``reserve`` where all of them will be asked for as blocks."""

    @abstractmethod
    def store(self, column: int, delta: Tensor) -> None:
        """Keep what is needed of δ for one column."""

    @abstractmethod
    def block(self, examples: slice, rows: slice) -> Tensor:
        """Compute the gradient with respect to the operand.

        Args:
            examples: Which examples, b' of them.
            rows: Which indices of the operand's first dimension, p of them.

        Returns:
            ``(b', R, p, …)`` float32 or float64, the operand's shape after the first two dimensions. It may
            be overwritten by the caller, and by the next call.
        """

    def gram(self, examples: slice) -> Tensor | None:
        """Compute the inner products of the columns, ``(b', R, R)`` float64, where they cost less than the block."""
        return None

    def pair_sizes(self) -> tuple[int, int, int] | None:
        """Return T, n, k of :meth:`pairs`; None where there are none."""
        return None

    def pairs(self, examples: slice) -> tuple[Tensor, Tensor, bool] | None:
        """Return the factors of a gradient that is a sum of outer products, ``Σ_t δ_t ⊗ a_t``.

        Args:
            examples: Which examples, b' of them.

        Returns:
            δ ``(b', T, R, n)``, a ``(b', T, k)``, and whether the operand is turned, ``Σ_t a_t ⊗ δ_t``; None where
            the gradient is no such sum. They may be overwritten by the next call of any rule.
        """
        return None

    def square(self, examples: slice, rows: slice) -> Tensor | None:
        """Sum the block's squares over columns, ``(b', p, …)``, where that costs less than the block."""
        return None

    def to_parameter(self, gradient: Tensor) -> Tensor:
        """Carry gradients of the value back to the parameter.

        Args:
            gradient: ``(b, R, *value.shape)``.

        Returns:
            ``(b, R, *parameter_shape)``: the adjoint of what derived the value from the parameter, applied
            b·R times.

        Raises:
            Unsupported: Autograd cannot apply it to many gradients at once.
        """
        size = gradient.shape[:2]
        if not self.value.reshaped:
            node, output = self._nodes[self.value.node], self.value.output
            cotangents = gradient.flatten(0, 1).to(node._input_metadata[output].dtype)
            try:
                (result,) = torch.autograd.grad(
                    [GradientEdge(node, output)],
                    [GradientEdge(self._nodes[self.use.parameter], 0)],
                    [cotangents],
                    retain_graph=True,
                    is_grads_batched=True,
                )
            except (RuntimeError, TypeError) as error:
                raise Unsupported(
                    f"{node.name()} cannot be differentiated for many examples at once ({error})"
                ) from error
            gradient = result.to(gradient.dtype)
        return gradient.reshape(*size, *self.use.parameter_shape)

    def kronecker_form(self) -> tuple[int, bool] | None:
        """Return the number G of groups in :meth:`kronecker_factors`, and whether the operand is turned, or None."""
        return None

    def kronecker_factors(self) -> tuple[Tensor, Tensor]:
        """Return the factors of the gradients of all examples and columns, ``Σ_t δ_gt ⊗ a_gt`` in each group g.

        Returns:
            a ``(b, G, T, p)`` and δ ``(b, G, T, R, q)``, in memory of their own.

        Raises:
            NotImplementedError: :meth:`kronecker_form` is None.
        """
        raise NotImplementedError


class StackedRule(Rule):
    """A rule that keeps δ of every column as it came, and multiplies when a tile is made.

    Columns are put side by side tile by tile: what a tile copies is still in the cache when it is multiplied.
    """

    @override
    def reserve(self, n_columns: int) -> None:
        self._kept: list[Tensor] = [torch.empty(0)] * n_columns

    @override
    def bytes_per_column(self) -> int:
        return self.use.output_bytes

    @override
    def store(self, column: int, delta: Tensor) -> None:
        self._kept[column] = delta

    def stacked(self, examples: slice, dim: int) -> Tensor:
        """Stack δ of some examples, all columns side by side in a new dimension ``dim`` of ``(b', T, …)``."""
        pieces = [working(self.split(delta)[examples]) for delta in self._kept]
        if len(pieces) == 1 and pieces[0].is_contiguous():
            return pieces[0].unsqueeze(dim)
        shape = (*pieces[0].shape[:dim], len(pieces), *pieces[0].shape[dim:])
        return torch.stack(pieces, dim=dim, out=self.scratch.take("columns", shape, pieces[0]))


class SmallRule(Rule):
    """A rule whose gradient is no larger than δ: it is reduced at once, column by column, and kept whole."""

    @override
    def reserve(self, n_columns: int) -> None:
        self._kept: Tensor | None = None
        self._n_columns = n_columns

    @override
    def bytes_per_column(self) -> int:
        return 4 * self.layout.examples * math.prod(self.value.shape)

    @abstractmethod
    def reduce(self, delta: Tensor) -> Tensor:
        """Reduce δ, split by example ``(b, T, …)``, to the operand's per-example gradient ``(b, *shape)``."""

    @override
    def store(self, column: int, delta: Tensor) -> None:
        gradient = self.reduce(self.split(working(delta)))
        if self._n_columns == 1:
            self._kept = gradient.reshape(len(gradient), 1, *self.value.shape)
            return
        if self._kept is None:
            self._kept = gradient.new_empty((len(gradient), self._n_columns, *self.value.shape))
        self._kept[:, column] = gradient.reshape(len(gradient), *self.value.shape)

    @override
    def block(self, examples: slice, rows: slice) -> Tensor:
        if self._kept is None:
            raise RuntimeError("store() comes before block()")
        kept = self._kept[examples]
        return kept[:, :, rows] if self.value.shape else kept
