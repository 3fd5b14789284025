"""Per-example gradients of any parameter at all, by torch.func; slower, and reported."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, vjp, vmap

from npeff.batches.batches import Batch
from npeff.errors import ModelError
from npeff.gradients.rules.base import working

TOLERANCE = {torch.float64: 1e-7, torch.float32: 2e-4, torch.bfloat16: 6e-2, torch.float16: 2e-2}
"""Relative differences that are rounding, per coarsest dtype of the model."""

ABSOLUTE = {torch.float64: 1e-10, torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}
"""Differences that are rounding, relative to the norm of all parameters' gradients together: what is zero in theory, as
the gradient of an attention's key bias, is so much of the rest in practice."""

Logits = Callable[[nn.Module, Batch], Tensor]


class CalledModel(nn.Module):
    """A model and the way in which it is called: a module whose parameters functional_call can replace."""

    def __init__(self, model: nn.Module, call: Callable[[nn.Module, Any], Any]) -> None:
        super().__init__()
        self.model, self._call = model, call
        self.training = model.training

    def forward(self, given: Any) -> Any:
        """Call the model."""
        return self._call(self.model, given)


class Fallback:
    """Per-example gradients without rules, each group of examples checked against autograd.

    Examples are vectorised by ``torch.func.vmap``; a model that refuses that is run example by example. ``selected``
    are all selected parameters, also those that rules serve: their gradients say what is rounding.

    Attributes:
        loop_reason: Why examples are run one by one; empty while they are vectorised.
    """

    def __init__(self, model: nn.Module, call: Logits, selected: Mapping[str, Tensor]) -> None:
        self._called = CalledModel(model, call)
        self._selected = selected
        self.loop_reason = ""

    def gradients(
        self,
        batch: Batch,
        logits: Tensor,
        columns: Tensor,
        parameters: Mapping[str, Tensor],
        budget: int,
        precision: torch.dtype,
    ) -> Iterator[tuple[str, slice, Tensor]]:
        """Yield the gradients of some parameters, several examples at a time where they fit ``budget`` elements.

        The batch's ``logits (b, C)`` with their graph are used when it cannot be sliced; ``columns (b, C, R)``
        have their dtype.

        Yields:
            Name, examples, and gradients ``(b', R, *shape)`` float32 or float64.

        Raises:
            ModelError: Examples influence each other.
        """
        numel = columns.shape[2] * sum(tensor.numel() for tensor in parameters.values())
        step = max(1, min(budget // max(1, numel), max(1, 256 // columns.shape[2])))
        for start in range(0, batch.n_examples, step):
            examples = slice(start, min(start + step, batch.n_examples))
            for name, gradient in self._some(batch, logits, columns, parameters, examples, precision).items():
                yield name, examples, working(gradient)

    def _some(
        self,
        batch: Batch,
        logits: Tensor,
        columns: Tensor,
        parameters: Mapping[str, Tensor],
        examples: slice,
        precision: torch.dtype,
    ) -> dict[str, Tensor]:
        stacked = batch.take(examples).stacked() if batch.sliceable and not self.loop_reason else None
        if batch.sliceable and not self.loop_reason and stacked is None:
            self.loop_reason = "not all that belongs to an example is a row of a tensor"
        if stacked is not None:
            try:
                result = self._vectorised(stacked, columns[examples], parameters)
                gap = self._gap(logits, columns, parameters, examples, result, precision)
                if not gap:
                    return result
                self.loop_reason = f"torch.func.vmap disagrees with autograd on {gap}"
            except (RuntimeError, ValueError, NotImplementedError, TypeError) as error:
                cause = error.__cause__ or error  # the model's own error, without the advice around it
                message = str(cause).strip() or type(cause).__name__
                self.loop_reason = f"torch.func.vmap refused ({type(cause).__name__}: {message.splitlines()[0][:120]})"
        result = self._looped(batch, logits, columns, parameters, examples)
        gap = self._gap(logits, columns, parameters, examples, result, precision)
        if gap:
            raise ModelError(
                f"model: among the examples {examples.start} to {examples.stop - 1} of a batch the gradient of one "
                f"alone is not what it is in the batch ({gap}), although its logits are the same: examples "
                "influence each other through gradients alone, as in a mean over the batch that is subtracted and "
                "added again; remove that from forward=, or pass batches of one example. To take it, "
                f"{batch.how_cut()}"
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
                result: Tensor = functional_call(self._called, replaced, (one,))
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
            one = slice(example, example + 1)
            output = self._called(batch.take(one))[0] if batch.sliceable else logits[example]
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
        self,
        logits: Tensor,
        columns: Tensor,
        parameters: Mapping[str, Tensor],
        examples: slice,
        result: Mapping[str, Tensor],
        precision: torch.dtype,
    ) -> str:
        """What disagrees with autograd, if anything: a random combination of all rows is one backward pass."""
        generator = torch.Generator().manual_seed(examples.start)
        weights = torch.randn((columns.shape[0], columns.shape[2]), generator=generator, dtype=torch.float64)
        weights = weights.to(columns.device)
        cotangent = torch.zeros_like(logits, dtype=torch.float64)
        cotangent[examples] = torch.einsum("bcr,br->bc", columns[examples].to(torch.float64), weights[examples])

        def autograd(tensors: Mapping[str, Tensor], factor: float = 1.0) -> list[Tensor | None]:
            given = (cotangent * factor).to(logits.dtype)
            return list(
                torch.autograd.grad(logits, list(tensors.values()), given, retain_graph=True, allow_unused=True)
            )

        exact = Autograd(
            autograd(parameters),
            lambda factor: autograd(parameters, factor),
            parameters,
            precision,
            lambda: norm(flat(autograd(self._selected), self._selected).values()),
        )
        for name, rows in result.items():
            by_row = rows.reshape(-1, math.prod(rows.shape[2:])).to(torch.promote_types(rows.dtype, torch.float32))
            combined = weights[examples].reshape(-1).to(by_row.dtype) @ by_row
            size = float(weights[examples].reshape(-1).abs() @ by_row.norm(dim=1).to(torch.float64))
            if gap := exact.disagrees(name, combined.to(torch.float64), size=size):
                return f"{name} {gap}"
        return ""


class Autograd:
    """Autograd's gradients of a weighted sum, and how far they are from exact.

    Args:
        truth: The gradients of some parameters; None stands for zero.
        again: The same, with the cotangent times a factor.
        tensors: The parameters by name.
        precision: The coarsest dtype in the graph.
        scale: The norm of the gradients of all selected parameters together; None: these are all.
    """

    def __init__(
        self,
        truth: list[Tensor | None],
        again: Callable[[float], list[Tensor | None]],
        tensors: Mapping[str, Tensor],
        precision: torch.dtype,
        scale: Callable[[], float] | None = None,
    ) -> None:
        self._truth, self._again, self._precision, self._tensors = flat(truth, tensors), again, precision, tensors
        self._all = scale or (lambda: norm(self._truth.values()))

    @cached_property
    def _scale(self) -> float:
        return self._all()

    @cached_property
    def _rounding(self) -> dict[str, float]:
        """Per parameter the differences that are rounding.

        The cotangent is scaled by numbers that are no powers of two, and the gradient scaled back: by what that changes
        it is rounding.
        """
        largest = dict.fromkeys(self._truth, 0.0)
        for factor in (1.1, 1.3, 1.7):
            for name, gradient in flat(self._again(factor), self._tensors).items():
                gap = norm([gradient.to(torch.float64) / factor - self._truth[name]])
                largest[name] = max(largest[name], gap)
        return {name: 32 * change for name, change in largest.items()}

    def disagrees(self, name: str, total: Tensor, where: Sequence[slice] = (), size: float = 0.0) -> str:
        """Say by how much a sum of gradients differs from autograd's; empty where the difference is rounding.

        Args:
            name: The parameter.
            total: ``(k,)`` float64.
            where: The elements of the parameter that these are; none: all.
            size: The sum of the terms' norms, where terms may cancel.
        """
        whole = self._truth[name]
        truth = torch.cat([whole[some] for some in where]) if where else whole
        gap = norm([total - truth])
        allowed = TOLERANCE.get(self._precision, 2e-4) * (size + norm([truth]))
        # Gradients that are not finite pass: they are reported with example and element later.
        if gap > allowed:
            share = (len(truth) / max(1, len(whole))) ** 0.5
            allowed = max(allowed + ABSOLUTE.get(self._precision, 1e-6) * self._scale * share, self._rounding[name])
        return f"(by {gap:.3g}, allowed {allowed:.3g})" if gap > allowed else ""


def flat(gradients: list[Tensor | None], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Flatten gradients as autograd gives them, each to ``(numel,)`` in its own dtype."""
    return {
        name: (torch.zeros_like(tensor) if gradient is None else dense(gradient)).detach().reshape(-1)
        for (name, tensor), gradient in zip(tensors.items(), gradients, strict=True)
    }


def norm(gradients: Iterable[Tensor]) -> float:
    """Compute the norm of some gradients together."""
    return math.hypot(*(_norm(gradient) for gradient in gradients))


def _norm(gradient: Tensor) -> float:
    if gradient.dtype == torch.float32 and gradient.numel() >= 1 << 16:  # in float64 it takes ten times as long
        quick = float(torch.linalg.vector_norm(gradient))
        if 1e-15 < quick < 1e15:
            return quick
    return float(torch.linalg.vector_norm(gradient, dtype=torch.float64))


def dense(gradient: Tensor) -> Tensor:
    """Return the gradient without its sparse layout, if it has one."""
    return gradient.to_dense() if gradient.is_sparse else gradient


def groups(parameters: Mapping[str, Tensor], n_columns: int, budget: int) -> Iterator[dict[str, Tensor]]:
    """Yield parameters that fit together into ``budget`` elements for one example, at least one at a time."""
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
