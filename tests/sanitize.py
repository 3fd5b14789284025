"""The native tests and the fuzzer of the boundary, with the CPU kernels built under sanitizers.

    python tests/sanitize.py [--sanitizer address thread] [--kernels base avx2 avx512] [--examples 3000] [--quick]

``address`` is AddressSanitizer with UndefinedBehaviorSanitizer; ``thread`` is ThreadSanitizer. The interpreter must
have npeff's dependencies, pytest, hypothesis and pybind11; CMake ≥ 3.24 and GCC must be there. Nothing is installed:
the module is built in a temporary folder, beside links to the package's Python files. Exits with 1 if anything was
found.

ThreadSanitizer sees the kernels' own accesses; torch and the interpreter are not instrumented, and would be reported.
So it runs a driver without torch (tests/native/threads.py): every kernel from several Python threads, with several
threads each, while the instruction set changes.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TESTS = ROOT / "tests"
FLAGS = {
    # Checks that cost most of the compiler's time and that AddressSanitizer makes anyway are left out.
    "address": "-fsanitize=address,undefined -fno-sanitize=vptr,null,object-size,return,pointer-overflow "
    "-fno-sanitize-recover=undefined",
    "thread": "-fsanitize=thread",
}
LIBRARIES = {"address": ("libasan.so", "libstdc++.so"), "thread": ("libtsan.so",)}
OPTIONS = {
    "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1:max_allocation_size_mb=6000:detect_odr_violation=0",
    "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
    "TSAN_OPTIONS": "exitcode=66:halt_on_error=0:report_signal_unsafe=0",
}
SUITES = ["topk", "nnls", "spmm", "sparse_gram", "sketch", "fisher_norms", "convolution_kernel", "native_hostile"]


def build(folder: Path, sanitizer: str) -> None:
    """npeff with a sanitised native module, in ``folder/npeff``."""
    import pybind11

    options = [
        "-DNPEFF_CUDA=OFF",
        "-DNPEFF_OPTIMISATION=-O1",
        "-DCMAKE_BUILD_TYPE=None",
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        f"-DCMAKE_CXX_FLAGS={FLAGS[sanitizer]} -fno-omit-frame-pointer -g1",
        *(["-G", "Ninja"] if shutil.which("ninja") else []),
    ]
    made = folder / "build"
    subprocess.run(["cmake", "-S", ROOT, "-B", made, *options], check=True, stdout=subprocess.DEVNULL)
    subprocess.run(["cmake", "--build", made, "--parallel", str(os.cpu_count() or 1)], check=True)
    (folder / "npeff").mkdir()
    for entry in (ROOT / "python" / "npeff").iterdir():
        if not entry.name.startswith(("_native.", "_cuda.")) or entry.suffix == ".pyi":
            (folder / "npeff" / entry.name).symlink_to(entry)
    shutil.copy(next((made / "csrc").glob("_native*.so")), folder / "npeff")


def environment(folder: Path, sanitizer: str, kernels: str, examples: int) -> dict[str, str]:
    compiler = os.environ.get("CXX", "g++")
    asked = [[compiler, f"-print-file-name={name}"] for name in LIBRARIES[sanitizer]]
    found = [subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip() for command in asked]
    own = {
        "LD_PRELOAD": " ".join(found),
        "PYTHONPATH": str(folder),
        "NPEFF_KERNELS": kernels,
        "NPEFF_FUZZ_EXAMPLES": str(examples),
        "NPEFF_FUZZ_FRUGAL": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONMALLOC": "malloc",
    }
    return {**os.environ, **OPTIONS, **own}


def available(folder: Path, sanitizer: str) -> set[str]:
    code = "from npeff import _native; from npeff.kernels import available; print(_native.__file__, *available())"
    command = [*prefix(sanitizer), sys.executable, "-c", code]
    said = subprocess.run(
        command, env=environment(folder, sanitizer, "", 0), capture_output=True, text=True, cwd=TESTS, check=True
    )
    file, *names = said.stdout.split()
    if not Path(file).is_relative_to(folder):
        raise SystemExit(
            f"{file} is imported before the sanitised module: use an interpreter without an editable npeff"
        )
    return set(names)


def prefix(sanitizer: str) -> list[str]:
    """ThreadSanitizer of older compilers cannot cope with far-apart random addresses."""
    return ["setarch", platform.machine(), "-R"] if sanitizer == "thread" and shutil.which("setarch") else []


def commands(sanitizer: str, quick: bool) -> list[list[str]]:
    if sanitizer == "thread":
        return [[sys.executable, "-W", "ignore", str(TESTS / "native" / "threads.py")]]
    suites = SUITES[-1:] if quick else SUITES
    tests = ["-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    named = [str(TESTS / "kernels" / f"test_{name}.py") for name in suites]
    return [
        [sys.executable, *tests, *named, "-k", "not ctrl_c and not file"],
        [sys.executable, *tests, str(TESTS / "kernels" / "test_native_fuzz.py")],
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sanitizer", nargs="+", choices=list(FLAGS), default=list(FLAGS))
    sets = ["base", "avx2", "avx512"]
    parser.add_argument("--kernels", nargs="+", choices=[*sets, "widest"], default=sets, help="instruction sets")
    parser.add_argument("--examples", type=int, default=3000, help="calls of the fuzzer")
    parser.add_argument("--quick", action="store_true", help="of the tests, only those of hostile arguments")
    options = parser.parse_args()
    failed = []
    for sanitizer in options.sanitizer:
        with tempfile.TemporaryDirectory() as work:
            build(Path(work), sanitizer)
            there = available(Path(work), sanitizer)
            widest = next(name for name in ("avx512", "avx2", "base") if name in there)
            for kernels in (widest if name == "widest" else name for name in options.kernels):
                if kernels not in there:
                    print(f"{sanitizer}, {kernels}: not on this processor", flush=True)
                    continue
                own = environment(Path(work), sanitizer, kernels, options.examples)
                clean = True
                for command in commands(sanitizer, options.quick):
                    clean &= subprocess.run([*prefix(sanitizer), *command], env=own, cwd=TESTS).returncode == 0
                print(f"{sanitizer}, {kernels}: {'clean' if clean else 'FOUND SOMETHING'}", flush=True)
                failed += [] if clean else [(sanitizer, kernels)]
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
