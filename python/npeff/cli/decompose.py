"""``npeff decompose``: stage 2."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from npeff.cli.common import EXISTING, WRITABLE, command, misused, note, quiet, seed, several, wants
from npeff.cli.processes import decompose_together

if TYPE_CHECKING:
    from npeff.trust import Selection


def _orthogonality(ctx: click.Context, parameter: click.Parameter, value: str | None) -> float | str | None:
    if value is None or value == "hard":
        return value
    try:
        return float(value)
    except ValueError:
        raise click.BadParameter(f"expected a number or 'hard', got {value!r}") from None


def _numbers(ctx: click.Context, parameter: click.Parameter, value: str) -> list[int]:
    try:
        numbers = [int(part) for part in value.split(",")]
    except ValueError:
        numbers = [0]
    if min(numbers) < 1:
        raise click.BadParameter(f"expected a number of components, or several as in 16,32,64, got {value!r}")
    return numbers


@command(
    examples="""
        npeff decompose fishers.h5 --components 64 --out components.h5
        npeff decompose fishers.h5 --components 16,32,64,128 --select --out components.h5
        npeff decompose fishers.h5 --components 64 --block-weights balanced --n-init 8 --out components.h5
        npeff decompose fishers.h5 --components 48 --wrong-only --out heuristics.h5
    """,
    shared=True,
)
@click.argument("path", metavar="FISHERS", type=EXISTING)
@click.option(
    "--components", "numbers", callback=_numbers, required=True, metavar="R[,R…]", help="How many; several: --select."
)
@click.option(
    "--select",
    is_flag=True,
    help="Try several numbers; take the one that the held-out loss recommends. The report shows the losses.",
)
@click.option("--out", type=WRITABLE, required=True, help="File to write.")
@click.option(
    "--algorithm",
    type=click.Choice(["npeff", "published"]),
    default="npeff",
    show_default=True,
    help="Solver.",
)
@click.option(
    "--space",
    type=click.Choice(["auto", "gram", "rows", "streamed"]),
    default="auto",
    show_default=True,
    help="Work on inner products of rows, on the rows in memory, or on rows streamed from FISHERS.",
)
@click.option("--n-init", type=click.IntRange(min=1), help="Random starts; the best goes on.")
@click.option("--n-replacements", type=click.IntRange(min=0), help="Attempts to replace poor components.")
@click.option("--max-iterations", type=click.IntRange(min=1), help="Limit of each descent.")
@click.option("--tolerance", type=click.FloatRange(min=0), help="Relative decrease of the loss at which it ends.")
@click.option(
    "--block-weights",
    type=click.Choice(["energy", "balanced"]),
    help="Parameter blocks as they are, or with equal shares.",
)
@click.option(
    "--orthogonality",
    callback=_orthogonality,
    metavar="WEIGHT|hard",
    help="Push components apart, or make them orthonormal.",
)
@click.option(
    "--normalize",
    type=click.Choice(["stored", "dense", "none"]),
    help="Norm scaled to 1: of the rows as stored, of the Fisher before compression, or none.",
)
@click.option("--learning-rate", type=click.FloatRange(min=0, min_open=True), help="Of --algorithm published.")
@click.option("--steps", type=click.IntRange(min=1), help="Joint steps of --algorithm published.")
@click.option("--wrong-only", is_flag=True, help="Only examples that the model predicts wrongly.")
@click.option("--memory", metavar="SIZE", help="Ceiling such as 4GB: what does not fit stays on disk.")
@click.option("--checkpoint", type=WRITABLE, help="File that keeps the state; the same command then goes on from it.")
@click.option("--device", help="cpu, cuda …  [default: cpu]")
@seed
@quiet
def decompose(
    path: Path,
    numbers: list[int],
    select: bool,
    out: Path,
    wrong_only: bool,
    learning_rate: float | None,
    steps: int | None,
    quiet: bool,
    **options: Any,
) -> None:
    """Factorise FISHERS into components.

    Started by torchrun (torchrun --nproc-per-node=4 -m npeff decompose …), each process holds a block of the
    examples; killed, the same command resumes.
    """
    given = {name: value for name, value in options.items() if value is not None}
    rates: dict[str, Any] = {"learning_rate": learning_rate, "joint": steps}
    published = {name: value for name, value in rates.items() if value is not None}
    if published and options["algorithm"] != "published":
        misused("--learning-rate and --steps belong to --algorithm published")
    if len(numbers) > 1 and not select:
        misused(f"--components {','.join(map(str, numbers))}: several numbers need --select")
    if select and options["algorithm"] == "published":
        misused("--select works with --algorithm npeff")
    import npeff
    from npeff.components.parameter_vectors import not_recovered
    from npeff.storage.recognition import check_components_target

    check_components_target(out)  # before the search: a slip in --out must not cost it
    if published:
        given["published"] = npeff.PublishedOptions(**published)
    fishers = wants(npeff.load(path), "Fishers", path)
    if wrong_only:
        fishers = fishers.filter(wrong=True)
    if several():
        given.setdefault("checkpoint", out.with_name(f"{out.name}.search"))
        components = decompose_together(fishers, numbers[0], select, progress=not quiet, **given)
        if components is None:
            return
    else:
        selection = _selected(fishers, numbers, given, quiet) if select else None
        n_components = numbers[0] if selection is None else selection.chosen
        components = npeff.decompose(fishers, n_components, progress=not quiet, **given)
        if selection is not None:  # for the report
            components = replace(components, provenance={**components.provenance, "selection": selection.to_json()})
    components.save(out)
    if given.get("checkpoint"):  # only now that the components are safe
        Path(given["checkpoint"]).unlink(missing_ok=True)
    click.echo(
        f"{out}: {components.n_components} components of {len(fishers):,} examples, relative loss {components.loss:.4f}"
    )
    if not_recovered(components):
        note(
            f"vectors in parameter space, for perturb, trace and export: npeff recover {out} MODEL DATA --out RECOVERED"
        )


def _selected(fishers: Any, numbers: list[int], options: dict[str, Any], quiet: bool) -> Selection:
    """Try the numbers of components; the table of their held-out losses goes to the terminal."""
    import npeff

    plain = {name: value for name, value in options.items() if name not in ("checkpoint", "algorithm")}
    selection = npeff.trust.select(fishers, numbers, progress=not quiet, **plain)
    click.echo("components  loss  held-out loss (mean ± standard deviation over folds)")
    for column, r in enumerate(selection.n_components):
        folds = selection.held_out[:, column]
        mark = "  ← chosen" if r == selection.chosen else ""
        click.echo(f"{r:10d}  {selection.train[column]:.4f}  {folds.mean():.4f} ± {folds.std(ddof=1):.4f}{mark}")
    return selection
