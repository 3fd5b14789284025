"""What benchmarks/cuda_kernels.py does besides timing: its answers, its published algorithm, its tables."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import scipy.sparse
import torch

import npeff
from emulated_device import emulated
from npeff.fishers.scaling import scale

CPU = torch.device("cpu")


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "benchmarks"))
    yield lambda name: importlib.import_module(name)
    for name in ("cuda_kernels", "cuda_end_to_end", "cuda_fishers", "machine"):
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


def test_kernels_are_checked_and_timed(benchmark: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every family with the kernels' blocks emulated on the processor; a family that fails keeps the others' lines."""
    module = benchmark("cuda_kernels")
    monkeypatch.setattr(module, "DEVICE", CPU)
    monkeypatch.setattr(module, "ceilings", lambda rounds: (1e12, 1e12))
    monkeypatch.setattr(module, "milliseconds", lambda run, rounds: [float(run() is None) + 1] * 3)
    with emulated(monkeypatch):
        table = module.kernels_table(0.0007, 1, list(module.FAMILIES), False)
        assert sum(line.endswith("% |") for line in table) == 13 and "FAILED" not in str(table)
        monkeypatch.setattr(module, "nnls", lambda *args, **options: 1 / 0)
        table = module.kernels_table(0.0007, 1, ["solver", "sketches"], False)
    assert sum("sketch" in line and "×" in line for line in table) == 2
    assert any(line.startswith("| solver: FAILED, ZeroDivisionError") for line in table)


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


def test_fishers_lines(benchmark: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    module = benchmark("cuda_fishers")
    with emulated(monkeypatch):
        table = list(module.fishers_lines(CPU, tmp_path, 0.01, 1, size=3, length=4))
    assert "FAILED" not in str(table)
    for side in ("plain backward passes |", "TopK(65 536) |", 'form="kronecker") |'):
        assert sum(side in line for line in table) == 2
    assert sum(line.startswith("Checked") for line in table) == 2


def test_language_lines(benchmark: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a bergson whose collection fails: the other lines stay."""
    pytest.importorskip("transformers")
    module = benchmark("cuda_fishers")
    monkeypatch.setattr(module, "bergson_absence", lambda: "")
    monkeypatch.setattr(module, "bergson_side", lambda *args: lambda: 1 / 0)
    with emulated(monkeypatch):
        table = list(module.language_lines(CPU, 0.01, 1, 3, 2, 4, npeff.Sketch(256, form="kronecker")))
    assert sum("compute_fishers, Sketch(256" in line and "FAILED" not in line for line in table) == 4
    assert sum("one plain backward pass" in line and "| 1.00 |" in line for line in table) == 2
    assert sum(line.startswith("| bergson") and "FAILED, ZeroDivisionError" in line for line in table) == 4
    assert sum(line.startswith("Checked") for line in table) == 2


def test_the_full_sizes_are_the_published_ones(benchmark: Any) -> None:
    pytest.importorskip("transformers")
    module = benchmark("cuda_fishers")
    with torch.device("meta"):
        assert sum(p.numel() for p in module.smollm(1.0).parameters()) == 134_515_008
        assert sum(p.numel() for p in module.minilm(3, 1.0).parameters()) == 22_713_216 + 3 * 385


def test_says_that_bergson_is_absent(benchmark: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    module = benchmark("cuda_fishers")
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    assert module.bergson_absence() == "bergson: not run, it is not installed."


def test_rounds_end_in_time(benchmark: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that the batches move: as many rounds as end within the limit."""
    module, now = benchmark("cuda_fishers"), [0.0]
    monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    data = module.Timed([torch.zeros(2, 3)] * 4)

    def work() -> None:
        for _ in data:
            now[0] += 0.25

    sides = {"one": work, "other": lambda: [1 / 0 for _ in data]}
    table = list(module.compared(sides, data, CPU, 50, 5.0))
    assert table[0].startswith("| other: FAILED, ZeroDivisionError")
    assert table[1].startswith("| one | 1.000 (5) | 0.2500 | 0.2500 – 0.2500 | 24 | 1.00 |")
    table = list(module.compared({"one": work}, data, CPU, 50, 0.5))
    assert table[0].startswith("| one | 1.000 (1) |")


def test_wrong_fishers_are_found_out(benchmark: Any) -> None:
    module, check = benchmark("cuda_end_to_end"), benchmark("cuda_fishers").check_fishers
    fishers = module.large_fishers(10, 2, 100, 40)
    check(fishers, fishers)
    other = module.large_fishers(10, 2, 100, 40, seed=1)
    with pytest.raises(AssertionError, match="differs"):
        check(other, fishers)
