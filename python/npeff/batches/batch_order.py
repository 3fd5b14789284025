"""Check that data keeps its order, because examples are known by their position; make batches by length."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, IterableDataset, RandomSampler, SubsetRandomSampler, WeightedRandomSampler

from npeff.batches.batches import Batch, batch_digest
from npeff.errors import ArgumentError, DataError

_FIXED = (
    "pass shuffle=False; for a random order that stays, draw it once: torch.utils.data.Subset(dataset, "
    "torch.randperm(len(dataset)).tolist()), or data = list(loader)"
)


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
        """Compare the first batch of the pass that counts.

        Raises:
            DataError: It is another one.
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
        for attribute in ("sampler", "batch_sampler", "base_dataloader", "dataloader", "iterable", "_data"):
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
