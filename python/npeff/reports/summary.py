"""The numbers of each component, those of the table among them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from npeff.components.components import Components
from npeff.reports.text import ClassNames, number, percent, plain

Array = npt.NDArray[Any]

DELAY = 3.0  # seconds before a progress bar shows
ACTIVE = 0.1
"""An example counts as active from this share of the component's largest coefficient."""
BINS, BLOCKS, CLASSES, CONTESTED = 28, 8, 8, 4  # entries listed at most
CHUNK = 8192  # examples multiplied at once


@dataclass(frozen=True)
class TopExample:
    """One of the examples with the largest coefficients on a component or a strategy.

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

    @property
    def known_class(self) -> int:
        """The label, else the prediction, else −1."""
        return self.label if self.label >= 0 else self.prediction

    def verdict(self, names: ClassNames) -> str:
        """Name the label, and the prediction where it is wrong."""
        if self.wrong:
            return f"{names[self.label]} → {names[self.prediction]}"
        return names[self.known_class] if self.known_class >= 0 else ""


@dataclass(frozen=True)
class ComponentSummary:
    """One component in numbers.

    Attributes:
        j: The component.
        share: Σ_i W_ij as a share of Σ W.
        top: Examples by falling coefficient; none with coefficient 0.
        middle: Examples around the median of the active ones, without those at the top.
        random: Others with a coefficient above zero, drawn at random.
        n_active: Examples with at least a tenth of the largest coefficient.
        n_zero: Examples with coefficient 0.
        purity: Share of the top examples with the commonest prediction among them; None without predictions.
        accuracy: Share of the active, labelled examples predicted rightly; None without labels.
        contest: ``(class, share)``: the classes between which the model weighs on the top examples.
        classes: ``(class, active examples with that label, … with that prediction)``, largest first.
        n_other: Classes beyond those, with any active example.
        histogram: Counts of the non-zero coefficients in bins of equal width up to the largest.
        profile: ``(C,)`` share of the component's weight per predicted class.
        block_energy: Share of ‖g_j‖² of every parameter; empty where the vector in parameter space was not recovered.
        weighted_energy: The same of the vector times the block weights, as it was decomposed.
        energy: Mean squared coefficient, ``Σ_i W_ij² / n``.
        stability: How nearly it comes back when the decomposition is repeated, in [0, 1]; None where unknown.
        kl_ratio: KL on its top examples over KL on the baseline when the weights move along it; None where unknown.
        control_ratio: The largest KL ratio of the random directions that it is compared with; None where unknown.
    """

    j: int
    share: float
    top: list[TopExample]
    middle: list[TopExample]
    random: list[TopExample]
    n_active: int
    n_zero: int
    purity: float | None
    accuracy: float | None
    contest: list[tuple[int, float]]
    classes: list[tuple[int, int, int]]
    n_other: int
    histogram: list[int]
    profile: Array
    block_energy: dict[str, float]
    weighted_energy: dict[str, float]
    energy: float
    stability: float | None = None
    kl_ratio: float | None = None
    control_ratio: float | None = None

    @property
    def shown(self) -> list[TopExample]:
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

    @property
    def blocks(self) -> list[tuple[str, float, float]]:
        """``(parameter, share of ‖g_j‖², weighted share)``, the largest share first, the rest summed as all others."""
        order = sorted(self.block_energy, key=lambda name: -self.block_energy[name])
        groups = [*((name, [name]) for name in order[:BLOCKS]), ("all others", order[BLOCKS:])]
        energies = self.block_energy, self.weighted_energy
        return [(title, *(sum(energy[n] for n in names) for energy in energies)) for title, names in groups if names]  # type: ignore[misc]


@dataclass(frozen=True)
class Column:
    """A number that every component has: in the table, its filters, the map's colours, and on the component's page.

    Attributes:
        name: Of the field of :class:`ComponentSummary`; None there is unknown. A column without any number is left out.
        title: In the head of the table.
        text: Prints the number.
        unit: What stands behind the number on the component's page.
        about: What the number means, for those who read the page; its subject is the title.
        is_share: Whether filters take it in percent.
    """

    name: str
    title: str
    text: Callable[[Any], str]
    unit: str
    about: str
    is_share: bool = False

    def value(self, summary: ComponentSummary) -> float | None:
        """Return the number."""
        return getattr(summary, self.name)

    def cell(self, summary: ComponentSummary) -> str:
        """Return what the table shows of a component."""
        value = self.value(summary)
        return "–" if value is None else self.text(value)


COLUMNS = (
    Column(
        "share",
        "Share",
        percent,
        "of all coefficients",
        "is its part of the sum of all coefficients.",
        is_share=True,
    ),
    Column(
        "n_active",
        "Active",
        number,
        "active",
        "examples have at least a tenth of its largest coefficient.",
    ),
    Column(
        "purity",
        "Purity",
        percent,
        "pure",
        "is the share of its top examples with the commonest prediction.",
        is_share=True,
    ),
    Column(
        "accuracy",
        "Accuracy",
        percent,
        "right",
        "is the share of its active examples with a label that the model predicts rightly.",
        is_share=True,
    ),
    Column(
        "stability",
        "Stability",
        "{:.2f}".format,
        "stable",
        "is how nearly the component comes back when the decomposition is repeated: |cos| between its vector and its "
        "partner’s, 1 when it always does. Below about 0.7, do not read much into it.",
    ),
    Column(
        "kl_ratio",
        "KL ratio",
        plain,
        "KL ratio",
        "is the mean KL on its top examples over that on a sample of all examples (the baseline) when the weights move "
        "along the component. Read it against the ratio of random directions, not against 1: top examples that hardly "
        "change along any direction have a ratio below 1 and may still change far more than at random.",
    ),
    Column(
        "control_ratio",
        "At random",
        plain,
        "KL ratio at random",
        "is the largest KL ratio among the kinds of random directions that the component is compared with. A component "
        "acts on its examples where its own ratio is far above this one.",
    ),
)
"""The numbers of the table. To add one, add an entry."""


def summarise(
    components: Components, k: int, seed: int = 0, chosen: Iterable[int] | None = None, progress: bool = False
) -> list[ComponentSummary]:
    """Summarise components with k top examples, half as many from the middle, and half as many at random.

    The seed decides the random ones. The components are in the order ``chosen``, by default the largest share first.
    """
    sizes = np.asarray(components.coefficients).sum(0, dtype=np.float64)
    shares = sizes / (sizes.sum() or 1.0)
    order = np.argsort(-sizes, kind="stable") if chosen is None else chosen
    bar = tqdm(order, "components", delay=DELAY, disable=not progress, unit="component")
    predictions = components.predictions
    return [_summary(components, predictions, int(j), float(shares[j]), k, seed) for j in bar]


def _summary(components: Components, predictions: Array, j: int, share: float, k: int, seed: int) -> ComponentSummary:
    w, labels = np.asarray(components.coefficients[:, j], np.float64), np.asarray(components.labels)
    best = components.top_examples(j, k=k)
    best = best[w[best] > 0]
    between = middle(w, best, k // 2)
    others = at_random(w, np.concatenate([best, between]), k // 2, (seed, j))
    top = top_examples(components, best, w)
    block_energy = {} if j in components.not_recovered else components.block_energy(j)
    largest = float(w.max(initial=0))
    active = (w >= ACTIVE * largest) & (w > 0)
    known = active & (labels >= 0) & (predictions >= 0)
    seen = predictions >= 0
    counts = np.unique([t.prediction for t in top], return_counts=True)[1] if top else np.zeros(1)
    classes = _classes(labels[active], predictions[active])
    return ComponentSummary(
        j=j,
        share=share,
        top=top,
        middle=top_examples(components, between, w),
        random=top_examples(components, others, w),
        n_active=int(active.sum()),
        n_zero=int((w == 0).sum()),
        purity=float(counts.max() / max(1, len(top))) if seen.any() else None,
        accuracy=float((labels == predictions)[known].mean()) if known.any() else None,
        contest=_contest(components, top),
        classes=classes[:CLASSES],
        n_other=len(classes[CLASSES:]),
        histogram=np.histogram(w[w > 0], BINS, (0.0, largest or 1.0))[0].tolist(),
        profile=np.bincount(predictions[seen], w[seen], components.logits.shape[1]) / (float(w.sum()) or 1.0),
        block_energy=block_energy,
        weighted_energy=weighted_shares(block_energy, components),
        energy=float(np.mean(np.square(w))) if len(w) else 0.0,
    )


def weighted_shares(block_energy: Mapping[str, float], components: Components) -> dict[str, float]:
    """Compute the share of each parameter in ‖D g‖², from its share e_p in ‖g‖².

    Rows are decomposed as ``A D``, D = √w_p on the columns of parameter p (w_p itself for diagonal Fishers), so the
    share is ``w_p e_p / Σ_q w_q e_q`` (``w_p² e_p / Σ_q w_q² e_q``).
    """
    weights, power = components.block_weights or {}, 1 if components.kind == "low_rank" else 2
    energy = {name: weights.get(name, 1.0) ** power * share for name, share in block_energy.items()}
    total = sum(energy.values()) or 1.0
    return {name: value / total for name, value in energy.items()}


def top_examples(components: Components, indices: Array, w: Array) -> list[TopExample]:
    """Describe examples by their indices, with their coefficients ``w (n,)``."""
    predictions = components.predictions[indices]
    return [
        TopExample(int(i), int(components.ids[i]), float(w[i]), int(components.labels[i]), int(prediction))
        for i, prediction in zip(indices, predictions, strict=True)
    ]


# ---- which examples are shown -------------------------------------------------------------------------------


def middle(w: Array, top: Array, m: int) -> Array:
    """Choose the m examples around the median of the active ones that are not in ``top``.

    The coefficients are ``w (n,)``; the result is indices by falling coefficient, fewer than m where fewer are active.
    """
    rest = np.setdiff1d(np.flatnonzero((w >= ACTIVE * w.max(initial=0)) & (w > 0)), top)
    order = rest[np.argsort(-w[rest], kind="stable")]
    start = max(0, (len(order) - m) // 2)
    return order[start : start + m]


def at_random(w: Array, shown: Array, m: int, seed: tuple[int, ...]) -> Array:
    """Choose m random examples of those with a coefficient ``w (n,)`` above zero that are not in ``shown``.

    The result is indices by falling coefficient.
    """
    rest = np.setdiff1d(np.flatnonzero(w > 0), shown)
    if len(rest) > m:
        rest = np.random.default_rng(seed).choice(rest, m, replace=False)
    return rest[np.lexsort((rest, -w[rest]))]


# ---- classes ------------------------------------------------------------------------------------------------


def _classes(labels: Array, predictions: Array) -> list[tuple[int, int, int]]:
    classes = np.union1d(labels[labels >= 0], predictions[predictions >= 0])
    rows = [(int(c), int((labels == c).sum()), int((predictions == c).sum())) for c in classes]
    return sorted(rows, key=lambda row: (-row[1] - row[2], row[0]))


def _contest(components: Components, top: Sequence[TopExample]) -> list[tuple[int, float]]:
    """Shares of trace(diag p − ppᵀ) = Σ_y p_y (1 − p_y) by class, the top examples' weighted mean."""
    if not top or components.logits.n_outputs < 2 or not _categorical(components.provenance):
        return []
    classes, p = components.logits.take([t.index for t in top]).top(components.logits.n_outputs)
    unkept = np.maximum(0, 1 - p.sum(1)) if p.shape[1] < components.logits.n_outputs else np.zeros(len(p))
    rest = 1 - p  # of a confident row's largest p, from the others: 1 − p would cancel
    rest[:, 0] = p[:, 1:].sum(1) + unkept
    spread = p * rest
    shares = spread / np.maximum(spread.sum(1, keepdims=True) + unkept[:, None], 1e-300)  # each unkept p is small
    mean, weights = np.zeros(components.logits.n_outputs), np.array([t.coefficient for t in top])
    np.add.at(mean, classes, shares * (weights / weights.sum())[:, None])
    order = np.argsort(-mean, kind="stable")[:CONTESTED]
    return [(int(c), float(mean[c])) for c in order if mean[c] >= 0.02]


def _categorical(provenance: Any) -> bool:
    """Whether the Fishers were those of a softmax (the default), as far as the provenance tells."""
    if isinstance(provenance, Mapping):
        return all(
            value in ("categorical", "probabilities") if key == "likelihood" else _categorical(value)
            for key, value in provenance.items()
        )
    return True


# ---- which components are like each other -------------------------------------------------------------------


def coactivation(coefficients: Array) -> Array:
    """Compute the ``(r, r)`` cosines between the components' coefficients ``(n, r)`` ≥ 0: 1 where they go together."""
    products = np.zeros((coefficients.shape[1],) * 2)
    for start in range(0, len(coefficients), CHUNK):
        part = coefficients[start : start + CHUNK]
        products += part.T @ part
    norms = np.sqrt(np.maximum(np.diag(products), 1e-30))
    return np.asarray(products / norms / norms[:, None])


def closest(similarity: Array, j: int, m: int = 6, least: float = 0.01) -> list[tuple[int, float]]:
    """Find the m others most similar to j, ``(component, similarity)``; those below ``least`` are left out."""
    row = similarity[j].astype(np.float64)
    row[j] = -1
    order = np.argsort(-row, kind="stable")[:m]
    return [(int(i), float(min(1.0, row[i]))) for i in order if row[i] >= least]


def explained_shares(vectors: Array, coefficients: Array, loss: float, kind: str) -> Array | None:
    """Compute the share of each example's unit-norm Fisher that the components account for, from W and G alone.

    Where ``w`` minimises ``‖F − Σ_j w_j C_j‖²`` over w ≥ 0, complementary slackness gives
    ``⟨F, Σ w_j C_j⟩ = ‖Σ w_j C_j‖²``, so the share is ``1 − ‖F − Σ‖² / ‖F‖² = wᵀ gram w`` for ‖F‖ = 1, with
    ``gram = (GGᵀ)∘²`` (low-rank) or ``HHᵀ``.

    Args:
        vectors: G or H, ``(r, n_kept)``.
        coefficients: W, ``(n, r)``.
        loss: The relative loss on record, to check with: 1 − loss is the mean share.
        kind: ``"low_rank"`` or ``"diagonal"``.

    Returns:
        ``(n,)`` in [0, 1], NaN for examples without coefficients; None where the mean is not 1 − loss: the
        coefficients are no such minimum, or the Fishers were not of unit norm.
    """
    Q = vectors @ vectors.T
    gram = np.square(Q) if kind == "low_rank" else Q
    chunks = np.array_split(coefficients, -(-len(coefficients) // CHUNK) or 1)
    share = np.concatenate([np.einsum("ij,ij->i", part @ gram, part) for part in chunks]).astype(np.float64)
    used = share > 0
    if not used.any() or not abs(1 - share[used].mean() - loss) <= 0.01 + 0.05 * abs(loss):
        return None
    return np.where(used, np.clip(share, 0, 1), np.nan)
