"""The always-on check of rules against autograd, and of examples against each other.

Three backward passes of the batch at hand: one whose cotangent is random for every example, and two whose
cotangent is zero except for the first, or for the last, example. From them:

- δ of a lone example must vanish on all rows that do not belong to it: this decides which rows belong to
  whom;
- Σ over examples of the rule's gradients must be autograd's gradient of the summed output;
- the rule's gradient of the first and of the last example must be autograd's gradient of that example alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from npeff.batches import Batch
from npeff.errors import ModelError
from npeff.gradients import tiles
from npeff.gradients.fallback import TOLERANCE, dense
from npeff.gradients.rules import Found, Rule, Unsupported

if TYPE_CHECKING:
    from npeff.gradients.engine import PerExampleGradients

LONG = 4096
"""Elements of an example's gradient from which on it is added alone."""

_ABSOLUTE = {torch.float64: 1e-10, torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def check_rules(
    engine: PerExampleGradients,
    batch: Batch,
    logits: Tensor,
    found: Mapping[str, list[Found]],
    unused: list[str],
) -> dict[str, tuple[int, ...]]:
    """Choose each use's layout and compare with autograd; what does not agree moves to the fallback.

    Args:
        engine: Receives the parameters that fail, with the reason, in ``moved``.
        batch: The batch at hand.
        logits: Its logits with their graph.
        found: Uses with their candidate layouts, per parameter.
        unused: Parameters on which the logits do not depend.

    Returns:
        Per parameter that passed, the index of the layout chosen for each use.

    Raises:
        ModelError: Examples influence each other, or the model is random.
    """
    check_independence(engine, batch, logits)
    n = batch.n_examples
    probes = sorted({0, n - 1})
    cotangents = _cotangents(logits, probes)
    names = [name for name in engine.tensors if name not in unused]
    uses = [(name, rule, use, layouts) for name in found for rule, use, layouts in found[name]]
    edges = [GradientEdge(use.node, 0) for _, _, use, _ in uses]
    truths: list[dict[str, Tensor]] = []
    deltas: list[list[Tensor]] = []
    for cotangent in cotangents:
        targets: list[Any] = [*edges, *(engine.tensors[name] for name in names)]
        results = torch.autograd.grad(
            logits,
            targets,
            cotangent,
            retain_graph=True,
            allow_unused=True,
        )
        deltas.append(
            [_dense(delta, logits, use.output_shape) for delta, (_, _, use, _) in zip(results, uses, strict=False)]
        )
        truths.append(
            {
                name: _dense(g, logits, tuple(engine.tensors[name].shape))
                for name, g in zip(names, results[len(uses) :], strict=True)
            }
        )
    scale = [
        torch.stack([truth.to(torch.float64).norm() for truth in column.values()]).norm().item() for column in truths
    ]
    chosen: dict[str, tuple[int, ...]] = {}
    position = 0
    for name, entries in found.items():
        mine = [[column[position + i] for column in deltas] for i in range(len(entries))]
        position += len(entries)
        try:
            picked = [_pick(entry, n, probes, delta, engine) for entry, delta in zip(entries, mine, strict=True)]
            rules = [entry[0](entry[1], entry[2][i], engine.scratch) for entry, i in zip(entries, picked, strict=True)]
            _compare(
                engine,
                name,
                rules,
                [delta[0] for delta in mine],
                probes,
                [column[name] for column in truths],
                scale,
            )
        except Unsupported as reason:
            engine.moved[name] = str(reason)
        else:
            chosen[name] = tuple(picked)
    return chosen


def check_independence(engine: PerExampleGradients, batch: Batch, logits: Tensor) -> None:
    """The first and the last example alone must have the logits that they have in the batch.

    Raises:
        ModelError: They do not.
    """
    if batch.n_examples == 1 or not batch.sliceable:
        return
    # The last example goes with the last but one: a lone example may be treated as something else altogether.
    for examples in (slice(0, 1), slice(batch.n_examples - 1, batch.n_examples)):
        with torch.no_grad():
            alone = engine._forward(batch.take(examples))
        if differ(alone, logits.detach()[examples], logits.dtype):
            with torch.no_grad():
                again = engine._forward(batch)
            if differ(again, logits.detach(), logits.dtype):
                raise ModelError(
                    "model: two passes over the same batch give different logits; make it deterministic "
                    "(model.eval() switches dropout off)"
                )
            gap = float((alone - logits.detach()[examples]).abs().max())
            raise ModelError(
                f"model: example {examples.start} of a batch has other logits when it is alone (largest "
                f"difference {gap:.3g}), so examples influence "
                "each other and have no gradient of their own; use model.eval(), batches of one example, "
                f"or forward= without that dependence. To take it, {batch.how_cut()}"
            )


def differ(one: Tensor, other: Tensor, dtype: torch.dtype) -> bool:
    """Whether logits differ by more than rounding in their dtype.

    Raises:
        ModelError: Their shapes differ.
    """
    if one.shape != other.shape:
        raise ModelError(
            f"model: the same examples have logits of shape {tuple(other.shape)} within their batch and "
            f"{tuple(one.shape)} when called again; make their number independent of the batch, or choose them "
            "in forward=callable(model, batch) -> logits"
        )
    one, other = one.to(torch.float64), other.to(torch.float64)
    finite = torch.isfinite(one) & torch.isfinite(other)
    gap = torch.where(finite, one - other, 0.0).abs()
    size = torch.where(finite, other, 0.0).abs().max().clamp_min(1.0)
    return bool((gap > 5 * TOLERANCE.get(dtype, 2e-4) * size).any())


def _cotangents(logits: Tensor, probes: list[int]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    full = torch.randn(logits.shape, generator=generator, dtype=torch.float64).to(logits.device, logits.dtype)
    alone = []
    for probe in probes:
        cotangent = torch.zeros_like(full)
        cotangent[probe] = full[probe]
        alone.append(cotangent)
    return [full, *alone]


def _dense(gradient: Tensor | None, like: Tensor, shape: tuple[int, ...]) -> Tensor:
    return like.detach().new_zeros(shape) if gradient is None else dense(gradient).detach()


def _add_examples(total: Tensor, values: Tensor) -> None:
    """Add ``(b', w)`` to a float64 ``(w,)``: long rows one by one, so that no copy in float64 is made."""
    if values.shape[1] < LONG:
        total += values.to(torch.float64).sum(dim=0)
        return
    for row in values:
        total += row


def _pick(entry: Found, n: int, probes: list[int], deltas: list[Tensor], engine: PerExampleGradients) -> int:
    """The first layout in which a lone example's δ stays on its own rows.

    Raises:
        Unsupported: There is none.
    """
    rule, use, layouts = entry
    if n == 1:
        return 0
    for index, layout in enumerate(layouts):
        made = rule(use, layout, engine.scratch)
        stays = True
        for probe, delta in zip(probes, deltas[1:], strict=True):
            size = made.split(delta).abs().flatten(1).amax(dim=1)
            strangers = torch.cat([size[:probe], size[probe + 1 :]]).max()
            stays = stays and bool(strangers <= _ABSOLUTE.get(delta.dtype, 1e-6) * size[probe])
        if stays:
            return index
    raise Unsupported(
        f"in the output of {use.node.name()}, {use.output_shape}, the rows of an example are not where a "
        "batch-first (or time-first) layout has them"
    )


def _compare(
    engine: PerExampleGradients,
    name: str,
    rules: list[Rule],
    full: list[Tensor],
    probes: list[int],
    truth: list[Tensor],
    scale: list[float],
) -> None:
    for rule, delta in zip(rules, full, strict=True):
        rule.reserve(1)
        rule.store(0, delta)
    parameter = engine.parameters.named(name)
    n = rules[0].layout.examples
    total = torch.zeros(parameter.numel, dtype=torch.float64, device=truth[0].device)
    lone = {probe: torch.zeros_like(total) for probe in probes}
    for block in tiles.tiles(parameter, rules, n, 1, False, tiles.TILE_ELEMENTS):
        values = block.values[:, 0]
        width = values.shape[2]
        if isinstance(block.starts, int):
            start = block.starts - parameter.offset
            _add_examples(total[start : start + width], values[:, 0])
        else:
            values = values.to(torch.float64)
            total.view(-1, width).index_add_(
                0, (block.starts - parameter.offset).reshape(-1) // width, values.reshape(-1, width)
            )
        for probe in probes:
            if block.examples.start <= probe < block.examples.stop:
                mine = values[probe - block.examples.start].to(torch.float64)
                if isinstance(block.starts, int):
                    lone[probe][start : start + width] += mine[0]
                else:
                    lone[probe].view(-1, width).index_add_(
                        0, (block.starts[probe - block.examples.start] - parameter.offset) // width, mine
                    )
    for what, got, expected, size in zip(
        ("their sum", *(f"example {probe}" for probe in probes)),
        (total, *lone.values()),
        truth,
        scale,
        strict=True,
    ):
        dtype = expected.dtype
        gap = float((got - expected.reshape(-1).to(torch.float64)).norm())
        allowed = (
            TOLERANCE.get(dtype, 2e-4) * float(expected.to(torch.float64).norm()) + _ABSOLUTE.get(dtype, 1e-6) * size
        )
        # Non-finite gradients are nobody's fault here: they are reported with example and element later.
        if gap > allowed:
            raise Unsupported(
                f"the {rules[0].name} rule disagrees with autograd on {what} (by {gap:.3g}, allowed {allowed:.3g})"
            )
