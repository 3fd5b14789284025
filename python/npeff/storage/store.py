"""Saving and opening Fishers and Components: one HDF5 container, which says by itself what it holds.

A file of Fishers has the root attributes ``format``, ``format_version``, ``content``, ``kind``, ``rows``
(``sparse``, ``dense`` or ``gram``), ``n_examples`` and ``n_parameters``, the JSON documents ``parameters`` (names and
shapes in order), ``provenance``, ``coverage``, ``batches`` (digest and size of each batch, when known) and
``checksums`` (CRC-32 of every dataset), and the arrays

=================  =============================  ==========================================================
``row_offsets``    int64 ``(n + 1,)``             example i owns rows ``row_offsets[i]:row_offsets[i+1]``
``norms``          float32 ``(n,)``               norms of the dense Fishers
``logits``         float32 ``(n, C)``             outputs of the model
``labels``         int64 ``(n,)``                 true classes, −1 where unknown
``ids``            int64 ``(n,)``                 positions in the data
``rows/indptr``    int64 ``(R + 1,)``             sparse rows: row j holds entries ``indptr[j]:indptr[j+1]``
``rows/indices``   int32 or int64 ``(nnz,)``      sparse rows: parameter index, ascending within a row
``rows/values``    float32 ``(nnz,)``, ``(R,m)``  the entries; the whole rows where dense, ``(R, d)`` of sketches
``rows/gram``      float32 ``(R, R)``             inner products of the rows, in place of them
=================  =============================  ==========================================================

Arrays lie contiguously, so they are mapped, not read, and any HDF5 reader can open them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from npeff.compress import sketch_of
from npeff.errors import ForeignFileError, NewerFileError, NpeffError, StorageError
from npeff.fishers import Fishers
from npeff.parameters import Parameters
from npeff.rows import DenseRows, GramRows, Rows
from npeff.storage.container import Container, open_file, write_container
from npeff.storage.contents import (
    COMPONENTS,
    EXAMPLE_ARRAYS,
    KINDS,
    check_provenance,
    check_saved,
    check_sizes,
    coherent,
    described_parameters,
    fishers_in,
    n_classes,
    one_of,
)
from npeff.storage.documents import expect, item
from npeff.storage.fields import Sizes, check_shapes
from npeff.storage.files import atomic, check_target, path_of
from npeff.storage.hdf5 import Data

if TYPE_CHECKING:
    from npeff.components import Components

READ_BYTES = 256 << 20  # components no larger are read into memory


def index_dtype(n_columns: int) -> np.dtype[Any]:
    """The type of stored column indices: int32 where it suffices, so that it never depends on the entries."""
    return np.dtype(np.int32 if n_columns <= np.iinfo(np.int32).max else np.int64)


def write_fishers(
    path: Path, header: dict[str, Any], coverage: object, batches: object, arrays: Sequence[Data]
) -> None:
    """Write the container of Fishers from streams.

    Args:
        path: A temporary name.
        header: ``kind``, ``parameters`` (JSON) and ``provenance``.
        coverage: As in :class:`npeff.fishers.Fishers`.
        batches: ``[digest, size]`` per batch, or None.
        arrays: The arrays in the order of the table above.
    """
    by_name = {item.name: item for item in arrays}
    parameters = Parameters.from_json(header["parameters"])
    texts = [Data.json(name, header[name]) for name in ("parameters", "provenance")] + [Data.json("coverage", coverage)]
    if batches is not None:
        texts.append(Data.json("batches", batches))
    attributes = {
        "kind": header["kind"],
        "rows": "sparse" if "rows/indptr" in by_name else "gram" if "rows/gram" in by_name else "dense",
        "n_examples": np.int64(by_name["norms"].shape[0]),
        "n_parameters": np.int64(parameters.n_parameters),
    }
    write_container(path, "fishers", [*texts, *arrays], attributes)


def row_data(rows: Rows) -> list[Data]:
    """The datasets of rows held in memory (or mapped)."""
    if isinstance(rows, DenseRows):
        return [Data.of("rows/values", rows.values, np.float32)]
    if isinstance(rows, GramRows):
        return [Data.of("rows/gram", rows.values, np.float32)]
    return [
        Data.of("rows/indptr", rows.indptr, np.int64),
        Data.of("rows/indices", rows.indices, index_dtype(rows.n_columns)),
        Data.of("rows/values", rows.values, np.float32),
    ]


def save_fishers(fishers: Fishers, path: Path | str) -> Path:
    """Write Fishers to an HDF5 file.

    The file appears whole or not at all. An existing file is replaced only if it, too, holds npeff Fishers.

    Args:
        fishers: What to save; may itself be mapped from ``path``.
        path: Where.

    Returns:
        ``path``.

    Raises:
        ArgumentError: An array holds what no Fishers have, such as NaN; says which.
        StorageError: The file cannot be written there; what was there is untouched.
    """
    path = path_of(path)
    check_replaceable(
        path,
        lambda found: found.content == "fishers",
        "Fishers saved by npeff",
    )
    header = {
        "kind": fishers.kind,
        "parameters": fishers.parameters.to_json(),
        "provenance": fishers.provenance,
    }
    arrays = [Data.of("row_offsets", fishers.row_offsets, np.int64)]
    arrays += [Data.of(name, getattr(fishers, name), dtype) for name, dtype in EXAMPLE_ARRAYS.items()]
    fishers.verify()
    check_saved("fishers", fishers)
    with atomic(path) as scratch:
        write_fishers(scratch, header, fishers.coverage, None, arrays + row_data(fishers.rows))
    return path


def save_components(components: Components, path: Path | str) -> Path:
    """Write Components to an HDF5 file: their arrays under ``arrays/`` and ``components.meta()`` as JSON.

    The file appears whole or not at all. An existing file is replaced only if it, too, holds npeff
    Components.

    Args:
        components: What to save.
        path: Where.

    Returns:
        ``path``.

    Raises:
        ArgumentError: An array holds what no Components have, such as NaN; says which.
        StorageError: The file cannot be written there; what was there is untouched.
    """
    path = path_of(path)
    check_components_target(path)
    components.verify()
    check_saved("components", components)
    arrays = [Data.of(f"arrays/{name}", np.asarray(array)) for name, array in sorted(components.to_arrays().items())]
    n, r = components.coefficients.shape
    attributes: dict[str, Any] = {"kind": components.kind, "n_examples": np.int64(n), "n_components": np.int64(r)}
    attributes["n_parameters"] = np.int64(components.parameters.n_parameters)
    with atomic(path) as scratch:
        write_container(scratch, "components", [Data.json("meta", components.meta()), *arrays], attributes)
    return path


def load(path: Path | str, *, verify: bool = False) -> Fishers | Components:
    """Open a file of Fishers or Components, saved by npeff or in one of the published layouts.

    Arrays of npeff's own files are mapped read-only: opening is quick and needs little memory, whatever the size
    (components up to 256 MiB are read instead). The file is never written to. Files in the published layouts
    are read into memory.

    Types, shapes and sizes of everything are checked. Arrays up to 256 MiB are also read once, their contents checked
    and compared with the stored checksums (about 0.1 s per 256 MiB in the system's cache). Larger ones are checked in
    the same way before they are first used as a whole (:meth:`npeff.Fishers.verify`,
    :meth:`npeff.Components.verify`). The published layouts have no checksums: their contents are checked,
    but a wrong number that could be a right one is not noticed.

    Args:
        path: The file.
        verify: Read and check large arrays too.

    Returns:
        What the file holds.

    Raises:
        ArgumentError: ``path`` is no path.
        StorageError: There is no such file, it is no regular file, or it is damaged.
        TruncatedFileError: It ends before its contents do.
        ForeignFileError: It was not written by npeff, nor in a published layout.
        NewerFileError: Its format is newer than this npeff knows.
    """
    path = path_of(path)
    found = recognise(path)
    if not found.is_npeff:
        from npeff.storage.published import published_in

        return published_in(found)
    if found.content == "fishers":
        return fishers_in(found, verify=verify)
    if found.content == "components":
        return _components_in(found, verify=verify)
    raise ForeignFileError(
        f"{path}: expected Fishers or Components, found an npeff file with content {found.content!r}"
    )


def recognise(path: Path) -> Container:
    """A file of npeff, or one in a published layout, whose name is then its content.

    Raises:
        ForeignFileError: Neither.
    """
    from npeff.storage.published import layout_of

    found = open_file(path)
    if found.is_npeff:
        return found
    layout = layout_of(found)
    if layout is None:
        raise ForeignFileError(
            f"{path}: an HDF5 file, but neither npeff's (no attribute format = 'npeff') nor in a published layout "
            "(no data/values, data/fisher, data/G or data/H)"
        )
    return replace(found, content=layout)


def check_replaceable(path: Path, same: Callable[[Container], bool], what: str) -> None:
    """Make sure that ``path`` is free, or holds what is about to be written anew.

    Raises:
        StorageError: Something else is there, or the folder is missing.
    """
    check_target(path)
    if not path.exists():
        return
    try:
        replaceable = same(recognise(path))
    except NpeffError:
        replaceable = False
    if not replaceable:
        raise StorageError(
            f"{path}: a file that does not hold {what} is there, and is not overwritten; remove it, or "
            "choose another name"
        )


def check_components_target(path: Path) -> None:
    """Make sure that Components may be saved at ``path``: worth knowing before they are computed.

    Raises:
        StorageError: Something else is there, or the folder is missing.
    """
    check_replaceable(
        path,
        lambda found: found.content == "components",
        "Components saved by npeff",
    )


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


def _components_in(container: Container, *, verify: bool = False) -> Components:
    from npeff.components import Components

    meta, where = container.json("meta", dict), f"{container.path}: dataset 'meta'"
    one_of(container, "'kind' of dataset 'meta'", item(meta, "kind", where, str), KINDS)
    parameters = described_parameters(item(meta, "parameters", where, list), f"{where}, 'parameters',")
    if math.isinf(item(meta, "loss", where, float)):
        raise StorageError(f"{where}, 'loss', is damaged: expected a finite number, or NaN")
    weights = item(meta, "block_weights", where, (dict, type(None))) or {}
    for name, weight in weights.items():
        if name not in parameters.names or not 0 <= expect(weight, f"{where}, 'block_weights'", float) < math.inf:
            raise StorageError(
                f"{where}, 'block_weights', is damaged: expected a finite weight ≥ 0 per parameter, got {weight} for "
                f"{name!r}"
            )
    provenance = item(meta, "provenance", where, dict)
    source = item(provenance, "fishers", where, dict) if "fishers" in provenance else {}
    options = check_provenance(container, source, "'provenance' of dataset 'meta'")
    item(provenance, "course", where, (dict, type(None)))
    fields = [replace(field, name=f"arrays/{field.name}") for field in COMPONENTS]
    sizes: Sizes = {"n_parameters": parameters.n_parameters}
    if "arrays/columns" not in container.specs:
        sketch, gram = sketch_of(source), (options.get("compress") or {}).get("method") == "gram"
        found = container.spec("arrays/coefficients").shape
        sizes["n_columns"] = sketch.d if sketch else found[-1] if gram and found else parameters.n_parameters
    check_shapes(container.path, container.specs, fields, sizes)
    sizes["n_classes"] = n_classes(options, sizes["n_outputs"])
    check_sizes(container, sizes)
    for together in (("row_offsets", "row_weights"), ("recovered", "recovered_vectors")):
        if len({f"arrays/{name}" in container.specs for name in together}) > 1:
            raise StorageError(
                f"{container.path}: damaged: expected both or none of the arrays {' and '.join(together)}"
            )
    found_arrays, check = container.read(fields, sizes, verify=verify)
    arrays = {name.removeprefix("arrays/"): array for name, array in found_arrays.items()}
    if sum(array.nbytes for array in arrays.values()) <= READ_BYTES:
        arrays = {name: np.array(array) for name, array in arrays.items()}
    with coherent(container.path):
        return replace(Components.from_parts(arrays, meta), check=check)


def describe(path: Path | str) -> dict[str, Any]:
    """What a file holds, without reading its arrays.

    Args:
        path: A file, finished or (its ``.parts`` folder) unfinished.

    Returns:
        ``path``, ``bytes``, ``format``, ``content`` and, by content: ``kind``, ``n_examples``,
        ``n_parameters``, ``arrays`` (name → shape and dtype), ``parameters``, ``provenance``, ``coverage``,
        ``meta``; for unfinished work ``shards``. JSON-able.
    """
    from npeff.storage.parts import describe_parts, parts_folder
    from npeff.storage.published import describe_published

    path = path_of(path)
    if not path.exists() and parts_folder(path).is_dir():
        return describe_parts(path)
    found = recognise(path)
    summary: dict[str, Any] = {"path": str(path), "bytes": path.stat().st_size}
    if not found.is_npeff:
        return {**summary, "format": "published", "content": found.content, **describe_published(path)}
    summary |= {name: value for name, value in found.attributes.items() if "@" not in name}
    summary["arrays"] = {
        name: [list(spec.shape), str(spec.dtype)] for name, spec in found.specs.items() if spec.dtype.kind != "S"
    }
    for name in ("parameters", "provenance", "coverage", "meta"):
        if name in found.specs:
            summary[name] = found.json(name)
    return summary
