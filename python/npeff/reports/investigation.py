"""Everything that a report needs to know, found out in one pass over the data."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from npeff.errors import ArgumentError
from npeff.reports.attribution import drawn
from npeff.reports.energy import Heads
from npeff.reports.extras import INFLUENCES, Extras
from npeff.reports.fragments import THUMBS
from npeff.reports.gallery import Gallery
from npeff.reports.groups import tree_of
from npeff.reports.relations import coactivation, explained_shares
from npeff.reports.study import Study
from npeff.reports.summary import Top, summarise, tops
from npeff.reports.wording import ClassNames

if TYPE_CHECKING:
    from npeff.components.components import Components

NODE_EXAMPLES = 12


def investigate(
    components: Components,
    data: Iterable[Any] | None,
    names: Sequence[str] | None,
    *,
    k: int,
    tokenizer: Any,
    strategies: Any,
    extras: Extras,
    influence_data: Iterable[Any] | None,
    heads: Heads,
    all_examples: bool,
    seed: int,
    progress: bool,
) -> Study:
    """Measure the components, build the tree, encode the examples.

    Args:
        components: A decomposition.
        data: Its data, or None.
        names: Of the classes, or None.
        k: Top examples per component.
        tokenizer: See :func:`npeff.report`.
        strategies: See :func:`npeff.report`.
        extras: The optional inputs.
        influence_data: The training data, or None.
        heads: See :func:`npeff.report`.
        all_examples: Encode every example, not only those on some component's page.
        seed: Decides the examples at random.
        progress: Show progress bars.

    Returns:
        The study; its galleries are to be closed.

    Raises:
        ArgumentError: Attributions are given without data.
    """
    if extras.attributions and data is None:
        raise ArgumentError("attributions: need the data to be drawn over; pass data=")
    if strategies is None:
        strategies = extras.trust.n_strategies
    summaries = summarise(components, k, seed, progress)
    cosines = components.cosines()
    nodes = tree_of(components, summaries, min(k, NODE_EXAMPLES), strategies)
    ids, labels = np.asarray(components.ids), np.asarray(components.labels)
    shown = {top.position for s in summaries for top in s.shown} | {top.position for node in nodes for top in node.top}
    attributed = {int(ids[i]) for _, i in extras.attributions}
    tiles = {top.position for s in summaries for top in s.top[:THUMBS]}
    gallery = Gallery(shown | attributed, tiles, attributed)
    if data is not None:
        wanted = set(ids.tolist()) if all_examples else shown | attributed
        gallery.fill(data, wanted, dict(zip(ids.tolist(), labels.tolist(), strict=True)), tokenizer, progress)
    influential = {position for found in extras.influences.values() for position, _ in found.pairs[:INFLUENCES]}
    training = Gallery(influential)
    if influence_data is not None:
        training.fill(influence_data, influential, {}, tokenizer)
    explained = extras.trust.explained
    if explained is None:
        explained = explained_shares(components.vectors, components.coefficients, components.loss, components.kind)
    return Study(
        components=components,
        summaries=summaries,
        nodes=nodes,
        gallery=gallery,
        training=training,
        extras=extras,
        names=ClassNames(names),
        cosines=cosines,
        together=coactivation(components.coefficients),
        explained=explained,
        attributions=attributions_of(gallery, components, extras, tokenizer),
        heads=heads,
    )


def attributions_of(
    gallery: Gallery, components: Components, extras: Extras, tokenizer: Any
) -> dict[int, list[tuple[Top, dict[str, Any]]]]:
    """Draw all attributions; see :func:`npeff.reports.attribution.drawn`."""
    found: dict[int, list[tuple[Top, dict[str, Any]]]] = {}
    for (j, i), weights in extras.attributions.items():
        (top,) = tops(components, np.array([i]), components.coefficients[:, j])
        name = f"attributions[{j}, {i}]"
        found.setdefault(j, []).append((top, drawn(gallery, top.position, weights, tokenizer, name)))
    for items in found.values():
        items.sort(key=lambda item: -item[0].coefficient)
    return found
