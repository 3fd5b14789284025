"""The options of a perturbation are stated once: signature, dataclass and documentation agree."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Callable
from typing import Any

import pytest

import npeff
from npeff.perturbation.options import PerturbOptions


def keywords_of(function: Callable[..., Any]) -> dict[str, Any]:
    """Keyword-only arguments and their defaults, in order."""
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}


def documented(function: Callable[..., Any]) -> list[str]:
    """Names in the section Args of a docstring."""
    arguments = (inspect.getdoc(function) or "").partition("Args:\n")[2].partition("\n\n")[0]
    return re.findall(r"^    (\w+):", arguments, re.MULTILINE)


FIELDS = {field.name: field.default for field in dataclasses.fields(PerturbOptions)}


def test_the_keyword_arguments_of_perturb_are_the_options() -> None:
    assert list(keywords_of(npeff.perturb).items()) == list(FIELDS.items())


def test_types_of_keyword_arguments_are_those_of_the_options() -> None:
    parameters = inspect.signature(npeff.perturb).parameters
    for field in dataclasses.fields(PerturbOptions):
        assert parameters[field.name].annotation == field.type


@pytest.mark.parametrize("function", [npeff.perturb, npeff.trace, npeff.mend, npeff.perturb_all])
def test_every_argument_is_documented(function: Callable[..., Any]) -> None:
    names = [name for name in inspect.signature(function).parameters if name != "options"]
    assert documented(function) == names
