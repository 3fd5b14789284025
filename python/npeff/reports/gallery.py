"""The examples of a page as pictures, text and strips."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from npeff.reports.examples import Example
from npeff.reports.images import PIXELATED_BELOW, Scale, data_uri, limit_of, strip
from npeff.reports.summary import Top
from npeff.reports.text import excerpt
from npeff.reports.wording import ClassNames, coefficient

THUMB_SIZE = 32


class Gallery:
    """Pictures and texts of the examples, drawn on one scale and encoded once each."""

    def __init__(self, examples: Mapping[int, Example]) -> None:
        self.examples = examples
        images = [e.image for e in examples.values() if e.image is not None]
        values = [e.values for e in examples.values() if e.values is not None]
        self._scales = {c: Scale.of([i for i in images if _channels(i) == c]) for c in {_channels(i) for i in images}}
        self._limit = limit_of(values) if values else 1.0
        self._uris: dict[tuple[int, int], str] = {}

    def plain(self, top: Top, names: ClassNames) -> dict[str, Any]:
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

    def show(self, top: Top, names: ClassNames) -> dict[str, Any]:
        """An example with its picture, text or strip."""
        base, example = self.plain(top, names), self.examples[top.position]
        if example.text is not None:
            start, rest = excerpt(example.text)
            return {**base, "kind": "text", "start": start, "rest": rest}
        if example.image is not None:
            small = max(example.image.shape[:2]) <= PIXELATED_BELOW
            return {**base, "kind": "image", "uri": self._uri(top.position, 160), "small": small}
        assert example.values is not None
        sample = ", ".join(f"{v:.3g}" for v in example.values.ravel()[:6])
        more = ", …" if example.values.size > 6 else ""
        return {
            **base,
            "kind": "values",
            "uri": self._uri(top.position, 256),
            "alt": f"{base['alt']}; values {sample}{more}",
        }

    def thumb(self, top: Top) -> dict[str, Any]:
        """A very small picture, or a few words."""
        example = self.examples.get(top.position)
        if example is None or example.values is not None:
            return {"kind": "none"}
        if example.text is not None:
            return {"kind": "text", "start": excerpt(example.text, 60)[0]}
        return {"kind": "image", "uri": self._uri(top.position, THUMB_SIZE)}

    def _uri(self, position: int, largest: int) -> str:
        example = self.examples[position]
        key = (position, largest)
        if key not in self._uris:
            if example.image is not None:
                self._uris[key] = data_uri(self._scales[_channels(example.image)].bytes(example.image), largest)
            else:
                assert example.values is not None
                self._uris[key] = data_uri(strip(example.values, self._limit), largest)
        return self._uris[key]


def _channels(image: Any) -> int:
    return int(image.shape[2]) if image.ndim == 3 else 1
