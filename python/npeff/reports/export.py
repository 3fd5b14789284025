r"""Top examples outside a page: image collages, and a LaTeX document with one section per component."""

from __future__ import annotations

import io
import math
import re
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment
from matplotlib.figure import Figure

from npeff.components.components import Components
from npeff.errors import ArgumentError, check_number
from npeff.language.places import check_places
from npeff.perturbation.options import among
from npeff.reports.data import ReportOptions, heading
from npeff.reports.examples import Gallery
from npeff.reports.figures import Pixels, picture_of
from npeff.reports.html import environment
from npeff.reports.summary import COLUMNS, ComponentSummary, summarise
from npeff.reports.text import ClassNames, coefficient, printable
from npeff.reports.writer import AssetsFolder, check_page
from npeff.storage.files import atomic, path_of

TEXT_WIDTH = 96  # characters per line of a collage
COLLAGED = 25  # examples of a collage
SPECIAL = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "&": r"\&", "#": r"\#", "%": r"\%", "_": r"\_",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}",
    "|": r"\textbar{}", '"': r"\textquotedbl{}", "'": r"\textquotesingle{}", "`": r"\textasciigrave{}", "-": "-{}",
    "\u00a0": " ", "\u2009": r"\,", "\u202f": r"\,", "–": r"\textendash{}", "—": r"\textemdash{}",
    "\u2018": r"\textquoteleft{}", "\u2019": r"\textquoteright{}",
    "\u201c": r"\textquotedblleft{}", "\u201d": r"\textquotedblright{}",
    "…": r"\dots{}", "→": r"$\to$", "[": "{[}", "]": "{]}",
}  # fmt: skip
TEXT_LENGTH = 600
PICTURE_WIDTH = 0.118  # of the line: eight side by side


@contextmanager
def _top_examples(
    components: Components, data: Iterable[Any] | None, chosen: Sequence[int], options: ReportOptions
) -> Iterator[tuple[list[ComponentSummary], Gallery, ClassNames]]:
    """Summarise the chosen components, and keep their top examples in one pass over the data.

    Raises:
        ArgumentError: An option is not as documented, or one of the chosen is no component.
    """
    names = options.names(data, components)
    check_places(data, components.provenance.get("fishers") or {})
    for j in chosen:
        if isinstance(j, bool) or not hasattr(j, "__index__") or not 0 <= j < components.n_components:
            raise ArgumentError(f"j: expected a component below {components.n_components}, got {j!r}")
    summaries = summarise(components, int(options.k), chosen=chosen)
    labels = {top.position: top.label for summary in summaries for top in summary.top}
    with closing(Gallery(labels, (), labels)) as gallery:
        if data is not None:
            gallery.fill(data, labels, labels, options.tokenizer)
        yield summaries, gallery, names


# ---- collages -----------------------------------------------------------------------------------------------


def collage(
    components: Components,
    data: Iterable[Any] | None,
    j: int,
    path: str | Path,
    *,
    class_names: Sequence[str] | None = None,
    k: int = COLLAGED,
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
    options = {"class_names": class_names, "k": k, "title": title, "tokenizer": tokenizer}
    return collages(components, data, {j: path_of(path)}, columns=columns, dpi=dpi, **options)[0]


def collages(
    components: Components,
    data: Iterable[Any] | None,
    paths: dict[int, Path],
    *,
    columns: int | None = None,
    dpi: int = 150,
    **given: Any,
) -> list[Path]:
    """Draw collages of several components, ``j → path``, with one pass over the data; see :func:`collage`.

    Raises:
        ArgumentError: As there.
        DataError: As there.
        StorageError: As there.
    """
    options = ReportOptions.checked(components, data, {"k": COLLAGED, **given})
    if columns is not None and (not isinstance(columns, int) or columns < 1):
        raise ArgumentError(f"columns: expected a number of pictures per row, got {columns!r}")
    check_number("dpi", dpi)
    for path in paths.values():
        check_page(path)
    with _top_examples(components, data, list(paths), options) as (summaries, gallery, names):
        for summary, path in zip(summaries, paths.values(), strict=True):
            figure = _collage(summary, gallery, names, columns, options.title, dpi)
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic(path) as scratch:
                figure.savefig(scratch, format="png", metadata={"Software": "npeff"})
    return list(paths.values())


def _collage(
    summary: ComponentSummary, gallery: Gallery, names: ClassNames, columns: int | None, title: str | None, dpi: int
) -> Figure:
    tops = summary.top
    pictures = [gallery.picture(top.position) for top in tops]
    beginnings = [gallery.beginning(top.position, 400) for top in tops]
    texts = [[w for line in text.splitlines() for w in textwrap.wrap(line, TEXT_WIDTH)] for text in beginnings]
    pictured = any(picture is not None for picture in pictures)
    wide = columns or (max(1, math.ceil(math.sqrt(len(tops)))) if pictured else 1)
    rows = max(1, math.ceil(len(tops) / wide))
    sizes = [1.22 if picture is not None else 0.3 + 0.16 * len(t) for picture, t in zip(pictures, texts, strict=True)]
    heights = [max(sizes[a : a + wide] or [0.5]) for a in range(0, rows * wide, wide)]
    width = wide * 1.05 if pictured else 7.5
    figure = Figure((max(width, 3.0) + 0.3, sum(heights) + 0.5), dpi=dpi, layout="constrained")
    title = f"{summary.j}  {heading(summary, names, gallery)}" if title is None else title
    figure.suptitle(printable(title), x=0.02, ha="left", fontsize=10, parse_math=False)
    grid = figure.subplots(rows, wide, squeeze=False, gridspec_kw={"height_ratios": heights})
    for axes in grid.flat:
        axes.set_axis_off()
    for axes, top, picture, lines in zip(grid.flat, tops, pictures, texts, strict=False):
        caption = printable(f"{top.verdict(names)[:24]}  {coefficient(top.coefficient)}".strip())
        colour = "#a8431b" if top.wrong else "#1d1d1b"
        if picture is None:
            axes.text(0, 1, caption, fontsize=7, va="top", color=colour, parse_math=False, transform=axes.transAxes)
            axes.text(0, 1, "\n" + "\n".join(lines), fontsize=8, va="top", parse_math=False, transform=axes.transAxes)
        else:
            axes.imshow(picture, interpolation="nearest", aspect="equal" if picture.shape[0] > 3 else "auto")
            axes.set_title(caption, fontsize=6.5, color=colour, pad=2, parse_math=False)
    return figure


# ---- documents ----------------------------------------------------------------------------------------------


def latex(
    components: Components,
    data: Iterable[Any] | None,
    path: str | Path,
    *,
    chosen: Sequence[int] | None = None,
    class_names: Sequence[str] | None = None,
    k: int = 16,
    title: str | None = None,
    tokenizer: Any = None,
) -> Path:
    """Write a document that pdfLaTeX, XeLaTeX or LuaLaTeX compiles: components and their top examples.

    Pictures go into a new folder within one of the same name with ``-images`` behind it; those of the document that is
    replaced are removed once the new one is in place. Text is escaped; characters that the
    engine's fonts lack are printed by their number.

    Args:
        components: A decomposition.
        data: The data given to ``compute_fishers``, in the same order. None: numbers only.
        path: The ``.tex`` file.
        chosen: Components, in this order; by default all, the largest share first.
        class_names: See :func:`npeff.report`.
        k: Examples per component.
        title: Of the document.
        tokenizer: See :func:`npeff.report`.

    Returns:
        The ``.tex`` file.

    Raises:
        ArgumentError: An argument is not as documented.
        DataError: The data ends early, or its labels are not those of the decomposed examples.
        StorageError: The document cannot be written.
    """
    options = ReportOptions.checked(components, data, among(ReportOptions, locals()))
    path = path_of(path)
    if path.suffix.lower() != ".tex":
        raise ArgumentError(f"path: expected a name ending in .tex, got {path}")
    check_page(path)
    if chosen is None:
        sizes = components.coefficients.sum(0, dtype=np.float64)
        chosen = np.argsort(-sizes, kind="stable").tolist()
    if not isinstance(chosen, Iterable):
        raise ArgumentError(f"chosen: expected numbers of components, got {chosen!r}")
    images = AssetsFolder(path, path.with_name(f"{path.stem}-images"))
    with images, _top_examples(components, data, chosen, options) as (summaries, gallery, names):
        sections = [_section(summary, gallery, names, images) for summary in summaries]
        text = _tex_environment().get_template("document.tex.j2").render(
            title=escape(title or "What the network responds to"),
            n_components=components.n_components,
            n_examples=len(components.coefficients),
            loss=f"{components.loss:.4f}",
            sections=sections,
            width=PICTURE_WIDTH,
        )  # fmt: skip
        images.publish(text)
    return path


def escape(text: str) -> str:
    r"""Escape text so that it stands for itself in LaTeX.

    Line breaks become spaces. Control characters are dropped; what pdfLaTeX's fonts lack becomes ``\npeffchar{…}``.
    """
    out = []
    for character in re.sub(r"\s+", " ", text):
        if character in SPECIAL:
            out.append(SPECIAL[character])
        elif character.isascii():
            out.append(character if character.isprintable() else "")
        elif "\u00c0" <= character <= "\u017f" and character not in "\u0149\u017f\u0138\u0140\u013f":
            out.append(character)
        else:
            code = ord(character)
            out.append(rf"\npeffchar{{{code:04X}}}" if not 0xD800 <= code < 0xE000 else "?")
    return "".join(out)


def _section(summary: ComponentSummary, gallery: Gallery, names: ClassNames, images: AssetsFolder) -> dict[str, Any]:
    facts = [f"{column.cell(summary)} {column.unit}" for column in COLUMNS if column.value(summary) is not None]
    items = []
    for rank, top in enumerate(summary.top):
        pixels = gallery.picture(top.position)
        items.append(
            {
                "file": "" if pixels is None else images.write(f"component-{summary.j}-{rank}.png", _png(pixels)),
                "verdict": escape(top.verdict(names)),
                "wrong": top.wrong,
                "coefficient": coefficient(top.coefficient),
                "position": top.position,
                "text": escape(gallery.beginning(top.position, TEXT_LENGTH)),
            }
        )
    return {
        "j": summary.j,
        "heading": escape(heading(summary, names, gallery)),
        "facts": escape(", ".join(facts)),
        "pictures": [item for item in items if item["file"]],
        "texts": [item for item in items if not item["file"]],
    }


def _png(pixels: Pixels) -> bytes:
    picture = picture_of(pixels)
    if max(picture.size) < 128:  # viewers blur what they enlarge
        factor = -(-128 // max(picture.size))
        picture = picture.resize((picture.width * factor, picture.height * factor), 0)
    content = io.BytesIO()
    picture.save(content, "PNG", optimize=True)
    return content.getvalue()


def _tex_environment() -> Environment:
    return environment().overlay(
        autoescape=False,
        block_start_string="<%",
        block_end_string="%>",
        variable_start_string="<<",
        variable_end_string=">>",
        comment_start_string="<#",
        comment_end_string="#>",
    )
