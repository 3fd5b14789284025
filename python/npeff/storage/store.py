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
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import numpy as np

from npeff.compress import sketch_of
from npeff.errors import ArgumentError, ForeignFileError, NewerFileError, NpeffError, StorageError
from npeff.fishers import Fishers, Kind
from npeff.parameters import Parameters
from npeff.rows import DenseRows, GramRows, Rows, SparseRows
from npeff.storage.container import VERIFY_BYTES, Container, open_file, write_container
from npeff.storage.documents import expect, item
from npeff.storage.fields import FLOAT, INT, Field, Sizes, check_arrays, check_shapes, refuse
from npeff.storage.files import atomic, check_target, path_of
from npeff.storage.hdf5 import Data

if TYPE_CHECKING:
    from npeff.components import Components

READ_BYTES = 256 << 20  # components no larger are read into memory
KINDS = get_args(Kind)
EXAMPLE_ARRAYS = {"norms": np.float32, "logits": np.float32, "labels": np.int64, "ids": np.int64}


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
    _check_saved("fishers", fishers)
    with atomic(path) as scratch:
        write_fishers(scratch, header, fishers.coverage, None, arrays + row_data(fishers.rows))
    return path


def _check_saved(name: str, saved: Fishers | Components) -> None:
    """Make sure that a file never holds what :func:`load` would refuse.

    Raises:
        ArgumentError: An array is not as the format says.
    """
    known = {"n_parameters": saved.parameters.n_parameters}
    source = saved.provenance if isinstance(saved, Fishers) else saved.provenance.get("fishers") or {}
    known["n_classes"] = n_classes(source.get("options") or {}, saved.logits.shape[1])
    if isinstance(saved, Fishers):
        arrays = {field: getattr(saved, field) for field in ("row_offsets", *EXAMPLE_ARRAYS)} | row_arrays(saved.rows)
        form = next(form for form, fields in ROWS.items() if {field.name for field in fields} <= set(arrays))
        fields = [OFFSETS, *EXAMPLES, *row_fields(form, saved.kind)]
        known["n_rows"] = saved.rows.n_rows
    else:
        arrays, fields = saved.to_arrays(), list(COMPONENTS)
    try:
        check_arrays(name, arrays, [replace(field, dtypes=(*"fiu",)) for field in fields], known)
    except StorageError as error:
        raise ArgumentError(str(error).replace(" is damaged", "")) from error


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
    _check_saved("components", components)
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
    and compared with the stored checksums (about 0.1 s per 256 MiB in the system's cache). Larger rows of Fishers
    are checked in the same way before they are first used as a whole (:meth:`npeff.fishers.Fishers.verify`); larger
    arrays of Components with ``verify`` alone. The published layouts have no checksums: their contents are checked,
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


OFFSETS = Field("row_offsets", ("<i8",), ("n_examples + 1",), ascends_to="n_rows")
EXAMPLES = (
    Field("norms", ("<f4",), ("n_examples",), least=0),
    Field("logits", ("<f4",), ("n_examples", "n_outputs")),
    Field("labels", ("<i8",), ("n_examples",), least=-1, below="n_classes"),
    Field("ids", ("<i8",), ("n_examples",), least=0),
)
ENTRIES = Field("rows/indices", INT, ("n_entries",), least=0, below="n_parameters", ascending_in="rows/indptr")
SPARSE = (
    Field("rows/indptr", ("<i8",), ("n_rows + 1",), ascends_to="n_entries"),
    ENTRIES,
    Field("rows/values", ("<f4",), ("n_entries",)),
)
DENSE = (Field("rows/values", ("<f4",), ("n_rows", "n_columns")),)
GRAM = (Field("rows/gram", ("<f4",), ("n_rows", "n_rows")),)
ROWS = {"sparse": SPARSE, "dense": DENSE, "gram": GRAM}

COMPONENTS = (
    Field("coefficients", FLOAT, ("n_examples", "n_components"), least=0),
    Field("vectors", FLOAT, ("n_components", "n_columns")),
    Field("columns", INT, ("n_columns",), least=0, below="n_parameters", ascending_in="", optional=True),
    Field("labels", INT, ("n_examples",), least=-1, below="n_classes"),
    Field("logits", FLOAT, ("n_examples", "n_outputs")),
    Field("ids", INT, ("n_examples",), least=0),
    Field("norms", FLOAT, ("n_examples",), least=0, nan=True),
    Field("loss_curve", FLOAT, ("n_losses",)),
    Field("row_offsets", INT, ("n_examples + 1",), ascends_to="n_rows", optional=True),
    Field("row_weights", FLOAT, ("n_rows", "n_components"), optional=True),
    Field("recovered", INT, ("n_recovered",), least=0, below="n_components", ascending_in="", optional=True),
    Field("recovered_vectors", FLOAT, ("n_recovered", "n_parameters"), optional=True),
)


def row_fields(form: str, kind: str) -> list[Field]:
    """What is expected of rows, sparse, dense or inner products; those of diagonal Fishers are not negative."""
    fields = ROWS[form]
    return [
        replace(field, least=0) if kind == "diagonal" and field.name == "rows/values" else field for field in fields
    ]


def row_arrays(rows: Rows) -> dict[str, Any]:
    """The arrays of rows by the names of their datasets."""
    if isinstance(rows, SparseRows):
        return {"rows/indptr": rows.indptr, "rows/indices": rows.indices, "rows/values": rows.values}
    return {"rows/gram" if isinstance(rows, GramRows) else "rows/values": rows.values}


@contextmanager
def _whole(path: Path) -> Iterator[None]:
    """Tell that a file is damaged where what it holds contradicts itself.

    Raises:
        StorageError: It does.
    """
    try:
        yield
    except StorageError:
        raise
    except (ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else error
        raise StorageError(f"{path}: damaged: {reason}") from error


def one_of(container: Container, name: str, value: object, choices: Iterable[str]) -> str:
    """``value``, which is one of ``choices``.

    Raises:
        StorageError: It is another.
    """
    if value not in tuple(choices):
        raise StorageError(f"{container.path}: {name} is damaged: expected {' or '.join(choices)}, got {value!r}")
    return str(value)


def described_parameters(document: Any, where: str) -> Parameters:
    """The parameters that a JSON document describes; ``where`` names file and field.

    Raises:
        StorageError: It describes none.
    """
    described = []
    for entry in expect(document, where, list):
        label, shape = item(expect(entry, where, dict), "name", where, str), item(entry, "shape", where, list)
        if not all(type(size) is int and size >= 0 for size in shape):
            raise StorageError(f"{where} is damaged: expected sizes ≥ 0 of {label!r}, got {shape}")
        described.append((label, shape))
    parameters = Parameters.of(described)
    if len(set(parameters.names)) != len(parameters) or parameters.n_parameters >= 1 << 62:
        raise StorageError(f"{where} is damaged: expected different names and fewer than 2⁶² elements")
    return parameters


def check_provenance(container: Container, provenance: dict[str, Any], name: str) -> dict[str, Any]:
    """The options in the provenance of Fishers, once all that is looked up in it later has the type expected there.

    Raises:
        StorageError: Something has not.
    """
    where, nothing = f"{container.path}: {name}", type(None)
    options = item(provenance, "options", where, (dict, nothing)) or {}
    compress = item(options, "compress", where, (dict, nothing)) or {}
    item(compress, "method", where, (str, nothing))
    item(options, "likelihood", where, (str, nothing))
    with _whole(container.path):
        sketch_of(provenance)
    return options


def n_classes(options: dict[str, Any], n_outputs: int) -> int:
    """What labels have to be below: the number of outputs, where those are classes."""
    return n_outputs if n_outputs and options.get("likelihood", "categorical") == "categorical" else 1 << 62


def check_sizes(container: Container, sizes: Sizes) -> None:
    """Make sure that the sizes told by attributes are those of the arrays.

    Raises:
        StorageError: One is not.
    """
    for name in ("n_examples", "n_parameters", "n_components"):
        if name in container.attributes and container.attribute(name, int) != sizes.get(name):
            found = container.attributes[name]
            raise StorageError(
                f"{container.path}: attribute {name!r} is damaged: expected {sizes.get(name)} as the arrays have, got "
                f"{found}"
            )


def fishers_in(container: Container, *, verify: bool = False) -> Fishers:
    """The Fishers in an npeff container, mapped; all arrays but large ones are checked.

    Args:
        container: The file.
        verify: Check large arrays too; otherwise :meth:`npeff.fishers.Fishers.verify` does, before they are used.

    Raises:
        StorageError: An array is not as the format says, or its checksum differs.
    """
    kind = one_of(container, "attribute 'kind'", container.attribute("kind", str), KINDS)
    form = one_of(container, "attribute 'rows'", container.attribute("rows", str), ROWS)
    parameters = described_parameters(container.json("parameters", list), f"{container.path}: dataset 'parameters'")
    provenance = container.json("provenance", dict)
    options = check_provenance(container, provenance, "dataset 'provenance'")
    coverage = container.json("coverage", list)
    for line in coverage:
        expect(line, f"{container.path}: dataset 'coverage'", dict)
    sketch = sketch_of(provenance)
    sizes: Sizes = {"n_parameters": parameters.n_parameters}
    if form == "dense":
        sizes["n_columns"] = parameters.n_parameters if sketch is None else sketch.d
    fields = [OFFSETS, *EXAMPLES, *row_fields(form, kind)]
    check_shapes(container.path, container.specs, [*EXAMPLES, *row_fields(form, kind)], sizes)
    sizes["n_classes"] = n_classes(options, sizes["n_outputs"])
    if kind == "diagonal":
        sizes["n_rows"] = sizes["n_examples"]
    check_sizes(container, sizes)
    arrays, check = container.read(fields, sizes, verify=verify)
    if kind == "diagonal" and not np.array_equal(arrays["row_offsets"], np.arange(sizes["n_examples"] + 1)):
        refuse(container.path, "row_offsets", "one row per example, as diagonal Fishers have")
    rows: Rows
    if form == "gram":
        rows = GramRows(arrays["rows/gram"])
    elif form == "sparse":
        rows = SparseRows(arrays["rows/indptr"], arrays["rows/indices"], arrays["rows/values"], parameters.n_parameters)
    else:
        rows = DenseRows(arrays["rows/values"])

    def check_part(part: Rows | None) -> None:
        if part is None:
            check()
        else:
            known: Sizes = {name: size for name, size in sizes.items() if name in ("n_parameters", "n_columns")}
            check_arrays(container.path, row_arrays(part), row_fields(form, kind), known)

    large = any(container.specs[field.name].nbytes > VERIFY_BYTES for field in fields)
    with _whole(container.path):
        return Fishers(
            kind=kind,  # type: ignore[arg-type]
            rows=rows,
            row_offsets=arrays["row_offsets"],
            **{name: arrays[name] for name in EXAMPLE_ARRAYS},
            parameters=parameters,
            provenance=provenance,
            coverage=coverage,
            path=container.path,
            check=check_part if large and not verify else None,
        )


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
    source = item(provenance, "fishers", where, (dict, type(None))) or {}
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
    found_arrays, _ = container.read(fields, sizes, verify=verify)
    arrays = {name.removeprefix("arrays/"): array for name, array in found_arrays.items()}
    if sum(array.nbytes for array in arrays.values()) <= READ_BYTES:
        arrays = {name: np.array(array) for name, array in arrays.items()}
    with _whole(container.path):
        return Components.from_parts(arrays, meta)


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
