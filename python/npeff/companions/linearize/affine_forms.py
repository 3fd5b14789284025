"""Affine forms of torch's operations: how each is frozen at a point, and the operations that are linear as they are.

An operation's form is a function of the :class:`Call`, in the table :data:`AFFINE_FORMS`. It gives an :class:`Affine`
function of the inputs for each output, or for the first one where the others are constant.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Any, TypeVar

import torch
from torch import Tensor

from npeff.errors import ModelError


def names_in(text: str) -> frozenset[str]:
    """Split a text into names of operations."""
    return frozenset(text.split())


@dataclass(frozen=True)
class Affine:
    """An output's value as an affine function of tensors that depend on the input.

    Attributes:
        function: From their values; None where the output is constant (between kinks).
        inputs: The tensors, as they are at the point.
        pattern: Gates and positions that change at a kink.
        held: The part that was held, for an operation that is not piecewise linear.
    """

    function: Callable[..., Tensor] | None = None
    inputs: tuple[Tensor, ...] = ()
    pattern: tuple[Tensor, ...] = ()
    held: str = ""


@dataclass
class Call:
    """One recorded operation.

    Attributes:
        name: Without ``aten::``, and without the underscore of operations in place.
        function: The functional overload.
        args: Positional arguments, tensors at the point.
        kwargs: Keyword arguments.
        output: Its result.
        where: The module that it ran in, for messages.
        kind: That module's class.
        depends: Whether a tensor depends on the input.
        keep: Gives a copy, or the weight itself, of a tensor that the frozen operation holds constant.
        kept: The tensors that were kept.
    """

    name: str
    function: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any
    where: str
    kind: str
    depends: Callable[[Tensor], bool]
    keep: Callable[[Tensor], Tensor]
    kept: list[Tensor] = field(default_factory=list)

    def constant(self, tensor: Tensor) -> Tensor:
        """Keep a tensor as a constant of the frozen operation."""
        self.kept.append(tensor)
        return self.keep(tensor)

    def argument(self, position: int, name: str, default: Any = None) -> Any:
        """Look an argument up by position or by name."""
        return self.args[position] if position < len(self.args) else self.kwargs.get(name, default)

    def varies(self, position: int) -> bool:
        """Tell whether an argument depends on the input."""
        return position < len(self.args) and any(map(self.depends, tensors_in(self.args[position])))

    def fixed(self, position: int, name: str) -> Any:
        """Look up an argument that must not depend on the input.

        Raises:
            ModelError: It does.
        """
        value = self.argument(position, name)
        if any(map(self.depends, tensors_in(value))):
            raise ModelError(
                f"model: {self.where} computes {self.name} with a {name} that depends on the input, which has no "
                "linear form here; linearise from a layer behind it (at=)"
            )
        return self.constant(value) if isinstance(value, Tensor) else value

    def replay(self, *positions: int) -> tuple[Callable[..., Any], tuple[Tensor, ...]]:
        """Return the operation as a function of the arguments that depend on the input, and the tensors it takes.

        By default all of them vary; with ``positions`` the arguments there, and the others are held.
        """
        inputs: list[Tensor] = []

        def filled(tree: Any, vary: bool) -> Callable[[tuple[Tensor, ...]], Any]:
            """Turn the tree into a function of the tensors that vary."""
            if isinstance(tree, (list, tuple)):
                kind, parts = type(tree), [filled(item, vary) for item in tree]
                return lambda values: kind(part(values) for part in parts)
            if isinstance(tree, Tensor) and vary and self.depends(tree):
                inputs.append(tree)
                return itemgetter(len(inputs) - 1)
            kept = self.constant(tree) if isinstance(tree, Tensor) else tree
            return lambda values: kept

        args = [filled(arg, not positions or i in positions) for i, arg in enumerate(self.args)]
        kwargs = {name: filled(value, not positions) for name, value in self.kwargs.items()}
        function = _REPLAYED_AS.get(self.name, self.function)

        def run(*values: Tensor) -> Any:
            return function(*(arg(values) for arg in args), **{name: value(values) for name, value in kwargs.items()})

        return run, tuple(inputs)


# In a replay values may lie in memory in another order than at the point, where no view of them exists.
_REPLAYED_AS: dict[str, Callable[..., Any]] = {"view": torch.reshape, "_unsafe_view": torch.reshape}

F = TypeVar("F", bound=Callable[[Call], Affine | tuple[Affine, ...]])

AFFINE_FORMS: dict[str, Callable[[Call], Affine | tuple[Affine, ...]]] = {}
"""By name of the operation; filled by the functions that :func:`affine_form` decorates."""


def affine_form(*names: str) -> Callable[[F], F]:
    """Put a function into the table, for the operations of these names."""

    def put(function: F) -> F:
        AFFINE_FORMS.update(dict.fromkeys(names, function))
        return function

    return put


def tensors_in(tree: Any) -> list[Tensor]:
    """List the tensors among an operation's arguments or outputs, in order."""
    if isinstance(tree, Tensor):
        return [tree]
    items = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, (tuple, list)) else ()
    return [tensor for item in items for tensor in tensors_in(item)]


CONSTANT = names_in(
    """
    zeros_like ones_like full_like empty_like new_zeros new_ones new_full new_empty new_empty_strided
    sign sgn round floor ceil trunc heaviside floor_divide
    """
)
"""Constant between jumps, or constant altogether."""

LINEAR = names_in(
    """
    view _unsafe_view reshape _reshape_alias permute transpose t expand slice select unsqueeze squeeze alias detach
    clone
    _to_copy lift_fresh contiguous split split_with_sizes unsafe_split unsafe_chunk unbind diagonal diag_embed tril triu
    unfold roll flip repeat index index_select _unsafe_index gather take neg positive
    sum mean cumsum trace nansum
    avg_pool1d avg_pool2d avg_pool3d _adaptive_avg_pool2d _adaptive_avg_pool3d adaptive_avg_pool1d
    upsample_nearest1d upsample_nearest2d upsample_nearest3d _upsample_nearest_exact1d _upsample_nearest_exact2d
    _upsample_nearest_exact3d upsample_linear1d upsample_bilinear2d upsample_trilinear3d upsample_bicubic2d
    _upsample_bilinear2d_aa _upsample_bicubic2d_aa grid_sampler_2d grid_sampler_3d
    reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d replication_pad2d replication_pad3d
    constant_pad_nd pixel_shuffle pixel_unshuffle channel_shuffle native_channel_shuffle im2col col2im
    max_unpool2d max_unpool3d
    """
)
"""Linear in the first argument (``constant_pad_nd``: affine); the others may not depend on the input."""

JOINT = names_in(
    """
    add sub rsub cat stack where masked_fill index_put index_fill index_add index_copy scatter scatter_add
    masked_scatter slice_scatter select_scatter diagonal_scatter
    """
)
"""Affine in all tensors together."""

FACTORS = {
    **dict.fromkeys(names_in("mul mm bmm mv dot convolution"), (0, 1)),
    **dict.fromkeys(names_in("addmm addmv addbmm baddbmm addr addcmul"), (1, 2)),
}
"""Linear in each of these arguments, affine in the rest."""


@affine_form(*CONSTANT)
def constant(call: Call) -> Affine:
    """Return the form of an output that depends on the input's shape alone, or on the side of a jump that it is on."""
    return Affine()


@affine_form(*LINEAR)
def linear(call: Call) -> Affine | tuple[Affine, ...]:
    """Return the form of layouts, sums, means, interpolation and copies, which are linear in the first argument."""
    for position in range(1, len(call.args)):
        if call.varies(position):
            call.fixed(position, f"{position + 1}th argument")
    return joint(call)


@affine_form(*JOINT)
def joint(call: Call) -> Affine | tuple[Affine, ...]:
    """Return the form of additions, concatenations and similar operations, which are affine in all tensors together."""
    run, inputs = call.replay()
    if isinstance(call.output, Tensor):
        return Affine(run, inputs)
    return tuple(Affine(lambda *values, i=i: run(*values)[i], inputs) for i in range(len(call.output)))


@affine_form(*FACTORS)
def product(call: Call) -> Affine:
    """Return the form of products and convolutions, which are linear in each factor.

    Where both factors depend on the input, each in turn varies while the other is held, and the mean is taken, which
    is exact at the point.
    """
    factors = [i for i in FACTORS[call.name] if call.varies(i)]
    if len(factors) < 2:
        run, inputs = call.replay()
        return Affine(run, inputs)
    others = [i for i in range(len(call.args)) if i not in FACTORS[call.name]]
    (first, a), (second, b) = (call.replay(i, *others) for i in factors)

    def mean(*values: Tensor) -> Tensor:
        return (first(*values[: len(a)]) + second(*values[len(a) :])) / 2

    return Affine(mean, (*a, *b), held="each factor in turn, half each,")


@affine_form("div")
def quotient(call: Call) -> Affine | tuple[Affine, ...]:
    """Return the form of a quotient: linear in the numerator; a denominator that depends on the input is held."""
    if call.argument(2, "rounding_mode"):
        return Affine()
    if not call.varies(1):
        return joint(call)
    if not call.varies(0):
        return Affine(held="value")
    run, inputs = call.replay(0)
    return Affine(run, inputs, held="denominator")


@affine_form("copy", "fill", "zero")
def overwritten(call: Call) -> Affine:
    """Return the form of a copy of the second argument, which overwrites the old value."""
    if not call.varies(1):
        call.fixed(1, "value")
        return Affine()
    shape, dtype = call.output.shape, call.output.dtype
    return Affine(lambda z: z.to(dtype).expand(shape), (call.args[1],))


ROW_BY_ROW = names_in(
    """
    relu leaky_relu _prelu_kernel prelu rrelu_with_noise threshold hardtanh clamp clamp_min clamp_max hardsigmoid
    softshrink hardshrink abs nan_to_num add sub rsub mul div neg positive clone detach alias contiguous
    native_batch_norm cudnn_batch_norm miopen_batch_norm _native_batch_norm_legit_no_training _batch_norm_no_update
    avg_pool2d _adaptive_avg_pool2d max_pool2d_with_indices adaptive_max_pool2d avg_pool3d _adaptive_avg_pool3d
    max_pool3d_with_indices adaptive_max_pool3d
    """
)
"""Number by number, or within windows of the last dimensions: never across the first dimension of arguments that have
as many dimensions as the result."""


def keeps_examples_apart(call: Call, inputs: tuple[Tensor, ...], output: Tensor) -> bool:
    """Tell whether row i of an output is known to depend on row i of the varying inputs alone.

    Known from names and shapes, for the operations of usual networks over batches; False where it is not known.
    """
    n = output.shape[0] if output.dim() > 1 else 0
    if not n or not inputs or any(v.dim() < 2 or v.shape[0] != n for v in inputs):
        return False
    if call.name in ("view", "_unsafe_view", "reshape", "_reshape_alias"):
        return True  # row by row in memory's order, and the rows are as many as before
    if call.name in ROW_BY_ROW:
        return all(v.dim() == output.dim() for v in inputs)
    if call.name in ("mm", "addmm", "convolution"):
        own = 1 if call.name == "addmm" else 0  # the factor with the rows; an unbatched convolution's are channels
        alone = not any(call.varies(i) for i in range(len(call.args)) if i != own)
        return alone and inputs[0].dim() == call.args[1].dim()
    if call.name in ("mean", "sum"):
        dims = call.argument(1, "dim", ())
        return bool(dims) and all(d % inputs[0].dim() for d in dims)
    return False
