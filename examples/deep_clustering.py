"""Deep embedded clustering: an encoder trained on soft assignments, without labels.

``benchmarks/influence.py`` and the tests share this module.
"""

from __future__ import annotations

from typing import Any

import torch
from sklearn.cluster import KMeans
from torch import Tensor, nn

from retraining import minimise


class DeepEmbeddedClustering(nn.Module):
    """An encoder and cluster centres; assignments by a Student-t kernel (Xie, Girshick & Farhadi 2016).

    ``q_j ∝ (1 + ‖z − μ_j‖²)⁻¹``, z the encoder's output. Called on inputs it gives ``a_j = −log(1 + ‖z − μ_j‖²)``, so
    that q = softmax(a).

    Args:
        encoder: ``(b, …) → (b, d)``.
        n_clusters: Number of centres, K.
        dimension: d.
    """

    def __init__(self, encoder: nn.Module, n_clusters: int, dimension: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.centres = nn.Parameter(torch.randn(n_clusters, dimension, dtype=next(encoder.parameters()).dtype))

    def forward(self, x: Tensor) -> Tensor:
        """Log-kernels ``(b, K)``; their softmax is q."""
        z = self.encoder(x)
        return -torch.log1p((z[:, None] - self.centres).square().sum(dim=2))

    @torch.no_grad()
    def place_centres(self, x: Tensor, seed: int = 0, n_init: int = 50) -> None:
        """Put the centres where k-means finds them in the embedding of x, the best of several runs.

        Args:
            x: ``(n, …)`` inputs, n ≥ K.
            seed: Decides where the runs begin.
            n_init: Number of runs.
        """
        found = KMeans(len(self.centres), n_init=n_init, tol=0.0, random_state=seed).fit(self.encoder(x).numpy())
        self.centres.copy_(torch.from_numpy(found.cluster_centers_))


def target_distribution(assignments: Tensor) -> Tensor:
    """``p_ij ∝ q_ij² / Σ_i q_ij``, the sharpened targets (Xie, Girshick & Farhadi 2016, eq. 3).

    Args:
        assignments: q, ``(n, K)``.

    Returns:
        ``(n, K)``, detached: the target is frozen while it is trained for.
    """
    sharp = assignments.detach().square() / assignments.detach().sum(dim=0)
    return sharp / sharp.sum(dim=1, keepdim=True)


def kl_of_kernels(kernels: Tensor, batch: Any) -> Tensor:
    """``KL(p ‖ softmax(kernels))`` per example, ``(b,)``: convex in the kernels.

    Args:
        kernels: ``(b, K)``.
        batch: ``(inputs, p)``.
    """
    target = batch[1].to(kernels.dtype)
    return (torch.special.xlogy(target, target) - target * torch.log_softmax(kernels, dim=1)).sum(dim=1)


def kl_loss(model: nn.Module, batch: Any) -> Tensor:
    """The training loss, ``KL(p ‖ q)`` per example, ``(b,)``.

    Args:
        model: Deep embedded clustering.
        batch: ``(inputs, p)`` with frozen targets p ``(b, K)``.
    """
    return kl_of_kernels(model(batch[0]), batch)


def nll_loss(model: nn.Module, batch: Any) -> Tensor:
    """A test loss, ``−log q_y`` per example, ``(b,)``.

    Args:
        model: Deep embedded clustering.
        batch: ``(inputs, y)``, y ``(b,)`` int64 clusters.
    """
    return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")


def deep_embedded_clustering(
    encoder: nn.Module,
    decoder: nn.Module,
    x: Tensor,
    n_clusters: int,
    dimension: int,
    *,
    weight_decay: float = 0.0,
    pretraining: int = 400,
    rounds: int = 5,
    tolerance: float = 1e-9,
    seed: int = 0,
) -> tuple[DeepEmbeddedClustering, Tensor]:
    """Autoencoder, k-means, a few rounds of moving targets, then frozen targets and training to the optimum.

    Args:
        encoder: ``(n, …) → (n, d)``; becomes part of the result.
        decoder: ``(n, d) → (n, features)``; used for pretraining alone.
        x: ``(n, …)`` inputs, float64 where small tolerances are wanted.
        n_clusters: Number of clusters, K.
        dimension: d.
        weight_decay: Of the clustering's training.
        pretraining: Steps of the autoencoder.
        rounds: Times that the targets are renewed, each followed by a short training.
        tolerance: ``‖∇J‖`` of the last training, whose targets stay frozen.
        seed: Decides the k-means starts.

    Returns:
        The model at its optimum, and the frozen targets p ``(n, K)``.
    """
    pretrain(encoder, decoder, x, steps=pretraining)
    model = DeepEmbeddedClustering(encoder, n_clusters, dimension)
    model.place_centres(x, seed)
    for number in range(rounds + 1):
        with torch.no_grad():
            targets = target_distribution(torch.softmax(model(x), dim=1))
        last = number == rounds
        reach, steps = (tolerance, 5000) if last else (1e-3, 30)
        data = [(x, targets)]
        minimise(model, kl_loss, data, weight_decay=weight_decay, tolerance=reach, max_iterations=steps)
    return model.eval(), targets


def pretrain(
    encoder: nn.Module,
    decoder: nn.Module,
    x: Tensor,
    *,
    steps: int = 500,
    learning_rate: float = 1e-2,
) -> None:
    """Fit an autoencoder to x by Adam on all of x; the encoder's part is where clustering starts.

    Args:
        encoder: ``(n, …) → (n, d)``; changed.
        decoder: ``(n, d) → (n, features)``; changed.
        x: ``(n, …)``.
        steps: Steps.
        learning_rate: Adam's.
    """
    optimizer = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], learning_rate)
    for _ in range(steps):
        loss = (decoder(encoder(x)) - x.flatten(1)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
