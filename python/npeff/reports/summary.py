"""What a page says about each component, as numbers: no pictures, no markup."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from npeff.components.parameter_vectors import not_recovered
from npeff.reports.selection import ACTIVE, at_random, middle

if TYPE_CHECKING:
    from npeff.components.components import Components

Array = npt.NDArray[Any]

DELAY = 3.0  # seconds before a progress bar shows
BINS = 28
BLOCKS = 8
CLASSES = 8


@dataclass(frozen=True)
class Top:
    """One of the examples with the largest coefficients.

    Attributes:
        index: Among the decomposed examples.
        position: In the data.
        coefficient: W_ij.
        label: True class, −1 where unknown.
        prediction: Predicted class, −1 where unknown.
    """

    index: int
    position: int
    coefficient: float
    label: int
    prediction: int

    @property
    def wrong(self) -> bool:
        """Whether the prediction is known to be wrong."""
        return self.label >= 0 and self.prediction >= 0 and self.label != self.prediction


@dataclass(frozen=True)
class Summary:
    """One component in numbers.

    Attributes:
        j: The component.
        share: Σ_i W_ij as a share of Σ W.
        top: Examples by falling coefficient; none with coefficient 0.
        middle: Examples around the median of the active ones, without those at the top.
        random: Others with a coefficient above zero, drawn at random.
        energy: Mean squared coefficient, ``Σ_i W_ij² / n``.
        n_active: Examples with at least a tenth of the largest coefficient.
        n_zero: Examples with coefficient 0.
        purity: Share of the top examples with the commonest prediction among them; None without predictions.
        accuracy: Share of the active, labelled examples predicted rightly; None without labels.
        contest: ``(class, share)``: the classes between which the model weighs on the top examples.
        classes: ``(class, active examples with that label, … with that prediction)``, largest first.
        n_other: Classes beyond those, with any active example.
        histogram: Counts of the non-zero coefficients in bins of equal width up to the largest.
        profile: ``(C,)`` share of the component's weight per predicted class.
        blocks: ``(parameter, share of ‖g_j‖²)``, largest first, the rest summed under the name ``None``.
        block_energy: Share of ‖g_j‖² of every parameter; empty where the vector in parameter space was not recovered.
    """

    j: int
    share: float
    top: list[Top]
    middle: list[Top]
    random: list[Top]
    n_active: int
    n_zero: int
    purity: float | None
    accuracy: float | None
    contest: list[tuple[int, float]]
    classes: list[tuple[int, int, int]]
    n_other: int
    histogram: list[int]
    profile: Array
    blocks: list[tuple[str | None, float]]
    block_energy: dict[str, float]
    energy: float

    @property
    def shown(self) -> list[Top]:
        """All examples on the component's page."""
        return [*self.top, *self.middle, *self.random]

    @property
    def leading_class(self) -> int:
        """The predicted class with most of its weight; −1 without predictions."""
        return int(self.profile.argmax()) if len(self.profile) and self.profile.any() else -1

    @property
    def largest(self) -> float:
        """The largest coefficient."""
        return self.top[0].coefficient if self.top else 0.0


def summarise(components: Components, k: int, seed: int = 0, progress: bool = False) -> list[Summary]:
    """Summaries of all components, the largest share first.

    Args:
        components: A decomposition.
        k: Top examples of each; half as many from the middle, and half as many at random.
        seed: Decides the random ones.
        progress: Show a progress bar.
    """
    W = np.asarray(components.coefficients)
    sizes = W.sum(0, dtype=np.float64)
    total = float(sizes.sum()) or 1.0
    order = np.argsort(-sizes, kind="stable")
    bar = tqdm(order, "components", delay=DELAY, disable=not progress, unit="component")
    return [_summary(components, int(j), float(sizes[j]) / total, k, seed) for j in bar]


def summary_of(components: Components, j: int, k: int) -> Summary:
    """The summary of one component."""
    W = components.coefficients
    total = float(W.sum(dtype=np.float64)) or 1.0
    return _summary(components, j, float(W[:, j].sum(dtype=np.float64)) / total, k, 0)


def _summary(components: Components, j: int, share: float, k: int, seed: int) -> Summary:
    w = np.asarray(components.coefficients[:, j], np.float64)
    labels, predictions = np.asarray(components.labels), known_predictions(components)
    best = components.top_examples(j, k=k)
    best = best[w[best] > 0]
    between = middle(w, best, k // 2)
    others = at_random(w, np.concatenate([best, between]), k // 2, (seed, j))
    top = tops(components, best, w)
    largest = float(w.max(initial=0))
    active = (w >= ACTIVE * largest) & (w > 0)
    known = active & (labels >= 0) & (predictions >= 0)
    seen = predictions >= 0
    counts = np.unique([t.prediction for t in top], return_counts=True)[1] if top else np.zeros(1)
    classes = _classes(labels[active], predictions[active])
    n_classes = components.logits.shape[1]
    blocks = {} if j in not_recovered(components) else components.block_energy(j)
    profile = np.bincount(predictions[seen], w[seen], minlength=n_classes) / (float(w.sum()) or 1.0)
    return Summary(
        j=j,
        share=share,
        top=top,
        middle=tops(components, between, w),
        random=tops(components, others, w),
        n_active=int(active.sum()),
        n_zero=int((w == 0).sum()),
        purity=float(counts.max() / max(1, len(top))) if seen.any() else None,
        accuracy=float((labels == predictions)[known].mean()) if known.any() else None,
        contest=_contest(components, top),
        classes=classes[:CLASSES],
        n_other=len(classes[CLASSES:]),
        histogram=np.histogram(w[w > 0], BINS, (0.0, largest or 1.0))[0].tolist(),
        profile=profile,
        blocks=_blocks(blocks),
        block_energy=blocks,
        energy=float(np.mean(np.square(w))) if len(w) else 0.0,
    )


def tops(components: Components, indices: Array, w: Array) -> list[Top]:
    """Examples by their indices, with their coefficients ``w (n,)``."""
    predictions = known_predictions(components)
    return [
        Top(int(i), int(components.ids[i]), float(w[i]), int(components.labels[i]), int(predictions[i]))
        for i in indices
    ]


def known_predictions(components: Components) -> Array:
    """``(n,)`` predicted classes; −1 for all where the file had no logits."""
    n, n_classes = components.logits.shape
    return np.asarray(components.predictions) if n_classes else np.full(n, -1, np.int64)


def _classes(labels: Array, predictions: Array) -> list[tuple[int, int, int]]:
    classes = np.union1d(labels[labels >= 0], predictions[predictions >= 0])
    rows = [(int(c), int((labels == c).sum()), int((predictions == c).sum())) for c in classes]
    return sorted(rows, key=lambda row: (-row[1] - row[2], row[0]))


def _contest(components: Components, top: Sequence[Top]) -> list[tuple[int, float]]:
    """Shares of trace(diag p − ppᵀ) = Σ_y p_y (1 − p_y) by class, the top examples' weighted mean."""
    logits = np.asarray(components.logits[[t.index for t in top]], np.float64)
    if not top or logits.shape[1] < 2 or not _categorical(components.provenance):
        return []
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    spread = p * _one_minus(p)
    shares = spread / np.maximum(spread.sum(1, keepdims=True), 1e-300)
    mean = np.average(shares, axis=0, weights=[t.coefficient for t in top])
    order = np.argsort(-mean, kind="stable")[:4]
    return [(int(c), float(mean[c])) for c in order if mean[c] >= 0.02]


def _one_minus(p: Array) -> Array:
    """1 − p without cancellation for confident rows: the sum of the other probabilities."""
    best = p.argmax(1)
    rows = np.arange(len(p))
    rest = p.copy()
    rest[rows, best] = 0
    out = 1 - p
    out[rows, best] = rest.sum(1)
    return np.asarray(out)


def _categorical(provenance: Any) -> bool:
    """Whether the Fishers were those of a softmax (the default), as far as the provenance tells."""
    if isinstance(provenance, dict):
        return all(
            value in ("categorical", "probabilities") if key == "likelihood" else _categorical(value)
            for key, value in provenance.items()
        )
    return True


def _blocks(energy: dict[str, float]) -> list[tuple[str | None, float]]:
    order = sorted(energy.items(), key=lambda item: -item[1])
    head: list[tuple[str | None, float]] = [(name, share) for name, share in order[:BLOCKS]]
    rest = sum(share for _, share in order[BLOCKS:])
    return [*head, (None, rest)] if len(order) > BLOCKS else head
