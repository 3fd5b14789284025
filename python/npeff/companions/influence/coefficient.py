"""The training examples behind a component: its coefficient as a test function for influence."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from npeff import kernels
from npeff.batches.reading import examples_at, read_batch
from npeff.companions.influence.estimator import Array, CrossLossInfluence, Scores
from npeff.components.components import Components
from npeff.errors import ArgumentError, DataError, ModelError
from npeff.fishers.block_weights import column_factors
from npeff.models.forward import OVER_CLASSES, call_model
from npeff.models.parameters import model_digest
from npeff.short_repr import short_repr

Forward = Callable[[Any, Any], Any]


class Coefficient:
    """Component j's coefficient on an example as a differentiable function of the model's parameters.

    With ``F_i(θ)`` the example's Fisher scaled to unit norm, ``cross_ik = g_kᵀ F_i g_k`` (``f_i·h_k`` for diagonal
    components) and ``gram`` the components' own products, the coefficients solve ``min ½ wᵀ gram w − cross_iᵀ w`` over
    ``w ≥ 0``. Around θ̂ the set P of positive ones stays as it is (but for ties): there ``w_P = gram_PP⁻¹ cross_P``, and
    this is differentiated: through the Fisher, and through its norm. Outside P the coefficient is constant, 0. The
    vectors g stay.

    The Fisher is the exact one: of components whose Fishers were compressed or truncated the value differs from the
    coefficient stored. Each example takes C backward passes, and one more through them.

    Args:
        components: The components.
        j: Which one.
        forward: As in :func:`npeff.compute_fishers`.

    Raises:
        ArgumentError: There is no such component, or the components' vectors were not recovered.
        DataError: The components' Fishers are not expectations over the model's own predictions.
    """

    one_by_one = True

    def __init__(self, components: Components, j: int, *, forward: Forward | None = None) -> None:
        if not isinstance(components, Components):
            raise ArgumentError(f"components: expected Components, got {type(components).__name__}")
        if isinstance(j, bool) or not isinstance(j, int | np.integer) or not 0 <= j < components.n_components:
            raise ArgumentError(f"j: expected a component below {components.n_components}, got {j!r}")
        options = components.provenance.get("fishers", {}).get("options", {})
        if options.get("labels", "expected") != "expected":
            raise DataError(
                f"components: their Fishers were made with labels={options['labels']!r}; the coefficient is a function "
                "of the model alone only with labels='expected'"
            )
        self.j, self._forward = int(j), forward
        self.likelihood = options.get("likelihood", "categorical")
        self._normalize = components.provenance.get("normalize", "stored")
        self._diagonal = components.kind == "diagonal"
        self._names = components.parameters.names
        weights = components.block_weights
        self._factor: Tensor | None = None
        if weights is not None:
            self._factor = torch.from_numpy(column_factors(components.parameters, weights, components.kind)).double()
        components.check_recovered(range(components.n_components))
        self._vectors = torch.zeros((components.n_components, components.n_parameters), dtype=torch.float64)
        for k, row in enumerate(self._vectors):
            row += torch.from_numpy(components.vector(k))
            if self._factor is not None:
                row *= self._factor
            row /= row.norm().clamp_min(1e-30)
        self._gram = self._vectors @ self._vectors.T
        if not self._diagonal:
            self._gram = self._gram.square()

    def __call__(self, model: nn.Module, content: Any) -> Tensor:
        """Compute the coefficients of a batch, ``(b,)``, with their graph.

        Raises:
            ModelError: The model lacks a parameter of the components, or an operation has no second derivative.
        """
        named = dict(model.named_parameters())
        missing = [name for name in self._names if name not in named]
        if missing:
            raise ModelError(f"model: it lacks the components' parameters {', '.join(missing[:5])}; pass their model")
        tensors = [named[name] for name in self._names]
        batch = read_batch(content, tensors[0].device, 0, True, self.likelihood in OVER_CLASSES)
        with _recorded(tensors):
            logits = call_model(model, self._forward, batch, self.likelihood)
            return torch.stack([self._one(row, tensors) for row in logits])

    def _one(self, logits: Tensor, tensors: Sequence[Tensor]) -> Tensor:
        rows = self._rows(logits, tensors)
        whole = rows.square().sum(dim=0, keepdim=True) if self._diagonal else rows
        weighted = whole if self._factor is None else whole * self._factor.to(whole)
        basis = whole if self._normalize == "dense" else weighted
        norm = basis.norm() if self._diagonal else (basis @ basis.T).norm()
        if self._normalize == "none" or float(norm.detach()) == 0:
            norm = torch.ones_like(norm)
        projected = weighted @ self._vectors.to(weighted).T
        cross = (projected[0] if self._diagonal else projected.square().sum(dim=0)).double() / norm.double()
        w = kernels.nnls(self._gram, cross.detach().cpu()[None], exact=True).w[0]
        active = (w > 0).nonzero()[:, 0]
        if not bool((active == self.j).any()):
            return cross[self.j] * 0
        inverse = torch.linalg.pinv(self._gram[active][:, active], hermitian=True)
        row = inverse[(active == self.j).nonzero()[0, 0]].to(cross)
        return row @ cross[active.to(cross.device)]

    def _rows(self, logits: Tensor, tensors: Sequence[Tensor]) -> Tensor:
        """Compute A with ``F = AᵀA`` in the class basis, ``(C, m)`` with its graph.

        Raises:
            ModelError: Autograd cannot record the gradient.
        """
        if self.likelihood == "gaussian":
            functions, scales = logits, torch.ones_like(logits)
        elif self.likelihood == "bernoulli":
            functions = logits
            scales = ((nn.functional.logsigmoid(logits) + nn.functional.logsigmoid(-logits)) / 2).exp()
        else:
            functions = torch.log_softmax(logits, dim=0)
            scales = (functions / 2).exp()
        rows = []
        for function in functions:
            try:
                parts = torch.autograd.grad(
                    function, tensors, create_graph=True, allow_unused=True, materialize_grads=True
                )
            except (RuntimeError, NotImplementedError) as error:
                raise ModelError(
                    f"model: the gradient of its outputs cannot be recorded ({str(error).splitlines()[0]}); remove "
                    "torch.no_grad() and .detach() from the forward pass"
                ) from error
            rows.append(torch.cat([part.reshape(-1) for part in parts]))
        return torch.stack(rows) * scales[:, None]


@contextmanager
def _recorded(tensors: Sequence[Tensor]) -> Iterator[None]:
    before = [tensor.requires_grad for tensor in tensors]
    try:
        for tensor in tensors:
            tensor.requires_grad_(True)
        with torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        for tensor, flag in zip(tensors, before, strict=True):
            tensor.requires_grad_(flag)


@dataclass(frozen=True, eq=False)
class ComponentInfluence:
    """The influence of training examples on a component's coefficients on its top examples.

    Attributes:
        j: The component.
        scores: ``I``, ``(n_train, k)``: with I > 0 training on z raises the coefficient. Its ``test_values`` are the
            coefficients of the exact Fishers.
        examples: ``(k,)`` int64 the component's top examples: indices of ``components.coefficients``.
        coefficients: ``(k,)`` float32 their coefficients as stored.
    """

    j: int
    scores: Scores
    examples: Array
    coefficients: Array

    by: ClassVar[str] = "influence on its coefficients; + training on the example raises them"

    __repr__ = short_repr

    def made_by(self, k: int = 16) -> Array:
        """List the training examples that raise the coefficients of the top examples most, summed over these."""
        return self.scores.top(k, direction="raises")

    def pairs(self, k: int = 16) -> list[tuple[int, float]]:
        """List ``(position, I)`` of the k training examples with most summed influence, for a report."""
        totals = self.scores.values.sum(axis=1)
        return [(int(i), float(totals[i])) for i in self.scores.top(k)]


def component_influence(
    influence: CrossLossInfluence,
    components: Components,
    j: int,
    train: Iterable[Any],
    data: Iterable[Any],
    *,
    k: int = 16,
    forward: Forward | None = None,
) -> ComponentInfluence:
    """Find the training examples behind a component: influence with its coefficient as the test function.

    Args:
        influence: For the model that the components belong to, at an optimum of the training loss. Where :meth:`fit
            <CrossLossInfluence.fit>` was called, its curvature serves for any number of components. The test loss is
            not used.
        components: From :func:`npeff.decompose`. The coefficient depends on the vectors of all of them: those that are
            not known are recovered first, by one pass over ``data``, and kept.
        j: Which component.
        train: The training data, batches as the training loss takes them.
        data: The data whose Fishers were decomposed.
        k: How many of the component's top examples.
        forward: As in :func:`npeff.compute_fishers`.

    Returns:
        Scores on the top examples.

    Raises:
        ArgumentError: See :class:`CrossLossInfluence` and :class:`Coefficient`.
        DataError: The data ends before the component's top examples.
        ModelError: The model is not the components', or see :class:`CrossLossInfluence`.
    """
    if not isinstance(influence, CrossLossInfluence):
        raise ArgumentError(
            f"influence: expected CrossLossInfluence(model, train_loss, …), got {type(influence).__name__}"
        )
    model = influence.model
    digest = components.provenance.get("fishers", {}).get("model_digest")
    if digest and digest != model_digest(model):
        raise ModelError("influence: its model is not that of the components (other weights); pass one of that model")
    examples = components.top_examples(j, k)
    examples = examples[components.coefficients[examples, j] > 0]
    if not len(examples):
        raise ArgumentError(f"j: component {j} has no example with a positive coefficient; choose another")
    components.ensure_vectors(
        range(components.n_components),
        model,
        data,
        forward=forward,
        device=influence.device,
        progress=influence.progress,
    )
    function = Coefficient(components, j, forward=forward)
    top = examples_at(data, components.ids[examples].tolist(), None, function.likelihood in OVER_CLASSES)
    if any(batch.outputs is not None for batch in top):
        raise DataError("data: influence on a coefficient needs all outputs; these batches keep some (outputs=)")
    scores = influence.with_test_loss(function).scores(train, [batch.content for batch in top])
    return ComponentInfluence(int(j), scores, examples, components.coefficients[examples, j].copy())
