"""Which step holds the value of each tensor, in the presence of views and in-place writes.

Tensors that share memory share a storage. Per storage there is one *whole* (the tensor that filled it) and a step for
its value; views of it have steps of their own. A write through any view makes a new whole, and views read later are
taken from that by position: what in-place code means, without knowing each operation that makes views.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from npeff.companions.linearize.program import Like, Step
from npeff.errors import ModelError

Geometry = tuple[int, tuple[int, ...], tuple[int, ...], torch.dtype]


def geometry(tensor: Tensor) -> Geometry:
    """Where in its storage a tensor lies, and how."""
    return int(tensor.storage_offset()), tuple(tensor.shape), tensor.stride(), tensor.dtype


def key(tensor: Tensor) -> int | None:
    """What tensors have in common that share memory; None for layouts without plain storage."""
    return int(tensor.untyped_storage()._cdata) if tensor.layout == torch.strided else None


@dataclass
class _Memory:
    """One storage: the geometry of its whole, and the step of each geometry that was written or viewed since."""

    holder: Tensor  # keeps the storage alive, so that its key stays its own
    whole: Geometry
    steps: dict[Geometry, int] = field(default_factory=dict)

    def positions(self, wanted: Geometry) -> Tensor:
        """Flat positions in the whole of a view's elements, in the view's shape.

        Raises:
            ModelError: The view reaches outside the whole.
        """
        offset, shape, stride, dtype = self.whole
        count = torch.Size(shape).numel()
        places = torch.full((self.holder.untyped_storage().nbytes() // dtype.itemsize,), -1)
        places.as_strided(shape, stride, offset).copy_(torch.arange(count).reshape(shape))
        found = places.as_strided(wanted[1], wanted[2], wanted[0]).clone()
        if wanted[3] != dtype or bool((found < 0).any()):
            raise ModelError(
                "model: it reads memory through a view of another type or extent, which cannot be followed"
            )
        return found.to(self.holder.device)


class Values:
    """The steps of all tensors that depend on the input.

    Args:
        emit: Appends a step to the program and returns its number.
    """

    def __init__(self, emit: Callable[[Step], int]) -> None:
        self._emit = emit
        self._memories: dict[int | None, _Memory] = {}

    def holds(self, tensor: Tensor) -> bool:
        """Whether a tensor depends on the input."""
        return key(tensor) in self._memories

    def step(self, tensor: Tensor) -> int:
        """The number of the step that holds a tensor's value."""
        memory = self._memories[key(tensor)]
        wanted = geometry(tensor)
        if wanted not in memory.steps:
            index = memory.positions(wanted)
            whole = memory.steps[memory.whole]
            memory.steps[wanted] = self._emit(Step(lambda z: z.reshape(-1)[index], (whole,), Like.of(tensor)))
        return memory.steps[wanted]

    def set(self, tensor: Tensor, step: int) -> None:
        """Note the value of an operation's output: new memory, or a view of memory that is known."""
        memory = self._memories.get(key(tensor))
        if memory is None:
            memory = self._memories[key(tensor)] = _Memory(tensor, geometry(tensor))
        memory.steps.setdefault(geometry(tensor), step)

    def write(self, tensor: Tensor, step: int, before: Tensor | None) -> None:
        """Note that an operation wrote a value into existing memory.

        Args:
            tensor: What was written to, any view.
            step: The value it has now.
            before: The whole storage as a flat tensor, before the write, where it did not depend on the input yet.
        """
        memory = self._memories.get(key(tensor))
        if memory is None:
            assert before is not None
            memory = _Memory(tensor, (0, tuple(before.shape), (1,), before.dtype))
            memory.steps[memory.whole] = self._emit(Step(lambda: before, (), Like.of(before), offset=True))
            self._memories[key(tensor)] = memory
        wanted = geometry(tensor)
        if wanted == memory.whole:
            memory.steps = {wanted: step}
            return
        index = memory.positions(wanted).reshape(-1)
        shape = memory.whole[1]

        def write(z: Tensor, part: Tensor) -> Tensor:
            return z.reshape(-1).scatter(0, index, part.reshape(-1)).reshape(shape)

        whole = memory.steps[memory.whole]
        written = self._emit(Step(write, (whole, step), Like(torch.Size(shape), tensor.dtype, tensor.device)))
        untouched = torch.ones(torch.Size(shape).numel(), dtype=torch.bool, device=index.device)
        untouched[index] = False
        kept = {
            view: number
            for view, number in memory.steps.items()
            if view not in (memory.whole, wanted) and bool(untouched[memory.positions(view)].all())
        }
        memory.steps = {**kept, memory.whole: written, wanted: step}


def flat_storage(tensor: Tensor) -> Tensor:
    """A copy of all of a tensor's storage, ``(elements,)``."""
    count = tensor.untyped_storage().nbytes() // tensor.dtype.itemsize
    return tensor.detach().as_strided((count,), (1,), 0).clone()
