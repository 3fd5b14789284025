"""Write HDF5 files: contiguous datasets from streams; npeff's containers and records, whole or not at all."""

from __future__ import annotations

import io
import json
import math
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt

from npeff.errors import ArgumentError, StorageError
from npeff.storage.container import FORMAT, FORMAT_VERSION, check_replaceable, package_version
from npeff.storage.files import atomic, explain, reserve
from npeff.storage.hdf5 import CHUNK_BYTES, as_bytes

Array = npt.NDArray[Any]
Attributes = Mapping[str, Mapping[str, Any]]

LONGEST = 60_000
"""Bytes of an attribute that HDF5 keeps beside its object; longer texts lie elsewhere in the file."""

_ALIGN = 64  # bytes: a cache line, the widest vector


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
        return math.prod(self.shape) * self.dtype.itemsize

    @classmethod
    def of(cls, name: str, array: Array, dtype: npt.DTypeLike | None = None) -> Data:
        """Describe the dataset that holds ``array``, of any shape, converted to ``dtype`` piece by piece.

        Raises:
            ArgumentError: The array holds neither numbers, booleans nor fixed-length bytes.
        """
        target = np.dtype(dtype) if dtype is not None else array.dtype
        if target.kind not in "biufcS":
            raise ArgumentError(f"{name}: expected an array of numbers, booleans or bytes, got dtype {target}")
        return cls(name, array.shape, target.newbyteorder("<"), lambda: pieces(array))

    @classmethod
    def text(cls, name: str, text: str) -> Data:
        """Describe a dataset of one UTF-8 string."""
        raw = text.encode() or b" "
        return cls(name, (), h5py.string_dtype("utf-8", len(raw)), lambda: [np.array(raw, f"S{len(raw)}")])

    @classmethod
    def json(cls, name: str, value: object) -> Data:
        """Describe a dataset of one JSON document."""
        return cls.text(name, to_json(value, name))


def to_json(value: object, name: str) -> str:
    """Write ``value`` as canonical JSON (sorted keys).

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
    """Cut ``array`` along its first axis into views of about 16 MiB."""
    if array.ndim == 0 or array.size == 0:
        yield array
        return
    step = max(1, CHUNK_BYTES // max(1, array[:1].nbytes))
    for start in range(0, len(array), step):
        yield array[start : start + step]


class _Output(io.FileIO):
    """A file for the HDF5 library that keeps a refused write to itself, as ``failed``.

    The library cannot close a file to which it could not write; it would leave it open until the process ends.
    """

    failed: OSError | None = None

    def write(self, data: Any) -> int:
        view = memoryview(data)
        try:
            done = 0
            while done < len(view):
                done += super().write(view[done:]) or 0
        except OSError as error:
            self.failed = self.failed or error
        return len(view)

    def truncate(self, size: int | None = None) -> int:
        try:
            return super().truncate(size)
        except OSError as error:
            self.failed = self.failed or error
            return size or 0


def write_hdf5(path: Path, data: Sequence[Data], attributes: Attributes) -> None:
    """Write a plain HDF5 file with contiguous datasets.

    The HDF5 library lays the file out and writes its structure; the data are then written to where it placed them.

    Args:
        path: Where; an existing file is overwritten (callers write to temporary names, see
            :mod:`npeff.storage.files`).
        data: The datasets, written in this order. A later one may depend on what an earlier one yielded.
        attributes: Attributes per group or dataset; ``"/"`` is the root.

    Raises:
        OSError: The system refused a write.
        StorageError: A dataset's chunks do not fill it (a bug, or a source that changed meanwhile).
    """
    with _Output(path, "w+") as out:
        with h5py.File(out, "w", alignment_threshold=1, alignment_interval=_ALIGN) as file:
            offsets = [_create(file, item) for item in data]
            for where, values in attributes.items():
                target = file[where] if where in file else file.require_group(where)
                for name, value in values.items():
                    raw = value.encode() if isinstance(value, str) and len(value.encode()) < LONGEST else None
                    text = None if raw is None else h5py.string_dtype("utf-8", max(1, len(raw)))
                    target.attrs.create(name, value if raw is None else raw, dtype=text)
        for item, offset in zip(data, offsets, strict=True):
            out.seek(offset)
            written = 0
            for chunk in item.chunks():
                raw_chunk = as_bytes(chunk, item.dtype)
                written += len(raw_chunk)
                if written <= item.nbytes:
                    out.write(raw_chunk.data)
                if written > item.nbytes or out.failed is not None:
                    break
            if out.failed is not None:
                raise out.failed
            if written != item.nbytes:
                raise StorageError(
                    f"{path}: dataset {item.name} should have {item.nbytes:,} bytes, its source gave {written:,}"
                )


def _create(file: h5py.File, data: Data) -> int:
    """Create the dataset without writing it; return its offset in the file, 0 where it is empty."""
    plist = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    plist.set_layout(h5py.h5d.CONTIGUOUS)
    plist.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    plist.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    plist.set_obj_track_times(False)
    parent, _, leaf = data.name.rpartition("/")
    group = file.require_group(parent) if parent else file
    space = h5py.h5s.create_simple(data.shape) if data.shape else h5py.h5s.create(h5py.h5s.SCALAR)
    dataset = h5py.h5d.create(group.id, leaf.encode(), h5py.h5t.py_create(data.dtype, logical=True), space, dcpl=plist)
    return int(dataset.get_offset() or 0)


def write_container(
    path: Path,
    content: str,
    data: Sequence[Data],
    attributes: Mapping[str, Any],
    *,
    format_version: int = FORMAT_VERSION,
) -> None:
    """Write an npeff container: ``data``, what it is, and a CRC-32 of every dataset.

    Args:
        path: A temporary name.
        content: ``"fishers"``, ``"components"``, ``"shard"``, …: what a reader has to know.
        data: The datasets.
        attributes: Further root attributes, such as ``kind``.
        format_version: To declare (tests of newer files only).
    """
    sums = {item.name: 0 for item in data}

    def summed(item: Data) -> Data:
        def chunks() -> Iterator[Array]:
            for chunk in item.chunks():
                raw = as_bytes(chunk, item.dtype)
                sums[item.name] = zlib.crc32(raw.data, sums[item.name])
                yield raw.view(item.dtype) if raw.size else chunk

        return Data(item.name, item.shape, item.dtype, chunks)

    def text() -> bytes:
        return json.dumps({name: f"{value:08x}" for name, value in sums.items()}).encode()

    length = len(text())
    sums_data = Data("checksums", (), h5py.string_dtype("utf-8", length), lambda: [np.array(text(), f"S{length}")])
    root = {
        "format": FORMAT,
        "format_version": np.int64(format_version),
        "content": content,
        "written_by": f"npeff {package_version()}",
    }
    write_hdf5(path, [*map(summed, data), sums_data], {"/": {**root, **attributes}})


def write_record(
    path: Path | str,
    content: str,
    arrays: Mapping[str, Array | Data],
    meta: Mapping[str, Any],
    *,
    kept: str = "Nothing else was touched.",
) -> Path:
    """Write arrays and what they mean to an HDF5 file that appears whole or not at all.

    Args:
        path: Where; replaced only if a record of the same content is there.
        content: What it holds, such as ``"rollback"``.
        arrays: By name; numbers or booleans of any shape, or streams of them (:class:`npeff.storage.writing.Data`).
        meta: Everything else, JSON-able.
        kept: What is safe, should the disk be full.

    Returns:
        ``path``.

    Raises:
        ArgumentError: ``path`` is no path, or ``meta`` is not JSON.
        StorageError: The file cannot be written there; what was there is untouched.
    """
    path = check_replaceable(path, content)
    data = [Data.json("meta", dict(meta))]
    data += [array if isinstance(array, Data) else Data.of(name, np.asarray(array)) for name, array in arrays.items()]
    with atomic(path, kept=kept) as scratch:
        write_container(scratch, content, data, {})
    return path


def scratch_array(beside: Path, shape: tuple[int, ...], dtype: npt.DTypeLike, kept: str) -> Array:
    """Make an array of zeros in a temporary file that vanishes with the array.

    Args:
        beside: The file that the array is for; the temporary file lies in the same folder, and has no name.
        shape: Of the array.
        dtype: Of the array.
        kept: A sentence about what is safe, should the disk be full; see :func:`npeff.storage.files.explain`.

    Raises:
        StorageError: The disk does not hold the array.
    """
    if 0 in shape:
        return np.zeros(shape, dtype)
    try:
        with tempfile.TemporaryFile(dir=beside.resolve().parent) as file:
            reserve(file, np.dtype(dtype).itemsize * math.prod(shape))
            return np.memmap(file, dtype, "r+", shape=shape)
    except OSError as error:
        failure = explain(beside, error, kept)
        raise failure from error
