"""What kind of file stands at a path: Fishers or Components, of npeff or in a published layout; may it be replaced?"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from npeff.errors import ForeignFileError, NewerFileError, NpeffError, StorageError
from npeff.storage.container import Container, open_file
from npeff.storage.files import check_target

LAYOUTS = (
    "low_rank_fishers",
    "low_rank_fishers_variable",
    "diagonal_fishers",
    "low_rank_decomposition",
    "diagonal_decomposition",
)


def layout_of(file: Container) -> str | None:
    """Return the published layout that an HDF5 file has, by the names in it; None where it has none."""
    found = {*file.specs, *file.refused, *("data/H" for name in file.specs if name.startswith("data/H/"))}
    if {"data/fisher/values", "data/fisher/indices"} <= found:
        return "diagonal_fishers"
    if {"data/values", "data/row_indices"} <= found:
        if "data/col_offsets" in found:
            return "low_rank_fishers"
        if {"data/ranks", "data/col_sizes"} <= found:
            return "low_rank_fishers_variable"
    if "data/W" in found:
        if {"data/H", "data/reduce_kept_indices"} & found:
            return "diagonal_decomposition"
        if {"data/G", "data/new_to_old_col_indices"} & found:
            return "low_rank_decomposition"
    return None


def recognise(path: Path) -> Container:
    """Open a file of npeff, or one in a published layout; its content is then the layout's name.

    Raises:
        ForeignFileError: Neither.
    """
    found = open_file(path)
    if found.is_npeff:
        return found
    layout = layout_of(found)
    if layout is None:
        raise ForeignFileError(
            f"{path}: an HDF5 file, but neither npeff's (no attribute format = 'npeff') nor in a published layout "
            "(no data/values, data/fisher, data/G or data/H)"
        )
    return replace(found, content=layout)


def check_replaceable(path: Path, same: Callable[[Container], bool], what: str) -> None:
    """Make sure that ``path`` is free, or holds what is about to be written anew.

    Raises:
        StorageError: Something else is there, or the folder is missing.
    """
    check_target(path)
    if not path.exists():
        return
    try:
        replaceable = same(recognise(path))
    except NpeffError:
        replaceable = False
    if not replaceable:
        raise StorageError(
            f"{path}: a file that does not hold {what} is there, and is not overwritten; remove it, or "
            "choose another name"
        )


def check_components_target(path: Path) -> None:
    """Make sure that Components may be saved at ``path``: worth knowing before they are computed.

    Raises:
        StorageError: Something else is there, or the folder is missing.
    """
    check_replaceable(
        path,
        lambda found: found.content == "components",
        "Components saved by npeff",
    )


def refuse_npeff_file(path: Path) -> None:
    """Make sure that a file of another format may be written at ``path``, and that no work of npeff is lost by it.

    Raises:
        StorageError: Fishers or Components are there, npeff's or in a published layout; or the folder is missing.
    """
    check_target(path)
    if not path.exists():
        return
    try:
        recognise(path)
    except NewerFileError:
        pass
    except NpeffError:
        return
    raise StorageError(f"{path}: holds Fishers or Components, and is not overwritten; choose another name")
