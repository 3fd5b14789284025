"""Parametric t-SNE: a network that embeds, so that each coordinate can be explained by its two-row affine map.

P is Gaussian neighbourhoods of equal perplexity in the input space, Q the Student-t similarities of the network's
outputs (van der Maaten & Hinton 2008). Beside ``linearize_tsne.py``, which draws digits.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from npeff.companions.linearize import LinearMap, linearize
from npeff.errors import ArgumentError, DataError
from npeff.reports.layout import conditional_probabilities


def squared_distances(X: Tensor) -> Tensor:
    """``(n, n)`` ‖x_i − x_j‖² of rows ``(n, d)``."""
    squares = X.square().sum(1)
    return (squares[:, None] + squares - 2 * X @ X.T).clamp_min(0).fill_diagonal_(0)


def joint_probabilities(X: Tensor, perplexity: float) -> Tensor:
    """P of rows ``(n, d)``: (p_{j|i} + p_{i|j}) / 2n, ``(n, n)`` float64, sums to 1."""
    p = conditional_probabilities(squared_distances(X.flatten(1).double()), perplexity)
    return (p + p.T) / (2 * len(p))


def divergence(P: Tensor, Y: Tensor, degrees: float = 1.0) -> Tensor:
    """KL(P‖Q) with Q the Student-t similarities of an embedding, in nats; differentiable in Y.

    q_ij ∝ (1 + ‖y_i − y_j‖²/ν)^{−(ν+1)/2} over all pairs.

    Args:
        P: ``(n, n)``, sums to 1.
        Y: ``(n, k)``.
        degrees: ν; 1 for two dimensions.
    """
    kernel = 1 + _pair_distances(Y) / degrees
    log_q = -(degrees + 1) / 2 * kernel.log()
    total = kernel.pow(-(degrees + 1) / 2).sum() - len(Y)  # the diagonal's ones are no pairs
    entropy = torch.special.xlogy(P, P).sum()
    return entropy - (P * log_q).sum() + P.sum() * total.log()


def _pair_distances(Y: Tensor) -> Tensor:
    squares = Y.square().sum(1)
    others = 1 - torch.eye(len(Y), dtype=Y.dtype, device=Y.device)
    return (squares[:, None] + squares - 2 * Y @ Y.T).clamp_min(0) * others


EXAGGERATED = 0.25
"""Share of the steps in which P is exaggerated."""

KEPT = 10
"""Epochs with the same batches, which share the cost of their P."""


class ParametricTSNE:
    """Fit a network to t-SNE's KL(P‖Q) (van der Maaten 2009, "Learning a parametric embedding …").

    P has a given perplexity in the input space and Q the Student-t similarities of the network's outputs. Each step
    takes a batch, with P of that batch. Unlike t-SNE itself, new examples can be embedded, and a network of ReLUs
    is an affine map around each of them.

    Args:
        network: Maps ``(n, *s)`` to ``(n, k)``; by default ReLU layers of 256, 256, 128 and 2 outputs. Trained in
            place.
        perplexity: Effective number of neighbours, within a batch.
        epochs: Passes over the data.
        batch_size: Examples whose neighbourhoods are kept together; P of n examples takes n² numbers.
        learning_rate: Adam's, falling to zero along a cosine.
        exaggeration: P is multiplied by it in the first quarter of the steps, which pulls clusters apart.
        seed: Of the default network's weights and of the batches.

    Attributes:
        network_: The network, in evaluation mode.
        embedding_: ``(n, k)`` float32 the embedding of the data.
        kl_divergence_: KL(P‖Q) at the end, mean over the last epoch's batches, in nats.
        loss_curve_: The same for every epoch, without exaggeration.

    Raises:
        ArgumentError: An option is out of range.
    """

    def __init__(
        self,
        network: nn.Module | None = None,
        *,
        perplexity: float = 30.0,
        epochs: int = 200,
        batch_size: int = 512,
        learning_rate: float = 1e-3,
        exaggeration: float = 4.0,
        seed: int = 0,
    ) -> None:
        for name, value, least in (
            ("perplexity", perplexity, 1),
            ("epochs", epochs, 1),
            ("batch_size", batch_size, 3),
            ("exaggeration", exaggeration, 1),
        ):
            if not isinstance(value, (int, float)) or not math.isfinite(value) or value < least:
                raise ArgumentError(f"{name}: expected a number ≥ {least}, got {value!r}")
        if not isinstance(learning_rate, (int, float)) or not 0 < learning_rate < math.inf:
            raise ArgumentError(f"learning_rate: expected a number > 0, got {learning_rate!r}")
        if network is not None and not isinstance(network, nn.Module):
            raise ArgumentError(f"network: expected a torch.nn.Module, got {type(network).__name__}")
        self.network, self.perplexity, self.epochs, self.batch_size = network, perplexity, epochs, batch_size
        self.learning_rate, self.exaggeration, self.seed = learning_rate, exaggeration, seed

    def fit(
        self, X: Any, y: object = None, *, after_epoch: Callable[[int, float], None] | None = None
    ) -> ParametricTSNE:
        """Train the network.

        Args:
            X: ``(n, *s)`` floats, a tensor or an array.
            y: Ignored.
            after_epoch: Called with the epoch (from 1) and its mean KL divergence.

        Returns:
            This.

        Raises:
            ArgumentError: The perplexity is too large for the batches, or the network has nothing to fit.
            DataError: X is not numbers, not finite, or too few; or the network gives no ``(n, k)`` tensor.
        """
        X = _examples(X)
        batches = max(1, len(X) // min(self.batch_size, len(X)))
        smallest = len(X) // batches
        if self.perplexity > (smallest - 1) / 3:
            raise ArgumentError(
                f"perplexity: expected at most a third of a batch's examples ({(smallest - 1) / 3:.0f}), got "
                f"{self.perplexity}; take larger batches (batch_size=) or a smaller perplexity"
            )
        network = self.network if self.network is not None else self._default(X[0].numel())
        generator = torch.Generator().manual_seed(self.seed)
        if not any(parameter.requires_grad for parameter in network.parameters()):
            raise ArgumentError("network: it has no parameters that require gradients, so there is nothing to fit")
        try:
            with torch.inference_mode(False), torch.enable_grad():
                self._train(network.train(), X, batches, generator, after_epoch)
        finally:
            network.eval()
        self.network_ = network
        self.embedding_ = self.transform(X)
        return self

    def fit_transform(self, X: Any, y: object = None) -> np.ndarray[Any, Any]:
        """Train, and embed the same examples: ``(n, k)`` float32."""
        return self.fit(X).embedding_

    @torch.no_grad()
    def transform(self, X: Any) -> np.ndarray[Any, Any]:
        """Embed examples, new ones too.

        Args:
            X: ``(n, *s)``.

        Returns:
            ``(n, k)`` float32.

        Raises:
            ArgumentError: Nothing was fitted yet.
        """
        network, X = self._fitted(), _examples(X)
        return torch.cat([_embedded(network, part) for part in X.split(4096)]).float().cpu().numpy()

    def explain(self, X: Any) -> LinearMap:
        """The affine maps of the embedding around examples ``(n, *s)``: W is ``(n, k, *s)``, a row per coordinate.

        Raises:
            ArgumentError: Nothing was fitted yet.
        """
        return linearize(self._fitted(), _examples(X), batched=True)

    def _fitted(self) -> nn.Module:
        if not hasattr(self, "network_"):
            raise ArgumentError("ParametricTSNE: it is not fitted yet; call fit(X) first")
        return self.network_

    def _default(self, n_inputs: int) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            sizes = (n_inputs, 256, 256, 128)
            layers: list[nn.Module] = [nn.Flatten()]
            for a, b in pairwise(sizes):
                layers += [nn.Linear(a, b), nn.ReLU()]
            return nn.Sequential(*layers, nn.Linear(sizes[-1], 2))

    def _train(
        self,
        network: nn.Module,
        X: Tensor,
        batches: int,
        generator: torch.Generator,
        after_epoch: Callable[[int, float], None] | None,
    ) -> None:
        optimizer = torch.optim.Adam(network.parameters(), self.learning_rate)
        steps = self.epochs * batches
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        neighbourhoods: list[tuple[Tensor, Tensor]] = []
        self.loss_curve_: list[float] = []
        step = 0
        for epoch in range(1, self.epochs + 1):
            total = 0.0
            if not neighbourhoods or (batches > 1 and epoch % KEPT == 1):
                parts = torch.randperm(len(X), generator=generator).tensor_split(batches)
                neighbourhoods = [(part, joint_probabilities(X[part], self.perplexity).float()) for part in parts]
            for chosen, P in neighbourhoods:
                Y = _embedded(network, X[chosen]).float()
                factor = self.exaggeration if step < EXAGGERATED * steps else 1.0
                loss = divergence(P * factor, Y)
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                schedule.step()
                step += 1
                # KL(cP‖Q) = c·KL(P‖Q) + c log c for P that sums to 1
                total += (float(loss.detach()) / factor - math.log(factor)) * len(chosen) / len(X)
            self.loss_curve_.append(total)
            if after_epoch:
                after_epoch(epoch, total)
        self.kl_divergence_ = self.loss_curve_[-1]


def _examples(X: Any) -> Tensor:
    if not isinstance(X, Tensor):
        X = np.asarray(X)
        if X.dtype.kind not in "biuf":
            raise DataError(f"X: expected numbers, got an array of {X.dtype}")
        X = torch.from_numpy(np.ascontiguousarray(X))
    X = X.detach()
    if X.dim() < 2 or len(X) == 0:
        raise DataError(f"X: expected examples (n, …) of numbers, got shape {tuple(X.shape)}")
    X = X if X.is_floating_point() and X.dtype != torch.float64 else X.float()
    if not bool(torch.isfinite(X).all()):
        raise DataError("X: it has NaN or infinite values")
    return X


def _embedded(network: nn.Module, X: Tensor) -> Tensor:
    Y = network(X)
    if not isinstance(Y, Tensor) or Y.dim() != 2 or len(Y) != len(X):
        shown = tuple(Y.shape) if isinstance(Y, Tensor) else type(Y).__name__
        raise DataError(f"network: expected an embedding ({len(X)}, k), got {shown}")
    return Y
