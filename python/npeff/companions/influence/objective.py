"""The training objective: gradients of its examples, products with its Hessian, and steps that unlearn examples."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from npeff.batches.batches import Batch
from npeff.companions.influence.losses import Loss, RepeatableData, call_loss, check_finite, check_loss
from npeff.errors import ArgumentError, ModelError, check_integer, check_number
from npeff.gradients.backward import side_by_side
from npeff.gradients.blocks import Block
from npeff.gradients.eligibility import placed, select_parameters
from npeff.gradients.engine import PerExampleGradients, Prepared
from npeff.gradients.rules.base import working
from npeff.models.parameters import Parameters
from npeff.short_repr import short_repr


class TrainingObjective:
    """What was trained: the mean loss of n examples and ½w‖θ‖², as a function of m selected parameters θ.

    Args:
        model: The model, in evaluation mode.
        loss: Per-example loss.
        data: The examples.
        parameters: The selected parameters and their positions in the flat vector.
        weight_decay: w.
        memory: Bytes that Hessian products may take beside their vectors.
        name: The loss's name, for messages.

    Raises:
        ModelError: The model has no per-example gradients as it stands.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        data: RepeatableData,
        parameters: Parameters,
        weight_decay: float = 0.0,
        memory: int = 1 << 29,
        name: str = "train_loss",
    ) -> None:
        self.model, self.loss, self.data, self.parameters = model, loss, data, parameters
        self.weight_decay, self.memory, self.name = weight_decay, memory, name
        # Whether losses are finite is asked behind the engine: torch.func.vmap, within it, allows no such question.
        self.engine = PerExampleGradients(model, parameters, lambda _, batch: self._called(batch)[:, None])
        self.tensors = list(self.engine.tensors.values())
        self.dtype = working(self.tensors[0]).dtype
        self.device = self.tensors[0].device
        self.n, self.m = sum(batch.n_examples for batch in data), parameters.n_parameters
        self._batched = True
        self._saved: int | None = None
        self._graphs: dict[int, Tensor] | None = None

    @classmethod
    def in_memory(
        cls,
        model: nn.Module,
        loss: Loss,
        data: Iterable[Any],
        device: torch.device,
        parameters: str | Sequence[str] | None = None,
        weight_decay: float = 0.0,
        *,
        names: tuple[str, str],
    ) -> TrainingObjective:
        """Read the data once and hold it in memory, for many passes; ``names`` are those of loss and data."""
        check_loss(loss, names[0])
        check_number("weight_decay", weight_decay, zero=True)
        held = RepeatableData(list(RepeatableData(data, names[1], device)), names[1], device)
        return cls(model, loss, held, select_parameters(model, parameters), weight_decay, name=names[0])

    def losses(self, batch: Batch) -> Tensor:
        """Compute the losses of a batch, ``(b,)`` with their graph.

        Raises:
            DataError: A loss is not finite or has another shape.
        """
        losses = self._called(batch)
        check_finite(losses, self.name)
        return losses

    def _called(self, batch: Batch) -> Tensor:
        return call_loss(self.model, self.loss, batch, self.name)

    def theta(self) -> Tensor:
        """Copy the selected parameters into one vector ``(m,)``."""
        return torch.cat([tensor.detach().reshape(-1) for tensor in self.tensors]).to(self.dtype)

    @torch.no_grad()
    def set_theta(self, theta: Tensor) -> None:
        """Set the selected parameters from a vector ``(m,)``."""
        for parameter, tensor in zip(self.parameters, self.tensors, strict=True):
            tensor.copy_(theta[parameter.slice].view_as(tensor))

    def blocks(self) -> Iterator[tuple[Batch, Tensor, Iterator[Block]]]:
        """Yield per batch its losses and the blocks of its per-example gradients ``∇ℓ(z_i)`` (one column each)."""
        for batch in self.data:
            with self.engine.recording():
                losses = self.engine.forward(batch)
                check_finite(losses, self.name)
                prepared = self.engine.prepare(batch, losses)
                columns = torch.ones_like(losses)[:, :, None]
                yield batch, losses, (block.formed() for block in self.engine.blocks(prepared, columns))

    def value_and_gradient(self) -> tuple[float, Tensor]:
        """Compute J and ``∇J``, ``(m,)`` float64."""
        total, gradient = 0.0, torch.zeros(self.m, dtype=torch.float64, device=self.device)
        for batch in self.data:
            with self.engine.recording():
                losses = self.losses(batch)
                gradient += self.flat_gradient(losses)
            total += float(losses.detach().double().sum())
        theta = self.theta().double()
        value = total / self.n + self.weight_decay / 2 * float(theta.square().sum())
        return value, gradient / self.n + self.weight_decay * theta

    def gradient_norms(self) -> tuple[float, float]:
        """Compute ``‖∇J‖``, and the root mean square of ``‖∇ℓ(z_i)‖``, in one pass."""
        gradient, squares = torch.zeros(self.m, dtype=torch.float64, device=self.device), 0.0
        for _, losses, blocks in self.blocks():
            gradient += self.flat_gradient(losses, retain_graph=True)
            for block in blocks:
                squares += float(block.values.to(torch.float64).square().sum())
        gradient = gradient / self.n + self.weight_decay * self.theta().double()
        return float(gradient.norm()), (squares / self.n) ** 0.5

    def products(self, vectors: Tensor, batches: list[Batch] | None = None, damping: float = 0.0) -> Tensor:
        """Compute ``(∇²J + λI) v`` for several vectors at once: one double backward pass per batch serves all of them.

        Args:
            vectors: ``(k, m)``.
            damping: λ.
            batches: Take the mean over these alone (stochastic estimates); None: all data.

        Returns:
            ``(k, m)`` in the vectors' dtype.

        Raises:
            ModelError: Some operation cannot be differentiated twice.
        """
        total = torch.zeros_like(vectors)
        count = 0
        for number, batch in enumerate(self.data if batches is None else batches):
            count += batch.n_examples
            with self.engine.recording():
                self._add_products(batch, number if batches is None else None, vectors, total)
        return total.div_(count).add_(vectors, alpha=self.weight_decay + damping)

    def hessian(self) -> Tensor:
        """Compute ``∇²J`` with weight decay, ``(m, m)`` float64, symmetrised."""
        hessian = torch.empty((self.m, self.m), dtype=torch.float64, device=self.device)
        step = min(self.m, 2048)
        with self.kept_graphs():
            for start in range(0, self.m, step):
                rows = torch.zeros((min(step, self.m - start), self.m), dtype=self.dtype, device=self.device)
                rows[:, start:].fill_diagonal_(1.0)
                hessian[start : start + step] = self.products(rows)
        return (hessian + hessian.T) / 2

    @contextmanager
    def kept_graphs(self) -> Iterator[None]:
        """Keep the gradients' graphs within it for the next products over all data, as far as memory goes.

        The parameters must not change meanwhile.
        """
        self._graphs = {}
        try:
            yield
        finally:
            self._graphs = None

    def flat_gradient(
        self, values: Tensor, cotangent: Tensor | None = None, *, name: str = "", **options: Any
    ) -> Tensor:
        """Compute the gradient of the values' sum, or of their product with a cotangent: ``(m,)``.

        Raises:
            ModelError: They have none.
        """
        if not values.requires_grad:
            raise ModelError(
                f"{name or self.name}: its value has no gradient in the parameters; remove torch.no_grad(), .detach() "
                "and .item() from it, and select parameters that it depends on"
            )
        cotangent = torch.ones_like(values) if cotangent is None else cotangent
        parts = torch.autograd.grad(
            values, self.tensors, cotangent, allow_unused=True, materialize_grads=True, **options
        )
        return torch.cat([part.reshape(-1) for part in parts])

    def _recorded(self, batch: Batch, number: int | None) -> Tensor:
        """Compute the gradient of a batch's summed loss, ``(m,)``, with its graph; numbered if of all data."""
        if number is not None and self._graphs and number in self._graphs:
            return self._graphs[number]
        saved = 0

        def pack(tensor: Tensor) -> Tensor:
            nonlocal saved
            saved += tensor.numel()
            return tensor

        hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
        with hooks if self._saved is None else nullcontext():
            gradient = self.flat_gradient(self.losses(batch), create_graph=True)
        if self._saved is None:
            self._saved = 1 + saved // batch.n_examples
        held = (self._saved * self.n + self.m * (1 + len(self._graphs or ()))) * gradient.element_size()
        if number is not None and self._graphs is not None and 2 * held <= self.memory:
            self._graphs[number] = gradient
        return gradient

    def _add_products(self, batch: Batch, number: int | None, vectors: Tensor, total: Tensor) -> None:
        try:
            gradient = self._recorded(batch, number)
            if not gradient.requires_grad:
                return  # linear in θ
            width = (self._saved or 1) * batch.n_examples + self.m
            step = max(1, min(len(vectors), self.memory // (width * gradient.element_size())))
            for first in range(0, len(vectors), step):
                part = slice(first, first + step)
                total[part] += self._pull(gradient, vectors[part].to(gradient.dtype)).to(total.dtype)
        except (NotImplementedError, RuntimeError) as error:
            known = ("not implemented", "not differentiable", "derivative for")
            if not isinstance(error, NotImplementedError) and not any(word in str(error) for word in known):
                raise
            raise ModelError(
                f"model: an operation in it cannot be differentiated twice ({str(error).splitlines()[0]}); use "
                "GaussNewton(…), EmpiricalFisher() or EKFAC(…), which need first derivatives alone, or replace the "
                "fused operation (attention: torch.nn.attention.sdpa_kernel(SDPBackend.MATH))"
            ) from error

    def _pull(self, gradient: Tensor, vectors: Tensor) -> Tensor:
        pulled = side_by_side(gradient, self.tensors, vectors) if self._batched and len(vectors) > 1 else None
        if pulled is not None:
            parts = [
                vectors.new_zeros((len(vectors), tensor.numel())) if part is None else part.reshape(len(vectors), -1)
                for part, tensor in zip(pulled, self.tensors, strict=True)
            ]
            return torch.cat(parts, dim=1)
        self._batched = self._batched and len(vectors) == 1  # no batched form of some operation: one after the other
        return torch.stack([self.flat_gradient(gradient, row, retain_graph=True) for row in vectors])


def dense_rows(
    engine: PerExampleGradients, prepared: Prepared, columns: Tensor, dtype: torch.dtype, squared: bool = False
) -> Tensor:
    """Compute the per-example gradients of a batch as dense rows ``(b, R, m)``, for cotangents ``(b, C, R)``.

    Squared: the sum of their squares over the columns, ``(b, 1, m)``.
    """
    b, _, n_columns = columns.shape
    shape = (b, 1 if squared else n_columns, engine.parameters.n_parameters)
    rows = torch.zeros(shape, dtype=dtype, device=columns.device)
    for made in engine.blocks(prepared, columns, squared=squared):
        block = made.formed()
        values, target = block.values.to(dtype), rows[block.examples]
        width = values.shape[3]
        if isinstance(block.starts, int):
            target[:, :, block.starts : block.starts + width] += values[:, :, 0]
            continue
        assert isinstance(block.starts, Tensor), "small parameters were not to be gathered"
        at = (block.starts[:, :, None] + torch.arange(width, device=rows.device)).flatten(1)
        target.scatter_add_(2, at[:, None].expand(-1, values.shape[1], -1), values.flatten(2))
    return rows


@dataclass(frozen=True, eq=False)
class Unlearned:
    """A model after unlearning.

    Attributes:
        model: A changed copy; the model given is as it was.
        before: The measure of the model given.
        after: The measure of ``model``.
        history: The measure after every step, ``before`` first.
        harmful_loss: Mean loss of the harmful examples, before and after.
        helpful_loss: Mean loss of the helpful examples, before and after.
    """

    model: nn.Module
    before: float
    after: float
    history: tuple[float, ...]
    harmful_loss: tuple[float, float]
    helpful_loss: tuple[float, float]

    __repr__ = short_repr


def unlearn(
    model: nn.Module,
    loss: Loss,
    harmful: Iterable[Any] | None,
    helpful: Iterable[Any] | None,
    measure: Callable[[nn.Module], float],
    *,
    learning_rate: float,
    steps: int = 10,
    parameters: str | Sequence[str] | None = None,
) -> Unlearned:
    """Climb the loss of harmful examples and descend that of helpful ones, and measure the model after every step.

    Each step is ``θ ← θ + η (∇ mean L(harmful) − ∇ mean L(helpful))``, plain gradient steps as in Silva, Chopra &
    Gombolay 2022. Ascent has no bound of its own: take few small steps, and look at ``history`` and the losses.

    Args:
        model: Not changed; the steps are made on a copy.
        loss: The training loss, per example.
        harmful: Batches to climb on; None for none.
        helpful: Batches to descend on; None for none.
        measure: ``measure(model) -> float``, such as a WEAT score.
        learning_rate: η.
        steps: How many steps.
        parameters: Name patterns of the parameters that may change.

    Returns:
        The changed copy and the measure's history.

    Raises:
        ArgumentError: Neither harmful nor helpful examples, or an option has another value.
        DataError: A loss is not finite or has another shape.
        ModelError: The loss or the model fails.
    """
    check_number("learning_rate", learning_rate)
    check_integer("steps", steps)
    if harmful is None and helpful is None:
        raise ArgumentError("harmful: neither harmful nor helpful examples were given; pass batches of at least one")
    if not callable(measure):
        raise ArgumentError(f"measure: expected callable(model) -> float, got {measure!r}")
    changed = copy.deepcopy(model)
    with placed(changed, None) as device:
        sides = {
            name: TrainingObjective.in_memory(changed, loss, data, device, parameters, names=("loss", name))
            for name, data in (("harmful", harmful), ("helpful", helpful))
            if data is not None
        }
        history = [float(measure(changed))]
        before = {name: side.value_and_gradient()[0] for name, side in sides.items()}
        for _ in range(steps):
            gradients = {name: side.value_and_gradient()[1] for name, side in sides.items()}
            for name, side in sides.items():
                step = (1.0 if name == "harmful" else -1.0) * learning_rate * gradients[name]
                side.set_theta(side.theta() + step.to(side.dtype))
            history.append(float(measure(changed)))
        losses = {
            name: (before[name], sides[name].value_and_gradient()[0]) if name in sides else (float("nan"),) * 2
            for name in ("harmful", "helpful")
        }
    return Unlearned(changed, history[0], history[-1], tuple(history), losses["harmful"], losses["helpful"])
