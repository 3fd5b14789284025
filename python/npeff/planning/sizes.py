"""Bytes of stored Fishers, counted: the same arithmetic as the file's layout, so nothing has to be written.

With n examples, R = Σ rank rows, m parameters and C outputs a file holds ``8(n+1) + 4n + 4nC + 8n + 8n`` bytes of
offsets, norms, logits, labels and ids, and the rows: ``4·R·m`` exact, ``4·R·d`` sketched, ``8(R+1) + (4 + w)·E`` for E
kept entries with indices of w = 4 bytes (8 beyond 2³¹ parameters); ``4·R²`` where only inner products are kept.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from npeff.fishers.options import Compression, GramOnly, Sketch, TopK

INT32_COLUMNS = 2**31 - 1
"""Most columns whose indices are stored in four bytes."""


def example_bytes(n_examples: int, n_outputs: int) -> int:
    """Bytes of the arrays that have one entry per example: offsets, norms, logits, labels, ids."""
    return 8 * (n_examples + 1) + n_examples * (4 + 4 * n_outputs + 8 + 8)


def row_bytes(compress: Compression | None, n_rows: int, n_columns: int, n_entries: int = 0) -> int:
    """Bytes of the rows.

    Args:
        compress: What is kept; None: everything.
        n_rows: Rows of all examples, R.
        n_columns: Parameters, m.
        n_entries: Entries that ``TopK`` keeps, over all rows.
    """
    if isinstance(compress, TopK):
        return 8 * (n_rows + 1) + (4 + (4 if n_columns <= INT32_COLUMNS else 8)) * n_entries
    if isinstance(compress, Sketch):
        return 4 * n_rows * compress.d
    if isinstance(compress, GramOnly):
        return 4 * n_rows * n_rows
    return 4 * n_rows * n_columns


def kept_entries(counts: npt.NDArray[np.int64], k: int) -> int:
    """Entries that ``TopK(k)`` keeps of examples with so many non-zero ones: exact zeros are never kept."""
    return int(np.minimum(counts, k).sum())


def name_of(compress: Compression | None) -> str:
    """``exact``, ``top-k 8192``, ``sketch 4096``, ``Gram only``: as tables call it."""
    if isinstance(compress, TopK):
        return f"top-k {compress.k:,}"
    if isinstance(compress, Sketch):
        return f"sketch {compress.d:,}"
    return "exact" if compress is None else "Gram only"
