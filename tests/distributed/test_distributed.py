"""npeff.distributed.compute_fishers: several processes make the very file of one, and survive each other."""

from __future__ import annotations

import os
import signal

import numpy as np
import pytest
import torch
from torch import nn

import npeff
from npeff.decomposition.processes import LOCAL
from npeff.distributed import merge_shares, share_path
from processes import all_returned, run

SLOW = pytest.mark.slow
PARTS = [5, 5, 3, 5, 1, 5, 2]
"""Batch sizes: seven batches, so that shares differ in length."""


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).eval()


def batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(n, 6, generator=generator), torch.randint(3, (n,), generator=generator)) for n in PARTS]


class Killing:
    """Batches of which one process does not survive the k-th."""

    def __init__(self, rank: int, victim: int, at: int, how: int) -> None:
        self.rank, self.victim, self.at, self.how = rank, victim, at, how

    def __iter__(self):
        for number, batch in enumerate(batches()):
            if self.rank == self.victim and number == self.at:
                os.kill(os.getpid(), self.how)
            yield batch


def compute(rank: int, out: str, options: dict) -> int:
    return len(npeff.distributed.compute_fishers(network(), batches(), out=out, progress=False, **options))


def compute_killed(rank: int, out: str, victim: int, at: int, how: int) -> int:
    data = Killing(rank, victim, at, how)
    return len(npeff.distributed.compute_fishers(network(), data, out=out, progress=False))


def compute_different(rank: int, out: str, what: str) -> int:
    data = batches()
    if what == "order" and rank == 1:
        data.reverse()
    if what == "end" and rank == 1:
        data[-1][0].add_(1)
    model = network(rank if what == "model" else 0)
    return len(npeff.distributed.compute_fishers(model, data, out=out, progress=False))


CASES = {
    "top-k": {"compress": npeff.TopK(20)},
    "exact": {},
    "sketch": {"compress": npeff.Sketch(16)},
    "draws": {"labels": "sampled", "n_samples": 2, "seed": 3},
    "ragged": {"energy": 0.7},
    "diagonal": {"kind": "diagonal", "compress": npeff.TopK(9)},
    "cut": {"max_examples": 17},
}


@pytest.mark.parametrize(
    ("case", "size"),
    [(case, 2) for case in CASES] + [pytest.param(case, 4, marks=SLOW if case != "top-k" else ()) for case in CASES],
)
def test_the_file_is_that_of_one_process(tmp_path, case, size):
    one, many = tmp_path / "one.h5", tmp_path / "many.h5"
    npeff.compute_fishers(network(), batches(), out=one, progress=False, **CASES[case])
    lengths = all_returned(size, compute, str(many), CASES[case])
    assert lengths == [len(npeff.load(one))] * size
    assert many.read_bytes() == one.read_bytes()
    assert sorted(os.listdir(tmp_path)) == ["many.h5", "one.h5"], "shares are removed"


def test_more_processes_than_batches(tmp_path):
    one, many = tmp_path / "one.h5", tmp_path / "many.h5"
    npeff.compute_fishers(network(), batches(), out=one, max_examples=8, progress=False)
    all_returned(4, compute, str(many), {"max_examples": 8})
    assert many.read_bytes() == one.read_bytes()


@pytest.mark.parametrize(
    ("victim", "how", "word"),
    [
        (2, signal.SIGKILL, "ended before"),
        (0, signal.SIGTERM, "told to end"),
        pytest.param(0, signal.SIGKILL, "ended before", marks=SLOW),
    ],
)
def test_killed_worker_is_named_and_the_same_call_resumes(tmp_path, victim, how, word):
    one, many = tmp_path / "one.h5", tmp_path / "many.h5"
    npeff.compute_fishers(network(), batches(), out=one, progress=False)
    results = run(3, compute_killed, str(many), victim, 4, how)
    others = [message for rank, (_, message) in enumerate(results) if rank != victim]
    assert all(f"rank {victim}" in message and "resumes" in message for message in others), results
    assert any(word in str(message) for _, message in results), results
    assert not many.exists()
    assert any(path.name.startswith("many.h5.") for path in tmp_path.iterdir()), "work is kept"
    all_returned(3, compute, str(many), {})
    assert many.read_bytes() == one.read_bytes()
    assert sorted(os.listdir(tmp_path)) == ["many.h5", "one.h5"]


def test_a_finished_file_is_checked_and_kept(tmp_path):
    out = tmp_path / "f.h5"
    all_returned(2, compute, str(out), {})
    before = out.stat().st_mtime_ns
    assert all_returned(2, compute, str(out), {}) == [26, 26]
    assert out.stat().st_mtime_ns == before
    results = run(2, compute, str(out), {"energy": 0.5})
    assert all(how == "raised" for how, _ in results)
    assert "ResumeError" in results[0][1]


@pytest.mark.parametrize(
    ("what", "words"),
    [("order", "rank 1 sees other batches"), ("end", "rank 1 sees other"), ("model", "rank 1 has other")],
)
def test_processes_must_see_the_same(tmp_path, what, words):
    results = run(2, compute_different, str(tmp_path / "f.h5"), what)
    assert all(how == "raised" and words in message for how, message in results), results


def test_another_number_of_processes_is_refused(tmp_path):
    out = tmp_path / "f.h5"
    run(3, compute_killed, str(out), 1, 4, signal.SIGKILL)
    results = run(2, compute, str(out), {})
    assert all("unfinished work of 3 processes" in message for _, message in results), results


def test_an_error_in_one_process_ends_all_of_them(tmp_path):
    results = run(2, compute, str(tmp_path / "f.h5"), {"compress": npeff.TopK(5), "rank": 7, "basis": "class"})
    assert all(how == "raised" and "rank" in message for how, message in results)


def test_shares_must_make_a_whole(tmp_path):
    out = tmp_path / "f.h5"
    for k in (0, 2):
        path = share_path(out, (k, 3))
        npeff.compute_fishers(network(), batches()[:3], out=path, share=(k, 3), progress=False)
    with pytest.raises(npeff.StorageError, match="do not make a whole"):
        merge_shares(out, 3)
    npeff.compute_fishers(network(5), batches()[:3], out=share_path(out, (1, 3)), share=(1, 3), progress=False)
    with pytest.raises(npeff.ResumeError, match="model_digest"):
        merge_shares(out, 3)


def test_a_share_keeps_the_ids_and_draws_of_the_whole():
    options = {"labels": "sampled", "n_samples": 3, "progress": False}
    whole = npeff.compute_fishers(network(), batches(), **options)
    share = npeff.compute_fishers(network(), batches(), share=(1, 3), **options)
    assert share.ids.tolist() == [*range(5, 10), 18]
    for i, example in enumerate(share.ids):
        assert np.array_equal(share.dense(i), whole.dense(int(example)))
    with pytest.raises(npeff.ArgumentError, match="share"):
        npeff.compute_fishers(network(), batches(), share=(3, 3), **options)


def test_one_process_needs_no_group(tmp_path, monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert npeff.distributed.connect() is LOCAL
    assert len(npeff.distributed.compute_fishers(network(), batches(), out=tmp_path / "f.h5", progress=False)) == 26
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(npeff.ArgumentError, match="MASTER_ADDR"):
        npeff.distributed.connect()
