"""Read batches from the user's data: inputs, labels, examples, digests.

Which dimension of a batch is the examples' is guessed from sizes; :class:`Batch` lets the data say it.
"""

from __future__ import annotations

import copy
import hashlib
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from npeff.batches.tensor_trees import (
    Path,
    called,
    leaves,
    length,
    map_tensors,
    named,
    onto,
    parts,
    rebuilt,
    rows_at,
    shown,
    update_with_tensor,
    update_with_tree,
    with_entries,
)
from npeff.errors import ArgumentError, DataError, check_integer

_REMEDY = "pass a DataLoader, or a list of batches such as [(inputs, labels)]"

OWN_BATCH = (
    "if its examples lie otherwise, yield npeff.Batch(content, n_examples, take), where take(content, positions) gives "
    "the content of some of them"
)
"""The way out where the examples of a batch cannot be guessed from sizes."""

IGNORED = -100
"""The label of a position that is no example."""

_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)

Take = Callable[[Any, list[int]], Any]


class Batch:
    """One batch, and which of its parts belong to which example.

    Data may yield anything whose tensors have the examples as their first dimension. For all else (graphs, ragged
    lists, offsets, square matrices) let it yield ``Batch(content, n_examples, take)``: every function that cuts batches
    into examples then calls ``take``. A :class:`torch.utils.data.DataLoader` makes such batches in its ``collate_fn``.

    **Places.** Where a model gives logits ``(b, T, C)`` for sequences, and the labels are integers ``(b, T)``, every
    position whose label is not −100 is an example, a *place*: ``labels[s, t]`` is the class that ``logits[s, t]``
    predicts, −1 where it is unknown. Places are counted sequence by sequence, and position by position.

    Args:
        content: What the data would yield by itself: ``(inputs, labels)``, a mapping, or whatever ``forward=`` takes.
        n_examples: How many examples, or sequences, it holds; by default the number of labels, or the first dimension
            of its first tensor.
        take: ``take(content, positions) -> content`` with the examples, or sequences, at ``positions``, a list of
            integers, in that order. By default everything is cut whose first dimension, or length, is ``n_examples``.
        outputs: The outputs that are kept, their indices; labels are then indices into ``outputs``. None keeps all.
        places: Whether labels ``(b, T)`` make places; None: integer labels do, if T > 1 and the likelihood is one of
            classes. The second item of a tuple that only zeros and ones fill is taken for a mask where ``forward=`` is
            given.

    Attributes:
        content: The same, once read: its tensors on the model's device, numpy arrays turned into tensors.
        labels: What stands for the labels in it, if anything; with places ``(n_examples,)``, their classes.
        n_examples: Number of examples.
        n_sequences: Number of sequences where examples are places, b; otherwise ``n_examples``.
        places: ``(n_examples, 2)`` int64 sequence within the batch and position of every place; None where examples are
            no places.
        outputs: The indices of the outputs that are kept, int64; None for all.
        places_in_data: The same with sequences counted over all of the data, positions as in the whole batch.
        part_of: Of a part of a batch, which part it is, for messages; empty for a whole batch.

    Raises:
        ArgumentError: ``n_examples`` is not a positive integer, ``take`` cannot be called, or ``outputs`` are no
            different indices.
    """

    def __init__(
        self,
        content: Any,
        n_examples: int | None = None,
        take: Take | None = None,
        *,
        outputs: Sequence[int] | Tensor | None = None,
        places: bool | None = None,
    ) -> None:
        if n_examples is not None:
            check_integer("n_examples", n_examples)
        if take is not None and not callable(take):
            raise ArgumentError(f"take: expected callable(content, positions) -> content, got {take!r}")
        self.content = content
        self.labels: Tensor | None = None
        self.n_examples = self.n_sequences = 0 if n_examples is None else int(n_examples)
        self.places: Tensor | None = None
        self.outputs = None if outputs is None else _indices(outputs)
        self.places_in_data: Tensor | None = None
        self._places_wanted = places
        self._take = take
        self._device = torch.device("cpu")
        self._whole: frozenset[Path] = frozenset()
        self._source: Batch | None = None  # for the user's take, which is always asked of the whole batch
        self._positions: list[int] = []
        self.part_of = ""
        self._count = "n_examples"

    @property
    def inputs(self) -> Any:
        """What the model is called with: the content without its labels."""
        return _inputs_in(self.content)

    @property
    def sliceable(self) -> bool:
        """Whether the batch can be cut into its examples."""
        return self._take is not None or any(self._owns(part, path) for part, path in self._input_parts())

    @property
    def cut_by_user(self) -> bool:
        """Whether the data itself says how to take examples."""
        return self._take is not None

    @property
    def n_positions(self) -> int:
        """Positions of each sequence, T, where examples are places; otherwise 1."""
        labels = None if self.places is None else _labels_in(self.content, self._device, "a batch")
        return 1 if labels is None else labels.shape[1]

    @property
    def n_bytes(self) -> int:
        """Size of the tensors that it keeps alive."""
        kept = self.content if self._source is None else self._source.content
        return sum(leaf.numel() * leaf.element_size() for leaf in leaves(kept) if isinstance(leaf, Tensor))

    def take(self, examples: slice | Tensor) -> Batch:
        """Take some examples, a slice or positions: by the user's ``take``, or from all parts with one entry for each.

        Raises:
            DataError: The user's ``take`` failed, or a tensor cannot be cut.
        """
        chosen = list(range(self.n_examples)[examples]) if isinstance(examples, slice) else examples.tolist()
        return self if chosen == list(range(self.n_examples)) else self._taken(chosen)

    def apart(self) -> Batch:
        """Give every place a sequence of its own: its sequence with the labels of all other places masked."""
        if self.places is None or self.n_examples == self.n_sequences:
            return self
        return self._taken(list(range(self.n_examples)), apart=True)

    def compact(self) -> Batch:
        """Leave out the sequences that hold no place, where the batch can be cut."""
        if self.places is None or not self.sliceable or len(torch.unique(self.places[:, 0])) == self.n_sequences:
            return self
        return self._taken(list(range(self.n_examples)))

    def slots(self) -> Tensor:
        """Give the places of each sequence side by side, the last ones last.

        Returns:
            ``(n_sequences, K)`` int64 numbers of the places, −1 where a sequence has fewer than K.
        """
        assert self.places is not None, "examples are places"
        sequences = self.places[:, 0]
        counts = torch.bincount(sequences, minlength=self.n_sequences)
        numbers = torch.arange(self.n_examples, device=sequences.device)
        width = int(counts.max())
        found = torch.full((self.n_sequences, width), -1, device=sequences.device)
        found[sequences, width - (counts.cumsum(0)[sequences] - numbers)] = numbers
        return found

    def of_sequences(self, start: int, stop: int) -> slice:
        """Say which examples are those of the sequences ``start … stop − 1``; without places, the same numbers."""
        if self.places is None:
            return slice(start, min(stop, self.n_examples))
        first, last = torch.searchsorted(self.places[:, 0].contiguous(), torch.tensor([start, stop])).tolist()
        return slice(first, last)

    def one_each(self) -> Tensor:
        """Give one example of each sequence that has any, its last, ``(b,)`` int64."""
        if self.places is None:
            return torch.arange(self.n_examples)
        last = self.slots()[:, -1]
        return last[last >= 0]

    def _taken(self, chosen: list[int], apart: bool = False) -> Batch:
        n = self.n_examples
        # From the whole batch, always: the user's take() may know it by other means than the content that it is given.
        root = self._source or self if self._take is not None else self
        positions = chosen if root is self else [self._positions[i] for i in chosen]
        rows, counted = (positions, None) if root.places is None else root._sequences_of(positions, apart)
        if self._take is not None:
            try:
                content = self._take(root.content, rows)
            except Exception as error:
                raise DataError(
                    f"take: failed on a batch of {root.n_sequences} examples, asked for {rows[:8]}: "
                    f"{type(error).__name__}: {error}"
                ) from error
            content = onto(self._device, content)
        else:
            content = self._cut(self.content, (), rows)
        some = Batch(content, len(rows), self._take)
        some._device, some._whole, some._source, some._positions = self._device, self._whole, root, positions
        some.outputs, some.n_examples = self.outputs, len(chosen)
        some.part_of = f"{len(chosen)} of the {n} examples of a batch: {self.how_cut()}"
        some.labels = None if self.labels is None else _labels_in(content, self._device, "what take() gave")
        if counted is not None:
            assert root.places is not None and self.places_in_data is not None
            some.places_in_data = self.places_in_data[torch.tensor(chosen, device=self._device)]
            some._keep(counted, torch.bincount(root.places[:, 0], minlength=root.n_sequences).tolist(), rows)
        elif some.labels is not None and len(some.labels) != len(chosen):
            if self.labels is None or self.labels.numel() != n:  # no labels, but something that all examples share
                some.labels = None
                return some
            raise DataError(f"take: expected {len(chosen)} labels for {len(chosen)} positions, got {len(some.labels)}")
        return some

    def _sequences_of(self, places: list[int], apart: bool) -> tuple[list[int], list[tuple[int, int]]]:
        """Find sequences that hold some places in their order.

        Returns:
            The sequences, a new one wherever the order or ``apart`` calls for it; and of every place, its row among
            these and its number within the sequence.
        """
        assert self.places is not None
        all_places = self.places.tolist()
        first: dict[int, int] = {}
        for number, (sequence, _) in enumerate(all_places):
            first.setdefault(sequence, number)
        rows, counted, before = list[int](), list[tuple[int, int]](), -1
        for place in places:
            sequence = all_places[place][0]
            if apart or not rows or sequence != rows[-1] or place <= before:
                rows.append(sequence)
            counted.append((len(rows) - 1, place - first[sequence]))
            before = place
        return rows, counted

    def _keep(self, counted: list[tuple[int, int]], numbers: list[int], rows: list[int]) -> None:
        """Keep some places of a batch that was just cut, and mask the labels of all others.

        Args:
            counted: Of every place, its row and its number within that row.
            numbers: How many places each sequence of the whole batch has.
            rows: Which sequence of the whole batch each row is.

        Raises:
            DataError: The user's ``take`` gave other labels.
        """
        labels = self.labels
        if labels is None or labels.dim() != 2 or (labels != IGNORED).sum(1).tolist() != [numbers[row] for row in rows]:
            got = "none" if labels is None else str(tuple(labels.shape))
            raise DataError(
                f"take: expected labels of {len(rows)} sequences that are not {IGNORED} at the same places as in the "
                f"whole batch, got {got}"
            )
        there = (labels != IGNORED).nonzero()
        begins = np.cumsum([0, *(numbers[row] for row in rows)])
        kept = there[torch.tensor([int(begins[row]) + number for row, number in counted], device=there.device)]
        masked = torch.full_like(labels, IGNORED)
        masked[kept[:, 0], kept[:, 1]] = labels[kept[:, 0], kept[:, 1]]
        self.content = _relabelled(self.content, masked)
        self.n_sequences, self.places = len(rows), kept
        self.labels = masked[kept[:, 0], kept[:, 1]].to(torch.int64)

    def fresh(self) -> Batch:
        """Copy the batch and all its tensors, for callers that may change them in place."""
        return self._with(map_tensors(lambda tensor: tensor.clone(), self.content, lambda item: called(item, "clone")))

    def to(self, device: torch.device) -> Batch:
        """Move the batch to another device."""
        if device == self._device:
            return self
        moved = self._with(onto(device, self.content))
        moved.labels = None if self.labels is None else self.labels.to(device)
        if self.places is not None and self.places_in_data is not None:
            moved.places, moved.places_in_data = self.places.to(device), self.places_in_data.to(device)
        moved._device = device
        return moved

    def stacked(self) -> tuple[list[Tensor], Callable[[Sequence[Tensor]], Batch]] | None:
        """Give the tensors with one row per example, and a function that makes a batch of one from a row of each.

        None where tensors are not all that belongs to examples.
        """
        if self._take is not None:
            return None
        if self.places is not None and self.n_examples != self.n_sequences:
            return self.apart().stacked()
        owned = [part for part, path in parts(self.content) if self._owns(part, path)]
        tensors = [part for part in owned if isinstance(part, Tensor) and not part.is_nested]
        if len(tensors) != len(owned) or any(tensor.layout != torch.strided for tensor in tensors):
            return None

        def one(rows: Sequence[Tensor]) -> Batch:
            pending = iter(rows)

            def place(part: Any, path: Path) -> Any:
                return next(pending).unsqueeze(0) if self._owns(part, path) else part

            made = Batch(rebuilt(place, self.content, ()), 1)
            made._device, made._whole, made.outputs = self._device, self._whole, self.outputs
            if self.places is not None:
                made.places = torch.stack([torch.zeros_like(rows[-1]), rows[-1]])[None]
            return made

        return (tensors if self.places is None else [*tensors, self.places[:, 1]]), one

    def joins(self, other: Batch) -> bool:
        """Tell whether the examples of both can be put into one batch."""
        if (
            self._take
            or other._take
            or self._form() != other._form()
            or (self.labels is None) != (other.labels is None)
            or (self.places is None) != (other.places is None)
            or not _equal(self.outputs, other.outputs)
        ):
            return False
        for (one, path), (two, _) in zip(parts(self.content), parts(other.content), strict=True):
            if not isinstance(one, Tensor):
                continue
            owned = self._owns(one, path)
            if owned != other._owns(two, path) or one.dtype != two.dtype or one.is_nested or two.is_nested:
                return False
            if one.layout != torch.strided or two.layout != torch.strided:
                return False
            if one.shape[owned:] != two.shape[owned:] or not (owned or torch.equal(one, two)):
                return False
        return True

    def joined(self, others: Sequence[Batch]) -> Batch:
        """Join the examples of batches that fit this one, in order."""
        every = [self, *others]
        columns = zip(*(parts(batch.content) for batch in every), strict=True)
        merged = iter(
            [torch.cat([part for part, _ in column]) if self._owns(*column[0]) else column[0][0] for column in columns]
        )
        made = self._with(map_tensors(lambda _: next(merged), self.content))
        made.n_examples, made.part_of = sum(batch.n_examples for batch in every), ""
        made.n_sequences = sum(batch.n_sequences for batch in every)
        labels = [batch.labels for batch in every if batch.labels is not None]
        made.labels = torch.cat(labels) if labels else None
        if self.places is not None:
            begins = np.cumsum([0, *(batch.n_sequences for batch in every)]).tolist()
            moved = [(batch.places, begin) for batch, begin in zip(every, begins, strict=False)]
            made.places = torch.cat([p + torch.tensor([at, 0], device=p.device) for p, at in moved if p is not None])
            made.places_in_data = torch.cat([b.places_in_data for b in every if b.places_in_data is not None])
        return made

    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Give the shapes of the inputs' tensors without their first dimension: equal for batches of one kind."""
        tensors = [leaf for leaf in leaves(self.inputs) if isinstance(leaf, Tensor)]
        return tuple(() if tensor.is_nested else tuple(tensor.shape[1:]) for tensor in tensors)

    def how_cut(self) -> str:
        """Say which tensors :meth:`take` cuts, and what to do where that is wrong; for messages."""
        if self._take is not None:
            return "the batch was cut by its own take="
        every = [(f"batch{''.join(path)} {shown(part)}", self._owns(part, path)) for part, path in parts(self.content)]
        cut, left = ([name for name, owned in every if owned is kept][:8] for kept in (True, False))
        whole = f" and left {', '.join(left)} whole" if left else ""
        return f"the batch was cut along the first dimension of {', '.join(cut) or 'nothing'}{whole}; {OWN_BATCH}"

    def how_counted(self) -> str:
        """Say how the examples were counted, and what to do where that is wrong."""
        if self.part_of:
            return f"as these are {self.part_of}"
        if self.places is not None:
            return f"as its labels (b, T) are not {IGNORED} at {self.n_examples} positions"
        return f"as the examples were counted by the {self._count} of {named(self.content)}: {OWN_BATCH}"

    def describe(self, example: int) -> str:
        """Say which example of the batch it is where that is a place, for messages; empty otherwise."""
        if self.places_in_data is None:
            return ""
        sequence, position = self.places_in_data[example].tolist()
        return f" (sequence {sequence}, position {position})"

    def _input_parts(self) -> list[tuple[Any, Path]]:
        if isinstance(self.content, tuple | list) and self.labels is not None:
            return parts(self.content[0], ("[0]",))
        return parts(_inputs_in(self.content) if isinstance(self.content, Mapping) else self.content)

    def _owns(self, part: Any, path: Path) -> bool:
        """Whether a part has one entry for every example."""
        return path not in self._whole and length(part) == self.n_sequences

    def _cut(self, tree: Any, path: Path, positions: list[int]) -> Any:
        def cut(part: Any, where: Path) -> Any:
            if not self._owns(part, where):
                return part
            try:
                if isinstance(part, Tensor):
                    return rows_at(part, positions)
                if isinstance(part, np.ndarray):
                    return part[positions]
                return type(part)([part[i] for i in positions])
            except (RuntimeError, TypeError, NotImplementedError) as error:
                raise DataError(
                    f"data: batch{''.join(where)} {shown(part)} cannot be cut ({error}); {OWN_BATCH}"
                ) from error

        return rebuilt(cut, tree, path)

    def _with(self, content: Any) -> Batch:
        made = copy.copy(self)
        made.content = content
        return made

    def _form(self) -> Any:
        """The structure without the tensors' values."""
        return [(path, "tensor" if isinstance(part, Tensor) else part) for part, path in parts(self.content)]


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
        elif not _equal(batch.outputs, outputs):
            kept, first = ("all" if some is None else str(some.tolist()) for some in (batch.outputs, outputs))
            raise DataError(
                f"outputs: batch {number} keeps {kept} and batch 0 keeps {first}; expected the same outputs in the "
                "same order in all batches, as labels and logits are indices into them; work on the others on their own"
            )
        if batch._take is None:
            whole |= {path for part, path in parts(batch.content) if length(part) != batch.n_sequences}
            batch._whole = whole
        if batch.places is not None:
            batch.places_in_data = batch.places + torch.tensor([n_sequences, 0], device=device)
        n_sequences += batch.n_sequences
        if not batch.n_examples:
            without += 1
            continue
        if not warned and batch.places is not None and _unshifted(batch):
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
    labels = _labels_in(content, device, f"batch {number}")
    if given is None or not given.n_sequences:
        n_sequences = _count(content, labels, number, given is not None and given.cut_by_user)
    else:
        n_sequences = given.n_sequences
        labels = labels if labels is not None and len(labels) == n_sequences else None
    batch = Batch(content, n_sequences, None if given is None else given._take)
    batch.labels, batch._device, batch._whole = labels, device, whole
    if given is None or not given.n_sequences:
        batch._count = "labels" if labels is not None else "first tensor"
    wanted = None if given is None else given._places_wanted
    if given is not None and given.outputs is not None:
        batch.outputs = given.outputs.to(device)
    if _has_places(batch, any_layout and given is None, places if wanted is None else wanted, wanted is True, number):
        assert labels is not None
        batch.content = _relabelled(content, labels)
        batch.places = batch.places_in_data = (labels != IGNORED).nonzero()
        batch.labels = labels[batch.places[:, 0], batch.places[:, 1]].to(torch.int64)
        batch.n_examples = len(batch.places)
        batch._places_wanted = True
        _check_padding(batch, number)
    return batch


def _check_padding(batch: Batch, number: int) -> None:
    """Refuse places where the attention mask of a mapping is zero.

    Raises:
        DataError: Naming the first.
    """
    mask = batch.content.get("attention_mask") if isinstance(batch.content, Mapping) else None
    if isinstance(mask, Tensor) and mask.dim() == 2 and batch.places is not None:
        padded = batch.places[mask[batch.places[:, 0], batch.places[:, 1]] == 0]
        if len(padded):
            s, t = padded[0].tolist()
            raise DataError(
                f"labels: batch {number} has a label at position {t} of sequence {s}, which the attention mask leaves "
                f"out as padding; expected {IGNORED} there"
            )


def _has_places(batch: Batch, any_layout: bool, places: bool | None, said: bool, number: int) -> bool:
    """Decide whether a batch's labels make places.

    Raises:
        DataError: The data says so of labels that cannot.
    """
    labels = batch.labels
    integers = labels is not None and labels.dtype in _INTEGERS
    if said and (labels is None or not integers or labels.dim() != 2):
        got = "none" if labels is None else f"{tuple(labels.shape)} {labels.dtype}"
        raise DataError(f"labels: batch {number} is said to have places, so expected integers (b, T), got {got}")
    if labels is None or not integers or labels.dim() != 2 or labels.is_nested or places is False:
        return False
    if said:
        return True
    unsure = places is None or (any_layout and isinstance(batch.content, tuple | list))
    return labels.shape[1] > 1 and not (unsure and bool(((labels == 0) | (labels == 1)).all()))


def _relabelled(content: Any, labels: Tensor) -> Any:
    """Put other labels into a batch's content."""
    if isinstance(content, Mapping):
        return with_entries(content, {"labels": labels})
    if hasattr(content, "_replace"):
        return content._replace(**{content._fields[1]: labels})
    if isinstance(content, tuple | list):
        return type(content)([content[0], labels])
    made = copy.copy(content)
    object.__setattr__(made, "labels", labels)
    return made


def _unshifted(batch: Batch) -> bool:
    """Whether the labels of all places, more than one, are the input tokens at these places."""
    if batch.places is None or batch.n_examples < 2:
        return False
    sequences, positions = batch.places.unbind(1)
    tokens = [
        part
        for part, path in batch._input_parts()
        if path != (".labels",)
        if isinstance(part, Tensor) and part.dim() == 2 and part.dtype in (torch.int32, torch.int64)
        if len(part) == batch.n_sequences and part.shape[1] > int(positions.max())
    ]
    labels = batch.labels
    return labels is not None and any(
        torch.equal(part[sequences, positions].to(torch.int64), labels) for part in tokens
    )


def _indices(outputs: Sequence[int] | Tensor) -> Tensor:
    """The outputs that are kept.

    Raises:
        ArgumentError: They are no different indices.
    """
    try:
        found = torch.as_tensor(outputs)
    except (ValueError, TypeError, RuntimeError) as error:
        raise ArgumentError(f"outputs: expected indices of outputs, got {outputs!r}") from error
    integers = not (found.is_floating_point() or found.is_complex() or found.dtype == torch.bool)
    if (
        found.dim() != 1
        or not len(found)
        or not integers
        or int(found.min()) < 0
        or len(set(found.tolist())) < len(found)
    ):
        raise ArgumentError(f"outputs: expected different indices ≥ 0 of outputs, got {outputs!r}")
    return found.to(torch.int64)


def _equal(one: Tensor | None, other: Tensor | None) -> bool:
    return one is other or (one is not None and other is not None and torch.equal(one, other))


def _inputs_in(content: Any) -> Any:
    if isinstance(content, Mapping):
        if "labels" not in content:
            return content
        return {key: value for key, value in content.items() if key != "labels"}
    return content[0] if isinstance(content, (tuple, list)) else content


def _labels_in(content: Any, device: torch.device, where: str) -> Tensor | None:
    """Find what stands for the labels in a batch's content.

    Raises:
        DataError: It is one label, or not numbers.
    """
    labels: Any = None
    if isinstance(content, Mapping):
        labels = content.get("labels")
    elif isinstance(content, (tuple, list)):
        labels = content[1] if len(content) == 2 else None
    elif not isinstance(content, Tensor):
        labels = getattr(content, "labels", None)
    if isinstance(labels, int) or (isinstance(labels, Tensor) and labels.dim() == 0):
        raise DataError(
            f"data: {where} has a single label, so it is one example; wrap the data in "
            "torch.utils.data.DataLoader(data, batch_size=64)"
        )
    if isinstance(labels, (list, tuple, np.ndarray)):
        try:
            labels = torch.as_tensor(labels, device=device)
        except (ValueError, TypeError, RuntimeError, OverflowError) as error:
            raise DataError(
                f"labels: expected integers; encode strings as class numbers ({where}: {error}); the second item of "
                f"a batch stands for its labels; {OWN_BATCH}"
            ) from error
    return labels if isinstance(labels, Tensor) else None


def _count(content: Any, labels: Tensor | None, number: int, cut_by_user: bool) -> int:
    within, path = content, ()
    if isinstance(content, Mapping):
        within = _inputs_in(content)
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


def batch_digest(batch: Batch) -> str:
    """Compute blake2b of a batch's structure and bytes, the same wherever the tensors live."""
    digest = hashlib.blake2b(digest_size=16)
    update_with_tree(digest, batch.content)
    if batch.outputs is not None:
        update_with_tensor(digest, batch.outputs)
    return digest.hexdigest()


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
