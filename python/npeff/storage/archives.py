"""Arrays in numpy's ``.npz`` archives, read as they were written by ``numpy.savez``: stored plainly, never pickled."""

from __future__ import annotations

import io
import math
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
    """The arrays of an archive, in memory, once they are as expected.

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
            arrays = {field.name: _array(archive, field) for field in fields}
    except Exception as error:  # zipfile meets damaged archives with errors of many types
        raise StorageError(f"{path}: damaged: {str(error) or type(error).__name__}") from error
    check_arrays(path, arrays, fields, sizes)
    return arrays


def _array(archive: zipfile.ZipFile, field: Field) -> Array:
    """One array; its bytes are compared with the archive's checksum.

    Raises:
        ValueError: The entry is compressed, or is no array of the types expected.
    """
    about = archive.getinfo(f"{field.name}.npy")
    if about.compress_type != zipfile.ZIP_STORED or about.file_size != about.compress_size:
        raise ValueError(f"array {field.name!r}: expected a plainly stored entry")
    raw = io.BytesIO(archive.read(about))
    version = np.lib.format.read_magic(raw)
    read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}.get(version)
    if read is None:
        raise ValueError(f"array {field.name!r}: expected version 1 or 2 of numpy's format, got {version}")
    shape, by_columns, dtype = read(raw)
    if dtype.str not in field.dtypes or any(size < 0 for size in shape):
        raise ValueError(f"array {field.name!r}: expected the type {' or '.join(field.dtypes)}, got {dtype}")
    content = raw.getbuffer()[raw.tell() :]
    if math.prod(shape) * dtype.itemsize != len(content):
        raise ValueError(f"array {field.name!r}: expected the {len(content):,} bytes of shape {shape}")
    return np.frombuffer(content, dtype).reshape(shape, order="F" if by_columns else "C").copy()
