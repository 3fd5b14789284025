"""The CUDA kernels. npeff.kernels is the way to call them: arguments are checked there, and outputs allocated.

Imports without a driver; there is no such module in a build without CUDA. Arrays are C-contiguous torch or CuPy
arrays on one device (DLPack); outputs are filled on ``stream``, and nothing is waited for.
"""

from typing import Any, TypedDict

Operand = Any  # torch.Tensor | cupy.ndarray

class Device(TypedDict):
    index: int
    name: str
    capability: tuple[int, int]
    memory: int

def device_count() -> int: ...
def absence() -> str: ...
def toolkit() -> tuple[int, int]: ...
def usable(device: int) -> str: ...
def devices() -> list[Device]: ...
def topk_bytes(n: int, k: int) -> int: ...
def topk_reset(memory: Operand, n: int, k: int, keep_zeros: bool, stream: int) -> None: ...
def topk_push(
    memory: Operand,
    n: int,
    k: int,
    keep_zeros: bool,
    block: Operand,
    targets: Operand,
    bases: Operand,
    order: Operand,
    starts: Operand,
    bad: Operand,
    stream: int,
) -> None: ...
def topk_finish(
    memory: Operand,
    n: int,
    k: int,
    keep_zeros: bool,
    counts: Operand,
    indices: Operand,
    values: Operand,
    stream: int,
) -> None: ...
def nnls_workspace(device: int, n: int, r: int) -> int: ...
def nnls(
    gram: Operand,
    cross: Operand,
    w: Operand,
    kkt: Operand | None,
    max_sweeps: int,
    tol: float,
    workspace: Operand,
    status: Operand,
    stream: int,
) -> None: ...
def cross(p: Operand, row_offsets: Operand, out: Operand, stream: int) -> None: ...
def spread_multiply(w: Operand, p: Operand, row_offsets: Operand, out: Operand, stream: int) -> None: ...
def spmm(indptr: Operand, indices: Operand, values: Operand, dense: Operand, out: Operand, stream: int) -> None: ...
def gram_panel(indptr: Operand, indices: Operand, values: Operand, n_columns: int, k: Operand, stream: int) -> None: ...
def mirror(k: Operand, stream: int) -> None: ...
def fisher_norms(
    indptr: Operand, indices: Operand, values: Operand, n_columns: int, row_offsets: Operand, out: Operand, stream: int
) -> None: ...
def sketch_workspace(device: int, dtype: str, d: int, copies: int, n_rows: int, width: int) -> int: ...
def sketch_rows(
    d: int,
    copies: int,
    seed: int,
    block: Operand,
    bases: Operand,
    order: Operand,
    starts: Operand,
    workspace: Operand,
    sums: Operand,
    stream: int,
) -> None: ...
def sketch_matrix_workspace(device: int, dtype: str, d: int, n_rows: int, width: int) -> int: ...
def sketch_matrix(
    d: int,
    weight: float,
    block: Operand,
    row_places: Operand,
    column_places: Operand,
    first: Operand,
    order: Operand,
    starts: Operand,
    workspace: Operand,
    sums: Operand,
    stream: int,
) -> None: ...
def sketch_csr(
    d: int,
    copies: int,
    seed: int,
    indptr: Operand,
    indices: Operand,
    values: Operand,
    n_columns: int,
    sums: Operand,
    stream: int,
) -> None: ...
def sketch_finish(sums: Operand, scale: float, out: Operand, bad: Operand, stream: int) -> None: ...
