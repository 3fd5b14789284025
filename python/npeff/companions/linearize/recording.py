"""Recording: a pass of a model below autograd, in which every operation that depends on the point is frozen."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from npeff.companions.linearize import nonlinear_forms  # noqa: F401 - it fills the table of forms
from npeff.companions.linearize.affine_forms import (
    AFFINE_FORMS,
    Affine,
    Call,
    keeps_examples_apart,
    names_in,
    tensors_in,
)
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
        pattern: Gates and positions of maxima at the point, which change at kinks.
        held: The part of an operation that was held, for one that is not piecewise linear.
        constants: Numbers of earlier steps whose values, which do not depend on the input, went into the function.
        apart: Whether row i of the value is known to depend on row i of the inputs alone.
    """

    function: Callable[..., Tensor]
    inputs: tuple[int, ...]
    zero: Tensor
    module: str = ""
    pattern: tuple[Tensor, ...] = ()
    held: Frozen | None = None
    constants: tuple[int, ...] = ()
    apart: bool = False


class Program:
    """The steps that lead from an input to an output.

    Args:
        steps: All of them in order; step 0 is the input.
        output: The number of the step that is the output; steps that do not lead to it are dropped.
        constants: Weights in use, and the version each had; they may not change as long as the program lives.

    Attributes:
        held: The held parts on the way from input to output, those of constants that went into a step included.
        depends: Whether the output depends on the input.
        pattern: All gates and selections, in order.
        widest: Elements of the largest value.
    """

    def __init__(self, steps: list[Step], output: int, constants: Iterable[tuple[Tensor, int]]) -> None:
        live, reached = {output}, {output}
        for number in range(output, 0, -1):
            if number in live:
                live.update(steps[number].inputs)
            if number in reached:
                reached.update(steps[number].inputs + steps[number].constants)
        self.held = [held for n in sorted(reached) if (held := steps[n].held)]
        self.depends = 0 in live
        kept = sorted(live | {0})
        new = {number: i for i, number in enumerate(kept)}
        self.steps = [replace(s, inputs=tuple(new[i] for i in s.inputs)) for s in (steps[number] for number in kept)]
        self.pattern = [tensor for step in self.steps for tensor in step.pattern]
        self.widest = max(1, *(step.zero.shape.numel() for step in self.steps))
        self._last_use = {i: number for number, step in enumerate(self.steps) for i in step.inputs}
        self._constants = list(constants)

    def check(self) -> None:
        """Make sure that the model's weights are those of the recording.

        Raises:
            ModelError: They changed.
        """
        if any(tensor._version != version for tensor, version in self._constants):
            raise ModelError(
                "model: its weights changed since it was linearised (was it trained in between?); linearise it again"
            )

    def run(self, z: Tensor, at: dict[int, Tensor] | None = None) -> Tensor:
        """Replay the steps on another input: the output, with a graph to it where it requires gradients.

        The values of steps that ``at`` has are put there; the output has a graph to these too.
        """
        self.check()
        values = {0: z}
        for number, step in enumerate(self.steps[1:], 1):
            value = step.function(*(values[i] for i in step.inputs))
            if at is not None and number in at:
                value = at[number] = value if value.requires_grad else value.detach().requires_grad_()
            values[number] = value
            for i in step.inputs:
                if self._last_use[i] == number:
                    values.pop(i, None)
        return values[len(self.steps) - 1]

    @torch.no_grad()
    def offsets(self) -> dict[int, Tensor]:
        """Compute each step's value where all its inputs are zero, for the steps where that is not zero itself."""
        found = {}
        for number, step in enumerate(self.steps[1:], 1):
            value = step.function(*(self.steps[i].zero.contiguous() for i in step.inputs))
            if bool(value.count_nonzero()):
                found[number] = value
        return found

    def examples_apart(self, n: int) -> bool:
        """Tell whether every step is known to keep n examples, which come first in each value, apart."""
        return all(step.apart and step.zero.shape[0] == n for step in self.steps[1:])


_RANDOM = torch.Tag.nondeterministic_seeded
_RESHAPED = names_in("as_strided as_strided_ transpose_ t_ squeeze_ unsqueeze_ swapaxes_ swapdims_ detach_")
"""Operations that give the same memory another shape."""

Geometry = tuple[int, tuple[int, ...], tuple[int, ...], torch.dtype]


def geometry(tensor: Tensor) -> Geometry:
    """Return the offset, shape, strides and dtype of a tensor within its storage."""
    return int(tensor.storage_offset()), tuple(tensor.shape), tensor.stride(), tensor.dtype


def key(tensor: Tensor) -> int | None:
    """Identify the storage of a tensor; None for layouts without plain storage."""
    return int(tensor.untyped_storage()._cdata) if tensor.layout == torch.strided else None


@dataclass
class _Memory:
    """One storage: the geometry of its whole, and the step of each geometry that was written or viewed since."""

    holder: Tensor  # keeps the storage alive, so that its key stays its own
    whole: Geometry
    steps: dict[Geometry, int] = field(default_factory=dict)

    def positions(self, wanted: Geometry) -> Tensor:
        """Find the flat positions in the whole of a view's elements, in the view's shape.

        Raises:
            ModelError: The view reaches outside the whole.
        """
        offset, shape, stride, dtype = self.whole
        count = torch.Size(shape).numel()
        numbers = torch.full((self.holder.untyped_storage().nbytes() // dtype.itemsize,), -1)
        numbers.as_strided(shape, stride, offset).copy_(torch.arange(count).reshape(shape))
        found = numbers.as_strided(wanted[1], wanted[2], wanted[0]).clone()
        if wanted[3] != dtype or bool((found < 0).any()):
            raise ModelError(
                "model: it reads memory through a view of another type or extent, which cannot be followed"
            )
        return found.to(self.holder.device)


class Values:
    """A map from the tensors that depend on the input to the steps of their values, through views and writes in place.

    Tensors that share memory share a storage. Per storage there is one *whole* (the tensor that filled it) and a step
    for its value; views of it have steps of their own. A write through any view makes a new whole, and views that are
    read later are taken from that whole by position. So in-place code keeps its meaning, and the operations that make
    views need not be known.
    """

    def __init__(self, emit: Callable[[Step], int]) -> None:
        self._emit = emit
        self._memories: dict[int | None, _Memory] = {}

    def holds(self, tensor: Tensor) -> bool:
        """Tell whether a tensor's memory has a step."""
        return key(tensor) in self._memories

    def step(self, tensor: Tensor) -> int:
        """Return the number of the step that holds a tensor's value."""
        memory = self._memories[key(tensor)]
        wanted = geometry(tensor)
        if wanted not in memory.steps:
            index = memory.positions(wanted)
            whole = memory.steps[memory.whole]
            memory.steps[wanted] = self._emit(Step(lambda z: z.reshape(-1)[index], (whole,), zero_like(tensor)))
        return memory.steps[wanted]

    def set(self, tensor: Tensor, step: int) -> None:
        """Note the value of an operation's output: new memory, or a view of memory that is known."""
        memory = self._memories.get(key(tensor))
        if memory is None:
            memory = self._memories[key(tensor)] = _Memory(tensor, geometry(tensor))
        memory.steps.setdefault(geometry(tensor), step)

    def write(self, tensor: Tensor, step: int, before: Tensor | None) -> None:
        """Note that an operation wrote a value into existing memory through a tensor, any view.

        Where the memory did not depend on the input yet, ``before`` is its whole storage before the write, flat.
        """
        memory = self._memories.get(key(tensor))
        if memory is None:
            assert before is not None
            memory = _Memory(tensor, (0, tuple(before.shape), (1,), before.dtype))
            memory.steps[memory.whole] = self._emit(Step(lambda: before, (), zero_like(before)))
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
        written = self._emit(Step(write, (whole, step), zero_like(tensor, shape)))
        memory.steps = {memory.whole: written, wanted: step}


class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Turns the operations within its context into steps, after :meth:`begin` was called.

    The model's weights are referred to, not copied; its modules give the steps their names.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.steps: list[Step] = []
        self._numbers_read: list[Frozen] = []
        self.modules: list[tuple[str, str]] = [("", type(model).__name__)]  # those that are running
        self._values = Values(self._emit)
        self._without_input: set[int] = set()
        self._weights = {key(t) for t in (*model.parameters(), *model.buffers())}
        self._versions: dict[int, tuple[Tensor, int]] = {}

    def begin(self, point: Tensor) -> None:
        """Record the operations on a tensor from here on."""
        self._values.set(point, self._emit(Step(lambda: point, (), zero_like(point))))

    def program(self, output: Tensor) -> tuple[Program, list[Frozen]]:
        """Return the steps that lead to an output, and the parts that were held on the way.

        Raises:
            ModelError: The output does not depend on the input.
        """
        step = self._values.step(output) if self._values.holds(output) else None
        program = Program(self.steps, step, self._versions.values()) if step is not None else None
        if program is None or not program.depends:
            if held := [*self._numbers_read, *(step.held for step in self.steps if step.held)]:
                raise ModelError(
                    "model: it is not piecewise linear, and its output does not depend on the input once these are "
                    f"held: {held_in_words(held)}; leave out a final sigmoid or softmax, or linearise from a "
                    "layer behind them (at=)"
                )
            raise ModelError(
                "model: its output does not depend on the input as far as torch's operations show (does it pass "
                "through numpy?)"
            )
        return program, [*self._numbers_read, *program.held]

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # torch would import its compiler, for seconds, to keep it away from this

    # ---- every operation ------------------------------------------------------------------

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, and freeze it if it depends on the input.

        Raises:
            ModelError: It is random, or has no frozen form.
        """
        kwargs = dict(kwargs or {})
        name = func._schema.name.partition("::")[2]
        if _RANDOM in func.tags and not (name == "rrelu_with_noise" and not any(args[4:5])):
            raise ModelError(f"model: {self._where()} draws random numbers ({name}): call model.eval()")
        tensors = tensors_in((args, kwargs))
        if not self.steps or not any(self._values.holds(tensor) for tensor in tensors):
            return func(*args, **kwargs)
        if func._schema.is_mutable and name not in AFFINE_FORMS and name not in _RESHAPED:
            return self._in_place(func, name, args, kwargs)
        output = func(*args, **kwargs)
        if name in _RESHAPED:  # another view of the same memory, read by position
            return output
        if name == "_local_scalar_dense":
            if args[0].is_floating_point() and self._depends(args[0]):
                self._numbers_read.append(Frozen(*self.modules[-1], "item", "number"))
            return output
        steps = self._frozen(self._call(name, func, args, kwargs, output), tensors)
        for tensor, step in zip(tensors_in(output), steps, strict=True):
            if step is not None:
                self._values.set(tensor, step)
        return output

    def _in_place(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        """Treat x.f_(…) as x.copy_(f(x, …)); views of the same memory follow.

        Raises:
            ModelError: It has no functional form.
        """
        target = args[0]
        functional = name.removesuffix("_")
        written = [item.name for item in func._schema.arguments if item.alias_info and item.alias_info.is_write]
        packet = getattr(torch.ops.aten, functional, None)
        function = getattr(packet, func._overloadname, None) if packet else None
        if written != ["self"] or function is None or functional == name or not isinstance(target, Tensor):
            raise ModelError(f"model: {self._where()} computes {func}, which writes in place in a way not known here")
        before = None
        if not self._values.holds(target):
            count = target.untyped_storage().nbytes() // target.dtype.itemsize
            before = target.detach().as_strided((count,), (1,), 0).clone()
        output: Tensor = function(*args, **kwargs)
        tensors = tensors_in((args, kwargs))
        (step,) = self._frozen(self._call(functional, function, args, kwargs, output), tensors)
        with torch.no_grad():
            target.copy_(output)
        self._values.write(target, self._constant(target) if step is None else step, before)
        return target

    def _frozen(self, call: Call, tensors: list[Tensor]) -> list[int | None]:
        """Freeze an operation: give each output's step, or none where it is constant and no held part made it.

        Raises:
            ModelError: The operation has no affine form.
        """
        outputs = tensors_in(call.output)
        involved = any(self._depends(tensor) for tensor in tensors)
        if not involved or not any(tensor.is_floating_point() or tensor.is_complex() for tensor in outputs):
            made_by = () if involved else self._steps_of(tensors)
            return [self._constant(output, made_by) if made_by else None for output in outputs]
        if call.name not in AFFINE_FORMS or "reduce" in call.kwargs:  # scatter(…, reduce="multiply")
            raise ModelError(
                f"model: {call.where} computes {call.name}, which has no affine form here; linearise from a layer "
                "behind it (at=), or write it with operations that have one"
            )
        found = AFFINE_FORMS[call.name](call)
        each = found if isinstance(found, tuple) else (found, *(Affine(),) * (len(outputs) - 1))
        constants = self._steps_of(call.kept)
        return [self._settle(call, form, output, constants) for form, output in zip(each, outputs, strict=True)]

    def _settle(self, call: Call, form: Affine, output: Tensor, constants: tuple[int, ...]) -> int | None:
        held = Frozen(*self.modules[-1], call.name, form.held) if form.held else None
        if form.function is None:
            return self._constant(output, constants, held) if held or constants else None
        inputs = tuple(self._values.step(tensor) for tensor in form.inputs)
        apart = not held and keeps_examples_apart(call, form.inputs, output)
        return self._emit(Step(form.function, inputs, zero_like(output), "", form.pattern, held, constants, apart))

    # ---- bookkeeping -----------------------------------------------------------------------------------------

    def _emit(self, step: Step) -> int:
        if self.steps and all(i in self._without_input for i in step.inputs):
            self._without_input.add(len(self.steps))
        name, kind = self.modules[-1]
        self.steps.append(replace(step, module=name or f"({kind})"))
        return len(self.steps) - 1

    def _depends(self, tensor: Tensor) -> bool:
        return self._values.holds(tensor) and self._values.step(tensor) not in self._without_input

    def _call(self, name: str, function: Any, args: Any, kwargs: Any, output: Any) -> Call:
        kind = self.modules[-1][1]
        return Call(name, function, tuple(args), kwargs, output, self._where(), kind, self._depends, self._keep)

    def _keep(self, tensor: Tensor) -> Tensor:
        """Keep a weight itself, with its version; a copy of any other tensor, which may be overwritten."""
        if key(tensor) not in self._weights or tensor.is_inference():
            with torch.inference_mode(False):
                return tensor.detach().clone()
        self._versions.setdefault(id(tensor), (tensor, tensor._version))
        return tensor.detach()

    def _constant(self, tensor: Tensor, constants: tuple[int, ...] = (), held: Frozen | None = None) -> int:
        """Make a step of a value that is held as it is."""
        value = self._keep(tensor)
        return self._emit(Step(lambda: value, (), zero_like(value), "", (), held, constants))

    def _steps_of(self, tensors: list[Tensor]) -> tuple[int, ...]:
        """Return the steps of those of the tensors that are constants made by steps."""
        steps = [self._values.step(tensor) for tensor in tensors if self._values.holds(tensor)]
        return tuple(number for number in steps if number in self._without_input)

    def _where(self) -> str:
        name, kind = self.modules[-1]
        return f"{name!r} ({kind})" if name else f"the forward pass of {kind}"


def held_in_words(held: Sequence[Frozen]) -> str:
    """List the first five held parts, for messages."""
    shown = [str(item) for item in held[:5]]
    return "; ".join(shown) + (f"; and {len(held) - 5} more" if len(held) > 5 else "")


@contextmanager
def recording(model: nn.Module, recorder: Recorder) -> Iterator[None]:
    """Tell the recorder which module is running, within the block; restore the model afterwards."""

    def enter(name: str, kind: str) -> Callable[..., None]:
        return lambda *_: recorder.modules.append((name, kind))

    def leave(*_: Any) -> None:
        recorder.modules.pop()

    with ExitStack() as stack:
        for name, module in model.named_modules():
            # scripted modules take no hooks: the module around gives the name of their steps
            if name and not isinstance(module, torch.jit.ScriptModule):
                hook = module.register_forward_pre_hook(enter(name, type(module).__name__))
                stack.callback(hook.remove)
                stack.callback(module.register_forward_hook(leave).remove)
        stack.enter_context(plain_operations(model))
        stack.enter_context(recorder)
        yield


@contextmanager
def plain_operations(model: nn.Module) -> Iterator[None]:
    """Run fused layers of a model as the operations that they are made of, without a graph, within the block."""
    fast = torch.backends.mha.get_fastpath_enabled()
    with ExitStack() as stack:
        stack.callback(torch.backends.mha.set_fastpath_enabled, fast)
        torch.backends.mha.set_fastpath_enabled(False)
        if any(isinstance(module, nn.RNNBase) for module in model.modules()):
            stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")  # the flags themselves warn about devices that are not here
            stack.enter_context(torch.backends.mkldnn.flags(enabled=False))
            stack.enter_context(torch.backends.cudnn.flags(enabled=False))
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        yield
