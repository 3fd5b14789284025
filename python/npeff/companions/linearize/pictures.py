"""Contributions as pictures: the input beside what each of its numbers gave, red for and blue against."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from npeff.batches.batches import looks_like_image
from npeff.errors import ArgumentError
from npeff.storage.files import atomic, check_target, path_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Array = npt.NDArray[Any]
COLOURS = "RdBu_r"


def contribution_grid(
    inputs: Tensor,
    maps: Sequence[Tensor],
    titles: Sequence[str],
    rows: Sequence[str] = (),
    *,
    shared: bool = False,
) -> Figure:
    """A row per example: the input, then one picture of contributions per column.

    Args:
        inputs: ``(n, *s)``.
        maps: Each ``(n, *s)``: contributions; channels are summed.
        titles: One per map.
        rows: One per example.
        shared: One colour scale for all; otherwise each picture has its own, so that faint ones can be read.

    Returns:
        A figure; red is positive, blue negative, white 0.

    Raises:
        ArgumentError: The inputs are no pictures, or the numbers of maps and titles differ.
    """
    from matplotlib.figure import Figure

    if len(maps) != len(titles):
        raise ArgumentError(f"titles: expected {len(maps)}, one per map, got {len(titles)}")
    images = [_picture(item) for item in inputs]
    drawn = [[_summed(item) for item in column] for column in maps]
    limit = max((float(np.abs(item).max()) for column in drawn for item in column), default=0.0)
    n, columns = len(images), 1 + len(maps)
    figure = Figure((1.25 * columns + 0.3, 1.25 * n + 0.35), layout="constrained", dpi=80)
    axes = figure.subplots(n, columns, squeeze=False)
    for i, image in enumerate(images):
        _bare(axes[i, 0]).imshow(image, cmap="gray_r")
        for k, column in enumerate(drawn, 1):
            most = limit if shared else float(np.abs(column[i]).max())
            _bare(axes[i, k]).imshow(column[i], cmap=COLOURS, vmin=-(most or 1), vmax=most or 1)
        if rows:
            axes[i, 0].set_ylabel(rows[i], fontsize=8)
    for k, title in enumerate(("input", *titles)):
        axes[0, k].set_title(title, fontsize=8)
    return figure


def contribution_bars(values: Tensor, title: str, most: int = 40) -> Figure:
    """Contributions that have no natural picture: the largest, as bars.

    Args:
        values: ``(*s)``.
        title: Of the figure.
        most: Bars.
    """
    from matplotlib.figure import Figure

    flat = values.detach().cpu().double().reshape(-1).numpy()
    chosen = np.sort(np.argsort(-np.abs(flat), kind="stable")[:most])
    figure = Figure((6, 0.6 + 0.16 * len(chosen)), layout="constrained", dpi=80)
    axes = figure.subplots()
    colours = ["#b24124" if flat[i] > 0 else "#215c8c" for i in chosen]
    axes.barh(range(len(chosen)), flat[chosen], color=colours)
    names = [str(tuple(map(int, np.unravel_index(i, values.shape)))).replace(",)", ")") for i in chosen]
    axes.set_yticks(range(len(chosen)), names, fontsize=7)
    axes.invert_yaxis()
    axes.set_title(title, fontsize=9)
    axes.set_xlabel("contribution")
    return figure


def is_picture(x: Tensor) -> bool:
    """Whether one example ``(*s)`` looks like an image."""
    return looks_like_image(x.shape)


def save_figure(figure: Figure, path: str | Path) -> Path:
    """Write a figure; the suffix decides the format.

    Args:
        figure: Matplotlib's.
        path: Ending in ``.png``, ``.svg`` or ``.pdf``; replaced only once the new file is whole.

    Returns:
        The path.

    Raises:
        ArgumentError: Another suffix.
        StorageError: The file cannot be written.
    """
    path = path_of(path, "out")
    suffix = path.suffix.lower().removeprefix(".")
    if suffix not in ("png", "svg", "pdf"):
        raise ArgumentError(f"out: expected a name ending in .png, .svg or .pdf, got {path}")
    check_target(path)
    with atomic(path) as scratch:
        figure.savefig(scratch, format=suffix)
    return path


def _picture(x: Tensor) -> Array:
    image = x.detach().cpu().double().numpy()
    if not looks_like_image(image.shape):
        raise ArgumentError(f"inputs: expected pictures (C, H, W) or (H, W), C 1 or 3, got shape {image.shape}")
    if image.ndim == 3 and image.shape[0] in (1, 3):
        image = image.transpose(1, 2, 0)
    low, high = image.min(), image.max()
    image = (image - low) / ((high - low) or 1)
    return image[..., 0] if image.ndim == 3 and image.shape[2] == 1 else image


def _summed(x: Tensor) -> Array:
    image = x.detach().cpu().double().numpy()
    if image.ndim == 3:
        image = image.sum(0 if image.shape[0] in (1, 3) else 2)
    return image


def _bare(axes: Axes) -> Axes:
    axes.set_xticks([])
    axes.set_yticks([])
    return axes
