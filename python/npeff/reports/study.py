"""What is known about a decomposition when its report is written, and what to call its parts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from npeff.reports.energy import Heads
from npeff.reports.extras import Effect, Extras
from npeff.reports.gallery import Gallery
from npeff.reports.groups import Node
from npeff.reports.summary import Summary, Top
from npeff.reports.wording import ClassNames

if TYPE_CHECKING:
    from npeff.components.components import Components

Array = npt.NDArray[Any]

UNSTABLE = 0.7
"""A component below this stability is to be read with doubt."""


@dataclass
class Study:
    """Everything that is known about a decomposition when its report is written.

    Attributes:
        components: The decomposition.
        summaries: Its components, the largest share first.
        nodes: The tree of strategies.
        gallery: The examples' pictures and texts.
        training: Pictures and texts of influential training examples.
        extras: The optional inputs.
        names: Of the classes.
        cosines: ``(r, r)`` |cos| between the vectors.
        together: ``(r, r)`` cosine between the coefficients.
        explained: ``(n,)`` explained share of each example, or None.
        attributions: Per component, ``(index of the example, what is drawn)``.
        heads: Attention heads per layer, see :func:`npeff.reports.energy.head_map`.
    """

    components: Components
    summaries: Sequence[Summary]
    nodes: Sequence[Node]
    gallery: Gallery
    training: Gallery
    extras: Extras
    names: ClassNames
    cosines: Array
    together: Array
    explained: Array | None = None
    attributions: Mapping[int, list[tuple[Top, dict[str, Any]]]] = field(default_factory=dict)
    heads: Heads = None

    def __post_init__(self) -> None:
        self.headings = {s.j: heading(s, self.names) for s in self.summaries}
        leaves = {node.components[0]: node for node in self.nodes if node.leaf}
        self.leaves = leaves
        self.branches: dict[int, Node] = {}
        for node in self.nodes:  # parents come first: the first node of a group is its branch
            if node.group >= 0:
                self.branches.setdefault(node.group, node)

    def stability(self, j: int) -> float | None:
        """Its stability, where it is known."""
        values = self.extras.trust.stability
        return None if values is None or not np.isfinite(values[j]) else float(values[j])

    def explained_of(self, summary: Summary) -> float | None:
        """Mean explained share of its top examples' Fishers, where it is known."""
        values = [] if self.explained is None else [self.explained[t.index] for t in summary.top]
        return float(np.mean(values)) if len(values) and np.isfinite(values).all() else None

    def effect(self, *components: int) -> Effect | None:
        """The effect of moving along a component, or a group of components, where one is given."""
        return self.extras.effects.get(components)

    def strategy(self, j: int) -> Node | None:
        """The coloured strategy it belongs to, where there are several."""
        group = self.leaves[j].group
        return self.branches[group] if group >= 0 and len(self.branches) > 1 else None

    def below_null(self, summary: Summary) -> bool:
        """Whether chance would give a component of as much energy."""
        threshold = self.extras.trust.null_threshold
        return threshold is not None and summary.energy <= threshold


def heading(summary: Summary, names: ClassNames) -> str:
    """A few words: the classes between which the model weighs, else the commonest prediction."""
    if not summary.top:
        return "unused"
    if summary.purity is None:
        return "no predictions on record"
    contest = summary.contest
    binary = len(summary.profile) == 2
    if len(contest) > 1 and contest[0][1] + contest[1][1] >= 0.55 and not (binary and summary.purity >= 0.75):
        return f"{names[contest[0][0]]} or {names[contest[1][0]]}"
    if contest and contest[0][1] >= 0.35 and not binary:
        return f"{names[contest[0][0]]} or something else"
    if summary.purity >= 0.5:
        values = [t.prediction for t in summary.top]
        return f"mostly {names[max(set(values), key=values.count)]}"
    return "several classes"


def node_heading(study: Study, node: Node) -> str:
    """A node in a few words: its component's heading, or the classes that it predicts."""
    if node.leaf:
        return study.headings[node.components[0]]
    if node.parent < 0:
        return "all components"
    order = np.argsort(-node.profile, kind="stable")
    known = [(study.names[int(c)], float(node.profile[c])) for c in order if node.profile[c] > 0]
    if not known:
        return f"{len(node.components)} components"
    if known[0][1] >= 0.8:
        return f"mostly {known[0][0]}"
    head = [name for name, share in known[:4] if share >= 0.1] or [known[0][0]]
    more = sum(share for _, share in known[len(head) :]) >= 0.1
    return ", ".join(head) + (", …" if more else "")


def node_address(node: Node) -> str:
    """Where a node is shown."""
    return f"#component-{node.components[0]}" if node.leaf else f"#strategy-{node.id}"


def doubts(study: Study, summary: Summary) -> str:
    """What speaks against reading much into a component; empty where nothing is known to."""
    reasons = []
    stability = study.stability(summary.j)
    if stability is not None and stability < UNSTABLE:
        reasons.append(f"it does not come back when the decomposition is repeated (stability {stability:.2f})")
    if study.below_null(summary):
        threshold = study.extras.trust.null_threshold
        reasons.append(f"components of shuffled Fishers have as much energy ({summary.energy:.2g} ≤ {threshold:.2g})")
    return "Read this one with doubt: " + ", and ".join(reasons) + "." if reasons else ""
