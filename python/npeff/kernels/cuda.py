"""The CUDA kernels on torch tensors: put on the caller's stream, never waited for.

What :mod:`npeff.kernels` calls for tensors on a CUDA device, after it has checked the arguments. Outputs and workspaces
come from torch's caching allocator.
"""

from __future__ import annotations

import weakref
from types import ModuleType

import torch
from torch import Tensor

from npeff.errors import ArgumentError, DataError
from npeff.kernels import dispatch

ALL_FINITE = 2**63 - 1
"""First entry of a status when nothing non-finite was found."""


def module(x: Tensor) -> ModuleType:
    """``npeff._cuda`` for x's device.

    Raises:
        ArgumentError: It cannot be used there.
    """
    found = dispatch.cuda(x.device)
    if found is None:
        raise ArgumentError(f"{x.device}: no CUDA kernels here ({dispatch.cuda_reason(x.device)})")
    return found


def stream(x: Tensor) -> int:
    """Address of the caller's current stream on x's device."""
    return int(torch.cuda.current_stream(x.device).cuda_stream)


def nnls_(
    gram: Tensor,
    cross: Tensor,
    w: Tensor,
    *,
    max_sweeps: int,
    tol: float,
    kkt: Tensor | None = None,
) -> Tensor:
    """Coordinate descent in place, as :func:`npeff.kernels.nnls` without ``exact``; waits for nothing.

    Args:
        gram: ``(r, r)`` float32 or float64, contiguous.
        cross: ``(n, r)``.
        w: ``(n, r)``, in: where to start; out: the result.
        max_sweeps: Most sweeps.
        tol: A row stops once its residual is ≤ tol.
        kkt: ``(n,)`` out: residuals; None to save that pass.

    Returns:
        Status ``(2,)`` int64: the first row with a non-finite value (or ``ALL_FINITE``), and the sweeps made.
    """
    entries = module(cross).nnls_workspace(index_of(cross), *cross.shape)
    workspace = torch.empty(entries, dtype=cross.dtype, device=cross.device)
    status = torch.empty(2, dtype=torch.int64, device=cross.device)
    module(cross).nnls(gram, cross, w, kkt, max_sweeps, tol, workspace, status, stream(cross))
    return status


def check_status(status: Tensor) -> int:
    """Wait for a status, and return the sweeps made.

    Raises:
        DataError: A row was not finite.
    """
    bad, sweeps = (int(x) for x in status.tolist())
    if bad != ALL_FINITE:
        raise DataError(f"cross: row {bad} (or its start in w0) holds NaN or infinite values")
    return sweeps


def spmm(indptr: Tensor, indices: Tensor, values: Tensor, dense: Tensor) -> Tensor:
    """``A · dense``: values and sums float32 (dense float32, float16 or bfloat16), or all float64."""
    out = torch.empty(len(indptr) - 1, dense.shape[1], dtype=values.dtype, device=dense.device)
    module(dense).spmm(indptr, indices, values, dense, out, stream(dense))
    return out


def gram_panel_(indptr: Tensor, indices: Tensor, values: Tensor, n_columns: int, k: Tensor) -> None:
    """The lower triangle of k += A·Aᵀ; indices ascend within a row."""
    module(k).gram_panel(indptr, indices, values, n_columns, k, stream(k))


def mirror_(k: Tensor) -> None:
    """Copies the lower triangle of k to the upper one."""
    module(k).mirror(k, stream(k))


def fisher_norms(indptr: Tensor, indices: Tensor, values: Tensor, n_columns: int, row_offsets: Tensor) -> Tensor:
    """``(n,)`` float64 norms of the examples' ``A Aᵀ``."""
    out = torch.empty(len(row_offsets) - 1, dtype=torch.float64, device=values.device)
    module(values).fisher_norms(indptr, indices, values, n_columns, row_offsets, out, stream(values))
    return out


def _sum_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def cross(p: Tensor, row_offsets: Tensor) -> Tensor:
    """Sums of squares over each example's rows; 16-bit p give float32."""
    out = torch.empty(len(row_offsets) - 1, p.shape[1], dtype=_sum_dtype(p), device=p.device)
    module(p).cross(p, row_offsets, out, stream(p))
    return out


def spread_multiply(w: Tensor, p: Tensor, row_offsets: Tensor) -> Tensor:
    """Rows of p times their example's row of w; 16-bit w and p give float32."""
    out = torch.empty(p.shape, dtype=_sum_dtype(p), device=p.device)
    module(p).spread_multiply(w, p, row_offsets, out, stream(p))
    return out


def index_of(x: Tensor) -> int:
    """Number of x's device."""
    return torch.cuda.current_device() if x.device.index is None else x.device.index


class Checked:
    """Remembers which tensors were found sound, so that a matrix used a thousand times is looked at once.

    A tensor counts as the same while it lives and nothing was written to it (torch counts the writes).
    """

    def __init__(self) -> None:
        self._seen: dict[tuple[int, ...], tuple[tuple[weakref.ref[Tensor], int], ...]] = {}

    def known(self, *tensors: Tensor, extent: int) -> bool:
        """Whether just these tensors were recorded with this extent, and are as they were."""
        found = self._seen.get((extent, *map(id, tensors)))
        return found is not None and all(
            ref() is tensor and version == tensor._version
            for (ref, version), tensor in zip(found, tensors, strict=True)
        )

    def record(self, *tensors: Tensor, extent: int) -> None:
        """They are sound for this extent."""
        self._seen = {key: entry for key, entry in self._seen.items() if all(ref() is not None for ref, _ in entry)}
        key = (extent, *map(id, tensors))
        self._seen[key] = tuple((weakref.ref(t), t._version) for t in tensors)


checked = Checked()
"""The CSR structures and row offsets on devices that were found sound."""
