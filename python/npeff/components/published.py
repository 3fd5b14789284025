"""Read and write the file layouts of the published NPEFF code (Matena & Raffel 2023).

=============================  ======================================================================
``low_rank_fishers``           fixed rank: every example has the same number of rows
``low_rank_fishers_variable``  ranks differ between examples
``diagonal_fishers``           one non-negative row per example
``low_rank_decomposition``     W and G; G there is not unit-norm, npeff's is: ``W_ij *= ‖g_j‖²``
``diagonal_decomposition``     W and H, dense or sparse; ``W_ij *= ‖h_j‖``
=============================  ======================================================================

These layouts know no parameter names: what is read has one parameter, ``"parameters"``, of shape ``(m,)``.
They keep the same number k of entries for every example: shorter examples are padded with explicit zeros,
which reading drops again.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from npeff.components.components import Components
from npeff.errors import ArgumentError, ForeignFileError, StorageError
from npeff.fishers.file_format import example_arrays, example_fields
from npeff.fishers.fishers import Fishers
from npeff.fishers.logits import Logits
from npeff.fishers.published_fishers import (
    INT32,
    NUMBER,
    WHOLE,
    PublishedLayout,
    n_parameters_of,
    plan_fishers,
    read_diagonal,
    read_low_rank,
    told,
    unnamed,
)
from npeff.storage.checks import Field, Sizes, refuse
from npeff.storage.container import LAYOUTS, Container, check_replaceable, open_file
from npeff.storage.files import atomic, check_target, path_of
from npeff.storage.hdf5 import LEAST_ALLOWED, MOST_TIMES
from npeff.storage.writing import Data, write_hdf5

Array = npt.NDArray[Any]


def read_published(path: Path | str, *, fishers: Fishers | None = None) -> Fishers | Components:
    """Open a file in one of the published layouts; it is read into memory.

    Args:
        path: The file.
        fishers: For a decomposition: the Fishers it was fitted to. They supply what that layout lacks
            (labels, logits, ids, norms, parameter names); without them labels are −1, norms NaN, and logits
            have no columns.

    Returns:
        Fishers or Components.

    Raises:
        StorageError: The file is not there, or contradicts itself.
        TruncatedFileError: It is cut short.
        ForeignFileError: It has none of the layouts.
    """
    path = path_of(path)
    found = open_file(path)
    if found.is_npeff or not found.content:
        raise ForeignFileError(f"{path}: an HDF5 file, but not in a published layout ({', '.join(LAYOUTS)})")
    return published_in(found, fishers)


def published_in(file: Container, fishers: Fishers | None = None) -> Fishers | Components:
    """Read Fishers or Components from a file that is known to have a published layout; see :func:`read_published`."""
    if file.content.endswith("decomposition"):
        return read_decomposition(file, fishers)
    return read_diagonal(file) if file.content == "diagonal_fishers" else read_low_rank(file)


def write_published(
    item: Fishers | Components, path: Path | str, *, variable: bool | None = None, sparse: bool | None = None
) -> Path:
    """Write Fishers or Components in the published layout that fits.

    Dense rows are written by their non-zero entries, so nothing is lost; k is the largest number of entries
    of any example, and shorter examples are padded with zeros at the lowest parameter indices their rows do
    not use. Parameter names and provenance have no place in these layouts. Losses are npeff's (relative), not
    on the scale of the published logs.

    Args:
        item: Fishers or Components.
        path: Where; an existing file is replaced only if it has the same layout.
        variable: Low-rank Fishers: force the variable-rank (True) or the fixed-rank layout; by default as the
            ranks are.
        sparse: Diagonal components: force H sparse or dense; by default whichever is smaller.

    Returns:
        ``path``.

    Raises:
        StorageError: The layout cannot hold it (says what and why), or the disk refuses.
        ArgumentError: ``item`` is neither.
    """
    path = path_of(path)
    check_target(path)
    if isinstance(item, Fishers) and not item.in_parameter_space:
        raise StorageError(
            f"{path}: the published layouts hold rows in parameter space, and these are sketches or inner products, "
            "from which the rows do not come back; compute Fishers with TopK(k) or compress=None (npeff fishers "
            "--top-k N or --exact) for that"
        )
    if isinstance(item, Fishers):
        item.verify()
        layout, data, attributes = plan_fishers(item, path, variable)
    elif hasattr(item, "coefficients"):
        layout, data, attributes = plan_decomposition(item, path, sparse)
    else:
        raise ArgumentError(f"item: expected Fishers or Components, got {type(item).__name__}")
    check_replaceable(path, layout)
    with atomic(path) as scratch:
        write_hdf5(scratch, data, attributes)
    return path


def describe_published(file: Container) -> dict[str, Any]:
    """Describe a file in a published layout without reading its arrays: sizes, attributes, shapes."""
    arrays = {name: [list(spec.shape), str(spec.dtype)] for name, spec in file.specs.items()}
    firsts = ("data/W", "data/labels", "data/fisher/values", "data/values")
    first = next((file.specs[name].shape for name in firsts if name in file.specs), ())
    sizes = ("data@n_parameters", "data/fisher@dense_fisher_size", "data/reduce_kept_indices@full_dense_size")
    found = next((file.attributes[name] for name in sizes if name in file.attributes), None)
    return {
        "kind": "diagonal" if file.content.startswith("diagonal") else "low_rank",
        "n_examples": first[0] if first else None,
        "n_parameters": found[0] if isinstance(found, list) and found else found,
        "attributes": dict(file.attributes),
        "arrays": arrays,
    }


def read_decomposition(file: Container, fishers: Fishers | None) -> Components:
    """Read a decomposition; vectors are made unit-norm, their scale moved into the coefficients.

    Raises:
        ArgumentError: The Fishers are not those of the decomposition.
        StorageError: The file contradicts itself, or holds coefficients only.
    """
    path = file.path
    provenance: dict[str, Any] = {"source": "published layout", "layout": file.content}
    low_rank = file.content == "low_rank_decomposition"
    weights = Field("data/W", NUMBER, ("n_examples", "n_components"), least=0)
    kept = "data/new_to_old_col_indices" if low_rank else "data/reduce_kept_indices"
    m = n_parameters_of(file, "data@n_parameters" if low_rank else f"{kept}@full_dense_size", kept)
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
        coefficients = (arrays["data/W"].astype(np.float64) * norms ** (2 if low_rank else 1)).astype(np.float32)
    if not np.isfinite(coefficients).all() or not np.isfinite(norms).all():
        refuse(path, "data/W", "coefficients within the range of float32")
    whole = np.array_equal(columns[order], np.arange(m)) if len(columns) == m else False
    n = len(coefficients)
    if fishers is not None and (len(fishers) != n or fishers.n_parameters != m):
        raise ArgumentError(
            f"fishers: expected the {n} examples over {m} parameters of {path}, got {len(fishers)} over "
            f"{fishers.n_parameters}"
        )
    if fishers is not None:
        known = {"parameters": fishers.parameters, **example_fields(example_arrays(fishers))}
    else:
        norms, logits = np.full(n, np.nan, np.float32), Logits(np.zeros((n, 0), np.float32))
        known = {"parameters": unnamed(m), "norms": norms, "logits": logits}
        known |= {"labels": np.full(n, -1, np.int64), "ids": np.arange(n)}
    return Components(
        kind="low_rank" if low_rank else "diagonal",
        coefficients=coefficients,
        vectors=unit,
        columns=None if whole else columns[order],
        block_weights=None,
        loss_curve=np.zeros(0),
        loss=float("nan"),
        provenance=provenance,
        **known,
    )


def _losses(file: Container) -> dict[str, Any]:
    """Read the losses logged by the published code: not comparable with npeff's, kept as they are."""
    found: dict[str, Any] = {}
    for name in ("G_only", "joint"):
        if (path := f"losses/{name}") in file.specs or path in file.refused:
            shape = tuple(f"n_{name}_{axis}" for axis in range(len(file.spec(path).shape)))
            arrays, _ = file.read([Field(path, NUMBER, shape)], {}, verify=True)
            found[name] = arrays[path].reshape(-1).tolist()
    return found | told(file, "losses@log_loss_frequency")


def _vectors(file: Container, name: str, sizes: Sizes, least: int | None) -> Array:
    """Read G or H, ``(r, columns)`` float64, at most as many columns as are listed.

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
    """Lay out ``components``: the layout's name, datasets and attributes.

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
    components.check_recovered(range(components.n_components))
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
