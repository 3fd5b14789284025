"""What of each example's rows is kept."""

from __future__ import annotations

from dataclasses import dataclass

from npeff.errors import ArgumentError


@dataclass(frozen=True)
class TopK:
    """Keep the k entries of largest magnitude over all rows of an example together (Matena & Raffel 2023).

    Exact; ties go to the lower (row, parameter) index; exact zeros are never kept.

    Attributes:
        k: Entries per example.
    """

    k: int

    def __post_init__(self) -> None:
        if isinstance(self.k, bool) or not isinstance(self.k, int) or self.k < 1:
            raise ArgumentError(f"k: expected an integer ≥ 1, got {self.k!r}")
