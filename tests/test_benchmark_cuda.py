"""What benchmarks/cuda_kernels.py does besides timing: its answers, its published algorithm, its tables."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.sparse
import torch

import npeff
from npeff.fishers.scaling import scale

CPU = torch.device("cpu")


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "benchmarks"))
    yield lambda name: importlib.import_module(name)
    for name in ("cuda_kernels", "cuda_end_to_end", "machine"):
        sys.modules.pop(name, None)


def test_says_that_there_is_no_device(
    benchmark: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    module = benchmark("cuda_kernels")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["cuda_kernels.py", "--out", str(tmp_path / "cuda.md")])
    module.main()
    assert "measures nothing: it needs a CUDA device" in capsys.readouterr().out
    assert not (tmp_path / "cuda.md").exists()


def test_lines_say_what_the_floor_is(benchmark: Any) -> None:
    module = benchmark("cuda_kernels")
    by_bytes = module.Case("copy", lambda: None, bytes=2e9, operations=1e9)
    assert "| 4.000 | 4.000 – 4.000 | 2.000 (bytes) | 50% |" in module.line(by_bytes, [4.0, 4.0, 4.0], 1e12, 1e12)
    by_operations = module.Case("product", lambda: None, bytes=1e9, operations=3e9)
    assert "3.000 (operations) | 75% |" in module.line(by_operations, [4.0, 4.0, 4.0], 1e12, 1e12)


def test_the_published_algorithm_is_npeffs(benchmark: Any) -> None:
    """Two codes of one algorithm: the same loss from the same start."""
    module = benchmark("cuda_end_to_end")
    fishers = module.large_fishers(60, 4, 300, 40)
    scaled = scale(fishers)
    rows = scaled.rows
    A = scipy.sparse.csr_matrix((rows.values, rows.indices, rows.indptr), shape=(120, rows.n_columns))
    W, G = module.start(60, 4, rows.n_columns, 0)
    energy = float(np.square(scaled.fisher_norms).sum())
    after = module.published(np, A, A.T.tocsr(), W, G, 1e-3, 5, 20)
    options = npeff.PublishedOptions(learning_rate=1e-3, g_only=5, joint=20)
    found = npeff.decompose(fishers, n_components=4, algorithm="published", published=options, progress=False)
    assert module.relative_loss(np, A, *after, energy) == pytest.approx(found.loss, rel=1e-3)
    seconds, loss = module.time_to(fishers, 4, found.loss, CPU)
    assert seconds > 0 and loss <= found.loss


def test_tables(benchmark: Any, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    module = benchmark("cuda_end_to_end")
    table = module.decomposition_table(CPU, 0.004, np, scipy.sparse.csr_matrix)
    assert "npeff.decompose, until as low" in table[-4] and "an equal loss" in table[-2]


@pytest.mark.slow
def test_fishers_table(benchmark: Any, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    table = benchmark("cuda_end_to_end").fishers_table(CPU, tmp_path, 0.1, 1, length=16)
    assert sum("compute_fishers" in line for line in table) == 2


def test_wrong_fishers_are_found_out(benchmark: Any) -> None:
    module = benchmark("cuda_end_to_end")
    fishers = module.large_fishers(10, 2, 100, 40)
    module.check_fishers(fishers, fishers)
    other = module.large_fishers(10, 2, 100, 40, seed=1)
    with pytest.raises(AssertionError, match="differs"):
        module.check_fishers(other, fishers)
