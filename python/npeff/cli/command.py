"""Shared parts of the commands: the command class, checks of files, DATA (of a function, or texts), and messages."""

from __future__ import annotations

import inspect
import os
import shlex
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import click
from click.core import ParameterSource

from npeff.cli.options import Arguments, FunctionOption, Help, own_parameters

if TYPE_CHECKING:
    from npeff.components.components import Components

HELP_WIDTH = 112
DEBUG: list[bool] = []
"""Holds True once ``--debug`` was given: errors then keep their traceback."""

MAKERS = {"Fishers": "npeff fishers", "Components": "npeff decompose"}

OPTIONS = ("answers", "context", "text_column", "label_column")
PLACES = Arguments("npeff.language:Places", only=OPTIONS)
"""Options of texts that follow from the arguments; :data:`Where` is another."""

Where = Annotated[
    str | None,
    "last|every|REGEX",
    Help(
        "Texts: the tokens whose predictions are examples: the last of each text, every one, or the one with the last "
        "character of each match.  [default: last]"
    ),
]


class Command(click.Command):
    """A command with the options of public functions, worked examples in its help, and ``--debug``.

    The callback gets those options that were given, ``forward`` and other callables imported. Unless the work can be
    ``shared``, the command refuses to run in more than one process.
    """

    def __init__(
        self, *args: Any, examples: str = "", arguments: tuple[Arguments, ...] = (), shared: bool = False, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.examples, self.arguments, self.shared = examples, arguments, shared
        self.complete = False

    def get_params(self, ctx: click.Context) -> list[click.Parameter]:
        """Return the parameters stated by the command, then those of its functions, read at the first call."""
        if not self.complete:
            for arguments in self.arguments:
                stated = {parameter.name for parameter in self.params}
                self.params += arguments.options(stated)
            debug = click.Option(
                ["--debug"],
                is_flag=True,
                expose_value=False,
                is_eager=True,
                callback=_remember,
                help="Show the traceback of an error.",
            )
            self.params.append(debug)
            self.complete = True
        return super().get_params(ctx)

    def format_help_text(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the description, then the examples."""
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
        for option in self.params:
            if isinstance(option, FunctionOption) and option.name:
                value = ctx.params.pop(option.name)
                if ctx.get_parameter_source(option.name) is not ParameterSource.DEFAULT:
                    ctx.params[option.name] = option.given(value)
        return super().invoke(ctx)


def _remember(ctx: click.Context, parameter: click.Parameter, value: bool) -> None:
    if value:
        DEBUG.append(True)


def command(examples: str, *arguments: Arguments, shared: bool = False) -> Callable[[Callable[..., Any]], Command]:
    """Make a command of a function; see :class:`Command` and :func:`own_parameters`."""

    def made(function: Callable[..., Any]) -> Command:
        description = (inspect.getdoc(function) or "").partition("\nOptions:\n")[0]
        own = own_parameters(function)
        return click.command(
            cls=Command, params=own, help=description, examples=examples, arguments=arguments, shared=shared
        )(function)

    return made


def several() -> bool:
    """Say whether this process is one of several that ``torchrun`` started."""
    size = os.environ.get("WORLD_SIZE", "1")
    return size.isdecimal() and int(size) > 1


def first() -> bool:
    """Say whether this process writes the messages: the only one, or the first of several."""
    return not several() or os.environ.get("RANK", "0") == "0"


def write_block(formatter: click.HelpFormatter, heading: str, text: str) -> None:
    """Write lines as they are under a heading."""
    if text.strip():
        with formatter.section(heading):
            for line in text.strip().splitlines():
                formatter.write(f"{'':{formatter.current_indent}}{line.strip()}\n")


def note(message: str) -> None:
    """Tell the user something beside the result: on stderr."""
    click.echo(message, err=True)


def next_step(*words: str | Path, options: Mapping[str, Any], about: str = "") -> None:
    """Tell the command that comes next, with what is to be said about it; nothing with ``--quiet``."""
    if options.get("progress", True):
        note(f"next: {shlex.join(map(str, ('npeff', *words)))}{about}")


def misused(message: str) -> NoReturn:
    """End with exit status 2, and a message that says what is wrong with the arguments.

    Raises:
        UsageError: Always.
    """
    raise click.UsageError(message)


def size(n_bytes: int) -> str:
    """Write a number of bytes for people: ``1.5 MB``."""
    from npeff.models.devices import format_bytes

    return format_bytes(n_bytes)


def unruled(coverage: Iterable[Mapping[str, str]]) -> list[tuple[str, str]]:
    """List the parameters that no gradient rule served: ``(name, what served it and why)``."""
    slow = [line for line in coverage if line.get("rule") in ("torch.func", "loop", "zero", "left out")]
    return [(line.get("parameter", "?"), f"{line['rule']} ({line.get('reason', '')})") for line in slow]


def check_out(path: Path | None, *suffixes: str, option: str = "--out") -> None:
    """Check, before the work, that a file can be written, and that it replaces no Fishers and no components.

    Its name must have one of the suffixes, if any are given. Nothing is checked where no file is asked for.

    Raises:
        UsageError: The name has another ending.
        StorageError: The file cannot be written, or holds Fishers or Components.
    """
    if path is None:
        return
    if suffixes and path.suffix.lower() not in suffixes:
        *others, last = suffixes
        misused(f"{option}: expected a name ending in {', '.join(others)}{' or ' if others else ''}{last}, got {path}")
    from npeff.storage.container import refuse_npeff_file
    from npeff.storage.files import check_target

    refuse_npeff_file(path)
    check_target(path)


def loaded(path: Path, kind: str) -> Any:
    """Open a file of ``"Fishers"`` or ``"Components"`` that a command needs.

    Raises:
        UsageError: It holds the other kind.
    """
    import npeff

    found = npeff.load(path)
    if type(found).__name__ != kind:
        misused(f"{path} holds {type(found).__name__}, expected {kind} (made by: {MAKERS[kind]})")
    return found


def listed(text: str) -> list[int] | None:
    """Read the numbers of ``J,K,…``; None where something else stands among them."""
    parts = [part.strip() for part in text.split(",")]
    return [int(part) for part in parts] if all(part.isascii() and part.isdigit() for part in parts) else None


def check_members(members: Iterable[int], components: Any, path: Path, option: str = "--component") -> None:
    """Check that there are such components.

    Raises:
        UsageError: One is not there.
    """
    if max(members) >= components.n_components:
        misused(f"{option}: {path} has components 0 to {components.n_components - 1}, got {max(members)}")


def components_of(text: str) -> tuple[Any, list[int]]:
    """Open what ``--component FILE:J[,J…]`` names: the components, and which.

    Raises:
        UsageError: The text has another form, or there is no such file or component.
    """
    name, _, numbers = text.rpartition(":")
    chosen, path = listed(numbers), Path(name)
    if not name or chosen is None:
        misused(f"--component: expected FILE:J such as components.h5:3, or FILE:J,J,…, got {text!r}")
    if not path.exists():
        misused(f"--component: there is no file {path}")
    components = loaded(path, "Components")
    check_members(chosen, components, path)
    return components, chosen


def for_report(out: Path, components: Any, data: str | None = None, **found: Any) -> None:
    """Write what a report shows of components to JSON, and say how the report gets it."""
    from npeff.reports import save_extras

    save_extras(out, components=components, **found)
    tell_extras(out, more=f" --influence-data {data}" if data else "")


def tell_extras(out: Path, made: str = "", more: str = "") -> None:
    """Say what was written to a file, and how the report gets it."""
    click.echo(f"{out}: {made}for npeff report … --extras {out}{more}")


def is_text(data: str) -> bool:
    """Say whether DATA is a file of texts, or a folder with a dataset."""
    from npeff.language.texts import FILES

    return data.lower().endswith(FILES) or (data != "" and ":" not in data and Path(data).is_dir())


def data_of_model(data: str, model: str, options: dict[str, Any]) -> Iterable[Any]:
    """Load DATA; the options of texts are taken out of ``options``.

    Raises:
        UsageError: They are given for other data, or MODEL is a function, which tells of no tokenizer.
    """
    from npeff.language import Places
    from npeff.models.targets import PREFIX, load_data, load_tokenizer

    given = {name: options.pop(name, None) for name in ("where", *OPTIONS)}
    about = {name: value for name, value in given.items() if value is not None}
    if not is_text(data):
        if about:
            misused(f"--{next(iter(about)).replace('_', '-')} belongs to DATA that is a file of texts, got {data}")
        return load_data(data)
    if not model.startswith(PREFIX):
        misused(
            f"DATA: {data} is a file of texts, and MODEL tells of no tokenizer; give MODEL as hf:PATH, or for DATA a "
            "function that returns npeff.language.Places(tokenizer, texts)"
        )
    return Places(load_tokenizer(model), data, **about)


def data_of_components(data: str, components: Components) -> Iterable[Any]:
    """Load DATA; texts are read as those that the components' Fishers were computed from.

    Raises:
        UsageError: The Fishers were computed from something else.
    """
    from npeff.language import Places
    from npeff.models.targets import load_data

    if not is_text(data):
        return load_data(data)
    described = (components.provenance.get("fishers") or {}).get("places")
    if described is None:
        misused(
            f"DATA: {data} is a file of texts, and these components were not made from one; give module:callable for "
            "the data of their Fishers"
        )
    return Places.described(described, data)
