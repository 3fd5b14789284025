"""Cross-loss influence functions: trained on one loss, judged by another."""

from __future__ import annotations

import copy
import math
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from npeff.batches.batches import Batch
from npeff.companions.influence.blocks import contract, formed, scatter
from npeff.companions.influence.losses import Examples, Loss, call_loss, check_loss
from npeff.companions.influence.objective import Objective, Stationarity, check_finite
from npeff.companions.influence.scores import Array, Direction, Scores, check_path
from npeff.companions.influence.solvers import Inverse, Solver, resolve
from npeff.companions.influence.solvers.base import check_count, check_positive
from npeff.errors import ArgumentError, ModelError
from npeff.gradients.engine import PerExampleGradients
from npeff.gradients.selection import placed, select_parameters
from npeff.models.digests import model_digest
from npeff.storage.files import check_target, explain, reserve

_VECTORS = 10
"""Vectors of length m that a right-hand side takes while it is solved for."""


class CrossLossInfluence:
    """Influence of training examples on another loss than the one that was trained.

    ``I(z, z_test) = −∇L_test(z_test, θ̂)ᵀ H⁻¹ ∇L_train(z, θ̂)``, ``H = (1/n) Σ ∇²L_train + (w + λ) I`` (Silva, Chopra &
    Gombolay 2022, after Koh & Liang 2017). Removing z, with the other weights 1/n as they are, and training again
    changes L_test by about −I/n. With ``test_loss = train_loss`` it is the influence function of Koh & Liang.

    Args:
        model: The trained model, in evaluation mode, at an optimum of its training loss. Left as it was.
        train_loss: ``train_loss(model, batch) -> (b,)`` per-example losses: all of what was trained.
        test_loss: ``test_loss(model, batch) -> (b,)``, or one number ``()`` for a function of the whole batch (one
            column per batch). None: the training loss.
        parameters: Name patterns as in the shell, one or several, ``"!…"`` excludes. None takes all.
        solver: ``"cg"``, ``"exact"``, ``"lissa"``, ``"empirical-fisher"``, ``"ekfac"``, ``"identity"``, or a
            solver with options.
        damping: λ ≥ 0, for the solve alone.
        weight_decay: w ≥ 0, if ``(w/2)‖θ‖²`` was part of what was trained.
        max_gradient: Warn when ``‖∇J‖`` exceeds this share of the examples' root-mean-square gradient norm.
        memory: Bytes to stay within, beside the model and a batch's activations.
        device: Where to compute; the model's own device by default.
        progress: Show a progress bar on stderr.

    Attributes:
        stationarity: How far the model is from an optimum, after :meth:`fit`.
        result: The last scores.
        iterations: Products with H that the last scores took, where the solver is iterative.

    Raises:
        ArgumentError: An argument has a wrong value.
    """

    def __init__(
        self,
        model: nn.Module,
        train_loss: Loss,
        test_loss: Loss | None = None,
        parameters: str | Sequence[str] | None = None,
        *,
        solver: Solver | str = "cg",
        damping: float = 0.0,
        weight_decay: float = 0.0,
        max_gradient: float = 0.05,
        memory: int = 1 << 30,
        device: torch.device | str | None = None,
        progress: bool = True,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise ArgumentError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
        check_loss(train_loss, "train_loss")
        if test_loss is not None:
            check_loss(test_loss, "test_loss")
        check_positive("damping", damping, zero=True)
        check_positive("weight_decay", weight_decay, zero=True)
        check_positive("max_gradient", max_gradient)
        check_count("memory", memory)
        self.model, self.train_loss = model, train_loss
        self.test_loss = train_loss if test_loss is None else test_loss
        self.parameters = select_parameters(model, parameters)
        self.solver, self.damping, self.weight_decay = resolve(solver), float(damping), float(weight_decay)
        self.max_gradient, self.memory, self.progress = max_gradient, memory, progress
        self.stationarity: Stationarity | None = None
        self.result: Scores | None = None
        self.iterations = 0
        self._device = device
        self._fitted: tuple[Inverse, int, str] | None = None
        self._last_objective: Objective | None = None

    # ---- the curvature -------------------------------------------------------------------------------------

    def fit(self, data: Iterable[Any]) -> CrossLossInfluence:
        """Prepare H from data, for all following scores; a sample of the training data will do where all is too much.

        Args:
            data: Batches as the losses take them, in the same order every time they are read.

        Returns:
            Itself.

        Raises:
            ArgumentError: The data, or an option of the solver, cannot be used.
            DataError: A loss is not finite or has another shape.
            ModelError: The model has no per-example gradients, or its Hessian is not positive definite.
        """
        with placed(self.model, self._device) as device:
            objective = self._last_objective = self._objective(Examples(data, "train", device))
            self.stationarity = objective.stationarity()
            self._judge(self.stationarity)
            inverse = self.solver.fit(objective, self.damping, self.memory // 2)
            self._fitted = (inverse, objective.n, model_digest(self.model))
        return self

    def with_test_loss(self, test_loss: Loss) -> CrossLossInfluence:
        """The same estimator, its curvature included, for another test loss.

        Raises:
            ArgumentError: ``test_loss`` cannot be called.
        """
        check_loss(test_loss, "test_loss")
        other = copy.copy(self)
        other.test_loss, other.result = test_loss, None
        return other

    def _objective(self, examples: Examples) -> Objective:
        return Objective(
            self.model, self.train_loss, examples, self.parameters, self.weight_decay, max(1, self.memory // 4)
        )

    def _judge(self, found: Stationarity) -> None:
        if found.relative > self.max_gradient:
            warnings.warn(
                f"model: it is not at an optimum of train_loss: the gradient of the mean loss is "
                f"{found.relative:.2g} of an example's typical gradient (expected ≤ {self.max_gradient:g}). "
                "Influence describes what retraining does at an optimum: train until it vanishes, make train_loss "
                "all of what was trained, and give weight_decay= if there was one; the ranking may still be useful",
                stacklevel=3,
            )

    def _inverse(self) -> tuple[Inverse, int]:
        if self._fitted is None:
            raise RuntimeError("fit() comes first")
        inverse, n, digest = self._fitted
        if model_digest(self.model) != digest:
            raise ModelError("model: it changed since fit(); call fit() again with the model as it is now")
        return inverse, n

    # ---- influence -----------------------------------------------------------------------------------------

    def scores(self, train: Iterable[Any], test: Iterable[Any], *, out: str | Path | None = None) -> Scores:
        """The influence of every training example on every test example.

        The test side is solved for once, in groups that fit into memory; the training examples' gradients stream past
        the solutions and are never held together.

        Args:
            train: Batches. Without :meth:`fit` before, they make H too.
            test: Batches as the test loss takes them.
            out: ``.h5`` file to stream the table to (``.csv`` and ``.npz`` are written at the end).

        Returns:
            Scores, also kept as ``result``.

        Raises:
            ArgumentError: Data that can be read only once, or a bad ``out``.
            DataError: A loss is not finite or has another shape.
            ModelError: See :meth:`fit`; or the model changed since.
            StorageError: ``out`` cannot be written.
        """
        target = None if out is None else check_path(out)
        if target is not None:
            check_target(target)
        fresh, self.iterations = self._fitted is None, 0
        if fresh:
            self.fit(train)
        try:
            with placed(self.model, self._device) as device:
                inverse, n = self._inverse()
                train_data, test_data = Examples(train, "train", device), Examples(test, "test", device)
                test_values = self._measure(test_data)
                shape = (train_data.count(), len(test_values))
                streamed = target is not None and target.suffix.lower() in (".h5", ".hdf5")
                values = np.empty(shape) if target is None or not streamed else _on_disk(shape, target)
                residuals = np.zeros(shape[1])
                self._fill(values, residuals, inverse, train_data, test_data)
                result = Scores(values, test_values, residuals, n, self._provenance(inverse))
                if target is not None:
                    result.save(target)
        finally:
            if fresh:
                self._fitted = self._last_objective = None
        if target is not None and streamed:
            result = Scores.load(target)
        self.result = result
        return result

    def _fill(self, values: Any, residuals: Array, inverse: Inverse, train: Examples, test: Examples) -> None:
        objective = self._last_objective
        if objective is None or objective.data.data is not train.data or objective.device != train.device:
            objective = self._objective(train)
        size = objective.m * torch.finfo(objective.dtype).bits // 8
        width = max(1, self.memory // 2 // (_VECTORS * size))
        kept = max(width, self.memory // 4 // size)
        bar = tqdm(total=values.shape[1], desc="Influence", unit="test", disable=not self.progress)
        with bar:
            pending: list[Tensor] = []
            first = done = 0
            for vectors in _groups(self._test_gradients(test), width):
                solved = inverse.solve(vectors)
                residuals[done : done + len(vectors)] = solved.residual.cpu().numpy()
                self.iterations += solved.iterations
                pending.append(solved.x)
                done += len(vectors)
                bar.update(len(vectors))
                if done - first + width > kept or done == values.shape[1]:
                    self._stream(values, first, torch.cat(pending), objective)
                    first, pending = done, []

    def _stream(self, values: Any, first: int, solved: Tensor, objective: Objective) -> None:
        row = 0
        for batch, blocks in objective.blocks():
            products = solved.new_zeros((batch.n_examples, len(solved)), dtype=torch.float64)
            for block in blocks:
                part = solved.new_zeros((batch.n_examples, len(solved)))
                contract(block, solved, part)
                products += part
            values[row : row + batch.n_examples, first : first + len(solved)] = (-products).cpu().numpy()
            row += batch.n_examples

    # ---- the test side -------------------------------------------------------------------------------------

    def _measure(self, test: Examples) -> Array:
        found = []
        with _grad_as(self.test_loss):
            for batch in test:
                values = call_loss(self.model, self.test_loss, batch, "test_loss", whole=True).detach().reshape(-1)
                check_finite(values, "test_loss")
                found.append(values.double().cpu().numpy())
        return np.concatenate(found)

    def _test_gradients(self, test: Examples) -> Iterator[Tensor]:
        """``∇L_test`` batch by batch, ``(b, m)``."""
        call = lambda _, batch: call_loss(self.model, self.test_loss, batch, "test_loss")[:, None]  # noqa: E731
        engine = PerExampleGradients(self.model, self.parameters, call)
        tensors = list(engine.tensors.values())
        for batch in test:
            with engine.recording():
                yield from self._gradients_of(batch, engine, tensors)

    def _gradients_of(self, batch: Batch, engine: PerExampleGradients, tensors: list[Tensor]) -> Iterator[Tensor]:
        values = call_loss(self.model, self.test_loss, batch, "test_loss", whole=True)
        like = tensors[0] if tensors[0].dtype == torch.float64 else tensors[0].float()
        if values.dim() == 0 or getattr(self.test_loss, "one_by_one", False):
            for value in values.reshape(-1):
                parts = _gradient(value, tensors)
                yield torch.cat([part.detach().reshape(-1) for part in parts]).to(like.dtype)[None]
            return
        rows = like.new_zeros((batch.n_examples, 1, self.parameters.n_parameters))
        prepared = engine.prepare(batch, engine.forward(batch))
        for block in formed(engine.blocks(prepared, rows.new_ones((batch.n_examples, 1, 1)))):
            scatter(block, rows)
        yield rows[:, 0].detach()

    # ---- what stands out -----------------------------------------------------------------------------------

    def top(self, k: int = 16, test: int | None = None, direction: Direction = "both") -> Array:
        """:meth:`Scores.top` of the last scores."""
        return self._last().top(k, test, direction)

    def group(self, indices: Any) -> Array:
        """:meth:`Scores.group` of the last scores."""
        return self._last().group(indices)

    def _last(self) -> Scores:
        if self.result is None:
            raise ArgumentError("scores: none have been computed; call scores(train, test) first")
        return self.result

    def _provenance(self, inverse: Inverse) -> dict[str, Any]:
        found = self.stationarity
        return {
            **self.solver.describe(),
            "damping": self.damping,
            "weight_decay": self.weight_decay,
            "gradient_norm": None if found is None else found.gradient_norm,
            "relative_gradient_norm": None if found is None else found.relative,
            "notes": list(inverse.notes),
        }


def _on_disk(shape: tuple[int, int], target: Path) -> Array:
    """An array in a file beside ``target`` that has no name, and goes with the array.

    Raises:
        StorageError: The disk does not hold it.
    """
    size = 8 * math.prod(shape)
    try:
        with tempfile.TemporaryFile(dir=target.resolve().parent) as file:
            reserve(file, size)
            return np.memmap(file, np.float64, "r+", shape=shape) if size else np.empty(shape)
    except OSError as error:
        failure = explain(target, error, "No scores were written.")
        raise failure from error


def _gradient(value: Tensor, tensors: list[Tensor]) -> Sequence[Tensor]:
    if not value.requires_grad:  # a coefficient outside of its active set: constant around here
        return [torch.zeros_like(tensor) for tensor in tensors]
    return torch.autograd.grad(value, tensors, retain_graph=True, allow_unused=True, materialize_grads=True)


def _grad_as(loss: Loss) -> Any:
    """Test functions that differentiate within need autograd even where only their value is asked for."""
    return torch.enable_grad() if getattr(loss, "one_by_one", False) else torch.no_grad()


def _groups(rows: Iterator[Tensor], width: int) -> Iterator[Tensor]:
    """Regroup rows into ``(≤ width, m)``."""
    held: list[Tensor] = []
    count = 0
    for block in rows:
        for part in torch.split(block, width):
            if count + len(part) > width:
                yield torch.cat(held)
                held, count = [], 0
            held.append(part)
            count += len(part)
    if held:
        yield torch.cat(held)
