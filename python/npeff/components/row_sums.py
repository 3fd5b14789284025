"""Weighted sums of rows, ``g_j = Σ_row c_row,j a_row``, for many components in one pass over the rows.

The block of a matrix in a row is ``Σ_t δ_t ⊗ a_t`` over the positions of an example. Two orders of summation:

* *positions first*: each row's block is formed, and the blocks are combined by one product of matrices, which costs
  ``R·N + c·R·b`` times the size of the matrix (R rows of each of b examples, N positions in all, c components);
* *components first*: δ is combined, ``D_tj = Σ_r c_rj δ_tr``, and ``g_j += Σ_t D_tj ⊗ a_t``, which costs ``c·N`` times
  the size. Positions at which δ vanishes are left out.

The cheaper is taken, parameter by parameter. Either order reads and writes the sums of all components, so that
examples wait until there are enough of them (:data:`ENOUGH`).

Where vectors are wanted as factors (:mod:`npeff.components.factored`), projections of the blocks are summed,
``Σ_t δ_t ⊗ a_tΩ`` and ``Σ_t Ψᵀδ_t ⊗ a_t``, in the same two orders.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from npeff.components.factored import FactorSlot, RangeSketch, slots, truncated
from npeff.gradients.blocks import Block, Pairs
from npeff.models.parameters import Parameters

Array = npt.NDArray[np.float32]

ENOUGH = 64
"""Rows (positions, in the second order) that are multiplied at a time: with fewer, the sums' own traffic dominates."""

WAITING_BYTES = 1 << 30
"""Most bytes of factors that wait."""

FORMED_ELEMENTS = 1 << 22
"""Most elements of blocks that are formed at a time."""


@dataclass(frozen=True)
class _Some:
    """Factors of some examples: δ ``(b, T, R, n)``, a ``(b, T, k)``, weights ``(b, R, c)``."""

    delta: Tensor
    inputs: Tensor
    weights: Tensor

    @property
    def n_rows(self) -> int:
        """Rows of the products: the examples' own, or with one position per example the positions."""
        b, t, r, _ = self.delta.shape
        return b * r if t > 1 else b

    @property
    def nbytes(self) -> int:
        """Bytes of all three."""
        return self.delta.nbytes + self.inputs.nbytes + self.weights.nbytes

    def blocks(self, rows: slice, turned: bool) -> Tensor:
        """Form some rows of every block ``Σ_t δ_tr ⊗ a_t``, or if turned of ``Σ_t a_t ⊗ δ_tr``: ``(b·R, …)``."""
        if turned:
            return torch.matmul(self.inputs[:, None, :, rows].mT, self.delta.transpose(1, 2)).flatten(2).flatten(0, 1)
        delta = self.delta[..., rows]
        b, t, r, p = delta.shape
        return torch.bmm(delta.reshape(b, t, r * p).mT, self.inputs).view(b * r, -1)


class RowSums:
    """Sums the rows that blocks hold, each with a weight per component.

    Args:
        parameters: The flat vector's layout.
        n_vectors: Components, c.
        rank: Rank of the factors; None: vectors are summed whole.
        device: Where the sums are kept.
    """

    def __init__(self, parameters: Parameters, n_vectors: int, rank: int | None, device: torch.device) -> None:
        self.parameters, self.n_vectors, self.rank = parameters, n_vectors, rank
        self._targets: dict[str, Tensor] = {}
        self._projected: dict[str, tuple[RangeSketch, Tensor, Tensor]] = {}
        self._waiting: dict[tuple[str, bool], list[_Some]] = {}
        self._waiting_bytes = 0
        self._offsets = {parameter.offset: parameter.name for parameter in parameters if parameter.numel}
        self._whole = torch.zeros(n_vectors, 0 if rank is not None else parameters.n_parameters, device=device)
        by_size: dict[tuple[int, int], RangeSketch] = {}
        for slot in slots(parameters, rank):
            name, (n, k) = slot.parameter.name, slot.size
            sketch = by_size.setdefault(slot.size, RangeSketch(slot.size, rank or 1))
            if rank is None:
                self._targets[name] = self._whole[:, slot.parameter.slice].view(n_vectors, n, k)
            elif slot.rank is not None and sketch.smaller:
                width, other = sketch.right.shape[1], sketch.left.shape[1]
                Y, Z = (torch.zeros(n_vectors, *size, device=device) for size in ((n, width), (other, k)))
                self._projected[name] = sketch, Y, Z
            else:
                self._targets[name] = torch.zeros(n_vectors, n, k, device=device)

    @staticmethod
    def nbytes(parameters: Parameters, n_vectors: int, rank: int | None) -> int:
        """Count the bytes of the sums, and of the vectors or factors that are made from them."""
        if rank is None:
            return 4 * n_vectors * parameters.n_parameters
        found = 0
        for slot in slots(parameters, rank):
            projected = RangeSketch(slot.size, rank).numel
            found += slot.numel + (slot.parameter.numel if slot.rank is None else min(slot.parameter.numel, projected))
        return 4 * n_vectors * found

    def add(self, block: Block | Pairs, weights: Tensor) -> None:
        """Add a block.

        Args:
            block: Of some examples of a pass, or of their slots.
            weights: ``(b, R, c)`` of all examples, or slots, of the pass.
        """
        weights = weights[block.examples]
        if isinstance(block, Pairs):
            self._wait(block, weights)
            return
        values = block.values
        flat = weights.reshape(-1, self.n_vectors).T.to(values)
        if isinstance(block.starts, Tensor):  # rows of a table that are looked up
            width = values.shape[3]
            rows = (block.starts - block.parameter.offset) // width
            combined = torch.einsum("brgw,brc->cbgw", values, weights.to(values)).flatten(1, 2)
            self._add_rows(block.parameter.name, rows.reshape(-1), combined)
        elif isinstance(block.starts, tuple):  # small parameters, gathered
            for run, start in enumerate(block.starts):
                self._add_run(self._offsets[start], 0, flat @ values[:, :, run].flatten(0, 1))
        else:
            start = block.starts - block.parameter.offset
            self._add_run(block.parameter.name, start, flat @ values[:, :, 0].flatten(0, 1))

    def _add_run(self, name: str, start: int, combined: Tensor) -> None:
        """Add ``(c, w)`` consecutive elements of a parameter."""
        if name in self._targets:
            self._targets[name].flatten(1)[:, start : start + combined.shape[1]] += combined.to(self._targets[name])
            return
        width = self._projected[name][0].size[1]
        rows = torch.arange(start // width, (start + combined.shape[1]) // width)
        self._add_rows(name, rows, combined.view(len(combined), -1, width))

    def _add_rows(self, name: str, rows: Tensor, combined: Tensor) -> None:
        """Add ``(c, u, k)`` to rows ``(u,)`` of a matrix, which may repeat."""
        if name in self._targets:
            target = self._targets[name]
            target.index_add_(1, rows.to(target.device), combined.to(target))
            return
        sketch, Y, Z = self._projected[name]
        combined, rows = combined.to(Y), rows.to(Y.device)
        Y.index_add_(1, rows, combined @ sketch.right.to(Y.device))
        Z += sketch.left.to(Y.device)[rows].T @ combined

    # ---- matrices as factors ---------------------------------------------------------------------------------------

    def _wait(self, pairs: Pairs, weights: Tensor) -> None:
        """Let factors wait until there are enough of them to be multiplied."""
        delta, inputs = pairs.delta, pairs.inputs
        weights = weights.reshape(len(delta), -1, self.n_vectors).to(delta)  # places of a sequence side by side
        b, t, r, _ = delta.shape
        if t > 1:
            used = (delta != 0).flatten(2).any(dim=2)
            n_used = int(used.sum())
            if self.n_vectors * n_used <= r * b * (t + self.n_vectors):  # every position as an example of its own
                example = torch.arange(b, device=used.device)[:, None].expand(b, t)[used]
                delta, inputs, weights = delta[used][:, None], inputs[used][:, None], weights[example]
        key = pairs.parameter.name, pairs.turned
        waiting = [*self._waiting.pop(key, []), _Some(delta, inputs, weights)]
        self._waiting_bytes += waiting[-1].nbytes
        if sum(some.n_rows for some in waiting) >= ENOUGH or self._waiting_bytes > WAITING_BYTES:
            self._multiply(key, waiting)
            self._waiting_bytes -= sum(some.nbytes for some in waiting)
        else:  # what came is overwritten when the next block is asked for
            self._waiting[key] = [*waiting[:-1], _Some(delta.clone(), inputs.clone(), weights)]

    def _multiply(self, key: tuple[str, bool], waiting: Iterable[_Some]) -> None:
        name, turned = key
        if name in self._targets:
            _add_products(self._targets[name], waiting, turned)
            return
        sketch, Y, Z = self._projected[name]
        right, left = sketch.right.to(Y.device), sketch.left.to(Y.device)
        on_left, on_right = [], []
        for some in waiting:
            if turned:
                on_right.append(replace(some, delta=some.delta @ right.to(some.delta)))
                on_left.append(replace(some, inputs=some.inputs @ left.to(some.inputs)))
            else:
                on_right.append(replace(some, inputs=some.inputs @ right.to(some.inputs)))
                on_left.append(replace(some, delta=some.delta @ left.to(some.delta)))
        _add_products(Y, on_right, turned)
        _add_products(Z, on_left, turned)

    # ---- results ---------------------------------------------------------------------------------------------------

    def finish(self) -> tuple[Array, npt.NDArray[np.float64]]:
        """Return the sums ``(c, p)`` as vectors or factored vectors, and the squared norms lost ``(c, n_tensors)``."""
        for key in list(self._waiting):
            self._multiply(key, self._waiting.pop(key))
        lost = np.zeros((self.n_vectors, len(self.parameters)))
        if self.rank is None:
            return self._whole.cpu().numpy(), lost
        laid = slots(self.parameters, self.rank)
        stored = np.zeros((self.n_vectors, sum(slot.numel for slot in laid)), np.float32)
        for number, slot in enumerate(laid):
            own = stored[:, slot.offset : slot.offset + slot.numel]
            if slot.rank is None:
                own[:] = self._targets.pop(slot.parameter.name).flatten(1).cpu().numpy()
                continue
            left, right, lost[:, number] = self._factors(slot)
            own[:] = np.concatenate([left.reshape(self.n_vectors, -1), right.reshape(self.n_vectors, -1)], 1)
        return stored, lost

    def _factors(self, slot: FactorSlot) -> tuple[Array, Array, npt.NDArray[np.float64]]:
        """The factors of one matrix of every component, and the squared norms that they lose."""
        assert slot.rank is not None
        name, found = slot.parameter.name, []
        for j in range(self.n_vectors):
            if name in self._projected:
                sketch, Y, Z = self._projected[name]
                left, right, lost = sketch.factors(Y[j : j + 1], Z[j : j + 1])
            else:
                whole = self._targets[name][j : j + 1].double()
                left, right = truncated(whole, slot.rank)
                lost = (whole - left @ right).square().sum(dim=(1, 2))
            found.append((left.float().cpu().numpy(), right.float().cpu().numpy(), lost.cpu().numpy()))
        self._targets.pop(name, None)
        self._projected.pop(name, None)
        lefts, rights, losses = zip(*found, strict=True)
        return np.concatenate(lefts), np.concatenate(rights), np.concatenate(losses)


def _add_products(target: Tensor, waiting: Iterable[_Some], turned: bool) -> None:
    """Add ``Σ_t,r c_rj δ_tr ⊗ a_t`` of all examples to ``target`` ``(c, n, k)``, or turned to ``(c, k, n)``."""
    formed = [some for some in waiting if some.delta.shape[1] > 1]
    positions = [some for some in waiting if some.delta.shape[1] == 1]
    if positions:
        inputs = torch.cat([some.inputs[:, 0] for some in positions]).to(target)
        for j in range(len(target)):
            parts = [torch.einsum("trn,tr->tn", some.delta[:, 0], some.weights[:, :, j]) for some in positions]
            combined = torch.cat(parts).to(target)
            left, right = (inputs, combined) if turned else (combined, inputs)
            target[j].addmm_(left.T, right)
    if formed:
        weights = torch.cat([some.weights.flatten(0, 1) for some in formed]).T.to(target)
        n_rows, (n, k) = weights.shape[1], target.shape[1:]
        step = max(1, FORMED_ELEMENTS // max(1, n_rows * k))
        for start in range(0, n, step):
            rows = slice(start, min(n, start + step))
            blocks = torch.cat([some.blocks(rows, turned) for some in formed])
            target[:, rows].flatten(1).addmm_(weights, blocks.to(target))
