"""One pass of a model over a point, below autograd, in which every operation on the input's path is frozen."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from npeff.batches.tensor_trees import leaves
from npeff.companions.linearize import piecewise, smooth  # noqa: F401 - they fill the table of rules
from npeff.companions.linearize.examples_apart import examples_apart
from npeff.companions.linearize.names import RESHAPED
from npeff.companions.linearize.program import Frozen, Like, Program, Step
from npeff.companions.linearize.rules import RULES, Affine, Call, Held, Outcome
from npeff.companions.linearize.values import Values, flat_storage, key
from npeff.errors import ModelError

_RANDOM = torch.Tag.nondeterministic_seeded
_ROOT = ""


class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Turns the operations that happen within it into steps, from the moment that :meth:`begin` is called.

    Args:
        model: Its weights are referred to, not copied; its modules give the steps their names.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.steps: list[Step] = []
        self.held: list[Frozen] = []
        self.modules: list[tuple[str, str]] = [(_ROOT, type(model).__name__)]
        self._values = Values(self._emit)
        self._without_input: set[int] = set()
        self._weights = {key(t) for t in (*model.parameters(), *model.buffers())}
        self._versions: dict[int, tuple[Tensor, int]] = {}
        self._leaning: dict[int | None, tuple[Tensor, frozenset[int]]] = {}
        self._always: set[int] = set()

    def begin(self, point: Tensor) -> None:
        """Record from here on what happens to a tensor."""
        self._values.set(point, self._emit(Step(lambda: point, (), Like.of(point))))

    def program(self, output: Tensor) -> tuple[Program, list[Frozen]]:
        """The steps that lead to an output, and what was held on the way.

        Raises:
            ModelError: The output does not depend on the input.
        """
        step = self._values.step(output) if self._values.holds(output) else None
        program = Program(self.steps, step, self._versions.values()) if step is not None else None
        if program is None or not program.depends:
            if self.held:
                raise ModelError(
                    "model: it is not piecewise linear, and its output does not depend on the input once these are "
                    f"held: {listed(self.held)}; leave out a final sigmoid or softmax, or linearise from a layer "
                    "behind them (at=)"
                )
            raise ModelError(
                "model: its output does not depend on the input as far as torch's operations show (does it pass "
                "through numpy?)"
            )
        return program, [self.held[i] for i in sorted(program.notes | self._always)]

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # torch would import its compiler, for seconds, to keep it away from this

    # ---- every operation comes through here ------------------------------------------------------------------

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, and freeze it if it depends on the input.

        Raises:
            ModelError: It is random, or has no frozen form.
        """
        kwargs = dict(kwargs or {})
        name = func._schema.name.partition("::")[2]
        if _RANDOM in func.tags and not (name == "rrelu_with_noise" and not any(args[4:5])):
            raise ModelError(f"model: {self._where()} draws random numbers ({name}): call model.eval()")
        tensors = _tensors((args, kwargs))
        if not self.steps or not any(self._values.holds(tensor) for tensor in tensors):
            output = func(*args, **kwargs)
            self._lean(output, self._notes(tensors))
            return output
        if func._schema.is_mutable and name not in RULES and name not in RESHAPED:
            return self._in_place(func, name, args, kwargs)
        output = func(*args, **kwargs)
        if name in RESHAPED:  # another view of the same memory, read by position
            return output
        if name == "_local_scalar_dense":
            if args[0].is_floating_point() and self._depends(args[0]):
                self._always.add(self._hold("item", "number"))
            return output
        outputs, outcomes = self._outcomes(self._call(name, func, args, kwargs, output), tensors)
        for tensor, (step, notes) in zip(outputs, outcomes, strict=True):
            if step is None:
                self._lean(tensor, notes)
            else:
                self._values.set(tensor, step)
        return output

    def _in_place(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        """x.f_(…) is x.copy_(f(x, …)); what else shares the memory follows.

        Raises:
            ModelError: It has no functional form.
        """
        target = args[0]
        functional = name.removesuffix("_")
        written = [argument.name for argument in func._schema.arguments if _is_written(argument)]
        packet = getattr(torch.ops.aten, functional, None)
        function = getattr(packet, func._overloadname, None) if packet else None
        if written != ["self"] or function is None or functional == name or not isinstance(target, Tensor):
            raise ModelError(f"model: {self._where()} computes {func}, which writes in place in a way not known here")
        before = None if self._values.holds(target) else flat_storage(target)
        output: Tensor = function(*args, **kwargs)
        tensors = _tensors((args, kwargs))
        _, ((step, notes),) = self._outcomes(self._call(functional, function, args, kwargs, output), tensors)
        with torch.no_grad():
            target.copy_(output)
        if step is None:
            value = target.detach().clone()
            step = self._emit(Step(lambda: value, (), Like.of(value), self._module(), True, (), notes))
        self._values.write(target, step, before)
        return target

    def _outcomes(
        self, call: Call, tensors: list[Tensor]
    ) -> tuple[list[Tensor], list[tuple[int | None, frozenset[int]]]]:
        """Apply the rule. For each output its step, or none where it is constant, and the notes it leans on.

        Raises:
            ModelError: There is none.
        """
        outputs = _tensors(call.output)
        nothing: frozenset[int] = frozenset()
        involved = any(self._depends(tensor) for tensor in tensors)
        if not involved or not any(tensor.is_floating_point() for tensor in outputs):
            notes = self._notes(tensors)
            return outputs, [(None, notes if not involved else nothing) for _ in outputs]
        if call.name not in RULES:
            raise ModelError(
                f"model: {call.where} computes {call.name}, which has no affine form here; linearise from a layer "
                "behind it (at=), or write it with operations that have one"
            )
        found = RULES[call.name](call)
        each: tuple[Outcome, ...] = found if isinstance(found, tuple) else (found,)
        notes = self._notes(call.kept)
        each += (None,) * (len(outputs) - len(each))
        return outputs, [self._settle(call, *pair, notes) for pair in zip(each, outputs, strict=True)]

    def _settle(
        self, call: Call, outcome: Outcome, output: Tensor, notes: frozenset[int]
    ) -> tuple[int | None, frozenset[int]]:
        if isinstance(outcome, Held):
            return None, notes | {self._hold(call.name, outcome.what)}
        if not isinstance(outcome, Affine):
            return None, notes
        if outcome.held:
            notes = notes | {self._hold(call.name, outcome.held)}
        inputs = tuple(self._values.step(tensor) for tensor in outcome.inputs)
        like, module = Like.of(output), self._module()
        apart = not outcome.held and examples_apart(call, outcome.inputs, output)
        step = Step(outcome.function, inputs, like, module, outcome.offset, outcome.pattern, notes, apart)
        return self._emit(step), notes

    # ---- bookkeeping -----------------------------------------------------------------------------------------

    def _emit(self, step: Step) -> int:
        if self.steps and all(i in self._without_input for i in step.inputs):
            self._without_input.add(len(self.steps))
        self.steps.append(step)
        return len(self.steps) - 1

    def _depends(self, tensor: Tensor) -> bool:
        return self._values.holds(tensor) and self._values.step(tensor) not in self._without_input

    def _call(self, name: str, function: Any, args: Any, kwargs: Any, output: Any) -> Call:
        kind = self.modules[-1][1]
        return Call(name, function, tuple(args), kwargs, output, self._where(), kind, self._depends, self._keep)

    def _keep(self, tensor: Tensor) -> Tensor:
        """A weight itself, its version noted; a copy of anything else, which may be overwritten."""
        if key(tensor) not in self._weights or tensor.is_inference():
            with torch.inference_mode(False):
                return tensor.detach().clone()
        self._versions.setdefault(id(tensor), (tensor, tensor._version))
        return tensor.detach()

    def _hold(self, operation: str, what: str) -> int:
        name, kind = self.modules[-1]
        self.held.append(Frozen(name, kind, operation, what))
        return len(self.held) - 1

    def _notes(self, tensors: list[Tensor]) -> frozenset[int]:
        notes: frozenset[int] = frozenset()
        for tensor in tensors:
            if key(tensor) in self._leaning:
                notes |= self._leaning[key(tensor)][1]
            if self._values.holds(tensor):
                notes |= self._step_notes(self._values.step(tensor))
        return notes

    def _step_notes(self, number: int) -> frozenset[int]:
        step = self.steps[number]
        return (
            step.notes.union(*(self._step_notes(i) for i in step.inputs))
            if number in self._without_input
            else frozenset()
        )

    def _lean(self, output: Any, notes: frozenset[int]) -> None:
        if notes:
            for tensor in leaves(output):
                if isinstance(tensor, Tensor):
                    earlier = self._leaning.get(key(tensor), (tensor, frozenset()))[1]
                    self._leaning[key(tensor)] = tensor, earlier | notes

    def _module(self) -> str:
        name, kind = self.modules[-1]
        return name or f"({kind})"

    def _where(self) -> str:
        name, kind = self.modules[-1]
        return f"{name!r} ({kind})" if name else f"the forward pass of {kind}"


def _tensors(tree: Any) -> list[Tensor]:
    """The tensors among an operation's arguments or outputs, in order."""
    found: list[Tensor] = []
    waiting = [tree]
    while waiting:
        item = waiting.pop()
        if isinstance(item, Tensor):
            found.append(item)
        elif isinstance(item, (tuple, list)):
            waiting.extend(reversed(item))
        elif isinstance(item, dict):
            waiting.extend(reversed(item.values()))
    return found


def _is_written(argument: Any) -> bool:
    return argument.alias_info is not None and bool(argument.alias_info.is_write)


def listed(held: list[Frozen]) -> str:
    """What was held, in words: the first five."""
    shown = [str(item) for item in held[:5]]
    return "; ".join(shown) + (f"; and {len(held) - 5} more" if len(held) > 5 else "")


@contextmanager
def recording(model: nn.Module, recorder: Recorder) -> Iterator[None]:
    """Within it the recorder knows which module is running; afterwards the model is as it was."""

    def enter(name: str, kind: str) -> Callable[..., None]:
        return lambda *_: recorder.modules.append((name, kind))

    def leave(*_: Any) -> None:
        recorder.modules.pop()

    fast = torch.backends.mha.get_fastpath_enabled()
    fused = not any(isinstance(module, nn.RNNBase) for module in model.modules())
    with ExitStack() as stack:
        for name, module in model.named_modules():
            if name and not isinstance(
                module, torch.jit.ScriptModule
            ):  # takes no hooks: its steps go by what is around
                hook = module.register_forward_pre_hook(enter(name, type(module).__name__))
                stack.callback(hook.remove)
                stack.callback(module.register_forward_hook(leave).remove)
        stack.callback(torch.backends.mha.set_fastpath_enabled, fast)
        torch.backends.mha.set_fastpath_enabled(False)
        if not fused:  # fused recurrent layers hide their steps
            stack.enter_context(warnings.catch_warnings())
            warnings.simplefilter("ignore")  # the flags themselves warn about devices that are not here
            stack.enter_context(torch.backends.mkldnn.flags(enabled=False))
            stack.enter_context(torch.backends.cudnn.flags(enabled=False))
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        stack.enter_context(recorder)
        yield
