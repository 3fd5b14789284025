"""Weights of the Fisher's blocks: one per parameter, so that no single layer dominates the components.

With weights w the Fishers are those of the rows ``A D``, D = √w on the parameter's columns (``w ∘ f`` of the diagonal
kind). What mixes the parameters, a sketch or an inner product, has to be weighted before; other Fishers may be weighted
afterwards as well (:mod:`npeff.fishers.scaling`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from npeff.errors import ArgumentError
from npeff.gradients.blocks import Block, Pairs
from npeff.models.parameters import Parameters

Array = npt.NDArray[Any]
BlockWeights = Literal["energy", "balanced"] | Mapping[str, float]


def layer_of(name: str) -> str:
    """Return the layer that a parameter belongs to: its name without the last part (``"0.weight"`` → ``"0"``)."""
    return name.rpartition(".")[0] or name


def check_block_weights(choice: object) -> None:
    """Refuse a value that does not describe block weights.

    Raises:
        ArgumentError: It is neither a known word nor a mapping.
    """
    if choice not in ("energy", "balanced") and not isinstance(choice, Mapping):
        raise ArgumentError(
            f"block_weights: expected 'energy', 'balanced' or a mapping from name patterns to weights, got {choice!r}"
        )


def given_weights(names: Sequence[str], choice: Mapping[str, float]) -> dict[str, float]:
    """Return the weight of every parameter: that of the last pattern that matches its name, or 1 without a match.

    Raises:
        ArgumentError: A pattern matches nothing, a weight is negative or infinite, or all are 0.
    """
    weights = dict.fromkeys(names, 1.0)
    for pattern, weight in choice.items():
        matched = [name for name in names if fnmatchcase(name, pattern)]
        if pattern in weights:  # a name in which brackets stand
            matched = [pattern]
        if not matched:
            raise ArgumentError(
                f"block_weights: pattern {pattern!r} matches no parameter; there are {', '.join(names[:8])}"
            )
        if not isinstance(weight, int | float) or not 0 <= weight < math.inf:
            raise ArgumentError(f"block_weights: expected finite weights ≥ 0, got {weight!r} for {pattern!r}")
        weights.update(dict.fromkeys(matched, float(weight)))
    if not any(weights.values()):
        raise ArgumentError("block_weights: every parameter has weight 0; keep at least one")
    return weights


def balanced_weights(energy: Mapping[str, float]) -> dict[str, float]:
    """Compute the weights that give every layer the same share of the trace; 0 for a layer without any.

    Args:
        energy: Share of the trace per parameter.
    """
    of_layer: dict[str, float] = {}
    for name, value in energy.items():
        of_layer[layer_of(name)] = of_layer.get(layer_of(name), 0.0) + value
    share = (sum(of_layer.values()) or 1.0) / len(of_layer)
    return {name: share / of_layer[layer_of(name)] if of_layer[layer_of(name)] else 0.0 for name in energy}


def column_factors(parameters: Parameters, weights: Mapping[str, float], kind: str) -> Array:
    """Return the ``(m,)`` float32 factor of each row entry: √weight, or the weight for diagonal Fishers; else 1."""
    own = [weights.get(p.name, 1.0) for p in parameters]
    factors = [math.sqrt(weight) if kind == "low_rank" else weight for weight in own]
    return np.repeat(np.asarray(factors, np.float32), [p.numel for p in parameters])


class WeightedBlocks:
    """Weighs blocks on their way to a sink, by the weight of each parameter's name."""

    def __init__(self, parameters: Parameters, weights: Mapping[str, float], squared: bool) -> None:
        self._weights = {parameter.name: weights.get(parameter.name, 1.0) for parameter in parameters}
        self._at = {parameter.offset: self._weights[parameter.name] for parameter in parameters if parameter.numel}
        self._squared = squared

    def __call__(self, block: Block | Pairs) -> Block | Pairs:
        """The block times its weight: rows times √weight, squares times the weight."""
        weight = self._weights[block.parameter.name]
        if isinstance(block, Pairs):  # which are never squared
            return replace(block, delta=block.delta * math.sqrt(weight))
        if isinstance(block.starts, tuple):
            each = torch.tensor([self._at[start] for start in block.starts]).to(block.values)
            return replace(block, values=block.values * (each if self._squared else each.sqrt())[:, None])
        gram = None if block.gram is None else block.gram * weight
        return replace(block, values=block.values * (weight if self._squared else math.sqrt(weight)), gram=gram)


class PilotEnergy:
    """Measures the share of the unit-norm Fishers' trace that lies in each parameter, from blocks."""

    def __init__(self, parameters: Parameters) -> None:
        self._parameters = parameters
        self._names = {parameter.offset: parameter.name for parameter in parameters if parameter.numel}
        self.energy = dict.fromkeys(parameters.names, 0.0)

    def add(self, blocks: Iterable[Block | Pairs], n: int) -> None:
        """Add the blocks of a pass over n examples (or slots), each divided by its Fisher norm ``‖A Aᵀ‖_F``."""
        traces: dict[str, Any] = {}
        total: Any = 0.0
        for block in blocks:
            for name, gram in self._grams(block):
                whole = torch.zeros(n, *gram.shape[1:], dtype=torch.float64)
                whole[block.examples] = gram.cpu()
                total = total + whole
                traces[name] = traces.get(name, 0.0) + whole.diagonal(dim1=1, dim2=2).sum(dim=1)
        norms = total.square().sum(dim=(1, 2)).sqrt()
        for name, own in traces.items():
            self.energy[name] += float(torch.where(norms > 0, own / norms.clamp_min(1e-300), 0.0).sum())

    def _grams(self, block: Block | Pairs) -> Iterator[tuple[str, torch.Tensor]]:
        """Names of parameters, and the inner products of the columns in each."""
        if isinstance(block, Pairs):
            yield block.parameter.name, block.gram()
        elif isinstance(block.starts, tuple):
            for run, start in enumerate(block.starts):
                values = block.values[:, :, run].to(torch.float64)
                yield self._names[start], values @ values.mT
        else:
            flat = block.values.flatten(2).to(torch.float64)
            yield block.parameter.name, flat @ flat.mT if block.gram is None else block.gram

    def weights(self) -> dict[str, float]:
        """Compute weights that balance the layers, to three digits; a layer without energy gets the median."""
        found = balanced_weights(self.energy)
        known = [weight for weight in found.values() if weight]
        return {name: float(f"{weight or np.median(known or [1.0]):.3g}") for name, weight in found.items()}
