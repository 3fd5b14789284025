"""From a model and a point to the affine map that the model is there."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from npeff.batches.tensor_trees import leaves
from npeff.companions.linearize.linear_map import LinearMap
from npeff.companions.linearize.program import Frozen, Program
from npeff.companions.linearize.recording import Recorder, listed, recording
from npeff.errors import ArgumentError, DataError, ModelError, NpeffError
from npeff.gradients.eligibility import check_eligible

Forward = Callable[[Any, Any], Any]


def linearize(
    model: nn.Module,
    x: Any,
    outputs: int | Sequence[int] | None = None,
    at: str = "input",
    *,
    smooth: Literal["refuse", "freeze"] = "refuse",
    batched: bool | None = None,
    forward: Forward | None = None,
) -> LinearMap:
    """The affine map F(z) = W·z + b that a piecewise linear network is around x (Li et al. 2023, arXiv 2310.16295).

    The model runs once, unmodified; every operation on the way from the point to the output is recorded with its
    gates and selections frozen. W and b come from that frozen network: rows of W by backward passes, b as its output
    at zero.

    Args:
        model: Any module whose forward pass is made of torch's operations, in evaluation mode. It is left as it was.
        x: What the model takes: a float tensor, one example or many. With ``at`` a layer, anything it takes: token
            ids, a tuple of positional or a mapping of keyword arguments.
        outputs: Which outputs, as positions in each example's flattened output; by default all, in that order.
        at: ``"input"``, or the name of a layer (as in ``model.named_modules()``), from whose output onwards the map is
            taken. What reaches the output by another way is a constant, and counts in b.
        smooth: What is not piecewise linear (GELU, softmax, LayerNorm, …) is refused, or frozen: the gate, the
            attention pattern, the standard deviation are held as they are at x, and
            :attr:`LinearMap.frozen` says so.
        batched: Whether the first dimension of the point and of the output are examples. By default they are if the
            output has two dimensions or more and they are equal in length, or if a point of several dimensions
            gives one number per example.
        forward: ``callable(model, x) -> output``, where ``model(x)`` is not enough.

    Returns:
        The map.

    Raises:
        ArgumentError: An argument is not as described.
        DataError: ``x`` or the output has non-finite values.
        ModelError: The model is in training mode, random, not piecewise linear, or uses an operation without an
            affine form.
    """
    _check(model, x, at, smooth)
    check_eligible(model)
    run = _Run(model, x, at, forward)
    recorder, point, output = run(None)
    if not bool(torch.isfinite(output).all()):
        raise DataError("model: its output at x is not finite (NaN or infinite weights or inputs?)")
    examples = _examples(point, output, batched)
    chosen = _chosen(outputs, output.shape.numel() // examples)
    batched = _is_batched(point, output, batched)

    def program(given: tuple[Recorder, Tensor, Tensor]) -> tuple[Program, tuple[Frozen, ...], Tensor]:
        recorder, _, output = given
        with torch.no_grad(), recorder:
            flat = output.reshape(examples, -1)
            flat = flat if chosen is None else flat.index_select(1, torch.tensor(chosen, device=flat.device))
        found, held = recorder.program(flat)
        return found, tuple(held), flat

    found, frozen, flat = program((recorder, point, output))
    if smooth == "refuse" and frozen:
        raise ModelError(
            f"model: it is not piecewise linear, so no exact linear map exists: {listed(list(frozen))}. "
            "Pass smooth='freeze' to hold these as they are at x, or linearise from a layer behind them (at=)"
        )
    return LinearMap(
        found,
        point,
        flat if batched else flat[0],
        at=at,
        batched=batched,
        frozen=frozen,
        again=lambda z: program(run(z))[0],
    )


class _Run:
    """Runs and records the model, from the input or from a layer's output onwards."""

    def __init__(self, model: nn.Module, x: Any, at: str, forward: Forward | None) -> None:
        self._model, self._x, self._at, self._forward = model, x, at, forward

    def __call__(self, point: Tensor | None) -> tuple[Recorder, Tensor, Tensor]:
        """Record at x, or at another point.

        Returns:
            The recorder, the point and the output.

        Raises:
            ArgumentError: The layer is not used, or more than once, or gives no float tensor.
            ModelError: The model failed.
        """
        recorder, points = Recorder(self._model), []

        def begin(value: Tensor) -> Tensor:
            value = value.detach().clone() if point is None else point.clone()
            points.append(value.clone())
            recorder.begin(value)
            return value

        def from_layer(_: nn.Module, __: Any, output: Any) -> Tensor:
            if points:
                raise ArgumentError(f"at: {self._at!r} runs more than once in a forward pass; choose a layer around it")
            if not isinstance(output, Tensor) or not output.is_floating_point():
                raise ArgumentError(
                    f"at: {self._at!r} gives {_shown(output)}, expected a float tensor; choose a layer in it"
                )
            return begin(output)

        hook = None
        try:
            with recording(self._model, recorder):
                if self._at != "input":
                    hook = self._model.get_submodule(self._at).register_forward_hook(from_layer)
                output = self._call(begin(self._x) if self._at == "input" else self._x)
        finally:
            if hook is not None:
                hook.remove()
        if not points:
            raise ArgumentError(f"at: {self._at!r} does not run when the model is called with x")
        return recorder, points[0], output

    def _call(self, x: Any) -> Tensor:
        try:
            if self._forward is not None:
                output = self._forward(self._model, x)
            elif isinstance(x, Mapping):
                output = self._model(**x)
            else:
                output = self._model(*x) if isinstance(x, tuple) else self._model(x)
        except (NpeffError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            given = ", ".join(_shown(leaf) for leaf in leaves(x) if isinstance(leaf, Tensor))
            raise ModelError(
                f"model: failed on {given or type(x).__name__}: {type(error).__name__}: {error}. Check that x is what "
                "the model takes (images with a dimension for examples?), or pass forward=callable(model, x)"
            ) from error
        output = getattr(output, "logits", output)
        if isinstance(output, (tuple, list)) and len(output) == 1:
            output = output[0]
        if not isinstance(output, Tensor) or not output.is_floating_point():
            raise ModelError(
                f"model: its output is {_shown(output)}, expected a float tensor; choose one in "
                "forward=callable(model, x)"
            )
        return output


def _check(model: Any, x: Any, at: Any, smooth: Any) -> None:
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    if smooth not in ("refuse", "freeze"):
        raise ArgumentError(f"smooth: expected 'refuse' or 'freeze', got {smooth!r}")
    names = [name for name, layer in model.named_modules() if name and not isinstance(layer, torch.jit.ScriptModule)]
    if at != "input" and at not in names:
        near = difflib.get_close_matches(str(at), names, n=3)
        raise ArgumentError(
            f"at: expected 'input' or the name of a layer, got {at!r}; "
            + (f"did you mean {' or '.join(near)}?" if near else f"layers: {', '.join(names[:8])}")
        )
    if at == "input" and not isinstance(x, Tensor):
        raise ArgumentError(
            f"x: expected a tensor, got {type(x).__name__}; with several inputs linearise from a layer (at=), or "
            "pass the one of interest and forward=callable(model, x)"
        )
    tensors = [leaf for leaf in leaves(x) if isinstance(leaf, Tensor)]
    if at == "input" and not x.is_floating_point():
        raise ArgumentError(
            f"x: expected floating point numbers, got {x.dtype}; convert it, or for token ids linearise from "
            f"the embedding's output (at=){_embedding(model)}"
        )
    if any(tensor.numel() == 0 for tensor in tensors):
        raise DataError("x: it is empty")
    if any(tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()) for tensor in tensors):
        raise DataError("x: it has NaN or infinite values")


def _embedding(model: nn.Module) -> str:
    name = next((name for name, module in model.named_modules() if isinstance(module, nn.Embedding)), "")
    return f", at={name!r}" if name else ""


def _is_batched(point: Tensor, output: Tensor, batched: bool | None) -> bool:
    if batched is not None:
        return batched
    same = point.dim() > 0 and output.dim() > 0 and len(point) == len(output)
    return same and (output.dim() > 1 or point.dim() > 1)


def _examples(point: Tensor, output: Tensor, batched: bool | None) -> int:
    if not _is_batched(point, output, batched):
        return 1
    if not (point.dim() and output.dim() and len(point) == len(output)):
        raise ArgumentError(
            f"batched: expected the same number of examples first in the point {tuple(point.shape)} and in the "
            f"output {tuple(output.shape)}; pass batched=False for one map of all"
        )
    return len(point)


def _chosen(outputs: Any, n_outputs: int) -> list[int] | None:
    if outputs is None:
        return None
    listed = [outputs] if isinstance(outputs, int | np.integer) else outputs
    if isinstance(listed, Tensor):
        listed = listed.tolist()
    if not isinstance(listed, Sequence | range) or isinstance(listed, str) or not len(listed):
        raise ArgumentError(f"outputs: expected a position, or some, below {n_outputs}, got {outputs!r}")
    for item in listed:
        if isinstance(item, bool) or not isinstance(item, int | np.integer) or not -n_outputs <= item < n_outputs:
            raise ArgumentError(f"outputs: expected positions below {n_outputs}, got {item!r}")
    return [int(item) % n_outputs for item in listed]


def _shown(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}"
    return f"a {type(value).__name__}"
