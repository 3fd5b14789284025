"""The examples that a report shows: read in one pass over the data, each encoded once as the data goes by."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from tqdm import tqdm

from npeff.batches.batches import Batch
from npeff.batches.reading import looks_like_image, read_batch
from npeff.batches.tensor_trees import leaves
from npeff.errors import ArgumentError, DataError
from npeff.reports.figures import (
    PIXELATED_BELOW,
    Pixels,
    Scale,
    channels_of,
    data_uri,
    full_colour,
    overlay,
    sprite,
    strip,
    tile,
)
from npeff.reports.summary import DELAY, TopExample
from npeff.reports.text import (
    BRIEF,
    FULL,
    ClassNames,
    PlaceText,
    ReadablePlaces,
    Words,
    coefficient,
    excerpt,
    place_in,
    printable,
    read_places,
    spread,
    text_of,
    token_texts,
    words_of,
)

Array = npt.NDArray[Any]

TEXT_KEYS = ("text", "texts", "sentence", "sentences")
INPUT_KEYS = ("pixel_values", "image", "images", "inputs", "input", "x", "features", "input_ids")
LABEL_KEYS = ("labels", "label", "y", "targets", "target")
SAMPLE, SAMPLE_BYTES = 256, 64 << 20
"""So many examples, or bytes of them, decide how numbers become brightness and colour."""
IN_MEMORY = 64 << 20
"""Bytes of encoded examples that are kept in memory; a temporary file takes more."""
SHOWN, OTHER = 160, 96  # pixels of the pictures of examples on some component's page, and of the others
QUOTED = (26, 0)  # characters before and after a place that the table shows
LONGEST, EXTRACT = 20_000, 400  # characters kept of a text on some component's page, and of the others


@dataclass(frozen=True)
class RawExample:
    """One example of the data: exactly one of the first four is set.

    Attributes:
        image: float or integer array ``(H, W)``, ``(H, W, 1)`` or ``(H, W, 3)``.
        text: What to print.
        values: Numbers without a natural picture, ``(d,)`` or ``(t, d)``.
        place: The text around a place.
        ids: ``(tokens,)`` the token ids behind a text, where there are any.
        compared: Whether its label was compared with the one on record.
    """

    image: Array | None = None
    text: str | None = None
    values: Array | None = None
    place: PlaceText | None = None
    ids: Array | None = None
    compared: bool = False


# ---- encoding ----------------------------------------------------------------------------------------------


class Gallery:
    """Pictures, texts and strips of examples, by position in the data; to be closed.

    Args:
        shown: Positions that appear on some component's page: kept large.
        tiles: Positions that need a thumbnail.
        keep: Positions whose raw example is needed too.

    Attributes:
        kept: Raw examples of the positions in ``keep``.
        n_compared: Of how many examples the label was compared with the one on record.
        of_places: Whether the examples are places of texts.
        words: The words of a sample of the texts, or near a sample of the places.
    """

    def __init__(self, shown: Collection[int] = (), tiles: Collection[int] = (), keep: Collection[int] = ()) -> None:
        self._shown, self._wants_tile, self._keep = frozenset(shown), frozenset(tiles), frozenset(keep)
        self._file = tempfile.SpooledTemporaryFile(max_size=IN_MEMORY)  # noqa: SIM115 - closed by close
        self._spans: dict[int, tuple[int, int]] = {}  # where each example's JSON stands in the file
        self._tiles: dict[int, Pixels] = {}
        self._scales: dict[int, Scale] = {}
        self._limit: float | None = None
        self._waiting: list[tuple[int, RawExample]] = []
        self.kept: dict[int, RawExample] = {}
        self.n_compared = 0
        self.of_places = False
        self.words = Words()
        self._near: dict[int, list[str]] = {}  # words of the shown texts, or near the shown places
        self._places: dict[int, PlaceText] = {}  # of the shown positions

    def close(self) -> None:
        """Forget all encoded examples."""
        self._spans.clear()
        self._file.close()

    def __len__(self) -> int:
        return len(self._spans)

    def fill(
        self,
        data: Iterable[Any],
        wanted: Collection[int],
        labels: Mapping[int, int],
        tokenizer: Any = None,
        progress: bool = False,
        name: str = "data",
    ) -> None:
        """Iterate the data once and encode the wanted examples; see :func:`read_examples`.

        Raises:
            DataError: The data ends early, or its labels are not those on record.
        """
        waiting_bytes = 0
        sample = frozenset(spread(sorted(wanted)))
        found = read_examples(data, wanted, labels, tokenizer, name)
        if isinstance(data, ReadablePlaces):
            known = np.asarray(data.labels) >= 0
            places = read_places(data, wanted, labels)
            found = (
                (i, RawExample(place=place, compared=bool(known[i]) and labels.get(i, -1) >= 0)) for i, place in places
            )
            self.of_places = True
            for _, place in read_places(data, spread(range(data.n_examples)), {}):
                self.words.add(place.near())
        bar = tqdm(found, "examples", len(wanted), delay=DELAY, disable=not progress, unit="example")
        for position, example in bar:
            if position in self._keep:
                self.kept[position] = example
            self.n_compared += example.compared
            if example.text is not None and (position in self._shown or position in sample):
                words = words_of(example.text[:LONGEST])
                if position in sample:
                    self.words.add(words)
                if position in self._shown:
                    self._near[position] = words
            self._waiting.append((position, example))
            waiting_bytes += sum(a.nbytes for a in (example.image, example.values) if a is not None)
            if self._limit is not None or len(self._waiting) >= SAMPLE or waiting_bytes >= SAMPLE_BYTES:
                self._encode_waiting()
        self._encode_waiting()

    def _encode_waiting(self) -> None:
        if self._limit is None:  # the first examples: they decide the scales
            images = [e.image for _, e in self._waiting if e.image is not None]
            for channels in {channels_of(image) for image in images}:
                self._scales[channels] = Scale.of([image for image in images if channels_of(image) == channels])
            self._limit = full_colour(*(e.values for _, e in self._waiting if e.values is not None))
        for position, example in self._waiting:
            content = json.dumps(self._encoded(position, example)).encode()
            start = self._file.seek(0, 2)
            self._file.write(content)
            self._spans[position] = (start, len(content))
        self._waiting = []

    def _encoded(self, position: int, example: RawExample) -> dict[str, Any]:
        shown = position in self._shown
        if example.place is not None:
            if shown:
                self._places[position] = example.place
                self._near[position] = example.place.near()
            return {"kind": "place", **example.place.window(*(FULL if shown else BRIEF))}
        if example.text is not None:
            return {"kind": "text", "text": printable(example.text[: LONGEST if shown else EXTRACT])}
        if example.image is not None:
            pixels = self.pixels(example.image)
            if position in self._wants_tile:
                self._tiles[position] = tile(pixels)
            small = max(pixels.shape[:2]) <= PIXELATED_BELOW
            return {"kind": "image", "uri": data_uri(pixels, SHOWN if shown else OTHER), "small": small}
        assert example.values is not None
        sample = ", ".join(f"{v:.3g}" for v in example.values.ravel()[:6]) + (", …" if example.values.size > 6 else "")
        uri = data_uri(strip(example.values, self._limit or 1.0), 256)
        return {"kind": "values", "uri": uri, "values": sample}

    def pixels(self, image: Array) -> Pixels:
        """Return an image's bytes on the gallery's scale."""
        channels = channels_of(image)
        if channels not in self._scales:
            self._scales[channels] = Scale.of([image])
        return self._scales[channels].bytes(image)

    # ---- showing -------------------------------------------------------------------------------------------

    def encoded(self, position: int) -> dict[str, Any] | None:
        """Return an example's ``kind`` (``"image"``, ``"text"``, ``"place"``, ``"values"``) and what goes with it.

        None for examples that were not wanted.
        """
        if position not in self._spans:
            return None
        start, size = self._spans[position]
        self._file.seek(start)
        return dict(json.loads(self._file.read(size)))

    def show(self, top: TopExample, names: ClassNames, window: tuple[int, int] = BRIEF) -> dict[str, Any]:
        """Return what a template prints of an example; of one that is not here, its number alone.

        The window says how many characters to show before and after a place.
        """
        verdict = [
            f"{word} {names[c]}" for word, c in (("labelled", top.label), ("predicted", top.prediction)) if c >= 0
        ]
        base: dict[str, Any] = {
            "kind": "number",
            "top": top,
            "label": names[top.known_class] if top.known_class >= 0 else "",
            "prediction": names[top.prediction],
            "alt": ", ".join([f"Example {top.position}", *verdict, f"coefficient {coefficient(top.coefficient)}"]),
        }
        found = self.encoded(top.position)
        if found is None:
            return base
        if top.position in self._places:
            return {**base, "kind": "place", **self._places[top.position].window(*window)}
        if found["kind"] == "text":
            start, rest = excerpt(found["text"])
            return {**base, "kind": "text", "start": start, "rest": rest}
        more = f"; values {found['values']}" if found["kind"] == "values" else ""
        return {**base, **found, "alt": f"{base['alt']}{more}"}

    def thumbs(self, tops: Iterable[TopExample]) -> bytes | None:
        """Return thumbnails of image examples as one picture; None without images."""
        tiles = [self._tiles[top.position] for top in tops if top.position in self._tiles]
        return sprite(tiles) if tiles else None

    def quote(self, top: TopExample) -> str:
        """Return the first words of a text, or the last before a place; empty for other examples."""
        if top.position in self._places:
            found = self._places[top.position].window(*QUOTED)
            return re.sub(r"^…\W+", "… ", (found["before"] + found["at"]).replace("\n", " "))
        read = self.encoded(top.position)
        return excerpt(read["text"], 60)[0] if read and read["kind"] == "text" else ""

    def telling(self, tops: Iterable[TopExample]) -> list[str]:
        """Return the words that tell these texts or places from the others; see :meth:`Words.telling`."""
        return self.words.telling(
            [(top.coefficient, self._near[top.position]) for top in tops if top.position in self._near]
        )

    def picture(self, position: int) -> Pixels | None:
        """Return an example of ``kept`` as a picture, ``(H, W, 3)``; None for texts and those that are not there."""
        example = self.kept.get(position, RawExample())
        if example.values is not None:
            return strip(example.values, full_colour(example.values))
        if example.image is None:
            return None
        pixels = self.pixels(example.image)
        return np.asarray(np.broadcast_to(np.atleast_3d(pixels), (*pixels.shape[:2], 3)))

    def beginning(self, position: int, length: int) -> str:
        """Return the beginning of a text of ``kept``, or the text around a place; empty for other examples."""
        example = self.kept.get(position, RawExample())
        if example.place is not None:
            return example.place.around()
        start, rest = excerpt(printable(example.text or ""), length)
        return start + (" …" if rest else "")

    def draw_attribution(self, position: int, weights: Array, tokenizer: Any, name: str) -> dict[str, Any]:
        """Draw what in an example of ``kept`` speaks for a component, as a picture or as coloured tokens.

        The weights have the shape of the input, or are one number per token. The result is ``{"uri": …, "small": …}``
        or ``{"tokens": [(text, level), …]}``, levels in [−1, 1]; for a place it is that of :meth:`PlaceText.window`.

        Raises:
            ArgumentError: The weights do not fit the example.
        """
        example = self.kept[position]
        if example.image is not None:
            pixels = self.pixels(example.image)
            return {"uri": data_uri(overlay(pixels, weights, name)), "small": max(pixels.shape[:2]) <= PIXELATED_BELOW}
        flat = np.nan_to_num(weights.ravel())
        levels = np.round(flat / (float(np.abs(flat).max(initial=0)) or 1.0), 4).tolist()
        if example.place is not None:
            if weights.size > len(example.place.tokens):
                raise ArgumentError(
                    f"{name}: expected a number per token, {len(example.place.tokens)}, got shape {weights.shape}"
                )
            return example.place.window(*BRIEF, levels)
        if example.text is not None:
            tokens = tokens_of(example, weights.size, tokenizer, name)
            return {"tokens": [(printable(t), level) for t, level in zip(tokens, levels, strict=True)]}
        assert example.values is not None
        if weights.size != example.values.size:
            raise ArgumentError(f"{name}: expected shape {example.values.shape} as the example's, got {weights.shape}")
        shaped = weights.reshape(example.values.shape)
        return {"uri": data_uri(strip(shaped, full_colour(shaped)), 256), "small": True}


def tokens_of(example: RawExample, count: int, tokenizer: Any, name: str) -> list[str]:
    """Cut a text into ``count`` tokens: those of its ids, each decoded alone; else its words.

    Raises:
        ArgumentError: There are not so many.
    """
    counts: Mapping[str, int] = {}
    if example.ids is not None and tokenizer is not None:
        ids = np.asarray(example.ids).ravel()
        if len(ids) >= count:  # weights may leave out the padding behind
            return [str(tokenizer.decode([int(i)])) for i in ids[:count]]
        counts = {"tokens": len(ids)}
    words = (example.text or "").split()
    if len(words) == count:
        return [word + " " for word in words]
    have = " and ".join(f"{number} {what}" for what, number in {**counts, "words": len(words)}.items())
    raise ArgumentError(f"{name}: {count} weights for a text of {have}; pass a number per token, and tokenizer=")


# ---- reading -----------------------------------------------------------------------------------------------


def read_examples(
    data: Iterable[Any], wanted: Iterable[int], labels: Mapping[int, int], tokenizer: Any = None, name: str = "data"
) -> Iterator[tuple[int, RawExample]]:
    """Iterate the data once and yield ``(position, example)`` for the wanted positions, in order.

    The labels on record of these positions, −1 where unknown, are checked against those in the data.

    Raises:
        DataError: The data ends early, or its labels are not those on record: it is other data, or in another
            order.
    """
    missing = set(wanted)
    start = 0
    token = token_texts(tokenizer)
    for number, batch in enumerate(data if missing else ()):
        own = _as_batch(batch, number)
        inputs, targets = (None, None) if own else _split(batch)
        size = own.n_examples if own else _size(inputs, targets)
        here = [position for position in range(start, start + size) if position in missing]
        for position in here:
            at, place = position - start, None
            if own:
                one = own.take(slice(at, at + 1))
                inputs, targets, at = *_split_one(one), 0
                place = None if token is None else place_in(one, token)
            compared = _check_label(position, targets, at, labels.get(position, -1))
            example = _example(inputs, at, tokenizer) if place is None else RawExample(place=place)
            yield position, replace(example, compared=compared)
        missing.difference_update(here)
        start += size
        if not missing:
            break
    if missing and name != "data":
        raise DataError(
            f"{name}: has {start} examples, and example {max(missing)} is asked for (the first one is 0); pass the "
            "training data that the influences are about, in the same order"
        )
    if missing:
        raise DataError(
            f"data: has {start} examples, but the components were computed from data with at least "
            f"{max(missing) + 1}; pass the data given to compute_fishers, in the same order"
        )


def _as_batch(batch: Any, number: int) -> Batch | None:
    """Read what says its examples by itself: a :class:`npeff.Batch`, or labels ``(b, T)`` that make places."""
    labels = batch.get("labels") if isinstance(batch, Mapping) else None
    labels = batch[1] if isinstance(batch, tuple | list) and len(batch) == 2 else labels
    if not isinstance(batch, Batch) and getattr(labels, "ndim", 0) != 2:
        return None
    read = read_batch(batch, torch.device("cpu"), number, True)
    return read if isinstance(batch, Batch) or read.places is not None else None


def _split_one(example: Batch) -> tuple[Any, Any]:
    """Return inputs and targets of one example, taken as its batch says; both with a first dimension of 1.

    Raises:
        DataError: It holds nothing to show.
    """
    inputs = example.inputs
    if isinstance(inputs, Mapping):
        return _split(inputs)[0], example.labels
    if not isinstance(inputs, torch.Tensor) or inputs.is_nested:
        inputs = next((leaf for leaf in leaves(inputs) if isinstance(leaf, torch.Tensor)), None)
    if inputs is None:
        raise DataError("data: an example holds neither text nor tensors to show")
    if inputs.is_nested:
        inputs = inputs.unbind()[0]
    return inputs if inputs.ndim and len(inputs) == 1 else inputs[None], example.labels


def _split(batch: Any) -> tuple[Any, Any]:
    if isinstance(batch, Mapping):
        targets = next((batch[key] for key in LABEL_KEYS if key in batch), None)
        for key in (*TEXT_KEYS, *INPUT_KEYS):
            if key in batch and batch[key] is not None:
                _check_entries({key: batch[key], "input_ids": batch.get("input_ids"), "labels": targets})
                if key in TEXT_KEYS and batch.get("input_ids") is not None:
                    return {"text": batch[key], "input_ids": batch["input_ids"]}, targets
                return {"input_ids": batch[key]} if key == "input_ids" else batch[key], targets
        rest = {k: v for k, v in batch.items() if k not in LABEL_KEYS and isinstance(v, torch.Tensor | np.ndarray)}
        if not rest:
            raise DataError(
                f"data: a batch is a dict with the keys {', '.join(map(str, batch)) or '(none)'}; "
                "found neither text nor tensors to show"
            )
        return next(iter(rest.values())), targets
    if isinstance(batch, list) and all(isinstance(item, str) for item in batch):
        return batch, None
    if isinstance(batch, tuple | list) and len(batch) >= 2:
        inputs = _split(batch[0])[0] if isinstance(batch[0], Mapping) else batch[0]
        labels = isinstance(batch[1], torch.Tensor | np.ndarray | Sequence) and not isinstance(batch[1], str)
        targets = batch[1] if labels else None
        several = isinstance(inputs, tuple | list) and all(isinstance(i, torch.Tensor | np.ndarray) for i in inputs)
        if several and inputs and targets is not None and len(inputs) != len(targets):
            inputs = inputs[0]  # of several inputs to the model
        _check_entries({**(inputs if isinstance(inputs, Mapping) else {"inputs": inputs}), "labels": targets})
        return inputs, targets
    if isinstance(batch, tuple | list) and len(batch) == 1:
        return batch[0], None
    return batch, None


def _check_entries(parts: Mapping[str, Any]) -> None:
    """Make sure that the parts of a batch have an entry per example.

    Raises:
        DataError: One is a single string, or they have different numbers of entries.
    """
    sizes: dict[str, int] = {}
    for name, part in parts.items():
        if isinstance(part, str | bytes):
            raise DataError(f"data: {name} is one string; expected a list, a text per example")
        if part is not None and getattr(part, "ndim", None) != 0:
            with suppress(TypeError):
                sizes[name] = len(part)
    if len(set(sizes.values())) > 1:
        (name, size), *others = sizes.items()
        rest = ", ".join(f"{other} {count}" for other, count in others)
        raise DataError(f"data: {name} has {size} entries, {rest}; expected one of each per example")


def _size(inputs: Any, targets: Any) -> int:
    inputs = next(iter(inputs.values())) if isinstance(inputs, Mapping) else inputs
    if getattr(inputs, "ndim", 1) == 0:
        raise DataError("data: a batch is a single number; expected its first dimension to be the examples")
    for part in (inputs, targets):
        with suppress(TypeError):
            return len(part)
    raise DataError(f"data: cannot tell how many examples a batch of type {type(inputs).__qualname__} holds")


def _check_label(position: int, targets: Any, index: int, on_record: int) -> bool:
    """Compare a label with the one on record, -1 where unknown; return whether there was something to compare.

    Raises:
        DataError: They differ.
    """
    if targets is None or on_record < 0:
        return False
    given = np.asarray(_array(targets[index]))
    if given.size != 1 or not np.issubdtype(given.dtype, np.integer):
        return False
    if int(given.item()) != on_record:
        raise DataError(
            f"data: example {position} has label {int(given.item())}, but {on_record} when the Fishers were "
            "computed; pass the same data in the same order (is a loader shuffling?)"
        )
    return True


def _example(inputs: Any, index: int, tokenizer: Any) -> RawExample:
    if isinstance(inputs, Mapping):
        ids = _array(inputs["input_ids"][index])
        if "text" in inputs:
            return RawExample(text=text_of(inputs["text"][index]) or str(inputs["text"][index]), ids=ids)
        text = _decoded(tokenizer, ids) if tokenizer is not None else "token ids " + " ".join(map(str, ids.tolist()))
        return RawExample(ids=ids, text=text)
    item = inputs[index]
    if (found := text_of(item)) is not None:
        return RawExample(text=found)
    array = _array(item)
    if tokenizer is not None and array.ndim == 1 and np.issubdtype(array.dtype, np.integer):
        return RawExample(text=_decoded(tokenizer, array), ids=array)
    if looks_like_image(array.shape):
        return RawExample(image=np.moveaxis(array, 0, -1) if array.ndim == 3 and array.shape[0] in (1, 3) else array)
    if not array.size:
        return RawExample(text=f"(empty: shape {array.shape})")
    rows = array.reshape(-1, array.shape[-1]) if array.ndim else array.reshape(1, 1)
    return RawExample(values=rows[0] if len(rows) == 1 else rows)


def _array(item: Any) -> Array:
    """Return the numbers to show; of complex ones their magnitude.

    Raises:
        DataError: The item holds no numbers.
    """
    if isinstance(item, torch.Tensor):
        item = item.detach().cpu()
        item = item.abs() if item.is_complex() else item
        narrow = item.is_floating_point() and item.dtype not in (torch.float32, torch.float64)
        return np.asarray(item.float().numpy() if narrow else item.numpy())
    array = np.asarray(item)
    array = np.abs(array) if np.iscomplexobj(array) else array
    if array.dtype == object or not (np.issubdtype(array.dtype, np.number) or array.dtype == bool):
        raise DataError(
            f"data: an example of type {type(item).__qualname__} is neither text nor numbers; cannot show it"
        )
    return array


def _decoded(tokenizer: Any, ids: Array) -> str:
    """Return the text of token ids, without special tokens where the tokenizer knows any."""
    try:
        return str(tokenizer.decode(ids.tolist(), skip_special_tokens=True))
    except TypeError:
        return str(tokenizer.decode(ids.tolist()))
