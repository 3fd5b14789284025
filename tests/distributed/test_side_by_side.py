"""Processes that write the same thing at once, links planted in their way, and signals: nothing is mixed or lost."""

from __future__ import annotations

import json
import os
import re
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import npeff
from npeff.cli import run as npeff_command
from npeff.demo import _prepare
from npeff.errors import StorageError, Terminated
from npeff.reports import collage, latex
from npeff.reports.writer import MARKER
from npeff.storage.files import atomic, ending_in_order
from planted import planted
from processes import run

FISHERS, _, _ = planted(40, 3, 30, 0.1, seed=0)


def decomposed(seed: int = 0) -> npeff.Components:
    return npeff.decompose(FISHERS, 3, seed=seed, n_init=1, n_replacements=0, max_iterations=5, progress=False)


def pictures() -> torch.Tensor:
    return torch.rand(40, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def together(at: float) -> None:
    time.sleep(max(0.0, at - time.time()))


# ---- two at once -------------------------------------------------------------------------------------------


def report_often(rank: int, folder: str, at: float, times: int) -> None:
    components = decomposed()
    together(at)
    for k in range(times):
        npeff.report(components, pictures(), folder, title=f"Report {rank} {k}", progress=False)


def check_folder(folder: Path) -> None:
    """The page's own folder of parts is there, whole, and there is no other one."""
    text = (folder / "index.html").read_text(encoding="utf-8")
    (named,) = set(re.findall(r'"parts":"(data-\d+)"', text)) or {None}
    assert named is not None, "the page names its folder"
    names = (folder / named / MARKER).read_text(encoding="utf-8").splitlines()[1:]
    assert names and all((folder / named / name).is_file() for name in names)
    for address in re.findall(r'src="(data-[^"]+)"', text):
        assert (folder / address).is_file()


def test_reports_into_one_folder_at_once(tmp_path):
    (tmp_path / "report" / "data-7").mkdir(parents=True)
    (tmp_path / "report" / "data-7" / "mine.txt").write_text("mine")
    results = run(3, report_often, str(tmp_path / "report"), time.time() + 0.5, 2)
    assert [how for how, _ in results] == ["returned"] * 3, results
    check_folder(tmp_path / "report")
    npeff.report(decomposed(), None, tmp_path / "report", progress=False)
    assert (tmp_path / "report" / "data-7" / "mine.txt").read_text() == "mine"
    folders = {path.name for path in (tmp_path / "report").glob("data-*")} - {"data-7"}
    assert len(folders) == 1, "what earlier reports left is removed"


def report_killed(rank: int, folder: str) -> None:
    from npeff.reports.writer import ReportWriter

    def die(*_):
        os.kill(os.getpid(), signal.SIGKILL)

    ReportWriter.publish = die  # parts are written, the page is not
    npeff.report(decomposed(), pictures(), folder, progress=False)


def test_what_a_killed_report_leaves_is_removed_and_what_people_put_there_stays(tmp_path):
    assert run(1, report_killed, str(tmp_path))[0] == ("killed", None)
    (left,) = tmp_path.glob("data-*")
    (left / "notes.txt").write_text("mine")
    npeff.report(decomposed(), pictures(), tmp_path, progress=False)
    check_folder(tmp_path)
    assert os.listdir(left) == ["notes.txt"]


def documents_often(rank: int, folder: str, at: float, times: int) -> None:
    components = decomposed(rank)
    together(at)
    for k in range(times):
        latex(components, [pictures()], Path(folder) / "x.tex", k=3, title=f"Document {rank} {k}")
        collage(components, [pictures()], 0, Path(folder) / "x.png", k=4)
        components.save(Path(folder) / "c.h5")
        components.save_state_dict(0, Path(folder) / "g.safetensors")
        npeff.report(components, None, Path(folder) / "x.html", title=f"Page {rank} {k}", progress=False)


def test_files_written_at_once_are_one_or_the_other(tmp_path):
    results = run(2, documents_often, str(tmp_path), time.time() + 0.5, 2)
    assert [how for how, _ in results] == ["returned"] * 2, results
    text = (tmp_path / "x.tex").read_text(encoding="utf-8")
    files = re.findall(r"\\includegraphics\[.*?\]\{(.*?)\}", text)
    assert len(files) == 9 and all((tmp_path / file).is_file() for file in files)
    assert len(list((tmp_path / "x-images").iterdir())) == 1
    saved = npeff.load(tmp_path / "c.h5", verify=True)
    assert any(np.array_equal(saved.coefficients, decomposed(rank).coefficients) for rank in range(2))
    assert sorted(os.listdir(tmp_path)) == ["c.h5", "g.safetensors", "x-images", "x.html", "x.png", "x.tex"]


def search(rank: int, folder: str, at: float) -> float:
    together(at)
    checkpoint = Path(folder) / "c.search"
    found = npeff.decompose(FISHERS, 3, n_init=20, n_replacements=2, checkpoint=checkpoint, progress=False)
    return found.loss


def test_one_search_keeps_its_state_in_a_file(tmp_path):
    results = run(2, search, str(tmp_path), time.time() + 0.5)
    assert {how for how, _ in results} <= {"returned", "raised"} and ("returned" in dict(results)), results
    for how, message in results:
        assert how == "returned" or "is already keeping the state of a search in" in message
    assert os.listdir(tmp_path) == ["c.search"]


def test_one_demo_at_a_time_in_a_folder(tmp_path):
    lock = _prepare(tmp_path / "demo")  # private: the whole demo holds its lock for as long as it trains
    with pytest.raises(StorageError, match="already running the demo in"):
        _prepare(tmp_path / "demo")
    lock.release()
    _prepare(tmp_path / "demo").release()
    assert os.listdir(tmp_path / "demo") == ["digits.py"]


def half_written(rank: int, path: str) -> None:
    with atomic(Path(path)) as scratch:
        scratch.write_text("half")
        os.kill(os.getpid(), signal.SIGKILL)


def test_what_a_killed_process_leaves_goes_and_what_a_living_one_writes_stays(tmp_path):
    path = tmp_path / "c.h5"
    run(1, half_written, str(path))
    assert len(os.listdir(tmp_path)) == 1
    with atomic(path) as scratch:
        scratch.write_text("a")
        decomposed().save(path)  # another writer begins and ends meanwhile
        assert scratch.read_text() == "a"
        assert sorted(os.listdir(tmp_path)) == sorted([scratch.parent.name, "c.h5"])
    assert os.listdir(tmp_path) == ["c.h5"] and path.read_text() == "a"


# ---- links -------------------------------------------------------------------------------------------------


def model() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3)).eval()


def batches(n: int = 6) -> list:
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(4, 6, generator=generator), torch.zeros(4).long()) for _ in range(n)]


@pytest.fixture
def victim(tmp_path):
    """A file that must stay as it is, outside the folder that is written to."""
    (tmp_path / "out").mkdir()
    path = tmp_path / "victim"
    path.write_bytes(b"precious")
    yield path
    assert path.read_bytes() == b"precious"


FORESEEN = ["c.search.writing", ".f.h5.PID.tmp", ".c.h5.PID.tmp", ".index.html.PID.tmp"]


@pytest.mark.parametrize("name", FORESEEN)
def test_links_at_names_that_could_be_foreseen_are_not_followed(victim, tmp_path, name):
    out, name = tmp_path / "out", name.replace("PID", str(os.getpid()))
    (out / name).symlink_to(victim)
    npeff.compute_fishers(model(), batches(), out=out / "f.h5", progress=False)
    options = {"n_init": 1, "n_replacements": 0, "progress": False}
    npeff.decompose(FISHERS, 3, checkpoint=out / "c.search", **options).save(out / "c.h5")
    npeff.report(decomposed(), None, out, progress=False)
    assert (out / name).is_symlink()


@pytest.mark.parametrize("name", ["header.tmp", "shard-000000.tmp", "merged.tmp", "coverage.tmp"])
def test_links_at_temporary_names_among_shards_are_removed(victim, tmp_path, name):
    parts = tmp_path / "out" / "f.h5.parts"
    parts.mkdir()
    (parts / name).symlink_to(victim)
    npeff.compute_fishers(model(), batches(), out=tmp_path / "out" / "f.h5", progress=False)
    assert os.listdir(tmp_path / "out") == ["f.h5"]


@pytest.mark.parametrize("name", ["lock", "header.json", "coverage.json", "shard-000000.h5"])
def test_links_among_shards_are_refused(victim, tmp_path, name):
    parts = tmp_path / "out" / "f.h5.parts"
    parts.mkdir()
    (parts / name).symlink_to(victim)
    with pytest.raises(StorageError, match=rf"{name}: expected a file that npeff wrote.* a symbolic link is there"):
        npeff.compute_fishers(model(), batches(), out=tmp_path / "out" / "f.h5", progress=False)


def test_a_link_in_place_of_the_shards_is_refused(victim, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out" / "f.h5.parts").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(StorageError, match="is a symbolic link"):
        npeff.compute_fishers(model(), batches(), out=tmp_path / "out" / "f.h5", progress=False)
    assert not os.listdir(tmp_path / "elsewhere")


@pytest.mark.parametrize("name", ["c.search", "c.search.lock"])
def test_links_in_place_of_a_checkpoint_are_refused(victim, tmp_path, name):
    (tmp_path / "out" / name).symlink_to(victim)
    with pytest.raises(StorageError, match="a symbolic link is there"):
        npeff.decompose(FISHERS, 3, checkpoint=tmp_path / "out" / "c.search", progress=False)


def shares(rank: int, out: str) -> int:
    return len(npeff.distributed.compute_fishers(model(), batches(), out=out, progress=False))


def test_links_in_place_of_shares_are_refused(victim, tmp_path):
    (tmp_path / "out" / "f.h5.1-of-2").symlink_to(victim)
    results = run(2, shares, str(tmp_path / "out" / "f.h5"))
    assert all("a symbolic link is there" in message for _, message in results), results


# ---- signals -----------------------------------------------------------------------------------------------

SOURCE = """
import os, signal, torch

def model():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3)).eval()

def batches():
    generator = torch.Generator().manual_seed(0)
    for k in range(6):
        if k == 4 and os.path.exists("kill"):
            os.kill(os.getpid(), int(open("kill").read()))
        yield torch.randn(4, 6, generator=generator), torch.zeros(4).long()

class Data:
    def __iter__(self):
        return batches()

def data():
    return Data()
"""


def by_command(rank: int, folder: str) -> int:
    os.chdir(folder)
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)]
    code = npeff_command(["fishers", "work.py:model", "work.py:data", "--exact", "--out", "f.h5", "--quiet"])
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)] == before
    return code


class Killing:
    def __init__(self, number: int) -> None:
        self.number = number

    def __iter__(self):
        for k, batch in enumerate(batches()):
            if k == 4:
                os.kill(os.getpid(), self.number)
            yield batch


def by_call(rank: int, folder: str, number: int) -> int:
    try:
        npeff.compute_fishers(model(), Killing(number), out=Path(folder) / "f.h5", progress=False)
    except Terminated as error:
        assert signal.getsignal(number) is signal.SIG_DFL
        assert "resumes" in str(error)
        return int(error.code)
    return 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_the_command_saves_the_open_shard(tmp_path, number):
    (tmp_path / "work.py").write_text(SOURCE)
    (tmp_path / "kill").write_text(str(int(number)))
    assert run(1, by_command, str(tmp_path)) == [("returned", 128 + number)]
    from npeff.components.loading import describe

    assert describe(tmp_path / "f.h5")["n_examples"] == 16
    (tmp_path / "kill").unlink()
    assert run(1, by_command, str(tmp_path)) == [("returned", 0)]
    npeff.compute_fishers(model(), batches(), out=tmp_path / "whole.h5", progress=False)
    assert np.array_equal(npeff.load(tmp_path / "f.h5").rows.values, npeff.load(tmp_path / "whole.h5").rows.values)
    assert not list(tmp_path.glob("*.parts"))


@pytest.mark.parametrize("where", ["at import", "in model()"])
def test_a_signal_while_the_model_is_made_is_no_error_of_the_model(tmp_path, where):
    die = "os.kill(os.getpid(), signal.SIGTERM)"
    at = {"at import": "def model():", "in model()": "def model():\n    " + die}[where]
    source = SOURCE.replace("def model():", at) + (die if where == "at import" else "")
    (tmp_path / "work.py").write_text(source)
    assert run(1, by_command, str(tmp_path)) == [("returned", 143)]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_the_call_saves_the_open_shard(tmp_path, number):
    assert run(1, by_call, str(tmp_path), number) == [("returned", 128 + number)]
    assert len(list((tmp_path / "f.h5.parts").glob("shard-*.h5"))) == 1
    assert len(npeff.compute_fishers(model(), batches(), out=tmp_path / "f.h5", progress=False)) == 24
    assert os.listdir(tmp_path) == ["f.h5"]


def uncaught(rank: int, folder: str) -> None:
    """A child of its own, whose status is that of a program that catches nothing."""
    child = os.fork()
    if child == 0:
        try:
            npeff.compute_fishers(model(), Killing(signal.SIGTERM), out=Path(folder) / "f.h5", progress=False)
        except SystemExit as error:
            os._exit(error.code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_left_alone_it_ends_the_program_with_the_conventional_status(tmp_path):
    assert run(1, uncaught, str(tmp_path)) == [("returned", 143)]


def handlers(rank: int) -> list[bool]:
    seen = []
    signal.signal(signal.SIGTERM, lambda *_: seen.append("theirs"))
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with ending_in_order():
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGHUP)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    elsewhere = []

    def on_a_thread() -> None:
        with ending_in_order():
            elsewhere.append(signal.getsignal(signal.SIGTERM) is signal.SIG_DFL)

    thread = threading.Thread(target=on_a_thread)
    thread.start()
    thread.join()
    child_status = None
    with ending_in_order():
        child = os.fork()
        if child == 0:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
            os._exit(0)
        child_status = os.waitpid(child, 0)[1]
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1)
        except Terminated:
            os.kill(os.getpid(), signal.SIGTERM)  # a second one does not interrupt the saving
            seen.append("ours")
    return [seen == ["theirs", "ours"], elsewhere == [True], os.WTERMSIG(child_status) == signal.SIGTERM]


def test_handlers_of_the_program_of_nohup_and_of_children_are_left_alone():
    assert run(1, handlers) == [("returned", [True, True, True])]


def test_json_for_a_report_is_written_whole(tmp_path, monkeypatch):
    """What `npeff trust` writes replaces what is there at once."""
    monkeypatch.chdir(tmp_path)
    FISHERS.save("f.h5")
    decomposed().save("c.h5")
    command = ["trust", "f.h5", "c.h5", "--repeats", "2", "--shuffles", "0", "--out", "t.json", "--quiet"]
    assert npeff_command(command) == 0
    assert "stability" in json.loads(Path("t.json").read_text())
    assert sorted(os.listdir()) == ["c.h5", "f.h5", "t.json"]
