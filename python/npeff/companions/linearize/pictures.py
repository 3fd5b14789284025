"""Contributions as pictures: the input beside the contribution of each of its numbers, red for and blue against."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from npeff.batches.batches import looks_like_image

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Array = npt.NDArray[Any]

BARS = 40
"""Bars of one chart: the largest contributions."""


def contribution_figure(inputs: Tensor, maps: Mapping[str, Tensor]) -> Figure:
    """Draw contributions, a row per example and a column per map; the scale differs from picture to picture.

    Inputs that are pictures, ``(C, H, W)`` or ``(H, W)`` with C 1 or 3, stand beside their contributions, whose
    channels are summed; white is 0. Of other inputs the largest contributions are drawn as bars.

    Args:
        inputs: ``(n, *s)``.
        maps: By title, each ``(n, *s)``.
    """
    from matplotlib.figure import Figure

    examples = list(_array(inputs))
    drawn = {title: _array(values) for title, values in maps.items()}
    pictures = all(looks_like_image(example.shape) for example in examples)
    width, height = (1.25, 1.25) if pictures else (6, 0.4 + 0.16 * min(BARS, examples[0].size))
    columns = len(maps) + pictures
    figure = Figure((width * columns + 0.3, height * len(examples) + 0.35), layout="constrained", dpi=80)
    grid = figure.subplots(len(examples), columns, squeeze=False)
    for i, example in enumerate(examples):
        if pictures:
            low, high = example.min(), example.max()
            _show(grid[i, 0], _channels_last((example - low) / ((high - low) or 1)), cmap="gray_r")
        for axes, values in zip(grid[i, int(pictures) :], drawn.values(), strict=True):
            if pictures:
                summed = _channels_last(values[i])
                summed = summed.sum(2) if summed.ndim == 3 else summed
                most = float(np.abs(summed).max()) or 1
                _show(axes, summed, cmap="RdBu_r", vmin=-most, vmax=most)
            else:
                _bars(axes, values[i])
    for axes, title in zip(grid[0], [*(["input"] if pictures else []), *maps], strict=True):
        axes.set_title(title, fontsize=8)
    return figure


def _array(x: Tensor) -> Array:
    return np.asarray(x.detach().cpu().double().numpy())


def _channels_last(image: Array) -> Array:
    if image.ndim == 3 and image.shape[0] in (1, 3):
        image = image.transpose(1, 2, 0)
    return image[..., 0] if image.ndim == 3 and image.shape[2] == 1 else image


def _show(axes: Axes, image: Array, **options: Any) -> None:
    axes.imshow(image, **options)
    axes.set_xticks([])
    axes.set_yticks([])


def _bars(axes: Axes, values: Array) -> None:
    flat = values.reshape(-1)
    chosen = np.sort(np.argsort(-np.abs(flat), kind="stable")[:BARS])
    axes.barh(range(len(chosen)), flat[chosen], color=["#b24124" if flat[i] > 0 else "#215c8c" for i in chosen])
    names = [str(tuple(map(int, np.unravel_index(i, values.shape)))).replace(",)", ")") for i in chosen]
    axes.set_yticks(range(len(chosen)), names, fontsize=7)
    axes.invert_yaxis()
