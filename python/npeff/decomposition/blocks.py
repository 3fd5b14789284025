"""Each process's block of examples, and what must be known of all blocks before any can be scaled."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from npeff.decomposition.choice import Plan
from npeff.decomposition.communicator import Group
from npeff.decomposition.options import Options, checked_and_scaled
from npeff.decomposition.place import Place
from npeff.errors import ArgumentError, DataError
from npeff.fishers.fishers import Fishers
from npeff.fishers.scaling import ScaledRows, resolve_block_weights

Array = npt.NDArray[Any]


def edges(fishers: Fishers, size: int) -> list[int]:
    """Where blocks of about as many entries begin and end: ``size + 1`` ascending example numbers.

    Raises:
        ArgumentError: There are fewer examples than processes.
    """
    n = len(fishers)
    if n < size:
        raise ArgumentError(f"distributed: {size} processes cannot share {n} examples; start fewer")
    rows = np.asarray(fishers.row_offsets)
    at = fishers.rows.starts(rows)
    cuts = [0]
    for k in range(1, size):
        cut = int(np.searchsorted(at, at[-1] * k / size))
        cuts.append(min(max(cut, cuts[-1] + 1), n - size + k))
    return [*cuts, n]


def block(fishers: Fishers, start: int, stop: int) -> Fishers:
    """Examples ``start … stop − 1``; rows that are mapped from a file stay so.

    Raises:
        ArgumentError: There are inner products alone.
    """
    first, last = int(fishers.row_offsets[start]), int(fishers.row_offsets[stop])
    if fishers.rows.products_only:
        raise ArgumentError(
            "fishers: inner products alone (GramOnly) cannot be shared out; decompose them in one process, or compute "
            "Fishers with TopK(k) or Sketch(d)"
        )
    part = fishers.rows.part(first, last)
    arrays = {name: getattr(fishers, name)[start:stop] for name in ("norms", "logits", "labels", "ids")}
    if fishers.check is not None:  # every process checks its own rows
        fishers.check(part)
    offsets = np.asarray(fishers.row_offsets[start : stop + 1]) - first
    return replace(fishers, rows=part, row_offsets=offsets, path=None, check=None, **arrays)


def scaled_block(
    fishers: Fishers, options: Options, group: Group, device: torch.device
) -> tuple[Fishers, ScaledRows, Plan, Place]:
    """This process's block, scaled as one process would scale it; ``device`` is where its products take place.

    Raises:
        ArgumentError: An option does not go with several processes, or there are more components than rows.
        DataError: There is nothing to decompose.
    """
    if options.algorithm != "npeff" or options.space == "gram":
        what = "algorithm: the published algorithm" if options.algorithm != "npeff" else "space: 'gram'"
        raise ArgumentError(f"{what} cannot be shared out among processes; use one, or leave the option out")
    if options.n_components > fishers.rows.n_rows:
        raise ArgumentError(
            f"n_components: expected at most the {fishers.rows.n_rows} rows of the {len(fishers)} Fishers, "
            f"got {options.n_components}"
        )
    cuts = edges(fishers, group.size)
    own = block(fishers, cuts[group.rank], cuts[group.rank + 1])
    # Read by process 0 alone: the energies are sums over all rows, and the same bits must reach every process.
    weights = group.objects(
        group.together(lambda: resolve_block_weights(fishers, options.block_weights) if group.rank == 0 else None)
    )[0]
    columns = None
    if (found := own.rows.column_counts()) is not None:
        counts = torch.zeros(own.rows.n_columns, dtype=torch.int64)
        counts[: len(found)] = torch.from_numpy(found)
        kept = group.sum(counts) >= max(1, options.min_nonzero_per_column)
        columns = kept.nonzero()[:, 0].numpy()
        if not len(columns):
            raise DataError(
                f"fishers: no parameter has {options.min_nonzero_per_column} non-zero entries; lower "
                "min_nonzero_per_column"
            )
    resolved = replace(options, block_weights="energy" if weights is None else _exactly(weights))
    scaled, plan = group.together(lambda: checked_and_scaled(own, resolved, columns, device, block=True))
    if not group.number(float(np.abs(scaled.fisher_norms).sum())):
        raise DataError(f"fishers: all {len(fishers)} are zero: nothing to decompose")
    lengths = group.lengths(own.rows.n_rows)
    place = Place(group, cuts[group.rank], len(fishers), sum(lengths[: group.rank]), sum(lengths))
    return own, replace(scaled, block_weights=weights), plan, place


def _exactly(weights: dict[str, float]) -> dict[str, float]:
    """The same weights under patterns that match their names and nothing else."""
    return {
        name.replace("[", "[[]").replace("*", "[*]").replace("?", "[?]"): weight for name, weight in weights.items()
    }
