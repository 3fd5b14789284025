"""Data of one parameter, kept for all examples until their inner products are formed."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from npeff import kernels
from npeff.gradients.blocks import Block, Pairs
from npeff.models.parameters import Parameter

Array = npt.NDArray[Any]

TILE = 1 << 24
"""Most numbers that a product in between may have."""
MERGED = 1024
"""Rows from which on parts are large enough."""


@dataclass
class KeptPart:
    """Some examples of one parameter: factors, whole gradients, or gradients on a few runs of elements.

    Attributes:
        counts: ``(b,)`` rows per example, or per sequence whose places share the inputs.
        delta: ``(rows, T, n)`` with ``inputs (b, T, k)``, when factors are kept.
        inputs: See ``delta``.
        turned: The parameter is (k, n).
        values: ``(rows, numel)``, when gradients are kept.
        sparse: ``indptr, indices, values`` CSR within the parameter, when runs are kept.
    """

    counts: Array
    delta: Tensor | None = None
    inputs: Tensor | None = None
    turned: bool = False
    values: Tensor | None = None
    sparse: tuple[Array, Array, Array] | None = None

    @property
    def form(self) -> tuple[object, ...]:
        """The properties that parts must share to be joined; runs are never joined."""
        if self.sparse is not None:
            return ("runs", id(self))
        return (self.turned, self.values is not None, None if self.delta is None else self.delta.shape[1])

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        held = sum(x.nbytes for x in (self.delta, self.inputs, self.values) if x is not None)
        return held + sum(x.nbytes for x in self.sparse or ())

    @property
    def empty(self) -> bool:
        """Whether the logits of these examples do not depend on the parameter."""
        return self.delta is None and self.values is None and self.sparse is None

    @property
    def owners(self) -> Tensor:
        """``(rows,)`` which of its examples each row belongs to."""
        return torch.repeat_interleave(torch.arange(len(self.counts)), torch.from_numpy(self.counts))


class LayerGram:
    """Collector of one parameter's data: keeps them batch by batch, and adds the parameter's share to K.

    Args:
        parameter: The parameter.
    """

    def __init__(self, parameter: Parameter) -> None:
        self.parameter = parameter
        self.parts: list[KeptPart] = []
        self.nbytes = 0

    def begin(self, counts: Array, n_columns: int) -> None:
        """Begin a batch with ``counts`` rows per example."""
        self._counts, self._n_columns = counts, n_columns
        self._pairs: list[Pairs] = []
        self._whole: Tensor | None = None
        self._runs: list[tuple[Array, Array, Array]] = []

    def take(self, block: Block | Pairs) -> None:
        """Take what is needed of a block; the block may be overwritten afterwards."""
        if isinstance(block, Pairs):
            delta, inputs = (x.to("cpu", torch.float32, copy=True) for x in (block.delta, block.inputs))
            self._pairs.append(replace(block, delta=delta, inputs=inputs))
            return
        values = block.values.to("cpu", torch.float32)
        b, r, runs, width = values.shape
        if isinstance(block.starts, int):
            if self._whole is None:
                self._whole = torch.zeros(len(self._counts), self._n_columns, self.parameter.numel)
            start = block.starts - self.parameter.offset
            self._whole[block.examples, :, start : start + width] = values[:, :, 0]
            return
        assert isinstance(block.starts, Tensor), "small parameters were not to be gathered"
        starts = (block.starts.cpu() - self.parameter.offset)[:, None, :, None] + torch.arange(width)
        rows = torch.arange(block.examples.start, block.examples.stop)[:, None] * r + torch.arange(r)
        entries = values != 0
        index = starts.expand(b, r, runs, width)[entries]
        row = rows[:, :, None, None].expand(b, r, runs, width)[entries]
        self._runs.append((row.numpy(), index.numpy(), values[entries].numpy()))

    def end(self) -> None:
        """End the batch: put its blocks together into one part."""
        counts, r = self._counts, self._n_columns
        kept = torch.from_numpy(np.less(np.arange(r), counts[:, None]).reshape(-1))
        if self._pairs:
            delta = torch.cat([pairs.delta for pairs in self._pairs])  # (b, T, R, n)
            delta = delta.transpose(1, 2).flatten(0, 1)[kept].contiguous()
            inputs = torch.cat([pairs.inputs for pairs in self._pairs])
            of_inputs = counts.reshape(len(inputs), -1).sum(axis=1)
            part = KeptPart(of_inputs, delta=delta, inputs=inputs, turned=self._pairs[0].turned)
        elif self._runs:
            part = KeptPart(counts, sparse=self._csr(kept.numpy()))
        elif self._whole is not None:
            part = KeptPart(counts, values=self._whole.flatten(0, 1)[kept])
        else:
            part = KeptPart(counts)  # the logits do not depend on it
        self._pairs, self._whole, self._runs = [], None, []
        self.parts.append(part)
        self.nbytes += part.nbytes

    def _csr(self, kept: Array) -> tuple[Array, Array, Array]:
        row, index, value = (np.concatenate(column) for column in zip(*self._runs, strict=True))
        order = np.lexsort((index, row))
        row, index, value = row[order], index[order], value[order]
        place = np.cumsum(kept) - 1
        alive = kept[row]
        indptr = np.concatenate([[0], np.cumsum(np.bincount(place[row[alive]], minlength=int(kept.sum())))])
        return indptr.astype(np.int64), index[alive].astype(np.int64), value[alive]

    # ---- inner products ------------------------------------------------------------------------------------

    def add_to(self, K: Array) -> None:
        """Add this parameter's share of all inner products, and let go of what was kept."""
        target, parts = torch.from_numpy(K), _merged(self.parts)
        self.parts = []
        edges = np.concatenate([[0], np.cumsum([int(part.counts.sum()) for part in parts])])
        if any(part.sparse is not None for part in parts):
            self._add_sparse(target, parts)
            return
        for i, mine in enumerate(parts):
            for j, other in enumerate(parts[: i + 1]):
                if mine.counts.sum() == 0 or other.counts.sum() == 0:
                    continue
                if mine.empty or other.empty:
                    continue
                if mine.delta is not None and other.delta is not None:
                    product = _of_factors(mine, other)
                else:
                    product = _gradients(mine) @ _gradients(other).T
                rows, columns = slice(int(edges[i]), int(edges[i + 1])), slice(int(edges[j]), int(edges[j + 1]))
                target[rows, columns] += product
                if j < i:
                    target[columns, rows] += product.T

    def _add_sparse(self, target: Tensor, parts: list[KeptPart]) -> None:
        """All examples' runs at once, by the kernel for sparse rows; whole gradients among them become sparse."""
        starts, indices, values = [np.zeros(1, np.int64)], [], []
        for part in parts:
            if part.sparse is not None:
                indptr, index, value = part.sparse
            elif part.values is not None:
                filled = part.values != 0
                indptr = np.concatenate([[0], np.cumsum(filled.sum(1).numpy())]).astype(np.int64)
                index, value = filled.nonzero()[:, 1].numpy(), part.values[filled].numpy()
            else:
                indptr = np.zeros(int(part.counts.sum()) + 1, np.int64)
                index, value = np.zeros(0, np.int64), np.zeros(0, np.float32)
            starts.append(indptr[1:] + starts[-1][-1])
            indices.append(index)
            values.append(value)
        csr = (np.concatenate(starts), np.concatenate(indices), np.concatenate(values))
        target += torch.from_numpy(kernels.sparse_gram(*csr, self.parameter.numel))


def _merged(parts: list[KeptPart]) -> list[KeptPart]:
    """The parts, neighbours of one form joined up to MERGED rows: few large products rather than many small ones."""
    groups: list[list[KeptPart]] = []
    for part in parts:
        last = groups[-1] if groups else []
        if last and last[0].form == part.form and sum(int(p.counts.sum()) for p in last) < MERGED:
            last.append(part)
        else:
            groups.append([part])
    return [group[0] if len(group) == 1 else _joined(group) for group in groups]


def _joined(group: list[KeptPart]) -> KeptPart:
    def together(name: str) -> Tensor | None:
        return None if getattr(group[0], name) is None else torch.cat([getattr(part, name) for part in group])

    counts = np.concatenate([part.counts for part in group])
    return KeptPart(counts, together("delta"), together("inputs"), group[0].turned, together("values"))


def _of_factors(mine: KeptPart, other: KeptPart) -> Tensor:
    assert mine.delta is not None and mine.inputs is not None
    assert other.delta is not None and other.inputs is not None
    n_mine, t, n = mine.delta.shape
    n_other, u, _ = other.delta.shape
    k = mine.inputs.shape[2]
    if t == u == 1:
        across = mine.inputs[:, 0] @ other.inputs[:, 0].T
        return (mine.delta[:, 0] @ other.delta[:, 0].T) * across[mine.owners][:, other.owners]
    contracting = n_mine * n_other * t * u * (n + 2) + len(mine.counts) * len(other.counts) * t * u * k
    forming = n_mine * n_other * n * k + (n_mine * t + n_other * u) * n * k
    return _contracted(mine, other) if contracting < forming else _formed(mine, other)


def _gradients(part: KeptPart) -> Tensor:
    """``(rows, numel)`` in the parameter's order."""
    if part.values is not None:
        return part.values
    assert part.delta is not None and part.inputs is not None
    n, k = part.delta.shape[2], part.inputs.shape[2]
    formed = _stretch(part, 0, n)
    return formed.view(-1, n, k).transpose(1, 2).flatten(1) if part.turned else formed


def _contracted(mine: KeptPart, other: KeptPart) -> Tensor:
    """``Σ_tu (a_t·a'_u)(δ_t·δ'_u)``, a few examples at a time."""
    assert mine.delta is not None and mine.inputs is not None
    assert other.delta is not None and other.inputs is not None
    n_other, u, _ = other.delta.shape
    t = mine.delta.shape[1]
    out = torch.empty(len(mine.delta), n_other)
    owners, step = mine.owners, max(1, TILE // max(1, t * u * n_other))
    for start in range(0, len(mine.delta), step):
        rows = slice(start, min(start + step, len(mine.delta)))
        present, place = np.unique(owners[rows].numpy(), return_inverse=True)
        across = torch.einsum("etk,fuk->eftu", mine.inputs[torch.from_numpy(present)], other.inputs)
        delta = torch.einsum("rtn,sun->rstu", mine.delta[rows], other.delta)
        out[rows] = (delta * across[torch.from_numpy(place)][:, other.owners]).sum(dim=(2, 3))
    return out


def _formed(mine: KeptPart, other: KeptPart) -> Tensor:
    """The gradients formed, some of the δ's elements at a time, and multiplied."""
    assert mine.delta is not None and mine.inputs is not None
    assert other.delta is not None
    k, n = mine.inputs.shape[2], mine.delta.shape[2]
    step = max(1, TILE // max(1, k * max(len(mine.delta), len(other.delta))))
    out = torch.zeros(len(mine.delta), len(other.delta))
    for start in range(0, n, step):
        left, right = (_stretch(part, start, start + step) for part in (mine, other))
        out += left @ right.T
    return out


def _stretch(part: KeptPart, start: int, stop: int) -> Tensor:
    """``(rows, p·k)`` gradients for elements start … stop − 1 of δ."""
    assert part.delta is not None and part.inputs is not None
    delta = part.delta[:, :, start:stop]
    out = torch.empty(len(delta), delta.shape[2] * part.inputs.shape[2])
    owners, step = part.owners, max(1, TILE // max(1, math.prod(part.inputs.shape[1:])))
    for first in range(0, len(delta), step):
        rows = slice(first, first + step)
        out[rows] = torch.bmm(delta[rows].transpose(1, 2), part.inputs[owners[rows]]).flatten(1)
    return out
