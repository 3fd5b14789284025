"""Open a file of Fishers or Components, npeff's own or in a published layout."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from npeff.components.components import Components
from npeff.components.factored import slots
from npeff.components.factorisation import COMPONENTS, OPTIONAL
from npeff.components.published import describe_published, published_in
from npeff.errors import ForeignFileError, StorageError
from npeff.fishers.file_format import (
    KINDS,
    check_provenance,
    check_sizes,
    coherent,
    count_outputs,
    described_parameters,
    example_fields,
    one_of,
    told_outputs,
)
from npeff.fishers.fishers import Fishers, fishers_in
from npeff.fishers.options import sketch_of
from npeff.fishers.parts import describe_parts, parts_folder
from npeff.storage.checks import Sizes, check_shapes, expect, item
from npeff.storage.container import Container, recognise
from npeff.storage.files import path_of

READ_BYTES = 256 << 20  # components no larger are read into memory


def load(path: Path | str, *, verify: bool = False) -> Fishers | Components:
    """Open a file of Fishers or Components, saved by npeff or in one of the published layouts.

    Arrays of npeff's own files are mapped read-only: opening is quick and needs little memory, whatever the size
    (components up to 256 MiB are read instead). Only vectors that are recovered later are added to a file of components
    (:meth:`npeff.Components.recover`). Files in the published layouts
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
        return published_in(found)
    if found.content == "fishers":
        return fishers_in(found, verify=verify)
    if found.content == "components":
        return _components_in(found, verify=verify)
    raise ForeignFileError(
        f"{path}: expected Fishers or Components, found an npeff file with content {found.content!r}"
    )


def _components_in(container: Container, *, verify: bool = False) -> Components:
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
    if "rank" in meta:
        rank = item(meta, "rank", where, int)
        if not 0 < rank <= parameters.n_parameters:
            raise StorageError(f"{where}, 'rank', is damaged: expected a number ≥ 1, got {rank}")
        sizes["n_factors"] = sum(slot.numel for slot in slots(parameters, rank))
    elif "arrays/factored" in container.specs:
        raise StorageError(f"{where} is damaged: expected 'rank', which the array 'factored_vectors' needs")
    sizes["n_tensors"] = len(parameters)
    check_shapes(container.path, container.specs, fields, sizes)
    count_outputs(container.path, sizes, options, told_outputs(container, "arrays/n_outputs"))
    check_sizes(container, sizes)
    for together in (
        ("row_offsets", "row_weights"),
        ("recovered", "recovered_vectors"),
        ("factored", "factored_vectors", "factored_lost"),
    ):
        if len({f"arrays/{name}" in container.specs for name in together}) > 1:
            raise StorageError(
                f"{container.path}: damaged: expected all or none of the arrays {' and '.join(together)}"
            )
    found_arrays, check = container.read(fields, sizes, verify=verify)
    arrays = {name.removeprefix("arrays/"): array for name, array in found_arrays.items()}
    if sum(array.nbytes for array in arrays.values()) <= READ_BYTES:
        arrays = {name: np.array(array) for name, array in arrays.items()}
    with coherent(container.path):
        return Components(
            kind=meta["kind"],
            block_weights=meta["block_weights"],
            parameters=parameters,
            loss=float(meta["loss"]),
            provenance=dict(provenance),
            rank=meta.get("rank"),
            path=container.path,
            check=check,
            **{name: arrays.get(name) for name in ("coefficients", "vectors", "loss_curve", *OPTIONAL)},  # type: ignore[arg-type]
            **example_fields(arrays),
        )


def describe(path: Path | str) -> dict[str, Any]:
    """Describe what a file holds, without reading its arrays.

    Args:
        path: A file, finished or (its ``.parts`` folder) unfinished.

    Returns:
        ``path``, ``bytes``, ``format``, ``content`` and, by content: ``kind``, ``n_examples``,
        ``n_parameters``, ``arrays`` (name → shape and dtype), ``parameters``, ``provenance``, ``coverage``,
        ``meta``; for unfinished work ``shards``. JSON-able.
    """
    path = path_of(path)
    if not path.exists() and parts_folder(path).is_dir():
        return describe_parts(path)
    found = recognise(path)
    summary: dict[str, Any] = {"path": str(path), "bytes": path.stat().st_size}
    if not found.is_npeff:
        return {**summary, "format": "published", "content": found.content, **describe_published(found)}
    summary |= {name: value for name, value in found.attributes.items() if "@" not in name}
    summary["arrays"] = {
        name: [list(spec.shape), str(spec.dtype)] for name, spec in found.specs.items() if spec.dtype.kind != "S"
    }
    for name in ("parameters", "provenance", "coverage", "meta"):
        if name in found.specs:
            summary[name] = found.json(name)
    return summary
