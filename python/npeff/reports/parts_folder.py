"""The folder beside a page that holds what the page refers to: made anew each time, swapped in with the page.

The page names its folder. So a new page never refers to an old part, whoever writes at the same time: the last page put
in place is whole, and what earlier ones referred to is removed after it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TextIO, TypeVar

from npeff.storage.files import atomic, explain

MARKER = "parts-of-a-npeff-report.txt"
HEADING = "Parts of the report beside this folder; these files are replaced along with it:\n"

T = TypeVar("T")


class PartsFolder:
    """A new folder ``data-N`` for the parts of one page.

    Its marker lists every file that npeff wrote there: only these are ever removed. The marker is locked until the page
    is in place, by which other processes see that the folder is in use.

    Args:
        page: The page (or document) that will refer to it.
        parent: Where the folder is made; this one is made if missing.

    Raises:
        StorageError: It cannot be written.
    """

    def __init__(self, page: Path, parent: Path) -> None:
        self.page = page
        self._made = [folder for folder in (parent, *parent.parents) if not folder.exists()]
        try:
            self.path, self._marker = self.guarded(lambda: _new_folder(parent))
        except BaseException:
            self._remove_made()
            raise
        try:
            self.guarded(lambda: self._marker.write(HEADING))
        except BaseException:
            self.discard()
            raise

    def _remove_made(self) -> None:
        """Remove the folders around it that were made for it, unless something else is in them."""
        with contextlib.suppress(OSError):
            for folder in self._made:
                folder.rmdir()

    def write(self, name: str, content: bytes) -> None:
        """Write a part.

        Raises:
            StorageError: It cannot be written.
        """
        self.guarded(lambda: self._marker.write(f"{name}\n"))
        self.guarded(lambda: (self.path / name).write_bytes(content))

    def publish(self, text: str) -> None:
        """Put the page in place, whole or not at all; then remove the parts of those that it replaces.

        Raises:
            StorageError: The page cannot be written.
        """
        with atomic(self.page) as scratch:
            scratch.write_text(text, encoding="utf-8", errors="replace")
        self._marker.close()
        for folder in self.path.parent.glob("data-*"):  # this one, too: another page may be in place by now
            _remove_unused(folder, self.page)

    def discard(self) -> None:
        """Remove the folder, unless the page is in place already: it will not come."""
        with contextlib.suppress(OSError, ValueError):
            self._marker.close()
        _remove_unused(self.path, self.page)
        self._remove_made()

    def guarded(self, action: Callable[[], T]) -> T:
        """Do something; errors of the system say what is safe.

        Raises:
            StorageError: The system refused it.
        """
        try:
            return action()
        except OSError as error:
            failure = explain(self.page, error, "An earlier report there is as it was.")
            raise failure from error


def _new_folder(parent: Path) -> tuple[Path, TextIO]:
    """``data-N`` and its open marker; N is above all there, so that no page on a screen takes new parts for its own.

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
            marker = (folder / MARKER).open("x", encoding="utf-8", buffering=1)
        except (FileExistsError, FileNotFoundError):  # another process was quicker, or removed what was empty
            continue
        except OSError:
            with contextlib.suppress(OSError):
                folder.rmdir()
            raise
        if _locked(marker.fileno()) and os.path.samestat(os.stat(folder / MARKER), os.fstat(marker.fileno())):
            return folder, marker
        marker.close()  # another process took the folder for one that nobody uses, and removes it


def _locked(fd: int) -> bool:
    """Lock a marker; False where another process has it. Without locks no folder of parts is ever removed."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True


def _remove_unused(folder: Path, page: Path) -> None:
    """Remove a folder of parts unless its page is being written, or is the one in place."""
    with contextlib.suppress(OSError), _claimed(folder / MARKER):
        # Looked up after the lock is there: a page is put in place before its folder's lock goes.
        text = page.read_text(encoding="utf-8", errors="replace") if page.exists() else ""
        if not re.search(rf"(?<![\w-]){re.escape(folder.name)}(?![\w-])", text):
            _remove(folder)


@contextlib.contextmanager
def _claimed(marker: Path) -> Iterator[None]:
    """Hold the lock of a folder of parts; an OSError where there is none, or a living process has it."""
    fd = os.open(marker, os.O_RDWR | os.O_NOFOLLOW)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(fd)


def _remove(folder: Path) -> None:
    """Remove what the marker lists, the marker, and the folder if nothing else is in it."""
    marker = folder / MARKER
    for name in marker.read_text(encoding="utf-8").splitlines()[1:]:
        if os.path.basename(name) == name:
            (folder / name).unlink(missing_ok=True)
    marker.unlink()
    folder.rmdir()
