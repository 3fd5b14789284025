"""Where in the network a component acts: its perturbation restricted to one part at a time, and without it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from tqdm import tqdm

from npeff.components.components import Components
from npeff.components.strategies import Strategy
from npeff.errors import ArgumentError
from npeff.gradients.factors import Likelihood
from npeff.perturbation.diagonal import diagonal_moves
from npeff.perturbation.directions import Directions, Reject
from npeff.perturbation.effect import plain, write_json
from npeff.perturbation.groups import REST, Groups, resolve, rest, restricted
from npeff.perturbation.magnitude import search
from npeff.perturbation.measures import Interval, ratio_with_interval
from npeff.perturbation.opening import checked_options, opened
from npeff.perturbation.options import Combine, Options, Signs, baseline_rows, top_rows
from npeff.perturbation.session import Forward, Session
from npeff.perturbation.subjects import Move, moves_of, needed_vectors, subject_of
from npeff.short_repr import several
from npeff.storage.files import atomic, path_of
from npeff.storage.recognition import refuse_npeff_file

Array = npt.NDArray[Any]
ENDINGS = (".png", ".svg", ".pdf")
ALONE, LOST = "#3366aa", "#cc7733"
SEPARATOR = " · "


@dataclass(frozen=True, eq=False)
class Trace:
    """How much of a component's effect on its top examples each part of the network carries.

    Attributes:
        components: The component, or those of the strategy.
        groups: Names of the parts, g of them.
        energy: ``(g,)`` share of the direction's squared norm.
        alone: Per part: mean KL with the perturbation in this part only, over the mean KL of all of it.
        lost: Per part: ``1 −`` (mean KL with the perturbation everywhere else) / (mean KL of all of it).
        magnitude: Norm of the change of the weights (mean over signs and a strategy's directions).
        ids: ``(k,)`` positions of the top examples in the data.
        kl: ``(k,)`` KL of each under the whole perturbation, nats.
        kl_alone: ``(g, k)`` under each part of it.
        kl_without: ``(g, k)`` under all but that part.
        details: Options and what was found.
    """

    components: tuple[int, ...]
    groups: tuple[str, ...]
    energy: Array
    alone: tuple[Interval, ...]
    lost: tuple[Interval, ...]
    magnitude: float
    ids: Array
    kl: Array
    kl_alone: Array
    kl_without: Array
    details: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.groups)

    def __repr__(self) -> str:
        most = int(np.argmax([i.value for i in self.alone]))
        about = f"component{'s' if len(self.components) > 1 else ''} {several(self.components)}"
        return f"Trace({about}, {len(self)} parts; most in {self.groups[most]}: {self.alone[most].value:.0%})"

    @property
    def name(self) -> str:
        """``"component 3"``, ``"components 1, 4, 7"``."""
        return f"component{'s' if len(self.components) > 1 else ''} {', '.join(map(str, self.components))}"

    def table(self) -> str:
        """The parts as text: energy, KL alone, KL lost without it."""
        rows = [(self.name, "energy", "KL alone", "KL lost without it")]
        for name, energy, alone, lost in zip(self.groups, self.energy, self.alone, self.lost, strict=True):
            rows.append((name, f"{energy:.1%}", _shown(alone), _shown(lost)))
        total = sum(i.value for i in self.alone)
        rows.append(("sum", f"{self.energy.sum():.1%}", f"{total:.1%}", f"{sum(i.value for i in self.lost):.1%}"))
        widths = [max(len(row[i]) for row in rows) for i in range(4)]
        return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)

    def to_json(self) -> dict[str, Any]:
        """Everything as numbers, strings, lists and dicts; None for what is not finite."""
        return plain({name: getattr(self, name) for name in self.__dataclass_fields__})

    def save(self, path: str | Path) -> Path:
        """Write :meth:`to_json` as a JSON file.

        Raises:
            ArgumentError: ``path`` is no path.
            StorageError: Fishers or Components are there, or the file cannot be written.
        """
        return write_json(self.to_json(), path)

    def plot(self, path: str | Path, *, most: int = 60) -> Path:
        """Draw it: bars, or a heat map where every part has a label, as from :func:`npeff.heads`.

        Args:
            path: ``.png``, ``.svg`` or ``.pdf``.
            most: Bars to draw at most, those that carry most.

        Raises:
            ArgumentError: The ending is another.
            StorageError: Fishers or Components are there, or the file cannot be written.
        """
        return _draw(self, path, most)


def trace(
    model: nn.Module,
    data: Iterable[Any],
    components: Components,
    j: int | Strategy,
    groups: Groups | None = None,
    *,
    magnitude: float | None = None,
    target_kl: float | tuple[float, float] = 0.1,
    sign: Signs = "both",
    combine: Combine = "each",
    reject: Reject | None = None,
    max_sim: float | None = None,
    top: int | Sequence[int] | Array = 32,
    baseline: int | Literal["all"] | Sequence[int] | Array = 4096,
    mix: float | Sequence[float] | None = None,
    fisher: Mapping[str, torch.Tensor] | Array | None = None,
    confidence: float = 0.95,
    n_resamples: int = 999,
    forward: Forward | None = None,
    likelihood: Likelihood | None = None,
    device: torch.device | str | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Trace:
    """Where in the network a component acts.

    The perturbation of :func:`npeff.perturb`, at the magnitude at which all of it reaches the wanted KL, is
    applied in one part of the network alone, and everywhere but there. Shares of KL need not add up: parts can
    help or hinder each other. The model is left bit for bit as it was.

    Args:
        model: As for :func:`npeff.perturb`.
        data: As for :func:`npeff.perturb`.
        components: A decomposition.
        j: A component, or a strategy.
        groups: ``"layer"`` (default): parameters by the module that owns them; ``"parameter"``: every tensor; or
            a mapping from names to patterns, ``(pattern, index)`` or parts: see :func:`npeff.heads` and
            :func:`npeff.units`. Parameters in no group are one more, ``"everything else"``. Groups may overlap.
        magnitude: As for :func:`npeff.perturb`.
        target_kl: As for :func:`npeff.perturb`.
        sign: ``"both"`` averages the KL of the two signs, each at its own magnitude; or ``1`` or ``-1``.
        combine: As for :func:`npeff.perturb`.
        reject: As for :func:`npeff.perturb`.
        max_sim: As for :func:`npeff.perturb`.
        top: As for :func:`npeff.perturb`.
        baseline: Examples for the mean Fisher of a diagonal component, where ``fisher`` is not given.
        mix: As for :func:`npeff.perturb`.
        fisher: As for :func:`npeff.perturb`.
        confidence: Level of the intervals.
        n_resamples: Bootstrap resamples of the top examples; 0 for no intervals.
        forward: As for :func:`npeff.perturb`.
        likelihood: As for :func:`npeff.perturb`.
        device: As for :func:`npeff.perturb`.
        seed: Decides the sample and the resamples.
        progress: Show a progress bar.

    Returns:
        The trace: table, picture, numbers.

    Raises:
        ArgumentError: As for :func:`npeff.perturb`; or a group fits no parameter.
        DataError: As for :func:`npeff.perturb`.
        ModelError: As for :func:`npeff.perturb`.
    """
    given = dict(locals())
    names = set(Options.__dataclass_fields__) & given.keys()
    options = checked_options(components, {name: given[name] for name in names})
    subject = subject_of(components, j)
    components.check_recovered(needed_vectors(components, [subject], options.reject))
    resolved = resolve(groups, components.parameters)
    free = rest(components.parameters, resolved)
    rows = top_rows(subject.coefficient, options.top)
    compared = rows
    if components.kind == "diagonal" and options.fisher is None:
        compared = baseline_rows(len(components.coefficients), options.baseline, options.seed)
    every = np.concatenate([rows, compared])
    with opened(model, data, components, every, likelihood, forward, device) as (session, places):
        at_top = np.unique(places[rows])
        pieces = session.examples.subset(at_top)
        if components.kind == "diagonal":
            moves = diagonal_moves(session, components, subject, options, pieces, np.unique(places[compared]), [])
        else:
            moves = moves_of(Directions(components), subject, options.combine, options.reject, options.max_sim)
        order = np.argsort(np.concatenate([piece.places for piece in pieces]), kind="stable")

        def kl(vector: Array, size: float) -> Array:
            return session.kl(pieces, session.placed(vector), size)[order]

        if any(bool(move.vector[free].any()) for move in moves):
            resolved = {**resolved, REST: []}
        steps = [(move, sign * _size(session, move, sign, options, pieces)) for move in moves for sign in options.signs]
        weights = [move.share / len(options.signs) for move, _ in steps]
        whole = np.zeros(len(at_top))
        for weight, (move, size) in zip(weights, steps, strict=True):
            whole += weight * kl(move.vector, size)
        alone, without = np.zeros((2, len(resolved), len(at_top)))
        energy = np.zeros(len(resolved))
        bar = tqdm(list(resolved.items()), desc="Trace", disable=not progress)
        for g, (name, elements) in enumerate(bar):
            for weight, (move, size) in zip(weights, steps, strict=True):
                part = np.where(free, move.vector, 0.0) if name == REST else restricted(move.vector, elements)
                alone[g] += weight * kl(part, size)
                without[g] += weight * kl(move.vector - part, size)
                energy[g] += weight * float(np.square(part).sum())
        ids = session.examples.ids[at_top]
    return Trace(
        components=subject.members,
        groups=tuple(resolved),
        energy=energy,
        alone=_shares(alone, whole, options, False),
        lost=_shares(without, whole, options, True),
        magnitude=float(np.dot(weights, [abs(size) for _, size in steps])),
        ids=ids,
        kl=whole,
        kl_alone=alone,
        kl_without=without,
        details={
            "kind": components.kind,
            "likelihood": session.likelihood,
            "sign": options.sign,
            "target_kl": options.target_kl if options.magnitude is None else None,
            "confidence": options.confidence,
            "components_digest": components.digest,
        },
    )


def _size(session: Session, move: Move, sign: int, options: Options, pieces: Any) -> float:
    return search(session, session.placed(move.vector), sign, options, pieces).magnitude


def _shares(parts: Array, whole: Array, options: Options, lost: bool) -> tuple[Interval, ...]:
    """Quotients of mean KL over the same examples, or 1 − them, with paired bootstrap intervals."""
    found = []
    for g, part in enumerate(parts):
        i = ratio_with_interval(part, whole, options.confidence, options.n_resamples, options.seed + g)
        found.append(Interval(1 - i.value, 1 - i.high, 1 - i.low) if lost else i)
    return tuple(found)


def _shown(interval: Interval) -> str:
    ends = "" if np.isnan(interval.low) else f" [{interval.low:.1%}, {interval.high:.1%}]"
    return "–" if np.isnan(interval.value) else f"{interval.value:.1%}{ends}"


def _draw(trace: Trace, path: str | Path, most: int) -> Path:
    """Draw a trace into a file.

    Args:
        trace: What to draw.
        path: ``.png``, ``.svg`` or ``.pdf``.
        most: Bars at most.

    Returns:
        The file.

    Raises:
        ArgumentError: The ending is another.
        StorageError: Fishers or Components are there, or the file cannot be written.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    path = path_of(path)
    ending = path.suffix.lower()
    if ending not in ENDINGS:
        raise ArgumentError(f"path: expected a name ending in .png, .svg or .pdf, got {path}")
    refuse_npeff_file(path)
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "npeff", "font.size": 9}):
        grid = _grid(trace)
        figure: Any = Figure(layout="constrained")
        if grid is None:
            _bars(figure, trace, most)
        else:
            _heat(figure, trace, *grid)
        figure.suptitle(f"Where {trace.name} acts: mean KL {trace.kl.mean():.3g} on {len(trace.kl)} top examples")
        with atomic(path) as scratch:
            figure.savefig(scratch, format=ending[1:], dpi=150, metadata={"Date": None} if ending == ".svg" else None)
    return path


def _bars(figure: Any, trace: Trace, most: int) -> None:
    carried = np.array([max(abs(a.value), abs(b.value)) for a, b in zip(trace.alone, trace.lost, strict=True)])
    shown = np.sort(np.argsort(-np.nan_to_num(carried), kind="stable")[:most])
    left_out = len(trace) - len(shown)
    figure.set_size_inches(7.5, 1.6 + 0.36 * len(shown))
    axes = figure.subplots()
    y = np.arange(len(shown))
    for offset, parts, colour, label in (
        (-0.2, trace.alone, ALONE, "in this part alone"),
        (0.2, trace.lost, LOST, "lost without this part"),
    ):
        some = [parts[g] for g in shown]
        values = [i.value for i in some]
        axes.barh(y + offset, values, 0.38, color=colour, label=label)
        axes.errorbar(values, y + offset, xerr=_errors(some), fmt="none", ecolor="#333333", elinewidth=0.8)
    axes.set_yticks(y, [f"{trace.groups[g]}  ({trace.energy[g]:.0%})" for g in shown])
    axes.invert_yaxis()
    axes.axvline(0, color="#333333", linewidth=0.8)
    axes.axvline(1, color="#999999", linewidth=0.8, linestyle=":")
    note = f"; {left_out} parts that carry less are left out" if left_out else ""
    axes.set_xlabel(f"share of the KL of the whole perturbation (in brackets: of its squared norm){note}")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(frameon=False, loc="outside lower center", ncols=2)


def _errors(parts: list[Interval]) -> Any:
    ends = np.array([[i.value - i.low, i.high - i.value] for i in parts]).T
    return np.nan_to_num(np.maximum(ends, 0))


def _grid(trace: Trace) -> tuple[list[str], list[str]] | None:
    """Row and column names, where every part but the rest is ``row · column``."""
    pairs = [name.split(SEPARATOR) for name in trace.groups if SEPARATOR in name]
    if not pairs or any(len(pair) != 2 for pair in pairs):
        return None
    rows, columns = (list(dict.fromkeys(pair[i] for pair in pairs)) for i in (0, 1))
    return (rows, columns) if len(pairs) == len(trace) or len(rows) > 1 else None


def _heat(figure: Any, trace: Trace, rows: list[str], columns: list[str]) -> None:
    figure.set_size_inches(3.0 + 2 * (1 + 0.3 * len(columns)), 2.2 + 0.32 * len(rows))
    panels = figure.subplots(1, 2)
    for axes, parts, title in (
        (panels[0], trace.alone, "in this part alone"),
        (panels[1], trace.lost, "lost without this part"),
    ):
        values = np.full((len(rows), len(columns)), np.nan)
        other = []
        for name, interval in zip(trace.groups, parts, strict=True):
            if SEPARATOR in name:
                row, column = name.split(SEPARATOR)
                values[rows.index(row), columns.index(column)] = interval.value
            else:
                other.append(f"{name}: {interval.value:.0%}")
        limit = float(np.nanmax(np.abs(values))) or 1.0
        image = axes.imshow(values, cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto")
        axes.set_xticks(range(len(columns)), columns, rotation=90)
        axes.set_yticks(range(len(rows)), rows if axes is panels[0] else [""] * len(rows))
        axes.set_title("\n".join([title, *other[:4]]), fontsize=9)
        figure.colorbar(image, ax=axes, shrink=0.8, label="share of the whole KL")
