"""Explain components: ``npeff trust``, ``perturb``, ``trace`` and ``report``.

How far components may be believed, what one does in the model, and where; and the page of all components.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import click

from npeff.cli.command import (
    check_members,
    check_out,
    command,
    data_of_components,
    is_text,
    listed,
    loaded,
    misused,
    next_step,
    note,
    size,
    tell_extras,
)
from npeff.cli.options import Arguments, Existing, Help, Whole

if TYPE_CHECKING:
    from npeff.components.components import Components
    from npeff.perturbation import Effect

PREDICTED, WORDS = 8, 3
"""Examples whose predictions are shown, and words of each."""
TEXTS = ("unrelated", "prompts", "n_tokens")
OneComponent = Annotated[Whole | None, "-j", "J", Help("Which component.")]
Group = Annotated[str | None, "J,K,…", Help("A group of components instead, as one strategy.")]


def chosen(components: Components, component: int | None, strategy: str | None, path: Path) -> Any:
    """Return the component or strategy that the options name.

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
        npeff trust fishers.h5 components.h5
        npeff trust fishers.h5 components.h5 --repeats 8 --shuffles 5 --out trust.json
    """,
    Arguments("npeff.trust:stability"),
)
def trust(
    fishers_path: Annotated[Existing, "FISHERS"],
    components_path: Annotated[Existing, "COMPONENTS"],
    *,
    shuffles: Whole = 2,
    out: Path | None = None,
    **options: Any,
) -> None:
    """How stable COMPONENTS are, what they explain of FISHERS, and what chance would give.

    Options:
        shuffles: Decompositions of shuffled Fishers.
        out: JSON file to write, for npeff report --extras.
    """
    import numpy as np

    import npeff
    from npeff.perturbation.effect import plain, write_json

    check_out(out)
    fishers, components = loaded(fishers_path, "Fishers"), loaded(components_path, "Components")
    if shuffles and fishers.rows.products_only:
        note("no null model: inner products alone (--gram-only) have no entries that could be shuffled")
        shuffles = 0
    stable = npeff.trust.stability(fishers, components, **options)
    shares = npeff.trust.explained(components, fishers)
    found: dict[str, Any] = {"explained": shares}
    found["stability"] = stable.to_json() | {"components_digest": components.digest}
    energy = np.square(components.coefficients.astype(np.float64)).mean(0)
    if shuffles:
        shared = {name: value for name, value in options.items() if name in ("seed", "progress")}
        found["null"] = npeff.trust.null_model(fishers, components, repeats=shuffles, **shared).to_json()
    known = shares[~np.isnan(shares)]
    click.echo(f"explained of an example's Fisher: median {np.median(known):.0%}, lowest {known.min(initial=1):.0%}")
    click.echo("component  energy  comes back (|cos|)" + ("  more than chance" if shuffles else ""))
    for j in range(components.n_components):
        line = f"{j:9d}  {energy[j]:6.4f}  {stable.components[j]:18.3f}"
        click.echo(line + (f"  {'yes' if found['null']['above'][j] else 'no':>16}" if shuffles else ""))
    for n, index in stable.strategies.items():
        mark = "  as well as any" if n in stable.stable_numbers else ""
        click.echo(f"{n:2d} strategies: parts agree on {index:.2f} (adjusted Rand index){mark}")
    if shuffles:
        loss = "not on record" if np.isnan(components.loss) else f"{components.loss:.4f}"
        click.echo(f"loss {loss}; of shuffled Fishers {np.mean(found['null']['losses']):.4f}")
    if out is not None:
        write_json(plain(found), out)
        tell_extras(out)


@command(
    """
        npeff perturb train.py:model train.py:data components.h5 --component 7
        npeff perturb train.py:model train.py:data components.h5 -j 7 --reject span --out effect.json
        npeff perturb train.py:model train.py:data components.h5 --strategy 2,7,11
        npeff perturb train.py:model train.py:data components.h5 --all --out effects.json
    """,
    Arguments("npeff:perturb", skip=("fisher",)),
)
def perturb(
    model: str,
    data: str,
    path: Annotated[Existing, "COMPONENTS"],
    *,
    component: OneComponent = None,
    strategy: Group = None,
    unrelated: Annotated[str | None, "DATA"] = None,
    every: Annotated[bool, "--all"] = False,
    out: Path | None = None,
    **options: Any,
) -> None:
    """Move MODEL's weights along a component, and say what changes on its top examples and on a sample of all.

    DATA is what the Fishers were computed from, in the same order. The table has a confidence interval beside
    every figure, and the same figures for random directions. A component that is about a behaviour has a KL ratio
    well above theirs.

    Options:
        unrelated: Other data, as DATA, or a file of texts: its perplexity is measured at every step.
        every: Every component: a table of KL ratios.
        out: JSON file for everything found; npeff report --extras shows it.
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
        tell_extras(out, f"{len(effects)} effect{'s' if len(effects) != 1 else ''}, ")


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
def trace(
    model: str,
    data: str,
    path: Annotated[Existing, "COMPONENTS"],
    *,
    component: OneComponent = None,
    strategy: Group = None,
    groups: Annotated[str, "layer|parameter|TARGET"] = "layer",
    out: Path | None = None,
    **options: Any,
) -> None:
    """Say where in MODEL a component acts: how much of its KL each layer, tensor or head carries.

    The perturbation is applied in one part alone, and everywhere but there; both columns are shares of the KL of
    all of it on the component's top examples.

    Options:
        groups: What to take one at a time; module:callable for a mapping, as made by npeff.heads and npeff.units.
        out: Picture, ending in .png, .svg or .pdf; or .json for the numbers, which npeff report --extras shows.
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
            tell_extras(out, f"{len(found)} parts, ")
        else:
            found.plot(out)
            click.echo(f"{out}: {len(found)} parts")


@command(
    """
        npeff report components.h5 --data train.py:data --out report/
        npeff report components.h5 --data train.py:data --class-names cat,dog,bird --out birds.html
        npeff report components.h5 --data train.py:data --extras trust.json --extras effects.json
        npeff report components.h5 --data train.py:data --extras pixels.json --extras behind.json --collages --latex
        npeff report components.h5 --out numbers.html
    """,
    Arguments("npeff:report", skip=("effects", "traces", "trust", "attributions", "influences")),
)
def report(
    path: Annotated[Existing, "COMPONENTS"],
    *,
    data: Annotated[str | None, "DATA"] = None,
    out: Path = Path("report"),
    class_names: Annotated[str | None, "A,B,…"] = None,
    tokenizer: Annotated[str | None, "TARGET"] = None,
    extras: Annotated[tuple[Existing, ...], "FILE"] = (),
    influence_data: Annotated[str | None, "DATA"] = None,
    collages: bool = False,
    latex: bool = False,
    **options: Any,
) -> None:
    """Write pages that show what each of COMPONENTS responds to.

    A folder loads what is looked at, from disk, without a server or a network. A file is complete up to its size
    limit, and says what is left out. Collages and the document go beside the page: into the folder, or for
    birds.html to birds-collages/ and birds.tex.

    Options:
        data: module:callable for the data of the Fishers, to show examples; without it, numbers only.
        out: A folder (for index.html and its parts), or a file ending in .html.
        class_names: Names of the classes: separated by commas, or a file with one per line.
        tokenizer: module:callable that returns a tokenizer, to print token ids as text.
        extras: JSON that trust, perturb, trace, or the companions with --component, wrote with --out; repeatable.
        influence_data: module:callable for the training data that the influences are about.
        collages: Also a PNG of each component's top examples.
        latex: Also a LaTeX document of the top examples.
    """
    import npeff
    from npeff.models.targets import load_data, load_made
    from npeff.reports import load_extras

    components = loaded(path, "Components")
    names = _names(class_names)
    tokens = None if tokenizer is None else load_made(tokenizer, "--tokenizer")

    def examples() -> Any:  # anew each time: data may be readable only once
        return None if data is None else data_of_components(data, components)

    page = npeff.report(
        components,
        examples(),
        out,
        class_names=names,
        tokenizer=tokens,
        influence_data=None if influence_data is None else load_data(influence_data),
        **load_extras(*extras, components=components),
        **options,
    )
    click.echo(f"{page}: {components.n_components} components, {size(_bytes_of(page, out))}")
    if data is None:
        note("without --data the pages show numbers alone; give DATA as for npeff fishers to see the examples")
    if not extras:
        about = ", and --extras trust.json here: how far the components may be believed"
        next_step("trust", "FISHERS", path, "--out", "trust.json", options=options, about=about)
    stem = page.parent / "components" if page.name == "index.html" and page != out else page.with_suffix("")
    common: dict[str, Any] = {"class_names": names, "tokenizer": tokens}
    common |= {name: value for name, value in options.items() if name == "k"}
    if collages:
        from npeff.reports.export import collages as write_collages

        folder = stem.with_name(f"{stem.name}-collages")
        paths = {j: folder / f"component-{j}.png" for j in range(components.n_components)}
        write_collages(components, examples(), paths, **common)
        click.echo(f"{folder}: {components.n_components} collages")
    if latex:
        document = stem.with_suffix(".tex")
        common["title"] = options.get("title")
        npeff.reports.latex(components, examples(), document, **common)
        click.echo(f"{document}: compile it with pdflatex, xelatex or lualatex")


def _bytes_of(page: Path, out: Path) -> int:
    """What the page and its parts take."""
    if page == out:
        return page.stat().st_size
    total = page.stat().st_size
    for path in page.parent.glob("data-*/*"):
        with suppress(OSError):  # another process may replace the report meanwhile
            total += path.stat().st_size
    return total


def _names(given: str | None) -> list[str] | None:
    if given is None:
        return None
    lines = given.split(",")
    if os.path.isfile(given):  # unlike Path.is_file, silent about a list too long to be a name
        try:
            lines = Path(given).read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError:
            misused(f"--class-names: {given} is not a text file in UTF-8; expected one name per line")
    return [name.strip() for name in lines if name.strip()]
