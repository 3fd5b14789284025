"""npeff._cuda without a device: it imports, says why there is none, and names wrong arguments before any launch."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch

from hostile_calls import Managed
from npeff.errors import ArgumentError
from npeff.kernels import dispatch

_cuda = pytest.importorskip("npeff._cuda", reason="npeff._cuda was not built")
no_device = pytest.mark.skipif(_cuda.device_count() > 0, reason="there is a CUDA device here")


class OnDevice:
    """A numpy array that says it lies on a CUDA device: good for what looks at shapes only."""

    def __init__(self, array: np.ndarray, index: int = 0, dtype: tuple[int, int] | None = None) -> None:
        code = {"f": 2, "i": 0, "u": 1}[array.dtype.kind]
        self.array = array
        self.shape = (ctypes.c_int64 * array.ndim)(*array.shape)
        self.strides = (ctypes.c_int64 * array.ndim)(*(s // array.itemsize for s in array.strides))
        code, bits = dtype or (code, 8 * array.itemsize)
        self.managed = Managed(
            array.ctypes.data, 2, index, array.ndim, code, bits, 1, self.shape, self.strides, 0, None, None
        )
        self.index = index

    def __dlpack_device__(self) -> tuple[int, int]:
        return 2, self.index

    def __dlpack__(self, stream: int) -> Any:
        assert stream == -1, "the caller's stream is used: nothing is waited for"
        new = ctypes.pythonapi.PyCapsule_New
        new.restype, new.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
        return new(ctypes.addressof(self.managed), b"dltensor", None)


P, OFFSETS, OUT = np.ones((4, 3), np.float32), np.array([0, 1, 4]), np.zeros((2, 3), np.float32)


def cross(p: object = OnDevice(P), offsets: object = OnDevice(OFFSETS), out: object = OnDevice(OUT)) -> None:
    _cuda.cross(p=p, row_offsets=offsets, out=out, stream=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"p": torch.ones(4, 3)}, "p: expected a CUDA tensor, got one on cpu"),
        ({"p": P}, "p: expected a CUDA tensor, got one on"),
        ({"p": [[1.0]]}, r"p: expected a CUDA tensor \(torch or CuPy\), got list"),
        ({"p": OnDevice(P.astype(np.int32))}, "p: expected float32, got int32"),
        ({"p": OnDevice(P[0])}, r"p: expected shape \(any, any\), got \(3,\)"),
        ({"p": OnDevice(np.ones((3, 4), np.float32).T)}, "p: expected a C-contiguous tensor"),
        ({"p": OnDevice(np.ones((1, 1, 1, 4, 3), np.float32))}, "p: expected at most 4 dimensions, got 5"),
        ({"offsets": OnDevice(OFFSETS[:2])}, r"row_offsets: expected shape \(3,\), got \(2,\)"),
        ({"offsets": OnDevice(OFFSETS, 1)}, "one device, got cuda:0 and cuda:1"),
        ({"out": OnDevice(np.zeros((2, 4), np.float32))}, r"out: expected shape \(any, 3\), got \(2, 4\)"),
        ({"out": OnDevice(np.zeros((2, 3)))}, "out: expected float32, got float64"),
        (
            {"p": OnDevice(P.astype(np.float16), dtype=(4, 16)), "out": OnDevice(np.zeros((2, 3)))},
            "out: expected float32",
        ),
        ({"p": OnDevice(P.astype(np.float64))}, "out: expected float64, got float32"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        cross(**arguments)


def test_sizes_are_checked() -> None:
    with pytest.raises(ArgumentError, match="k: expected 1"):
        _cuda.topk_bytes(n=3, k=0)
    memory = np.zeros(_cuda.topk_bytes(n=3, k=5) - 1, np.uint8)
    with pytest.raises(ArgumentError, match="memory: expected shape"):
        _cuda.topk_reset(memory=OnDevice(memory), n=3, k=5, keep_zeros=False, stream=0)
    a = _cuda.Csr(indptr=OnDevice(OFFSETS), indices=OnDevice(OFFSETS), values=OnDevice(P[0]), n_columns=5, stream=0)
    for d, copies in ((40, 1), (16, 0)):
        with pytest.raises(ArgumentError, match="sums: expected a multiple of 16·copies columns, 1 … 64 copies"):
            _cuda.sketch_csr(a=a, seed=0, copies=copies, sums=OnDevice(np.zeros((2, d))), stream=0)


@no_device
def test_without_a_device_every_launch_fails_cleanly() -> None:
    assert _cuda.absence() and _cuda.devices() == [] and _cuda.usable(0)
    with pytest.raises(RuntimeError, match="cross: "):
        cross()
    memory = np.zeros(_cuda.topk_bytes(n=3, k=5) + 16, np.uint8)
    memory = memory[-memory.ctypes.data % 16 :][: _cuda.topk_bytes(n=3, k=5)]
    with pytest.raises(RuntimeError, match="topk_reset: "):
        _cuda.topk_reset(memory=OnDevice(memory), n=3, k=5, keep_zeros=False, stream=0)


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
