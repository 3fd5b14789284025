"""Where the parts of a report go: into the page itself, or into files beside it that the page loads when it needs them.

A page opened from disk may not fetch files, but it may load scripts: every part beside the page is a script that hands
its content to the page, ``npeff("component-17", …)``.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from npeff.reports.parts_folder import MARKER, PartsFolder
from npeff.storage.files import atomic, explain

__all__ = ["MARKER", "Book", "script_json"]

INLINE = 1_500_000
"""Component pages that together take no more bytes than this stand in the page of a folder too."""


def script_json(value: Any) -> str:
    """JSON that may stand inside a ``<script>``: no ``<``, ``>``, ``&`` and no line separators of JavaScript's."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text.encode("utf-8", "replace").decode("utf-8")


@dataclass
class Book:
    """The parts of one report.

    Attributes:
        page: The HTML file.
        folder: Whether parts may stand beside it.
        limit: Bytes that the report may take.
        size: Bytes of the parts so far.
        inline: Parts that stand in the page, ``name → JSON``.
        html: Component pages that stand in the page, in order.
        left_out: Parts that the limit left no room for, by kind.
        added: Parts that are there, by kind.
        absent: Names of those that were left out.
    """

    page: Path
    folder: bool
    limit: int
    size: int = 0
    inline: dict[str, str] = field(default_factory=dict)
    html: list[str] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)
    added: Counter[str] = field(default_factory=Counter)
    absent: set[str] = field(default_factory=set)
    _waiting: list[tuple[str, str]] = field(default_factory=list)
    _overflowed: bool = False
    _parts: PartsFolder | None = None

    @property
    def parts(self) -> str:
        """Name of the folder of parts, as the page addresses it; empty for a single file."""
        return self._parts.path.name if self._parts else ""

    def __enter__(self) -> Book:
        if self.folder:
            self._parts = PartsFolder(self.page, self.page.parent)
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if kind is not None and self._parts is not None:
            self._parts.discard()

    # ---- parts ---------------------------------------------------------------------------------------------

    def add(self, name: str, value: Any) -> bool:
        """Put a JSON value where the page finds it under ``name`` (``kind-number``), if the limit leaves room."""
        content = script_json(value)
        if not self._room(name, len(content.encode())):
            return False
        if self._parts is None:
            self.inline[name] = content
        else:
            self._write(f"{name}.js", f"npeff({json.dumps(name)},{content});\n".encode())
        return True

    def add_html(self, name: str, html: str) -> bool:
        """Put a component's page into the page itself, where all of them fit; else beside it."""
        size = len(html.encode("utf-8", "replace"))
        if not self._room(name, size):
            return False
        if self._parts is None:
            self.html.append(html)
        else:
            self._waiting.append((name, html))
            if self._overflowed or sum(len(h) for _, h in self._waiting) > INLINE:
                self._overflowed = True
                for waiting, text in self._waiting:
                    self._write(f"{waiting}.js", f"npeff({json.dumps(waiting)},{script_json(text)});\n".encode())
                self._waiting = []
        return True

    def close_html(self) -> None:
        """No component page comes any more."""
        self.html += [html for _, html in self._waiting]
        self._waiting = []

    @property
    def complete(self) -> bool:
        """Whether the page itself holds all its component pages."""
        return not self._overflowed

    def add_file(self, name: str, content: bytes) -> str | None:
        """Put a file beside the page.

        Returns:
            Its address for the page; None where there is no folder, or the limit leaves no room.
        """
        if self._parts is None or not self._room(name, len(content)):
            return None
        self._write(name, content)
        return f"{self._parts.path.name}/{name}"

    def add_bytes(self, name: str, size: int, share: float = 1.0) -> bool:
        """Count what stands in the page anyhow, if the limit, or that share of it, leaves room."""
        return self.size + size <= share * self.limit and self._room(name, size)

    def full(self, name: str) -> bool:
        """Whether no more parts of that kind fit; then this one counts as left out."""
        kind = name.split("-")[0]
        if self.left_out[kind]:
            self.left_out[kind] += 1
            self.absent.add(name)
            return True
        return False

    def _room(self, name: str, size: int) -> bool:
        kind = name.split("-")[0]
        if self.size + size > self.limit:
            self.left_out[kind] += 1
            self.absent.add(name)
            return False
        self.size += size
        self.added[kind] += 1
        return True

    def _write(self, name: str, content: bytes) -> None:
        assert self._parts is not None
        self._parts.write(name, content)

    # ---- the page ------------------------------------------------------------------------------------------

    def finish(self, html: str) -> None:
        """Write the page, whole or not at all; then remove the parts of the one that it replaces.

        Raises:
            StorageError: The page cannot be written.
        """
        if self._parts is not None:
            self._parts.publish(html)
            return
        try:
            self.page.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            failure = explain(self.page, error, "An earlier report there is as it was.")
            raise failure from error
        with atomic(self.page) as scratch:
            scratch.write_text(html, encoding="utf-8", errors="replace")
