"""Mending a model through its components: answers that came by a wrong route change, all others stay.

A component that stands for a shortcut, a backdoor or a flawed heuristic says which weights carry it: its own direction
g_j. So the repair is sought there and nowhere else. With G the directions of the chosen components (k of them), R the
examples to repair and K the others,

``min_c  mean_{i∈R} −log p(y_i | x_i, θ + Gᵀc)  +  λ · mean_{i∈K} KL(p(·|x_i, θ) ‖ p(·|x_i, θ + Gᵀc))``

has only k unknowns. It is solved along a path of falling λ; of its points the one is taken that repairs most on
examples kept aside for the choice, while accuracy on the others, of the fit and of the choice, falls by no more than a
tolerance. Matena &
Raffel (2023) mend by a line search along ±g_j, the case k = 1.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from tqdm import tqdm

from npeff.batches import Batch, call_model, check_data, read_batch
from npeff.components import Components
from npeff.computation import Forward
from npeff.errors import ArgumentError, DataError
from npeff.gradients.selection import placed
from npeff.perturbation.weights import Weights
from npeff.strategies import Strategy

Array = npt.NDArray[Any]

PATH = (30.0, 10.0, 3.0, 1.0, 0.3, 0.1)
"""λ, from careful to bold."""


@dataclass(frozen=True, eq=False)
class Mending:
    """A change of the weights, and what it does.

    Attributes:
        components: Whose directions it is made of.
        coefficients: ``(k,)`` float64 c; all 0 when nothing could be repaired within the tolerance.
        change: Gᵀc as parameter-shaped tensors: add it to the weights, or use it with :func:`npeff.applied`.
        repaired: Share of the examples to repair that are answered as labelled, ``(before, after)``, on those that
            neither the fit nor the choice of λ saw when ``held_out`` is true.
        accuracy: Accuracy on the other examples, ``(before, after)``, likewise.
        n_repair: Examples to repair that these shares are of.
        n_others: Other examples that the accuracies are of.
        held_out: Whether there were enough examples to keep a part for this last judgement.
    """

    components: tuple[int, ...]
    coefficients: Array
    change: dict[str, Tensor]
    repaired: tuple[float, float]
    accuracy: tuple[float, float]
    n_repair: int
    n_others: int
    held_out: bool

    @property
    def changed(self) -> bool:
        """Whether a repair within the tolerance was found."""
        return bool(np.any(self.coefficients))

    def to_json(self) -> dict[str, Any]:
        """JSON-able description, without the change itself."""
        return {
            "components": list(self.components),
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
    iterations: int = 20,
    forward: Forward | None = None,
    device: torch.device | str | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Mending:
    """Find a change of the weights within the span of some components that repairs wrong answers.

    The examples are parted at random: half to fit c, a quarter to choose λ, a quarter to judge. The model is left as it
    was; ``npeff.applied(model, mending.change)`` makes the change.

    Args:
        model: The model that the Fishers were of, in evaluation mode.
        data: Labelled batches, as for :func:`npeff.compute_fishers`.
        components: Low-rank components of the model.
        which: A component, several, or a strategy.
        repair: Positions in ``data`` of the examples to repair; by default the wrongly predicted ones on which the
            chosen components hold at least half of the coefficients.
        tolerance: Largest fall of the accuracy on all other examples.
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
    with placed(model, device) as place:
        batches = [read_batch(raw, place, i, forward is not None) for i, raw in enumerate(check_data(data))]
        return _Bench(model, batches, forward).mend(components, chosen, repair, tolerance, iterations, seed, progress)


class _Bench:
    """The model on its bench: its batches, what it says of them, and weights that can be moved."""

    def __init__(self, model: nn.Module, batches: list[Batch], forward: Forward | None) -> None:
        self.model, self.batches, self.forward = model, batches, forward
        if any(batch.labels is None for batch in batches):
            raise DataError("labels: mending needs them; pass batches of (inputs, labels)")
        if not batches:
            raise DataError("data: it has no batches")
        self.labels = torch.cat([batch.labels.long() for batch in batches if batch.labels is not None])
        self.logits = self.outputs()

    @torch.no_grad()
    def outputs(self) -> Tensor:
        """``(n, C)`` logits with the weights as they now are."""
        return torch.cat([call_model(self.model, self.forward, batch).float() for batch in self.batches])

    def mend(
        self,
        components: Components,
        chosen: tuple[int, ...],
        repair: Sequence[int] | Array | None,
        tolerance: float,
        iterations: int,
        seed: int,
        progress: bool,
    ) -> Mending:
        """See :func:`mend`."""
        wanted = self._wanted(components, chosen, repair)
        part = _parts(wanted, seed)
        basis = [
            {name: tensor.to(self.labels.device) for name, tensor in components.state_dict(j).items()} for j in chosen
        ]
        objective = _Objective(self, basis, wanted & (part == 0), ~wanted & (part == 0))
        weights = Weights(self.model)
        try:
            found = objective.path(weights, iterations, progress)
            c = self._choose(weights, objective, found, wanted, part, tolerance)
            objective.move(weights, c)
            after = self.outputs()
        finally:
            weights.restore()
        held_out = bool((wanted & (part == 2)).any() and (~wanted & (part == 2)).any())
        judged = part == 2 if held_out else np.ones(len(part), bool)
        R, K = wanted & judged, ~wanted & judged
        return Mending(
            chosen,
            c,
            {name: tensor.cpu() for name, tensor in objective.direction(c).items()},
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

    def _choose(
        self, weights: Weights, objective: _Objective, found: list[Array], wanted: Array, part: Array, tolerance: float
    ) -> Array:
        """The point of the path that repairs most on the part kept for it, within the tolerance; 0 if none does."""
        judged = part == 1 if (wanted & (part == 1)).any() else part == 0
        # k numbers hardly adapt to the examples of the fit: accuracy is watched on these too, three times as many.
        R, K = wanted & judged, ~wanted & (part != 2)
        before = self._accuracy(self.logits, K)
        best, chosen = self._accuracy(self.logits, R), np.zeros(len(objective.basis))
        for c in found:
            objective.move(weights, c)
            after = self.outputs()
            if self._accuracy(after, K) >= before - tolerance and self._accuracy(after, R) > best:
                best, chosen = self._accuracy(after, R), c
        return chosen

    def _accuracy(self, logits: Tensor, which: Array) -> float:
        right = (logits.argmax(1) == self.labels).cpu().numpy()
        return float(right[which].mean()) if which.any() else 0.0


class _Objective:
    """The loss over c, and its gradient ``G ∇_θ``: one backward pass, whatever the number of directions."""

    def __init__(self, bench: _Bench, basis: list[dict[str, Tensor]], R: Array, K: Array) -> None:
        self.bench, self.basis = bench, basis
        device = bench.labels.device
        self.weight_R = torch.from_numpy(R / max(1, R.sum())).to(device)
        self.weight_K = torch.from_numpy(K / max(1, K.sum())).to(device)
        named = dict(bench.model.named_parameters(remove_duplicate=False))
        self.names = [name for name in basis[0] if name in named]
        self.tensors = [named[name] for name in self.names]

    def direction(self, c: Array) -> dict[str, Tensor]:
        """Gᵀc, parameter-shaped."""
        return {
            name: torch.stack([float(x) * g[name] for x, g in zip(c, self.basis, strict=True)]).sum(0)
            for name in self.basis[0]
        }

    def move(self, weights: Weights, c: Array) -> None:
        """Set the weights to θ + Gᵀc."""
        weights.move(self.direction(c), 1.0)

    def path(self, weights: Weights, iterations: int, progress: bool) -> list[Array]:
        """Solutions along falling λ, each started from the one before."""
        from scipy.optimize import minimize

        c, found = np.zeros(len(self.basis)), []
        for strength in tqdm(PATH, "mending", disable=not progress):
            solution = minimize(
                lambda c, strength=strength: self.value_and_gradient(weights, c, strength),
                c,
                jac=True,
                method="L-BFGS-B",
                options={"maxiter": iterations},
            )
            if np.isfinite(solution.fun):
                c = np.asarray(solution.x, np.float64)
                found.append(c)
        return found

    def value_and_gradient(self, weights: Weights, c: Array, strength: float) -> tuple[float, Array]:
        """The objective of the module's docstring, and its ``(k,)`` gradient."""
        self.move(weights, c)
        value, gradient, start = 0.0, np.zeros(len(c)), 0
        frozen = [tensor.requires_grad for tensor in self.tensors]
        try:
            for tensor in self.tensors:
                tensor.requires_grad_(True)
            for batch in self.bench.batches:
                part = slice(start, start + batch.n_examples)
                start += batch.n_examples
                r, k = self.weight_R[part], strength * self.weight_K[part]
                if not bool((r + k).any()):
                    continue
                with torch.enable_grad():
                    log_p = torch.log_softmax(call_model(self.bench.model, self.bench.forward, batch).double(), 1)
                    log_q = torch.log_softmax(self.bench.logits[part].double(), 1)
                    wrong = -log_p.gather(1, self.bench.labels[part, None])[:, 0]
                    moved = (log_q.exp() * (log_q - log_p)).sum(1)
                    loss = (r * wrong + k * moved).sum()
                    slopes = torch.autograd.grad(loss, self.tensors, allow_unused=True)
                value += float(loss.detach())
                for i, g in enumerate(self.basis):
                    gradient[i] += sum(
                        float((slope.double() * g[name].double()).sum())
                        for name, slope in zip(self.names, slopes, strict=True)
                        if slope is not None
                    )
        finally:
            for tensor, was in zip(self.tensors, frozen, strict=True):
                tensor.requires_grad_(was)
        return value, gradient


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
