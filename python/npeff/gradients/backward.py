"""The backward passes of a batch: a column of cotangents at a time, or all of them side by side.

Where examples are places, a sequence has several: one backward pass takes a column of one place of every sequence.
"""

from __future__ import annotations

import warnings
from collections.abc import Container, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from npeff.batches.batches import Batch
from npeff.gradients.graph import Graph
from npeff.gradients.rules import Rule
from npeff.gradients.rules.layers import MatrixBias, MatrixProduct


class Cotangents:
    """The cotangents of what a model gave, column by column.

    Where examples are places, all other positions have none. A pass to operations below the output layer then begins
    below it: the cotangents of its input, ``S Wᵀ``, are made for all places and columns in one product, in place of a
    product with all positions in every pass.

    Args:
        batch: The batch.
        graph: Its graph.
        columns: ``(b, C, R)`` cotangents of the logits; of all slots, ``(b·K, C, R)``.
        slots: ``(b, K)`` the places that the K slots of each sequence hold, −1 for none; None without places.
        edges: Where gradients are wanted; None: the passes begin with what the model gave.

    Attributes:
        output: Where the passes begin: what the model gave, or its edge, or that of the output layer's input.
        n_columns: Number of columns, K·R.
    """

    def __init__(
        self,
        batch: Batch,
        graph: Graph,
        columns: Tensor,
        slots: Tensor | None = None,
        edges: Iterable[GradientEdge] | None = None,
    ) -> None:
        self.output, self._shape = graph.output, graph.shape
        self._outputs, self._positions = batch.outputs, None
        n_slots = 1 if slots is None else slots.shape[1]
        self.n_columns = n_slots * columns.shape[2]
        self._sequences = torch.arange(batch.n_sequences, device=columns.device)
        if slots is not None:
            assert batch.places is not None, "examples are places"
            # From the end: a model may give the logits of the last positions alone.
            self._positions = batch.places[slots.clamp_min(0), 1] - batch.n_positions if batch.n_examples else slots
        columns = columns.to(graph.dtype).mT  # (b·K, R, C)
        layer = None if slots is None or edges is None else graph.output_layer(edges)
        if layer is not None:
            weight = layer.weight if self._outputs is None else layer.weight[:, self._outputs]
            columns = columns.to(layer.dtype) @ weight.mT
            self.output, self._outputs = layer.edge, None
            self._shape = (*graph.shape[:-1], len(weight))
        self._below = self.output is not graph.output
        self._columns = columns.reshape(-1, n_slots, *columns.shape[1:])
        self._whole: Tensor | None = None
        self._written: Any = None

    def column(self, number: int) -> Tensor:
        """Return the cotangents of one column where the passes begin; the next call overwrites them."""
        slot, row = divmod(number, self._columns.shape[2])
        given = self._columns[:, slot, row]
        if self._positions is None and self._outputs is None:
            return given
        if self._whole is None:
            self._whole = given.new_zeros(self._shape)
        else:
            self._whole[self._written] = 0.0
        self._written = self._index(slot)
        self._whole[self._written] = given
        return self._whole.flatten(0, -2) if self._below else self._whole

    def keep(self, deltas: Iterable[Tensor | None]) -> None:
        """Leave the memory of the last column to δ that are views of it."""
        if self._whole is not None:
            own = self._whole.untyped_storage().data_ptr()
            if any(delta is not None and delta.untyped_storage().data_ptr() == own for delta in deltas):
                self._whole = None

    def summed(self, weights: Tensor) -> Tensor:
        """Sum all columns, those of each sequence times its weight ``(b,)``."""
        total = self._columns.sum(dim=2, dtype=torch.float64) * weights[:, None, None]
        total = total.to(self._columns.dtype)
        if self._positions is None and self._outputs is None:
            return total[:, 0]
        whole = total.new_zeros(self._shape)
        for slot in range(total.shape[1]):
            whole[self._index(slot)] += total[:, slot]
        return whole.flatten(0, -2) if self._below else whole

    def _index(self, slot: int) -> Any:
        """Where the logits of a slot lie in what the model gave."""
        if self._positions is None:
            return self._sequences[:, None], self._outputs
        at = self._positions[:, slot]
        if self._outputs is None:
            return self._sequences, at
        return self._sequences[:, None], at[:, None], self._outputs


def backward(
    cotangents: Cotangents,
    rules: list[Rule],
    whole: Container[int] = (),
    at_once: bool = False,
    weighted: Tensor | None = None,
) -> dict[tuple[Node, int], tuple[Tensor, Tensor]]:
    """Run one backward pass per column to the rules' edges, or all in one; each rule keeps what it needs.

    Args:
        cotangents: The cotangents.
        rules: All rules.
        whole: ``id`` of those that will be asked for blocks of everything, which they may form at once.
        at_once: One pass with the columns side by side, where the graph's operations can do that.
        weighted: One more cotangent: the sum of the columns, each example's times a weight.

    Returns:
        With ``weighted``, per edge the sum of δ over the columns, and δ of the weighted pass; otherwise nothing.
    """
    output, n_columns = cotangents.output, cotangents.n_columns
    takers: dict[tuple[Node, int], list[Rule]] = {}
    for rule in rules:
        rule.reserve(n_columns)
        if id(rule) in whole:
            rule.form_early()
        takers.setdefault((rule.edge.node, rule.edge.output_nr), []).append(rule)
    edges = [GradientEdge(*key) for key in takers]
    if not edges:
        return {}
    n_passes = n_columns + (weighted is not None)
    together: tuple[Tensor | None, ...] | None = None
    if at_once and n_passes > 1:
        every = [cotangents.column(column).clone() for column in range(n_columns)]
        together = side_by_side(output, edges, torch.stack(every if weighted is None else [*every, weighted]))
    sums: dict[tuple[Node, int], Tensor] = {}
    checked: dict[tuple[Node, int], tuple[Tensor, Tensor]] = {}
    for column in range(n_passes):
        if together is not None:
            deltas = tuple(None if delta is None else delta[column] for delta in together)
        else:
            given = cotangents.column(column) if column < n_columns else weighted
            deltas = torch.autograd.grad(output, edges, given, retain_graph=True, allow_unused=True)
            cotangents.keep(deltas)
        for (key, sharing), found in zip(takers.items(), deltas, strict=True):
            delta = sharing[0].zeros() if found is None else found.detach()
            if column == n_columns:
                checked[key] = sums.pop(key), delta
                continue
            if weighted is not None:
                wide = torch.promote_types(delta.dtype, torch.float32)
                sums[key] = sums[key] + delta if key in sums else delta.to(wide)
            for rule in sharing:
                rule.store(column, delta)
    return checked


def side_by_side(
    output: Tensor | GradientEdge, edges: Sequence[Tensor] | Sequence[GradientEdge], columns: Tensor
) -> tuple[Tensor | None, ...] | None:
    """Pull all columns ``(R, b, …)`` back at once.

    Returns:
        ``(R, …)`` per edge, None for those without a way to the output; None where an operation takes no batch of them.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "(?s).*performance drop")
        try:
            return torch.autograd.grad(
                output, edges, columns, retain_graph=True, allow_unused=True, is_grads_batched=True
            )
        except RuntimeError:
            return None


def small_products(rules: Iterable[Rule]) -> bool:
    """Say whether the backward passes are matrix products with one row per example, as in a multilayer perceptron.

    One pass over all columns then makes R·b rows of b, for which products are far more efficient, and calls every
    operation once in place of R times. Otherwise it gains nothing and takes R times the memory.
    """
    return all(isinstance(rule, (MatrixProduct, MatrixBias)) and rule.layout.positions == 1 for rule in rules)
