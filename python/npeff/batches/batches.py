"""Read batches from the user's data: inputs, labels, examples, digests.

Which dimension of a batch is the examples' is guessed from sizes; :class:`Batch` lets the data say it.
"""

from __future__ import annotations

import copy
import hashlib
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
    update_with_tree,
)
from npeff.errors import ArgumentError, DataError

_REMEDY = "pass a DataLoader, or a list of batches such as [(inputs, labels)]"

OWN_BATCH = (
    "if its examples lie otherwise, yield npeff.Batch(content, n_examples, take), where take(content, positions) gives "
    "the content of some of them"
)
"""The way out where the examples of a batch cannot be guessed from sizes."""

Take = Callable[[Any, list[int]], Any]


class Batch:
    """One batch, and which of its parts belong to which example.

    Data may yield anything whose tensors have the examples as their first dimension. For all else (graphs, ragged
    lists, offsets, square matrices) let it yield ``Batch(content, n_examples, take)``: every function that cuts batches
    into examples then calls ``take``. A :class:`torch.utils.data.DataLoader` makes such batches in its ``collate_fn``.

    Args:
        content: What the data would yield by itself: ``(inputs, labels)``, a mapping, or whatever ``forward=`` takes.
        n_examples: How many examples it holds; by default the number of labels, or the first dimension of its first
            tensor.
        take: ``take(content, positions) -> content`` with the examples at ``positions``, a list of integers, in that
            order. By default everything is cut whose first dimension, or length, is ``n_examples``.

    Attributes:
        content: The same, once read: its tensors on the model's device, numpy arrays turned into tensors.
        labels: What stands for the labels in it, if anything.
        n_examples: Number of examples.
        part_of: Of a part of a batch, which part it is, for messages; empty for a whole batch.

    Raises:
        ArgumentError: ``n_examples`` is not a positive integer, or ``take`` cannot be called.
    """

    def __init__(self, content: Any, n_examples: int | None = None, take: Take | None = None) -> None:
        if n_examples is not None and (
            isinstance(n_examples, bool) or not isinstance(n_examples, int | np.integer) or n_examples < 1
        ):
            raise ArgumentError(f"n_examples: expected an integer ≥ 1, got {n_examples!r}")
        if take is not None and not callable(take):
            raise ArgumentError(f"take: expected callable(content, positions) -> content, got {take!r}")
        self.content = content
        self.labels: Tensor | None = None
        self.n_examples = 0 if n_examples is None else int(n_examples)
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
    def n_bytes(self) -> int:
        """Size of the tensors that it keeps alive."""
        kept = self.content if self._source is None else self._source.content
        return sum(leaf.numel() * leaf.element_size() for leaf in leaves(kept) if isinstance(leaf, Tensor))

    def take(self, examples: slice | Tensor) -> Batch:
        """Take some examples, a slice or positions: by the user's ``take``, or from all parts with one entry for each.

        Raises:
            DataError: The user's ``take`` failed, or a tensor cannot be cut.
        """
        n = self.n_examples
        positions = list(range(n)[examples]) if isinstance(examples, slice) else examples.tolist()
        if positions == list(range(n)):
            return self
        root = None
        if self._take is not None:
            # From the whole batch, always: take() may know it by other means than the content that it is given.
            root = self._source or self
            positions = [self._positions[i] for i in positions] if self._source is not None else positions
            try:
                content = self._take(root.content, positions)
            except Exception as error:
                raise DataError(
                    f"take: failed on a batch of {root.n_examples} examples, asked for {positions[:8]}: "
                    f"{type(error).__name__}: {error}"
                ) from error
            content = onto(self._device, content)
        else:
            content = self._cut(self.content, (), examples, positions)
        some = Batch(content, len(positions), self._take)
        some._device, some._whole, some._source, some._positions = self._device, self._whole, root, positions
        some.part_of = f"{len(positions)} of the {n} examples of a batch: {self.how_cut()}"
        some.labels = None if self.labels is None else _labels_in(content, self._device, "what take() gave")
        if some.labels is not None and len(some.labels) != len(positions):
            if self.labels is None or self.labels.numel() != n:  # no labels, but something that all examples share
                some.labels = None
                return some
            raise DataError(
                f"take: expected {len(positions)} labels for {len(positions)} positions, got {len(some.labels)}"
            )
        return some

    def fresh(self) -> Batch:
        """Copy the batch and all its tensors, for callers that may change them in place."""
        return self._with(map_tensors(lambda tensor: tensor.clone(), self.content, lambda item: called(item, "clone")))

    def to(self, device: torch.device) -> Batch:
        """Move the batch to another device."""
        if device == self._device:
            return self
        moved = self._with(onto(device, self.content))
        moved.labels = None if self.labels is None else self.labels.to(device)
        moved._device = device
        return moved

    def stacked(self) -> tuple[list[Tensor], Callable[[Sequence[Tensor]], Batch]] | None:
        """Give the tensors with one row per example, and a function that makes a batch of one from a row of each.

        None where tensors are not all that belongs to examples.
        """
        if self._take is not None:
            return None
        owned = [part for part, path in parts(self.content) if self._owns(part, path)]
        tensors = [part for part in owned if isinstance(part, Tensor) and not part.is_nested]
        if len(tensors) != len(owned) or any(tensor.layout != torch.strided for tensor in tensors):
            return None

        def one(rows: Sequence[Tensor]) -> Batch:
            pending = iter(rows)

            def place(part: Any, path: Path) -> Any:
                return next(pending).unsqueeze(0) if self._owns(part, path) else part

            made = Batch(rebuilt(place, self.content, ()), 1)
            made._device, made._whole = self._device, self._whole
            return made

        return tensors, one

    def joins(self, other: Batch) -> bool:
        """Tell whether the examples of both can be put into one batch."""
        if (
            self._take
            or other._take
            or self._form() != other._form()
            or (self.labels is None) != (other.labels is None)
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
        labels = [batch.labels for batch in every if batch.labels is not None]
        made.labels = torch.cat(labels) if labels else None
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
        return f"as the examples were counted by the {self._count} of {named(self.content)}: {OWN_BATCH}"

    def _input_parts(self) -> list[tuple[Any, Path]]:
        if isinstance(self.content, tuple | list) and self.labels is not None:
            return parts(self.content[0], ("[0]",))
        return parts(_inputs_in(self.content) if isinstance(self.content, Mapping) else self.content)

    def _owns(self, part: Any, path: Path) -> bool:
        """Whether a part has one entry for every example."""
        return path not in self._whole and length(part) == self.n_examples

    def _cut(self, tree: Any, path: Path, examples: slice | Tensor, positions: list[int]) -> Any:
        def cut(part: Any, where: Path) -> Any:
            if not self._owns(part, where):
                return part
            try:
                if isinstance(part, Tensor):
                    return rows_at(part, examples, positions)
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


def read_batches(data: Iterable[Any], device: torch.device, any_layout: bool) -> Iterator[Batch]:
    """Iterate over the batches of the data as :func:`read_batch` makes it.

    A tensor whose first dimension was not the number of examples in one batch is cut in none that follows: in a batch
    where the two agree, that is chance.

    Args:
        data: The data.
        device: Where the model is.
        any_layout: As for :func:`read_batch`.

    Raises:
        ArgumentError: The data is not an iterable of batches.
    """
    whole: frozenset[Path] = frozenset()
    for number, raw in enumerate(check_data(data)):
        batch = read_batch(raw, device, number, any_layout, whole)
        if batch._take is None:
            whole |= {path for part, path in parts(batch.content) if length(part) != batch.n_examples}
            batch._whole = whole
        yield batch


def read_batch(
    raw: Any, device: torch.device, number: int, any_layout: bool, whole: frozenset[Path] = frozenset()
) -> Batch:
    """Make a batch of what the data yielded.

    Args:
        raw: A :class:`Batch`, ``(inputs, labels)``, ``(inputs,)``, a mapping with or without ``"labels"``, or a tensor.
        device: Where the model is.
        number: The batch's position in the data, for messages.
        any_layout: Take any structure with a tensor, because the user's ``forward=`` will understand it.
        whole: Where the tensors lie that do not have the examples as their first dimension, whatever their size.

    Returns:
        The batch, on the device.

    Raises:
        DataError: It has no tensor, no examples, or a structure that the model cannot be called with.
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
    if given is None or not given.n_examples:
        n_examples = _count(content, labels, number, given is not None and given.cut_by_user)
    else:
        n_examples = given.n_examples
        labels = labels if labels is not None and len(labels) == n_examples else None
    batch = Batch(content, n_examples, None if given is None else given._take)
    batch.labels, batch._device, batch._whole = labels, device, whole
    if given is None or not given.n_examples:
        batch._count = "labels" if labels is not None else "first tensor"
    return batch


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


def examples_at(data: Iterable[Any], positions: Sequence[int], device: torch.device | None = None) -> list[Batch]:
    """Find the examples at some positions of the data, each as a batch of one, in the order asked for.

    Args:
        data: Batches, read until all are found.
        positions: From 0 over all batches.
        device: Where they go; the CPU by default.

    Raises:
        DataError: The data ends before, or a batch cannot be cut.
    """
    wanted = [int(i) for i in positions]
    found: dict[int, Batch] = {}
    start = 0
    for number, batch in enumerate(read_batches(data, device or torch.device("cpu"), True)):
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
