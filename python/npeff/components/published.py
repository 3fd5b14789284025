"""The file layouts of the published NPEFF code (Matena & Raffel 2023), read and written.

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

from dataclasses import replace
from pathlib import Path
from typing import Any

from npeff.components.components import Components
from npeff.components.published_components import plan_decomposition, read_decomposition
from npeff.errors import ArgumentError, ForeignFileError, StorageError
from npeff.fishers.fishers import Fishers
from npeff.fishers.published_fishers import plan_fishers, read_diagonal, read_low_rank
from npeff.storage.container import Container, open_file
from npeff.storage.files import atomic, check_target, path_of
from npeff.storage.hdf5 import write_hdf5
from npeff.storage.recognition import LAYOUTS, check_replaceable, layout_of


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
    layout = None if found.is_npeff else layout_of(found)
    if layout is None:
        raise ForeignFileError(f"{path}: an HDF5 file, but not in a published layout ({', '.join(LAYOUTS)})")
    return published_in(replace(found, content=layout), fishers)


def published_in(file: Container, fishers: Fishers | None = None) -> Fishers | Components:
    """The Fishers or Components in a file that is known to have a published layout; see :func:`read_published`."""
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
    elsewhere = isinstance(item, Fishers) and item.kept_elsewhere
    if elsewhere:
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
    check_replaceable(path, lambda found: found.content == layout and not found.is_npeff, f"a published {layout} file")
    with atomic(path) as scratch:
        write_hdf5(scratch, data, attributes)
    return path


def describe_published(path: Path) -> dict[str, Any]:
    """What a file in a published layout holds, without reading its arrays: sizes, attributes, shapes."""
    file = open_file(path)
    arrays = {name: [list(spec.shape), str(spec.dtype)] for name, spec in file.specs.items()}
    firsts = ("data/W", "data/labels", "data/fisher/values", "data/values")
    first = next((file.specs[name].shape for name in firsts if name in file.specs), ())
    sizes = ("data@n_parameters", "data/fisher@dense_fisher_size", "data/reduce_kept_indices@full_dense_size")
    found = next((file.attributes[name] for name in sizes if name in file.attributes), None)
    return {
        "kind": "diagonal" if (layout_of(file) or "").startswith("diagonal") else "low_rank",
        "n_examples": first[0] if first else None,
        "n_parameters": found[0] if isinstance(found, list) and found else found,
        "attributes": dict(file.attributes),
        "arrays": arrays,
    }
