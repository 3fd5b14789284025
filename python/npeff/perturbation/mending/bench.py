"""The search for a repair: examples parted, λ along its path, the bench on which the model is moved and restored."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from npeff.batches.batch_order import check_sampler
from npeff.batches.batches import Batch, read_batches
from npeff.components.components import Components
from npeff.components.strategies import Strategy
from npeff.errors import ArgumentError, DataError
from npeff.fishers.computation import Forward
from npeff.gradients.selection import placed
from npeff.models.forward import call_model
from npeff.perturbation.mending.objective import Directions, Objective
from npeff.perturbation.mending.search import Judge, along_the_line, down_the_path
from npeff.perturbation.weights import Weights
from npeff.short_repr import several

Array = npt.NDArray[Any]


@dataclass(frozen=True, eq=False)
class Mending:
    """A change of the weights, and what it does.

    Attributes:
        components: Whose directions it is made of.
        layers: The modules whose parts have a step each; one empty name where all layers go together.
        coefficients: ``(k, len(layers))`` float64 multiples of each component's part in each layer; all 0 when nothing
            could be repaired within the tolerance.
        change: What is added to the weights, parameter-shaped: use it with :func:`npeff.applied`.
        repaired: Share of the examples to repair that are answered as labelled, ``(before, after)``, on those that
            neither the fit nor the choice of λ saw when ``held_out`` is true.
        accuracy: Accuracy on the other examples, ``(before, after)``, likewise.
        n_repair: Examples to repair that these shares are of.
        n_others: Other examples that the accuracies are of.
        held_out: Whether there were enough examples to keep a part for this last judgement.
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
            f"components {several(self.components)} in {len(self.layers)} layer{'s' if len(self.layers) > 1 else ''}"
        )
        repaired = f"right on {self.n_repair} to repair {self.repaired[0]:.0%} → {self.repaired[1]:.0%}"
        others = f"on {self.n_others} others {self.accuracy[0]:.1%} → {self.accuracy[1]:.1%}"
        judged = "examples that were kept aside" if self.held_out else "the examples of the search itself"
        change = "" if self.changed else "; no change was found within the tolerance"
        return f"Mending({along}: {repaired}, {others}; judged on {judged}{change})"

    @property
    def changed(self) -> bool:
        """Whether a repair within the tolerance was found."""
        return bool(np.any(self.coefficients))

    def to_json(self) -> dict[str, Any]:
        """JSON-able description, without the change itself."""
        return {
            "components": list(self.components),
            "layers": list(self.layers),
            "coefficients": self.coefficients.tolist(),
            "repaired": list(self.repaired),
            "accuracy": list(self.accuracy),
            "n_repair": self.n_repair,
            "n_others": self.n_others,
            "held_out": self.held_out,
        }


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

    The examples are parted at random: half to fit c, a quarter to choose λ, a quarter to judge. The model is left as it
    was; ``npeff.applied(model, mending.change)`` makes the change.

    Args:
        model: The model that the Fishers were of, in evaluation mode.
        data: Labelled batches, as for :func:`npeff.compute_fishers`.
        components: Low-rank components of the model.
        which: A component, several, or a strategy.
        repair: Positions in ``data`` of the examples to repair; by default the wrongly predicted ones on which the
            chosen components hold at least half of the coefficients.
        tolerance: Largest fall of the accuracy on all other examples, one standard error of it included.
        by_layer: Whether every layer's part of a direction has a step of its own; otherwise, as published, all layers
            move together along ±g_j.
        iterations: Of the optimiser, per λ.
        forward: ``forward(model, batch) -> logits``.
        device: Where to compute; the model's own device by default.
        seed: Decides the parts.
        progress: Show a progress bar.

    Raises:
        ArgumentError: A component or an example is not there, or the components are not low-rank.
        DataError: Labels are missing, or there is nothing to repair.
    """
    chosen = _indices(components, which)
    if components.kind != "low_rank":
        raise ArgumentError(
            "components: mending moves along pseudo-Fisher vectors, which low-rank components have; these are "
            f"{components.kind}"
        )
    if not 0 <= tolerance <= 1:
        raise ArgumentError(f"tolerance: expected a share between 0 and 1, got {tolerance}")
    if iterations < 1:
        raise ArgumentError(f"iterations: expected at least 1, got {iterations}")
    check_sampler(data)
    with placed(model, device) as place:
        batches = list(read_batches(data, place, forward is not None))
        likelihood = components.provenance.get("fishers", {}).get("options", {}).get("likelihood", "categorical")
        bench = Bench(model, batches, forward, likelihood)
        return bench.mend(components, chosen, repair, tolerance, by_layer, iterations, seed, progress)


class Bench:
    """The model on its bench: its batches, what it says of them, and weights that can be moved."""

    def __init__(
        self, model: nn.Module, batches: list[Batch], forward: Forward | None, likelihood: str = "categorical"
    ) -> None:
        self.model, self.batches, self.forward, self.likelihood = model, batches, forward, likelihood
        if any(batch.labels is None for batch in batches):
            raise DataError("labels: mending needs them; pass batches of (inputs, labels)")
        if not batches:
            raise DataError("data: it has no batches")
        self.labels = torch.cat([batch.labels.long() for batch in batches if batch.labels is not None])
        self.logits = self.outputs()

    @torch.no_grad()
    def outputs(self) -> Tensor:
        """``(n, C)`` logits with the weights as they now are."""
        return torch.cat(
            [call_model(self.model, self.forward, batch, self.likelihood).float() for batch in self.batches]
        )

    def mend(
        self,
        components: Components,
        chosen: tuple[int, ...],
        repair: Sequence[int] | Array | None,
        tolerance: float,
        by_layer: bool,
        iterations: int,
        seed: int,
        progress: bool,
    ) -> Mending:
        """See :func:`mend`."""
        wanted = self._wanted(components, chosen, repair)
        part = _parts(wanted, seed)
        device = self.labels.device
        directions = Directions(
            [{name: tensor.to(device) for name, tensor in components.state_dict(j).items()} for j in chosen], by_layer
        )
        weights = Weights(self.model)
        try:
            c = self._search(weights, directions, wanted, part, tolerance, iterations, progress)
            weights.move(directions.change(c), 1.0)
            after = self.outputs()
        finally:
            weights.restore()
        held_out = bool((wanted & (part == 2)).any() and (~wanted & (part == 2)).any())
        judged = part == 2 if held_out else np.ones(len(part), bool)
        R, K = wanted & judged, ~wanted & judged
        return Mending(
            chosen,
            directions.layers,
            directions.coefficients(c),
            {name: tensor.cpu() for name, tensor in directions.change(c).items()},
            (self._accuracy(self.logits, R), self._accuracy(after, R)),
            (self._accuracy(self.logits, K), self._accuracy(after, K)),
            int(R.sum()),
            int(K.sum()),
            held_out,
        )

    def _wanted(self, components: Components, chosen: tuple[int, ...], repair: Sequence[int] | Array | None) -> Array:
        n = len(self.labels)
        wanted = np.zeros(n, bool)
        if repair is not None:
            positions = np.asarray(repair, np.int64).reshape(-1)
            if len(positions) and not (positions.min() >= 0 and positions.max() < n):
                raise ArgumentError(f"repair: expected positions below {n}, the examples in data, got {repair!r}")
            wanted[positions] = True
        else:
            if len(components.ids) and components.ids.max() >= n:
                raise ArgumentError(
                    f"data: it has {n} examples, but the components are of examples up to {components.ids.max()}; "
                    "pass the data that the Fishers were computed from, or repair="
                )
            W = components.coefficients.astype(np.float64)
            share = W[:, chosen].sum(1) / np.maximum(W.sum(1), 1e-30)
            wanted[components.ids[share >= 0.5]] = True
            wanted &= (self.logits.argmax(1) != self.labels).cpu().numpy()
        if wanted.sum() < 2:
            raise DataError(
                f"repair: {int(wanted.sum())} wrongly predicted examples belong to these components; at least 2 are "
                "needed. Name the examples to repair with repair="
            )
        return wanted

    def _search(
        self, weights: Weights, directions: Directions, wanted: Array, part: Array, tolerance: float, iterations: int,
        progress: bool,
    ) -> Array:  # fmt: skip
        """The step that repairs most on the part kept for the choice, within the tolerance; 0 if none does."""
        line = directions.shape == (1, 1)
        chooses = part == 1 if (wanted & (part == 1)).any() and not line else part != 2
        # A few numbers hardly adapt to the examples of the fit: accuracy is watched on these too, three times as many.
        R, K = wanted & chooses, ~wanted & (part != 2)
        said = (self.model, self.forward, self.batches, self.labels, self.logits)
        judge = Judge(*said, weights, directions, R, K, tolerance, self.likelihood)
        if line:
            nothing = np.zeros(len(R), bool)
            along_the_line(judge, Objective(*said, directions, R, nothing, self.likelihood), progress)
        else:
            fitted = part == 0
            objective = Objective(*said, directions, wanted & fitted, ~wanted & fitted, self.likelihood)
            down_the_path(judge, objective, iterations, progress)
        return judge.best

    def _accuracy(self, logits: Tensor, which: Array) -> float:
        right = (logits.argmax(1) == self.labels).cpu().numpy()
        return float(right[which].mean()) if which.any() else 0.0


def _indices(components: Components, which: int | Sequence[int] | Strategy) -> tuple[int, ...]:
    if isinstance(which, Strategy):
        return which.components
    several = [which] if isinstance(which, int | np.integer) else list(which)
    r = components.n_components
    if not several or any(not isinstance(j, int | np.integer) or not -r <= j < r for j in several):
        raise ArgumentError(f"which: expected components below {r}, or a strategy, got {which!r}")
    return tuple(dict.fromkeys(int(j) % r for j in several))


def _parts(wanted: Array, seed: int) -> Array:
    """``(n,)`` 0: fit, 1: choose, 2: judge; of those to repair and of the others alike."""
    rng = np.random.default_rng(seed)
    part = np.zeros(len(wanted), np.int64)
    for group in (np.flatnonzero(wanted), np.flatnonzero(~wanted)):
        order = rng.permutation(group)
        n = len(order)
        part[order[n // 2 : n // 2 + (n - n // 2) // 2]] = 1
        part[order[n // 2 + (n - n // 2) // 2 :]] = 2
        if n < 8:  # too few to keep a part for judgement: fit on the first half, choose on the second
            part[order] = np.where(np.arange(n) < (n + 1) // 2, 0, 1)
    return part
