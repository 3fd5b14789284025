"""The native module itself: views without copies, and wrong arguments named before any work."""

from __future__ import annotations

import importlib
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch

from npeff.errors import ArgumentError
from npeff.kernels import available, dispatch, nnls, set_num_threads, topk, use
from processes import all_returned

_native = pytest.importorskip("npeff._native", reason="the native module was not built")


def segments(p: object, offsets: object, out: object) -> None:
    _native.cross(p=p, row_offsets=offsets, out=out, threads=1)


P = np.ones((4, 3), np.float32)
OFFSETS = np.array([0, 1, 4])


def test_memory_is_shared() -> None:
    out = torch.zeros(2, 3)
    segments(P, OFFSETS, out.numpy())
    np.testing.assert_array_equal(out, [[1, 1, 1], [3, 3, 3]])
    view = np.zeros((9, 3), np.float32)[2:4]
    segments(memoryview(P), OFFSETS, view)
    np.testing.assert_array_equal(view, out)


@pytest.mark.parametrize(
    ("p", "message"),
    [
        (P.astype(np.float64), "p: expected float32, got float64"),
        (P.astype(np.int32), "p: expected float32, got int32"),
        (P.astype(np.complex64), "p: expected float32, got format 'Zf'"),
        (P[0], r"p: expected shape \(any, any\), got \(3,\)"),
        (np.ones((3, 4), np.float32).T, "p: expected a C-contiguous array"),
        ([[1.0]], "p: expected a numpy array, got list"),
        (None, "p: expected a numpy array"),
        (torch.ones(4, 3), "p: expected a numpy array, got Tensor"),
        (np.ones((1, 1, 1, 4, 3), np.float32), "p: expected at most 4 dimensions, got 5"),
        (np.ones(48, np.int8)[:].view(">f4").reshape(4, 3), "p: expected float32, got format '>f'"),
    ],
)
def test_wrong_input_is_named(p: object, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        segments(p, OFFSETS, np.zeros((2, 3), np.float32))


def test_wrong_output_is_named() -> None:
    out = np.zeros((2, 3), np.float32)
    out.flags.writeable = False
    with pytest.raises(ArgumentError, match="out: expected a writable"):
        segments(P, OFFSETS, out)
    with pytest.raises(ArgumentError, match=r"out: expected shape \(any, 3\), got \(2, 4\)"):
        segments(P, OFFSETS, np.zeros((2, 4), np.float32))
    with pytest.raises(ArgumentError, match=r"row_offsets: expected shape \(3,\), got \(2,\)"):
        segments(P, OFFSETS[:2], np.zeros((2, 3), np.float32))
    with pytest.raises(ArgumentError, match="row_offsets: expected to ascend from 0 to 4"):
        segments(P, np.array([0, 5, 4]), np.zeros((2, 3), np.float32))
    with pytest.raises(ArgumentError, match="indices: expected 1 … 3 columns, got 4"):
        indices, values = np.zeros((4, 4), np.int64), np.zeros((4, 4), np.float32)
        _native.topk(x=P, indices=indices, values=values, by_magnitude=False, threads=1)


def test_a_convolution_that_would_read_beyond_its_inputs_is_named() -> None:
    inputs, delta, out = (np.zeros(shape, np.float32) for shape in ((1, 1, 4, 4), (1, 1, 3, 3), (1, 1, 1, 4)))

    def run(**change: object) -> None:
        arguments = {
            "delta": [delta],
            "turns": 1,
            "groups": 1,
            "kernel": (2, 2),
            "stride": (1, 1),
            "dilation": (1, 1),
            "channels": (0, 1),
        }
        _native.convolution_gradients(inputs=inputs, **{**arguments, **change}, squared=False, out=out, threads=1)

    run()
    for change, text in (
        ({"kernel": (3, 2)}, "inputs: the kernel does not fit"),
        ({"dilation": (1, 3)}, "inputs: the kernel does not fit"),
        ({"stride": (2**62, 1)}, "expected 1"),
        ({"kernel": (0, 2)}, "expected 1"),
        ({"channels": (0, 2)}, "channels"),
        ({"channels": (-1, 1)}, "channels"),
        ({"turns": 2}, "do not divide"),
        ({"delta": []}, "at least one column"),
        ({"delta": [delta, delta[:, :, :2]]}, "delta: expected shape"),
    ):
        with pytest.raises(ArgumentError, match=text):
            run(**change)


def test_other_device_is_named() -> None:
    gram = np.eye(3, dtype=np.float32)
    with pytest.raises(ArgumentError, match="one device, got gram on cpu, cross on meta"):
        nnls(torch.from_numpy(gram), torch.ones(4, 3, device="meta"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device and a CUDA build of torch")
def test_cuda_tensors_stay_there() -> None:
    x = torch.randn(3, 1000, device="cuda")
    values, indices = topk(x, 10)
    assert values.is_cuda and indices.is_cuda
    np.testing.assert_array_equal(indices.cpu(), topk(x.cpu(), 10)[1])


def test_many_threads_of_python_at_once() -> None:
    """The pool serves one call at a time; the others run on their own threads, with the same answers."""
    rng = np.random.default_rng(0)
    inputs = [rng.standard_normal((3, 100_000)).astype(np.float32) for _ in range(6)]
    expected = [topk(x, 500)[1] for x in inputs]
    results: list[np.ndarray | None] = [None] * len(inputs)

    def work(i: int) -> None:
        for _ in range(5):
            results[i] = topk(inputs[i], 500)[1]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for got, want in zip(results, expected, strict=True):
        np.testing.assert_array_equal(got, want)


def largest(rank: int, x: np.ndarray) -> np.ndarray:
    return np.asarray(topk(x, 100)[1])


@pytest.mark.skipif(sys.platform == "win32", reason="there is no fork")
def test_works_in_a_forked_child() -> None:
    set_num_threads(3)
    try:
        x = np.random.default_rng(0).standard_normal((6, 100_000)).astype(np.float32)
        wanted = largest(0, x)  # the parent has its threads
        (found,) = all_returned(1, largest, x)
        np.testing.assert_array_equal(found, wanted)
    finally:
        set_num_threads(None)


def test_environment_chooses() -> None:
    name = available()[-2]
    code = "from npeff.kernels import implementation; print(implementation())"
    out = subprocess.run(
        [sys.executable, "-c", code],
        env={"NPEFF_KERNELS": name},
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    assert out.stdout.strip() == name == "base"


def test_unknown_implementation() -> None:
    with pytest.raises(ArgumentError, match="implementation: expected reference, base, avx2 or avx512, got 'sse9'"):
        use("sse9")
    with pytest.raises(ArgumentError, match="n: expected a number of threads"):
        set_num_threads(0)


def test_report_says_why() -> None:
    report = dispatch.report()
    assert {line.device for line in report} == {"cpu", "cuda"}
    assert all(line.reason for line in report if line.device == "cuda" or line.implementation != "avx512")


def test_cuda_module_without_a_driver() -> None:
    try:
        cuda = importlib.import_module("npeff._cuda")
    except ImportError as error:
        pytest.skip(f"npeff._cuda was not built ({error})")
    count = cuda.device_count()
    assert count >= 0
    assert bool(cuda.absence()) == (count == 0)
