"""The parameters of a Fisher, and where each one lies in the flat parameter vector."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from npeff.errors import ArgumentError


@dataclass(frozen=True)
class Parameter:
    """One parameter tensor's place in the flat vector: elements ``offset … offset + numel − 1`` in C order."""

    name: str
    shape: tuple[int, ...]
    offset: int

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def slice(self) -> slice:
        """Its elements in a flat parameter vector."""
        return slice(self.offset, self.offset + self.numel)


class Parameters(Sequence[Parameter]):
    """The selected parameters of a model, in the model's order, laid end to end."""

    def __init__(self, items: Iterable[Parameter]) -> None:
        self._items = tuple(items)
        self._by_name = {item.name: item for item in self._items}

    @classmethod
    def of(cls, named_shapes: Iterable[tuple[str, Sequence[int]]]) -> Parameters:
        """Lay parameters out end to end.

        Args:
            named_shapes: ``(name, shape)`` in the wanted order.

        Returns:
            Parameters whose offsets start at 0 and leave no gap.
        """
        items, offset = [], 0
        for name, shape in named_shapes:
            item = Parameter(name, tuple(int(size) for size in shape), offset)
            items.append(item)
            offset += item.numel
        return cls(items)

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: Any) -> Any:
        return self._items[index]

    def __iter__(self) -> Iterator[Parameter]:
        return iter(self._items)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Parameters) and self._items == other._items

    def __hash__(self) -> int:
        return hash(self._items)

    def __repr__(self) -> str:
        return f"Parameters({len(self)} tensors, {self.n_parameters:,} elements)"

    @property
    def n_parameters(self) -> int:
        """Length of the flat parameter vector, m."""
        return self._items[-1].offset + self._items[-1].numel if self._items else 0

    @property
    def names(self) -> tuple[str, ...]:
        """Parameter names in order."""
        return tuple(item.name for item in self._items)

    @cached_property
    def _offsets(self) -> list[int]:
        return [item.offset for item in self._items]

    def named(self, name: str) -> Parameter:
        """Look a parameter up by name.

        Raises:
            ArgumentError: No parameter has that name.
        """
        if name not in self._by_name:
            raise ArgumentError(
                f"parameter {name!r} is not among the {len(self)} selected ones: {', '.join(self.names[:8])}…"
            )
        return self._by_name[name]

    def block(self, name: str) -> slice:
        """Give the elements of parameter ``name`` in the flat vector."""
        return self.named(name).slice

    def locate(self, index: int) -> tuple[str, tuple[int, ...]]:
        """Find the name and multi-index of flat element ``index``.

        Raises:
            ArgumentError: ``index`` lies outside the vector.
        """
        if not 0 <= index < self.n_parameters:
            raise ArgumentError(f"index: expected 0 ≤ index < {self.n_parameters}, got {index}")
        # Empty tensors share their offset with the next one: bisect_right lands on the last, the one that holds it.
        item = self._items[bisect_right(self._offsets, index) - 1]
        return item.name, tuple(int(i) for i in np.unravel_index(index - item.offset, item.shape))

    def unflatten(self, vector: npt.NDArray[Any]) -> dict[str, npt.NDArray[Any]]:
        """Cut a flat vector ``(n_parameters,)`` into parameter-shaped arrays (views).

        Raises:
            ArgumentError: The vector has another length.
        """
        if vector.shape != (self.n_parameters,):
            raise ArgumentError(f"vector: expected shape ({self.n_parameters},), got {vector.shape}")
        return {item.name: vector[item.slice].reshape(item.shape) for item in self._items}

    def to_json(self) -> list[Mapping[str, Any]]:
        """Describe them for JSON: name and shape of each parameter, in order."""
        return [{"name": item.name, "shape": list(item.shape)} for item in self._items]

    @classmethod
    def from_json(cls, description: Iterable[Mapping[str, Any]]) -> Parameters:
        """Make Parameters of what :meth:`to_json` gave."""
        return cls.of((str(item["name"]), item["shape"]) for item in description)
