"""Stage 2: Fishers → components, by the search or by the published algorithms, step for step."""

from __future__ import annotations

import math
import time
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from npeff.components.components import Components
from npeff.decomposition.checkpoint import SearchState
from npeff.decomposition.kinds import LowRank
from npeff.decomposition.options import Algorithm, Callback, DecomposeOptions, Progress, PublishedOptions, SpaceName
from npeff.decomposition.problem import Problem, prepare
from npeff.decomposition.search import Search, progress_bar
from npeff.decomposition.spaces import RowSpace
from npeff.errors import ArgumentError, DataError, check_integer
from npeff.fishers.block_weights import BlockWeights
from npeff.fishers.file_format import example_arrays, example_fields
from npeff.fishers.fishers import Fishers
from npeff.fishers.scaling import Normalize

Array = npt.NDArray[Any]

DIVERGED = 1e3
"""Relative loss above which the fixed-rate steps are given up."""

MU_EPS = 1e-9
"""Added to the denominators of multiplicative updates."""


def decompose(
    fishers: Fishers,
    n_components: int,
    *,
    seed: int = 0,
    algorithm: Algorithm = "npeff",
    space: SpaceName = "auto",
    n_init: int = 3,
    n_replacements: int = 40,
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
        n_components: Number of components, r; at most the number of rows. More than there are examples give a warning:
            r = the number of rows has the rows themselves as a solution, with loss 0.
        seed: Determines every random choice.
        algorithm: ``"npeff"``: exact line search, random starts and replacements; ``"published"``: the authors'
            fixed-rate algorithm.
        space: ``"gram"`` works on K = A Aᵀ, ``"rows"`` on the rows in memory, ``"streamed"`` on rows that are read
            from the file in every product; ``"auto"``: the cheapest that fits into memory.
        n_init: Random starts, of which the best goes on.
        n_replacements: Limit of attempts to replace components by better ones.
        patience: Successive failed replacements after which the search ends.
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
        checkpoint: A file that keeps the search's state; the same call with the same file resumes there. The file
            stays when the search has ended, and the same call then gives the same components at once, so that a kill
            loses nothing; remove the file once the components are saved, as the command line does.
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
    options = DecomposeOptions(**{name: value for name, value in locals().items() if name != "fishers"})
    problem = prepare(fishers, options)
    result = run_published(problem) if algorithm == "published" else Search(problem).run()
    return components_of(problem, result)


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
    if not isinstance(components, Components):
        raise ArgumentError(f"components: expected Components, got {type(components).__name__}")
    components.check_compatible(fishers)
    check_integer("n", n)
    given = ("n_components", "algorithm", "published", "block_weights", "normalize", "min_nonzero_per_column", "init")
    unknown = set(options) - {one.name for one in fields(DecomposeOptions) if one.name not in given}
    if unknown:
        raise ArgumentError(
            f"options: {', '.join(sorted(unknown))} cannot be given to expand; weights, normalisation and "
            "columns are those of the components"
        )
    chosen = DecomposeOptions(
        components.n_components + n,
        **components.scaling_of(fishers),
        checkpoint=checkpoint,
        callback=callback,
        progress=progress,
        device=device,
        **options,
    )
    if chosen.orthogonality:
        raise ArgumentError("orthogonality: not available with frozen components; leave it at 0")
    columns = None
    if (counts := fishers.rows.column_counts()) is not None:
        present = np.flatnonzero(counts)
        kept = np.arange(fishers.n_parameters) if components.columns is None else components.columns
        columns = np.union1d(present, kept).astype(np.int64)
    frozen = np.zeros((components.n_components, fishers.rows.n_columns), np.float32)
    frozen[:, slice(None) if components.columns is None else components.columns] = components.vectors
    frozen_W = None
    if keep_coefficients:
        if not components.made_from(fishers):
            raise ArgumentError(
                f"keep_coefficients: needs the {len(components.coefficients)} examples that the components "
                f"were made from, in their order; got {len(fishers)} that are not these"
            )
        frozen_W = components.coefficients.copy()
    problem = prepare(fishers, chosen, columns=columns, frozen=frozen, frozen_W=frozen_W)
    return components_of(problem, Search(problem).run(), expanded_from=components.n_components)


def components_of(problem: Problem, result: SearchState, **course: Any) -> Components:
    """Make components of a solved problem: unit vectors, new ones ordered by total coefficient.

    Where several processes hold a block of examples each, every process must call it; the coefficients and the weights
    of rows are then those of its block.

    Args:
        problem: The problem.
        result: Its factorisation, and how the search went.
        **course: Further facts for the record of the search.

    Raises:
        DataError: The factorisation is not finite.
    """
    state = result.best
    assert state is not None
    if not -1e-3 < state.loss < math.inf:
        raise DataError(
            f"fishers: the factorisation broke down numerically (relative loss {state.loss:.3g}); "
            "use dtype='float64', or fewer components"
        )
    f, fishers, scaled, space = state.frozen, problem.own, problem.scaled, problem.objective.space
    total = problem.objective.comm.sum(state.W[:, f:].double().sum(0))
    order = torch.cat([torch.arange(f, device=total.device), f + torch.argsort(total, descending=True, stable=True)])
    state = replace(state.keep(order), loss=state.loss)
    vectors = space.vectors(state.coords)
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
        **example_fields(example_arrays(fishers)),
        loss_curve=np.asarray(result.curve, np.float64),
        loss=float(state.loss),
        provenance={
            "fishers": fishers.provenance,
            "options": problem.options.record(),
            "normalize": problem.options.normalize,
            "course": {
                "iterations": result.iteration,
                "replacements": max(0, result.unit - problem.options.n_init),
                "replacements_kept": result.kept,
                **({} if result.subspace is None else {"subspace": result.subspace}),
                "space": space.name,
                "space_reason": problem.choice.reason,
                **course,
            },
        },
        seconds={"building": problem.seconds, "solving": result.seconds},
        row_weights=weights,
        row_offsets=None if weights is None else np.asarray(fishers.row_offsets),
    )


# ---- the published algorithms -----------------------------------------------------------------------------------


class DivergedError(ArgumentError):
    """The fixed rate was too large: the loss went up without end."""


def run_published(problem: Problem) -> SearchState:
    """Solve a problem by the published algorithm of its kind; the loss may rise.

    Low-rank (Matena & Raffel 2023): steps on G alone, then joint ones, each a multiplicative update of W followed by a
    gradient step of fixed rate on G. Diagonal: multiplicative updates (Lee & Seung 2001) from a uniform start.

    Raises:
        DivergedError: The loss went up without end.
    """
    options, objective = problem.options, problem.objective
    published, r, space = options.published or PublishedOptions(), options.n_components, objective.space
    began, generator = time.perf_counter(), torch.Generator().manual_seed(options.seed)
    assert isinstance(space, RowSpace)
    low_rank = isinstance(objective, LowRank)
    W = torch.rand(objective.n_examples, r, generator=generator).to(space.device, space.dtype)
    if low_rank:
        start = torch.randn(r, space.n_columns, generator=generator) / (r * space.n_columns / 2) ** 0.5
    else:
        start = torch.rand(r, space.n_columns, generator=generator)
    coords, curve, steps = space.embed(start), list[float](), published.g_only + published.joint
    with progress_bar(options) as bar:
        for iteration in range(1, steps + 1):
            joint, Q = iteration > published.g_only, coords @ coords.T
            P = space.project(coords) if joint or low_rank else W
            if joint:
                W = W * objective.cross(P) / (W @ objective.gram(Q) + MU_EPS)
            if isinstance(objective, LowRank):
                gradient = ((W.T @ W) * Q) @ coords - space.combine(objective.spread(W, P))
                coords = coords - 4 * published.learning_rate * gradient
            else:
                coords = coords * space.combine(W) / ((W.T @ W) @ coords + MU_EPS)
            if iteration % published.log_every:
                continue
            curve.append(objective.relative_loss(W, objective.cross(space.project(coords)), coords @ coords.T))
            bar.n = iteration
            bar.set_postfix(loss=f"{curve[-1]:.5f}")
            progress = Progress("published", 0, iteration, curve[-1], curve[-1], time.perf_counter() - began)
            if options.callback is not None and options.callback(progress):
                break
            if low_rank and not curve[-1] < DIVERGED:
                raise DivergedError(
                    f"published: the loss is {curve[-1]:.3g} after {iteration} iterations with learning_rate="
                    f"{published.learning_rate:g}: it diverged. Choose a smaller rate"
                )
    state = objective.from_vectors(coords.contiguous(), W)
    return SearchState(iteration=steps, best=state, curve=curve, seconds=time.perf_counter() - began)
