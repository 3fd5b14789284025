"""Rows A_i whose products approximate the Hessian: H ≈ (1/n) Σ A_iᵀA_i + w I."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from npeff.batches.batches import Batch
from npeff.companions.influence.blocks import formed, scatter
from npeff.companions.influence.losses import call_loss
from npeff.companions.influence.objective import Objective, check_finite
from npeff.errors import ArgumentError, DataError
from npeff.gradients.engine import PerExampleGradients, Prepared

Outputs = Callable[[nn.Module, Any], Tensor]
"""``outputs(model, batch) -> (b, C)``."""
OutputLoss = Callable[[Tensor, Any], Tensor]
"""``output_loss(outputs, batch) -> (b,)``, convex in the outputs."""

_NULL = 1e-12


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

    def __init__(self, objective: Objective, outputs: Outputs | None, output_loss: OutputLoss | None) -> None:
        self._objective, self._outputs, self._loss = objective, outputs, output_loss
        self.engine = objective.engine
        if outputs is not None:
            self.engine = PerExampleGradients(objective.model, objective.parameters, self._call)
        self._compared = outputs is None

    def _call(self, model: nn.Module, batch: Batch) -> Tensor:
        if self._outputs is None:
            raise RuntimeError("no outputs")
        values = self._outputs(model, batch.content)
        if not isinstance(values, Tensor) or values.dim() != 2 or len(values) != batch.n_examples:
            got = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
            raise DataError(f"outputs: expected shape ({batch.n_examples}, C) for a batch, got {got}")
        return values

    def passes(self) -> Iterator[tuple[Batch, Prepared, Tensor]]:
        """Per batch: what the engine prepared, and the cotangents S ``(b, C, R)``.

        Raises:
            ArgumentError: The output loss is not the training loss, or not convex.
        """
        for batch in self._objective.data:
            with self.engine.recording():
                values = self.engine.forward(batch)
                check_finite(values, "train_loss" if self._outputs is None else "outputs")
                if self._loss is None:
                    columns = torch.ones_like(values.detach())[:, :, None]
                else:
                    self._compare(values, batch)
                    columns = square_roots(values.detach(), self._loss, batch).to(values.dtype)
                yield batch, self.engine.prepare(batch, values), columns

    def dense(self) -> Iterator[Tensor]:
        """The rows of one batch after the other, ``(b·R, m)`` in the objective's dtype."""
        for batch, prepared, columns in self.passes():
            rows = torch.zeros(
                (batch.n_examples, columns.shape[2], self._objective.m),
                dtype=self._objective.dtype,
                device=self._objective.device,
            )
            for block in formed(self.engine.blocks(prepared, columns)):
                scatter(block, rows)
            yield rows.flatten(0, 1)

    def _compare(self, values: Tensor, batch: Batch) -> None:
        if self._compared or self._loss is None:
            return
        self._compared = True
        with torch.no_grad():
            ours = call_loss(self._objective.model, lambda *_: self._loss(values, batch.content), batch, "output_loss")  # type: ignore[misc]
            theirs = self._objective.losses(batch)
        gap = float((ours - theirs).abs().max())
        if gap > 1e-3 * float(theirs.abs().max().clamp_min(1e-6)):
            raise ArgumentError(
                f"output_loss: of the outputs it differs from train_loss by up to {gap:.3g} on the first batch; both "
                "must be the loss that was trained, or the curvature belongs to something else"
            )


def square_roots(values: Tensor, loss: OutputLoss, batch: Batch) -> Tensor:
    """S with ``S Sᵀ = ∇²c`` per example, by the eigenvectors that are not null.

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
