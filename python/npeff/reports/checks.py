"""What ``report`` was given, checked before the work."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from numbers import Integral
from pathlib import Path
from typing import Any

from npeff.errors import ArgumentError, StorageError
from npeff.storage.files import check_target


def check_components(components: Any) -> None:
    """Refuse what is no Components.

    Raises:
        ArgumentError: With what it is instead.
    """
    from npeff.components.components import Components

    if not isinstance(components, Components):
        raise ArgumentError(f"components: expected Components, got {type(components).__name__}; see npeff.decompose")


def check_options(data: Any, k: Any, tokenizer: Any, size_limit: Any = None) -> None:
    """Refuse arguments of other types than documented.

    Raises:
        ArgumentError: Naming the argument.
    """
    if not isinstance(k, Integral) or k < 1:
        raise ArgumentError(f"k: expected at least 1 top example per component, got {k!r}")
    if data is not None and not isinstance(data, Iterable) and not hasattr(data, "__getitem__"):
        raise ArgumentError(f"data: expected an iterable of batches, got {data!r}")
    if tokenizer is not None and not callable(getattr(tokenizer, "decode", None)):
        raise ArgumentError(f"tokenizer: expected something with decode(ids), got a {type(tokenizer).__name__}")
    if size_limit is not None and (not isinstance(size_limit, Integral) or size_limit < 1):
        raise ArgumentError(f"size_limit: expected a number of bytes, got {size_limit!r}")


def names_of(given: Sequence[str] | None, data: Any, n_classes: int) -> Sequence[str] | None:
    """The classes' names: as given, or as the data has them.

    Raises:
        ArgumentError: They are too few, or a single string.
    """
    if given is not None and (isinstance(given, str) or not hasattr(given, "__len__")):
        raise ArgumentError(f"class_names: expected a list of names, got {given!r}")
    if given is not None:
        if len(given) < n_classes:
            raise ArgumentError(f"class_names: expected {n_classes} names, one per class, got {len(given)}")
        return given
    for owner, attribute in (
        (data, "class_names"),
        (getattr(data, "dataset", None), "class_names"),
        (getattr(data, "dataset", None), "classes"),
    ):
        found = getattr(owner, attribute, None)
        if isinstance(found, Sequence) and not isinstance(found, str) and len(found) >= n_classes:
            return found
    return None


def check_page(path: Path) -> None:
    """Make sure, before the work, that a page may be written at ``path``; folders that are missing will be made.

    Raises:
        StorageError: A file stands in the place of a folder, or the reverse, or the folder may not be written to.
    """
    there = path
    while not there.parent.exists():
        there = there.parent
    if not there.parent.is_dir():
        raise StorageError(
            f"{path}: writing failed ({there.parent} is a file, not a folder). Choose another folder, or a name ending "
            "in .html"
        )
    check_target(there)
