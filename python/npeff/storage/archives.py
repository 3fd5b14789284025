"""Arrays in numpy's ``.npz`` archives, read as they were written by ``numpy.savez``: stored plainly, never pickled."""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from npeff.errors import StorageError
from npeff.storage.documents import check_regular
from npeff.storage.fields import Field, Sizes, check_arrays

Array = npt.NDArray[Any]


def read_npz(path: Path, fields: Sequence[Field], sizes: Sizes) -> dict[str, Array]:
    """Read the arrays of an archive into memory and check them.

    Args:
        path: The file.
        fields: What is expected of the arrays; every field has to be there.
        sizes: Sizes known beforehand; those that the fields decide are added.

    Raises:
        StorageError: There is no such file, it is damaged, or an array is not as expected.
    """
    check_regular(path)
    try:
        with zipfile.ZipFile(path) as archive:
            plain = all(
                entry.compress_type == zipfile.ZIP_STORED and entry.file_size == entry.compress_size
                for entry in archive.infolist()
            )
        with np.load(path, allow_pickle=False) as found:
            arrays = {field.name: np.asarray(found[field.name]) for field in fields if plain}
    except Exception as error:  # numpy and zipfile meet damaged archives with errors of many types
        raise StorageError(f"{path}: damaged: {str(error) or type(error).__name__}") from error
    if not plain:
        raise StorageError(f"{path}: damaged: expected plainly stored arrays, as numpy.savez writes them")
    check_arrays(path, arrays, fields, sizes)
    return arrays
