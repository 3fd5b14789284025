"""What Fishers and Components look like in a container: their fields, and what is looked up in their JSON later."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import numpy as np

from npeff.compress import sketch_of
from npeff.errors import ArgumentError, StorageError
from npeff.fishers import Fishers, Kind
from npeff.parameters import Parameters
from npeff.rows import DenseRows, GramRows, Rows, SparseRows
from npeff.storage.container import VERIFY_BYTES, Container
from npeff.storage.documents import expect, item
from npeff.storage.fields import FLOAT, INT, MOST_PARAMETERS, Field, Sizes, check_arrays, check_shapes, refuse

if TYPE_CHECKING:
    from npeff.components import Components

KINDS = get_args(Kind)
EXAMPLE_ARRAYS = {"norms": np.float32, "logits": np.float32, "labels": np.int64, "ids": np.int64}
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
def coherent(path: Path) -> Iterator[None]:
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
    if len(set(parameters.names)) != len(parameters) or parameters.n_parameters > MOST_PARAMETERS:
        raise StorageError(f"{where} is damaged: expected different names and at most 2⁴⁸ elements in all")
    return parameters


def check_provenance(container: Container, provenance: dict[str, Any], name: str) -> dict[str, Any]:
    """The options in the provenance of Fishers, once all that is looked up in it later has the type expected there.

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
    with coherent(container.path):
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


def check_saved(name: str, saved: Fishers | Components) -> None:
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
