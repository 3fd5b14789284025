"""What to choose under a budget of memory and disk, and why."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from npeff.compress import GramOnly, Sketch, TopK
from npeff.memory import format_bytes

if TYPE_CHECKING:
    from npeff.planning.choices import Choice

ENOUGH_KEPT = 0.9
"""Share of the Fisher's norm from which on a larger k is not worth its bytes."""


@dataclass(frozen=True)
class Advice:
    """A recommended way.

    Attributes:
        kind: ``"low_rank"`` or ``"diagonal"``.
        name: The way; empty where nothing fits.
        reason: Why this one, with the numbers that decide.
        flags: Of ``npeff fishers``.
    """

    kind: str
    name: str
    reason: str
    flags: str


def advise(choices: Sequence[Choice], memory: int, disk: int) -> list[Advice]:
    """One recommendation per kind: the most faithful way that fits, and of equals the smallest.

    Exact rows where file and memory allow; then exact inner products alone; then the smallest top-k that keeps
    nine tenths of the Fisher's norm; then the way that keeps most: a large top-k, or a sketch, whose error does not
    depend on how the energy is spread.
    """
    found = []
    for kind in dict.fromkeys(choice.kind for choice in choices):
        mine = [choice for choice in choices if choice.kind == kind]
        fitting = [choice for choice in mine if _fits(choice, memory, disk)]
        found.append(_pick(kind, fitting) if fitting else _nothing(kind, mine, memory, disk))
    return found


def _fits(choice: Choice, memory: int, disk: int) -> bool:
    solving = choice.decomposition.memory_bytes if choice.decomposition is not None else 0
    return choice.disk_bytes <= disk and max(choice.memory_bytes, solving) <= memory


def _pick(kind: str, fitting: Sequence[Choice]) -> Advice:
    diagonal = " --kind diagonal" if kind == "diagonal" else ""
    exact = next((choice for choice in fitting if choice.compress is None), None)
    if exact is not None:
        return Advice(kind, exact.name, f"everything is kept, and {_takes(exact)}", "--exact" + diagonal)
    gram = next((choice for choice in fitting if isinstance(choice.compress, GramOnly)), None)
    if gram is not None:
        reason = f"exact rows do not fit, their inner products do: nothing is lost to the solver, and {_takes(gram)}"
        return Advice(kind, gram.name, reason, "--gram-only")
    largest = [choice for choice in fitting if isinstance(choice.compress, TopK)]
    enough = [choice for choice in largest if (choice.kept or 0) >= ENOUGH_KEPT]
    if enough:
        best = min(enough, key=lambda choice: choice.disk_bytes)
        reason = f"the smallest that keeps {ENOUGH_KEPT:.0%} of the Fisher's norm ({best.kept:.2f}); {_takes(best)}"
        assert isinstance(best.compress, TopK)
        return Advice(kind, best.name, reason, f"--top-k {best.compress.k}{diagonal}")
    sketches = [choice for choice in fitting if isinstance(choice.compress, Sketch)]
    if sketches:
        best = max(sketches, key=lambda choice: choice.disk_bytes)
        assert isinstance(best.compress, Sketch)
        kept = max((choice.kept or 0 for choice in largest), default=0.0)
        reason = (
            f"no top-k that fits keeps {ENOUGH_KEPT:.0%} of the Fisher's norm (most {kept:.2f}); inner "
            f"products of sketches have a standard deviation of at most {(2 / best.compress.d) ** 0.5:.1%} of the "
            f"norms, however the energy is spread; {_takes(best)}"
        )
        return Advice(kind, best.name, reason, f"--sketch {best.compress.d}")
    best = max(largest, key=lambda choice: choice.kept or 0)
    assert isinstance(best.compress, TopK)
    reason = f"keeps most of what fits, {best.kept or 0:.2f} of the Fisher's norm; {_takes(best)}"
    return Advice(kind, best.name, reason, f"--top-k {best.compress.k}{diagonal}")


def _takes(choice: Choice) -> str:
    return f"it takes {format_bytes(choice.disk_bytes)} of disk and {format_bytes(choice.memory_bytes)} of memory"


def _nothing(kind: str, mine: Sequence[Choice], memory: int, disk: int) -> Advice:
    least = min(mine, key=lambda choice: choice.disk_bytes)
    solving = least.decomposition.memory_bytes if least.decomposition is not None else 0
    needs = max(least.memory_bytes, solving)
    reason = (
        f"nothing fits into {format_bytes(memory)} of memory and {format_bytes(disk)} of disk; {least.name}, the "
        f"smallest, takes {format_bytes(needs)} and {format_bytes(least.disk_bytes)}: allow more, select parameters, "
        "or take fewer examples or passes (rank=, energy=)"
    )
    return Advice(kind, "", reason, "")
