"""Stage 4b: pages in which people read components; formats what it is given."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any

from npeff.errors import ArgumentError, StorageError
from npeff.storage.files import atomic, check_target, explain, path_of

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
            are kept. The order is checked by the labels: in data without labels another order (a loader that
            shuffles) cannot be noticed, and the page would show the wrong examples.
            Inputs that look like images ``(C, H, W)`` or ``(H, W)``, C in {1, 3}, are drawn;
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
        ArgumentError: ``components`` are no Components, ``k`` is no number from 1, ``data`` cannot be iterated,
            ``tokenizer`` cannot decode, or ``class_names`` are too few or a single string.
        DataError: The data ends early, or its labels are not those of the decomposed examples.
        StorageError: The page cannot be written.
    """
    from npeff.components import Components
    from npeff.reports.examples import collect
    from npeff.reports.page import render
    from npeff.reports.summary import summarise

    if not isinstance(components, Components):
        raise ArgumentError(f"components: expected Components, got {type(components).__name__}; see npeff.decompose")
    if not isinstance(k, Integral) or k < 1:
        raise ArgumentError(f"k: expected at least 1 top example per component, got {k!r}")
    if data is not None and not isinstance(data, Iterable) and not hasattr(data, "__getitem__"):
        raise ArgumentError(f"data: expected an iterable of batches, got {data!r}")
    if tokenizer is not None and not callable(getattr(tokenizer, "decode", None)):
        raise ArgumentError(f"tokenizer: expected something with decode(ids), got a {type(tokenizer).__name__}")
    names = _class_names(class_names, data, components.logits.shape[1])
    path = path_of(out, "out")
    path = path if path.suffix.lower() in (".html", ".htm") else path / "index.html"
    _check(path)
    summaries = summarise(components, k)
    wanted = {t.position: t.label for s in summaries for t in s.top}
    examples = collect(data, wanted, wanted, tokenizer) if data is not None else {}
    html = render(components, summaries, examples, names, title or "What the network responds to")
    _write(path, html)
    return path


def _class_names(given: Sequence[str] | None, data: Any, n_classes: int) -> Sequence[str] | None:
    if given is not None and (isinstance(given, str) or not hasattr(given, "__len__")):
        raise ArgumentError(f"class_names: expected a list of names, got {given!r}")
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


def _check(path: Path) -> None:
    """Make sure, before the work, that a page may be written at ``path``; folders that are missing will be made.

    Raises:
        StorageError: A file stands in the place of a folder, or the reverse, or the folder may not be written to.
    """
    there = path
    while not there.parent.exists():
        there = there.parent
    if not there.parent.is_dir():
        raise StorageError(
            f"{path}: writing failed ({there.parent} is a file, not a folder). Choose another folder, or a name ending "
            "in .html"
        )
    check_target(there)


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
        scratch.write_text(html, encoding="utf-8", errors="replace")


__all__ = ["report"]
