"""Products with blocks of per-example gradients as they come from npeff's engine."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from npeff.gradients.tiles import Block, Pairs

Blocks = Iterable[Block | Pairs]
"""What the engine gives of a batch."""


def formed(blocks: Blocks) -> Iterator[Block]:
    """The blocks, with factors multiplied."""
    return (block.formed() if isinstance(block, Pairs) else block for block in blocks)


def place(block: Block, values: Tensor, mean: Tensor) -> None:
    """Add the sum over examples and columns of a block to a flat vector.

    Args:
        block: Says where.
        values: Its values ``(b', R, g, w)``, in the vector's dtype.
        mean: ``(m,)``; changed.
    """
    width = values.shape[3]
    if isinstance(block.starts, int):
        mean[block.starts : block.starts + width] += values.sum(dim=(0, 1, 2))
        return
    assert isinstance(block.starts, Tensor), "small parameters were not to be gathered"
    columns = block.starts[:, :, None] + torch.arange(width, device=mean.device)
    mean.index_add_(0, columns.reshape(-1), values.sum(dim=1).reshape(-1))


def scatter(block: Block, rows: Tensor) -> None:
    """Write a block into dense rows.

    Args:
        block: A block.
        rows: ``(b, R, m)`` of the whole batch, zero at first; changed.
    """
    values = block.values.to(rows.dtype)
    width = values.shape[3]
    target = rows[block.examples]
    if isinstance(block.starts, int):
        target[:, :, block.starts : block.starts + width] += values[:, :, 0]
        return
    assert isinstance(block.starts, Tensor), "small parameters were not to be gathered"
    columns = (block.starts[:, :, None] + torch.arange(width, device=rows.device)).flatten(1)
    target.scatter_add_(2, columns[:, None].expand(-1, values.shape[1], -1), values.flatten(2))


def contract(block: Block, vectors: Tensor, out: Tensor) -> None:
    """Add the inner products of a block's gradients with vectors.

    Args:
        block: A block with one column (R = 1).
        vectors: ``(k, m)``.
        out: ``(b, k)`` of the whole batch; changed.
    """
    values = block.values[:, 0].to(vectors.dtype)
    width = values.shape[2]
    if isinstance(block.starts, int):
        out[block.examples] += values[:, 0] @ vectors[:, block.starts : block.starts + width].T
        return
    assert isinstance(block.starts, Tensor), "small parameters were not to be gathered"
    reach = torch.arange(width, device=vectors.device)
    for row, (starts, value) in enumerate(zip(block.starts, values, strict=True), block.examples.start):
        out[row] += vectors[:, (starts[:, None] + reach).reshape(-1)] @ value.reshape(-1)
