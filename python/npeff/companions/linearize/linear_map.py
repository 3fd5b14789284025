"""The affine map of a network around a point: F(z) = W·z + b."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import cached_property
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import jvp

from npeff.batches.tensor_trees import leaves, shown
from npeff.companions.linearize.recording import Frozen, Program, Recorder, held_in_words, recording
from npeff.errors import ArgumentError, DataError, ModelError, NpeffError, check_choice
from npeff.gradients.backward import side_by_side
from npeff.gradients.eligibility import check_eligible
from npeff.models.devices import memory_explained

BUDGET = 1 << 26
"""Elements that the widest step may have, over all rows of W that are pulled back together."""

explained = memory_explained(
    "the linear map of x",
    "give fewer examples, choose outputs=, linearise from a later layer (at=), or take rows(), matvec() and rmatvec(), "
    "which do not hold W",
)


class LinearMap:
    """F(z) = W·z + b, which equals a network around a point x (Li et al. 2023, arXiv 2310.16295).

    Shapes below are for n examples of shape s and K outputs, ``x (n, *s)``; where the point is one example without
    a dimension for it, all shapes lack the n. Examples do not influence each other, so W is a matrix per example.

    Attributes:
        x: ``(n, *s)`` the point: the input, or the output of the layer ``at``.
        output: ``(n, K)`` the model's output there, F(x).
        at: ``"input"`` or the layer's name.
        frozen: The parts that are not piecewise linear and were held; empty where the map is exact.
    """

    def __init__(
        self,
        program: Program,
        x: Tensor,
        output: Tensor,
        *,
        at: str,
        batched: bool,
        frozen: tuple[Frozen, ...],
        again: Callable[[Tensor], Program],
    ) -> None:
        self.x, self.output, self.at, self.frozen = x, output, at, frozen
        self._program, self._batched, self._again = program, batched, again

    def __repr__(self) -> str:
        held = f", {len(self.frozen)} operations held" if self.frozen else ""
        return f"LinearMap({tuple(self.x.shape)} → {tuple(self.output.shape)}, at {self.at!r}{held})"

    @property
    def exact(self) -> bool:
        """Whether nothing was held: the model *is* this map wherever its activation pattern is that of x."""
        return not self.frozen

    @cached_property
    @explained
    def _graph(self) -> tuple[Tensor, Tensor]:
        """A point at zero and the frozen network's output there, with the graph between them."""
        with torch.inference_mode(False), torch.enable_grad():
            z = torch.zeros_like(self.x).requires_grad_()
            return z, self._program.run(z)

    # ---- W and b --------------------------------------------------------------------------------------

    @cached_property
    def b(self) -> Tensor:
        """``(n, K)`` the frozen network's output at zero input: a pass of its own, never F − W·x."""
        return self._out(self._graph[1].detach())

    @cached_property
    @explained
    def W(self) -> Tensor:
        """``(n, K, *s)`` one vector–Jacobian product of the frozen network per row; kept once made.

        For many outputs and large inputs, :meth:`rows`, :meth:`matvec` and :meth:`rmatvec` need less memory.
        """
        return torch.cat(list(self.rows()), dim=1 if self._batched else 0)

    def rows(self) -> Iterator[Tensor]:
        """Compute W some rows at a time.

        Yields:
            ``(n, k, *s)``, the next k rows.
        """
        n, n_outputs = self._flat.shape
        size = max(1, min(n_outputs, BUDGET // self._program.widest))
        for start in range(0, n_outputs, size):
            units = self._flat.new_zeros((min(size, n_outputs - start), n_outputs))
            units[:, start:].fill_diagonal_(1)
            rows = self._pull(units[:, None].expand(-1, n, -1))
            yield rows.transpose(0, 1) if self._batched else rows

    # ---- products ---------------------------------------------------------------------------------------------

    @explained
    def __call__(self, z: Tensor) -> Tensor:
        """Compute W·z + b, the frozen network at any point ``(n, *s)``.

        Raises:
            ArgumentError: ``z`` has another shape.
        """
        with torch.no_grad():
            return self._out(self._program.run(self._checked(z, self.x, "z")))

    @explained
    def matvec(self, v: Tensor) -> Tensor:
        """Compute W·v ``(n, K)`` for ``v (n, *s)``, by one pass; W is not formed.

        Raises:
            ArgumentError: ``v`` has another shape.
        """
        v = self._checked(v, self.x, "v")
        with torch.inference_mode(False), torch.no_grad():
            return self._out(jvp(self._program.run, (torch.zeros_like(self.x),), (v.clone(),))[1])

    def rmatvec(self, c: Tensor) -> Tensor:
        """Compute Wᵀ·c ``(n, *s)`` for ``c (n, K)``, by one backward pass; W is not formed.

        Raises:
            ArgumentError: ``c`` has another shape.
        """
        c = self._checked(c, self.output, "c")
        return self._pull(c.reshape(1, *self._flat.shape))[0]

    # ---- contributions -----------------------------------------------------------------------------------------

    def contributions(self, c: Tensor | None = None) -> Tensor:
        """Compute W_k ∘ x ``(n, K, *s)``: the contribution of each number of the point to each output.

        The contributions and b sum to F(x).

        Args:
            c: ``(n, K)`` weights of outputs: then ``(n, *s)``, the contributions to Σ_k c_k·F_k, by one backward pass.

        Raises:
            ArgumentError: ``c`` has another shape.
        """
        if c is not None:
            return self.rmatvec(c) * self.x
        return self.W * (self.x.unsqueeze(1) if self._batched else self.x)

    @explained
    def bias_contributions(self, c: Tensor | None = None) -> dict[str, Tensor]:
        """Compute the contribution of each module's constants to each output: Σ bias·(gradient at that bias).

        Constants are biases, the shifts of batch normalisation, bounds such as ReLU6's 6, and tensors that join
        without depending on the point.

        Args:
            c: ``(n, K)`` weights of outputs: then ``(n,)`` each, the contributions to Σ_k c_k·F_k, by one
                backward pass.

        Returns:
            ``(n, K)`` by module name (the model's class in brackets where its own code adds one), in order of use;
            they sum to b.

        Raises:
            ArgumentError: ``c`` has another shape.
        """
        if c is None:
            units = torch.eye(self._flat.shape[1], dtype=self._flat.dtype, device=self.x.device)
            cotangents = units[:, None].expand(-1, len(self._flat), -1)
        else:
            cotangents = self._checked(c, self.output, "c").reshape(1, *self._flat.shape)
        found: dict[str, Tensor] = {}
        for number, part in self._from_offsets(cotangents).items():
            name = self._program.steps[number].module
            found[name] = found[name] + part if name in found else part
        return {name: self._out(part if c is None else part[:, 0]) for name, part in found.items()}

    def residual(self) -> float:
        """Compute the largest |W·x + b − F(x)| over the largest |F(x)|.

        Three computations meet: rows of W by backward passes, b by a pass at zero, F(x) by the model.
        """
        x = self.x.double()
        products = [
            (rows.double() * (x.unsqueeze(1) if self._batched else x)).flatten(2 if self._batched else 1).sum(-1)
            for rows in ([self.W] if "W" in vars(self) else self.rows())
        ]
        total = torch.cat(products, dim=-1) + self.b.double()
        largest = float(self.output.abs().max())
        gap = float((total - self.output.double()).abs().max())
        return gap / largest if largest else gap

    def same_pattern(self, z: Tensor) -> bool:
        """Tell whether all gates and selections at another point ``(n, *s)`` are those of x: then the map holds there.

        Raises:
            ArgumentError: ``z`` has another shape.
        """
        theirs, ours = self._again(self._checked(z, self.x, "z")).pattern, self._program.pattern
        return len(theirs) == len(ours) and all(map(torch.equal, theirs, ours))

    # ---- internals --------------------------------------------------------------------------------------------------

    @property
    def _flat(self) -> Tensor:
        """``(n, K)`` always."""
        return self.output if self._batched else self.output[None]

    def _out(self, flat: Tensor) -> Tensor:
        return flat if self._batched else flat[0]

    def _checked(self, given: Tensor, like: Tensor, name: str) -> Tensor:
        if not isinstance(given, Tensor) or given.shape != like.shape:
            got = tuple(given.shape) if isinstance(given, Tensor) else type(given).__name__
            raise ArgumentError(f"{name}: expected a tensor of shape {tuple(like.shape)}, got {got}")
        return given.detach().to(like)

    @explained
    def _pull(self, cotangents: Tensor) -> Tensor:
        """Compute Wᵀ·c for each c of ``(m, n, K)`` cotangents: ``(m, n, *s)``, without the n where the point has none.

        Raises:
            ModelError: Examples influence each other.
        """
        self._program.check()
        if not self._independent:
            raise ModelError(
                "model: examples influence each other, so that there is no map per example; pass one example, or "
                "batched=False for one map of all"
            )
        return self._gradients(self._graph[1], [self._graph[0]], cotangents)[0]

    @staticmethod
    def _gradients(output: Tensor, points: list[Tensor], cotangents: Tensor) -> Sequence[Tensor]:
        together = side_by_side(output, points, cotangents) if len(cotangents) > 1 else None
        if together is not None:
            return cast("tuple[Tensor, ...]", together)  # every point leads to the output
        rows = [torch.autograd.grad(output, points, c, retain_graph=True) for c in cotangents]
        return [torch.stack(parts) for parts in zip(*rows, strict=True)]

    @cached_property
    def _independent(self) -> bool:
        """Whether no example's outputs have a gradient at another example.

        Two examples differ in some bit of their numbers. So for every bit the outputs of the examples that have it may
        have no gradient at the examples that lack it, nor the other way round: 2·log₂ n backward passes.
        """
        n = len(self._flat)
        if n == 1 or self._program.examples_apart(n):
            return True
        z, output = self._graph
        weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(0)).to(output)
        numbers = torch.arange(n, device=output.device)
        for bit in range((n - 1).bit_length()):
            for some in ((numbers >> bit & 1) == 1, (numbers >> bit & 1) == 0):
                leaked = torch.autograd.grad(output, z, weights * some[:, None], retain_graph=True)[0][~some]
                if bool(leaked.count_nonzero()):
                    return False
        return True

    def _from_offsets(self, cotangents: Tensor) -> dict[int, Tensor]:
        """Compute by step what its offset adds to each of ``(m, n, K)`` combinations of outputs: ``(n, m)``.

        That is the offset times the gradient at the step's value. One backward pass serves all examples where
        they come first in every such value, which shapes alone do not show: the sum is compared with b, and if it
        differs, each example has a backward pass of its own.
        """
        n, offsets = len(self._flat), self._program.offsets()
        if not offsets:
            return {}
        with torch.inference_mode(False), torch.enable_grad():
            at = dict(offsets)
            output = self._program.run(torch.zeros_like(self.x).requires_grad_(), at)
        values = list(at.values())
        size = max(1, BUDGET // sum(value.numel() for value in values))

        def summed(cotangents: Tensor, n_groups: int) -> Tensor:
            """Sum over each group of the values' entries: ``(offsets, n_groups, m)``."""
            found = []
            for some in torch.split(cotangents, size):
                pairs = zip(self._gradients(output, values, some), offsets.values(), strict=True)
                parts = [
                    torch.einsum("mgi,gi->gm", g.reshape(len(some), n_groups, -1), offset.reshape(n_groups, -1))
                    for g, offset in pairs
                ]
                found.append(torch.stack(parts))
            return torch.cat(found, dim=2).to(output.dtype)

        if n == 1 or (all(value.shape[:1] == (n,) for value in values) and self._independent):
            found = summed(cotangents, n)
            expected = (cotangents * self._graph[1].detach()).sum(-1).T
            tolerance = 1e3 * torch.finfo(found.dtype).eps * found.abs().sum(0)
            if bool(((found.sum(0) - expected).abs() <= tolerance + torch.finfo(found.dtype).tiny).all()):
                return dict(zip(offsets, found, strict=True))
        alone = cotangents * torch.eye(n, dtype=cotangents.dtype, device=cotangents.device)[:, None, :, None]
        return dict(zip(offsets, summed(alone.flatten(0, 1), 1).reshape(len(offsets), n, -1), strict=True))


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
        OutOfMemoryError: There is too little memory; the map's methods raise it too.
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
            raise ArgumentError(f"at: {at!r} gives {shown(output)}, expected a float tensor; choose a layer in it")
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
        OutOfMemoryError: There is too little memory.
    """
    try:
        output = _called(model, x, forward)
    except (NpeffError, MemoryError):
        raise
    except Exception as error:
        given = ", ".join(shown(leaf) for leaf in leaves(x) if isinstance(leaf, Tensor))
        raise ModelError(
            f"model: failed on {given or type(x).__name__}: {type(error).__name__}: {error}. Check that x is what "
            "the model takes (images with a dimension for examples?), or pass forward=callable(model, x)"
        ) from error
    output = getattr(output, "logits", output)
    if isinstance(output, (tuple, list)) and len(output) == 1:
        output = output[0]
    if not isinstance(output, Tensor) or not output.is_floating_point():
        raise ModelError(
            f"model: its output is {shown(output)}, expected a float tensor; choose one in forward=callable(model, x)"
        )
    return output


@explained
def _called(model: nn.Module, x: Any, forward: Forward | None) -> Any:
    if forward is not None:
        return forward(model, x)
    if isinstance(x, Mapping):
        return model(**x)
    return model(*x) if isinstance(x, tuple) else model(x)


def _check(model: Any, x: Any, at: Any, smooth: Any) -> None:
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    check_choice("smooth", smooth, ("refuse", "freeze"))
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
        embedding = next((name for name, module in model.named_modules() if isinstance(module, nn.Embedding)), "")
        raise ArgumentError(
            f"x: expected floating point numbers, got {x.dtype}; convert it, or for token ids linearise from "
            f"the embedding's output (at=){f', at={embedding!r}' if embedding else ''}"
        )
    if any(tensor.numel() == 0 for tensor in tensors):
        raise DataError("x: it is empty")
    if any(tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()) for tensor in tensors):
        raise DataError("x: it has NaN or infinite values")


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
