"""Decompositions in the published layouts: low-rank, and diagonal with dense or sparse H."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from npeff.components.components import Components
from npeff.components.parameter_vectors import check_recovered
from npeff.errors import ArgumentError, StorageError
from npeff.fishers.fishers import Fishers
from npeff.fishers.published_fishers import INT32, NUMBER, WHOLE, PublishedLayout, n_parameters_of, told, unnamed
from npeff.fishers.rows import Kind
from npeff.storage.container import Container
from npeff.storage.fields import Field, Sizes, refuse
from npeff.storage.hdf5 import LEAST_ALLOWED, MOST_TIMES, Data

Array = npt.NDArray[Any]


def read_decomposition(file: Container, fishers: Fishers | None) -> Components:
    """Read a decomposition; vectors are made unit-norm, their scale moved into the coefficients.

    Raises:
        StorageError: The file contradicts itself, or holds coefficients only.
    """
    path = file.path
    provenance: dict[str, Any] = {"source": "published layout", "layout": file.content}
    low_rank = file.content == "low_rank_decomposition"
    weights = Field("data/W", NUMBER, ("n_examples", "n_components"), least=0)
    if low_rank:
        power, kept, m = (
            2,
            "data/new_to_old_col_indices",
            n_parameters_of(file, "data@n_parameters", "data/new_to_old_col_indices"),
        )
    else:
        power, kept = 1, "data/reduce_kept_indices"
        m = n_parameters_of(file, "data/reduce_kept_indices@full_dense_size", kept)
    axes = tuple(f"axis {axis}" for axis in range(len(file.spec(kept).shape)))
    listed = Field(kept, WHOLE, axes, least=0, below="n_parameters")
    sizes = {"n_parameters": m}
    arrays, _ = file.read([weights, listed], sizes, verify=True)
    columns = arrays[kept].astype(np.int64).reshape(-1)
    sizes["n_listed"] = len(columns)
    vectors = _vectors(file, "data/G" if low_rank else "data/H", sizes, None if low_rank else 0)
    if vectors.shape[1] < len(columns):  # some published files list more columns than G has: the first ones are meant
        provenance["columns_dropped"] = len(columns) - vectors.shape[1]
        columns = columns[: vectors.shape[1]]
    order = np.argsort(columns, kind="stable")
    if (np.diff(columns[order]) == 0).any():
        refuse(path, kept, "every parameter once")
    if low_rank:
        provenance |= told(file, "data@n_classes")
        provenance["published_losses"] = _losses(file)
    with np.errstate(over="ignore", invalid="ignore"):
        norms = np.linalg.norm(vectors, axis=1)
        unit = (vectors / np.where(norms > 0, norms, 1)[:, None])[:, order].astype(np.float32)
        coefficients = (arrays["data/W"].astype(np.float64) * norms**power).astype(np.float32)
    if not np.isfinite(coefficients).all() or not np.isfinite(norms).all():
        refuse(path, "data/W", "coefficients within the range of float32")
    whole = np.array_equal(columns[order], np.arange(m)) if len(columns) == m else False
    kind: Kind = "low_rank" if low_rank else "diagonal"
    return _components(path, kind, coefficients, unit, None if whole else columns[order], m, provenance, fishers)


def _components(
    path: Path,
    kind: Kind,
    coefficients: Array,
    vectors: Array,
    columns: Array | None,
    m: int,
    provenance: dict[str, Any],
    fishers: Fishers | None,
) -> Components:
    n = len(coefficients)
    if fishers is not None and (len(fishers) != n or fishers.n_parameters != m):
        raise ArgumentError(
            f"fishers: expected the {n} examples over {m} parameters of {path}, got {len(fishers)} over "
            f"{fishers.n_parameters}"
        )
    return Components(
        kind=kind,
        coefficients=coefficients,
        vectors=vectors,
        columns=columns,
        block_weights=None,
        parameters=fishers.parameters if fishers is not None else unnamed(m),
        labels=fishers.labels if fishers is not None else np.full(n, -1, np.int64),
        logits=fishers.logits if fishers is not None else np.zeros((n, 0), np.float32),
        ids=fishers.ids if fishers is not None else np.arange(n),
        norms=fishers.norms if fishers is not None else np.full(n, np.nan, np.float32),
        loss_curve=np.zeros(0),
        loss=float("nan"),
        provenance=provenance,
    )


def _losses(file: Container) -> dict[str, Any]:
    """The losses logged by the published code: not comparable with npeff's, kept as they are."""
    found: dict[str, Any] = {}
    for name in ("G_only", "joint"):
        if (path := f"losses/{name}") in file.specs or path in file.refused:
            shape = tuple(f"n_{name}_{axis}" for axis in range(len(file.spec(path).shape)))
            arrays, _ = file.read([Field(path, NUMBER, shape)], {}, verify=True)
            found[name] = arrays[path].reshape(-1).tolist()
    return found | told(file, "losses@log_loss_frequency")


def _vectors(file: Container, name: str, sizes: Sizes, least: int | None) -> Array:
    """G or H, ``(r, columns)`` float64, at most as many columns as are listed.

    Raises:
        StorageError: The file contradicts itself.
    """
    path, listed = file.path, sizes["n_listed"]
    if name in file.specs or f"{name}/values" not in file.specs:
        arrays, _ = file.read([Field(name, NUMBER, ("n_components", "n_columns"), least=least)], sizes, verify=True)
        dense = np.asarray(arrays[name], np.float64)
    else:
        shape = file.attribute(f"{name}@shape", list)
        if len(shape) != 2 or not all(type(size) is int and size >= 0 for size in shape):
            raise StorageError(f"{path}: attribute '{name}@shape' is damaged: expected two sizes, got {shape}")
        if shape[0] != sizes["n_components"] or shape[1] > listed:
            raise StorageError(
                f"{path}: damaged: sparse H of shape {tuple(shape)} does not fit {sizes['n_components']} components "
                f"and {listed} columns"
            )
        nbytes, stored = 8 * shape[0] * shape[1], path.stat().st_size
        if nbytes > max(LEAST_ALLOWED, MOST_TIMES * stored):
            raise StorageError(
                f"{path}: damaged: sparse H of shape {tuple(shape)} would take {nbytes:,} bytes of memory, and the "
                f"whole file has {stored:,}"
            )
        sizes["n_columns"] = shape[1]
        fields = [
            Field(f"{name}/values", NUMBER, ("n_entries",), least=least),
            Field(f"{name}/row_indices", WHOLE, ("n_components + 1",), ascends_to="n_entries"),
            Field(f"{name}/column_indices", WHOLE, ("n_entries",), least=0, below="n_columns"),
        ]
        arrays, _ = file.read(fields, sizes, verify=True)
        offsets: Array = arrays[f"{name}/row_indices"].astype(np.int64)
        rows = np.repeat(np.arange(shape[0]), offsets[1:] - offsets[:-1])
        columns = arrays[f"{name}/column_indices"].astype(np.int64)
        if len(np.unique(rows * max(1, shape[1]) + columns)) != len(rows):
            refuse(path, f"{name}/column_indices", "every column once per row")
        dense = np.zeros(shape)
        dense[rows, columns] = arrays[f"{name}/values"]
    if dense.shape[1] > listed:
        raise StorageError(f"{path}: damaged: vectors {dense.shape} and {listed} columns do not fit together")
    return dense


def plan_decomposition(components: Components, path: Path, sparse: bool | None) -> PublishedLayout:
    """The layout, datasets and attributes that hold ``components``.

    Raises:
        ArgumentError: Their vectors in parameter space were not recovered.
        StorageError: They were fitted with weights per parameter, which the layouts cannot say, or indices do
            not fit.
    """
    m = components.parameters.n_parameters
    if m > INT32:
        raise StorageError(f"{path}: the published layouts index parameters with int32; {m:,} parameters do not fit")
    if components.block_weights and any(weight != 1 for weight in components.block_weights.values()):
        raise StorageError(
            f"{path}: these components were fitted with weights per parameter, and the published layouts "
            "have no place for them; "
            "decompose without block weights, or save in npeff's own format"
        )
    columns = np.arange(m) if components.columns is None else components.columns
    vectors = components.vectors
    check_recovered(components, range(components.n_components))
    if components.compression in ("sketch", "gram"):  # factorised elsewhere: what was recovered counts
        vectors = np.stack([components.vector(j) for j in range(components.n_components)])
    data = [Data.of("data/W", components.coefficients, "<f4")]
    if components.kind == "low_rank":
        data += [Data.of("data/G", vectors, "<f4"), Data.of("data/new_to_old_col_indices", columns, "<i4")]
        data += [
            Data.of("losses/G_only", np.zeros(0), "<f4"),
            Data.of("losses/joint", components.loss_curve, "<f4"),
        ]
        n_classes = int(components.provenance.get("n_classes") or components.logits.shape[1])
        about = {"n_parameters": np.int64(m), "n_classes": np.int64(n_classes)}
        losses = {
            "log_loss_frequency": np.int64(1),
            "definition": "npeff: L / sum_i ||A_i A_i^T||^2, not the published scale",
        }
        return "low_rank_decomposition", data, {"data": about, "losses": losses}
    kept = Data.of("data/reduce_kept_indices", columns, "<i4")
    attributes: dict[str, dict[str, Any]] = {"data/reduce_kept_indices": {"full_dense_size": np.int64(m)}}
    rows, where = np.nonzero(vectors)
    if sparse or (sparse is None and 2 * len(rows) < vectors.size):
        starts = np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=len(vectors)))])
        data += [
            Data.of("data/H/values", vectors[rows, where], "<f4"),
            Data.of("data/H/row_indices", starts, "<i8"),
        ]
        data += [Data.of("data/H/column_indices", where, "<i4"), kept]
        attributes["data/H"] = {"shape": np.array(vectors.shape, np.int64)}
    else:
        data += [Data.of("data/H", vectors, "<f4"), kept]
    return "diagonal_decomposition", data, attributes
