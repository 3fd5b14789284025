"""A frozen network: the affine operations that an input went through, to be replayed on any other input.

::

    F(z) = A_D(… A_1(z)),   A_d(v) = L_d v + c_d

Step 0 is the input; step d applies A_d to the values of earlier steps. The linear parts L_d are closures over the
gates found at the point of linearisation; the offsets c_d = A_d(0) are biases, shifts, and constants that join.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from npeff.errors import ModelError
from npeff.short_repr import short_repr


@dataclass(frozen=True)
class Frozen:
    """Something that is not piecewise linear, and was held as it was at the point of linearisation.

    Attributes:
        module: Name of the module; empty for the model itself.
        kind: Its class.
        operation: Of torch: ``"gelu"``, ``"softmax"``, ``"native_layer_norm"``, …
        held: What is held: ``"gate"``, ``"attention pattern"``, ``"standard deviation"``, …
    """

    module: str
    kind: str
    operation: str
    held: str

    __repr__ = short_repr

    def __str__(self) -> str:
        return f"{self.module or 'the model itself'} ({self.kind}): {self.operation}, {self.held} held"


@dataclass(frozen=True)
class Like:
    """Shape, dtype and device of a tensor."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, tensor: Tensor) -> Like:
        """Those of a given tensor."""
        return cls(tensor.shape, tensor.dtype, tensor.device)

    def zeros(self) -> Tensor:
        """A tensor of zeros."""
        return torch.zeros(self.shape, dtype=self.dtype, device=self.device)


@dataclass(frozen=True, eq=False)
class Step:
    """One affine operation.

    Attributes:
        function: Maps the values of ``inputs`` to this step's value, affinely and differentiably.
        inputs: Numbers of earlier steps.
        like: Shape, dtype and device of the value.
        module: Name of the module it ran in; the model's class in brackets for the model itself.
        offset: Whether the value may be non-zero where all inputs are zero.
        pattern: What was found at the point and would change at its kinks: gates, arg-maxima.
        notes: Numbers of what was held, that this step leans on.
        apart: Row i of the value is known to depend on row i of the inputs alone.
    """

    function: Callable[..., Tensor]
    inputs: tuple[int, ...]
    like: Like
    module: str = ""
    offset: bool = False
    pattern: tuple[Tensor, ...] = ()
    notes: frozenset[int] = frozenset()
    apart: bool = False


class Program:
    """The steps that lead from an input to an output.

    Args:
        steps: All of them in order; step 0 is the input.
        output: The number of the step that is the output; steps that do not lead to it are dropped.
        constants: Weights in use, and the version each had; they may not change as long as the program lives.
    """

    def __init__(self, steps: list[Step], output: int, constants: Iterable[tuple[Tensor, int]]) -> None:
        live = {output}
        for number in range(output, 0, -1):
            if number in live:
                live.update(steps[number].inputs)
        self.depends = 0 in live
        kept = sorted(live | {0})
        place = {number: i for i, number in enumerate(kept)}
        self.steps = [replace(s, inputs=tuple(place[i] for i in s.inputs)) for s in (steps[number] for number in kept)]
        self._last_use = {i: number for number, step in enumerate(self.steps) for i in step.inputs}
        self._constants = list(constants)

    @property
    def notes(self) -> frozenset[int]:
        """Numbers of what was held on the way from input to output."""
        return frozenset().union(*(step.notes for step in self.steps))

    @property
    def pattern(self) -> list[Tensor]:
        """All gates and selections, in order."""
        return [tensor for step in self.steps for tensor in step.pattern]

    @property
    def widest(self) -> int:
        """Elements of the largest value."""
        return max(1, *(step.like.shape.numel() for step in self.steps))

    def check(self) -> None:
        """Make sure that the model's weights are those of the recording.

        Raises:
            ModelError: They changed.
        """
        if any(tensor._version != version for tensor, version in self._constants):
            raise ModelError(
                "model: its weights changed since it was linearised (was it trained in between?); linearise it again"
            )

    def run(self, z: Tensor, scales: Tensor | None = None) -> Tensor:
        """Replay.

        Args:
            z: Of the input's shape.
            scales: ``(n_sources,)`` what each offset of ``sources`` is multiplied by, or ``(n_sources, n)`` one for
                each example where all offsets have the examples first; by default 1.

        Returns:
            The output, with a graph to ``z`` and ``scales`` where they require gradients.
        """
        self.check()
        order = {number: i for i, number in enumerate(self.sources)} if scales is not None else {}
        values = {0: z}
        for number, step in enumerate(self.steps[1:], 1):
            value = step.function(*(values[i] for i in step.inputs))
            if scales is not None and number in order:
                scale = scales[order[number]] - 1
                offset = self.offset(number)
                value = value + scale.reshape(-1, *(1,) * (offset.dim() - 1) if scale.dim() else ()) * offset
            values[number] = value
            for i in step.inputs:
                if self._last_use[i] == number:
                    values.pop(i, None)
        return values[len(self.steps) - 1]

    def offset(self, number: int) -> Tensor:
        """c_d of a step: its value where all its inputs are zero."""
        step = self.steps[number]
        with torch.no_grad():
            return step.function(*(self.steps[i].like.zeros() for i in step.inputs))

    def examples_apart(self, n: int) -> bool:
        """Whether every step is known to keep n examples, which come first in each value, apart."""
        return all(step.apart and step.like.shape[0] == n for step in self.steps[1:])

    def examples_first(self, n: int) -> bool:
        """Whether every source's value has n as its first dimension."""
        return all(self.steps[number].like.shape[:1] == (n,) for number in self.sources)

    @cached_property
    def sources(self) -> list[int]:
        """The steps with an offset: where something other than the input enters."""
        candidates = (number for number, step in enumerate(self.steps) if number and step.offset)
        return [number for number in candidates if bool(self.offset(number).count_nonzero())]
