"""Opening HDF5 files, with a diagnosis where that fails."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py

from npeff.errors import ForeignFileError, NpeffError, StorageError, TruncatedFileError

_SIGNATURE = b"\x89HDF\r\n\x1a\n"
_OTHERS = {
    b"PK\x03\x04": "a zip archive (torch.save or numpy .npz)",
    b"\x93NUMPY": "a numpy .npy file",
    b"\x80": "a pickle",
    b"{": "JSON",
}


def check_readable(path: Path) -> None:
    """Make sure that ``path`` is a file.

    Raises:
        StorageError: Nothing is there, or a folder; a neighbouring ``.parts`` folder is pointed out.
    """
    if path.is_dir():
        raise StorageError(f"{path}: expected a file, but this is a folder; give the file inside it")
    if not path.exists():
        parts = path.with_name(path.name + ".parts")
        hint = (
            f"; unfinished work for it is in {parts}: run the command that made it again, it resumes"
            if parts.is_dir()
            else ""
        )
        raise StorageError(f"{path}: no such file{hint or '; check the path'}")


def _diagnose(path: Path, error: OSError) -> StorageError:
    """Say why the HDF5 library could not open ``path``."""
    if "already open" in str(error):
        return StorageError(f"{path}: this process has the file open for writing; close it there first")
    with open(path, "rb") as file:
        head = file.read(len(_SIGNATURE))
    size = path.stat().st_size
    if not size or not head.strip(b"\0") or head == _SIGNATURE or _SIGNATURE.startswith(head):
        return TruncatedFileError(
            f"{path}: the file is cut short or damaged ({size:,} bytes; {error}); copy it again from where "
            "it is whole, or compute it again"
        )
    kind = next((name for start, name in _OTHERS.items() if head.startswith(start)), "something else")
    return ForeignFileError(f"{path}: expected an HDF5 file written by npeff or in a published layout, found {kind}")


def _open(path: Path) -> h5py.File:
    try:
        return h5py.File(path, "r")
    except OSError as error:
        if "lock" not in str(error):
            raise
        return h5py.File(path, "r", locking=False)  # a file system without locks: nobody rewrites finished files anyway


@contextlib.contextmanager
def open_hdf5(path: Path) -> Iterator[h5py.File]:
    """Open an HDF5 file for reading, without touching it.

    Args:
        path: The file.

    Yields:
        The open file.

    Raises:
        StorageError: There is no such file, or it may not be read.
        TruncatedFileError: It ends too early, or reading it fails inside the ``with`` block.
        NpeffError: Raised inside the ``with`` block: passed on.
        ForeignFileError: It is not HDF5, or reading it inside the ``with`` block met what nobody expects there.
    """
    check_readable(path)
    try:
        with open(path, "rb"):
            pass
    except OSError as error:
        raise StorageError(f"{path}: cannot be read ({error.strerror}); check its permissions") from error
    try:
        file = _open(path)
    except OSError as error:
        diagnosis = _diagnose(path, error)
        raise diagnosis from error
    with file:
        try:
            yield file
        except NpeffError:
            raise
        except (OSError, RuntimeError, KeyError) as error:
            raise TruncatedFileError(
                f"{path}: the file is damaged, or cut short ({error}); copy it again from where it is whole"
            ) from error
        except (ValueError, TypeError, AttributeError, IndexError) as error:
            raise ForeignFileError(
                f"{path}: an HDF5 file, but damaged, or not as npeff and the published code write it "
                f"({type(error).__name__}: {error})"
            ) from error


def text_of(value: Any) -> str:
    """A string attribute or dataset value, however HDF5 returned it."""
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)
