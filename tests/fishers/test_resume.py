"""kill -9 at any moment: the same command resumes, and the final file is equal to an uninterrupted one.

A forked process forks one child per attempt, so that Python and torch are imported once.
"""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import torch

from npeff.components.loading import describe
from npeff.fishers.computation import compute_fishers
from npeff.fishers.shards import FisherWriter
from processes import all_returned
from stored_samples import blocks_of, fishers_of, header_of


def write_with_writer(out: Path, n_batches: int = 12, pause: float = 0.004) -> None:
    """Batches with little sleeps, in shards of one or two."""
    fishers = fishers_of(ranks=(2, 1, 3) * n_batches)
    with FisherWriter(out, header_of(fishers), shard_bytes=200) as writer:
        for index, block in enumerate(blocks_of(fishers, 3)):
            if not writer.skip(f"batch {index}", 3):
                time.sleep(pause)
                writer.append(block, f"batch {index}")
        writer.finish(fishers.coverage)


def write_with_model(out: Path | None) -> None:
    """compute_fishers of a tiny model, twelve batches, a shard each."""
    defaults = FisherWriter.__init__.__kwdefaults__
    assert defaults is not None
    defaults["shard_bytes"] = 1  # in this process alone
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3)).eval()
    inputs, labels = torch.randn(48, 6), torch.arange(48) % 3
    data = list(zip(inputs.split(4), labels.split(4), strict=True))
    compute_fishers(model, data, compress=None, out=out, progress=False)


COMMANDS = {
    "writer": write_with_writer,
    "short": lambda out: write_with_writer(out, 2, 0),
    "model": write_with_model,
}
STEPS = (
    "replace",
    "fsync",
    "unlink",
    "mkdir",
    "rmdir",
    "ftruncate",
)  # every way in which the disk comes to change


def child(command: str, out: Path, kill_after: float | None = None, step: int | None = None) -> tuple[int, float]:
    """Run the command in a forked child; kill it after some time, or at its step-th change of the disk.

    An even ``step`` kills before change step/2, an odd one after it. Returns the exit status and the seconds
    it took.
    """
    start = time.monotonic()
    pid = os.fork()
    if pid == 0:
        try:
            if step is not None:
                die_at(step)
            COMMANDS[command](out)
            os._exit(0)
        except BaseException:
            import traceback

            traceback.print_exc()
            os._exit(1)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    return status, time.monotonic() - start


def die_at(step: int) -> None:
    count = -1

    def wrap(function):
        def wrapped(*args, **kwargs):
            nonlocal count
            count += 1
            if count == step // 2 and step % 2 == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            result = function(*args, **kwargs)
            if count == step // 2:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return wrapped

    for name in STEPS:
        setattr(os, name, wrap(getattr(os, name)))


def examples_on_disk(out: Path) -> int:
    return describe(out)["n_examples"] if out.exists() or Path(f"{out}.parts").exists() else 0


def trial(rank: int, command: str, folder: Path, kills: int, every_step: bool) -> dict:
    """Kill, resume, compare; return what happened."""
    if command == "model":
        write_with_model(None)  # warmed up before forking
    whole = folder / "whole.h5"
    seconds = []
    for _ in range(3):
        whole.unlink(missing_ok=True)
        seconds.append(child(command, whole)[1])
    expected = whole.read_bytes()
    chance = random.Random(20260)
    report = {"seconds": min(seconds), "killed": 0, "finished_before": 0, "resumed_with": [], "steps": 0}

    def attempt(name: str, **how) -> bool:
        out = folder / name / "f.h5"
        out.parent.mkdir()
        status, _ = child(command, out, **how)
        killed = os.WIFSIGNALED(status)
        report["killed" if killed else "finished_before"] += 1
        report["resumed_with"].append(examples_on_disk(out))
        status, _ = child(command, out)
        assert status == 0, f"{how}: resuming failed"
        assert out.read_bytes() == expected, f"{how}: the resumed file differs"
        assert os.listdir(out.parent) == ["f.h5"], f"{how}: left {os.listdir(out.parent)}"
        return killed

    latest, tries = min(seconds), 0
    while report["killed"] < kills and tries < 6 * kills:
        if not attempt(f"time {tries}", kill_after=chance.uniform(0, latest)):
            latest *= 0.9  # it finished first: the machine is quicker now than when it was measured
        tries += 1
    while every_step and attempt(f"step {report['steps']}", step=report["steps"]):
        report["steps"] += 1
    return report


def run(command: str, folder: Path, kills: int, every_step: bool) -> dict:
    (report,) = all_returned(1, trial, command, folder, kills, every_step)
    return report


def test_killed_at_random_moments(tmp_path):
    report = run("writer", tmp_path, 8, every_step=False)
    assert report["killed"] == 8
    assert len(set(report["resumed_with"])) >= 3, "the moments should fall into different shards"


def test_killed_before_and_after_every_change_of_the_disk(tmp_path):
    report = run("short", tmp_path, 0, every_step=True)
    assert report["steps"] > 30
    assert report["finished_before"] == 1  # the step after the last one


def test_compute_fishers_killed_at_random_moments(tmp_path):
    report = run("model", tmp_path, 10, every_step=False)
    assert report["killed"] == 10
    assert len(set(report["resumed_with"])) >= 4
