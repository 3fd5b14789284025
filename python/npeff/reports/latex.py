r"""A LaTeX document of top examples, one section per component, with its pictures beside it."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from npeff.errors import ArgumentError
from npeff.reports.parts_folder import PartsFolder
from npeff.storage.files import atomic, path_of

if TYPE_CHECKING:
    from npeff.components.components import Components
    from npeff.reports.picked import Picked
    from npeff.reports.summary import Summary, Top

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
    import numpy as np

    from npeff.reports import checks
    from npeff.reports.picked import pick

    checks.check_components(components)
    checks.check_options(data, k, tokenizer)
    path = path_of(path)
    if path.suffix.lower() != ".tex":
        raise ArgumentError(f"path: expected a name ending in .tex, got {path}")
    checks.check_page(path)
    if chosen is None:
        sizes = components.coefficients.sum(0, dtype=np.float64)
        chosen = np.argsort(-sizes, kind="stable").tolist()
    images = _Images(path)
    with images, pick(components, data, chosen, k, class_names, tokenizer) as picked:
        sections = [_section(picked, picked.summaries[j], images) for j in chosen]
        text = _environment().get_template("document.tex.j2").render(
            title=escape(title or "What the network responds to"),
            n_components=components.n_components,
            n_examples=len(components.coefficients),
            loss=f"{components.loss:.4f}",
            sections=sections,
            width=PICTURE_WIDTH,
        )  # fmt: skip
        images.publish(text)
    return path


class _Images:
    """The pictures of a document, in a folder that is made with the first of them."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._parts: PartsFolder | None = None

    def __enter__(self) -> _Images:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if kind is not None and self._parts is not None:
            self._parts.discard()

    def add(self, name: str, content: bytes) -> str:
        """Write a picture; returns its address for the document."""
        if self._parts is None:
            self._parts = PartsFolder(self._path, self._path.with_name(f"{self._path.stem}-images"))
        self._parts.write(name, content)
        return self._parts.path.relative_to(self._path.parent).joinpath(name).as_posix()

    def publish(self, text: str) -> None:
        """Write the document, and remove the pictures of the one that it replaces."""
        if self._parts is not None:
            self._parts.publish(text)
            return
        with atomic(self._path) as scratch:
            scratch.write_text(text, encoding="utf-8", errors="replace")


def escape(text: str) -> str:
    r"""Text that stands for itself in LaTeX.

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


def _section(picked: Picked, summary: Summary, images: _Images) -> dict[str, Any]:
    from npeff.reports.study import heading
    from npeff.reports.wording import percent

    facts = [f"{percent(summary.share)} of all coefficients", f"{summary.n_active} active examples"]
    if summary.purity is not None:
        facts.append(f"{percent(summary.purity)} pure")
    if summary.accuracy is not None:
        facts.append(f"{percent(summary.accuracy)} right")
    items = [_item(picked, summary, top, rank, images) for rank, top in enumerate(summary.top)]
    return {
        "j": summary.j,
        "heading": escape(heading(summary, picked.names)),
        "facts": escape(", ".join(facts)),
        "pictures": [item for item in items if item["file"]],
        "texts": [item for item in items if not item["file"]],
    }


def _item(picked: Picked, summary: Summary, top: Top, rank: int, images: _Images) -> dict[str, Any]:
    from npeff.reports.collage import _pixels
    from npeff.reports.images import picture_of
    from npeff.reports.text import excerpt, printable
    from npeff.reports.wording import coefficient

    names, example = picked.names, picked.gallery.kept.get(top.position)
    known = names[top.label] if top.label >= 0 else names[top.prediction] if top.prediction >= 0 else ""
    verdict = f"{names[top.label]} → {names[top.prediction]}" if top.wrong else known
    item = {
        "file": "",
        "verdict": escape(verdict),
        "wrong": top.wrong,
        "coefficient": coefficient(top.coefficient),
        "position": top.position,
        "text": "",
    }
    pixels = _pixels(picked.gallery, example)
    if pixels is not None:
        name = f"component-{summary.j}-{rank}.png"
        picture = picture_of(pixels)
        if max(picture.size) < 128:  # viewers blur what they enlarge
            factor = -(-128 // max(picture.size))
            picture = picture.resize((picture.width * factor, picture.height * factor), 0)
        content = io.BytesIO()
        picture.save(content, "PNG", optimize=True)
        item["file"] = images.add(name, content.getvalue())
    elif example is not None and example.text is not None:
        start, rest = excerpt(printable(example.text), TEXT_LENGTH)
        item["text"] = escape(start + (" …" if rest else ""))
    return item


def _environment() -> Any:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    from npeff.reports.assets import TEMPLATES

    return Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=False,
        undefined=StrictUndefined,
        block_start_string="<%",
        block_end_string="%>",
        variable_start_string="<<",
        variable_end_string=">>",
        comment_start_string="<#",
        comment_end_string="#>",
        trim_blocks=True,
        lstrip_blocks=True,
    )
