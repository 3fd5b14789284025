"""npeff._cuda without a device: it imports, says why there is none, and names wrong arguments before any launch."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch

from npeff.errors import ArgumentError
from npeff.kernels import dispatch

_cuda = pytest.importorskip("npeff._cuda", reason="npeff._cuda was not built")
no_device = pytest.mark.skipif(_cuda.device_count() > 0, reason="there is a CUDA device here")


class OnDevice:
    """A numpy array that says it lies on a CUDA device: good for what looks at shapes only."""

    is_neg = is_conj = staticmethod(lambda: False)

    def __init__(self, array: np.ndarray, index: int = 0, dtype: str | None = None, length: int | None = None) -> None:
        self.array, self.device = array, torch.device("cuda", index)
        self.shape = array.shape if length is None else (length,) * array.ndim
        self.dtype = f"torch.{dtype or array.dtype.name}"

    def stride(self) -> tuple[int, ...]:
        return tuple(step // self.array.itemsize for step in self.array.strides)

    def element_size(self) -> int:
        return self.array.itemsize

    def data_ptr(self) -> int:
        return self.array.ctypes.data


P, OFFSETS, OUT = np.ones((4, 3), np.float32), np.array([0, 1, 4]), np.zeros((2, 3), np.float32)


def cross(p: object = OnDevice(P), offsets: object = OnDevice(OFFSETS), out: object = OnDevice(OUT)) -> None:
    _cuda.cross(p=p, row_offsets=offsets, out=out, stream=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"p": torch.ones(4, 3)}, "p: expected a CUDA tensor, got one on cpu"),
        ({"p": P}, "p: expected a CUDA tensor, got numpy.ndarray"),
        ({"p": [[1.0]]}, "p: expected a CUDA tensor, got list"),
        ({"p": OnDevice(P.astype(np.int32))}, "p: expected float32, got int32"),
        ({"p": OnDevice(P[0])}, r"p: expected shape \(any, any\), got \(3,\)"),
        ({"p": OnDevice(np.ones((3, 4), np.float32).T)}, "p: expected a C-contiguous tensor"),
        ({"p": OnDevice(np.ones((1, 1, 1, 4, 3), np.float32))}, "p: expected at most 4 dimensions, got 5"),
        ({"offsets": OnDevice(OFFSETS[:2])}, r"row_offsets: expected shape \(3,\), got \(2,\)"),
        ({"offsets": OnDevice(OFFSETS, 1)}, "one device, got cuda:0 and cuda:1"),
        ({"out": OnDevice(np.zeros((2, 4), np.float32))}, r"out: expected shape \(any, 3\), got \(2, 4\)"),
        ({"out": OnDevice(np.zeros((2, 3)))}, "out: expected float32, got float64"),
        ({"p": OnDevice(P.astype(np.float16), dtype="bfloat16")}, "p: expected float32, got bfloat16"),
        ({"p": OnDevice(P, length=1 << 32)}, "p: expected an array of at most"),
        ({"p": OnDevice(P, length=-3)}, "p: expected an array of at most"),
        ({"p": torch.ones(4, 3).to_sparse()}, "p: expected a CUDA tensor, got one on cpu"),
        ({"p": OnDevice(P.astype(np.float64))}, "out: expected float64, got float32"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        cross(**arguments)


def finish(memory: np.ndarray) -> None:
    filled = {"counts": np.zeros(3, np.int64), "indices": np.zeros((3, 5), np.int64), "values": np.zeros((3, 5), "f4")}
    there = {name: OnDevice(x) for name, x in filled.items()}
    _cuda.topk_finish(memory=OnDevice(memory), n=3, k=5, keep_zeros=False, **there, stream=0)


def test_sizes_are_checked() -> None:
    with pytest.raises(ArgumentError, match="k: expected 1"):
        _cuda.topk_bytes(n=3, k=0)
    memory = np.zeros(_cuda.topk_bytes(n=3, k=5) - 1, np.uint8)
    with pytest.raises(ArgumentError, match="memory: expected shape"):
        finish(memory)
    rows = {"block": OnDevice(P), "bases": OnDevice(OFFSETS), "order": OnDevice(OFFSETS), "starts": OnDevice(OFFSETS)}
    for d, copies in ((40, 1), (16, 0)):
        with pytest.raises(ArgumentError, match="sums: expected a multiple of 16·copies columns, 1 … 64 copies"):
            _cuda.sketch_rows(**rows, seed=0, copies=copies, sums=OnDevice(np.zeros((2, d))), stream=0)


@no_device
def test_without_a_device_every_launch_fails_cleanly() -> None:
    assert _cuda.absence() and _cuda.usable(0)
    with pytest.raises(RuntimeError, match="cross: "):
        cross()
    memory = np.zeros(_cuda.topk_bytes(n=3, k=5) + 16, np.uint8)
    memory = memory[-memory.ctypes.data % 16 :][: _cuda.topk_bytes(n=3, k=5)]
    with pytest.raises(RuntimeError, match="topk_finish: "):
        finish(memory)


@no_device
def test_the_absence_is_told() -> None:
    lines = [line for line in dispatch.report() if line.device == "cuda"]
    assert {line.kernel for line in lines} == set(dispatch.KERNELS)
    assert all(line.implementation == "reference" and _cuda.absence() in line.reason for line in lines)
    assert dispatch.cuda(torch.device("cuda", 0)) is None


def test_toolkit_is_known() -> None:
    major, minor = _cuda.toolkit()
    assert major >= 11 and 0 <= minor < 20


def test_imports_alone() -> None:
    """In a fresh interpreter, without torch having loaded anything of CUDA's."""
    code = (
        "import importlib.util as u\n"
        f"spec = u.spec_from_file_location('npeff._cuda', {_cuda.__file__!r})\n"
        "module = u.module_from_spec(spec)\n"
        "spec.loader.exec_module(module)\n"
        "print(module.device_count())\n"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert int(out.stdout) == _cuda.device_count()
