"""What else a report can show, when it is given: perturbations, trust, attributions, influences.

Every input may be a plain mapping or sequence, as read from JSON, or the object that another part of npeff made.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from npeff.errors import ArgumentError

if TYPE_CHECKING:
    from npeff.components import Components

Array = npt.NDArray[Any]
INFLUENCES = 12
"""Training examples shown on a component's page."""


@dataclass(frozen=True)
class Effect:
    """What moving the weights along one component does.

    Attributes:
        kl_ratio: KL on the component's top examples over KL on the others; None where unknown.
        magnitudes: Step lengths that were tried.
        kl_top: Mean KL on the top examples per step length, in nats.
        kl_baseline: The same on the other examples.
    """

    kl_ratio: float | None = None
    magnitudes: tuple[float, ...] = ()
    kl_top: tuple[float, ...] = ()
    kl_baseline: tuple[float, ...] = ()


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


@dataclass(frozen=True)
class Extras:
    """All optional inputs, checked.

    Attributes:
        effects: Per component, as many as were perturbed.
        trust: See :class:`Trust`.
        attributions: ``(component, index of the example)`` → array of the shape of the example's input (or one
            number per token), positive where the input speaks for the component.
        influences: Per component.
    """

    effects: Mapping[int, Effect] = field(default_factory=dict)
    trust: Trust = field(default_factory=Trust)
    attributions: Mapping[tuple[int, int], Array] = field(default_factory=dict)
    influences: Mapping[int, Influences] = field(default_factory=dict)


def read_extras(
    components: Components, effects: Any = None, trust: Any = None, attributions: Any = None, influences: Any = None
) -> Extras:
    """Check the optional inputs of :func:`npeff.report`.

    Raises:
        ArgumentError: One of them has another form than documented, or names components or examples that are not
            there.
    """
    r, n = components.n_components, len(components.coefficients)
    drawings = _items(attributions, "attributions")
    return Extras(
        {_component(j, r, "effects"): effect_of(j, value) for j, value in _items(effects, "effects")},
        trust_of(trust, r, n),
        {_pair(key, r, n): _numbers(value, f"attributions[{key}]") for key, value in drawings},
        {_component(j, r, "influences"): influences_of(j, value) for j, value in _items(influences, "influences")},
    )


def effect_of(j: Any, value: Any) -> Effect:
    """One component's effect, from a mapping or an object with the attributes of :class:`Effect`.

    Raises:
        ArgumentError: The curves' lengths differ, or something is no number.
    """
    name = f"effects[{j}]"
    get = value.get if isinstance(value, Mapping) else lambda key, default=None: getattr(value, key, default)
    ratio = get("kl_ratio")
    curves = [tuple(_numbers(_or_empty(get(key)), f"{name}.{key}").ravel().tolist()) for key in _CURVES]
    if len({len(curve) for curve in curves if curve}) > 1 or (any(curves) and not curves[0]):
        lengths = ", ".join(f"{key} {len(curve)}" for key, curve in zip(_CURVES, curves, strict=True))
        raise ArgumentError(f"{name}: expected curves of one length, a value per magnitude, got {lengths}")
    return Effect(None if ratio is None else float(_numbers(ratio, f"{name}.kl_ratio").reshape(-1)[0]), *curves)


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
    if not isinstance(pairs, Sequence | np.ndarray) or not all(np.shape(pair) == (2,) for pair in pairs):
        raise ArgumentError(f"{name}: expected pairs (position in the training data, score), got {value!r:.80}")
    scores = sorted(((int(i), float(score)) for i, score in pairs), key=lambda item: (-abs(item[1]), item[0]))
    return Influences(scores, by or Influences.by, {int(i): str(text) for i, text in dict(texts).items()})


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
    if not isinstance(value, Mapping) or not set(map(str, value)) <= {"stability", "null", "selection", "explained"}:
        value = {"stability": value}
    stability, null, selection = (value.get(key) for key in ("stability", "null", "selection"))
    explained = value.get("explained")
    losses = _get(selection, "held_out")
    held_out = _numbers(_or_empty(losses), "trust.selection.held_out")
    numbers = _numbers(_or_empty(_get(selection, "n_components")), "trust.selection.n_components").ravel()
    train = _numbers(_or_empty(_get(selection, "train")), "trust.selection.train").ravel()
    folds = len(numbers) and held_out.size and held_out.size % len(numbers) == 0
    means = held_out.reshape(-1, len(numbers)).mean(0) if folds else ()
    if selection is not None and not len(means):
        raise ArgumentError("trust.selection: expected n_components, and held_out with a loss for each of them")
    chosen, n_strategies = _get(selection, "chosen"), _get(stability, "n_strategies")
    threshold = null if isinstance(null, int | float | None) else _get(null, "threshold")
    return Trust(
        None if stability is None else _per_component(stability, r),
        None if threshold is None else float(threshold),
        tuple((int(a), float(b)) for a, b in zip(numbers, means, strict=True)),
        tuple((int(a), float(b)) for a, b in zip(numbers, train, strict=False)),
        None if chosen is None else int(chosen),
        None if n_strategies is None else min(int(n_strategies), r),
        None if explained is None else _sized(_numbers(explained, "trust.explained"), n, "trust.explained"),
    )


def _per_component(value: Any, r: int) -> Array:
    name = "trust.stability"
    inner = _get(value, "components")
    if inner is not None:
        value = inner
    if isinstance(value, Mapping):
        full = np.full(r, np.nan)
        for j, number in value.items():
            full[_component(j, r, name)] = float(_numbers(number, f"{name}[{j}]"))
        return full
    return _sized(_numbers(value, name), r, name)


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
    try:
        number = int(j)
    except (TypeError, ValueError):
        number = -1
    if not 0 <= number < r:
        raise ArgumentError(f"{name}: expected components 0 to {r - 1}, got {j!r}")
    return number


def _pair(key: Any, r: int, n: int) -> tuple[int, int]:
    if not isinstance(key, tuple) or len(key) != 2:
        raise ArgumentError(f"attributions: expected keys (component, example), got {key!r}")
    j, i = _component(key[0], r, "attributions"), key[1]
    if not isinstance(i, int | np.integer) or not 0 <= i < n:
        raise ArgumentError(f"attributions: expected examples 0 to {n - 1}, got {i!r}")
    return j, int(i)


def _numbers(value: Any, name: str) -> Array:
    if hasattr(value, "detach"):
        value = value.detach().cpu().numpy()
    try:
        return np.asarray(value, np.float64)
    except (TypeError, ValueError) as error:
        raise ArgumentError(f"{name}: expected numbers, got {value!r:.80}") from error
