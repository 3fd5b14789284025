"""Arrays of any stage in npeff's container, and what they mean as JSON: written whole or not at all, then mapped."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from npeff.errors import ForeignFileError
from npeff.storage.container import open_container, write_container
from npeff.storage.fields import Field, Sizes
from npeff.storage.files import atomic, path_of
from npeff.storage.hdf5 import Data
from npeff.storage.recognition import check_replaceable

Array = npt.NDArray[Any]


def check_record_target(path: Path | str, content: str) -> Path:
    """Make sure that a record may be written at ``path``: worth knowing before it is computed.

    Args:
        path: Where.
        content: What the record holds, such as ``"rollback"``; only a file of the same content is replaced.

    Returns:
        The path.

    Raises:
        ArgumentError: ``path`` is no path.
        StorageError: Something else is there, or the folder is missing.
    """
    path = path_of(path)
    check_replaceable(path, lambda found: found.is_npeff and found.content == content, f"a {content} record of npeff")
    return path


def write_record(path: Path | str, content: str, arrays: Mapping[str, Array | Data], meta: Mapping[str, Any]) -> Path:
    """Write arrays and what they mean to an HDF5 file that appears whole or not at all.

    Args:
        path: Where; replaced only if a record of the same content is there.
        content: What it holds, such as ``"rollback"``.
        arrays: By name; numbers or booleans of any shape, or streams of them (:class:`npeff.storage.hdf5.Data`).
        meta: Everything else, JSON-able.

    Returns:
        ``path``.

    Raises:
        ArgumentError: ``path`` is no path, or ``meta`` is not JSON.
        StorageError: The file cannot be written there; what was there is untouched.
    """
    path = check_record_target(path, content)
    data = [Data.json("meta", dict(meta))]
    data += [array if isinstance(array, Data) else Data.of(name, np.asarray(array)) for name, array in arrays.items()]
    with atomic(path) as scratch:
        write_container(scratch, content, data, {})
    return path


def read_record(
    path: Path | str,
    content: str,
    describe: Callable[[dict[str, Any], str], tuple[Sequence[Field], Sizes]],
    *,
    verify: bool = False,
) -> tuple[dict[str, Array], dict[str, Any]]:
    """Open a record: its arrays, mapped read-only, and its meta data.

    Args:
        path: The file.
        content: What it must hold.
        describe: From the meta data and the words for it in messages: what is expected of the arrays, and the sizes
            that the meta data tell. Raises ``StorageError`` where those are not as expected.
        verify: Read and check arrays larger than 256 MiB too.

    Raises:
        ArgumentError: ``path`` is no path.
        StorageError: There is no such file, or it is damaged.
        TruncatedFileError: It ends before its contents do.
        ForeignFileError: It holds something else.
        NewerFileError: Its format is newer than this npeff knows.
    """
    path = path_of(path)
    found = open_container(path)
    if found.content != content:
        raise ForeignFileError(
            f"{path}: expected a {content} record, found an npeff file with content {found.content!r}"
        )
    meta = found.json("meta", dict)
    fields, sizes = describe(meta, f"{path}: dataset 'meta'")
    arrays, _ = found.read(fields, sizes, verify=verify)
    return arrays, meta
