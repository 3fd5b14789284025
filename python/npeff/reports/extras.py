"""What else a report can show, when it is given: perturbations, traces, trust, attributions, influences.

Every input may be a plain mapping or sequence, as read from JSON, or the object that another part of npeff made.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from npeff.errors import ArgumentError
from npeff.perturbation.effect import CONTROLS
from npeff.short_repr import short_repr

Array = npt.NDArray[Any]
TRUST_KEYS = {"stability", "null", "selection", "explained"}
INFLUENCES = 12
"""Training examples shown on a component's page."""


@dataclass(frozen=True)
class Effect:
    """What moving the weights along one component, or a group of components, does.

    Attributes:
        kl_ratio: KL on the component's top examples over KL on the others; None where unknown.
        magnitudes: Step lengths that were tried.
        kl_top: Mean KL on the top examples per step length, in nats.
        kl_baseline: The same on the other examples.
        interval: Confidence interval of the ratio; None where unknown.
        controls: ``(kind of random direction, its KL ratio)``.
    """

    kl_ratio: float | None = None
    magnitudes: tuple[float, ...] = ()
    kl_top: tuple[float, ...] = ()
    kl_baseline: tuple[float, ...] = ()
    interval: tuple[float, float] | None = None
    controls: tuple[tuple[str, float], ...] = ()

    __repr__ = short_repr


@dataclass(frozen=True)
class Traced:
    """Where in the network a component, or a group of components, acts.

    Attributes:
        parts: ``(name, energy, KL alone, KL lost without it)``, shares; the part with most KL alone first.
    """

    parts: tuple[tuple[str, float, float, float], ...]

    __repr__ = short_repr


@dataclass(frozen=True)
class Trust:
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
class Influences:
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


@dataclass(frozen=True)
class Extras:
    """All optional inputs, checked.

    Attributes:
        effects: Per component or group of components, ascending, as many as were perturbed.
        trust: See :class:`Trust`.
        attributions: ``(component, index of the example)`` → array of the shape of the example's input (or one
            number per token), positive where the input speaks for the component.
        influences: Per component.
        traces: Per component or group of components.
    """

    effects: Mapping[tuple[int, ...], Effect] = field(default_factory=dict)
    trust: Trust = field(default_factory=Trust)
    attributions: Mapping[tuple[int, int], Array] = field(default_factory=dict)
    influences: Mapping[int, Influences] = field(default_factory=dict)
    traces: Mapping[tuple[int, ...], Traced] = field(default_factory=dict)

    @property
    def groups(self) -> list[tuple[int, ...]]:
        """Groups of several components that were moved along or traced."""
        return sorted({key for key in (*self.effects, *self.traces) if len(key) > 1})


def read_extras(
    r: int,
    n: int,
    *,
    effects: Any = None,
    trust: Any = None,
    attributions: Any = None,
    influences: Any = None,
    traces: Any = None,
) -> Extras:
    """Check the optional inputs of :func:`npeff.report`.

    Args:
        r: Number of components.
        n: Number of examples.
        effects: As for :func:`npeff.report`.
        trust: As for :func:`npeff.report`.
        attributions: As for :func:`npeff.report`.
        influences: As for :func:`npeff.report`.
        traces: As for :func:`npeff.report`.

    Raises:
        ArgumentError: One of them has another form than documented, or names components or examples that are not
            there.
    """
    drawings = _items(attributions, "attributions")
    return Extras(
        {key: effect_of(name, value) for key, name, value in _subjects(effects, r, "effects", "figures")},
        trust_of(trust, r, n),
        {_pair(key, r, n): numbers(value, f"attributions[{key}]") for key, value in drawings},
        {_component(j, r, "influences"): influences_of(j, value) for j, value in _items(influences, "influences")},
        {key: _acts(name, value) for key, name, value in _subjects(traces, r, "traces", "groups")},
    )


def _subjects(value: Any, r: int, name: str, sign: str) -> list[tuple[tuple[int, ...], str, Any]]:
    """Effects or traces as ``(components, name for messages, effect)``.

    Args:
        value: What ``npeff.perturb`` or ``npeff.trace`` returned, or the JSON of it: one, a sequence of them, or a
            mapping from components (or tuples of them), which may hold forms that do not say what they are of.
        r: Number of components.
        name: Of the argument.
        sign: The field by which an effect or trace is known.

    Raises:
        ArgumentError: It is none of these, names no component, or says two things of one.
    """
    if value is None:
        return []
    if _get(value, sign) is not None:
        value = [value]
    found: dict[tuple[int, ...], tuple[str, Any]] = {}
    if isinstance(value, Mapping):
        for j, item in value.items():
            several = j if isinstance(j, tuple) and j else (j,)
            key = tuple(sorted({_component(k, r, name) for k in several}))
            if _get(item, sign) is not None and (own := _members(item, r, f"{name}[{j}]")) != key:
                raise ArgumentError(f"{name}[{j}]: is about {_called(own)}")
            found[key] = (f"{name}[{j}]", item)
    elif isinstance(value, Sequence) and not isinstance(value, str | bytes):
        for i, item in enumerate(value):
            if _get(item, sign) is None:
                raise ArgumentError(
                    f"{name}: expected a mapping, got {type(value).__name__} whose item {i} is not what "
                    f"npeff.{_MAKER[name]} returned: {_excerpt(item)}"
                )
            key = _members(item, r, f"{name}[{i}]")
            if key in found:
                raise ArgumentError(f"{name}[{i}]: another one of {_called(key)} was given; pass one of them")
            found[key] = (f"{name}[{i}]", item)
    else:
        raise ArgumentError(f"{name}: expected a mapping from components, or a list, got {type(value).__name__}")
    return [(key, *item) for key, item in found.items()]


_MAKER = {"effects": "perturb", "traces": "trace"}


def _called(components: Sequence[int]) -> str:
    return f"component{'s' if len(components) > 1 else ''} {', '.join(map(str, components))}"


def _members(item: Any, r: int, name: str) -> tuple[int, ...]:
    components = _get(item, "components")
    if not isinstance(components, Sequence) or isinstance(components, str) or not len(components):
        raise ArgumentError(f"{name}.components: expected the numbers of components, got {_excerpt(components)}")
    return tuple(sorted({_component(j, r, f"{name}.components") for j in components}))


def effect_of(j: Any, value: Any) -> Effect:
    """One component's effect.

    Args:
        j: The component, or a name for messages.
        value: A mapping or an object with the attributes of :class:`Effect`, or what ``npeff.perturb`` returned, or
            the JSON of it.

    Raises:
        ArgumentError: The curves' lengths differ, or something is no number.
    """
    name = j if isinstance(j, str) and j.startswith("effects") else f"effects[{j}]"
    if _get(value, "figures") is not None:
        return _from_experiment(name, value.to_json() if hasattr(value, "to_json") else value)
    if isinstance(value, str | bytes | int | float | Sequence):
        raise ArgumentError(f"{name}: expected a mapping with kl_ratio, magnitudes, …, got {_excerpt(value)}")
    ratio, interval, controls = (_get(value, key) for key in ("kl_ratio", "interval", "controls"))
    if isinstance(controls, Mapping):
        controls = tuple(controls.items())
    ends = None if interval is None else numbers(interval, f"{name}.interval").ravel().tolist()
    if ends is not None and len(ends) != 2:
        raise ArgumentError(f"{name}.interval: expected two numbers, got {_excerpt(interval)}")
    return Effect(
        None if ratio is None else _number(ratio, f"{name}.kl_ratio"),
        **_curves(name, {key: _get(value, key) for key in _CURVES}),
        interval=None if ends is None else (ends[0], ends[1]),
        controls=tuple((str(label), _number(of, f"{name}.controls")) for label, of in controls or ()),
    )


def _curves(name: str, given: Mapping[str, Any]) -> dict[str, Any]:
    curves = [tuple(numbers(_or_empty(given[key]), f"{name}.{key}").ravel().tolist()) for key in _CURVES]
    if len({len(curve) for curve in curves if curve}) > 1 or (any(curves) and not curves[0]):
        lengths = ", ".join(f"{key} {len(curve)}" for key, curve in zip(_CURVES, curves, strict=True))
        raise ArgumentError(f"{name}: expected curves of one length, a value per magnitude, got {lengths}")
    return dict(zip(_CURVES, curves, strict=True))


def _from_experiment(name: str, value: Any) -> Effect:
    """The JSON of what ``npeff.perturb`` returned: the curve of the sign kept, or the mean where each has its own.

    Raises:
        ArgumentError: A field is missing or has another form.
    """
    ratio = _interval(value, "ratio", name)
    controls = []
    for kind, control in _items(value.get("controls"), f"{name}.controls"):
        own = _interval(control, "ratio", f"{name}.controls.{kind}")[0]
        if own is not None:
            controls.append((CONTROLS.get(str(kind), str(kind)), own))
    curves: dict[str, Any] = {}
    curve = value.get("curve")
    if curve is not None:
        signs = numbers(_get(curve, "signs"), f"{name}.curve.signs").ravel().tolist()
        rows: dict[str, Any] = {}
        for key, field_ in zip(_CURVES, ("magnitudes", "top", "baseline"), strict=True):
            table = numbers(_get(curve, field_), f"{name}.curve.{field_}")
            if table.ndim != 2 or len(table) != len(signs) or not len(signs):
                raise ArgumentError(
                    f"{name}.curve.{field_}: expected a list of numbers for each of {len(signs)} signs, got shape "
                    f"{table.shape}"
                )
            sign = value.get("sign")
            rows[key] = table[signs.index(sign)] if sign in signs else table.mean(0)
        curves = _curves(name, rows)
    low, high = ratio[1:]
    interval = None if low is None or high is None else (low, high)
    return Effect(ratio[0], **curves, interval=interval, controls=tuple(controls))


def _interval(of: Any, key: str, name: str) -> tuple[float | None, float | None, float | None]:
    """``(value, low, high)`` of a figure; None for what is not known.

    Raises:
        ArgumentError: There is no such figure.
    """
    figure = _get(_get(of, "figures"), key)
    if not isinstance(figure, Mapping):
        raise ArgumentError(f"{name}.figures.{key}: expected value, low and high, got {_excerpt(figure)}")
    return tuple(  # type: ignore[return-value]
        None if figure.get(part) is None else _number(figure[part], f"{name}.figures.{key}.{part}")
        for part in ("value", "low", "high")
    )


def _acts(name: str, value: Any) -> Traced:
    """What a report shows of what ``npeff.trace`` returned, or of the JSON of it.

    Raises:
        ArgumentError: The lists do not go together, or something is no number.
    """
    value = value.to_json() if hasattr(value, "to_json") else value
    names, energy = value.get("groups"), numbers(_or_empty(value.get("energy")), f"{name}.energy").ravel()
    if not isinstance(names, Sequence) or isinstance(names, str) or not all(isinstance(part, str) for part in names):
        raise ArgumentError(f"{name}.groups: expected names of parts, got {_excerpt(names)}")
    shares = {}
    for key in ("alone", "lost"):
        items = value.get(key)
        if not isinstance(items, Sequence) or isinstance(items, str) or not len(items) == len(names) == len(energy):
            raise ArgumentError(f"{name}.{key}: expected a figure and an energy for each of {len(names)} parts")
        figures = [item.get("value") if isinstance(item, Mapping) else item for item in items]
        shares[key] = _sized(numbers(figures, f"{name}.{key}"), len(names), f"{name}.{key}")
    order = np.argsort(-np.nan_to_num(shares["alone"], nan=-np.inf), kind="stable")
    rows = ((names[i], float(energy[i]), float(shares["alone"][i]), float(shares["lost"][i])) for i in order)
    return Traced(tuple(rows))


_CURVES = ("magnitudes", "kl_top", "kl_baseline")


def influences_of(j: Any, value: Any) -> Influences:
    """One component's influences.

    Args:
        j: The component, for messages.
        value: Pairs (position, score), or a mapping from positions to scores; a mapping with ``pairs`` and perhaps
            ``by`` and ``texts``; or what ``component_influence`` or ``component_rollback`` returned.

    Raises:
        ArgumentError: It is none of these.
    """
    name = f"influences[{j}]"
    by, texts, pairs = None, {}, value
    if hasattr(value, "pairs"):
        if getattr(value, "j", int(j)) != int(j):
            raise ArgumentError(f"{name}: is about component {value.j}")
        pairs, by = value.pairs(INFLUENCES), value.by
        told = getattr(value, "text", lambda position: None)
        texts = {i: text for i, _ in pairs if (text := told(i)) is not None}
    elif isinstance(value, Mapping) and "pairs" in value:
        pairs, by, texts = value["pairs"], value.get("by"), value.get("texts") or {}
    elif isinstance(value, Mapping):
        pairs = list(value.items())
    if not isinstance(pairs, Sequence | np.ndarray) or not all(_length(pair) == 2 for pair in pairs):
        raise ArgumentError(f"{name}: expected pairs (position in the training data, score), got {_excerpt(value)}")
    if not isinstance(by, str | None) or not isinstance(texts, Mapping):
        raise ArgumentError(f"{name}: expected by to be a text and texts a mapping from positions to texts")
    scores = [(_position(i, name), _number(score, f"{name}, the score of {i!r:.20}")) for i, score in pairs]
    if not np.isfinite([score for _, score in scores]).all():
        raise ArgumentError(f"{name}: expected finite scores")
    scores.sort(key=lambda item: (-abs(item[1]), item[0]))
    return Influences(scores, by or Influences.by, {_position(i, name): str(text) for i, text in texts.items()})


def _excerpt(value: Any) -> str:
    """The beginning of a value, without writing out all of a large one."""
    if isinstance(value, list | tuple):
        value = value[:8]
    return repr(value)[:80]


def _length(value: Any) -> int:
    return -1 if isinstance(value, str | bytes) or not hasattr(value, "__len__") else len(value)


def _position(value: Any, name: str) -> int:
    """The position of a training example, also as the text that JSON has for a key.

    Raises:
        ArgumentError: It is none.
    """
    whole = int(value) if isinstance(value, str) and value.isascii() and value.isdigit() else value
    if isinstance(whole, float | np.floating) and np.isfinite(whole) and whole == int(whole):
        whole = int(whole)  # pairs may stand in one array of floats
    if isinstance(whole, bool) or not isinstance(whole, int | np.integer) or not 0 <= whole < 1 << 63:
        raise ArgumentError(
            f"{name}: expected whole numbers ≥ 0, positions of training examples, got {_excerpt(value)}"
        )
    return int(whole)


def trust_of(value: Any, r: int, n: int) -> Trust:
    """What ``trust=`` says.

    Args:
        value: A :class:`Trust`; one number per component (its stability), as a sequence or a mapping from components;
            or a mapping with any of ``stability`` (the same, or what ``npeff.trust.stability`` returned), ``null``
            (a threshold, or what ``npeff.trust.null_model`` returned), ``selection`` (what ``npeff.trust.select``
            returned) and ``explained`` (one number per example).
        r: Number of components.
        n: Number of examples.

    Raises:
        ArgumentError: It is none of these.
    """
    if value is None:
        return Trust()
    if isinstance(value, Trust):
        _sized(value.stability, r, "trust.stability")
        _sized(value.explained, n, "trust.explained")
        return value
    if not isinstance(value, Mapping) or not set(map(str, value)) <= TRUST_KEYS:
        value = {"stability": value}
    stability, null, selection = (value.get(key) for key in ("stability", "null", "selection"))
    explained = value.get("explained")
    losses = _get(selection, "held_out")
    held_out = numbers(_or_empty(losses), "trust.selection.held_out")
    tried = numbers(_or_empty(_get(selection, "n_components")), "trust.selection.n_components").ravel()
    train = numbers(_or_empty(_get(selection, "train")), "trust.selection.train").ravel()
    folds = len(tried) and held_out.size and held_out.size % len(tried) == 0
    means = held_out.reshape(-1, len(tried)).mean(0) if folds else ()
    if selection is not None and not len(means):
        raise ArgumentError("trust.selection: expected n_components, and held_out with a loss for each of them")
    chosen, n_strategies = _get(selection, "chosen"), _get(stability, "n_strategies")
    threshold = null if isinstance(null, int | float | np.number | None) else _get(null, "threshold")
    if null is not None and threshold is None:
        raise ArgumentError(
            f"trust.null: expected a threshold, or what npeff.trust.null_model returned, got {_excerpt(null)}"
        )
    for name, number in (("selection.chosen", chosen), ("stability.n_strategies", n_strategies)):
        if number is not None and (isinstance(number, bool) or not isinstance(number, int | np.integer) or number < 1):
            raise ArgumentError(f"trust.{name}: expected a whole number ≥ 1, got {_excerpt(number)}")
    return Trust(
        None if stability is None else _per_component(stability, r),
        None if threshold is None else _number(threshold, "trust.null.threshold"),
        tuple((int(a), float(b)) for a, b in zip(tried, means, strict=True)),
        tuple((int(a), float(b)) for a, b in zip(tried, train, strict=False)),
        None if chosen is None else int(chosen),
        None if n_strategies is None else min(int(n_strategies), r),
        None if explained is None else _sized(numbers(explained, "trust.explained"), n, "trust.explained"),
    )


def _per_component(value: Any, r: int) -> Array:
    name = "trust.stability"
    inner = _get(value, "components")
    if inner is not None:
        value = inner
    if isinstance(value, Mapping):
        full = np.full(r, np.nan)
        for j, number in value.items():
            full[_component(j, r, name)] = np.nan if number is None else _number(number, f"{name}[{j}]")
        return full
    return _sized(numbers(value, name), r, name)


def _get(value: Any, key: str) -> Any:
    return value.get(key) if isinstance(value, Mapping) else getattr(value, key, None)


def _or_empty(value: Any) -> Any:
    return () if value is None else value


def _sized(value: Any, size: int, name: str) -> Any:
    if value is not None and np.shape(value) != (size,):
        raise ArgumentError(f"{name}: expected {size} numbers, got shape {np.shape(value)}")
    return value


def _items(value: Any, name: str) -> list[tuple[Any, Any]]:
    if value is None:
        return []
    if not isinstance(value, Mapping):
        raise ArgumentError(f"{name}: expected a mapping, got {type(value).__name__}")
    return list(value.items())


def _component(j: Any, r: int, name: str) -> int:
    whole = int(j) if isinstance(j, str) and j.isascii() and j.isdigit() and len(j) < 20 else j
    if isinstance(whole, bool) or not isinstance(whole, int | np.integer) or not 0 <= whole < r:
        raise ArgumentError(f"{name}: expected components 0 to {r - 1}, got {_excerpt(j)}")
    return int(whole)


def _pair(key: Any, r: int, n: int) -> tuple[int, int]:
    if not isinstance(key, tuple) or len(key) != 2:
        raise ArgumentError(f"attributions: expected keys (component, example), got {_excerpt(key)}")
    j, i = _component(key[0], r, "attributions"), key[1]
    if isinstance(i, bool) or not isinstance(i, int | np.integer) or not 0 <= i < n:
        raise ArgumentError(f"attributions: expected examples 0 to {n - 1}, got {_excerpt(i)}")
    return j, int(i)


def numbers(value: Any, name: str) -> Array:
    """Numbers as float64; None among them is unknown, NaN.

    Raises:
        ArgumentError: Something else is among them: text, truth values, an infinity, lists of unequal lengths.
    """
    if hasattr(value, "detach"):
        value = value.detach().cpu().numpy()
    wrong = ArgumentError(f"{name}: expected numbers, got {_excerpt(value)}")
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
        raise ArgumentError(f"{name}: expected a number, got {_excerpt(value)}")
    return float(array.reshape(-1)[0])
