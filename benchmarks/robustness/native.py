"""Hostile calls of the kernels: every function and every argument with every kind of hostility, then random mixtures.

    python benchmarks/robustness/native.py [--random 4000] [--seed 0] [--kernels avx512] > native.md

The calls (tests/hostile_calls.py) are made in processes of their own, watched from here: one that dies is a crash, one
that says nothing for 30 seconds a hang. A call that is not refused is compared with the plain implementation on clean
copies of its arguments, and the memory around its outputs is looked at.
"""

from __future__ import annotations

import argparse
import os
import queue
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

TESTS = Path(__file__).resolve().parents[2] / "tests"
SILENCE = 30
ADDRESS_SPACE = 12 << 30
COLUMNS = {
    "refused": "refused, naming the argument",
    "refused by its type": "TypeError of the native module",
    "no memory": "MemoryError",
    "right": "right result",
    "other error": "another error",
    "wrong": "wrong result",
    "crash": "crash",
    "hang": "hang",
}


def made(first: int, end: int, seed: int, environment: dict[str, str]) -> list[tuple[str, str, str, str]]:
    """Calls first … end − 1: function, kind, what came of it, and the error."""
    found: list[tuple[str, str, str, str]] = []
    while first < end:
        command = [sys.executable, "-W", "ignore", str(TESTS / "hostile_calls.py"), str(first), str(end), str(seed)]
        command.append(str(ADDRESS_SPACE))
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, cwd=TESTS
        )
        lines: queue.Queue[str | None] = queue.Queue()
        assert process.stdout is not None and process.stderr is not None
        stdout, stderr = process.stdout, process.stderr

        def read(stdout=stdout, lines=lines) -> None:  # type: ignore[no-untyped-def]
            for line in stdout:
                lines.put(line)
            lines.put(None)

        threading.Thread(target=read, daemon=True).start()
        errors: list[str] = []
        threading.Thread(target=lambda stderr=stderr, errors=errors: errors.append(stderr.read()), daemon=True).start()
        hung, started = False, None
        while True:
            try:
                line = lines.get(timeout=SILENCE)
            except queue.Empty:
                hung = True
                process.kill()
                break
            if line is None:
                break
            what, number, *rest = line.rstrip("\n").split("\t")
            if what == "start":
                started = int(number)
            else:
                found.append((rest[0], rest[1], rest[2], rest[3] if len(rest) > 3 else ""))
                first, started = int(number) + 1, None
        code = process.wait()
        if first >= end:
            break
        if started is None:
            raise SystemExit(f"the calls ended with {code} before call {first}: {''.join(errors)}")
        function, kind = described(started, seed, environment)
        found.append((function, kind, "hang" if hung else "crash", f"call {started}, exit status {code}"))
        first = started + 1
    return found


def described(number: int, seed: int, environment: dict[str, str]) -> tuple[str, str]:
    code = f"import hostile_calls as h; f, _, k = h.hostile({number}, {seed}); print(f, k, sep='\\t')"
    said = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, env=environment, cwd=TESTS
    )
    function, _, kind = said.stdout.strip().partition("\t")
    return function, kind


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--random", type=int, default=4000, help="calls with several hostile arguments")
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kernels", default="", help="instruction set: base, avx2 or avx512")
    parser.add_argument("--faults", default="", help="file for one line per fault")
    options = parser.parse_args()
    sys.path.insert(0, str(TESTS))
    import hostile_calls

    planned = hostile_calls.plan_once()
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    if options.kernels:
        environment["NPEFF_KERNELS"] = options.kernels
    found = made(options.first, len(planned) + options.random, options.seed, environment)
    systematic = len(planned) - options.first
    print("## The native boundary\n")
    functions = {function for function, _, _ in planned}
    public = sum(function in hostile_calls.PUBLIC for function in functions)
    print(
        f"{len(found)} hostile calls of {len(functions)} functions ({public} "
        f"public, the others of the native module): {systematic} with one hostile argument (each argument of each "
        f"function with each of {len(hostile_calls.ARRAYS)} kinds of arrays or {len(hostile_calls.NUMBERS)} kinds of "
        f"numbers), {len(found) - systematic} with two or three. Kernels: {options.kernels or 'the fastest here'}.\n"
    )
    print("| function | calls | " + " | ".join(COLUMNS.values()) + " |")
    print("|---|" + "---|" * (len(COLUMNS) + 1))
    for function in [*hostile_calls.CASES, "all"]:
        count = Counter(what for of, _, what, _ in found if function in (of, "all"))
        print(f"| {function} | {sum(count.values())} | " + " | ".join(str(count[what]) for what in COLUMNS) + " |")
    if options.faults:
        faults = [line for line in found if line[2] in ("other error", "wrong", "crash", "hang")]
        Path(options.faults).write_text("".join("\t".join(line) + "\n" for line in faults))


if __name__ == "__main__":
    main()
