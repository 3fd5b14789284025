"""The affine map of a model around a point: checks, the recorded run, the map."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from npeff.batches.tensor_trees import leaves
from npeff.companions.linearize.linear_map import LinearMap
from npeff.companions.linearize.program import Frozen, Program
from npeff.companions.linearize.recording import Recorder, held_in_words, recording
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
    """Find the affine map F(z) = W·z + b that equals a piecewise linear network around x (arXiv 2310.16295).

    The model runs once, unmodified; every operation on the way from the point to the output is recorded with its
    gates and selections frozen. W and b come from that frozen network: rows of W by backward passes, b as its output
    at zero.

    Args:
        model: Any module whose forward pass is made of torch's operations, in evaluation mode. It is left as it was.
        x: The model's input: a float tensor, one example or many. With ``at`` a layer, any input: token
            ids, a tuple of positional or a mapping of keyword arguments.
        outputs: Which outputs, as positions in each example's flattened output; by default all, in that order.
        at: ``"input"``, or the name of a layer (as in ``model.named_modules()``), from whose output onwards the map is
            taken. Paths to the output that avoid the layer are constants, and count in b.
        smooth: Operations that are not piecewise linear (GELU, softmax, LayerNorm, …) are refused, or frozen: the gate,
            the attention pattern, the standard deviation are held as they are at x, and :attr:`LinearMap.frozen`
            lists them.
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
    recorder, point, output = _recorded(model, x, at, forward)
    if not bool(torch.isfinite(output).all()):
        raise DataError("model: its output at x is not finite (NaN or infinite weights or inputs?)")
    n = _n_examples(point, output, batched)
    chosen = _chosen(outputs, output.shape.numel() // (n or 1))

    def program(recorder: Recorder, output: Tensor) -> tuple[Program, tuple[Frozen, ...], Tensor]:
        with torch.no_grad(), recorder:
            flat = output.reshape(n or 1, -1)
            flat = flat if chosen is None else flat.index_select(1, torch.tensor(chosen, device=flat.device))
        found, held = recorder.program(flat)
        return found, tuple(held), flat

    def again(z: Tensor) -> Program:
        recorder, _, output = _recorded(model, x, at, forward, z)
        return program(recorder, output)[0]

    found, frozen, flat = program(recorder, output)
    if smooth == "refuse" and frozen:
        raise ModelError(
            f"model: it is not piecewise linear, so no exact linear map exists: {held_in_words(frozen)}. "
            "Pass smooth='freeze' to hold these as they are at x, or linearise from a layer behind them (at=)"
        )
    flat = flat[0] if n is None else flat
    return LinearMap(found, point, flat, at=at, batched=n is not None, frozen=frozen, again=again)


def _recorded(
    model: nn.Module, x: Any, at: str, forward: Forward | None, point: Tensor | None = None
) -> tuple[Recorder, Tensor, Tensor]:
    """Run and record the model, from the input or from a layer's output onwards, or from another point in its place.

    Returns:
        The recorder, the point and the output.

    Raises:
        ArgumentError: The layer is not used, or more than once, or gives no float tensor.
        ModelError: The model failed.
    """
    recorder, points = Recorder(model), []

    def begin(value: Tensor) -> Tensor:
        value = value.detach().clone() if point is None else point.clone()
        points.append(value.clone())
        recorder.begin(value)
        return value

    def from_layer(_: nn.Module, __: Any, output: Any) -> Tensor:
        if points:
            raise ArgumentError(f"at: {at!r} runs more than once in a forward pass; choose a layer around it")
        if not isinstance(output, Tensor) or not output.is_floating_point():
            raise ArgumentError(f"at: {at!r} gives {_shown(output)}, expected a float tensor; choose a layer in it")
        return begin(output)

    with ExitStack() as stack:
        stack.enter_context(recording(model, recorder))
        if at != "input":
            stack.callback(model.get_submodule(at).register_forward_hook(from_layer).remove)
        output = model_output(model, begin(x) if at == "input" else x, forward)
    if not points:
        raise ArgumentError(f"at: {at!r} does not run when the model is called with x")
    return recorder, points[0], output


def model_output(model: nn.Module, x: Any, forward: Forward | None) -> Tensor:
    """Call the model on one input.

    Raises:
        ModelError: The model failed, or gives no float tensor.
        NpeffError: The model raised it.
        MemoryError: The model raised it.
        OutOfMemoryError: The model raised it.
    """
    try:
        if forward is not None:
            output = forward(model, x)
        elif isinstance(x, Mapping):
            output = model(**x)
        else:
            output = model(*x) if isinstance(x, tuple) else model(x)
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
            f"model: its output is {_shown(output)}, expected a float tensor; choose one in forward=callable(model, x)"
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


def _n_examples(point: Tensor, output: Tensor, batched: bool | None) -> int | None:
    """Find the number of examples that come first in the point and in the output; None for one map of all.

    Raises:
        ArgumentError: They are not batched as asked for.
    """
    same = point.dim() > 0 and output.dim() > 0 and len(point) == len(output)
    if batched is None:
        batched = same and (output.dim() > 1 or point.dim() > 1)
    if batched and not same:
        raise ArgumentError(
            f"batched: expected the same number of examples first in the point {tuple(point.shape)} and in the "
            f"output {tuple(output.shape)}; pass batched=False for one map of all"
        )
    return len(point) if batched else None


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
