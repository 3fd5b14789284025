"""Decompositions on a device, whose kernels are emulated on the processor; rows that come to it by stretches."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

import npeff
from emulated_device import emulated
from npeff.decomposition.options import choose_space
from npeff.errors import ArgumentError
from npeff.fishers.rows import ENTRY_BYTES, DenseRows, SparseRows
from npeff.fishers.scaling import StreamedRows, ahead, device_combine, device_gram, device_project
from npeff.kernels import csr_transpose, sparse_gram, spmm
from npeff.kernels.sparse import add_gram_, mirror_
from planted import planted
from sparse_cases import skewed

CPU = torch.device("cpu")


def rows_of(form: str) -> Any:
    indptr, indices, values = skewed(70, 300)
    rows = SparseRows(indptr, indices.astype(np.int32), values, 300)
    if form == "sparse":
        return rows
    if form == "dense":
        return DenseRows(rows.dense(0, 70))
    factors = np.linspace(1, 2, 70, dtype=np.float32)
    stored = rows if form == "streamed sparse" else DenseRows(rows.dense(0, 70))
    return StreamedRows(stored, factors, np.linspace(2, 1, 300, dtype=np.float32), None, 4000)


def test_split_of_dense_and_sparse_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the device's Gram matrix is put together from; it is added to what is there."""
    csr = skewed(90, 500)
    tensors = [torch.from_numpy(x) for x in csr]
    with emulated(monkeypatch) as module:
        for dense_bytes in (1 << 30, 1):
            k = torch.zeros(90, 90)
            for _ in range(2):
                add_gram_(k, tensors[0], tensors[1], tensors[2], 500, dense_bytes)
            k = mirror_(k)
            np.testing.assert_allclose(k, 2 * sparse_gram(*csr, 500), rtol=1e-4, atol=1e-4)
            assert torch.equal(k, k.T)
        assert module.calls == {"gram_panel": 4}


@pytest.mark.parametrize("form", ["sparse", "dense", "streamed sparse", "streamed dense"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("room", [1, 40_000, 1 << 30])
def test_stretches_of_columns(monkeypatch: pytest.MonkeyPatch, form: str, dtype: torch.dtype, room: int) -> None:
    """By a column at a time, by some, or by all: the products of the whole."""
    rows = rows_of(form)
    generator = torch.Generator().manual_seed(0)
    G = torch.randn(4, 300, generator=generator, dtype=dtype)
    S = torch.randn(70, 4, generator=generator, dtype=dtype)
    K, P, C = rows.row_gram(dtype), rows.project(G), rows.combine(S)
    tolerance = 1e-4 if dtype == torch.float32 else 1e-10
    with emulated(monkeypatch):
        near = {"rtol": tolerance, "atol": tolerance}
        torch.testing.assert_close(device_gram(rows, dtype, CPU, room), K, **near)
        torch.testing.assert_close(device_project(rows, G, CPU, room), P, **near)
        torch.testing.assert_close(device_combine(rows, S, room), C, **near)


def test_stretches_keep_to_their_room() -> None:
    """A private function is called: the products do not show how the columns were divided."""
    rows = rows_of("sparse")
    for room, per_column in ((5000, 0), (20_000, 100), (10, 0), (1 << 30, 8)):
        stretches = list(rows.stretches(room, per_column))
        assert stretches[0][0] == 0 and stretches[-1][1] == 300
        for (first, last, part), following in zip(stretches, [*stretches[1:], (300,)], strict=True):
            assert last == following[0] and part.n_columns == last - first
            cost = ENTRY_BYTES * len(part.indices) + (per_column + 8) * (last - first)
            assert cost <= room or last == first + 1 or len(stretches) == 1
        whole = np.concatenate([part.dense(0, 70) for *_, part in stretches], axis=1)
        np.testing.assert_array_equal(whole, rows.dense(0, 70))


def test_the_next_item_is_made_meanwhile() -> None:
    made, threads = [], set()

    def items() -> Iterator[int]:
        for i in range(5):
            made.append(i)
            threads.add(threading.get_ident())
            yield i
        raise OSError("no more")

    found = ahead(items())
    assert next(found) == 0
    with pytest.raises(OSError, match="no more"):
        assert list(found) == [1, 2, 3, 4]
    assert made == [0, 1, 2, 3, 4] and threads.isdisjoint({threading.get_ident()})
    assert list(ahead([])) == []


@pytest.mark.parametrize("space", ["gram", "rows", "streamed"])
@pytest.mark.parametrize("form", ["sparse", "dense"])
def test_decompositions(monkeypatch: pytest.MonkeyPatch, space: Any, form: str) -> None:
    """The same components, to the dtype's tolerance, with the kernels that are meant to serve."""
    fishers, _, _ = planted(40, 4, 50, 0.05, 0)
    if form == "sparse":
        indptr = np.arange(0, fishers.rows.values.size + 1, fishers.rows.n_columns)
        indices = np.tile(np.arange(fishers.rows.n_columns, dtype=np.int32), fishers.rows.n_rows)
        rows = SparseRows(indptr, indices, fishers.rows.values.reshape(-1), fishers.rows.n_columns)
        fishers = npeff.Fishers(**{**vars(fishers), "rows": rows})
    few: dict[str, Any] = {"n_init": 1, "n_replacements": 1, "max_iterations": 60, "progress": False}
    options: dict[str, Any] = {"n_components": 4, "space": space, **few}
    here = npeff.decompose(fishers, **options)
    with emulated(monkeypatch) as module:
        there = npeff.decompose(fishers, **options)
        more = npeff.expand(there, fishers, 1, space=space, **few)
    assert there.loss == pytest.approx(here.loss, abs=1e-4)
    assert np.abs((here.vectors * there.vectors).sum(1)).min() > 0.999
    assert more.loss <= there.loss + 1e-4
    used = {"nnls", "cross"} | ({"spmm"} if form == "sparse" else set())
    assert used <= set(module.calls) | ({"spmm"} if space == "gram" else set())
    assert ("gram_panel" in module.calls) == (space == "gram" and form == "sparse")


def test_rows_beyond_the_devices_memory_are_streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    n, m = 3000, 20_000
    rows = SparseRows(np.arange(0, n * 100 + 1, 100), np.tile(np.arange(100, dtype=np.int32), n), np.ones(n * 100), m)
    large = DenseRows(np.zeros((n, m), np.float32))
    with emulated(monkeypatch, memory=64 << 20):
        found = choose_space(large, n, "rows", 4, device=CPU)
        assert found.space == "streamed" and found.stream and "streamed" in found.reason
        assert found.part_bytes < 64 << 20
        gram = choose_space(rows, n, "gram", 4, device=CPU)
        assert gram.space == "gram" and not gram.stream
        with pytest.raises(ArgumentError, match="memory: "):
            choose_space(rows, n, "gram", 4, memory=1 << 20, device=CPU)
    with emulated(monkeypatch, memory=1 << 33):
        found = choose_space(large, n, "rows", 4, device=CPU)
        assert found.space == "rows" and found.part_bytes == 1 << 30


def test_what_a_space_brings_to_a_device_is_looked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Indices are checked on the host, before they go; a transpose is sound by construction."""
    rows = rows_of("sparse")
    with emulated(monkeypatch) as module:
        csr = rows.tensors()
        bad = SparseRows(rows.indptr, rows.indices + 250, rows.values, 300)
        with pytest.raises(ArgumentError, match="indices: expected"):
            bad.tensors()
        with monkeypatch.context() as patch:
            patch.setattr("npeff.kernels.sparse.check_structure", lambda *args: pytest.fail("the device was asked"))
            turned = csr_transpose(*csr, 300)
            spmm(*turned, torch.ones(70, 2))
            spmm(*csr, torch.ones(300, 2))
        assert module.calls == {"spmm": 2}
