"""``npeff doctor``: what this machine offers and what npeff makes of it."""

from __future__ import annotations

import click

from npeff.cli.common import command


@command(
    examples="""
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
            first, *rest = value.splitlines() or [""]
            click.echo(f"  {name:<{width}}  {first}")
            for line in rest:
                click.echo(f"  {'':<{width}}  {line}")
        click.echo()
