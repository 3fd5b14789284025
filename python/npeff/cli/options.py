"""Parameters of a command: of its own signature, and of the signatures and docstrings of public functions.

A public function is imported when the command is asked for its parameters, not before: ``npeff --help`` lists all
commands at once.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from operator import attrgetter
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin, get_type_hints

import click

WRITABLE = click.Path(path_type=Path)

Existing = Annotated[Path, click.Path(exists=True, path_type=Path)]
"""A file that is there."""
Count = Annotated[int, click.IntRange(min=1)]
Whole = Annotated[int, click.IntRange(min=0)]
"""A number from 1, and one from 0."""

_SECTION = re.compile(r"^(?:Args|Attributes|Options):\n((?:    .*\n?|\n)*)", re.MULTILINE)
_ENTRY = re.compile(r"^    (\w+): (.*(?:\n {8}.*)*)", re.MULTILINE)
_REFERENCE = re.compile(r"(?:As (?:for|in)|See) :\w+:`~?(?:(npeff[.a-z_]*)\.)?(\w+)`|Likewise")


class Help(NamedTuple):
    """The description of an option that several commands have."""

    text: str


def own_parameters(function: Callable[..., Any]) -> list[click.Parameter]:
    """Make the parameters that a command's function has itself.

    An argument that has no default and may be given by position becomes an argument of the command, each other one an
    option. Its annotation may hold a type of click, flags (texts that begin with a dash) in place of its name or beside
    it, another text as the metavar, and :class:`Help`; else ``Options:`` in the docstring describe it.
    """
    hints, described = get_type_hints(function, include_extras=True), entries_of(inspect.getdoc(function))
    parameters: list[click.Parameter] = []
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            continue
        kind, about = _unfolded(hints[name])
        texts = [item for item in about if isinstance(item, str)]
        flags = [text for text in texts if text.startswith("-")]
        metavar = next((text for text in texts if not text.startswith("-")), None)
        types = {Path: WRITABLE, tuple: WRITABLE, Literal: click.Choice(get_args(kind))}
        type_ = next((item for item in about if isinstance(item, click.ParamType)), None)
        type_ = type_ or types.get(get_origin(kind) or kind, kind)
        if parameter.kind is not parameter.KEYWORD_ONLY:
            parameters.append(click.Argument([name], metavar=metavar or name.upper(), type=type_))
            continue
        if not any(text.startswith("--") for text in flags):
            flags.insert(0, f"--{name.replace('_', '-')}" if len(name) > 1 else f"-{name}")
        if kind is bool and parameter.default:
            flags[0] += f"/--no-{flags[0][2:]}"
        default = parameter.default
        given: dict[str, Any] = {"required": True} if default is parameter.empty else {"default": default}
        option = click.Option(
            [name, *flags],
            type=None if kind is bool else type_,
            is_flag=kind is bool,
            multiple=get_origin(kind) is tuple,
            show_default=default not in (None, (), parameter.empty) and default is not False,
            metavar=metavar,
            help=next((item.text for item in about if isinstance(item, Help)), described.get(name, "")),
            **given,
        )
        parameters.append(option)
    return parameters


def _unfolded(hint: Any) -> tuple[Any, list[Any]]:
    """Take a type out of ``Annotated`` and ``| None``, with what the annotations say."""
    if get_origin(hint) is Annotated:
        kind, about = _unfolded(get_args(hint)[0])
        return kind, [*get_args(hint)[1:], *about]
    if get_origin(hint) in (Union, UnionType):
        return _unfolded(next(item for item in get_args(hint) if item is not NoneType))
    return hint, []


def entries_of(docstring: str | None) -> dict[str, str]:
    """Return the description of each argument in a docstring, each on one line."""
    section = _SECTION.search(f"{docstring}\n")
    entries = _ENTRY.findall(section[1] if section else "")
    return {name: " ".join(text.split()).replace(" [default:", "  [default:") for name, text in entries}


@dataclass(frozen=True)
class Arguments:
    """Arguments of a public function, or fields of a public dataclass, that a command offers as options.

    The command itself states those without a default, and those whose values come from elsewhere: from a file, say.

    Args:
        path: ``"npeff:compute_fishers"``: a module and a name in it.
        skip: Arguments that no text can give.
        only: These arguments alone; None: all.
    """

    path: str
    skip: tuple[str, ...] = ()
    only: tuple[str, ...] | None = None

    def options(self, stated: Container[str | None]) -> list[FunctionOption]:
        """Make the options, in the order of the signature, but for those that the command states itself."""
        return [
            FunctionOption(argument)
            for argument in arguments_of(self.path)
            if argument.name not in stated
            and argument.name not in self.skip
            and (self.only is None or argument.name in self.only)
        ]


class Argument(NamedTuple):
    """One argument as its function states it; the kinds are what a text can be read as, see :func:`_kinds`."""

    name: str
    kinds: tuple[Any, ...]
    default: Any
    help: str


@cache
def arguments_of(path: str) -> tuple[Argument, ...]:
    """Read the arguments that have a default; see :class:`Arguments` for the path."""
    module, _, name = path.partition(":")
    function = attrgetter(name)(import_module(module))
    hints = get_type_hints(function.__init__ if inspect.isclass(function) else function)
    described = _descriptions(function)
    return tuple(
        Argument(one.name, tuple(_kinds(hints[one.name])), one.default, described.get(one.name, ""))
        for one in inspect.signature(function).parameters.values()
        if one.default is not one.empty
    )


def _descriptions(function: Any) -> dict[str, str]:
    """The text of each argument; where it refers to another function, the text of that one's argument."""
    found: dict[str, str] = {}
    referred = function
    for name, text in entries_of(inspect.getdoc(function)).items():
        if reference := _REFERENCE.match(text):
            if reference[2]:
                referred = getattr(import_module(reference[1] or function.__module__), reference[2])
            text = _descriptions(referred).get(name, text)
        found[name] = re.sub(r":\w+:`~?([^`]+)`", r"\1", text).replace("``", "")
    return found


def _kinds(hint: Any) -> Iterator[Any]:
    """What a text can be read as under an annotation: types, :class:`Word`, ``Callable``, ``list`` for several."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin in (Union, UnionType):
        for part in inner:
            yield from _kinds(part)
    elif origin is Literal:
        yield from map(Word, inner)
    elif origin is Sequence:
        yield list
        yield from _kinds(inner[0])
    elif hint == tuple[float, float]:
        yield pair
    elif origin is Callable:
        yield Callable
    elif hint in (int, float, str, bool, Path):
        yield hint


@dataclass(frozen=True)
class Word:
    """A value of a ``Literal``."""

    value: Any


def pair(text: str) -> tuple[float, float]:
    """Read ``LOW,HIGH``.

    Raises:
        ValueError: The text is something else.
    """
    low, high = text.split(",")
    return float(low), float(high)


_NAMES: dict[Any, tuple[str, str]] = {
    int: ("N", "a whole number"),
    float: ("NUMBER", "a number"),
    pair: ("LOW,HIGH", "two numbers as LOW,HIGH"),
    str: ("TEXT", "a text"),
}


class Value(click.ParamType):  # type: ignore[type-arg]  # no generic in earlier clicks
    """A text read as the first that fits: a word of a ``Literal``, a whole number, a number, two numbers, a text."""

    def __init__(self, kinds: tuple[Any, ...]) -> None:
        self.words = {str(kind.value): kind.value for kind in kinds if isinstance(kind, Word)}
        self.types = [type_ for type_ in _NAMES if type_ in kinds]
        read = dict.fromkeys(kind for kind in kinds if kind in _NAMES or isinstance(kind, Word))
        named = [(str(kind.value), repr(kind.value)) if isinstance(kind, Word) else _NAMES[kind] for kind in read]
        self.expected = [long for _, long in named]
        bytes_ = {int, str} <= {*self.types}  # as in 4GB
        self.name = "SIZE" if bytes_ else "|".join(short for short, _ in named)

    def get_metavar(self, param: click.Parameter, ctx: click.Context | None = None) -> str:
        """Return the words and types, as in ``[low_rank|diagonal]``."""
        return f"[{self.name}]" if "|" in self.name else self.name

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Read one value; the error says what was expected and what came."""
        if not isinstance(value, str):
            return value
        if value in self.words:
            return self.words[value]
        for type_ in self.types:
            with suppress(ValueError):
                return type_(value)
        *others, last = self.expected
        self.fail(f"expected {', '.join(others)}{' or ' if others else ''}{last}, got {value!r}", param, ctx)


class FunctionOption(click.Option):
    """The option of one argument; its value is what the function takes.

    A flag for a bool; ``progress`` is switched off by ``--quiet``; an argument that takes a sequence is repeatable; a
    callable is named as ``module:callable`` or ``file.py:callable``.

    Raises:
        TypeError: No text can give the argument.
    """

    def __init__(self, argument: Argument) -> None:
        name, kinds = argument.name, argument.kinds
        flag = f"-{name}" if len(name) == 1 else f"--{name.replace('_', '-')}"
        if bool in kinds:
            flag += "/--quiet" if name == "progress" else f"/--no-{flag[2:]}"
        elif not kinds:
            raise TypeError(f"{name}: no text can give it; skip it, or state an option of the command in its place")
        self.callable, self.repeatable = Callable in kinds, list in kinds
        self.scalar = list not in kinds[:1]
        given = {bool: None, Path: WRITABLE, Callable: click.STRING}
        type_ = next((type_ for kind, type_ in given.items() if kind in kinds), Value(kinds))
        super().__init__(
            [name, flag],
            type=type_,
            metavar="TARGET" if self.callable else None,
            multiple=self.repeatable,
            default=[] if self.repeatable else argument.default,
            show_default=False,
            help=_help(argument),
        )
        self.argument = argument

    def given(self, value: Any) -> Any:
        """Convert a value from the command line into what the function takes."""
        if self.callable:
            from npeff.models.targets import load_object

            return load_object(value, self.opts[0])
        if self.repeatable:
            return value[0] if self.scalar and len(value) == 1 else list(value)
        return value


def _help(argument: Argument) -> str:
    text = re.sub(r"\b([a-z_]+)=\"(\w+)\"", lambda m: f"--{m[1].replace('_', '-')} {m[2]}", argument.help)
    if Callable in argument.kinds:
        text += " Named as module:callable or file.py:callable."
    if list in argument.kinds:
        text += " Repeatable."
    if argument.default is not None and bool not in argument.kinds:
        text += f"  [default: {argument.default}]"
    return text
