"""Stage 2: Fishers → components."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from tqdm import tqdm

from npeff import published_algorithm
from npeff.checkpoint import Checkpoint
from npeff.components import Components
from npeff.diagonal import Diagonal
from npeff.errors import ArgumentError, DataError
from npeff.fishers import Fishers
from npeff.forms import State
from npeff.low_rank import LowRank
from npeff.published_algorithm import PublishedOptions
from npeff.rows import DenseRows, SparseRows
from npeff.scaling import BlockWeights, Normalize, ScaledRows, scale
from npeff.search import Callback, Memory, Progress, Search
from npeff.spaces import FactorSpace, GramSpace, SpaceName, SparseSpace, choose_space
from npeff.subspace import find_subspace

Array = npt.NDArray[Any]
Algorithm = Literal["npeff", "published"]


@dataclass(frozen=True)
class _Options:
    """What determines the result, besides the data."""

    n_components: int
    seed: int = 0
    algorithm: Algorithm = "npeff"
    space: SpaceName = "auto"
    starts: int = 3
    moves: int = 40
    patience: int = 15
    max_iterations: int = 500
    tolerance: float = 1e-6
    block_weights: BlockWeights = "energy"
    normalize: Normalize = "stored"
    orthogonality: float | Literal["hard"] = 0.0
    min_nonzero_per_column: int = 1
    dtype: Literal["float32", "float64"] = "float32"
    published: PublishedOptions = field(default_factory=PublishedOptions)

    def __post_init__(self) -> None:
        for name, least in (
            ("n_components", 1),
            ("seed", 0),
            ("starts", 1),
            ("moves", 0),
            ("patience", 1),
            ("max_iterations", 1),
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
                raise ArgumentError(f"{name}: expected an integer ≥ {least}, got {value!r}")
        if self.algorithm not in ("npeff", "published"):
            raise ArgumentError(f"algorithm: expected 'npeff' or 'published', got {self.algorithm!r}")
        if self.dtype not in ("float32", "float64"):
            raise ArgumentError(f"dtype: expected 'float32' or 'float64', got {self.dtype!r}")
        if self.orthogonality != "hard" and not (
            isinstance(self.orthogonality, int | float) and self.orthogonality >= 0
        ):
            raise ArgumentError(f"orthogonality: expected a number ≥ 0 or 'hard', got {self.orthogonality!r}")


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
) -> Components:
    """Factorise per-example Fishers into non-negative sums of shared components.

    Low-rank: minimise ``Σ_i ‖A_iᵀA_i − Σ_j W_ij g_j g_jᵀ‖_F²`` over W ≥ 0 and G; diagonal: minimise
    ``Σ_i ‖f_i − Σ_j W_ij h_j‖²`` over W, H ≥ 0 (Matena & Raffel 2023). Every Fisher is scaled to unit norm first.

    Args:
        fishers: The Fishers, either kind.
        n_components: Number of components, r; at most the number of rows.
        seed: Determines every random choice.
        algorithm: ``"npeff"``: exact line search, starts and moves; ``"published"``: the authors' fixed-rate algorithm.
        space: ``"gram"`` works on K = A Aᵀ, ``"sparse"`` on the rows; ``"auto"``: the cheaper (low-rank only).
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
        callback: Called with a :class:`npeff.search.Progress` after every iteration; a true answer ends the search.
        progress: Show a progress bar.
        device: Where the solver's products run.

    Returns:
        The components, largest total coefficient first.

    Raises:
        ArgumentError: An option is out of range, or there are more components than rows.
        DataError: There are no examples, every Fisher is zero, or a stored value is not finite.
        ResumeError: The checkpoint belongs to other Fishers or other options.
    """
    options = _Options(
        n_components, seed, algorithm, space, starts, moves, patience, max_iterations, tolerance, block_weights,
        normalize, orthogonality, min_nonzero_per_column, dtype, published or PublishedOptions(),
    )  # fmt: skip
    scaled = _scaled(fishers, options, None)
    problem = _Problem(fishers, scaled, options, device)
    initial = None if init is None else problem.state_from(*init)
    state, curve, course = problem.solve(initial, checkpoint, callback, progress)
    return problem.components(state, curve, course)


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
    """Frozen components plus n new ones; see :meth:`npeff.Components.expand`.

    Raises:
        ArgumentError: An option is unknown or out of range.
    """
    if n < 1:
        raise ArgumentError(f"n: expected at least 1 new component, got {n}")
    unknown = set(options) - {
        f
        for f in _Options.__dataclass_fields__
        if f not in ("n_components", "algorithm", "published", "block_weights", "normalize")
    }
    if unknown:
        raise ArgumentError(
            f"options: {', '.join(sorted(unknown))} cannot be given to expand; weights and normalisation are "
            "those of the components"
        )
    chosen = _Options(
        components.n_components + n,
        block_weights=components.block_weights or "energy",
        normalize=components.provenance.get("normalize", "stored"),
        **options,
    )
    if chosen.orthogonality:
        raise ArgumentError("orthogonality: not available with frozen components; leave it at 0")
    columns = None
    if isinstance(fishers.rows, SparseRows):
        present = np.flatnonzero(np.bincount(fishers.rows.indices, minlength=fishers.n_parameters))
        kept = np.arange(fishers.n_parameters) if components.columns is None else components.columns
        columns = np.union1d(present, kept).astype(np.int64)
    scaled = _scaled(fishers, chosen, columns)
    vectors = np.zeros((components.n_components, fishers.n_parameters), np.float32)
    vectors[:, slice(None) if components.columns is None else components.columns] = components.vectors
    frozen = torch.from_numpy(vectors if scaled.columns is None else vectors[:, scaled.columns])
    frozen_W = None
    if keep_coefficients:
        if len(components.coefficients) != len(fishers):
            raise ArgumentError(
                f"keep_coefficients: needs the {len(components.coefficients)} examples that the components "
                f"were made from, got {len(fishers)}"
            )
        frozen_W = torch.from_numpy(components.coefficients.copy())
    problem = _Problem(fishers, scaled, chosen, device, frozen, frozen_W)
    state, curve, course = problem.solve(None, checkpoint, callback, progress)
    return problem.components(state, curve, course | {"expanded_from": components.n_components})


def _scaled(fishers: Fishers, options: _Options, columns: Array | None) -> ScaledRows:
    """Check the Fishers and scale them.

    Raises:
        DataError: See :func:`decompose`.
        ArgumentError: More components than rows.
    """
    if len(fishers) == 0:
        raise DataError("fishers: there are no examples to decompose")
    values = fishers.rows.values
    if not np.isfinite(values).all():
        where = np.argwhere(~np.isfinite(values))[0]
        row = (
            int(where[0])
            if isinstance(fishers.rows, DenseRows)
            else int(np.searchsorted(fishers.rows.indptr, where[0], "right")) - 1
        )
        example = int(np.searchsorted(fishers.row_offsets, row, "right")) - 1
        raise DataError(
            f"fishers: example {example} (id {fishers.ids[example]}) has a value that is not finite; compute "
            "its Fisher again"
        )
    if options.n_components > fishers.rows.n_rows:
        raise ArgumentError(
            f"n_components: expected at most the {fishers.rows.n_rows} rows of the {len(fishers)} Fishers, "
            f"got {options.n_components}"
        )
    scaled = scale(fishers, options.block_weights, options.normalize, columns, options.min_nonzero_per_column)
    if not scaled.fisher_norms.any():
        raise DataError(
            f"fishers: all {len(fishers)} are zero (the model is certain of every example, or every block has "
            "weight 0): nothing to decompose"
        )
    return scaled


class _Problem:
    """Fishers, a space over them and a form: one decomposition to be solved."""

    def __init__(
        self,
        fishers: Fishers,
        scaled: ScaledRows,
        options: _Options,
        device: str | torch.device,
        frozen: Tensor | None = None,
        frozen_W: Tensor | None = None,
    ) -> None:
        self.fishers, self.scaled, self.options = fishers, scaled, options
        self.subspace: dict[str, Any] | None = None
        began = time.perf_counter()
        dtype = torch.float64 if options.dtype == "float64" else torch.float32
        self.space: FactorSpace
        self.form: LowRank | Diagonal
        if fishers.kind == "diagonal":
            if options.orthogonality:
                raise ArgumentError("orthogonality: only for the low-rank kind; leave it at 0 for diagonal Fishers")
            self.reason = "the diagonal kind always works on the rows"
            rows_space = SparseSpace(scaled.rows, dtype, device)
            self.space, self.form = rows_space, Diagonal(rows_space, scaled, frozen, frozen_W)
        else:
            space = "sparse" if options.algorithm == "published" else options.space
            kind, self.reason = choose_space(scaled.rows, space, options.n_components)
            self.space = (
                GramSpace(scaled.rows, frozen, dtype, device)
                if kind is GramSpace
                else SparseSpace(scaled.rows, dtype, device)
            )
            embedded = None if frozen is None else self.space.embed(frozen)
            self.form = LowRank(self.space, scaled, options.orthogonality, embedded, frozen_W)
        self.seconds_building = time.perf_counter() - began

    def state_from(self, W: Array, G: Array) -> State:
        """A state from given coefficients ``(n, r)`` and vectors ``(r, n_parameters)``.

        Raises:
            ArgumentError: A shape is wrong.
        """
        n, r, m = len(self.fishers), self.options.n_components, self.fishers.n_parameters
        for name, array, shape in (("W", W, (n, r)), ("G", G, (r, m))):
            if np.shape(array) != shape:
                raise ArgumentError(f"init: expected {name} of shape {shape}, got {np.shape(array)}")
        if isinstance(self.space, GramSpace):
            self.space = SparseSpace(self.scaled.rows, self.space.K.dtype, self.space.K.device)
            self.form = LowRank(self.space, self.scaled, self.options.orthogonality)
            self.reason = "given vectors need not lie in the row space"
        kept = np.asarray(G, np.float32)[:, slice(None) if self.scaled.columns is None else self.scaled.columns]
        return self.form.from_vectors(
            self.space.embed(torch.from_numpy(kept.copy())), torch.from_numpy(np.array(W, np.float32))
        )

    def solve(
        self, initial: State | None, checkpoint: str | Path | None, callback: Callback | None, progress: bool
    ) -> tuple[State, list[float], dict[str, Any]]:
        """Run the algorithm; returns the factorisation, its losses, and how the search went."""
        options = self.options
        began = time.perf_counter()
        bar_options = {"desc": f"decompose r={options.n_components}", "unit": "it", "disable": not progress}
        with tqdm(**bar_options) as bar:
            if options.algorithm == "published":
                state, curve = self._published(bar, callback)
                course: dict[str, Any] = {"iterations": options.published.g_only + options.published.joint}
            else:
                memory = self._search(initial, checkpoint, _with_bar(bar, callback))
                assert memory.best is not None
                state, curve = memory.best, memory.curve
                course = {
                    "iterations": memory.iteration,
                    "moves": max(0, memory.unit - options.starts),
                    "moves_kept": memory.kept,
                }
        seconds = {"building": round(self.seconds_building, 3), "solving": round(time.perf_counter() - began, 3)}
        if self.subspace is not None:
            course["subspace"] = self.subspace
        return state, curve, course | {"space": self.space.name, "space_reason": self.reason, "seconds": seconds}

    def _search(self, initial: State | None, checkpoint: str | Path | None, callback: Callback) -> Memory:
        options = self.options
        keeper = None
        if checkpoint is not None:
            keeper = Checkpoint(Path(checkpoint), self.scaled, {"kind": self.fishers.kind, **asdict(options)})
        form, lift = self.form, None
        if isinstance(self.form, LowRank) and initial is None:
            form, lift = self._coarse(self.form)
        search = Search(
            form, options.n_components, seed=options.seed, starts=options.starts, moves=options.moves,
            patience=options.patience, max_iterations=options.max_iterations, tolerance=options.tolerance,
            callback=callback, save=None if keeper is None else keeper.save, lift=lift, polish_form=self.form,
        )  # fmt: skip
        memory = search.run(None if keeper is None else keeper.load(), initial)
        if keeper is not None:
            keeper.remove()
        return memory

    def _coarse(self, fine: LowRank) -> tuple[LowRank, Callable[[State], State] | None]:
        """The form to search in, and the way back: a subspace where one holds nearly all of the rows for less work."""
        generator = torch.Generator().manual_seed(self.options.seed)
        energy = float(self.scaled.rows.squared_norms().sum())
        subspace = find_subspace(self.space, energy, self.options.n_components, generator, fine.frozen)
        if subspace is None:
            return fine, None
        self.subspace = {"dimensions": subspace.rows.shape[1], "kept": round(subspace.kept, 6)}
        rows = DenseRows(subspace.rows.cpu().numpy())
        space = SparseSpace(rows, subspace.rows.dtype, subspace.rows.device)
        scaled = replace(self.scaled, rows=rows, columns=None)
        coarse = LowRank(space, scaled, self.options.orthogonality, subspace.given, fine.frozen_W)

        def lift(state: State) -> State:
            coords = subspace.lift(state.coords)
            if fine.frozen is not None:
                coords[: len(fine.frozen)] = fine.frozen
            return fine.from_vectors(coords, state.W)

        return coarse, lift

    def _published(self, bar: Any, callback: Callback | None) -> tuple[State, list[float]]:
        began, generator = time.perf_counter(), torch.Generator().manual_seed(self.options.seed)

        def report(iteration: int, loss: float) -> Any:
            bar.n = iteration
            bar.set_postfix(loss=f"{loss:.5f}")
            return callback is not None and callback(
                Progress("published", 0, iteration, loss, loss, time.perf_counter() - began)
            )

        if isinstance(self.form, Diagonal):
            return published_algorithm.diagonal(
                self.form, self.options.n_components, self.options.published, generator, report
            )
        return published_algorithm.low_rank(
            self.form, self.options.n_components, self.options.published, generator, report
        )

    def components(self, state: State, curve: list[float], course: dict[str, Any]) -> Components:
        """Components in parameter space, new ones ordered by total coefficient."""
        f, fishers = state.frozen, self.fishers
        total = state.W[:, f:].double().sum(0)
        order = torch.cat(
            [torch.arange(f, device=total.device), f + torch.argsort(total, descending=True, stable=True)]
        )
        state = replace(state.keep(order), loss=state.loss)
        vectors = self.space.vectors(state.coords).double()
        norms = vectors.norm(dim=1).clamp_min(1e-30)
        vectors = (vectors / norms[:, None]).float()
        W = state.W.cpu().float().clone()
        W[torch.from_numpy(self.scaled.fisher_norms == 0)] = 0
        chosen = asdict(self.options)
        return Components(
            kind=fishers.kind,
            coefficients=W.numpy(),
            vectors=vectors.contiguous().numpy(),
            columns=self.scaled.columns,
            block_weights=self.scaled.block_weights,
            parameters=fishers.parameters,
            labels=np.asarray(fishers.labels),
            logits=np.asarray(fishers.logits),
            ids=np.asarray(fishers.ids),
            norms=np.asarray(fishers.norms),
            loss_curve=np.asarray(curve, np.float64),
            loss=float(state.loss),
            provenance={
                "fishers": fishers.provenance,
                "options": chosen,
                "normalize": self.options.normalize,
                "course": course,
            },
        )


def _with_bar(bar: Any, callback: Callback | None) -> Callback:
    """A callback that also moves the progress bar."""

    def report(progress: Progress) -> Any:
        bar.n = progress.iteration
        bar.set_postfix_str(f"{progress.stage} {progress.unit} loss {progress.best:.5f}", refresh=False)
        bar.update(0)
        return callback is not None and callback(progress)

    return report
