"""Stage 2: Fishers → components."""

from __future__ import annotations

import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from npeff.components.components import Components
from npeff.decomposition.choice import SpaceName
from npeff.decomposition.forms import State
from npeff.decomposition.options import Algorithm, Options, checked_and_scaled
from npeff.decomposition.problem import Problem
from npeff.decomposition.published_algorithm import PublishedOptions
from npeff.decomposition.search_state import Callback
from npeff.errors import ArgumentError, DataError
from npeff.fishers.fishers import Fishers
from npeff.fishers.scaling import BlockWeights, Normalize
from npeff.models.devices import usable_device

Array = npt.NDArray[Any]


def decompose(
    fishers: Fishers,
    n_components: int,
    *,
    seed: int = 0,
    algorithm: Algorithm = "npeff",
    space: SpaceName = "auto",
    starts: int = 3,
    moves: int = 40,
    patience: int = 15,
    max_iterations: int = 500,
    tolerance: float = 1e-6,
    block_weights: BlockWeights = "energy",
    normalize: Normalize = "stored",
    orthogonality: float | Literal["hard"] = 0.0,
    min_nonzero_per_column: int = 1,
    dtype: Literal["float32", "float64"] = "float32",
    published: PublishedOptions | None = None,
    init: tuple[Array, Array] | None = None,
    checkpoint: str | Path | None = None,
    callback: Callback | None = None,
    progress: bool = True,
    device: str | torch.device = "cpu",
    memory: int | str | None = None,
) -> Components:
    """Factorise per-example Fishers into non-negative sums of shared components.

    Low-rank: minimise ``Σ_i ‖A_iᵀA_i − Σ_j W_ij g_j g_jᵀ‖_F²`` over W ≥ 0 and G; diagonal: minimise
    ``Σ_i ‖f_i − Σ_j W_ij h_j‖²`` over W, H ≥ 0 (Matena & Raffel 2023). Every Fisher is scaled to unit norm first.

    Args:
        fishers: The Fishers, either kind.
        n_components: Number of components, r; at most the number of rows.
        seed: Determines every random choice.
        algorithm: ``"npeff"``: exact line search, starts and moves; ``"published"``: the authors' fixed-rate algorithm.
        space: ``"gram"`` works on K = A Aᵀ, ``"sparse"`` on the rows in memory, ``"sketch"`` on rows that are
            streamed from where they are stored; ``"auto"``: the cheapest that fits into memory.
        starts: Random starts, of which the best goes on.
        moves: At most so many attempts to replace components by better ones.
        patience: Moves in vain after which the search ends.
        max_iterations: Limit of each descent.
        tolerance: Relative decrease of the loss over five iterations at which the final descent ends.
        block_weights: ``"energy"`` (as they are), ``"balanced"`` (equal share per layer), or a mapping from name
            patterns to weights.
        normalize: Norm that is scaled to 1: of the rows as ``"stored"``, of the ``"dense"`` Fisher before
            compression, or ``"none"``.
        orthogonality: λ of the penalty ``λ·n·Σ_{j≠k} cos²(g_j, g_k)``, or ``"hard"`` for orthonormal vectors
            (low-rank kind only).
        min_nonzero_per_column: Drop parameters with fewer non-zero entries (published code: column pruning).
        dtype: Precision of the solver's products; ``"float64"`` for checks.
        published: Options of the published algorithm.
        init: ``(W (n, r), G (r, n_parameters))`` to descend from in place of random starts.
        checkpoint: A file that keeps the search's state; the same call with the same file resumes there.
        callback: Called with a :class:`npeff.Progress` after every iteration; a true answer ends the search.
        progress: Show a progress bar.
        device: Where the solver's products run.
        memory: Ceiling, ``"4GB"`` or bytes, for what the decomposition holds beyond the Fishers' small arrays and
            the result; rows then stay on disk, or K is not built, where they would exceed it.

    Returns:
        The components, largest total coefficient first.

    Raises:
        ArgumentError: An option is out of range, there are more components than rows, or the memory allowed does
            not hold the space asked for.
        DataError: There are no examples, every Fisher is zero, or a stored value is not finite.
        ResumeError: The checkpoint belongs to other Fishers or other options.
    """
    if published is not None and algorithm != "published":
        raise ArgumentError("published: these options belong to algorithm='published'")
    if callback is not None and not callable(callback):
        raise ArgumentError(f"callback: expected a callable, got {type(callback).__name__}")
    options = Options(
        n_components, seed, algorithm, space, starts, moves, patience, max_iterations, tolerance, block_weights,
        normalize, orthogonality, min_nonzero_per_column, dtype, published or PublishedOptions(), memory,
    )  # fmt: skip
    place = usable_device(device)
    scaled, plan = checked_and_scaled(fishers, options, None, place)
    problem = Problem(fishers, scaled, plan, options, place)
    if init is not None and len(init) != 2:
        raise ArgumentError("init: expected a pair (W, G)")
    initial = None if init is None else problem.state_from(*init)
    state, curve, course = problem.solve(initial, checkpoint, callback, progress)
    return components_of(problem, state, curve, course)


def expand(
    components: Components,
    fishers: Fishers,
    n: int,
    *,
    keep_coefficients: bool = False,
    checkpoint: str | Path | None = None,
    callback: Callback | None = None,
    progress: bool = True,
    device: str | torch.device = "cpu",
    **options: Any,
) -> Components:
    """Fit n new components beside given ones, which are frozen.

    Args:
        components: The components to keep.
        fishers: Fishers of the same kind and parameters, of the same examples or of others.
        n: Number of new components.
        keep_coefficients: Keep the coefficients of the frozen components too (same examples only);
            otherwise they are fitted along with the new ones.
        checkpoint: As for :func:`decompose`.
        callback: As for :func:`decompose`.
        progress: As for :func:`decompose`.
        device: As for :func:`decompose`.
        **options: As for :func:`decompose`.

    Returns:
        Components whose first ``components.n_components`` are the given ones.

    Raises:
        ArgumentError: Kind or parameters differ, n is not positive, or an option is unknown or out of range.
    """
    components.check_compatible(fishers)
    if n < 1:
        raise ArgumentError(f"n: expected at least 1 new component, got {n}")
    unknown = set(options) - {
        f
        for f in Options.__dataclass_fields__
        if f not in ("n_components", "algorithm", "published", "block_weights", "normalize")
    }
    if unknown:
        raise ArgumentError(
            f"options: {', '.join(sorted(unknown))} cannot be given to expand; weights and normalisation are "
            "those of the components"
        )
    chosen = Options(
        components.n_components + n,
        block_weights=components.block_weights or "energy",
        normalize=components.provenance.get("normalize", "stored"),
        **options,
    )
    if chosen.orthogonality:
        raise ArgumentError("orthogonality: not available with frozen components; leave it at 0")
    columns = None
    if (counts := fishers.rows.column_counts()) is not None:
        present = np.flatnonzero(counts)
        kept = np.arange(fishers.n_parameters) if components.columns is None else components.columns
        columns = np.union1d(present, kept).astype(np.int64)
    place = usable_device(device)
    scaled, plan = checked_and_scaled(fishers, chosen, columns, place)
    vectors = np.zeros((components.n_components, fishers.rows.n_columns), np.float32)
    vectors[:, slice(None) if components.columns is None else components.columns] = components.vectors
    frozen = torch.from_numpy(vectors if scaled.columns is None else vectors[:, scaled.columns])
    frozen_W = None
    if keep_coefficients:
        same = np.array_equal(components.ids, fishers.ids)
        if not same or (components.logits.shape[1] and not np.array_equal(components.logits, fishers.logits)):
            raise ArgumentError(
                f"keep_coefficients: needs the {len(components.coefficients)} examples that the components "
                f"were made from, in their order; got {len(fishers)} that are not these"
            )
        frozen_W = torch.from_numpy(components.coefficients.copy())
    problem = Problem(fishers, scaled, plan, chosen, place, frozen, frozen_W)
    state, curve, course = problem.solve(None, checkpoint, callback, progress)
    return components_of(problem, state, curve, course | {"expanded_from": components.n_components})


def components_of(problem: Problem, state: State, curve: list[float], course: dict[str, Any]) -> Components:
    """A solved problem as components with unit vectors, new ones ordered by total coefficient.

    Where several processes hold a block of examples each, every one must call it; the coefficients and the weights of
    rows are then those of its block.

    Args:
        problem: What was solved.
        state: Its factorisation.
        curve: Relative loss per iteration.
        course: How the search went.

    Raises:
        DataError: The factorisation is not finite.
    """
    if not -1e-3 < state.loss < math.inf:
        raise DataError(
            f"fishers: the factorisation broke down numerically (relative loss {state.loss:.3g}); "
            "use dtype='float64', or fewer components"
        )
    f, fishers, scaled = state.frozen, problem.fishers, problem.scaled
    total = problem.form.comm.sum(state.W[:, f:].double().sum(0))
    order = torch.cat([torch.arange(f, device=total.device), f + torch.argsort(total, descending=True, stable=True)])
    state = replace(state.keep(order), loss=state.loss)
    vectors = problem.space.vectors(state.coords)
    norms = torch.linalg.vector_norm(vectors, dim=1, dtype=torch.float64).clamp_min(1e-30)
    W = state.W.cpu().float().clone()
    W[torch.from_numpy(scaled.fisher_norms == 0)] = 0
    weights = problem.row_weights(state, norms)
    return Components(
        kind=fishers.kind,
        coefficients=W.numpy(),
        vectors=(vectors / norms[:, None].to(vectors)).float().contiguous().numpy(),
        columns=scaled.columns,
        block_weights=scaled.block_weights,
        parameters=fishers.parameters,
        labels=np.asarray(fishers.labels),
        logits=np.asarray(fishers.logits),
        ids=np.asarray(fishers.ids),
        norms=np.asarray(fishers.norms),
        loss_curve=np.asarray(curve, np.float64),
        loss=float(state.loss),
        provenance={
            "fishers": fishers.provenance,
            "options": asdict(problem.options),
            "normalize": problem.options.normalize,
            "course": course,
        },
        seconds={"building": problem.seconds_building, "solving": problem.seconds_solving},
        row_weights=weights,
        row_offsets=None if weights is None else np.asarray(fishers.row_offsets),
    )
