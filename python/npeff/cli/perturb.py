"""``npeff perturb``: stage 4a."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from npeff.cli.common import EXISTING, WRITABLE, command, listed, misused, note, quiet, seed, wants

if TYPE_CHECKING:
    from npeff.components.components import Components
    from npeff.perturbation import Effect

F = TypeVar("F", bound=Callable[..., Any])


def moving(function: F) -> F:
    """The options that ``npeff perturb`` and ``npeff trace`` share."""
    options = (
        click.option("--component", "-j", type=click.IntRange(min=0), metavar="J", help="Which component."),
        click.option("--strategy", metavar="J,K,…", help="A group of components instead, as one strategy."),
        click.option(
            "--target-kl",
            type=click.FloatRange(min=0, min_open=True),
            default=0.1,
            show_default=True,
            help="Mean KL on the top examples, in nats, to search the magnitude for.",
        ),
        click.option(
            "--magnitude",
            type=click.FloatRange(min=0, min_open=True),
            help="Norm of the change of the weights, instead of searching for it.",
        ),
        click.option(
            "--sign",
            type=click.Choice(["both", "+", "-"]),
            default="both",
            show_default=True,
            help="Which way to move.",
        ),
        click.option(
            "--combine",
            type=click.Choice(["each", "principal"]),
            default="each",
            show_default=True,
            help="A strategy's directions one by one, or their principal direction.",
        ),
        click.option(
            "--reject",
            type=click.Choice(["span", "sequential"]),
            help="Take out the other components: their span, or one after the other as published.",
        ),
        click.option("--max-sim", type=click.FloatRange(0, 1), help="Reject components with |cos| up to this."),
        click.option(
            "--top", type=click.IntRange(min=1), default=32, show_default=True, metavar="N", help="Top examples."
        ),
        click.option(
            "--baseline", default="4096", show_default=True, metavar="N|all", help="Examples to compare with, drawn."
        ),
        click.option(
            "--lam",
            type=click.FloatRange(0, 1, min_open=True, max_open=True),
            multiple=True,
            help="λ of a diagonal component's interpolation; repeatable.",
        ),
        click.option(
            "--confidence",
            type=click.FloatRange(0, 1, min_open=True, max_open=True),
            default=0.95,
            show_default=True,
            help="Level of the intervals.",
        ),
        click.option(
            "--forward", metavar="TARGET", help="module:callable for (model, batch) -> logits, as for npeff fishers."
        ),
        click.option("--device", help="cpu, cuda, cuda:1 …  [default: where the model is]"),
    )
    for option in reversed(options):
        function = option(function)
    return function


def asked(
    sign: str, baseline: str, lam: tuple[float, ...], forward: str | None, quiet: bool, options: dict[str, Any]
) -> dict[str, Any]:
    """The keywords of :func:`npeff.perturb` for the shared options."""
    from npeff.models.targets import load_object

    if baseline != "all" and not (baseline.isascii() and baseline.isdigit() and int(baseline) > 0):
        misused(f"--baseline: expected a number of examples or 'all', got {baseline!r}")
    return {
        **options,
        "sign": {"both": "both", "+": 1, "-": -1}[sign],
        "baseline": "all" if baseline == "all" else int(baseline),
        "lam": lam or None,
        "forward": load_object(forward, "--forward") if forward else None,
        "progress": not quiet,
    }


def chosen(components: Components, component: int | None, strategy: str | None, path: Path) -> Any:
    """The component or strategy that the options name; ends with exit status 2 where there is none."""
    if (component is None) == (strategy is None):
        misused("give either --component J or --strategy J,K,…")
    r = components.n_components
    if component is not None:
        if component >= r:
            misused(f"--component: {path} has components 0 to {r - 1}, got {component}")
        return component
    assert strategy is not None
    from npeff.components.strategies import Strategy

    members = listed(strategy)
    if members is None or max(members) >= r:
        misused(f"--strategy: expected components from 0 to {r - 1}, separated by commas, got {strategy!r}")
    parts = tuple(sorted(set(members)))
    return Strategy(parts, components.coefficients[:, list(parts)].sum(1))


@command(
    examples="""
        npeff perturb train.py:model train.py:data components.h5 --component 7
        npeff perturb train.py:model train.py:data components.h5 -j 7 --reject span --out effect.json
        npeff perturb train.py:model train.py:data components.h5 --strategy 2,7,11
        npeff perturb train.py:model train.py:data components.h5 --all --out effects.json
    """
)
@click.argument("model", metavar="MODEL")
@click.argument("data", metavar="DATA")
@click.argument("path", metavar="COMPONENTS", type=EXISTING)
@click.option("--all", "every", is_flag=True, help="Every component: a table of KL ratios.")
@moving
@click.option(
    "--random",
    "n_random",
    type=click.IntRange(min=0),
    default=8,
    show_default=True,
    metavar="N",
    help="Random directions to compare with, per control.",
)
@click.option("--out", type=WRITABLE, help="JSON file for everything found; npeff report --extras shows it.")
@seed
@quiet
def perturb(
    model: str,
    data: str,
    path: Path,
    every: bool,
    component: int | None,
    strategy: str | None,
    sign: str,
    baseline: str,
    lam: tuple[float, ...],
    forward: str | None,
    out: Path | None,
    quiet: bool,
    **options: Any,
) -> None:
    """Move MODEL's weights along a component, and say what changes on its top examples and on others.

    DATA is what the Fishers were computed from, in the same order. The table has a confidence interval beside
    every figure, and the same figures for random directions. A component that is about a behaviour has a KL ratio
    well above theirs.
    """
    import npeff
    from npeff.models.targets import load_data, load_model
    from npeff.perturbation import perturb_all
    from npeff.perturbation.effect import write_json
    from npeff.storage.files import check_target
    from npeff.storage.recognition import refuse_npeff_file

    if out is not None:
        check_target(out)
        refuse_npeff_file(out)  # before the work: a slip in --out must not cost it
    if every and (component is not None or strategy is not None):
        misused("--all takes every component: leave --component and --strategy out")
    components = wants(npeff.load(path), "Components", path)
    which = None if every else [chosen(components, component, strategy, path)]
    keywords = asked(sign, baseline, lam, forward, quiet, options)
    if every:
        keywords["curve"] = 8 if out else 0
    effects = perturb_all(load_model(model), load_data(data), components, which, **keywords)
    click.echo(_ratios(effects) if every else effects[0].table())
    missed = [effect.name for effect in effects if not effect.reached]
    if missed:
        note(f"the wanted KL was not reached for {', '.join(missed[:5])}{' …' if len(missed) > 5 else ''}")
    if any(abs(effect.details["rounding"] - 1) > 0.1 for effect in effects):
        note("the weights' dtype rounds much of the change away; use a float32 copy of the model")
    if out is not None:
        write_json([e.to_json() for e in effects] if every else effects[0].to_json(), out)
        click.echo(f"{out}: {len(effects)} effect{'s' if len(effects) != 1 else ''}")


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
