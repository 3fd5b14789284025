"""``npeff demo`` and ``npeff doctor``: the whole pipeline on handwritten digits, and what this machine offers."""

from __future__ import annotations

import os
import sys
import webbrowser
from pathlib import Path
from typing import Any

import click

from npeff.cli.command import command
from npeff.cli.options import WRITABLE, Arguments


@command(
    """
        npeff demo
        npeff demo --out /tmp/demo --n-components 16 --no-open
    """,
    Arguments("npeff.demo:run_demo", skip=("say",)),
)
@click.option("--out", type=WRITABLE, default="npeff-demo", show_default=True, help="Folder for everything made.")
@click.option("--open/--no-open", "open_page", default=True, show_default=True, help="Open the page in a browser.")
def demo(out: Path, open_page: bool, **options: Any) -> None:
    """Train a small network on handwritten digits and show its components.

    Needs no download and about a minute: the digits come with scikit-learn (pip install 'npeff[demo]').
    Run again, it starts anew.
    """
    from npeff.demo import run_demo

    page = run_demo(out, say=click.echo, **options)
    screen = sys.platform in ("darwin", "win32") or os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    if open_page and screen and webbrowser.open(page.resolve().as_uri()):
        click.echo("Opened it in your browser.")


@command(
    """
        npeff doctor
    """
)
def doctor() -> None:
    """Say which hardware and kernels are used, and why not faster ones."""
    from npeff.doctor import examine

    for section in examine():
        click.echo(click.style(section.title, bold=True))
        width = max((len(name) for name, _ in section.lines), default=0)
        for name, value in section.lines:
            head, *rest = value.splitlines() or [""]
            click.echo(f"  {name:<{width}}  {head}")
            for line in rest:
                click.echo(f"  {'':<{width}}  {line}")
        click.echo()
