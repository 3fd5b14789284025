"""A model, some examples, and what it says of them at its own weights and at others."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from npeff.batches.batches import Batch
from npeff.errors import DataError
from npeff.gradients.factors import Likelihood, check_meaning
from npeff.models.forward import call_model
from npeff.models.parameters import Parameters
from npeff.perturbation import outputs
from npeff.perturbation.curvature import Curvature
from npeff.perturbation.directions import Directions, random_direction
from npeff.perturbation.examples import Examples, Piece
from npeff.perturbation.weights import Direction, Weights, on_model

Array = npt.NDArray[Any]
Forward = Callable[[Any, Any], Any]


@dataclass(frozen=True)
class Measured:
    """What moved weights do to each example, or the average of several such moves.

    Attributes:
        kl: ``(n,)`` float64 KL(moved ‖ original) in nats; inf where the moved outputs are not finite.
        flipped: ``(n,)`` float64 1 where the prediction changed, nan where there is none.
        correct: ``(n,)`` float64 1 where the prediction is the label, nan where unknown.
    """

    kl: Array
    flipped: Array
    correct: Array

    @staticmethod
    def average(several: Sequence[Measured], shares: Sequence[float]) -> Measured:
        """The average with given shares (they sum to 1)."""
        if len(several) == 1:
            return several[0]
        fields = ("kl", "flipped", "correct")
        return Measured(*(sum(s * getattr(m, f) for m, s in zip(several, shares, strict=True)) for f in fields))


class Session:
    """Examples under a model whose weights are moved and put back.

    Use within :func:`untouched`, on a model that is on ``device``.

    Args:
        model: The model.
        parameters: What flat vectors stand for.
        data: As for :func:`npeff.compute_fishers`.
        ids: ``(n,)`` int64 ascending positions of the examples.
        labels: ``(n,)`` int64 their classes, −1 where unknown.
        device: Where the model is.
        likelihood: What its outputs mean.
        forward: As for :func:`npeff.compute_fishers`.

    Attributes:
        outputs: ``(n, C)`` at the model's own weights.
        correct: ``(n,)`` as in :class:`Measured`, at the model's own weights.
        rows: ``(n,)`` which rows of the components' coefficients the examples are.
        directions: Of the components, once someone needed them.
        fishers: The mean diagonal Fisher, once someone needed it.

    Raises:
        DataError: The data is too short, or the outputs are not finite.
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: Parameters,
        data: Iterable[Any],
        ids: Array,
        labels: Array,
        device: torch.device,
        likelihood: Likelihood,
        forward: Forward | None,
    ) -> None:
        self.model, self.parameters, self.device = model, parameters, device
        self.likelihood, self.forward, self.labels = likelihood, forward, labels
        self.weights = Weights(model)
        self.examples = Examples(data, ids, device, self.call, forward is not None)
        self.outputs = self._outputs()
        known = torch.from_numpy(np.asarray(labels, np.int64)).to(device)
        self.correct: Array = outputs.correct(self.outputs, known, likelihood).cpu().numpy()
        self._curvature = Curvature(
            model, lambda inner, batch: call_model(inner, forward, batch, likelihood), self.weights, likelihood
        )
        self._random_curvatures: dict[tuple[int, int], Array] = {}
        self.rows: Array = np.arange(len(self.examples))
        self.directions: Directions | None = None
        self.fishers: dict[str, Any] = {}

    def call(self, batch: Batch) -> Tensor:
        """The model's outputs on a batch, without a graph."""
        with torch.no_grad():
            return call_model(self.model, self.forward, batch, self.likelihood).detach()

    def _outputs(self) -> Tensor:
        kept: Tensor | None = None
        for piece in self.examples:
            found = self.call(piece.batch)[piece.rows]
            if kept is None:
                kept = found.new_empty((len(self.examples), found.shape[1]))
            if found.shape[1] != kept.shape[1]:
                raise DataError(
                    f"logits: expected {kept.shape[1]} per example as in the first batch, got {found.shape[1]}"
                )
            kept[self._places(piece)] = found
        if kept is None:
            raise DataError("data: no examples to measure; pass the data that the Fishers were computed from")
        check_meaning(kept, self.likelihood)
        finite = torch.isfinite(kept).all(1)
        if not bool(finite.all()):
            bad = int((~finite).to(torch.uint8).argmax())
            raise DataError(
                f"logits: example {self.examples.ids[bad]} has the logits {kept[bad, :8].tolist()} at the model's own "
                "weights; find what overflows in the model on it, or leave it out"
            )
        return kept

    def _places(self, piece: Piece) -> Tensor:
        return torch.from_numpy(piece.places).to(self.device)

    # ---- directions ------------------------------------------------------------------------------------------

    @cached_property
    def size(self) -> float:
        """‖θ‖ over the selected parameters, at least 1e-3."""
        tensors = dict(self.model.named_parameters(remove_duplicate=False))
        squares = sum(float(tensors[name].detach().double().square().sum()) for name in self.parameters.names)
        return max(math.sqrt(squares), 1e-3)

    def placed(self, vector: Array) -> Direction:
        """A flat vector ``(m,)`` as tensors on the model's device."""
        return on_model(self.model, self.parameters.unflatten(vector), "direction")

    def random(self, seed: int, number: int) -> Direction:
        """The random direction of that number."""
        return self.placed(random_direction(self.parameters.n_parameters, seed, number))

    # ---- measuring -------------------------------------------------------------------------------------------

    def measure(self, direction: Direction, magnitude: float) -> Measured:
        """All examples at ``θ + magnitude · direction``."""
        kl, flips, right = np.zeros((3, len(self.examples)))
        labels = torch.from_numpy(np.asarray(self.labels, np.int64)).to(self.device)
        for piece, moved in self._moved(self.examples, direction, magnitude):
            places = self._places(piece)
            old = self.outputs[places]
            kl[piece.places] = _finite(outputs.divergence(moved, old, self.likelihood))
            flips[piece.places] = outputs.flipped(moved, old, self.likelihood).cpu().numpy()
            right[piece.places] = outputs.correct(moved, labels[places], self.likelihood).cpu().numpy()
        return Measured(kl, flips, right)

    def kl(self, pieces: Sequence[Piece], direction: Direction, magnitude: float) -> Array:
        """KL of the examples in ``pieces``, in their order, ``(k,)`` float64."""
        found = [
            _finite(outputs.divergence(moved, self.outputs[self._places(piece)], self.likelihood))
            for piece, moved in self._moved(pieces, direction, magnitude)
        ]
        return np.concatenate(found) if found else np.zeros(0)

    def _moved(self, pieces: Iterable[Piece], direction: Direction, magnitude: float) -> Iterator[tuple[Piece, Tensor]]:
        try:
            self.weights.move(direction, magnitude)
            for piece in pieces:
                yield piece, self.call(piece.batch)[piece.rows]
        finally:
            self.weights.restore()

    def curvature(self, direction: Direction) -> Array:
        """``vᵀF_i v`` of every example, ``(n,)`` float64."""
        return self._curvature.along(direction, self.examples, self.outputs)

    def random_curvature(self, seed: int, number: int) -> Array:
        """That of a random direction, computed once."""
        if (seed, number) not in self._random_curvatures:
            self._random_curvatures[seed, number] = self.curvature(self.random(seed, number))
        return self._random_curvatures[seed, number]

    @property
    def curvature_method(self) -> str:
        """How curvatures were found: ``"forward mode"`` or ``"central differences"``."""
        return self._curvature.method


def _finite(kl: Tensor) -> Array:
    return torch.where(torch.isnan(kl), torch.inf, kl).cpu().numpy()


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Afterwards, buffers and training modes are as they were, whatever the forward passes did to them."""
    modes = [(module, module.training) for module in model.modules()]
    buffers = [
        (module, name, buffer, None if buffer is None else buffer.detach().clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
    ]
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        for module, name, buffer, saved in buffers:
            module._buffers[name] = buffer
            if buffer is not None and saved is not None and not _same(buffer, saved):
                with torch.inference_mode(buffer.is_inference()), torch.no_grad():
                    buffer.copy_(saved)


def _same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one, other)
