"""A component's vector in parameter space, from wherever it was factorised; and as a file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import save

from npeff.components.factorisation import Factorisation
from npeff.errors import ArgumentError
from npeff.fishers.scaling import column_factors
from npeff.storage.files import atomic, path_of
from npeff.storage.recognition import refuse_npeff_file

Array = npt.NDArray[Any]


def parameter_vector(components: Factorisation, j: int) -> Array:
    """``(n_parameters,)`` float32, unit norm, block weights undone; see :meth:`npeff.Components.vector`.

    Raises:
        ArgumentError: The vectors live in another space, and this one was not recovered.
    """
    if components.compression in ("sketch", "gram"):
        check_recovered(components, [j])
        assert components.recovered is not None and components.recovered_vectors is not None
        return np.array(components.recovered_vectors[int(np.flatnonzero(components.recovered == j)[0])], np.float32)
    entries = components.vectors[j].astype(np.float64)
    columns = slice(None) if components.columns is None else components.columns
    if components.block_weights is not None:
        factor = column_factors(components.parameters, components.block_weights, components.kind)[columns]
        entries = np.divide(entries, factor, out=np.zeros_like(entries), where=factor > 0)
    norm = float(np.linalg.norm(entries))
    vector = np.zeros(components.n_parameters, np.float32)
    vector[columns] = entries / norm if norm else entries
    return vector


def not_recovered(components: Factorisation) -> list[int]:
    """Components whose vectors in parameter space are not known: those of sketches, or of inner products alone."""
    if components.compression not in ("sketch", "gram"):
        return []
    known = set() if components.recovered is None else set(components.recovered.tolist())
    return [j for j in range(components.n_components) if j not in known]


def check_recovered(components: Factorisation, js: Sequence[int]) -> None:
    """Make sure that some components' vectors in parameter space are known.

    Args:
        components: A decomposition.
        js: The components in question.

    Raises:
        ArgumentError: Some are not; the message says how they are recovered.
    """
    unknown = set(not_recovered(components))
    if not (missing := [j for j in dict.fromkeys(js) if j in unknown]):
        return
    kept = "sketches of rows" if components.compression == "sketch" else "inner products of rows"
    named = ",".join(map(str, missing[:8])) + (",…" if len(missing) > 8 else "")
    few = len(missing) < components.n_components
    raise ArgumentError(
        f"component{'s' if len(missing) > 1 else ''} {named}: the vector in parameter space is not known, because the "
        f"Fishers were kept as {kept}. One pass over the data recovers it: on the command line with npeff recover "
        f"COMPONENTS MODEL DATA{f' --component {named}' if few else ''} --out RECOVERED, in Python with "
        f"components = components.recover(model, data{f', js=[{named}]' if few else ''}); then use what that gives"
    )


def write_state_dict(components: Factorisation, j: int, path: str | Path) -> Path:
    """Write component j as a safetensors file; see :meth:`npeff.Components.save_state_dict`."""
    path = path_of(path)
    refuse_npeff_file(path)
    about = {"component": j, "kind": components.kind, **components.provenance}
    tensors = {
        name: torch.from_numpy(block.copy())
        for name, block in components.parameters.unflatten(parameter_vector(components, j)).items()
    }
    content = save(tensors, {"npeff": json.dumps(about, default=str)})
    with atomic(path) as scratch:
        scratch.write_bytes(content)
    return path
