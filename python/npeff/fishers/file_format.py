"""The file of Fishers: the contents of one HDF5 container, how they are written, and how they are checked.

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

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import numpy.typing as npt

from npeff.errors import ArgumentError, StorageError
from npeff.fishers.logits import Logits
from npeff.fishers.options import sketch_of
from npeff.fishers.rows import Array, Kind, index_dtype
from npeff.models.parameters import Parameters
from npeff.storage.checks import FLOAT, INT, MOST_PARAMETERS, Field, Sizes, check_arrays, expect, item, refuse
from npeff.storage.container import Container
from npeff.storage.files import forget
from npeff.storage.writing import Data, write_container

Span = tuple[Container, int, int]
KINDS = get_args(Kind)
EXAMPLE_ARRAYS: dict[str, npt.DTypeLike] = {
    "norms": np.float32, "logits": np.float32, "logit_classes": np.int32, "log_normaliser": np.float32,
    "n_outputs": np.int64, "labels": np.int64, "ids": np.int64, "places": np.int64,
}  # fmt: skip
"""The arrays that say something of each example, the rows apart, in the order of the file."""

MOST_CLASSES = 1 << 24
"""Outputs that a file may tell without their logits: arrays of one number per class stay small."""

OFFSETS = Field("row_offsets", ("<i8",), ("n_examples + 1",), ascends_to="n_rows")
LOGITS = (
    Field("logits", FLOAT, ("n_examples", "n_logits")),
    Field("logit_classes", ("<i4",), ("n_examples", "n_logits"), least=0, below="n_outputs", optional=True),
    Field("log_normaliser", FLOAT, ("n_examples",), optional=True),
    Field("n_outputs", ("<i8",), (), least=1, optional=True),
)
PLACES = Field("places", ("<i8",), ("n_examples", 2), least=0, optional=True)
EXAMPLES = (
    Field("norms", ("<f4",), ("n_examples",), least=0),
    *(replace(field, dtypes=("<f4",)) if field.dtypes == FLOAT else field for field in LOGITS),
    Field("labels", ("<i8",), ("n_examples",), least=-1, below="n_classes"),
    Field("ids", ("<i8",), ("n_examples",), least=0),
    PLACES,
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


def row_fields(form: str, kind: str) -> list[Field]:
    """List the fields of rows, sparse, dense or inner products; those of diagonal Fishers are not negative."""
    fields = ROWS[form]
    return [
        replace(field, least=0) if kind == "diagonal" and field.name == "rows/values" else field for field in fields
    ]


def write_fishers(
    path: Path, header: dict[str, Any], coverage: object, batches: object, arrays: Sequence[Data]
) -> None:
    """Write the container of Fishers from streams: the arrays in the order of the table above.

    ``batches`` are ``[digest, size]`` of each batch, or None.
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


def example_arrays(item: Any) -> dict[str, Array]:
    """List the arrays of Fishers, of a block or of Components that say something of each example, by dataset."""
    arrays = {"norms": item.norms, **item.logits.arrays(), "labels": item.labels, "ids": item.ids}
    return arrays if item.places is None else {**arrays, "places": item.places}


def example_fields(arrays: Mapping[str, Array], which: Any = ...) -> dict[str, Any]:
    """Make the fields of some examples (integers, a slice or a mask) from arrays by the names of their datasets."""
    chosen = {name: array[which] for name, array in arrays.items() if name in EXAMPLE_ARRAYS and array.ndim}
    fields = {name: chosen[name] for name in ("norms", "labels", "ids")}
    logits = {**chosen, "n_outputs": arrays["n_outputs"]} if "n_outputs" in arrays else chosen
    return {**fields, "logits": Logits.from_arrays(logits), "places": chosen.get("places")}


def fisher_data(parts: Sequence[Mapping[str, Array]], n_columns: int) -> list[Data]:
    """Describe the datasets of Fishers that lie in memory (or are mapped), from arrays by name, part after part."""
    dtypes: dict[str, npt.DTypeLike] = {"row_offsets": np.int64, **EXAMPLE_ARRAYS, "rows/indptr": np.int64}
    dtypes |= {"rows/indices": index_dtype(n_columns), "rows/values": np.float32, "rows/gram": np.float32}

    def described(name: str) -> Data:
        arrays, dtype = [part[name] for part in parts], np.dtype(dtypes[name])
        if len(arrays) == 1 or not arrays[0].ndim:
            return Data.of(name, arrays[0], dtype)
        if name in ("row_offsets", "rows/indptr"):
            return Data.of(name, offsets_of([np.diff(array) for array in arrays]))
        shape = (sum(len(array) for array in arrays), *arrays[0].shape[1:])
        return Data(name, shape, dtype.newbyteorder("<"), lambda: arrays)

    return [described(name) for name in dtypes if name in parts[0]]


def offsets_of(counts: Sequence[Array]) -> Array:
    """Return the offsets, int64 from 0 on, of items with so many entries each."""
    return np.concatenate([[0], np.cumsum(np.concatenate([*counts]))]).astype(np.int64)


def joined_data(spans: Sequence[Span]) -> list[Data]:
    """Describe the datasets of a file of Fishers that joins the examples of several files, streamed.

    A span is a file that has the datasets of Fishers, and its examples from … to. Of arrays that are taken as a whole,
    the checksum is compared.
    """
    rows = [_inside(span, "row_offsets") for span in spans]
    names = [name for name in EXAMPLE_ARRAYS if any(name in file.specs for file, _, _ in spans)]
    data = [_offsets("row_offsets", spans), *(_slices(name, spans) for name in names)]
    if "rows/indptr" in spans[0][0].specs:
        entries = [_inside(span, "rows/indptr") for span in rows]
        return [*data, _offsets("rows/indptr", rows), _slices("rows/indices", entries), _slices("rows/values", entries)]
    return [*data, _slices("rows/values", rows)]


def _inside(span: Span, offsets: str) -> Span:
    file, start, stop = span
    array = file.array(offsets)
    return file, int(array[start]), int(array[stop])


def _slices(name: str, spans: Sequence[Span]) -> Data:
    spec = spans[0][0].spec(name)
    if not spec.shape:
        return Data.of(name, spans[0][0].array(name))
    shape = (sum(stop - start for _, start, stop in spans), *spec.shape[1:])

    def chunks() -> Iterator[Array]:
        for file, start, stop in spans:
            if (start, stop) == (0, file.spec(name).shape[0]):
                yield from file.chunks(name)
            else:
                array = file.array(name)
                yield array[start:stop]
                forget(array)

    return Data(name, shape, spec.dtype, chunks)


def _offsets(name: str, spans: Sequence[Span]) -> Data:
    def chunks() -> Iterator[Array]:
        total = 0
        yield np.zeros(1, np.int64)
        for file, start, stop in spans:
            array = np.asarray(file.array(name)[start : stop + 1], np.int64)
            yield array[1:] - array[0] + total
            total += int(array[-1] - array[0])

    return Data(name, (sum(stop - start for _, start, stop in spans) + 1,), np.dtype("<i8"), chunks)


@contextmanager
def coherent(path: Path) -> Iterator[None]:
    """Refuse a file as damaged where its contents contradict each other.

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
    """Return ``value``, once it is one of ``choices``.

    Raises:
        StorageError: It is another.
    """
    if value not in tuple(choices):
        raise StorageError(f"{container.path}: {name} is damaged: expected {' or '.join(choices)}, got {value!r}")
    return str(value)


def described_parameters(document: Any, where: str) -> Parameters:
    """Read the parameters that a JSON document describes; ``where`` names file and field.

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
    if len(set(parameters.names)) != len(parameters) or parameters.n_parameters > MOST_PARAMETERS:
        raise StorageError(f"{where} is damaged: expected different names and at most 2⁴⁸ elements in all")
    return parameters


def check_provenance(container: Container, provenance: dict[str, Any], name: str) -> dict[str, Any]:
    """Check the provenance of Fishers for the types of all that is looked up there later, and return its options.

    Raises:
        StorageError: Something has not.
    """
    where, nothing = f"{container.path}: {name}", type(None)
    options = item(provenance, "options", where, dict) if "options" in provenance else {}
    compress = item(options, "compress", where, (dict, nothing)) or {}
    item(compress, "method", where, (str, nothing))
    item(options, "likelihood", where, (str, nothing))
    with coherent(container.path):
        sketch_of(provenance)
    return options


def told_outputs(file: Container, name: str = "n_outputs") -> Array | None:
    """Read the number of outputs that a file tells, whose type and shape are right; None where all logits are kept."""
    return file.array(name) if name in file.specs else None


def count_outputs(where: object, sizes: Sizes, options: dict[str, Any], n_outputs: Any = None) -> None:
    """Add the number of outputs, and the upper bound of the labels, to sizes that have ``n_logits``.

    The Fishers' options say whether outputs are classes; ``n_outputs`` is what a file tells where not all logits are
    kept.

    Raises:
        StorageError: The number is less than the logits that are kept, or more than any model has.
    """
    n = sizes["n_logits"] if n_outputs is None else int(n_outputs)
    if n < sizes["n_logits"] or (n_outputs is not None and n > MOST_CLASSES):
        refuse(where, "n_outputs", f"at least {sizes['n_logits']}, the logits that are kept, and ≤ 2²⁴, got {n}")
    over_classes = n and options.get("likelihood", "categorical") == "categorical"
    sizes |= {"n_outputs": n, "n_classes": n if over_classes else 1 << 62}


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


def check_saved(name: str, arrays: dict[str, Any], fields: Iterable[Field], known: Sizes) -> None:
    """Make sure that arrays are as the format says, before they are written.

    Raises:
        ArgumentError: One is not.
    """
    try:
        check_arrays(name, arrays, [replace(field, dtypes=(*"fiu",)) for field in fields], known)
    except StorageError as error:
        raise ArgumentError(str(error).replace(" is damaged", "")) from error
