"""Non-negative least squares in normal form, many right-hand sides at once."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Generic

import numpy as np
import torch

from npeff.errors import ArgumentError, DataError
from npeff.kernels import arrays, dispatch, reference
from npeff.kernels.arrays import ALL_FINITE, A, Operand, accepts_cupy
from npeff.short_repr import short_repr

MOST_SWEEPS = 1_000_000
"""Sweeps that may be asked for."""
STEP = 1 << 31
"""Multiply-adds, about, between two looks for Ctrl-C on the processor."""


@dataclass(frozen=True)
class NnlsResult(Generic[A]):
    """The result of :func:`nnls`.

    Attributes:
        w: ``(n, r)`` ≥ 0.
        kkt: ``(n,)`` relative KKT residuals at w; None where they were not asked for.
        sweeps: Most sweeps (``exact``: active-set steps) that any row took.
    """

    w: A
    kkt: A | None
    sweeps: int

    __repr__ = short_repr


@accepts_cupy
def nnls(
    gram: A,
    cross: A,
    w0: A | None = None,
    *,
    max_sweeps: int = 100,
    tol: float | None = None,
    exact: bool = False,
    kkt: bool = True,
) -> NnlsResult[A]:
    r"""Minimise ``½ wᵀ·gram·w − cross_iᵀ·w`` over ``w ≥ 0``, for every row i of ``cross``.

    Cyclic coordinate descent (Hsieh & Dhillon 2011), ``w_j ← max(0, w_j − (gram·w − cross_i)_j / gram_jj)``:
    a few sweeps from a warm start inside a solver. With ``exact`` each row is then finished in float64 by
    active sets (Lawson & Hanson 1974). Rows do not influence each other.

    The KKT residual of row i is ``max_j |violation_j| / max_j |cross_ij|`` (over 1 if ``cross_i = 0``), with
    violation the gradient where ``w_j > 0`` and ``min(gradient, 0)`` where ``w_j = 0``. Coordinates with
    ``gram_jj ≤ 0`` get coefficient 0 and are left out of it.

    Args:
        gram: ``(r, r)`` symmetric, float32 or float64.
        cross: ``(n, r)``, same dtype.
        w0: ``(n, r)`` where to start (negative entries count as 0), same dtype; None: at 0.
        max_sweeps: Most coordinate-descent sweeps, up to 10⁶. Ctrl-C ends them.
        tol: A row stops once its residual is ≤ tol; None: 1e-5 in float32, 1e-10 in float64 and ``exact``.
        exact: Solve to optimality in float64; w and kkt are then float64.
        kkt: Compute the residuals (the work of one more sweep).

    Returns:
        w, its KKT residuals, and the sweeps made.

    Raises:
        ArgumentError: Shapes, dtypes or devices do not fit.
        DataError: A row of cross (or gram, or w0) holds NaN or infinite values, or its solution overflows.
    """
    exact, kkt = arrays.flag(exact, "exact"), arrays.flag(kkt, "kkt")
    max_sweeps = arrays.integer(max_sweeps, "max_sweeps", 0, MOST_SWEEPS)
    dtypes = ("float32", "float64")
    gram = arrays.check(gram, "gram", dtypes, (None, None))
    dtype = (arrays.dtype_name(gram),)
    r = gram.shape[1]
    gram = arrays.check(gram, "gram", dtype, (r, r))
    cross = arrays.check(cross, "cross", dtype, (None, r))
    n = cross.shape[0]
    if w0 is not None:
        w0 = arrays.check(w0, "w0", dtype, (n, r))
    work = "float64" if exact else dtype[0]
    if tol is None:
        tol = 1e-10 if work == "float64" else 1e-5
    if isinstance(tol, bool) or not isinstance(tol, int | float | np.integer | np.floating) or not tol >= 0:
        raise ArgumentError(f"tol: expected a number ≥ 0, got {tol}")
    tol = float(min(tol, 1e30))  # finite in float32: where each row starts, its residual counts as infinite
    device = arrays.same_device(gram=gram, cross=cross, w0=w0)
    if not bool(torch.isfinite(arrays.as_tensor(gram)).all()):
        raise DataError("gram: expected finite values, got NaN or infinite ones")

    kernels = dispatch.compiled(cross, *dtypes)
    if kernels is None:
        return _reference(gram, cross, w0, max_sweeps, tol, exact, kkt)
    g, c = (arrays.contiguous(_as(x, work)) for x in (gram, cross))
    w = arrays.empty((n, r), work, device)
    target = arrays.as_tensor(w)
    target.zero_() if w0 is None else target.copy_(arrays.as_tensor(w0))
    residual = arrays.empty((n,), work, device)
    arrays.as_tensor(residual).fill_(math.inf)
    problem = {"gram": g, "cross": c, "w": w, "residual": residual}
    sweeps = _descend(kernels, problem, max_sweeps, max(tol, 1e-9) if exact else tol, kkt and not exact)
    if kernels.on_device:
        _check_finite(w)
    if exact:
        sweeps = _finish_exactly(problem, tol)
    return NnlsResult(w=arrays.like(cross, w), kkt=arrays.like(cross, residual) if kkt else None, sweeps=sweeps)


def _descend(kernels: dispatch.Compiled, problem: dict[str, Operand], max_sweeps: int, tol: float, kkt: bool) -> int:
    """Coordinate descent in place, and with ``kkt`` the residuals; the sweeps made.

    On the processor Ctrl-C is seen to between calls of some sweeps each. A row that has stopped is not swept again: its
    residual is at most tol.

    Raises:
        DataError: A row is not finite, or its solution overflows.
    """
    n, r = problem["cross"].shape
    most = max_sweeps if kernels.on_device else max(1, STEP // (max(n, 64) * max(1, r * r)))
    status: Any = arrays.empty((2,), "int64", arrays.device_of(problem["w"]))
    sweeps, going = 0, True
    while going:
        asked = min(most, max_sweeps - sweeps)
        last = sweeps + asked == max_sweeps
        kernels("nnls", **problem, max_sweeps=asked, tol=tol, kkt=kkt and last, status=status)
        made = _iterations(status)
        sweeps += made
        going = made == asked and not last
    if kkt and not last:
        kernels("nnls", **problem, max_sweeps=0, tol=tol, kkt=True, status=status)
    return sweeps


def _finish_exactly(problem: dict[str, Operand], tol: float) -> int:
    """Active sets from w on, in place; the steps made. On the processor: they are short work for many different rows.

    Raises:
        DataError: A row is not finite, or its solution overflows.
    """
    there = {name: arrays.as_tensor(x) for name, x in problem.items()}
    here = {name: x.cpu().contiguous() for name, x in there.items()}
    kernels = dispatch.on_host()
    if kernels is None:
        solution, steps = reference.nnls_exact(here["gram"], here["cross"], here["w"].clone(), tol)
        here["w"].copy_(solution)
        here["residual"].copy_(reference.kkt(here["gram"], here["cross"], here["w"]))
    else:
        status = np.empty(2, np.int64)
        kernels("nnls_exact", **here, tol=tol, status=status)
        steps = _iterations(status)
    for name in ("w", "residual"):
        if there[name] is not here[name]:
            there[name].copy_(here[name])
    return steps


def _iterations(status: Any) -> int:
    """The iterations that a kernel made.

    Raises:
        DataError: It found a row that is not finite, or whose solution overflows.
    """
    bad, iterations = status.tolist()
    if bad != ALL_FINITE:
        raise DataError(_nonfinite(bad))
    return int(iterations)


def _check_finite(w: Operand) -> None:
    finite = torch.isfinite(arrays.as_tensor(w)).all(dim=1)
    if not bool(finite.all()):
        raise DataError(_nonfinite(int((~finite).to(torch.uint8).argmax())))


def _nonfinite(row: int) -> str:
    return (
        f"cross: row {row} (or its start in w0) holds NaN or infinite values, or numbers so large that the solution "
        "overflows"
    )


def _as(x: A, dtype: str) -> A:
    if isinstance(x, torch.Tensor):
        return x.to(getattr(torch, dtype))
    return x.astype(dtype, copy=False)


def _reference(gram: A, cross: A, w0: A | None, max_sweeps: int, tol: float, exact: bool, kkt: bool) -> NnlsResult[A]:
    g, c = arrays.as_tensor(gram), arrays.as_tensor(cross)
    _check_finite(c)
    start = torch.zeros_like(c) if w0 is None else arrays.as_tensor(w0).clone()
    if exact:
        g, c, start = g.double(), c.double(), start.double()
        w, sweeps = reference.nnls_exact(g, c, start, tol)
    else:
        w, sweeps = reference.nnls(g, c, start, max_sweeps, tol)
    _check_finite(w)
    residual = arrays.like(cross, reference.kkt(g, c, w)) if kkt else None
    return NnlsResult(w=arrays.like(cross, w), kkt=residual, sweeps=sweeps)
