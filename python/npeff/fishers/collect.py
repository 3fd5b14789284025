"""Taking blocks of per-example gradients in, and giving compressed rows and dense norms out."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from npeff.errors import DataError
from npeff.fishers import largest
from npeff.fishers.compress import Compression, Sketch, TopK
from npeff.fishers.rows import DenseRows, Rows
from npeff.fishers.sketched import Sketched, worth_pairing
from npeff.gradients.factors import Factors
from npeff.gradients.rules import Rule
from npeff.gradients.tiles import Block, Pairs
from npeff.kernels import StreamingTopK
from npeff.kernels.transfers import HostCopy, to_host
from npeff.models import devices
from npeff.models.parameters import Parameter, Parameters

Array = npt.NDArray[Any]


class _Sink(Protocol):
    def put(self, block: Block) -> None:
        """Take a block's values, where they lie."""

    def later(self) -> Callable[[Array, Array], Rows]:
        """Start bringing what was taken to the host.

        Returns:
            Of ``counts`` (b,) and ``scale`` (b,), the rows, once they are there: example by example, the first
            ``counts`` of each, multiplied by the example's scale.
        """


class Collected:
    """What a batch gave, on its way to the host."""

    def __init__(self, numbers: HostCopy, rows: Callable[[Array, Array], Rows]) -> None:
        self._numbers, self._rows = numbers, rows
        self._here: list[Array] | None = None

    def finite(self) -> bool:
        """Whether all gradients were finite; waits for the batch's work on the device."""
        return bool(np.isfinite(self._arrived()[0]).all())

    def take(self) -> tuple[Rows, Array, Array]:
        """The rows, how many each example has ``(b,)``, and the dense Fishers' norms ``(b,)`` float32.

        Any thread may wait for them.
        """
        norms, counts, scale = self._arrived()
        return self._rows(counts, scale), counts, norms.astype(np.float32)

    def _arrived(self) -> list[Array]:
        if self._here is None:
            self._here = self._numbers.wait()
        return self._here


class Collector:
    """Collects the blocks of one batch, on the device where they lie.

    Args:
        parameters: The flat vector's layout.
        factors: The batch's cotangents; blocks were made with their unit-norm columns.
        ids: ``(b,)`` positions of the examples, for messages.
        squared: Blocks are Σ of squares (diagonal Fishers).
        compress: What to keep.
        at_once: Look at every block whether it is finite, and say where it is not. Otherwise nothing is waited for, and
            :meth:`Collected.finite` says whether the batch has to be collected again, looking at once.

    Attributes:
        paired: Of which parameters blocks are wanted as factors; None: of none.
    """

    def __init__(
        self,
        parameters: Parameters,
        factors: Factors,
        ids: Array,
        squared: bool,
        compress: Compression | None,
        at_once: bool = True,
    ) -> None:
        n, _, width = factors.columns.shape
        self._parameters, self._ids, self._squared, self._at_once = parameters, ids, squared, at_once
        self._n_columns = 1 if squared else width
        self._counts = torch.ones_like(factors.counts) if squared else factors.counts
        self._norm_scale = factors.scale.square()
        scale = self._norm_scale if squared else factors.scale
        self._scale = scale.to(torch.float32)
        # A square may be 0 · ∞ where the Fisher is zero because the model is certain.
        self._certain = self._norm_scale == 0
        there = devices.has_own_memory(factors.columns.device)
        self._some_certain = squared and (there or bool(self._certain.any()))
        self._gram = torch.zeros(
            (n, self._n_columns, self._n_columns), dtype=torch.float64, device=factors.columns.device
        )
        m = parameters.n_parameters
        self._sink: _Sink
        self.paired: Callable[[Parameter, list[Rule]], bool] | None = None
        if isinstance(compress, TopK):
            self._sink = _Largest(n, self._n_columns, m, compress.k)
            if not there:
                self.paired = largest.worth_pairing(squared, width)
        elif isinstance(compress, Sketch):
            self._sink = Sketched(n, self._n_columns, compress)
            if compress.form == "kronecker":
                self.paired = worth_pairing(compress, self._n_columns, factors.columns.device)
        else:
            self._sink = _Whole(self._n_columns, m, self._scale)

    def add(self, block: Block | Pairs) -> None:
        """Take one block.

        Raises:
            DataError: A gradient is not finite; names example and element.
        """
        if isinstance(block, Pairs):
            self._add_pairs(block)
            return
        if self._some_certain:
            certain = self._certain[block.examples]
            block = replace(block, values=block.values.masked_fill(certain[:, None, None, None], 0.0))
        gram = block.gram
        if gram is None:
            gram = _gram(_at_least_float32(block.values), block.starts)
        gram = gram.to(self._gram.device, torch.float64)
        if self._at_once and not torch.isfinite(gram).all():
            self._refuse_non_finite(block)
            flat = block.values.flatten(2).to(torch.float64)
            gram = (flat @ flat.mT).to(self._gram.device)
        self._gram[block.examples] += gram
        self._sink.put(block)

    def _add_pairs(self, pairs: Pairs) -> None:
        pairs = pairs.squared() if self._squared else pairs
        gram = pairs.gram().to(self._gram.device, torch.float64)
        unsound = self._at_once and not torch.isfinite(gram).all()
        unsound = unsound or (self._some_certain and bool(self._certain[pairs.examples].any()))
        if unsound or not isinstance(self._sink, Sketched | _Largest):
            self.add(pairs.formed())
            return
        self._gram[pairs.examples] += gram
        self._sink.put_pairs(pairs)

    def finish(self) -> Collected:
        """Start bringing the results to the host; the collector is done."""
        norms = self._gram[:, 0, 0].sqrt() if self._squared else self._gram.square().sum(dim=(1, 2)).sqrt()
        return Collected(to_host(norms * self._norm_scale, self._counts, self._scale), self._sink.later())

    def _refuse_non_finite(self, block: Block) -> None:
        bad = (~torch.isfinite(block.values)).nonzero()
        if not len(bad):
            return
        example, _, run, offset = (int(i) for i in bad[0])
        starts = (block.starts,) if isinstance(block.starts, int) else block.starts
        start = starts[run] if isinstance(starts, tuple) else int(starts[example, run])
        name, index = self._parameters.locate(start + offset)
        value = float(block.values[tuple(bad[0])])
        position = int(self._ids[block.examples.start + example])
        raise DataError(
            f"gradients: example {position} has the gradient {value} for {name}{list(index)}; find what "
            "overflows in the model on that example, or leave it out of the data"
        )


class _Whole:
    """Exact rows, written where they stay; blocks on a device first come over, one after the other."""

    def __init__(self, n_columns: int, n_parameters: int, scale: Tensor) -> None:
        self._shape = (len(scale), n_columns, n_parameters)
        self._scale, self._on_the_way = scale[:, None, None, None], devices.has_own_memory(scale.device)
        self._pieces: deque[tuple[slice, HostCopy, int | None]] = deque()
        self._values: Array | None = None

    def put(self, block: Block) -> None:
        assert not isinstance(block.starts, tuple), "exact rows are not gathered"
        scale = self._scale[block.examples]
        if self._on_the_way:
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

    def later(self) -> Callable[[Array, Array], Rows]:
        def rows(counts: Array, _: Array) -> Rows:
            while self._pieces:
                examples, copy, start = self._pieces.popleft()
                values, *starts = copy.wait()
                self._write(examples, values, starts[0] if start is None else start, 1.0)
            values = np.zeros(self._shape, np.float32) if self._values is None else self._values
            return DenseRows.first_of_each(values, counts)

        return rows


class _Largest:
    """The k largest entries over each example's rows, by the streaming kernel."""

    def __init__(self, n: int, n_columns: int, n_parameters: int, k: int) -> None:
        self._n_columns, self._n_parameters = n_columns, n_parameters
        self._selectors = StreamingTopK(n, min(k, n_columns * n_parameters))

    def put(self, block: Block) -> None:
        b, r, runs, width = block.values.shape
        values, first = block.values.reshape(-1, width), block.examples.start
        if not isinstance(block.starts, Tensor):
            starts = (block.starts,) if isinstance(block.starts, int) else block.starts
            n, m = self._selectors.n_rows, self._n_parameters
            self._selectors.push(values, largest.rows_at(starts, first, b, r, m, n))
            return
        offsets = torch.arange(r, device=block.starts.device) * self._n_parameters
        base = (block.starts[:, None, :] + offsets[:, None]).reshape(-1)
        self._selectors.push(values, base, np.repeat(np.arange(first, first + b, dtype=np.int64), r * runs))

    def put_pairs(self, pairs: Pairs) -> None:
        largest.push(self._selectors, pairs, self._n_parameters)

    def later(self) -> Callable[[Array, Array], Rows]:
        selections, n_columns, m = self._selectors.finish_later(), self._n_columns, self._n_parameters
        return lambda counts, scale: largest.sparse_rows(*selections(), n_columns, m, counts, scale)


def _gram(values: Tensor, starts: Tensor | tuple[int, ...] | int) -> Tensor:
    """Inner products of the columns ``(b, R, R)``; in float64 summed over gathered parameters."""
    if isinstance(starts, tuple):
        runs = values.transpose(1, 2)
        return (runs @ runs.mT).sum(dim=1, dtype=torch.float64)
    flat = values.flatten(2)
    return torch.bmm(flat, flat.mT)


def _at_least_float32(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
