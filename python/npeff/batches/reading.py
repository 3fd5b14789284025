"""Read the user's data: batches in a fixed order, because examples are identified by their position.

Which dimension of a batch is the examples' is guessed from sizes; :class:`npeff.batches.batches.Batch` lets the data
say it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, RandomSampler, SubsetRandomSampler, WeightedRandomSampler

from npeff.batches.batches import Batch, batch_digest, same
from npeff.batches.places import IGNORED, check_padding, make_places
from npeff.batches.tensor_trees import OWN_BATCH, Path, inputs_in, labels_in, length, named, onto, parts
from npeff.errors import ArgumentError, DataError

_REMEDY = "pass a DataLoader, or a list of batches such as [(inputs, labels)]"

_FIXED = (
    "pass shuffle=False; for a random order that stays, draw it once: torch.utils.data.Subset(dataset, "
    "torch.randperm(len(dataset)).tolist()), or data = list(loader)"
)


def check_data(data: Any) -> Iterable[Any]:
    """Refuse data that are not an iterable of batches.

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
    if not isinstance(data, Iterable) or isinstance(data, set | frozenset):  # sets have no order that stays
        raise ArgumentError(f"data: expected an iterable of batches, got {type(data).__name__}; {_REMEDY}")
    return data


def read_batches(
    data: Iterable[Any], device: torch.device, any_layout: bool, places: bool | None = None
) -> Iterator[Batch]:
    """Iterate over the batches of the data as :func:`read_batch` makes it, without those that hold no place.

    A tensor whose first dimension was not the number of examples in one batch is cut in none that follows: in a batch
    where the two agree, that is chance. All batches keep the same outputs, so that a class is the same in all.

    Args:
        data: The data.
        device: Where the model is.
        any_layout: As for :func:`read_batch`.
        places: As for :func:`read_batch`.

    Raises:
        ArgumentError: The data is not an iterable of batches.
        DataError: No batch holds a place, or a batch keeps other outputs than the first one.
    """
    whole: frozenset[Path] = frozenset()
    outputs: Tensor | None = None
    number, n_sequences, without, warned = -1, 0, 0, False
    for number, raw in enumerate(check_data(data)):
        batch = read_batch(raw, device, number, any_layout, places, whole)
        if number == 0:
            outputs = batch.outputs
        elif not same(batch.outputs, outputs):
            kept, first = ("all" if some is None else str(some.tolist()) for some in (batch.outputs, outputs))
            raise DataError(
                f"outputs: batch {number} keeps {kept} and batch 0 keeps {first}; expected the same outputs in the "
                "same order in all batches, as labels and logits are indices into them; work on the others on their own"
            )
        if batch.user_take is None:
            whole |= {path for part, path in parts(batch.content) if length(part) != batch.n_sequences}
            batch.never_cut = whole
        if batch.places is not None:
            batch.places_in_data = batch.places + torch.tensor([n_sequences, 0], device=device)
        n_sequences += batch.n_sequences
        if not batch.n_examples:
            without += 1
            continue
        if not warned and _unshifted(batch):
            warned = True
            warnings.warn(
                f"labels: in batch {number} they are the input tokens at all of its {batch.n_examples} places, so that "
                "every position is to predict its own token. labels[s, t] is what logits[s, t] predicts, without "
                f"any shift: of a causal model, give labels[s, t] = input_ids[s, t + 1], and {IGNORED} at the last "
                "position; npeff.language.Places does so",
                stacklevel=2,
            )
        yield batch
    if without and without == number + 1:
        raise DataError(
            f"labels: no batch has a place: all labels are {IGNORED}; expected a label ≥ 0, or −1 where it is unknown, "
            "at every position that is an example"
        )


def read_batch(
    raw: Any,
    device: torch.device,
    number: int,
    any_layout: bool,
    places: bool | None = None,
    whole: frozenset[Path] = frozenset(),
) -> Batch:
    """Make a batch of what the data yielded.

    Args:
        raw: A :class:`Batch`, ``(inputs, labels)``, ``(inputs,)``, a mapping with or without ``"labels"``, or a tensor.
        device: Where the model is.
        number: The batch's position in the data, for messages.
        any_layout: Take any structure with a tensor, because the user's ``forward=`` will understand it.
        places: Integer labels ``(b, T)`` make places: True where the likelihood is one of classes, False where it is
            not; None where it is not known: unless only zeros and ones fill them, as they fill masks and answers to
            many questions.
        whole: Where the tensors lie that do not have the examples as their first dimension, whatever their size.

    Returns:
        The batch, on the device; without examples where all labels ``(b, T)`` are −100.

    Raises:
        DataError: It has no tensor, no examples, or a structure that the model cannot be called with; or its labels
            are not of the form that ``Batch(…, places=True)`` says.
    """
    given = raw if isinstance(raw, Batch) else None
    content = onto(device, raw if given is None else given.content)
    any_layout = any_layout or given is not None
    if isinstance(content, (tuple, list)):
        if len(content) not in (1, 2) and not any_layout:
            raise DataError(
                f"data: batch {number} has {len(content)} items; expected (inputs, labels), or pass "
                f"forward=callable(model, batch) -> logits; {OWN_BATCH}"
            )
    elif not isinstance(content, (Tensor, Mapping)) and not any_layout:
        raise DataError(
            f"data: batch {number} is a {type(content).__name__}; expected (inputs, labels), a mapping or a "
            f"tensor, or pass forward=; {OWN_BATCH}"
        )
    labels = labels_in(content, device, f"batch {number}")
    if given is None or not given.n_sequences:
        n_sequences = _count(content, labels, number, given is not None and given.cut_by_user)
    else:
        n_sequences = given.n_sequences
        labels = labels if labels is not None and len(labels) == n_sequences else None
    batch = Batch(content, n_sequences, None if given is None else given.user_take)
    batch.labels, batch.device, batch.never_cut = labels, device, whole
    if given is None or not given.n_sequences:
        batch.counted_by = "labels" if labels is not None else "first tensor"
    wanted = None if given is None else given.places_wanted
    if given is not None and given.outputs is not None:
        batch.outputs = given.outputs.to(device)
    unsure = any_layout and given is None and isinstance(content, tuple | list)
    said = False if wanted is None and places is False else wanted
    if make_places(labels, said, places is True and not unsure, number):
        assert labels is not None
        batch.hold_places(labels, (labels != IGNORED).nonzero())
        assert batch.places is not None
        batch.places_in_data, batch.places_wanted = batch.places, True
        check_padding(content, batch.places, number)
    return batch


def _unshifted(batch: Batch) -> bool:
    """Whether the labels of all places, more than one, are the input tokens at these places."""
    if batch.places is None or batch.labels is None or len(batch.places) < 2:
        return False
    sequences, positions = batch.places.unbind(1)
    return any(
        torch.equal(part[sequences, positions].to(torch.int64), batch.labels)
        for part, path in batch.input_parts()
        if isinstance(part, Tensor) and part.dim() == 2 and part.dtype in (torch.int32, torch.int64)
        if path != (".labels",) and len(part) == batch.n_sequences and part.shape[1] > int(positions.max())
    )


def _count(content: Any, labels: Tensor | None, number: int, cut_by_user: bool) -> int:
    within, path = content, ()
    if isinstance(content, Mapping):
        within = inputs_in(content)
    elif isinstance(content, (tuple, list)) and labels is not None:
        within, path = content[0], ("[0]",)  # type: ignore[assignment]
    found = parts(within, path)
    sizes = [length(part) for part, _ in found if isinstance(part, Tensor) and part.dim()]
    if labels is not None:
        if sizes and not cut_by_user and len(labels) not in [length(part) for part, _ in found]:
            raise DataError(
                f"data: batch {number} has {sizes[0]} inputs and {len(labels)} labels ({named(content)}); {OWN_BATCH}"
            )
        sizes = [len(labels)]
    if not sizes:
        raise DataError(f"data: batch {number} has no tensor whose first dimension could be the examples; {OWN_BATCH}")
    if sizes[0] == 0:
        raise DataError(f"data: batch {number} is empty")
    return sizes[0]


def examples_at(
    data: Iterable[Any],
    positions: Sequence[int],
    device: torch.device | None = None,
    places: bool | None = None,
) -> list[Batch]:
    """Find the examples at some positions of the data, each as a batch of one, in the order asked for.

    Args:
        data: Batches, read until all are found.
        positions: From 0 over all batches.
        device: Where they go; the CPU by default.
        places: As for :func:`read_batch`.

    Raises:
        DataError: The data ends before, or a batch cannot be cut.
    """
    wanted = [int(i) for i in positions]
    found: dict[int, Batch] = {}
    start = 0
    for number, batch in enumerate(read_batches(data, device or torch.device("cpu"), True, places)):
        for i in set(wanted):
            if start <= i < start + batch.n_examples:
                if not batch.sliceable and batch.n_examples > 1:
                    raise DataError(f"data: batch {number} cannot be cut into examples; {OWN_BATCH}")
                found[i] = batch.take(slice(i - start, i - start + 1))
        start += batch.n_examples
        if len(found) == len(set(wanted)):
            break
    if missing := [i for i in wanted if i not in found]:
        raise DataError(
            f"data: it has {start} examples, and example {max(missing)} is asked for (the first one is 0); pass the "
            "data that the examples were counted in"
        )
    return [found[i] for i in wanted]


def looks_like_image(shape: Sequence[int]) -> bool:
    """Tell whether an array of that shape is plausibly a picture: ``(H, W)``, or 1 or 3 channels of it, first or last.

    Both sides must be at least 4 and no more than 16 times apart, so that ``(tokens, features)`` matrices
    rarely qualify.
    """
    if len(shape) == 3 and {1, 3} & {shape[0], shape[2]}:
        height, width = shape[1:] if shape[0] in (1, 3) else shape[:2]
    elif len(shape) == 2:
        height, width = shape
    else:
        return False
    return min(height, width) >= 4 and max(height, width) <= 16 * min(height, width)


# ---- the order of the data -----------------------------------------------------------------------------------------


class FixedOrder:
    """Refuses data that gives other batches each time it is iterated.

    A sampler that shuffles shows it. Other data is asked for its first batch twice, unless it is a list, or can be
    iterated only once.

    Args:
        data: The data.
        batches: Its batches, read anew at every call.

    Raises:
        ArgumentError: A DataLoader shuffles.
    """

    def __init__(self, data: Iterable[Any], batches: Callable[[], Iterator[Batch]]) -> None:
        check_sampler(data)
        self._first: str | None = None
        if not isinstance(data, list | tuple) and not hasattr(data, "__next__"):
            self._first = next((batch_digest(batch) for batch in batches()), None)

    def check(self, first: Batch) -> None:
        """Check that the first batch of the pass is the one seen before.

        Raises:
            DataError: The batch is another one.
        """
        if self._first is not None and batch_digest(first) != self._first:
            raise DataError(
                "data: its first batch is another one each time it is iterated, and examples are known by their "
                f"position. If it shuffles, {_FIXED}; if it changes examples at random, turn that off; if it can be "
                "read only once, pass iter(data)"
            )


def _within(data: Any) -> Iterator[Any]:
    """The data, what it wraps, and the samplers of all of these."""
    waiting: list[Any] = [data]
    seen: set[int] = set()
    while waiting:
        found = waiting.pop()
        if found is None or id(found) in seen or len(seen) > 50:
            continue
        seen.add(id(found))
        yield found
        for attribute in ("sampler", "batch_sampler", "base_dataloader", "dataloader", "iterable", "data", "_data"):
            waiting.append(getattr(found, attribute, None))


def check_sampler(data: Any, name: str = "data") -> None:
    """Refuse a DataLoader, or a wrapper of one, whose sampler shuffles.

    Args:
        data: The data.
        name: The argument's name, for the message.

    Raises:
        ArgumentError: It does.
    """
    kinds = RandomSampler | SubsetRandomSampler | WeightedRandomSampler
    for found in _within(data):
        if isinstance(found, kinds):
            raise ArgumentError(
                f"{name}: its {type(found).__name__} gives every pass over it another order, and examples are known by "
                f"their position; {_FIXED}"
            )


class Repeats:
    """Notices that every worker of a DataLoader yields the whole of an IterableDataset.

    Args:
        data: The data.
    """

    def __init__(self, data: Iterable[Any]) -> None:
        loaders = [found for found in _within(data) if isinstance(found, DataLoader)]
        self._workers = max((x.num_workers for x in loaders if isinstance(x.dataset, IterableDataset)), default=0)
        self._round: list[str] = []
        self._equal = 0

    def add(self, digest: str) -> None:
        """Note the next batch; workers take turns.

        Raises:
            DataError: All workers gave the same batches, twice.
        """
        if self._workers < 2 or self._equal < 0:
            return
        self._round.append(digest)
        if len(self._round) == self._workers:
            self._equal = self._equal + 1 if len(set(self._round)) == 1 else -1
            self._round = []
            if self._equal == 2:
                self._refuse()

    def end(self) -> None:
        """Note that there are no more batches.

        Raises:
            DataError: All workers gave the same.
        """
        if self._equal > 0 and not self._round:
            self._refuse()

    def _refuse(self) -> None:
        raise DataError(
            f"data: every one of the {self._workers} workers of the DataLoader yields the same batches, so that each "
            "example comes several times; let the IterableDataset yield a share of the examples in each worker "
            "(torch.utils.data.get_worker_info()), or pass num_workers=0"
        )
