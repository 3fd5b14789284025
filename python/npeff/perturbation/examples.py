"""Some examples of a data set, by their positions: held in memory when they fit, read again when not."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from npeff.batches.batches import Batch, batch_digest, check_data, read_batches
from npeff.errors import DataError, NpeffError
from npeff.gradients.eligibility import differ

Array = npt.NDArray[Any]

HELD_BYTES = 1 << 30
"""Examples up to this size are held; beyond it, the data is iterated anew for every measurement."""


@dataclass(frozen=True)
class Piece:
    """Some wanted examples, in a batch that the model can be called with.

    Attributes:
        batch: The batch, on the model's device.
        rows: ``(k,)`` int64 which of the batch's examples are wanted.
        places: ``(k,)`` int64 their places among the wanted examples.
    """

    batch: Batch
    rows: Tensor
    places: Array

    @property
    def n_bytes(self) -> int:
        """Size of the batch's tensors."""
        return self.batch.n_bytes

    def at(self, chosen: Array) -> Piece:
        """The part of it whose places ``chosen`` (a mask over places) are."""
        keep = np.flatnonzero(chosen[self.places])
        return Piece(self.batch, self.rows[torch.from_numpy(keep).to(self.rows.device)], self.places[keep])


class Examples:
    """The examples at given positions of the data, as batches for the model.

    Batches are cut down to the wanted examples, and small ones joined, where their tensors allow it and the model
    says the same of an example with and without its neighbours. Otherwise whole batches are kept.

    Args:
        data: As for :func:`npeff.compute_fishers`.
        ids: ``(n,)`` int64 ascending positions, each once.
        device: Where the model is.
        call: Runs the model on a batch.
        any_layout: The batch's structure is the user's business (``forward=`` is given).
        held_bytes: What may be held in memory.

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
        held_bytes: int = HELD_BYTES,
    ) -> None:
        self.ids = np.asarray(ids, np.int64)
        self._data, self._device, self._call, self._any_layout = check_data(data), device, call, any_layout
        self._cut: bool | None = None
        self._held: list[Piece] | None = []
        self._digests: list[str] = []
        self._held_bytes = held_bytes
        self._source_size = size = largest = 0
        for piece in self._read():
            largest = max(largest, self._source_size)
            if self._held is None:
                self._digests.append(batch_digest(piece.batch))
                continue
            self._held.append(piece)
            size += piece.n_bytes
            if size > held_bytes:
                self._check_again()
                self._digests = [batch_digest(held.batch) for held in self._held]
                self._held = None
        if self._held is not None:
            self._held = list(_joined(self._held, largest)) if self._cut else self._held

    def __len__(self) -> int:
        return len(self.ids)

    def __iter__(self) -> Iterator[Piece]:
        """The pieces, in an order that stays the same; their places cover 0 … n − 1.

        Raises:
            DataError: The data yields other batches than before.
        """
        if self._held is not None:
            yield from self._held
            return
        number = -1
        for number, piece in enumerate(self._read()):
            if number >= len(self._digests) or batch_digest(piece.batch) != self._digests[number]:
                raise DataError(
                    "data: it yields other batches than the first time; examples are known by their position, so it "
                    "must keep one order: turn shuffling and random changes off"
                )
            yield piece
        if number + 1 < len(self._digests):
            raise DataError("data: it yields fewer batches than the first time; pass a DataLoader or a list")

    def subset(self, places: Array) -> list[Piece]:
        """Some of the wanted examples as pieces of their own, cut and joined; places stay those of the whole."""
        chosen = np.zeros(len(self), bool)
        chosen[places] = True
        pieces = [piece.at(chosen) for piece in self if chosen[piece.places].any()]
        if not self._cut:
            return pieces
        largest = max((piece.batch.n_examples for piece in pieces), default=1)
        return list(_joined([_cut_down(piece) for piece in pieces], max(largest, 32)))

    def _read(self) -> Iterator[Piece]:
        seen = done = 0
        for batch in read_batches(self._data, torch.device("cpu"), self._any_layout) if len(self.ids) else ():
            self._source_size = batch.n_examples
            stop = int(np.searchsorted(self.ids, seen + batch.n_examples))
            if stop > done:
                rows = torch.from_numpy(self.ids[done:stop] - seen)
                yield self._piece(batch, rows, np.arange(done, stop))
            seen, done = seen + batch.n_examples, stop
            if done == len(self.ids):
                return
        if done < len(self.ids):
            raise DataError(
                f"data: expected an example at position {int(self.ids[done])}, but it ends after {seen}; pass the "
                "data that the Fishers were computed from, whole and in the same order"
                + ("" if seen else " (a generator may be used up: pass a DataLoader or a list)")
            )

    def _piece(self, batch: Batch, rows: Tensor, places: Array) -> Piece:
        if self._cut is None and batch.n_examples > 1:
            self._cut = _cuttable(batch) and self._agrees(batch)
        piece = Piece(batch, rows, places)
        piece = _cut_down(piece) if self._cut else piece
        return Piece(piece.batch.to(self._device), piece.rows.to(self._device), places)

    def _agrees(self, batch: Batch) -> bool:
        """Whether half of a batch gets the outputs that it has in the whole."""
        half = torch.arange(1, batch.n_examples, 2)
        expected = self._call(batch.to(self._device))[half.to(self._device)]
        cut = _cut_down(Piece(batch, half, np.arange(len(half))))
        try:
            return not differ(self._call(cut.batch.to(self._device)), expected, expected.dtype)
        except NpeffError:  # its batches cannot be cut: they stay whole
            return False

    def _check_again(self) -> None:
        if iter(self._data) is self._data:
            raise DataError(
                f"data: the {len(self.ids):,} examples to be measured do not fit into {self._held_bytes >> 20} MiB, "
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


def _cut_down(piece: Piece) -> Piece:
    k = len(piece.places)
    if k == piece.batch.n_examples:
        return piece
    return Piece(piece.batch.take(piece.rows), torch.arange(k, device=piece.rows.device), piece.places)


def _joined(pieces: list[Piece], size: int) -> Iterator[Piece]:
    """Join neighbours of one form into batches of up to ``size`` examples."""
    group: list[Piece] = []
    for piece in pieces:
        total = sum(len(p.places) for p in group) + len(piece.places)
        if group and (total > size or not _alike(group[0], piece)):
            yield _join(group)
            group = []
        group.append(piece)
    if group:
        yield _join(group)


def _alike(one: Piece, other: Piece) -> bool:
    whole = all(len(p.places) == p.batch.n_examples and _of_tensors(p.batch.content) for p in (one, other))
    return whole and one.batch.joins(other.batch)


def _join(group: list[Piece]) -> Piece:
    if len(group) == 1:
        return group[0]
    batch = group[0].batch.joined([piece.batch for piece in group[1:]])
    places = np.concatenate([piece.places for piece in group])
    return Piece(batch, torch.arange(batch.n_examples, device=group[0].rows.device), places)
