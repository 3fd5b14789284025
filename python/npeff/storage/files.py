"""Write files that appear whole or not at all: temporary names, fsync, rename, locks; explain a full disk.

Work whose files grow while it is done is told of the system's signals by an error, so that it saves what is open.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import math
import mmap
import os
import re
import signal
import socket
import stat
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import IO, TYPE_CHECKING, Any

from npeff.errors import ArgumentError, NpeffError, StorageError, Terminated

if TYPE_CHECKING:  # the command line imports this module to answer --help at once
    import numpy.typing as npt

_FULL = {errno.ENOSPC, errno.EDQUOT}
_HANDLES = {errno.EMFILE, errno.ENFILE}
FEW_INODES, FEW_BYTES = 16, 1 << 20
"""With fewer inodes free and more bytes, a file system that refuses a write lacks inodes."""
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
    reason, number = error.strerror or str(error), _number(error)
    if number in _FULL:
        what, remedy = _lacking(path.parent, number, reason)
        return StorageError(f"{path}: {what}. {kept} {remedy} and run the same command again.")
    if number in _HANDLES:
        return StorageError(
            f"{path}: too many files are open ({reason}). {kept} Close some, or raise the limit (`ulimit -n`), and run "
            "the same command again."
        )
    if number == errno.EFBIG:
        return StorageError(
            f"{path}: the file may not grow further ({reason}): `ulimit -f`, or the file system's limit. {kept} "
            "Raise the limit, or choose another place."
        )
    if number in _DENIED:
        return StorageError(
            f"{path}: cannot be written ({reason}). {kept} Check its owner and permissions, or choose another place."
        )
    return StorageError(f"{path}: writing failed ({reason}). {kept}")


def _number(error: OSError) -> int | None:
    """Return the system's number of an error; HDF5 gives it in its message alone."""
    if error.errno is not None:
        return error.errno
    found = re.search(r"\berrno = (\d+)", str(error))
    return int(found[1]) if found else None


def _lacking(folder: Path, number: int, reason: str) -> tuple[str, str]:
    """Say what a file system lacks that refused a write, and what to do about it."""
    if number == errno.EDQUOT:
        return f"the disk quota is used up ({reason})", "Free some of your space there, or have the quota raised,"
    while not folder.is_dir() and folder != folder.parent:
        folder = folder.parent
    found = os.statvfs(folder)
    free = found.f_bavail * found.f_frsize
    # What was half made is gone by now: a few inodes may be free again.
    if found.f_files and found.f_favail < FEW_INODES and (free > FEW_BYTES or not found.f_favail):
        left = f"{found.f_favail or 'no'} inodes are left, {free:,} bytes are"
        return f"the file system of {folder} can hold no more files ({reason}; {left})", "Remove some files"
    return f"the disk is full ({reason}; {free:,} bytes free in {folder})", "Free some space"


def path_of(value: object, name: str = "path") -> Path:
    """Check the path of a file that may not exist yet.

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
    """Make sure that a file may be created at ``path``; remove what killed processes left of their attempts.

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
    _remove_leftovers(_target(path))


def refuse_link(path: Path) -> None:
    """Refuse to go on from a file of npeff's own naming that is a symbolic link, a folder or a device.

    The names of such files are known in advance: through a link there, another file would be read or overwritten.

    Raises:
        StorageError: It is one.
    """
    with contextlib.suppress(FileNotFoundError):
        mode = os.lstat(path).st_mode
        if not stat.S_ISREG(mode):
            what = "a symbolic link" if stat.S_ISLNK(mode) else "no file"
            raise StorageError(
                f"{path}: expected a file that npeff wrote, or nothing, but {what} is there; remove it, or choose "
                "another place"
            )


def _target(path: Path) -> Path:
    """Return the file that ``path`` means: where a symbolic link leads, otherwise the path itself."""
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
def atomic(path: Path, *, kept: str = "Nothing else was touched.") -> Iterator[Path]:
    """Write a file aside; rename it to ``path`` once it is whole and on the disk.

    It is written in a new folder beside ``path`` that has a random name and that only this user may enter, so
    that processes which write the same file do not meet, and no link planted there is followed. The last one that ends
    replaces the file. What a killed process leaves of it, :func:`check_target` removes the next time.

    Args:
        path: The final name. What stands there is replaced only at the very end; a symbolic link stays, the
            file it leads to is replaced.
        kept: What to tell the user is safe, should the disk be full.

    Yields:
        The temporary name to write to; it ends as ``path`` does.

    Raises:
        StorageError: The system refused a write; the temporary file is removed.
    """
    target = _target(path)
    folder = handle = None
    try:
        folder, handle = _aside(target)
        scratch = folder / target.name
        yield scratch
        fd = os.open(scratch, os.O_RDONLY | os.O_NOFOLLOW)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
        os.replace(scratch, target)
        sync_folder(target.parent)
    except BaseException as error:
        system = _system_error(error, folder or target)
        if system is not None:
            failure = explain(path, system, kept)  # while the file still takes its space
            raise failure from error
        raise
    finally:
        if folder is not None:
            _discard(folder, target.name)
        if handle is not None:
            os.close(handle)


def _system_error(error: BaseException, folder: Path) -> OSError | None:
    """Find the system's error on writing in ``folder``; zip files hide a full disk behind a ValueError.

    Errors that npeff raised itself, and those about files elsewhere, are none.
    """
    if isinstance(error, NpeffError) or not isinstance(error, Exception):
        return None
    if isinstance(error, OSError):
        elsewhere = isinstance(error.filename, str) and Path(error.filename).parent not in (folder, folder.parent)
        return None if elsewhere else error
    inner = error.__context__
    while inner is not None and not (isinstance(inner, OSError) and inner.errno in _FULL | {errno.EFBIG}):
        inner = inner.__context__
    return inner


def _aside(target: Path) -> tuple[Path, int | None]:
    """Make a folder beside ``target`` to write it in, and claim it; see :func:`claim`."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=f".{target.name[:32]}.", suffix=".tmp", dir=target.parent))
        try:
            return folder, claim(folder)
        except (BlockingIOError, FileNotFoundError):  # another process took it for a leftover
            continue
        except BaseException:
            _discard(folder, target.name)
            raise


def claim(folder: Path) -> int | None:
    """Mark a folder as in use until the process ends, or closes what is returned; every process can tell.

    Args:
        folder: The folder, no symbolic link.

    Returns:
        The open folder; None where the file system has no locks.

    Raises:
        BlockingIOError: Another process uses it.
        FileNotFoundError: It is no longer there.
    """
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not os.path.samestat(os.stat(folder, follow_symlinks=False), os.fstat(fd)):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(folder))
    except (BlockingIOError, FileNotFoundError):
        os.close(fd)
        raise
    except OSError:
        os.close(fd)
        return None
    return fd


def abandoned(folder: Path) -> int | None:
    """Claim a folder that a process left when it was killed; None where one is at work in it, or that is unknown."""
    with contextlib.suppress(OSError):
        return claim(folder)
    return None


def _remove_leftovers(target: Path) -> None:
    """Remove what killed processes left of their attempts to write ``target``; never what a living one writes."""
    pattern = re.compile(re.escape(f".{target.name[:32]}.") + r"[a-z0-9_]{8}\.tmp")
    with contextlib.suppress(OSError):
        for name in os.listdir(target.parent):
            if pattern.fullmatch(name) and (fd := abandoned(target.parent / name)) is not None:
                _discard(target.parent / name, target.name)
                os.close(fd)


def _discard(folder: Path, name: str) -> None:
    """Remove a folder in which a file was written; without opening anything, which may be impossible by now."""
    with contextlib.suppress(OSError):
        if os.path.lexists(folder / name):
            os.unlink(folder / name)
        os.rmdir(folder)


def reserve(file: IO[bytes], size: int) -> None:
    """Take a file's space on the disk now: on a full disk, a later write to its mapping would end the process.

    Args:
        file: An open file.
        size: In bytes.
    """
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file.fileno(), 0, size)
    else:
        file.truncate(size)


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
            StorageError: Another process, or another writer of this one, holds it; or a symbolic link is there.
        """
        self.path = path
        self._key = os.path.realpath(path)
        if self._held.get(self._key) == os.getpid():
            raise StorageError(f"{path}: this process (pid {os.getpid()}) is already {purpose}; finish that first")
        while True:
            refuse_link(path)
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
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
                if os.path.samestat(os.stat(path, follow_symlinks=False), os.fstat(self._fd)):
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


def forget(*arrays: npt.NDArray[Any]) -> None:
    """Release the pages of mapped files: they count as this process's memory until the system wants them back.

    The contents stay on disk, and are read again when they are needed.
    """
    for array in arrays:
        base: Any = array
        while base is not None and not isinstance(base, mmap.mmap):
            base = getattr(base, "base", None)
        if base is not None and hasattr(base, "madvise"):
            with contextlib.suppress(OSError, ValueError):
                base.madvise(mmap.MADV_DONTNEED)


# ---- a system that tells the process to end ------------------------------------------------------------------------

SIGNALS = (signal.SIGTERM, signal.SIGHUP)

TOGETHER = 5.0
"""Seconds within which further signals count as the same: they would interrupt the saving."""


@contextlib.contextmanager
def ending_in_order() -> Iterator[None]:
    """Turn SIGTERM and SIGHUP into an error in the main thread; at the end, restore the handlers of before.

    A signal that the program handles itself, or ignores (``nohup``), is left to it. Where the caller is another thread
    nothing changes: Python handles signals in the main thread alone.

    Raises:
        Terminated: One of the signals came.
    """
    owner, last = os.getpid(), -math.inf

    def end(number: int, frame: FrameType | None) -> None:
        nonlocal last
        if os.getpid() != owner:  # a child that was forked meanwhile ends as it would have
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        elif time.monotonic() - last > TOGETHER:
            last = time.monotonic()
            raise Terminated(number, f"told to end ({signal.Signals(number).name})")

    taken = []
    if threading.current_thread() is threading.main_thread():
        taken = [number for number in SIGNALS if signal.getsignal(number) is signal.SIG_DFL]
    try:
        for number in taken:
            signal.signal(number, end)
        yield
    finally:
        for number in taken:
            signal.signal(number, signal.SIG_DFL)
