"""The errors npeff raises: each names the argument, what was expected, what came, and what to do."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from numbers import Integral, Real


class NpeffError(Exception):
    """Base of every error raised on purpose by npeff."""


class ArgumentError(NpeffError, ValueError):
    """An argument has the wrong value, shape, dtype or device."""


class DataError(NpeffError, ValueError):
    """The examples (or what the model makes of them) cannot be used: empty, unlabelled, non-finite."""


class ModelError(NpeffError, RuntimeError):
    """The model has no per-example Fisher as it stands, or it changed while Fishers were computed."""


class ResumeError(NpeffError, RuntimeError):
    """Unfinished work on disk belongs to another model, other data or other options."""


class StorageError(NpeffError, OSError):
    """A file cannot be read or written; the file itself is left as it was."""


class TruncatedFileError(StorageError):
    """The file ends before its contents do."""


class ForeignFileError(StorageError):
    """The file was not written by npeff, nor in one of the published layouts."""


class NewerFileError(StorageError):
    """The file was written by a newer npeff whose format this one does not know."""


class ExtrasError(StorageError, ArgumentError):
    """A JSON file given to a report is damaged, of another kind, or about other components."""


class WorkerError(NpeffError, RuntimeError):
    """Another process of a distributed run failed, or is no longer there."""


class OutOfMemoryError(NpeffError, MemoryError):
    """A device, or this machine, has too little memory for a batch."""


class Terminated(SystemExit):
    """The system told the process to end (SIGTERM, SIGHUP); what was open has been saved.

    No ``NpeffError``: code that recovers from errors must not go on. Left alone it ends the program with the
    conventional status, 128 and the signal's number.

    Attributes:
        signal: The signal's number.
        reason: What happened.
    """

    def __init__(self, number: int, reason: str) -> None:
        super().__init__(128 + number)
        self.signal, self.reason = number, reason

    def __str__(self) -> str:
        return f"{self.reason}. What is finished is kept on the disk; the same command resumes it"


def check_integer(name: str, value: object, least: int = 1) -> int:
    """Refuse a value that is no integer ≥ ``least``; numpy's integers are integers, booleans are not.

    Returns:
        The value as Python's own integer, which JSON takes.

    Raises:
        ArgumentError: Naming the argument.
    """
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise ArgumentError(f"{name}: expected an integer ≥ {least}, got {value!r}")
    return int(value)


def check_integers(item: object, least: Mapping[str, int]) -> None:
    """Check some attributes of a dataclass, None aside, and make Python's own integers of them, which JSON takes.

    Args:
        item: The dataclass, frozen or not.
        least: The least value of each attribute.

    Raises:
        ArgumentError: Naming the attribute.
    """
    for name, smallest in least.items():
        if (value := getattr(item, name)) is not None:
            object.__setattr__(item, name, check_integer(name, value, smallest))


def check_number(name: str, value: object, *, zero: bool = False) -> None:
    """Refuse a value that is no finite number > 0 (≥ 0 with ``zero``).

    Raises:
        ArgumentError: Naming the argument.
    """
    number = isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    if not number or not (value > 0 or (zero and value == 0)):  # type: ignore[operator]
        raise ArgumentError(f"{name}: expected a finite number {'≥' if zero else '>'} 0, got {value!r}")


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """Refuse a value that is none of the choices.

    Raises:
        ArgumentError: Naming the argument and the choices.
    """
    if value not in choices:
        raise ArgumentError(f"{name}: expected {' or '.join(map(repr, choices))}, got {value!r}")
