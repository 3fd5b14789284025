"""Optional inputs of a report: effects, traces, trust, attributions and influences, in any of their forms.

Every input may be a plain mapping or sequence, as read from JSON, or the object that another part of npeff made. The
same functions read what :func:`npeff.report` is given and what ``npeff report --extras`` finds in files.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from npeff.components.components import Components
from npeff.errors import ArgumentError, ExtrasError, StorageError
from npeff.perturbation.effect import CONTROLS
from npeff.short_repr import short_repr
from npeff.storage.checks import read_json
from npeff.storage.files import atomic, path_of

Array = npt.NDArray[Any]

INFLUENCES, PUSHED = 12, 8
"""Training examples, and examples before and after the push, shown on a component's page."""
TRUST_KEYS = ("stability", "null", "selection", "explained")


@dataclass(frozen=True)
class EffectSummary:
    """What moving the weights along one component, or a group of components, does.

    Attributes:
        kl_ratio: KL on the component's top examples over KL on the others; None where unknown.
        magnitudes: Step lengths that were tried.
        kl_top: Mean KL on the top examples per step length, in nats.
        kl_baseline: The same on the other examples.
        interval: Confidence interval of the ratio; None where unknown.
        controls: ``(kind of random direction, its KL ratio)``.
        predictions: ``(position in the data, ((class, probability before the step, and after it), …))``.
        continuations: ``(position in the data or None, prompt, ((how the component is turned, the text), …))``.
        label: Mean probability of the labels of the top examples, before and after; None where unknown.
        perplexity: Of unrelated data, before and after; None where unknown.
    """

    kl_ratio: float | None = None
    magnitudes: tuple[float, ...] = ()
    kl_top: tuple[float, ...] = ()
    kl_baseline: tuple[float, ...] = ()
    interval: tuple[float, float] | None = None
    controls: tuple[tuple[str, float], ...] = ()
    predictions: tuple[tuple[int, tuple[tuple[int, float, float], ...]], ...] = ()
    continuations: tuple[tuple[int | None, str, tuple[tuple[str, str], ...]], ...] = ()
    label: tuple[float, float] | None = None
    perplexity: tuple[float, float] | None = None

    __repr__ = short_repr


@dataclass(frozen=True)
class TraceSummary:
    """Where in the network a component, or a group of components, acts.

    Attributes:
        parts: ``(name, energy, KL alone, KL lost without it)``, shares; the part with most KL alone first.
    """

    parts: tuple[tuple[str, float, float, float], ...]

    __repr__ = short_repr


@dataclass(frozen=True)
class TrustSummary:
    """How far components may be believed.

    Attributes:
        stability: ``(r,)`` in [0, 1], how nearly each component comes back over seeds or subsamples; NaN where unknown.
        null_threshold: Energy ``Σ_i W_ij² / n`` that components of shuffled Fishers stay below.
        held_out: ``(number of components, relative loss on held-out examples)``, ascending.
        train: The same on the examples that were decomposed.
        chosen: The number of components that the held-out losses speak for.
        n_strategies: The number of strategies that comes back best.
        explained: ``(n,)`` share of each example's Fisher that the components account for.
    """

    stability: Array | None = None
    null_threshold: float | None = None
    held_out: tuple[tuple[int, float], ...] = ()
    train: tuple[tuple[int, float], ...] = ()
    chosen: int | None = None
    n_strategies: int | None = None
    explained: Array | None = None

    __repr__ = short_repr


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


_CURVES = ("magnitudes", "kl_top", "kl_baseline")
CONTINUED = {"base": "as it is", "down": "turned down", "up": "turned up"}
"""The models that continue a text: the key of the text, and what the page calls the component in them."""


def effect_of(name: str, value: Any) -> EffectSummary:
    """Read one component's effect.

    Args:
        name: For messages.
        value: A mapping or an object with the attributes of :class:`EffectSummary`, or what ``npeff.perturb``
            returned, or the JSON of it.

    Raises:
        ArgumentError: The curves' lengths differ, or something is no number.
    """
    if field_of(value, "figures") is not None:
        value = _of_experiment(name, value.to_json() if hasattr(value, "to_json") else value)
    if isinstance(value, str | bytes | int | float | Sequence):
        raise ArgumentError(f"{name}: expected a mapping with kl_ratio, magnitudes, …, got {excerpt_of(value)}")
    ratio, interval, controls = (field_of(value, key) for key in ("kl_ratio", "interval", "controls"))
    if isinstance(controls, Mapping):
        controls = tuple(controls.items())
    ends = None if interval is None else numbers(interval, f"{name}.interval").ravel().tolist()
    if ends is not None and len(ends) != 2:
        raise ArgumentError(f"{name}.interval: expected two numbers, got {excerpt_of(interval)}")
    curves = [tuple(numbers(_or_empty(field_of(value, key)), f"{name}.{key}").ravel().tolist()) for key in _CURVES]
    if len({len(curve) for curve in curves if curve}) > 1 or (any(curves) and not curves[0]):
        lengths = ", ".join(f"{key} {len(curve)}" for key, curve in zip(_CURVES, curves, strict=True))
        raise ArgumentError(f"{name}: expected curves of one length, a value per magnitude, got {lengths}")
    magnitudes, kl_top, kl_baseline = curves
    return EffectSummary(
        None if ratio is None else _number(ratio, f"{name}.kl_ratio"),
        magnitudes,
        kl_top,
        kl_baseline,
        interval=None if ends is None else (ends[0], ends[1]),
        controls=tuple((str(label), _number(of, f"{name}.controls")) for label, of in controls or ()),
        predictions=tuple(_predictions(item, f"{name}.predictions") for item in field_of(value, "predictions") or ()),
        continuations=tuple(
            _continuation(item, f"{name}.continuations") for item in field_of(value, "continuations") or ()
        ),
        label=_change(field_of(value, "label"), f"{name}.label"),
        perplexity=_change(field_of(value, "perplexity"), f"{name}.perplexity"),
    )


def _predictions(item: Any, name: str) -> tuple[int, tuple[tuple[int, float, float], ...]]:
    """Read what is predicted for one example: ``id``, ``classes``, and their probabilities ``before`` and ``after``.

    Raises:
        ArgumentError: The lists do not go together, or something is no number.
    """
    classes, before, after = (
        numbers(_or_empty(field_of(item, key)), f"{name}.{key}").ravel() for key in ("classes", "before", "after")
    )
    if not len(classes) == len(before) == len(after):
        raise ArgumentError(
            f"{name}: expected a probability before and after for each of {len(classes)} classes, got {len(before)} "
            f"and {len(after)}"
        )
    rows = zip(classes.astype(np.int64).tolist(), before.tolist(), after.tolist(), strict=True)
    return _position(field_of(item, "id"), f"{name}.id"), tuple(rows)


def _continuation(item: Any, name: str) -> tuple[int | None, str, tuple[tuple[str, str], ...]]:
    """Read the texts that continue one: ``id`` of the example or ``prompt``, and any of ``base``, ``down`` and ``up``.

    Raises:
        ArgumentError: One is no text.
    """
    position, prompt = field_of(item, "id"), field_of(item, "prompt") or ""
    texts = [(words, field_of(item, key)) for key, words in CONTINUED.items() if field_of(item, key) is not None]
    if not texts or not all(isinstance(text, str) for text in (prompt, *(text for _, text in texts))):
        raise ArgumentError(f"{name}: expected texts as {', '.join(CONTINUED)}, got {excerpt_of(item)}")
    if position is None and not prompt:
        raise ArgumentError(f"{name}: expected the id of an example, or a prompt, got {excerpt_of(item)}")
    return None if position is None else _position(position, f"{name}.id"), prompt, tuple(texts)


def _change(value: Any, name: str) -> tuple[float, float] | None:
    """Read a number before and after the step; None where either is not known.

    Raises:
        ArgumentError: They are no two numbers.
    """
    pair = numbers(_or_empty(value), name).ravel().tolist()
    if len(pair) not in (0, 2):
        raise ArgumentError(f"{name}: expected two numbers, before and after, got {excerpt_of(value)}")
    return (pair[0], pair[1]) if pair and np.isfinite(pair).all() else None


def _of_experiment(name: str, value: Mapping[str, Any]) -> dict[str, Any]:
    """Turn the JSON of what ``npeff.perturb`` returned into the fields of :class:`EffectSummary`.

    The curve is that of the sign kept, or the mean where each component has its own sign.

    Raises:
        ArgumentError: A field is missing or has another form.
    """
    ratio, low, high = _interval(value, name)
    fields: dict[str, Any] = {"kl_ratio": ratio, "interval": None if low is None or high is None else (low, high)}
    controls = [
        (CONTROLS.get(str(kind), str(kind)), _interval(control, f"{name}.controls.{kind}")[0])
        for kind, control in items_of(value.get("controls"), f"{name}.controls")
    ]
    fields["controls"] = tuple((kind, own) for kind, own in controls if own is not None)
    fields |= {key: value.get(key) for key in ("predictions", "continuations", "perplexity")}
    if value.get("label_before") is not None:
        top = numbers(value.get("top"), f"{name}.top").ravel().astype(np.int64)
        labels = [numbers(value.get(key), f"{name}.{key}").ravel() for key in ("label_before", "label_after")]
        known = [of[top][np.isfinite(of[top])] for of in labels if len(of) > top.max(initial=-1)]
        fields["label"] = [float(of.mean()) for of in known if len(of)] or None
    curve = value.get("curve")
    if curve is None:
        return fields
    signs = numbers(field_of(curve, "signs"), f"{name}.curve.signs").ravel().tolist()
    for key, own_key in zip(_CURVES, ("magnitudes", "top", "baseline"), strict=True):
        table = numbers(field_of(curve, own_key), f"{name}.curve.{own_key}")
        if table.ndim != 2 or len(table) != len(signs) or not len(signs):
            raise ArgumentError(
                f"{name}.curve.{own_key}: expected a list of numbers for each of {len(signs)} signs, got shape "
                f"{table.shape}"
            )
        sign = value.get("sign")
        fields[key] = table[signs.index(sign)] if sign in signs else table.mean(0)
    return fields


def _interval(of: Any, name: str) -> list[float | None]:
    """Value, low and high end of the KL ratio; None for what is not known.

    Raises:
        ArgumentError: There is no such figure.
    """
    figure = field_of(field_of(of, "figures"), "ratio")
    if not isinstance(figure, Mapping):
        raise ArgumentError(f"{name}.figures.ratio: expected value, low and high, got {excerpt_of(figure)}")
    return [
        None if figure.get(part) is None else _number(figure[part], f"{name}.figures.ratio.{part}")
        for part in ("value", "low", "high")
    ]


def trace_of(name: str, value: Any) -> TraceSummary:
    """Read what ``npeff.trace`` returned, or the JSON of it.

    Raises:
        ArgumentError: The lists do not go together, or something is no number.
    """
    value = value.to_json() if hasattr(value, "to_json") else value
    names, energy = field_of(value, "groups"), numbers(_or_empty(field_of(value, "energy")), f"{name}.energy").ravel()
    if not isinstance(names, Sequence) or isinstance(names, str) or not all(isinstance(part, str) for part in names):
        raise ArgumentError(f"{name}.groups: expected names of parts, got {excerpt_of(names)}")
    shares = []
    for key in ("alone", "lost"):
        items = field_of(value, key)
        if not isinstance(items, Sequence) or isinstance(items, str) or not len(items) == len(names) == len(energy):
            raise ArgumentError(f"{name}.{key}: expected a figure and an energy for each of {len(names)} parts")
        figures = [item.get("value") if isinstance(item, Mapping) else item for item in items]
        shares.append(_sized(numbers(figures, f"{name}.{key}"), len(names), f"{name}.{key}"))
    alone, lost = shares
    order = np.argsort(-np.nan_to_num(alone, nan=-np.inf), kind="stable")
    return TraceSummary(tuple((names[i], float(energy[i]), float(alone[i]), float(lost[i])) for i in order))


def influences_of(name: str, value: Any) -> InfluenceSummary:
    """Read one component's influences.

    Args:
        name: ``influences[j]``.
        value: Pairs (position, score), or a mapping from positions to scores; a mapping with ``pairs`` and perhaps
            ``by`` and ``texts``; or what ``component_influence`` or ``component_rollback`` returned.

    Raises:
        ArgumentError: It is none of these.
    """
    by, pairs = None, value
    texts: Mapping[int, str] = {}
    if callable(getattr(value, "pairs", None)):
        pairs, by = value.pairs(INFLUENCES), value.by
        told = getattr(value, "text", lambda position: None)
        texts = {i: text for i, _ in pairs if (text := told(i)) is not None}
    elif isinstance(value, InfluenceSummary):
        pairs, by, texts = value.pairs, value.by, value.texts
    elif isinstance(value, Mapping) and "pairs" in value:
        pairs, by, texts = value["pairs"], value.get("by"), value.get("texts") or {}
    elif isinstance(value, Mapping):
        pairs = list(value.items())
    if not isinstance(pairs, Sequence | np.ndarray) or not all(
        hasattr(pair, "__len__") and not isinstance(pair, str | bytes) and len(pair) == 2 for pair in pairs
    ):
        raise ArgumentError(f"{name}: expected pairs (position in the training data, score), got {excerpt_of(value)}")
    if not isinstance(by, str | None) or not isinstance(texts, Mapping):
        raise ArgumentError(f"{name}: expected by to be a text and texts a mapping from positions to texts")
    scores = [(_position(i, name), _number(score, f"{name}, the score of {i!r:.20}")) for i, score in pairs]
    if not np.isfinite([score for _, score in scores]).all():
        raise ArgumentError(f"{name}: expected finite scores")
    scores.sort(key=lambda item: (-abs(item[1]), item[0]))
    texts = {_position(i, name): str(text) for i, text in texts.items()}
    return InfluenceSummary(scores, by or InfluenceSummary.by, texts)


def trust_of(value: Any, r: int | None, n: int | None) -> TrustSummary:
    """Read what ``trust=`` says.

    Args:
        value: A :class:`TrustSummary`; one number per component (its stability), as a sequence or a mapping from
            components; or a mapping with any of ``stability`` (the same, or what ``npeff.trust.stability`` returned),
            ``null`` (a threshold, or what ``npeff.trust.null_model`` returned), ``selection`` (what
            ``npeff.trust.select`` returned) and ``explained`` (one number per example).
        r: Number of components; None where it is not known.
        n: Number of examples; None where it is not known.

    Raises:
        ArgumentError: It is none of these.
    """
    if value is None:
        return TrustSummary()
    if isinstance(value, TrustSummary):
        _sized(value.stability, r, "trust.stability")
        _sized(value.explained, n, "trust.explained")
        return value
    if not isinstance(value, Mapping) or not set(map(str, value)) <= set(TRUST_KEYS):
        value = {"stability": value}
    stability, null, selection, explained = (value.get(key) for key in TRUST_KEYS)
    held_out = numbers(_or_empty(field_of(selection, "held_out")), "trust.selection.held_out")
    tried = numbers(_or_empty(field_of(selection, "n_components")), "trust.selection.n_components").ravel()
    train = numbers(_or_empty(field_of(selection, "train")), "trust.selection.train").ravel()
    folds = len(tried) and held_out.size and held_out.size % len(tried) == 0
    if selection is not None and not folds:
        raise ArgumentError("trust.selection: expected n_components, and held_out with a loss for each of them")
    means = held_out.reshape(-1, len(tried)).mean(0) if folds else ()
    threshold = null if isinstance(null, int | float | np.number | None) else field_of(null, "threshold")
    if null is not None and threshold is None:
        raise ArgumentError(
            f"trust.null: expected a threshold, or what npeff.trust.null_model returned, got {excerpt_of(null)}"
        )
    chosen, n_strategies = field_of(selection, "chosen"), field_of(stability, "n_strategies")
    for name, number in (("selection.chosen", chosen), ("stability.n_strategies", n_strategies)):
        if number is not None and (isinstance(number, bool) or not isinstance(number, int | np.integer) or number < 1):
            raise ArgumentError(f"trust.{name}: expected a whole number ≥ 1, got {excerpt_of(number)}")
    return TrustSummary(
        None if stability is None else _per_component(stability, r),
        None if threshold is None else _number(threshold, "trust.null.threshold"),
        tuple((int(a), float(b)) for a, b in zip(tried, means, strict=True)),
        tuple((int(a), float(b)) for a, b in zip(tried, train, strict=False)),
        None if chosen is None else int(chosen),
        None if n_strategies is None else min(int(n_strategies), r or int(n_strategies)),
        None if explained is None else _sized(numbers(explained, "trust.explained"), n, "trust.explained"),
    )


def _per_component(value: Any, r: int | None) -> Array:
    name = "trust.stability"
    inner = field_of(value, "components")
    value = value if inner is None else inner
    if not isinstance(value, Mapping):
        return np.asarray(_sized(numbers(value, name), r, name))
    known = {index_of(j, r, name): _number(number, f"{name}[{j}]") for j, number in value.items()}
    full = np.full(r or len(known), np.nan)
    full[list(known) if r else slice(None)] = list(known.values())
    return full


def numbers(value: Any, name: str) -> Array:
    """Read numbers as float64; None among them is unknown, NaN.

    Raises:
        ArgumentError: Something else is among them: text, truth values, an infinity, lists of unequal lengths.
    """
    if hasattr(value, "detach"):
        value = value.detach().cpu().numpy()
    wrong = ArgumentError(f"{name}: expected numbers, got {excerpt_of(value)}")
    try:
        array = np.asarray(value)
        known = [item for item in array.ravel() if item is not None] if array.dtype == object else []
        if not all(isinstance(item, int | float | np.number) and not isinstance(item, bool) for item in known):
            raise wrong
        if array.dtype.kind not in "iufO" and array.size:
            raise wrong
        array = array.astype(np.float64)
    except (TypeError, ValueError, OverflowError) as error:
        raise wrong if not isinstance(error, ArgumentError) else error from None
    if np.isinf(array).any():
        raise ArgumentError(f"{name}: expected finite numbers, got an infinity")
    return array


def _number(value: Any, name: str) -> float:
    array = numbers(value, name)
    if array.size != 1:
        raise ArgumentError(f"{name}: expected a number, got {excerpt_of(value)}")
    return float(array.reshape(-1)[0])


def index_of(value: Any, size: int | None, name: str, of: str = "components") -> int:
    """Read the number of a component or example, also as the text that JSON has for a key.

    Raises:
        ArgumentError: It is none, or not below ``size``.
    """
    whole = int(value) if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 20 else value
    if isinstance(whole, bool) or not isinstance(whole, int | np.integer) or not 0 <= whole < (size or 1 << 63):
        span = f"0 to {size - 1}" if size else "as whole numbers"
        raise ArgumentError(f"{name}: expected {of} {span}, got {excerpt_of(whole)}")
    return int(whole)


def _position(value: Any, name: str) -> int:
    """Read the position of an example in the data; pairs may stand in one array of floats.

    Raises:
        ArgumentError: It is none.
    """
    whole = int(value) if isinstance(value, float | np.floating) and np.isfinite(value) and value % 1 == 0 else value
    try:
        return index_of(whole, None, name)
    except ArgumentError:
        raise ArgumentError(
            f"{name}: expected whole numbers ≥ 0, positions in the data, got {excerpt_of(value)}"
        ) from None


def excerpt_of(value: Any) -> str:
    """Print the beginning of a value, without writing out all of a large one."""
    return repr(value[:8] if isinstance(value, list | tuple) else value)[:80]


def field_of(value: Any, key: str) -> Any:
    """Return an item of a mapping or an attribute of an object; None where there is none."""
    return value.get(key) if isinstance(value, Mapping) else getattr(value, key, None)


def _or_empty(value: Any) -> Any:
    return () if value is None else value


def _sized(value: Any, size: int | None, name: str) -> Any:
    if value is not None and size is not None and np.shape(value) != (size,):
        raise ArgumentError(f"{name}: expected {size} numbers, got shape {np.shape(value)}")
    return value


def items_of(value: Any, name: str) -> list[tuple[Any, Any]]:
    """Return the items of a mapping, none for None.

    Raises:
        ArgumentError: It is no mapping.
    """
    if value is None:
        return []
    if not isinstance(value, Mapping):
        raise ArgumentError(f"{name}: expected a mapping, got {type(value).__name__}")
    return list(value.items())


RECORDS = {
    "effects": ("npeff.perturb", ("components", "figures")),
    "traces": ("npeff.trace", ("components", "groups", "alone")),
}
"""Per input, which function returns one, and the fields by which it is known; the second is in no other record."""
DIGEST = "components_digest"
"""The field that says which components a file is about: :attr:`npeff.Components.digest`."""
LARGEST_FILE = 1 << 30
"""Bytes of the largest file that is read."""


@dataclass(frozen=True)
class Extras:
    """All optional inputs of a report, checked.

    Attributes:
        effects: Per component or group of components, ascending, as many as were perturbed.
        traces: Per component or group of components.
        influences: Per component.
        attributions: ``(component, index of the example)`` → array of the shape of the example's input (or one
            number per token), positive where the input speaks for the component.
        trust: See :class:`TrustSummary`.
    """

    effects: Mapping[tuple[int, ...], EffectSummary]
    traces: Mapping[tuple[int, ...], TraceSummary]
    influences: Mapping[int, InfluenceSummary]
    attributions: Mapping[tuple[int, int], Array]
    trust: TrustSummary

    @property
    def groups(self) -> list[tuple[int, ...]]:
        """Groups of several components that were moved along or traced."""
        return sorted({key for key in (*self.effects, *self.traces) if len(key) > 1})


def read_extras(r: int | None, n: int | None, given: Mapping[str, Any]) -> Extras:
    """Check the optional inputs of :func:`npeff.report`.

    Args:
        r: Number of components; None where it is not known.
        n: Number of examples; None where it is not known.
        given: ``effects``, ``traces``, ``influences``, ``attributions`` and ``trust``, as for :func:`npeff.report`.

    Raises:
        ArgumentError: One of them has another form than documented, or names components or examples that are not
            there.
    """
    checked = {
        key: {entry: read(name, value) for entry, (name, value) in entries(key, given.get(key), r, n).items()}
        for key, (entries, read) in KINDS.items()
    }
    return Extras(**checked, trust=trust_of(given.get("trust"), r, n))


# ---- entries: what each input says, of which components -----------------------------------------------------

Entries = dict[Any, tuple[str, Any]]
"""What an entry is about → its name for messages, and its value."""


def _by_group(key: str, given: Any, r: int | None, n: int | None) -> Entries:
    """Effects or traces by component, or by a group of components.

    Args:
        key: ``"effects"`` or ``"traces"``.
        given: What ``npeff.perturb`` or ``npeff.trace`` returned, or the JSON of it: one, a sequence of them, or a
            mapping from components (or tuples of them), which may hold forms that do not say what they are of.
        r: Number of components, where it is known.
        n: Number of examples.

    Raises:
        ArgumentError: It is none of these, names no component, or says two things of one.
    """
    maker, (_, sign, *_rest) = RECORDS[key]
    entries: Entries = {}
    if given is None:
        return entries
    if field_of(given, sign) is not None:
        given = [given]
    if isinstance(given, Mapping):
        for j, item in given.items():
            several = j if isinstance(j, tuple) and j else (j,)
            group = tuple(sorted({index_of(k, r, key) for k in several}))
            if field_of(item, sign) is not None and (own := _members(item, r, f"{key}[{j}]")) != group:
                raise ArgumentError(f"{key}[{j}]: is about {called(key, own)}")
            entries[group] = (f"{key}[{j}]", item)
        return entries
    if not isinstance(given, Sequence) or isinstance(given, str | bytes):
        raise ArgumentError(f"{key}: expected a mapping from components, or a list, got {type(given).__name__}")
    for i, item in enumerate(given):
        if field_of(item, sign) is None:
            raise ArgumentError(
                f"{key}: expected a mapping, got {type(given).__name__} whose item {i} is not what {maker} returned: "
                f"{excerpt_of(item)}"
            )
        group = _members(item, r, f"{key}[{i}]")
        if group in entries:
            raise ArgumentError(f"{key}[{i}]: another one of {called(key, group)} was given; pass one of them")
        entries[group] = (f"{key}[{i}]", item)
    return entries


def _by_component(key: str, given: Any, r: int | None, n: int | None) -> Entries:
    """Influences by component.

    Raises:
        ArgumentError: They are no mapping, or one is about another component.
    """
    entries: Entries = {}
    for given_key, value in items_of(given, key):
        j = index_of(given_key, r, key)
        if (own := getattr(value, "j", j)) != j:
            raise ArgumentError(f"{key}[{j}]: is about component {own}")
        entries[j] = (f"{key}[{j}]", value)
    return entries


def _by_example(key: str, given: Any, r: int | None, n: int | None) -> Entries:
    """Attributions by component and example: ``{(j, i): …}``, or ``{j: {i: …}}`` as in JSON.

    Raises:
        ArgumentError: A key is neither.
    """
    entries: Entries = {}
    for given_key, value in items_of(given, key):
        pairs = [(given_key, value)]
        if not isinstance(given_key, tuple) and isinstance(value, Mapping):
            pairs = [((given_key, i), weights) for i, weights in value.items()]
        for pair, weights in pairs:
            if not isinstance(pair, tuple) or len(pair) != 2:
                raise ArgumentError(
                    f"{key}: expected keys (component, example), got {excerpt_of(pair)}; in JSON, an object with "
                    "components, and within them examples, as keys"
                )
            j, i = index_of(pair[0], r, key), index_of(pair[1], n, key, "examples")
            entries[j, i] = (f"{key}[{j}, {i}]", weights)
    return entries


def _members(item: Any, r: int | None, name: str) -> tuple[int, ...]:
    components = field_of(item, "components")
    if not isinstance(components, Sequence) or isinstance(components, str) or not len(components):
        raise ArgumentError(f"{name}.components: expected the numbers of components, got {excerpt_of(components)}")
    return tuple(sorted({index_of(j, r, f"{name}.components") for j in components}))


def called(key: str, entry: Any) -> str:
    """Say what an entry is about."""
    if key == "trust":
        return str(entry)
    members = entry[:1] if key == "attributions" else entry if isinstance(entry, tuple) else (entry,)
    return f"component{'s' if len(members) > 1 else ''} {', '.join(map(str, members))}"


KINDS: dict[str, tuple[Callable[[str, Any, int | None, int | None], Entries], Callable[[str, Any], Any]]] = {
    "effects": (_by_group, effect_of),
    "traces": (_by_group, trace_of),
    "attributions": (_by_example, lambda name, value: numbers(value, name)),
    "influences": (_by_component, influences_of),
}
"""Every optional input but ``trust``, whose entries are its fields: what tells its entries apart, what reads each.

The keys are those of files, too.
"""


# ---- files --------------------------------------------------------------------------------------------------

_WRITTEN_BY = (
    "expected a JSON file written by npeff trust, perturb, trace, linearize --component, influence --component or "
    f"rollback --component, or a JSON object with any of {', '.join([*KINDS, 'trust'])}"
)


def load_extras(*paths: str | Path, components: Components | None = None) -> dict[str, Any]:
    """Read JSON files that other commands wrote, ready for :func:`npeff.report`.

    Args:
        *paths: Files of ``npeff trust --out``, ``perturb --out``, ``trace --out``, of the companions with
            ``--component``, of :func:`save_extras`; or JSON objects with any of ``effects``, ``trust``,
            ``attributions``, ``influences`` and ``traces``. What they say is put together. ``attributions`` hold per
            component, and within it per index of an example, nested lists of numbers.
        components: What the files should be about: each file is checked against these components.

    Returns:
        Keywords for :func:`npeff.report`, as many as the files have.

    Raises:
        ExtrasError: A file is damaged or of another kind, is about other components, or two say the same thing.
    """
    r, n = (components.n_components, len(components.coefficients)) if components else (None, None)
    merged: dict[str, dict[Any, Any]] = {}
    for path in map(path_of, paths):
        found, about = _recognised(path, read_extras_file(path))
        if components is not None and about and about != {components.digest}:
            raise ExtrasError(
                f"{path}: {DIGEST}: expected {components.digest}, the components of this report, got "
                f"{', '.join(sorted(about))[:80]}: the file is about another decomposition; run the command that "
                "wrote it on these components"
            )
        with _naming(path):
            read_extras(r, n, found)
            entries = _entries(found, r, n)
        for key, values in entries.items():
            known = merged.setdefault(key, {})
            if twice := [entry for entry in values if entry in known]:
                example = f" (example {twice[0][1]})" if key == "attributions" else ""
                raise ExtrasError(
                    f"{path}: {key} of {called(key, twice[0])} were given by another file already{example}; pass one "
                    "of them"
                )
            known |= values
    return merged


def describe_extras(path: str | Path) -> dict[str, Any]:
    """Say what a JSON file holds for a report.

    Args:
        path: A file that :func:`load_extras` reads.

    Returns:
        ``path``, ``bytes``, ``format``, ``content``, ``components_digest`` where the file says so, and per key of
        :func:`load_extras` what it is about. JSON-able.

    Raises:
        ExtrasError: The file is damaged or of another kind.
    """
    path = path_of(path)
    found, about = _recognised(path, read_extras_file(path))
    summary: dict[str, Any] = {"path": str(path), "bytes": path.stat().st_size, "format": "JSON"}
    summary["content"] = "for npeff report --extras"
    if about:
        summary[DIGEST] = min(about)
    with _naming(path):
        entries = _entries(found, None, None)
    return summary | {key: "; ".join(dict.fromkeys(called(key, e) for e in entries[key])) for key in entries}


def save_extras(
    path: str | Path,
    *,
    attributions: Mapping[tuple[int, int], Any] | None = None,
    influences: Mapping[int, Any] | None = None,
    components: Components | None = None,
) -> Path:
    """Write what :func:`load_extras` reads.

    Args:
        path: Ending in ``.json``.
        attributions: As for :func:`npeff.report`; four significant digits are kept.
        influences: As for :func:`npeff.report`.
        components: What they are about; a report of other components then refuses the file.

    Returns:
        The path.

    Raises:
        ArgumentError: The name ends otherwise, or the influences are of another form.
        StorageError: The file cannot be written.
    """
    path = path_of(path)
    if path.suffix.lower() != ".json":
        raise ArgumentError(f"out: expected a name ending in .json, got {path}")
    content: dict[str, Any] = {} if components is None else {DIGEST: components.digest}
    for (j, i), values in (attributions or {}).items():
        digits = np.vectorize(lambda v: float(f"{v:.4g}"), otypes=[float])(np.asarray(values, np.float64))
        content.setdefault("attributions", {}).setdefault(str(j), {})[str(i)] = digits.tolist()
    for j, value in (influences or {}).items():
        found = influences_of(f"influences[{j}]", value)
        texts = {str(i): text for i, text in found.texts.items()}
        content.setdefault("influences", {})[str(j)] = {"by": found.by, "pairs": found.pairs, "texts": texts}
    with atomic(path) as scratch:
        scratch.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    return path


def read_extras_file(path: Path) -> Any:
    """Read the JSON of a file that may hold extras: an object or a list.

    Raises:
        ExtrasError: The file is missing, too large or damaged.
    """
    try:
        return read_json(path, (dict, list), most=LARGEST_FILE)
    except StorageError as error:
        why = str(error)
        if path.is_file() and path.stat().st_size <= LARGEST_FILE and path.open("rb").read(4) == b"\x89HDF":
            why = "got an HDF5 file, made by an --out that does not end in .json"
        raise ExtrasError(f"{path}: {_WRITTEN_BY} ({why})") from error


def _recognised(path: Path, content: Any) -> tuple[dict[str, Any], set[str]]:
    """Return keywords for :func:`npeff.report`, and the digests of the components that a file says it is about.

    Raises:
        ExtrasError: The file is of another kind.
    """
    records = content if isinstance(content, list) else [content]
    for key, (_, fields) in RECORDS.items():
        if records and all(isinstance(item, dict) and set(fields) <= set(item) for item in records):
            details = [item["details"] for item in records if isinstance(item.get("details"), dict)]
            return {key: records}, {d[DIGEST] for d in details if isinstance(d.get(DIGEST), str)}
    if not isinstance(content, dict) or not content:
        got = f"a list of {len(content)}" if isinstance(content, list) else f"{content!r:.40}"
        raise ExtrasError(f"{path}: {_WRITTEN_BY}; got {got}")
    found = {key: value for key, value in content.items() if value is not None}
    digest = found.pop(DIGEST, None)
    if not isinstance(digest, str | None):
        raise ExtrasError(f"{path}: {DIGEST}: expected a text, got {digest!r:.40}")
    if found and set(found) <= set(TRUST_KEYS):
        found = {"trust": found}
    if not found or not set(found) <= {*KINDS, "trust"}:
        raise ExtrasError(f"{path}: {_WRITTEN_BY}; got {', '.join(content)[:200]}")
    trust = found["trust"] if isinstance(found.get("trust"), dict) else {}
    own = trust["stability"].get(DIGEST) if isinstance(trust.get("stability"), dict) else None
    return found, {text for text in (digest, own) if isinstance(text, str) and text}


def _entries(found: Mapping[str, Any], r: int | None, n: int | None) -> dict[str, dict[Any, Any]]:
    """What each keyword says, by what it is about: what two files may not both say."""
    entries = {
        key: {entry: value for entry, (_, value) in KINDS[key][0](key, found[key], r, n).items()}
        for key in KINDS
        if key in found
    }
    if "trust" in found:
        whole = found["trust"]
        parts = whole if isinstance(whole, Mapping) and set(whole) <= set(TRUST_KEYS) else {"stability": whole}
        entries["trust"] = {name: value for name, value in parts.items() if value is not None}
    return entries


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Name the file in errors about what it holds.

    Raises:
        ExtrasError: In place of an ArgumentError.
    """
    try:
        yield
    except ArgumentError as error:
        raise ExtrasError(f"{path}: {error}; write the file again with the command that made it") from error
