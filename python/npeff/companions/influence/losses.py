"""Losses per example: how they are called and checked, on data that can be read again, and the named ones."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from npeff.batches.batches import Batch
from npeff.batches.reading import check_data, check_sampler, read_batches
from npeff.batches.tensor_trees import leaves
from npeff.errors import ArgumentError, DataError, ModelError, NpeffError
from npeff.models.devices import memory_explained

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
    """Compute the losses of a batch, ``(b,)``, with their graph; with ``whole`` also one number for the batch.

    Raises:
        DataError: It gave something else.
        ModelError: It raised an error.
        OutOfMemoryError: There is too little memory for the batch.
    """
    try:
        with memory_explained():
            value = loss(model, batch.fresh().content)
    except Exception as error:
        # Inference tensors have an explanation of their own, see PerExampleGradients.recording.
        explained = isinstance(error, RuntimeError) and "inference tensor" in str(error).lower()
        if explained or isinstance(error, (NpeffError, MemoryError)):
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
    """Compute a test loss on all batches, float64: per example, or per batch where the loss is of the whole batch.

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
