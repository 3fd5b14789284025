"""Batches of sequences by their number of tokens, padding included."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from npeff.errors import ArgumentError


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
        order: ``(n,)`` int64 places in the dataset, in the order in which they come.

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
        """The places of each batch."""
        for start, end in zip(self._cuts[:-1], self._cuts[1:], strict=True):
            yield self.order[start:end].tolist()

    def __len__(self) -> int:
        """Number of batches."""
        return len(self._cuts) - 1
