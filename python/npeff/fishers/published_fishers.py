"""Fishers in the published layouts: fixed rank, variable rank, diagonal."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from npeff.errors import StorageError
from npeff.fishers.fishers import Fishers
from npeff.fishers.logits import Logits
from npeff.fishers.rows import Array, Kind, Rows, SparseRows, concatenate, index_dtype
from npeff.models.parameters import Parameters
from npeff.storage.checks import MOST_PARAMETERS, Field, check_shapes, refuse
from npeff.storage.container import Container
from npeff.storage.hdf5 import CHUNK_BYTES
from npeff.storage.writing import Attributes, Data

PublishedLayout = tuple[str, list[Data], Attributes]
Entries = tuple[Array, Array, Array]
INT32 = int(np.iinfo(np.int32).max)


def unnamed(n_parameters: int) -> Parameters:
    """Return the one unnamed parameter of files that name none."""
    return Parameters.of([("parameters", (n_parameters,))])


LOGITS = ("data/logits", "data/predicted_logits")
NUMBER = ("f", "i", "u")
WHOLE = ("i", "u")


def _fields(values: str, indices: str, norms: str, logits: str, least: int | None) -> list[Field]:
    """What all layouts of Fishers have; numbers of any width and byte order are taken."""
    return [
        Field(values, NUMBER, ("n_examples", "n_entries"), least=least),
        Field(indices, WHOLE, ("n_examples", "n_entries")),  # those of entries that are 0 mean nothing
        Field(norms, NUMBER, ("n_examples",), least=0),
        Field(logits, NUMBER, ("n_examples", "n_outputs")),
        Field("data/labels", WHOLE, ("n_examples",), least=-1, below="n_classes", optional=True),
    ]


def told(file: Container, name: str, kind: type = int) -> dict[str, Any]:
    """Read attribute ``"path@name"``, a finite number, as ``{name: number}``; empty where there is none.

    Raises:
        StorageError: The attribute is no such number.
    """
    if name not in file.attributes and name not in file.refused:
        return {}
    value = file.attribute(name, int, float)
    if not math.isfinite(value) or kind(value) != value:
        raise StorageError(f"{file.path}: attribute {name!r} is damaged: expected a finite number, got {value}")
    return {name.partition("@")[2]: kind(value)}


def n_parameters_of(file: Container, name: str, indices: str) -> int:
    """Read the number of parameters from an attribute; no more than the type of the ``indices`` can count.

    Raises:
        StorageError: The attribute is missing, or no such number.
    """
    m, dtype = file.attribute(name, int, float), file.spec(indices).dtype
    most = min(MOST_PARAMETERS, np.iinfo(dtype).max + 1 if dtype.kind in "iu" else MOST_PARAMETERS)
    if not 0 <= m <= most or int(m) != m:
        raise StorageError(f"{file.path}: attribute {name!r} is damaged: expected a number of parameters, got {m}")
    return int(m)


def read_low_rank(file: Container) -> Fishers:
    """Read low-rank Fishers, of fixed or variable rank.

    Raises:
        StorageError: The file contradicts itself.
    """
    path, provenance = file.path, {"source": "published layout", "layout": file.content}
    m = n_parameters_of(file, "data@n_parameters", "data/row_indices")
    fields = _fields("data/values", "data/row_indices", "data/pef_frobenius_norms", _logits(file), None)
    if file.content == "low_rank_fishers":
        arrays = _read(file, [*fields, Field("data/col_offsets", WHOLE, ("n_examples", "n_ranks + 1"))], m)
        n, k = arrays["data/values"].shape
        sizes = _row_sizes(path, arrays["data/col_offsets"].astype(np.int64), k)
        ranks = np.full(n, sizes.shape[1], np.int64)
        sizes = sizes.reshape(-1)
        provenance |= told(file, "data@n_classes")
    else:
        ranks_field = Field("data/ranks", WHOLE, ("n_examples",), adds_up_to="n_rows")
        arrays = _read(file, [*fields, Field("data/col_sizes", WHOLE, ("n_rows",), least=0), ranks_field], m)
        ranks, sizes = (arrays[name].astype(np.int64) for name in ("data/ranks", "data/col_sizes"))
        provenance |= told(file, "data@min_prob_class", float)
    rows = _rows(path, arrays["data/values"], arrays["data/row_indices"], sizes, ranks, m)
    return _fishers(file, "low_rank", provenance, m, rows, ranks, arrays, "data/pef_frobenius_norms")


def read_diagonal(file: Container) -> Fishers:
    """Read diagonal Fishers.

    Raises:
        StorageError: The file contradicts itself.
    """
    m = n_parameters_of(file, "data/fisher@dense_fisher_size", "data/fisher/indices")
    norms = "data/dense_fisher_norms"
    arrays = _read(file, _fields("data/fisher/values", "data/fisher/indices", norms, _logits(file), 0), m)
    n, k = arrays["data/fisher/values"].shape
    ranks = np.ones(n, np.int64)
    entries = (arrays["data/fisher/values"], arrays["data/fisher/indices"])
    rows = _rows(file.path, *entries, np.full(n, k, np.int64), ranks, m)
    provenance = {"source": "published layout", "layout": "diagonal_fishers"}
    return _fishers(file, "diagonal", provenance, m, rows, ranks, arrays, norms)


def _logits(file: Container) -> str:
    """The name that the logits have.

    Raises:
        StorageError: They are missing.
    """
    for name in LOGITS:
        if name in file.specs or name in file.refused:
            return name
    raise StorageError(f"{file.path}: {' or '.join(LOGITS)} is missing from this file in a published layout")


def _read(file: Container, fields: list[Field], m: int) -> dict[str, Array]:
    sizes = {"n_parameters": m}
    check_shapes(file.path, file.specs, fields, sizes)
    sizes["n_classes"] = sizes["n_outputs"] or 1 << 62
    arrays, _ = file.read(fields, sizes, verify=True)
    return arrays


def _fishers(
    file: Container,
    kind: Kind,
    provenance: dict[str, Any],
    m: int,
    rows: Rows,
    ranks: Array,
    arrays: dict[str, Array],
    norms: str,
) -> Fishers:
    n = len(ranks)
    with np.errstate(over="ignore"):
        floats = {name: arrays[name].astype(np.float32) for name in (norms, _logits(file))}
    for name, array in floats.items():
        if not np.isfinite(array).all():
            refuse(file.path, name, "numbers within the range of float32")
    return Fishers(
        kind=kind,
        rows=rows,
        row_offsets=np.concatenate([[0], np.cumsum(ranks)]).astype(np.int64),
        norms=floats[norms],
        logits=Logits(floats[_logits(file)]),
        labels=arrays.get("data/labels", np.full(n, -1)).astype(np.int64),
        ids=np.arange(n),
        parameters=unnamed(m),
        provenance=provenance,
        path=file.path,
    )


def _row_sizes(path: Path, offsets: Array, k: int) -> Array:
    """Entries per row, ``(n, rows)``, from cumulative offsets; in first-generation files, a 0 and the sizes.

    Raises:
        StorageError: They are neither.
    """
    if (offsets < 0).any() or (offsets > k).any():
        refuse(path, "data/col_offsets", f"offsets or sizes from 0 to {k}")
    cumulative = bool((np.diff(offsets, axis=1) >= 0).all() and (offsets[:, :1] == 0).all())
    if cumulative and (offsets[:, -1] == k).all():
        return np.diff(offsets, axis=1)
    if (offsets[:, :1] == 0).all() and (offsets.sum(axis=1) == k).all() and (offsets >= 0).all():
        return offsets[:, 1:]
    if cumulative and (offsets[:, -1] <= k).all():
        return np.diff(offsets, axis=1)
    raise StorageError(
        f"{path}: damaged: col_offsets are neither offsets into {k} entries nor sizes that add up to them"
    )


def _rows(path: Path, values: Array, indices: Array, sizes: Array, ranks: Array, m: int) -> Rows:
    """CSR rows, ascending, without zeros, from ``(n, k)`` entries and the sizes ``(R,)`` of the rows in them.

    Raises:
        StorageError: They contradict each other.
    """
    n, k = values.shape
    starts = np.concatenate([[0], np.cumsum(ranks)])
    step = max(1, CHUNK_BYTES // max(1, 4 * k))
    parts: list[Rows] = [SparseRows(np.zeros(1, np.int64), np.zeros(0, index_dtype(m)), np.zeros(0, np.float32), m)]
    for start in range(0, n, step):
        stop = min(n, start + step)
        mine = sizes[starts[start] : starts[stop]]
        if (mine > k).any():
            raise StorageError(f"{path}: damaged: an example among {start}…{stop - 1} has more than its {k} entries")
        per_example = np.add.reduceat(np.append(mine, 0), starts[start:stop] - starts[start]) * (ranks[start:stop] > 0)
        if (mine < 0).any() or (per_example > k).any():
            raise StorageError(f"{path}: damaged: an example among {start}…{stop - 1} has more than its {k} entries")
        inside = np.arange(k) < per_example[:, None]
        with np.errstate(over="ignore"):
            value = values[start:stop][inside].astype(np.float32)
        index = indices[start:stop][inside].astype(np.int64)
        row = np.repeat(np.arange(len(mine)), mine)
        keep = value != 0
        value, index, row = value[keep], index[keep], row[keep]
        if len(index) and (index.min() < 0 or index.max() >= m):
            raise StorageError(f"{path}: damaged: a parameter index lies outside 0 … {m - 1}")
        if not np.isfinite(value).all():
            raise StorageError(f"{path}: damaged: expected values within the range of float32")
        if ((np.diff(row) == 0) & (np.diff(index) <= 0)).any():
            order = np.lexsort((index, row))
            value, index, row = value[order], index[order], row[order]
            if ((np.diff(row) == 0) & (np.diff(index) == 0)).any():
                raise StorageError(f"{path}: damaged: a row has two entries for one parameter")
        parts.append(SparseRows.of_entries(row, index.astype(index_dtype(m)), value, len(mine), m))
    return concatenate(parts)


def plan_fishers(fishers: Fishers, path: Path, variable: bool | None) -> PublishedLayout:
    """Choose the layout, datasets and attributes that hold ``fishers``.

    Raises:
        StorageError: No published layout can hold them.
    """
    n, m, ranks = len(fishers), fishers.n_parameters, fishers.ranks
    if m > INT32:
        raise StorageError(f"{path}: the published layouts index parameters with int32; {m:,} parameters do not fit")
    if variable is None:
        variable = bool(n) and bool((ranks != ranks[0]).any())
    if not variable and n and (ranks != ranks[0]).any():
        raise StorageError(
            f"{path}: the fixed-rank layout needs one rank for all, these have {ranks.min()} to "
            f"{ranks.max()}; leave variable=None"
        )
    if fishers.logits.classes is not None:
        raise StorageError(
            f"{path}: the published layouts hold all logits, and of these {fishers.logits.n_outputs:,} outputs only "
            "the largest are kept; save in npeff's own format"
        )
    logits = np.asarray(fishers.logits)
    k = max((int(rows.indptr[-1]) for rows in _examples(fishers)), default=0)
    short = np.flatnonzero(ranks * m < k)
    if len(short):
        i = int(short[0])
        raise StorageError(
            f"{path}: the published layouts keep the same number of entries for every example, here {k}, but example "
            f"{i} has {int(ranks[i])} rows of {m} parameters; recompute with compress=TopK(k), k ≤ {ranks.min() * m}"
        )

    def data(name: str, shape: tuple[int, ...], dtype: str, pick: Callable[[Entries], Array]) -> Data:
        return Data(name, shape, np.dtype(dtype), lambda: (pick(_padded(rows, k)) for rows in _examples(fishers)))

    labels, found = Data.of("data/labels", fishers.labels, "<i4"), Data.of("data/logits", logits, "<f4")
    if fishers.kind == "diagonal":
        own = [
            data("data/fisher/values", (n, k), "<f4", lambda e: e[0]),
            data("data/fisher/indices", (n, k), "<i4", lambda e: e[1]),
            Data.of("data/dense_fisher_norms", fishers.norms, "<f4"),
            labels,
            found,
            Data.of("data/predicted_logits", logits, "<f4"),  # either name is in use
        ]
        return "diagonal_fishers", own, {"data/fisher": {"dense_fisher_size": np.int64(m)}}
    common = [
        labels,
        found,
        data("data/values", (n, k), "<f4", lambda e: e[0]),
        data("data/row_indices", (n, k), "<i4", lambda e: e[1]),
        Data.of("data/pef_frobenius_norms", fishers.norms, "<f4"),
    ]
    attributes: dict[str, Any] = {"n_parameters": np.int64(m)}
    if variable:
        sizes = data("data/col_sizes", (int(ranks.sum()),), "<i4", lambda e: e[2])
        attributes["min_prob_class"] = _min_prob(fishers.provenance)
        own = [*common, Data.of("data/ranks", ranks, "<i4"), sizes]
        return "low_rank_fishers_variable", own, {"data": attributes}
    rank = int(ranks[0]) if n else 0
    offsets = data("data/col_offsets", (n, rank + 1), "<i4", lambda e: np.concatenate([[0], np.cumsum(e[2])]))
    return "low_rank_fishers", [*common, offsets], {"data": {"n_classes": np.int64(rank), **attributes}}


def _min_prob(provenance: dict[str, Any]) -> float:
    options = provenance.get("options")
    found = provenance.get("min_prob_class", options.get("min_prob") if isinstance(options, dict) else None)
    return float(found) if found is not None else 0.0


def _examples(fishers: Fishers) -> Iterator[SparseRows]:
    """Every example's non-zero entries."""
    for start, stop in zip(fishers.row_offsets[:-1], fishers.row_offsets[1:], strict=True):
        assert not fishers.rows.products_only, "sketches and inner products are refused before"
        entries = fishers.rows.nonzero(int(start), int(stop))
        yield SparseRows.of_entries(*entries, int(stop - start), fishers.rows.n_columns)


def _padded(rows: SparseRows, k: int) -> Entries:
    """Values, indices ``(k,)``, row sizes; zeros fill the lowest unused indices, first rows first."""
    missing = k - int(rows.indptr[-1])
    values, indices = [np.zeros(0, np.float32)], [np.zeros(0, np.int64)]
    for start, stop in pairwise(rows.indptr.tolist()):
        index = rows.indices[start:stop]
        unused = np.setdiff1d(np.arange(min(rows.n_columns, len(index) + missing)), index, assume_unique=True)[:missing]
        missing -= len(unused)
        index, value = np.append(index, unused), np.append(rows.values[start:stop], np.zeros(len(unused), np.float32))
        order = np.argsort(index)
        values.append(value[order])
        indices.append(index[order])
    return np.concatenate(values), np.concatenate(indices), np.array([len(index) for index in indices[1:]], np.int64)
