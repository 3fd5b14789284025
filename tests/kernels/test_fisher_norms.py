"""Norms of sparse examples against the dense matrices."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch

import npeff
from npeff import kernels
from planted import random_rows, sparse


@pytest.mark.parametrize("index", [np.int32, np.int64])
@pytest.mark.parametrize("level", ["reference", "native"])
def test_against_dense(index: type, level: str) -> None:
    rng = np.random.default_rng(0)
    values, offsets = random_rows(50, 0, 33, 0.4, 0, rng.integers(0, 5, 50))
    rows = sparse(values)
    expected = [np.linalg.norm((b := values[s:t].astype(np.float64)) @ b.T) for s, t in pairwise(offsets)]
    kernels.use("reference" if level == "reference" else None)
    try:
        found = kernels.fisher_norms(rows.indptr, rows.indices.astype(index), rows.values, 33, offsets)
    finally:
        kernels.use(None)
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_bad_offsets_are_named() -> None:
    rows = sparse(np.eye(4, dtype=np.float32))
    with pytest.raises(npeff.ArgumentError, match="row_offsets"):
        kernels.fisher_norms(rows.indptr, rows.indices, rows.values, 4, np.array([0, 3]))
    with pytest.raises(npeff.ArgumentError, match="values: expected float32"):
        kernels.fisher_norms(rows.indptr, rows.indices, rows.values.astype(np.float64), 4, np.array([0, 4]))


def test_tensors_in_tensors_out() -> None:
    rows = sparse(np.eye(4, dtype=np.float32))
    tensors = [torch.from_numpy(x) for x in (rows.indptr, rows.indices, rows.values)]
    found = kernels.fisher_norms(*tensors, 4, torch.tensor([0, 1, 4]))
    assert torch.equal(found, torch.tensor([1.0, 3.0], dtype=torch.float64).sqrt())
