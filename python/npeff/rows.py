"""The rows of per-example factors: CSR after top-k, dense when exact."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class SparseRows:
    """Compressed sparse rows.

    Attributes:
        indptr: ``(n_rows + 1,)`` int64; row i holds entries ``indptr[i]:indptr[i+1]``.
        indices: ``(nnz,)`` int32 or int64 column of each entry, ascending within a row.
        values: ``(nnz,)`` float32.
        n_columns: Width of the matrix.
    """

    indptr: Array
    indices: Array
    values: Array
    n_columns: int

    @property
    def n_rows(self) -> int:
        """Number of rows."""
        return len(self.indptr) - 1

    @property
    def nbytes(self) -> int:
        """Bytes of the three arrays."""
        return int(self.indptr.nbytes + self.indices.nbytes + self.values.nbytes)

    def dense(self, start: int, stop: int) -> Array:
        """Rows ``start … stop − 1`` as float32 ``(stop − start, n_columns)``, absent entries 0."""
        out = np.zeros((stop - start, self.n_columns), np.float32)
        lo, hi = self.indptr[start], self.indptr[stop]
        row = np.repeat(np.arange(stop - start), np.diff(self.indptr[start : stop + 1]))
        out[row, self.indices[lo:hi]] = self.values[lo:hi]
        return out

    def entries(self, rows: Array) -> tuple[Array, Array]:
        """Positions of the entries of ``rows`` in ``values``, and the new ``indptr``."""
        counts = np.diff(self.indptr)[rows]
        indptr = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        positions = np.arange(indptr[-1]) + np.repeat(self.indptr[rows] - indptr[:-1], counts)
        return positions, indptr

    def take(self, rows: Array) -> SparseRows:
        """The given rows, in the given order, copied."""
        positions, indptr = self.entries(np.asarray(rows, np.int64))
        return SparseRows(indptr, self.indices[positions], self.values[positions], self.n_columns)

    def squared_norms(self) -> Array:
        """Σ of squared entries per row, ``(n_rows,)`` float64."""
        total = np.concatenate([[0.0], np.cumsum(np.square(self.values, dtype=np.float64))])
        return np.asarray(total[self.indptr[1:]] - total[self.indptr[:-1]])


@dataclass(frozen=True)
class DenseRows:
    """Rows kept whole.

    Attributes:
        values: ``(n_rows, n_columns)`` float32.
    """

    values: Array

    @property
    def n_rows(self) -> int:
        """Number of rows."""
        return int(self.values.shape[0])

    @property
    def n_columns(self) -> int:
        """Width of the matrix."""
        return int(self.values.shape[1])

    @property
    def nbytes(self) -> int:
        """Bytes of the array."""
        return int(self.values.nbytes)

    def dense(self, start: int, stop: int) -> Array:
        """Rows ``start … stop − 1`` as float32 ``(stop − start, n_columns)``, copied."""
        return np.array(self.values[start:stop], np.float32)

    def take(self, rows: Array) -> DenseRows:
        """The given rows, in the given order, copied."""
        return DenseRows(np.asarray(self.values[np.asarray(rows, np.int64)]))

    def squared_norms(self) -> Array:
        """Σ of squared entries per row, ``(n_rows,)`` float64."""
        norms = [
            np.einsum("ij,ij->i", b, b, dtype=np.float64)
            for b in np.array_split(self.values, max(1, self.n_rows // 256))
        ]
        return np.concatenate(norms) if norms else np.zeros(0)


Rows = SparseRows | DenseRows


def concatenate(parts: Sequence[Rows]) -> Rows:
    """Stack rows of one type and one width.

    Args:
        parts: At least one; all sparse or all dense.

    Returns:
        Rows of the same type, all parts' rows in order.
    """
    if isinstance(parts[0], DenseRows):
        return DenseRows(np.concatenate([part.values for part in parts]))
    sparse = [part for part in parts if isinstance(part, SparseRows)]
    indptr = np.concatenate([[0], np.cumsum(np.concatenate([np.diff(part.indptr) for part in sparse]))]).astype(
        np.int64
    )
    indices = np.concatenate([part.indices for part in sparse])
    return SparseRows(indptr, indices, np.concatenate([part.values for part in sparse]), sparse[0].n_columns)
