"""EK-FAC: curvature that is diagonal in the Kronecker-factored eigenbasis of every layer."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from typing_extensions import override

from npeff.companions.influence.blocks import formed, scatter
from npeff.companions.influence.objective import Objective
from npeff.companions.influence.solvers.base import Inverse, Solution, Solver, relative_residual
from npeff.companions.influence.solvers.factor_rows import FactorRows, OutputLoss, Outputs
from npeff.companions.influence.solvers.kronecker import Layer, find_layers, from_matrices, pairs, to_matrices
from npeff.errors import ArgumentError, ModelError
from npeff.gradients.engine import PerExampleGradients, Prepared


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
    def fit(self, objective: Objective, damping: float, memory: int) -> Inverse:
        if (self.outputs is None) != (self.output_loss is None):
            raise ArgumentError("outputs: give outputs and output_loss both, or neither (empirical Fisher)")
        if damping + objective.weight_decay <= 0:
            raise ArgumentError("damping: EK-FAC needs damping or weight decay > 0: directions without data have none")
        source = FactorRows(objective, self.outputs, self.output_loss)
        return _Eigenbasis(_Accumulator(objective, source), objective, damping + objective.weight_decay)


class _Accumulator:
    """The two passes: covariances of a and δ, then second moments in their eigenbases."""

    def __init__(self, objective: Objective, source: FactorRows) -> None:
        self._objective = objective
        self.layers: list[Layer] = []
        first = True
        inputs: dict[str, Tensor] = {}
        deltas: dict[str, Tensor] = {}
        for _, prepared, columns in source.passes():
            source.engine.backward(prepared, columns)
            self._agree(prepared, first)
            first = False
            for layer in self.layers:
                a, delta = (x.double() for x in pairs(prepared.rules[layer.weight], layer.bias is not None))
                _add(inputs, layer.weight, torch.einsum("bgtp,bgtu->gpu", a, a))
                _add(deltas, layer.weight, torch.einsum("bgtrq,bgtrv->gqv", delta, delta))
        self.bases = {name: (torch.linalg.eigh(deltas[name])[1], torch.linalg.eigh(inputs[name])[1]) for name in inputs}
        self.moments: dict[str, Tensor] = {}
        self.diagonal = torch.zeros(objective.m, dtype=torch.float64, device=objective.device)
        self.others: list[str] = []
        for batch, prepared, columns in source.passes():
            source.engine.backward(prepared, columns)
            self._agree(prepared, False)
            for layer in self.layers:
                self._moments(prepared, layer, batch.n_examples)
            self._rest(source.engine, prepared, columns)

    def _agree(self, prepared: Prepared, first: bool) -> None:
        layers = find_layers(prepared)
        if first:
            self.layers = layers
        elif layers != self.layers:
            raise ModelError(
                "model: batches use its layers in different ways, so that its Kronecker factors are not of one form; "
                "use ConjugateGradients(), GaussNewton(…) or EmpiricalFisher()"
            )

    def _moments(self, prepared: Prepared, layer: Layer, n_examples: int) -> None:
        a, delta = pairs(prepared.rules[layer.weight], layer.bias is not None)
        left, right = (basis.to(a.dtype) for basis in self.bases[layer.weight])
        a = torch.einsum("bgtp,gpu->bgtu", a, right)
        delta = torch.einsum("bgtrq,gqv->bgtrv", delta, left)
        if a.shape[2] == 1:
            square = torch.einsum("bgv,bgu->gvu", delta[:, :, 0].square().sum(dim=2), a[:, :, 0].square())
            _add(self.moments, layer.weight, square.double())
            return
        size = delta.shape[3] * delta.shape[4] * a.shape[3] * a.shape[1]
        step = max(1, (1 << 22) // size)
        for start in range(0, n_examples, step):
            part = slice(start, start + step)
            rotated = torch.einsum("bgtrv,bgtu->bgrvu", delta[part], a[part])
            _add(self.moments, layer.weight, rotated.square().sum(dim=(0, 2)).double())

    def _rest(self, engine: PerExampleGradients, prepared: Prepared, columns: Tensor) -> None:
        taken = {name for layer in self.layers for name in (layer.weight, layer.bias)}
        rules = {name: rules for name, rules in prepared.rules.items() if name not in taken}
        others = [*rules, *prepared.others]
        self.others = list(dict.fromkeys([*self.others, *others]))
        if not others:
            return
        rest = replace(prepared, rules=rules, checked=False)
        for block in formed(engine.blocks(rest, columns, squared=True)):
            row = torch.zeros((prepared.batch.n_examples, 1, self._objective.m), dtype=torch.float64)
            scatter(block, row)
            self.diagonal += row.sum(dim=(0, 1))


def _add(sums: dict[str, Tensor], name: str, value: Tensor) -> None:
    if name in sums:
        sums[name] += value
    else:
        sums[name] = value


class _Eigenbasis(Inverse):
    def __init__(self, fitted: _Accumulator, objective: Objective, ridge: float) -> None:
        super().__init__()
        self._parameters, self._ridge = objective.parameters, ridge
        self._layers = fitted.layers
        self._bases = {
            name: (left.to(objective.dtype), right.to(objective.dtype)) for name, (left, right) in fitted.bases.items()
        }
        self._curvature = {
            name: (moments / objective.n + ridge).to(objective.dtype) for name, moments in fitted.moments.items()
        }
        self._diagonal = (fitted.diagonal / objective.n + ridge).to(objective.dtype)
        if fitted.others:
            names = ", ".join(fitted.others[:8]) + (" …" if len(fitted.others) > 8 else "")
            self.notes.append(f"EK-FAC: diagonal blocks for {names}: no linear or convolutional weight")

    def _apply(self, vectors: Tensor, inverse: bool) -> Tensor:
        result = vectors / self._diagonal if inverse else vectors * self._diagonal
        for layer in self._layers:
            left, right = self._bases[layer.weight]
            rotated = left.mT @ to_matrices(vectors, layer, self._parameters) @ right
            curvature = self._curvature[layer.weight]
            rotated = rotated / curvature if inverse else rotated * curvature
            from_matrices(left @ rotated @ right.mT, layer, self._parameters, result)
        return result

    @override
    def solve(self, vectors: Tensor) -> Solution:
        x = self._apply(vectors, True)
        return Solution(x, relative_residual(self._apply(x, False), vectors))
