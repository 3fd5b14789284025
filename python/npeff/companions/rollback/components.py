"""The training examples behind a component of a factor model: rollback of its top examples' support."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import numpy.typing as npt
from torch import Tensor

from npeff.companions.rollback.explaining import Explainer
from npeff.errors import ArgumentError
from npeff.short_repr import short_repr

if TYPE_CHECKING:
    from npeff.components.components import Components

Array = npt.NDArray[Any]


@dataclass(frozen=True, eq=False)
class ComponentRollback:
    """How much each training example supports what the model says on a component's top examples.

    Attributes:
        j: The component.
        influence: ``(n_train,)`` float64, the mean over the top examples of the explainer's influence; 0 where an
            example is a candidate of none, or is itself among them.
        examples: ``(k,)`` int64 the component's top examples: indices of ``components.coefficients``.
    """

    by: ClassVar[str] = "probability that its top examples lose when the example's updates are taken back, on average"

    j: int
    influence: Array
    examples: Array
    _names: tuple[list[str], ...] | None = field(default=None, repr=False)
    _train: Array | None = field(default=None, repr=False)

    __repr__ = short_repr

    def made_by(self, k: int = 16) -> Array:
        """Positions of the k training examples with the largest support, ties by position, int64."""
        order = np.argsort(-self.influence, kind="stable")[:k]
        return order[self.influence[order] > 0]

    def pairs(self, k: int = 16) -> list[tuple[int, float]]:
        """``(position, influence)`` of :meth:`made_by`, for a report."""
        return [(int(d), float(self.influence[d])) for d in self.made_by(k)]

    def text(self, position: int) -> str | None:
        """A training example with names; None where the record has none."""
        if self._names is None or self._train is None:
            return None
        return " · ".join(names[row] for names, row in zip(self._names, self._train[position].tolist(), strict=True))


def component_rollback(
    explainer: Explainer, components: Components, j: int, examples: Array | Tensor, k: int = 16
) -> ComponentRollback:
    """The training examples whose recorded updates a component's top examples rest on.

    Each of the k top examples is a target; the explainer's influence of every candidate on it, such as the probability
    it loses by rollback, is averaged over them. That a training example supports itself is no news: where a top example
    is one, it is left out.

    Args:
        explainer: Of the model that the components are of, such as :class:`GradientRollback`.
        components: A decomposition of the model's Fishers.
        j: Which component.
        examples: ``(n, m + 1)`` context and answer of the examples whose Fishers were computed, in their order.
        k: How many of its top examples.

    Returns:
        An influence per training example.

    Raises:
        ArgumentError: There is no such component, it has no top example, or ``examples`` do not reach to them.
    """
    if isinstance(j, bool) or not isinstance(j, int | np.integer) or not 0 <= j < components.n_components:
        raise ArgumentError(f"j: expected a component below {components.n_components}, got {j!r}")
    model, record = explainer.model, explainer.record
    targets = model.check_examples(np.asarray(examples), "examples")
    tops = components.top_examples(int(j), k)
    tops = tops[components.coefficients[tops, j] > 0]
    if not len(tops):
        raise ArgumentError(f"j: component {j} has no example with a positive coefficient; choose another")
    ids = np.asarray(components.ids)[tops]
    if ids.max() >= len(targets):
        raise ArgumentError(
            f"examples: {len(targets)} were given, and component {j} has number {ids.max()} among its top ones; pass "
            "all those whose Fishers were computed, in their order"
        )
    train = np.asarray(record.examples)
    total = np.zeros(len(record))
    for target in targets[ids]:
        candidates = explainer.candidates(target)
        total[candidates] += explainer.influence(target, candidates)
    own = {tuple(row) for row in targets[ids].tolist()}
    total[[tuple(row) in own for row in train.tolist()]] = 0
    known = all(table in record.names for table in record.columns)
    names = tuple(record.names[table] for table in record.columns) if known else None
    return ComponentRollback(int(j), total / len(ids), tops, names, train)
