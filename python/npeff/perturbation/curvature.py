"""The Fisher along a direction: vᵀ F_i v of every example, without ever making F_i."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp

from npeff.batches.batches import Batch
from npeff.gradients.factors import Likelihood
from npeff.gradients.fallback import CalledModel
from npeff.perturbation.examples import Examples
from npeff.perturbation.outputs import curvature
from npeff.perturbation.weights import Direction, Weights

Method = Literal["forward mode", "central differences"]
Call = Callable[[nn.Module, Batch], Tensor]

STEP = {torch.float64: 1e-5, torch.float32: 2e-2, torch.bfloat16: 0.3, torch.float16: 0.1}
"""Change of the outputs, relative to their size, that central differences aim for: rounding and curvature even out."""


class Curvature:
    """Computes ``vᵀF_i v = uᵀS u`` with ``u = J_i v`` and S the Fisher of the outputs at θ.

    u is one Jacobian-vector product in forward mode, exact. Where an operation of the model has no forward-mode
    derivative, u is a central difference of the outputs, ``(f(θ+εv) − f(θ−εv)) / 2ε``, with ε chosen so that the
    outputs change by a small share of their size.

    Args:
        model: At its own weights.
        call: Runs the model on a batch.
        weights: Moves the model for the differences.
        likelihood: What the outputs mean.

    Attributes:
        method: How u is found.
    """

    def __init__(self, model: nn.Module, call: Call, weights: Weights, likelihood: Likelihood) -> None:
        self._model, self._call, self._weights, self._likelihood = model, call, weights, likelihood
        self._called = CalledModel(model, call)
        self.method: Method = "forward mode"

    def along(self, direction: Direction, examples: Examples, outputs: Tensor) -> npt.NDArray[Any]:
        """``vᵀF_i v`` of every example.

        Args:
            direction: v, on the model's device.
            examples: The examples.
            outputs: ``(n, C)`` the model's outputs on them at θ.

        Returns:
            ``(n,)`` float64 ≥ 0.
        """
        found = np.zeros(len(examples))
        if not direction:
            return found
        step = 0.0
        for piece in examples:
            own = outputs[torch.from_numpy(piece.places).to(outputs.device)]
            change = None
            if self.method == "forward mode":
                change = self._forward_mode(piece.batch, direction)
            if change is None:
                if not step:
                    step = self._step(piece.batch, direction, own)
                change = self._difference(piece.batch, direction, step)
            found[piece.places] = curvature(own, change[piece.rows], self._likelihood).cpu().numpy()
        return found

    def _forward_mode(self, batch: Batch, direction: Direction) -> Tensor | None:
        tensors = dict(self._model.named_parameters(remove_duplicate=False))
        at = {f"model.{name}": tensors[name].detach() for name in direction}
        along = {f"model.{name}": part.to(tensors[name].dtype) for name, part in direction.items()}

        def outputs(moved: dict[str, Tensor]) -> Tensor:
            return functional_call(self._called, moved, (batch,))

        try:
            with warnings.catch_warnings(), torch.inference_mode(False), torch.no_grad():
                warnings.simplefilter("ignore", DeprecationWarning)  # torch's own, about torch.jit
                return jvp(outputs, (at,), (along,))[1].detach()
        except (NotImplementedError, RuntimeError) as error:  # ModelError is a RuntimeError too
            if isinstance(error, torch.OutOfMemoryError) or isinstance(error.__cause__, torch.OutOfMemoryError):
                raise
            self.method = "central differences"
            return None

    def _difference(self, batch: Batch, direction: Direction, step: float) -> Tensor:
        try:
            self._weights.move(direction, step)
            ahead = self._outputs(batch)
            self._weights.move(direction, -step)
            return (ahead - self._outputs(batch)) / (2 * step)
        finally:
            self._weights.restore()

    def _outputs(self, batch: Batch) -> Tensor:
        with torch.no_grad():
            return self._call(self._model, batch).detach().double()

    def _step(self, batch: Batch, direction: Direction, outputs: Tensor) -> float:
        share = STEP.get(next(iter(self._model.parameters())).dtype, 2e-2)
        aim = share * max(1e-3, float(outputs.double().square().mean().sqrt()))
        step = 1e-3
        for _ in range(12):
            change = self._difference(batch, direction, step) * step
            size = float(change.square().mean().sqrt())
            if not np.isfinite(size):
                step /= 100
            elif size == 0:
                step *= 100
            elif 0.2 < size / aim < 5:
                return step
            else:
                step *= float(np.clip(aim / size, 1e-3, 1e3))
        return step
