"""Reading the autograd graph: where each parameter meets the data.

The graph that autograd recorded in the forward pass is the one complete account of how parameters were used:
through modules or functions, once or many times, tied, sliced or transposed. Each use found here is an
operation that takes a parameter (or something derived from it alone: its *value*) together with data.
Operations are known by the names of their backward nodes; what is not known by name is reported, and left to
the fallback.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

_RESHAPES = frozenset(
    f"{name}Backward{version}"
    for name in ("View", "UnsafeView", "ReshapeAlias", "Unsqueeze", "Squeeze", "Alias", "Clone", "ToCopy")
    for version in range(3)
)
_MAPS = frozenset(
    f"{name}Backward0"
    for name in (
        *("T", "Transpose", "Permute", "Slice", "Select", "Split", "SplitWithSizes", "Unbind"),
        *("Repeat", "Expand", "Embedding", "WeightNormInterface"),
    )
)


class Unsupported(Exception):
    """A use of a parameter that no rule can serve; the message says why."""


@dataclass(frozen=True)
class Value:
    """A parameter, or a tensor derived from it alone.

    Attributes:
        edge: Where the value is made; the parameter's own accumulator for the parameter itself.
        shape: Its shape.
        reshaped: It was only reshaped or cast on the way from the parameter, if anything.
        untransposed: What this is the plain (2-D) transpose of, if it is.
    """

    edge: GradientEdge
    shape: tuple[int, ...]
    reshaped: bool = True
    untransposed: Value | None = None


@dataclass(frozen=True)
class Use:
    """An operation in which a parameter's value meets data.

    Attributes:
        node: The operation's backward node.
        operand: Which of its inputs the value is.
        value: The value.
        parameter: The parameter: its accumulator.
        parameter_shape: The parameter's shape.
    """

    node: Node
    operand: int
    value: Value
    parameter: GradientEdge
    parameter_shape: tuple[int, ...]

    @property
    def output_shape(self) -> tuple[int, ...]:
        """Shape of the operation's (first) output."""
        return output_shapes(self.node)[0]

    @property
    def output_bytes(self) -> int:
        """Bytes of that output."""
        metadata = self.node._input_metadata[0]
        return int(metadata.dtype.itemsize) * int(torch.Size(metadata.shape).numel())

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
            node, output = self.value.edge.node, self.value.edge.output_nr
            cotangents = gradient.flatten(0, 1).to(node._input_metadata[output].dtype)
            try:
                (result,) = torch.autograd.grad(
                    [self.value.edge],
                    [self.parameter],
                    [cotangents],
                    retain_graph=True,
                    is_grads_batched=True,
                )
            except (RuntimeError, TypeError) as error:
                raise Unsupported(
                    f"{node.name()} cannot be differentiated for many examples at once ({error})"
                ) from error
            gradient = result.to(gradient.dtype)
        return gradient.reshape(*size, *self.parameter_shape)


def output_shapes(node: Node) -> list[tuple[int, ...]]:
    """Shapes of the outputs of the operation that ``node`` is the backward of."""
    return [tuple(int(size) for size in metadata.shape) for metadata in node._input_metadata]


class Graph:
    """The operations between the parameters and the logits, and who takes whose output.

    Holds every node, so that their identities stay fixed while it lives.
    """

    def __init__(self, logits: Tensor) -> None:
        self._takers: dict[tuple[Node, int], list[tuple[Node, int]]] = {}
        self.names: set[str] = set()
        seen: set[Node] = set()
        pending = [] if logits.grad_fn is None else [logits.grad_fn]
        while pending:
            node = pending.pop()
            if node in seen:
                continue
            seen.add(node)
            self.names.add(node.name())
            for operand, (source, output) in enumerate(node.next_functions):
                if source is not None:
                    self._takers.setdefault((source, output), []).append((node, operand))
                    pending.append(source)
        self._nodes = seen

    def takers(self, edge: GradientEdge) -> list[tuple[Node, int]]:
        """The operations that take the value made at ``edge``, and as which operand."""
        return self._takers.get((edge.node, edge.output_nr), [])

    def derive(self, value: Value, node: Node) -> list[Value] | None:
        """The outputs of ``node`` as values, if it is an operation of parameters alone."""
        name = node.name()
        if name not in _RESHAPES and name not in _MAPS:
            return None
        if name in _RESHAPES:
            return [Value(GradientEdge(node, 0), output_shapes(node)[0], value.reshaped)]
        if name == "TBackward0" and len(value.shape) == 2:
            return [Value(GradientEdge(node, 0), output_shapes(node)[0], False, untransposed=value)]
        return [Value(GradientEdge(node, i), shape, False) for i, shape in enumerate(output_shapes(node))]

    def widens(self, node: Node) -> bool:
        """Whether everything that takes the output of ``node`` broadcasts it to a larger shape."""
        takers = self.takers(GradientEdge(node, 0))
        shape = output_shapes(node)[0]
        return bool(takers) and all(
            taker.name() in ("AddBackward0", "MulBackward0", "ExpandBackward0", "SubBackward0")
            and torch.Size(output_shapes(taker)[0]).numel() > torch.Size(shape).numel()
            for taker, _ in takers
        )
