"""Curvature from per-example rows: Gauss–Newton matrix, empirical Fisher, EK-FAC."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from npeff.batches.batches import Batch
from npeff.companions.influence.losses import call_loss, check_finite
from npeff.companions.influence.objective import TrainingObjective, dense_rows
from npeff.companions.influence.solvers import Inverse, Solver, dense_inverse
from npeff.errors import ArgumentError, DataError, ModelError
from npeff.gradients.engine import PerExampleGradients, Prepared
from npeff.models.parameters import Parameters

Outputs = Callable[[nn.Module, Any], Tensor]
"""``outputs(model, batch) -> (b, C)``."""
OutputLoss = Callable[[Tensor, Any], Tensor]
"""``output_loss(outputs, batch) -> (b,)``, convex in the outputs."""

_NULL = 1e-12


@dataclass(frozen=True)
class GaussNewton(Solver):
    """``H ≈ (1/n) Σ JᵀCJ + w I``, C the curvature of a convex loss in the model's outputs.

    Attributes:
        outputs: ``outputs(model, batch) -> (b, C)``.
        output_loss: ``output_loss(outputs, batch) -> (b,)``; of the outputs it must be the training loss.
    """

    outputs: Outputs
    output_loss: OutputLoss
    name = "gauss-newton"

    @override
    def fit(self, objective: TrainingObjective, damping: float, memory: int) -> Inverse:
        for name in ("outputs", "output_loss"):
            if not callable(getattr(self, name)):
                raise ArgumentError(f"{name}: expected a callable, got {getattr(self, name)!r}")
        return _invert(FactorRows(objective, self.outputs, self.output_loss), objective, damping, memory)


@dataclass(frozen=True)
class EmpiricalFisher(Solver):
    """``H ≈ (1/n) Σ ∇ℓ ∇ℓᵀ + w I``, from the per-example gradients alone.

    It needs nothing but the loss, and is the Fisher only where the model is well specified and its labels are its own
    (Kunstner, Balles & Hennig 2019): its scale may be far from the Hessian's.
    """

    name = "empirical-fisher"

    @override
    def fit(self, objective: TrainingObjective, damping: float, memory: int) -> Inverse:
        return _invert(FactorRows(objective), objective, damping, memory)


class FactorRows:
    """Per-example factor rows by npeff's gradient engine.

    With outputs f and a convex loss on them, ``ℓ(z, θ) = c(f(z, θ))``: the generalised Gauss–Newton matrix
    ``JᵀCJ``, C = ∇²c (Schraudolph 2002; Martens 2020), in rows ``A = SᵀJ``, ``S Sᵀ = C``. It is the Hessian without
    the curvature of f, the Fisher where c is a log-likelihood of an exponential family, and exact where f is linear in
    θ. Without outputs: the one row ``∇ℓ``, the empirical Fisher.
    """

    def __init__(
        self, objective: TrainingObjective, outputs: Outputs | None = None, output_loss: OutputLoss | None = None
    ) -> None:
        self._objective, self._loss = objective, output_loss
        self.engine = objective.engine
        if outputs is not None:
            call = lambda model, batch: _checked(outputs(model, batch.content), batch)  # noqa: E731
            self.engine = PerExampleGradients(objective.model, objective.parameters, call)

    def passes(self) -> Iterator[tuple[Prepared, Tensor]]:
        """Yield per batch what the engine prepared, and the cotangents S ``(b, C, R)``.

        Raises:
            ArgumentError: The output loss is not the training loss, or not convex.
        """
        for number, batch in enumerate(self._objective.data):
            with self.engine.recording():
                values = self.engine.forward(batch)
                check_finite(values, "train_loss" if self._loss is None else "outputs")
                if self._loss is None:
                    columns = torch.ones_like(values.detach())[:, :, None]
                else:
                    if number == 0:
                        self._compare(values, batch, self._loss)
                    columns = _square_roots(values.detach(), self._loss, batch).to(values.dtype)
                yield self.engine.prepare(batch, values), columns

    def dense(self) -> Iterator[Tensor]:
        """Yield the rows of one batch after the other, ``(b·R, m)`` in the objective's dtype."""
        for prepared, columns in self.passes():
            yield dense_rows(self.engine, prepared, columns, self._objective.dtype).flatten(0, 1)

    @torch.no_grad()
    def _compare(self, values: Tensor, batch: Batch, loss: OutputLoss) -> None:
        model = self._objective.model
        ours = call_loss(model, lambda *_: loss(values, batch.content), batch, "output_loss")
        theirs = self._objective.losses(batch)
        gap = float((ours - theirs).abs().max())
        if gap > 1e-3 * float(theirs.abs().max().clamp_min(1e-6)):
            raise ArgumentError(
                f"output_loss: of the outputs it differs from train_loss by up to {gap:.3g} on the first batch; both "
                "must be the loss that was trained, or the curvature belongs to something else"
            )


def _checked(values: Tensor, batch: Batch) -> Tensor:
    if not isinstance(values, Tensor) or values.dim() != 2 or len(values) != batch.n_examples:
        got = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise DataError(f"outputs: expected shape ({batch.n_examples}, C) for a batch, got {got}")
    return values


def _square_roots(values: Tensor, loss: OutputLoss, batch: Batch) -> Tensor:
    """Compute S ``(b, C, R)`` float64 with ``S Sᵀ = ∇²c`` at outputs ``(b, C)``, by the eigenvectors that are not null.

    R ≤ C is the largest rank in the batch.

    Raises:
        ArgumentError: c is not convex there.
    """
    with torch.enable_grad():
        inputs = values.to(torch.float64).requires_grad_()
        (gradient,) = torch.autograd.grad(loss(inputs, batch.content).sum(), inputs, create_graph=True)
        columns = [
            torch.autograd.grad(column.sum(), inputs, retain_graph=True)[0] if gradient.requires_grad else 0 * values
            for column in gradient.unbind(1)
        ]
    curvature = torch.stack(columns, dim=2)
    size, vectors = torch.linalg.eigh((curvature + curvature.mT) / 2)
    largest = size.abs().amax(dim=1, keepdim=True).clamp_min(1e-300)
    if bool((size < -1e-6 * largest).any()):
        raise ArgumentError(
            f"output_loss: not convex in the outputs (curvature {float(size.min()):.3g}); choose outputs in which it "
            "is, such as logits, or use EmpiricalFisher() or ConjugateGradients()"
        )
    keep = size > _NULL * largest
    width = max(1, int(keep.sum(dim=1).max()))
    return (vectors * (size * keep).clamp_min(0).sqrt()[:, None, :])[:, :, -width:]


def _invert(source: FactorRows, objective: TrainingObjective, damping: float, memory: int) -> Inverse:
    """Invert ``(1/n) AᵀA + λI``, A ``(N, m)`` the rows of all examples, λ = damping + weight decay.

    By m × m products when the parameters are fewer than the rows, by Woodbury's identity otherwise:
    ``(1/λ)(v − Aᵀ(nλ I + AAᵀ)⁻¹ A v)``.

    Raises:
        ArgumentError: λ is 0 where Woodbury's identity needs it, or neither form fits into memory.
    """
    m, size = objective.m, torch.finfo(objective.dtype).bits // 8
    ridge = damping + objective.weight_decay
    kept: list[Tensor] = []
    n_rows = 0
    square: Tensor | None = None
    for rows in source.dense():
        n_rows += len(rows)
        kept.append(rows)
        if square is None:
            if n_rows <= m and n_rows * m * size + 16 * n_rows * n_rows <= memory:
                continue
            if 16 * m * m > memory:
                raise ArgumentError(
                    f"solver: {n_rows:,} rows or more of {m:,} parameters fit into "
                    f"memory= {memory / 1e9:.2f} GB neither as rows nor as a matrix; "
                    "use EKFAC(…) or ConjugateGradients(), fewer examples in fit(), or fewer parameters"
                )
            square = torch.zeros((m, m), dtype=torch.float64, device=objective.device)
        for part in kept:
            square.addmm_(part.double().T, part.double())
        kept = []
    if square is not None:
        square /= objective.n
        square.diagonal().add_(objective.weight_decay)
        return dense_inverse(square, damping)
    if ridge <= 0:
        raise ArgumentError(
            f"damping: {n_rows:,} rows cannot determine {m:,} parameters without damping or weight decay; set "
            "damping > 0"
        )
    return _woodbury(torch.cat(kept), objective.n, ridge)


def _woodbury(rows: Tensor, n: int, ridge: float) -> Inverse:
    gram = _wide(rows, rows)
    gram.diagonal().add_(n * ridge)
    factor = torch.linalg.cholesky(gram)

    def apply(vectors: Tensor) -> tuple[Tensor, int]:
        inner = torch.cholesky_solve(_wide(rows, vectors), factor)
        return (vectors - inner.T.to(vectors.dtype) @ rows) / ridge, 0

    return Inverse(apply, lambda x: (x @ rows.T) @ rows / n + ridge * x)


def _wide(a: Tensor, b: Tensor) -> Tensor:
    """Compute ``a bᵀ``, accumulated in float64 over slices of the columns."""
    total = torch.zeros((len(a), len(b)), dtype=torch.float64, device=a.device)
    for start in range(0, a.shape[1], 8192):
        total.addmm_(a[:, start : start + 8192].double(), b[:, start : start + 8192].double().T)
    return total


@dataclass(frozen=True)
class EKFAC(Solver):
    """Eigenvalue-corrected Kronecker factors (George et al. 2018), for influence as in Grosse et al. 2023.

    A linear or convolutional layer's gradient is ``Σ_t δ_t a_tᵀ``. With ``E[aaᵀ] = U_a Λ_a U_aᵀ`` and
    ``E[δδᵀ] = U_δ Λ_δ U_δᵀ``, its block of the curvature is taken as diagonal in the basis ``U_δ ⊗ U_a``, with the
    second moments that the per-example gradients really have there. Two passes over the data; memory of a few copies
    of the model. Layers do not interact, and other parameters (normalisation, embeddings …) get the diagonal of their
    block; the notes name them.

    Attributes:
        outputs: With ``output_loss``: the curvature is the Gauss–Newton matrix's, from all columns of the loss's
            Hessian in the outputs (no sampling). None: the empirical Fisher's.
        output_loss: See :class:`GaussNewton`.
    """

    outputs: Outputs | None = None
    output_loss: OutputLoss | None = None
    name = "ekfac"

    @override
    def fit(self, objective: TrainingObjective, damping: float, memory: int) -> Inverse:
        if (self.outputs is None) != (self.output_loss is None):
            raise ArgumentError("outputs: give outputs and output_loss both, or neither (empirical Fisher)")
        if damping + objective.weight_decay <= 0:
            raise ArgumentError("damping: EK-FAC needs damping or weight decay > 0: directions without data have none")
        source = FactorRows(objective, self.outputs, self.output_loss)
        return _Eigenbasis(objective, source, damping + objective.weight_decay).inverse()


@dataclass(frozen=True)
class _Layer:
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

    def factors(self, prepared: Prepared) -> tuple[Tensor, Tensor]:
        """Read a ``(b, G, T, p)`` and δ ``(b, G, T, R, q)`` of all uses, after the backward passes of R columns."""
        found = [rule.kronecker_factors() for rule in prepared.rules[self.weight]]
        a, delta = (torch.cat(parts, dim=2) if len(parts) > 1 else parts[0] for parts in zip(*found, strict=True))
        return (a if self.bias is None else torch.cat([a, a.new_ones((*a.shape[:3], 1))], dim=3)), delta

    def positions(self, parameters: Parameters) -> Tensor:
        """Find the layer's elements ``(G, q, p)`` in the flat vector."""
        weight = parameters.named(self.weight)
        at = torch.arange(weight.numel).view(weight.shape) + weight.offset
        at = at.mT if self.transposed else at.flatten(1)
        at = at.reshape(self.groups, -1, at.shape[1])
        if self.bias is None:
            return at
        bias = parameters.named(self.bias)
        return torch.cat([at, (torch.arange(bias.numel) + bias.offset).view(*at.shape[:2], 1)], dim=2)


def _layers(prepared: Prepared) -> list[_Layer]:
    """Find the weights of a batch's graph that have Kronecker factors: those of linear and convolutional layers.

    A weight that is used several times counts as one layer with more positions if all uses are products alike.
    """
    forms = {name: {rule.kronecker_form() for rule in rules} for name, rules in prepared.rules.items()}
    biases = {
        rules[0].use.node: name for name, rules in prepared.rules.items() if len(rules) == 1 and forms[name] == {None}
    }
    layers = []
    for name, rules in prepared.rules.items():
        whole = all(rule.value.shape == rule.use.parameter_shape and rule.value.reshaped for rule in rules)
        form = forms[name].pop()
        if form is not None and not forms[name] and whole:
            bias = biases.get(rules[0].use.node) if len(rules) == 1 else None
            layers.append(_Layer(name, bias, *form))
    return layers


class _Eigenbasis:
    """The eigenbasis of every layer, from a first pass over the data, and the second moments in it, from another."""

    def __init__(self, objective: TrainingObjective, source: FactorRows, ridge: float) -> None:
        self._objective, self._source = objective, source
        self._layers: list[_Layer] | None = None
        self._others: dict[str, None] = {}
        inputs: dict[str, Tensor] = {}
        deltas: dict[str, Tensor] = {}
        for prepared, columns in source.passes():
            for layer in self._backward(prepared, columns):
                a, delta = (x.double() for x in layer.factors(prepared))
                _add(inputs, layer, torch.einsum("bgtp,bgtu->gpu", a, a))
                _add(deltas, layer, torch.einsum("bgtrq,bgtrv->gqv", delta, delta))
        self._bases = {
            name: tuple(torch.linalg.eigh(sums[name])[1].to(objective.dtype) for sums in (deltas, inputs))
            for name in inputs
        }
        moments: dict[str, Tensor] = {}
        diagonal = torch.zeros(objective.m, dtype=torch.float64, device=objective.device)
        for prepared, columns in source.passes():
            layers = self._backward(prepared, columns)
            for layer in layers:
                self._add_moments(prepared, layer, moments)
            taken = {name for layer in layers for name in (layer.weight, layer.bias)}
            rest = {name: rules for name, rules in prepared.rules.items() if name not in taken}
            self._others |= dict.fromkeys([*rest, *prepared.others])
            if rest or prepared.others:
                prepared = replace(prepared, rules=rest, checked=False)
                diagonal += dense_rows(source.engine, prepared, columns, torch.float64, squared=True).sum(dim=(0, 1))
        self._curvature = {name: (sums / objective.n + ridge).to(objective.dtype) for name, sums in moments.items()}
        self._diagonal = (diagonal / objective.n + ridge).to(objective.dtype)

    def inverse(self) -> Inverse:
        """Return the products with the curvature, its inverse, and what is approximated."""
        notes: tuple[str, ...] = ()
        if self._others:
            names = ", ".join(list(self._others)[:8]) + (" …" if len(self._others) > 8 else "")
            notes = (f"EK-FAC: diagonal blocks for {names}: no linear or convolutional weight",)
        return Inverse(lambda v: (self._scaled(v, torch.div), 0), lambda x: self._scaled(x, torch.mul), notes)

    def _backward(self, prepared: Prepared, columns: Tensor) -> list[_Layer]:
        """Run the backward passes of a batch, and check that it uses the layers as the first batch does.

        Raises:
            ModelError: It does not.
        """
        self._source.engine.backward(prepared, columns)
        layers = _layers(prepared)
        if self._layers is None:
            self._layers = layers
        elif layers != self._layers:
            raise ModelError(
                "model: batches use its layers in different ways, so that its Kronecker factors are not of one form; "
                "use ConjugateGradients(), GaussNewton(…) or EmpiricalFisher()"
            )
        return layers

    def _add_moments(self, prepared: Prepared, layer: _Layer, moments: dict[str, Tensor]) -> None:
        a, delta = layer.factors(prepared)
        left, right = (basis.to(a.dtype) for basis in self._bases[layer.weight])
        a = torch.einsum("bgtp,gpu->bgtu", a, right)
        delta = torch.einsum("bgtrq,gqv->bgtrv", delta, left)
        if a.shape[2] == 1:
            square = torch.einsum("bgv,bgu->gvu", delta[:, :, 0].square().sum(dim=2), a[:, :, 0].square())
            _add(moments, layer, square.double())
            return
        size = delta.shape[3] * delta.shape[4] * a.shape[3] * a.shape[1]
        for a_part, delta_part in zip(*(torch.split(x, max(1, (1 << 22) // size)) for x in (a, delta)), strict=True):
            rotated = torch.einsum("bgtrv,bgtu->bgrvu", delta_part, a_part)
            _add(moments, layer, rotated.square().sum(dim=(0, 2)).double())

    def _scaled(self, vectors: Tensor, scale: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """Multiply or divide by the curvature, in the eigenbases and on the remaining diagonal."""
        result = scale(vectors, self._diagonal)
        for layer in self._layers or ():
            left, right = self._bases[layer.weight]
            at = layer.positions(self._objective.parameters).to(vectors.device)
            result[:, at] = left @ scale(left.mT @ vectors[:, at] @ right, self._curvature[layer.weight]) @ right.mT
        return result


def _add(sums: dict[str, Tensor], layer: _Layer, value: Tensor) -> None:
    sums[layer.weight] = sums.get(layer.weight, 0) + value
