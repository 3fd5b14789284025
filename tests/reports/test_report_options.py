"""The options of a report are stated once: signature, dataclass and documentation agree."""

from __future__ import annotations

import inspect
from dataclasses import fields

import npeff
from npeff.reports.data import ReportOptions


def test_the_dataclass_has_the_options_of_the_signature() -> None:
    signature = inspect.signature(npeff.report).parameters.values()
    given = [(option.name, option.default) for option in signature if option.kind is option.KEYWORD_ONLY]
    assert [(field.name, field.default) for field in fields(ReportOptions)] == given


def test_every_option_is_documented() -> None:
    documented = inspect.getdoc(npeff.report) or ""
    assert [field.name for field in fields(ReportOptions) if f"\n    {field.name}: " not in documented] == []
