"""Reading the autograd graph: where each parameter meets the data.

The graph that autograd recorded in the forward pass is the one complete account of how parameters were used:
through modules or functions, once or many times, tied, sliced or transposed. Each use found here is an
operation that takes a parameter (or something derived from it alone: its *value*) together with data.
Operations are known by the names of their backward nodes; what is not known by name is reported, and left to
the fallback.
"""

from __future__ import annotations

from collections.abc import Iterator
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

_ELEMENTWISE = (
    *("Abs", "Acos", "Acosh", "Add", "Addcdiv", "Addcmul", "Asin", "Asinh", "Atan", "Atanh", "Ceil", "Celu", "Clamp"),
    *("ClampMax", "ClampMin", "Cos", "Cosh", "Div", "Elu", "Erf", "Erfc", "Exp", "Exp2", "Expm1", "Floor", "Gelu"),
    *("Hardshrink", "Hardsigmoid", "Hardswish", "Hardtanh", "LeakyRelu", "Lerp", "Log", "Log10", "Log1P", "Log2"),
    *("LogSigmoid", "Logaddexp", "MaskedFill", "Maximum", "Minimum", "Mish", "Mul", "NanToNum", "NativeDropout", "Neg"),
    *("Pow", "PreluKernel", "Reciprocal", "Relu", "Round", "Rsqrt", "Rsub", "Sigmoid", "Sign", "Silu", "Sin", "Sinh"),
    *("Softplus", "Softshrink", "Sqrt", "Sub", "Tan", "Tanh", "Threshold", "Where"),
)
_MOVES = (
    *("Alias", "Cat", "Clone", "ConstantPadNd", "Diagonal", "Expand", "Flip", "Glu", "Permute", "PixelShuffle"),
    *("PixelUnshuffle", "ReflectionPad1D", "ReflectionPad2D", "ReflectionPad3D", "Repeat", "ReplicationPad1D"),
    *("ReplicationPad2D", "ReplicationPad3D", "ReshapeAlias", "Roll", "Select", "Slice", "Split", "SplitWithSizes"),
    *("Squeeze", "Stack", "T", "ToCopy", "Transpose", "Tril", "Triu", "Unbind", "Unfold", "UnsafeSplit"),
    *("UnsafeSplitWithSizes", "UnsafeView", "Unsqueeze", "View"),
)
_REDUCTIONS = (
    *("AdaptiveAvgPool2D", "AdaptiveAvgPool3D", "AdaptiveMaxPool2D", "AdaptiveMaxPool3D", "Amax", "Amin", "AvgPool2D"),
    *("AvgPool3D", "Cumsum", "LinalgVectorNorm", "LogSoftmax", "Logsumexp", "Max", "MaxPool2D", "MaxPool2DWithIndices"),
    *("MaxPool3DWithIndices", "Mean", "Min", "Norm", "Prod", "Softmax", "Std", "StdMean", "Sum", "Var", "VarMean"),
)
_PRODUCTS = (
    *("Addmm", "Baddbmm", "Bmm", "Convolution", "CudnnConvolution", "CudnnBatchNorm", "Embedding", "FusedRmsNorm"),
    *("Mm", "MkldnnConvolution", "NativeBatchNorm", "NativeGroupNorm", "NativeLayerNorm"),
    *("ScaledDotProductCudnnAttention", "ScaledDotProductEfficientAttention", "ScaledDotProductFlashAttention"),
    *("ScaledDotProductFlashAttentionForCpu", "WeightNormInterface"),
)
_FIXED = frozenset(
    f"{name}Backward{version}" for name in (*_ELEMENTWISE, *_MOVES, *_REDUCTIONS, *_PRODUCTS) for version in range(6)
) | {"torch::autograd::AccumulateGrad"}
"""Operations that move rows by shapes and by the numbers in _NUMBERS alone, never by the values of a tensor."""

_NUMBERS = tuple(
    f"_saved_{name}"
    for name in ("dim", "dims", "dim0", "dim1", "index", "start", "end", "step", "shifts", "split_size", "split_sizes")
)
_NUMBERED = frozenset(
    f"{name}Backward{version}"
    for name in (*_MOVES, *_REDUCTIONS)
    for version in range(6)
    if name not in ("Alias", "Clone", "View", "UnsafeView", "ReshapeAlias", "ToCopy")
)
_PRECISIONS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
"""Floating dtypes, the coarsest first."""


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

    Attributes:
        names: Names of all nodes.
        form: Equal for graphs with the same operations on the same operands, whatever the sizes.
        sizes: Equal where also all shapes, dimensions, indices and steps are the same.
        precision: The coarsest floating dtype of any operation's output.
        routed: Some operation may move rows by the values of a tensor (an index, a sorted order, a product with a
            matrix of data), so that graphs of the same form and sizes can give rows to other examples.
    """

    def __init__(self, logits: Tensor) -> None:
        self._takers: dict[tuple[Node, int], list[tuple[Node, int]]] = {}
        order: dict[Node, int] = {}
        pending = [] if logits.grad_fn is None else [logits.grad_fn]
        while pending:
            node = pending.pop()
            if node in order:
                continue
            order[node] = len(order)
            for operand, (source, output) in enumerate(node.next_functions):
                if source is not None:
                    self._takers.setdefault((source, output), []).append((node, operand))
                    pending.append(source)
        self._nodes = order
        self.names = {node.name() for node in order}
        wiring = [
            (
                node.name(),
                *((order.get(source, -1) if source else -1, output) for source, output in node.next_functions),
            )
            for node in order
        ]
        self.form = hash(tuple(wiring))
        metadata = [[(tuple(made.shape), made.dtype) for made in node._input_metadata] for node in order]
        self.sizes = hash((self.form, repr(metadata), repr([list(_numbers(node)) for node in order])))
        dtypes = {dtype for outputs in metadata for _, dtype in outputs} | {logits.dtype}
        self.precision = next((dtype for dtype in _PRECISIONS if dtype in dtypes), torch.float32)
        self.routed = not self.names <= _FIXED or any(_mixes_rows(node, len(logits)) for node in order)

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


def _numbers(node: Node) -> Iterator[object]:
    if node.name() in _NUMBERED:
        yield from (getattr(node, name) for name in _NUMBERS if hasattr(node, name))


def _mixes_rows(node: Node, n_examples: int) -> bool:
    """Whether it is a product that may give an example rows of another: by matrices that depend on the data."""
    name = node.name()
    if name in ("BmmBackward0", "BaddbmmBackward0") or name.startswith("ScaledDotProduct"):
        return output_shapes(node)[0][0] % n_examples != 0  # otherwise each example has matrices of its own
    second = {"MmBackward0": 1, "AddmmBackward0": 2}.get(name)
    source = None if second is None else node.next_functions[second][0]
    while source is not None and source.name() in (_RESHAPES | _MAPS) - {"EmbeddingBackward0"}:
        source = source.next_functions[0][0]
    return source is not None and source.name() != "torch::autograd::AccumulateGrad"
