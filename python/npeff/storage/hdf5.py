"""Plain HDF5 files with contiguous datasets, written by streaming.

The HDF5 library lays the file out in memory, without the data; npeff then writes that skeleton and the data
itself. So the bytes depend on the contents alone, a full disk is an ordinary error, and arrays larger than
memory stream through.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt

from npeff.errors import ArgumentError, StorageError

Array = npt.NDArray[Any]
Attributes = Mapping[str, Mapping[str, Any]]

CHUNK_BYTES = 16 << 20
_PAGE = 4096
_ALIGN = 64  # bytes: a cache line, the widest vector


LONGEST = 60_000
"""Bytes of an attribute that HDF5 can keep where it stands; longer texts lie elsewhere in the file."""


@dataclass(frozen=True)
class Data:
    """One dataset to write.

    Attributes:
        name: Its path in the file, such as ``"rows/values"``.
        shape: Its shape.
        dtype: Its type in the file.
        chunks: Called once; yields arrays whose elements, end to end in C order, fill the dataset.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    chunks: Callable[[], Iterable[Array]]

    @property
    def nbytes(self) -> int:
        """Size of the dataset in bytes."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize

    @classmethod
    def of(cls, name: str, array: Array, dtype: npt.DTypeLike | None = None) -> Data:
        """The dataset that holds ``array``, of any shape, converted to ``dtype`` piece by piece.

        Raises:
            ArgumentError: The array holds neither numbers, booleans nor fixed-length bytes.
        """
        target = np.dtype(dtype) if dtype is not None else array.dtype
        if target.kind not in "biufcS":
            raise ArgumentError(f"{name}: expected an array of numbers, booleans or bytes, got dtype {target}")
        return cls(name, array.shape, target.newbyteorder("<"), lambda: pieces(array))

    @classmethod
    def text(cls, name: str, text: str) -> Data:
        """A dataset of one UTF-8 string."""
        raw = text.encode() or b" "
        return cls(name, (), h5py.string_dtype("utf-8", len(raw)), lambda: [np.array(raw, f"S{len(raw)}")])

    @classmethod
    def json(cls, name: str, value: object) -> Data:
        """A dataset of one JSON document."""
        return cls.text(name, to_json(value, name))


def to_json(value: object, name: str) -> str:
    """``value`` as canonical JSON (sorted keys).

    Raises:
        ArgumentError: It holds something that JSON cannot.
    """
    try:
        return json.dumps(value, sort_keys=True, ensure_ascii=False)
    except TypeError as error:
        raise ArgumentError(
            f"{name}: expected strings, numbers, lists and dicts with string keys (JSON), got {error}"
        ) from error


def pieces(array: Array) -> Iterator[Array]:
    """``array`` cut along its first axis into views of about 16 MiB."""
    if array.ndim == 0 or array.size == 0:
        yield array
        return
    for rows in row_slices(array.shape, array.dtype.itemsize):
        yield array[rows]


def row_slices(shape: tuple[int, ...], itemsize: int) -> Iterator[slice]:
    """Slices of the first axis that hold about 16 MiB each."""
    step = max(1, CHUNK_BYTES // max(1, math.prod(shape[1:]) * itemsize))
    for start in range(0, shape[0], step):
        yield slice(start, start + step)


class _Sparse:
    """A file object for the HDF5 library that keeps only the pages written: the skeleton of a file."""

    def __init__(self) -> None:
        self.pages: dict[int, bytearray] = {}
        self.size = 0
        self._at = 0

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = offset + (0, self._at, self.size)[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def _spans(self, n: int) -> Iterator[tuple[int, int, int, int]]:
        done = 0
        while done < n:
            page, start = divmod(self._at + done, _PAGE)
            take = min(n - done, _PAGE - start)
            yield page, start, done, take
            done += take

    def write(self, data: Any) -> int:
        raw = bytes(data)
        for page, start, done, take in self._spans(len(raw)):
            self.pages.setdefault(page, bytearray(_PAGE))[start : start + take] = raw[done : done + take]
        self._at += len(raw)
        self.size = max(self.size, self._at)
        return len(raw)

    def readinto(self, buffer: Any) -> int:
        blank = bytearray(_PAGE)
        for page, start, done, take in self._spans(len(buffer)):
            buffer[done : done + take] = self.pages.get(page, blank)[start : start + take]
        self._at += len(buffer)
        return len(buffer)

    def read(self, n: int) -> bytes:
        buffer = bytearray(n)
        self.readinto(buffer)
        return bytes(buffer)

    def truncate(self, size: int | None = None) -> int:
        self.size = self._at if size is None else size
        return self.size

    def flush(self) -> None:
        pass


def _create(file: h5py.File, data: Data) -> int | None:
    """Create the dataset without writing it; its offset in the file, None when it is empty."""
    plist = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    plist.set_layout(h5py.h5d.CONTIGUOUS)
    plist.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    plist.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    plist.set_obj_track_times(False)
    parent, _, leaf = data.name.rpartition("/")
    group = file.require_group(parent) if parent else file
    space = h5py.h5s.create_simple(data.shape) if data.shape else h5py.h5s.create(h5py.h5s.SCALAR)
    dataset = h5py.h5d.create(group.id, leaf.encode(), h5py.h5t.py_create(data.dtype, logical=True), space, dcpl=plist)
    offset = dataset.get_offset()
    return None if offset is None else int(offset)


def _set_attribute(item: Any, name: str, value: Any) -> None:
    raw = value.encode() if isinstance(value, str) else b""
    if isinstance(value, str) and len(raw) < LONGEST:
        item.attrs.create(name, raw, dtype=h5py.string_dtype("utf-8", max(1, len(raw))))
    else:
        item.attrs.create(name, value)


def write_hdf5(path: Path, data: Sequence[Data], attributes: Attributes) -> None:
    """Write a plain HDF5 file with contiguous datasets; the same contents always give the same bytes.

    Args:
        path: Where; an existing file is overwritten (callers write to temporary names, see
            :mod:`npeff.storage.files`).
        data: The datasets, written in this order. A later one may depend on what an earlier one yielded.
        attributes: Attributes per group or dataset; ``"/"`` is the root.

    Raises:
        StorageError: A dataset's chunks do not fill it (a bug, or a file that changed underfoot).
    """
    skeleton = _Sparse()
    with h5py.File(skeleton, "w", alignment_threshold=1, alignment_interval=_ALIGN) as file:
        offsets = [_create(file, item) for item in data]
        for where, values in attributes.items():
            for name, value in values.items():
                _set_attribute(file.require_group(where) if where not in file else file[where], name, value)
    with open(path, "wb") as out:
        out.truncate(skeleton.size)
        for page in sorted(skeleton.pages):
            out.seek(page * _PAGE)
            out.write(skeleton.pages[page][: skeleton.size - page * _PAGE])
        for item, offset in zip(data, offsets, strict=True):
            out.seek(offset or 0)
            written = 0
            for chunk in item.chunks():
                raw = as_bytes(chunk, item.dtype)
                written += len(raw)
                if written > item.nbytes:
                    break
                out.write(raw.data)
            if written != item.nbytes:
                raise StorageError(
                    f"{path}: dataset {item.name} should have {item.nbytes:,} bytes, its source gave {written:,}"
                )


def as_bytes(chunk: Array, dtype: np.dtype[Any]) -> Array:
    """The elements of ``chunk`` as ``dtype``, as a flat array of bytes; without a copy where it can be."""
    return np.ascontiguousarray(chunk, dtype).reshape(-1).view(np.uint8)
