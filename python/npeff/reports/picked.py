"""Some components' top examples with their raw inputs: what collages and documents are made of."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from npeff.errors import ArgumentError
from npeff.reports.checks import check_components, names_of
from npeff.reports.gallery import Gallery
from npeff.reports.summary import Summary, summary_of
from npeff.reports.wording import ClassNames

if TYPE_CHECKING:
    from npeff.components.components import Components


@dataclass(frozen=True)
class Picked:
    """Components with the examples that they are shown by.

    Attributes:
        summaries: By component.
        gallery: Holds the raw examples, under ``kept``.
        names: Of the classes.
    """

    summaries: dict[int, Summary]
    gallery: Gallery
    names: ClassNames


@contextmanager
def pick(
    components: Components,
    data: Iterable[Any] | None,
    chosen: Sequence[int],
    k: int,
    class_names: Sequence[str] | None,
    tokenizer: Any,
) -> Iterator[Picked]:
    """Collect the top examples of some components in one pass over the data.

    Args:
        components: A decomposition.
        data: Its data, or None.
        chosen: Components.
        k: Examples of each.
        class_names: See :func:`npeff.report`.
        tokenizer: See :func:`npeff.report`.

    Yields:
        The components and their examples.

    Raises:
        ArgumentError: One of the chosen is no component.
        DataError: The data ends early, or its labels are not those of the decomposed examples.
    """
    check_components(components)
    names = names_of(class_names, data, components.logits.shape[1])
    for j in chosen:
        if isinstance(j, bool) or not hasattr(j, "__index__") or not 0 <= j < components.n_components:
            raise ArgumentError(f"j: expected a component below {components.n_components}, got {j!r}")
    summaries = {j: summary_of(components, j, k) for j in chosen}
    labels = {top.position: top.label for summary in summaries.values() for top in summary.top}
    with Gallery(labels, (), labels) as gallery:
        if data is not None:
            gallery.fill(data, labels, labels, tokenizer)
        yield Picked(summaries, gallery, ClassNames(names))
