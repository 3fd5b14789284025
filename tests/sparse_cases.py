"""CSR matrices of the shapes and skews that the sparse kernels meet."""

from __future__ import annotations

import numpy as np
import scipy.sparse

Csr = tuple[np.ndarray, np.ndarray, np.ndarray]


def skewed(n_rows: int, n_columns: int, seed: int = 0, dtype: type = np.int32) -> Csr:
    """Rows of very different lengths (some empty), columns from nearly full to empty."""
    rng = np.random.default_rng(seed)
    popularity = rng.random(n_columns) ** 4
    length = rng.random((n_rows, 1)) * (rng.random((n_rows, 1)) < 0.9)
    mask = rng.random((n_rows, n_columns)) < 1.5 * length * popularity
    indptr = np.concatenate([[0], np.cumsum(mask.sum(1))]).astype(np.int64)
    indices = np.nonzero(mask)[1].astype(dtype)
    return indptr, indices, rng.standard_normal(len(indices)).astype(np.float32)


def to_scipy(csr: Csr, n_columns: int) -> scipy.sparse.csr_matrix:
    """float64, for an oracle."""
    indptr, indices, values = csr
    return scipy.sparse.csr_matrix((values.astype(np.float64), indices, indptr), shape=(len(indptr) - 1, n_columns))
