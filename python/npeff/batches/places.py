"""Positions of sequences as examples (places): which labels make places; count, cut and order places.

Of labels ``(b, T)`` every entry that is not :data:`IGNORED` is a place; places count sequence by sequence, and position
by position. :class:`TokenBatches` groups sequences by their length.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from npeff.errors import ArgumentError, DataError

IGNORED = -100
"""The label of a position that is no example."""

_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def make_places(labels: Tensor | None, said: bool | None, sure: bool, number: int) -> bool:
    """Decide whether labels make places.

    Args:
        labels: The labels of a batch.
        said: What the data says; None: nothing.
        sure: Labels ``(b, T)`` are classes; otherwise zeros and ones alone are taken for a mask, or answers to many
            questions.
        number: The batch's position in the data, for messages.

    Raises:
        DataError: The data says so of labels that cannot.
    """
    integers = labels is not None and labels.dtype in _INTEGERS
    if said and (labels is None or not integers or labels.dim() != 2):
        got = "none" if labels is None else f"{tuple(labels.shape)} {labels.dtype}"
        raise DataError(f"labels: batch {number} is said to have places, so expected integers (b, T), got {got}")
    if labels is None or not integers or labels.dim() != 2 or labels.is_nested or said is False:
        return False
    if said:
        return True
    return labels.shape[1] > 1 and (sure or not bool(((labels == 0) | (labels == 1)).all()))


def check_padding(content: Any, places: Tensor, number: int) -> None:
    """Refuse places where the attention mask of a batch's content is zero.

    Args:
        content: The content; what is no mapping with a mask passes.
        places: ``(n, 2)``.
        number: The batch's position in the data, for messages.

    Raises:
        DataError: Naming the first.
    """
    mask = content.get("attention_mask") if isinstance(content, Mapping) else None
    if isinstance(mask, Tensor) and mask.dim() == 2:
        padded = places[mask[places[:, 0], places[:, 1]] == 0]
        if len(padded):
            s, t = padded[0].tolist()
            raise DataError(
                f"labels: batch {number} has a label at position {t} of sequence {s}, which the attention mask leaves "
                f"out as padding; expected {IGNORED} there"
            )


def sequences_of(places: Tensor, chosen: Sequence[int], apart: bool) -> tuple[list[int], list[tuple[int, int]]]:
    """Find sequences that hold some places in their order.

    Args:
        places: ``(n, 2)`` all places of a batch.
        chosen: Numbers of places.
        apart: Every place has a sequence of its own.

    Returns:
        The sequences, a new one wherever the order or ``apart`` calls for it; and of every place, its row among
        these and its number within the sequence.
    """
    every = places.tolist()
    first: dict[int, int] = {}
    for number, (sequence, _) in enumerate(every):
        first.setdefault(sequence, number)
    rows, counted, before = list[int](), list[tuple[int, int]](), -1
    for place in chosen:
        sequence = every[place][0]
        if apart or not rows or sequence != rows[-1] or place <= before:
            rows.append(sequence)
        counted.append((len(rows) - 1, place - first[sequence]))
        before = place
    return rows, counted


def kept_places(labels: Tensor | None, counted: Sequence[tuple[int, int]], numbers: Sequence[int]) -> Tensor:
    """Find some places again in the labels of a batch that was just cut.

    Args:
        labels: Its labels.
        counted: Of every place, its row and its number within that row.
        numbers: How many places each row is to have.

    Returns:
        ``(n, 2)`` the places.

    Raises:
        DataError: The labels are others; the user's ``take`` gave them.
    """
    if labels is None or labels.dim() != 2 or (labels != IGNORED).sum(1).tolist() != [*numbers]:
        got = "none" if labels is None else str(tuple(labels.shape))
        raise DataError(
            f"take: expected labels of {len(numbers)} sequences that are not {IGNORED} at the same places as in the "
            f"whole batch, got {got}"
        )
    there, begins = (labels != IGNORED).nonzero(), np.cumsum([0, *numbers])
    return there[torch.tensor([int(begins[row]) + number for row, number in counted], device=there.device)]


class TokenBatches:
    """A batch sampler: as many sequences at a time as keep longest × number within a budget of tokens.

    Pass it to ``torch.utils.data.DataLoader(dataset, batch_sampler=…, collate_fn=…)`` with a function that pads to the
    longest of the batch. Sorted by length, batches hold little padding; Fishers then come in the order of ``order``,
    and ``fishers[np.argsort(batches.order)]`` in that of the data.

    Args:
        lengths: Tokens of every sequence of the dataset.
        tokens: The most tokens in a batch, padding included.
        sort: Take sequences by length, longest first, so that the largest batch comes first; otherwise in their order.

    Attributes:
        order: ``(n,)`` int64 positions in the dataset, in the order in which they come.

    Raises:
        ArgumentError: A length is below 1, or a sequence has more tokens than the budget.
    """

    def __init__(self, lengths: Sequence[int], tokens: int, *, sort: bool = True) -> None:
        self._lengths = np.asarray(lengths, np.int64)
        if self._lengths.ndim != 1 or (self._lengths < 1).any():
            raise ArgumentError("lengths: expected a sequence of numbers ≥ 1, the tokens of every sequence")
        if len(self._lengths) and self._lengths.max() > tokens:
            longest = int(self._lengths.argmax())
            raise ArgumentError(
                f"tokens: expected at least {self._lengths[longest]}, the length of sequence {longest}, got {tokens}; "
                "cut long sequences, or give more"
            )
        self._tokens = tokens
        n = len(self._lengths)
        self.order = np.argsort(-self._lengths, kind="stable") if sort else np.arange(n, dtype=np.int64)
        self._cuts = [0]
        longest = 0
        for at, length in enumerate(self._lengths[self.order].tolist()):
            longest = max(longest, length)
            if longest * (at + 1 - self._cuts[-1]) > tokens:
                self._cuts.append(at)
                longest = length
        if n:
            self._cuts.append(n)

    def __iter__(self) -> Iterator[list[int]]:
        """Iterate over the positions of each batch."""
        for start, end in zip(self._cuts[:-1], self._cuts[1:], strict=True):
            yield self.order[start:end].tolist()

    def __len__(self) -> int:
        """Number of batches."""
        return len(self._cuts) - 1
