"""The backward passes of a batch: a column of cotangents at a time, or all of them side by side."""

from __future__ import annotations

import warnings
from collections.abc import Container, Iterable

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from npeff.gradients.rules import Rule
from npeff.gradients.rules.dense import MatrixBias, MatrixProduct


def backward(
    logits: Tensor,
    columns: Tensor,
    rules: list[Rule],
    whole: Container[int] = (),
    at_once: bool = False,
    weights: Tensor | None = None,
) -> dict[tuple[Node, int], tuple[Tensor, Tensor]]:
    """One backward pass per column to the rules' edges, or all in one; each rule keeps what it needs.

    Args:
        logits: ``(b, C)`` with their graph.
        columns: ``(b, C, R)`` cotangents.
        rules: All rules.
        whole: ``id`` of those that will be asked for blocks of everything, which they may form at once.
        at_once: One pass with the columns side by side, where the graph's operations can do that.
        weights: ``(b,)``: one more pass, whose cotangent is the sum of the columns times these.

    Returns:
        With ``weights``, per edge the sum of δ over the columns, and δ of the weighted pass; otherwise nothing.
    """
    takers: dict[tuple[Node, int], list[Rule]] = {}
    for rule in rules:
        rule.reserve(columns.shape[2])
        if id(rule) in whole:
            rule.form_early()
        takers.setdefault((rule.edge.node, rule.edge.output_nr), []).append(rule)
    edges = [GradientEdge(*key) for key in takers]
    if not edges:
        return {}
    n_columns = columns.shape[2]
    if weights is not None:
        weighted = columns.sum(dim=2, dtype=torch.float64) * weights[:, None]
        columns = torch.cat([columns, weighted.to(columns.dtype)[:, :, None]], dim=2)
    together = _side_by_side(logits, edges, columns) if at_once and columns.shape[2] > 1 else None
    sums: dict[tuple[Node, int], Tensor] = {}
    checked: dict[tuple[Node, int], tuple[Tensor, Tensor]] = {}
    for column in range(columns.shape[2]):
        if together is not None:
            deltas = [None if delta is None else delta[column] for delta in together]
        else:
            deltas = list(
                torch.autograd.grad(logits, edges, columns[:, :, column], retain_graph=True, allow_unused=True)
            )
        for (key, sharing), delta in zip(takers.items(), deltas, strict=True):
            delta = logits.new_zeros(sharing[0].use.output_shape) if delta is None else delta.detach()
            if column == n_columns:
                checked[key] = sums.pop(key), delta
                continue
            if weights is not None:
                wide = torch.promote_types(delta.dtype, torch.float32)
                sums[key] = sums[key] + delta if key in sums else delta.to(wide)
            for rule in sharing:
                rule.store(column, delta)
    return checked


def _side_by_side(logits: Tensor, edges: list[GradientEdge], columns: Tensor) -> tuple[Tensor | None, ...] | None:
    """δ of all columns, ``(R, …)`` per edge; None where an operation cannot take them side by side."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="There is a performance drop")
        try:
            return torch.autograd.grad(
                logits, edges, columns.permute(2, 0, 1), retain_graph=True, allow_unused=True, is_grads_batched=True
            )
        except RuntimeError:
            return None


def small_products(rules: Iterable[Rule]) -> bool:
    """Whether the backward passes are matrix products with one row per example, as in a multilayer perceptron.

    One pass over all columns makes R·b rows of b, for which the products are far more efficient, and calls every
    operation once in place of R times. With many rows per example already, and with convolutions, it gains nothing and
    takes R times the memory.
    """
    return all(isinstance(rule, (MatrixProduct, MatrixBias)) and rule.layout.positions == 1 for rule in rules)
