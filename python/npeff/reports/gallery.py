"""The examples of a report as pictures, text and strips, each encoded once, as the data goes by."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from npeff.reports.examples import Example, stream
from npeff.reports.images import PIXELATED_BELOW, Scale, data_uri, limit_of, sprite, strip, tile
from npeff.reports.spool import Spool
from npeff.reports.summary import DELAY, Top
from npeff.reports.text import excerpt, printable
from npeff.reports.wording import ClassNames, coefficient

SAMPLE = 256
"""So many examples decide how numbers become brightness and colour."""

SAMPLE_BYTES = 64 << 20
SHOWN, OTHER = 160, 96  # pixels of the pictures of examples on some component's page, and of the others
LONGEST = 20_000  # characters kept of a text on some component's page; EXTRACT of the others
EXTRACT = 400


class Gallery:
    """What to show of each example; for use in a ``with`` block.

    Attributes:
        kept: Raw examples that were asked for by position.
    """

    def __init__(self, shown: Collection[int] = (), tiles: Collection[int] = (), keep: Collection[int] = ()) -> None:
        """Make an empty gallery.

        Args:
            shown: Positions that appear on some component's page: kept large.
            tiles: Positions that need a thumbnail.
            keep: Positions whose raw input is needed too.
        """
        self._shown, self._wants_tile, self._keep = frozenset(shown), frozenset(tiles), frozenset(keep)
        self._spool = Spool()
        self._tiles: dict[int, npt.NDArray[np.uint8]] = {}
        self._scales: dict[int, Scale] = {}
        self._limit: float | None = None
        self._waiting: list[tuple[int, Example]] = []
        self._waiting_bytes = 0
        self.kept: dict[int, Example] = {}

    def __enter__(self) -> Gallery:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._spool.close()

    def __len__(self) -> int:
        return len(self._spool)

    def __contains__(self, position: object) -> bool:
        return position in self._spool

    # ---- filling -------------------------------------------------------------------------------------------

    def fill(
        self,
        data: Iterable[Any],
        wanted: Collection[int],
        labels: Mapping[int, int],
        tokenizer: Any = None,
        progress: bool = False,
    ) -> None:
        """Iterate the data once and encode the wanted examples; see :func:`npeff.reports.examples.stream`."""
        found = stream(data, wanted, labels, tokenizer)
        bar = tqdm(found, "examples", len(wanted), delay=DELAY, disable=not progress, unit="example")
        for position, example in bar:
            if position in self._keep:
                self.kept[position] = example
            self._waiting.append((position, example))
            self._waiting_bytes += sum(a.nbytes for a in (example.image, example.values) if a is not None)
            if self._limit is not None or len(self._waiting) >= SAMPLE or self._waiting_bytes >= SAMPLE_BYTES:
                self._encode_waiting()
        self._encode_waiting()

    def _encode_waiting(self) -> None:
        if self._limit is None:  # the first: they decide the scales
            images = [e.image for _, e in self._waiting if e.image is not None]
            values = [e.values for _, e in self._waiting if e.values is not None]
            for channels in {_channels(image) for image in images}:
                self._scales[channels] = Scale.of([image for image in images if _channels(image) == channels])
            self._limit = limit_of(values) if values else 1.0
        for position, example in self._waiting:
            self._spool[position] = self._encoded(position, example)
        self._waiting, self._waiting_bytes = [], 0

    def _encoded(self, position: int, example: Example) -> dict[str, Any]:
        shown = position in self._shown
        if example.text is not None:
            return {"kind": "text", "text": printable(example.text[: LONGEST if shown else EXTRACT])}
        if example.image is not None:
            pixels = self.pixels(example.image)
            if position in self._wants_tile:
                self._tiles[position] = tile(pixels)
            small = max(pixels.shape[:2]) <= PIXELATED_BELOW
            return {"kind": "image", "uri": data_uri(pixels, SHOWN if shown else OTHER), "small": small}
        assert example.values is not None
        sample = ", ".join(f"{v:.3g}" for v in example.values.ravel()[:6])
        more = ", …" if example.values.size > 6 else ""
        uri = data_uri(strip(example.values, self._limit or 1.0), 256)
        return {"kind": "values", "uri": uri, "values": f"{sample}{more}"}

    def pixels(self, image: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
        """An image's bytes on the gallery's scale."""
        channels = _channels(image)
        if channels not in self._scales:
            self._scales[channels] = Scale.of([image])
        return self._scales[channels].bytes(image)

    # ---- showing -------------------------------------------------------------------------------------------

    def encoded(self, position: int) -> dict[str, Any] | None:
        """``kind`` (``"image"``, ``"text"``, ``"values"``) and what goes with it; None for what is not here."""
        return self._spool.get(position)

    def show(self, top: Top, names: ClassNames) -> dict[str, Any]:
        """An example with its picture, text or strip; by its number alone where there is none."""
        base, found = plain(top, names), self.encoded(top.position)
        if found is None:
            return base
        if found["kind"] == "text":
            start, rest = excerpt(found["text"])
            return {**base, "kind": "text", "start": start, "rest": rest}
        alt = f"{base['alt']}; values {found['values']}" if found["kind"] == "values" else base["alt"]
        return {**base, **found, "alt": alt}

    def thumbs(self, tops: Iterable[Top]) -> bytes | None:
        """Thumbnails of image examples as one picture, or None."""
        tiles = [self._tiles[top.position] for top in tops if top.position in self._tiles]
        return sprite(tiles) if tiles else None

    def quote(self, top: Top) -> str:
        """The first words of a text example; empty for others."""
        found = self.encoded(top.position)
        return excerpt(found["text"], 60)[0] if found and found["kind"] == "text" else ""


def plain(top: Top, names: ClassNames) -> dict[str, Any]:
    """An example by its number alone."""
    known = {"labelled": top.label, "predicted": top.prediction}
    verdict = [f"{word} {names[c]}" for word, c in known.items() if c >= 0]
    shown = top.label if top.label >= 0 else top.prediction
    return {
        "kind": "number",
        "top": top,
        "label": names[shown] if shown >= 0 else "",
        "prediction": names[top.prediction],
        "alt": ", ".join([f"Example {top.position}", *verdict, f"coefficient {coefficient(top.coefficient)}"]),
    }


def _channels(image: npt.NDArray[Any]) -> int:
    return int(image.shape[2]) if image.ndim == 3 else 1
