"""The npeff container: an HDF5 file that says what it is, and whose arrays are mapped rather than read."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property, lru_cache
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt

from npeff.errors import ForeignFileError, NewerFileError, StorageError, TruncatedFileError
from npeff.storage.documents import MOST_BYTES, expect, parse_json
from npeff.storage.fields import Field, Sizes, check_shapes, checked_pieces, refuse
from npeff.storage.files import forget
from npeff.storage.hdf5 import CHUNK_BYTES, Data, as_bytes, write_hdf5
from npeff.storage.opening import Spec, open_hdf5, structure_of

Array = npt.NDArray[Any]

FORMAT = "npeff"
FORMAT_VERSION = 1


@lru_cache
def package_version() -> str:
    """The installed version of npeff."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("npeff")
    except PackageNotFoundError:
        return "unknown"


def write_container(
    path: Path,
    content: str,
    data: Sequence[Data],
    attributes: Mapping[str, Any],
    *,
    version: int = FORMAT_VERSION,
) -> None:
    """Write an npeff container: ``data``, what it is, and a CRC-32 of every dataset.

    Args:
        path: A temporary name.
        content: ``"fishers"``, ``"components"``, ``"shard"``, …: what a reader has to know.
        data: The datasets.
        attributes: Further root attributes, such as ``kind``.
        version: Format version to declare (tests of newer files only).
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
        "format_version": np.int64(version),
        "content": content,
        "written_by": f"npeff {package_version()}",
    }
    write_hdf5(path, [*map(summed, data), sums_data], {"/": {**root, **attributes}})


VERIFY_BYTES = 256 << 20
"""Datasets no larger are checked when a file is opened; larger ones before all of them is used."""


@dataclass(frozen=True)
class Container:
    """An HDF5 file opened for reading: no handle but, once arrays are asked for, one read-only mapping.

    Attributes:
        path: The file.
        content: What it holds, as a file of npeff says: ``"fishers"``, ``"components"``, ``"shard"``, …; or the name of
            its published layout.
        attributes: Attributes of the root by name, of other objects as ``"path@name"``.
        specs: Its datasets.
        refused: Why other datasets and attributes are not read.
    """

    path: Path
    content: str
    attributes: Mapping[str, Any]
    specs: Mapping[str, Spec]
    refused: Mapping[str, str] = field(default_factory=dict)

    @property
    def is_npeff(self) -> bool:
        """Whether the file says that npeff wrote it."""
        return self.attributes.get("format") == FORMAT

    @cached_property
    def _bytes(self) -> np.memmap[Any, np.dtype[np.uint8]]:
        return np.memmap(self.path, np.uint8, "r")

    def spec(self, name: str) -> Spec:
        """Where dataset ``name`` lies.

        Raises:
            StorageError: The file lacks it, or it holds nothing that npeff reads.
        """
        if name not in self.specs:
            reason = self.refused.get(name, "is missing")
            raise StorageError(
                f"{self.path}: dataset {name!r} {reason}; the file was changed by another program, or is damaged"
            )
        return self.specs[name]

    def array(self, name: str) -> Array:
        """Dataset ``name`` as a read-only array mapped from the file; its contents are not checked."""
        spec = self.spec(name)
        if spec.offset is None:
            array = self._read(name)
        else:
            array = self._bytes[spec.offset : spec.offset + spec.nbytes].view(spec.dtype).reshape(spec.shape)
            array = array if array.flags.aligned else array.copy()
        array.flags.writeable = False
        return array

    def _read(self, name: str) -> Array:
        spec = self.specs[name]
        if spec.nbytes == 0:
            return np.empty(spec.shape, spec.dtype)
        with open_hdf5(self.path) as file:
            return np.array(file[name][()], spec.dtype)

    def attribute(self, name: str, *types: type) -> Any:
        """Attribute ``name``: of the root, or of another object as ``"path@name"``.

        Args:
            name: Its name.
            *types: Types that its value may have; an array of one number serves as a number.

        Raises:
            StorageError: The file lacks it, or its value has another type.
        """
        if name not in self.attributes:
            reason = self.refused.get(name, "is missing")
            raise StorageError(
                f"{self.path}: attribute {name!r} {reason}; the file was changed by another program, or is damaged"
            )
        value = self.attributes[name]
        while isinstance(value, list) and len(value) == 1 and list not in types:
            value = value[0]
        return expect(value, f"{self.path}: attribute {name!r}", types)

    def read(
        self, fields: Sequence[Field], sizes: Sizes, *, verify: bool = False
    ) -> tuple[dict[str, Array], Callable[[], None]]:
        """Arrays as a format expects them: types and shapes are checked, and the contents of all but large arrays.

        Args:
            fields: What is expected; fields that others refer to come first.
            sizes: Sizes known beforehand; those that the fields decide are added.
            verify: Check large arrays too.

        Returns:
            The arrays by name, mapped and read-only, and a function that checks those larger than
            :data:`VERIFY_BYTES`, once.

        Raises:
            StorageError: One is not as expected, or its checksum differs.
        """
        for one in fields:
            if not one.optional or one.name in self.refused:
                self.spec(one.name)
        check_shapes(self.path, self.specs, fields, sizes)
        present = [one for one in fields if one.name in self.specs]
        arrays = {one.name: self.array(one.name) for one in present}
        large = [one for one in present if self.specs[one.name].nbytes > VERIFY_BYTES]
        later = [one for one in large if not verify and one.ascends_to is None]  # offsets are needed at once

        def check(chosen: Sequence[Field]) -> None:
            for one in chosen:
                for _ in self._summed(one.name, checked_pieces(self.path, one, arrays, sizes)):
                    pass
                if arrays[one.name].nbytes > CHUNK_BYTES:
                    forget(arrays[one.name])

        check([one for one in present if one not in later])
        return arrays, cache(lambda: check(later))

    def _summed(self, name: str, pieces: Iterable[Array]) -> Iterator[Array]:
        """The pieces of a dataset, which are compared with its checksum, where the file has checksums.

        Raises:
            StorageError: They differ.
        """
        total = 0
        for piece in pieces:
            total = zlib.crc32(as_bytes(piece, self.specs[name].dtype).data, total)
            yield piece
        if self.checksums is not None and f"{total:08x}" != self.checksums.get(name):
            raise StorageError(
                f"{self.path}: dataset {name!r} is damaged (its checksum differs); restore the file, or "
                "compute it again"
            )

    def chunks(self, name: str) -> Iterator[Array]:
        """Dataset ``name`` in flat pieces of about 16 MiB, read, not mapped; its checksum is verified.

        Raises:
            StorageError: The contents do not match the checksum written with them.
        """
        return self._summed(name, self._pieces(name, self.spec(name)))

    def _pieces(self, name: str, spec: Spec) -> Iterator[Array]:
        if spec.offset is None:
            yield self._read(name).reshape(-1)
            return
        size = spec.dtype.itemsize
        with open(self.path, "rb") as file:
            file.seek(spec.offset)
            left = spec.nbytes // size
            while left:
                chunk = np.fromfile(file, spec.dtype, min(left, max(1, CHUNK_BYTES // size)))
                if not len(chunk):
                    raise TruncatedFileError(f"{self.path}: the file ended inside dataset {name!r}")
                left -= len(chunk)
                yield chunk

    def json(self, name: str, expected: type | tuple[type, ...] = (dict, list)) -> Any:
        """The JSON document in dataset ``name``; its checksum is verified.

        Args:
            name: The dataset, a text.
            expected: Type, or types, that the document must have.

        Raises:
            StorageError: It is damaged, or has another type.
        """
        self._check_text(name)
        raw = b"".join(chunk.tobytes() for chunk in self.chunks(name))
        return parse_json(raw, f"{self.path}: dataset {name!r}", expected, finite=False)

    def _check_text(self, name: str) -> None:
        spec = self.spec(name)
        if spec.dtype.kind != "S" or spec.shape:
            refuse(self.path, name, f"one text, got {spec.dtype} of shape {spec.shape}")
        if spec.nbytes > MOST_BYTES:
            refuse(self.path, name, f"at most {MOST_BYTES:,} bytes of JSON, got {spec.nbytes:,}")

    @cached_property
    def checksums(self) -> dict[str, str] | None:
        """CRC-32 of every dataset, hexadecimal; None where another program wrote the file.

        Raises:
            StorageError: They are damaged, or of a dataset that is missing.
        """
        where = f"{self.path}: dataset 'checksums'"
        if self.is_npeff:
            self._check_text("checksums")
            raw: Any = b"".join(chunk.tobytes() for chunk in self._pieces("checksums", self.specs["checksums"]))
        elif "checksums" in self.attributes:
            raw = self.attribute("checksums", str)
        else:
            return None
        sums: dict[str, str] = parse_json(raw, where)
        for name in sums:
            if not name.startswith("@"):  # of an attribute
                self.spec(name)
        return sums


def open_container(path: Path) -> Container:
    """Open an npeff file of any content. Costs a few reads, however large the file.

    Raises:
        StorageError: There is no such file.
        TruncatedFileError: It ends before its contents do.
        ForeignFileError: It is not npeff's.
        NewerFileError: Its format is newer than this npeff knows.
    """
    found = open_file(path)
    if not found.is_npeff:
        raise ForeignFileError(f"{path}: an HDF5 file, but not one written by npeff (no attribute format = {FORMAT!r})")
    return found


def open_file(path: Path) -> Container:
    """Open an HDF5 file, npeff's or not. Costs a few reads, however large the file.

    Raises:
        StorageError: There is no such file, or it is damaged.
        TruncatedFileError: It ends before its contents do.
        ForeignFileError: It is no HDF5 file, or its format version is none of npeff's.
        NewerFileError: Its format is newer than this npeff knows.
    """
    with open_hdf5(path) as file:
        found = structure_of(path, file)
    attributes = found.attributes
    if attributes.get("format") != FORMAT:
        return Container(path, "", attributes, found.specs, found.refused)
    version = attributes.get("format_version")
    if not isinstance(version, int) or version < 1:
        raise ForeignFileError(
            f"{path}: calls itself npeff's, but its format version is {version!r}; no npeff wrote that"
        )
    if version > FORMAT_VERSION:
        raise NewerFileError(
            f"{path}: format version {version} (written by {attributes.get('written_by', 'unknown')}); "
            f"this is npeff {package_version()}, which reads version {FORMAT_VERSION}: upgrade npeff to open "
            "it"
        )
    return Container(path, str(attributes.get("content")), attributes, found.specs, found.refused)
