"""The structure of HDF5 files, checked when it is read.

A dataset is read only where the file itself stores all of it, as plain numbers or a text of fixed length. For whatever
else has a name in a file, the reason why npeff does not read it is kept.
"""

from __future__ import annotations

import contextlib
import math
import mmap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt

from npeff.errors import ForeignFileError, NpeffError, StorageError, TruncatedFileError
from npeff.storage.checks import check_regular

Array = npt.NDArray[Any]

CHUNK_BYTES = 16 << 20
"""Bytes of a dataset that are written or read together."""

MOST_TIMES = 1_100
"""Memory that a file may ask for, as a multiple of what it stores: deflate's best, and a little."""

LEAST_ALLOWED = 16 << 20
"""Bytes of memory that any file may ask for."""

_MOST_OBJECTS = 10_000
_MOST_ELEMENTS = 1_000  # of an attribute
_SIGNATURE = b"\x89HDF\r\n\x1a\n"
_OTHERS = {
    b"PK\x03\x04": "a zip archive (torch.save or numpy .npz)",
    b"\x93NUMPY": "a numpy .npy file",
    b"\x80": "a pickle",
    b"{": "JSON",
}
_HEAP = b"GCOL\x01\0\0\0"  # begins what holds texts of varying length
_FILTERS = {1: "deflate", 2: "shuffle", 3: "fletcher32", 4: "szip", 32000: "lzf"}


def as_bytes(chunk: Array, dtype: np.dtype[Any]) -> Array:
    """Return the elements of ``chunk``, as ``dtype``, as a flat array of bytes; without a copy where possible."""
    return np.ascontiguousarray(chunk, dtype).reshape(-1).view(np.uint8)


@dataclass(frozen=True)
class Spec:
    """The place of a dataset: ``offset`` is None when it is empty, or stored by another program in pieces."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    offset: int | None

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


Structure = tuple[dict[str, Spec], dict[str, Any], dict[str, str]]
"""Datasets by path; attributes of the root by name, of other objects as ``"path@name"``: numbers, texts, or lists of
numbers; and, by the same names, why npeff does not read other datasets, links and attributes."""


class _Refused(Exception):
    """A dataset or attribute is not for npeff; says why."""


@contextlib.contextmanager
def open_hdf5(path: Path) -> Iterator[h5py.File]:
    """Open an HDF5 file for reading, without touching it.

    Args:
        path: The file.

    Yields:
        The open file.

    Raises:
        StorageError: There is no such file, or it may not be read; a neighbouring ``.parts`` folder is pointed out.
        TruncatedFileError: It ends too early, or reading it fails inside the ``with`` block.
        NpeffError: Raised inside the ``with`` block: passed on.
        ForeignFileError: It is not HDF5, or reading it inside the ``with`` block met something unexpected.
    """
    parts = path.parent / f"{path.name}.parts"
    if not path.exists() and parts.is_dir():
        raise StorageError(
            f"{path}: no such file; unfinished work for it is in {parts}: run the command that made it again, it "
            "resumes"
        )
    check_regular(path)
    try:
        file = _open(path)
    except Exception as error:  # the HDF5 library meets a damaged file with errors of many types
        diagnosis = _diagnose(path, error)
        raise diagnosis from error
    with file:
        try:
            yield file
        except NpeffError:
            raise
        except (ValueError, TypeError, AttributeError, IndexError) as error:
            raise ForeignFileError(
                f"{path}: an HDF5 file, but damaged, or not as npeff and the published code write it "
                f"({type(error).__name__}: {error})"
            ) from error
        except Exception as error:
            raise TruncatedFileError(
                f"{path}: the file is damaged, or cut short ({error}); copy it again from where it is whole"
            ) from error


def _open(path: Path) -> h5py.File:
    try:
        return h5py.File(path, "r")
    except OSError as error:
        if "lock" not in str(error):
            raise
        return h5py.File(path, "r", locking=False)  # a file system without locks: finished files are not rewritten


def _diagnose(path: Path, error: Exception) -> StorageError:
    """Say why the HDF5 library could not open ``path``."""
    if "already open" in str(error):
        return StorageError(f"{path}: this process has the file open for writing; close it there first")
    try:
        with open(path, "rb") as file:
            head, size = file.read(len(_SIGNATURE)), path.stat().st_size
    except OSError as refusal:
        return StorageError(f"{path}: cannot be read ({refusal.strerror}); check its permissions")
    if not size or not head.strip(b"\0") or head == _SIGNATURE or _SIGNATURE.startswith(head):
        return TruncatedFileError(
            f"{path}: the file is cut short or damaged ({size:,} bytes; {error}); copy it again from where "
            "it is whole, or compute it again"
        )
    kind = next((name for start, name in _OTHERS.items() if head.startswith(start)), "something else")
    return ForeignFileError(f"{path}: expected an HDF5 file written by npeff or in a published layout, found {kind}")


def structure_of(path: Path, file: h5py.File) -> Structure:
    """List what an open HDF5 file holds, without reading its data or following links out of the file.

    Raises:
        TruncatedFileError: A dataset goes on after the end of the file.
        StorageError: The file has more objects than any that npeff reads.
    """
    specs, attributes, refused = dict[str, Spec](), dict[str, Any](), dict[str, str]()
    size, check_heaps = path.stat().st_size, cache(lambda: _check_heaps(path))
    groups = [("", file.id)]
    seen = {h5py.h5o.get_info(file.id).addr}
    while groups:
        where, group = groups.pop()
        _read_attributes(where, group, attributes, refused, check_heaps)
        for raw in group:
            leaf = raw.decode("utf-8", "replace")
            name = f"{where}/{leaf}" if where else leaf
            if group.links.get_info(raw).type != h5py.h5l.TYPE_HARD:
                refused[name] = "is a link to another place"
                continue
            about = h5py.h5o.get_info(group, raw)
            if about.type == h5py.h5o.TYPE_GROUP and about.addr not in seen:
                seen.add(about.addr)
                groups.append((name, h5py.h5g.open(group, raw)))
            elif about.type == h5py.h5o.TYPE_DATASET:
                dataset = h5py.h5d.open(group, raw)
                try:
                    specs[name] = _spec_of(path, name, dataset, size)
                except _Refused as error:
                    refused[name] = str(error)
                _read_attributes(name, dataset, attributes, refused, check_heaps)
            if len(specs) + len(refused) + len(attributes) + len(seen) > _MOST_OBJECTS:
                raise StorageError(f"{path}: expected at most {_MOST_OBJECTS:,} objects and attributes, found more")
    return specs, attributes, refused


def _spec_of(path: Path, name: str, dataset: Any, size: int) -> Spec:
    """Find where a dataset lies.

    Raises:
        TruncatedFileError: It goes on after the end of the file.
        _Refused: It is not stored in the file, or holds something else than numbers or a text of fixed length.
    """
    properties = dataset.get_create_plist()
    layout = properties.get_layout()
    if layout == h5py.h5d.VIRTUAL or properties.get_external_count():  # before its shape: asking may open other files
        raise _Refused("is stored in other files")
    dtype = _dtype_of(dataset.get_type())
    space = dataset.get_space()
    if space.get_simple_extent_type() == h5py.h5s.NULL:
        raise _Refused("holds nothing")
    spec = Spec(tuple(int(n) for n in space.shape), dtype, None)
    stored, nbytes = int(dataset.get_storage_size()), spec.nbytes
    if not nbytes:
        return spec
    if layout == h5py.h5d.CHUNKED:
        _check_chunks(spec, dataset, properties, stored)
        return spec
    offset = dataset.get_offset() if layout == h5py.h5d.CONTIGUOUS else None
    if stored != nbytes or (layout == h5py.h5d.CONTIGUOUS and offset is None):
        raise _Refused(f"declares {nbytes:,} bytes, of which {stored if stored != nbytes else 0:,} are stored")
    if offset is not None and offset + nbytes > size:
        raise TruncatedFileError(
            f"{path}: the file ends at byte {size:,}, inside dataset {name!r} (up to byte {offset + nbytes:,}); "
            "copy it again from where it is whole, or compute it again"
        )
    return Spec(spec.shape, dtype, offset)


def _dtype_of(kind: Any) -> np.dtype[Any]:
    """Return the type of plain numbers, or of a text of fixed length.

    Raises:
        _Refused: It is another one.
    """
    plain = {h5py.h5t.INTEGER: "iu", h5py.h5t.FLOAT: "f", h5py.h5t.STRING: "S"}.get(kind.get_class())
    if plain is None:
        names = ("REFERENCE", "COMPOUND", "ENUM", "OPAQUE", "VLEN", "ARRAY", "BITFIELD", "TIME")
        found = next((name.lower() for name in names if kind.get_class() == getattr(h5py.h5t, name, None)), "unknown")
        raise _Refused(f"has the type {found}, which npeff never writes")
    try:
        dtype = np.dtype(kind.dtype)
    except (TypeError, ValueError) as error:
        raise _Refused("has a type that numpy does not know, which npeff never writes") from error
    if plain == "S" and not kind.is_variable_str():
        return np.dtype(f"S{kind.get_size()}")
    if dtype.kind not in plain:
        raise _Refused(f"has the type {dtype}, which npeff never writes")
    if dtype.itemsize > 8 or not kind.equal(h5py.h5t.py_create(dtype)):
        raise _Refused(f"has the type {dtype} in an unusual form, which npeff never writes")
    return dtype


def _check_chunks(spec: Spec, dataset: Any, properties: Any, stored: int) -> None:
    """Make sure that a dataset in pieces is stored, and is no larger than its bytes in the file can hold.

    Raises:
        _Refused: It is not.
    """
    filters = [properties.get_filter(i)[0] for i in range(properties.get_nfilters())]
    if not _FILTERS.keys() >= set(filters) or len(set(filters)) != len(filters):
        raise _Refused(f"is compressed by filters that npeff does not read ({', '.join(map(str, filters))})")
    chunk = properties.get_chunk()
    most = max(LEAST_ALLOWED, MOST_TIMES * stored if filters else stored)
    chunk_bytes = math.prod(chunk) * spec.dtype.itemsize
    if spec.nbytes > most or chunk_bytes > max(most, 2 * spec.nbytes):
        raise _Refused(f"declares {max(spec.nbytes, chunk_bytes):,} bytes, and {stored:,} are stored")
    if dataset.get_num_chunks() < math.prod(-(-n // k) for n, k in zip(spec.shape, chunk, strict=True)):
        raise _Refused("is not stored as a whole")


def _read_attributes(
    where: str, item: Any, attributes: dict[str, Any], refused: dict[str, str], check_heaps: Callable[[], None]
) -> None:
    for index in range(min(h5py.h5a.get_num_attrs(item), _MOST_OBJECTS + 1)):
        attribute = h5py.h5a.open(item, index=index)
        leaf, kind = attribute.name.decode("utf-8", "replace"), attribute.get_type()
        name = f"{where}@{leaf}" if where else leaf
        if kind.get_class() == h5py.h5t.STRING and kind.is_variable_str():
            check_heaps()
        try:
            attributes[name] = _attribute_value(attribute)
        except _Refused as error:
            refused[name] = str(error)


def _attribute_value(attribute: Any) -> Any:
    """Read a number, a text or a list of numbers.

    Raises:
        _Refused: It is something else.
    """
    kind, count = attribute.get_type(), math.prod(attribute.shape)
    if attribute.get_space().get_simple_extent_type() == h5py.h5s.NULL or count > _MOST_ELEMENTS:
        raise _Refused("holds neither one value nor a few")
    if kind.get_class() != h5py.h5t.STRING:
        value = np.empty(attribute.shape, _dtype_of(kind))
        attribute.read(value)
        return value.tolist()
    if count != 1:
        raise _Refused("holds several texts")
    text = np.zeros(attribute.shape, kind.dtype)
    attribute.read(text, mtype=h5py.h5t.py_create(kind.dtype))
    found = text.reshape(-1)[0]
    return found.decode(errors="replace") if isinstance(found, bytes) else str(found)


def _check_heaps(path: Path) -> None:
    """Make sure that the HDF5 library can read texts of varying length: in a damaged heap it may search without end.

    Raises:
        TruncatedFileError: A heap is damaged.
    """
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as raw:
        start = raw.find(_HEAP)
        while start >= 0:
            end = start + int.from_bytes(raw[start + 8 : start + 16], "little")
            at, whole = start + 16, end <= len(raw)
            while whole and at + 16 <= end:
                index = int.from_bytes(raw[at : at + 2], "little")
                size = int.from_bytes(raw[at + 8 : at + 16], "little")
                step = size if index == 0 else 16 + (size + 7) // 8 * 8  # 0: what is free, with its own 16 bytes
                whole = step >= 16 and at + step <= end
                at += step
            if not whole:
                raise TruncatedFileError(
                    f"{path}: the file is damaged (its heap of texts, at byte {start:,}); copy it again from where "
                    "it is whole"
                )
            start = raw.find(_HEAP, start + 1)
