"""Selected examples of a data set, as batches for the model: held in memory if they fit, else read again each time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from npeff.batches.batches import Batch, batch_digest
from npeff.batches.reading import check_data, read_batches
from npeff.errors import DataError, NpeffError
from npeff.gradients.eligibility import differ

Array = npt.NDArray[Any]

HELD_BYTES = 1 << 30
"""Examples up to this size stay in memory; if they are larger, every measurement iterates the data again."""


@dataclass(frozen=True)
class BatchSlice:
    """Selected examples in one batch, with which the model can be called.

    Attributes:
        batch: The batch, on the model's device.
        rows: ``(k,)`` int64 rows of the selected examples in the batch.
        indices: ``(k,)`` int64 indices of these examples among all selected examples.
    """

    batch: Batch
    rows: Tensor
    indices: Array

    def restricted(self, chosen: Array) -> BatchSlice:
        """Return the same batch with only the examples that a mask ``(n,)`` over all selected examples chooses."""
        keep = np.flatnonzero(chosen[self.indices])
        return BatchSlice(self.batch, self.rows[torch.from_numpy(keep).to(self.rows.device)], self.indices[keep])

    def cut(self) -> BatchSlice:
        """Cut the batch to the selected examples alone."""
        k = len(self.indices)
        if k == self.batch.n_examples:
            return self
        return BatchSlice(self.batch.take(self.rows), torch.arange(k, device=self.rows.device), self.indices)

    def joins(self, other: BatchSlice) -> bool:
        """Say whether the examples of both can form one batch."""
        whole = all(len(s.indices) == s.batch.n_examples and _of_tensors(s.batch.content) for s in (self, other))
        return whole and self.batch.joins(other.batch)


class SelectedExamples:
    """The examples at given positions of the data, as batches for the model.

    Batches are cut to the selected examples, and small batches are joined, if their tensors allow this and the model
    gives an example the same outputs with and without its neighbours. Otherwise whole batches are kept.

    Args:
        data: As for :func:`npeff.compute_fishers`.
        ids: ``(n,)`` int64 ascending positions in the data, each once.
        device: The device of the model.
        call: Runs the model on a batch.
        any_layout: As for :func:`npeff.batches.reading.read_batch`.
        places: Likewise.

    Raises:
        DataError: The data ends before the last position, or is too large to hold and cannot be iterated again.
    """

    def __init__(
        self,
        data: Iterable[Any],
        ids: Array,
        device: torch.device,
        call: Callable[[Batch], Tensor],
        any_layout: bool = False,
        places: bool | None = None,
    ) -> None:
        self.ids = np.asarray(ids, np.int64)
        self._data, self._device, self._call, self._any_layout = check_data(data), device, call, any_layout
        self._places = places
        self._cut: bool | None = None
        self._held: list[BatchSlice] | None = []
        self._digests: list[str] = []
        self._source_size = size = largest = 0
        for one in self._read():
            largest = max(largest, self._source_size)
            if self._held is None:
                self._digests.append(batch_digest(one.batch))
                continue
            self._held.append(one)
            size += one.batch.n_bytes
            if size > HELD_BYTES:
                self._check_again()
                self._digests = [batch_digest(held.batch) for held in self._held]
                self._held = None
        if self._held is not None and self._cut:
            self._held = _joined(self._held, largest)

    def __len__(self) -> int:
        return len(self.ids)

    def __iter__(self) -> Iterator[BatchSlice]:
        """Yield slices in a fixed order; together their indices are 0 … n − 1.

        Raises:
            DataError: The data yields other batches than the first time.
        """
        if self._held is not None:
            yield from self._held
            return
        number = -1
        for number, one in enumerate(self._read()):
            if number >= len(self._digests) or batch_digest(one.batch) != self._digests[number]:
                raise DataError(
                    "data: it yields other batches than the first time; examples are known by their position, so it "
                    "must keep one order: turn shuffling and random changes off"
                )
            yield one
        if number + 1 < len(self._digests):
            raise DataError("data: it yields fewer batches than the first time; pass a DataLoader or a list")

    def subset(self, indices: Array) -> list[BatchSlice]:
        """Return some of the examples as slices of their own, cut and joined; indices keep their meaning."""
        chosen = np.zeros(len(self), bool)
        chosen[indices] = True
        slices = [one.restricted(chosen) for one in self if chosen[one.indices].any()]
        if not self._cut:
            return slices
        largest = max((one.batch.n_examples for one in slices), default=1)
        return _joined([one.cut() for one in slices], max(largest, 32))

    def _read(self) -> Iterator[BatchSlice]:
        seen = done = 0
        given = read_batches(self._data, torch.device("cpu"), self._any_layout, self._places)
        for batch in given if len(self.ids) else ():
            self._source_size = batch.n_examples
            stop = int(np.searchsorted(self.ids, seen + batch.n_examples))
            if stop > done:
                rows = torch.from_numpy(self.ids[done:stop] - seen)
                yield self._slice(batch, rows, np.arange(done, stop))
            seen, done = seen + batch.n_examples, stop
            if done == len(self.ids):
                return
        if done < len(self.ids):
            raise DataError(
                f"data: expected an example at position {int(self.ids[done])}, but it ends after {seen}; pass the "
                "data that the Fishers were computed from, whole and in the same order"
                + ("" if seen else " (a generator may be used up: pass a DataLoader or a list)")
            )

    def _slice(self, batch: Batch, rows: Tensor, indices: Array) -> BatchSlice:
        if self._cut is None and batch.n_examples > 1:
            self._cut = _cuttable(batch) and self._agrees(batch)
        found = BatchSlice(batch, rows, indices)
        found = found.cut() if self._cut else found
        return BatchSlice(found.batch.to(self._device), found.rows.to(self._device), indices)

    def _agrees(self, batch: Batch) -> bool:
        """Whether the model gives half of a batch the outputs that it gives these examples in the whole batch."""
        half = torch.arange(1, batch.n_examples, 2)
        expected = self._call(batch.to(self._device))[half.to(self._device)]
        cut = BatchSlice(batch, half, np.arange(len(half))).cut()
        try:
            return not differ(self._call(cut.batch.to(self._device)), expected, expected.dtype)
        except NpeffError:  # these batches cannot be cut: they stay whole
            return False

    def _check_again(self) -> None:
        if iter(self._data) is self._data:
            raise DataError(
                f"data: the {len(self.ids):,} examples to be measured do not fit into {HELD_BYTES >> 20} MiB, "
                "and it can be iterated only once; pass a DataLoader or a list, or fewer examples with baseline="
            )


def _cuttable(batch: Batch) -> bool:
    """Whether taking examples takes everything that belongs to them."""
    return batch.cut_by_user or _of_tensors(batch.content)


def _of_tensors(content: Any) -> bool:
    if isinstance(content, Mapping):
        return all(isinstance(key, str) and _of_tensors(value) for key, value in content.items())
    if isinstance(content, (tuple, list)):
        return all(_of_tensors(item) for item in content)
    return content is None or isinstance(content, (Tensor, bool))


def _joined(slices: list[BatchSlice], size: int) -> list[BatchSlice]:
    """Join neighbours of the same structure into batches of up to ``size`` examples."""
    groups: list[list[BatchSlice]] = []
    for one in slices:
        last = groups[-1] if groups else []
        if last and sum(len(s.indices) for s in last) + len(one.indices) <= size and last[0].joins(one):
            last.append(one)
        else:
            groups.append([one])
    return [_join(group) if len(group) > 1 else group[0] for group in groups]


def _join(group: list[BatchSlice]) -> BatchSlice:
    batch = group[0].batch.joined([one.batch for one in group[1:]])
    indices = np.concatenate([one.indices for one in group])
    return BatchSlice(batch, torch.arange(batch.n_examples, device=group[0].rows.device), indices)
