"""Where the components' vectors live: three verbs that the solver needs, and nothing else.

A space holds the rows A of all examples, end to end, and represents r vectors by *coordinates*:

- ``project(coords)`` → ``P = A Gᵀ``, ``(rows, r)``;
- ``combine(S)`` → coordinates of ``Sᵀ A``;
- ``inner(a, b, P_b)`` → ``G_a G_bᵀ``.

:class:`GramSpace` writes ``G = C A`` and keeps only ``K = A Aᵀ``: at every stationary point
``(WᵀW ∘ GGᵀ) G = (W∘AG)ᵀ A``, so G lies in the row space and nothing is lost. Its cost does not depend on the
number of parameters. :class:`SparseSpace` keeps the rows themselves and G over the kept columns.
"""

from __future__ import annotations

from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from npeff import kernels
from npeff.errors import ArgumentError
from npeff.rows import DenseRows, Rows, SparseRows

Array = npt.NDArray[Any]
SpaceName = Literal["auto", "gram", "sparse"]

GRAM_BYTES = 4 << 30
"""Largest K that ``space="auto"`` builds."""


class FactorSpace(Protocol):
    """The solver's whole view of the data."""

    name: str
    n_rows: int
    step_bytes: int

    def random(self, r: int, generator: torch.Generator) -> Tensor:
        """Coordinates of r random vectors."""
        ...

    def embed(self, vectors: Tensor) -> Tensor:
        """Coordinates of given vectors ``(r, n_columns)``."""
        ...

    def project(self, coords: Tensor) -> Tensor:
        """``P = A Gᵀ``, ``(n_rows, r)``."""
        ...

    def combine(self, S: Tensor) -> Tensor:
        """Coordinates of ``Sᵀ A`` for S ``(n_rows, r)``."""
        ...

    def inner(self, a: Tensor, b: Tensor, P_b: Tensor) -> Tensor:
        """``G_a G_bᵀ``, ``(r_a, r_b)``, where ``P_b = project(b)``."""
        ...

    def vectors(self, coords: Tensor) -> Tensor:
        """G itself, ``(r, n_columns)``."""
        ...


class GramSpace:
    """G = C·A, with K = A Aᵀ in memory, ``(rows, rows)``.

    Vectors that do not lie in the row space (frozen components of an expansion) come in as ``anchors``:
    extra rows of A that belong to no example.

    Args:
        rows: The scaled rows.
        anchors: ``(f, n_columns)`` float32 further vectors that coordinates may use.
        dtype: float32 or float64, of K and of everything derived from it.
        device: Where K lives.
    """

    name = "gram"

    def __init__(
        self,
        rows: Rows,
        anchors: Tensor | None = None,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
    ) -> None:
        self._rows = rows
        self._anchors = None if anchors is None or not len(anchors) else anchors.to(dtype).cpu()
        self.n_rows = rows.n_rows
        own = row_gram(rows, dtype)
        if self._anchors is not None:
            across = project_rows(rows, self._anchors)
            own = torch.cat([torch.cat([own, across], 1), torch.cat([across.T, self._anchors @ self._anchors.T], 1)])
        self.K = own.to(device)
        self.step_bytes = self.K.nbytes

    def random(self, r: int, generator: torch.Generator) -> Tensor:
        """Random combinations of all rows."""
        coords = torch.zeros(r, len(self.K), dtype=torch.float64)
        coords[:, : self.n_rows] = torch.randn(r, self.n_rows, generator=generator, dtype=torch.float64)
        return coords.to(self.K)

    def embed(self, vectors: Tensor) -> Tensor:
        """Coordinates of the anchors, which ``vectors`` must be.

        Raises:
            ArgumentError: The space was built without these vectors as anchors.
        """
        if self._anchors is None or vectors.shape != self._anchors.shape:
            raise ArgumentError(
                "vectors: a GramSpace can only embed the anchors that it was built with; use SparseSpace"
            )
        coords = torch.zeros(len(vectors), len(self.K), dtype=self.K.dtype, device=self.K.device)
        coords[:, self.n_rows :] = torch.eye(len(vectors))
        return coords

    def project(self, coords: Tensor) -> Tensor:
        """``K Cᵀ``; rows past ``n_rows`` are those of the anchors."""
        return self.K @ coords.T

    def combine(self, S: Tensor) -> Tensor:
        """``Sᵀ``, with zeros for the anchors."""
        return torch.nn.functional.pad(S.T, (0, len(self.K) - self.n_rows))

    def inner(self, a: Tensor, b: Tensor, P_b: Tensor) -> Tensor:
        """``C_a K C_bᵀ``."""
        return a @ P_b

    def vectors(self, coords: Tensor) -> Tensor:
        """``C A``, one pass over the rows."""
        coords = coords.cpu()
        G = combine_rows(self._rows, coords[:, : self.n_rows].T.contiguous())
        return G if self._anchors is None else G + coords[:, self.n_rows :] @ self._anchors


class SparseSpace:
    """The rows themselves (CSR and its transpose, or dense), coordinates = G ``(r, n_columns)``.

    Args:
        rows: The scaled rows.
        dtype: float32 or float64 of G and P (sparse products accumulate in that dtype).
        device: Where coordinates live.
    """

    name = "sparse"

    def __init__(self, rows: Rows, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu") -> None:
        self.n_rows, self.n_columns = rows.n_rows, rows.n_columns
        self.dtype, self._device = dtype, torch.device(device)
        self._rows = rows
        self.step_bytes = 2 * rows.nbytes
        if isinstance(rows, SparseRows):
            self._csr = sparse_tensors(rows, dtype, self._device)
            self._transposed = kernels.csr_transpose(*self._csr, rows.n_columns)
        else:
            self._dense = torch.from_numpy(np.ascontiguousarray(rows.values)).to(self._device, dtype)

    def random(self, r: int, generator: torch.Generator) -> Tensor:
        """Random combinations of all rows, as in the Gram space: the row space is where solutions lie."""
        return self.combine(
            torch.randn(r, self.n_rows, generator=generator, dtype=torch.float64)
            .to(self._device, self.dtype)
            .T.contiguous()
        )

    def embed(self, vectors: Tensor) -> Tensor:
        """The vectors."""
        return vectors.to(self._device, self.dtype)

    def project(self, coords: Tensor) -> Tensor:
        """``A Gᵀ``."""
        if isinstance(self._rows, SparseRows):
            return kernels.spmm(*self._csr, coords.T.contiguous())
        return self._dense @ coords.T

    def combine(self, S: Tensor) -> Tensor:
        """``Sᵀ A``."""
        if isinstance(self._rows, SparseRows):
            return kernels.spmm(*self._transposed, S.contiguous()).T
        return S.T @ self._dense

    def inner(self, a: Tensor, b: Tensor, P_b: Tensor) -> Tensor:
        """``G_a G_bᵀ``."""
        return a @ b.T

    def vectors(self, coords: Tensor) -> Tensor:
        """The coordinates."""
        return coords.cpu()


def sparse_tensors(
    rows: SparseRows, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu"
) -> tuple[Tensor, Tensor, Tensor]:
    """``(indptr, indices, values)`` as torch tensors."""
    arrays = (np.ascontiguousarray(a) for a in (rows.indptr, rows.indices, rows.values))
    indptr, indices, values = (torch.from_numpy(a if a.flags.writeable else a.copy()).to(device) for a in arrays)
    return indptr, indices, values.to(dtype)


def project_rows(rows: Rows, vectors: Tensor) -> Tensor:
    """``A Gᵀ`` for G ``(r, n_columns)``: ``(rows, r)`` in G's dtype."""
    if isinstance(rows, SparseRows):
        return kernels.spmm(*sparse_tensors(rows, vectors.dtype), vectors.T.contiguous())
    parts = [
        torch.from_numpy(rows.dense(i, min(i + 4096, rows.n_rows))).to(vectors.dtype) @ vectors.T
        for i in range(0, rows.n_rows, 4096)
    ]
    return torch.cat(parts) if parts else vectors.new_zeros(0, len(vectors))


def combine_rows(rows: Rows, S: Tensor) -> Tensor:
    """``Sᵀ A`` for S ``(rows, r)``: ``(r, n_columns)`` in S's dtype."""
    if isinstance(rows, SparseRows):
        return kernels.spmm(
            *kernels.csr_transpose(*sparse_tensors(rows, S.dtype), rows.n_columns), S.contiguous()
        ).T.contiguous()
    out = S.new_zeros(S.shape[1], rows.n_columns)
    for i in range(0, rows.n_rows, 4096):
        stop = min(i + 4096, rows.n_rows)
        out += S[i:stop].T @ torch.from_numpy(rows.dense(i, stop)).to(S.dtype)
    return out


def row_gram(rows: Rows, dtype: torch.dtype = torch.float32) -> Tensor:
    """``K = A Aᵀ``, ``(rows, rows)``; only one triangle is computed."""
    if isinstance(rows, SparseRows) and dtype == torch.float32:
        return kernels.sparse_gram(*sparse_tensors(rows), rows.n_columns)
    if isinstance(rows, SparseRows):
        rows = DenseRows(rows.dense(0, rows.n_rows))
    K = torch.empty(rows.n_rows, rows.n_rows, dtype=dtype)
    A = torch.from_numpy(np.ascontiguousarray(rows.values))
    edges = range(0, rows.n_rows, max(512, -(-rows.n_rows // 8)))
    for i in edges:
        block = A[i : i + edges.step].to(dtype)
        below = A[i:].to(dtype) @ block.T
        K[i:, i : i + edges.step] = below
        K[i : i + edges.step, i:] = below.T
    return K


DENSE_RATE, SPARSE_RATE, SCATTER_RATE = 100e9, 10e9, 1e9
"""Operations per second of dense products, of sparse times dense, and of sparse Gram matrices: ratios matter."""

POLISH_STEPS = 30
"""Steps that a polish is reckoned to take."""


def choose_space(rows: Rows, choice: SpaceName, n_components: int) -> tuple[type[GramSpace] | type[SparseSpace], str]:
    """The space to use, and why: the one whose operations, at typical rates, take less time.

    Both spaces serve the search's subspace (about five products with d vectors) and the polish (two products with r
    vectors a step; over K one). K has to be built first.

    Raises:
        ArgumentError: ``choice`` is unknown.
    """
    if choice not in ("auto", "gram", "sparse"):
        raise ArgumentError(f"space: expected 'auto', 'gram' or 'sparse', got {choice!r}")
    if choice != "auto":
        return (GramSpace if choice == "gram" else SparseSpace), "asked for"
    need = 4 * rows.n_rows**2
    if need > GRAM_BYTES:
        return SparseSpace, f"K of {rows.n_rows:,} rows would take {need / 2**30:.1f} GiB"
    products = 5 * max(256, 4 * n_components) + 2 * POLISH_STEPS * n_components
    if isinstance(rows, SparseRows):
        counts = np.bincount(rows.indices, minlength=1).astype(np.float64)
        building = min(np.square(counts).sum() / SCATTER_RATE, rows.n_rows**2 * rows.n_columns / DENSE_RATE)
        over_rows = 2 * len(rows.values) * products / SPARSE_RATE
    else:
        building = rows.n_rows**2 * rows.n_columns / DENSE_RATE
        over_rows = 2 * rows.values.size * products / DENSE_RATE
    over_gram = building + 2 * rows.n_rows**2 * products / DENSE_RATE
    found = f"reckoned {over_gram:.2g} s over K of {rows.n_rows:,} rows, {over_rows:.2g} s over the rows themselves"
    return (GramSpace if over_gram < over_rows else SparseSpace), found
