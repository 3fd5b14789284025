"""``npeff demo``: the whole pipeline on handwritten digits."""

from __future__ import annotations

from pathlib import Path

import click

from npeff.cli.common import WRITABLE, command, quiet, seed


@command(
    examples="""
        npeff demo
        npeff demo --out /tmp/demo --components 16 --no-open
    """
)
@click.option("--out", type=WRITABLE, default="npeff-demo", show_default=True, help="Folder for everything made.")
@click.option(
    "--components",
    "n_components",
    type=click.IntRange(min=1),
    default=32,
    show_default=True,
    help="How many.",
)
@click.option("--open/--no-open", "open_page", default=True, show_default=True, help="Open the page in a browser.")
@seed
@quiet
def demo(out: Path, n_components: int, open_page: bool, seed: int, quiet: bool) -> None:
    """Train a small network on handwritten digits and show its components.

    Needs no download and about a minute: the digits come with scikit-learn (pip install 'npeff[demo]').
    Run again, it starts anew.
    """
    from npeff.demo import run_demo

    page = run_demo(out, n_components=n_components, seed=seed, say=click.echo, progress=not quiet)
    if open_page:
        _open(page)


def _open(page: Path) -> None:
    """Open the page where there is somewhere to show it."""
    import os
    import sys
    import webbrowser

    somewhere = sys.platform in ("darwin", "win32") or os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    if somewhere and webbrowser.open(page.resolve().as_uri()):
        click.echo("Opened it in your browser.")
