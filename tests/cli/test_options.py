"""Options of the commands and arguments of the public functions: the same names, the same defaults."""

from __future__ import annotations

import inspect
from importlib import import_module
from typing import Any

import click
import pytest

from npeff.cli import COMMANDS, cli
from npeff.cli.command import Command, command
from npeff.cli.options import Arguments, FunctionOption

NO_TEXT = {
    "npeff:compute_fishers": {"compress", "share"},  # --top-k, --sketch, --exact, --gram-only; torchrun
    "npeff:decompose": {"published", "init", "callback"},  # published: its fields are options
    "npeff:perturb": {"fisher"},
    "npeff:report": {"effects", "traces", "trust", "attributions", "influences"},  # --extras
    "npeff.demo:run_demo": {"say"},
}
"""Arguments that no text gives."""

NOT_OFFERED = {
    "plan": {"out", "seed", "max_examples", "block_weights", "progress"},
    "trace": {"floor", "n_random", "curve", "unrelated", "prompts", "n_tokens"},
}
"""Arguments of a function whose options a command has in part."""


def made(name: str) -> Command:
    found = cli.get_command(click.Context(cli), name)
    assert isinstance(found, Command)
    found.get_params(click.Context(found))
    return found


def defaults(path: str) -> dict[str, Any]:
    """Arguments of the function itself that have a default."""
    module, _, names = path.partition(":")
    function: Any = import_module(module)
    for part in names.split("."):
        function = getattr(function, part)
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not p.empty}


PAIRS = [(name, arguments) for name in COMMANDS for arguments in made(name).arguments]


@pytest.mark.parametrize(("name", "arguments"), PAIRS, ids=[f"{name} {given.path}" for name, given in PAIRS])
def test_each_argument_is_an_option_with_the_same_default(name: str, arguments: Arguments) -> None:
    parameters = {parameter.name: parameter for parameter in made(name).params}
    wanted = defaults(arguments.path)
    if arguments.only is not None:
        assert set(arguments.only) <= set(wanted)
        wanted = {only: wanted[only] for only in arguments.only}
    else:
        assert set(wanted) - set(parameters) - NOT_OFFERED.get(name, set()) == NO_TEXT.get(arguments.path, set())
    for argument, default in wanted.items():
        if argument in arguments.skip:
            continue
        option = parameters.get(argument)
        if isinstance(option, FunctionOption):
            assert option.argument.default == default, argument
            assert option.help and not option.help.startswith(("As for", "Likewise")), argument
            assert argument == "progress" or option.opts[0].lstrip("-").replace("-", "_") == argument


@pytest.mark.parametrize("name", COMMANDS)
def test_each_option_of_a_function_is_an_argument(name: str) -> None:
    known = {argument for arguments in made(name).arguments for argument in defaults(arguments.path)}
    assert {option.name for option in made(name).params if isinstance(option, FunctionOption)} <= known


def values(*words: str) -> dict[str, Any]:
    """What ``npeff.perturb`` would be given."""
    given: dict[str, Any] = {}

    @command("", Arguments("npeff:perturb", skip=("fisher", "unrelated")))
    def collect(**options: Any) -> None:
        given.update(options)

    collect.main(words, standalone_mode=False)
    return given


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("", {}),
        ("--magnitude 3 --n-random 0", {"magnitude": 3.0, "n_random": 0}),
        ("--target-kl 0.2", {"target_kl": 0.2}),
        ("--target-kl 0.05,0.2", {"target_kl": (0.05, 0.2)}),
        ("--sign both", {"sign": "both"}),
        ("--sign -1", {"sign": -1}),
        ("--top 8", {"top": 8}),
        ("--top 8 --top 5", {"top": [8, 5]}),
        ("--baseline all", {"baseline": "all"}),
        ("--prompts 3", {"prompts": 3}),
        ("--prompts sea", {"prompts": "sea"}),
        ("--prompts sea --prompts land", {"prompts": ["sea", "land"]}),
        ("--combine 0.5 --combine -2", {"combine": [0.5, -2.0]}),
        ("--quiet", {"progress": False}),
        ("--progress", {"progress": True}),
        ("--forward operator:add", {"forward": __import__("operator").add}),
    ],
)
def test_texts_become_values(words: str, expected: dict[str, Any]) -> None:
    """Options that are not given are left to the function."""
    assert values(*words.split()) == expected


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--magnitude far", "'--magnitude': expected a number, got 'far'"),
        ("--n-random 1.5", "'--n-random': expected a whole number, got '1.5'"),
        ("--sign up", "'--sign': expected 'both', 1 or -1, got 'up'"),
        ("--target-kl 1,2,3", "'--target-kl': expected a number or two numbers as LOW,HIGH, got '1,2,3'"),
        ("--baseline many", "'--baseline': expected a whole number or 'all', got 'many'"),
        ("--reject all", "'--reject': expected 'span' or 'sequential', got 'all'"),
    ],
)
def test_errors_say_what_was_expected_and_what_came(words: str, message: str) -> None:
    with pytest.raises(click.BadParameter) as caught:
        values(*words.split())
    assert message in caught.value.format_message()


def test_an_argument_that_no_text_gives_is_noticed() -> None:
    with pytest.raises(TypeError, match="fisher: no text can give it"):
        Arguments("npeff:perturb").options(())
