"""Batches as they come from the user's data: inputs, labels, slices, digests."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from npeff.errors import ArgumentError, DataError, ModelError, NpeffError

_REMEDY = "pass a DataLoader, or a list of batches such as [(inputs, labels)]"


@dataclass(frozen=True)
class Batch:
    """One batch, its tensors on the model's device.

    Attributes:
        content: What the data yielded, numpy arrays turned into tensors.
        labels: What stands for the labels in it, if anything.
        n_examples: Number of examples.
    """

    content: Any
    labels: Tensor | None
    n_examples: int

    @property
    def inputs(self) -> Any:
        """What the model is called with: the content without its labels."""
        if isinstance(self.content, Mapping):
            return {key: value for key, value in self.content.items() if key != "labels"}
        return self.content[0] if isinstance(self.content, (tuple, list)) else self.content

    def take(self, examples: slice | Tensor) -> Batch:
        """Some of the examples, a slice or positions: cut from every tensor whose first dimension is the batch."""

        def cut(tensor: Tensor) -> Tensor:
            return tensor[examples] if _has_examples(tensor, self.n_examples) else tensor

        labels = None if self.labels is None else self.labels[examples]
        count = len(range(self.n_examples)[examples]) if isinstance(examples, slice) else len(examples)
        return Batch(map_tensors(cut, self.content), labels, count)

    @property
    def sliceable(self) -> bool:
        """Whether some tensor of the inputs has the examples as its first dimension."""
        return any(
            _has_examples(tensor, self.n_examples) for tensor in leaves(self.inputs) if isinstance(tensor, Tensor)
        )


def _has_examples(tensor: Tensor, n_examples: int) -> bool:
    return tensor.dim() > 0 and tensor.shape[0] == n_examples


def map_tensors(function: Callable[[Tensor], Tensor], tree: Any) -> Any:
    """Apply a function to every tensor in nested tuples, lists and mappings.

    Numpy arrays count as tensors.
    """
    if isinstance(tree, np.ndarray) and tree.dtype.kind in "biufc":
        tree = torch.from_numpy(np.ascontiguousarray(tree))
    if isinstance(tree, Tensor):
        return function(tree)
    if isinstance(tree, Mapping):
        mapped = {key: map_tensors(function, value) for key, value in tree.items()}
        try:
            return type(tree)(mapped)  # type: ignore[call-arg]
        except TypeError:
            return mapped
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*(map_tensors(function, item) for item in tree))
    if isinstance(tree, (tuple, list)):
        return type(tree)(map_tensors(function, item) for item in tree)
    return tree


def leaves(tree: Any) -> Iterator[Any]:
    """Everything in nested tuples, lists and mappings, in order, each key before its value."""
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            yield key
            yield from leaves(value)
    elif isinstance(tree, (tuple, list)):
        for item in tree:
            yield from leaves(item)
    else:
        yield tree


def check_data(data: Any) -> Iterable[Any]:
    """Refuse what is not an iterable of batches.

    Raises:
        ArgumentError: With the way to make batches of it.
    """
    if isinstance(data, (Tensor, np.ndarray, Mapping, str, bytes)):
        raise ArgumentError(f"data: expected an iterable of batches, got one {type(data).__name__}; {_REMEDY}")
    if (
        isinstance(data, tuple) and len(data) == 2 and all(isinstance(item, (Tensor, np.ndarray)) for item in data)
    ) and len(data[0]) == len(data[1]):
        raise ArgumentError(
            f"data: got a tuple of two arrays, which is one batch, not an iterable of batches; {_REMEDY}"
        )
    if isinstance(data, torch.utils.data.Dataset) and hasattr(data, "__getitem__"):
        raise ArgumentError(
            f"data: {type(data).__name__} yields single examples; wrap it: "
            "torch.utils.data.DataLoader(data, batch_size=64)"
        )
    if not isinstance(data, Iterable):
        raise ArgumentError(f"data: expected an iterable of batches, got {type(data).__name__}; {_REMEDY}")
    return data


def read_batch(raw: Any, device: torch.device, number: int, any_layout: bool) -> Batch:
    """Make a batch of what the data yielded.

    Args:
        raw: ``(inputs, labels)``, ``(inputs,)``, a mapping with or without ``"labels"``, or a tensor.
        device: Where the model is.
        number: The batch's position in the data, for messages.
        any_layout: A ``forward=`` of the user's will make sense of it: any structure with a tensor will do.

    Returns:
        The batch, on the device.

    Raises:
        DataError: It has no tensor, no examples, or a structure that the model cannot be called with.
    """

    def move(tensor: Tensor) -> Tensor:
        tensor = tensor.detach()
        return (tensor.clone() if tensor.is_inference() else tensor).to(device, non_blocking=True)

    with torch.inference_mode(False):
        content = map_tensors(move, raw)
    labels: Any = None
    if isinstance(content, Mapping):
        labels = content.get("labels")
    elif isinstance(content, (tuple, list)):
        if len(content) not in (1, 2) and not any_layout:
            raise DataError(
                f"data: batch {number} has {len(content)} items; expected (inputs, labels), or pass "
                "forward=callable(model, batch) -> logits"
            )
        labels = content[1] if len(content) == 2 else None
    elif not isinstance(content, Tensor) and not any_layout:
        raise DataError(
            f"data: batch {number} is a {type(content).__name__}; expected (inputs, labels), a mapping or a "
            "tensor, or pass forward="
        )
    if isinstance(labels, int) or (isinstance(labels, Tensor) and labels.dim() == 0):
        raise DataError(
            f"data: batch {number} has a single label, so it is one example; wrap the data in "
            "torch.utils.data.DataLoader(data, batch_size=64)"
        )
    if isinstance(labels, (list, tuple, np.ndarray)):
        try:
            labels = torch.as_tensor(labels, device=device)
        except (ValueError, TypeError, RuntimeError, OverflowError) as error:
            raise DataError(
                f"labels: expected integers; encode strings as class numbers (batch {number}: {error})"
            ) from error
    if not isinstance(labels, Tensor):
        labels = None
    return Batch(content, labels, _count(content, labels, number))


def _count(content: Any, labels: Tensor | None, number: int) -> int:
    inputs = content[0] if isinstance(content, (tuple, list)) and labels is not None else content
    if isinstance(inputs, Mapping):
        inputs = {key: value for key, value in inputs.items() if key != "labels"}
    sizes = [len(tensor) for tensor in leaves(inputs) if isinstance(tensor, Tensor) and tensor.dim()]
    if labels is not None:
        if sizes and len(labels) not in sizes:
            raise DataError(f"data: batch {number} has {sizes[0]} inputs and {len(labels)} labels")
        sizes = [len(labels)]
    if not sizes:
        raise DataError(f"data: batch {number} has no tensor whose first dimension could be the examples")
    if sizes[0] == 0:
        raise DataError(f"data: batch {number} is empty")
    return sizes[0]


def examples_at(data: Iterable[Any], positions: Sequence[int], device: torch.device | None = None) -> list[Batch]:
    """The examples at some positions of the data, each as a batch of one, in the order asked for.

    Args:
        data: Batches, read until all are found.
        positions: From 0 over all batches.
        device: Where they go; the CPU by default.

    Raises:
        DataError: The data ends before, or a batch cannot be cut.
    """
    wanted = [int(i) for i in positions]
    found: dict[int, Batch] = {}
    start = 0
    for number, raw in enumerate(check_data(data)):
        if len(found) == len(set(wanted)):
            break
        batch = read_batch(raw, device or torch.device("cpu"), number, True)
        for i in set(wanted):
            if start <= i < start + batch.n_examples:
                if not batch.sliceable and batch.n_examples > 1:
                    raise DataError(f"data: batch {number} cannot be cut into examples; pass batches of one example")
                found[i] = batch.take(slice(i - start, i - start + 1))
        start += batch.n_examples
    if missing := [i for i in wanted if i not in found]:
        raise DataError(
            f"data: it has {start} examples, and example {max(missing)} is asked for (the first one is 0); pass the "
            "data that the examples were counted in"
        )
    return [found[i] for i in wanted]


def batch_digest(batch: Batch) -> str:
    """blake2b of a batch's structure and bytes, the same wherever the tensors live."""
    digest = hashlib.blake2b(digest_size=16)
    for leaf in leaves(batch.content):
        if isinstance(leaf, Tensor):
            update_with_tensor(digest, leaf)
        elif isinstance(leaf, np.ndarray) and leaf.dtype.kind in "SU":
            digest.update(repr(leaf.tolist()).encode())
        elif isinstance(leaf, (str, bytes, int, float, bool, type(None))):
            digest.update(repr(leaf).encode())
    return digest.hexdigest()


def update_with_tensor(digest: hashlib.blake2b, tensor: Tensor) -> None:
    """Add a tensor's shape, dtype and bytes to a digest."""
    tensor = tensor.detach()
    if tensor.layout != torch.strided:
        tensor = tensor.to_dense()
    digest.update(f"{tuple(tensor.shape)}{tensor.dtype}".encode())
    if tensor.numel():
        raw = tensor.cpu().contiguous().reshape(-1).view(torch.uint8)
        digest.update(raw.numpy().data)


def _run(model: nn.Module, inputs: Any) -> Any:
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, (tuple, list)) else model(inputs)


def _failure(error: Exception, forward: object, batch: Batch) -> str:
    what, given = ("model", batch.inputs) if forward is None else ("forward", batch.content)
    tensors = [leaf for leaf in leaves(given) if isinstance(leaf, Tensor)]
    shown = ", ".join(f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}" for tensor in tensors[:8])
    remedy = "Check that the data yields batches of what the model takes, or pass forward=callable(model, batch)"
    if forward is not None:
        remedy = "It is called with the model and a batch as the data yields it"
    if isinstance(batch.content, Mapping) and "label" in batch.content and "labels" not in batch.content:
        remedy += '; labels are taken from the key "labels": rename "label"'
    return (
        f"{what}: failed on a batch with inputs {shown or 'without tensors'}: {type(error).__name__}: {error}. {remedy}"
    )


def call_model(model: nn.Module, forward: Callable[[Any, Any], Any] | None, batch: Batch) -> Tensor:
    """The model's logits for a batch.

    Returns:
        ``(b, C)`` with its graph; a ``(b,)`` output becomes ``(b, 1)``.

    Raises:
        DataError: The model gave something else.
        ModelError: The model, or ``forward``, raised an error.
    """
    source = "the model" if forward is None else "forward="
    try:
        output = _run(model, batch.inputs) if forward is None else forward(model, batch.content)
    except Exception as error:
        # Inference tensors have an explanation of their own, see PerExampleGradients.recording.
        explained = isinstance(error, RuntimeError) and "inference tensor" in str(error).lower()
        if explained or isinstance(error, (NpeffError, MemoryError, torch.OutOfMemoryError)):
            raise
        raise ModelError(_failure(error, forward, batch)) from error
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", output)
    if isinstance(logits, Mapping):
        logits = logits.get("logits")
    if isinstance(logits, (tuple, list)) and len(logits) == 1:
        logits = logits[0]
    if not isinstance(logits, Tensor):
        raise DataError(
            f"logits: expected a tensor (or an output with .logits) from {source}, got "
            f"{type(output).__name__}; pass forward=callable(model, batch) -> logits"
        )
    if logits.dim() == 1 and len(logits) == batch.n_examples:
        logits = logits[:, None]
    if logits.dim() != 2 or len(logits) != batch.n_examples or logits.shape[1] == 0:
        raise DataError(
            f"logits: expected shape ({batch.n_examples}, C) for a batch of {batch.n_examples} examples, "
            f"got {tuple(logits.shape)} from {source}; "
            "choose or flatten outputs in forward=callable(model, batch) -> logits"
        )
    if not logits.is_floating_point():
        raise DataError(f"logits: expected floating point numbers from {source}, got {logits.dtype}")
    return logits
