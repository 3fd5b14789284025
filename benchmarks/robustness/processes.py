"""Commands that are killed, run side by side, meet planted links or a full disk: what is left, and what comes next.

Every trial runs real commands of ``npeff`` in forked processes, then the same command again, and compares its result
with that of an undisturbed run. Full disks are small file systems in memory: mounting them needs root; without it that
part says that it was left out. Prints a section in Markdown.

    python benchmarks/robustness/processes.py
    python benchmarks/robustness/processes.py --kills 200 --pairs 60 --disks 20 --launches 0
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
import torch

import npeff
from npeff.cli import run

SOURCE = """
import time
import torch

def model():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(24, 40), torch.nn.ReLU(), torch.nn.Linear(40, 4)).eval()

class Data:
    def __init__(self, pause):
        self.pause = pause

    def __iter__(self):
        generator = torch.Generator().manual_seed(0)
        for _ in range(12):
            time.sleep(self.pause)
            yield torch.randn(10, 24, generator=generator), torch.arange(10) % 4

def data():
    return Data(0.02)

def pictures():
    generator = torch.Generator().manual_seed(0)
    return [(torch.rand(10, 1, 8, 8, generator=generator), torch.arange(10) % 4) for _ in range(12)]
"""

FISHERS = ["fishers", "work.py:model", "work.py:data", "--exact", "--out", "f.h5", "--quiet"]
DECOMPOSE = ["decompose", "in.h5", "--n-components", "8", "--n-init", "3", "--n-replacements", "6", "--space", "rows"]
DECOMPOSE += ["--quiet"]
DECOMPOSE += ["--checkpoint", "c.search", "--out", "c.h5"]
REPORT = ["report", "in-c.h5", "--data", "work.py:pictures", "--out", "report", "--quiet"]
PAGE = ["report", "in-c.h5", "--data", "work.py:pictures", "--out", "page.html", "--quiet"]
DOCUMENT = ["report", "in-c.h5", "--data", "work.py:pictures", "--out", "d.html", "--latex", "--quiet"]
ENCODE = ["encode", "in-c.h5", "in.h5", "--out", "e.h5"]
TABLE = ["encode", "in-c.h5", "in.h5", "--out", "e.csv"]
EXPORT = ["export", "in-c.h5", "--component", "0", "--out", "g.safetensors"]
PUBLISHED = ["export", "in.h5", "--layout", "published", "--out", "p.h5"]
COMMANDS = {
    "fishers": FISHERS,
    "decompose": DECOMPOSE,
    "report, folder": REPORT,
    "report, file": PAGE,
    "report, LaTeX": DOCUMENT,
    "encode, HDF5": ENCODE,
    "encode, CSV": TABLE,
    "export": EXPORT,
    "export, published": PUBLISHED,
}
KILLED = ("fishers", "decompose", "report, folder", "encode, HDF5")
VARIED = {
    "decompose": ["--seed", "1"],
    "report, folder": ["--title", "Another"],
    "report, file": ["--title", "Another"],
    "report, LaTeX": ["--title", "Another"],
}
"""What the second of two processes is given besides: the result must be wholly one's or the other's."""
INPUTS = ("work.py", "in.h5", "in-c.h5")
FORESEEN = ("c.search.writing", ".f.h5.{pid}.tmp", ".c.h5.{pid}.tmp", ".e.h5.{pid}.tmp", ".index.html.{pid}.tmp")
REFUSED_LINKS = ("f.h5.parts", "f.h5.parts/lock", "f.h5.parts/header.json", "f.h5.parts/shard-000000.h5", "c.search")


def result_of(folder: Path) -> dict[str, object]:
    """What commands made in a folder, without times and the numbers of folders."""
    found: dict[str, object] = {}
    for path in sorted(folder.rglob("*")):
        name = re.sub(r"data-\d+", "data-N", str(path.relative_to(folder)))
        if path.is_dir() or name in INPUTS or "__pycache__" in name or name.startswith("filler"):
            continue
        if name == "c.h5":
            components = npeff.load(path, verify=True)
            found[name] = (components.coefficients.tobytes(), components.vectors.tobytes())
        elif name == "e.h5":
            with h5py.File(path, "r") as file:
                found[name] = {key: np.asarray(file[key]).tobytes() for key in file}
        else:
            found[name] = re.sub(rb"data-\d+", b"data-N", path.read_bytes())
    return found


def by_target(made: dict[str, object]) -> list[dict[str, object]]:
    """What must be one's or the other's as a whole: the page of ``--latex`` is a target beside its document."""
    page = {name: value for name, value in made.items() if name == "d.html"}
    return [page, {name: value for name, value in made.items() if name not in page}]


@dataclass
class Child:
    """A command in a forked process."""

    pid: int
    log: Path

    def wait(self) -> int:
        """Its exit status; negative for the signal that ended it."""
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    @property
    def said(self) -> str:
        """What it wrote to the terminal."""
        return self.log.read_text(errors="replace")


class Bench:
    """Folders with inputs, commands in forked processes, results of undisturbed runs."""

    def __init__(self, root: Path) -> None:
        self.root, self.count = root, 0
        self.inputs = root / "inputs"
        self.inputs.mkdir()
        (self.inputs / "work.py").write_text(SOURCE)
        self.expected: dict[tuple[str, ...], dict[str, object]] = {}
        self.seconds: dict[str, float] = {}
        with inside(self.inputs), quietly(root / "log"):
            assert run([*FISHERS[:-3], "--out", "in.h5", "--quiet"]) == 0
            arguments = ["--n-components", "8", "--n-replacements", "1", "--out", "in-c.h5", "--quiet"]
            assert run(["decompose", "in.h5", *arguments]) == 0
        for name, command in COMMANDS.items():
            for arguments in (command, [*command, *VARIED.get(name, [])]):
                with inside(self.folder()) as folder, quietly(root / "log"):
                    assert run(arguments) == 0, name  # here, so that forked processes need not import anything
                    self.expected[tuple(arguments)] = result_of(folder)
            began = time.monotonic()
            assert self.start(command, self.folder()).wait() == 0
            self.seconds[name] = time.monotonic() - began

    def folder(self, parent: Path | None = None) -> Path:
        """A new folder with the inputs."""
        self.count += 1
        folder = (parent or self.root) / f"trial-{self.count}"
        folder.mkdir()
        for name in INPUTS:
            if (self.inputs / name).exists():
                (folder / name).symlink_to(self.inputs / name)
        return folder

    def start(self, arguments: list[str], folder: Path, at: float = 0.0, link: tuple[str, Path] | None = None) -> Child:
        """Begin a command in a folder, at a time; with a link planted before, whose name may hold ``{pid}``."""
        self.count += 1
        log = self.root / f"log-{self.count}"
        pid = os.fork()
        if pid == 0:
            status = 70
            try:
                os.chdir(folder)
                if link is not None:
                    Path(link[0].format(pid=os.getpid())).symlink_to(link[1])
                with quietly(log):
                    time.sleep(max(0.0, at - time.time()))
                    status = run(arguments)
            finally:
                os._exit(status)
        return Child(pid, log)

    def again(self, arguments: list[str], folder: Path) -> str:
        """Run the command once more; what is wrong with its result, or nothing."""
        child = self.start(arguments, folder)
        status = child.wait()
        if status:
            return f"ended with {status}: {child.said[-300:]}"
        return (
            "" if result_of(folder) == self.expected[tuple(arguments)] else f"other result: {sorted(result_of(folder))}"
        )


@contextlib.contextmanager
def inside(folder: Path) -> Iterator[Path]:
    """Work in a folder."""
    before = os.getcwd()
    os.chdir(folder)
    try:
        yield folder
    finally:
        os.chdir(before)


@contextlib.contextmanager
def quietly(log: Path) -> Iterator[None]:
    """Send both outputs to a file."""
    sys.stdout.flush()
    sys.stderr.flush()
    kept = os.dup(1), os.dup(2)
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for number, fd in enumerate(kept, 1):
            os.dup2(fd, number)
            os.close(fd)


class Faults:
    """What went wrong, told at once."""

    def __init__(self) -> None:
        self.found: list[str] = []
        self.trial = 0

    def since(self, before: int, count: int) -> str:
        """How many of some trials went as they should."""
        wrong = {fault.split(",")[0] for fault in self.found[before:]}
        return f"{count - len(wrong)} of {count}"

    def check(self, fault: str, where: str) -> None:
        """Note a fault, if there is one."""
        if fault:
            where = f"trial {self.trial}, {where}"
            self.found.append(f"{where}: {fault}")
            print(f"FAULT {where}: {fault}", file=sys.stderr)


def kills(bench: Bench, count: int, chance: random.Random, faults: Faults) -> Iterator[str]:
    """Kill commands at random moments; the same command again must end with the right result."""
    signals = (signal.SIGKILL, signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
    seen: collections.Counter[tuple[str, str]] = collections.Counter()
    kept: collections.Counter[str] = collections.Counter()
    done = tries = 0
    before = len(faults.found)
    while done < count and tries < 8 * count:
        name = KILLED[tries % len(KILLED)]
        number = signals[tries // len(KILLED) % len(signals)]
        folder = bench.folder()
        tries += 1
        faults.trial += 1
        child = bench.start(COMMANDS[name], folder)
        time.sleep(chance.uniform(0, bench.seconds[name]))
        os.kill(child.pid, number)
        status = child.wait()
        if status == 0:
            shutil.rmtree(folder)
            continue
        done += 1
        seen[name, number.name] += 1
        if status not in (128 + number, -number):
            faults.check(f"ended with {status}: {child.said[-300:]}", f"{name} after {number.name}")
        if name == "fishers" and list(folder.glob("f.h5.parts/shard-*.h5")):
            kept[number.name] += 1
        faults.check(bench.again(COMMANDS[name], folder), f"{name} again after {number.name}")
        shutil.rmtree(folder)
    went = faults.since(before, done)
    yield f"| killed at a random moment | {done} | run again, the right result, and nothing else was left: {went} |"
    for number in signals:
        parts = ", ".join(f"{name} {seen[name, number.name]}" for name in KILLED)
        saved = f"; finished or open shards of `fishers` were on the disk in {kept[number.name]}"
        yield f"| – {number.name} | {sum(seen[name, number.name] for name in KILLED)} | {parts}{saved} |"


def pairs(bench: Bench, count: int, faults: Faults) -> Iterator[str]:
    """Two processes write the same thing at once."""
    outcomes: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    before = len(faults.found)
    for trial in range(count):
        faults.trial += 1
        name = list(COMMANDS)[trial % len(COMMANDS)]
        folder, at = bench.folder(), time.time() + 0.1
        commands = [COMMANDS[name], [*COMMANDS[name], *VARIED.get(name, [])]]
        children = [bench.start(command, folder, at) for command in commands]
        statuses = [child.wait() for child in children]
        refused = [child for child, status in zip(children, statuses, strict=True) if status]
        for child in refused:
            faults.check("" if "is already" in child.said else child.said[-300:], f"pair of {name}, {statuses}")
        if len(refused) == 2:
            faults.check("both were refused", f"pair of {name}")
        made = result_of(folder)
        wholes = [by_target(bench.expected[tuple(command)]) for command in commands]
        for k, part in enumerate(by_target(made)):
            if part not in [whole[k] for whole in wholes]:
                faults.check(f"a mixed result: {sorted(part)[:8]}", f"pair of {name}")
        outcomes[name]["one was refused" if refused else "both ended"] += 1
        shutil.rmtree(folder)
    went = faults.since(before, count)
    yield f"| two processes into one target | {count} | the result was wholly one's, nothing else was left: {went} |"
    for name, counter in outcomes.items():
        yield f"| – {name} | {counter.total()} | {', '.join(f'{what}: {n}' for what, n in counter.items())} |"


def disks(bench: Bench, count: int, chance: random.Random, faults: Faults) -> Iterator[str]:
    """Small file systems that fill up; with more room, the same command must end with the right result."""
    outcomes: collections.Counter[tuple[str, str]] = collections.Counter()
    earlier = len(faults.found)
    for trial in range(count):
        faults.trial += 1
        name = list(COMMANDS)[trial % len(COMMANDS)]
        kind = "bytes" if trial // len(COMMANDS) % 2 == 0 else "files"
        limit = (
            f"size={chance.randrange(1, 30) * 4}k"
            if kind == "bytes"
            else f"size=64m,nr_inodes={chance.randrange(6, 14)}"
        )
        disk = bench.root / f"disk-{trial}"
        disk.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", limit, "npeff-trial", str(disk)]
        mounted = subprocess.run(command, capture_output=True, text=True, check=False)
        if mounted.returncode:
            yield f"| full disks | 0 | left out: {mounted.stderr.strip()} |"
            return
        try:
            folder = bench.folder(disk)
            before = sorted(path.name for path in folder.iterdir())
            child = bench.start(COMMANDS[name], folder)
            status = child.wait()
            if status == 0:
                outcomes[kind, "it was enough"] += 1
            else:
                words = "the disk is full" if kind == "bytes" else "can hold no more files"
                faults.check(
                    "" if status == 1 and words in child.said else f"{status}: {child.said[-300:]}", f"{name}, {limit}"
                )
                kept = {"f.h5.parts", "c.search"}  # finished work
                left = {path.name for path in folder.iterdir()} - set(before) - {"__pycache__"} - kept
                if name != "report, LaTeX":  # whose page is there before its document
                    faults.check(f"left {sorted(left)}" if left else "", f"{name}, {limit}")
                outcomes[kind, f"told: {words}"] += 1
            subprocess.run(["mount", "-o", "remount,size=64m,nr_inodes=1000", str(disk)], check=True)
            faults.check(bench.again(COMMANDS[name], folder), f"{name} again, {limit}")
        finally:
            subprocess.run(["umount", "-l", str(disk)], check=False)
    total = sum(outcomes.values())
    went = faults.since(earlier, total)
    yield f"| file systems that fill up | {total} | nothing half left; run again with room, the right result: {went} |"
    for kind in ("bytes", "files"):
        parts = [f"{what}: {n}" for (k, what), n in outcomes.items() if k == kind]
        yield f"| – out of {kind} | {sum(n for (k, _), n in outcomes.items() if k == kind)} | {', '.join(parts)} |"


def links(bench: Bench, faults: Faults) -> Iterator[str]:
    """Symbolic links planted where files of npeff could be expected."""
    victim = bench.root / "victim"
    victim.write_bytes(b"precious")
    ran = refused = 0
    before = len(faults.found)
    for name, command in COMMANDS.items():
        for planted in (*FORESEEN, *REFUSED_LINKS):
            folder = bench.folder()
            faults.trial += 1
            (folder / planted).parent.mkdir(exist_ok=True)
            concerned = planted.startswith(COMMANDS[name][-1]) or (name, planted[:4]) in {
                ("fishers", "f.h5"),
                ("decompose", "c.se"),
            }
            child = bench.start(command, folder, link=(planted, victim))
            status = child.wait()
            path = folder / planted.format(pid=child.pid)
            must_refuse = concerned and planted in REFUSED_LINKS
            if must_refuse:
                faults.check(
                    "" if status == 1 and "symbolic link" in child.said else child.said[-300:], f"{name}, {planted}"
                )
                refused += 1
            else:
                faults.check("" if status == 0 else child.said[-300:], f"{name}, {planted}")
                ran += 1
            if victim.read_bytes() != b"precious" or not path.is_symlink():
                faults.check("the link was followed or replaced", f"{name}, {planted}")
                victim.write_bytes(b"precious")
            shutil.rmtree(folder)
    yield (
        f"| links planted at foreseeable names | {ran + refused} | none was followed, {ran} commands did their work, "
        f"{refused} refused to go on from one: {faults.since(before, ran + refused)} |"
    )


def launches(bench: Bench, count: int, chance: random.Random, faults: Faults) -> Iterator[str]:
    """torchrun, a worker of which is killed, or all of it told to end; the same command again."""
    outcomes: collections.Counter[str] = collections.Counter()
    before = len(faults.found)
    for trial in range(count):
        faults.trial += 1
        name = ("fishers", "decompose")[trial % 2]
        number = (signal.SIGKILL, signal.SIGTERM)[trial // 2 % 2]
        command = FISHERS if name == "fishers" else [word for word in DECOMPOSE if word not in ("--space", "rows")]
        folder = bench.folder()
        launch = torchrun(command, folder)
        time.sleep(chance.uniform(3, 8))
        workers = subprocess.run(["pgrep", "-P", str(launch.pid)], capture_output=True, text=True, check=False)
        target = (
            launch.pid if number == signal.SIGTERM else next(iter(map(int, workers.stdout.split()[-1:])), launch.pid)
        )
        with contextlib.suppress(ProcessLookupError):
            os.kill(target, number)
        status = launch.wait(timeout=300)
        outcomes[f"{name} by {number.name}: {'ended first' if status == 0 else 'ended by it'}"] += 1
        if status:
            launch = torchrun(command, folder)
            faults.check(
                "" if launch.wait(timeout=300) == 0 else "failed again", f"torchrun {name} after {number.name}"
            )
        if name == "fishers":
            same = result_of(folder) == bench.expected[tuple(FISHERS)]
        else:
            ours = npeff.load(folder / "c.h5").loss
            fishers = npeff.load(bench.inputs / "in.h5")
            one = npeff.decompose(fishers, 8, n_replacements=6, space="rows", progress=False).loss
            same = abs(ours - one) < 1e-3 * one and not list(folder.glob("*.search*"))
        faults.check("" if same else f"other result: {sorted(result_of(folder))[:8]}", f"torchrun {name}")
        shutil.rmtree(folder)
    parts = ", ".join(f"{what}: {n}" for what, n in outcomes.items())
    went = faults.since(before, count)
    yield f"| torchrun of two processes, killed | {count} | run again, the right result: {went}; {parts} |"


def torchrun(command: list[str], folder: Path) -> subprocess.Popen[bytes]:
    """Start two processes."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={port}"]
    return subprocess.Popen(
        [*launcher, "-m", "npeff", *command],
        cwd=folder,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
    )


def main() -> int:
    """Run the trials and print the section."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=80)
    parser.add_argument("--pairs", type=int, default=36)
    parser.add_argument("--disks", type=int, default=54)
    parser.add_argument("--launches", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    chance, faults = random.Random(args.seed), Faults()
    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench(Path(scratch))
        trials: list[Callable[[], Iterator[str]]] = [
            lambda: kills(bench, args.kills, chance, faults),
            lambda: pairs(bench, args.pairs, faults),
            lambda: disks(bench, args.disks, chance, faults),
            lambda: links(bench, faults),
            lambda: launches(bench, args.launches, chance, faults),
        ]
        lines = []
        for trial in trials:
            lines += trial()
            print(lines[-1], file=sys.stderr)
    print("## Killed, side by side, full\n")
    print(
        f"`python benchmarks/robustness/processes.py --kills {args.kills} --pairs {args.pairs} --disks {args.disks} "
        f"--launches {args.launches} --seed {args.seed}`\n"
    )
    print("| what was tried | how often | what happened |\n|---|---|---|")
    print("\n".join(lines))
    print(f"| faults | {len(faults.found)} | {'; '.join(faults.found[:5]) or 'none'} |")
    return bool(faults.found)


if __name__ == "__main__":
    sys.exit(main())
