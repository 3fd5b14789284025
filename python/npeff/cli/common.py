"""What the commands share: options, types, and how they speak."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import click

HELP_WIDTH = 112
DEBUG: list[bool] = []
"""Holds True once ``--debug`` was given: errors then keep their traceback."""

F = TypeVar("F", bound=Callable[..., Any])

EXISTING = click.Path(exists=True, path_type=Path)
WRITABLE = click.Path(path_type=Path)


def _remember(ctx: click.Context, parameter: click.Parameter, value: bool) -> None:
    if value:
        DEBUG.append(True)


def several() -> bool:
    """Whether this process is one of several that ``torchrun`` started."""
    size = os.environ.get("WORLD_SIZE", "1")
    return size.isdecimal() and int(size) > 1


class Command(click.Command):
    """A command with worked examples in its help, and ``--debug``.

    Args:
        examples: Lines shown as they are.
        shared: Whether several processes can share its work; else it refuses to run in more than one.
    """

    def __init__(self, *args: Any, examples: str = "", shared: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.examples, self.shared = examples, shared
        self.params.append(
            click.Option(
                ["--debug"],
                is_flag=True,
                expose_value=False,
                is_eager=True,
                callback=_remember,
                help="Show the traceback of an error.",
            )
        )

    def format_help_text(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The description, then the examples."""
        super().format_help_text(ctx, formatter)
        write_block(formatter, "Examples", self.examples)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; refuse where several processes would each do all of it, and write the same file."""
        if several() and not self.shared:
            misused(
                f"npeff {self.name} runs in one process, and WORLD_SIZE says that this is one of "
                f"{os.environ['WORLD_SIZE']}; start it without torchrun, or unset WORLD_SIZE (npeff fishers and npeff "
                "decompose share their work among processes)"
            )
        return super().invoke(ctx)


def command(examples: str, *, shared: bool = False) -> Callable[[Callable[..., Any]], click.Command]:
    """Make a command of a function; see :class:`Command`."""
    return click.command(cls=Command, examples=examples, shared=shared)


def write_block(formatter: click.HelpFormatter, heading: str, text: str) -> None:
    """Write lines as they are under a heading."""
    if text.strip():
        with formatter.section(heading):
            for line in text.strip().splitlines():
                formatter.write(f"{'':{formatter.current_indent}}{line.strip()}\n")


def seed(function: F) -> F:
    """``--seed``."""
    return click.option("--seed", type=int, default=0, show_default=True, help="Decides every random choice.")(function)


def quiet(function: F) -> F:
    """``--quiet``: no progress bar."""
    return click.option("--quiet", is_flag=True, help="No progress bar.")(function)


def note(message: str) -> None:
    """Tell the user something beside the result: on stderr."""
    click.echo(message, err=True)


def misused(message: str) -> NoReturn:
    """End with exit status 2.

    Args:
        message: What is wrong with the arguments.

    Raises:
        UsageError: Always.
    """
    raise click.UsageError(message)


def size(n_bytes: int) -> str:
    """A number of bytes for people: ``1.5 MB``."""
    value, unit = float(n_bytes), "B"
    for larger in ("kB", "MB", "GB", "TB"):
        if value < 1000:
            break
        value, unit = value / 1000, larger
    return f"{value:.0f} {unit}" if unit == "B" or value >= 100 else f"{value:.1f} {unit}"


def unruled(coverage: Iterable[Mapping[str, str]]) -> list[tuple[str, str]]:
    """Parameters that no gradient rule served: ``(name, what served it and why)``."""
    slow = [line for line in coverage if line.get("rule") in ("torch.func", "loop", "zero", "left out")]
    return [(line.get("parameter", "?"), f"{line['rule']} ({line.get('reason', '')})") for line in slow]


def wants(loaded: Any, kind: str, path: Path) -> Any:
    """Check that a file held what a command needs.

    Args:
        loaded: What :func:`npeff.load` gave.
        kind: ``"Fishers"`` or ``"Components"``.
        path: The file, for the message.

    Returns:
        ``loaded``; ends with exit status 2 where it is of the other kind.
    """
    name = type(loaded).__name__
    if name != kind:
        how = {"Fishers": "npeff fishers", "Components": "npeff decompose"}[kind]
        misused(f"{path} holds {name}, expected {kind} (made by: {how})")
    return loaded


def listed(text: str) -> list[int] | None:
    """The numbers of ``J,K,…``, or None where something else stands among them."""
    parts = [part.strip() for part in text.split(",")]
    return [int(part) for part in parts] if all(part.isascii() and part.isdigit() for part in parts) else None


def components_of(text: str) -> tuple[Any, list[int]]:
    """What ``--component FILE:J[,J…]`` names: the components, and which; ends with exit status 2 otherwise."""
    import npeff

    path, _, numbers = text.rpartition(":")
    chosen = listed(numbers)
    if not path or chosen is None:
        misused(f"--component: expected FILE:J such as components.h5:3, or FILE:J,J,…, got {text!r}")
    if not Path(path).exists():
        misused(f"--component: there is no file {path}")
    components = wants(npeff.load(Path(path)), "Components", Path(path))
    if max(chosen) >= components.n_components:
        misused(f"--component: {path} has components 0 to {components.n_components - 1}, got {max(chosen)}")
    return components, chosen


def for_report(out: Path, components: Any, data: str | None = None, **found: Any) -> None:
    """Write what a report shows of components to JSON, and tell how it gets there."""
    from npeff.reports import save_extras

    save_extras(out, components=components, **found)
    more = f" --influence-data {data}" if data else ""
    click.echo(f"{out}: for npeff report … --extras {out}{more}")
