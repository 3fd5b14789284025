"""Taking blocks of per-example gradients in, and giving compressed rows and dense norms out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from npeff.compress import Compression, Sketch, TopK
from npeff.errors import DataError
from npeff.gradients.factors import Factors
from npeff.gradients.rules import Rule
from npeff.gradients.sketched import Sketched, worth_pairing
from npeff.gradients.tiles import Block, Pairs
from npeff.kernels import StreamingTopK
from npeff.parameters import Parameter, Parameters
from npeff.rows import DenseRows, Rows, SparseRows

Array = npt.NDArray[np.generic]


class _Sink(Protocol):
    def put(self, block: Block) -> None:
        """Take a block's values."""

    def rows(self, counts: Array) -> Rows:
        """The rows, example by example, the first ``counts`` of each, multiplied by the example's scale."""


class Collector:
    """Collects the blocks of one batch.

    Args:
        parameters: The flat vector's layout.
        factors: The batch's cotangents; blocks were made with their unit-norm columns.
        ids: ``(b,)`` positions of the examples, for messages.
        squared: Blocks are Σ of squares (diagonal Fishers).
        compress: What to keep.

    Attributes:
        paired: Of which parameters blocks are wanted as factors; None: of none.
    """

    def __init__(
        self, parameters: Parameters, factors: Factors, ids: Array, squared: bool, compress: Compression | None
    ) -> None:
        n, _, width = factors.columns.shape
        self._parameters, self._ids, self._squared = parameters, ids, squared
        self._n_columns = 1 if squared else width
        self._counts = np.ones(n, np.int64) if squared else factors.counts.cpu().numpy()
        scale = factors.scale.square().cpu().numpy() if squared else factors.scale.cpu().numpy()
        self._norm_scale = factors.scale.square().cpu().numpy()
        # A square may be 0 · ∞ where the Fisher is zero because the model is certain.
        self._certain = factors.scale.square() == 0
        self._gram = torch.zeros((n, self._n_columns, self._n_columns), dtype=torch.float64)
        m = parameters.n_parameters
        self._sink: _Sink
        self.paired: Callable[[Parameter, list[Rule]], bool] | None = None
        if isinstance(compress, TopK):
            self._sink = _Largest(self._n_columns, m, scale, compress.k)
        elif isinstance(compress, Sketch):
            self._sink = Sketched(self._n_columns, scale, compress)
            if compress.form == "kronecker":
                self.paired = worth_pairing(compress, self._n_columns)
        else:
            self._sink = _Whole(self._n_columns, m, scale)

    def add(self, block: Block | Pairs) -> None:
        """Take one block.

        Raises:
            DataError: A gradient is not finite; names example and element.
        """
        if isinstance(block, Pairs):
            self._add_pairs(block)
            return
        certain = self._certain[block.examples]
        if self._squared and bool(certain.any()):
            block = replace(block, values=block.values.masked_fill(certain[:, None, None, None], 0.0))
        gram = block.gram
        if gram is None:
            flat = block.values.flatten(2)
            gram = torch.bmm(flat, flat.mT)
        gram = gram.to("cpu", torch.float64)
        if not torch.isfinite(gram).all():
            self._refuse_non_finite(block)
            flat = block.values.flatten(2).to(torch.float64)
            gram = (flat @ flat.mT).cpu()
        self._gram[block.examples] += gram
        self._sink.put(block)

    def _add_pairs(self, pairs: Pairs) -> None:
        gram = pairs.gram().to("cpu", torch.float64)
        if not torch.isfinite(gram).all() or not isinstance(self._sink, Sketched):
            self.add(pairs.formed())
            return
        self._gram[pairs.examples] += gram
        self._sink.put_pairs(pairs)

    def finish(self) -> tuple[Rows, Array, Array]:
        """The rows, how many each example has ``(b,)``, and the dense Fishers' norms ``(b,)`` float32."""
        norms = self._gram.square().sum(dim=(1, 2)).sqrt() if not self._squared else self._gram[:, 0, 0].sqrt()
        rows = self._sink.rows(self._counts)
        return rows, self._counts, (norms.numpy() * self._norm_scale).astype(np.float32)

    def _refuse_non_finite(self, block: Block) -> None:
        bad = (~torch.isfinite(block.values)).nonzero()
        if not len(bad):
            return
        example, _, run, offset = (int(i) for i in bad[0])
        start = block.starts if isinstance(block.starts, int) else int(block.starts[example, run])
        name, index = self._parameters.locate(start + offset)
        value = float(block.values[tuple(bad[0])])
        position = int(self._ids[block.examples.start + example])
        raise DataError(
            f"gradients: example {position} has the gradient {value} for {name}{list(index)}; find what "
            "overflows in the model on that example, or leave it out of the data"
        )


class _Whole:
    """Exact rows, written where they stay."""

    def __init__(self, n_columns: int, n_parameters: int, scale: Array) -> None:
        self._values = np.zeros((len(scale), n_columns, n_parameters), np.float32)
        self._scale = scale.astype(np.float32)[:, None, None]

    def put(self, block: Block) -> None:
        values = block.values.to("cpu", torch.float32).numpy()
        target, scale = self._values[block.examples], self._scale[block.examples]
        width = values.shape[3]
        if isinstance(block.starts, int):
            np.multiply(values[:, :, 0], scale, out=target[:, :, block.starts : block.starts + width])
            return
        for example, starts in enumerate(block.starts.cpu().numpy()):
            for run, start in enumerate(starts):
                target[example, :, start : start + width] += values[example, :, run] * scale[example]

    def rows(self, counts: Array) -> Rows:
        keep = np.less(np.arange(self._values.shape[1]), counts[:, None])
        flat = self._values.reshape(-1, self._values.shape[2])
        return DenseRows(flat if keep.all() else flat[keep.reshape(-1)])


class _Largest:
    """The k largest entries over each example's rows, by the streaming kernel."""

    def __init__(self, n_columns: int, n_parameters: int, scale: Array, k: int) -> None:
        self._n_parameters, self._scale = n_parameters, scale.astype(np.float32)
        self._selectors = StreamingTopK(len(scale), min(k, n_columns * n_parameters))

    def put(self, block: Block) -> None:
        values = block.values.to("cpu", torch.float32)
        b, r, runs, width = values.shape
        if isinstance(block.starts, int):
            base = np.tile(np.arange(r, dtype=np.int64) * self._n_parameters + block.starts, b)
        else:
            offsets = np.arange(r, dtype=np.int64) * self._n_parameters
            base = (block.starts.cpu().numpy()[:, None, :] + offsets[:, None]).reshape(-1)
        example = np.repeat(np.arange(block.examples.start, block.examples.stop, dtype=np.int64), r * runs)
        self._selectors.push(values.reshape(-1, width), base, example)

    def rows(self, counts: Array) -> Rows:
        found, flat, values = self._selectors.finish()
        m = self._n_parameters
        example = np.repeat(np.arange(len(found)), found)
        row, column = np.divmod(flat, m)
        # Rows beyond an example's count are zero and have no entries: number the rest end to end.
        first = np.concatenate([[0], np.cumsum(counts)])
        lengths = np.bincount(first[example] + row, minlength=int(first[-1]))
        indptr = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        index = np.int32 if m <= np.iinfo(np.int32).max else np.int64
        return SparseRows(indptr, column.astype(index), values * self._scale[example], m)
