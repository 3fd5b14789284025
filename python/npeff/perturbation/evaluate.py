"""Measure a model's outputs on selected examples at its own weights and at weights moved along a direction."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from npeff.batches.batches import Batch
from npeff.batches.reading import check_sampler
from npeff.components.components import Components
from npeff.errors import ArgumentError, DataError, check_choice
from npeff.fishers.factors import check_meaning
from npeff.fishers.logits import Logits
from npeff.fishers.options import Likelihood
from npeff.gradients.eligibility import check_eligible, placed
from npeff.gradients.engine import PerExampleGradients
from npeff.language.places import check_places
from npeff.models.devices import memory_explained
from npeff.models.forward import OVER_CLASSES, call_model
from npeff.models.parameters import Parameters, model_digest
from npeff.perturbation import outputs
from npeff.perturbation.directions import Direction
from npeff.perturbation.effect import Prediction
from npeff.perturbation.examples import BatchSlice, SelectedExamples, unrelated_batches
from npeff.perturbation.figures import Measured
from npeff.perturbation.options import Forward, PerturbOptions
from npeff.perturbation.outputs import Writer
from npeff.perturbation.weights import TensorsByName, Weights, on_model, untouched

Array = npt.NDArray[Any]

MOST_CLASSES = 32
"""Classes of a prediction."""

OWN_BYTES = 256 << 20
"""Outputs at the model's own weights are kept up to this size; larger ones are computed anew beside the moved ones."""


class Evaluator:
    """Evaluates a model on selected examples; it moves the weights in place and restores them after every call.

    Use it within :func:`checked_model`. The examples are those of some rows of the components' coefficients.

    Attributes:
        rows: ``(n,)`` the rows, each once, by ascending position of their examples in the data.
        own: As :meth:`measure` gives it, at the model's own weights; no prediction has flipped.
        mean_fishers: Mean diagonal Fishers that were computed, by the indices of their examples.

    Raises:
        ArgumentError: ``unrelated`` is no iterable of batches.
        DataError: The data is too short or not that of the Fishers, the outputs are not finite, or unrelated data has
            no labels that fit.
    """

    def __init__(
        self, checked: CheckedModel, data: Iterable[Any], components: Components, rows: Array, options: PerturbOptions
    ) -> None:
        check_places(data, components.provenance.get("fishers") or {}, checked.model)
        self.checked, self.model, self.likelihood = checked, checked.model, checked.likelihood
        self.parameters = checked.parameters
        ids, first = np.unique(components.ids[rows], return_index=True)
        self.rows = np.asarray(rows)[first]
        self._ids_of_rows = components.ids
        self.weights = Weights(self.model)
        self.examples = SelectedExamples(data, ids, checked.device, self.call, *checked.layout)
        tokenizer = getattr(data, "tokenizer", None)
        self.writer = Writer(self.model, tokenizer, options.prompts, options.n_tokens)
        self.unrelated = unrelated_batches(options.unrelated, self.model, tokenizer, checked.device, *checked.layout)
        self._labels = torch.from_numpy(components.labels[self.rows].astype(np.int64)).to(checked.device)
        self._kept: Tensor | None = None
        own = self._compared(self._own_outputs(components.logits.take(self.rows)))
        self.own = replace(own, unrelated=self._surprise_on_unrelated())
        if not np.isfinite(self.own.unrelated).all():
            raise DataError("unrelated: the model's outputs on it are not finite at its own weights; leave it out")
        self.derivative = outputs.Derivative(self.model, self.weights, checked.call)
        self._last: tuple[Direction, TensorsByName] | None = None
        self._random: dict[tuple[int, int], Array] = {}
        self.mean_fishers: dict[bytes, Array] = {}

    def indices(self, rows: Array) -> Array:
        """Return the ascending indices, each once, of the examples of some rows of the coefficients."""
        return np.unique(np.searchsorted(self.examples.ids, self._ids_of_rows[rows]))

    def call(self, batch: Batch) -> Tensor:
        """Compute the outputs on a batch, without a graph."""
        with torch.no_grad():
            return self.checked.call(self.model, batch).detach()

    def _own_outputs(self, stored: Logits) -> Iterator[tuple[BatchSlice, Tensor, Tensor]]:
        """Yield the outputs at the model's own weights, twice; keep them if they fit, compare them with stored ones.

        Raises:
            DataError: The outputs do not fit, or are not finite.
        """
        n, width = len(self.examples), 0
        differs = np.zeros(n, bool)
        for one in self.examples:
            found = self.call(one.batch)[one.rows]
            if not width:
                width = found.shape[1]
                check_meaning(found, self.likelihood)
                if n * width * found.element_size() <= OWN_BYTES:
                    self._kept = found.new_empty((n, width))
            if found.shape[1] != width:
                raise DataError(f"logits: expected {width} per example as in the first batch, got {found.shape[1]}")
            check_finite(found, self.examples.ids[one.indices])
            if self._kept is not None:
                self._kept[self._at(one)] = found
            differs[one.indices] = differing(found, stored, one.indices)
            yield one, found, found
        if not width:
            raise DataError("data: no examples to measure; pass the data that the Fishers were computed from")
        check_outputs(differs, self.examples.ids, self.checked.same)

    def _compared(self, pairs: Iterable[tuple[BatchSlice, Tensor, Tensor]]) -> Measured:
        """Compare outputs at the model's own weights with those at moved ones, of all examples."""
        kl, flips, right, label = np.zeros((4, len(self.examples)))
        for one, own, moved in pairs:
            labels = self._labels[self._at(one)]
            kl[one.indices] = _not_nan(outputs.divergence(moved, own, self.likelihood))
            flips[one.indices] = outputs.flipped(moved, own, self.likelihood).cpu().numpy()
            right[one.indices] = outputs.correct(moved, labels, self.likelihood).cpu().numpy()
            label[one.indices] = outputs.log_probability(moved, labels, self.likelihood).exp().cpu().numpy()
        return Measured(kl, flips, right, label, np.zeros(0))

    def _surprise_on_unrelated(self) -> Array:
        """−log p of the labels of unrelated data at the weights as they are, ``(u,)``; inf where not finite.

        Raises:
            DataError: The outputs are no classes, or a label is beyond them.
        """
        found = []
        for batch in self.unrelated:
            logits, labels = self.call(batch), batch.labels
            assert labels is not None
            labels, n = labels.long().reshape(-1), outputs.n_classes(logits.shape[1], self.likelihood)
            if n is None:
                raise DataError(
                    f"unrelated: perplexity is of classes, and {logits.shape[1]} {self.likelihood} outputs are none; "
                    "leave it out"
                )
            if len(labels) and int(labels.max()) >= n:
                raise DataError(
                    f"unrelated: expected labels below {n}, the model's outputs, got "
                    f"{int(labels.max())}; make it with the tokenizer of this model"
                )
            known = labels >= 0
            found.append(_not_nan(-outputs.log_probability(logits[known], labels[known], self.likelihood)))
        return np.concatenate(found) if found else np.zeros(0)

    def _at(self, one: BatchSlice) -> Tensor:
        return torch.from_numpy(one.indices).to(self.checked.device)

    def placed(self, vector: Array) -> TensorsByName:
        """Cut a flat vector ``(m,)`` into parameter-shaped tensors on the model's device."""
        return on_model(self.model, self.parameters.unflatten(vector), "direction")

    def tensors(self, direction: Direction) -> TensorsByName:
        """Return a direction as parameter-shaped tensors on the model's device; the last one is kept."""
        if self._last is None or self._last[0] is not direction:
            self._last = None
            self._last = direction, self.placed(direction.vector())
        return self._last[1]

    # ---- at moved weights ------------------------------------------------------------------------------------

    def measure(self, direction: TensorsByName, magnitude: float) -> Measured:
        """Measure all examples, and unrelated data, at ``θ + magnitude · direction``."""
        measured = self._compared(self._moved(self.examples, direction, magnitude))
        if not self.unrelated:
            return measured
        with self.weights.at(direction, magnitude):
            return replace(measured, unrelated=self._surprise_on_unrelated())

    def kl(self, slices: Sequence[BatchSlice], direction: TensorsByName, magnitude: float) -> Array:
        """Compute the KL ``(k,)`` float64 of the examples in ``slices``, in order, at ``θ + magnitude · direction``."""
        found = [
            _not_nan(outputs.divergence(moved, own, self.likelihood))
            for _, own, moved in self._moved(slices, direction, magnitude)
        ]
        return np.concatenate(found) if found else np.zeros(0)

    def predictions(
        self, indices: Array, slices: Sequence[BatchSlice], steps: Sequence[tuple[Direction, float]]
    ) -> tuple[Prediction, ...]:
        """Predict the examples at some indices, in order, before and after; nothing where outputs are no classes.

        They are those of ``slices``.
        Probabilities after several changes of the weights, a direction and a magnitude each, are averaged by shares.
        """
        if self.likelihood not in OVER_CLASSES:
            return ()
        before = [self._own(one).double().softmax(1) for one in slices]
        after = [torch.zeros_like(p) for p in before]
        for direction, magnitude in steps:
            with self.weights.at(self.tensors(direction), magnitude):
                for one, total in zip(slices, after, strict=True):
                    total += direction.share * self.call(one.batch)[one.rows].double().softmax(1)
        found: dict[int, Prediction] = {}
        for one, p, q in zip(slices, before, after, strict=True):
            classes = torch.maximum(p, q).topk(min(MOST_CLASSES, p.shape[1])).indices
            parts = (classes, p.gather(1, classes), q.gather(1, classes))
            for index, *own in zip(one.indices.tolist(), *(part.cpu().numpy() for part in parts), strict=True):
                found[index] = Prediction(int(self.examples.ids[index]), *own)
        return tuple(found[index] for index in indices.tolist())

    def _own(self, one: BatchSlice) -> Tensor:
        """Outputs at the model's own weights, where it is now."""
        return self.call(one.batch)[one.rows] if self._kept is None else self._kept[self._at(one)]

    def _moved(
        self, slices: Iterable[BatchSlice], direction: TensorsByName, magnitude: float
    ) -> Iterator[tuple[BatchSlice, Tensor, Tensor]]:
        """Outputs at the model's own weights and at moved ones."""
        for group in self._with_own(slices):
            with self.weights.at(direction, magnitude):
                for one, own in group:
                    yield one, own, self.call(one.batch)[one.rows]

    def _with_own(self, slices: Iterable[BatchSlice]) -> Iterator[Iterable[tuple[BatchSlice, Tensor]]]:
        """Slices and their outputs at the model's own weights, in groups whose outputs fit into memory."""
        if self._kept is not None:
            yield ((one, self._own(one)) for one in slices)
            return
        group: list[tuple[BatchSlice, Tensor]] = []
        for one in slices:
            group.append((one, self._own(one)))
            if sum(own.nbytes for _, own in group) > OWN_BYTES:
                yield group
                group = []
        yield group

    # ---- Fishers at the model's own weights ------------------------------------------------------------------

    def random_fisher(self, seed: int, number: int, direction: TensorsByName) -> Array:
        """Compute ``vᵀF_i v`` along the random direction of that number, once for all components."""
        if (seed, number) not in self._random:
            self._random[seed, number] = self.fisher_along(direction)
        return self._random[seed, number]

    def fisher_along(self, direction: TensorsByName) -> Array:
        """Compute ``vᵀF_i v = uᵀS u`` of every example, ``(n,)`` float64 ≥ 0.

        Here ``u = J_i v``, and S is the Fisher of the outputs.
        """
        found = np.zeros(len(self.examples))
        for one, change in self.derivative.along(direction, self.examples) if direction else ():
            curvature = outputs.curvature(self._own(one), change[one.rows], self.likelihood)
            found[one.indices] = curvature.cpu().numpy()
        return found


def _not_nan(kl: Tensor) -> Array:
    return torch.where(torch.isnan(kl), torch.inf, kl).cpu().numpy()


# ---- checks before the first measurement -------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class CheckedModel:
    """A model that fits some components, and how it is called.

    Attributes:
        model: The model, without what ``torch.compile`` wraps around it.
        parameters: The components' parameters.
        device: Where it is.
        forward: ``forward(model, batch) -> logits``, or None.
        likelihood: Likelihood of its outputs.
        same: Whether its weights are those of the Fishers; None where that is not on record.
    """

    model: nn.Module
    parameters: Parameters
    device: torch.device
    forward: Forward | None
    likelihood: Likelihood
    same: bool | None

    def call(self, model: nn.Module, batch: Batch) -> Tensor:
        """Compute the outputs ``(b, C)`` of the model, or of a module in its place, with a graph."""
        return call_model(model, self.forward, batch, self.likelihood)

    @cached_property
    def _engine(self) -> PerExampleGradients:
        return PerExampleGradients(self.model, self.parameters, self.call)

    def gradient(
        self, slices: Iterable[BatchSlice], loss: Callable[[BatchSlice, Tensor], Tensor]
    ) -> tuple[float, dict[str, Tensor]]:
        """Sum a function of each slice and its outputs ``(k, C)``, and differentiate the sum by the parameters.

        Returns:
            The sum, and the gradient by parameter name, without parameters that it does not depend on; in half
            precision its terms are summed in float32.
        """
        value, total = 0.0, dict[str, Tensor]()
        engine = self._engine
        with engine.recording():
            for one in slices:
                found = loss(one, self.call(self.model, one.batch)[one.rows])
                gradients = torch.autograd.grad(found, list(engine.tensors.values()), allow_unused=True)
                value += float(found.detach())
                for name, gradient in zip(engine.tensors, gradients, strict=True):
                    if gradient is not None and name in total:
                        total[name] += gradient
                    elif gradient is not None:
                        wide = torch.promote_types(gradient.dtype, torch.float32)
                        total[name] = gradient.to_dense().to(wide, copy=True)
        return value, total

    @cached_property
    def weight_norm(self) -> float:
        """‖θ‖ over the selected parameters, at least 1e-3."""
        tensors = dict(self.model.named_parameters(remove_duplicate=False))
        squares = sum(float(tensors[name].detach().double().square().sum()) for name in self.parameters.names)
        return max(math.sqrt(squares), 1e-3)

    @property
    def layout(self) -> tuple[bool, bool]:
        """How its data is read: whether batches may have any layout, and whether labels of sequences make places."""
        return self.forward is not None, self.likelihood in OVER_CLASSES


@contextmanager
def checked_model(
    model: nn.Module, data: Iterable[Any], components: Components, options: Mapping[str, Any]
) -> Iterator[CheckedModel]:
    """Check a model and data against components, and put the model on its device; restore its modes and buffers.

    Of ``options``, as for :func:`npeff.perturb`, it takes ``forward``, ``device`` and ``likelihood``.

    Raises:
        ArgumentError: The model, ``forward`` or ``likelihood`` has a wrong type or value.
    """
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    if options["forward"] is not None and not callable(options["forward"]):
        raise ArgumentError(f"forward: expected callable(model, batch) -> logits, got {options['forward']!r}")
    inner = getattr(model, "_orig_mod", model)
    fishers = components.provenance.get("fishers") or {}
    likelihood = options["likelihood"] or (fishers.get("options") or {}).get("likelihood", "categorical")
    check_choice("likelihood", likelihood, get_args(Likelihood))
    check_eligible(inner)
    check_sampler(data)
    _check_parameters(inner, components)
    theirs = fishers.get("model_digest")
    same = None if not theirs else theirs == model_digest(inner)
    if same is False:
        warnings.warn("model: it is not the one of the components' Fishers (other weights)", stacklevel=6)
    with placed(inner, options["device"]) as device, untouched(inner), memory_explained():
        yield CheckedModel(inner, components.parameters, device, options["forward"], likelihood, same)


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


def differing(found: Tensor, stored: Logits, rows: Array) -> Array:
    """Mark the examples whose outputs ``(k, C)`` are not those that were stored in some rows, ``(k,)`` bool.

    Raises:
        DataError: There are more or fewer outputs.
    """
    if not stored.n_outputs:
        return np.zeros(len(found), bool)
    if stored.n_outputs != found.shape[1]:
        raise DataError(
            f"logits: expected {stored.n_outputs} per example as with the Fishers, got {found.shape[1]}; pass the "
            "same model, data and forward="
        )
    own = stored.take(rows)
    apart = np.abs(own.numbers_of(found.double()).numpy() - own.numbers.numpy()).max(1)
    return np.asarray(apart > 0.02 * max(1.0, stored.largest))


def check_finite(found: Tensor, ids: Array) -> None:
    """Refuse outputs ``(k, C)`` at the model's own weights that are not finite.

    Raises:
        DataError: Naming the first example.
    """
    finite = torch.isfinite(found).all(1)
    if not bool(finite.all()):
        bad = int((~finite).to(torch.uint8).argmax())
        raise DataError(
            f"logits: example {ids[bad]} has the logits {found[bad, :8].tolist()} "
            "at the model's own weights; find what overflows in the model on it, or leave it out"
        )


def check_outputs(differs: Array, ids: Array, same: bool | None) -> None:
    """Judge whether the data is the same by the examples, at positions ``ids``, whose outputs differ.

    Raises:
        DataError: The model is the same, but not its outputs.
    """
    if not differs.any() or same is False:
        return
    message = (
        f"data: {int(differs.sum())} of {len(differs)} examples, the first at position {int(ids[np.argmax(differs)])}, "
        "have other outputs than when the Fishers were computed"
    )
    if same:
        raise DataError(
            f"{message}, although the model is the same; pass the same data in the same order, and forward="
        )
    warnings.warn(f"{message}; are model and data the same?", stacklevel=6)
