"""How operations of torch are frozen: the table of rules, and the rules for what is linear already."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from npeff.companions.linearize.names import CONSTANT, FACTORS, JOINT, LINEAR, OFFSET
from npeff.errors import ModelError


@dataclass(frozen=True)
class Affine:
    """An output's value as an affine function of tensors that depend on the input.

    Attributes:
        function: From their values.
        inputs: The tensors, as they are at the point.
        offset: Whether the function may be non-zero at zero.
        pattern: What would change at a kink.
        held: What was held, for an operation that is not piecewise linear.
    """

    function: Callable[..., Tensor]
    inputs: tuple[Tensor, ...]
    offset: bool = False
    pattern: tuple[Tensor, ...] = ()
    held: str = ""


@dataclass(frozen=True)
class Held:
    """An output that is held at its value, because it is not piecewise linear."""

    what: str = "value"


Outcome = Affine | Held | None
"""Of one output. None: it is constant, exactly so away from kinks."""

Rule = Callable[["Call"], Outcome | tuple[Outcome, ...]]


@dataclass
class Call:
    """One operation as it happened.

    Attributes:
        name: Without ``aten::`` and without the underscore of in-place forms.
        function: The functional overload.
        args: Positional arguments, tensors at the point.
        kwargs: Keyword arguments.
        output: What it gave.
        where: The module that it ran in, for messages.
        kind: That module's class.
        depends: Whether a tensor depends on the input.
        keep: What to keep of a tensor that does not, or whose dependence is to be held.
        kept: The tensors that were kept.
    """

    name: str
    function: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any
    where: str
    kind: str
    depends: Callable[[Tensor], bool]
    keep: Callable[[Tensor], Tensor]
    kept: list[Tensor] = field(default_factory=list)

    def constant(self, tensor: Tensor) -> Tensor:
        """A tensor that the frozen operation holds on to."""
        self.kept.append(tensor)
        return self.keep(tensor)

    def argument(self, position: int, name: str, default: Any = None) -> Any:
        """An argument, wherever it was passed."""
        return self.args[position] if position < len(self.args) else self.kwargs.get(name, default)

    def varies(self, position: int) -> bool:
        """Whether an argument depends on the input."""
        return position < len(self.args) and self._varies(self.args[position])

    def _varies(self, tree: Any) -> bool:
        if isinstance(tree, (list, tuple)):
            return any(self._varies(item) for item in tree)
        return isinstance(tree, Tensor) and self.depends(tree)

    def fixed(self, position: int, name: str) -> Any:
        """An argument that may not depend on the input.

        Raises:
            ModelError: It does.
        """
        value = self.argument(position, name)
        if self._varies(value):
            raise ModelError(
                f"model: {self.where} computes {self.name} with a {name} that depends on the input, which has no "
                "linear form here; linearise from a layer behind it (at=)"
            )
        return self.constant(value) if isinstance(value, Tensor) else value

    def replay(self, *places: int) -> tuple[Callable[..., Any], tuple[Tensor, ...]]:
        """The operation itself, as a function of the arguments that depend on the input.

        Args:
            *places: Positions of the arguments that vary; the others are held. By default all vary.

        Returns:
            The function, and the tensors it takes.
        """
        inputs: list[Tensor] = []

        def template(tree: Any, vary: bool) -> Any:
            if isinstance(tree, Tensor):
                if not (vary and self.depends(tree)):
                    return self.constant(tree)
                inputs.append(tree)
                return _Slot(len(inputs) - 1)
            return type(tree)(template(item, vary) for item in tree) if isinstance(tree, (list, tuple)) else tree

        args = tuple(template(arg, not places or i in places) for i, arg in enumerate(self.args))
        kwargs = {name: template(value, not places) for name, value in self.kwargs.items()}
        function = _REPLAYED_AS.get(self.name, self.function)

        def run(*values: Tensor) -> Any:
            return function(*_fill(args, values), **{name: _fill(value, values) for name, value in kwargs.items()})

        return run, tuple(inputs)


@dataclass(frozen=True)
class _Slot:
    index: int


def _fill(tree: Any, values: tuple[Tensor, ...]) -> Any:
    if isinstance(tree, _Slot):
        return values[tree.index]
    return type(tree)(_fill(item, values) for item in tree) if isinstance(tree, (list, tuple)) else tree


# In a replay values may lie in memory in another order than at the point, where no view of them exists.
_REPLAYED_AS: dict[str, Callable[..., Any]] = {"view": torch.reshape, "_unsafe_view": torch.reshape}

RULES: dict[str, Rule] = {}
"""By name of the operation; filled by the modules that define rules."""


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Put a function into the table."""

    def put(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, function))
        return function

    return put


@rule(*CONSTANT)
def constant(call: Call) -> Outcome:
    """Nothing of the input is left but its shape, or on which side of a jump it is."""
    return None


@rule(*LINEAR)
def linear(call: Call) -> Outcome | tuple[Outcome, ...]:
    """Layout, sums, means, interpolation, copies: linear in the first argument."""
    for position in range(1, len(call.args)):
        if call.varies(position):
            call.fixed(position, f"{position + 1}th argument")
    return joint(call)


@rule(*JOINT)
def joint(call: Call) -> Outcome | tuple[Outcome, ...]:
    """Additions and their like: affine in all tensors together."""
    run, inputs = call.replay()
    if isinstance(call.output, Tensor):
        return Affine(run, inputs, call.name in OFFSET)
    return tuple(Affine(lambda *values, i=i: run(*values)[i], inputs) for i in range(len(call.output)))


@rule(*FACTORS)
def product(call: Call) -> Outcome:
    """Products and convolutions: linear in each factor.

    Where both factors depend on the input, each in turn varies while the other is held, and the mean is taken: exact
    at the point, nothing left over.
    """
    factors = [i for i in FACTORS[call.name] if call.varies(i)]
    offset = call.name in OFFSET
    if len(factors) < 2:
        run, inputs = call.replay()
        return Affine(run, inputs, offset)
    others = [i for i in range(len(call.args)) if i not in FACTORS[call.name]]
    (first, a), (second, b) = (call.replay(i, *others) for i in factors)

    def mean(*values: Tensor) -> Tensor:
        return (first(*values[: len(a)]) + second(*values[len(a) :])) / 2

    return Affine(mean, (*a, *b), offset, held="each factor in turn, half each,")


@rule("div")
def quotient(call: Call) -> Outcome | tuple[Outcome, ...]:
    """Linear in the numerator; a denominator that depends on the input is held."""
    if call.argument(2, "rounding_mode"):
        return None
    if not call.varies(1):
        return joint(call)
    if not call.varies(0):
        return Held()
    run, inputs = call.replay(0)
    return Affine(run, inputs, held="denominator")


@rule("copy", "fill", "zero")
def overwritten(call: Call) -> Outcome:
    """What was there is gone; what comes is copied."""
    if not call.varies(1):
        call.fixed(1, "value")
        return None
    shape, dtype = call.output.shape, call.output.dtype
    return Affine(lambda z: z.to(dtype).expand(shape), (call.args[1],))
