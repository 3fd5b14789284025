"""A component's vector in parameter space, from wherever it was factorised; and as a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from npeff.errors import ArgumentError
from npeff.solver.scaling import column_factors

if TYPE_CHECKING:
    from npeff.components import Components

Array = npt.NDArray[Any]


def parameter_vector(components: Components, j: int) -> Array:
    """``(n_parameters,)`` float32, unit norm, block weights undone; see :meth:`npeff.Components.vector`.

    Raises:
        ArgumentError: The vectors live in another space, and this one was not recovered.
    """
    if components.compression in ("sketch", "gram"):
        known, vectors = components.recovered, components.recovered_vectors
        if known is None or vectors is None or j not in known:
            kept = "sketches of them" if components.compression == "sketch" else "their inner products"
            raise ArgumentError(
                f"component {j}: its vector in parameter space is not known, because the Fishers were kept as {kept}; "
                f"components = components.recover(model, data, js=[{j}]) computes it in one pass over the data"
            )
        return np.array(vectors[int(np.flatnonzero(known == j)[0])], np.float32)
    entries = components.vectors[j].astype(np.float64)
    columns = slice(None) if components.columns is None else components.columns
    if components.block_weights is not None:
        factor = column_factors(components.parameters, components.block_weights, components.kind)[columns]
        entries = np.divide(entries, factor, out=np.zeros_like(entries), where=factor > 0)
    norm = float(np.linalg.norm(entries))
    vector = np.zeros(components.n_parameters, np.float32)
    vector[columns] = entries / norm if norm else entries
    return vector


def write_state_dict(components: Components, j: int, path: str | Path) -> Path:
    """Write component j as a safetensors file; see :meth:`npeff.Components.save_state_dict`."""
    from safetensors.torch import save

    from npeff.storage import refuse_npeff_file
    from npeff.storage.files import atomic, path_of

    path = path_of(path)
    refuse_npeff_file(path)
    about = {"component": j, "kind": components.kind, **components.provenance}
    tensors = {name: tensor.contiguous() for name, tensor in components.state_dict(j).items()}
    content = save(tensors, {"npeff": json.dumps(about, default=str)})
    with atomic(path) as scratch:
        scratch.write_bytes(content)
    return path
