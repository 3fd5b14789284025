"""What was trained: J(θ) = (1/n) Σ ℓ(z_i, θ) + (w/2)‖θ‖², its gradient, and its Hessian's products."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from npeff.batches.batches import Batch
from npeff.companions.influence.blocks import formed, place
from npeff.companions.influence.losses import Examples, Loss, call_loss
from npeff.errors import DataError, ModelError
from npeff.gradients.engine import PerExampleGradients
from npeff.gradients.rules.base import working
from npeff.gradients.tiles import Block
from npeff.models.parameters import Parameters


@dataclass(frozen=True)
class Stationarity:
    """How far a model is from an optimum of its training loss.

    Attributes:
        gradient_norm: ``‖∇J‖``, weight decay included; 0 at an optimum.
        example_norm: Root mean square of ``‖∇ℓ(z_i)‖``.
        n: Number of examples.
    """

    gradient_norm: float
    example_norm: float
    n: int

    @property
    def relative(self) -> float:
        """``‖∇J‖`` over the root mean square of ``‖∇ℓ(z_i)‖``: between 0 (optimum) and about 1 (no training)."""
        return self.gradient_norm / self.example_norm if self.example_norm else 0.0


class Objective:
    """The training objective over given data.

    Made within ``recording()`` contexts of its engine: every method opens one.

    Args:
        model: The model, in evaluation mode.
        loss: Per-example loss.
        data: The examples.
        parameters: The selected parameters' places in the flat vector of length m.
        weight_decay: w; the coefficient of ½‖θ‖² in what was trained.
        memory: Bytes that Hessian products may take beside their vectors.

    Raises:
        ModelError: The model has no per-example gradients as it stands.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        data: Examples,
        parameters: Parameters,
        weight_decay: float = 0.0,
        memory: int = 1 << 29,
    ) -> None:
        self.model, self.loss, self.data, self.parameters = model, loss, data, parameters
        self.weight_decay, self.memory = weight_decay, memory
        self.engine = PerExampleGradients(model, parameters, lambda _, batch: self.losses(batch)[:, None])
        self.tensors = list(self.engine.tensors.values())
        self.dtype = working(self.tensors[0]).dtype
        self.device = self.tensors[0].device
        self.n = data.count()
        self._batched = True
        self._saved: int | None = None
        self._graphs: dict[int, Tensor] | None = None

    @property
    def m(self) -> int:
        """Number of selected parameters."""
        return self.parameters.n_parameters

    def losses(self, batch: Batch) -> Tensor:
        """``(b,)`` with their graph."""
        return call_loss(self.model, self.loss, batch, "train_loss")

    def theta(self) -> Tensor:
        """The selected parameters as one vector ``(m,)``, a copy."""
        return torch.cat([tensor.detach().reshape(-1) for tensor in self.tensors]).to(self.dtype)

    def blocks(self) -> Iterator[tuple[Batch, Iterator[Block]]]:
        """Per batch, the blocks of its per-example gradients ``∇ℓ(z_i)`` (one column each)."""
        for batch in self.data:
            with self.engine.recording():
                losses = self.engine.forward(batch)
                check_finite(losses, "train_loss")
                prepared = self.engine.prepare(batch, losses)
                yield batch, formed(self.engine.blocks(prepared, torch.ones_like(losses)[:, :, None]))

    def stationarity(self) -> Stationarity:
        """Compare the mean gradient with the examples' own gradients, in one pass."""
        mean = torch.zeros(self.m, dtype=torch.float64, device=self.device)
        squares = 0.0
        for _, blocks in self.blocks():
            for block in blocks:
                values = block.values.to(torch.float64)
                squares += float(values.square().sum())
                place(block, values, mean)
        mean = mean / self.n + self.weight_decay * self.theta().to(torch.float64)
        return Stationarity(float(mean.norm()), (squares / self.n) ** 0.5, self.n)

    def products(self, vectors: Tensor, batches: list[Batch] | None = None) -> Tensor:
        """``∇²J · v`` for several vectors at once: one double backward pass per batch serves all of them.

        Args:
            vectors: ``(k, m)``.
            batches: Take the mean over these alone (stochastic estimates); None: all data.

        Returns:
            ``(k, m)`` in the vectors' dtype.

        Raises:
            ModelError: Some operation cannot be differentiated twice.
        """
        total = torch.zeros_like(vectors)
        count = 0
        for number, batch in enumerate(self.data if batches is None else batches):
            count += batch.n_examples
            with self.engine.recording():
                self._add_products(batch, None if batches is not None else number, vectors, total)
        return total.div_(count).add_(vectors, alpha=self.weight_decay)

    @contextmanager
    def kept_graphs(self) -> Iterator[None]:
        """Within it the gradients' graphs are kept for the next products over all data, as far as memory goes.

        The parameters must not change meanwhile.
        """
        self._graphs = {}
        try:
            yield
        finally:
            self._graphs = None

    def _recorded(self, batch: Batch, number: int | None) -> Tensor:
        """The gradient of a batch's summed loss, ``(m,)``, with its graph."""
        if number is not None and self._graphs and number in self._graphs:
            return self._graphs[number]
        saved = 0

        def pack(tensor: Tensor) -> Tensor:
            nonlocal saved
            saved += tensor.numel()
            return tensor

        if self._saved is None:
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                gradient = self._gradient(batch)
            self._saved = 1 + saved // batch.n_examples
        else:
            gradient = self._gradient(batch)
        held = (self._saved * self.n + self.m * (1 + len(self._graphs or ()))) * gradient.element_size()
        if number is not None and self._graphs is not None and 2 * held <= self.memory:
            self._graphs[number] = gradient
        return gradient

    def _add_products(self, batch: Batch, number: int | None, vectors: Tensor, total: Tensor) -> None:
        try:
            gradient = self._recorded(batch, number)
            if not gradient.requires_grad:
                return  # linear in θ
            width = (self._saved or 1) * batch.n_examples + self.m
            step = max(1, min(len(vectors), self.memory // (width * gradient.element_size())))
            for start in range(0, len(vectors), step):
                part = slice(start, start + step)
                total[part] += self._pull(gradient, vectors[part].to(gradient.dtype)).to(total.dtype)
        except NotImplementedError as error:
            raise _not_twice(error) from error
        except RuntimeError as error:
            if any(word in str(error) for word in ("not implemented", "not differentiable", "derivative for")):
                raise _not_twice(error) from error
            raise

    def _gradient(self, batch: Batch) -> Tensor:
        losses = self.losses(batch)
        check_finite(losses, "train_loss")
        gradients = torch.autograd.grad(
            losses.sum(), self.tensors, create_graph=True, allow_unused=True, materialize_grads=True
        )
        return torch.cat([gradient.reshape(-1) for gradient in gradients])

    def _pull(self, gradient: Tensor, vectors: Tensor) -> Tensor:
        if self._batched and len(vectors) > 1:
            try:
                with warnings.catch_warnings():
                    warnings.filterwarnings("ignore", "(?s).*performance drop", UserWarning)
                    pulled = torch.autograd.grad(
                        gradient, self.tensors, vectors, True, is_grads_batched=True, allow_unused=True
                    )
                return self._flat(pulled, len(vectors), vectors)
            except RuntimeError as error:
                if "vmap" not in str(error) and "batching" not in str(error):
                    raise
                self._batched = False  # some operation has no batched form: one vector at a time
        rows = [torch.autograd.grad(gradient, self.tensors, row, True, allow_unused=True) for row in vectors]
        return torch.cat([self._flat(row, 1, vectors) for row in rows])

    def _flat(self, pulled: tuple[Tensor | None, ...], k: int, like: Tensor) -> Tensor:
        parts = [
            like.new_zeros((k, tensor.numel())) if part is None else part.reshape(k, -1)
            for part, tensor in zip(pulled, self.tensors, strict=True)
        ]
        return torch.cat(parts, dim=1)


def _not_twice(error: Exception) -> ModelError:
    return ModelError(
        f"model: an operation in it cannot be differentiated twice ({str(error).splitlines()[0]}); use "
        "GaussNewton(…), EmpiricalFisher() or EKFAC(…), which need first derivatives alone, or replace the fused "
        "operation (attention: torch.nn.attention.sdpa_kernel(SDPBackend.MATH))"
    )


def check_finite(losses: Tensor, name: str) -> None:
    """Refuse losses that are not finite.

    Raises:
        DataError: Naming the first.
    """
    finite = torch.isfinite(losses.detach()).reshape(-1)
    if not bool(finite.all()):
        bad = int((~finite).to(torch.uint8).argmax())
        raise DataError(
            f"{name}: example {bad} of a batch has the loss {float(losses.detach().reshape(-1)[bad])}; find what "
            "overflows in the model on it, or leave it out of the data"
        )
