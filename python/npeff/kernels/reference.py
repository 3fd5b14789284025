"""The kernels in plain torch: the native ones are tested against them, and they run where there are no native ones.

Written to be read, not to be fast. Tensors in, tensors out, on any device; the callers check arguments.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

Array = npt.NDArray[np.int64]
Tensor = torch.Tensor


def topk(x: Tensor, k: int, by_magnitude: bool) -> tuple[Tensor, Tensor]:
    """Return values and indices, both ``(rows, k)``, of the k largest |x| per row; ties go to the lower index.

    Args:
        x: ``(rows, cols)`` finite float32.
        k: Entries per row.
        by_magnitude: Order by descending |x| instead of by index.
    """
    indices = torch.sort(x.abs(), dim=1, descending=True, stable=True).indices[:, :k]
    if not by_magnitude:
        indices = indices.sort(dim=1).values
    return x.gather(1, indices), indices


class Selectors:
    """Running selections of the k largest |value| per selector; see ``kernels.StreamingTopK``.

    Args:
        n_rows: Number of selectors.
        k: Most entries that each keeps.
        keep_zeros: Keep exact zeros, too.
    """

    def __init__(self, n_rows: int, k: int, keep_zeros: bool) -> None:
        self.k = k
        self.keep_zeros = keep_zeros
        self.n_rows = n_rows
        self.reset()

    def reset(self) -> None:
        """Empty the selectors."""
        self.entries = [(torch.empty(0), torch.empty(0, dtype=torch.int64)) for _ in range(self.n_rows)]

    def push(self, block: Tensor, bases: Array, rows: Array | None) -> tuple[int, int] | None:
        """Take in ``block`` (b, width); return the row and flat index of the first non-finite value, if any."""
        for i, x in enumerate(block):
            bad = torch.nonzero(~torch.isfinite(x))
            if len(bad):
                return i, int(bases[i]) + int(bad[0])
        for i, x in enumerate(block):
            selector = i if rows is None else int(rows[i])
            indices = torch.arange(len(x)) + int(bases[i])
            kept = torch.ones(len(x), dtype=torch.bool) if self.keep_zeros else x != 0
            values, places = self.entries[selector]
            self.entries[selector] = self._best(torch.cat([values, x[kept]]), torch.cat([places, indices[kept]]))
        return None

    def _best(self, values: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
        """The k best, by ascending index."""
        by_index = indices.argsort()
        values, indices = values[by_index], indices[by_index]
        best = values.abs().argsort(descending=True, stable=True)[: self.k].sort().values
        return values[best], indices[best]

    def finish(
        self, by_magnitude: bool
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.float32]]:
        """Return counts, indices and values; the selectors are empty afterwards."""
        entries = self.entries
        if by_magnitude:
            orders = [values.abs().argsort(descending=True, stable=True) for values, _ in entries]
            entries = [(v[o], i[o]) for (v, i), o in zip(entries, orders, strict=True)]
        counts = np.array([len(values) for values, _ in entries], np.int64)
        values = torch.cat([values for values, _ in entries]) if entries else torch.empty(0)
        indices = torch.cat([indices for _, indices in entries]) if entries else torch.empty(0, dtype=torch.int64)
        self.reset()
        return counts, indices.numpy(), values.numpy()


def kkt(gram: Tensor, cross: Tensor, w: Tensor) -> Tensor:
    """Compute ``(n,)`` relative KKT residuals of w for ``min ½wᵀ·gram·w − crossᵀw, w ≥ 0`` (see ``kernels.nnls``)."""
    if w.numel() == 0:
        return w.new_zeros(len(w))
    gradient = w @ gram - cross
    violation = torch.where(w > 0, gradient.abs(), (-gradient).clamp(min=0))
    violation = torch.where(gram.diagonal() > 0, violation, 0)
    scale = cross.abs().amax(dim=1)
    return violation.amax(dim=1) / torch.where(scale > 0, scale, 1)


def nnls(gram: Tensor, cross: Tensor, w: Tensor, max_sweeps: int, tol: float) -> tuple[Tensor, int]:
    """Run cyclic coordinate descent from w, all rows at once; return the result and the sweeps made."""
    if w.numel() == 0:
        return w, 0
    diagonal = gram.diagonal()
    scale = cross.abs().amax(dim=1)
    scale = torch.where(scale > 0, scale, 1)
    w = torch.where(diagonal > 0, w.clamp(min=0), 0)
    live = torch.ones(len(w), dtype=torch.bool, device=w.device)
    sweeps = 0
    while sweeps < max_sweeps and bool(live.any()):
        worst = torch.zeros_like(scale)
        for j in range(len(gram)):
            if diagonal[j] <= 0:
                continue
            gradient = w @ gram[:, j] - cross[:, j]
            worst = torch.maximum(worst, torch.where(w[:, j] > 0, gradient.abs(), (-gradient).clamp(min=0)))
            w[:, j] = torch.where(live, (w[:, j] - gradient / diagonal[j]).clamp(min=0), w[:, j])
        live = live & (worst / scale > tol)
        sweeps += 1
    return w, sweeps


def nnls_exact(gram: Tensor, cross: Tensor, w: Tensor, tol: float) -> tuple[Tensor, int]:
    """Solve to optimality by active sets (Lawson & Hanson 1974), float64; return w and the most steps of a row."""
    rows, most = [], 0
    for c, start in zip(cross, w, strict=True):
        row, steps = _active_set(gram, c, start.clamp(min=0), tol)
        rows.append(row)
        most = max(most, steps)
    return (torch.stack(rows) if rows else w), most


def _active_set(gram: Tensor, cross: Tensor, w: Tensor, tol: float) -> tuple[Tensor, int]:
    scale = float(cross.abs().max()) if len(cross) else 1.0
    usable = gram.diagonal() > 0
    free = (w > 0) & usable
    w = torch.where(free, w, 0)
    steps = 0
    for _ in range(10 * len(cross) + 10):
        steps += 1
        while bool(free.any()):
            target = torch.zeros_like(w)
            target[free] = torch.linalg.lstsq(gram[free][:, free], cross[free, None], driver="gelsd").solution[:, 0]
            falling = free & (target <= 0)
            if not bool(falling.any()):
                w = target
                break
            ratio = w[falling] / (w[falling] - target[falling])
            w = w + float(ratio.min()) * (target - w)
            free = free & ~(falling & (w <= 1e-15 * w.max()))
            first = torch.nonzero(falling)[ratio.argmin()]
            free[first] = False
            w = torch.where(free, w, 0)
        gradient = gram @ w - cross
        entering = torch.where(~free & usable, -gradient, 0)
        j = int(entering.argmax())
        if float(entering[j]) <= tol * (scale or 1.0):
            break
        free[j] = True
    return w, steps


def spmm(indptr: Tensor, indices: Tensor, values: Tensor, dense: Tensor) -> Tensor:
    """Multiply CSR (R, n_columns) by dense (n_columns, r): ``(R, r)``."""
    out = dense.new_zeros(len(indptr) - 1, dense.shape[1])
    rows = torch.repeat_interleave(torch.arange(len(out), device=indptr.device), indptr.diff())
    step = max(1, (1 << 24) // max(1, dense.shape[1]))
    for start in range(0, len(values), step):
        part = slice(start, start + step)
        out.index_add_(0, rows[part], values[part, None] * dense[indices[part].long()])
    return out


def csr_transpose(indptr: Tensor, indices: Tensor, values: Tensor, n_columns: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return indptr, indices and values of the transposed matrix; indices keep their dtype."""
    numbers = torch.arange(len(indptr) - 1, device=indptr.device)
    rows = torch.repeat_interleave(
        numbers, indptr.diff(), output_size=len(indices)
    )  # without it a device is waited for
    columns, order = torch.sort(indices, stable=True)
    starts = torch.searchsorted(columns.long(), torch.arange(n_columns + 1, device=indptr.device))
    return starts, rows[order].to(indices.dtype), values[order]


def sparse_gram(indptr: Tensor, indices: Tensor, values: Tensor, n_columns: int) -> Tensor:
    """Compute A·Aᵀ ``(R, R)`` by dense blocks of columns."""
    n_rows = len(indptr) - 1
    rows = torch.repeat_interleave(torch.arange(n_rows, device=indptr.device), indptr.diff())
    out = values.new_zeros(n_rows, n_rows)
    step = max(1, (1 << 26) // max(1, n_rows))
    for start in range(0, n_columns, step):
        here = (indices >= start) & (indices < start + step)
        block = values.new_zeros(n_rows, min(step, n_columns - start))
        block[rows[here], indices[here].long() - start] = values[here]
        out += block @ block.T
    return out


def cross(p: Tensor, row_offsets: Tensor) -> Tensor:
    """Sum p² over each example's rows: ``(n, r)``."""
    examples = torch.repeat_interleave(torch.arange(len(row_offsets) - 1, device=p.device), row_offsets.diff())
    return p.new_zeros(len(row_offsets) - 1, p.shape[1]).index_add_(0, examples, p.square())


def fisher_norms(indptr: Tensor, indices: Tensor, values: Tensor, n_columns: int, row_offsets: Tensor) -> Tensor:
    """Compute ‖A_iA_iᵀ‖_F ``(n,)`` float64, example by example from dense rows."""
    out = values.new_zeros(len(row_offsets) - 1, dtype=torch.float64)
    for i in range(len(out)):
        rows = range(int(row_offsets[i]), int(row_offsets[i + 1]))
        block = values.new_zeros(len(rows), n_columns, dtype=torch.float64)
        for place, row in enumerate(rows):
            entries = slice(int(indptr[row]), int(indptr[row + 1]))
            block[place, indices[entries].long()] = values[entries].double()
        out[i] = (block @ block.T).norm()
    return out


def convolution_gradients(
    inputs: Tensor,
    delta: list[Tensor],
    kernel: tuple[int, int],
    stride: tuple[int, int],
    dilation: tuple[int, int],
    groups: int,
    turns: int,
    channels: slice,
) -> Tensor:
    """Multiply, for each tap, the inputs under it at every position by δ: ``(b, R, C', I/groups, *kernel)``."""
    (height, width), n = delta[0].shape[2:], len(inputs)
    columns = torch.stack(delta).reshape(len(delta), n // turns, turns, groups, -1, height, width)[:, :, :, :, channels]
    taps = []
    for ky in range(kernel[0]):
        for kx in range(kernel[1]):
            top, left = ky * dilation[0], kx * dilation[1]
            rows = slice(top, top + (height - 1) * stride[0] + 1, stride[0])
            under = inputs[:, :, rows, left : left + (width - 1) * stride[1] + 1 : stride[1]]
            under = under.reshape(n // turns, turns, groups, -1, height, width)
            taps.append(torch.einsum("rbtgoyx,btgiyx->brgoi", columns, under))
    found = torch.stack(taps, dim=-1).flatten(2, 3)
    return found.reshape(*found.shape[:-1], *kernel)


def _hash(key: int, index: Array) -> npt.NDArray[np.uint64]:
    """Entry ``index`` of stream ``key``; as ``sketch_hash`` in csrc/sketch/hash.h."""
    return _mix(np.uint64(key) + (index.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15))


def _mix(z: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def _key(seed: int, number: int) -> int:
    start = [seed + 0x9E3779B97F4A7C15, number + 0x5851F42D4C957F2D]
    first, second = (_mix(np.array([value % 2**64], np.uint64)) for value in start)
    return int(_mix(first ^ second)[0])


def sketch_map(indices: Array, d: int, seed: int, copies: int) -> tuple[Array, npt.NDArray[np.float64]]:
    """Compute buckets and signs, both ``(copies, n)``, of the parameters at flat ``indices`` ``(n,)``."""
    groups = np.uint64(d // (16 * copies))
    buckets, signs = np.empty((copies, len(indices)), np.int64), np.empty((copies, len(indices)))
    lane = indices & 15
    for copy in range(copies):
        hashed = _hash(_key(seed, copy), indices >> 4)
        group = ((hashed >> np.uint64(32)) * groups >> np.uint64(32)).astype(np.int64)
        turn = (hashed >> np.uint64(16)).astype(np.int64) & 15
        buckets[copy] = 16 * (group + copy * int(groups)) + (lane ^ turn)
        signs[copy] = 1 - 2 * ((hashed.astype(np.int64) >> lane) & 1)
    return buckets, signs


def add_to_sketch(
    sums: npt.NDArray[np.float64], rows: Array | int, indices: Array, values: npt.NDArray[np.float32], seed: int,
    copies: int,
) -> None:  # fmt: skip
    """Add ``values`` (n,) at flat ``indices`` (n,) to ``sums[rows]``, one after the other; sums (R, d)."""
    buckets, signs = sketch_map(np.asarray(indices, np.int64), sums.shape[1], seed, copies)
    for bucket, sign in zip(buckets, signs, strict=True):
        place: Any = (rows, bucket)
        np.add.at(sums, place, sign * values)


def sketch(x: npt.NDArray[np.float64], d: int, seed: int, base: int, copies: int) -> npt.NDArray[np.float64]:
    """Multiply x (rows, cols) by the matrix of the map, formed in float64: ``(rows, d)``, the oracle."""
    buckets, signs = sketch_map(base + np.arange(x.shape[1], dtype=np.int64), d, seed, copies)
    matrix = np.zeros((x.shape[1], d))
    for bucket, sign in zip(buckets, signs, strict=True):
        matrix[np.arange(x.shape[1]), bucket] += sign / np.sqrt(copies)
    return x @ matrix


def sketch_places(seed: int, offset: int, side: int, d: int, n: int) -> npt.NDArray[np.int32]:
    """Compute bucket·2 + (1 where the sign is −), ``(n,)``, for one side of the two-sided map of a matrix."""
    number = (1 << 63) | (offset << 1) | side
    hashed = _hash(_key(seed, number), np.arange(n, dtype=np.int64))
    bucket = (hashed >> np.uint64(32)).astype(np.int64) & (d - 1)
    return ((bucket << 1) | (hashed.astype(np.int64) & 1)).astype(np.int32)


def sketch_outer(
    delta: Tensor, inputs: Tensor, by_delta: npt.NDArray[np.int32], by_input: npt.NDArray[np.int32], d: int
) -> Tensor:
    """Form Σ_t delta (b, T, R, n) ⊗ inputs (b, T, k), and sketch the sums on two sides: ``(b·R, d)`` float64."""
    products = torch.einsum("btrn,btk->brnk", delta.double(), inputs.double()).flatten(2).flatten(0, 1)
    both = torch.from_numpy((by_delta[:, None] ^ by_input).reshape(-1).astype(np.int64))
    return products.new_zeros(len(products), d).index_add_(1, both >> 1, products * (1 - 2 * (both & 1)))


def outer_gram(delta: Tensor, inputs: Tensor, n_slots: int) -> tuple[Tensor, Tensor]:
    """Inner products ``(b·K, R, R)`` of the columns Σ_t delta (b, T, K·R, n) ⊗ inputs (b, T, k) of each of K slots.

    And ``(b·K,)`` bounds of the sums of their terms' sizes; on the CPU in float64.
    """
    b, t, columns, n = delta.shape
    flat = delta.reshape(b, t, columns * n)
    across = torch.bmm(inputs, inputs.mT)
    left, right = (
        x.view(b, t, n_slots, columns // n_slots, n).permute(0, 2, 3, 1, 4).flatten(3).flatten(0, 1)
        for x in (flat, torch.bmm(across, flat))
    )
    size = torch.linalg.matrix_norm(across).repeat_interleave(n_slots) * left.square().sum(dim=(1, 2))
    wide = torch.float64 if delta.device.type == "cpu" else delta.dtype
    return torch.bmm(left, right.mT).to(wide), size.to(wide)
