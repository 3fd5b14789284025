"""Image collages: a component's top examples in one PNG."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from npeff.storage.files import atomic, path_of

if TYPE_CHECKING:
    from npeff.components.components import Components
    from npeff.reports.examples import Example
    from npeff.reports.gallery import Gallery
    from npeff.reports.summary import Summary, Top
    from npeff.reports.wording import ClassNames

TEXT_WIDTH = 96  # characters per line


def collage(
    components: Components,
    data: Iterable[Any] | None,
    j: int,
    path: str | Path,
    *,
    class_names: Sequence[str] | None = None,
    k: int = 25,
    columns: int | None = None,
    title: str | None = None,
    tokenizer: Any = None,
    dpi: int = 150,
) -> Path:
    """Draw a component's top examples side by side, each with its label, its prediction if wrong, and its coefficient.

    Args:
        components: A decomposition.
        data: The data given to ``compute_fishers``, in the same order. None: captions only.
        j: A component.
        path: The PNG to write; its folder is made if missing.
        class_names: See :func:`npeff.report`.
        k: How many examples.
        columns: Pictures per row; by default about as many as rows.
        title: By default the component's number and heading.
        tokenizer: See :func:`npeff.report`.
        dpi: Pixels per inch; a picture is an inch wide.

    Returns:
        The file.

    Raises:
        ArgumentError: ``j`` is not a component, or another argument is not as documented.
        DataError: The data ends early, or its labels are not those of the decomposed examples.
        StorageError: The file cannot be written.
    """
    (done,) = collages(
        components,
        data,
        {j: path_of(path)},
        class_names=class_names,
        k=k,
        columns=columns,
        title=title,
        tokenizer=tokenizer,
        dpi=dpi,
    )
    return done


def collages(
    components: Components,
    data: Iterable[Any] | None,
    paths: dict[int, Path],
    *,
    class_names: Sequence[str] | None = None,
    k: int = 25,
    columns: int | None = None,
    title: str | None = None,
    tokenizer: Any = None,
    dpi: int = 150,
) -> list[Path]:
    """Like :func:`collage` for several components, ``j → path``, with one pass over the data.

    Raises:
        ArgumentError: As there.
        DataError: As there.
        StorageError: As there.
    """
    from npeff.errors import ArgumentError
    from npeff.reports import checks
    from npeff.reports.picked import pick
    from npeff.reports.study import heading

    checks.check_options(data, k, tokenizer)
    if columns is not None and (not isinstance(columns, int) or columns < 1):
        raise ArgumentError(f"columns: expected a number of pictures per row, got {columns!r}")
    for path in paths.values():
        checks.check_page(path)
    with pick(components, data, list(paths), k, class_names, tokenizer) as picked:
        for j, path in paths.items():
            summary = picked.summaries[j]
            name = f"{j}  {heading(summary, picked.names)}" if title is None else title
            _draw(summary, picked.gallery, picked.names, path, columns, name, dpi)
    return list(paths.values())


def _draw(
    summary: Summary, gallery: Gallery, names: ClassNames, path: Path, columns: int | None, title: str, dpi: int
) -> None:
    from matplotlib.figure import Figure

    from npeff.reports.text import printable

    tops = summary.top
    examples = [gallery.kept.get(top.position) for top in tops]
    pictures = [_pixels(gallery, example) for example in examples]
    wide = columns or (1 if not any(p is not None for p in pictures) else max(1, math.ceil(math.sqrt(len(tops)))))
    rows = max(1, math.ceil(len(tops) / wide))
    texts = [_lines(example) for example in examples]
    sizes = [1.22 if picture is not None else 0.3 + 0.16 * len(t) for picture, t in zip(pictures, texts, strict=True)]
    heights = [max(sizes[a : a + wide] or [0.5]) for a in range(0, rows * wide, wide)]
    width = wide * 1.05 if any(p is not None for p in pictures) else 7.5
    figure = Figure((max(width, 3.0) + 0.3, sum(heights) + 0.5), dpi=dpi, layout="constrained")
    figure.suptitle(printable(title), x=0.02, ha="left", fontsize=10, parse_math=False)
    grid = figure.subplots(rows, wide, squeeze=False, gridspec_kw={"height_ratios": heights})
    for axes in grid.flat:
        axes.set_axis_off()
    for axes, top, picture, lines in zip(grid.flat, tops, pictures, texts, strict=False):
        caption = _caption(top, names)
        colour = "#a8431b" if top.wrong else "#1d1d1b"
        if picture is None:
            axes.text(0, 1, caption, fontsize=7, va="top", color=colour, parse_math=False, transform=axes.transAxes)
            axes.text(0, 1, "\n" + "\n".join(lines), fontsize=8, va="top", parse_math=False, transform=axes.transAxes)
        else:
            axes.imshow(picture, interpolation="nearest", aspect="equal" if picture.shape[0] > 3 else "auto")
            axes.set_title(caption, fontsize=6.5, color=colour, pad=2, parse_math=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic(path) as scratch:
        figure.savefig(scratch, format="png", metadata={"Software": "npeff"})


def _caption(top: Top, names: ClassNames) -> str:
    from npeff.reports.text import printable
    from npeff.reports.wording import coefficient

    known = names[top.label] if top.label >= 0 else names[top.prediction] if top.prediction >= 0 else ""
    verdict = f"{names[top.label]} → {names[top.prediction]}" if top.wrong else known
    return printable(f"{verdict[:24]}  {coefficient(top.coefficient)}".strip())


def _pixels(gallery: Gallery, example: Example | None) -> Any:
    import numpy as np

    from npeff.reports.images import limit_of, strip

    if example is None or (example.image is None and example.values is None):
        return None
    if example.image is None:
        assert example.values is not None
        return strip(example.values, limit_of([example.values]))
    pixels = gallery.pixels(example.image)
    pixels = pixels[..., 0] if pixels.ndim == 3 and pixels.shape[2] == 1 else pixels
    return np.repeat(pixels[..., None], 3, axis=2) if pixels.ndim == 2 else pixels


def _lines(example: Example | None) -> list[str]:
    from npeff.reports.text import excerpt, printable

    if example is None or example.text is None:
        return []
    start, rest = excerpt(printable(example.text), 400)
    return [line for part in (start + (" …" if rest else "")).splitlines() for line in textwrap.wrap(part, TEXT_WIDTH)]
