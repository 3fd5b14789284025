"""Write the parts of a report: into the page itself, or into a folder beside it that the page loads from.

A page opened from disk may not fetch files, but it may load scripts: every part beside the page is a script that hands
its content to the page, ``npeff("component-17", …)``.

The folder is made anew each time and takes its place together with the page, which names it. So a new page never refers
to an old part, whichever processes write at the same time: the last page put in place is whole, and what earlier ones
referred to is removed after it.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from npeff.errors import StorageError
from npeff.storage.files import abandoned, atomic, check_target, claim, explain

GENERATOR = '<meta name="generator" content="npeff'
"""The beginning of the tag by which a page of npeff is known."""
MARKER = "parts-of-a-npeff-report.txt"
HEADING = "Parts of the report beside this folder; these files are replaced along with it:\n"
INLINE = 1_500_000
"""Component pages that together take no more bytes than this stand in the page of a folder too."""


def check_page(path: Path) -> None:
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


def refuse_foreign(path: Path) -> None:
    """Refuse to replace a page that npeff did not write; an empty file may be replaced.

    Raises:
        StorageError: Such a page is there, or it cannot be read.
    """
    if not path.is_file():
        return
    with _explained(path), path.open(encoding="utf-8", errors="replace") as file:
        head = file.read(4096)
    if head and GENERATOR not in head:
        raise StorageError(
            f"{path}: a file that npeff did not write is there, and the report would replace it; choose another out=, "
            "or delete the file"
        )


def script_json(value: Any) -> str:
    """Write JSON that may stand inside a ``<script>``: no ``<``, ``>``, ``&``, no line separators of JavaScript's."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text.encode("utf-8", "replace").decode("utf-8")


class AssetsFolder:
    """The folder ``data-N`` that holds the parts of one page; for use in a ``with`` block.

    It is made with the first part, and claimed until the page is in place, by which other processes see that the folder
    is in use. Its marker lists every file that npeff wrote there: only these are ever removed.

    Args:
        page: The page (or document) that will refer to it.
        parent: Where the folder is made; this one is made if missing.

    Attributes:
        path: The folder; None until it is made.
    """

    def __init__(self, page: Path, parent: Path) -> None:
        self.page, self.parent = page, parent
        self.path: Path | None = None
        self._claim: int | None = None
        self._around: list[Path] = []

    def __enter__(self) -> AssetsFolder:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        if kind is not None:
            self._discard()

    def make(self) -> None:
        """Make the folder.

        Raises:
            StorageError: It cannot be written.
        """
        self._around = [folder for folder in (self.parent, *self.parent.parents) if not folder.exists()]
        try:
            with _explained(self.page):
                self.path, self._claim = _new_folder(self.parent)
                with (self.path / MARKER).open("x", encoding="utf-8") as marker:
                    marker.write(HEADING)
        except BaseException:
            self._discard()
            raise

    def write(self, name: str, content: bytes) -> str:
        """Write a part, and return its address for the page.

        Raises:
            StorageError: It cannot be written.
        """
        if self.path is None:
            self.make()
        assert self.path is not None
        with _explained(self.page):
            with (self.path / MARKER).open("a", encoding="utf-8") as marker:
                marker.write(f"{name}\n")
            (self.path / name).write_bytes(content)
        return (self.path / name).relative_to(self.page.parent).as_posix()

    def publish(self, text: str) -> None:
        """Put the page in place, whole or not at all; then remove the parts of those that it replaces.

        Raises:
            StorageError: The page cannot be written.
        """
        with _explained(self.page):
            self.page.parent.mkdir(parents=True, exist_ok=True)
        with atomic(self.page) as scratch:
            scratch.write_text(text, encoding="utf-8", errors="replace")
        if self.path is not None:
            self._unclaim()
            for folder in self.parent.glob("data-*"):  # this one, too: another page may be in place by now
                _remove_unused(folder, self.page)

    def _discard(self) -> None:
        """Remove the folder, unless the page is in place already; and those around it that are empty."""
        if self.path is not None:
            self._unclaim()
            _remove_unused(self.path, self.page)
            with contextlib.suppress(OSError):
                self.path.rmdir()  # without a marker, on a full disk
        with contextlib.suppress(OSError):
            for folder in self._around:
                folder.rmdir()

    def _unclaim(self) -> None:
        if self._claim is not None:
            os.close(self._claim)
        self._claim = None


class ReportWriter(AssetsFolder):
    """Writes one report in parts, up to a limit; for use in a ``with`` block.

    Parts are given in the order of their importance: where the limit ends, the last are left out.

    Args:
        page: The HTML file.
        folder: Whether parts may stand beside it.
        limit: Bytes that the report may take.

    Attributes:
        size: Bytes of the parts so far.
        inline: Parts that stand in the page, ``name → JSON``.
        pages: Component pages that stand in the page, in order.
        complete: Whether the page itself holds all its component pages.
        added: How many parts are there, by kind.
        left_out: How many the limit left no room for, by kind.
        absent: Names of those.
    """

    def __init__(self, page: Path, folder: bool, limit: int) -> None:
        super().__init__(page, page.parent)
        self.folder, self.limit = folder, limit
        self.size = 0
        self.inline: dict[str, str] = {}
        self.pages: list[tuple[str, str]] = []
        self.complete = True
        self.added: Counter[str] = Counter()
        self.left_out: Counter[str] = Counter()
        self.absent: set[str] = set()

    @property
    def parts(self) -> str:
        """Name of the folder of parts, as the page addresses it; empty for a single file."""
        return self.path.name if self.path else ""

    def __enter__(self) -> ReportWriter:
        if self.folder:
            self.make()
        return self

    def add(self, name: str, value: Any) -> None:
        """Put a JSON value where the page finds it under ``name`` (``kind-number``), if the limit leaves room."""
        content = script_json(value)
        if not self._room(name, len(content.encode())):
            return
        if self.folder:
            self._write_script(name, content)
        else:
            self.inline[name] = content

    def add_page(self, name: str, html: str) -> None:
        """Put a component's page into the page itself, where all of them fit; else beside it."""
        if not self._room(name, len(html.encode("utf-8", "replace"))):
            return
        self.pages.append((name, html))
        if self.folder and (not self.complete or sum(len(h) for _, h in self.pages) > INLINE):
            self.complete = False
            for waiting, text in self.pages:
                self._write_script(waiting, script_json(text))
            self.pages = []

    def add_picture(self, name: str, content: bytes) -> str | None:
        """Put a picture beside the page; return its address, or None where the limit leaves no room."""
        return self.write(name, content) if self._room(name, len(content)) else None

    def room_inline(self, name: str, size: int, share: float) -> bool:
        """Count what stands in the page's rows, if that share of the limit leaves room."""
        return self.size + size <= share * self.limit and self._room(name, size)

    def full(self, name: str) -> bool:
        """Say whether no more parts of that kind fit; then this one counts as left out."""
        return bool(self.left_out[name.split("-")[0]]) and self._leave_out(name)

    def _leave_out(self, name: str) -> bool:
        self.left_out[name.split("-")[0]] += 1
        self.absent.add(name)
        return True

    def _room(self, name: str, size: int) -> bool:
        if self.size + size > self.limit:
            return not self._leave_out(name)
        self.size += size
        self.added[name.split("-")[0]] += 1
        return True

    def _write_script(self, name: str, content: str) -> None:
        self.write(f"{name}.js", f"npeff({json.dumps(name)},{content});\n".encode())


@contextlib.contextmanager
def _explained(page: Path) -> Iterator[None]:
    """Have errors of the system say what is safe.

    Raises:
        StorageError: The system refused something.
    """
    try:
        yield
    except OSError as error:
        failure = explain(page, error, "An earlier report there is as it was.")
        raise failure from error


def _new_folder(parent: Path) -> tuple[Path, int | None]:
    """Make ``data-N`` and claim it; N is above all there: an open page never takes new parts for its own.

    Raises:
        OSError: The system refuses it.
    """
    number = 0
    while True:
        parent.mkdir(parents=True, exist_ok=True)
        numbers = [int(name[5:]) for name in os.listdir(parent) if re.fullmatch(r"data-\d{1,9}", name)]
        number = max(number, *numbers, 0) + 1
        folder = parent / f"data-{number}"
        try:
            folder.mkdir()
            return folder, claim(folder)
        except (FileExistsError, FileNotFoundError):  # another process was quicker, or removed what was empty
            continue
        except OSError as error:  # a BlockingIOError: another process looks whether the folder is in use
            with contextlib.suppress(OSError):
                folder.rmdir()
            if not isinstance(error, BlockingIOError):
                raise


def _remove_unused(folder: Path, page: Path) -> None:
    """Remove a folder of parts unless its page is being written, or is the one in place.

    An error of the system (no marker, something else in the folder) leaves what is there.
    """
    fd = abandoned(folder)
    if fd is None:
        return
    marker = folder / MARKER
    with contextlib.suppress(OSError):
        # Looked up after the claim is there: a page is put in place before the claim on its folder goes.
        text = page.read_text(encoding="utf-8", errors="replace") if page.exists() else ""
        if not re.search(rf"(?<![\w-]){re.escape(folder.name)}(?![\w-])", text):
            for name in _regular_text(marker).splitlines()[1:]:
                if os.path.basename(name) == name:
                    (folder / name).unlink(missing_ok=True)
            marker.unlink()
            folder.rmdir()
    os.close(fd)


def _regular_text(path: Path) -> str:
    """Read a marker, which must be no symbolic link.

    Raises:
        OSError: It is one, or is not there.
    """
    with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), encoding="utf-8") as file:
        return file.read()
