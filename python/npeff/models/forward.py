"""Call a model with a batch and get its logits."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from contextvars import copy_context
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from npeff.batches.batches import Batch
from npeff.batches.tensor_trees import leaves, shown
from npeff.errors import DataError, ModelError, NpeffError
from npeff.models.devices import is_out_of_memory

R = TypeVar("R")

OVER_CLASSES = ("categorical", "probabilities")
"""Likelihoods of one distribution over classes."""


@contextmanager
def _one_function() -> Iterator[None]:
    """A context within which a model computes the same whether gradients are recorded or not.

    Without gradients torch's transformer layers take a fast path of their own, in which padded positions become zero.
    """
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


class ThreadSettings:
    """The settings that torch and Python keep per thread, under which another thread computes what this one does.

    They are context variables, torch's default device, and autocast on the type of ``device``.
    """

    def __init__(self, device: torch.device) -> None:
        self._thread, self._context = threading.get_ident(), copy_context()
        self._default, self._type = torch.get_default_device(), device.type
        self._autocast = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None

    def run(self, work: Callable[[], R]) -> R:
        """Call ``work`` under these settings; on their own thread, as it is."""
        return work() if threading.get_ident() == self._thread else self._context.copy().run(self._within, work)

    def _within(self, work: Callable[[], R]) -> R:
        with ExitStack() as stack:
            if self._default != torch.get_default_device():
                stack.enter_context(self._default)
            if self._autocast is not None:
                stack.enter_context(torch.autocast(self._type, dtype=self._autocast))
            return work()


def _run(model: nn.Module, inputs: Any, n_logits: int | None) -> Any:
    if isinstance(inputs, Mapping):
        inputs = _taken(model, inputs)
        return model(**inputs) if n_logits is None else model(**inputs, logits_to_keep=n_logits)
    several = isinstance(inputs, (tuple, list)) and not isinstance(inputs, PackedSequence)
    return model(*inputs) if several else model(inputs)


def _taken(model: nn.Module, inputs: Mapping[str, Any]) -> Mapping[str, Any]:
    """Leave out texts that the model has no argument for, which would fail: a report prints them."""
    if not (texts := _texts_in(inputs)):
        return inputs
    try:
        arguments = inspect.signature(model.forward).parameters
    except (TypeError, ValueError):  # a scripted model may have no signature
        return inputs
    if any(argument.kind is argument.VAR_KEYWORD for argument in arguments.values()):
        return inputs
    return {name: value for name, value in inputs.items() if name not in texts or name in arguments}


def _texts_in(inputs: Mapping[str, Any]) -> list[str]:
    """Name the entries that are texts: a string, or strings alone."""
    several = (list, tuple, np.ndarray)
    return [
        name
        for name, value in inputs.items()
        if isinstance(value, str)
        or (isinstance(value, several) and len(value) > 0 and all(isinstance(item, str) for item in value))
    ]


_KEEPS_LAST: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()
"""Of models whose ``logits_to_keep`` was tried, whether it keeps the last positions."""


def _logits_wanted(model: nn.Module, batch: Batch) -> int | None:
    """Count the positions from the first place on, for language models that make logits of the last ones alone.

    None where all logits are made: the first position is a place, the model has no argument for it, or keeps others.
    """
    if batch.places is None or not isinstance(batch.content, Mapping) or "logits_to_keep" in batch.content:
        return None
    base = getattr(model, "get_base_model", None)  # within adapters
    called = base() if callable(base) else model
    if "logits_to_keep" not in inspect.signature(called.forward).parameters:
        return None
    try:
        first = int(batch.places[:, 1].min())
    except RuntimeError:  # within vmap places have no values
        return None
    if not first:
        return None
    wanted = batch.n_positions - first
    if called not in _KEEPS_LAST:
        _KEEPS_LAST[called] = _keeps_last(model, batch, wanted)
    return wanted if _KEEPS_LAST[called] else None


@torch.no_grad()
def _keeps_last(model: nn.Module, batch: Batch, n: int) -> bool:
    """Whether ``logits_to_keep=n`` keeps the last n positions: those of n + 1 without the first.

    One sequence is tried. The logits count as others where they are farther from these than half of what the logits of
    neighbouring positions differ by.
    """
    one = batch.take(batch.one_each()[:1]) if batch.sliceable else batch
    fewer, more = (_logits_in(_run(model, one.fresh().inputs, keep)) for keep in (n, n + 1))
    if not isinstance(fewer, Tensor) or not isinstance(more, Tensor) or fewer.dim() != 3 or more.dim() != 3:
        return True  # refused once all examples are there
    if (fewer.shape[1], more.shape[1]) != (n, n + 1):
        return True
    last, neighbours = more[:, 1:], float((more[:, 1:] - more[:, :-1]).abs().max())
    rounding = 8 * torch.finfo(more.dtype).eps * float(more.abs().max()) if more.is_floating_point() else 0.0
    return not float((fewer - last).abs().max()) > max(neighbours / 2, rounding)


def _logits_in(output: Any) -> Any:
    """What stands for the logits in a model's output."""
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", output)
    if isinstance(logits, Mapping):
        logits = logits.get("logits")
    return logits[0] if isinstance(logits, (tuple, list)) and len(logits) == 1 else logits


def _failure(error: Exception, model: nn.Module, forward: object, batch: Batch) -> str:
    what, given = ("model", batch.inputs) if forward is None else ("forward", batch.content)
    tensors = ", ".join(shown(leaf) for leaf in [leaf for leaf in leaves(given) if isinstance(leaf, Tensor)][:8])
    remedy = "Check that the data yields batches of what the model takes, or pass forward=callable(model, batch)"
    if forward is not None:
        remedy = "It is called with the model and a batch as the data yields it"
    if isinstance(batch.content, Mapping) and "label" in batch.content and "labels" not in batch.content:
        remedy += '; labels are taken from the key "labels": rename "label"'
    if forward is None and isinstance(given, Mapping) and (texts := _texts_in(_taken(model, given))):
        entries = ("entry " if len(texts) == 1 else "entries ") + ", ".join(map(repr, texts))
        remedy += f"; the text {entries} of the batch went to the model too: forward= chooses its inputs"
    if batch.part_of:
        remedy = f"It was called with {batch.part_of}"
    cause = f"{type(error).__name__}: {error}"
    return f"{what}: failed on a batch with inputs {tensors or 'without tensors'}: {cause}. {remedy}"


def call_model(
    model: nn.Module, forward: Callable[[Any, Any], Any] | None, batch: Batch, likelihood: str = "categorical"
) -> Tensor:
    """Call the model; the batch stays as it is even where the model changes its inputs in place.

    Args:
        model: The model.
        forward: ``forward(model, batch) -> logits``; None calls the model with the inputs.
        batch: The batch.
        likelihood: What the outputs mean; the logits of ``"probabilities"`` are their logarithms.

    Returns:
        ``(n_examples, C)`` with its graph; a ``(b,)`` output becomes ``(b, 1)``. Of logits ``(b, T, C)`` those at the
        batch's places; of all outputs those that ``batch.outputs`` keeps.

    Raises:
        DataError: The model gave something else.
        ModelError: The model, or ``forward``, raised an error.
    """
    source = "the model" if forward is None else "forward="
    given, n_logits = batch.fresh(), None
    try:
        with _one_function():
            n_logits = None if forward is not None else _logits_wanted(model, batch)
            output = _run(model, given.inputs, n_logits) if forward is None else forward(model, given.content)
    except Exception as error:
        # Inference tensors have an explanation of their own, see PerExampleGradients.recording.
        explained = isinstance(error, RuntimeError) and "inference tensor" in str(error).lower()
        if explained or isinstance(error, (NpeffError, MemoryError)) or is_out_of_memory(error):
            raise
        raise ModelError(_failure(error, model, forward, batch)) from error
    logits = _logits_in(output)
    if not isinstance(logits, Tensor):
        head = (
            "load it with its head, as AutoModelForCausalLM does, or " if hasattr(output, "last_hidden_state") else ""
        )
        raise DataError(
            f"logits: expected a tensor (or an output with .logits) from {source}, got "
            f"{type(output).__name__}; {head}pass forward=callable(model, batch) -> logits"
        )
    if batch.places is None and logits.dim() == 1 and len(logits) == batch.n_examples:
        logits = logits[:, None]
    # A model that takes logits_to_keep may ignore it, and give all.
    n_positions = batch.n_positions if n_logits is None or logits.shape[1:2] == (batch.n_positions,) else n_logits
    _check_shape(logits, batch, n_positions, source)
    if not logits.is_floating_point():
        raise DataError(f"logits: expected floating point numbers from {source}, got {logits.dtype}")
    if likelihood == "probabilities":
        logits = log_probabilities(logits)
    if batch.outputs is None and batch.places is None:
        return logits
    if batch.outputs is not None and int(batch.outputs.max()) >= logits.shape[-1]:
        raise DataError(
            f"outputs: the batch keeps output {int(batch.outputs.max())}, but {source} gives {logits.shape[-1]}; "
            "expected indices of the model's outputs"
        )
    if batch.places is None:
        return logits[:, batch.outputs]
    sequences, positions = batch.places[:, 0], batch.places[:, 1] - (batch.n_positions - n_positions)
    if batch.outputs is None:
        return logits[sequences, positions]
    return logits[sequences[:, None], positions[:, None], batch.outputs]


def _check_shape(logits: Tensor, batch: Batch, n_positions: int, source: str) -> None:
    """Refuse logits that are not of the shape that the batch's examples call for.

    Raises:
        DataError: With what to do.
    """
    got = f"got {tuple(logits.shape)} from {source}"
    if batch.places is None:
        if logits.dim() == 2 and len(logits) == batch.n_examples and logits.shape[1]:
            return
        several = logits.dim() == 3 and len(logits) == batch.n_examples
        remedy = (
            f"for examples at positions, give integer labels of shape {tuple(logits.shape[:2])}, −100 where there is "
            "no example"
            + ("" if batch.labels is None else f" (they have {tuple(batch.labels.shape)})")
            + "; labels of zeros and ones alone need npeff.Batch(content, places=True). Or choose"
            if several
            else "choose"
        )
        raise DataError(
            f"logits: expected shape ({batch.n_examples}, C) for a batch of {batch.n_examples} examples, {got}; "
            f"{remedy} or flatten outputs in forward=callable(model, batch) -> logits"
            + (f", or, {batch.how_counted()}" if logits.dim() == 2 and len(logits) != batch.n_examples else "")
        )
    shape = (batch.n_sequences, n_positions)
    if logits.dim() == 3 and logits.shape[:2] == shape and logits.shape[2]:
        return
    expected = f"logits: expected shape ({shape[0]}, {shape[1]}, C), as the labels have {shape}, {got}; "
    if logits.dim() == 2 and len(logits) == batch.n_sequences:
        raise DataError(
            f"{expected}give one label per sequence, leave the labels out, or yield "
            "npeff.Batch(content, places=False) where they are something else"
        )
    raise DataError(
        f"{expected}give a label for every position that has logits, −100 where there is no example, or choose "
        "the logits of the labels' positions in forward=callable(model, batch) -> logits"
    )


def log_probabilities(outputs: Tensor) -> Tensor:
    """Return logits whose softmax gives the probabilities: their logarithms, finite where a probability is zero.

    With z = log p the Fisher of a categorical output is that of its logits: ``J_pᵀ diag(1/p) J_p = J_zᵀ (diag p − ppᵀ)
    J_z``, since Σp = 1. What underflowed to zero has no gradient and no share in it.
    """
    wide = outputs.to(torch.promote_types(outputs.dtype, torch.float32))
    return wide.clamp_min(torch.finfo(wide.dtype).tiny).log()
