"""Scores of the influence of training examples on another loss than the one that was trained."""

from __future__ import annotations

import copy
import csv
import json
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from tqdm import tqdm

from npeff.companions.influence.curvature import EKFAC, EmpiricalFisher
from npeff.companions.influence.losses import Loss, RepeatableData, call_loss, check_loss, loss_values
from npeff.companions.influence.objective import TrainingObjective, dense_rows
from npeff.companions.influence.solvers import ConjugateGradients, Exact, Identity, Inverse, LiSSA, Solution, Solver
from npeff.errors import ArgumentError, ModelError, StorageError, check_choice, check_integer, check_number
from npeff.gradients.blocks import Block
from npeff.gradients.eligibility import placed, select_parameters
from npeff.gradients.engine import PerExampleGradients
from npeff.models.parameters import model_digest
from npeff.storage.checks import FLOAT, Field, Sizes, item
from npeff.storage.container import check_replaceable, read_record, refuse_npeff_file
from npeff.storage.files import atomic, path_of
from npeff.storage.writing import scratch_array, write_record

Array = npt.NDArray[Any]
Direction = Literal["raises", "lowers", "both"]
CONTENT = "influence"
SUFFIXES = (".h5", ".hdf5", ".csv")
FIELDS = (
    Field("values", FLOAT, ("n_train", "n_test"), nan=True, infinite=True),
    Field("test_values", FLOAT, ("n_test",)),
    Field("residuals", FLOAT, ("n_test",), least=0, nan=True, infinite=True),
)


@dataclass(frozen=True, eq=False)
class Scores:
    """``I(z, z_test) = −∇L_test(z_test)ᵀ H⁻¹ ∇L_train(z)`` for all pairs.

    Weighing z up by ε changes L_test by εI: with I < 0 training on z lowers L_test (helpful, if it is a loss), with
    I > 0 it raises it. Removing z changes it by about −I/n.

    Attributes:
        values: ``(n_train, n_test)`` float64; may be mapped from a file.
        test_values: ``(n_test,)`` float64 L_test at the model's parameters.
        residuals: ``(n_test,)`` float64 relative residuals of the solves.
        n: Number of training examples: those of :meth:`CrossLossInfluence.fit` or of the scores, whichever are more.
        provenance: Solver, damping, weight decay, gradient norms, notes.
    """

    values: Array
    test_values: Array
    residuals: Array
    n: int
    provenance: dict[str, Any] = field(default_factory=dict)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        return np.array(self.values, dtype=dtype, copy=True) if copy else np.asarray(self.values, dtype)

    def __len__(self) -> int:
        return len(self.values)

    def __repr__(self) -> str:
        solver = self.provenance.get("solver", "?")
        return f"Scores({self.values.shape[0]} training × {self.values.shape[1]} test examples, {solver})"

    def _column(self, test: int | None) -> Array:
        if test is None:
            return np.asarray(self.values.sum(axis=1))
        if not isinstance(test, int | np.integer) or not -self.values.shape[1] <= test < self.values.shape[1]:
            raise ArgumentError(f"test: expected a test example below {self.values.shape[1]}, or None, got {test!r}")
        return np.asarray(self.values[:, test])

    def top(self, k: int = 16, test: int | None = None, direction: Direction = "both") -> Array:
        """Find the training examples with most influence, strongest first, ties by lower index.

        Args:
            k: How many at most.
            test: On which test example; None: on the sum over all.
            direction: ``"raises"``: training on them raises L_test (I > 0, harmful if it is a loss); ``"lowers"``:
                lowers it; ``"both"``: by |I|.

        Returns:
            ``(≤ k,)`` int64 indices. Examples of the other sign are left out.

        Raises:
            ArgumentError: An argument has another value.
        """
        check_integer("k", k, 0)
        check_choice("direction", direction, get_args(Direction))
        column = self._column(test)
        key = {"raises": column, "lowers": -column, "both": np.abs(column)}[direction]
        order = np.argsort(-key, kind="stable")[:k]
        return order[key[order] > 0].astype(np.int64)

    def group(self, indices: Any) -> Array:
        """Compute the influence of a group, the sum over its examples, ``(n_test,)``.

        First order in the group's share of the data: for large groups the true effect of removal is usually larger,
        the order of groups is kept better (Koh, Ang, Teo & Liang 2019).

        Raises:
            ArgumentError: ``indices`` are no training examples, or contain one twice.
        """
        try:
            chosen = np.arange(len(self))[np.asarray(indices, None if len(indices) else np.int64)]
        except (IndexError, TypeError, ValueError) as error:
            raise ArgumentError(
                f"indices: expected training examples below {len(self)}, or a mask ({error})"
            ) from error
        if chosen.ndim != 1 or len(np.unique(chosen)) != len(chosen):
            raise ArgumentError("indices: expected a list in which no training example comes twice")
        return np.asarray(self.values[chosen].sum(axis=0))

    def removal(self, indices: Any = None) -> Array:
        """Predict the change of L_test when examples are removed and the model is trained again: ``−I/n``.

        The others keep their weight 1/n in the objective.

        Args:
            indices: Remove these together, ``(n_test,)``; None: each alone, ``(n_train, n_test)``.
        """
        return np.asarray(-(self.values if indices is None else self.group(indices)) / self.n)

    def save(self, path: str | Path) -> Path:
        """Write to ``.h5``, or the values alone to ``.csv`` (one line per z).

        Raises:
            ArgumentError: The name ends otherwise.
            StorageError: The path holds other work of npeff, or the file cannot be written.
        """
        path = check_path(path)
        if path.suffix.lower() != ".csv":
            arrays = {part.name: getattr(self, part.name) for part in FIELDS}
            meta = json.loads(json.dumps({"n": self.n, "provenance": self.provenance}, default=str))
            return write_record(path, CONTENT, arrays, meta)
        with atomic(path) as scratch, scratch.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["train", *(f"test_{j}" for j in range(self.values.shape[1]))])
            writer.writerows([i, *row] for i, row in enumerate(self.values.tolist()))
        return path

    @classmethod
    def load(cls, path: str | Path, *, verify: bool = False) -> Scores:
        """Open scores from ``.h5``; the table stays on disk, mapped.

        Types and shapes are checked; arrays up to 256 MiB are read once, checked, and compared with their checksums.

        Args:
            path: The file.
            verify: Read and check larger tables too.

        Raises:
            ArgumentError: ``path`` is no path.
            ForeignFileError: The file holds something else.
            StorageError: It cannot be read, or is damaged.
        """
        arrays, meta = read_record(path, CONTENT, _describe, verify=verify)
        return cls(**arrays, n=meta["n"], provenance=meta["provenance"])


def _describe(meta: dict[str, Any], where: str) -> tuple[Sequence[Field], Sizes]:
    """Check the meta data of a file of scores, and state what is expected of its arrays.

    Raises:
        StorageError: The meta data are not as expected.
    """
    if (n := item(meta, "n", where, int)) < 1:
        raise StorageError(f"{where}, 'n', is damaged: expected a number of examples, got {n}")
    item(meta, "provenance", where, dict)
    return FIELDS, {}


def check_path(path: str | Path) -> Path:
    """Refuse names of other formats, and files that hold other work of npeff.

    Raises:
        ArgumentError: The name ends otherwise.
        StorageError: Something else is there, or the folder is missing.
    """
    path = path_of(path)
    if path.suffix.lower() not in SUFFIXES:
        raise ArgumentError(f"out: expected a name ending in .h5 or .csv, got {path}")
    if path.suffix.lower() != ".csv":
        return check_replaceable(path, CONTENT)
    refuse_npeff_file(path)
    return path


SOLVERS: dict[str, type[Solver]] = {
    kind.name: kind for kind in (ConjugateGradients, Exact, LiSSA, EmpiricalFisher, EKFAC, Identity)
}
"""Solvers that a name means, with their default options."""

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
        gradient_norm: ``‖∇J‖`` after :meth:`fit`, weight decay included; 0 at an optimum.
        relative_gradient_norm: The same over the root mean square of ``‖∇ℓ(z_i)‖``: about 1 before any training.

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
        check_number("damping", damping, zero=True)
        check_number("weight_decay", weight_decay, zero=True)
        check_number("max_gradient", max_gradient)
        check_integer("memory", memory)
        self.model, self.train_loss = model, train_loss
        self.test_loss = train_loss if test_loss is None else test_loss
        self.parameters = select_parameters(model, parameters)
        self.solver, self.damping, self.weight_decay = _named(solver), float(damping), float(weight_decay)
        self.max_gradient, self.memory, self.progress = max_gradient, memory, progress
        self.gradient_norm: float | None = None
        self.relative_gradient_norm: float | None = None
        self.device = device
        self._fitted: tuple[Inverse, TrainingObjective, str] | None = None

    def fit(self, data: Iterable[Any]) -> CrossLossInfluence:
        """Prepare H from data, for all scores that follow; a sample of the training data may be enough.

        Args:
            data: Batches as the losses take them, in the same order every time they are read.

        Returns:
            Itself.

        Raises:
            ArgumentError: The data, or an option of the solver, cannot be used.
            DataError: A loss is not finite or has another shape.
            ModelError: The model has no per-example gradients, or its Hessian is not positive definite.
        """
        with placed(self.model, self.device) as device:
            objective = self._objective(RepeatableData(data, "train", device))
            self.gradient_norm, typical = objective.gradient_norms()
            relative = self.relative_gradient_norm = self.gradient_norm / typical if typical else 0.0
            if relative > self.max_gradient:
                warnings.warn(
                    f"model: it is not at an optimum of train_loss: the gradient of the mean loss is "
                    f"{relative:.2g} of an example's typical gradient (expected ≤ {self.max_gradient:g}). "
                    "Influence describes what retraining does at an optimum: train until it vanishes, make train_loss "
                    "all of what was trained, and give weight_decay= if there was one; the ranking may still be useful",
                    stacklevel=2,
                )
            inverse = self.solver.fit(objective, self.damping, self.memory // 2)
            self._fitted = (inverse, objective, model_digest(self.model))
        return self

    def with_test_loss(self, test_loss: Loss) -> CrossLossInfluence:
        """Return the same estimator, its curvature included, for another test loss.

        Raises:
            ArgumentError: ``test_loss`` cannot be called.
        """
        check_loss(test_loss, "test_loss")
        other = copy.copy(self)
        other.test_loss = test_loss
        return other

    def solve(self, vectors: Tensor) -> Solution:
        """Compute ``(H + λI)⁻¹ v`` with the curvature of :meth:`fit`.

        Args:
            vectors: ``(k, m)``, one right-hand side per row.

        Raises:
            ArgumentError: :meth:`fit` was not called.
            ModelError: The model changed since.
        """
        return self._inverse().solve(vectors)

    def scores(self, train: Iterable[Any], test: Iterable[Any], *, out: str | Path | None = None) -> Scores:
        """Compute the influence of every training example on every test example.

        The test side is solved for once, in groups that fit into memory; the training examples' gradients stream past
        the solutions and are never held together.

        Args:
            train: Batches. Without :meth:`fit` before, they make H too.
            test: Batches as the test loss takes them.
            out: ``.h5`` file to stream the table to (a ``.csv`` is written at the end).

        Raises:
            ArgumentError: Data that can be read only once, or a bad ``out``.
            DataError: A loss is not finite or has another shape.
            ModelError: See :meth:`fit`; or the model changed since.
            StorageError: ``out`` cannot be written.
        """
        target = None if out is None else check_path(out)
        if self._fitted is None:
            fitted = copy.copy(self).fit(train)
            self.gradient_norm, self.relative_gradient_norm = fitted.gradient_norm, fitted.relative_gradient_norm
            return fitted.scores(train, test, out=out)
        streamed = target is not None and target.suffix.lower() != ".csv"
        with placed(self.model, self.device) as device:
            inverse, objective = self._inverse(), self._fitted[1]
            train_data, test_data = RepeatableData(train, "train", device), RepeatableData(test, "test", device)
            test_values = loss_values(self.model, self.test_loss, test_data)
            if objective.data.data is not train_data.data or objective.device != device:
                objective = self._objective(train_data)
            n, shape = max(self._fitted[1].n, objective.n), (objective.n, len(test_values))
            kept = "No scores were written."
            values = scratch_array(target, shape, np.float64, kept) if target and streamed else np.empty(shape)
            residuals = np.zeros(shape[1])
            iterations = self._fill(values, residuals, inverse, objective, test_data)
        options = {
            key: value for key, value in vars(self.solver).items() if isinstance(value, int | float | str | None)
        }
        provenance = {
            "solver": self.solver.name,
            **options,
            "damping": self.damping,
            "weight_decay": self.weight_decay,
            "gradient_norm": self.gradient_norm,
            "relative_gradient_norm": self.relative_gradient_norm,
            "iterations": iterations,
            "notes": list(inverse.notes),
        }
        result = Scores(values, test_values, residuals, n, provenance)
        if target is None:
            return result
        result.save(target)
        return Scores.load(target) if streamed else result

    def _objective(self, data: RepeatableData) -> TrainingObjective:
        memory = max(1, self.memory // 4)
        return TrainingObjective(self.model, self.train_loss, data, self.parameters, self.weight_decay, memory)

    def _inverse(self) -> Inverse:
        if self._fitted is None:
            raise ArgumentError("fit: it was not called; call fit(data) first")
        inverse, _, digest = self._fitted
        if model_digest(self.model) != digest:
            raise ModelError("model: it changed since fit(); call fit() again with the model as it is now")
        return inverse

    def _fill(
        self, values: Any, residuals: Array, inverse: Inverse, objective: TrainingObjective, test: RepeatableData
    ) -> int:
        """Fill the table group by group of test examples; return the products with H that this took."""
        size = objective.m * torch.finfo(objective.dtype).bits // 8
        width = max(1, self.memory // 2 // (_VECTORS * size))
        kept = max(width, self.memory // 4 // size)
        iterations = 0
        with tqdm(total=values.shape[1], desc="Influence", unit="test", disable=not self.progress) as bar:
            pending: list[Tensor] = []
            first = done = 0
            gradients = self._test_gradients(test, objective)
            while some := list(islice(gradients, width)):
                vectors = torch.stack(some)
                solved = inverse.solve(vectors)
                residuals[done : done + len(vectors)] = solved.residual.cpu().numpy()
                iterations += solved.iterations
                pending.append(solved.x)
                done += len(vectors)
                bar.update(len(vectors))
                if done - first + width > kept or done == values.shape[1]:
                    _stream(values, first, torch.cat(pending), objective)
                    first, pending = done, []
        return iterations

    def _test_gradients(self, test: RepeatableData, objective: TrainingObjective) -> Iterator[Tensor]:
        """Yield ``∇L_test``, ``(m,)`` for each test example."""
        call = lambda _, batch: call_loss(self.model, self.test_loss, batch, "test_loss")[:, None]  # noqa: E731
        engine = PerExampleGradients(self.model, self.parameters, call)
        for batch in test:
            with engine.recording():
                values = call_loss(self.model, self.test_loss, batch, "test_loss", whole=True)
                if values.dim() and not getattr(self.test_loss, "one_by_one", False):
                    prepared = engine.prepare(batch, engine.forward(batch))
                    columns = torch.ones_like(prepared.logits)[:, :, None]
                    yield from dense_rows(engine, prepared, columns, objective.dtype)[:, 0].detach()
                    continue
                for value in values.reshape(-1):
                    yield (
                        objective.flat_gradient(value, name="test_loss", retain_graph=True).detach().to(objective.dtype)
                    )


def _named(solver: Solver | str) -> Solver:
    if isinstance(solver, Solver):
        return solver
    if isinstance(solver, str) and solver in SOLVERS:
        return SOLVERS[solver]()
    raise ArgumentError(
        f"solver: expected a solver such as ConjugateGradients(), or one of {', '.join(SOLVERS)}; got {solver!r}"
    )


def _stream(values: Any, first: int, solved: Tensor, objective: TrainingObjective) -> None:
    """Write the columns of the solutions ``(k, m)``: their negative products with all per-example gradients."""
    row = 0
    for batch, _, blocks in objective.blocks():
        products = solved.new_zeros((batch.n_examples, len(solved)), dtype=torch.float64)
        for block in blocks:
            products[block.examples] += _products(block, solved)
        values[row : row + batch.n_examples, first : first + len(solved)] = (-products).cpu().numpy()
        row += batch.n_examples


def _products(block: Block, vectors: Tensor) -> Tensor:
    """Compute the inner products ``(b', k)`` of a block's gradients (one column) with ``(k, m)``."""
    values = block.values[:, 0].to(vectors.dtype)
    width = values.shape[2]
    if isinstance(block.starts, int):
        return values[:, 0] @ vectors[:, block.starts : block.starts + width].T
    assert isinstance(block.starts, Tensor), "small parameters were not to be gathered"
    reach = torch.arange(width, device=vectors.device)
    rows = [
        vectors[:, (starts[:, None] + reach).reshape(-1)] @ value.reshape(-1)
        for starts, value in zip(block.starts, values, strict=True)
    ]
    return torch.stack(rows)
