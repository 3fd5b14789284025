"""benchmarks/on_device.sh where there is no device: every part is tried, logged and summed up."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "on_device.sh"

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")


def run(out: Path, *parts: str, **environment: str) -> dict[str, str]:
    """The state of each part: passed, failed with a status, too long."""
    environment = {**os.environ, "PYTHON": sys.executable, **environment}
    subprocess.run(["bash", str(SCRIPT), str(out), *parts], env=environment, check=True, capture_output=True)
    lines = (out / "summary.txt").read_text().splitlines()[1:]
    return {line.split()[0]: " ".join(line[15:].split()[:2]) for line in lines if line.rstrip()[-1].isdigit()}


def test_parts_go_on_and_leave_logs(tmp_path: Path) -> None:
    states = run(tmp_path / "o", "kernels", "memcheck", "decomposition", "profiles")
    assert list(states) == ["kernels", "memcheck", "decomposition", "profiles"]
    for part in ("kernels", "decomposition"):
        assert states[part].startswith("passed")
        assert "measures nothing: it needs a CUDA device" in (tmp_path / "o" / f"{part}.log").read_text()
    if shutil.which("compute-sanitizer") is None:
        assert states["memcheck"].startswith("failed")
        assert "compute-sanitizer" in (tmp_path / "o" / "memcheck.log").read_text()


def test_a_part_has_a_time_limit(tmp_path: Path) -> None:
    slow = tmp_path / "python"
    slow.write_text("#!/bin/sh\necho begun\nexec sleep 60\n")
    slow.chmod(0o755)
    states = run(tmp_path / "o", "kernels", "decomposition", PYTHON=str(slow), LIMITS="2")
    assert set(states.values()) == {"too long"}
    assert (tmp_path / "o" / "kernels.log").read_text() == "begun\n"


def test_the_tests_that_need_a_device_are_found(tmp_path: Path) -> None:
    counting = tmp_path / "python"
    counting.write_text('#!/bin/sh\n[ "$1" = -c ] && exit 1\necho "$@"\n')
    counting.chmod(0o755)
    run(tmp_path / "o", "tests", PYTHON=str(counting))
    said = (tmp_path / "o" / "tests.log").read_text()
    assert "-m gpu" in said and "test_cuda.py" in said and "test_cuda_end_to_end.py" in said
