"""The CPU kernels. npeff.kernels is the way to call them: arguments are checked there, and outputs allocated.

Arrays are C-contiguous numpy arrays (buffer protocol) or torch CPU tensors (DLPack); outputs are filled.
"""

from typing import Any

Operand = Any  # numpy.ndarray | torch.Tensor

def isa() -> str: ...
def has_isa(name: str) -> bool: ...
def use_isa(name: str) -> bool: ...
def topk(x: Operand, indices: Operand, values: Operand, by_magnitude: bool, threads: int) -> tuple[int, int] | None: ...

class Selectors:
    def __init__(self, n_rows: int, k: int, keep_zeros: bool) -> None: ...
    def push(self, block: Operand, base: Operand, rows: Operand | None, threads: int) -> tuple[int, int] | None: ...
    def push_outer(
        self,
        delta: Operand,
        inputs: Operand,
        first: int,
        base: int,
        column_stride: int,
        turned: bool,
        threads: int,
    ) -> tuple[int, int] | None: ...
    def thresholds(self, thresholds: Operand) -> None: ...
    def finish(self, counts: Operand, threads: int) -> None: ...
    def take(self, indices: Operand, values: Operand, by_magnitude: bool, threads: int) -> None: ...
    def reset(self) -> None: ...

def convolution_gradients(
    inputs: Operand,
    delta: list[Operand],
    turns: int,
    groups: int,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    dilation: tuple[int, int],
    channels: tuple[int, int],
    squared: bool,
    out: Operand,
    threads: int,
) -> None: ...
def nnls_f32(
    gram: Operand, cross: Operand, w: Operand, kkt: Operand | None, max_sweeps: int, tol: float, threads: int
) -> tuple[int, int]: ...
def nnls_f64(
    gram: Operand, cross: Operand, w: Operand, kkt: Operand | None, max_sweeps: int, tol: float, threads: int
) -> tuple[int, int]: ...
def nnls_exact(
    gram: Operand, cross: Operand, w: Operand, kkt: Operand, tol: float, threads: int
) -> tuple[int, int]: ...
def spmm(indptr: Operand, indices: Operand, values: Operand, dense: Operand, out: Operand, threads: int) -> None: ...
def csr_transpose(
    indptr: Operand,
    indices: Operand,
    values: Operand,
    indptr_out: Operand,
    indices_out: Operand,
    values_out: Operand,
    threads: int,
) -> None: ...
def column_counts(indptr: Operand, indices: Operand, values: Operand, counts: Operand, threads: int) -> None: ...
def select_columns_indptr(
    indptr: Operand, indices: Operand, values: Operand, map: Operand, indptr_out: Operand, threads: int
) -> None: ...
def select_columns(
    indptr: Operand,
    indices: Operand,
    values: Operand,
    map: Operand,
    indptr_out: Operand,
    indices_out: Operand,
    values_out: Operand,
    threads: int,
) -> None: ...
def to_dense(indptr: Operand, indices: Operand, values: Operand, out: Operand, threads: int) -> None: ...
def gram_scatter(
    indptr: Operand, indices: Operand, values: Operand, n_columns: int, k: Operand, threads: int
) -> None: ...
def gram_panel(
    indptr: Operand, indices: Operand, values: Operand, n_columns: int, k: Operand, threads: int
) -> None: ...
def mirror(k: Operand, threads: int) -> None: ...
def cross(p: Operand, row_offsets: Operand, out: Operand, threads: int) -> None: ...
def spread_multiply(w: Operand, p: Operand, row_offsets: Operand, out: Operand, threads: int) -> None: ...
def fisher_norms(
    indptr: Operand,
    indices: Operand,
    values: Operand,
    n_columns: int,
    row_offsets: Operand,
    out: Operand,
    threads: int,
) -> None: ...
def sketch_rows(
    block: Operand, base: Operand, rows: Operand, seed: int, copies: int, sums: Operand, threads: int
) -> None: ...
def sketch_csr(
    indptr: Operand,
    indices: Operand,
    values: Operand,
    n_columns: int,
    seed: int,
    copies: int,
    sums: Operand,
    threads: int,
) -> None: ...
def sketch_finish(sums: Operand, scale: float, out: Operand, threads: int) -> int: ...
def sketch_places(seed: int, offset: int, side: int, d: int, places: Operand) -> None: ...
def sketch_matrix(
    block: Operand,
    columns: int,
    row_places: Operand,
    column_places: Operand,
    rows: Operand,
    first: Operand,
    weight: float,
    sums: Operand,
    threads: int,
) -> None: ...
def sketch_outer(
    delta: Operand,
    input: Operand,
    delta_places: Operand,
    input_places: Operand,
    weight: float,
    sums: Operand,
    threads: int,
) -> None: ...
