"""The CUDA kernels on arrays of the processor, compiled as a module when a test first asks for it.

The module has the functions of ``npeff._cuda`` (tests/native/emulated_cuda.cpp): the same bindings and the same blocks
of threads, run one thread after the other in an order that the ``stream`` argument seeds. The functions of this module
take numpy arrays, too, in shared memory; those defined here call them more briefly. The compiler is ``CXX``, or else
``c++``, ``g++`` or ``clang++``; where there is none the test is skipped.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from npeff.kernels.arrays import ALL_FINITE
from npeff.kernels.sparse import mirror_

NAME = "npeff_emulated_cuda"
HERE = Path(__file__).parent
CSRC = HERE.parent / "csrc"
SOURCES = (HERE / "native" / "emulated_cuda.cpp", CSRC / "common" / "tensor_view.cpp")


class Selectors:
    """Running selections of the k largest |value|, in memory of the processor."""

    def __init__(self, n: int, k: int, keep_zeros: bool, seed: int) -> None:
        self.seed = seed
        self.memory = torch.zeros(module().topk_bytes(n=n, k=k), dtype=torch.uint8)
        self.selectors = {"memory": self.memory, "n": n, "k": k, "keep_zeros": keep_zeros, "stream": seed}

    def push(self, block: Any, bases: np.ndarray, targets: np.ndarray) -> None:
        """Take in the rows of a block."""
        rows = by_target(targets, np.zeros_like(bases), self.selectors["n"])
        call("topk_push", **self.selectors, block=block, targets=targets, bases=bases, **rows)

    def finish(self, counts: np.ndarray, indices: np.ndarray, values: np.ndarray) -> None:
        """Fill the selections; the selectors are empty afterwards."""
        call("topk_finish", **self.selectors, counts=counts, indices=indices, values=values)

    def held(self, selector: int) -> int:
        """Candidates that a selector holds: the first number of its state of 64 bytes."""
        return int(self.memory[64 * selector :][:8].view(torch.int64))


def by_target(targets: np.ndarray, bases: np.ndarray, n_targets: int) -> dict[str, np.ndarray]:
    """The rows by target and base (``order``), and where each target's begin (``starts``)."""
    order = np.lexsort((bases, targets))
    return {"order": order, "starts": np.searchsorted(targets[order], np.arange(n_targets + 1)).astype(np.int64)}


def csr(indptr: Any, indices: Any, values: Any, n_columns: int) -> Any:
    """A matrix as the emulated kernels take it."""
    return call("Csr", indptr=indptr, indices=indices, values=values, n_columns=n_columns, stream=0)


def gram(a: Any, k: np.ndarray, seed: int) -> None:
    """Add A·Aᵀ to k, both triangles."""
    call("gram_panel", a=a, k=k, stream=seed)
    mirror_(torch.from_numpy(k))


def nnls(gram: np.ndarray, cross: np.ndarray, w: np.ndarray, kkt: np.ndarray, max_sweeps: int, tol: float,
         seed: int) -> tuple[int, int]:  # fmt: skip
    """The first row that is not finite (or −1), and the sweeps made."""
    status = np.full(2, -7)
    kkt.fill(np.inf)
    problem = {"gram": gram, "cross": cross, "w": w, "residual": kkt, "tol": tol, "stream": seed}
    call("nnls", **problem, max_sweeps=max_sweeps, kkt=True, status=status)
    return -1 if status[0] == ALL_FINITE else int(status[0]), int(status[1])


def call(name: str, /, **arguments: Any) -> Any:
    """Call a function of the module."""
    given = {key: torch.from_numpy(x) if isinstance(x, np.ndarray) else x for key, x in arguments.items()}
    return getattr(module(), name)(**given)


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    return functools.partial(call, name)


@functools.cache
def module() -> ModuleType:
    """The module, from the cache folder where these very sources were compiled before."""
    path = _folder() / f"{NAME}{sysconfig.get_config_var('EXT_SUFFIX')}"
    if not path.exists():
        _compile(path)
    spec = importlib.util.spec_from_file_location(NAME, path)
    assert spec is not None and spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def compiler() -> list[str]:
    """The command of a C++17 compiler."""
    if os.environ.get("CXX"):
        return shlex.split(os.environ["CXX"])
    found = next((name for name in ("c++", "g++", "clang++") if shutil.which(name)), None)
    if found is None:
        pytest.skip("the emulated CUDA kernels are compiled for the processor, and there is no C++ compiler here")
    return [found]


def _folder() -> Path:
    digest = hashlib.sha256(sys.version.encode())
    for path in sorted([*SOURCES, HERE / "native" / "emulated_blocks.h", *CSRC.rglob("*.h")]):
        digest.update(path.name.encode() + path.read_bytes())
    folder = Path(tempfile.gettempdir()) / f"npeff-emulated-cuda-{os.getuid()}-{digest.hexdigest()[:16]}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():  # of another user: nothing in it is loaded
        return Path(tempfile.mkdtemp())
    return folder


def _compile(path: Path) -> None:
    pybind11 = pytest.importorskip("pybind11", reason="the emulated CUDA kernels are compiled with pybind11's headers")
    includes = [
        sysconfig.get_path("include"),
        pybind11.get_include(),
        CSRC,
    ]
    command = [
        *compiler(),
        "-std=c++17",
        "-O1",
        "-fPIC",
        "-fvisibility=hidden",
        "-pthread",
        *(f"-I{x}" for x in includes),
    ]
    link = ["-shared", "-pthread", *(["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else [])]
    with tempfile.TemporaryDirectory() as work:
        objects = [f"{work}/{source.stem}.o" for source in SOURCES]
        running = [
            subprocess.Popen([*command, "-c", str(source), "-o", to], stderr=subprocess.PIPE, text=True)
            for source, to in zip(SOURCES, objects, strict=True)
        ]
        said = [process.communicate()[1] for process in running]
        failed = [text for process, text in zip(running, said, strict=True) if process.returncode]
        assert not failed, failed[0]
        subprocess.run([*compiler(), *link, *objects, "-o", f"{work}/{path.name}"], check=True)
        built = path.with_name(f"{path.name}.{os.getpid()}")
        shutil.copyfile(f"{work}/{path.name}", built)
        built.replace(path)
