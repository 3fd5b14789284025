"""Rows that are added to equal the same rows put together at once."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from npeff.fishers.rows import DenseRows, GrowingArray, GrowingRows, SparseRows, concatenate
from planted import sparse


@pytest.mark.parametrize("dtypes", [(np.int32,), (np.int32, np.int64), (np.float32,)])
def test_parts_of_any_size(dtypes) -> None:
    rng = np.random.default_rng(0)
    parts = [rng.integers(0, 1000, size).astype(dtypes[i % len(dtypes)]) for i, size in enumerate((3, 0, 500, 7, 40))]
    grown = GrowingArray()
    for part in parts:
        grown.add(part)
    whole = grown.finish()
    np.testing.assert_array_equal(whole, np.concatenate(parts))
    assert whole.dtype == np.result_type(*dtypes) and whole.flags.c_contiguous
    np.testing.assert_array_equal(parts[0], np.concatenate(parts)[:3])  # what was given is left alone


@pytest.mark.parametrize("kind", ["sparse", "dense"])
def test_rows_as_put_together_at_once(kind) -> None:
    rng = np.random.default_rng(0)
    parts = [rng.normal(size=(n, 6)).astype(np.float32) * (rng.random((n, 6)) < 0.5) for n in (4, 1, 9)]
    made = [sparse(part) if kind == "sparse" else DenseRows(part) for part in parts]
    grown = GrowingRows()
    for rows in made:
        grown.add(rows)
    for whole in (grown.finish(), concatenate(list(made))):
        assert type(whole) is type(made[0])
        np.testing.assert_array_equal(whole.dense(0, 14), np.concatenate(parts))
        if isinstance(whole, SparseRows):
            assert whole.n_columns == 6 and whole.indptr.dtype == np.int64


def test_one_part_is_not_copied() -> None:
    rows, grown = DenseRows(np.ones((3, 2), np.float32)), GrowingRows()
    grown.add(rows)
    assert grown.finish().values is rows.values


def test_memory_is_that_of_the_rows_and_an_eighth() -> None:
    tracemalloc.start()
    try:
        grown = GrowingArray()
        for _ in range(40):
            grown.add(np.ones((1 << 14, 4), np.float32))
        whole = grown.finish()
        # and one part, and what lies where an enlargement cannot extend in place (counted as old and new at once)
        assert tracemalloc.get_traced_memory()[0] <= 1.01 * whole.nbytes + (1 << 18)
        assert len(whole) == 40 << 14
    finally:
        tracemalloc.stop()
