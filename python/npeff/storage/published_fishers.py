"""Fishers in the published layouts: fixed rank, variable rank, diagonal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt

from npeff.errors import StorageError
from npeff.fishers import Fishers, Kind
from npeff.growing_rows import concatenate
from npeff.parameters import Parameters
from npeff.rows import DenseRows, SparseRows
from npeff.storage.hdf5 import CHUNK_BYTES, Attributes, Data
from npeff.storage.store import index_dtype

Array = npt.NDArray[Any]
Plan = tuple[str, list[Data], Attributes]
Entries = tuple[Array, Array, Array]
INT32 = int(np.iinfo(np.int32).max)


def unnamed(n_parameters: int) -> Parameters:
    """The one unnamed parameter of files that know none."""
    return Parameters.of([("parameters", (n_parameters,))])


def number(value: Any) -> int:
    """An attribute that is a number, or an array of one."""
    return int(np.asarray(value).reshape(-1)[0])


def dataset(path: Path, file: h5py.File, *names: str) -> h5py.Dataset:
    """The first of ``names`` that the file has.

    Raises:
        StorageError: It has none.
    """
    for name in names:
        if name in file:
            return file[name]
    raise StorageError(f"{path}: {' or '.join(names)} is missing from this file in a published layout")


def attribute(path: Path, file: h5py.File, where: str, name: str) -> int:
    """A whole-number attribute.

    Raises:
        StorageError: It is missing.
    """
    if name not in file[where].attrs:
        raise StorageError(f"{path}: attribute {name} of {where} is missing from this file in a published layout")
    return number(file[where].attrs[name])


def read_low_rank(path: Path, file: h5py.File, layout: str) -> Fishers:
    """Read low-rank Fishers, of fixed or variable rank.

    Raises:
        StorageError: The file contradicts itself.
    """
    values, indices = dataset(path, file, "data/values"), dataset(path, file, "data/row_indices")
    n, k = values.shape
    provenance: dict[str, Any] = {"source": "published layout", "layout": layout}
    if layout == "low_rank_fishers":
        sizes = _row_sizes(path, dataset(path, file, "data/col_offsets")[()].astype(np.int64), k)
        ranks = np.full(n, sizes.shape[1], np.int64)
        sizes = sizes.reshape(-1)
        if "n_classes" in file["data"].attrs:
            provenance["n_classes"] = number(file["data"].attrs["n_classes"])
    else:
        ranks = dataset(path, file, "data/ranks")[()].astype(np.int64)
        sizes = dataset(path, file, "data/col_sizes")[()].astype(np.int64)
        if len(ranks) != n or ranks.sum() != len(sizes):
            raise StorageError(
                f"{path}: damaged: {len(ranks)} ranks, in sum {ranks.sum()}, for {n} examples and "
                f"{len(sizes)} col_sizes"
            )
        if "min_prob_class" in file["data"].attrs:
            provenance["min_prob_class"] = float(np.asarray(file["data"].attrs["min_prob_class"]).reshape(-1)[0])
    m = attribute(path, file, "data", "n_parameters")
    norms = dataset(path, file, "data/pef_frobenius_norms")
    return _fishers(path, file, "low_rank", provenance, m, _rows(path, values, indices, sizes, ranks, m), ranks, norms)


def read_diagonal(path: Path, file: h5py.File) -> Fishers:
    """Read diagonal Fishers.

    Raises:
        StorageError: The file contradicts itself.
    """
    values, indices = dataset(path, file, "data/fisher/values"), dataset(path, file, "data/fisher/indices")
    n, k = values.shape
    m = attribute(path, file, "data/fisher", "dense_fisher_size")
    ranks = np.ones(n, np.int64)
    rows = _rows(path, values, indices, np.full(n, k, np.int64), ranks, m)
    provenance = {"source": "published layout", "layout": "diagonal_fishers"}
    return _fishers(path, file, "diagonal", provenance, m, rows, ranks, dataset(path, file, "data/dense_fisher_norms"))


def _fishers(
    path: Path,
    file: h5py.File,
    kind: Kind,
    provenance: dict[str, Any],
    m: int,
    rows: SparseRows,
    ranks: Array,
    norms: h5py.Dataset,
) -> Fishers:
    n = len(ranks)
    labels = file["data/labels"][()].astype(np.int64) if "data/labels" in file else np.full(n, -1, np.int64)
    logits = dataset(path, file, "data/logits", "data/predicted_logits")[()].astype(np.float32)
    for name, array in (("labels", labels), ("logits", logits), ("norms", norms)):
        if array.shape[:1] != (n,):
            raise StorageError(f"{path}: damaged: {n} examples, but {name} of shape {array.shape}")
    offsets = np.concatenate([[0], np.cumsum(ranks)]).astype(np.int64)
    return Fishers(
        kind=kind,
        rows=rows,
        row_offsets=offsets,
        norms=norms[()].astype(np.float32),
        logits=logits,
        labels=labels,
        ids=np.arange(n),
        parameters=unnamed(m),
        provenance=provenance,
        path=path,
    )


def _row_sizes(path: Path, offsets: Array, k: int) -> Array:
    """Entries per row, ``(n, rows)``, from cumulative offsets; in first-generation files, a 0 and the sizes.

    Raises:
        StorageError: They are neither.
    """
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


def _rows(path: Path, values: h5py.Dataset, indices: h5py.Dataset, sizes: Array, ranks: Array, m: int) -> SparseRows:
    """CSR rows, ascending, without zeros, from ``(n, k)`` entries and the sizes ``(R,)`` of the rows in them.

    Raises:
        StorageError: They contradict each other.
    """
    n, k = values.shape
    starts = np.concatenate([[0], np.cumsum(ranks)])
    step = max(1, CHUNK_BYTES // max(1, 4 * k))
    parts = [SparseRows(np.zeros(1, np.int64), np.zeros(0, index_dtype(m)), np.zeros(0, np.float32), m)]
    for start in range(0, n, step):
        stop = min(n, start + step)
        mine = sizes[starts[start] : starts[stop]]
        per_example = np.add.reduceat(np.append(mine, 0), starts[start:stop] - starts[start]) * (ranks[start:stop] > 0)
        if (mine < 0).any() or (per_example > k).any():
            raise StorageError(f"{path}: damaged: an example among {start}…{stop - 1} has more than its {k} entries")
        inside = np.arange(k) < per_example[:, None]
        value, index = (
            values[start:stop][inside].astype(np.float32),
            indices[start:stop][inside].astype(np.int64),
        )
        row = np.repeat(np.arange(len(mine)), mine)
        keep = value != 0
        value, index, row = value[keep], index[keep], row[keep]
        if len(index) and (index.min() < 0 or index.max() >= m):
            raise StorageError(f"{path}: damaged: a parameter index lies outside 0 … {m - 1}")
        key = row * m + index
        if (np.diff(key) <= 0).any():
            order = np.argsort(key, kind="stable")
            value, index, row, key = value[order], index[order], row[order], key[order]
            if (np.diff(key) == 0).any():
                raise StorageError(f"{path}: damaged: a row has two entries for one parameter")
        indptr = np.concatenate([[0], np.cumsum(np.bincount(row, minlength=len(mine)))]).astype(np.int64)
        parts.append(SparseRows(indptr, index.astype(index_dtype(m)), value, m))
    rows = concatenate([*parts])
    assert isinstance(rows, SparseRows), "sparse parts give sparse rows"
    return rows


def plan_fishers(fishers: Fishers, path: Path, variable: bool | None) -> Plan:
    """The layout, datasets and attributes that hold ``fishers``.

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
    k = max((int(rows.indptr[-1]) for rows in _examples(fishers)), default=0)
    short = np.flatnonzero(ranks * m < k)
    if len(short):
        i = int(short[0])
        raise StorageError(
            f"{path}: the published layouts keep the same number of entries for every example, here {k}, but "
            f"example {i} has "
            f"{int(ranks[i])} rows of {m} parameters; recompute with compress=TopK(k), k ≤ "
            f"{int(ranks.min()) * m}"
        )

    def data(name: str, shape: tuple[int, ...], dtype: str, pick: Callable[[Entries], Array]) -> Data:
        return Data(name, shape, np.dtype(dtype), lambda: (pick(_padded(rows, k)) for rows in _examples(fishers)))

    examples = [Data.of("data/labels", fishers.labels, "<i4")]
    if fishers.kind == "diagonal":
        return (
            "diagonal_fishers",
            [
                data("data/fisher/values", (n, k), "<f4", lambda e: e[0]),
                data("data/fisher/indices", (n, k), "<i4", lambda e: e[1]),
                Data.of("data/dense_fisher_norms", fishers.norms, "<f4"),
                *examples,
                Data.of("data/logits", fishers.logits, "<f4"),
                Data.of("data/predicted_logits", fishers.logits, "<f4"),  # either name is in use
            ],
            {"data/fisher": {"dense_fisher_size": np.int64(m)}},
        )
    common = [
        *examples,
        Data.of("data/logits", fishers.logits, "<f4"),
        data("data/values", (n, k), "<f4", lambda e: e[0]),
        data("data/row_indices", (n, k), "<i4", lambda e: e[1]),
        Data.of("data/pef_frobenius_norms", fishers.norms, "<f4"),
    ]
    if variable:
        sizes = data("data/col_sizes", (int(ranks.sum()),), "<i4", lambda e: e[2])
        attributes = {"n_parameters": np.int64(m), "min_prob_class": _min_prob(fishers.provenance)}
        return (
            "low_rank_fishers_variable",
            [*common, Data.of("data/ranks", ranks, "<i4"), sizes],
            {"data": attributes},
        )
    rank = int(ranks[0]) if n else 0
    offsets = data("data/col_offsets", (n, rank + 1), "<i4", lambda e: np.concatenate([[0], np.cumsum(e[2])]))
    return (
        "low_rank_fishers",
        [*common, offsets],
        {"data": {"n_classes": np.int64(rank), "n_parameters": np.int64(m)}},
    )


def _min_prob(provenance: dict[str, Any]) -> float:
    options = provenance.get("options")
    found = provenance.get("min_prob_class", options.get("min_prob") if isinstance(options, dict) else None)
    return float(found) if found is not None else 0.0


def _examples(fishers: Fishers) -> Iterator[SparseRows]:
    """Every example's non-zero entries."""
    for start, stop in zip(fishers.row_offsets[:-1], fishers.row_offsets[1:], strict=True):
        if isinstance(fishers.rows, DenseRows):
            block = fishers.rows.values[start:stop]
            row, index = np.nonzero(block)
            value = block[row, index]
        else:
            assert isinstance(fishers.rows, SparseRows), "sketches and inner products are refused before"
            lo, hi = fishers.rows.indptr[start], fishers.rows.indptr[stop]
            row = np.repeat(np.arange(stop - start), np.diff(fishers.rows.indptr[start : stop + 1]))
            value, index = fishers.rows.values[lo:hi], fishers.rows.indices[lo:hi]
            keep = value != 0
            row, index, value = row[keep], index[keep], value[keep]
        indptr = np.concatenate([[0], np.cumsum(np.bincount(row, minlength=int(stop - start)))]).astype(np.int64)
        yield SparseRows(indptr, index, value, fishers.rows.n_columns)


def _padded(rows: SparseRows, k: int) -> Entries:
    """Values, indices ``(k,)``, row sizes; zeros fill the lowest unused indices, first rows first."""
    missing = k - int(rows.indptr[-1])
    values, indices, sizes = [], [], []
    for start, stop in zip(rows.indptr[:-1], rows.indptr[1:], strict=True):
        value, index = rows.values[start:stop], rows.indices[start:stop]
        extra = min(missing, rows.n_columns - len(index))
        if extra:
            unused = np.setdiff1d(np.arange(len(index) + extra), index, assume_unique=True)[:extra]
            index, value = (
                np.concatenate([index, unused]),
                np.concatenate([value, np.zeros(extra, np.float32)]),
            )
            order = np.argsort(index)
            index, value, missing = index[order], value[order], missing - extra
        values.append(value)
        indices.append(index)
        sizes.append(len(index))
    return (
        np.concatenate([np.zeros(0, np.float32), *values]),
        np.concatenate([np.zeros(0, np.int64), *indices]),
        np.array(sizes, np.int64),
    )
