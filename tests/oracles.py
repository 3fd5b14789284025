"""The dense objects that everything fast is compared with, in float64, by the most literal route."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


def in_float64(tree: Any) -> Any:
    """Floating tensors of nested structures as float64."""
    if isinstance(tree, Tensor):
        return tree.double() if tree.is_floating_point() else tree
    if isinstance(tree, dict):
        return {key: in_float64(value) for key, value in tree.items()}
    if isinstance(tree, (tuple, list)):
        return type(tree)(in_float64(item) for item in tree)
    return tree


def dense_jacobians(
    model: nn.Module,
    examples: Sequence[Any],
    names: Sequence[str],
    call: Callable[[nn.Module, Any], Tensor] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Jacobians of the logits, each example in a batch of its own, one output at a time.

    Args:
        model: The model; a float64 copy is used.
        examples: Batches of one example.
        names: Parameters, in order.
        call: How to run the model on a batch; by default it is called on it.

    Returns:
        Logits ``(n, C)`` and Jacobians ``(n, C, m)``, float64.
    """
    twin = copy.deepcopy(model).double()
    for parameter in twin.parameters():
        parameter.requires_grad_(True)
    named = dict(twin.named_parameters())
    chosen = [named[name] for name in names]
    logits, jacobians = [], []
    for example in examples:
        output = (call or (lambda m, x: m(x)))(twin, in_float64(example)).reshape(-1)
        rows = []
        for value in output:
            gradients = torch.autograd.grad(value, chosen, retain_graph=True, allow_unused=True)
            rows.append(
                torch.cat(
                    [
                        (torch.zeros_like(p) if g is None else g.to_dense()).reshape(-1)
                        for g, p in zip(gradients, chosen, strict=True)
                    ]
                )
            )
        logits.append(output.detach().numpy())
        jacobians.append(torch.stack(rows).numpy())
    return np.stack(logits), np.stack(jacobians)


def output_fisher(logits: np.ndarray, likelihood: str = "categorical") -> np.ndarray:
    """Fisher of the outputs ``(n, C, C)``: diag p − ppᵀ, diag p(1−p), or the identity."""
    if likelihood == "gaussian":
        return np.broadcast_to(np.eye(logits.shape[1]), (*logits.shape, logits.shape[1]))
    if likelihood == "bernoulli":
        p = 1 / (1 + np.exp(-logits))
        return np.einsum("nc,cd->ncd", p * (1 - p), np.eye(logits.shape[1]))
    p = np.exp(logits - logits.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    return np.einsum("nc,cd->ncd", p, np.eye(logits.shape[1])) - p[:, :, None] * p[:, None, :]


def dense_fishers(logits: np.ndarray, jacobians: np.ndarray, likelihood: str = "categorical") -> np.ndarray:
    """``F = Jᵀ (output Fisher) J``, ``(n, m, m)``."""
    return np.einsum("ncm,ncd,ndk->nmk", jacobians, output_fisher(logits, likelihood), jacobians, optimize=True)


def largest(rows: np.ndarray, k: int) -> np.ndarray:
    """The array with all but its k largest |values| zero; ties by lower flat index."""
    flat = rows.reshape(-1)
    kept = np.argsort(-np.abs(flat), kind="stable")[:k]
    out = np.zeros_like(flat)
    out[kept] = flat[kept]
    return out.reshape(rows.shape)
