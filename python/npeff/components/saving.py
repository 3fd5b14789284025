"""Save Components: all of them as one HDF5 container, one component's vector as a safetensors file."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save

from npeff.components.factorisation import Factorisation
from npeff.errors import StorageError
from npeff.fishers.file_format import check_saved, n_classes
from npeff.storage.container import open_container, write_container
from npeff.storage.fields import FLOAT, INT, Field
from npeff.storage.files import atomic, path_of
from npeff.storage.hdf5 import Data
from npeff.storage.recognition import check_components_target, refuse_npeff_file

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
    Field("factored", INT, ("n_factored",), least=0, below="n_components", ascending_in="", optional=True),
    Field("factored_vectors", FLOAT, ("n_factored", "n_factors"), optional=True),
    Field("factored_lost", FLOAT, ("n_factored", "n_tensors"), least=0, optional=True),
)


def save_components(components: Factorisation, path: Path | str) -> Path:
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
    components.verify()
    source = components.provenance.get("fishers") or {}
    known = {
        "n_parameters": components.parameters.n_parameters,
        "n_classes": n_classes(source.get("options") or {}, components.logits.shape[1]),
    }
    check_saved("components", components.to_arrays(), COMPONENTS, known)
    arrays = [Data.of(f"arrays/{name}", np.asarray(array)) for name, array in sorted(components.to_arrays().items())]
    n, r = components.coefficients.shape
    attributes: dict[str, Any] = {"kind": components.kind, "n_examples": np.int64(n), "n_components": np.int64(r)}
    attributes["n_parameters"] = np.int64(components.parameters.n_parameters)
    with atomic(path) as scratch:
        write_container(scratch, "components", [Data.json("meta", components.meta()), *arrays], attributes)
    return path


def update_file(components: Factorisation, path: Path) -> None:
    """Write Components over the file that they came from, with the vectors that were recovered since.

    Nothing is written where the file holds other components by now; where it cannot be written, a warning says so.
    """
    try:
        if np.array_equal(open_container(path).array("arrays/coefficients"), components.coefficients):
            save_components(components, path)
    except StorageError as error:
        warnings.warn(f"the vectors that were recovered could not be kept: {error}", stacklevel=4)


def write_state_dict(components: Factorisation, j: int, path: str | Path) -> Path:
    """Write component j as a safetensors file; see :meth:`npeff.Components.save_state_dict`."""
    path = path_of(path)
    refuse_npeff_file(path)
    about = {"component": j, "kind": components.kind, **components.provenance}
    tensors = {
        name: torch.from_numpy(block.copy())
        for name, block in components.parameters.unflatten(components.vector(j)).items()
    }
    content = save(tensors, {"npeff": json.dumps(about, default=str)})
    with atomic(path) as scratch:
        scratch.write_bytes(content)
    return path
