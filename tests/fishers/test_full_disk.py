"""Real file systems that are full, of bytes or of files: every writer says which, and leaves nothing half."""

from __future__ import annotations

import os
import resource
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

import npeff
from npeff.cli import run
from npeff.errors import StorageError
from npeff.reports import collage, latex
from planted import planted
from processes import all_returned

SOURCE = """
import torch

def model():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 24), torch.nn.ReLU(), torch.nn.Linear(24, 4)).eval()

def data():
    return [(torch.rand(20, 1, 8, 8, generator=torch.Generator().manual_seed(i)), torch.arange(20) % 4) for i in range(3)]
"""  # noqa: E501


def mounted(folder: Path, options: str) -> Iterator[Path]:
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "npeff-test", str(folder)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        pytest.skip(f"cannot mount a small file system here: {done.stderr.strip() or done.returncode}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=False)


@pytest.fixture
def small(tmp_path) -> Iterator[Path]:
    """A file system of eight megabytes."""
    yield from mounted(tmp_path / "small", "size=8m")


@pytest.fixture
def few(tmp_path) -> Iterator[Path]:
    """A file system that holds 12 files."""
    yield from mounted(tmp_path / "few", "size=64m,nr_inodes=12")


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    (folder / "work.py").write_text(SOURCE)
    before = os.getcwd()
    os.chdir(folder)
    try:
        assert run(["fishers", "work.py:model", "work.py:data", "--exact", "--out", "f.h5", "--quiet"]) == 0
        search = ["--n-components", "4", "--n-replacements", "0"]
        assert run(["decompose", "f.h5", *search, "--out", "c.h5", "--quiet"]) == 0
    finally:
        os.chdir(before)
    return folder


def compute(made: Path, out: Path) -> None:
    torch.manual_seed(0)
    layers = torch.nn.Flatten(), torch.nn.Linear(64, 24), torch.nn.ReLU(), torch.nn.Linear(24, 4)
    batches = [(torch.rand(20, 1, 8, 8, generator=torch.Generator().manual_seed(i)), torch.arange(20) % 4)
               for i in range(3)]  # fmt: skip
    npeff.compute_fishers(torch.nn.Sequential(*layers).eval(), batches, out=out / "f.h5", progress=False)


def search(made: Path, out: Path) -> None:
    fishers, _, _ = planted(400, 8, 40, 0.1, seed=0)
    npeff.decompose(
        fishers, 64, n_init=2, n_replacements=0, max_iterations=2, checkpoint=out / "c.search", progress=False
    )


def pictures(made: Path) -> torch.Tensor:
    return torch.cat([torch.rand(20, 1, 8, 8, generator=torch.Generator().manual_seed(i)) for i in range(3)])


def written_by_cli(*arguments: str):
    def write(made: Path, out: Path) -> None:
        before = os.getcwd()
        os.chdir(made)
        try:
            code = run([argument.replace("OUT", str(out)) for argument in arguments] + ["--debug"])
            assert code == 0
        finally:
            os.chdir(before)

    return write


WRITERS = {
    "fishers": compute,
    "checkpoint": search,
    "save": lambda made, out: npeff.load(made / "f.h5").save(out / "f.h5"),
    "components": lambda made, out: npeff.load(made / "c.h5").save(out / "c.h5"),
    "report": lambda made, out: npeff.report(npeff.load(made / "c.h5"), pictures(made), out / "report", progress=False),
    "page": lambda made, out: npeff.report(npeff.load(made / "c.h5"), pictures(made), out / "r.html", progress=False),
    "collage": lambda made, out: collage(npeff.load(made / "c.h5"), [pictures(made)], 0, out / "c.png"),
    "latex": lambda made, out: latex(npeff.load(made / "c.h5"), [pictures(made)], out / "c.tex"),
    "encode h5": written_by_cli("encode", "c.h5", "f.h5", "--out", "OUT/e.h5"),
    "encode npz": written_by_cli("encode", "c.h5", "f.h5", "--out", "OUT/e.npz"),
    "encode csv": written_by_cli("encode", "c.h5", "f.h5", "--out", "OUT/e.csv"),
    "export": written_by_cli("export", "c.h5", "--component", "0", "--out", "OUT/g.safetensors"),
    "published": written_by_cli("export", "f.h5", "--layout", "published", "--out", "OUT/p.h5"),
    "influence": written_by_cli(
        "influence", "work.py:model", "work.py:data", "work.py:data", "--solver", "identity", "--out", "OUT/i.h5",
        "--quiet",
    ),
}  # fmt: skip


def fill_up(filler: Path) -> None:
    """Write a file that leaves a page or none."""
    with filler.open("wb", buffering=0) as file, pytest.raises(OSError, match="No space"):
        while True:
            file.write(b"\0" * 4096)


def left_in(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.mark.parametrize("writer", WRITERS)
def test_no_bytes_left(made, small, writer):
    filler = small / "filler"
    fill_up(filler)
    before = left_in(small)
    with pytest.raises(StorageError, match=r"the disk is full \(.*bytes free"):
        WRITERS[writer](made, small)
    assert left_in(small) == before, "nothing half is left"
    filler.unlink()
    WRITERS[writer](made, small)


@pytest.mark.parametrize("writer", WRITERS)
def test_no_files_left(made, few, writer):
    while os.statvfs(few).f_favail:
        (few / f"filler-{os.statvfs(few).f_favail}").touch()
    before = left_in(few)
    with pytest.raises(StorageError, match=r"can hold no more files .*no inodes are left") as told:
        WRITERS[writer](made, few)
    assert "disk is full" not in str(told.value)
    assert left_in(few) == before


def test_a_checkpoint_that_does_not_fit_leaves_the_one_before(made, small):
    fishers, _, _ = planted(400, 8, 40, 0.1, seed=0)
    options = {"n_init": 4, "n_replacements": 0, "max_iterations": 2, "progress": False}
    options["checkpoint"] = small / "c.search"
    saved = []

    def fill(progress: npeff.Progress) -> None:
        if progress.unit == 2 and not saved:
            saved.append((small / "c.search").read_bytes())
            fill_up(small / "filler")

    with pytest.raises(StorageError, match=r"disk is full .*state that was saved there before is kept"):
        npeff.decompose(fishers, 64, callback=fill, **options)
    assert sorted(os.listdir(small)) == ["c.search", "filler"]
    assert (small / "c.search").read_bytes() == saved[0]
    (small / "filler").unlink()
    resumed = npeff.decompose(fishers, 64, **options)
    whole = npeff.decompose(fishers, 64, **{**options, "checkpoint": None})
    assert np.array_equal(resumed.coefficients, whole.coefficients)


def save_with_too_many_open_files(rank: int, components: Path, out: Path) -> str:
    loaded = npeff.load(components)
    loaded.save(out).unlink()
    held = [os.open(os.devnull, os.O_RDONLY)]
    resource.setrlimit(resource.RLIMIT_NOFILE, (held[0] + 20, held[0] + 20))
    with pytest.raises(OSError, match="Too many open files"):
        while True:
            held.append(os.open(os.devnull, os.O_RDONLY))
    os.close(held.pop())
    with pytest.raises(StorageError) as caught:
        loaded.save(out)
    for file in held:
        os.close(file)
    return str(caught.value)


def test_too_many_open_files(made, tmp_path):
    """The limit of open files is told as such."""
    (said,) = all_returned(1, save_with_too_many_open_files, made / "c.h5", tmp_path / "c.h5")
    assert "too many files are open" in said
    assert not os.listdir(tmp_path)
