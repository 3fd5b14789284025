"""Measure where in the network a component acts: apply its perturbation to one part at a time, and to all but one.

The parts are groups of parameters: layers, tensors, heads, blocks of units.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from torch import nn
from tqdm import tqdm

from npeff.components.components import Components
from npeff.components.strategies import Strategy
from npeff.errors import ArgumentError, check_integer
from npeff.fishers.block_weights import layer_of
from npeff.models.parameters import Parameter, Parameters
from npeff.perturbation.directions import ComponentDirections
from npeff.perturbation.effect import Result, text_table
from npeff.perturbation.evaluate import check_kl
from npeff.perturbation.figures import Interval, interval, mean_ratio
from npeff.perturbation.options import PerturbOptions
from npeff.perturbation.steps import experiment, search_steps
from npeff.short_repr import short_repr
from npeff.storage.container import refuse_npeff_file
from npeff.storage.files import atomic, path_of

Array = npt.NDArray[Any]
Groups = Literal["layer", "parameter"] | Mapping[str, Any]
Resolved = dict[str, list[tuple[Parameter, Any]]]

REST = "everything else"
ENDINGS = (".png", ".svg", ".pdf")
ALONE, LOST = ("in this part alone", "#3366aa"), ("lost without this part", "#cc7733")
SEPARATOR = " · "
UNTRACED = {"floor", "n_random", "curve", "unrelated", "prompts", "n_tokens"}
"""Options of a perturbation that a trace does not have."""


@dataclass(frozen=True)
class Part:
    """One of several equal parts of every matching tensor.

    Attributes:
        pattern: Shell pattern of parameter names.
        dim: Dimension that is divided.
        number: Number of the part, from 0.
        of: Number of parts.
        packed: Number of matrices that lie behind each other along ``dim`` (3 for query, key and value in one tensor);
            the part is taken of each.
    """

    pattern: str
    dim: int
    number: int
    of: int
    packed: int = 1

    __repr__ = short_repr

    def index(self, parameter: Parameter) -> tuple[Any, ...]:
        """Return the index of the part in a tensor.

        Raises:
            ArgumentError: The tensor cannot be divided in this way.
        """
        dims = len(parameter.shape)
        if not -dims <= self.dim < dims:
            raise ArgumentError(f"groups: {parameter.name} has shape {parameter.shape}, and no dimension {self.dim}")
        dim = self.dim % dims
        size = parameter.shape[dim]
        if size % (self.of * self.packed):
            raise ArgumentError(
                f"groups: dimension {dim} of {parameter.name} {parameter.shape} does not divide into "
                f"{self.packed} × {self.of} parts"
            )
        width = size // (self.of * self.packed)
        starts = np.arange(self.packed) * (size // self.packed) + self.number * width
        taken: Any = (starts[:, None] + np.arange(width)).reshape(-1)
        if self.packed == 1:
            taken = slice(int(starts[0]), int(starts[0]) + width)
        return (slice(None),) * dim + (taken,)


Division = str | Sequence[str] | Mapping[str, int | tuple[int, int]]


def heads(parameters: Division, n_heads: int, dim: int = 0, *, label: str = "") -> dict[str, list[Part]]:
    """Make a group per attention head, for :func:`npeff.trace`.

    Args:
        parameters: Patterns of the tensors that the heads divide. A mapping gives each its dimension: rows (0) of
            query, key and value, columns (1) of the output projection; ``(dimension, 3)`` where query, key and
            value lie behind each other in one tensor. For ``torch.nn.MultiheadAttention``:
            ``{"attn.in_proj_*": (0, 3), "attn.out_proj.weight": 1}``.
        n_heads: Number of heads.
        dim: Dimension for patterns given without one.
        label: Put before each name: ``"layer 3"``. Groups whose names have a label are drawn as a heat map.

    Returns:
        ``{"layer 3 · head 0": …}``; mappings of several layers can be united with ``|``.

    Raises:
        ArgumentError: ``n_heads`` is not a number from 1.
    """
    check_integer("n_heads", n_heads)
    return _divided(parameters, n_heads, dim, label, "head")


def units(parameters: Division, n_blocks: int, dim: int = 0, *, label: str = "") -> dict[str, list[Part]]:
    """Make a group per block of hidden units, for :func:`npeff.trace`.

    Args:
        parameters: As for :func:`heads`: a hidden unit owns a row of the layer before it, an element of its bias,
            and a column of the layer after it: ``{"fc1.*": 0, "fc2.weight": 1}``.
        n_blocks: Number of blocks of equal size that the units are cut into; the number of units for single units.
        dim: Dimension for patterns given without one.
        label: Put before each name.

    Returns:
        ``{"units 0": …}``.

    Raises:
        ArgumentError: ``n_blocks`` is not a number from 1.
    """
    check_integer("n_blocks", n_blocks)
    return _divided(parameters, n_blocks, dim, label, "units")


def _divided(parameters: Division, n: int, dim: int, label: str, what: str) -> dict[str, list[Part]]:
    names = [parameters] if isinstance(parameters, str) else parameters
    if not isinstance(names, Mapping | Sequence):
        raise ArgumentError(f"parameters: expected patterns, or a mapping from patterns to dimensions, got {names!r}")
    given: dict[str, Any] = dict(names) if isinstance(names, Mapping) else dict.fromkeys(names, dim)
    parts = {}
    for pattern, at in given.items():
        dim, packed = at if isinstance(at, tuple) and len(at) == 2 else (at, 1)
        if not isinstance(dim, int) or not isinstance(packed, int):
            raise ArgumentError(
                f"parameters: expected a dimension, or (dimension, number of matrices), of {pattern}, got {at!r}"
            )
        parts[pattern] = dim, packed
    prefix = f"{label} · " if label else ""
    return {
        f"{prefix}{what} {i}": [Part(pattern, dim, i, int(n), packed) for pattern, (dim, packed) in parts.items()]
        for i in range(n)
    }


def resolve(groups: Groups | None, parameters: Parameters) -> Resolved:
    """Find the elements of every group: tensors and indices into them.

    A group has one or several of: a shell pattern, ``(pattern, index)`` with any numpy index, a :class:`Part`.

    Raises:
        ArgumentError: A pattern matches nothing, an index does not fit, or there are no groups.
    """
    if groups is None or (isinstance(groups, str) and groups in ("layer", "parameter")):
        found: Resolved = {}
        for parameter in parameters:
            name = parameter.name if groups == "parameter" else layer_of(parameter.name)
            found.setdefault(name, []).append((parameter, ...))
        return found
    if not isinstance(groups, Mapping) or not groups:
        raise ArgumentError(
            f"groups: expected 'layer', 'parameter' or a mapping from names to patterns, got {groups!r}"
        )
    return {str(name): list(_elements(given, parameters)) for name, given in groups.items()}


def _elements(given: Any, parameters: Parameters) -> Iterator[tuple[Parameter, Any]]:
    pair = isinstance(given, tuple) and len(given) == 2 and isinstance(given[0], str) and not isinstance(given[1], str)
    single = pair or isinstance(given, (str, Part))
    if not single and (not isinstance(given, Sequence) or not given):
        raise ArgumentError(f"groups: expected patterns, (pattern, index) or parts, got {given!r}")
    for item in [given] if single else given:
        pattern, index = item if isinstance(item, tuple) and len(item) == 2 else (item, ...)
        if isinstance(item, Part):
            pattern, index = item.pattern, item
        if not isinstance(pattern, str):
            raise ArgumentError(f"groups: expected a pattern of parameter names, got {pattern!r}")
        matched = [p for p in parameters if fnmatchcase(p.name, pattern)]
        if not matched:
            some = ", ".join(parameters.names[:8])
            raise ArgumentError(f"groups: {pattern!r} matches none of the components' parameters: {some} …")
        for p in matched:
            where = index.index(p) if isinstance(index, Part) else index
            try:
                empty = np.zeros(p.shape, bool)[where].size == 0
            except (IndexError, TypeError) as error:
                raise ArgumentError(f"groups: {where!r} is no index of {p.name} {p.shape}: {error}") from error
            if empty and p.numel:
                raise ArgumentError(f"groups: {where!r} takes nothing of {p.name} {p.shape}")
            yield p, where


def marked(parameters: Parameters, elements: Iterable[tuple[Parameter, Any]]) -> Array:
    """Mark elements of the flat vector, ``(m,)`` bool."""
    chosen = np.zeros(parameters.n_parameters, bool)
    for parameter, where in elements:
        chosen[parameter.slice].reshape(parameter.shape)[where] = True
    return chosen


@dataclass(frozen=True, eq=False)
class Trace(Result):
    """The share of a component's effect on its top examples that each part of the network carries.

    Attributes:
        components: The component, or those of the strategy.
        groups: Names of the parts, g of them.
        energy: ``(g,)`` share of the direction's squared norm.
        alone: Per part: mean KL with the perturbation in this part only, over the mean KL of the whole.
        lost: Per part: ``1 −`` (mean KL with the perturbation everywhere else) / (mean KL of the whole).
        magnitude: Norm of the change of the weights (mean over signs and a strategy's directions).
        ids: ``(k,)`` positions of the top examples in the data.
        kl: ``(k,)`` KL of each under the whole perturbation, nats.
        kl_alone: ``(g, k)`` under each part alone.
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
        return f"Trace({self._named()}, {len(self)} parts; most in {self.groups[most]}: {self.alone[most].value:.0%})"

    def table(self) -> str:
        """Write the parts as text: energy, KL alone, KL lost without the part."""
        rows = [(self.name, "energy", "KL alone", "KL lost without it")]
        for name, energy, alone, lost in zip(self.groups, self.energy, self.alone, self.lost, strict=True):
            rows.append((name, f"{energy:.1%}", alone.text(".1%"), lost.text(".1%")))
        alone_sum, lost_sum = (sum(i.value for i in part) for part in (self.alone, self.lost))
        rows.append(("sum", f"{self.energy.sum():.1%}", f"{alone_sum:.1%}", f"{lost_sum:.1%}"))
        return text_table(rows)

    def plot(self, path: str | Path, *, most: int = 60) -> Path:
        """Draw the parts as bars, or as a heat map if every part has a label, as from :func:`npeff.heads`.

        Args:
            path: ``.png``, ``.svg`` or ``.pdf``.
            most: Bars to draw at most, those of the parts that carry most.

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
            grid = _grid(self)
            figure: Any = Figure(layout="constrained")
            if grid is None:
                _bars(figure, self, most)
            else:
                _heat(figure, self, *grid)
            figure.suptitle(f"Where {self.name} acts: mean KL {self.kl.mean():.3g} on {len(self.kl)} top examples")
            with atomic(path) as scratch:
                metadata = {"Date": None} if ending == ".svg" else None
                figure.savefig(scratch, format=ending[1:], dpi=150, metadata=metadata)
        return path


def trace(
    model: nn.Module,
    data: Iterable[Any],
    components: Components,
    j: int | Strategy,
    groups: Groups | None = None,
    **options: Any,
) -> Trace:
    """Measure where in the network a component acts.

    The perturbation of :func:`npeff.perturb`, at the magnitude at which the whole reaches the wanted KL, is
    applied in one part of the network alone, and everywhere except in this part. Shares of KL need not add up: parts
    can help or hinder each other. The model is left bit for bit as it was.

    Args:
        model: As for :func:`npeff.perturb`.
        data: As for :func:`npeff.perturb`.
        components: A decomposition.
        j: A component, or a strategy.
        groups: ``"layer"`` (default): parameters by the module that owns them; ``"parameter"``: every tensor; or
            a mapping from names to patterns, ``(pattern, index)`` or parts: see :func:`npeff.heads` and
            :func:`npeff.units`. Parameters in no group form one more, ``"everything else"``. Groups may overlap.
        **options: As for :func:`npeff.perturb`, without those of controls, curve and texts. ``sign="both"``
            averages the KL of the two signs, each at its own magnitude; ``baseline`` are the examples of a diagonal
            component's mean Fisher, where ``fisher`` is not given.

    Returns:
        The trace: table, picture, numbers.

    Raises:
        ArgumentError: As for :func:`npeff.perturb`; or a group fits no parameter.
        DataError: As for :func:`npeff.perturb`.
        ModelError: As for :func:`npeff.perturb`.
    """
    if untraced := UNTRACED & options.keys():
        raise ArgumentError(f"{min(untraced)}: a trace has no such option; npeff.perturb has it")
    chosen = PerturbOptions.checked(components, options)
    resolved = resolve(groups, components.parameters)
    free = ~marked(components.parameters, chain.from_iterable(resolved.values()))
    merged = components.kind == "diagonal" and chosen.fisher is None
    with experiment(model, data, components, [j], chosen, with_baseline=merged) as (evaluator, (target,)):
        at_top = evaluator.indices(chosen.top_rows(target.coefficient))
        at_base = evaluator.indices(chosen.baseline_rows(len(target.coefficient))) if merged else at_top
        slices = evaluator.examples.subset(at_top)
        found = search_steps(evaluator, ComponentDirections(components), target, chosen, slices, at_base)
        used = found[:1] if components.kind == "diagonal" else found
        order = np.argsort(np.concatenate([one.indices for one in slices]), kind="stable")

        def kl(vector: Array, size: float) -> Array:
            return evaluator.kl(slices, evaluator.placed(vector), size)[order]

        if any(bool(one.direction.vector[free].any()) for one in used):
            resolved = {**resolved, REST: []}
        whole, magnitude = np.zeros(len(at_top)), 0.0
        alone, without = np.zeros((2, len(resolved), len(at_top)))
        energy = np.zeros(len(resolved))
        bar = tqdm(total=len(used) * len(resolved), desc="Trace", disable=not chosen.progress)
        for one in used:  # one direction in memory at a time
            vector, weight = one.direction.vector, one.direction.share / len(one.results)
            sizes = [sign * search.magnitude for sign, search in one.results.items()]
            magnitude += weight * sum(map(abs, sizes))
            whole += weight * sum(kl(vector, size) for size in sizes)
            check_kl(whole, abs(sizes[0]))
            for g, (name, elements) in enumerate(resolved.items()):
                part = np.where(free if name == REST else marked(components.parameters, elements), vector, 0.0)
                energy[g] += one.direction.share * float(np.square(part).sum())
                others = vector - part
                for size in sizes:
                    alone[g] += weight * kl(part, size)
                    without[g] += weight * kl(others, size)
                bar.update()
        bar.close()
        ids, meaning = evaluator.examples.ids[at_top], evaluator.likelihood

    def shares(parts: Array) -> list[Interval]:
        """Mean KL of each part over the mean KL of the whole, with paired bootstrap intervals."""
        levels = chosen.confidence, chosen.n_resamples
        return [
            interval(mean_ratio, part, whole, paired=True, levels=(*levels, chosen.seed + g))
            for g, part in enumerate(parts)
        ]

    return Trace(
        components=target.members,
        groups=tuple(resolved),
        energy=energy,
        alone=tuple(shares(alone)),
        lost=tuple(Interval(1 - i.value, 1 - i.high, 1 - i.low) for i in shares(without)),
        magnitude=magnitude,
        ids=ids,
        kl=whole,
        kl_alone=alone,
        kl_without=without,
        details={
            "kind": components.kind,
            "likelihood": meaning,
            "sign": chosen.sign,
            "target_kl": chosen.target_kl if chosen.magnitude is None else None,
            "confidence": chosen.confidence,
            "components_digest": components.digest,
        },
    )


def _bars(figure: Any, trace: Trace, most: int) -> None:
    carried = np.array([max(abs(a.value), abs(b.value)) for a, b in zip(trace.alone, trace.lost, strict=True)])
    shown = np.sort(np.argsort(-np.nan_to_num(carried), kind="stable")[:most])
    left_out = len(trace) - len(shown)
    figure.set_size_inches(7.5, 1.6 + 0.36 * len(shown))
    axes = figure.subplots()
    y = np.arange(len(shown))
    for offset, parts, (label, colour) in ((-0.2, trace.alone, ALONE), (0.2, trace.lost, LOST)):
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
    """Row and column names, if every part but the rest is ``row · column``."""
    pairs = [name.split(SEPARATOR) for name in trace.groups if SEPARATOR in name]
    if not pairs or any(len(pair) != 2 for pair in pairs):
        return None
    rows, columns = (list(dict.fromkeys(pair[i] for pair in pairs)) for i in (0, 1))
    return (rows, columns) if len(pairs) == len(trace) or len(rows) > 1 else None


def _heat(figure: Any, trace: Trace, rows: list[str], columns: list[str]) -> None:
    figure.set_size_inches(3.0 + 2 * (1 + 0.3 * len(columns)), 2.2 + 0.32 * len(rows))
    panels = figure.subplots(1, 2)
    for axes, parts, (title, _) in ((panels[0], trace.alone, ALONE), (panels[1], trace.lost, LOST)):
        values = np.full((len(rows), len(columns)), np.nan)
        other = []
        for name, share in zip(trace.groups, parts, strict=True):
            if SEPARATOR in name:
                row, column = name.split(SEPARATOR)
                values[rows.index(row), columns.index(column)] = share.value
            else:
                other.append(f"{name}: {share.value:.0%}")
        limit = float(np.nanmax(np.abs(values))) or 1.0
        image = axes.imshow(values, cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto")
        axes.set_xticks(range(len(columns)), columns, rotation=90)
        axes.set_yticks(range(len(rows)), rows if axes is panels[0] else [""] * len(rows))
        axes.set_title("\n".join([title, *other[:4]]), fontsize=9)
        figure.colorbar(image, ax=axes, shrink=0.8, label="share of the whole KL")
