"""``npeff perturb`` and ``npeff trace``: what a component does in the model, and where."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from npeff.cli.command import check_members, check_out, command, listed, loaded, misused, note
from npeff.cli.options import EXISTING, WRITABLE, Arguments
from npeff.cli.texts import data_of_components, is_text

if TYPE_CHECKING:
    from npeff.components.components import Components
    from npeff.perturbation import Effect

PREDICTED, WORDS = 8, 3
"""Examples whose predictions are shown, and words of each."""
TEXTS = ("unrelated", "prompts", "n_tokens")
F = TypeVar("F", bound=Callable[..., Any])


def of_components(function: F) -> F:
    """Add MODEL, DATA, COMPONENTS, and which component or strategy."""
    for decorator in (
        click.option("--strategy", metavar="J,K,…", help="A group of components instead, as one strategy."),
        click.option("--component", "-j", type=click.IntRange(min=0), metavar="J", help="Which component."),
        click.argument("path", metavar="COMPONENTS", type=EXISTING),
        click.argument("data", metavar="DATA"),
        click.argument("model", metavar="MODEL"),
    ):
        function = decorator(function)
    return function


def chosen(components: Components, component: int | None, strategy: str | None, path: Path) -> Any:
    """The component or strategy that the options name.

    Raises:
        UsageError: They name none, or both, or one that is not there.
    """
    if component is not None and strategy is None:
        check_members([component], components, path)
        return component
    if strategy is None or component is not None:
        misused("give either --component J or --strategy J,K,…")
    from npeff.components.strategies import Strategy

    members, r = listed(strategy), components.n_components
    if members is None or max(members) >= r:
        misused(f"--strategy: expected components from 0 to {r - 1}, separated by commas, got {strategy!r}")
    parts = tuple(sorted(set(members)))
    return Strategy(parts, components.coefficients[:, list(parts)].sum(1))


@command(
    """
        npeff perturb train.py:model train.py:data components.h5 --component 7
        npeff perturb train.py:model train.py:data components.h5 -j 7 --reject span --out effect.json
        npeff perturb train.py:model train.py:data components.h5 --strategy 2,7,11
        npeff perturb train.py:model train.py:data components.h5 --all --out effects.json
    """,
    Arguments("npeff:perturb", skip=("fisher",)),
)
@of_components
@click.option(
    "--unrelated",
    metavar="DATA",
    help="Other data, as DATA, or a file of texts: its perplexity is measured at every step.",
)
@click.option("--all", "every", is_flag=True, help="Every component: a table of KL ratios.")
@click.option("--out", type=WRITABLE, help="JSON file for everything found; npeff report --extras shows it.")
def perturb(
    model: str,
    data: str,
    path: Path,
    unrelated: str | None,
    every: bool,
    component: int | None,
    strategy: str | None,
    out: Path | None,
    **options: Any,
) -> None:
    """Move MODEL's weights along a component, and say what changes on its top examples and on others.

    DATA is what the Fishers were computed from, in the same order. The table has a confidence interval beside
    every figure, and the same figures for random directions. A component that is about a behaviour has a KL ratio
    well above theirs.
    """
    from npeff.models.targets import load_data, load_model
    from npeff.perturbation import perturb_all
    from npeff.perturbation.effect import write_json

    check_out(out)
    if every and (component is not None or strategy is not None):
        misused("--all takes every component: leave --component and --strategy out")
    components = loaded(path, "Components")
    which = None if every else [chosen(components, component, strategy, path)]
    if every and not out:
        options.setdefault("curve", 0)  # the table does not show it
    if unrelated is not None:
        options["unrelated"] = unrelated if is_text(unrelated) else load_data(unrelated)
    examples = data_of_components(data, components)
    effects = perturb_all(load_model(model), examples, components, which, **options)
    click.echo(_ratios(effects) if every else effects[0].table())
    if not every and hasattr(examples, "output_names"):
        click.echo(_predicted(effects[0], examples))
    missed = [effect.name for effect in effects if not effect.reached]
    if missed:
        note(f"the wanted KL was not reached for {', '.join(missed[:5])}{' …' if len(missed) > 5 else ''}")
    if any(abs(effect.details["rounding"] - 1) > 0.1 for effect in effects):
        note("the weights' dtype rounds much of the change away; use a float32 copy of the model")
    if out is not None:
        write_json([e.to_json() for e in effects] if every else effects[0].to_json(), out)
        click.echo(f"{out}: {len(effects)} effect{'s' if len(effects) != 1 else ''}")


def _predicted(effect: Effect, data: Any) -> str:
    """The words that are most probable on some top examples, before and after, one line per example."""
    lines = ["most probable before → after:"]
    for one in effect.predictions[:PREDICTED]:
        told = zip(data.output_names(one.classes[:WORDS].tolist()), one.before, one.after, strict=False)
        words = ", ".join(f"{word!r} {before:.2f} → {after:.2f}" for word, before, after in told)
        lines.append(f"  example {one.id}: {words}")
    return "\n".join(lines)


def _ratios(effects: list[Effect]) -> str:
    """One line per component: KL ratio with interval, the controls' ratios, rank correlation."""
    from npeff.perturbation.effect import CONTROLS, text_table

    rows = [("component", "KL ratio", *CONTROLS.values(), "disjoint", "rank corr. of KL/‖F‖", "magnitude")]
    for e in sorted(effects, key=lambda e: -e.ratio):
        beside = [f"{e.controls[n].figures['ratio'].value:.3g}" if n in e.controls else "–" for n in CONTROLS]
        rows.append(
            (
                ", ".join(map(str, e.components)),
                e.figures["ratio"].text(),
                *beside,
                f"{e.figures['disjoint_ratio'].value:.3g}",
                f"{e.figures['normalised_rank_correlation'].value:.2f}",
                f"{e.magnitude:.3g}",
            )
        )
    return text_table(rows)


@command(
    """
        npeff trace train.py:model train.py:data components.h5 --component 7 --out where.png
        npeff trace train.py:model train.py:data components.h5 -j 7 --groups parameter --out where.json
        npeff trace bert.py:model bert.py:data components.h5 -j 7 --groups bert.py:heads --out heads.svg
    """,
    Arguments("npeff:perturb", skip=("fisher", "floor", "n_random", "curve", *TEXTS)),
)
@of_components
@click.option(
    "--groups",
    default="layer",
    show_default=True,
    metavar="layer|parameter|TARGET",
    help="What to take one at a time; module:callable for a mapping, as made by npeff.heads and npeff.units.",
)
@click.option(
    "--out",
    type=WRITABLE,
    help="Picture, ending in .png, .svg or .pdf; or .json for the numbers, which npeff report --extras shows.",
)
def trace(
    model: str,
    data: str,
    path: Path,
    component: int | None,
    strategy: str | None,
    groups: str,
    out: Path | None,
    **options: Any,
) -> None:
    """Say where in MODEL a component acts: how much of its KL each layer, tensor or head carries.

    The perturbation is applied in one part alone, and everywhere but there; both columns are shares of the KL of
    all of it on the component's top examples.
    """
    import npeff
    from npeff.models.targets import load_made, load_model

    check_out(out, ".png", ".svg", ".pdf", ".json")
    components = loaded(path, "Components")
    j = chosen(components, component, strategy, path)
    parts: Any = groups if groups in ("layer", "parameter") else load_made(groups, "--groups")
    found = npeff.trace(load_model(model), data_of_components(data, components), components, j, parts, **options)
    click.echo(found.table())
    if out is not None:
        if out.suffix.lower() == ".json":
            found.save(out)
        else:
            found.plot(out)
        click.echo(f"{out}: {len(found)} parts")
