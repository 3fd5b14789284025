"""Small networks for demos, tests and benchmarks, and a plain training loop."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from npeff.models.datasets import Images


def digits_cnn() -> nn.Sequential:
    """A network for 8×8 digits: two convolutions, two dense layers, 38 282 parameters.

    Returns:
        ``(b, 1, 8, 8)`` float32 → ``(b, 10)`` logits.
    """
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(512, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )


def fashion_cnn() -> nn.Sequential:
    """A network for 28×28 images: two convolutions with pooling, two dense layers, 114 314 parameters.

    Returns:
        ``(b, 1, 28, 28)`` float32 → ``(b, 10)`` logits.
    """
    return nn.Sequential(
        nn.Conv2d(1, 16, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(1568, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )


def train(
    model: nn.Module,
    data: Images,
    *,
    epochs: int,
    learning_rate: float = 1e-3,
    batch_size: int = 64,
    weight_decay: float = 1e-4,
    seed: int = 0,
    after_epoch: Callable[[int, float], None] | None = None,
) -> nn.Module:
    """Fit a classifier with AdamW on cross-entropy; the same seed gives the same order of examples.

    Args:
        model: Maps ``data.inputs`` to logits ``(n, C)``.
        data: What to fit.
        epochs: Passes over the data.
        learning_rate: Falls to zero along a cosine.
        batch_size: Examples per step.
        weight_decay: AdamW's.
        seed: Of the shuffling; the weights are as given.
        after_epoch: Called with the epoch (from 1) and its mean loss.

    Returns:
        The same model, in evaluation mode.
    """
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), learning_rate, weight_decay=weight_decay)
    steps = epochs * -(-len(data.labels) // batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, steps))
    model.train()
    for epoch in range(1, epochs + 1):
        total = 0.0
        order = torch.randperm(len(data.labels), generator=generator)
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            loss = nn.functional.cross_entropy(model(data.inputs[batch]), data.labels[batch])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
            total += float(loss.detach()) * len(batch)
        if after_epoch:
            after_epoch(epoch, total / len(data.labels))
    return model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, data: Images) -> float:
    """Share of examples whose largest logit is the label's."""
    hits = sum(int((model(inputs).argmax(1) == labels).sum()) for inputs, labels in data)
    return hits / max(1, len(data.labels))
