"""``npeff report``: stage 4b."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import click

from npeff.cli.command import command, loaded, misused, note, size
from npeff.cli.options import EXISTING, WRITABLE, Arguments
from npeff.cli.texts import data_of_components


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
@click.argument("path", metavar="COMPONENTS", type=EXISTING)
@click.option(
    "--data",
    metavar="DATA",
    help="module:callable for the data of the Fishers, to show examples; without it, numbers only.",
)
@click.option(
    "--out",
    type=WRITABLE,
    default="report",
    show_default=True,
    help="A folder (for index.html and its parts), or a file ending in .html.",
)
@click.option(
    "--class-names",
    metavar="A,B,…",
    help="Names of the classes: separated by commas, or a file with one per line.",
)
@click.option(
    "--tokenizer",
    metavar="TARGET",
    help="module:callable that returns a tokenizer, to print token ids as text.",
)
@click.option(
    "--strategies", type=click.IntRange(min=1), metavar="N", help="How many strategies to colour; chosen by default."
)
@click.option("--heads", type=click.IntRange(min=1), metavar="N", help="Attention heads per layer, to show each.")
@click.option(
    "--extras",
    type=EXISTING,
    multiple=True,
    metavar="FILE",
    help="JSON that trust, perturb, trace, or the companions with --component, wrote with --out; repeatable.",
)
@click.option(
    "--influence-data", metavar="DATA", help="module:callable for the training data that the influences are about."
)
@click.option("--size-limit", type=click.IntRange(min=1), metavar="MB", help="What the report may take on the disk.")
@click.option("--collages", is_flag=True, help="Also a PNG of each component's top examples.")
@click.option("--latex", is_flag=True, help="Also a LaTeX document of the top examples.")
def report(
    path: Path,
    data: str | None,
    out: Path,
    class_names: str | None,
    tokenizer: str | None,
    strategies: int | None,
    heads: int | None,
    extras: tuple[Path, ...],
    influence_data: str | None,
    size_limit: int | None,
    collages: bool,
    latex: bool,
    **options: Any,
) -> None:
    """Write pages that show what each of COMPONENTS responds to.

    A folder loads what is looked at, from disk, without a server or a network. A file is complete up to its size
    limit, and says what is left out. Collages and the document go beside the page: into the folder, or for
    birds.html to birds-collages/ and birds.tex.
    """
    import npeff
    from npeff.models.targets import load_data, load_made
    from npeff.reports import load_extras

    components = loaded(path, "Components")
    if strategies is not None and strategies > components.n_components:
        misused(f"--strategies: expected at most {components.n_components}, one per component, got {strategies}")
    names = _names(class_names)
    tokens = load_made(tokenizer, "--tokenizer") if tokenizer else None
    page = npeff.report(
        components,
        data_of_components(data, components) if data else None,
        out,
        class_names=names,
        tokenizer=tokens,
        strategies=strategies,
        heads=heads,
        influence_data=load_data(influence_data) if influence_data else None,
        size_limit=size_limit * 1_000_000 if size_limit else None,
        **load_extras(*extras, components=components),
        **options,
    )
    click.echo(f"{page}: {components.n_components} components, {size(_bytes_of(page, out))}")
    stem = page.parent / "components" if page.name == "index.html" and page != out else page.with_suffix("")
    common: dict[str, Any] = {"class_names": names, "tokenizer": tokens}
    common |= {name: value for name, value in options.items() if name == "k"}
    if collages:
        from npeff.reports.export import collages as write_collages

        folder = stem.with_name(f"{stem.name}-collages")
        paths = {j: folder / f"component-{j}.png" for j in range(components.n_components)}
        write_collages(components, data_of_components(data, components) if data else None, paths, **common)
        click.echo(f"{folder}: {components.n_components} collages")
        if data is None:
            note("without --data, collages hold captions only")
    if latex:
        document = stem.with_suffix(".tex")
        common["title"] = options.get("title")
        npeff.reports.latex(components, data_of_components(data, components) if data else None, document, **common)
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
