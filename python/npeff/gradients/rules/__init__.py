"""The table of rules: the rule that serves each operand of each operation.

To add a rule, subclass :class:`~npeff.gradients.rules.base.Rule` and enter it here under the name of the
operation's backward node and the position of the parameter among its inputs. The self-check tests it on every
model it is used on.
"""

from __future__ import annotations

from npeff.gradients.graph import Graph, Use, Value
from npeff.gradients.rules.base import Layout, Rule, Unsupported
from npeff.gradients.rules.convolution import ConvolutionWeight
from npeff.gradients.rules.layers import (
    BatchNormWeight,
    Broadcast,
    ChannelBias,
    Difference,
    Embedding,
    FusedRMSNormWeight,
    GroupNormWeight,
    LayerNormBias,
    LayerNormWeight,
    MatrixBias,
    MatrixProduct,
    Product,
    Slope,
    Sum,
)

__all__ = ["RULES", "Found", "Rule", "Unsupported", "find_uses"]

RULES: dict[tuple[str, int], type[Rule]] = {
    ("AddmmBackward0", 0): MatrixBias,
    ("AddmmBackward0", 2): MatrixProduct,
    ("MmBackward0", 1): MatrixProduct,
    ("ConvolutionBackward0", 1): ConvolutionWeight,
    ("ConvolutionBackward0", 2): ChannelBias,
    ("EmbeddingBackward0", 0): Embedding,
    ("NativeLayerNormBackward0", 1): LayerNormWeight,
    ("NativeLayerNormBackward0", 2): LayerNormBias,
    ("FusedRmsNormBackward0", 1): FusedRMSNormWeight,
    ("NativeGroupNormBackward0", 1): GroupNormWeight,
    ("NativeGroupNormBackward0", 2): ChannelBias,
    ("NativeBatchNormBackward0", 1): BatchNormWeight,
    ("NativeBatchNormBackward0", 2): ChannelBias,
    ("ExpandBackward0", 0): Broadcast,
    ("AddBackward0", 0): Sum,
    ("AddBackward0", 1): Sum,
    ("SubBackward0", 0): Difference,
    ("SubBackward0", 1): Difference,
    ("MulBackward0", 0): Product,
    ("MulBackward0", 1): Product,
    ("PreluKernelBackward0", 1): Slope,
}

Found = tuple[type[Rule], Use, list[Layout]]


def find_uses(graph: Graph, parameter: Value, n_examples: int) -> list[Found]:
    """Find every use of a parameter between it and the logits, with its rule and the layouts that it may have.

    Returns:
        One entry per use; empty when the logits do not depend on the parameter.

    Raises:
        Unsupported: At least one use has no rule.
    """
    found: list[Found] = []
    pending = [parameter]
    while pending:
        value = pending.pop()
        for node, operand in graph.takers(value):
            name = graph.names[node]
            use = graph.use(node, operand, value, parameter)
            rule = RULES.get((name, operand))
            layouts = rule.layouts(use, n_examples) if rule is not None else []
            derived = graph.derive(value, node, operand)
            if rule is not None and layouts and not (derived and name == "EmbeddingBackward0" and graph.widens(node)):
                found.append((rule, use, layouts))
            elif derived is not None:
                pending.extend(derived)
            elif rule is not None:
                raise Unsupported(f"{name} gives {use.output_shape}, which {n_examples} examples do not share out")
            else:
                raise Unsupported(f"used by {name} as operand {operand}, for which there is no rule")
    return found
