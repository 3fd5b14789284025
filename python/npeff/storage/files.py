"""Files that appear whole or not at all: temporary names, fsync, rename, locks; what a full disk means."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

from npeff.errors import ArgumentError, StorageError

_FULL = {errno.ENOSPC, errno.EDQUOT}
_DENIED = {errno.EACCES, errno.EPERM, errno.EROFS}


def explain(path: Path, error: OSError, kept: str) -> StorageError:
    """Turn an operating-system error into one that says what happened, what is safe and what to do.

    Args:
        path: The file that was being written.
        error: What the system said.
        kept: A sentence about what is safe, e.g. ``"12 finished shards are safe."``.

    Returns:
        The error to raise, ``from`` the original.
    """
    reason = error.strerror or str(error)
    if error.errno in _FULL:
        with contextlib.suppress(OSError):
            reason += f"; {shutil.disk_usage(path.parent).free:,} bytes free in {path.parent}"
        return StorageError(
            f"{path}: the disk is full ({reason}). {kept} Free some space and run the same command again."
        )
    if error.errno == errno.EFBIG:
        return StorageError(
            f"{path}: the file may not grow further ({reason}): `ulimit -f`, or the file system's limit. {kept} "
            "Raise the limit, or choose another place."
        )
    if error.errno in _DENIED:
        return StorageError(
            f"{path}: cannot be written ({reason}). {kept} Check its owner and permissions, or choose another place."
        )
    return StorageError(f"{path}: writing failed ({reason}). {kept}")


def path_of(value: object, name: str = "path") -> Path:
    """A path that someone gave, of a file that may not exist yet.

    Args:
        value: A string or a path.
        name: Of the argument, for messages.

    Raises:
        ArgumentError: It is no path.
        StorageError: The system cannot look it up: its name is too long, or a folder on the way is closed.
    """
    if not isinstance(value, str | os.PathLike):
        raise ArgumentError(f"{name}: expected a path, got {value!r}")
    try:
        path = Path(value)
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return path
    except (TypeError, ValueError) as error:
        raise ArgumentError(f"{name}: expected a path, got {value!r} ({error})") from error
    except OSError as error:
        raise StorageError(f"{path}: {error.strerror or error}; check the path") from error
    return path


def check_target(path: Path) -> None:
    """Make sure that a file may be created at ``path``.

    Raises:
        StorageError: Its folder does not exist or may not be written to, or something that is no file stands in
            its place.
    """
    if path.is_dir():
        raise StorageError(f"{path}: expected the name of a file, but a folder is there; give a file name inside it")
    if path.exists() and not path.is_file():
        raise StorageError(f"{path}: expected the name of a file, but a device or pipe is there; give another name")
    folder = _target(path).parent
    if not folder.is_dir():
        raise StorageError(f"{path}: the folder {folder} does not exist; create it, or check the path")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise StorageError(f"{path}: cannot be written; check the permissions of {folder}, or choose another place")


def _target(path: Path) -> Path:
    """The file that ``path`` means: where a symbolic link leads, itself otherwise."""
    return Path(os.path.realpath(path)) if path.is_symlink() else path


def sync_folder(folder: Path) -> None:
    """Make the names in ``folder`` durable, where the file system can."""
    with contextlib.suppress(OSError):
        fd = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


@contextlib.contextmanager
def atomic(path: Path, *, temporary: Path | None = None, kept: str = "Nothing else was touched.") -> Iterator[Path]:
    """Write a file under a temporary name; rename it to ``path`` once it is whole and on the disk.

    Args:
        path: The final name. What stands there is replaced only at the very end; a symbolic link stays, the
            file it leads to is replaced (but for a ``temporary`` in another file system than that file).
        temporary: Where to write first, in the same file system; by default beside ``path``,
            with a dot before its name and the process id behind it.
        kept: What to tell the user is safe, should the disk be full.

    Yields:
        The temporary name to write to.

    Raises:
        StorageError: The system refused a write; the temporary file is removed.
    """
    target = _target(path)
    if temporary and not _same_device(temporary.parent, target.parent):
        target = path
    scratch = temporary or target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        yield scratch
        fd = os.open(scratch, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
        os.replace(scratch, target)
        sync_folder(target.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.unlink(scratch)
        if isinstance(error, OSError) and not isinstance(error, StorageError):
            failure = explain(path, error, kept)
            raise failure from error
        raise


def _same_device(a: Path, b: Path) -> bool:
    return a.is_dir() and b.is_dir() and a.stat().st_dev == b.stat().st_dev


class Lock:
    """A lock file that one process at a time may hold; the system drops it when that process dies.

    A POSIX record lock: data-loader workers forked meanwhile do not inherit it. Where the file system
    has no locks the file is a note only.
    """

    _held: dict[str, int] = {}  # noqa: RUF012 - record locks do not exclude the same process: this does

    def __init__(self, path: Path, purpose: str) -> None:
        """Take the lock.

        Args:
            path: The lock file; its folder exists.
            purpose: What the holder is doing, for the message, e.g. ``"writing fishers.h5"``.

        Raises:
            StorageError: Another process, or another writer of this one, holds it.
        """
        import fcntl

        self.path = path
        self._key = os.path.realpath(path)
        if self._held.get(self._key) == os.getpid():
            raise StorageError(f"{path}: this process (pid {os.getpid()}) is already {purpose}; finish that first")
        while True:
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                fcntl.lockf(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno in (errno.EACCES, errno.EAGAIN):
                    holder = os.read(self._fd, 200).decode(errors="replace").strip() or "unknown pid"
                    os.close(self._fd)
                    raise StorageError(
                        f"{path}: another process ({holder}) is already {purpose}; wait for it, end it, or "
                        "choose another output"
                    ) from error
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.stat(path), os.fstat(self._fd)):
                    break
            os.close(self._fd)  # the holder removed the file between our open and our lock: take the new one
        os.ftruncate(self._fd, 0)
        with contextlib.suppress(OSError):  # a note for others; a full disk is told when there is work to write
            os.write(self._fd, f"pid {os.getpid()} on {socket.gethostname()}\n".encode())
        self._held[self._key] = os.getpid()

    def release(self, *, folder: bool = False) -> None:
        """Remove the lock file, with ``folder`` its (then empty) folder too, and let go."""
        if self._held.pop(self._key, None) is None:
            return
        with contextlib.suppress(OSError):
            os.unlink(self.path)
        if folder:
            with contextlib.suppress(OSError):  # not empty: another process has come, or the user keeps something there
                os.rmdir(self.path.parent)
        os.close(self._fd)
