"""Join the Fishers that processes made of every n-th batch each into the file that one process would have made."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from npeff.errors import ResumeError, StorageError
from npeff.fishers.file_format import joined_data, write_fishers
from npeff.fishers.fishers import fishers_in
from npeff.fishers.parts import batches_in
from npeff.storage.container import Container, open_container
from npeff.storage.files import atomic

Array = npt.NDArray[Any]
Span = tuple[Container, int, int]


def share_path(out: Path, share: tuple[int, int]) -> Path:
    """Give the file of a share of the work for ``out``: ``fishers.h5.2-of-4``."""
    return out.with_name(f"{out.name}.{share[0]}-of-{share[1]}")


def merge_shares(out: Path, n_shares: int) -> None:
    """Write ``out`` from the files of its shares, with the arrays that one process would have written.

    Args:
        out: The file to make; the shares lie beside it, see :func:`share_path`. They stay.
        n_shares: How many there are; those to which no batch fell have no file.

    Raises:
        StorageError: A share is missing, the disk is full, or a file appeared at ``out`` meanwhile.
        ResumeError: Shares were computed from different models, data or options.
    """
    paths = [share_path(out, (k, n_shares)) for k in range(n_shares)]
    found = [open_container(path) if path.exists() else None for path in paths]
    for share in found:
        if share is not None:
            fishers_in(share).verify()
    lengths = [0 if share is None else len(batches_in(share)) for share in found]
    n_batches = sum(lengths)
    if not n_batches or lengths != [len(range(k, n_batches, n_shares)) for k in range(n_shares)]:
        raise StorageError(
            f"{out}: the shares {', '.join(path.name for path in paths)} do not make a whole: they have "
            f"{', '.join(map(str, lengths))} batches; run the same command again to complete them"
        )
    shares = [share for share in found if share is not None]  # those that have no batch come last
    header = _common_header(shares)
    batches = [batches_in(share) for share in shares]
    ends = [np.concatenate([[0], np.cumsum([size for _, size in own])]).astype(int) for own in batches]
    order = [(number % n_shares, number // n_shares) for number in range(n_batches)]
    spans = [(shares[k], int(ends[k][i]), int(ends[k][i + 1])) for k, i in order]
    if out.exists():
        raise StorageError(
            f"{out}: a file appeared there during the work, and is not overwritten; move it away and run the same "
            "command again: all examples are in its shares"
        )
    with atomic(out) as scratch:
        write_fishers(
            scratch,
            header,
            _coverage([share.json("coverage") for share in shares]),
            [list(batches[k][i]) for k, i in order],
            joined_data(spans),
        )


def remove_shares(out: Path, n_shares: int) -> None:
    """Remove the files of the shares."""
    for k in range(n_shares):
        share_path(out, (k, n_shares)).unlink(missing_ok=True)


def _common_header(shares: Sequence[Container]) -> dict[str, Any]:
    headers = []
    for share in shares:
        provenance = copy.deepcopy(share.json("provenance"))
        (provenance.get("options") or {}).pop("share", None)
        headers.append(
            {
                "kind": share.attributes["kind"],
                "parameters": share.json("parameters"),
                "provenance": provenance,
            }
        )
    for share, header in zip(shares[1:], headers[1:], strict=True):
        if header != headers[0]:
            theirs, ours = header["provenance"], headers[0]["provenance"]
            differing = [name for name in ours if theirs.get(name) != ours[name]] or ["parameters"]
            raise ResumeError(
                f"{share.path}: differs from {shares[0].path.name} in {', '.join(differing)}; every process must use "
                "the same model, data and options: remove the shares and start again"
            )
    return headers[0]


def _coverage(reports: Sequence[list[dict[str, str]]]) -> list[dict[str, str]]:
    """Give, per parameter, the first share's line, or the first line that names a fallback."""
    slow = ("torch.func", "loop")
    return [next((line for line in lines if line["rule"] in slow), lines[0]) for lines in zip(*reports, strict=True)]
