"""Blocks of per-example gradients on their way into sketches."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from npeff.errors import DataError
from npeff.fishers.compress import Sketch
from npeff.fishers.rows import DenseRows, Rows
from npeff.gradients.rules import Rule
from npeff.gradients.tiles import Block, Pairs
from npeff.kernels import NonFiniteError, StreamingSketch
from npeff.kernels.block_rows import BlockRows
from npeff.models.parameters import Parameter

Array = npt.NDArray[Any]


class _Costs(NamedTuple):
    """Nanoseconds, of which the ratios matter.

    Attributes:
        transform: Of a Walsh–Hadamard transform, per element and level.
        scatter: Of an element added to a bucket by itself.
        product: Of a multiply-add in a product of matrices.
    """

    transform: float
    scatter: float
    product: float


_ON_HOST = _Costs(0.06, 1.2, 0.03)  # one core, AVX-512
_ON_DEVICE = _Costs(0.002, 0.008, 0.00004)  # an H100, from its bandwidth and its rate of float32 products


def worth_pairing(sketch: Sketch, n_columns: int, device: torch.device) -> Callable[[Parameter, list[Rule]], bool]:
    """Whether to sketch a two-sided parameter from its factors, by counting operations; either way it is one sketch."""
    costs = _ON_DEVICE if device.type == "cuda" else _ON_HOST

    def decide(parameter: Parameter, rules: list[Rule]) -> bool:
        if len(rules) != 1 or not sketch.two_sided(parameter.shape):
            return False
        t, (n, k) = rules[0].layout.positions, parameter.shape
        transforms = t * (1 + n_columns) + n_columns
        factored = transforms * sketch.d * math.log2(sketch.d) * costs.transform
        factored += t * (n_columns * max(n, k) + min(n, k)) * costs.scatter
        formed = n_columns * n * k * (t * costs.product + costs.scatter)
        return factored < formed

    return decide


class Sketched:
    """Rows as sketches, by the streaming kernel.

    Args:
        n: Examples.
        n_columns: Rows per example, R.
        sketch: Which sketch.
    """

    def __init__(self, n: int, n_columns: int, sketch: Sketch) -> None:
        self._n_columns, self._sketch = n_columns, sketch
        self._sums = StreamingSketch(n * n_columns, sketch.d, sketch.seed, nonzeros=sketch.nonzeros)

    def put(self, block: Block) -> None:
        """Take a block's values, where they lie."""
        b, r, runs, width = block.values.shape
        values, parameter, shape = block.values.reshape(-1, width), block.parameter, None
        if self._sketch.two_sided(parameter.shape):
            shape = (parameter.shape[0], parameter.shape[1])
        where: BlockRows | torch.Tensor
        rows: Array | None = None
        if not isinstance(block.starts, torch.Tensor):
            starts = (block.starts,) if isinstance(block.starts, int) else block.starts
            if shape is not None:
                starts = tuple((start - parameter.offset) // shape[1] for start in starts)
            where = _rows_at(starts, block.examples.start, b, r, self._sums.n_rows)
        else:
            where = block.starts[:, None, :].expand(b, r, runs).reshape(-1)
            where = where if shape is None else (where - parameter.offset) // shape[1]
            example = np.arange(block.examples.start, block.examples.stop, dtype=np.int64)
            rows = np.repeat(example[:, None] * r + np.arange(r), runs)
        if shape is None:
            self._sums.push(values, where, rows)
        else:
            self._sums.push_matrix(values, parameter.offset, shape, where, rows)

    def put_pairs(self, pairs: Pairs) -> None:
        """Take the factors of a two-sided parameter's gradients."""
        rows = slice(pairs.examples.start * self._n_columns, pairs.examples.stop * self._n_columns)
        parameter = pairs.parameter
        shape = (parameter.shape[0], parameter.shape[1])
        self._sums.push_outer(pairs.delta, pairs.inputs, parameter.offset, shape, rows, pairs.turned)

    def later(self) -> Callable[[Array, Array], Rows]:
        """Start bringing the sketches to the host; see ``collect._Sink``."""
        sketches = self._sums.finish_later()

        def rows(counts: Array, scale: Array) -> Rows:
            try:
                sums = sketches().reshape(len(counts), self._n_columns, self._sketch.d)
            except NonFiniteError as error:
                example = error.row // max(1, self._n_columns)
                raise DataError(
                    f"gradients: the sketch of example {example} of a batch overflows float32; scale the model's loss "
                    "or logits down"
                ) from error
            sums *= scale[:, None, None]
            return DenseRows.first_of_each(sums, counts)

        return rows


@functools.lru_cache(maxsize=2048)
def _rows_at(starts: tuple[int, ...], first: int, b: int, r: int, n_rows: int) -> BlockRows:
    """The rows of b examples: example by example, column by column, one for each start."""
    rows = np.repeat(np.arange(first * r, (first + b) * r, dtype=np.int64), len(starts))
    return BlockRows(np.tile(np.array(starts, np.int64), b * r), rows, n_rows)
