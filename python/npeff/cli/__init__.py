"""The command line: arguments → one public call each.

A command lives in a module of this package, as a click command; a line in ``COMMANDS`` adds it. The modules
here import click and nothing heavy; torch and the stages are imported inside the commands, so that ``npeff
--help`` answers at once.
"""

from __future__ import annotations

import difflib
import re
import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import click

from npeff.cli.command import DEBUG, HELP_WIDTH, write_block
from npeff.errors import NpeffError, Terminated
from npeff.storage.files import ending_in_order

COMMANDS = {
    "demo": "npeff.cli.tools:demo",
    "plan": "npeff.cli.stages:plan",
    "fishers": "npeff.cli.stages:fishers",
    "decompose": "npeff.cli.stages:decompose",
    "recover": "npeff.cli.stages:recover",
    "encode": "npeff.cli.stages:encode",
    "trust": "npeff.cli.explain:trust",
    "perturb": "npeff.cli.explain:perturb",
    "trace": "npeff.cli.explain:trace",
    "linearize": "npeff.cli.companions:linearize",
    "report": "npeff.cli.explain:report",
    "influence": "npeff.cli.companions:influence",
    "rollback": "npeff.cli.companions:rollback",
    "info": "npeff.cli.tools:info",
    "export": "npeff.cli.tools:export",
    "doctor": "npeff.cli.tools:doctor",
}

EXAMPLES = """
npeff demo                                           all of it, on handwritten digits
npeff fishers train.py:model train.py:data --out fishers.h5
npeff decompose fishers.h5 --n-components 64 --out components.h5
npeff report components.h5 --data train.py:data --out report/
npeff trust fishers.h5 components.h5 --out trust.json
npeff report components.h5 --data train.py:data --extras trust.json --out report/
"""

PYTHON_ONLY = ("ablated", "applied", "expand", "mean_fisher", "mend")
"""Public functions that no command calls."""

OK, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130


class Commands(click.Group):
    """The commands of ``COMMANDS``, in that order, each imported when it is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names in the order of the pipeline."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import one command."""
        if cmd_name not in COMMANDS:
            return None
        module, _, attribute = COMMANDS[cmd_name].partition(":")
        command = getattr(import_module(module), attribute)
        assert isinstance(command, click.Command)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command; name a similar one where there is none.

        Raises:
            UsageError: There is no such command.
        """
        near = difflib.get_close_matches(args[0], COMMANDS, n=1)
        if args[0] not in COMMANDS and not args[0].startswith("-"):
            hint = f". Did you mean {near[0]!r}?" if near else "."
            if args[0] in PYTHON_ONLY:
                hint = f": it is a function in Python alone, npeff.{args[0]}."
            raise click.UsageError(f"There is no command {args[0]!r}{hint}", ctx)
        return super().resolve_command(ctx, args)

    def format_help_text(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the description, then the examples."""
        super().format_help_text(ctx, formatter)
        write_block(formatter, "Examples", EXAMPLES)


def _version() -> str:
    try:
        return version("npeff")
    except PackageNotFoundError:
        return "0 (source tree)"


@click.group(
    cls=Commands,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": HELP_WIDTH},
)
@click.version_option(_version(), prog_name="npeff", message="%(prog)s %(version)s")
def cli() -> None:
    """Which strategies a network uses, on which examples, and which parameter directions carry them.

    Every step writes a file that the next one reads: `fishers` makes Fishers of a model and data, `decompose`
    makes components of Fishers, `report` makes a page of components. `trust`, `perturb`, `trace` and the companions
    write JSON about components, which `report --extras` shows. Components of sketched Fishers get their vectors in
    parameter space from `recover`.

    Every command has --help, and --debug to see where an error came from. Exit status: 0 done, 1 failed, 2
    wrong usage, 130 interrupted (143 by SIGTERM, 129 by SIGHUP); what is finished is kept, and the same command
    goes on from it.
    """


def run(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        arguments: As in ``sys.argv[1:]``, the default.

    Returns:
        The exit status: 0; 1 for an error of npeff or of the system, told in one message; 2 for wrong usage;
        130 for Ctrl-C, 143 for SIGTERM, 129 for SIGHUP.

    Raises:
        NpeffError: With ``--debug``, errors keep their traceback.
        OSError: With ``--debug``.
        MemoryError: With ``--debug``.
        SystemExit: With ``--debug``, where the model or the data end the program.
    """
    DEBUG.clear()
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        return _run(arguments)


def _show_warning(message: Warning | str, *args: Any, **kwargs: Any) -> None:
    """Without the file and line that warn: they are ours, not the reader's."""
    click.echo(f"npeff: note: {message}", err=True)


def _run(arguments: Sequence[str] | None) -> int:
    stdout = sys.stdout
    try:
        with ending_in_order():
            result = cli.main(None if arguments is None else list(arguments), prog_name="npeff", standalone_mode=False)
        return result if isinstance(result, int) else OK
    except click.exceptions.Exit as error:
        return error.exit_code
    except click.ClickException as error:
        error.show()
        return USAGE
    except (click.Abort, KeyboardInterrupt):
        click.echo(
            "npeff: interrupted; shards and checkpoints are kept, the same command goes on from them",
            err=True,
        )
        return INTERRUPTED
    except Terminated as error:
        click.echo(f"npeff: {error}", err=True)
        return 128 + error.signal
    except SystemExit as error:
        if sys.stdout is not stdout:  # wrapped by click: the reader of our output (head, less) has gone
            return FAILED
        if DEBUG:
            raise
        click.echo(f"npeff: the model or the data ended the program: sys.exit({error.code!r})", err=True)
        return FAILED
    except (NpeffError, OSError, MemoryError) as error:
        if DEBUG:
            raise
        said = str(error) or type(error).__name__
        click.echo(f"npeff: {said}{_as_options(said, arguments)}", err=True)
        return FAILED


def _as_options(message: str, arguments: Sequence[str] | None) -> str:
    """Name the options for the arguments that a message names, as in ``forward=`` or ``k: expected``."""
    given = sys.argv[1:] if arguments is None else arguments
    name = next((word for word in given if word in COMMANDS), None)
    context = click.Context(cli)
    command = None if name is None else cli.get_command(context, name)
    parameters = command.get_params(context) if command else []
    options = {parameter.name: parameter.opts[0] for parameter in parameters if isinstance(parameter, click.Option)}
    named = re.findall(r"(?<![\w.-])([a-z_]+)=(?!=)|^([a-z_]+)(?=: )", message)
    keywords = {f"{word}=" if word else first: word or first for word, first in named}
    found = [
        f"{text} is {options[word]}" for text, word in keywords.items() if options.get(word, message) not in message
    ]
    return f" (on the command line: {', '.join(found)})" if found else ""


def main() -> None:
    """Run the ``npeff`` command and exit with its status."""
    sys.exit(run())


__all__ = ["COMMANDS", "cli", "main", "run"]
