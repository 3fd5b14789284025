"""CuPy arrays at the kernels' door: in by DLPack, out by DLPack, on CuPy's current stream."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from typing import Any, ParamSpec, TypeVar

import numpy as np
import torch
from torch.utils.dlpack import from_dlpack

from npeff.errors import ArgumentError

P = ParamSpec("P")
R = TypeVar("R")


def is_cupy(x: object) -> bool:
    """Whether x is a CuPy array (without importing CuPy)."""
    return type(x).__module__.partition(".")[0] == "cupy" and hasattr(x, "__dlpack__")


def accepts_cupy(function: Callable[P, R]) -> Callable[P, R]:
    """Let a function of tensors take CuPy arrays: results are then CuPy arrays, too; no copies.

    The work goes to CuPy's current stream of the arrays' device.
    """

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        found = next((x for x in (*args, *kwargs.values()) if is_cupy(x)), None)
        if found is None:
            return function(*args, **kwargs)
        with _stream_of(found):
            tensors = [_to_torch(x) for x in args]
            named = {name: _to_torch(x) for name, x in kwargs.items()}
            return _to_cupy(function(*tensors, **named))

    return call


def _stream_of(x: Any) -> Any:
    import cupy

    if not torch.cuda.is_available():
        raise ArgumentError(
            "CuPy arrays are handed to torch, whose build here has no CUDA; install a CUDA build of torch"
        )
    device = torch.device("cuda", x.device.id)
    with x.device:
        pointer = cupy.cuda.get_current_stream().ptr
    side = torch.cuda.ExternalStream(pointer, device=device)  # type: ignore[no-untyped-call]
    return torch.cuda.stream(side)


def _to_torch(x: Any) -> Any:
    return from_dlpack(x) if is_cupy(x) else x


def _to_cupy(x: Any) -> Any:
    if isinstance(x, torch.Tensor):
        import cupy

        return cupy.from_dlpack(x.detach())
    if isinstance(x, tuple):
        return tuple(_to_cupy(entry) for entry in x)
    if is_dataclass(x) and not isinstance(x, type):
        return replace(x, **{field.name: _to_cupy(getattr(x, field.name)) for field in fields(x)})
    return x


def csr_arrays(matrix: Any) -> tuple[Any, Any, Any]:
    """The three arrays of a ``scipy.sparse`` or ``cupyx.scipy.sparse`` CSR matrix, as the kernels take them.

    Args:
        matrix: CSR, float32 (or float64). Indices that are not sorted within rows, or come twice, are mended in a copy.

    Returns:
        indptr (int64), indices and values, numpy or CuPy; memory is shared where dtypes allow.

    Raises:
        ArgumentError: It is not in CSR format.
    """
    if getattr(matrix, "format", None) != "csr":
        raise ArgumentError(f"matrix: expected a CSR matrix of scipy or cupyx, got {type(matrix).__name__}")
    if not matrix.has_canonical_format:
        matrix = matrix.copy()
        matrix.sum_duplicates()
    return matrix.indptr.astype(np.int64, copy=False), matrix.indices, matrix.data


def csr_matrix(indptr: Any, indices: Any, values: Any, n_columns: int) -> Any:
    """The three arrays as a matrix: ``cupyx.scipy.sparse`` for CuPy arrays and CUDA tensors, else ``scipy.sparse``.

    Args:
        indptr: ``(R + 1,)`` int64.
        indices: ``(nnz,)``.
        values: ``(nnz,)``.
        n_columns: Columns of the matrix.

    Returns:
        A ``(R, n_columns)`` ``csr_matrix``. cupyx keeps int32 indices only.
    """
    shape = (len(indptr) - 1, n_columns)
    arrays = (values, indices, indptr)
    if any(is_cupy(x) or (isinstance(x, torch.Tensor) and x.is_cuda) for x in arrays):
        return importlib.import_module("cupyx.scipy.sparse").csr_matrix(tuple(_to_cupy(x) for x in arrays), shape=shape)
    import scipy.sparse

    data = tuple(x.detach().numpy() if isinstance(x, torch.Tensor) else x for x in arrays)
    return scipy.sparse.csr_matrix(data, shape=shape)
