"""The sink of the largest entries; it forms a row of outer products only if the row can hold one of them.

The rows of a layer's gradient are ``Σ_t δ_ti a_t``. By the inequality of Cauchy and Schwarz no entry of row i exceeds
``‖δ_i‖ max_j ‖a_j‖``; a row whose bound lies below the running threshold of the selection is never made. What every row
adds to the inner products of the columns comes from the factors, so that the dense Fisher's norm stays exact.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from npeff.fishers.rows import Array, Rows, SparseRows, index_dtype
from npeff.fishers.sinks import Sink, target_rows
from npeff.gradients import blocks
from npeff.gradients.blocks import Block, Pairs, split
from npeff.gradients.rules import Rule
from npeff.kernels import StreamingTopK
from npeff.models import devices
from npeff.models.parameters import Parameter

_FEWEST = 1 << 22
"""Multiply-adds per example below which calls cost more than products."""
_SHARE = 0.5
"""What share of the rows is made, as seen in convolutional networks and transformers with some 1 % of entries kept."""


class TopKSink(Sink):
    """Keeps the k largest entries over each example's rows, selected by the streaming kernel."""

    def _begin(self, compress: Any, n_backward: int) -> None:
        self._m, self._n_backward = self.parameters.n_parameters, n_backward
        self._forms_all = devices.has_own_memory(self.scale.device)
        self._selectors = StreamingTopK(self.n_examples, min(compress.k, self.n_columns * self._m))

    def paired(self, parameter: Parameter, rules: list[Rule]) -> bool:
        """Decide whether entries are selected from the factors, by counting multiply-adds per example."""
        if self._forms_all or len(rules) != 1:
            return False
        sizes = rules[0].pair_sizes()
        if sizes is None:
            return False
        t, n, k = sizes
        if t == 1:
            return True
        formed = t * self._n_backward * n * k
        gram = t * t * (k + self._n_backward * n)
        return not self._squared and formed >= _FEWEST and gram + _SHARE * formed < formed

    def _put(self, block: Block) -> None:
        b, r, runs, width = block.values.shape
        values, first = block.values.reshape(-1, width), block.examples.start
        if not isinstance(block.starts, Tensor):
            starts = (block.starts,) if isinstance(block.starts, int) else block.starts
            self._selectors.push(values, target_rows(starts, first, b, r, self._selectors.n_rows, self._m))
            return
        offsets = torch.arange(r, device=block.starts.device) * self._m
        base = (block.starts[:, None, :] + offsets[:, None]).reshape(-1)
        self._selectors.push(values, base, np.repeat(np.arange(first, first + b, dtype=np.int64), r * runs))

    def _put_pairs(self, pairs: Pairs) -> None:
        push(self._selectors, pairs, self._m)

    def _rows(self) -> Callable[[Array, Array], Rows]:
        selections, n_columns, m = self._selectors.finish_later(), self.n_columns, self._m
        return lambda counts, scale: sparse_rows(*selections(), n_columns, m, counts, scale)


def push(selectors: StreamingTopK, pairs: Pairs, column_stride: int) -> None:
    """Select among the entries of some examples' gradients, with a selector for each example of the batch.

    Flat indices of two columns are ``column_stride``, the number of parameters, apart.
    """
    offset, first = pairs.parameter.offset, pairs.examples.start
    if pairs.delta.shape[1] == 1:
        delta, inputs = split(pairs.delta[:, 0], pairs.n_slots), pairs.inputs[:, 0].repeat_interleave(pairs.n_slots, 0)
        selectors.push_outer(delta, inputs, first, offset, column_stride, pairs.turned)
        return
    thresholds = selectors.thresholds()
    for e in range(len(pairs.delta) * pairs.n_slots):
        for base, rows, columns in _factors(*pairs.of_example(e), pairs.turned, offset, column_stride):
            _push_rows(selectors, first + e, float(thresholds[first + e]), base, rows, columns)


def _factors(
    delta: Tensor, inputs: Tensor, turned: bool, offset: int, stride: int
) -> Iterator[tuple[np.ndarray, Tensor, Tensor]]:
    """Flat index of each row's first entry, the factors of the rows ``(T, rows)`` and of the columns ``(T, width)``."""
    t, r, n = delta.shape
    k = inputs.shape[1]
    if turned:
        for column in range(r):
            yield offset + column * stride + n * np.arange(k), inputs, delta[:, column]
    else:
        starts = offset + stride * np.arange(r)[:, None] + k * np.arange(n)
        yield starts.reshape(-1), delta.reshape(t, r * n), inputs


def _push_rows(
    selectors: StreamingTopK, selector: int, threshold: float, base: np.ndarray, rows: Tensor, columns: Tensor
) -> None:
    # Products are rounded, too: by at most T units in the last place of the bound.
    slack = 1 + 4 * len(rows) * torch.finfo(rows.dtype).eps
    bounds = torch.linalg.vector_norm(rows, dim=0) * (torch.linalg.vector_norm(columns, dim=0).max() * slack)
    needed = torch.nonzero(bounds >= threshold).flatten()
    step = max(1, blocks.TILE_ELEMENTS // columns.shape[1])
    for start in range(0, len(needed), step):
        some = needed[start : start + step]
        chosen = rows if len(some) == rows.shape[1] else rows[:, some]
        selectors.push(chosen.mT @ columns, base[some.numpy()], np.full(len(some), selector, np.int64))


def sparse_rows(
    found: Array,
    flat: Array,
    values: npt.NDArray[np.float32],
    n_columns: int,
    n_parameters: int,
    counts: Array,
    scale: Array,
) -> SparseRows:
    """Convert selections to compressed rows, the examples' rows end to end.

    Args:
        found: ``(b,)`` entries of each example.
        flat: Their flat indices, row · n_parameters + column, ascending within an example.
        values: Theirs; overwritten.
        n_columns: Most rows of an example.
        n_parameters: Length of a row.
        counts: ``(b,)`` rows of each example; rows beyond have no entries.
        scale: ``(b,)`` factor of each example's values.
    """
    columns = np.empty(len(flat), index_dtype(n_parameters))
    lengths = np.zeros((len(found), n_columns), np.int64)
    begins = np.arange(n_columns + 1) * n_parameters
    start = 0
    for example, end in enumerate(np.cumsum(found)):
        cuts = start + np.searchsorted(flat[start:end], begins)
        lengths[example] = np.diff(cuts)
        for row in range(n_columns):
            some = slice(int(cuts[row]), int(cuts[row + 1]))
            np.subtract(flat[some], begins[row], out=columns[some], casting="unsafe")
        np.multiply(values[start:end], scale[example], out=values[start:end])
        start = int(end)
    lengths = lengths[np.less(np.arange(n_columns), counts[:, None])]
    indptr = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return SparseRows(indptr, columns, values, n_parameters)
