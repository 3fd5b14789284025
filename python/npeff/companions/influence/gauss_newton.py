"""Gauss–Newton matrix and empirical Fisher, from per-example rows: H ≈ (1/n) Σ A_iᵀA_i + w I."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from npeff.batches.batches import Batch
from npeff.companions.influence.losses import call_loss, check_finite
from npeff.companions.influence.objective import TrainingObjective, dense_rows
from npeff.companions.influence.solvers import Inverse, Solver, dense_inverse
from npeff.errors import ArgumentError, DataError
from npeff.gradients.engine import PerExampleGradients, Prepared

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

    Args:
        objective: What was trained.
        outputs: f; or None.
        output_loss: c; given with f.
    """

    def __init__(
        self, objective: TrainingObjective, outputs: Outputs | None = None, output_loss: OutputLoss | None = None
    ) -> None:
        self._objective, self._loss = objective, output_loss
        self.engine = objective.engine
        if outputs is not None:
            call = lambda model, batch: _checked(outputs(model, batch.content), batch)  # noqa: E731
            self.engine = PerExampleGradients(objective.model, objective.parameters, call)

    def passes(self) -> Iterator[tuple[Batch, Prepared, Tensor]]:
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
                yield batch, self.engine.prepare(batch, values), columns

    def dense(self) -> Iterator[Tensor]:
        """Yield the rows of one batch after the other, ``(b·R, m)`` in the objective's dtype."""
        for _, prepared, columns in self.passes():
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
    """Compute S with ``S Sᵀ = ∇²c`` per example, by the eigenvectors that are not null.

    Args:
        values: ``(b, C)`` outputs.
        loss: c.
        batch: Its other argument.

    Returns:
        ``(b, C, R)`` float64, R ≤ C the largest rank in the batch.

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
