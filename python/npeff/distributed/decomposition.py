"""Decomposition by several processes: each holds a block of examples, the solver's sums go over all of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from npeff.components.components import Components
from npeff.decomposition.decompose import components_of
from npeff.decomposition.decompose import decompose as decompose_alone
from npeff.decomposition.options import WITHOUT_EFFECT, Callback, DecomposeOptions, Progress
from npeff.decomposition.problem import prepare
from npeff.decomposition.processes import Group, Local, connect, ending_together
from npeff.decomposition.search import Search
from npeff.errors import ArgumentError
from npeff.fishers.fishers import Fishers


def decompose(
    fishers: Fishers,
    n_components: int,
    *,
    group: Group | Local | None = None,
    checkpoint: str | Path | None = None,
    callback: Callback | None = None,
    progress: bool = True,
    device: str | torch.device = "cpu",
    **options: Any,
) -> Components | None:
    """Factorise Fishers with all processes; the result is that of one, up to rounding.

    Every process calls it with the same Fishers (opened from one file, of which each reads its block) and the same
    options. W and the projections are spread by examples; a step exchanges r·(d + r) numbers and a handful of scalars,
    whatever the number of examples. Works on the rows, never on K = A Aᵀ.

    Args:
        fishers: All Fishers, either kind, with rows.
        n_components: Number of components.
        group: The processes; by default those that :func:`npeff.distributed.connect` finds.
        checkpoint: A file that keeps the search's state, on a disk that all processes see; the same call resumes, with
            any number of processes. As for :func:`npeff.decompose`, the caller removes the file.
        callback: Called in process 0, as by :func:`npeff.decompose`.
        progress: Show process 0's progress bar.
        device: Where products run; ``"cuda"`` is the GPU of the process.
        **options: As for :func:`npeff.decompose`, without ``init``.

    Returns:
        The components in process 0, None in the others.

    Raises:
        ArgumentError: An option has a wrong value, or does not go with several processes.
        DataError: There is nothing to decompose, or a stored value is not finite.
        ResumeError: The checkpoint belongs to other Fishers or other options.
        WorkerError: Another process failed or is gone.
    """
    group = connect() if group is None else group
    ours = {"checkpoint": checkpoint, "callback": callback, "progress": progress, "device": device}
    if isinstance(group, Local):
        return decompose_alone(fishers, n_components, **ours, **options)  # type: ignore[arg-type]
    known = [one.name for one in fields(DecomposeOptions) if one.name not in (*WITHOUT_EFFECT, "published")]
    unknown = [name for name in options if name not in known]
    if unknown:
        raise ArgumentError(f"options: {', '.join(unknown)} cannot be given to several processes")
    ours["progress"] = progress and group.rank == 0
    ours["callback"] = None if callback is None else _asked_once(callback, group)
    if torch.device(device) == torch.device("cuda"):
        ours["device"] = torch.device("cuda", torch.cuda.current_device())
    with ending_together(group):
        chosen = group.together(lambda: DecomposeOptions(n_components, **ours, **options))  # type: ignore[arg-type]
        problem = prepare(fishers, chosen, group)
        result = Search(problem).run()
        part = group.together(lambda: components_of(problem, result))
        return _joined(part, fishers, group)


def _joined(part: Components, fishers: Fishers, group: Group) -> Components | None:
    """Join the components of each process's block into those of all examples, in process 0."""
    coefficients = group.collected(torch.from_numpy(part.coefficients))
    weights = None if part.row_weights is None else group.collected(torch.from_numpy(part.row_weights))
    if coefficients is None:
        return None
    return replace(
        part,
        coefficients=coefficients.numpy(),
        row_weights=None if weights is None else weights.numpy(),
        row_offsets=None if weights is None else np.asarray(fishers.row_offsets),
        labels=np.asarray(fishers.labels),
        logits=fishers.logits,
        places=fishers.places,
        ids=np.asarray(fishers.ids),
        norms=np.asarray(fishers.norms),
    )


def _asked_once(callback: Callable[[Progress], Any], group: Group) -> Callable[[Progress], bool]:
    """Make a callback that is called in process 0 alone, its answer known to all."""
    return lambda progress: bool(group.agreed(float(bool(group.rank == 0 and callback(progress)))))
