"""npeff.distributed.decompose: several processes find the components of one, and exchange what the formula says."""

from __future__ import annotations

import os
import signal

import numpy as np
import pytest
import torch

import npeff
from npeff.decomposition import processes
from npeff.decomposition.problem import block_edges
from planted import fishers_of, planted, sparse
from processes import all_returned, run

SLOW = pytest.mark.slow


def stored(kind: str, path) -> str:
    """Fishers with known components, in a file."""
    if kind == "diagonal":
        rng = np.random.default_rng(3)
        H, W = rng.random((4, 30)) * (rng.random((4, 30)) < 0.4), rng.random((41, 4)) * (rng.random((41, 4)) < 0.5)
        values = (W @ H + 0.01 * rng.random((41, 30))).astype(np.float32)
        fishers = fishers_of(sparse(values * (values > 0.02)), np.arange(42), "diagonal")
    else:
        fishers, _, _ = planted(41, 5, 30, 0.1, seed=2)
        if kind == "sparse":
            values = fishers.rows.values * (np.abs(fishers.rows.values) > 0.03)
            fishers = fishers_of(sparse(values), fishers.row_offsets)
    fishers.save(path)
    return str(path)


def decomposed(rank: int, path: str, out: str, options: dict) -> tuple[int, int] | None:
    components = npeff.distributed.decompose(npeff.load(path), progress=False, **options)
    if components is None:
        return None
    components.save(out)
    return components.coefficients.shape


FORMS = {
    "dense": {"n_components": 5, "space": "rows"},
    "sparse": {"n_components": 5, "space": "rows"},
    "streamed": {"n_components": 5, "space": "streamed"},
    "diagonal": {"n_components": 4},
    "penalty": {"n_components": 5, "space": "rows", "orthogonality": 0.01},
    "hard": {"n_components": 5, "space": "rows", "orthogonality": "hard"},
    "balanced": {"n_components": 5, "space": "rows", "block_weights": "balanced"},
}


@pytest.mark.parametrize(
    ("case", "size"),
    [(case, 2) for case in ("dense", "diagonal")]
    + [pytest.param(case, 2, marks=SLOW) for case in FORMS if case not in ("dense", "diagonal")]
    + [("sparse", 4)]
    + [pytest.param(case, 4, marks=SLOW) for case in FORMS if case != "sparse"],
)
def test_components_are_those_of_one_process(tmp_path, case, size):
    kind = case if case in ("sparse", "diagonal") else "dense"
    path = stored(kind, tmp_path / "f.h5")
    options = {**FORMS[case], "dtype": "float64", "n_init": 1, "n_replacements": 1, "max_iterations": 80, "seed": 1}
    one = npeff.decompose(npeff.load(path), progress=False, **options)
    shapes = all_returned(size, decomposed, path, str(tmp_path / "c.h5"), options)
    assert shapes == [one.coefficients.shape] + [None] * (size - 1)
    many = npeff.load(tmp_path / "c.h5")
    assert many.loss == pytest.approx(one.loss, rel=1e-5)
    common = min(len(many.loss_curve), len(one.loss_curve))  # the last steps move within rounding
    np.testing.assert_allclose(many.loss_curve[:common], one.loss_curve[:common], rtol=1e-5)
    order = np.abs(many.vectors @ one.vectors.T).argmax(0)
    cosines = np.abs((many.vectors[order] * one.vectors).sum(1))
    assert cosines.min() > 1 - 1e-5
    np.testing.assert_allclose(many.coefficients[:, order], one.coefficients, atol=1e-5)
    assert np.array_equal(many.ids, one.ids)
    assert np.array_equal(many.labels, one.labels)


def differing(rank: int, paths: list[str], options: list[dict]) -> object:
    return npeff.distributed.decompose(npeff.load(paths[rank]), progress=False, **options[rank])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"seed": 1}, "ArgumentError: seed: rank 1 was given 1, and rank 0 0"),
        ({"n_components": 4}, "ArgumentError: n_components: rank 1 was given 4, and rank 0 3"),
        ({}, "DataError: fishers: rank 1 has other Fishers than rank 0"),
    ],
)
def test_processes_that_differ_are_named(tmp_path, change, words):
    """Each would go on by its own numbers, and the sums over all of them would mean nothing."""
    paths = [stored("dense", tmp_path / "f.h5")] * 2
    if not change:
        paths[1] = str(tmp_path / "g.h5")
        npeff.load(paths[0])[::-1].save(paths[1])
    options = {"n_components": 3, "n_init": 1, "n_replacements": 0, "max_iterations": 5}
    for how, said in run(2, differing, paths, [options, options | change]):
        assert how == "raised" and words in said


# ---- what is exchanged, and what survives ------------------------------------------------------------------


def traffic(rank: int, path: str, r: int) -> list[int]:
    """Numbers exchanged by each of three steps."""
    from npeff.decomposition.options import DecomposeOptions
    from npeff.decomposition.problem import prepare

    group = npeff.distributed.connect()
    objective = prepare(npeff.load(path), DecomposeOptions(r), group).objective
    state = objective.start(r, torch.Generator().manual_seed(0))
    counts = []
    for _ in range(3):
        before = group.numbers_summed
        state = objective.step(state)
        counts.append(group.numbers_summed - before)
    return counts


@pytest.mark.parametrize(("kind", "scalars"), [("dense", 4), ("diagonal", 2)])
def test_a_step_exchanges_r_times_d_plus_r_numbers(tmp_path, kind, scalars):
    path = stored(kind, tmp_path / "f.h5")
    d = npeff.load(path).rows.n_columns
    if kind == "diagonal":
        d = len(np.unique(npeff.load(path).rows.indices))
    for r in (3, 5):
        numbers = r * (d + r) + scalars
        taken_back = (
            2 * numbers if kind == "diagonal" else numbers
        )  # an extrapolated step, and a plain one in its place
        for counts in all_returned(2, traffic, path, r):
            assert set(counts) <= {numbers, taken_back}


def dies_at(rank: int, path: str, checkpoint: str, victim: int, iteration: int, options: dict) -> bool:
    from npeff.decomposition import kinds

    step, count = kinds.LowRank.step, 0

    def counted(self, state):
        nonlocal count
        count += 1
        if rank == victim and count == iteration:
            os.kill(os.getpid(), signal.SIGKILL)
        return step(self, state)

    kinds.LowRank.step = counted
    found = npeff.distributed.decompose(npeff.load(path), checkpoint=checkpoint, progress=False, **options)
    return found is not None


def resumed(rank: int, path: str, out: str, checkpoint: str, options: dict) -> int:
    """Iterations that were left to do."""
    seen = []
    components = npeff.distributed.decompose(
        npeff.load(path), checkpoint=checkpoint, callback=seen.append, progress=False, **options
    )
    if components is not None:
        components.save(out)
    return seen[0].iteration if seen else 0


def test_killed_search_names_the_worker_and_resumes_with_any_number_of_processes(tmp_path):
    path, checkpoint = stored("dense", tmp_path / "f.h5"), tmp_path / "c.search"
    options = {"n_components": 5, "space": "rows", "dtype": "float64", "n_replacements": 6}
    one = npeff.decompose(npeff.load(path), progress=False, **options)
    results = run(3, dies_at, path, str(checkpoint), 1, 60, options)
    assert results[1] == ("killed", None)
    assert all("rank 1 (process" in message and "resumes" in message for _, message in (results[0], results[2]))
    assert checkpoint.exists()
    iterations = all_returned(2, resumed, path, str(tmp_path / "c.h5"), str(checkpoint), options)
    assert iterations[0] > 10, "it did not begin anew"
    assert iterations[1] == 0, "callbacks are called in process 0"
    assert npeff.load(tmp_path / "c.h5").loss == pytest.approx(one.loss, rel=1e-5)
    again = all_returned(2, resumed, path, str(tmp_path / "c.h5"), str(checkpoint), options)
    assert again == [0, 0], "the finished search is in the file"
    results = run(2, resumed, path, str(tmp_path / "c.h5"), str(checkpoint), {**options, "space": "gram"})
    assert all("gram" in message for _, message in results)


def test_random_numbers_do_not_depend_on_the_number_of_processes(monkeypatch):
    monkeypatch.setattr(processes, "CHUNK", 64)
    whole_normal = torch.randn(7, 61, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    pieces = []
    for first, count in ((0, 20), (20, 1), (21, 40)):
        pieces.append(processes.normal_columns(7, first, count, 61, torch.Generator().manual_seed(4)))
    assert torch.equal(torch.cat(pieces, 1), whole_normal)


def test_blocks_are_even_and_never_empty():
    fishers, _, _ = planted(50, 3, 8, 0.1, seed=0)
    assert block_edges(fishers, 4) == [0, 13, 25, 38, 50]
    assert block_edges(fishers[:4], 4) == [0, 1, 2, 3, 4]
    lopsided = fishers[:6]
    lopsided.row_offsets[:] = [0, 0, 0, 0, 0, 0, 24]
    assert np.diff(block_edges(lopsided, 4)).min() >= 1
    with pytest.raises(npeff.ArgumentError, match="cannot share"):
        block_edges(fishers[:3], 4)
