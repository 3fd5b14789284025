"""Evidence about components beside their numbers: effects, traces, trust and influences, in any of their forms.

Every input may be a plain mapping or sequence, as read from JSON, or the object that another part of npeff made. The
same classes read what :func:`npeff.report` is given and what ``npeff report --extras`` finds in files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from npeff.errors import ArgumentError
from npeff.perturbation.effect import CONTROLS, Continuation, Prediction
from npeff.reports.text import plain
from npeff.short_repr import short_repr

Array = npt.NDArray[Any]

INFLUENCES, PUSHED = 12, 8
"""Training examples, and examples before and after the push, shown on a component's page."""
TRUST_KEYS = ("stability", "null", "selection", "explained")
CONTINUED = {"base": "as it is", "down": "turned down", "up": "turned up"}
"""The models that continue a text: the field of the text, and what the page calls the component in them."""
CURVES = {"magnitudes": "magnitudes", "kl_top": "top", "kl_baseline": "baseline"}
"""The curves of an effect, and their names in what ``npeff.perturb`` returned."""


@dataclass(frozen=True)
class Given:
    """A value from outside, with its name for messages; items of mappings and attributes of objects are read alike.

    Its methods raise ArgumentError for values that are not as they expect.

    Attributes:
        name: Of the argument, or the part of one.
        value: What was given; None where nothing was.
        r: Number of components; None where it is not known.
        n: Number of examples; None where it is not known.
    """

    name: str
    value: Any
    r: int | None = None
    n: int | None = None

    def __getitem__(self, key: str) -> Given:
        own = self.value.get(key) if isinstance(self.value, Mapping) else getattr(self.value, key, None)
        return self.part(f".{key}", own)

    def part(self, suffix: str, value: Any) -> Given:
        """Return another value, under the name of this one with a suffix."""
        return Given(self.name + suffix, value, self.r, self.n)

    @property
    def known(self) -> bool:
        """Whether there is a value."""
        return self.value is not None

    @property
    def listed(self) -> bool:
        """Whether the value is a list, and no text."""
        return isinstance(self.value, Sequence) and not isinstance(self.value, str | bytes)

    def refuse(self, expected: str, got: str | None = None) -> NoReturn:
        """Say what was expected, and what came: the beginning of the value, if nothing else is named.

        Raises:
            ArgumentError: Always.
        """
        if got is None:  # without writing out all of a large value
            got = repr(self.value[:8] if isinstance(self.value, list | tuple) else self.value)[:80]
        raise ArgumentError(f"{self.name}: expected {expected}, got {got}")

    def array(self, size: int | None = None) -> Array:
        """Read numbers as float64, none for None, in a row of that size if one is given; None among them is NaN.

        Text, truth values, an infinity and lists of unequal lengths are refused.
        """
        array = None
        with suppress(TypeError, ValueError, OverflowError):
            value = self.value.detach().cpu().numpy() if hasattr(self.value, "detach") else self.value
            found = np.asarray(() if value is None else value)
            known = [item for item in found.ravel() if item is not None] if found.dtype == object else []
            numeric = all(isinstance(item, int | float | np.number) and not isinstance(item, bool) for item in known)
            array = found.astype(np.float64) if numeric and (found.dtype.kind in "iufO" or not found.size) else None
        if array is None:
            self.refuse("numbers")
        if np.isinf(array).any():
            self.refuse("finite numbers", "an infinity")
        if size is not None and array.shape != (size,):
            self.refuse(f"{size} numbers", f"shape {array.shape}")
        return array

    def row(self, *lengths: int, expected: str = "") -> tuple[float, ...]:
        """Read numbers in a row, of one of these lengths if any is given."""
        found = tuple(self.array().ravel().tolist())
        if lengths and len(found) not in lengths:
            self.refuse(expected)
        return found

    def number(self) -> float | None:
        """Read one number; None where it is not known, or NaN."""
        found = self.row(1, expected="a number")[0] if self.known else np.nan
        return found if np.isfinite(found) else None

    def pair(self, which: str = "") -> tuple[float, float] | None:
        """Read two numbers; None where they, or one of them, are not known."""
        found = self.row(0, 2, expected=f"two numbers{which}")
        return (found[0], found[1]) if found and np.isfinite(found).all() else None

    def whole(self, expected: str, least: int = 0, below: int | None = None) -> int:
        """Read a whole number, also as the text that JSON has for a key, or in an array of floats."""
        value = self.value
        text = isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 20
        number = isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)
        if not (text or (number and value % 1 == 0)) or not least <= int(value) < (below or 1 << 63):
            self.part("", int(value) if text else value).refuse(expected)
        return int(value)

    def component(self) -> int:
        """Read the number of a component."""
        return self.whole(_span("components", self.r), below=self.r)

    def example(self) -> int:
        """Read the number of an example among those that were decomposed."""
        return self.whole(_span("examples", self.n), below=self.n)

    def position(self) -> int:
        """Read the position of an example in the data."""
        return self.whole("whole numbers ≥ 0, positions in the data")

    def count(self) -> int | None:
        """Read a number of things; None where it is not known."""
        return self.whole("a whole number ≥ 1", 1) if self.known else None

    def plain(self) -> Given:
        """Return the value as mappings and lists, where it is a result that has such a form."""
        return self.part("", self.value.to_json()) if hasattr(self.value, "to_json") else self

    def each(self) -> list[Given]:
        """Return the items of a list, none for None."""
        if self.known and not self.listed:
            self.refuse("a list")
        return [self.part("", item) for item in self.value or ()]

    def items(self) -> list[tuple[Any, Any]]:
        """Return the items of a mapping, none for None."""
        if not isinstance(self.value, Mapping | None):
            self.refuse("a mapping", type(self.value).__name__)
        return list((self.value or {}).items())


def _span(what: str, size: int | None) -> str:
    return f"{what} 0 to {size - 1}" if size else f"{what} as whole numbers"


@dataclass(frozen=True)
class EffectSummary:
    """The effect of moving the weights along one component, or a group of components.

    Attributes:
        kl_ratio: KL on the component's top examples over KL on the baseline, a sample of all examples; None where
            unknown.
        magnitudes: Step lengths that were tried.
        kl_top: Mean KL on the top examples per step length, in nats.
        kl_baseline: The same on the baseline.
        interval: Confidence interval of the ratio; None where unknown.
        controls: ``(kind of random direction, its KL ratio)``.
        predictions: What is predicted for some examples before and after the step.
        continuations: How texts go on.
        label: Mean probability of the labels of the top examples, before and after; None where unknown.
        perplexity: Of unrelated data, before and after; None where unknown.
        disjoint_ratio: KL on the top examples over KL on those of the baseline with (nearly) no coefficient; None where
            unknown.
        magnitude: Norm of the change of the weights at which the figures were measured; None where unknown.
        sign: Its sign along the component; 0 where unknown, or where each of several directions has its own.
    """

    kl_ratio: float | None = None
    magnitudes: tuple[float, ...] = ()
    kl_top: tuple[float, ...] = ()
    kl_baseline: tuple[float, ...] = ()
    interval: tuple[float, float] | None = None
    controls: tuple[tuple[str, float], ...] = ()
    predictions: tuple[Prediction, ...] = ()
    continuations: tuple[Continuation, ...] = ()
    label: tuple[float, float] | None = None
    perplexity: tuple[float, float] | None = None
    disjoint_ratio: float | None = None
    magnitude: float | None = None
    sign: int = 0

    __repr__ = short_repr

    @property
    def step(self) -> str:
        """What was done to the weights, as *moved by −0.15*; empty where it is unknown."""
        return "" if self.magnitude is None else f"moved by {'±+−'[self.sign]}{plain(self.magnitude)}"

    @property
    def control_ratio(self) -> float | None:
        """The largest KL ratio of the random directions; None where there are none."""
        return max((ratio for _, ratio in self.controls), default=None)

    @classmethod
    def of(cls, given: Given) -> EffectSummary:
        """Read a mapping or an object with these fields, or what ``npeff.perturb`` returned, or the JSON of it."""
        if isinstance(given.value, cls):
            return given.value
        if given["figures"].known:
            given = given.part("", _of_experiment(given.plain()))
        if isinstance(given.value, str | bytes | int | float | Sequence):
            given.refuse("a mapping with kl_ratio, magnitudes, …")
        curves = {key: given[key].row() for key in CURVES}
        lengths = {key: len(curve) for key, curve in curves.items()}
        if not set(lengths.values()) <= {0, lengths["magnitudes"]}:
            got = ", ".join(f"{key} {length}" for key, length in lengths.items())
            given.refuse("curves of one length, a value per magnitude", got)
        magnitudes, kl_top, kl_baseline = curves.values()
        controls = given["controls"]
        by_kind = isinstance(controls.value, Mapping)
        pairs = controls.items() if by_kind else [one.value for one in controls.each()]
        if not all(isinstance(pair, tuple | list) and len(pair) == 2 for pair in pairs):
            controls.refuse("a mapping from kinds of random directions to their KL ratios, or pairs of both")
        ratios = {str(kind): controls.part("", ratio).number() for kind, ratio in pairs}
        return cls(
            given["kl_ratio"].number(),
            magnitudes,
            kl_top,
            kl_baseline,
            interval=given["interval"].pair(),
            controls=tuple((kind, ratio) for kind, ratio in ratios.items() if ratio is not None),
            predictions=tuple(map(_prediction, given["predictions"].each())),
            continuations=tuple(map(_continuation, given["continuations"].each())),
            label=given["label"].pair(", before and after"),
            perplexity=given["perplexity"].pair(", before and after"),
            disjoint_ratio=given["disjoint_ratio"].number(),
            magnitude=given["magnitude"].number(),
            sign=int(np.sign(given["sign"].number() or 0)),
        )


def _prediction(given: Given) -> Prediction:
    """Read what is predicted for one example: ``id``, ``classes``, and their probabilities ``before`` and ``after``."""
    classes, before, after = (given[key].array().ravel() for key in ("classes", "before", "after"))
    if not len(classes) == len(before) == len(after):
        expected = f"a probability before and after for each of {len(classes)} classes"
        given.refuse(expected, f"{len(before)} and {len(after)}")
    whole = [given.part(".classes", of).whole("whole numbers ≥ 0") for of in classes.tolist()]
    return Prediction(given["id"].position(), np.array(whole, np.int64), before, after)


def _continuation(given: Given) -> Continuation:
    """Read the texts that continue one: ``id`` of the example, or ``prompt``; any of ``base``, ``down`` and ``up``."""
    texts, prompt = {key: given[key].value for key in CONTINUED}, given["prompt"].value or ""
    told = [text for text in texts.values() if text is not None]
    if not told or not all(isinstance(text, str) for text in (prompt, *told)):
        given.refuse(f"texts as {', '.join(CONTINUED)}")
    if not given["id"].known and not prompt:
        given.refuse("the id of an example, or a prompt")
    return Continuation(given["id"].position() if given["id"].known else None, prompt, **texts)


def _of_experiment(given: Given) -> dict[str, Any]:
    """Turn the JSON of what ``npeff.perturb`` returned into the fields of :class:`EffectSummary`.

    The curve is that of the sign kept, or the mean where each component has its own sign.
    """
    ratio, *ends = _ratio(given, "ratio")
    controls = {kind: _ratio(given.part(f".controls.{kind}", of), "ratio")[0] for kind, of in given["controls"].items()}
    fields: dict[str, Any] = {
        "kl_ratio": ratio,
        "interval": None if None in ends else ends,
        "disjoint_ratio": _ratio(given, "disjoint_ratio")[0] if given["figures"]["disjoint_ratio"].known else None,
        "controls": {CONTROLS.get(str(kind), str(kind)): own for kind, own in controls.items()},
        **{key: given[key].value for key in ("predictions", "continuations", "perplexity", "magnitude", "sign")},
    }
    if given["label_before"].known:
        top = np.array([one.position() for one in given["top"].each()], np.int64)
        labels = [given[key].array().ravel() for key in ("label_before", "label_after")]
        known = [of[top][np.isfinite(of[top])] for of in labels if len(of) > top.max(initial=-1)]
        fields["label"] = [float(of.mean()) for of in known if len(of)] or None
    curve, sign = given["curve"], given["sign"].value
    signs = curve["signs"].row()
    for key, name in CURVES.items() if curve.known else ():
        table = curve[name].array()
        if table.ndim != 2 or len(table) != len(signs) or not len(signs):
            curve[name].refuse(f"a list of numbers for each of {len(signs)} signs", f"shape {table.shape}")
        fields[key] = table[signs.index(sign)] if sign in signs else table.mean(0)
    return fields


def _ratio(given: Given, name: str) -> list[float | None]:
    """Value, low and high end of a KL ratio; None for what is not known."""
    figure = given["figures"][name]
    if not isinstance(figure.value, Mapping):
        figure.refuse("value, low and high")
    return [figure[part].number() for part in ("value", "low", "high")]


@dataclass(frozen=True)
class TraceSummary:
    """The parts of the network in which a component, or a group of components, acts.

    Attributes:
        parts: ``(name, energy, KL alone, KL lost without it)``, shares; the part with most KL alone first.
    """

    parts: tuple[tuple[str, float, float, float], ...]

    __repr__ = short_repr

    @classmethod
    def of(cls, given: Given) -> TraceSummary:
        """Read what ``npeff.trace`` returned, or the JSON of it."""
        if isinstance(given.value, cls):
            return given.value
        given = given.plain()
        names, energy, shares = given["groups"], given["energy"].array().ravel(), []
        if not names.listed or not all(isinstance(part, str) for part in names.value):
            names.refuse("names of parts")
        for figures in (given["alone"], given["lost"]):
            if not figures.listed or not len(figures.value) == len(names.value) == len(energy):
                figures.refuse(f"a figure and an energy for each of {len(names.value)} parts")
            values = [item.get("value") if isinstance(item, Mapping) else item for item in figures.value]
            shares.append(figures.part("", values).array(len(energy)))
        parts = [*zip(names.value, energy.tolist(), *(share.tolist() for share in shares), strict=True)]
        return cls(tuple(parts[i] for i in np.argsort(-np.nan_to_num(shares[0], nan=-np.inf), kind="stable")))


@dataclass(frozen=True)
class InfluenceSummary:
    """The training examples behind a component.

    Attributes:
        pairs: ``(position in the training data, score)`` by falling magnitude.
        by: What a score is, for the page.
        texts: What to print of an example, by position, where ``influence_data`` does not show it.
    """

    pairs: list[tuple[int, float]]
    by: str = "+ towards, − away from it"
    texts: Mapping[int, str] = field(default_factory=dict)

    __repr__ = short_repr

    @classmethod
    def of(cls, given: Given) -> InfluenceSummary:
        """Read the influences on one component.

        They may be pairs (position, score), a mapping from positions to scores, a mapping with ``pairs`` and perhaps
        ``by`` and ``texts``, or what ``component_influence`` or ``component_rollback`` returned.
        """
        value = given.value
        pairs, by, texts = given["pairs"].value, given["by"].value, given["texts"].value or {}
        if callable(pairs):
            pairs, text = pairs(INFLUENCES), getattr(value, "text", lambda position: None)
            texts = {i: told for i, _ in pairs if (told := text(i)) is not None}
        elif pairs is None:
            pairs, by, texts = list(value.items()) if isinstance(value, Mapping) else value, None, {}
        if not isinstance(pairs, Sequence | np.ndarray) or not all(
            hasattr(pair, "__len__") and not isinstance(pair, str | bytes) and len(pair) == 2 for pair in pairs
        ):
            given.refuse("pairs (position in the training data, score)")
        if not isinstance(by, str | None) or not isinstance(texts, Mapping):
            given.refuse("by to be a text and texts a mapping from positions to texts")
        positions = [given.part("", i).position() for i, _ in pairs]
        scores = [
            (position, given.part(f", the score of {i!r:.20}", score).row(1, expected="a number")[0])
            for position, (i, score) in zip(positions, pairs, strict=True)
        ]
        if not np.isfinite([score for _, score in scores]).all():
            given.refuse("finite scores")
        scores.sort(key=lambda item: (-abs(item[1]), item[0]))
        return cls(scores, by or cls.by, {given.part("", i).position(): str(text) for i, text in texts.items()})


@dataclass(frozen=True)
class TrustSummary:
    """The measurements that say how reliable the components are.

    Attributes:
        stability: ``(r,)`` in [0, 1], how nearly each component comes back over seeds or subsamples; NaN where unknown.
        null_threshold: Energy ``Σ_i W_ij² / n`` that components of shuffled Fishers stay below.
        held_out: ``(number of components, relative loss on held-out examples)``, ascending.
        train: The same on the examples that were decomposed.
        chosen: The number of components that the held-out losses speak for.
        n_strategies: The number of strategies that comes back best.
        explained: ``(n,)`` share of each example's Fisher that the components account for.
        agreement: ``(number of strategies, how well they come back)``, ascending.
        stable_numbers: Numbers of strategies that come back about as well as the best one.
    """

    stability: Array | None = None
    null_threshold: float | None = None
    held_out: tuple[tuple[int, float], ...] = ()
    train: tuple[tuple[int, float], ...] = ()
    chosen: int | None = None
    n_strategies: int | None = None
    explained: Array | None = None
    agreement: tuple[tuple[int, float], ...] = ()
    stable_numbers: tuple[int, ...] = ()

    __repr__ = short_repr

    def stability_of(self, j: int) -> float | None:
        """Return the stability of a component; None where it is unknown."""
        return None if self.stability is None or not np.isfinite(self.stability[j]) else float(self.stability[j])

    @classmethod
    def of(cls, parts: Mapping[str, Given]) -> TrustSummary:
        """Put together what was given as ``stability``, ``null``, ``selection`` and ``explained``.

        The first is one number per component, as a sequence or a mapping from components, or what
        ``npeff.trust.stability`` returned; the second a threshold, or what ``npeff.trust.null_model`` returned; the
        third what ``npeff.trust.select`` returned; the last one number per example. A part may be missing. A whole
        summary may be given as ``summary``.
        """
        if "summary" in parts:
            whole = parts["summary"]
            for key, size in (("stability", whole.r), ("explained", whole.n)):
                if whole[key].known:
                    whole[key].array(size)
            return cls(**vars(whole.value))
        missing = Given("trust", None)
        stability, null, selection, explained = (parts.get(key, missing[key]) for key in TRUST_KEYS)
        tried, held_out, train = (selection[key].array() for key in ("n_components", "held_out", "train"))
        if selection.known and not (tried.size and held_out.size and held_out.size % tried.size == 0):
            selection.refuse("n_components, and held_out with a loss for each of them")
        threshold = null["threshold"]
        if isinstance(null.value, int | float | np.number):
            threshold = null.part(".threshold", null.value)
        elif null.known and not threshold.known:
            null.refuse("a threshold, or what npeff.trust.null_model returned")
        several = stability["strategies"]
        agreement = [
            (several.part("", n).whole("numbers of strategies", 1), several.part(f"[{n}]", of).number())
            for n, of in several.items()
        ]
        n_strategies, tried = stability["n_strategies"].count(), tried.ravel()
        means = held_out.reshape(-1, len(tried)).mean(0) if len(tried) else ()
        return cls(
            _per_component(stability) if stability.known else None,
            threshold.number(),
            tuple((int(a), float(b)) for a, b in zip(tried, means, strict=True) if np.isfinite(b)),
            tuple((int(a), float(b)) for a, b in zip(tried, train.ravel(), strict=False) if np.isfinite(b)),
            selection["chosen"].count(),
            None if n_strategies is None else min(n_strategies, stability.r or n_strategies),
            explained.array(explained.n) if explained.known else None,
            tuple(sorted((n, index) for n, index in agreement if index is not None)),
            tuple(one.whole("whole numbers ≥ 1", 1) for one in stability["stable_numbers"].each()),
        )


def _per_component(given: Given) -> Array:
    """Read the stability of every component, NaN where a mapping leaves one out."""
    given = given.part("", given["components"].value) if given["components"].known else given
    if not isinstance(given.value, Mapping):
        return given.array(given.r)
    items = [(given.part("", j).component(), given.part(f"[{j}]", of).number()) for j, of in given.items()]
    full = np.full(given.r or len(items), np.nan)
    full[[j for j, _ in items] if given.r else slice(None)] = [of for _, of in items]
    return full
