"""A frozen network: the affine operations on the way from an input to the output, to be replayed on other inputs.

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
    """A part of an operation that is not piecewise linear, held as it was at the point of linearisation.

    Attributes:
        module: Name of the module; empty for the model itself.
        kind: Its class.
        operation: Of torch: ``"gelu"``, ``"softmax"``, ``"native_layer_norm"``, …
        held: The part: ``"gate"``, ``"attention pattern"``, ``"standard deviation"``, …
    """

    module: str
    kind: str
    operation: str
    held: str

    __repr__ = short_repr

    def __str__(self) -> str:
        return f"{self.module or 'the model itself'} ({self.kind}): {self.operation}, {self.held} held"


def zero_like(tensor: Tensor, shape: tuple[int, ...] | None = None) -> Tensor:
    """Make a zero with a tensor's dtype and device, and its shape or another, that takes no memory."""
    shape = tensor.shape if shape is None else shape
    with torch.inference_mode(False):
        return torch.zeros((), dtype=tensor.dtype, device=tensor.device).expand(shape)


@dataclass(frozen=True, eq=False)
class Step:
    """One affine operation.

    Attributes:
        function: Maps the values of ``inputs`` to this step's value, affinely and differentiably.
        inputs: Numbers of earlier steps.
        zero: A zero with the shape, dtype and device of the value, from :func:`zero_like`.
        module: Name of the module it ran in; the model's class in brackets for the model itself.
        offset: Whether the value may be non-zero where all inputs are zero.
        pattern: Gates and positions of maxima at the point, which change at kinks.
        notes: Numbers of the held parts that this step depends on.
        apart: Whether row i of the value is known to depend on row i of the inputs alone.
    """

    function: Callable[..., Tensor]
    inputs: tuple[int, ...]
    zero: Tensor
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
        """Numbers of the held parts on the way from input to output."""
        return frozenset().union(*(step.notes for step in self.steps))

    @property
    def pattern(self) -> list[Tensor]:
        """All gates and selections, in order."""
        return [tensor for step in self.steps for tensor in step.pattern]

    @property
    def widest(self) -> int:
        """Elements of the largest value."""
        return max(1, *(step.zero.shape.numel() for step in self.steps))

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
        """Replay the steps on another input.

        Args:
            z: A point of the input's shape.
            scales: ``(n_sources,)`` factors of the offsets of ``sources``, or ``(n_sources, n)`` one for
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
        """Compute c_d of a step: its value where all its inputs are zero."""
        step = self.steps[number]
        with torch.no_grad():
            return step.function(*(self.steps[i].zero.contiguous() for i in step.inputs))

    def examples_apart(self, n: int) -> bool:
        """Tell whether every step is known to keep n examples, which come first in each value, apart."""
        return all(step.apart and step.zero.shape[0] == n for step in self.steps[1:])

    def examples_first(self, n: int) -> bool:
        """Tell whether every source's value has n as its first dimension."""
        return all(self.steps[number].zero.shape[:1] == (n,) for number in self.sources)

    @cached_property
    def sources(self) -> list[int]:
        """Numbers of the steps with an offset."""
        candidates = (number for number, step in enumerate(self.steps) if number and step.offset)
        return [number for number in candidates if bool(self.offset(number).count_nonzero())]
