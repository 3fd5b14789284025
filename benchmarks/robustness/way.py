"""Damaged and foreign JSON files given to a report: every one gives an error that names it, or is as good as it was.

    python benchmarks/robustness/way.py --count 5000

Files are made by npeff's own commands on a small network. Random trials change bytes; structural trials replace, remove
or add one value of the JSON tree. Each file is read with and without the components; every ``--page`` th that is taken
goes onto a page, which must be written. Prints one Markdown section.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import json
import os
import random
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import npeff
from npeff.cli import run
from npeff.errors import ExtrasError
from npeff.reports import load_extras

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
from way_cases import DATA, FEW, FREEZE, MODEL, SEARCH, SOURCE

COMMANDS = (
    ["fishers", MODEL, DATA, "--top-k", "120", "--out", "fishers.h5", "--quiet"],
    ["decompose", "fishers.h5", "--n-components", "3", "--out", "components.h5", *SEARCH],
    ["trust", "fishers.h5", "components.h5", "--repeats", "2", "--shuffles", "1", "--out", "trust.json", "--quiet"],
    ["perturb", MODEL, DATA, "components.h5", "--all", *FEW, "--out", "effects.json"],
    ["perturb", MODEL, DATA, "components.h5", "--strategy", "0,2", *FEW, "--out", "group.json"],
    ["trace", MODEL, DATA, "components.h5", "-j", "1", "--top", "12", "--quiet", "--out", "trace.json"],
    ["linearize", MODEL, DATA, *FREEZE, "--component", "components.h5:0,1", "-k", "2", "--out", "attributions.json"],
    ["influence", MODEL, "net.py:train", DATA, "--component", "components.h5:2", "--damping", "1", "--quiet", "--out",
     "influences.json"],
)  # fmt: skip
TOKENS = (b"[", b"]", b"{", b"}", b",", b'"', b"1e999", b"NaN", b"9" * 30, b"\\u0000", b"null")
OTHERS: tuple[Any, ...] = (
    None, True, False, "", "text", "3", "-1", "١", -1, 0, 1, 2, 3, 7, 2**63, 10**19, -(10**19), 0.5, -0.5, 1e308,
    1e-320, "NaN",
    [], {}, [None], [[]], [[1], [2, 3]], [1, "a"], {"value": 1}, {"0": 1}, {"components": [0]}, [{}], [[[[[[1]]]]]],
    "x" * 5000, list(range(300)), {str(i): i for i in range(50)},
)  # fmt: skip


def places(content: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths of all values in a JSON tree."""
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    return [path, *(p for key, value in items for p in places(value, (*path, key)))]


def changed(content: Any, rng: random.Random) -> bytes:
    """The tree with one to three values replaced, removed, doubled or renamed."""
    content = json.loads(json.dumps(content))
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        every = [path for path in places(content) if path]
        if not every:
            break
        # most values are numbers in long lists: take every depth alike
        depth = rng.choice(sorted({len(path) for path in every}))
        *outer, key = rng.choice([path for path in every if len(path) == depth])
        inner = content
        for step in outer:
            inner = inner[step]
        how = rng.choice(("replace", "replace", "replace", "remove", "double", "rename", "exchange"))
        if how == "replace":
            inner[key] = copy.deepcopy(rng.choice(OTHERS))
        elif how == "remove":
            del inner[key]
        elif how == "double" and isinstance(inner, list):
            inner.insert(key, copy.deepcopy(inner[key]))
        elif how == "rename" and isinstance(inner, dict):
            inner[rng.choice(("other", "0", "-1", "99", str(key) + " ", "components"))] = inner.pop(key)
        elif isinstance(inner, dict):
            other = rng.choice(list(inner))
            inner[key], inner[other] = inner[other], inner[key]
    return json.dumps(content).encode()


def mutated(raw: bytes, rng: random.Random) -> bytes:
    """Some bytes changed, cut out, doubled, or the end cut off."""
    data = bytearray(raw)
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        at = rng.randrange(len(data)) if data else 0
        how = rng.randrange(6)
        if how == 0 and data:
            data[at] ^= 1 << rng.randrange(8)
        elif how == 1 and data:
            data[at] = rng.randrange(256)
        elif how == 2:
            del data[at : at + rng.randrange(1, 40)]
        elif how == 3:
            data[at:at] = data[at : at + rng.randrange(1, 40)]
        elif how == 4:
            data[at:at] = rng.choice(TOKENS)
        elif rng.random() < 0.2:
            del data[at:]
    return bytes(data)


def trial(path: Path, components: npeff.Components) -> tuple[str, dict[str, Any] | None]:
    """What reading the file gives: ``taken``, ``refused``, or the fault."""
    found = None
    outcomes = set()
    for about in (None, components):
        try:
            found = load_extras(path, components=about)
            outcomes.add("taken")
        except ExtrasError as error:
            named = str(error).startswith(str(path)) and len(str(error)) < 1500
            outcomes.add("refused" if named else f"unnamed: {error!s:.200}")
            found = None
        except BaseException as error:
            return f"{type(error).__name__}: {error!s:.200}", None
    faults = outcomes - {"taken", "refused"}
    return (faults.pop(), None) if faults else ("taken" if found is not None else "refused", found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=2000, help="Random trials per file; half as many structural ones.")
    parser.add_argument("--page", type=int, default=200, help="One in so many files that are taken goes onto a page.")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng = random.Random(options.seed)
    warnings.simplefilter("ignore")
    start = time.perf_counter()
    rows, faults = [], []
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        Path("net.py").write_text(SOURCE)
        with contextlib.redirect_stdout(io.StringIO()):
            for command in COMMANDS:
                assert run(command) == 0, command
        components = npeff.load("components.h5")
        assert isinstance(components, npeff.Components)
        for file in sorted(Path().glob("*.json")):
            raw = file.read_bytes()
            content = json.loads(raw)
            for kind, count in (("bytes", options.count), ("structure", options.count // 2)):
                told = {"taken": 0, "refused": 0, "fault": 0, "pages": 0}
                for number in range(count):
                    case = Path(folder, "case.json")
                    case.write_bytes(mutated(raw, rng) if kind == "bytes" else changed(content, rng))
                    outcome, found = trial(case, components)
                    told[outcome if outcome in told else "fault"] += 1
                    if outcome not in told:
                        faults.append(f"{file} {kind} {number}: {outcome}")
                    if found and told["taken"] % options.page == 0:
                        try:
                            npeff.report(components, None, "case.html", progress=False, **drawable(found))
                            told["pages"] += 1
                        except Exception as error:
                            faults.append(f"{file} {kind} {number}: page: {type(error).__name__}: {error!s:.200}")
                rows.append((file.name, kind, count, told["refused"], told["taken"], told["pages"], told["fault"]))
        os.chdir("/")
    print("## JSON files for a report\n")
    print(
        f"`python benchmarks/robustness/way.py --count {options.count} --seed {options.seed}`, "
        f"{time.perf_counter() - start:.0f} s. Files that commands wrote, changed, and read by `load_extras` with and "
        "without the components. Taken: the change left a valid file. Refused: an `ExtrasError` that names the file. "
        "Fault: anything else.\n"
    )
    print("| file | changed | trials | refused | taken | of these on a page | faults |")
    print("|---|---|---|---|---|---|---|")
    for row in rows:
        print("| " + " | ".join(f"{cell:,}" if isinstance(cell, int) else cell for cell in row) + " |")
    total = [sum(row[i] for row in rows) for i in range(2, 7)]
    print("| **all** | | " + " | ".join(f"{number:,}" for number in total) + " |")
    for fault in faults[:20]:
        print(f"\n- {fault}")
    sys.exit(1 if faults else 0)


def drawable(found: dict[str, Any]) -> dict[str, Any]:
    """Without attributions, which have to fit the examples' inputs."""
    return {key: value for key, value in found.items() if key != "attributions"}


if __name__ == "__main__":
    main()
