"""The training objective: per-example losses over data, their gradients, and products with the Hessian."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from npeff.batches.batches import Batch
from npeff.batches.reading import check_data, check_sampler, read_batches
from npeff.batches.tensor_trees import leaves
from npeff.errors import ArgumentError, DataError, ModelError, NpeffError, check_number
from npeff.gradients.blocks import Block, Pairs
from npeff.gradients.eligibility import select_parameters
from npeff.gradients.engine import PerExampleGradients, Prepared
from npeff.gradients.rules.base import working
from npeff.models.parameters import Parameters

Array = npt.NDArray[Any]
Loss = Callable[[nn.Module, Any], Tensor]
"""``loss(model, batch) -> (b,)``: one number per example of the batch as the data yields it."""


def check_loss(loss: object, name: str) -> None:
    """Refuse a loss that cannot be called.

    Raises:
        ArgumentError: Naming the argument.
    """
    if not callable(loss):
        raise ArgumentError(f"{name}: expected callable(model, batch) -> (b,) per-example losses, got {loss!r}")


def check_finite(losses: Tensor, name: str) -> None:
    """Refuse losses that are not finite.

    Raises:
        DataError: Naming the first.
    """
    finite = torch.isfinite(losses.detach()).reshape(-1)
    if not bool(finite.all()):
        bad = int((~finite).to(torch.uint8).argmax())
        raise DataError(
            f"{name}: example {bad} of a batch has the loss {float(losses.detach().reshape(-1)[bad])}; find what "
            "overflows in the model on it, or leave it out of the data"
        )


def call_loss(model: nn.Module, loss: Loss, batch: Batch, name: str, *, whole: bool = False) -> Tensor:
    """Compute the losses of a batch, with their graph.

    Args:
        model: The model.
        loss: What to call.
        batch: The batch.
        name: The argument's name, for messages.
        whole: Accept a single number for the whole batch (no dimensions) too.

    Returns:
        ``(b,)``, or ``()`` where ``whole`` allows it.

    Raises:
        DataError: It gave something else.
        ModelError: It raised an error.
    """
    try:
        value = loss(model, batch.fresh().content)
    except Exception as error:
        # Inference tensors have an explanation of their own, see PerExampleGradients.recording.
        explained = isinstance(error, RuntimeError) and "inference tensor" in str(error).lower()
        if explained or isinstance(error, (NpeffError, MemoryError, torch.OutOfMemoryError)):
            raise
        shapes = ", ".join(str(tuple(leaf.shape)) for leaf in leaves(batch.content) if isinstance(leaf, Tensor))
        raise ModelError(
            f"{name}: failed on a batch of tensors {shapes or '(none)'}: {type(error).__name__}: {error}. It is called "
            "with the model and a batch as the data yields it"
        ) from error
    expected = f"shape ({batch.n_examples},) for a batch of {batch.n_examples} examples"
    if not isinstance(value, Tensor) or not value.is_floating_point():
        kind = str(value.dtype) if isinstance(value, Tensor) else type(value).__name__
        raise DataError(f"{name}: expected a floating-point tensor of {expected}, got {kind}")
    if value.dim() == 0 and whole:
        return value
    if value.shape != (batch.n_examples,):
        hint = "; return one loss per example (reduction='none')" if value.dim() == 0 else "; sum over what remains"
        raise DataError(f"{name}: expected {expected}, got {tuple(value.shape)}{hint}")
    return value


class RepeatableData:
    """Data as batches on a device, in the same order every time.

    Args:
        data: Iterable of batches as the losses take them.
        name: The argument's name, for messages.
        device: Where the model is.

    Raises:
        ArgumentError: The data can be read only once, or comes in another order each time.
    """

    def __init__(self, data: Iterable[Any], name: str, device: torch.device) -> None:
        self.data, self.name, self.device = check_data(data), name, device
        if iter(self.data) is self.data:
            raise ArgumentError(f"{name}: it can be read only once and is needed several times; pass list({name})")
        check_sampler(data, name)

    def __iter__(self) -> Iterator[Batch]:
        """Yield batches, as read by :func:`npeff.batches.reading.read_batches`; a sequence is one example.

        Raises:
            DataError: There are none.
        """
        empty = True
        for batch in read_batches(self.data, self.device, True, False):
            empty = False
            yield batch
        if empty:
            raise DataError(f"{self.name}: it yielded no batches")


def loss_values(model: nn.Module, loss: Loss, data: Iterable[Batch], name: str = "test_loss") -> Array:
    """Compute a test loss on all batches: one number per example, or per batch where the loss is of the whole batch.

    Returns:
        float64.

    Raises:
        DataError: A loss is not finite or has another shape.
    """
    found = []
    # A loss that differentiates within itself needs autograd even where only its value is asked for.
    with torch.enable_grad() if getattr(loss, "one_by_one", False) else torch.no_grad():
        for batch in data:
            values = call_loss(model, loss, batch, name, whole=True).detach().reshape(-1)
            check_finite(values, name)
            found.append(values.double().cpu().numpy())
    return np.concatenate(found)


NAMED_OUTPUT_LOSSES: dict[str, Callable[[Tensor, Any], Tensor]] = {
    "cross_entropy": lambda outputs, batch: nn.functional.cross_entropy(outputs, batch[1], reduction="none"),
    "squared_error": lambda outputs, batch: (outputs - batch[1].reshape(outputs.shape)).square().sum(1) / 2,
}
"""Losses by name, as functions of the outputs ``(b, C)`` and the batch: for Gauss–Newton curvature."""


def cross_entropy(model: nn.Module, batch: Any) -> Tensor:
    """Compute the cross-entropy of ``model(inputs)`` with the labels, per example.

    Args:
        model: Gives logits ``(b, C)``.
        batch: ``(inputs, labels)`` with labels ``(b,)`` int64.

    Returns:
        ``(b,)``.
    """
    return NAMED_OUTPUT_LOSSES["cross_entropy"](model(batch[0]), batch)


def squared_error(model: nn.Module, batch: Any) -> Tensor:
    """Compute ``½ Σ (model(inputs) − targets)²`` per example.

    Args:
        model: Gives ``(b, …)``.
        batch: ``(inputs, targets)``, the targets as many numbers per example as the outputs.

    Returns:
        ``(b,)``.
    """
    return NAMED_OUTPUT_LOSSES["squared_error"](model_outputs(model, batch), batch)


def model_outputs(model: nn.Module, batch: Any) -> Tensor:
    """Compute ``model(inputs)`` of a batch ``(inputs, …)``, flattened to ``(b, C)``."""
    outputs: Tensor = model(batch[0])
    return outputs.flatten(1) if outputs.dim() > 1 else outputs[:, None]


NAMED: dict[str, Loss] = {"cross_entropy": cross_entropy, "squared_error": squared_error}
"""Losses that the command line knows by name."""


class TrainingObjective:
    """The training objective over given data.

    Args:
        model: The model, in evaluation mode.
        loss: Per-example loss.
        data: The examples.
        parameters: The selected parameters' places in the flat vector of length m.
        weight_decay: w; the coefficient of ½‖θ‖² in what was trained.
        memory: Bytes that Hessian products may take beside their vectors.
        name: The loss's name, for messages.

    Attributes:
        n: Number of examples.
        m: Number of selected parameters.

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
                yield batch, losses, gradient_blocks(self.engine, prepared, columns)

    def value_and_gradient(self) -> tuple[float, Tensor]:
        """Compute J and ``∇J``, ``(m,)`` float64."""
        total, gradient = 0.0, torch.zeros(self.m, dtype=torch.float64, device=self.device)
        for batch in self.data:
            with self.engine.recording():
                losses = self.losses(batch)
                gradient += self._flat_gradient(losses)
            total += float(losses.detach().double().sum())
        theta = self.theta().double()
        value = total / self.n + self.weight_decay / 2 * float(theta.square().sum())
        return value, gradient / self.n + self.weight_decay * theta

    def gradient_norms(self) -> tuple[float, float]:
        """Compute ``‖∇J‖``, and the root mean square of ``‖∇ℓ(z_i)‖``, in one pass."""
        gradient, squares = torch.zeros(self.m, dtype=torch.float64, device=self.device), 0.0
        for _, losses, blocks in self.blocks():
            gradient += self._flat_gradient(losses, retain_graph=True)
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

    def _flat_gradient(self, losses: Tensor, **options: Any) -> Tensor:
        parts = torch.autograd.grad(losses.sum(), self.tensors, allow_unused=True, materialize_grads=True, **options)
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
            gradient = self._flat_gradient(self.losses(batch), create_graph=True)
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
        if self._batched and len(vectors) > 1:
            try:
                with warnings.catch_warnings():
                    warnings.filterwarnings("ignore", "(?s).*performance drop", UserWarning)
                    pulled = torch.autograd.grad(
                        gradient, self.tensors, vectors, True, is_grads_batched=True, allow_unused=True
                    )
                return self._flat(pulled, len(vectors), vectors)
            except RuntimeError as error:
                if "vmap" not in str(error) and "batching" not in str(error):
                    raise
                self._batched = False  # some operation has no batched form: one vector at a time
        rows = [torch.autograd.grad(gradient, self.tensors, row, True, allow_unused=True) for row in vectors]
        return torch.cat([self._flat(row, 1, vectors) for row in rows])

    def _flat(self, pulled: tuple[Tensor | None, ...], k: int, like: Tensor) -> Tensor:
        parts = [
            like.new_zeros((k, tensor.numel())) if part is None else part.reshape(k, -1)
            for part, tensor in zip(pulled, self.tensors, strict=True)
        ]
        return torch.cat(parts, dim=1)


def gradient_blocks(
    engine: PerExampleGradients, prepared: Prepared, columns: Tensor, squared: bool = False
) -> Iterator[Block]:
    """Yield the blocks of a batch's per-example gradients, none of them as factors."""
    for block in engine.blocks(prepared, columns, squared=squared):
        yield block.formed() if isinstance(block, Pairs) else block


def dense_rows(
    engine: PerExampleGradients, prepared: Prepared, columns: Tensor, dtype: torch.dtype, squared: bool = False
) -> Tensor:
    """Compute the per-example gradients of a batch as dense rows.

    Args:
        engine: Made ``prepared``.
        prepared: The batch.
        columns: ``(b, C, R)`` cotangents.
        dtype: Of the rows.
        squared: Σ over columns of the squares instead; then R = 1 in the result.

    Returns:
        ``(b, R, m)``.
    """
    b, _, n_columns = columns.shape
    shape = (b, 1 if squared else n_columns, engine.parameters.n_parameters)
    rows = torch.zeros(shape, dtype=dtype, device=columns.device)
    for block in gradient_blocks(engine, prepared, columns, squared):
        values, target = block.values.to(dtype), rows[block.examples]
        width = values.shape[3]
        if isinstance(block.starts, int):
            target[:, :, block.starts : block.starts + width] += values[:, :, 0]
            continue
        assert isinstance(block.starts, Tensor), "small parameters were not to be gathered"
        at = (block.starts[:, :, None] + torch.arange(width, device=rows.device)).flatten(1)
        target.scatter_add_(2, at[:, None].expand(-1, values.shape[1], -1), values.flatten(2))
    return rows
