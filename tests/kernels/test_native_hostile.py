"""Hostile arguments of the kernels: an error that names the argument, or the right result; never anything else."""

from __future__ import annotations

import ctypes
import importlib
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import blocks
import hostile_calls
import npeff
from npeff import kernels
from npeff.errors import ArgumentError, NpeffError
from npeff.kernels import available, fisher_norms, nnls, sparse_gram, spmm, use
from npeff.kernels.sparse import Csr

_native = pytest.importorskip("npeff._native", reason="the native module was not built")
FORMATS = Path(__file__).parents[1] / "formats"

P = np.arange(12, dtype=np.float32).reshape(4, 3)
OFFSETS = np.array([0, 1, 4])
WANT = np.array([[0, 1, 4], [126, 165, 210]], np.float32)


@pytest.fixture(params=available())
def implementation(request: pytest.FixtureRequest) -> Any:
    use(request.param)
    yield request.param
    use(None)


# ---- rows of a sparse matrix


UNSORTED = (np.array([0, 3, 5]), np.array([900, 4, 17, 3, 0], np.int32), np.ones(5, np.float32))
TWICE = (np.array([0, 3, 5]), np.array([4, 4, 17, 3, 900], np.int32), np.ones(5, np.float32))


@pytest.mark.parametrize("csr", [UNSORTED, TWICE])
@pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy])
def test_columns_out_of_order(implementation: str, csr: Any, kind: Any) -> None:
    given = [kind(x) for x in csr]
    with pytest.raises(ArgumentError, match=r"indices: expected columns that ascend .* row 0"):
        sparse_gram(*given, 1000)
    with pytest.raises(ArgumentError, match=r"indices: expected columns that ascend .* row 0"):
        fisher_norms(*given, 1000, kind(np.array([0, 2])))
    dense = np.zeros((2, 1000), np.float32)
    np.add.at(dense, (np.repeat([0, 1], [3, 2]), csr[1]), csr[2])
    np.testing.assert_allclose(spmm(*given, kind(np.eye(1000, dtype=np.float32))), dense)  # takes any order


def test_rows_may_begin_below_where_the_last_one_ended(implementation: str) -> None:
    indptr, indices = np.array([0, 0, 2, 2, 4, 5, 5]), np.array([1, 8, 0, 8, 3])
    k = sparse_gram(indptr, indices, np.ones(5, np.float32), 9)
    assert k[1, 3] == 1 and k[1, 1] == 2 and k[3, 4] == 0


def test_a_file_with_columns_out_of_order(tmp_path: Path) -> None:
    path = tmp_path / "fishers.h5"
    shutil.copyfile(FORMATS / "v1" / "low_rank_fishers_sparse.h5", path)
    with h5py.File(path, "r+") as file:
        name = next(n for n in ("indices", "fishers/indices", "rows/indices") if n in file)
        file[name][...] = file[name][...][::-1]
    with pytest.raises(NpeffError):
        npeff.decompose(npeff.load(path), n_components=2, seed=0)


def cross(p: Any, out: Any, row_offsets: Any = OFFSETS, threads: int = 1) -> None:
    _native.cross(p=p, row_offsets=row_offsets, out=out, threads=threads)


def largest(indices: Any, values: Any, threads: int = 1) -> None:
    _native.topk(x=P, indices=indices, values=values, by_magnitude=False, threads=threads)


def solve(kernel: str, cross: Any, w: Any, **numbers: Any) -> None:
    gram, status = np.eye(cross.shape[1], dtype=cross.dtype), np.zeros(2, np.int64)
    residual = np.full(len(cross), np.inf, cross.dtype)
    getattr(_native, kernel)(gram=gram, cross=cross, w=w, residual=residual, **numbers, status=status, threads=1)


def test_the_native_gram_needs_order() -> None:
    indptr, indices, values = UNSORTED
    a = _native.Csr(indptr=indptr, indices=indices, values=values, n_columns=1000, threads=1)
    with pytest.raises(ArgumentError, match="indices: expected columns that ascend"):
        _native.sparse_gram(a=a, names=np.zeros(1000, np.int32), k=np.zeros((2, 2), np.float32), threads=1)


def test_wild_names_of_dense_columns() -> None:
    csr = {"indptr": np.array([0, 1, 3]), "indices": np.array([0, 1, 2], np.int32), "values": np.ones(3, np.float32)}
    names, out = np.array([2**31 - 1, -(2**31), 1], np.int32), np.full((2, 1), 7, np.float32)
    a = _native.Csr(**csr, n_columns=3, threads=1)
    for first, want in ((0, [0, 0]), (1, [0, 1]), (2**31 - 1, [1, 0]), (-(2**31), [0, 0]), (2**62, [0, 0])):
        _native.to_dense(a=a, names=names, first=first, out=out, threads=1)
        np.testing.assert_array_equal(out[:, 0], want)


def test_a_matrix_that_was_written_to_is_checked_again() -> None:
    indptr, indices, values = (torch.tensor([0, 1, 2]), torch.tensor([0, 1]), torch.ones(2))
    matrix = Csr(indptr, indices, values, 2)
    dense = torch.eye(2)
    assert torch.equal(matrix.times(dense), dense)
    indices[1] = 7
    with pytest.raises(ArgumentError, match="row 1 is broken"):
        matrix.times(dense)
    indices[1] = 0
    assert torch.equal(matrix.times(dense), torch.tensor([[1.0, 0.0], [1.0, 0.0]]))
    arrays = [x.numpy().copy() for x in (indptr, indices, values)]
    there: Any = Csr(arrays[0], arrays[1], arrays[2], 2)
    arrays[1][0] = -5
    with pytest.raises(ArgumentError, match="row 0 is broken"):
        there.times(np.eye(2, dtype=np.float32))


def test_more_columns_than_memory(implementation: str) -> None:
    csr = (np.array([0, 2, 3]), np.array([5, 2**40], np.int64)[[0, 1, 1]], np.ones(3, np.float32))
    if implementation != "reference":  # which takes memory for all columns
        np.testing.assert_array_equal(sparse_gram(*csr, 2**41), [[2, 1], [1, 1]])
    for function in (sparse_gram, kernels.csr_transpose):
        with pytest.raises(ArgumentError, match="n_columns: expected"):
            function(*csr, 2**62)


# ---- numbers


@pytest.mark.parametrize("k", [0, -1, -(2**63), 2**62, 2**63 - 1])
def test_numbers_of_entries_to_keep(k: int) -> None:
    with pytest.raises(ArgumentError, match="k: expected"):
        kernels.StreamingTopK(1, k)
    with pytest.raises(ArgumentError, match="k: expected"):
        _native.Selectors(n_rows=1, k=k, keep_zeros=False)
    with pytest.raises(ArgumentError, match="k: expected"):
        blocks.Selectors(1, k, False, 0)
    for n_rows in (-1, 2**63 - 1):
        with pytest.raises(ArgumentError, match="n_rows: expected"):
            _native.Selectors(n_rows=n_rows, k=1, keep_zeros=False)


@pytest.mark.parametrize("value", [True, 1.0, "3", None, 2**64, np.array([1, 2]), torch.ones(2, 2), object()])
def test_what_is_no_number(value: Any) -> None:
    for call in (
        lambda: kernels.topk(P, value),
        lambda: kernels.StreamingTopK(value, 1),
        lambda: kernels.StreamingSketch(1, value),
        lambda: kernels.sketch(P, 16, seed=value),
        lambda: sparse_gram(*UNSORTED, value),
        lambda: nnls(np.eye(2), np.ones((1, 2)), max_sweeps=value),
    ):
        with pytest.raises(ArgumentError, match=r"\w+: expected"):
            call()


def test_outer_products_beyond_all_selectors_and_indices(implementation: str) -> None:
    stream = kernels.StreamingTopK(2, 3)
    delta, inputs = np.ones((1, 2, 3), np.float32), np.ones((1, 4), np.float32)
    for arguments, name in (
        ((2**63 - 1, 0, 12), "first"),
        ((2, 0, 12), "first"),
        ((-1, 0, 12), "first"),
        ((0, -1, 12), "base"),
        ((0, 2**63 - 1, 12), "base"),
        ((0, 2**62 - 5, 12), "base"),
        ((0, 0, 2**62), "column_stride"),
        ((0, 0, -1), "column_stride"),
    ):
        with pytest.raises(ArgumentError, match=f"{name}.*: expected"):
            stream.push_outer(delta, inputs, *arguments)
        if implementation != "reference":
            native = _native.Selectors(n_rows=2, k=3, keep_zeros=False)
            with pytest.raises(ArgumentError, match=f"{name}.*: expected"):
                outer = dict(zip(("first", "base", "column_stride"), arguments, strict=True))
                native.push_outer(delta=delta, inputs=inputs, **outer, turned=False, threads=1)


@pytest.mark.parametrize("threads", [0, -1, 2**31 - 1])
def test_numbers_of_threads(threads: int) -> None:
    with pytest.raises(ArgumentError, match="threads: expected 1 … 4096"):
        cross(P, np.zeros((2, 3), np.float32), threads=threads)
    with pytest.raises(ArgumentError, match="threads: expected 1 … 4096"):
        largest(np.zeros((4, 1), np.int64), np.zeros((4, 1), np.float32), threads)
    with pytest.raises(ArgumentError, match="n: expected a number of threads"):
        kernels.set_num_threads(threads)


def test_sweeps_without_end() -> None:
    with pytest.raises(ArgumentError, match="max_sweeps: expected 0 … 1000000"):
        nnls(np.eye(2), np.ones((1, 2)), max_sweeps=2**62)
    with pytest.raises(ArgumentError, match="max_sweeps: expected 0 … 1000000"):
        solve("nnls", np.ones((1, 2)), np.zeros((1, 2)), max_sweeps=2**62, tol=0.0, kkt=False)
    for tol in (-1.0, float("nan")):
        with pytest.raises(ArgumentError, match="tol: expected"):
            nnls(np.eye(2), np.ones((1, 2)), tol=tol)
        with pytest.raises(ArgumentError, match="tol: expected"):
            solve("nnls_exact", np.ones((1, 2)), np.zeros((1, 2)), tol=tol)


SWEEPS_WITHOUT_END = """
import numpy as np
from npeff import kernels

x = np.random.default_rng(0).standard_normal((300, 200))
for threads in (1, 3):
    for rows in (1, 3000):
        kernels.set_num_threads(threads)
        cross = np.abs(x[:1, :200]).repeat(rows, 0)
        kernels.nnls(x.T @ x, cross, max_sweeps=1)
        try:
            print("now", flush=True)
            kernels.nnls(x.T @ x, cross, max_sweeps=1_000_000, tol=0)
        except KeyboardInterrupt:
            print(f"interrupted with {threads} threads and {rows} rows", flush=True)
        else:
            print("came to its end", flush=True)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="signals are sent by POSIX's means")
def test_ctrl_c_ends_the_sweeps() -> None:
    command = [sys.executable, "-W", "ignore", "-c", SWEEPS_WITHOUT_END]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        watch = threading.Timer(120, process.kill)  # then readline returns ""
        watch.start()
        try:
            for threads in (1, 3):
                for rows in (1, 3000):
                    assert process.stdout.readline() == "now\n"
                    process.send_signal(signal.SIGINT)
                    assert process.stdout.readline() == f"interrupted with {threads} threads and {rows} rows\n"
            assert process.wait(timeout=120) == 0
        finally:
            watch.cancel()
            process.kill()


# ---- memory


def test_outputs_that_lie_in_inputs() -> None:
    right = np.ones((4, 3), np.float32)
    both = np.ones(24, np.float32)
    for out in (right, both[3:15].reshape(4, 3)):
        given = right if out is right else both[:12].reshape(4, 3)
        with pytest.raises(ArgumentError, match="w: must not be the same memory as cross"):
            solve("nnls", given, out, max_sweeps=10, tol=0.0, kkt=False)
    with pytest.raises(ArgumentError, match="out: must not be the same memory as p"):
        cross(both[:12].reshape(4, 3), both[6:12].reshape(2, 3))
    with pytest.raises(ArgumentError, match="indices: must not be the same memory as values"):
        space = np.zeros(16, np.int64)
        largest(space[:8].reshape(4, 2), space[4:8].view(np.float32).reshape(4, 2))
    inputs, delta = np.ones((1, 1, 4, 4), np.float32), np.ones((1, 1, 3, 3), np.float32)
    with pytest.raises(ArgumentError, match="out: must not be the same memory as inputs"):
        kernels.convolution_gradients(inputs, [delta], (2, 2), out=inputs.reshape(-1)[:4].reshape(1, 1, 1, 1, 2, 2))


def test_memory_that_is_no_place_for_numbers() -> None:
    space = np.zeros(P.nbytes + 4, np.uint8)
    misaligned = space[1 : 1 + P.nbytes].view(np.float32).reshape(4, 3)
    misaligned[...] = P
    out = np.zeros((2, 3), np.float32)
    with pytest.raises(ArgumentError, match="p: expected an address that is a multiple of 4"):
        cross(misaligned, out)
    np.testing.assert_array_equal(kernels.cross(misaligned, OFFSETS), WANT)
    np.testing.assert_array_equal(kernels.cross(torch.from_numpy(misaligned), torch.from_numpy(OFFSETS)), WANT)
    np.testing.assert_array_equal(kernels.topk(misaligned, 1)[1][:, 0], [2, 2, 2, 2])
    with pytest.raises(ArgumentError, match="elements of at least one byte"):
        cross(np.zeros((4, 3), "V0"), out)
    inputs, delta = np.ones((1, 1, 2, 6), np.float32), np.ones((1, 1, 1, 1), np.float32)
    with pytest.raises(ArgumentError, match="out: expected a C-contiguous"):
        kernels.convolution_gradients(inputs, [delta], (2, 6), out=misaligned.reshape(1, 1, 1, 1, 2, 6))
    offsets = (ctypes.c_int64 * 3)(0, 1, 4)  # gives no strides
    cross(P, out, offsets)
    np.testing.assert_array_equal(out, WANT)


def test_sizes_whose_product_overflows() -> None:
    out = np.zeros((2, 3), np.float32)
    with pytest.raises(ArgumentError, match="p: expected"):
        cross(np.lib.stride_tricks.as_strided(P, (2, 2), (2**61, 4)), out)
    with pytest.raises(ArgumentError, match="p: expected"):
        cross(np.lib.stride_tricks.as_strided(P, (1 << 30, 1 << 30), (0, 0)), out)
    # Nothing in it, however long: no loop over the length.
    delta, inputs = np.zeros((1, 1 << 50, 0, 5), np.float32), np.zeros((1, 1 << 50, 0), np.float32)
    places = {"delta_places": np.zeros(5, np.int32), "input_places": np.zeros(0, np.int32)}
    _native.sketch_outer(delta=delta, input=inputs, **places, weight=1.0, sums=np.zeros((1, 0, 16)), threads=1)


# ---- tensors that are no ordinary ones


def test_noted_signs_are_minded(implementation: str) -> None:
    x = torch.complex(torch.ones(3, 4), torch.arange(12.0).reshape(3, 4)).conj().imag
    assert x.is_neg()
    values, _ = kernels.topk(x, 4)
    np.testing.assert_array_equal(values, -np.arange(12.0).reshape(3, 4))
    np.testing.assert_array_equal(kernels.spread_multiply(torch.ones(1, 4), x, torch.tensor([0, 3])), x.resolve_neg())
    want = kernels.sketch(x.resolve_neg(), 16)
    np.testing.assert_array_equal(kernels.sketch(x, 16), want)


def _fake() -> torch.Tensor:
    with FakeTensorMode():
        return torch.ones(4, 3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (_fake, "p: expected a tensor that lies in memory"),
        (lambda: torch.ones(4, 3, device="meta"), "lies in memory|one device"),
        (lambda: hostile_calls._Hollow(torch.ones(4, 3)), "p: expected a tensor that lies in memory"),
        (lambda: torch.ones(4, 3).to_sparse(), "p: expected a dense tensor, got one of layout torch.sparse_coo"),
        (lambda: torch.ones(4, 3).to_mkldnn(), "p: expected a dense tensor"),
        (
            lambda: torch.quantize_per_tensor(torch.ones(4, 3), 0.1, 0, torch.qint8),
            "p: expected a dense tensor, got a q",
        ),
        (
            lambda: torch.nested.nested_tensor([torch.ones(3), torch.ones(2)]),
            "p: expected a dense tensor, got a nested",
        ),
        (lambda: np.ma.masked_array(P, mask=P > 5), "p: expected an array without a mask"),
    ],
)
def test_what_has_no_numbers_in_memory(implementation: str, make: Any, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        kernels.cross(make(), torch.from_numpy(OFFSETS))
    with pytest.raises(ArgumentError):
        cross(make(), np.zeros((2, 3), np.float32), OFFSETS[[0, 1, 1]])


def test_within_vmap() -> None:
    with pytest.raises(ArgumentError, match="p: expected a tensor that lies in memory"):
        torch.func.vmap(lambda p: kernels.cross(p, torch.from_numpy(OFFSETS)))(torch.ones(2, 4, 3))


def test_tensors_of_other_kinds_that_are_fine(implementation: str) -> None:
    plain = torch.from_numpy(P)
    with torch.inference_mode():
        inference = plain * 1
    for p in (torch.nn.Parameter(plain), plain.as_subclass(hostile_calls._Tagged), inference, plain.T.contiguous().T):
        got = kernels.cross(p, torch.from_numpy(OFFSETS))
        assert type(got) is torch.Tensor
        np.testing.assert_array_equal(got, WANT)
    got = kernels.cross(P[::-1].astype(">f4")[::-1], OFFSETS)
    np.testing.assert_array_equal(got, WANT)


def test_two_callers_of_one_selection() -> None:
    """The second is refused while the first is at work; neither spoils anything."""
    stream = kernels.StreamingTopK(1, 1000)
    x = np.random.default_rng(0).standard_normal((1, 400_000)).astype(np.float32)
    refused: list[ArgumentError] = []

    def work(caller: int) -> None:
        for i in range(20):
            try:
                stream.push(x, (20 * caller + i) * x.size)
            except ArgumentError as error:
                refused.append(error)

    threads = [threading.Thread(target=work, args=(caller,)) for caller in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all("one caller at a time" in str(error) for error in refused)
    counts, _, values = stream.finish("magnitude")
    assert counts[0] == 1000 and abs(values[0]) == np.abs(x).max()


def test_test_code_is_not_in_the_package() -> None:
    assert not hasattr(_native, "_blocks")
    assert importlib.util.find_spec("npeff._test_blocks") is None
