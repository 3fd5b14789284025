"""Small models, their data and their components, for tests of perturbations."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from npeff import Components
from npeff.models.parameters import Parameters
from oracles import dense_fishers, dense_jacobians


def state(model: nn.Module) -> dict[str, Any]:
    """Everything about a model that must be left alone, by value."""
    return {
        "tensors": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "versions": [id(p) for p in model.parameters()],
        "flags": [p.requires_grad for p in model.parameters()],
        "grads": [p.grad is None for p in model.parameters()],
        "modes": [m.training for m in model.modules()],
    }


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Bit for bit."""
    tensors = all(torch.equal(t, other["tensors"][name]) for name, t in one["tensors"].items())
    return tensors and all(one[key] == other[key] for key in ("versions", "flags", "grads", "modes"))


def linear(dtype: torch.dtype = torch.float64) -> nn.Module:
    """Logits linear in the weights: 5 inputs, 3 classes, 18 parameters."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 3)).to(dtype).eval()


def deep(dtype: torch.dtype = torch.float64) -> nn.Module:
    """Two layers and a batch norm in evaluation mode: 61 parameters."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 2)).to(dtype)
    model(torch.randn(64, 5, dtype=dtype))
    return model.eval()


def batches(n: int, size: int, dtype: torch.dtype = torch.float64, classes: int = 3) -> list[Any]:
    """``(inputs, labels)`` in batches of a size, the last smaller."""
    generator = torch.Generator().manual_seed(3)
    x = 2 * torch.randn(n, 5, generator=generator, dtype=torch.float64).to(dtype)
    y = torch.randint(classes, (n,), generator=generator)
    return [(x[i : i + size], y[i : i + size]) for i in range(0, n, size)]


def fishers_of(model: nn.Module, data: list[Any], likelihood: str = "categorical") -> np.ndarray:
    """Dense Fishers ``(n, m, m)`` of all examples, and no compromise."""
    examples = [x[i : i + 1] for x, _ in data for i in range(len(x))]
    names = [name for name, _ in model.named_parameters()]
    return dense_fishers(*dense_jacobians(model, examples, names), likelihood)


def components_of(
    model: nn.Module,
    data: list[Any],
    r: int = 4,
    kind: str = "low_rank",
    ids: np.ndarray | None = None,
    likelihood: str = "categorical",
    block_weights: dict[str, float] | None = None,
) -> Components:
    """Random directions, with the coefficients that make them largest where ``gᵀFg / ‖F‖`` is."""
    F = fishers_of(model, data, likelihood)
    ids = np.arange(len(F)) if ids is None else ids
    F = F[ids]
    rng = np.random.default_rng(5)
    norms = np.linalg.norm(F, axis=(1, 2)) if kind == "low_rank" else np.linalg.norm(np.einsum("nmm->nm", F), axis=1)
    directions = np.stack([np.linalg.eigh(F[i])[1][:, -1] for i in rng.choice(len(F), r, replace=False)])
    if kind == "diagonal":
        directions = directions**2 * (np.abs(directions) > 0.02)
    G = directions / np.linalg.norm(directions, axis=1, keepdims=True)
    W = np.einsum("rm,nmk,rk->nr", G, F, G) / norms[:, None]
    W *= np.quantile(W, 0.3, axis=0) < W
    with torch.no_grad():
        logits = torch.cat([model(x) for x, _ in data]).float().numpy()[ids]
    labels = torch.cat([y for _, y in data]).numpy()[ids]
    return Components(
        kind=kind,  # type: ignore[arg-type]
        coefficients=W.astype(np.float32),
        vectors=G.astype(np.float32),
        columns=None,
        block_weights=block_weights,
        parameters=Parameters.of((name, tuple(p.shape)) for name, p in model.named_parameters()),
        labels=labels,
        logits=logits,
        ids=np.asarray(ids, np.int64),
        norms=norms.astype(np.float32),
        loss_curve=np.zeros(1),
        loss=0.0,
        provenance={"fishers": {"options": {"likelihood": likelihood}}},
    )


def flat(model: nn.Module) -> np.ndarray:
    """All weights end to end."""
    return np.concatenate([p.detach().numpy().reshape(-1) for p in model.parameters()])
