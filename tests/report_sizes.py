"""A decomposition of 1 000 components and 100 000 examples, made of random numbers, and its images."""

import numpy as np
import torch

from report_cases import components_of


def large_case(n=100_000, r=1_000, n_classes=10, per_example=5, groups=8):
    """Components in planted groups of directions; every example uses a few."""
    rng = np.random.default_rng(0)
    W = np.zeros((n, r), np.float32)
    rows = np.repeat(np.arange(n), per_example)
    W[rows, rng.integers(0, r, n * per_example)] = rng.gamma(2, 0.1, n * per_example)
    centres = rng.normal(size=(groups, 122))
    vectors = centres[rng.integers(0, groups, r)] + 1.5 * rng.normal(size=(r, 122))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return components_of(
        n=n,
        r=r,
        n_classes=n_classes,
        coefficients=W,
        vectors=vectors.astype(np.float32),
        labels=rng.integers(0, n_classes, n),
        logits=(3 * rng.normal(size=(n, n_classes))).astype(np.float32),
    )


def large_images(components, size=1000):
    """Batches of 28×28 images with a few strokes, which compress like drawn digits."""
    generator = torch.Generator().manual_seed(0)
    for start in range(0, len(components.labels), size):
        noise = torch.rand(size, 1, 7, 7, generator=generator)
        images = torch.nn.functional.interpolate((noise - 0.6).clamp_min(0) * 2.5, scale_factor=4, mode="bilinear")
        yield images, torch.as_tensor(components.labels[start : start + size])
