"""Places in several processes, and places that are interrupted: the file is that of one process, uninterrupted."""

from __future__ import annotations

import json
import os
import signal
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import npeff
from npeff.cli import run as npeff_command
from npeff.errors import Terminated
from npeff.language import Places
from npeff.models.targets import load_model, load_tokenizer
from processes import all_returned, run
from tiny_language import tokenizer_of, working_beside_a_model

pytest.importorskip("transformers")

THINGS = ("France", "Spain", "grass", "the sky", "it", "no", "the colour of the sky")
TEXTS = 24 * [f"{start} {thing} is" for start in ("The capital of", "Is it good? Is it bad?") for thing in THINGS]
WHERE = "capital|Is it"
OPTIONS: dict[str, Any] = {"compress": npeff.Sketch(64), "rank": 2, "progress": False}
COMMAND = ["fishers", "hf:model", "texts.jsonl", "--where", WHERE, "--sketch", "64"]
COMMAND += ["--rank", "2", "--quiet", "--out"]

SOURCE = """
import os
import signal

from npeff.language import Places
from npeff.models.targets import load_tokenizer


class Killing(Places):
    def __iter__(self):
        for number, batch in enumerate(super().__iter__()):
            if number == 2 and os.path.exists("kill"):
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch


def data():
    return Killing(load_tokenizer("hf:model"), "texts.jsonl", "capital|Is it")
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A model, its tokenizer and texts, and the Fishers that one process makes of their places."""
    with working_beside_a_model(tmp_path_factory.mktemp("processes")) as path:
        Path("texts.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in TEXTS))
        Path("work.py").write_text(SOURCE)
        assert npeff_command([*COMMAND, "one.h5"]) == 0
        yield path


def by_command(rank: int, command: list[str]) -> tuple[int, str]:
    with redirect_stderr(StringIO()) as said:
        return npeff_command(command), said.getvalue()


class Killing(Places):
    """Places of which a process does not survive the third batch."""

    killed = False

    def __iter__(self) -> Any:
        for number, batch in enumerate(super().__iter__()):
            if self.killed and number == 2:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch


def by_call(rank: int, out: str, victim: int) -> int:
    places = Killing(load_tokenizer("hf:model"), "texts.jsonl", WHERE)
    places.killed = rank == victim
    return len(npeff.distributed.compute_fishers(load_model("hf:model"), places, out=out, **OPTIONS))


def check_same(folder: Path, name: str) -> None:
    assert (folder / name).read_bytes() == (folder / "one.h5").read_bytes()
    assert not list(folder.glob("*.parts"))


def test_two_processes_make_the_file_of_one(folder: Path) -> None:
    codes = all_returned(2, by_command, [*COMMAND, "two.h5"])
    assert [code for code, _ in codes] == [0, 0], codes
    check_same(folder, "two.h5")
    one = npeff.load("one.h5")
    assert isinstance(one, npeff.Fishers) and one.places is not None
    assert one.provenance["options"]["parameters"] == ["blocks"] and len(one) > len(TEXTS)
    np.testing.assert_array_equal(one.places, Places(tokenizer_of(), TEXTS, WHERE).places)


def test_a_process_that_is_told_to_end_and_the_same_call_again(folder: Path) -> None:
    (first, second) = run(2, by_call, "call.h5", 1)
    assert second[0] == "raised" and second[1].startswith(Terminated.__name__)
    assert first[0] == "raised" and "WorkerError" in first[1]
    assert len(set(all_returned(2, by_call, "call.h5", -1))) == 1
    check_same(folder, "call.h5")


def test_a_command_that_is_told_to_end_and_the_same_command_again(folder: Path) -> None:
    command = ["fishers", "hf:model", "work.py:data", *COMMAND[-6:], "killed.h5"]
    Path("kill").touch()
    ((code, said),) = all_returned(1, by_command, command)
    assert code == 128 + signal.SIGTERM and "the same command resumes it" in said
    Path("kill").unlink()
    assert list(folder.glob("killed.h5.parts/shard-*"))
    ((code, said),) = all_returned(1, by_command, command)
    assert code == 0, said
    check_same(folder, "killed.h5")
