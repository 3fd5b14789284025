"""NPEFF and what people use instead, each as a function that scores all examples.

Every method gets the same examples and the same number of components. Baselines: class probabilities; k-means of one
gradient per example (Burns et al. style gradient clustering: ∇ log p of the predicted class, unit norm); PCA of the
same gradients (positive and negative parts); NMF, k-means and a sparse autoencoder on the activations of each layer.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
from sklearn.cluster import KMeans
from sklearn.decomposition import NMF, PCA
from sklearn.exceptions import ConvergenceWarning
from torch import nn

import npeff
from measures import MOST, Scores, linked

Fit = Callable[[int], Scores]  # seed -> scores of all examples

AUTOENCODER_STEPS = 1500
WIDEST = 512  # units of a layer for which an autoencoder is trained

warnings.simplefilter("ignore", ConvergenceWarning)


@dataclass
class Subject:
    """A trained model and the examples on which every method looks at it.

    Attributes:
        model: In evaluation mode.
        inputs: ``(n, …)``.
        layers: Name → module whose output is taken as activations (non-negative ones: after ReLU).
        rank: Rows per Fisher.
    """

    model: nn.Module
    inputs: torch.Tensor
    layers: dict[str, nn.Module]
    rank: int | None = None
    compress: npeff.TopK | None = None

    def batches(self, labels: torch.Tensor | None = None, size: int = 200) -> list:
        labels = torch.zeros(len(self.inputs), dtype=torch.long) if labels is None else labels
        return list(zip(self.inputs.split(size), labels.split(size), strict=True))

    @torch.no_grad()
    def logits(self) -> torch.Tensor:
        return torch.cat([self.model(x) for x, _ in self.batches()])

    @torch.no_grad()
    def activations(self) -> dict[str, np.ndarray]:
        found: dict[str, list] = {name: [] for name in self.layers}
        hooks = [
            layer.register_forward_hook(lambda _m, _i, out, name=name: found[name].append(out.flatten(1).clone()))
            for name, layer in self.layers.items()
        ]
        self.logits()
        for hook in hooks:
            hook.remove()
        return {name: torch.cat(parts).numpy() for name, parts in found.items()}

    def fishers(self, **options: object) -> npeff.Fishers:
        options = {"rank": self.rank, "compress": self.compress, **options}
        return npeff.compute_fishers(self.model, self.batches(), progress=False, **options)


def npeff_methods(subject: Subject, r: int, **variants: dict) -> dict[str, Fit]:
    """Decompositions, one per variant.

    A variant is options of ``decompose``; ``fishers=`` options of ``compute_fishers``; ``choose=True`` to have the
    number of strategies chosen by stability.
    """
    made: dict[str, npeff.Fishers] = {}

    def fit_of(options: dict) -> Fit:
        options = dict(options)
        wanted, choose = options.pop("fishers", {}), options.pop("choose", False)

        def fit(seed: int) -> Scores:
            key = repr(sorted(wanted.items()))
            fishers = made.setdefault(key, subject.fishers(**wanted)) if key not in made else made[key]
            components = npeff.decompose(fishers, r, seed=seed, progress=False, **options)
            return npeff_scores(components, fishers if choose else None, seed)

        return fit

    return {name: fit_of(options) for name, options in variants.items()}


def npeff_scores(components: npeff.Components, fishers: npeff.Fishers | None = None, seed: int = 0) -> Scores:
    """Coefficients of the components and of their strategies, cut where it is stable when the Fishers are given."""
    cuts = {
        n: np.stack([group.coefficient for group in components.strategies(n).children], 1)
        for n in range(2, min(MOST, components.n_components) + 1)
    }
    chosen = None
    if fishers is not None:
        effort = {"repeats": 3, "n_init": 1, "n_replacements": 8, "most_strategies": MOST}
        chosen = npeff.trust.stability(fishers, components, seed=seed, progress=False, **effort).n_strategies
    return Scores(components.coefficients, cuts, chosen)


def baselines(subject: Subject, r: int) -> dict[str, Fit]:
    """The methods that NPEFF is compared with."""
    probabilities = subject.logits().softmax(1).numpy()
    gradients = predicted_gradients(subject)
    activations = subject.activations()
    methods: dict[str, Fit] = {
        "class probabilities": lambda _: Scores(probabilities),
        "gradients, k-means": kmeans(gradients, r),
        "gradients, PCA": pca(gradients, r),
    }
    for name, h in activations.items():
        methods[f"{name}, NMF"] = nmf(h, r)
        methods[f"{name}, k-means"] = kmeans(h, r)
        if h.shape[1] <= WIDEST:
            methods[f"{name}, sparse autoencoder"] = sparse_autoencoder(h, r)
    return methods


def predicted_gradients(subject: Subject) -> np.ndarray:
    """Unit-norm ∇ log p of each example's predicted class, ``(n, ≤ n)``: rotated into the space that they span.

    A rotation changes neither k-means nor PCA, and n numbers per gradient are enough. Rows are scaled before they are
    squared: those of certain predictions are as small as 1e-30.
    """
    predicted = subject.logits().argmax(1)
    rows = npeff.compute_fishers(subject.model, subject.batches(predicted), labels="true", progress=False).rows
    gradients = rows.dense(0, rows.n_rows)
    gradients /= np.maximum(np.abs(gradients).max(1, keepdims=True), 1e-37)
    gradients /= np.maximum(np.linalg.norm(gradients, axis=1, keepdims=True), 1e-20)
    values, vectors = np.linalg.eigh((gradients @ gradients.T).astype(np.float64))
    return vectors * np.sqrt(values.clip(0))


def kmeans(x: np.ndarray, r: int) -> Fit:
    def fit(seed: int) -> Scores:
        model = KMeans(r, n_init=3, random_state=seed).fit(x)
        return linked(-model.transform(x), model.cluster_centers_, "max")

    return fit


def pca(x: np.ndarray, r: int) -> Fit:
    def fit(seed: int) -> Scores:
        model = PCA(max(1, r // 2), svd_solver="randomized", random_state=seed).fit(x)
        z = model.transform(x)
        vectors = np.concatenate([model.components_, model.components_])
        return linked(np.concatenate([z.clip(0), (-z).clip(0)], 1), vectors)

    return fit


def nmf(x: np.ndarray, r: int) -> Fit:
    def fit(seed: int) -> Scores:
        model = NMF(r, init="nndsvda", max_iter=300, random_state=seed).fit(x)
        norms = np.linalg.norm(model.components_, axis=1)
        return linked(model.transform(x) * norms, model.components_)

    return fit


def train_autoencoder(
    h: torch.Tensor,
    loss: Callable[[torch.Tensor], torch.Tensor],
    decoder: torch.Tensor,
    others: Iterable[torch.Tensor],
    rate: float,
    steps: int,
    generator: torch.Generator,
) -> None:
    """Train an autoencoder in place by Adam on random batches of 256; the decoder's rows stay of unit norm.

    Args:
        h: ``(N, d)`` activations to train on.
        loss: The loss of a batch.
        decoder: ``(units, d)``, of unit rows.
        others: The other parameters.
        rate: Adam's.
        steps: Adam's.
        generator: Draws the batches.
    """
    optimizer = torch.optim.Adam([*others, decoder], rate)
    for _ in range(steps):
        batch = h[torch.randint(len(h), (256,), generator=generator)]
        optimizer.zero_grad()
        loss(batch).backward()
        optimizer.step()
        with torch.no_grad():
            decoder /= decoder.norm(dim=1, keepdim=True)


def sparse_autoencoder(x: np.ndarray, r: int) -> Fit:
    """ReLU autoencoder with unit decoder columns and an L1 penalty, tuned over three penalties.

    As in Bricken et al. 2023: the decoder's bias is subtracted first; the penalty is the one of the sweep whose codes
    explain at least 80 % of the variance with the fewest active units (or the one that explains most).
    """

    def train(h: torch.Tensor, penalty: float, seed: int) -> tuple[nn.Linear, torch.Tensor, torch.Tensor, float]:
        generator = torch.Generator().manual_seed(seed)
        d = h.shape[1]
        decoder = torch.randn(r, d, generator=generator)
        decoder /= decoder.norm(dim=1, keepdim=True)
        encoder = nn.Linear(d, r)
        with torch.no_grad():
            encoder.weight.copy_(decoder)
            encoder.bias.zero_()
        decoder.requires_grad_()
        bias = h.mean(0).clone().requires_grad_()

        def loss(batch: torch.Tensor) -> torch.Tensor:
            code = encoder(batch - bias).relu()
            return (code @ decoder + bias - batch).square().sum(1).mean() + penalty * code.sum(1).mean()

        train_autoencoder(h, loss, decoder, [*encoder.parameters(), bias], 3e-3, AUTOENCODER_STEPS, generator)
        with torch.no_grad():
            code = encoder(h - bias).relu()
            left = (code @ decoder + bias - h).square().sum() / (h - h.mean(0)).square().sum()
        return encoder, decoder.detach(), bias.detach(), float(1 - left)

    def fit(seed: int) -> Scores:
        h = torch.from_numpy(x)
        h = h / h.norm(dim=1).mean()
        best, sparsest = None, None
        for penalty in (0.003, 0.03, 0.1):
            encoder, decoder, bias, share = train(h, penalty, seed)
            with torch.no_grad():
                code = encoder(h - bias).relu().numpy()
            found = (share, (code > 0).mean(), code, decoder.numpy())
            best = found if best is None or share > best[0] else best
            if share >= 0.8 and (sparsest is None or found[1] < sparsest[1]):
                sparsest = found
        return linked(*(sparsest or best)[2:])

    return fit
