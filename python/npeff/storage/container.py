"""The npeff container: an HDF5 file that states its contents, and whose arrays are mapped rather than read."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from npeff.errors import ForeignFileError, NewerFileError, NpeffError, StorageError, TruncatedFileError
from npeff.storage.checks import MOST_BYTES, Field, Sizes, check_shapes, checked_pieces, expect, parse_json, refuse
from npeff.storage.files import check_target, forget, path_of
from npeff.storage.hdf5 import CHUNK_BYTES, Spec, as_bytes, open_hdf5, structure_of

Array = npt.NDArray[Any]

FORMAT = "npeff"
FORMAT_VERSION = 2
"""Since version 2 a file may hold the largest logits alone, and places."""


@cache
def package_version() -> str:
    """Return the installed version of npeff."""
    try:
        return version("npeff")
    except PackageNotFoundError:
        return "unknown"


VERIFY_BYTES = 256 << 20
"""Datasets no larger are checked when a file is opened; larger ones before all of them is used."""


@dataclass(frozen=True)
class Container:
    """An HDF5 file opened for reading: no handle but, once arrays are asked for, one read-only mapping.

    Attributes:
        path: The file.
        content: What it holds, as a file of npeff says: ``"fishers"``, ``"components"``, ``"shard"``, …; or the name of
            its published layout; empty where it has none.
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
        specs, attributes, refused = structure_of(path, file)
    if attributes.get("format") != FORMAT:
        return Container(path, _layout_of({*specs, *refused}), attributes, specs, refused)
    version = attributes.get("format_version")
    if not isinstance(version, int) or version < 1:
        raise ForeignFileError(
            f"{path}: calls itself npeff's, but its format version is {version!r}; no npeff wrote that"
        )
    if version > FORMAT_VERSION:
        raise NewerFileError(
            f"{path}: format version {version} (written by {attributes.get('written_by', 'unknown')}); this is npeff "
            f"{package_version()}, which reads up to version {FORMAT_VERSION}: upgrade npeff to open it"
        )
    return Container(path, str(attributes.get("content")), attributes, specs, refused)


# ---- what stands at a path ------------------------------------------------------------------------------------

_ROWS = {"data/values", "data/row_indices"}
LAYOUTS: dict[str, tuple[set[str], set[str]]] = {
    "low_rank_fishers": (_ROWS | {"data/col_offsets"}, set()),
    "low_rank_fishers_variable": (_ROWS | {"data/ranks", "data/col_sizes"}, set()),
    "diagonal_fishers": ({"data/fisher/values", "data/fisher/indices"}, set()),
    "diagonal_decomposition": ({"data/W"}, {"data/H", "data/reduce_kept_indices"}),
    "low_rank_decomposition": ({"data/W"}, {"data/G", "data/new_to_old_col_indices"}),
}
"""The published layouts: names that a file has all of, and names of which it has one."""


def _layout_of(names: set[str]) -> str:
    """Return the published layout that a file with these names has; empty where it has none."""
    names = names | {"data/H" for name in names if name.startswith("data/H/")}
    fitting = (name for name, (every, some) in LAYOUTS.items() if every <= names and (not some or some & names))
    return next(fitting, "")


def recognise(path: Path) -> Container:
    """Open a file of npeff, or one in a published layout.

    Raises:
        ForeignFileError: Neither.
    """
    found = open_file(path)
    if not found.is_npeff and not found.content:
        raise ForeignFileError(
            f"{path}: an HDF5 file, but neither npeff's (no attribute format = 'npeff') nor in a published layout "
            "(no data/values, data/fisher, data/G or data/H)"
        )
    return found


def check_replaceable(path: Path | str, content: str) -> Path:
    """Check, before the computation, that ``path`` is free or holds a file of the same content.

    Args:
        path: Where.
        content: ``"fishers"``, ``"components"``, a record's content such as ``"rollback"``, or a published layout.

    Returns:
        The path.

    Raises:
        ArgumentError: ``path`` is no path.
        StorageError: Something else is there, or the folder is missing.
    """
    path = path_of(path)
    check_target(path)
    if path.exists():
        try:
            found = recognise(path).content
        except NpeffError:
            found = ""
        if found != content:
            what = f"a published {content} file" if content in LAYOUTS else f"a {content} record of npeff"
            what = f"{content.capitalize()} saved by npeff" if content in ("fishers", "components") else what
            raise StorageError(
                f"{path}: a file that does not hold {what} is there, and is not overwritten; remove it, or choose "
                "another name"
            )
    return path


def refuse_npeff_file(path: Path) -> None:
    """Make sure that a file of another format may be written at ``path``, and that no work of npeff is lost by it.

    Raises:
        StorageError: Fishers or Components are there, npeff's or in a published layout; or the folder is missing.
    """
    check_target(path)
    if not path.exists():
        return
    try:
        recognise(path)
    except NewerFileError:
        pass
    except NpeffError:
        return
    raise StorageError(f"{path}: holds Fishers or Components, and is not overwritten; choose another name")


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
