"""One decomposition to be solved: its options, its checked and scaled Fishers, its space and form, its course."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from tqdm import tqdm

from npeff.decomposition import published_algorithm
from npeff.decomposition.checkpoint import Checkpoint
from npeff.decomposition.choice import Plan
from npeff.decomposition.coarse import Coarse
from npeff.decomposition.diagonal import Diagonal
from npeff.decomposition.forms import State
from npeff.decomposition.low_rank import LowRank
from npeff.decomposition.options import Options
from npeff.decomposition.place import comm_of
from npeff.decomposition.search import Search
from npeff.decomposition.search_state import Callback, Memory, Progress
from npeff.decomposition.sketch_space import SketchSpace
from npeff.decomposition.spaces import FactorSpace, GramSpace, SparseSpace
from npeff.decomposition.subspace import find_subspace, most_dimensions
from npeff.errors import ArgumentError, StorageError
from npeff.fishers.fishers import Fishers
from npeff.fishers.scaling import ScaledRows
from npeff.fishers.streamed_rows import StreamedRows
from npeff.models.memory import return_freed_memory

Array = npt.NDArray[Any]


class Problem:
    """Fishers, a space over them and a form: one decomposition to be solved."""

    def __init__(
        self,
        fishers: Fishers,
        scaled: ScaledRows,
        plan: Plan,
        options: Options,
        device: torch.device,
        frozen: Tensor | None = None,
        frozen_W: Tensor | None = None,
    ) -> None:
        self.fishers, self.scaled, self.plan, self.options = fishers, scaled, plan, options
        self.reason = plan.reason
        self.subspace: dict[str, Any] | None = None
        began = time.perf_counter()
        dtype = torch.float64 if options.dtype == "float64" else torch.float32
        self.space: FactorSpace
        self.form: LowRank | Diagonal
        if fishers.kind == "diagonal":
            if options.orthogonality:
                raise ArgumentError("orthogonality: only for the low-rank kind; leave it at 0 for diagonal Fishers")
            rows_space = self.shared(_rows_space(scaled, dtype, device))
            self.space, self.form = rows_space, Diagonal(rows_space, scaled, frozen, frozen_W)
        else:
            gram = plan.space == "gram"
            if gram:
                own: Any = GramSpace(scaled.rows, frozen, dtype, device, plan.part_bytes)
            else:
                own = _rows_space(scaled, dtype, device)
            self.space = self.shared(own)
            embedded = None if frozen is None else self.space.embed(frozen)
            self.form = LowRank(self.space, scaled, options.orthogonality, embedded, frozen_W)
        self.seconds_building = time.perf_counter() - began
        self.seconds_solving = 0.0

    def shared(self, space: Any) -> Any:
        """The space as the forms see it: over the rows of all processes, where there are several."""
        return space

    def keeper(self, path: Path, options: dict[str, Any]) -> Checkpoint:
        """Where the search's state is kept."""
        return Checkpoint(path, self.scaled, options)

    def state_from(self, W: Array, G: Array) -> State:
        """A state from given coefficients ``(n, r)`` and vectors ``(r, n_parameters)``.

        Raises:
            ArgumentError: A shape is wrong, or a value.
        """
        n, r, m = len(self.fishers), self.options.n_components, self.fishers.rows.n_columns
        for name, array, shape in (("W", W, (n, r)), ("G", G, (r, m))):
            if np.shape(array) != shape:
                raise ArgumentError(f"init: expected {name} of shape {shape}, got {np.shape(array)}")
            if not np.isfinite(array).all():
                raise ArgumentError(f"init: expected finite values, got some in {name} that are not")
        if np.min(W) < 0 or not np.any(G, axis=1).all():
            raise ArgumentError("init: expected W ≥ 0 and no vector of G that is all zero")
        if isinstance(self.space, GramSpace):
            if self.scaled.rows.products_only:
                raise ArgumentError("init: Fishers of inner products alone (GramOnly) cannot take given vectors")
            self.space = _rows_space(self.scaled, self.space.K.dtype, self.space.K.device)
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
                memory = self._search(initial, checkpoint, with_bar(bar, callback))
                assert memory.best is not None
                state, curve = memory.best, memory.curve
                course = {
                    "iterations": memory.iteration,
                    "moves": max(0, memory.unit - options.starts),
                    "moves_kept": memory.kept,
                }
        self.seconds_solving = time.perf_counter() - began
        if self.subspace is not None:
            course["subspace"] = self.subspace
        return state, curve, course | {"space": self.space.name, "space_reason": self.reason}

    def _search(self, initial: State | None, checkpoint: str | Path | None, callback: Callback) -> Memory:
        options = self.options
        keeper = None
        if checkpoint is not None:
            keeper = self.keeper(Path(checkpoint), {"kind": self.fishers.kind, **asdict(options)})
        coarse = self._coarse(self.form) if isinstance(self.form, LowRank) and initial is None else None
        search = Search(
            self.form, options.n_components, seed=options.seed, starts=options.starts, moves=options.moves,
            patience=options.patience, max_iterations=options.max_iterations, tolerance=options.tolerance,
            callback=callback, save=None if keeper is None else keeper.save, coarse=coarse,
        )  # fmt: skip
        if keeper is None:
            return search.run(None, initial)
        with keeper:
            found = keeper.load()
            if found is not None and found.best is not None:
                try:
                    search.form.refresh(found.best)
                    if len(found.best.W) != self.form.n_examples:
                        raise ValueError(f"{len(found.best.W)} examples, not {self.form.n_examples}")
                except (ValueError, RuntimeError, IndexError) as error:
                    raise StorageError(
                        f"checkpoint: {checkpoint} does not fit the Fishers ({error}); remove it or choose another path"
                    ) from error
            memory = search.run(found, initial)
            keeper.remove()
        return memory

    def _coarse(self, fine: LowRank) -> Coarse | None:
        """The form to search in: a subspace where one holds nearly all of the rows for less work."""
        generator = torch.Generator().manual_seed(self.options.seed)
        comm = comm_of(self.space)
        energy = comm.number(float(self.scaled.rows.squared_norms().sum()))
        width = 0 if isinstance(fine.space, GramSpace) else self.scaled.rows.n_columns
        number = 8 if self.options.dtype == "float64" else 4
        if self.options.memory is not None:
            return_freed_memory()
        most = int(comm.agreed(most_dimensions(self.plan.subspace_bytes, self.space.n_rows, width, number)))
        subspace = find_subspace(self.space, energy, self.options.n_components, generator, fine.frozen, most)
        if subspace is None:
            return None
        if self.options.memory is not None:
            return_freed_memory()
        self.subspace = {"dimensions": subspace.rows.shape[1], "kept": round(subspace.kept, 6)}
        return Coarse(fine, self.scaled, self.options.orthogonality, subspace, self.shared, most)

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

    def row_weights(self, state: State, norms: Tensor) -> Array | None:
        """``(n_rows, r)``: the unit vectors as combinations of the stored rows, for the rows that are here.

        Over K these are the coordinates. Elsewhere they follow from stationarity, ``G = M⁻¹ (W∘P)ᵀ A`` with
        ``M = WᵀW ∘ Q``.

        Args:
            state: The factorisation.
            norms: ``(r,)`` norms of its vectors, which are divided out.

        Returns:
            None where the rows are in parameter space, so that the vectors say it all, or some vectors are frozen.
        """
        if not self.fishers.kept_elsewhere or state.frozen:
            return None
        form = self.form
        assert isinstance(form, LowRank)
        if isinstance(self.space, GramSpace):
            weights = state.coords[:, : self.space.n_rows].T.double()
        else:
            M = form.comm.sum(state.W.T @ state.W).double() * state.Q.double()
            ridge = 1e-9 * M.diagonal().mean().clamp_min(1e-30) * torch.eye(len(M), dtype=M.dtype, device=M.device)
            weights = form.spread(state.W, state.P).double() @ torch.linalg.inv(M + ridge)
        weights = weights.cpu() / norms
        return np.asarray(weights.numpy() * self.scaled.row_factors[:, None], np.float32)


def _rows_space(scaled: ScaledRows, dtype: torch.dtype, device: torch.device) -> SparseSpace | SketchSpace:
    if isinstance(scaled.rows, StreamedRows):
        return SketchSpace(scaled.rows, dtype, device)
    return SparseSpace(scaled.rows, dtype, device)


def with_bar(bar: Any, callback: Callback | None) -> Callback:
    """A callback that also moves the progress bar."""

    def report(progress: Progress) -> Any:
        bar.n = progress.iteration
        bar.set_postfix_str(f"{progress.stage} {progress.unit} loss {progress.best:.5f}", refresh=False)
        bar.update(0)
        return callback is not None and callback(progress)

    return report
