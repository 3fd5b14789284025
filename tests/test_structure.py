"""The import graph of the package: no circle, no import upward, no import inside a function."""

from __future__ import annotations

import npeff
from structure import FLOORS, circles, imports, late_imports, modules, upward


def test_no_modules_import_each_other_in_a_circle() -> None:
    assert circles() == []


def test_no_module_imports_from_a_higher_floor() -> None:
    assert [f"{one.source}:{one.line} imports {one.target}" for one in upward()] == []
    floors = {name for floor in FLOORS for name in floor}
    assert {name.split(".")[0] for name in modules()} - {"__init__"} == floors


def test_imports_of_the_package_stand_at_the_top_of_modules() -> None:
    assert late_imports() == []


def test_imports_in_functions_and_for_annotations_are_counted() -> None:
    found = {(one.source, one.target, one.late) for one in imports()}
    assert ("cli.perturb", "components.components", False) in found  # under TYPE_CHECKING
    assert any(late and source.startswith("cli.") for source, _, late in found)


def test_no_module_has_the_name_of_a_public_function() -> None:
    """Such a module would take the function's place once it is imported."""
    assert not {name.split(".")[0] for name in modules()} & set(npeff.__all__)
