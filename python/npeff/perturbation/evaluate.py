"""Measure a model's outputs on selected examples at its own weights and at weights moved along a direction."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp

from npeff.batches.batch_order import check_sampler
from npeff.batches.batches import Batch
from npeff.components.components import Components
from npeff.errors import ArgumentError, DataError
from npeff.fishers.factors import check_meaning
from npeff.fishers.options import Likelihood
from npeff.gradients.eligibility import check_eligible
from npeff.gradients.selection import placed
from npeff.models.digests import model_digest
from npeff.models.forward import OVER_CLASSES, call_model
from npeff.perturbation import outputs
from npeff.perturbation.data_fisher import summed_fisher
from npeff.perturbation.directions import random_direction
from npeff.perturbation.examples import BatchSlice, SelectedExamples
from npeff.perturbation.options import Forward, PerturbOptions
from npeff.perturbation.weights import TensorsByName, Weights, on_model

Array = npt.NDArray[Any]

DIFFERENCE = {torch.float64: 1e-5, torch.float32: 2e-2, torch.bfloat16: 0.3, torch.float16: 0.1}
"""Change of the outputs relative to their size, per dtype of the weights, at which central differences err least."""


@dataclass(frozen=True)
class Measured:
    """What a change of the weights does to each example, or the average over several changes.

    Attributes:
        kl: ``(n,)`` float64 KL(moved ‖ original) in nats; inf where the moved outputs are not finite.
        flipped: ``(n,)`` float64 1 where the prediction changed, nan where there is no prediction.
        correct: ``(n,)`` float64 1 where the prediction is the label, nan where the label is unknown.
    """

    kl: Array
    flipped: Array
    correct: Array

    @staticmethod
    def average(several: Sequence[Measured], shares: Sequence[float]) -> Measured:
        """Average with the given shares, which sum to 1."""
        if len(several) == 1:
            return several[0]
        fields = ("kl", "flipped", "correct")
        return Measured(*(sum(s * getattr(m, f) for m, s in zip(several, shares, strict=True)) for f in fields))


class Evaluator:
    """Evaluates a model on selected examples; it moves the weights in place and restores them after every call.

    Use it within :func:`untouched`, with the model on ``device``.

    Args:
        model: The model.
        data: As for :func:`npeff.compute_fishers`.
        components: A decomposition of Fishers of the data.
        rows: Rows of the components' coefficients whose examples are measured, in any order.
        device: The device of the model.
        likelihood: Likelihood of the outputs.
        forward: As for :func:`npeff.compute_fishers`.

    Attributes:
        rows: ``(n,)`` the rows without repetition, by ascending position of their examples in the data.
        outputs: ``(n, C)`` outputs at the model's own weights.
        correct: ``(n,)`` as in :class:`Measured`, at the model's own weights.
        fisher_method: How :meth:`fisher_along` differentiates: ``"forward mode"`` or ``"central differences"``.

    Raises:
        DataError: The data is too short, or the outputs are not finite.
    """

    def __init__(
        self,
        model: nn.Module,
        data: Iterable[Any],
        components: Components,
        rows: Array,
        device: torch.device,
        likelihood: Likelihood,
        forward: Forward | None,
    ) -> None:
        self.model, self.parameters, self.device = model, components.parameters, device
        self.likelihood, self.forward = likelihood, forward
        ids, first = np.unique(components.ids[rows], return_index=True)
        self.rows = np.asarray(rows)[first]
        self._ids_of_rows = components.ids
        self.weights = Weights(model)
        places = likelihood in OVER_CLASSES
        self.examples = SelectedExamples(data, ids, device, self.call, forward is not None, places)
        self.outputs = self._own_outputs()
        self._labels = torch.from_numpy(components.labels[self.rows].astype(np.int64)).to(device)
        self.correct: Array = outputs.correct(self.outputs, self._labels, likelihood).cpu().numpy()
        self.fisher_method = "forward mode"
        self._callable = _Callable(model, lambda inner, batch: call_model(inner, forward, batch, likelihood))
        self._random: dict[tuple[int, int], Array] = {}
        self._mean_fishers: dict[bytes, Array] = {}

    def indices(self, rows: Array) -> Array:
        """Ascending indices, each once, of the examples of some rows of the coefficients."""
        return np.unique(np.searchsorted(self.examples.ids, self._ids_of_rows[rows]))

    def call(self, batch: Batch) -> Tensor:
        """Outputs on a batch, without a graph."""
        with torch.no_grad():
            return call_model(self.model, self.forward, batch, self.likelihood).detach()

    def _own_outputs(self) -> Tensor:
        kept: Tensor | None = None
        for one in self.examples:
            found = self.call(one.batch)[one.rows]
            if kept is None:
                kept = found.new_empty((len(self.examples), found.shape[1]))
            if found.shape[1] != kept.shape[1]:
                raise DataError(
                    f"logits: expected {kept.shape[1]} per example as in the first batch, got {found.shape[1]}"
                )
            kept[self._at(one)] = found
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

    def _at(self, one: BatchSlice) -> Tensor:
        return torch.from_numpy(one.indices).to(self.device)

    @cached_property
    def weight_norm(self) -> float:
        """‖θ‖ over the selected parameters, at least 1e-3."""
        tensors = dict(self.model.named_parameters(remove_duplicate=False))
        squares = sum(float(tensors[name].detach().double().square().sum()) for name in self.parameters.names)
        return max(math.sqrt(squares), 1e-3)

    def tensors(self, vector: Array) -> TensorsByName:
        """A flat vector ``(m,)`` as parameter-shaped tensors on the model's device."""
        return on_model(self.model, self.parameters.unflatten(vector), "direction")

    # ---- at moved weights ------------------------------------------------------------------------------------

    def measure(self, direction: TensorsByName, magnitude: float) -> Measured:
        """Measure all examples at ``θ + magnitude · direction``."""
        kl, flips, right = np.zeros((3, len(self.examples)))
        for one, moved in self._moved(self.examples, direction, magnitude):
            own = self.outputs[self._at(one)]
            kl[one.indices] = _not_nan(outputs.divergence(moved, own, self.likelihood))
            flips[one.indices] = outputs.flipped(moved, own, self.likelihood).cpu().numpy()
            right[one.indices] = outputs.correct(moved, self._labels[self._at(one)], self.likelihood).cpu().numpy()
        return Measured(kl, flips, right)

    def kl(self, slices: Sequence[BatchSlice], direction: TensorsByName, magnitude: float) -> Array:
        """KL of the examples in ``slices``, in their order, ``(k,)`` float64, at ``θ + magnitude · direction``."""
        found = [
            _not_nan(outputs.divergence(moved, self.outputs[self._at(one)], self.likelihood))
            for one, moved in self._moved(slices, direction, magnitude)
        ]
        return np.concatenate(found) if found else np.zeros(0)

    def _moved(
        self, slices: Iterable[BatchSlice], direction: TensorsByName, magnitude: float
    ) -> Iterator[tuple[BatchSlice, Tensor]]:
        with self.weights.at(direction, magnitude):
            for one in slices:
                yield one, self.call(one.batch)[one.rows]

    # ---- Fishers at the model's own weights ------------------------------------------------------------------

    def mean_fisher(self, indices: Array) -> Array:
        """Mean diagonal Fisher ``(m,)`` of some examples, computed once."""
        key = indices.tobytes()
        if key not in self._mean_fishers:
            chosen = np.zeros(len(self.examples), bool)
            chosen[indices] = True
            slices = (one.restricted(chosen) for one in self.examples)
            batches = ((one.batch, one.rows.cpu().numpy()) for one in slices if len(one.indices))
            total, count = summed_fisher(self.model, self.parameters, batches, self.likelihood, self.forward)
            self._mean_fishers[key] = total / count
        return self._mean_fishers[key]

    def random_fisher(self, seed: int, number: int) -> Array:
        """``vᵀF_i v`` along the random direction of that number, computed once."""
        if (seed, number) not in self._random:
            vector = random_direction(self.parameters.n_parameters, seed, number)
            self._random[seed, number] = self.fisher_along(self.tensors(vector))
        return self._random[seed, number]

    def fisher_along(self, direction: TensorsByName) -> Array:
        """``vᵀF_i v = uᵀS u`` of every example, ``(n,)`` float64 ≥ 0, with ``u = J_i v``, S the Fisher of the outputs.

        u is one Jacobian-vector product in forward mode, exact. If an operation of the model has no forward-mode
        derivative, u is a central difference of the outputs, ``(f(θ+εv) − f(θ−εv)) / 2ε``, with ε chosen so that the
        outputs change by a small share of their size.
        """
        found = np.zeros(len(self.examples))
        step = 0.0
        for one in self.examples if direction else ():
            own = self.outputs[self._at(one)]
            change = self._forward_mode(one.batch, direction) if self.fisher_method == "forward mode" else None
            if change is None:
                self.fisher_method = "central differences"
                step = step or self._difference_step(one.batch, direction, own)
                change = self._difference(one.batch, direction, step)
            found[one.indices] = outputs.curvature(own, change[one.rows], self.likelihood).cpu().numpy()
        return found

    def _forward_mode(self, batch: Batch, direction: TensorsByName) -> Tensor | None:
        """``J v`` of a batch, or None if the model has no forward-mode derivative.

        Raises:
            RuntimeError: The memory does not suffice.
        """
        tensors = dict(self.model.named_parameters(remove_duplicate=False))
        at = {f"model.{name}": tensors[name].detach() for name in direction}
        along = {f"model.{name}": part.to(tensors[name].dtype) for name, part in direction.items()}
        try:
            with warnings.catch_warnings(), torch.inference_mode(False), torch.no_grad():
                warnings.simplefilter("ignore", DeprecationWarning)  # torch's own, about torch.jit
                return jvp(lambda moved: functional_call(self._callable, moved, (batch,)), (at,), (along,))[1].detach()
        except (NotImplementedError, RuntimeError) as error:  # ModelError is a RuntimeError too
            if isinstance(error, torch.OutOfMemoryError) or isinstance(error.__cause__, torch.OutOfMemoryError):
                raise
            return None

    def _difference(self, batch: Batch, direction: TensorsByName, step: float) -> Tensor:
        with self.weights.at(direction, step):
            ahead = self.call(batch).double()
        with self.weights.at(direction, -step):
            return (ahead - self.call(batch).double()) / (2 * step)

    def _difference_step(self, batch: Batch, direction: TensorsByName, own: Tensor) -> float:
        share = DIFFERENCE.get(next(iter(self.model.parameters())).dtype, 2e-2)
        aim = share * max(1e-3, float(own.double().square().mean().sqrt()))
        step = 1e-3
        for _ in range(12):
            size = float((self._difference(batch, direction, step) * step).square().mean().sqrt())
            if not np.isfinite(size):
                step /= 100
            elif size == 0:
                step *= 100
            elif 0.2 < size / aim < 5:
                return step
            else:
                step *= float(np.clip(aim / size, 1e-3, 1e3))
        return step


class _Callable(nn.Module):
    """Makes any way of calling a model one that ``functional_call`` can give other parameters."""

    def __init__(self, model: nn.Module, call: Callable[[nn.Module, Batch], Tensor]) -> None:
        super().__init__()
        self.training = model.training
        self.model, self._call = model, call

    def forward(self, batch: Batch) -> Tensor:
        return self._call(self.model, batch)


def _not_nan(kl: Tensor) -> Array:
    return torch.where(torch.isnan(kl), torch.inf, kl).cpu().numpy()


# ---- checks before the first measurement -------------------------------------------------------------------------


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Restore buffers and training modes at the end, whatever the forward passes did to them."""
    modes = [(module, module.training) for module in model.modules()]
    buffers = [(module, name, buffer) for module in model.modules() for name, buffer in module._buffers.items()]
    saved = [None if buffer is None else buffer.detach().clone() for _, _, buffer in buffers]
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        for (module, name, buffer), before in zip(buffers, saved, strict=True):
            module._buffers[name] = buffer
            if buffer is None or before is None or (buffer.shape == before.shape and torch.equal(buffer, before)):
                continue
            with torch.inference_mode(buffer.is_inference()), torch.no_grad():
                buffer.copy_(before)


@contextmanager
def evaluator_for(
    model: nn.Module, data: Iterable[Any], components: Components, rows: Array, options: PerturbOptions
) -> Iterator[Evaluator]:
    """Check model, data and components against each other, and yield the evaluator of some examples.

    Args:
        model: As for :func:`npeff.perturb`.
        data: As for :func:`npeff.perturb`.
        components: The decomposition.
        rows: Rows of the coefficients whose examples are needed, in any order.
        options: As for :func:`npeff.perturb`.

    Yields:
        The evaluator, whose examples are ordered by their position in the data.

    Raises:
        ArgumentError: The model, ``forward`` or ``likelihood`` has a wrong type or value.
        DataError: The data is not the data of the Fishers.
    """
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    if options.forward is not None and not callable(options.forward):
        raise ArgumentError(f"forward: expected callable(model, batch) -> logits, got {options.forward!r}")
    inner = getattr(model, "_orig_mod", model)
    fishers = components.provenance.get("fishers") or {}
    likelihood = options.likelihood or (fishers.get("options") or {}).get("likelihood", "categorical")
    if likelihood not in get_args(Likelihood):
        raise ArgumentError(f"likelihood: expected one of {', '.join(get_args(Likelihood))}, got {likelihood!r}")
    check_eligible(inner)
    check_sampler(data)
    _check_parameters(inner, components)
    theirs = fishers.get("model_digest")
    same_model = None if not theirs else theirs == model_digest(inner)
    if same_model is False:
        warnings.warn("model: it is not the one of the components' Fishers (other weights)", stacklevel=4)
    if components.ids[rows].min() < 0:
        raise ArgumentError("components: their ids are not positions in data; examples cannot be found")
    with placed(inner, options.device) as device, untouched(inner):
        evaluator = Evaluator(inner, data, components, rows, device, likelihood, options.forward)
        _check_outputs(evaluator, components.logits[evaluator.rows], same_model)
        yield evaluator


def _check_parameters(model: nn.Module, components: Components) -> None:
    tensors = dict(model.named_parameters(remove_duplicate=False))
    if components.parameters.names == ("parameters",) and "parameters" not in tensors:
        raise ArgumentError(
            "components: they come from a file in a published layout, which has no names of parameters, so that these "
            "cannot be found in the model; take npeff's own files of the Fishers and the components"
        )
    for parameter in components.parameters:
        found = tensors.get(parameter.name)
        if found is None:
            raise ArgumentError(
                f"model: the components are of a parameter {parameter.name!r}, which {type(model).__name__} has not "
                f"({', '.join(list(tensors)[:5])} …); pass the model that the Fishers were computed from"
            )
        if tuple(found.shape) != parameter.shape:
            raise ArgumentError(
                f"model: {parameter.name} has shape {tuple(found.shape)}, expected {parameter.shape} as in the "
                "components; pass the model that the Fishers were computed from"
            )


def _check_outputs(evaluator: Evaluator, stored: Array, same_model: bool | None) -> None:
    """Compare the outputs with those that were stored with the components: they show whether the data is the same.

    Raises:
        DataError: The model is the same, but not its outputs.
    """
    if not stored.shape[1]:
        return
    found = evaluator.outputs.double().cpu().numpy()
    if found.shape != stored.shape:
        raise DataError(
            f"logits: expected {stored.shape[1]} per example as with the Fishers, got {found.shape[1]}; pass the same "
            "model, data and forward="
        )
    size = max(1.0, float(np.abs(stored).max()))
    differs = np.abs(found - stored).max(1) > 0.02 * size
    if not differs.any() or same_model is False:
        return
    bad = int(evaluator.examples.ids[int(np.argmax(differs))])
    message = (
        f"data: {int(differs.sum())} of {len(differs)} examples, the first at position {bad}, have other outputs than "
        "when the Fishers were computed"
    )
    if same_model:
        raise DataError(
            f"{message}, although the model is the same; pass the same data in the same order, and forward="
        )
    warnings.warn(f"{message}; are model and data the same?", stacklevel=5)
