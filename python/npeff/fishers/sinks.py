"""Sinks of per-example gradients: each takes the blocks of one pass, and gives compressed rows and dense norms."""

from __future__ import annotations

import functools
import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from npeff.errors import DataError
from npeff.fishers.factors import Factors
from npeff.fishers.options import FisherOptions, Sketch
from npeff.fishers.rows import Array, DenseRows, Rows
from npeff.gradients.blocks import Block, Pairs
from npeff.gradients.rules import Rule
from npeff.gradients.rules.base import working
from npeff.kernels import NonFiniteError, StreamingSketch
from npeff.kernels.streams import BlockRows, HostCopy, to_host
from npeff.models import devices
from npeff.models.parameters import Parameter, Parameters

FEW_ROWS = 4
"""Rows of an example up to which a device takes their inner products pair by pair."""


class _Costs(NamedTuple):
    """Nanoseconds, of which the ratios matter.

    A transform is that of Walsh and Hadamard, per element and level; a scatter adds an element to a bucket by itself; a
    product is a multiply-add in a product of matrices.
    """

    transform: float
    scatter: float
    product: float


_ON_HOST = _Costs(0.06, 1.2, 0.03)  # one core, AVX-512
_ON_DEVICE = _Costs(0.002, 0.008, 0.00004)  # an H100, from its bandwidth and its rate of float32 products


class Sink:
    """Collects the blocks of one pass on the device where they lie, and sums their inner products for the norms.

    Args:
        parameters: The flat vector's layout.
        factors: The cotangents; blocks were made with their unit-norm columns.
        ids: ``(b,)`` positions of the examples, for messages.
        options: What is kept; blocks are Σ of squares where Fishers are diagonal.
        at_once: Check every block for gradients that are not finite, and name the first. Otherwise the device is
            not waited for, and the norms tell whether the pass has to be repeated with the check.

    Attributes:
        n_examples: Examples, b.
        n_columns: Most rows of an example, R.
        scale: ``(b,)`` float32 factor of each example's rows.
    """

    def __init__(
        self, parameters: Parameters, factors: Factors, ids: Array, options: FisherOptions, at_once: bool = True
    ) -> None:
        self.parameters, self._ids, self._at_once = parameters, ids, at_once
        self._squared = squared = options.kind == "diagonal"
        self.n_examples, _, width = factors.columns.shape
        self.n_columns = 1 if squared else width
        self._counts = factors.counts.clamp_max(1) if squared else factors.counts
        self._norm_scale = factors.scale.square()
        self.scale = (self._norm_scale if squared else factors.scale).to(torch.float32)
        # A square may be 0 · ∞ where the Fisher is zero because the model is certain.
        self._certain = self._norm_scale == 0
        there = devices.has_own_memory(factors.columns.device)
        self._any_certain = squared and (there or bool(self._certain.any()))
        shape = (self.n_examples, self.n_columns, self.n_columns)
        self._gram = torch.zeros(shape, dtype=torch.float64, device=factors.columns.device)
        self._begin(options.compress, width)

    def _begin(self, compress: Any, n_backward: int) -> None:
        """Make room for what is kept of the blocks, which came of so many backward passes."""
        raise NotImplementedError

    def paired(self, parameter: Parameter, rules: list[Rule]) -> bool:
        """Decide whether blocks of a parameter are wanted as factors."""
        return False

    def add(self, block: Block | Pairs) -> None:
        """Take one block, where it lies.

        Raises:
            DataError: A gradient is not finite; names example and element.
        """
        if isinstance(block, Pairs):
            pairs = block.squared() if self._squared else block
            if self._add_norms(pairs):
                self._put_pairs(pairs)
                return
            block = pairs.formed()
        if self._any_certain:
            certain = self._certain[block.examples]
            block = replace(block, values=block.values.masked_fill(certain[:, None, None, None], 0.0))
        gram = block.gram
        if gram is None:
            gram = _gram(working(block.values), block.starts)
        gram = gram.to(self._gram.device, torch.float64)
        if self._at_once and not torch.isfinite(gram).all():
            self._refuse_non_finite(block)
            flat = block.values.flatten(2).to(torch.float64)
            gram = (flat @ flat.mT).to(self._gram.device)
        self._gram[block.examples] += gram
        self._put(block)

    def _add_norms(self, pairs: Pairs) -> bool:
        """Add the inner products of factors; False where their product has to be looked at instead."""
        gram = pairs.gram().to(self._gram.device, torch.float64)
        if self._at_once and not torch.isfinite(gram).all():
            return False
        if self._any_certain and bool(self._certain[pairs.examples].any()):
            return False
        self._gram[pairs.examples] += gram
        return True

    def _put(self, block: Block) -> None:
        """Take the values of a block."""
        raise NotImplementedError

    def _put_pairs(self, pairs: Pairs) -> None:
        """Take the gradients that factors stand for."""
        self._put(pairs.formed())

    def finish(self, logits: Sequence[Tensor]) -> tuple[HostCopy, Callable[[Array, Array], Rows]]:
        """Start bringing the results to the host; the sink is done.

        Args:
            logits: What is kept of the examples' outputs, on their device; see :func:`npeff.fishers.logits.largest`.

        Returns:
            The norms of the dense Fishers ``(b,)``, the rows per example ``(b,)``, their scale ``(b,)`` and
            ``logits``, on their way; and a function that makes rows of ``counts`` and ``scale`` once they are
            there: example by example, the first ``counts`` of each, multiplied by the example's scale.
        """
        norms = self._gram[:, 0, 0].sqrt() if self._squared else self._gram.square().sum(dim=(1, 2)).sqrt()
        return to_host(norms * self._norm_scale, self._counts, self.scale, *logits), self._rows()

    def _rows(self) -> Callable[[Array, Array], Rows]:
        """Start bringing what was taken to the host; see :meth:`finish`."""
        raise NotImplementedError

    def _refuse_non_finite(self, block: Block) -> None:
        bad = (~torch.isfinite(block.values)).nonzero()
        if not len(bad):
            return
        example, _, run, offset = (int(i) for i in bad[0])
        starts = (block.starts,) if isinstance(block.starts, int) else block.starts
        start = starts[run] if isinstance(starts, tuple) else int(starts[example, run])
        name, index = self.parameters.locate(start + offset)
        value = float(block.values[tuple(bad[0])])
        position = int(self._ids[block.examples.start + example])
        raise DataError(
            f"gradients: example {position} has the gradient {value} for {name}{list(index)}; find what "
            "overflows in the model on that example, or leave it out of the data"
        )


class DenseSink(Sink):
    """Keeps exact rows, written where they stay; blocks on a device come over first, one after the other."""

    def _begin(self, compress: Any, n_backward: int) -> None:
        self._shape = (self.n_examples, self.n_columns, self.parameters.n_parameters)
        self._on_a_device = devices.has_own_memory(self.scale.device)
        self._pieces: deque[tuple[slice, HostCopy, int | None]] = deque()
        self._values: Array | None = None

    def _put(self, block: Block) -> None:
        assert not isinstance(block.starts, tuple), "exact rows are not gathered"
        scale = self.scale[block.examples, None, None, None]
        if self._on_a_device:
            scaled = block.values.to(torch.float32) * scale  # the block's own memory is used again
            starts = () if isinstance(block.starts, int) else (block.starts,)
            start = block.starts if isinstance(block.starts, int) else None
            self._pieces.append((block.examples, to_host(scaled, *starts), start))
            return
        starts_here = block.starts if isinstance(block.starts, int) else block.starts.numpy()
        self._write(block.examples, block.values.to(torch.float32).numpy(), starts_here, scale.numpy())

    def _write(self, examples: slice, values: Array, starts: int | Array, scale: Array | float) -> None:
        if self._values is None:
            self._values = np.zeros(self._shape, np.float32)
        target, width = self._values[examples], values.shape[3]
        if isinstance(starts, int):
            np.multiply(values, scale, out=target[:, :, None, starts : starts + width])
            return
        scaled = values * scale
        for example, begins in enumerate(starts):
            for run, start in enumerate(begins):
                target[example, :, start : start + width] += scaled[example, :, run]

    def _rows(self) -> Callable[[Array, Array], Rows]:
        def arrived(counts: Array, _: Array) -> Rows:
            while self._pieces:
                examples, copy, start = self._pieces.popleft()
                values, *starts = copy.wait()
                self._write(examples, values, starts[0] if start is None else start, 1.0)
            values = np.zeros(self._shape, np.float32) if self._values is None else self._values
            return DenseRows.first_of_each(values, counts)

        return arrived


class SketchSink(Sink):
    """Keeps the rows' sketches, made by the streaming kernel."""

    def _begin(self, compress: Any, n_backward: int) -> None:
        self._sketch: Sketch = compress
        sketch = self._sketch
        self._sums = StreamingSketch(self.n_examples * self.n_columns, sketch.d, sketch.seed, nonzeros=sketch.nonzeros)

    def paired(self, parameter: Parameter, rules: list[Rule]) -> bool:
        """Decide whether a two-sided parameter is sketched from its factors, by counting operations."""
        if len(rules) != 1 or not self._sketch.two_sided(parameter.shape):
            return False
        t, (n, k), d = rules[0].layout.positions, parameter.shape, self._sketch.d
        transforms = t * (1 + self.n_columns) + self.n_columns
        costs = _ON_DEVICE if self.scale.device.type == "cuda" else _ON_HOST
        factored = transforms * d * math.log2(d) * costs.transform
        factored += t * (self.n_columns * max(n, k) + min(n, k)) * costs.scatter
        formed = self.n_columns * n * k * (t * costs.product + costs.scatter)
        return factored < formed

    def _put(self, block: Block) -> None:
        b, r, runs, width = block.values.shape
        values, parameter, shape = block.values.reshape(-1, width), block.parameter, None
        if self._sketch.two_sided(parameter.shape):
            shape = (parameter.shape[0], parameter.shape[1])
        where: BlockRows | Tensor
        rows: Array | None = None
        if not isinstance(block.starts, Tensor):
            starts = (block.starts,) if isinstance(block.starts, int) else block.starts
            if shape is not None:
                starts = tuple((start - parameter.offset) // shape[1] for start in starts)
            where = target_rows(starts, block.examples.start, b, r, self._sums.n_rows)
        else:
            where = block.starts[:, None, :].expand(b, r, runs).reshape(-1)
            where = where if shape is None else (where - parameter.offset) // shape[1]
            example = np.arange(block.examples.start, block.examples.stop, dtype=np.int64)
            rows = np.repeat(example[:, None] * r + np.arange(r), runs)
        if shape is None:
            self._sums.push(values, where, rows)
        else:
            self._sums.push_matrix(values, parameter.offset, shape, where, rows)

    def _put_pairs(self, pairs: Pairs) -> None:
        rows = slice(pairs.examples.start * self.n_columns, pairs.examples.stop * self.n_columns)
        parameter = pairs.parameter
        shape = (parameter.shape[0], parameter.shape[1])
        self._sums.push_outer(pairs.delta, pairs.inputs, parameter.offset, shape, rows, pairs.turned)

    def _rows(self) -> Callable[[Array, Array], Rows]:
        sketches = self._sums.finish_later()

        def arrived(counts: Array, scale: Array) -> Rows:
            try:
                sums = sketches().reshape(len(counts), self.n_columns, self._sketch.d)
            except NonFiniteError as error:
                position = int(self._ids[error.row // max(1, self.n_columns)])
                raise DataError(
                    f"gradients: the sketch of example {position} overflows float32; scale the model's loss or logits "
                    "down"
                ) from error
            sums *= scale[:, None, None]
            return DenseRows.first_of_each(sums, counts)

        return arrived


@functools.lru_cache(maxsize=2048)
def target_rows(
    starts: tuple[int, ...], first: int, b: int, r: int, n_targets: int, column_stride: int | None = None
) -> BlockRows:
    """Plan the rows of a block: b examples from the first on, r columns of each, a row for each start of a run.

    ``column_stride`` is the distance of two columns' flat indices in the one target (sketch or selector) of an example;
    with None, each column has a target of its own.
    """
    one = np.arange(r, dtype=np.int64)[:, None] * (column_stride or 0) + np.array(starts, np.int64)
    columns = 1 if column_stride is not None else r
    rows = np.repeat(np.arange(first * columns, (first + b) * columns, dtype=np.int64), one.size // columns)
    return BlockRows(np.tile(one.reshape(-1), b), rows, n_targets)


def _gram(values: Tensor, starts: Tensor | tuple[int, ...] | int) -> Tensor:
    """Inner products of the columns ``(b, R, R)``; in float64 summed over gathered parameters."""
    if isinstance(starts, tuple):
        runs = values.transpose(1, 2)
        return (runs @ runs.mT).sum(dim=1, dtype=torch.float64)
    flat = values.flatten(2)
    if flat.shape[1] <= FEW_ROWS and devices.has_own_memory(flat.device):
        return _gram_of_few(flat)
    return torch.bmm(flat, flat.mT)


def _gram_of_few(flat: Tensor) -> Tensor:
    """Inner products of few long rows ``(b, R, m)``: ``(b, R, R)`` float64, by one sum over all entries for each pair.

    In a profile on an H100 cuBLAS took 1 ms for such products of 32 examples, some 50 times what reading them takes: it
    gives an example to one multiprocessor (benchmarks/results/cuda.md).
    """
    gram = flat.new_empty(len(flat), flat.shape[1], flat.shape[1], dtype=torch.float64)
    for i in range(flat.shape[1]):
        gram[:, i, i] = torch.linalg.vector_norm(flat[:, i], dim=1, dtype=torch.float64).square()
        for j in range(i):
            gram[:, i, j] = gram[:, j, i] = (flat[:, i] * flat[:, j]).sum(dim=1, dtype=torch.float64)
    return gram
