"""Every option of stage 1 is stated once: the signature of compute_fishers, and the dataclass that carries it."""

from __future__ import annotations

import inspect
from dataclasses import fields

import npeff
from npeff.fishers.options import FisherOptions


def test_the_dataclass_has_the_options_of_the_signature() -> None:
    signature = inspect.signature(npeff.compute_fishers).parameters.values()
    given = [(option.name, option.default) for option in signature if option.kind is option.KEYWORD_ONLY]
    assert [(field.name, field.default) for field in fields(FisherOptions)] == given


def test_every_option_is_documented() -> None:
    documented = inspect.getdoc(npeff.compute_fishers) or ""
    assert [field.name for field in fields(FisherOptions) if f"\n    {field.name}: " not in documented] == []
