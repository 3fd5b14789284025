"""Where a weight's per-example gradient is Σ_t δ_t a_tᵀ: the pairs (a, δ), taken from npeff's gradient rules."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NoReturn

import torch
from torch import Tensor

from npeff.gradients.engine import Prepared
from npeff.gradients.rules.base import Rule, working
from npeff.gradients.rules.convolution import ConvolutionBias, ConvolutionWeight, patches
from npeff.gradients.rules.dense import MatrixBias, MatrixProduct
from npeff.models.parameters import Parameters


@dataclass(frozen=True)
class Layer:
    """One weight (and its bias) as G matrices of q × p; G > 1 for grouped convolutions.

    Attributes:
        weight: Name of the weight.
        bias: Name of the bias that is added in the same operation, if it is selected; it is p's last column.
        groups: G.
        transposed: The weight is stored (p, q) rather than (q, p).
    """

    weight: str
    bias: str | None
    groups: int
    transposed: bool


def find_layers(prepared: Prepared) -> list[Layer]:
    """The weights of a batch's graph that have Kronecker factors: linear and convolutional ones, used once.

    Layers whose weight is used several times count as one with more positions if all uses are products alike.
    """
    biases = {
        rule.use.node: name
        for name, rules in prepared.rules.items()
        for rule in rules
        if isinstance(rule, (MatrixBias, ConvolutionBias)) and len(rules) == 1
    }
    layers = []
    for name, rules in prepared.rules.items():
        kinds = {type(rule) for rule in rules}
        if len(kinds) != 1 or not kinds <= {MatrixProduct, ConvolutionWeight}:
            continue
        first = rules[0]
        whole = all(rule.value.shape == first.use.parameter_shape and rule.value.reshaped for rule in rules)
        if not whole:
            continue
        bias = biases.get(first.use.node) if len(rules) == 1 else None
        if isinstance(first, MatrixProduct):
            orientations = {rule.by_rows for rule in rules if isinstance(rule, MatrixProduct)}
            if len(orientations) == 1:
                layers.append(Layer(name, bias, 1, not first.by_rows))
        elif isinstance(first, ConvolutionWeight):
            layers.append(Layer(name, bias, first._groups, False))
    return layers


def pairs(rules: list[Rule], bias: bool) -> tuple[Tensor, Tensor]:
    """Inputs and output gradients of a layer's uses, after the backward passes.

    Args:
        rules: All uses of the weight; they have stored R columns.
        bias: Append a 1 to the inputs.

    Returns:
        a ``(b, G, T, p)`` and δ ``(b, G, T, R, q)``.
    """
    found = [_linear(rule) if isinstance(rule, MatrixProduct) else _convolution(rule) for rule in rules]
    a, delta = (torch.cat(parts, dim=2) if len(parts) > 1 else parts[0] for parts in zip(*found, strict=True))
    if bias:
        a = torch.cat([a, a.new_ones((*a.shape[:3], 1))], dim=3)
    return a, delta


def _linear(rule: MatrixProduct) -> tuple[Tensor, Tensor]:
    delta, inputs, _ = rule.pairs(slice(None)) or _no_pairs(rule)
    return inputs[:, None], delta[:, None].clone()  # the rule may use its memory again


def _convolution(rule: Rule) -> tuple[Tensor, Tensor]:
    if not isinstance(rule, ConvolutionWeight):
        _no_pairs(rule)
    groups = rule._groups
    delta = torch.stack([working(rule.split(kept)) for kept in rule._kept], dim=2)  # (b, t, R, channels, *space)
    b, t, r, channels = delta.shape[:4]
    delta = delta.reshape(b, t, r, groups, channels // groups, -1).permute(0, 3, 1, 5, 2, 4)  # (b, G, t, L, R, q)
    output = rule.use.output_shape[2:]
    under = patches(rule._input.flatten(0, 1), rule.value.shape[2:], output, rule._stride, rule._dilation)
    under = under.reshape(b, t, groups, -1, math.prod(output)).permute(0, 2, 1, 4, 3)  # (b, G, t, L, p)
    return under.flatten(2, 3), delta.flatten(2, 3)


def _no_pairs(rule: Rule) -> NoReturn:
    raise TypeError(f"no pairs from {type(rule).__name__}")


def to_matrices(vectors: Tensor, layer: Layer, parameters: Parameters) -> Tensor:
    """The layer's part of flat vectors ``(k, m)`` as ``(k, G, q, p)``."""
    weight = parameters.named(layer.weight)
    rows = vectors[:, weight.slice].reshape(len(vectors), *weight.shape)
    matrices = rows.mT if layer.transposed else rows.flatten(2)
    matrices = matrices.reshape(len(vectors), layer.groups, -1, matrices.shape[2])
    if layer.bias is None:
        return matrices
    column = vectors[:, parameters.named(layer.bias).slice].reshape(*matrices.shape[:3], 1)
    return torch.cat([matrices, column], dim=3)


def from_matrices(matrices: Tensor, layer: Layer, parameters: Parameters, vectors: Tensor) -> None:
    """Write ``(k, G, q, p)`` into the layer's part of flat vectors ``(k, m)``."""
    k = len(vectors)
    if layer.bias is not None:
        vectors[:, parameters.named(layer.bias).slice] = matrices[..., -1].reshape(k, -1)
        matrices = matrices[..., :-1]
    rows = matrices[:, 0].mT if layer.transposed else matrices
    vectors[:, parameters.named(layer.weight).slice] = rows.reshape(k, -1)
