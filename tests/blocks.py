"""The blocks of the CUDA kernels as a module for the processor, compiled when a test first asks for one.

``blocks.Selectors``, ``blocks.spmm``, …: see tests/native/blocks.cpp. Installed packages do not hold them. The compiler
is ``CXX``, or else ``c++``, ``g++`` or ``clang++``; where there is none the test is skipped.
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

import pytest

NAME = "npeff_test_blocks"
HERE = Path(__file__).parent
CSRC = HERE.parent / "csrc"
SOURCES = (
    HERE / "native" / "blocks.cpp",
    HERE / "native" / "blocks_solver.cpp",
    CSRC / "bindings" / "tensor_view.cpp",
    CSRC / "cpu" / "csr_check.cpp",
    CSRC / "cpu" / "parallel.cpp",
)


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    return getattr(module(), name)


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
        pytest.skip("the CUDA kernels' blocks are compiled for the processor, and there is no C++ compiler here")
    return [found]


def _folder() -> Path:
    digest = hashlib.sha256(sys.version.encode())
    for path in sorted([*SOURCES, HERE / "native" / "blocks.h", *CSRC.rglob("*.h")]):
        digest.update(path.name.encode() + path.read_bytes())
    folder = Path(tempfile.gettempdir()) / f"npeff-test-blocks-{os.getuid()}-{digest.hexdigest()[:16]}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():  # somebody else's: nothing of it is loaded
        return Path(tempfile.mkdtemp())
    return folder


def _compile(path: Path) -> None:
    pybind11 = pytest.importorskip("pybind11", reason="the CUDA kernels' blocks are compiled with pybind11's headers")
    includes = [
        sysconfig.get_path("include"),
        pybind11.get_include(),
        CSRC / "include",
        CSRC / "bindings",
        CSRC / "cpu",
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
