"""``npeff report``: stage 4b."""

from __future__ import annotations

import os
from pathlib import Path

import click

from npeff.cli.common import EXISTING, WRITABLE, command, misused, size, wants


@command(
    examples="""
        npeff report components.h5 --data train.py:data --out report/
        npeff report components.h5 --data train.py:data --class-names cat,dog,bird --out birds.html
        npeff report components.h5 --out numbers.html
    """
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
    help="A folder (for index.html), or a file ending in .html.",
)
@click.option(
    "--class-names",
    metavar="A,B,…",
    help="Names of the classes: separated by commas, or a file with one per line.",
)
@click.option(
    "--examples",
    "k",
    type=click.IntRange(min=1),
    default=16,
    show_default=True,
    help="Top examples per component.",
)
@click.option("--title", help="Heading of the page.")
@click.option(
    "--tokenizer",
    metavar="TARGET",
    help="module:callable that returns a tokenizer, to print token ids as text.",
)
def report(
    path: Path,
    data: str | None,
    out: Path,
    class_names: str | None,
    k: int,
    title: str | None,
    tokenizer: str | None,
) -> None:
    """Write a page that shows what each of COMPONENTS responds to.

    One self-contained HTML file; it needs no network and no server.
    """
    import npeff
    from npeff.targets import load_data, load_made

    components = wants(npeff.load(path), "Components", path)
    page = npeff.report(
        components,
        load_data(data) if data else None,
        out,
        class_names=_names(class_names),
        k=k,
        title=title,
        tokenizer=load_made(tokenizer, "--tokenizer") if tokenizer else None,
    )
    click.echo(f"{page}: {components.n_components} components, {size(page.stat().st_size)}")


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
