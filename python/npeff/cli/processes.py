"""Commands that ``torchrun`` started several times: one result, told once."""

from __future__ import annotations

import os
from typing import Any

from npeff.cli.common import misused, several


def first() -> bool:
    """Whether this process is the one that speaks."""
    return not several() or os.environ.get("RANK", "0") == "0"


def decompose_together(fishers: Any, n_components: int, select: bool, **options: Any) -> Any:
    """Call :func:`npeff.distributed.decompose`.

    Returns:
        The components in the process that speaks, None in the others.
    """
    from npeff.distributed import decompose

    if select:
        misused("--select tries numbers of components in one process; choose one, then start several")
    return decompose(fishers, n_components, **options)
