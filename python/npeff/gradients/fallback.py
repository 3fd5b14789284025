"""Per-example gradients of any parameter at all, by torch.func; slower, and reported."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call, vjp, vmap

from npeff.batches import Batch
from npeff.errors import ModelError
from npeff.gradients.rules.base import working

TOLERANCE = {torch.float64: 1e-7, torch.float32: 2e-4, torch.bfloat16: 6e-2, torch.float16: 2e-2}
"""Relative differences that are rounding, per dtype of the model."""

Logits = Callable[[nn.Module, Batch], Tensor]


class _Holder(nn.Module):
    """Lets functional_call replace the model's parameters around any way of calling it."""

    def __init__(self, model: nn.Module, call: Logits) -> None:
        super().__init__()
        self.model = model
        self._call = call

    def forward(self, batch: Batch) -> Tensor:
        return self._call(self.model, batch)


class Fallback:
    """Per-example gradients without rules.

    Examples are vectorised by ``torch.func.vmap``; a model that refuses that is run example by example.

    Attributes:
        loop_reason: Why examples are run one by one; empty while they are vectorised.
    """

    def __init__(self, model: nn.Module, call: Logits) -> None:
        self._holder = _Holder(model, call)
        self._holder.training = model.training
        self._call = call
        self._model = model
        self.loop_reason = ""

    def gradients(
        self, batch: Batch, logits: Tensor, columns: Tensor, parameters: Mapping[str, Tensor], budget: int
    ) -> Iterator[tuple[str, slice, Tensor]]:
        """Gradients of a group of parameters, some examples at a time.

        Args:
            batch: The batch.
            logits: ``(b, C)`` its logits with their graph; used when the batch cannot be sliced.
            columns: ``(b, C, R)`` cotangents in the logits' dtype.
            parameters: The parameters by name.
            budget: Most elements to make at a time, if more than one example would exceed it.

        Yields:
            Name, examples, and gradients ``(b', R, *shape)`` float32 or float64.

        Raises:
            ModelError: Examples influence each other.
        """
        numel = columns.shape[2] * sum(tensor.numel() for tensor in parameters.values())
        step = max(1, min(budget // max(1, numel), max(1, 256 // columns.shape[2])))
        for start in range(0, batch.n_examples, step):
            examples = slice(start, min(start + step, batch.n_examples))
            for name, gradient in self._some(batch, logits, columns, parameters, examples).items():
                yield name, examples, working(gradient)

    def _some(
        self, batch: Batch, logits: Tensor, columns: Tensor, parameters: Mapping[str, Tensor], examples: slice
    ) -> dict[str, Tensor]:
        stacked = batch.take(examples).stacked() if batch.sliceable and not self.loop_reason else None
        if batch.sliceable and not self.loop_reason and stacked is None:
            self.loop_reason = "not all that belongs to an example is a row of a tensor"
        if stacked is not None:
            try:
                result = self._vectorised(stacked, columns[examples], parameters)
                gap = _gap(logits, columns, parameters, examples, result)
                if not gap:
                    return result
                self.loop_reason = f"torch.func.vmap disagrees with autograd on {gap}"
            except (RuntimeError, ValueError, NotImplementedError, TypeError) as error:
                cause = error.__cause__ or error  # the model's own error, without the advice around it
                message = str(cause).strip() or type(cause).__name__
                self.loop_reason = f"torch.func.vmap refused ({type(cause).__name__}: {message.splitlines()[0][:120]})"
        result = self._looped(batch, logits, columns, parameters, examples)
        gap = _gap(logits, columns, parameters, examples, result)
        if gap:
            raise ModelError(
                f"model: among the examples {examples.start} to {examples.stop - 1} of a batch the gradient "
                "of one alone is not what it is in the "
                f"batch ({gap}), so examples influence each other; use model.eval(), batches of one "
                f"example, or forward= without that dependence. To take it, {batch.how_cut()}"
            )
        return result

    def _vectorised(
        self,
        stacked: tuple[list[Tensor], Callable[[Sequence[Tensor]], Batch]],
        columns: Tensor,
        parameters: Mapping[str, Tensor],
    ) -> dict[str, Tensor]:
        arrays, example_of = stacked
        values = {f"model.{name}": tensor.detach() for name, tensor in parameters.items()}

        def rows(cotangents: Tensor, *example: Tensor) -> dict[str, Tensor]:
            one = example_of(example)

            def output(replaced: dict[str, Tensor]) -> Tensor:
                result: Tensor = functional_call(self._holder, replaced, (one,))
                return result[0]

            pullback = vjp(output, values)[1]
            (gradients,) = vmap(pullback)(cotangents.T)
            return dict(gradients)

        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "(?s).*performance drop", UserWarning)  # coverage() tells what is slow
            result = vmap(rows, randomness="same")(columns, *arrays)
        return {name.removeprefix("model."): gradient.detach() for name, gradient in result.items()}

    def _looped(
        self, batch: Batch, logits: Tensor, columns: Tensor, parameters: Mapping[str, Tensor], examples: slice
    ) -> dict[str, Tensor]:
        r = columns.shape[2]
        n = len(range(batch.n_examples)[examples])
        result = {name: tensor.new_zeros((n, r, *tensor.shape)) for name, tensor in parameters.items()}
        for i in range(n):
            example = examples.start + i
            if batch.sliceable:
                output = self._call(self._model, batch.take(slice(example, example + 1)))[0]
            else:
                output = logits[example]
            for column in range(r):
                gradients = torch.autograd.grad(
                    output,
                    list(parameters.values()),
                    columns[example, :, column],
                    retain_graph=True,
                    allow_unused=True,
                )
                for name, gradient in zip(parameters, gradients, strict=True):
                    if gradient is not None:
                        result[name][i, column] = dense(gradient)
        return result


def _gap(
    logits: Tensor,
    columns: Tensor,
    parameters: Mapping[str, Tensor],
    examples: slice,
    result: Mapping[str, Tensor],
) -> str:
    """What disagrees with autograd, if anything: a random combination of all rows is one backward pass."""
    generator = torch.Generator().manual_seed(examples.start)
    weights = torch.randn((columns.shape[0], columns.shape[2]), generator=generator, dtype=torch.float64)
    weights = weights.to(columns.device, columns.dtype)
    cotangent = torch.zeros_like(logits)
    cotangent[examples] = torch.einsum("bcr,br->bc", columns[examples], weights[examples])
    truth = torch.autograd.grad(logits, list(parameters.values()), cotangent, retain_graph=True, allow_unused=True)
    for (name, rows), gradient in zip(result.items(), truth, strict=True):
        wide = torch.promote_types(rows.dtype, torch.float32)
        flat = rows.reshape(-1, math.prod(rows.shape[2:])).to(wide)
        combined = weights[examples].reshape(-1).to(wide) @ flat
        expected = torch.zeros_like(combined) if gradient is None else dense(gradient).reshape(-1).to(wide)
        size = (weights[examples].reshape(-1).to(wide).abs() * flat.norm(dim=1)).sum()
        gap = float((combined - expected).norm())
        if gap > TOLERANCE.get(rows.dtype, 2e-4) * float(size + expected.norm()):
            return f"{name} (by {gap:.3g})"
    return ""


def dense(gradient: Tensor) -> Tensor:
    """The gradient without its sparse layout, if it has one."""
    return gradient.to_dense() if gradient.is_sparse else gradient


def groups(parameters: Mapping[str, Tensor], n_columns: int, budget: int) -> Iterator[dict[str, Tensor]]:
    """Parameters that fit together into ``budget`` elements for one example, at least one at a time."""
    group: dict[str, Tensor] = {}
    size = 0
    for name, tensor in parameters.items():
        numel = n_columns * math.prod(tensor.shape)
        if group and size + numel > budget:
            yield group
            group, size = {}, 0
        group[name] = tensor
        size += numel
    if group:
        yield group
