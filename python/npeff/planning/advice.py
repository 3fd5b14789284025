"""What to choose under a budget of memory and disk, and why."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from npeff.fishers.options import GramOnly, Sketch, TopK
from npeff.models.memory import format_bytes
from npeff.planning.quality import SKETCH_ERROR, TOP_K_ERROR

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

    Exact rows where file and memory allow; then exact inner products alone; then the smallest top-k or sketch whose
    inner products were close enough to the exact ones in the trial (:mod:`npeff.planning.quality`), or, of the diagonal
    kind and where exact rows were too large to try, the smallest top-k that keeps nine tenths of the Fisher's norm and
    a sketch by its theory; then the closest one.
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
    faithful = [choice for choice in fitting if _is_faithful(choice)]
    best = min(faithful, key=lambda choice: choice.disk_bytes) if faithful else min(fitting, key=_unfaithfulness)
    reason = _measured(best)
    reason = f"the smallest that is faithful enough: {reason}" if faithful else f"the most faithful that fits: {reason}"
    if isinstance(best.compress, TopK):
        return Advice(kind, best.name, f"{reason}; {_takes(best)}", f"--top-k {best.compress.k}{diagonal}")
    assert isinstance(best.compress, Sketch)
    reason += "; vectors in parameter space take another pass (npeff recover, components.recover)"
    return Advice(kind, best.name, f"{reason}; {_takes(best)}", f"--sketch {best.compress.d}")


def _expected_error(choice: Choice) -> float | None:
    """Error of K: measured, or for sketches the standard deviation of an inner product, over the norms."""
    if choice.gram_error is not None or not isinstance(choice.compress, Sketch):
        return choice.gram_error
    return float((2 / choice.compress.d) ** 0.5)


def _is_faithful(choice: Choice) -> bool:
    error = _expected_error(choice)
    if error is None:
        return (choice.kept or 0) >= ENOUGH_KEPT
    return error <= (SKETCH_ERROR if isinstance(choice.compress, Sketch) else TOP_K_ERROR)


def _unfaithfulness(choice: Choice) -> float:
    error = _expected_error(choice)
    return 1 - (choice.kept or 0) if error is None else error


def _measured(choice: Choice) -> str:
    if choice.gram_error is not None:
        return f"on the trial's examples inner products of rows are off by {choice.gram_error:.3f} of their size"
    if isinstance(choice.compress, Sketch):
        spread = _expected_error(choice)
        return f"inner products of sketches have a standard deviation of at most {spread:.1%} of the norms"
    return f"it keeps {choice.kept or 0:.2f} of the Fisher's norm"


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
