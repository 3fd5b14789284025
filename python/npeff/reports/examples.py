"""The examples a page shows, picked out of one pass over the data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from npeff.batches.batches import Batch, read_batch
from npeff.batches.tensor_trees import leaves
from npeff.errors import DataError
from npeff.reports.images import looks_like_image
from npeff.reports.text import words

TEXT_KEYS = ("text", "texts", "sentence", "sentences")
INPUT_KEYS = ("pixel_values", "image", "images", "inputs", "input", "x", "features", "input_ids")
LABEL_KEYS = ("labels", "label", "y", "targets", "target")

Decode = Callable[[Any], str]


@dataclass(frozen=True)
class Example:
    """One example as it will be shown: exactly one of the three is set.

    Attributes:
        image: float or integer array ``(H, W)``, ``(H, W, 1)`` or ``(H, W, 3)``.
        text: What to print.
        values: Numbers without a natural picture, ``(d,)`` or ``(t, d)``.
        ids: ``(tokens,)`` the token ids behind a text, where there are any.
    """

    image: np.ndarray[Any, Any] | None = None
    text: str | None = None
    values: np.ndarray[Any, Any] | None = None
    ids: np.ndarray[Any, Any] | None = None


def collect(
    data: Iterable[Any], wanted: Iterable[int], labels: Mapping[int, int], tokenizer: Any = None
) -> dict[int, Example]:
    """Iterate the data once and keep the wanted examples.

    Args:
        data: Batches as given to ``compute_fishers``: ``(inputs, labels)``, a dict, a tensor.
        wanted: Positions in the data.
        labels: The labels on record of wanted positions, −1 where unknown; checked against those in the data.
        tokenizer: Anything with ``decode(ids)``, for batches that hold only token ids.

    Returns:
        An example per wanted position.

    Raises:
        DataError: The data ends early, or its labels are not those on record: it is other data, or in another
            order.
    """
    return dict(stream(data, wanted, labels, tokenizer))


def stream(
    data: Iterable[Any], wanted: Iterable[int], labels: Mapping[int, int], tokenizer: Any = None
) -> Iterator[tuple[int, Example]]:
    """Iterate the data once and yield ``(position, example)`` for the wanted positions, in order.

    Takes and raises what :func:`collect` does; nothing is kept.

    Raises:
        DataError: As :func:`collect`.
    """
    missing = set(wanted)
    start = 0
    decode = _decoder(tokenizer)
    for number, batch in enumerate(data if missing else ()):
        own = read_batch(batch, torch.device("cpu"), number, True) if isinstance(batch, Batch) else None
        inputs, targets = (None, None) if own else _split(batch)
        size = own.n_examples if own else _size(inputs, targets)
        here = [position for position in range(start, start + size) if position in missing]
        for position in here:
            at = position - start
            if own:
                inputs, targets, at = *_split_one(own.take(slice(at, at + 1))), 0
            _check_label(position, targets, at, labels.get(position, -1))
            yield position, _example(inputs, at, decode)
        missing.difference_update(here)
        start += size
        if not missing:
            break
    if missing:
        raise DataError(
            f"data: has {start} examples, but the components were computed from data with at least "
            f"{max(missing) + 1}; pass the data given to compute_fishers, in the same order"
        )


def _split_one(example: Batch) -> tuple[Any, Any]:
    """Inputs and targets of one example, taken as its batch says; both with a first dimension of 1.

    Raises:
        DataError: It holds nothing to show.
    """
    inputs = example.inputs
    if not isinstance(inputs, torch.Tensor | Mapping) or (isinstance(inputs, torch.Tensor) and inputs.is_nested):
        inputs = next((leaf for leaf in leaves(inputs) if isinstance(leaf, torch.Tensor)), None)
    if inputs is None:
        raise DataError("data: an example holds neither text nor tensors to show")
    if isinstance(inputs, torch.Tensor):
        if inputs.is_nested:
            inputs = inputs.unbind()[0]
        return inputs if inputs.ndim and len(inputs) == 1 else inputs[None], example.labels
    return _split(inputs)[0], example.labels


def _split(batch: Any) -> tuple[Any, Any]:
    if isinstance(batch, Mapping):
        targets = next((batch[key] for key in LABEL_KEYS if key in batch), None)
        for key in (*TEXT_KEYS, *INPUT_KEYS):
            if key in batch and batch[key] is not None:
                if key in TEXT_KEYS and batch.get("input_ids") is not None:
                    return {"text": batch[key], "input_ids": batch["input_ids"]}, targets
                return {"input_ids": batch[key]} if key == "input_ids" else batch[key], targets
        rest = {k: v for k, v in batch.items() if k not in LABEL_KEYS and isinstance(v, torch.Tensor | np.ndarray)}
        if not rest:
            raise DataError(
                f"data: a batch is a dict with the keys {', '.join(map(str, batch)) or '(none)'}; "
                "found neither text nor tensors to show"
            )
        return next(iter(rest.values())), targets
    if isinstance(batch, list) and all(isinstance(item, str) for item in batch):
        return batch, None
    if isinstance(batch, tuple | list) and len(batch) >= 2:
        inputs = _split(batch[0])[0] if isinstance(batch[0], Mapping) else batch[0]
        targets = batch[1] if _is_labels(batch[1]) else None
        several = isinstance(inputs, tuple | list) and all(isinstance(i, torch.Tensor | np.ndarray) for i in inputs)
        if several and inputs and targets is not None and len(inputs) != len(targets):
            inputs = inputs[0]  # of several inputs to the model
        return inputs, targets
    if isinstance(batch, tuple | list) and len(batch) == 1:
        return batch[0], None
    return batch, None


def _is_labels(value: Any) -> bool:
    return isinstance(value, torch.Tensor | np.ndarray | Sequence) and not isinstance(value, str)


def _size(inputs: Any, targets: Any) -> int:
    if isinstance(inputs, Mapping):
        inputs = next(iter(inputs.values()))
    if isinstance(inputs, torch.Tensor | np.ndarray) and inputs.ndim == 0:
        raise DataError("data: a batch is a single number; expected its first dimension to be the examples")
    try:
        return len(inputs)
    except TypeError:
        pass
    if targets is not None:
        return len(targets)
    raise DataError(f"data: cannot tell how many examples a batch of type {type(inputs).__qualname__} holds")


def _check_label(position: int, targets: Any, index: int, on_record: int) -> None:
    if targets is None or on_record < 0:
        return
    given = np.asarray(_array(targets[index]))
    if given.size == 1 and np.issubdtype(given.dtype, np.integer) and int(given.item()) != on_record:
        raise DataError(
            f"data: example {position} has label {int(given.item())}, but {on_record} when the Fishers were "
            "computed; pass the same data in the same order (is a loader shuffling?)"
        )


def _example(inputs: Any, index: int, decode: Decode | None) -> Example:
    if isinstance(inputs, Mapping):
        ids = _array(inputs["input_ids"][index])
        if "text" in inputs:
            return Example(text=words(inputs["text"][index]) or str(inputs["text"][index]), ids=ids)
        return Example(ids=ids, text=decode(ids) if decode else "token ids " + " ".join(str(i) for i in ids.tolist()))
    item = inputs[index]
    text = words(item)
    if text is not None:
        return Example(text=text)
    array = _array(item)
    if decode and array.ndim == 1 and np.issubdtype(array.dtype, np.integer):
        return Example(text=decode(array), ids=array)
    if looks_like_image(array):
        return Example(image=np.moveaxis(array, 0, -1) if array.ndim == 3 and array.shape[0] in (1, 3) else array)
    if not array.size:
        return Example(text=f"(empty: shape {array.shape})")
    rows = array.reshape(-1, array.shape[-1]) if array.ndim else array.reshape(1, 1)
    return Example(values=rows[0] if len(rows) == 1 else rows)


def _array(item: Any) -> np.ndarray[Any, Any]:
    """Numbers to show; of complex ones their magnitude.

    Raises:
        DataError: The item holds no numbers.
    """
    if isinstance(item, torch.Tensor):
        item = item.detach().cpu()
        item = item.abs() if item.is_complex() else item
        narrow = item.is_floating_point() and item.dtype not in (torch.float32, torch.float64)
        return np.asarray(item.float().numpy() if narrow else item.numpy())
    array = np.asarray(item)
    array = np.abs(array) if np.iscomplexobj(array) else array
    if array.dtype == object or not (np.issubdtype(array.dtype, np.number) or array.dtype == bool):
        raise DataError(
            f"data: an example of type {type(item).__qualname__} is neither text nor numbers; cannot show it"
        )
    return array


def _decoder(tokenizer: Any) -> Decode | None:
    if tokenizer is None:
        return None

    def decode(ids: Any) -> str:
        try:
            return str(tokenizer.decode(ids.tolist(), skip_special_tokens=True))
        except TypeError:
            return str(tokenizer.decode(ids.tolist()))

    return decode
