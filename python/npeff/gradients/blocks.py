"""Form blocks of per-example gradients from a parameter's rules: tile by tile, in memory that is used again."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from npeff.gradients.rules.base import Rule, Scratch, SmallRule
from npeff.gradients.rules.layers import Embedding, MatrixProduct
from npeff.kernels import outer_gram
from npeff.models import devices
from npeff.models.parameters import Parameter

TILE_ELEMENTS = 1 << 20
"""Most elements (columns × parameters × examples) made at a time: 4 MB stay in the cache until compressed."""


def tile_elements(device: torch.device) -> int:
    """Return the most elements to make at a time: devices want fewer, larger kernels (how large is not measured)."""
    return TILE_ELEMENTS * (8 if devices.has_own_memory(device) else 1)


GATHERED = 32
"""Most small parameters that are gathered in one block."""

_CANCELLATION = 64.0
"""How much larger than their sum the terms of an inner product may be in float32."""


@dataclass(frozen=True)
class Block:
    """Some per-example gradients, on their way to compression; overwritten when the next block is asked for.

    Attributes:
        parameter: The parameter, with its place in the flat vector; the first of several small ones that were gathered.
        examples: Which examples of the batch, b'.
        values: ``(b', R, g, w)``: g runs of w consecutive elements, per example and column. Squared blocks
            have R = 1.
        starts: Where the runs start in the flat vector: ``(b', g)`` int64, g numbers that hold for every example, or
            one number when g = 1.
        gram: ``(b', R, R)`` float64 inner products of the columns, if they were cheaper to get than from the
            values.

    Where each sequence of the batch has several places, ``examples`` are their slots, K per sequence: see
    :meth:`npeff.gradients.engine.PerExampleGradients.blocks`.
    """

    parameter: Parameter
    examples: slice
    values: Tensor
    starts: Tensor | tuple[int, ...] | int
    gram: Tensor | None = None

    def formed(self) -> Block:
        """Return the block itself, as :meth:`Pairs.formed` does of factors."""
        return self


@dataclass(frozen=True)
class Pairs:
    """Per-example gradients of a matrix or a convolution as factors that were not multiplied: ``Σ_t δ_t ⊗ a_t``.

    Attributes:
        parameter: The parameter, with its place in the flat vector.
        examples: Which examples of the batch, b'.
        delta: ``(b'/K, T, K·R, n)``.
        inputs: ``(b'/K, T, k)``.
        turned: The parameter is (k, n), not (n, k, …).
        n_slots: K neighbouring examples that share their inputs.
    """

    parameter: Parameter
    examples: slice
    delta: Tensor
    inputs: Tensor
    turned: bool
    n_slots: int = 1

    def of_example(self, i: int) -> tuple[Tensor, Tensor]:
        """Return δ ``(T, R, n)`` and inputs ``(T, k)`` of the i-th of these examples."""
        sequence, slot = divmod(i, self.n_slots)
        n_columns = self.delta.shape[2] // self.n_slots
        return self.delta[sequence, :, slot * n_columns : (slot + 1) * n_columns], self.inputs[sequence]

    def gram(self) -> Tensor:
        """Compute ``(b', R, R)`` float64 inner products of the columns: ``Σ_tu (a_t·a_u) (δ_tr·δ_us)``.

        The CPU computes in float64 where positions cancel so much that float32's rounding would show.
        """
        slots = self.n_slots
        if self.delta.shape[1] == 1:
            delta = split(self.delta[:, 0].to(torch.float64), slots)
            squares = self.inputs.to(torch.float64).square().sum(dim=(1, 2)).repeat_interleave(slots)
            return delta @ delta.mT * squares[:, None, None]
        gram, size = outer_gram(self.delta, self.inputs, slots)
        # To look at it would mean waiting for the device.
        if devices.has_own_memory(gram.device) or self.delta.dtype == torch.float64:
            return gram.to(torch.float64)
        doubtful = torch.nonzero(size > _CANCELLATION * gram.diagonal(dim1=1, dim2=2).sum(dim=1)).flatten().tolist()
        for example in doubtful:
            delta, inputs = (part[None].to(torch.float64) for part in self.of_example(example))
            gram[example] = outer_gram(delta, inputs)[0][0]
        return gram

    def squared(self) -> Pairs:
        """Return the factors of the sum of squares over columns, for T = 1: ``(Σ_r δ_r²) ⊗ a²``."""
        delta = split(self.delta.square().transpose(1, 2), self.n_slots).sum(dim=1)  # (b', T, n)
        delta = delta.reshape(-1, self.n_slots, *delta.shape[1:]).transpose(1, 2)
        return replace(self, delta=delta, inputs=self.inputs.square())

    def formed(self) -> Block:
        """Form the gradients themselves."""
        order = "btrn,btk->brkn" if self.turned else "btrn,btk->brnk"
        values = split(torch.einsum(order, self.delta, self.inputs).flatten(2)[:, :, None], self.n_slots)
        return Block(self.parameter, self.examples, values, self.parameter.offset)


def split(by_sequence: Tensor, n_slots: int) -> Tensor:
    """Tell the slots' columns apart: ``(b, K·R, …)`` to ``(b·K, R, …)``."""
    if n_slots == 1:
        return by_sequence
    b, columns = by_sequence.shape[:2]
    return by_sequence.reshape(b * n_slots, columns // n_slots, *by_sequence.shape[2:])


@dataclass(frozen=True)
class Tiling:
    """How the gradients of a batch are cut into blocks, in memory that is used again.

    Attributes:
        n_examples: Examples that the rules know, b.
        n_columns: Columns that the rules have stored.
        elements: Most elements of a block, unless one example has more.
        squared: Blocks are Σ over columns of the squares.
        n_slots: K examples of which each of the b has the columns, side by side.
    """

    n_examples: int
    n_columns: int
    elements: int
    squared: bool = False
    n_slots: int = 1

    def _some(self, size: int) -> Iterator[slice]:
        """Some examples at a time, each of a size in elements."""
        step = max(1, self.elements // max(1, size))
        for start in range(0, self.n_examples, step):
            yield slice(start, min(start + step, self.n_examples))

    def _slots(self, examples: slice) -> slice:
        return slice(examples.start * self.n_slots, examples.stop * self.n_slots)

    def pairs(self, parameter: Parameter, rules: list[Rule]) -> Iterator[Pairs] | None:
        """Return one parameter's gradients as factors, some examples at a time; None where they are no such sums."""
        rule = rules[0]
        sizes = rule.pair_sizes() if len(rules) == 1 and _is_the_parameter(rule, parameter) else None
        if sizes is None:
            return None
        t, n, k = sizes

        def factors() -> Iterator[Pairs]:
            for examples in self._some(t * max(self.n_columns * n, k)):
                found = rule.pairs(examples)
                assert found is not None
                yield Pairs(parameter, self._slots(examples), *found, self.n_slots)

        return factors()

    def tiles(self, parameter: Parameter, rules: list[Rule]) -> Iterator[Block]:
        """Yield the gradients of one parameter, those of its uses summed, as many examples and rows at a time as fit.

        Each block is overwritten by the next.
        """
        row_size = math.prod(parameter.shape[1:])
        per_row = self.n_columns * row_size
        n_rows = parameter.shape[0] if parameter.shape else 1
        rule = rules[0]
        alone = len(rules) == 1 and _is_the_parameter(rule, parameter)
        if alone and isinstance(rule, Embedding):
            for examples in self._some(per_row * rule.layout.positions):
                values, table_rows, _ = rule.looked_up(examples)
                yield self._on_rows(parameter, examples, values, table_rows, rule.scratch)
            return
        n_tile_rows = max(1, min(n_rows, self.elements // max(1, per_row)))
        for examples in self._some(per_row * n_rows if n_tile_rows == n_rows else self.elements):
            for row in range(0, n_rows, n_tile_rows):
                rows = slice(row, min(row + n_tile_rows, n_rows))
                gram = square = None
                if self.n_slots == 1 and self.squared and alone:
                    square = rule.square(examples, rows)
                elif self.n_slots == 1 and not self.squared and len(rules) == 1 and rule.value.reshaped:
                    gram = rule.gram(examples)
                    if gram is not None and row > 0:
                        gram = torch.zeros_like(gram)  # the first tile of rows brought all of it
                if square is None:
                    values = split(summed(parameter, rules, examples, rows), self.n_slots)
                    values = squares(values, rule.scratch)[:, None] if self.squared else values
                else:
                    values = square[:, None]
                values = values.reshape(*values.shape[:2], 1, -1)
                yield Block(parameter, self._slots(examples), values, parameter.offset + row * row_size, gram)

    def _on_rows(
        self, parameter: Parameter, examples: slice, values: Tensor, table_rows: Tensor, scratch: Scratch
    ) -> Block:
        """Gradients ``(b', K·R, u, d)`` on rows ``(b', u)`` of a table as a block."""
        starts = (parameter.offset + table_rows * values.shape[3]).repeat_interleave(self.n_slots, dim=0)
        values = split(values, self.n_slots)
        values = squares(values, scratch)[:, None] if self.squared else values
        return Block(parameter, self._slots(examples), values, starts)

    def head_of_tied(self, parameter: Parameter, rules: list[Rule]) -> MatrixProduct | None:
        """Find the output layer's product of a large table that is also an embedding; None where it has other uses."""
        if len(rules) != 2 or self.n_columns * parameter.numel <= self.elements:
            return None
        head = next((rule for rule in rules if isinstance(rule, MatrixProduct) and rule.by_rows), None)
        table = next((rule for rule in rules if isinstance(rule, Embedding)), None)
        whole = head is not None and table is not None and all(_is_the_parameter(rule, parameter) for rule in rules)
        return head if whole else None

    def tied(self, parameter: Parameter, rules: list[Rule]) -> Iterator[Block | Pairs]:
        """Yield the gradients of a table that is used as embedding and as output layer, without forming them.

        Rows that an example looks up come as runs, with what the output layer adds to them. All other rows come as
        factors of the output layer's gradient, whose δ is zero on the rows that came before.
        """
        head, table = rules if isinstance(rules[0], MatrixProduct) else rules[::-1]
        assert isinstance(head, MatrixProduct) and isinstance(table, Embedding)
        t, n, k = head.pair_sizes()
        for examples in self._some(self.n_columns * (t * n + table.layout.positions * k)):
            values, table_rows, counts = table.looked_up(examples)
            delta, inputs, turned = head.pairs(examples)
            rows = table_rows[:, None, None].expand(*delta.shape[:3], -1)
            here = delta.gather(3, rows) * counts[:, None, None]
            values += torch.einsum("btru,btk->bruk", here, inputs)
            yield self._on_rows(parameter, examples, values, table_rows, table.scratch)
            delta = delta.scatter(3, rows, 0.0)
            yield Pairs(parameter, self._slots(examples), delta, inputs, turned, self.n_slots)

    def is_small(self, parameter: Parameter, rules: list[Rule]) -> bool:
        """Say whether gradients are worth gathering with others of their size: those of biases, scales and shifts."""
        return (
            len(rules) == 1
            and isinstance(rules[0], SmallRule)
            and len(parameter.shape) <= 1
            and _is_the_parameter(rules[0], parameter)
            and GATHERED * self.n_examples * self.n_columns * parameter.numel <= self.elements
        )

    def gathered(self, small: list[tuple[Parameter, Rule]]) -> Iterator[Block]:
        """Yield the gradients of small parameters, each given with its rule, several of one size to a block."""
        by_size: dict[tuple[int, torch.dtype], list[tuple[Parameter, Tensor]]] = {}
        examples = slice(0, self.n_examples)
        for parameter, rule in small:
            values = rule.block(examples, slice(None))
            values = values.reshape(*values.shape[:2], -1)
            by_size.setdefault((values.shape[2], values.dtype), []).append((parameter, values))
        for members in by_size.values():
            for start in range(0, len(members), GATHERED):
                some = members[start : start + GATHERED]
                values = split(torch.stack([values for _, values in some], dim=2), self.n_slots)
                starts = tuple(parameter.offset for parameter, _ in some)
                if self.squared:
                    values = squares(values, small[0][1].scratch)[:, None]
                yield Block(some[0][0], self._slots(examples), values, starts)


def summed(parameter: Parameter, rules: list[Rule], examples: slice, rows: slice) -> Tensor:
    """Sum the gradients of a parameter's uses on some of its rows, ``(b', R, p, …)``."""
    total: Tensor | None = None
    for rule in rules:
        if _is_the_parameter(rule, parameter):
            block = rule.block(examples, rows)
        else:
            block = rule.to_parameter(rule.block(examples, slice(None)))
            block = block[:, :, rows] if parameter.shape else block
        if len(rules) == 1:
            return block
        if total is None:
            total = rule.scratch.take("total", tuple(block.shape), block).copy_(block)
        else:
            total.add_(block)
    assert total is not None, "a parameter with rules is used"
    return total


def _is_the_parameter(rule: Rule, parameter: Parameter) -> bool:
    """Whether the rule's operand is the parameter as it is, not a part of it, or something made of it."""
    return rule.value.reshaped and rule.value.shape == parameter.shape


def squares(block: Tensor, scratch: Scratch) -> Tensor:
    """Sum the squares over columns, ``(b, R, …)`` to ``(b, …)``: column by column, the fastest order."""
    total = scratch.take("squares", (len(block), *block.shape[2:]), block)
    if block.shape[1] == 0:
        return total.zero_()
    torch.mul(block[:, 0], block[:, 0], out=total)
    for column in range(1, block.shape[1]):
        total.addcmul_(block[:, column], block[:, column])
    return total
