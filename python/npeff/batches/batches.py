"""A batch of the user's data: its inputs, labels and examples, and how it is cut and joined."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from npeff.batches.places import IGNORED, kept_places, sequences_of
from npeff.batches.tensor_trees import (
    OWN_BATCH,
    Path,
    called,
    inputs_in,
    labels_in,
    leaves,
    length,
    map_tensors,
    named,
    onto,
    parts,
    rebuilt,
    relabelled,
    rows_at,
    shown,
    update_with_tensor,
    update_with_tree,
)
from npeff.errors import ArgumentError, DataError, check_integer

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
        device: Where its tensors are.
        user_take: ``take`` as it was given.
        never_cut: Where the tensors lie that are shared by all examples, whatever their size.
        counted_by: What the examples were counted by, for messages.
        places_wanted: ``places`` as it was given; True once there are places.

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
        self.places_wanted = places
        self.user_take = take
        self.device = torch.device("cpu")
        self.never_cut: frozenset[Path] = frozenset()
        self._source: Batch | None = None  # for the user's take, which is always asked of the whole batch
        self._positions: list[int] = []
        self.part_of = ""
        self.counted_by = "n_examples"

    @property
    def inputs(self) -> Any:
        """The arguments of the model: the content without its labels."""
        return inputs_in(self.content)

    @property
    def sliceable(self) -> bool:
        """Whether the batch can be cut into its examples."""
        return self.user_take is not None or any(self._owns(part, path) for part, path in self.input_parts())

    @property
    def cut_by_user(self) -> bool:
        """Whether the data itself says how to take examples."""
        return self.user_take is not None

    @property
    def n_positions(self) -> int:
        """Positions of each sequence, T, where examples are places; otherwise 1."""
        labels = None if self.places is None else labels_in(self.content, self.device, "a batch")
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
        """Return the numbers of each sequence's places side by side, aligned to the end.

        Returns:
            ``(n_sequences, K)`` int64 numbers of the places, −1 where a sequence has fewer than K.
        """
        assert self.places is not None, "examples are places"
        sequences = self.places[:, 0]
        counts = torch.bincount(sequences, minlength=self.n_sequences)
        numbers = torch.arange(len(self.places), device=sequences.device)
        width = int(counts.max())
        found = torch.full((self.n_sequences, width), -1, device=sequences.device)
        found[sequences, width - (counts.cumsum(0)[sequences] - numbers)] = numbers
        return found

    def of_sequences(self, start: int, stop: int) -> slice:
        """Return the range of the examples in the sequences ``start … stop − 1``; without places, the same range."""
        if self.places is None:
            return slice(start, min(stop, self.n_examples))
        first, last = torch.searchsorted(self.places[:, 0].contiguous(), torch.tensor([start, stop])).tolist()
        return slice(first, last)

    def one_each(self) -> Tensor:
        """Return the last example of each sequence that has any, ``(b,)`` int64."""
        if self.places is None:
            return torch.arange(self.n_examples)
        last = self.slots()[:, -1]
        return last[last >= 0]

    def _taken(self, chosen: list[int], apart: bool = False) -> Batch:
        n = self.n_examples
        # From the whole batch, always: the user's take() may know it by other means than the content that it is given.
        root = self._source or self if self.user_take is not None else self
        positions = chosen if root is self else [self._positions[i] for i in chosen]
        rows, counted = (positions, None) if root.places is None else sequences_of(root.places, positions, apart)
        if self.user_take is not None:
            try:
                content = self.user_take(root.content, rows)
            except Exception as error:
                raise DataError(
                    f"take: failed on a batch of {root.n_sequences} examples, asked for {rows[:8]}: "
                    f"{type(error).__name__}: {error}"
                ) from error
            content = onto(self.device, content)
        else:
            content = self._cut(self.content, (), rows)
        some = Batch(content, len(rows), self.user_take)
        some.device, some.never_cut, some._source, some._positions = self.device, self.never_cut, root, positions
        some.outputs, some.n_examples = self.outputs, len(chosen)
        some.part_of = f"{len(chosen)} of the {n} examples of a batch: {self.how_cut()}"
        some.labels = None if self.labels is None else labels_in(content, self.device, "what take() gave")
        if counted is not None:
            assert root.places is not None and self.places_in_data is not None
            some.places_in_data = self.places_in_data[torch.tensor(chosen, device=self.device)]
            numbers = torch.bincount(root.places[:, 0], minlength=root.n_sequences)[rows].tolist()
            kept = kept_places(some.labels, counted, numbers)
            assert some.labels is not None
            some.n_sequences = len(rows)
            some.hold_places(some.labels, kept)
        elif some.labels is not None and len(some.labels) != len(chosen):
            if self.labels is None or self.labels.numel() != n:  # no labels, but something that all examples share
                some.labels = None
                return some
            raise DataError(f"take: expected {len(chosen)} labels for {len(chosen)} positions, got {len(some.labels)}")
        return some

    def hold_places(self, labels: Tensor, places: Tensor) -> None:
        """Make places ``(n, 2)`` the examples; all other labels ``(b, T)`` become −100."""
        sequences, positions = places.unbind(1)
        kept = torch.full_like(labels, IGNORED)
        kept[sequences, positions] = labels[sequences, positions]
        self.content = relabelled(self.content, kept)
        self.places, self.n_examples = places, len(places)
        self.labels = kept[sequences, positions].to(torch.int64)

    def fresh(self) -> Batch:
        """Copy the batch and all its tensors, for callers that may change them in place."""
        return self._with(map_tensors(lambda tensor: tensor.clone(), self.content, lambda item: called(item, "clone")))

    def to(self, device: torch.device) -> Batch:
        """Move the batch to another device."""
        if device == self.device:
            return self
        moved = self._with(onto(device, self.content))
        moved.labels = None if self.labels is None else self.labels.to(device)
        if self.places is not None and self.places_in_data is not None:
            moved.places, moved.places_in_data = self.places.to(device), self.places_in_data.to(device)
        moved.device = device
        return moved

    def stacked(self) -> tuple[list[Tensor], Callable[[Sequence[Tensor]], Batch]] | None:
        """Return the tensors with one row per example, and a function that makes a batch of one from a row of each.

        None where tensors are not all that belongs to examples.
        """
        if self.user_take is not None:
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
            made.device, made.never_cut, made.outputs = self.device, self.never_cut, self.outputs
            if self.places is not None:
                made.places = torch.stack([torch.zeros_like(rows[-1]), rows[-1]])[None]
            return made

        return (tensors if self.places is None else [*tensors, self.places[:, 1]]), one

    def joins(self, other: Batch) -> bool:
        """Tell whether the examples of both can be put into one batch."""
        if (
            self.user_take
            or other.user_take
            or self._form() != other._form()
            or (self.labels is None) != (other.labels is None)
            or (self.places is None) != (other.places is None)
            or not same(self.outputs, other.outputs)
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
        """Return the shapes of the inputs' tensors without their first dimension: equal for batches of one kind."""
        tensors = [leaf for leaf in leaves(self.inputs) if isinstance(leaf, Tensor)]
        return tuple(() if tensor.is_nested else tuple(tensor.shape[1:]) for tensor in tensors)

    def how_cut(self) -> str:
        """Say which tensors :meth:`take` cuts, and what to do where that is wrong; for messages."""
        if self.user_take is not None:
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
        return f"as the examples were counted by the {self.counted_by} of {named(self.content)}: {OWN_BATCH}"

    def describe(self, example: int) -> str:
        """Describe the sequence and position of an example that is a place, for messages; empty otherwise."""
        if self.places_in_data is None:
            return ""
        sequence, position = self.places_in_data[example].tolist()
        return f" (sequence {sequence}, position {position})"

    def input_parts(self) -> list[tuple[Any, Path]]:
        """List the parts of the inputs, and where they lie in the content."""
        if isinstance(self.content, tuple | list) and self.labels is not None:
            return parts(self.content[0], ("[0]",))
        return parts(inputs_in(self.content) if isinstance(self.content, Mapping) else self.content)

    def _owns(self, part: Any, path: Path) -> bool:
        """Whether a part has one entry for every example."""
        return path not in self.never_cut and length(part) == self.n_sequences

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


def same(one: Tensor | None, other: Tensor | None) -> bool:
    """Tell whether two batches keep the same outputs."""
    return one is other or (one is not None and other is not None and torch.equal(one, other))


def batch_digest(batch: Batch) -> str:
    """Compute blake2b of a batch's structure and bytes, the same wherever the tensors live."""
    digest = hashlib.blake2b(digest_size=16)
    update_with_tree(digest, batch.content)
    if batch.outputs is not None:
        update_with_tensor(digest, batch.outputs)
    return digest.hexdigest()
