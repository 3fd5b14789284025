"""What is known of components besides: effects, traces, trust and influences, read from any of their forms.

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

INFLUENCES = 12
"""Training examples shown on a component's page."""
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
    """

    kl_ratio: float | None = None
    magnitudes: tuple[float, ...] = ()
    kl_top: tuple[float, ...] = ()
    kl_baseline: tuple[float, ...] = ()
    interval: tuple[float, float] | None = None
    controls: tuple[tuple[str, float], ...] = ()

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
    )


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
    """Read the position of a training example; pairs may stand in one array of floats.

    Raises:
        ArgumentError: It is none.
    """
    whole = int(value) if isinstance(value, float | np.floating) and np.isfinite(value) and value % 1 == 0 else value
    try:
        return index_of(whole, None, name)
    except ArgumentError:
        raise ArgumentError(
            f"{name}: expected whole numbers ≥ 0, positions of training examples, got {excerpt_of(value)}"
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
