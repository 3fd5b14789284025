"""What a repair minimises, over steps along the directions of some components.

A component's direction g_j spans all layers in fixed proportion, as they carry its Fisher. The repair may want other
proportions: to forget a patch in the first filters need not change the last layer. So g_j is cut into its parts per
layer, each of unit norm, and every part has its own step; or, as published, all layers go together.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from npeff.batches.batches import Batch
from npeff.fishers.computation import Forward
from npeff.models.forward import call_model
from npeff.perturbation.weights import Weights

Array = npt.NDArray[Any]


class Directions:
    """Components' directions, cut by layers or whole: ``(k·L,)`` steps make a change of the weights.

    Args:
        vectors: Each component's direction, parameter-shaped, on the device of the model.
        by_layer: Whether each layer's part has a step of its own; a layer is a module with its weight and bias.
    """

    def __init__(self, vectors: Sequence[dict[str, Tensor]], by_layer: bool) -> None:
        layers = {name: name.rpartition(".")[0] if by_layer else "" for name in vectors[0]}
        self.layers = tuple(dict.fromkeys(layers.values()))
        self.shapes = {name: tensor.shape for name, tensor in vectors[0].items()}
        self._layer_of = {name: self.layers.index(layer) for name, layer in layers.items()}
        self._parts = {name: torch.stack([g[name].flatten() for g in vectors]) for name in layers}
        squares = np.zeros((len(vectors), len(self.layers)))
        for name, G in self._parts.items():
            squares[:, self._layer_of[name]] += G.double().square().sum(1).cpu().numpy()
        self._scales = np.where(squares > 1e-24, 1 / np.sqrt(np.maximum(squares, 1e-24)), 0.0)

    @property
    def shape(self) -> tuple[int, int]:
        """Components, layers."""
        return self._scales.shape[0], self._scales.shape[1]

    def size_of_weights(self, model: nn.Module) -> float:
        """Norm of the weights that move."""
        named = dict(model.named_parameters(remove_duplicate=False))
        return float(sum(named[name].detach().double().square().sum() for name in self._layer_of)) ** 0.5

    def coefficients(self, c: Array) -> Array:
        """``(k, L)``: the steps as multiples of the layers' parts of g_j."""
        return np.asarray(c, np.float64).reshape(self.shape) * self._scales

    def change(self, c: Array) -> dict[str, Tensor]:
        """The change of the weights, parameter-shaped."""
        weights = torch.from_numpy(self.coefficients(c))
        return {
            name: (weights[:, self._layer_of[name]].to(G) @ G).reshape(self.shapes[name])
            for name, G in self._parts.items()
        }

    def slopes(self, gradient: dict[str, Tensor]) -> Array:
        """Slopes of a function of the weights along the steps, ``(k·L,)``, from its gradient."""
        slopes = np.zeros(self.shape)
        for name, slope in gradient.items():
            G = self._parts[name]
            slopes[:, self._layer_of[name]] += (G @ slope.flatten().to(G)).double().cpu().numpy()
        return (slopes * self._scales).ravel()


class Objective:
    """The objective of :func:`npeff.mend` over the steps, and its gradient: one backward pass for any number of them.

    Args:
        model: The model, whose weights move.
        forward: As for :func:`npeff.mend`.
        batches: The examples of the fit and perhaps others.
        labels: ``(n,)`` of all of their examples.
        logits: ``(n, C)`` before any change.
        directions: Along which to move.
        R: ``(n,)`` boolean, to repair.
        K: ``(n,)`` boolean, to keep.
        likelihood: What the outputs mean.
    """

    def __init__(
        self, model: nn.Module, forward: Forward | None, batches: Sequence[Batch], labels: Tensor, logits: Tensor,
        directions: Directions, R: Array, K: Array, likelihood: str = "categorical",
    ) -> None:  # fmt: skip
        self.model, self.forward, self.directions, self._likelihood = model, forward, directions, likelihood
        self._parts = [
            (batch, labels[at], logits[at], torch.from_numpy(R[at.cpu().numpy()] / max(1, R.sum())).to(labels.device),
             torch.from_numpy(K[at.cpu().numpy()] / max(1, K.sum())).to(labels.device))
            for batch, at in needed(batches, R | K, labels.device)
        ]  # fmt: skip
        named = dict(model.named_parameters(remove_duplicate=False))
        self._moving = {name: named[name] for name in directions.shapes if name in named}

    def solve(self, weights: Weights, c: Array, strength: float, iterations: int) -> Array | None:
        """The minimiser at λ = strength, from c; None where the objective is not finite."""
        from scipy.optimize import minimize

        solution = minimize(
            lambda c: self.value_and_gradient(weights, c, strength), c, jac=True, method="L-BFGS-B",
            options={"maxiter": iterations},
        )  # fmt: skip
        return np.asarray(solution.x, np.float64) if np.isfinite(solution.fun) else None

    def value_and_gradient(self, weights: Weights, c: Array, strength: float) -> tuple[float, Array]:
        """The objective and its ``(k·L,)`` gradient."""
        weights.move(self.directions.change(c), 1.0)
        value, gradient = 0.0, np.zeros(len(c))
        frozen = [tensor.requires_grad for tensor in self._moving.values()]
        try:
            for tensor in self._moving.values():
                tensor.requires_grad_(True)
            for batch, labels, logits, r, k in self._parts:
                with torch.enable_grad():
                    outputs = call_model(self.model, self.forward, batch, self._likelihood)
                    log_p = torch.log_softmax(outputs.double(), 1)
                    log_q = torch.log_softmax(logits.double(), 1)
                    wrong = -log_p.gather(1, labels[:, None])[:, 0]
                    moved = (log_q.exp() * (log_q - log_p)).sum(1)
                    loss = (r * wrong + strength * k * moved).sum()
                    slopes = torch.autograd.grad(loss, list(self._moving.values()), allow_unused=True)
                value += float(loss.detach())
                gradient += self.directions.slopes(
                    {name: slope for name, slope in zip(self._moving, slopes, strict=True) if slope is not None}
                )
        finally:
            for tensor, was in zip(self._moving.values(), frozen, strict=True):
                tensor.requires_grad_(was)
        return value, gradient


def needed(batches: Sequence[Batch], which: Array, device: torch.device) -> Iterator[tuple[Batch, Tensor]]:
    """The batches without the examples that are not asked for, and the positions of those that stay."""
    start = 0
    for batch in batches:
        at = torch.arange(start, start + batch.n_examples, device=device)
        wanted = torch.from_numpy(which[start : start + batch.n_examples]).to(device)
        start += batch.n_examples
        if not bool(wanted.any()):
            continue
        yield (batch.take(wanted.nonzero()[:, 0]), at[wanted]) if batch.sliceable else (batch, at)
