"""The scripts of benchmarks/ and examples/ stand first on the path of imports when they run."""

import importlib.machinery
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPTS = sorted(path for folder in ("benchmarks", "examples") for path in (ROOT / folder).rglob("*.py"))
OF_PACKAGES_TORCH_LOOKS_FOR = {"cuda", "optree", "triton"}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_script_hides_a_module(script: Path) -> None:
    """A ``benchmarks/cuda.py`` would be imported in place of ``cuda.bindings``' package, and torch would not load."""
    elsewhere = [entry for entry in sys.path if entry and not Path(entry).is_relative_to(ROOT)]
    assert script.stem not in sys.stdlib_module_names | OF_PACKAGES_TORCH_LOOKS_FOR
    assert importlib.machinery.PathFinder.find_spec(script.stem, elsewhere) is None
