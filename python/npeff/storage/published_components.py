"""Decompositions in the published layouts: low-rank, and diagonal with dense or sparse H."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import h5py
import numpy as np
import numpy.typing as npt

from npeff.errors import ArgumentError, StorageError
from npeff.fishers import Fishers, Kind
from npeff.parameter_vectors import check_recovered
from npeff.storage.hdf5 import Data
from npeff.storage.published_fishers import INT32, Plan, attribute, dataset, number, unnamed

if TYPE_CHECKING:
    from npeff.components import Components

Array = npt.NDArray[Any]


def read_decomposition(path: Path, file: h5py.File, layout: str, fishers: Fishers | None) -> Components:
    """Read a decomposition; vectors are made unit-norm, their scale moved into the coefficients.

    Raises:
        StorageError: The file contradicts itself, or holds coefficients only.
    """
    provenance: dict[str, Any] = {"source": "published layout", "layout": layout}
    weights = dataset(path, file, "data/W")[()].astype(np.float64)
    if layout == "low_rank_decomposition":
        vectors = dataset(path, file, "data/G")[()].astype(np.float64)
        columns = dataset(path, file, "data/new_to_old_col_indices")[()].astype(np.int64).reshape(-1)
        m = attribute(path, file, "data", "n_parameters")
        power = 2
        if "n_classes" in file["data"].attrs:
            provenance["n_classes"] = number(file["data"].attrs["n_classes"])
        provenance["published_losses"] = _losses(file)
    else:
        kept = dataset(path, file, "data/reduce_kept_indices")
        columns, power = kept[()].astype(np.int64).reshape(-1), 1
        m = attribute(path, file, "data/reduce_kept_indices", "full_dense_size")
        vectors = _read_h(path, dataset(path, file, "data/H"))
    if vectors.shape[1] < len(columns):  # some published files list more columns than G has: the first ones are meant
        provenance["columns_dropped"] = len(columns) - vectors.shape[1]
        columns = columns[: vectors.shape[1]]
    if vectors.shape != (weights.shape[1], len(columns)):
        raise StorageError(
            f"{path}: damaged: W {weights.shape}, vectors {vectors.shape} and {len(columns)} columns do not "
            "fit together"
        )
    if len(columns) and (columns.min() < 0 or columns.max() >= m):
        raise StorageError(f"{path}: damaged: a column index lies outside 0 … {m - 1}")
    order = np.argsort(columns, kind="stable")
    norms = np.linalg.norm(vectors, axis=1)
    unit = (vectors / np.where(norms > 0, norms, 1)[:, None])[:, order].astype(np.float32)
    coefficients = (weights * norms**power).astype(np.float32)
    whole = np.array_equal(columns[order], np.arange(m))
    kind: Kind = "low_rank" if power == 2 else "diagonal"
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
    from npeff.components import Components

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


def _losses(file: h5py.File) -> dict[str, Any]:
    """The losses logged by the published code: not comparable with npeff's, kept as they are."""
    found: dict[str, Any] = {}
    if "losses" in file:
        found = {
            name: file["losses"][name][()].reshape(-1).tolist()
            for name in ("G_only", "joint")
            if name in file["losses"]
        }
        if "log_loss_frequency" in file["losses"].attrs:
            found["log_loss_frequency"] = number(file["losses"].attrs["log_loss_frequency"])
    return found


def _read_h(path: Path, item: h5py.Dataset | h5py.Group) -> Array:
    if isinstance(item, h5py.Dataset):
        return np.asarray(item[()], np.float64)
    shape = tuple(int(size) for size in item.attrs["shape"])
    values, starts, columns = (
        item["values"][()],
        item["row_indices"][()].astype(np.int64),
        item["column_indices"][()],
    )
    if (
        len(starts) != shape[0] + 1
        or starts[-1] != len(values)
        or len(columns) != len(values)
        or (np.diff(starts) < 0).any()
    ):
        raise StorageError(
            f"{path}: damaged: sparse H of shape {shape} has {len(values)} values and {len(starts)} row_indices"
        )
    if len(columns) and (columns.min() < 0 or columns.max() >= shape[1]):
        raise StorageError(f"{path}: damaged: a column of sparse H lies outside 0 … {shape[1] - 1}")
    dense = np.zeros(shape)
    dense[np.repeat(np.arange(shape[0]), np.diff(starts)), columns] = values
    return dense


def plan_decomposition(components: Components, path: Path, sparse: bool | None) -> Plan:
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
