"""Rows that stay on disk: the same factorisation as in memory, under the ceiling that was set."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch

import npeff
from npeff.decomposition.options import choose_space
from npeff.decomposition.spaces import RowSpace
from npeff.errors import ArgumentError
from npeff.fishers.rows import DenseRows, SparseRows
from npeff.fishers.scaling import StreamedRows, scale
from npeff.models.devices import parse_bytes
from planted import best_cosines, fishers_of, planted, random_rows, sparse


def stored(form: str, seed: int = 0, kind: str = "low_rank") -> npeff.Fishers:
    """Fishers of examples with 0 to 5 rows."""
    ranks = np.random.default_rng(seed).integers(0, 6, 40)
    if kind == "diagonal":
        ranks = np.ones(40, np.int64)
    values, offsets = random_rows(40, 0, 90, 0.5 if form == "sparse" else 1.0, seed, ranks)
    values = np.abs(values) if kind == "diagonal" else values
    return fishers_of(sparse(values) if form == "sparse" else DenseRows(values), offsets, kind)


@pytest.mark.parametrize("form", ["sparse", "dense"])
@pytest.mark.parametrize("kind", ["low_rank", "diagonal"])
@pytest.mark.parametrize("weights", ["energy", "balanced"])
@pytest.mark.parametrize("part_bytes", [1, 700, 1 << 30])
def test_scaling_by_parts_is_scaling(form: str, kind: str, weights: str, part_bytes: int) -> None:
    fishers = stored(form, kind=kind)
    whole = scale(fishers, weights)
    parts = scale(fishers, weights, stream=True, part_bytes=part_bytes)
    assert isinstance(parts.rows, StreamedRows) and type(whole.rows) is type(fishers.rows)
    np.testing.assert_array_equal(parts.fisher_norms, whole.fisher_norms)
    assert parts.columns is whole.columns or np.array_equal(parts.columns, whole.columns)
    np.testing.assert_array_equal(parts.rows.dense(0, parts.rows.n_rows), whole.rows.dense(0, whole.rows.n_rows))
    covered = [(start, stop) for start, stop, _ in parts.rows.parts()]
    assert [start for start, _ in covered] == [0, *(stop for _, stop in covered[:-1])]
    assert covered[-1][1] == parts.rows.n_rows
    np.testing.assert_allclose(parts.rows.squared_norms(), whole.rows.squared_norms(), rtol=1e-12)


@pytest.mark.parametrize("form", ["sparse", "dense"])
@pytest.mark.parametrize("part_bytes", [1, 3000])
def test_products_by_parts_are_the_products(form: str, part_bytes: int) -> None:
    fishers = stored(form)
    whole = scale(fishers).rows
    rows = scale(fishers, stream=True, part_bytes=part_bytes).rows
    assert isinstance(rows, StreamedRows)
    dense = torch.from_numpy(whole.dense(0, whole.n_rows)).double()
    generator = torch.Generator().manual_seed(0)
    G = torch.randn(5, rows.n_columns, generator=generator, dtype=torch.float64)
    S = torch.randn(rows.n_rows, 4, generator=generator, dtype=torch.float64)
    space = RowSpace(rows, torch.float64, stream=True)
    for project, combine in ((space.project, space.combine), (rows.project, None)):
        torch.testing.assert_close(project(G), dense @ G.T)
        if combine is not None:
            torch.testing.assert_close(combine(S), S.T @ dense)
    torch.testing.assert_close(rows.combine(S), S.T @ dense)
    torch.testing.assert_close(rows.row_gram(torch.float64), dense @ dense.T)
    one, other = space, RowSpace(whole, torch.float64)
    coords = (one.random(3, torch.Generator().manual_seed(1)), other.random(3, torch.Generator().manual_seed(1)))
    torch.testing.assert_close(*coords)


@pytest.mark.parametrize("form", ["sparse", "dense"])
@pytest.mark.parametrize("kind", ["low_rank", "diagonal"])
def test_streamed_decompositions_are_those_in_memory(form: str, kind: str) -> None:
    fishers = stored(form, kind=kind)
    options = {"n_init": 1, "n_replacements": 2, "progress": False, "dtype": "float64"}
    memory = npeff.decompose(fishers, 4, space="rows" if kind == "low_rank" else "auto", **options)
    disk = npeff.decompose(fishers, 4, space="streamed", **options)
    assert disk.provenance["course"]["space"] == "streamed"
    assert disk.loss == pytest.approx(memory.loss, abs=1e-9)
    np.testing.assert_allclose(disk.coefficients, memory.coefficients, atol=1e-5)
    assert best_cosines(disk.vectors, memory.vectors).min() > 1 - 1e-6


def test_planted_components_are_found_from_disk(tmp_path: Path) -> None:
    fishers, G, _ = planted(200, 5, 400, 0.02, 0)
    opened = npeff.load(fishers.save(tmp_path / "f.h5"))
    components = npeff.decompose(opened, 5, space="streamed", memory="30MB", progress=False)
    assert best_cosines(components.vectors, G).min() > 0.98
    np.testing.assert_array_equal(opened.rows.values, fishers.rows.values)


def test_checkpoints_resume_over_streamed_rows(tmp_path: Path) -> None:
    fishers = stored("dense")
    options = {"space": "streamed", "n_init": 1, "n_replacements": 3, "progress": False}
    whole = npeff.decompose(fishers, 4, **options)
    path = tmp_path / "state"
    seen: list[int] = []

    def stop(progress: npeff.Progress) -> bool:
        seen.append(progress.iteration)
        if progress.stage == "replacement" and progress.unit == 1:
            raise KeyboardInterrupt
        return False

    with pytest.raises(KeyboardInterrupt):
        npeff.decompose(fishers, 4, checkpoint=path, callback=stop, **options)
    resumed = npeff.decompose(fishers, 4, checkpoint=path, **options)
    np.testing.assert_array_equal(resumed.vectors, whole.vectors)


# ---- the ceiling ----------------------------------------------------------------------------------------------------


def huge(n_rows: int, width: int, nnz: int | None = None) -> DenseRows | SparseRows:
    """Rows that take no memory, whatever their size."""
    if nnz is None:
        return DenseRows(np.broadcast_to(np.float32(1), (n_rows, width)))
    indptr = np.linspace(0, nnz, n_rows + 1).astype(np.int64)
    rng = np.random.default_rng(0)
    return SparseRows(indptr, rng.integers(0, width, nnz, dtype=np.int32), np.ones(nnz, np.float32), width)


def test_the_space_is_chosen_by_what_fits() -> None:
    rows = huge(40_000, 16_384)  # 2.6 GB; K 6.4 GB
    assert choose_space(rows, 10_000, "auto", 16, memory=parse_bytes("8GB")).space == "rows"
    plan = choose_space(rows, 10_000, "auto", 16, memory=parse_bytes("1GB"))
    assert plan.space == "streamed" and plan.stream and 6 * plan.part_bytes < 10**9
    exact = huge(3000, 2_000_000)  # 24 GB; K 36 MB
    plan = choose_space(exact, 1000, "auto", 16, memory=parse_bytes("1GB"))
    assert plan.space == "gram" and plan.stream
    few = huge(5000, 3_000_000, 6_000_000)  # short rows, but 256 directions over all their columns take 5 GB
    assert "basis" in (plan := choose_space(few, 5000, "auto", 16, memory=parse_bytes("4GB"))).reason
    assert plan.space == "gram"
    with pytest.raises(ArgumentError, match=r"memory: 1\.0 MB"):
        choose_space(rows, 10_000, "auto", 16, memory=10**6)
    with pytest.raises(ArgumentError, match="space='streamed'"):
        choose_space(rows, 10_000, "gram", 16, memory=parse_bytes("1GB"))
    assert choose_space(huge(5000, 1000, 100_000), 5000, "auto", 4, low_rank=False).space == "rows"
    with pytest.raises(ArgumentError, match="space"):
        choose_space(rows, 10_000, "disk", 16)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "value"), [("4GB", 4 * 10**9), ("1.5 MiB", 3 << 19), ("10", 10), (7, 7), ("2k", 2000), ("3TB", 3 * 10**12)]
)
def test_amounts_of_memory(text: str | int, value: int) -> None:
    assert parse_bytes(text) == value


@pytest.mark.parametrize("text", ["", "GB", "-1", 0, -5, "4 bytes", None, True, 1.5, "0MB"])
def test_no_amounts_of_memory(text: object) -> None:
    with pytest.raises(ArgumentError, match="memory"):
        parse_bytes(text)  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the peak of resident memory from /proc")
@pytest.mark.parametrize("form", ["sparse", "dense"])
def test_the_ceiling_holds(tmp_path: Path, form: str) -> None:
    """A file of 300 MB decomposed under 100 MB: peak resident memory, less that of the imports, stays below."""
    rng = np.random.default_rng(0)
    n, rank, d = 6_000, 3, 4096
    values = rng.standard_normal((n * rank, d), dtype=np.float32)
    offsets = np.arange(n + 1) * rank
    if form == "sparse":
        keep = 2048
        indices = np.tile(np.arange(0, d, 2, dtype=np.int32), n * rank)
        rows: DenseRows | SparseRows = SparseRows(
            np.arange(n * rank + 1) * keep, indices, np.ascontiguousarray(values[:, ::2]).reshape(-1), d
        )
    else:
        rows = DenseRows(values)
    path = fishers_of(rows, offsets).save(tmp_path / "f.h5")
    del values, rows
    script = f"""
        import npeff, resource, numpy as np
        fishers = npeff.load({str(path)!r})
        tiny = fishers[:20]
        npeff.decompose(tiny, 2, progress=False, n_init=1, n_replacements=0)
        def reset():
            with open("/proc/self/clear_refs", "w") as file: file.write("5")
        def peak():
            return next(int(l.split()[1]) * 1024 for l in open("/proc/self/status") if l.startswith("VmHWM"))
        reset()
        before = peak()
        c = npeff.decompose(fishers, 8, memory="100MB", progress=False, n_init=1, n_replacements=1, max_iterations=2)
        assert c.provenance["course"]["space"] == "streamed", c.provenance["course"]
        print(peak() - before)
    """
    run = [sys.executable, "-c", textwrap.dedent(script)]
    done = subprocess.run(run, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 110 * 10**6
