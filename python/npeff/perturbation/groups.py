"""Groups of parameters for a trace: layers, tensors, heads, blocks of units."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from npeff.errors import ArgumentError
from npeff.fishers.block_weights import layer_of
from npeff.models.parameters import Parameter, Parameters
from npeff.short_repr import short_repr

Array = npt.NDArray[Any]
Groups = Literal["layer", "parameter"] | Mapping[str, Any]
Resolved = dict[str, list[tuple[Parameter, Any]]]

REST = "everything else"


@dataclass(frozen=True)
class Part:
    """One of several equal parts of every matching tensor.

    Attributes:
        pattern: Shell pattern of parameter names.
        dim: Dimension that is divided.
        number: Number of the part, from 0.
        of: Number of parts.
        packed: Number of matrices that lie behind each other along ``dim`` (3 for query, key and value in one tensor);
            the part is taken of each.
    """

    pattern: str
    dim: int
    number: int
    of: int
    packed: int = 1

    __repr__ = short_repr

    def index(self, parameter: Parameter) -> tuple[Any, ...]:
        """The index of the part in a tensor.

        Raises:
            ArgumentError: The tensor cannot be divided in this way.
        """
        dims = len(parameter.shape)
        if not -dims <= self.dim < dims:
            raise ArgumentError(f"groups: {parameter.name} has shape {parameter.shape}, and no dimension {self.dim}")
        dim = self.dim % dims
        size = parameter.shape[dim]
        if size % (self.of * self.packed):
            raise ArgumentError(
                f"groups: dimension {dim} of {parameter.name} {parameter.shape} does not divide into "
                f"{self.packed} × {self.of} parts"
            )
        width = size // (self.of * self.packed)
        starts = np.arange(self.packed) * (size // self.packed) + self.number * width
        taken: Any = (starts[:, None] + np.arange(width)).reshape(-1)
        if self.packed == 1:
            taken = slice(int(starts[0]), int(starts[0]) + width)
        return (slice(None),) * dim + (taken,)


Division = str | Sequence[str] | Mapping[str, int | tuple[int, int]]


def heads(parameters: Division, n_heads: int, dim: int = 0, *, label: str = "") -> dict[str, list[Part]]:
    """Make a group per attention head, for :func:`npeff.trace`.

    Args:
        parameters: Patterns of the tensors that the heads divide. A mapping gives each its dimension: rows (0) of
            query, key and value, columns (1) of the output projection; ``(dimension, 3)`` where query, key and
            value lie behind each other in one tensor. For ``torch.nn.MultiheadAttention``:
            ``{"attn.in_proj_*": (0, 3), "attn.out_proj.weight": 1}``.
        n_heads: Number of heads.
        dim: Dimension for patterns given without one.
        label: Put before each name: ``"layer 3"``. Groups whose names have a label are drawn as a heat map.

    Returns:
        ``{"layer 3 · head 0": …}``; mappings of several layers can be united with ``|``.

    Raises:
        ArgumentError: ``n_heads`` is not a number from 1.
    """
    return _divided(parameters, n_heads, dim, label, "head")


def units(parameters: Division, n_blocks: int, dim: int = 0, *, label: str = "") -> dict[str, list[Part]]:
    """Make a group per block of hidden units, for :func:`npeff.trace`.

    Args:
        parameters: As for :func:`heads`: a hidden unit owns a row of the layer before it, an element of its bias,
            and a column of the layer after it: ``{"fc1.*": 0, "fc2.weight": 1}``.
        n_blocks: Number of blocks of equal size that the units are cut into; the number of units for single units.
        dim: Dimension for patterns given without one.
        label: Put before each name.

    Returns:
        ``{"units 0": …}``.

    Raises:
        ArgumentError: ``n_blocks`` is not a number from 1.
    """
    return _divided(parameters, n_blocks, dim, label, "units")


def _divided(parameters: Division, n: int, dim: int, label: str, what: str) -> dict[str, list[Part]]:
    if isinstance(n, bool) or not isinstance(n, int | np.integer) or n < 1:
        raise ArgumentError(f"{what}: expected how many, an integer ≥ 1, got {n!r}")
    names = [parameters] if isinstance(parameters, str) else parameters
    given: dict[str, Any] = dict(names) if isinstance(names, Mapping) else dict.fromkeys(names, dim)
    prefix = f"{label} · " if label else ""
    return {
        f"{prefix}{what} {i}": [
            Part(pattern, *((at, i, int(n)) if isinstance(at, int) else (at[0], i, int(n), at[1])))
            for pattern, at in given.items()
        ]
        for i in range(n)
    }


def resolve(groups: Groups | None, parameters: Parameters) -> Resolved:
    """Find the elements of every group.

    Args:
        groups: ``"layer"`` (the default), ``"parameter"``, or a mapping from names to patterns: one or several of
            a shell pattern, ``(pattern, index)`` with any numpy index, or a :class:`Part`.
        parameters: Those of the components.

    Returns:
        Tensors and indices into them, per group.

    Raises:
        ArgumentError: A pattern matches nothing, an index does not fit, or there are no groups.
    """
    if groups is None or (isinstance(groups, str) and groups in ("layer", "parameter")):
        found: Resolved = {}
        for parameter in parameters:
            name = parameter.name if groups == "parameter" else layer_of(parameter.name)
            found.setdefault(name, []).append((parameter, ...))
        return found
    if not isinstance(groups, Mapping) or not groups:
        raise ArgumentError(
            f"groups: expected 'layer', 'parameter' or a mapping from names to patterns, got {groups!r}"
        )
    return {
        str(name): [pair for item in _items(given) for pair in _matching(item, parameters)]
        for name, given in groups.items()
    }


def _items(given: Any) -> list[Any]:
    if isinstance(given, (str, Part)):
        return [given]
    if isinstance(given, tuple) and len(given) == 2 and isinstance(given[0], str) and not isinstance(given[1], str):
        return [given]
    if not isinstance(given, Sequence) or not given:
        raise ArgumentError(f"groups: expected patterns, (pattern, index) or parts, got {given!r}")
    return list(given)


def _matching(item: Any, parameters: Parameters) -> list[tuple[Parameter, Any]]:
    if isinstance(item, tuple) and len(item) == 2:
        pattern, index = item
    else:
        pattern, index = (item.pattern, item) if isinstance(item, Part) else (item, ...)
    if not isinstance(pattern, str):
        raise ArgumentError(f"groups: expected a pattern of parameter names, got {pattern!r}")
    matched = [p for p in parameters if fnmatchcase(p.name, pattern)]
    if not matched:
        some = ", ".join(parameters.names[:8])
        raise ArgumentError(f"groups: {pattern!r} matches none of the components' parameters: {some} …")
    pairs = [(p, index.index(p) if isinstance(index, Part) else index) for p in matched]
    for parameter, where in pairs:
        try:
            empty = np.zeros(parameter.shape, bool)[where].size == 0
        except (IndexError, TypeError) as error:
            raise ArgumentError(
                f"groups: {where!r} is no index of {parameter.name} {parameter.shape}: {error}"
            ) from error
        if empty and parameter.numel:
            raise ArgumentError(f"groups: {where!r} takes nothing of {parameter.name} {parameter.shape}")
    return pairs


def restricted(vector: Array, elements: list[tuple[Parameter, Any]]) -> Array:
    """A flat vector with everything but the elements set to 0."""
    kept = np.zeros_like(vector)
    for parameter, where in elements:
        kept[parameter.slice].reshape(parameter.shape)[where] = vector[parameter.slice].reshape(parameter.shape)[where]
    return kept


def rest(parameters: Parameters, resolved: Resolved) -> Array:
    """``(m,)`` bool: elements that are in no group."""
    free = np.ones(parameters.n_parameters, bool)
    for elements in resolved.values():
        for parameter, where in elements:
            free[parameter.slice].reshape(parameter.shape)[where] = False
    return free
