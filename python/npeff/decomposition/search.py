"""The search: the only loop of the solver, the same for every objective and space.

1. *Starts*: a few random starts, each descended until it slows down; the best goes on.
2. *Replacements*: components made from badly explained examples are added, the enlarged factorisation descends, the
   least useful components are pruned one by one, and the result descends again. Kept if the loss is lower.
3. *Polish*: the best is descended to the final tolerance. After a search in a subspace: a step in the full space, which
   widens the subspace, and a descent in that, for as long as such rounds help.

The work is cut into units (a start, a replacement, the polish). A unit's randomness depends on the seed and the unit's
number alone, so that a run resumed from a checkpoint ends where an uninterrupted one does, bit for bit.
"""

from __future__ import annotations

import time
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from npeff.decomposition.checkpoint import Checkpoint, SearchState, end_at
from npeff.decomposition.kinds import LowRank
from npeff.decomposition.objective import Objective, State
from npeff.decomposition.options import DecomposeOptions, Progress
from npeff.decomposition.problem import Problem
from npeff.decomposition.spaces import GramSpace
from npeff.decomposition.subspace import Subspace, find_subspace, most_dimensions, restricted, to_full_space, widen
from npeff.kernels.dispatch import threads_for
from npeff.models.devices import return_freed_memory

WINDOW = 5
"""Iterations over which progress is judged."""

REFRESH = 50
"""Iterations after which P is computed anew."""

WIDE = 8
"""Steps that an enlarged factorisation descends before it is pruned."""

PRUNING_NOISE = 0.5
"""Standard deviation of the log of the random factor on usefulness: it makes repeated replacements differ."""

UNIT_TOLERANCE = 1e-4
"""Starts and replacements end when the loss falls by less than this share in WINDOW iterations."""

SOUND = 1e-5
"""Difference between a loss and the same loss from P and Q computed anew up to which it is believed."""

ROUNDS = 12
"""Times that a subspace is widened."""


def progress_bar(options: DecomposeOptions) -> Any:
    """Open the progress bar of a decomposition."""
    return tqdm(desc=f"decompose r={options.n_components}", unit="it", disable=not options.progress)


class Search:
    """One run of the search.

    Args:
        problem: What to solve.
    """

    def __init__(self, problem: Problem) -> None:
        self._problem, self._options = problem, problem.options
        self._full: Objective = problem.objective
        self._objective: Objective = problem.objective
        self._subspace: Subspace | None = None
        self._state = SearchState()
        self._stopped = False
        self._began = time.perf_counter()

    def run(self) -> SearchState:
        """Search from the beginning, or from the state in the checkpoint.

        The checkpoint stays, also at the end: the caller removes it once the result is safe.

        Returns:
            The result; its best state is one of the full space.

        Raises:
            StorageError: The checkpoint cannot be read or written.
            ResumeError: The checkpoint belongs to other Fishers or other options.
        """
        options, path = self._options, self._options.checkpoint
        keeper = None if path is None else Checkpoint(path, self._problem)
        with progress_bar(options) as self._bar, keeper or nullcontext():
            initial = self._problem.initial_state()
            if initial is None:
                self._restrict()
            if keeper is not None:
                self._resume(keeper)
            state = self._state
            with threads_for(self._objective.space.step_bytes):
                while state.unit < options.n_init and not (self._stopped or state.finished):
                    first = initial or self._objective.start(options.n_components, self._generator())
                    found, curve = self._descend(first, "start", UNIT_TOLERANCE)
                    self._keep_if_better(found, curve)
                    self._finish_unit(keeper, 1 if initial is None else options.n_init)
                while self._replacements_left():
                    enlarged, generator = self._enlarged()
                    wide, _ = self._descend(enlarged, "replacement", 0.0, WIDE)
                    pruned = self._prune(wide, generator)
                    found, curve = self._descend(pruned, "replacement", UNIT_TOLERANCE, below=self._best.loss)
                    self._replace_if_better(found, curve)
                    self._finish_unit(keeper)
            if not state.finished:
                with threads_for(self._full.space.step_bytes):
                    self._polish(keeper)
        state.seconds = time.perf_counter() - self._began
        return state

    # ---- before the units ----------------------------------------------------------------------------------

    def _restrict(self) -> None:
        """Search in a subspace, where one holds nearly all of the rows for less work."""
        full, problem = self._full, self._problem
        if not isinstance(full, LowRank):
            return
        generator = torch.Generator().manual_seed(self._options.seed)
        energy = full.comm.number(float(problem.scaled.rows.squared_norms().sum()))
        width = 0 if isinstance(full.space, GramSpace) else problem.scaled.rows.n_columns
        limited = self._options.memory is not None
        if limited:
            return_freed_memory()
        number = self._options.torch_dtype.itemsize
        most = most_dimensions(problem.choice.subspace_bytes, full.space.n_rows, width, number)
        most = int(full.comm.agreed(most))
        subspace = find_subspace(full.space, energy, self._options.n_components, generator, full.frozen, most)
        if subspace is None:
            return
        if limited:
            return_freed_memory()
        self._state.subspace = {"dimensions": subspace.rows.shape[1], "kept": round(subspace.kept, 6)}
        self._subspace, self._most_dimensions = subspace, most
        self._objective = restricted(full, subspace)

    def _resume(self, keeper: Checkpoint) -> None:
        """Go on from the state in the file, if there is one.

        Raises:
            StorageError: The state does not fit the Fishers.
        """
        found = keeper.load()
        if found is None or found.best is None:
            return
        best, objective = found.best, self._full if found.finished else self._objective
        try:
            objective.refresh(best)
            if found.finished:  # the result itself: nothing but P and Q, which the file does not hold, is computed
                P = objective.space.project(best.coords)
                found.best = replace(best, P=P, Q=objective.space.inner(best.coords, best.coords, P))
        except (ValueError, RuntimeError, IndexError) as error:
            raise keeper.misfit(error) from error
        found.subspace, self._state = self._state.subspace, found

    # ---- starts and replacements ---------------------------------------------------------------------------

    @property
    def _best(self) -> State:
        assert self._state.best is not None
        return self._state.best

    def _replacements_left(self) -> bool:
        state, options = self._state, self._options
        left = state.unit < options.n_init + options.n_replacements and state.failures < options.patience
        return left and not (self._stopped or state.finished)

    def _keep_if_better(self, found: State, curve: list[float]) -> None:
        """Keep a start's result, also that of a start that was stopped."""
        found = self._believed(found, curve)
        if self._state.best is None or found.loss < self._state.best.loss:
            self._state.best, self._state.curve = found, curve

    def _enlarged(self) -> tuple[State, torch.Generator]:
        """Add components to the best factorisation; their number is log-uniform in 1 … r/4·√2."""
        best = self._objective.refresh(self._best)
        generator = self._generator()
        spread = max(2.0, self._options.n_components / 4)
        count = int(spread ** float(torch.rand(1, generator=generator)) * 2**0.5)
        return self._objective.enlarged(best, count, generator), generator

    def _prune(self, state: State, generator: torch.Generator) -> State:
        """Drop the least useful components one by one, W refitted in between, until r are left."""
        while state.r > self._options.n_components:
            noise = torch.randn(state.r, generator=generator, dtype=torch.float64).mul(PRUNING_NOISE).exp()
            use = self._objective.usefulness(state)
            use = use * noise.to(use)
            state = self._objective.solve_W(state.keep(torch.arange(state.r, device=use.device) != use.argmin()), 2)
        return state

    def _replace_if_better(self, found: State, curve: list[float]) -> None:
        """Keep a replacement's result if its loss is lower, and stands when computed anew."""
        state = self._state
        if self._stopped:
            return
        if found.loss < self._best.loss * (1 - 1e-6) and self._is_sound(found):
            state.best, state.failures, state.kept = found, 0, state.kept + 1
            state.curve += [loss for loss in curve[1:] if loss < state.curve[-1]]
        else:
            state.failures += 1

    def _finish_unit(self, keeper: Checkpoint | None, units: int = 1) -> None:
        if self._stopped:
            return
        self._state.unit += units
        if keeper is not None:
            keeper.save(self._state)

    def _generator(self) -> torch.Generator:
        entropy = np.random.SeedSequence([self._options.seed, self._state.unit]).generate_state(1, np.uint64)[0]
        return torch.Generator().manual_seed(int(entropy) & (2**63 - 1))

    # ---- descent -------------------------------------------------------------------------------------------

    def _descend(
        self, state: State, stage: str, tolerance: float, limit: int | None = None, below: float | None = None
    ) -> tuple[State, list[float]]:
        """Step until the loss stops falling, or the callback stops the search. A step that would raise it is not taken.

        With ``below``, give up once the pace of the last window could not get there in ten more.

        Returns:
            The last state, and the losses from the first state on.
        """
        self._sound = state
        losses, curve = [state.loss], [state.loss]
        for i in range(1, (self._options.max_iterations if limit is None else limit) + 1):
            if self._stopped:
                break
            if i % REFRESH == 0:
                fresh = self._objective.solve_W(self._objective.refresh(state), 0)
                if not _agree(fresh, state):
                    break
                self._sound = state = fresh
                losses = [fresh.loss]  # the pace is judged anew: drift is no fall
                end_at(curve, fresh.loss)
            moved = self._objective.step(state)
            self._state.iteration += 1
            if not moved.loss < losses[-1]:
                break
            state = moved
            losses.append(state.loss)
            curve.append(state.loss)
            self._report(stage, state.loss)
            if len(losses) > WINDOW:
                fall = losses[-1 - WINDOW] - losses[-1]
                if fall < tolerance * losses[-1]:
                    break
                if below is not None and losses[-1] - 10 * fall > below:
                    break
        return state, curve

    def _report(self, stage: str, loss: float) -> None:
        """Move the progress bar, and ask the callback whether to stop."""
        state = self._state
        best = loss if state.best is None else min(loss, state.best.loss)
        unit = state.unit if stage == "start" else state.unit - self._options.n_init
        self._bar.n = state.iteration
        self._bar.set_postfix_str(f"{stage} {unit} loss {best:.5f}", refresh=False)
        self._bar.update(0)
        if self._options.callback is not None:
            seconds = time.perf_counter() - self._began
            progress = Progress(stage, unit, state.iteration, loss, best, seconds)
            self._stopped = bool(self._options.callback(progress))

    def _is_sound(self, state: State) -> bool:
        """Tell whether the loss stands when P and Q are computed anew: not so after a numerical accident."""
        return _agree(self._objective.solve_W(self._objective.refresh(state), 0), state)

    def _believed(self, last: State, curve: list[float]) -> State:
        """Return a descent's last state, or the last one before whose loss stands; the curve ends there, too."""
        if self._is_sound(last):
            return last
        end_at(curve, self._sound.loss)
        return self._sound

    # ---- the polish ----------------------------------------------------------------------------------------

    def _polish(self, keeper: Checkpoint | None) -> None:
        """Descend to the final tolerance in the full space, or in subspaces that its steps widen."""
        state, full, subspace = self._state, self._full, self._subspace
        if subspace is None or not isinstance(full, LowRank):
            state.best, ended = replace(self._objective.refresh(self._best), loss=self._best.loss), False
        else:
            state.best = to_full_space(full, subspace, self._objective.refresh(self._best))
            state.extend_curve([])
            ended = not self._stopped and self._widen(full, subspace)
        if not self._stopped and not ended:
            self._objective = self._full
            last, curve = self._descend(self._best, "polish", self._options.tolerance)
            state.best = self._believed(last, curve)
            state.extend_curve(curve)
        if keeper is not None and not self._stopped:
            state.finished = 1
            keeper.save(state)

    def _widen(self, full: LowRank, subspace: Subspace) -> bool:
        """Alternate steps in the full space and descents in the subspace widened by them.

        Returns:
            Whether the last round fell short of the final tolerance, at its pace, or the search was stopped; if not,
            the subspace could not be widened.
        """
        state, tolerance = self._state, self._options.tolerance
        for _ in range(ROUNDS):
            before = self._best
            self._objective = full
            moved = full.step(before)
            state.iteration += 1
            if not moved.loss < before.loss or not self._is_sound(moved):
                return True
            state.best = moved
            state.extend_curve([])
            room = subspace.rows.shape[1] + moved.r <= self._most_dimensions
            wider = widen(full.space, subspace, moved.coords, moved.P) if room else None
            if wider is None:
                return False
            subspace, coords = wider
            self._objective = restricted(full, subspace)
            with threads_for(self._objective.space.step_bytes):
                last, curve = self._descend(self._objective.from_vectors(coords, moved.W), "polish", tolerance)
                last = self._objective.refresh(self._believed(last, curve))
            lifted = to_full_space(full, subspace, last)
            if lifted.loss < moved.loss:
                state.best = lifted
                state.extend_curve(curve)
            if self._stopped or before.loss - self._best.loss < tolerance * before.loss * max(1, len(curve) / WINDOW):
                return True
        return False


def _agree(fresh: State, state: State) -> bool:
    return abs(fresh.loss - state.loss) < SOUND and state.loss > -SOUND
