"""Which of all examples and rows a process holds, and its share of random numbers that do not depend on it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from npeff.decomposition.communicator import LOCAL, Communicator

CHUNK = 1 << 20
"""Random numbers drawn at a time (a multiple of 16, in which torch draws normal ones)."""


@dataclass(frozen=True)
class Place:
    """A process's block of examples and rows among those of all processes.

    Attributes:
        comm: The processes.
        first_example: Examples before it.
        n_examples: Examples of all processes.
        first_row: Rows before it.
        n_rows: Rows of all processes.
    """

    comm: Communicator
    first_example: int
    n_examples: int
    first_row: int
    n_rows: int

    def own(self, examples: Iterable[int], n_own: int) -> Iterator[tuple[int, int]]:
        """Of examples numbered over all processes: position in the list, and number among this process's ``n_own``."""
        for position, example in enumerate(examples):
            if 0 <= example - self.first_example < n_own:
                yield position, example - self.first_example

    def normal(self, r: int, n_own: int, generator: torch.Generator) -> Tensor:
        """This process's columns of ``torch.randn(r, n_rows)``, float64; the generators stay in step."""
        own = torch.empty(r, n_own, dtype=torch.float64)
        for start, stop in _chunks(self.n_rows * r):
            drawn = torch.randn(stop - start, generator=generator, dtype=torch.float64)
            for j in range(start // self.n_rows, -(-stop // self.n_rows)):
                row = j * self.n_rows + self.first_row  # where this process's part of row j begins
                lo, hi = max(start, row), min(stop, row + n_own)
                if lo < hi:
                    own[j, lo - row : hi - row] = drawn[lo - start : hi - start]
        return own


def _chunks(count: int) -> Iterator[tuple[int, int]]:
    """Pieces of CHUNK numbers; the last is longer rather than short, as torch draws fewer than 16 in another way."""
    start = 0
    while start < count:
        stop = count if count - start < 2 * CHUNK else start + CHUNK
        yield start, stop
        start = stop


def place_of(space: Any, n_examples: int) -> Place:
    """The place of a space's rows: all there are, unless the space says otherwise."""
    found = getattr(space, "place", None)
    return found if isinstance(found, Place) else Place(LOCAL, 0, n_examples, 0, space.n_rows)


def comm_of(space: Any) -> Communicator:
    """The processes that a space's rows are spread over."""
    return place_of(space, 0).comm
