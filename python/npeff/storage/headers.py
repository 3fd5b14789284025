"""What work on disk was made with, compared with what is asked for now."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from npeff.errors import NewerFileError, ResumeError, StorageError
from npeff.storage.container import FORMAT_VERSION
from npeff.storage.documents import item, read_json
from npeff.storage.hdf5 import to_json


def differences(then: object, now: object, name: str = "") -> list[str]:
    """What differs between two JSON values, one line per item, with its dotted name."""
    if isinstance(then, dict) and isinstance(now, dict):
        keys = sorted({*then, *now})
        return [
            line for key in keys for line in differences(then.get(key), now.get(key), f"{name}.{key}" if name else key)
        ]
    if isinstance(then, list) and isinstance(now, list) and len(then) == len(now):
        return [
            line for i, pair in enumerate(zip(then, now, strict=True)) for line in differences(*pair, f"{name}[{i}]")
        ]
    return [] if then == now else [f"{name}: {_short(then)} then, {_short(now)} now"]


def _short(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}…"


def check_header(out: Path, where: Path, then: object, now: object) -> None:
    """Make sure that work found on disk was made with the same model and options.

    Args:
        out: The output asked for.
        where: What holds the older work: ``out`` itself or its parts folder.
        then: Its header.
        now: The header of this run.

    Raises:
        ResumeError: They differ; says in what.
    """
    lines = differences(then, now)
    if lines:
        more = f" (and {len(lines) - 5} more)" if len(lines) > 5 else ""
        work = "finished" if where == out else "unfinished"
        raise ResumeError(
            f"{where} holds {work} work with other settings: {'; '.join(lines[:5])}{more}. "
            f"Use the same settings to continue it, choose another out than {out}, or remove {where} to "
            "start anew."
        )


def plain(header: dict[str, Any]) -> Any:
    """The header as JSON gives it back."""
    return json.loads(to_json(header, "header"))


def read_header(path: Path) -> dict[str, Any]:
    """The header of unfinished work.

    Raises:
        StorageError: It is damaged.
        NewerFileError: A newer npeff wrote it.
    """
    try:
        document = read_json(path, finite=False)
        version, header = item(document, "format_version", str(path), int), item(document, "header", str(path), dict)
    except StorageError as error:
        raise StorageError(f"{error}; remove {path.parent} to start anew") from error
    if version > FORMAT_VERSION:
        raise NewerFileError(
            f"{path}: format version {version}, this npeff knows {FORMAT_VERSION}: upgrade npeff to continue"
        )
    return header
