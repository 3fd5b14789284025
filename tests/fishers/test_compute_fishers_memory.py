"""Memory, pieces and files of compute_fishers: what is held at once, and work that resumes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import npeff
from npeff.errors import ArgumentError, DataError, ResumeError
from npeff.fishers.computation import compute_fishers
from npeff.fishers.options import TopK
from small_network import N, Y, fishers_of, model, x

__all__ = ["model", "x"]  # fixtures


class Largest(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, Tensor) and tensor.is_floating_point():
                self.numel = max(self.numel, tensor.untyped_storage().nbytes() // tensor.element_size())
        return result


@pytest.mark.parametrize("kind", ["low_rank", "diagonal"])
def test_no_tensor_holds_all_examples_rows_and_parameters(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import npeff.gradients.blocks as blocks

    monkeypatch.setattr(blocks, "TILE_ELEMENTS", 4096)
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Embedding(200, 16),
        nn.Linear(16, 64),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(4 * 64, 32),
        nn.Linear(32, 5),
    )
    m, batch, rank = sum(p.numel() for p in model.parameters()), 16, 4
    with Largest() as seen:
        fishers_of(model, [torch.randint(0, 200, (batch, 4))], kind=kind, compress=TopK(100))
    assert seen.numel <= max(p.numel() for p in model.parameters()) * 1.01
    assert seen.numel * 20 < batch * rank * m


def test_blocks_and_pieces_do_not_change_the_result(
    model: nn.Module, x: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    from npeff.fishers import passes
    from npeff.gradients import blocks

    whole = fishers_of(model, [(x, Y)], compress=TopK(60))
    monkeypatch.setattr(blocks, "TILE_ELEMENTS", 64)
    monkeypatch.setattr(passes, "KEPT_BYTES", 3000)
    pieces = fishers_of(model, [(x, Y)], compress=TopK(60))
    for i in range(N):
        np.testing.assert_allclose(pieces.dense(i), whole.dense(i), atol=2e-6)
    np.testing.assert_allclose(pieces.norms, whole.norms, rtol=1e-5)
    assert pieces.ids.tolist() == list(range(N))


@pytest.mark.parametrize(("memory", "most"), [(1_000, 1), (5_000, N - 1), ("1MB", N)])
def test_batches_are_cut_to_a_memory(model: nn.Module, x: Tensor, memory: int | str, most: int, tmp_path: Path) -> None:
    whole = fishers_of(model, [(x, Y)], compress=TopK(60))
    sizes: list[int] = []

    def note(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if torch.is_grad_enabled():  # what is kept for backward passes
            sizes.append(len(inputs[0]))

    hook = model.register_forward_pre_hook(note)
    cut = fishers_of(model, [(x, Y)], compress=TopK(60), memory=memory, out=tmp_path / "cut.h5")
    assert sizes[0] == 2  # the trial
    assert max(sizes[1:]) <= most
    assert (max(sizes) == N) == (most == N)
    for i in range(N):
        np.testing.assert_allclose(cut.dense(i), whole.dense(i), atol=2e-6)
    assert cut.ids.tolist() == list(range(N))
    again = fishers_of(model, [(x, Y)], compress=TopK(60), out=tmp_path / "cut.h5")  # memory does not enter the result
    np.testing.assert_array_equal(again.rows.values, cut.rows.values)
    hook.remove()
    with pytest.raises(ArgumentError, match="memory"):
        fishers_of(model, [(x, Y)], memory="much")


def test_work_resumes_where_it_stopped(model: nn.Module, x: Tensor, tmp_path: Path) -> None:
    batches = [(x[i : i + 3], Y[i : i + 3]) for i in range(0, N, 3)]
    bad = [*batches[:2], (batches[2][0] * float("inf"), batches[2][1])]
    wanted = fishers_of(model, batches, compress=TopK(40), out=tmp_path / "whole.h5")
    with pytest.raises(DataError, match="example 6"):
        fishers_of(model, bad, compress=TopK(40), out=tmp_path / "stopped.h5")
    with pytest.raises(ResumeError):
        fishers_of(model, batches, compress=TopK(41), out=tmp_path / "stopped.h5")
    got = fishers_of(model, batches, compress=TopK(40), out=tmp_path / "stopped.h5")
    assert (tmp_path / "whole.h5").read_bytes() == (tmp_path / "stopped.h5").read_bytes()
    np.testing.assert_array_equal(got.rows.values, wanted.rows.values)
    assert got.provenance["model_digest"] == wanted.provenance["model_digest"]


def test_progress_goes_to_stderr_and_can_be_silenced(
    model: nn.Module, x: Tensor, capsys: pytest.CaptureFixture[str]
) -> None:
    compute_fishers(model, x.split(3))
    shown = capsys.readouterr()
    assert "3/3" in shown.err
    assert not shown.out
    compute_fishers(model, x.split(3), progress=False)
    silent = capsys.readouterr()
    assert not silent.err
    assert not silent.out


@pytest.mark.parametrize("options", [{"compress": npeff.GramOnly()}, {"energy": 0.9}, {"basis": "class"}])
def test_cotangents_of_pieces_are_those_of_the_batch(options: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from npeff.fishers import passes

    torch.manual_seed(0)
    model, x = nn.Linear(4, 70), 3 * torch.randn(7, 4)
    whole, mean = fishers_of(model, [x], **options), npeff.mean_fisher(model, [x], progress=False)
    monkeypatch.setattr(passes, "KEPT_BYTES", 400_000)
    pieces, summed = fishers_of(model, [x], **options), npeff.mean_fisher(model, [x], progress=False)
    n = whole.rows.n_rows
    np.testing.assert_allclose(whole.rows.gram(0, n), pieces.rows.gram(0, n), atol=1e-4)
    np.testing.assert_allclose(whole.norms, pieces.norms, rtol=1e-5)
    for name, one in mean.items():
        np.testing.assert_allclose(one, summed[name], rtol=1e-5, atol=1e-9)


MANY_CLASSES = """
import torch
from torch import nn
import npeff

def norms(model, x, memory, **options):
    made = npeff.compute_fishers(model, [x], kind="diagonal", progress=False, memory=memory, **options)
    (peak,) = (line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))
    print(int(peak) / 1024, float(made.norms.sum()))

torch.manual_seed(0)
torch.set_num_threads(1)
ways = ({"basis": "class", "min_prob": 1e-9}, {"energy": 0.9})
small, large = (nn.Linear(4, 90), torch.randn(2, 4)), (nn.Linear(4, 600), torch.randn(24, 4))
for memory, case in (("30MB", small), ("30MB", large), ("4GB", large)):
    for way in ways:
        norms(*case, memory, **way)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak memory of a process from /proc")
def test_cotangents_of_many_classes_stay_within_the_memory() -> None:
    """Of a whole batch they are up to 24 · 600² · 8 bytes = 69 MB, and several copies while they are made."""
    command = [sys.executable, "-W", "ignore", "-c", MANY_CLASSES]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    peaks, norms = zip(*(map(float, line.split()) for line in lines), strict=True)
    assert peaks[3] - peaks[1] < 45
    assert peaks[5] - peaks[1] > 90
    assert norms[2:4] == pytest.approx(norms[4:6], rel=1e-6)
