"""The always-on check of rules against autograd, and of which rows belong to which example.

*Rows.* Two backward passes of a batch, one with cotangents c_i, one with w_i c_i, where every w_i is a power of two.
Where some rows of the gradient δ of an operation's output belong to example i, and to no other, the second pass gives
w_i δ there, to the last bit: a product with a power of two rounds nothing. Any other assignment of rows to examples
shows as a difference, because the w_i differ.

*Values.* With the first pass comes autograd's gradient of ``Σ_i ⟨c_i, out_i⟩``, which must equal ``Σ_i rule_i``: on all
elements of a parameter, or on some of its rows where it is large.

Both are done when the graph has a new form. The first is repeated, against the rows of the batch's own backward
passes, on every batch whose graph has new sizes or can move rows by the values of a tensor, and on one batch in
``EVERY`` of the others: see :func:`npeff.gradients.backward.backward`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from npeff.batches.batches import Batch
from npeff.gradients import blocks
from npeff.gradients.backward import Cotangents
from npeff.gradients.fallback import Autograd, dense
from npeff.gradients.graph import Graph
from npeff.gradients.rules import Found, Rule, Unsupported
from npeff.gradients.rules.base import Scratch
from npeff.models.parameters import Parameter, Parameters

EVERY = 16
"""Of batches whose graph is known and moves rows by its shapes alone, one in so many is checked again."""

ROWS = {torch.float64: 1e-6, torch.float32: 2e-3, torch.bfloat16: 0.2, torch.float16: 0.2}
"""By how much w_i δ may differ, relative to its norm. A wrong example's rows differ by half of it at least, the right
one's by the rounding of a sum over columns alone."""

LONG = 4096
"""Elements of an example's gradient from which on it is added alone."""

WINDOWS = 4
"""Of a large parameter so many stretches of rows are compared, a 32nd of the rows each."""


@dataclass
class Form:
    """The findings of the checks on graphs of one form.

    Attributes:
        layouts: Per parameter that passed, the index of the layout chosen for each use.
        undecided: Parameters of which δ was zero, or could belong to the examples in more than one way.
        unchecked: For each size (:attr:`Graph.fingerprint`) that was checked, the batches computed since.
    """

    layouts: dict[str, tuple[int, ...]] = field(default_factory=dict)
    undecided: set[str] = field(default_factory=set)
    unchecked: dict[int, int] = field(default_factory=dict)

    def due(self, fingerprint: int, routed: bool) -> bool:
        """Say whether to check the rows of the next batch, of a graph with this fingerprint; count the batch."""
        before = self.unchecked.setdefault(fingerprint, EVERY)
        if routed or self.undecided or before >= EVERY - 1:
            return True
        self.unchecked[fingerprint] += 1
        return False


class Checked(Protocol):
    """The parameters of an engine that are checked, and those of them that failed before."""

    parameters: Parameters
    tensors: dict[str, Tensor]
    scratch: Scratch
    moved: dict[str, str]


def check_rules(
    engine: Checked,
    batch: Batch,
    logits: Tensor,
    found: Mapping[str, list[Found]],
    unused: list[str],
    graph: Graph,
) -> Form:
    """Choose each use's layout and compare with autograd; what does not agree moves to the fallback.

    Parameters that fail get their reason in ``engine.moved``; on those ``unused`` the logits do not depend.
    """
    n, precision = batch.n_sequences, graph.precision
    uses = [(name, rule, use, layouts) for name in found for rule, use, layouts in found[name]]
    shapes = [use.output_shape for _, _, use, _ in uses]
    edges: list[Any] = [GradientEdge(graph.nodes[use.node], 0) for _, _, use, _ in uses]
    tensors = {name: tensor for name, tensor in engine.tensors.items() if name not in unused}
    generator = torch.Generator().manual_seed(0)
    given = torch.randn((n, logits.shape[1]), generator=generator, dtype=torch.float64)
    signs = torch.randint(0, 2, (n,), generator=generator) * 2 - 1
    u = (signs * (0.5 + torch.rand(n, generator=generator, dtype=torch.float64))).to(logits.device)
    w = powers_of_two(n, precision).to(logits.device)
    slots = None if batch.places is None else batch.slots()[:, -1:]  # the last place of each sequence
    columns = given.to(logits.device)[:, :, None]

    def passed(targets: list[Any], weights: Tensor, own: list[Any] | None = None) -> list[Tensor | None]:
        if not targets:
            return []
        cotangents = Cotangents(batch, graph, columns * weights[:, None, None], slots, own)
        given = cotangents.column(0)
        return list(torch.autograd.grad(cotangents.output, targets, given, retain_graph=True, allow_unused=True))

    def deltas(results: list[Tensor | None]) -> list[Tensor]:
        return [_dense(result, logits, shape) for result, shape in zip(results, shapes, strict=True)]

    u = torch.ones_like(u) if n == 1 else u
    first = passed([*edges, *tensors.values()], u)
    delta, truth = deltas(first[: len(edges)]), first[len(edges) :]
    # From where the batch's own passes begin; of one example all rows are its own, and one pass does for both.
    weighted = delta if n == 1 else deltas(passed(edges, u * w, edges))
    autograd = Autograd(truth, lambda factor: passed(list(tensors.values()), u * factor), tensors, precision)
    form, position = Form(unchecked={graph.fingerprint: 0}), 0
    for name, entries in found.items():
        own = slice(position, position + len(entries))
        position += len(entries)
        try:
            chosen = []
            for entry, one, other in zip(entries, delta[own], weighted[own], strict=True):
                fitting = _fitting(entry, graph.nodes, one, other, w, precision, engine)
                chosen.append(fitting[0])
                if n > 1 and (len(fitting) > 1 or not bool(one.any())):
                    form.undecided.add(name)
            rules = [
                rule(use, graph.nodes, layouts[i], engine.scratch)
                for (rule, use, layouts), i in zip(entries, chosen, strict=True)
            ]
            total, where = _sum(engine, name, rules, delta[own], n)
        except Unsupported as error:
            reason = str(error)
        else:
            reason = autograd.disagrees(name, total, where)
            reason = reason and f"the {rules[0].name} rule disagrees with autograd {reason}"
        if reason:
            engine.moved[name] = reason
            form.undecided.discard(name)
        else:
            form.layouts[name] = tuple(chosen)
    return form


def powers_of_two(n: int, precision: torch.dtype) -> Tensor:
    """Make weights ``(n,)`` float64, ±2^k, different from each other for up to 130 examples (16 in float16)."""
    exponents = torch.arange(0, 8) if precision == torch.float16 else torch.arange(-32, 33)
    magnitudes = torch.ldexp(torch.ones(len(exponents), dtype=torch.float64), exponents)
    values = torch.cat([magnitudes, -magnitudes])
    generator = torch.Generator().manual_seed(1)
    orders = [torch.randperm(len(values), generator=generator) for _ in range(0, n, len(values))]
    return values[torch.cat(orders)[:n]]


def rows_follow(rule: Rule, delta: Tensor, weighted: Tensor, w: Tensor, precision: torch.dtype) -> bool:
    """Say whether ``weighted`` is w_i δ on the rows that the rule gives to example i; w are ``(n,)`` powers of two."""
    mine, theirs = rule.split(delta), rule.split(weighted)
    shape = (-1, *(1,) * (theirs.dim() - 1))
    wide = torch.promote_types(mine.dtype, torch.float32)
    mine = mine.to(wide)
    gap = (theirs.to(wide) * (1 / w).to(wide).view(shape) - mine).flatten(1).norm(dim=1)
    size = mine.flatten(1).norm(dim=1)
    info = torch.finfo(precision)
    smallest = 64 * info.smallest_normal * info.eps * max(1, mine.numel() // len(w)) ** 0.5  # of numbers below normal
    # Gradients that are not finite pass: they are reported with example and element later.
    return not bool((gap > ROWS.get(precision, 2e-3) * size + smallest).any())


def _fitting(
    entry: Found, nodes: list[Node], delta: Tensor, weighted: Tensor, w: Tensor, precision: torch.dtype, engine: Checked
) -> list[int]:
    """The layouts in which the rows of each example follow its weight.

    Raises:
        Unsupported: There is none.
    """
    rule, use, layouts = entry
    if len(w) == 1:
        return [0]
    fitting = [
        index
        for index, layout in enumerate(layouts)
        if rows_follow(rule(use, nodes, layout, engine.scratch), delta, weighted, w, precision)
    ]
    if not fitting:
        raise Unsupported(misplaced(use.operation, use.output_shape))
    return fitting


def misplaced(operation: str, shape: tuple[int, ...]) -> str:
    """Explain why a use has no layout."""
    return (
        f"in the output of {operation}, {shape}, the rows of an example are not where a batch-first (or time-first) "
        "layout has them"
    )


def _dense(gradient: Tensor | None, like: Tensor, shape: tuple[int, ...]) -> Tensor:
    return like.detach().new_zeros(shape) if gradient is None else dense(gradient).detach()


def _sum(
    engine: Checked, name: str, rules: list[Rule], delta: list[Tensor], n_examples: int
) -> tuple[Tensor, list[slice]]:
    """``Σ_i rule_i`` by way of the per-example gradients, ``(k,)`` float64, and on which elements; none: on all."""
    for rule, one in zip(rules, delta, strict=True):
        rule.reserve(1)
        rule.store(0, one)
    parameter = engine.parameters.named(name)
    if parameter.numel * n_examples > blocks.TILE_ELEMENTS // 8 and parameter.shape[0] >= 32 * WINDOWS:
        return _sum_of_some(parameter, rules, n_examples)
    total = torch.zeros(parameter.numel, dtype=torch.float64, device=delta[0].device)
    for block in blocks.Tiling(n_examples, 1, blocks.TILE_ELEMENTS).tiles(parameter, rules):
        values = block.values[:, 0]
        width = values.shape[2]
        if isinstance(block.starts, int):
            start = block.starts - parameter.offset
            _add_examples(total[start : start + width], values[:, 0])
        else:
            assert isinstance(block.starts, Tensor), "small parameters were not to be gathered"
            rows = (block.starts - parameter.offset).reshape(-1) // width
            total.view(-1, width).index_add_(0, rows, values.to(torch.float64).reshape(-1, width))
    return total, []


def _sum_of_some(parameter: Parameter, rules: list[Rule], n_examples: int) -> tuple[Tensor, list[slice]]:
    """As :func:`_sum`, on a few stretches of rows that lie apart."""
    n_rows = parameter.shape[0]
    width, size = parameter.numel // n_rows, n_rows // 32
    totals, where = [], []
    for window in range(WINDOWS):
        first = (n_rows - size) * window // (WINDOWS - 1)
        total: Tensor | None = None
        for example in range(n_examples):
            values = blocks.summed(parameter, rules, slice(example, example + 1), slice(first, first + size))
            values = values.reshape(-1).to(torch.float64)
            total = values if total is None else total + values
        assert total is not None, "a batch has examples"
        totals.append(total)
        where.append(slice(first * width, (first + size) * width))
    return torch.cat(totals), where


def _add_examples(total: Tensor, values: Tensor) -> None:
    """Add ``Σ_i values_i`` to a float64 ``(w,)``: long rows one by one, so that no float64 copy is made."""
    if values.shape[1] < LONG:
        total += values.sum(dim=0, dtype=torch.float64)
        return
    for row in values:
        total.add_(row)
