"""Stage 4b: pages in which people read components; formats what it is given."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from npeff.errors import ArgumentError
from npeff.files import atomic, explain

if TYPE_CHECKING:
    from npeff.components import Components


def report(
    components: Components,
    data: Iterable[Any] | None = None,
    out: str | Path = "report/",
    *,
    class_names: Sequence[str] | None = None,
    k: int = 16,
    title: str | None = None,
    tokenizer: Any = None,
) -> Path:
    """Write one self-contained HTML page that shows what each component responds to.

    Args:
        components: A decomposition.
        data: The data given to ``compute_fishers``, in the same order; iterated once, only the examples shown
            are kept. Inputs that look like images ``(C, H, W)`` or ``(H, W)``, C in {1, 3}, are drawn;
            strings, dicts with ``"text"``, and ``"input_ids"`` with a ``tokenizer``, are printed; other
            tensors become strips of colours. None: numbers only.
        out: A file ending in ``.html``, or a folder for ``index.html``.
        class_names: One name per class; by default ``data.class_names`` or ``data.dataset.classes`` where
            they exist.
        k: Top examples per component.
        title: Heading of the page.
        tokenizer: Anything with ``decode(ids)``, for data that holds only token ids.

    Returns:
        The file written.

    Raises:
        ArgumentError: ``k`` is below 1, or ``class_names`` are too few or a single string.
        DataError: The data ends early, or its labels are not those of the decomposed examples.
        StorageError: The page cannot be written.
    """
    from npeff.reports.examples import collect
    from npeff.reports.page import render
    from npeff.reports.summary import summarise

    if k < 1:
        raise ArgumentError(f"k: expected at least 1 top example per component, got {k}")
    names = _class_names(class_names, data, components.logits.shape[1])
    path = Path(out)
    path = path if path.suffix.lower() in (".html", ".htm") else path / "index.html"
    summaries = summarise(components, k)
    wanted = {t.position: t.label for s in summaries for t in s.top}
    examples = collect(data, wanted, wanted, tokenizer) if data is not None else {}
    html = render(components, summaries, examples, names, title or "What the network responds to")
    _write(path, html)
    return path


def _class_names(given: Sequence[str] | None, data: Any, n_classes: int) -> Sequence[str] | None:
    if isinstance(given, str):
        raise ArgumentError(f"class_names: expected a list of names, got the string {given!r}")
    if given is not None:
        if len(given) < n_classes:
            raise ArgumentError(f"class_names: expected {n_classes} names, one per class, got {len(given)}")
        return given
    for owner, attribute in (
        (data, "class_names"),
        (getattr(data, "dataset", None), "class_names"),
        (getattr(data, "dataset", None), "classes"),
    ):
        found = getattr(owner, attribute, None)
        if isinstance(found, Sequence) and not isinstance(found, str) and len(found) >= n_classes:
            return found
    return None


def _write(path: Path, html: str) -> None:
    """Replace an old page only once the new one is whole.

    Raises:
        StorageError: The page cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        failure = explain(path, error, "Nothing else was touched.")
        raise failure from error
    with atomic(path) as scratch:
        scratch.write_text(html, encoding="utf-8")


__all__ = ["report"]
