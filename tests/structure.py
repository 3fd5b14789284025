"""Measure the structure of the package's source: lines, modules, import circles, late imports, imports upward.

Run it to see the table::

    python tests/structure.py
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "python" / "npeff"

FLOORS = (
    ("errors", "short_repr"),
    ("kernels", "storage"),
    ("batches", "language", "models"),
    ("gradients",),
    ("fishers",),
    ("components",),
    ("decomposition",),
    ("distributed", "trust"),
    ("perturbation",),
    ("companions",),
    ("reports",),
    ("planning", "demo", "doctor"),
    ("cli",),
    ("__main__",),
)
"""Modules and packages in the root, from the ground up; a module imports from its own floor and lower ones."""

NATIVE = ("_native", "_cuda")
"""Compiled modules, which import nothing of the package."""

LATE = ("__init__", "cli", "doctor")
"""Where imports may stand inside functions, as in ``__init__``: the doctor works where a package is missing."""


@dataclass(frozen=True)
class Import:
    """One import of a module of the package by another.

    Attributes:
        source: The module that imports, without ``npeff.``.
        target: The module that is imported.
        line: Where.
        late: It stands inside a function.
    """

    source: str
    target: str
    line: int
    late: bool


def modules() -> dict[str, Path]:
    """Every module by its name without ``npeff.``; a package by its own name."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        parts = parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts
        found[".".join(parts)] = path
    return found


@cache
def imports() -> tuple[Import, ...]:
    """Every import between modules, those inside functions and under TYPE_CHECKING included."""
    known = modules()
    found = []
    for name, path in known.items():
        for node, late in _statements(ast.parse(path.read_text()), False):
            for target in _targets(node, known):
                if target != name:
                    found.append(Import(name, target, node.lineno, late))
    return tuple(found)


def _statements(node: ast.AST, late: bool) -> Iterator[tuple[ast.Import | ast.ImportFrom, bool]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.Import, ast.ImportFrom)):
            yield child, late
        inside = late or isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        yield from _statements(child, inside)


def _targets(node: ast.Import | ast.ImportFrom, known: dict[str, Path]) -> Iterator[str]:
    if isinstance(node, ast.Import):
        names = [(alias.name, None) for alias in node.names]
    else:
        names = [(node.module or "", alias.name) for alias in node.names]
    for module, attribute in names:
        if module != "npeff" and not module.startswith("npeff."):
            continue
        base = module.removeprefix("npeff").lstrip(".")
        whole = ".".join(filter(None, (base, attribute)))
        if whole in NATIVE:
            continue
        if whole in known:
            yield whole
        elif base in known:
            yield base
        elif not base:
            yield "__init__"


def circles() -> list[list[str]]:
    """Groups of modules that import each other, in a circle."""
    arrows: dict[str, set[str]] = {}
    for one in imports():
        arrows.setdefault(one.source, set()).add(one.target)
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(name: str) -> None:
        index[name] = low[name] = len(index)
        stack.append(name)
        for other in sorted(arrows.get(name, ())):
            if other not in index:
                visit(other)
                low[name] = min(low[name], low[other])
            elif other in stack:
                low[name] = min(low[name], index[other])
        if low[name] == index[name]:
            group = []
            while not group or group[-1] != name:
                group.append(stack.pop())
            if len(group) > 1:
                found.append(sorted(group))

    for name in sorted(arrows):
        if name not in index:
            visit(name)
    return found


def late_imports() -> list[Import]:
    """Imports of the package inside functions, outside the places that may have them."""
    packages = {name for name, path in modules().items() if path.name == "__init__.py"}
    return [
        one for one in imports() if one.late and one.source not in packages and one.source.split(".")[0] not in LATE
    ]


def upward() -> list[Import]:
    """Imports from a lower floor to a higher one."""
    floor = {name: height for height, names in enumerate(FLOORS) for name in names}
    return [
        one
        for one in imports()
        if one.source != "__init__"
        and one.target != "__init__"
        and floor.get(one.source.split(".")[0], 99) < floor.get(one.target.split(".")[0], 99)
    ]


def main() -> None:
    """Print the table."""
    known = modules()
    lines = {name: len(path.read_text().splitlines()) for name, path in known.items()}
    root = [path for path in known.values() if path.parent == PACKAGE]
    rows = {
        "lines of Python": sum(lines.values()),
        "of these, companions": sum(n for name, n in lines.items() if name.startswith("companions")),
        "modules": len(known),
        "files in the root": len(root),
        "modules in a circle": sum(map(len, circles())),
        "arrows upward": len(upward()),
        "late imports": len(late_imports()),
        "lines of C++ and CUDA": sum(
            len(path.read_text().splitlines())
            for path in (PACKAGE.parents[1] / "csrc").rglob("*")
            if path.suffix in (".cpp", ".cu", ".h", ".cuh")
        ),
    }
    for what, count in rows.items():
        print(f"| {what} | {count:,} |")


if __name__ == "__main__":
    main()
