"""Every ``npeff …`` command line in the docs, the help and the messages exists, with its options."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import click
import pytest

import npeff
from npeff.cli import COMMANDS, cli

ROOT = Path(__file__).parents[2]
PACKAGE = Path(npeff.__file__).parent
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")])
SOURCES = sorted([*PACKAGE.rglob("*.py"), *(ROOT / "examples").rglob("*.py")])
TEMPLATES = sorted(PACKAGE.rglob("*.j2"))

# A command line begins at a word npeff followed by a command, and ends with the line, the code, or the sentence.
LINE = re.compile(r"(?<![\w./{-])(?:python -m |-m )?npeff +(?P<rest>[a-z]+\b[^\n`\"|#→]*)")
COMMAND_LIKE = re.compile(r" --?[a-z]|\.py:|\.h5|\.json|\b(MODEL|DATA|FISHERS|COMPONENTS|COMMAND|FILE)\b")
"""What tells a command line from a sentence about the package, where the word after ``npeff`` is no command."""


def contexts() -> dict[str, click.Command]:
    ctx = click.Context(cli)
    found = {name: cli.get_command(ctx, name) for name in COMMANDS}
    assert all(found.values())
    return found  # type: ignore[return-value]


KNOWN = contexts()


@cache
def texts() -> list[tuple[str, str]]:
    return list(_texts())


def _texts() -> Iterator[tuple[str, str]]:
    for page in (*PAGES, *TEMPLATES):
        text = re.sub(r"\\\n\s*", " ", page.read_text(encoding="utf-8"))
        yield str(page.relative_to(ROOT if page.is_relative_to(ROOT) else PACKAGE)), text
    for source in SOURCES:
        name = str(source.relative_to(ROOT if source.is_relative_to(ROOT) else PACKAGE))
        for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield f"{name}:{node.lineno}", node.value
            elif isinstance(node, ast.JoinedStr):
                parts = [p.value if isinstance(p, ast.Constant) else "\0" for p in node.values]
                yield f"{name}:{node.lineno}", "".join(map(str, parts))


def command_lines() -> list[tuple[str, str]]:
    found = []
    for where, text in texts():
        for match in LINE.finditer(text):
            quoted = text[: match.start()].endswith("`")
            if match["rest"].split()[0] in KNOWN or quoted or COMMAND_LIKE.search(match["rest"]):
                found.append((where, match["rest"]))
    return found


def problem(rest: str) -> str | None:
    """What is wrong with ``fishers MODEL DATA --top-k 5 …``."""
    name = rest.split()[0].rstrip(".,;:)")
    if name not in KNOWN:
        return f"there is no command {name!r}"
    rest = re.split(r"[,;:.)](?=\s|$)", rest)[0]  # the sentence goes on
    options = {
        opt
        for parameter in KNOWN[name].get_params(click.Context(KNOWN[name]))
        for opt in (*parameter.opts, *parameter.secondary_opts)
    }
    options |= {"--help", "-h", "--debug"}
    try:
        words = shlex.split(rest.replace("…", " "))
    except ValueError:
        words = rest.split()
    for word in words[1:]:
        option = re.match(r"\[?(--?[a-zA-Z][\w-]*)", word)
        if option and option[1] not in options:
            return f"npeff {name} has no option {option[1]}"
    return None


def test_command_lines_are_found() -> None:
    found = command_lines()
    assert len(found) > 100
    assert {rest.split()[0] for _, rest in found} >= set(COMMANDS), "each command is shown somewhere"


def test_every_command_line_exists() -> None:
    wrong = [f"{where}: npeff {rest.strip()}: {what}" for where, rest in command_lines() if (what := problem(rest))]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("report --trust", "npeff report has no option --trust"),
        ("repair components.h5", "there is no command 'repair'"),
        ("fishers m.py:model m.py:data --top-k 3 --out f.h5", None),
        ("perturb MODEL DATA c.h5 -j 3 --reject span", None),
        ("demo --no-open --outt x", "npeff demo has no option --outt"),
    ],
)
def test_the_check_itself(line: str, what: str | None) -> None:
    assert problem(line) == what


@pytest.mark.parametrize("name", COMMANDS)
def test_examples_in_help_are_parsed(name: str) -> None:
    """Each example of a command's own help passes its parser: arguments, options and their values."""
    command = KNOWN[name]
    for line in getattr(command, "examples", "").strip().splitlines():
        words = shlex.split(line.split("|")[0])
        assert words[:2] == ["npeff", name], line
        parser = command.make_parser(click.Context(command, info_name=name))
        _, rest, _ = parser.parse_args(words[2:])
        assert not rest, line


@pytest.mark.parametrize("kind", [npeff.Components, npeff.Fishers, npeff.Effect, npeff.Mending, npeff.Strategy])
def test_methods_in_docs_exist(kind: type) -> None:
    """``components.method(`` and the like, in the docs and in messages that name a call."""
    name = kind.__name__.lower()
    own = {*dir(kind), *kind.__dataclass_fields__}  # type: ignore[attr-defined]
    called = {(where, m[1]) for where, text in texts() for m in re.finditer(rf"\b{name}\.(\w+)\(", text)}
    assert not {item for item in called if item[1] not in own}


def test_python_names_in_docs_exist() -> None:
    """``npeff.name(`` and ``npeff.part.name(`` in docs, docstrings and messages."""
    import importlib

    wrong, seen = [], 0
    for where, text in texts():
        for match in re.finditer(r"(?<![\w/.@-])npeff((?:\.[A-Za-z_]\w*)+)", text):
            if "._" in match[0] or re.match(r"[\w-]*\.(h5|json|py|toml|md|dev)\b", match[0]):
                continue
            seen += 1
            item: object = npeff
            path = "npeff"
            for part in match[1].strip(".").split("."):
                try:
                    item = getattr(item, part)
                except AttributeError:
                    try:
                        item = importlib.import_module(f"{path}.{part}")
                    except ImportError:
                        if part not in getattr(item, "__dataclass_fields__", {}):
                            wrong.append(f"{where}: {match[0]}")
                        break
                path += f".{part}"
    assert not wrong, "\n".join(sorted(set(wrong)))
    assert seen > 100


def test_python_blocks_of_the_docs_call_what_exists() -> None:
    """Calls of ``npeff.…`` and methods of components and Fishers, with the keywords that they are given."""
    import importlib
    import inspect

    owners = {"npeff": npeff, "components": npeff.Components, "fishers": npeff.Fishers, "effect": npeff.Effect}
    wrong, seen = [], 0
    for page in PAGES:
        for block in re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.S):
            for node in ast.walk(ast.parse(block)):
                if not isinstance(node, ast.Call):
                    continue
                path = ast.unparse(node.func).split(".")
                if path[0] not in owners or not all(part.isidentifier() for part in path):
                    continue
                item, called = owners[path[0]], path[0]
                try:
                    for part in path[1:]:
                        called += f".{part}"
                        item = getattr(item, part, None) or importlib.import_module(called)
                    parameters = inspect.signature(item).parameters.values()  # type: ignore[arg-type]
                except (ImportError, TypeError, ValueError):
                    wrong.append(f"{page.name}: {called}")
                    continue
                seen += 1
                if not any(p.kind is p.VAR_KEYWORD for p in parameters):
                    names = {p.name for p in parameters}
                    given = [keyword.arg for keyword in node.keywords if keyword.arg]
                    wrong += [f"{page.name}: {called}({name}=…)" for name in given if name not in names]
    assert not wrong, "\n".join(wrong)
    assert seen > 50


def test_files_named_in_the_docs_are_there() -> None:
    path = re.compile(r"(?:`|\]\()((?:\.\./|docs/|benchmarks/|examples/|tests/|csrc/|python/)[\w./-]+\.\w+)")
    wrong, seen = [], 0
    for page in PAGES:
        for name in path.findall(page.read_text("utf-8")):
            seen += 1
            if not (page.parent / name).exists() and not (ROOT / name).exists():
                wrong.append(f"{page.relative_to(ROOT)}: {name}")
    assert not wrong, "\n".join(sorted(set(wrong)))
    assert seen > 20
