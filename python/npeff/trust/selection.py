"""Choose the number of components: the loss on held-out examples against it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from tqdm import tqdm

from npeff import kernels
from npeff.components.components import Components, statistics
from npeff.decomposition.decompose import decompose
from npeff.errors import ArgumentError
from npeff.fishers.fishers import Fishers
from npeff.fishers.scaling import ScaledRows, fisher_norms
from npeff.short_repr import several

Array = npt.NDArray[Any]


@dataclass(frozen=True, eq=False)
class Selection:
    """Held-out losses by number of components.

    Attributes:
        n_components: The numbers tried, ascending.
        train: ``(len(n_components),)`` float64 relative loss on the examples that were decomposed, mean over folds.
        held_out: ``(folds, len(n_components))`` float64 relative loss on parameters and examples that were not.
        chosen: The fewest components whose mean held-out loss is within one standard error of the best.
    """

    n_components: tuple[int, ...]
    train: Array
    held_out: Array
    chosen: int

    def __repr__(self) -> str:
        folds = len(self.held_out)
        loss = float(self.held_out[:, self.n_components.index(self.chosen)].mean())
        numbers = several(self.n_components)
        return f"Selection(chosen {self.chosen} of {numbers}; held-out loss {loss:.4f}, mean of {folds} folds)"

    def to_json(self) -> dict[str, Any]:
        """Describe it for JSON."""
        return {
            "n_components": list(self.n_components),
            "train": self.train.tolist(),
            "held_out": self.held_out.tolist(),
            "chosen": self.chosen,
        }


def select(
    fishers: Fishers,
    n_components: Sequence[int],
    *,
    folds: int = 3,
    seed: int = 0,
    progress: bool = True,
    **options: Any,
) -> Selection:
    """Try several numbers of components by bi-cross-validation (Owen & Perry 2009).

    A fold's examples are left out of the decomposition. Their coefficients are then solved for on a random half of the
    parameters, and judged on the other half, so that a component that only fits noise raises the loss. Then the halves
    change places, and both losses are averaged.

    Args:
        fishers: The Fishers, either kind.
        n_components: Numbers to try.
        folds: Parts that are held out in turn.
        seed: Decides the parts and the decompositions.
        progress: Show a progress bar.
        **options: As for :func:`npeff.decompose`.

    Raises:
        ArgumentError: A number is out of range, or there are too few examples.
    """
    if fishers.rows.products_only:
        raise ArgumentError(
            "fishers: inner products alone (GramOnly) cannot be split into halves of the parameters, on which the "
            "number of components is judged; compute Fishers with compress=None, TopK(k) or Sketch(d) (--exact, "
            "--top-k, --sketch), or choose the number yourself"
        )
    numbers = tuple(sorted({int(r) for r in n_components}))
    if not numbers or numbers[0] < 1:
        raise ArgumentError(f"n_components: expected numbers of at least 1, got {list(n_components)!r}")
    if folds < 2 or folds > len(fishers):
        raise ArgumentError(f"folds: expected 2 to {len(fishers)} (the examples), got {folds}")
    rng = np.random.default_rng(seed)
    fold_of = rng.permutation(len(fishers)) % folds
    train, held_out = np.zeros((folds, len(numbers))), np.zeros((folds, len(numbers)))
    bar = tqdm(total=folds * len(numbers), desc="select", disable=not progress, unit="run")
    for fold in range(folds):
        seen, unseen = fishers[fold_of != fold], fishers[fold_of == fold]
        for column, r in enumerate(numbers):
            components = decompose(seen, r, seed=seed, progress=False, **options)
            train[fold, column] = components.loss
            held_out[fold, column] = held_out_loss(components, unseen, seed)
            bar.update()
    bar.close()
    mean, error = held_out.mean(0), held_out.std(0, ddof=1) / np.sqrt(folds)
    best = int(mean.argmin())
    chosen = numbers[int(np.flatnonzero(mean <= mean[best] + error[best])[0])]
    return Selection(numbers, train.mean(0), held_out, chosen)


def held_out_loss(components: Components, fishers: Fishers, seed: int = 0) -> float:
    """Compute the relative loss on each half of the parameters with coefficients of the other half; average both.

    Args:
        components: A decomposition of other examples.
        fishers: Examples to judge it on.
        seed: Decides the halves.
    """
    scaled = components._scale(fishers)
    side = np.random.default_rng(seed).permutation(scaled.rows.n_columns) % 2
    halves = [np.flatnonzero(side == s) for s in (0, 1)]
    parts = [_restricted(scaled, half, fishers.kind) for half in halves]
    vectors = torch.from_numpy(components.vectors).double()
    cross, gram = zip(
        *(statistics(fishers.kind, part, vectors[:, half]) for part, half in zip(parts, halves, strict=True)),
        strict=True,
    )
    losses = []
    for here, there in ((0, 1), (1, 0)):
        w = kernels.nnls(gram[here], cross[here], exact=True).w
        energy = float(np.square(parts[there].fisher_norms).sum())
        left = energy - 2 * float((w * cross[there]).sum()) + float(((w.T @ w) * gram[there]).sum())
        losses.append(left / energy if energy else 0.0)
    return float(np.mean(losses))


def _restricted(scaled: ScaledRows, columns: Array, kind: str) -> ScaledRows:
    """The rows on some of their columns; the Fisher norms are those of the restricted rows."""
    rows = scaled.rows.on_columns(columns)
    return ScaledRows(rows, scaled.row_offsets, None, fisher_norms(rows, scaled.row_offsets, kind), None)
