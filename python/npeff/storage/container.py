"""The npeff container: an HDF5 file that says what it is, and whose arrays are mapped rather than read."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt

from npeff.errors import ForeignFileError, NewerFileError, StorageError, TruncatedFileError
from npeff.storage.hdf5 import CHUNK_BYTES, Data, as_bytes, write_hdf5
from npeff.storage.opening import open_hdf5, text_of

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


@dataclass(frozen=True)
class Spec:
    """Where a dataset lies: ``offset`` is None when it is empty, or stored by another program in pieces."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    offset: int | None

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


@dataclass(frozen=True)
class Container:
    """An npeff file opened for reading: no handle but, once arrays are asked for, one read-only mapping.

    Attributes:
        path: The file.
        content: What it holds: ``"fishers"``, ``"components"``, ``"shard"``.
        attributes: All root attributes.
        specs: Its datasets.
    """

    path: Path
    content: str
    attributes: Mapping[str, Any]
    specs: Mapping[str, Spec]

    @cached_property
    def _bytes(self) -> np.memmap[Any, np.dtype[np.uint8]]:
        return np.memmap(self.path, np.uint8, "r")

    def spec(self, name: str) -> Spec:
        """Where dataset ``name`` lies.

        Raises:
            StorageError: The file lacks it, or it holds nothing that npeff writes.
        """
        if name not in self.specs:
            raise StorageError(
                f"{self.path}: dataset {name!r} is missing; the file was changed by another program, or is damaged"
            )
        if self.specs[name].dtype.kind not in "biufcS":
            raise StorageError(
                f"{self.path}: dataset {name!r} has the type {self.specs[name].dtype}, which npeff never writes; the "
                "file was changed by another program, or is damaged"
            )
        return self.specs[name]

    def array(self, name: str) -> Array:
        """Dataset ``name`` as a read-only array mapped from the file."""
        spec = self.spec(name)
        if spec.offset is None:
            array = self._read(name)
        else:
            array = self._bytes[spec.offset : spec.offset + spec.nbytes].view(spec.dtype).reshape(spec.shape)
        array.flags.writeable = False
        return array

    def _read(self, name: str) -> Array:
        spec = self.specs[name]
        if spec.nbytes == 0:
            return np.empty(spec.shape, spec.dtype)
        with open_hdf5(self.path) as file:
            return np.array(file[name][()], spec.dtype)

    def chunks(self, name: str) -> Iterator[Array]:
        """Dataset ``name`` in flat pieces of about 16 MiB, read, not mapped; its checksum is verified.

        Raises:
            StorageError: The contents do not match the checksum written with them.
        """
        spec = self.spec(name)
        total = 0
        for chunk in self._pieces(name, spec):
            total = zlib.crc32(as_bytes(chunk, spec.dtype).data, total)
            yield chunk
        if f"{total:08x}" != self.checksums.get(name, ""):
            raise StorageError(
                f"{self.path}: dataset {name!r} is damaged (its checksum differs); restore the file, or "
                "compute it again"
            )

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

    def text(self, name: str) -> str:
        """The string in dataset ``name``.

        Raises:
            StorageError: It is no UTF-8.
        """
        raw = b"".join(chunk.tobytes() for chunk in self._pieces(name, self.spec(name)))
        try:
            return raw.decode()
        except UnicodeDecodeError as error:
            raise StorageError(f"{self.path}: dataset {name!r} is damaged: {error}") from error

    def json(self, name: str) -> Any:
        """The JSON document in dataset ``name``.

        Raises:
            StorageError: It is no JSON.
        """
        try:
            return json.loads(self.text(name))
        except ValueError as error:
            raise StorageError(f"{self.path}: dataset {name!r} is damaged: {error}") from error

    @cached_property
    def checksums(self) -> dict[str, str]:
        """CRC-32 of every dataset, hexadecimal.

        Raises:
            StorageError: They are damaged.
        """
        sums = self.json("checksums")
        if not isinstance(sums, dict):
            raise StorageError(f"{self.path}: dataset 'checksums' is damaged: it holds a {type(sums).__name__}")
        return sums

    def verify(self) -> None:
        """Read everything and compare it with the checksums.

        Raises:
            StorageError: A dataset is damaged; named.
        """
        for name in self.checksums:
            for _ in self.chunks(name):
                pass


def open_container(path: Path) -> Container:
    """Open an npeff file of any content. Costs a few reads, however large the file.

    Raises:
        StorageError: There is no such file.
        TruncatedFileError: It ends before its contents do.
        ForeignFileError: It is not npeff's.
        NewerFileError: Its format is newer than this npeff knows.
    """
    with open_hdf5(path) as file:
        found = container_in(path, file)
    if found is None:
        raise ForeignFileError(f"{path}: an HDF5 file, but not one written by npeff (no attribute format = {FORMAT!r})")
    return found


def container_in(path: Path, file: h5py.File) -> Container | None:
    """The container in an open HDF5 file, or None when it is not npeff's.

    Raises:
        TruncatedFileError: It ends before its contents do.
        ForeignFileError: Its format version is none of npeff's.
        NewerFileError: Its format is newer than this npeff knows.
    """
    attributes = {name: _plain(value) for name, value in file.attrs.items()}
    if attributes.get("format") != FORMAT:
        return None
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
    size = path.stat().st_size
    specs: dict[str, Spec] = {}

    def visit(name: str, item: Any) -> None:
        if isinstance(item, h5py.Dataset):
            offset = item.id.get_offset()
            specs[name] = Spec(item.shape, item.dtype, None if offset is None else int(offset))
            if offset is not None and offset + specs[name].nbytes > size:
                raise TruncatedFileError(
                    f"{path}: the file ends at byte {size:,}, inside dataset {name!r} (up to byte "
                    f"{offset + specs[name].nbytes:,}); "
                    "copy it again from where it is whole, or compute it again"
                )

    file.visititems(visit)
    return Container(path, str(attributes.get("content")), attributes, specs)


def _plain(value: Any) -> Any:
    if isinstance(value, bytes | str):
        return text_of(value)
    return value.item() if isinstance(value, np.generic) else value
