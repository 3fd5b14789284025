"""The errors npeff raises: each names the argument, what was expected, what came, and what to do."""

from __future__ import annotations


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
