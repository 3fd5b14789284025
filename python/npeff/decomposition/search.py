"""The search over starts and moves: the only loop of the solver, the same for every form and space.

1. *Starts*: a few random starts, each descended until it slows down; the best goes on.
2. *Moves*: components made from badly explained examples are added, the enlarged factorisation descends, the least
   useful components are pruned one by one, and the result descends again. Kept if the loss is lower.
3. *Polish*: the best is descended to the final tolerance. After a search in a subspace: a step in the full space, which
   widens the subspace, and a descent in that, for as long as such rounds help.

The work is cut into units (a start, a move, the polish). A unit's randomness depends on the seed and the unit's number
alone, so that a run resumed from a checkpoint ends where an uninterrupted one does, bit for bit.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch

from npeff.decomposition.coarse import Coarse
from npeff.decomposition.forms import Form, State, usefulness
from npeff.decomposition.search_state import Callback, Memory, Progress, Stopped, end_at
from npeff.kernels.dispatch import threads_for

WINDOW = 5
"""Iterations over which progress is judged."""

REFRESH = 50
"""Iterations after which P is computed anew, and where a descent may be checkpointed."""

WIDE = 8
"""Steps that an enlarged factorisation descends before it is pruned."""

PRUNING_NOISE = 0.5
"""Standard deviation of the log of the random factor on usefulness: without it the same moves are tried for ever."""

MOVE_TOLERANCE = 1e-4
"""Starts and moves end when the loss falls by less than this share in WINDOW iterations."""

SOUND = 1e-5
"""Difference between a loss and the same loss from P and Q computed anew up to which it is believed."""

ROUNDS = 12
"""Times that a subspace is widened."""


class Search:
    """One run of the search.

    Args:
        form: The factorisation.
        r: Number of components, frozen ones included.
        seed: Determines every random choice.
        starts: Random starts.
        moves: At most this many moves.
        patience: Moves without success after which the search ends.
        max_iterations: Limit of one descent.
        tolerance: Final relative decrease of the loss over WINDOW iterations.
        callback: Called after every iteration; a true answer ends the search with the best so far.
        save: Called with the memory whenever it is worth keeping.
        coarse: A subspace to search in; None: everything happens in ``form``.
    """

    def __init__(
        self,
        form: Form,
        r: int,
        *,
        seed: int,
        starts: int,
        moves: int,
        patience: int,
        max_iterations: int,
        tolerance: float,
        callback: Callback | None = None,
        save: Callable[[Memory], None] | None = None,
        coarse: Coarse | None = None,
    ) -> None:
        self._full, self._coarse = form, coarse
        self.form: Form = form if coarse is None else coarse.form
        self.r, self.seed = r, seed
        self.starts, self.moves, self.patience = starts, moves, patience
        self.max_iterations, self.tolerance = max_iterations, tolerance
        self._callback, self._save = callback, save or (lambda memory: None)
        self._began = time.perf_counter()

    def run(self, memory: Memory | None = None, initial: State | None = None) -> Memory:
        """Search from the beginning, from a given state (no starts), or from where ``memory`` left off."""
        memory = memory or Memory()
        try:
            with threads_for(self.form.space.step_bytes):
                while memory.unit < self.starts:
                    self._start(memory, initial)
                    if initial is not None:
                        memory.unit = self.starts
                while memory.unit < self.starts + self.moves and memory.failures < self.patience:
                    self._move(memory)
            with threads_for(self._full.space.step_bytes):
                self._polish(memory)
        except Stopped:
            self._leave_subspace(memory)
        return memory

    # ---- units ---------------------------------------------------------------------------------------------

    def _start(self, memory: Memory, initial: State | None) -> None:
        state = initial if initial is not None else self.form.start(self.r, self._generator(memory.unit))
        curve = [state.loss]
        try:
            state = self._descend(state, memory, "start", MOVE_TOLERANCE, self.max_iterations, curve)
        finally:  # also when stopped: a single start's result is better than none
            state = self._believed(curve)
            if memory.best is None or state.loss < memory.best.loss:
                memory.best, memory.curve = state, curve
        self._finish(memory)

    def _move(self, memory: Memory) -> None:
        assert memory.best is not None
        best = self.form.refresh(memory.best)
        generator = self._generator(memory.unit)
        count = int(
            max(2.0, self.r / 4) ** float(torch.rand(1, generator=generator)) * 2**0.5
        )  # log-uniform: 1 … r/4·√2
        curve: list[float] = []
        state = self.form.candidates(best, count, generator)
        state = self._descend(state, memory, "move", 0.0, WIDE, [])
        state = self.prune(state, generator)
        state = self._descend(state, memory, "move", MOVE_TOLERANCE, self.max_iterations, curve, below=best.loss)
        if state.loss < best.loss * (1 - 1e-6) and self._is_sound(state):
            memory.best, memory.failures, memory.kept = state, 0, memory.kept + 1
            memory.curve += [loss for loss in curve if loss < memory.curve[-1]]
        else:
            memory.failures += 1
        self._finish(memory)

    def _polish(self, memory: Memory) -> None:
        """Descend to the final tolerance in the full space, or in subspaces that its steps widen."""
        assert memory.best is not None
        coarse = self._coarse
        if coarse is None:
            memory.best = replace(self.form.refresh(memory.best), loss=memory.best.loss)
        else:
            self._leave_subspace(memory)
            if self._widen(memory, coarse):
                return
        self.form = self._full
        curve: list[float] = [memory.best.loss]
        try:
            self._descend(memory.best, memory, "polish", self.tolerance, self.max_iterations, curve)
        finally:
            memory.best = self._believed(curve)
            memory.note(curve)

    def _leave_subspace(self, memory: Memory) -> None:
        """Turn the best of a search in a subspace into a state of the full space."""
        if self._coarse is not None and memory.best is not None:
            memory.best = self._coarse.lift(self.form.refresh(memory.best))
            memory.note([])
            self._coarse = None

    def _widen(self, memory: Memory, coarse: Coarse) -> bool:
        """Rounds of a step in the full space and a descent in the subspace widened by it.

        Returns:
            Whether the last round fell short of the final tolerance, at its pace; if not, no wider subspace was to be
            had.
        """
        for _ in range(ROUNDS):
            assert memory.best is not None
            before = memory.best
            self.form = self._full
            moved = self.form.step(before)
            memory.iteration += 1
            if not moved.loss < before.loss or not self._is_sound(moved):
                return True
            memory.best = moved
            memory.note([])
            wider = coarse.widened(moved)
            if wider is None:
                return False
            coarse, state = wider
            curve: list[float] = []
            self.form = coarse.form
            with threads_for(self.form.space.step_bytes):
                self._descend(state, memory, "polish", self.tolerance, self.max_iterations, curve)
                state = self.form.refresh(self._believed(curve))
            lifted = coarse.lift(state)
            if lifted.loss < moved.loss:
                memory.best = lifted
                memory.note(curve)
            if before.loss - memory.best.loss < self.tolerance * before.loss * max(1, (1 + len(curve)) / WINDOW):
                return True
        return False

    def _is_sound(self, state: State) -> bool:
        """Whether the loss stands when P and Q are computed anew: not so after a numerical accident."""
        return self._agree(self.form.solve_W(self.form.refresh(state), 0), state)

    @staticmethod
    def _agree(fresh: State, state: State) -> bool:
        return abs(fresh.loss - state.loss) < SOUND and state.loss > -SOUND

    def _believed(self, curve: list[float]) -> State:
        """Where the descent came to, or the last state on its way whose loss stands; the curve ends there, too."""
        if not self._is_sound(self._last):
            end_at(curve, self._sound.loss)
            return self._sound
        return self._last

    def prune(self, state: State, generator: torch.Generator) -> State:
        """Drop the least useful components one by one, W refitted in between, until r are left."""
        while state.r > self.r:
            noise = torch.randn(state.r, generator=generator, dtype=torch.float64).mul(PRUNING_NOISE).exp()
            squares = self.form.comm.sum(state.W.double().square().sum(0))
            use = usefulness(state, self.form.gram(state), squares)
            use = use * noise.to(use)
            state = self.form.solve_W(state.keep(torch.arange(state.r, device=use.device) != use.argmin()), 2)
        return state

    # ---- descent -------------------------------------------------------------------------------------------

    def _descend(
        self,
        state: State,
        memory: Memory,
        stage: str,
        tolerance: float,
        limit: int,
        curve: list[float],
        below: float | None = None,
    ) -> State:
        """Step until the loss stops falling. A step that would raise it is not taken.

        With ``below``, give up once the pace of the last window could not get there in ten more.
        """
        self._last = self._sound = state
        losses = [state.loss]
        for i in range(1, limit + 1):
            if i % REFRESH == 0:
                fresh = self.form.solve_W(self.form.refresh(state), 0)
                if not self._agree(fresh, state):
                    break
                self._last = self._sound = state = fresh
                losses = [fresh.loss]  # the pace is judged anew: drift is no fall
                end_at(curve, fresh.loss)
            moved = self.form.step(state)
            memory.iteration += 1
            if not moved.loss < losses[-1]:
                break
            self._last = state = moved
            losses.append(state.loss)
            curve.append(state.loss)
            self._report(memory, stage, state.loss)
            if len(losses) > WINDOW:
                fall = losses[-1 - WINDOW] - losses[-1]
                if fall < tolerance * losses[-1]:
                    break
                if below is not None and losses[-1] - 10 * fall > below:
                    break
        return self._last

    # ---- bookkeeping ---------------------------------------------------------------------------------------

    def _generator(self, unit: int) -> torch.Generator:
        entropy = np.random.SeedSequence([self.seed, unit]).generate_state(1, np.uint64)[0]
        return torch.Generator().manual_seed(int(entropy) & (2**63 - 1))

    def _finish(self, memory: Memory) -> None:
        memory.unit += 1
        self._save(memory)

    def _report(self, memory: Memory, stage: str, loss: float) -> None:
        if self._callback is None:
            return
        best = min(loss, memory.best.loss) if memory.best is not None else loss
        unit = memory.unit if stage == "start" else memory.unit - self.starts
        if self._callback(Progress(stage, unit, memory.iteration, loss, best, time.perf_counter() - self._began)):
            raise Stopped
