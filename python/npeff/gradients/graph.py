"""Read the autograd graph of a batch: where each parameter meets the data.

The graph that autograd recorded in the forward pass is the one complete account of how parameters were used:
through modules or functions, once or many times, tied, sliced or transposed. Each use found here is an
operation that takes a parameter (or something derived from it alone: its *value*) together with data.
Operations are known by the names of their backward nodes. Operations with other names are reported, and left to
the fallback.

Values and uses name nodes by their positions in the graph, so that what was found in one batch holds for every
later batch whose graph has the same fingerprint.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from npeff.errors import ModelError

_ACCUMULATOR = "torch::autograd::AccumulateGrad"
_RESHAPES = frozenset(
    f"{name}Backward{version}"
    for name in ("View", "UnsafeView", "ReshapeAlias", "Unsqueeze", "Squeeze", "Alias", "Clone", "ToCopy")
    for version in range(3)
)
_VIEWS = frozenset(f"{name}Backward0" for name in ("View", "UnsafeView", "ReshapeAlias", "Alias", "ToCopy"))
_MAPS = frozenset(
    f"{name}Backward0"
    for name in (
        *("T", "Transpose", "Permute", "Slice", "Select", "Split", "SplitWithSizes", "Unbind"),
        *("Repeat", "Expand", "Embedding", "WeightNormInterface", "Exp", "Neg", "Softplus", "Sigmoid", "Tanh"),
    )
)
_SHIFTS = ("AddBackward0", "SubBackward0")

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
) | {_ACCUMULATOR}
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
        node: Position of the node that makes the value; of the parameter's own accumulator for the parameter itself.
        output: Which output of that node the value is.
        shape: Its shape.
        reshaped: It was only reshaped or cast on the way from the parameter, if anything.
        untransposed: What this is the plain (2-D) transpose of, if it is.
    """

    node: int
    output: int
    shape: tuple[int, ...]
    reshaped: bool = True
    untransposed: Value | None = None


@dataclass(frozen=True)
class OutputLayer:
    """The last operation of a model, where it is a matrix product that no gradient is wanted of.

    Attributes:
        weight: ``(h, C)``: the model's output is ``x W``, perhaps with a bias.
        edge: Of x, ``(b·T, h)``.
        dtype: Of x W.
    """

    weight: Tensor
    edge: GradientEdge
    dtype: torch.dtype


@dataclass(frozen=True)
class Use:
    """An operation in which a parameter's value meets data.

    Attributes:
        operation: Name of the operation's backward node.
        node: Position of that node.
        operand: Which of its inputs the value is.
        value: The value.
        parameter: Position of the parameter's accumulator.
        parameter_shape: The parameter's shape.
        output_shape: Shape of the operation's (first) output.
        output_bytes: Bytes of that output.
    """

    operation: str
    node: int
    operand: int
    value: Value
    parameter: int
    parameter_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    output_bytes: int


class Graph:
    """The operations between the parameters and the logits, and which operation takes whose output.

    Holds every node, so that their identities stay fixed while it lives. The walk that makes it is done for every
    batch; all other properties are computed when they are asked for, which only graphs with a new fingerprint need.

    Args:
        logits: The batch's logits with their graph.
        parameters: Number of each parameter by ``id``.
        n_sequences: Examples that the model sees, in the first dimension of its output.
        selected: The logits were selected from the model's output, which the graph begins with.

    Attributes:
        logits: The node that made the logits.
        output: The model's output: a tensor, or the edge of it.
        shape: Its shape.
        dtype: Its dtype.
        nodes: The nodes, in the order of the walk.
        leaves: Position of the accumulator of each parameter in the graph, by the parameter's number.
        fingerprint: Equal for graphs with the same operations on the same operands and the same parameters, where also
            all shapes, dtypes, dimensions, indices and steps are the same.

    Raises:
        ModelError: A tensor in it is nested.
    """

    def __init__(self, logits: Tensor, parameters: Mapping[int, int], n_sequences: int, selected: bool = False) -> None:
        self.logits = self.root = logits.grad_fn
        self._n_sequences = n_sequences
        self.output: Tensor | GradientEdge = logits
        self.shape, self.dtype = tuple(logits.shape), logits.dtype
        if selected and self.root is not None:
            made, number = self.root.next_functions[0]
            assert made is not None, "logits that need no gradient were refused"
            self.output, self.root = GradientEdge(made, number), made
            metadata: Any = made._input_metadata[number]
            self.shape, self.dtype = tuple(int(size) for size in metadata.shape), metadata.dtype
        self.nodes: list[Node] = []
        self.leaves: dict[int, int] = {}
        self._sources: list[tuple[tuple[Node | None, int], ...]] = []
        positions: dict[Node | None, int] = {None: -1}
        pending: list[Node | None] = [self.root]
        while pending:
            node = pending.pop()
            if node is None or node in positions:
                continue
            positions[node] = len(self.nodes)
            self.nodes.append(node)
            sources = node.next_functions
            self._sources.append(sources)
            pending.extend([source for source, _ in sources])
        self._positions = positions
        found: list[object] = [self.shape, self.dtype]
        for position, (node, sources) in enumerate(zip(self.nodes, self._sources, strict=True)):
            name = node.name()
            found.append(name)
            for source, output in sources:
                found.append(positions[source])
                found.append(output)
            for made in node._input_metadata:
                if made.is_nested_tensor:
                    raise ModelError(
                        "model: it computes with nested tensors, of which no rows can be told to belong to an example; "
                        "pad them to one length, with a mask"
                    )
                found.append(tuple(made.shape))
                found.append(made.dtype)
            if name == _ACCUMULATOR:
                leaf: Any = node
                number = parameters.get(id(leaf.variable), -1)
                found.append(number)
                self.leaves[number] = position
            elif name in _NUMBERED:
                found.extend([_hashable(getattr(node, number, None)) for number in _numbers(type(node))])
        self.leaves.pop(-1, None)
        self.fingerprint = hash(tuple(found))

    def output_layer(self, edges: Iterable[GradientEdge]) -> OutputLayer | None:
        """Find the matrix product that makes the model's output ``(b, T, C)``, if gradients are wanted below it alone.

        Args:
            edges: Where gradients are wanted.
        """
        wanted = {edge.node for edge in edges}
        made: Any = self.root
        while made.name() in _VIEWS and int(made._input_metadata[0].shape[-1]) == self.shape[-1] and made not in wanted:
            made = made.next_functions[0][0]
        if made.name() not in ("MmBackward0", "AddmmBackward0") or made in wanted:
            return None
        *bias, (source, number), (weight, _) = made.next_functions
        rows = tuple(int(size) for size in made._input_metadata[0].shape)
        if source is None or weight is not None or rows != (math.prod(self.shape[:-1]), self.shape[-1]):
            return None
        if bias and (bias[0][0] is not None or made._saved_alpha != 1):
            return None
        return OutputLayer(made._saved_mat2.detach(), GradientEdge(source, number), made._input_metadata[0].dtype)

    @cached_property
    def names(self) -> list[str]:
        """Name of each node."""
        return [node.name() for node in self.nodes]

    @cached_property
    def form(self) -> int:
        """A value that is equal for graphs with the same operations on the same operands, whatever the sizes."""
        wiring = [tuple((self._positions[source], output) for source, output in sources) for sources in self._sources]
        return hash((tuple(self.names), tuple(wiring)))

    @cached_property
    def precision(self) -> torch.dtype:
        """The coarsest floating dtype of any operation's output."""
        dtypes = {made.dtype for node in self.nodes for made in node._input_metadata} | {self.dtype}
        return next((dtype for dtype in _PRECISIONS if dtype in dtypes), torch.float32)

    @cached_property
    def routed(self) -> bool:
        """Whether operations may move rows by a tensor's values, so that equal graphs can give rows to other examples.

        Such operations take an index, a sorted order, or a matrix of data as a factor.
        """
        return not _FIXED.issuperset(self.names) or any(
            self._mixes_rows(position, self._n_sequences) for position in range(len(self.nodes))
        )

    @cached_property
    def _takers(self) -> dict[tuple[int, int], list[tuple[int, int]]]:
        takers: dict[tuple[int, int], list[tuple[int, int]]] = {}
        for position, sources in enumerate(self._sources):
            for operand, (source, output) in enumerate(sources):
                takers.setdefault((self._positions[source], output), []).append((position, operand))
        return takers

    def takers(self, value: Value) -> list[tuple[int, int]]:
        """Return the operations that take the value, and as which operand."""
        return self._takers.get((value.node, value.output), [])

    def shapes(self, position: int) -> list[tuple[int, ...]]:
        """Return the shapes of the outputs of the operation that the node at that position is the backward of."""
        return [tuple(int(size) for size in made.shape) for made in self.nodes[position]._input_metadata]

    def use(self, position: int, operand: int, value: Value, parameter: Value) -> Use:
        """Describe the use of a value by the node at a position."""
        shape = self.shapes(position)[0]
        n_bytes = int(self.nodes[position]._input_metadata[0].dtype.itemsize) * math.prod(shape)
        name = self.names[position]
        return Use(name, position, operand, value, parameter.node, parameter.shape, shape, n_bytes)

    def derive(self, value: Value, position: int, operand: int = 0) -> list[Value] | None:
        """Return the outputs of a node as values, if it is an operation of parameters alone."""
        name, shapes = self.names[position], self.shapes(position)
        if name in _SHIFTS and operand == 0 and shapes[0] == value.shape:
            if any(source is not None for source, _ in self._sources[position][1:]):
                return None
            return [Value(position, 0, shapes[0], value.reshaped)]  # a constant added, as in 1 + weight
        if name not in _RESHAPES and name not in _MAPS:
            return None
        if name in _RESHAPES:
            return [Value(position, 0, shapes[0], value.reshaped)]
        if name == "TBackward0" and len(value.shape) == 2:
            return [Value(position, 0, shapes[0], False, untransposed=value)]
        return [Value(position, i, shape, False) for i, shape in enumerate(shapes)]

    def widens(self, position: int) -> bool:
        """Say whether everything that takes the node's output broadcasts it to a larger shape."""
        shape = self.shapes(position)[0]
        takers = self.takers(Value(position, 0, shape))
        return bool(takers) and all(
            self.names[taker] in ("AddBackward0", "MulBackward0", "ExpandBackward0", "SubBackward0")
            and math.prod(self.shapes(taker)[0]) > math.prod(shape)
            for taker, _ in takers
        )

    def _mixes_rows(self, position: int, n_examples: int) -> bool:
        """Whether it is a product that may give an example rows of another: by matrices that depend on the data."""
        name = self.names[position]
        if name in ("BmmBackward0", "BaddbmmBackward0") or name.startswith("ScaledDotProduct"):
            return self.shapes(position)[0][0] % n_examples != 0  # otherwise each example has matrices of its own
        second = {"MmBackward0": 1, "AddmmBackward0": 2}.get(name)
        source = -1 if second is None else self._positions[self._sources[position][second][0]]
        while source >= 0 and self.names[source] in (_RESHAPES | _MAPS) - {"EmbeddingBackward0"}:
            source = self._positions[self._sources[source][0][0]]
        return source >= 0 and self.names[source] != _ACCUMULATOR


@functools.cache
def _numbers(kind: type[Node]) -> tuple[str, ...]:
    """Which numbers nodes of a kind have kept."""
    return tuple(name for name in _NUMBERS if hasattr(kind, name))


def _hashable(number: object) -> object:
    return tuple(number) if isinstance(number, list) else number
