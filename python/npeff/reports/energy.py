"""Which layers and heads carry a component: ‖g_j‖² per parameter, as tables of layers by parts."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from npeff.errors import ArgumentError
from npeff.models.parameters import Parameter, Parameters

Array = npt.NDArray[Any]

# Where a parameter keeps its heads: (pattern of the name, dimension, equal parts that each hold all heads).
_HEADS = (
    (r"(^|\.)(in_proj_weight|in_proj_bias|qkv\.(weight|bias))$", 0, 3),
    (r"(^|\.)c_attn\.(weight|bias)$", -1, 3),
    (r"(^|\.)query_key_value\.(weight|bias)$", 0, 1),
    (r"(^|\.)(q|k|v|query|key|value)(_proj|_lin|_linear)?\.(weight|bias)$", 0, 1),
    (r"(^|\.)(o_proj|out_proj|out_lin|wo)\.weight$", 1, 1),
    (r"attention\.output\.dense\.weight$", 1, 1),
    (r"attn\.c_proj\.weight$", 0, 1),
)

Heads = int | Mapping[str, int] | None


@dataclass(frozen=True)
class HeatMap:
    """Energy in a table.

    Attributes:
        rows: Names of the layers.
        columns: Names of the parts.
        values: ``(rows, columns)`` shares of ‖g_j‖²; NaN where a layer has no such part.
    """

    rows: tuple[str, ...]
    columns: tuple[str, ...]
    values: Array

    @property
    def largest(self) -> float:
        """The largest share, at least a very small number."""
        return float(np.nanmax(self.values, initial=1e-12))

    @property
    def totals(self) -> list[float]:
        """Sum per row."""
        return [float(v) for v in np.nansum(self.values, axis=1)]


def block_map(energy: Mapping[str, float]) -> HeatMap:
    """Parameters as layers by parts.

    Args:
        energy: Share per parameter name, in the model's order. A name is cut behind its first number
            (``encoder.layer.3 | attention.query.weight``), names without one before their last part.
    """
    cells = {place(name): share for name, share in energy.items()}
    rows = tuple(dict.fromkeys(row for row, _ in cells))
    columns = tuple(dict.fromkeys(column for _, column in cells))
    values = np.full((len(rows), len(columns)), np.nan)
    for (row, column), share in cells.items():
        values[rows.index(row), columns.index(column)] = share
    return HeatMap(rows, columns, values)


def place(name: str) -> tuple[str, str]:
    """A parameter's layer and part."""
    parts = name.split(".")
    cut = next((i + 1 for i, part in enumerate(parts[:-1]) if part.isdigit()), len(parts) - 1)
    return ".".join(parts[:cut]) or "(model)", ".".join(parts[cut:])


def check_heads(parameters: Parameters, heads: Heads) -> None:
    """Make sure that ``heads`` fits some parameters.

    Raises:
        ArgumentError: It is no number and no mapping, or no parameter can be cut that way.
    """
    if heads is None:
        return
    numbers = list(heads.values()) if isinstance(heads, Mapping) else [heads]
    if not numbers or not all(isinstance(number, int) and number > 0 for number in numbers):
        raise ArgumentError(f"heads: expected a number of heads, or a mapping from name patterns to one, got {heads!r}")
    if not any(_cut(parameter, heads) for parameter in parameters):
        raise ArgumentError(
            f"heads: no parameter could be cut into {heads!r} heads; leave heads out, give another number, or, from "
            "Python, a mapping from name patterns to numbers, for parameters whose first dimension holds the heads. "
            f"Names: {', '.join(parameters.names[:6])}, …"
        )


def head_map(parameters: Parameters, vector: Array, heads: Heads) -> HeatMap | None:
    """Energy per layer and attention head.

    Args:
        parameters: What the vector stands for.
        vector: ``(n_parameters,)`` unit-norm pseudo-Fisher vector.
        heads: Heads per layer, for parameters with the usual names of attention projections; or a mapping
            from name patterns (``"*.attn.*"``) to numbers, for parameters whose first dimension holds the heads.
            Parameters that do not divide evenly (keys and values shared by several heads) are left out.

    Returns:
        Layers by heads; None where no parameter has heads.
    """
    found: dict[str, Array] = {}
    for parameter in parameters:
        cut = _cut(parameter, heads)
        if cut is None:
            continue
        axis, parts, number = cut
        block = np.square(vector[parameter.slice].astype(np.float64)).reshape(parameter.shape)
        along = block.sum(tuple(d for d in range(block.ndim) if d != axis % block.ndim))
        energy = along.reshape(parts, number, -1).sum((0, 2))
        layer = place(parameter.name)[0]
        old = found.get(layer, np.zeros(0))
        size = max(len(old), number)
        found[layer] = np.pad(old, (0, size - len(old))) + np.pad(energy, (0, size - number))
    if not found:
        return None
    most = max(map(len, found.values()))
    values = np.stack([np.pad(v, (0, most - len(v)), constant_values=np.nan) for v in found.values()])
    return HeatMap(tuple(found), tuple(str(h) for h in range(most)), values)


def _cut(parameter: Parameter, heads: Heads) -> tuple[int, int, int] | None:
    """``(dimension, parts, heads)`` of a parameter that holds heads."""
    if isinstance(heads, Mapping):
        number = next((n for pattern, n in heads.items() if fnmatch.fnmatchcase(parameter.name, pattern)), None)
        rules = [(0, 1)] if number else []
    else:
        number = heads
        rules = [(axis, parts) for pattern, axis, parts in _HEADS if re.search(pattern, parameter.name)]
    for axis, parts in rules:
        if number and -len(parameter.shape) <= axis < len(parameter.shape):
            size = parameter.shape[axis]
            if size and size % (parts * number) == 0:
                return axis, parts, number
    return None
