"""CuPy arrays at the kernels' door, CSR matrices in and out; with a stand-in for CuPy where there is none."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from npeff.errors import ArgumentError
from npeff.kernels import NnlsResult, nnls, spmm, topk
from npeff.kernels.arrays import accepts_cupy, is_cupy
from npeff.kernels.sparse import Checked
from npeff.kernels.streams import BlockRows
from sparse_cases import skewed, to_scipy


class FakeArray:
    """On the processor, but it says that it is CuPy's."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array

    def __dlpack__(self, **options: object) -> Any:
        return self.array.__dlpack__()

    def __dlpack_device__(self) -> tuple[int, int]:
        return 1, 0


FakeArray.__module__ = "cupy"


@pytest.fixture
def cupy(monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = ModuleType("cupy")
    module.from_dlpack = lambda tensor: FakeArray(tensor.numpy())
    monkeypatch.setitem(sys.modules, "cupy", module)
    # Private: without a device there is no stream to ask for.
    monkeypatch.setattr("npeff.kernels.arrays._stream_of", lambda x: nullcontext())


def test_in_and_out(cupy: None) -> None:
    x = np.random.default_rng(0).standard_normal((3, 50)).astype(np.float32)
    values, indices = topk(FakeArray(x), 5)  # type: ignore[type-var]
    expected_values, expected_indices = topk(x, 5)
    assert is_cupy(values) and is_cupy(indices)
    np.testing.assert_array_equal(values.array, expected_values)
    np.testing.assert_array_equal(indices.array, expected_indices)
    gram = np.eye(4)
    result = nnls(FakeArray(gram), cross=FakeArray(np.ones((2, 4))))  # type: ignore[type-var]
    assert isinstance(result, NnlsResult) and isinstance(result.sweeps, int)
    np.testing.assert_allclose(result.w.array, 1)
    csr = skewed(20, 30)
    dense = np.random.default_rng(0).standard_normal((30, 4)).astype(np.float32)
    out = spmm(*(FakeArray(a) for a in (*csr, dense)))  # type: ignore[type-var]
    np.testing.assert_allclose(out.array, to_scipy(csr, 30) @ dense, atol=1e-5)


def test_without_cuda_in_torch_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", ModuleType("cupy"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ArgumentError, match="install a CUDA build of torch"):
        topk(FakeArray(np.ones((2, 3), np.float32)), 1)  # type: ignore[type-var]


def test_others_pass_untouched() -> None:
    assert accepts_cupy(lambda *x: x)(1, "a", None) == (1, "a", None)
    assert not is_cupy(np.ones(3)) and not is_cupy(torch.ones(3))


def test_plan_of_rows() -> None:
    bases, rows = np.array([500, 0, 100, 50]), np.array([2, 0, 2, 0])
    plan = BlockRows(bases, rows, 4).on(torch.device("cpu"))
    assert plan.order.tolist() == [1, 3, 2, 0] and plan.starts.tolist() == [0, 2, 2, 4, 4]
    assert plan.targets.tolist() == rows.tolist() and plan.bases.tolist() == bases.tolist()
    assert BlockRows(bases, None, 5).on(torch.device("cpu")).starts.tolist() == [0, 1, 2, 3, 4, 4]


def test_what_was_checked_is_known_until_it_is_written_to() -> None:
    checked = Checked()
    a, b = torch.arange(5), torch.arange(3)
    assert not checked.known(a, b, extent=7)
    checked.record(a, b, extent=7)
    assert checked.known(a, b, extent=7) and not checked.known(a, b, extent=6) and not checked.known(b, a, extent=7)
    a[0] = 9
    assert not checked.known(a, b, extent=7)
    checked.record(a, b, extent=7)
    del b
    checked.record(a, extent=1)
    assert len(checked._seen) == 1  # private: what died is forgotten, and only the memory shows it
