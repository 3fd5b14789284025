"""What a computation will take: the result of planning, as numbers and as a table for the terminal."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Literal

from npeff.models.memory import format_bytes
from npeff.planning.advice import Advice
from npeff.planning.choices import Choice
from npeff.short_repr import short_repr

SLOW = ("torch.func", "loop")
SHOWN = 8

Source = Literal["given", "counted", "upper bound"]


@dataclass(frozen=True)
class Plan:
    """What a computation will take; ``str(plan)`` is a table for the terminal.

    Attributes:
        model: Its class.
        n_parameters: Selected parameters, m.
        n_examples: Examples reckoned with.
        examples_from: ``"given"``, ``"counted"``, or an ``"upper bound"`` from the number of batches.
        n_outputs: Logits, C.
        passes: Backward passes per example, mean over the trial's examples.
        passes_vary: Whether they differ between examples.
        coverage: Per parameter, the gradient rule that serves it, and why.
        batch_size: Examples per batch, mean over the trial.
        trial_batches: Batches that were computed.
        one_off_seconds: Start, choice of rules and self-check: once per run.
        seconds_per_example: After that, of the first kind asked for.
        write_rate: Bytes per second to disk, merging included.
        process_bytes: Held before: Python, torch, the model, the first batches.
        memory: Bytes of memory reckoned with.
        disk: Bytes of disk reckoned with.
        choices: The ways to keep the Fishers.
        advice: Recommended ones, each with its reason.
    """

    model: str
    n_parameters: int
    n_examples: int
    examples_from: Source
    n_outputs: int
    passes: float
    passes_vary: bool
    coverage: list[dict[str, str]]
    batch_size: float
    trial_batches: int
    one_off_seconds: float
    seconds_per_example: float
    write_rate: float
    process_bytes: int
    memory: int
    disk: int
    choices: list[Choice]
    advice: list[Advice]

    __repr__ = short_repr

    def to_json(self) -> str:
        """Everything, as one JSON document."""
        described = asdict(self)
        for choice, own in zip(described["choices"], self.choices, strict=True):
            choice["compress"] = None if own.compress is None else {type(own.compress).__name__: choice["compress"]}
        return json.dumps(described, indent=1)

    def __str__(self) -> str:
        """The table."""
        return plan_table(self)


def plan_table(plan: Plan) -> str:
    """The plan as lines of at most about 110 characters."""
    counted = {"given": "", "counted": "", "upper bound": " at most"}[plan.examples_from]
    passes = f"{plan.passes:.1f} on average" if plan.passes_vary else f"{plan.passes:.0f}"
    lines = [
        f"{plan.model}: {plan.n_parameters:,} parameters, {plan.n_outputs} outputs;"
        f"{counted} {plan.n_examples:,} examples in batches of {plan.batch_size:g}",
        f"backward passes per example: {passes}",
        *_coverage(plan),
        f"measured on {plan.trial_batches} batches: {format_seconds(plan.one_off_seconds)} once (start, self-check), "
        f"then {1e3 * plan.seconds_per_example:.3g} ms an example; disk {format_bytes(plan.write_rate)}/s",
        f"memory of the process before: {format_bytes(plan.process_bytes)}",
    ]
    for kind, choices in groupby(plan.choices, key=lambda choice: choice.kind):
        lines += ["", f"{kind} Fishers", *_rows(list(choices))]
    lines += ["", f"within {format_bytes(plan.memory)} of memory and {format_bytes(plan.disk)} of disk:"]
    for advice in plan.advice:
        lines.append(f"  {advice.kind}: {advice.name or 'none'} — {advice.reason}")
        if advice.flags:
            lines.append(f"    npeff fishers … {advice.flags}")
    return "\n".join(lines)


def _coverage(plan: Plan) -> list[str]:
    rules: dict[str, int] = {}
    for line in plan.coverage:
        rules[line["rule"]] = rules.get(line["rule"], 0) + 1
    served = ", ".join(f"{rule} {count}" for rule, count in sorted(rules.items(), key=lambda item: -item[1]))
    lines = [f"gradient rules (parameters each serves): {served}"]
    others = [line for line in plan.coverage if line["rule"] in (*SLOW, "zero", "left out")]
    lines += [f"  {line['parameter']}: {line['rule']} — {line['reason']}" for line in others[:SHOWN]]
    if len(others) > SHOWN:
        lines.append(f"  and {len(others) - SHOWN} more")
    return lines


def _rows(choices: Sequence[Choice]) -> list[str]:
    solved = any(choice.decomposition is not None for choice in choices)
    r = next((choice.decomposition.n_components for choice in choices if choice.decomposition is not None), 0)
    head = ["", "disk", "memory", "in memory", "time", "timed as", "norm kept"]
    measured = any(choice.gram_error for choice in choices)
    head += ["error of K"] if measured else []
    head += [f"decompose r={r}", "memory", "about"] if solved else []
    table = [head]
    for choice in choices:
        kept = "" if choice.kept is None else f"{choice.kept:.2f}"
        row = [
            choice.name,
            format_bytes(choice.disk_bytes),
            format_bytes(choice.memory_bytes),
            format_bytes(choice.in_memory_bytes),
            format_seconds(choice.seconds),
            choice.timed,
            kept,
        ]
        if measured:
            row.append("" if choice.gram_error is None else f"{choice.gram_error:.3f}")
        if solved and choice.decomposition is not None:
            solving = choice.decomposition
            row += [solving.space, format_bytes(solving.memory_bytes), format_seconds(solving.seconds)]
        table.append(row)
    widths = [max(len(row[i]) for row in table if i < len(row)) for i in range(len(head))]
    return [
        "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False)).rstrip() for row in table
    ]


def format_seconds(seconds: float | None) -> str:
    """``0.42 s``, ``12 min``, ``3.5 h``, ``2.1 days``."""
    if seconds is None:
        return "–"
    for size, unit in ((86_400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
