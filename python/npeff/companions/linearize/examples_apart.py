"""Operations that keep examples apart, told by their name and shapes: those of usual networks over batches."""

from __future__ import annotations

from torch import Tensor

from npeff.companions.linearize.names import BY_POSITION, POOLING, SAME_ORDER
from npeff.companions.linearize.rules import Call


def examples_apart(call: Call, inputs: tuple[Tensor, ...], output: Tensor) -> bool:
    """Whether row i of the output depends on row i of the inputs alone, rows being the first dimension.

    Sure where it says so; an operation that is not known here may keep examples apart all the same.

    Args:
        call: The operation.
        inputs: What of its arguments depends on the point.
        output: What it gave.
    """
    n = output.shape[0] if output.dim() > 1 else 0
    if not n or not inputs or any(v.dim() < 2 or v.shape[0] != n for v in inputs):
        return False
    if call.name in SAME_ORDER:
        return True  # row by row in memory's order, and the rows are as many as before
    if call.name in BY_POSITION:
        return all(v.dim() == output.dim() for v in inputs)
    if call.name in POOLING:
        return output.dim() == (4 if "2d" in call.name else 5)
    if call.name == "convolution":
        return not call.varies(1) and inputs[0].dim() == call.args[1].dim()
    if call.name == "mm":
        return not call.varies(1)
    if call.name == "addmm":
        return not call.varies(0) and not call.varies(2)
    if call.name in ("mean", "sum"):
        dims = call.argument(1, "dim", ())
        return bool(dims) and all(d % inputs[0].dim() for d in dims)
    return False
