"""The npeff container: an HDF5 file that says what it is, and whose arrays are mapped rather than read."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt

from npeff.errors import ForeignFileError, NewerFileError, StorageError, TruncatedFileError
from npeff.storage.documents import MOST_BYTES, expect, parse_json
from npeff.storage.fields import Field, Sizes, check_shapes, checked_pieces, refuse
from npeff.storage.files import forget
from npeff.storage.hdf5 import CHUNK_BYTES, Data, Spec, as_bytes, open_hdf5, structure_of, write_hdf5

Array = npt.NDArray[Any]

FORMAT = "npeff"
FORMAT_VERSION = 1


@cache
def package_version() -> str:
    """Return the installed version of npeff."""
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
        """Return where dataset ``name`` lies.

        Raises:
            StorageError: The file lacks it, or it holds nothing that npeff reads.
        """
        spec: Spec = self._found(self.specs, "dataset", name)
        return spec

    def _found(self, items: Mapping[str, Any], what: str, name: str) -> Any:
        if name not in items:
            reason = self.refused.get(name, "is missing")
            raise StorageError(
                f"{self.path}: {what} {name!r} {reason}; the file was changed by another program, or is damaged"
            )
        return items[name]

    def array(self, name: str) -> Array:
        """Map dataset ``name`` from the file as a read-only array, without a check of its contents."""
        spec = self.spec(name)
        if spec.offset is not None:
            array: Array = self._bytes[spec.offset : spec.offset + spec.nbytes].view(spec.dtype).reshape(spec.shape)
            array = array if array.flags.aligned else array.copy()
        elif spec.nbytes == 0:
            array = np.empty(spec.shape, spec.dtype)
        else:
            with open_hdf5(self.path) as file:
                array = np.array(file[name][()], spec.dtype)
        array.flags.writeable = False
        return array

    def attribute(self, name: str, *types: type) -> Any:
        """Return attribute ``name``: of the root, or of another object as ``"path@name"``.

        Args:
            name: Its name.
            *types: Types that its value may have; an array of one number serves as a number.

        Raises:
            StorageError: The file lacks it, or its value has another type.
        """
        value = self._found(self.attributes, "attribute", name)
        while isinstance(value, list) and len(value) == 1 and list not in types:
            value = value[0]
        return expect(value, f"{self.path}: attribute {name!r}", types)

    def read(
        self, fields: Sequence[Field], sizes: Sizes, *, verify: bool = False
    ) -> tuple[dict[str, Array], Callable[[], None] | None]:
        """Map the arrays of a format; check their types and shapes, and the contents of all but large ones.

        Args:
            fields: What is expected; fields that others refer to come first.
            sizes: Sizes known beforehand; those that the fields decide are added.
            verify: Check large arrays too.

        Returns:
            The arrays by name, mapped and read-only, and a function that checks those larger than
            :data:`VERIFY_BYTES`, once; None where there are none.

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
                mapped_large = arrays[one.name].nbytes > CHUNK_BYTES
                for _ in self._summed(one.name, checked_pieces(self.path, one, arrays, sizes)):
                    if mapped_large:  # pages that were read count as this process's memory
                        forget(arrays[one.name])

        check([one for one in present if one not in later])
        return arrays, cache(lambda: check(later)) if later else None

    def _summed(self, name: str, pieces: Iterable[Array]) -> Iterator[Array]:
        """Yield the pieces of a dataset and compare them with its checksum, where the file has checksums.

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
        """Yield dataset ``name`` in flat pieces of about 16 MiB, and verify its checksum at the end.

        Raises:
            StorageError: The contents do not match the checksum written with them.
        """
        return self._summed(name, self._pieces(name, self.spec(name)))

    def _pieces(self, name: str, spec: Spec) -> Iterator[Array]:
        if spec.offset is None:
            yield self.array(name).reshape(-1)
            return
        left = spec.nbytes // spec.dtype.itemsize
        with open(self.path, "rb") as file:  # read, not mapped: faster for one pass, and no page stays
            file.seek(spec.offset)
            while left:
                piece = np.fromfile(file, spec.dtype, min(left, max(1, CHUNK_BYTES // spec.dtype.itemsize)))
                if not len(piece):
                    raise TruncatedFileError(f"{self.path}: the file ended inside dataset {name!r}")
                left -= len(piece)
                yield piece

    def json(self, name: str, expected: type | tuple[type, ...] = (dict, list)) -> Any:
        """Read the JSON document in dataset ``name`` and verify its checksum.

        Args:
            name: The dataset, a text.
            expected: Type, or types, that the document must have.

        Raises:
            StorageError: It is damaged, or has another type.
        """
        return parse_json(self._text(name, checked=True), f"{self.path}: dataset {name!r}", expected, finite=False)

    def _text(self, name: str, checked: bool) -> bytes:
        spec = self.spec(name)
        if spec.dtype.kind != "S" or spec.shape:
            refuse(self.path, name, f"one text, got {spec.dtype} of shape {spec.shape}")
        if spec.nbytes > MOST_BYTES:
            refuse(self.path, name, f"at most {MOST_BYTES:,} bytes of JSON, got {spec.nbytes:,}")
        array = self.array(name).reshape(-1)
        return b"".join(piece.tobytes() for piece in (self._summed(name, [array]) if checked else [array]))

    @cached_property
    def checksums(self) -> dict[str, str] | None:
        """CRC-32 of every dataset, hexadecimal; None where another program wrote the file.

        Raises:
            StorageError: They are damaged, or of a dataset that is missing.
        """
        where = f"{self.path}: dataset 'checksums'"
        if self.is_npeff:
            raw: Any = self._text("checksums", checked=False)
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
    """Open an npeff file of any content, with a few reads, however large the file.

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
    """Open an HDF5 file, npeff's or not, with a few reads, however large the file.

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
