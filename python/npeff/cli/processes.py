"""Commands that ``torchrun`` started several times: one result, told once."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from npeff.cli.common import misused, several


def first() -> bool:
    """Whether this process is the one that speaks."""
    return not several() or os.environ.get("RANK", "0") == "0"


def decompose_together(fishers: Any, n_components: int, out: Path, select: bool, **options: Any) -> Any:
    """:func:`npeff.distributed.decompose`, its state kept beside ``out`` so that the same command resumes.

    Returns:
        The components in the process that speaks, None in the others.
    """
    from npeff.distributed import decompose

    if select:
        misused("--select tries numbers of components in one process; choose one, then start several")
    options.setdefault("checkpoint", out.with_name(f"{out.name}.search"))
    return decompose(fishers, n_components, **options)
