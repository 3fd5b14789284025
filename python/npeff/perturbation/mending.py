"""Repair wrong answers of a model along the directions of some components, and keep all other answers.

A component that stands for a shortcut, a backdoor or a flawed heuristic names the weights that carry it: its direction
g_j. The repair is searched for along these directions only. With B the directions of the chosen components, each cut
into layers (:class:`LayerSteps`), R the examples to repair and K the others,

``min_c  mean_{i∈R} −log p(y_i | x_i, θ + Bᵀc)  +  λ · mean_{i∈K} KL(p(·|x_i, θ) ‖ p(·|x_i, θ + Bᵀc))``

has only as many unknowns as there are components times layers. It is solved at falling λ. Of the solutions, the one is
taken that repairs most on examples set aside for the choice, while accuracy on the others, of the fit and of the
choice, falls by no more than a tolerance, one standard error of the fall included. Matena & Raffel (2023) repair by a
line search along ±g_j, one component, all layers together: this is the case of a single unknown, in which steps of
doubling length replace the solutions.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from npeff.batches.reading import read_batches
from npeff.components.components import Components
from npeff.components.strategies import Strategy
from npeff.errors import ArgumentError, DataError, check_integer
from npeff.kernels.arrays import as_tensor
from npeff.language.places import check_places
from npeff.perturbation.directions import target_of
from npeff.perturbation.effect import plain
from npeff.perturbation.evaluate import check_outputs, checked_model, differing
from npeff.perturbation.options import Forward, check_components, check_share, given_rows
from npeff.perturbation.repair import DirectionBlock, LabelledExamples, LayerSteps, Repair, share
from npeff.perturbation.weights import Weights
from npeff.short_repr import several

Array = npt.NDArray[Any]

ENOUGH = 20
"""With fewer examples of either kind to judge a change on, a warning is given."""


@dataclass(frozen=True, eq=False)
class Mending:
    """A change of the weights, and its effect.

    Attributes:
        components: The components whose directions it combines.
        layers: The modules whose parts have a step each; one empty name where all layers go together.
        coefficients: ``(k, len(layers))`` float64 multiples of each component's part in each layer; all 0 when nothing
            could be repaired within the tolerance.
        change: The change of the weights, parameter-shaped: use it with :func:`npeff.applied`.
        repaired: Share of the examples to repair that are answered as labelled, ``(before, after)``, on examples that
            neither the fit nor the choice of λ used when ``held_out`` is true.
        accuracy: Accuracy on the other examples, ``(before, after)``, likewise; nan where there are none.
        n_repair: Number of examples to repair that these shares are of.
        n_others: Number of other examples that the accuracies are of.
        held_out: Whether there were enough examples to set some aside for this judgement.
    """

    components: tuple[int, ...]
    layers: tuple[str, ...]
    coefficients: Array
    change: dict[str, Tensor]
    repaired: tuple[float, float]
    accuracy: tuple[float, float]
    n_repair: int
    n_others: int
    held_out: bool

    def __repr__(self) -> str:
        along = (
            f"component{'s' if len(self.components) > 1 else ''} {several(self.components)} in "
            f"{len(self.layers)} layer{'s' if len(self.layers) > 1 else ''}"
        )
        before, after = (round(share * self.n_repair) for share in self.repaired)
        repaired = f"right on {before} → {after} of {self.n_repair} to repair"
        others = f"and on {self.accuracy[0]:.1%} → {self.accuracy[1]:.1%} of {self.n_others} others"
        judged = "examples that were set aside" if self.held_out else "the examples of the search itself"
        change = "" if self.changed else "; no change was found within the tolerance"
        return (
            f"Mending({along}: {repaired}, {others if self.n_others else 'no others'}; held_out={self.held_out}, "
            f"judged on {judged}{change})"
        )

    @property
    def changed(self) -> bool:
        """Whether a repair within the tolerance was found."""
        return bool(np.any(self.coefficients))

    def to_json(self) -> dict[str, Any]:
        """Describe the repair for JSON, without the change itself."""
        return {name: value for name, value in plain(self).items() if name != "change"}


def mend(
    model: nn.Module,
    data: Iterable[Any],
    components: Components,
    which: int | Sequence[int] | Strategy,
    *,
    repair: Sequence[int] | Array | None = None,
    tolerance: float = 0.01,
    by_layer: bool = True,
    iterations: int = 20,
    forward: Forward | None = None,
    device: torch.device | str | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Mending:
    """Find a change of the weights along the directions of some components that repairs wrong answers.

    The examples are divided at random: half to fit c, a quarter to choose λ, a quarter to judge. Fewer than 8 examples
    to repair, or 8 others, leave none to judge: the result is then of the examples of the search itself. A warning says
    so, and where fewer than 20 of either kind are judged. The model is left as it was;
    ``npeff.applied(model, mending.change)`` makes the change.

    Args:
        model: The model of the Fishers, in evaluation mode.
        data: Labelled batches, as for :func:`npeff.compute_fishers`.
        components: Low-rank components of the model.
        which: A component, several, or a strategy: a group of ``components.strategies(n)``. Its root, which holds all
            components, gives a warning.
        repair: Positions in ``data`` of the examples to repair, or a mask; by default the wrongly predicted ones on
            which the chosen components hold at least half of the coefficients.
        tolerance: Largest fall of the accuracy on the other examples, one standard error of it included. It bounds
            the average over all of them; a subgroup may lose more.
        by_layer: Whether every layer's part of a direction has a step of its own; otherwise, as published, all layers
            move together along ±g_j.
        iterations: Of the optimiser, per λ.
        forward: ``forward(model, batch) -> logits``.
        device: Where to compute; the model's own device by default.
        seed: Determines the division of the examples.
        progress: Show a progress bar.

    Returns:
        The change, and its effect.

    Raises:
        ArgumentError: A component or an example does not exist, or the components are not low-rank.
        DataError: Labels are missing or no classes, outputs are not finite, there is nothing to repair, or without
            ``repair`` the data is not that of the Fishers.
        ModelError: The model fails, or is in training mode with layers whose outputs depend on the mode.
        OutOfMemoryError: There is too little memory for a batch.
    """
    check_components(components)
    chosen = _indices(components, which)
    if components.kind != "low_rank":
        raise ArgumentError(
            "components: mending moves along pseudo-Fisher vectors, which low-rank components have; these are "
            f"{components.kind}"
        )
    check_share("tolerance", tolerance)
    iterations, seed = check_integer("iterations", iterations), check_integer("seed", seed, 0)
    fishers = components.provenance.get("fishers") or {}
    how = {"forward": forward, "device": device, "likelihood": None}
    with checked_model(model, data, components, how) as checked:
        check_places(data, fishers if repair is None else {}, checked.model)  # positions may be given of other places
        components.ensure_vectors(chosen, checked.model, data, forward=forward, device=device, progress=progress)
        batches = list(read_batches(data, checked.device, *checked.layout))
        if not batches:
            raise DataError("data: it has no batches; if it is a generator it may be used up: pass a list")
        examples = LabelledExamples(checked, batches)
        wanted = _to_repair(components, chosen, examples, repair)
        part = divide_examples(wanted, seed)
        held_out = bool((wanted & (part == 2)).any() and (~wanted & (part == 2)).any())
        judged = part == 2 if held_out else np.ones(len(part), bool)
        R, K = wanted & judged, ~wanted & judged
        _warn_of_few(int(R.sum()), int(K.sum()), held_out)
        directions = [_blocks(components, j, checked.device) for j in chosen]
        steps = LayerSteps(directions, {p.name: p.shape for p in components.parameters}, by_layer)
        weights = Weights(checked.model)
        try:
            c = _best_step(examples, weights, steps, wanted, part, tolerance, iterations, progress)
            change = steps.change(c)
            weights.move(change, 1.0)
            every = np.arange(len(part))
            after = examples.answered(examples.outputs(examples.some(every >= 0)), every)
        finally:
            weights.restore()
    return Mending(
        components=chosen,
        layers=steps.layers,
        coefficients=steps.coefficients(c),
        change={name: tensor.cpu() for name, tensor in change.items()},
        repaired=(share(examples.right[R]), share(after[R])),
        accuracy=(share(examples.right[K]), share(after[K])),
        n_repair=int(R.sum()),
        n_others=int(K.sum()),
        held_out=held_out,
    )


def _warn_of_few(n_repair: int, n_others: int, held_out: bool) -> None:
    if not held_out or min(n_repair, n_others) < ENOUGH:
        warnings.warn(
            f"mend: its result is judged on {n_repair} examples to repair and {n_others} others"
            f"{'' if held_out else ', those of the search itself'}: that on new examples may be quite different. Give "
            f"more labelled examples (a quarter is set aside: {4 * ENOUGH} of each leave {ENOUGH}), or judge the "
            "change on others yourself",
            stacklevel=3,
        )


def _indices(components: Components, which: int | Sequence[int] | Strategy) -> tuple[int, ...]:
    if isinstance(which, Strategy | int | np.integer):
        return target_of(components, which, "which").members
    if not isinstance(which, Iterable) or not (numbers := list(which)):
        r = components.n_components
        raise ArgumentError(f"which: expected components below {r}, or a strategy, got {which!r}")
    return tuple(dict.fromkeys(k for j in numbers for k in target_of(components, j, "which").members))


def _blocks(components: Components, j: int, device: torch.device) -> dict[str, DirectionBlock]:
    """Component j's direction: factors stay factors, and vectors in memory are not copied."""
    return {
        parameter.name: DirectionBlock(
            as_tensor(left).to(device), None if right is None else as_tensor(right).to(device)
        )
        for parameter, left, right in components.blocks(j)
    }


def _to_repair(
    components: Components,
    chosen: tuple[int, ...],
    examples: LabelledExamples,
    repair: Sequence[int] | Array | None,
) -> Array:
    """Choose the examples to repair, ``(n,)`` bool.

    Raises:
        ArgumentError: Given examples do not exist, or the components are of other data.
        DataError: There are fewer than two, or the data is not that of the Fishers.
    """
    n, ids = len(examples.right), components.ids
    wanted = np.zeros(n, bool)
    if repair is not None:
        wanted[given_rows("repair", repair, n, "positions of examples in data") if np.size(repair) else []] = True
    else:
        if len(ids) and ids.max() >= n:
            raise ArgumentError(
                f"data: it has {n} examples, but the components are of examples up to {ids.max()}; "
                "pass the data that the Fishers were computed from, or repair="
            )
        own = examples.logits[as_tensor(ids)]
        check_outputs(differing(own, components.logits, np.arange(len(ids))), ids, examples.checked.same)
        W = components.coefficients.astype(np.float64)
        held = W[:, chosen].sum(1) / np.maximum(W.sum(1), 1e-30)
        wanted[ids[held >= 0.5]] = True
        wanted &= ~examples.right
    if wanted.sum() < 2:
        raise DataError(
            f"repair: {int(wanted.sum())} wrongly predicted examples belong to these components; at least 2 are "
            "needed. Name the examples to repair with repair="
        )
    return wanted


def divide_examples(wanted: Array, seed: int) -> Array:
    """Assign 0 (fit), 1 (choose) or 2 (judge) to examples ``(n,)``; divide those to repair and the others alike."""
    rng = np.random.default_rng(seed)
    part = np.zeros(len(wanted), np.int64)
    for group in (np.flatnonzero(wanted), np.flatnonzero(~wanted)):
        order = rng.permutation(group)
        n = len(order)
        part[order[n // 2 : n // 2 + (n - n // 2) // 2]] = 1
        part[order[n // 2 + (n - n // 2) // 2 :]] = 2
        if n < 8:  # too few to set some aside for judgement: fit on the first half, choose on the second
            part[order] = np.where(np.arange(n) < (n + 1) // 2, 0, 1)
    return part


def _best_step(
    examples: LabelledExamples, weights: Weights, steps: LayerSteps, wanted: Array, part: Array, tolerance: float,
    iterations: int, progress: bool,
) -> Array:  # fmt: skip
    """The step that repairs most on the part for the choice, within the tolerance; 0 if none does."""
    line = steps.shape == (1, 1)
    chooses = part == 1 if (wanted & (part == 1)).any() and not line else part != 2
    # A few numbers hardly adapt to the examples of the fit: accuracy is watched on these too, three times as many.
    watched = wanted & chooses, ~wanted & (part != 2)
    fitted = (watched[0], np.zeros_like(wanted)) if line else (wanted & (part == 0), ~wanted & (part == 0))
    search = Repair(examples, weights, steps, fitted, watched, tolerance)
    if line:
        search.along_the_line(progress)
    else:
        search.down_the_path(iterations, progress)
    return search.best
