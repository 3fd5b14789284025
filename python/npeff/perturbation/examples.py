"""Some examples of a data set, by their positions: held in memory when they fit, read again when not."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from npeff.batches import Batch, batch_digest, check_data, leaves, map_tensors, read_batch
from npeff.errors import DataError, NpeffError
from npeff.gradients.independence import differ

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
        return sum(t.numel() * t.element_size() for t in leaves(self.batch.content) if isinstance(t, Tensor))

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
        for number, raw in enumerate(self._data):
            if done == len(self.ids):
                return
            batch = read_batch(raw, torch.device("cpu"), number, self._any_layout)
            self._source_size = batch.n_examples
            stop = int(np.searchsorted(self.ids, seen + batch.n_examples))
            if stop > done:
                rows = torch.from_numpy(self.ids[done:stop] - seen)
                yield self._piece(batch, rows, np.arange(done, stop))
            seen, done = seen + batch.n_examples, stop
        if done < len(self.ids):
            raise DataError(
                f"data: expected an example at position {int(self.ids[done])}, but it ends after {seen}; pass the "
                "data that the Fishers were computed from, whole and in the same order"
                + ("" if seen else " (a generator may be used up: pass a DataLoader or a list)")
            )

    def _piece(self, batch: Batch, rows: Tensor, places: Array) -> Piece:
        if self._cut is None and batch.n_examples > 1:
            self._cut = _cuttable(batch.content) and self._agrees(batch)
        piece = Piece(batch, rows, places)
        piece = _cut_down(piece) if self._cut else piece
        return Piece(_on(piece.batch, self._device), piece.rows.to(self._device), places)

    def _agrees(self, batch: Batch) -> bool:
        """Whether half of a batch gets the outputs that it has in the whole."""
        half = torch.arange(1, batch.n_examples, 2)
        expected = self._call(_on(batch, self._device))[half.to(self._device)]
        cut = _cut_down(Piece(batch, half, np.arange(len(half))))
        try:
            return not differ(self._call(_on(cut.batch, self._device)), expected, expected.dtype)
        except NpeffError:  # its batches cannot be cut: they stay whole
            return False

    def _check_again(self) -> None:
        if iter(self._data) is self._data:
            raise DataError(
                f"data: the {len(self.ids):,} examples to be measured do not fit into {self._held_bytes >> 20} MiB, "
                "and it can be iterated only once; pass a DataLoader or a list, or fewer examples with baseline="
            )


def _on(batch: Batch, device: torch.device) -> Batch:
    if device.type == "cpu":
        return batch
    labels = None if batch.labels is None else batch.labels.to(device)
    return Batch(map_tensors(lambda t: t.to(device), batch.content), labels, batch.n_examples)


def _cuttable(content: Any) -> bool:
    """Whether taking rows of the tensors takes everything that belongs to the examples."""
    if isinstance(content, Mapping):
        return all(isinstance(key, str) and _cuttable(value) for key, value in content.items())
    if isinstance(content, (tuple, list)):
        return all(_cuttable(item) for item in content)
    return content is None or isinstance(content, (Tensor, bool))


def _per_example(tensor: Tensor, n: int) -> bool:
    return tensor.dim() > 0 and len(tensor) == n


def _cut_down(piece: Piece) -> Piece:
    n, k = piece.batch.n_examples, len(piece.places)
    if k == n:
        return piece
    rows = piece.rows

    def cut(tensor: Tensor) -> Tensor:
        return tensor[rows] if _per_example(tensor, n) else tensor

    labels = None if piece.batch.labels is None else piece.batch.labels[rows]
    batch = Batch(map_tensors(cut, piece.batch.content), labels, k)
    return Piece(batch, torch.arange(k, device=rows.device), piece.places)


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


def _tensors(batch: Batch) -> list[Tensor]:
    found: list[Tensor] = []
    map_tensors(lambda t: found.append(t) or t, batch.content)  # type: ignore[func-returns-value]
    return found


def _alike(one: Piece, other: Piece) -> bool:
    whole = [len(p.places) == p.batch.n_examples and _cuttable(p.batch.content) for p in (one, other)]
    if not all(whole) or _form(one.batch.content) != _form(other.batch.content):
        return False
    for a, b in zip(_tensors(one.batch), _tensors(other.batch), strict=True):
        per = _per_example(a, one.batch.n_examples), _per_example(b, other.batch.n_examples)
        if per[0] != per[1] or a.dtype != b.dtype or a.shape[per[0] :] != b.shape[per[0] :]:
            return False
        if not per[0] and not torch.equal(a, b):
            return False
    return (one.batch.labels is None) == (other.batch.labels is None)


def _form(content: Any) -> Any:
    """The structure without the tensors' values."""
    if isinstance(content, Mapping):
        return tuple((key, _form(value)) for key, value in content.items())
    if isinstance(content, (tuple, list)):
        return tuple(_form(item) for item in content)
    return "tensor" if isinstance(content, Tensor) else content


def _join(group: list[Piece]) -> Piece:
    if len(group) == 1:
        return group[0]
    n = group[0].batch.n_examples
    columns = zip(*(_tensors(piece.batch) for piece in group), strict=True)
    merged = iter([torch.cat(parts) if _per_example(parts[0], n) else parts[0] for parts in columns])
    content = map_tensors(lambda _: next(merged), group[0].batch.content)
    labels = [piece.batch.labels for piece in group]
    total = sum(piece.batch.n_examples for piece in group)
    known = [label for label in labels if label is not None]
    places = np.concatenate([piece.places for piece in group])
    batch = Batch(content, torch.cat(known) if known else None, total)
    return Piece(batch, torch.arange(total, device=group[0].rows.device), places)
