"""The model's outputs as they are kept for each example: all of them, or the largest ones of many classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from scipy.special import logsumexp
from torch import Tensor

from npeff.errors import ArgumentError
from npeff.short_repr import short_repr

Array = npt.NDArray[Any]

MOST_OUTPUTS = 1024
"""Of more classes than this, not all logits are kept."""

N_LARGEST = 32
"""Logits that are then kept of an example."""

ARRAYS = ("logits", "logit_classes", "log_normaliser", "n_outputs")
"""Names in a file; the first one alone where all logits are kept."""


@dataclass(frozen=True, eq=False)
class Logits:
    """The outputs of n examples; up to 1,024 outputs it serves as the array ``(n, C)`` float32 itself.

    Of more classes the 32 largest logits and ``log Σ_y exp z_y`` are kept, from which probabilities follow: ``log p_y =
    z_y − log Σ exp z``. What then needs all of them, as ``logits[i]`` and ``numpy.asarray(logits)``, is refused.

    Attributes:
        values: ``(n, k)`` float32: all logits in order, k = C, or the largest, falling.
        classes: ``(n, k)`` int32: which outputs the values are; None: all.
        log_normaliser: ``(n,)`` float32 logarithm of the sum of ``exp`` over all outputs; None where all are kept.
        n_outputs: C.
    """

    values: Array
    classes: Array | None = None
    log_normaliser: Array | None = None
    n_outputs: int = -1

    __repr__ = short_repr

    @cached_property
    def largest(self) -> float:
        """The largest absolute value of all."""
        return max(float(self.values.max(initial=0.0)), -float(self.values.min(initial=0.0)))

    def __post_init__(self) -> None:
        if np.ndim(self.values) != 2:
            raise ArgumentError(f"logits: expected (n, C), got an array of shape {np.shape(self.values)}")
        n, k = self.values.shape
        if self.n_outputs < 0:
            object.__setattr__(self, "n_outputs", k)
        if (self.classes is None) != (self.log_normaliser is None) or (self.classes is None and self.n_outputs != k):
            raise ArgumentError("logits: expected all of them, or the largest with their classes and the normaliser")
        shapes = [None if array is None else array.shape for array in (self.classes, self.log_normaliser)]
        if shapes not in ([None, None], [(n, k), (n,)]):
            raise ArgumentError(f"logits: expected a class for each of {n} × {k} logits and {n} normalisers")

    @classmethod
    def of(cls, outputs: Logits | Array) -> Logits:
        """Take an array ``(n, C)`` as all logits; :class:`Logits` as they are."""
        return outputs if isinstance(outputs, cls) else cls(outputs)  # type: ignore[arg-type]

    @classmethod
    def kept(cls, arrays: Sequence[Array], n_outputs: int) -> Logits:
        """Make Logits of what :func:`largest` gives."""
        return cls.from_arrays({**dict(zip(ARRAYS, arrays, strict=False)), "n_outputs": np.array(n_outputs)})

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, Array]) -> Logits:
        """Make Logits of the arrays by the names of their datasets; see :meth:`arrays`."""
        values, classes, log_normaliser, n_outputs = (arrays.get(name) for name in ARRAYS)
        assert values is not None, "every file has logits"
        return cls(values, classes, log_normaliser, -1 if n_outputs is None else int(n_outputs))

    def arrays(self) -> dict[str, Array]:
        """Return the arrays by the names of their datasets in a file."""
        if self.classes is None or self.log_normaliser is None:
            return {"logits": self.values}
        found = (self.values, self.classes, self.log_normaliser, np.array(self.n_outputs, np.int64))
        return dict(zip(ARRAYS, found, strict=True))

    @property
    def shape(self) -> tuple[int, int]:
        """``(n, C)``, whatever is kept."""
        return len(self.values), self.n_outputs

    @property
    def nbytes(self) -> int:
        """Bytes of what is kept."""
        return sum(array.nbytes for array in self.arrays().values())

    def __len__(self) -> int:
        return len(self.values)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        """All logits.

        Raises:
            ArgumentError: They are not kept.
        """
        if self.classes is not None:
            raise ArgumentError(
                f"logits: of {self.n_outputs:,} outputs the {self.values.shape[1]} largest are kept (more than "
                f"{MOST_OUTPUTS:,} outputs are not kept whole); use logits.top(k), logits.log_probability(classes), "
                "logits.confidence or logits.take(examples), or call the model on the examples (their ids say which)"
            )
        return np.array(self.values, dtype) if copy or dtype is not None else self.values

    def __getitem__(self, which: Any) -> Any:
        """Index all logits as an array.

        Raises:
            ArgumentError: They are not kept.
        """
        return np.asarray(self)[which]

    def take(self, examples: Any) -> Logits:
        """Return the outputs of some examples: integers, a slice or a mask."""
        if self.classes is None or self.log_normaliser is None:
            return Logits(self.values[examples])
        return Logits(self.values[examples], self.classes[examples], self.log_normaliser[examples], self.n_outputs)

    def same(self, other: Logits) -> bool:
        """Say whether both keep the same numbers, to the bit."""
        ours, theirs = self.arrays(), other.arrays()
        return ours.keys() == theirs.keys() and all(np.array_equal(ours[name], theirs[name]) for name in ours)

    # ---- predictions ---------------------------------------------------------------------------------------

    @property
    def predicted(self) -> Array:
        """``(n,)`` int64 class with the largest logit, the first among equals; −1 where there are no outputs."""
        if not self.values.shape[1]:
            return np.full(len(self), -1, np.int64)
        first = np.argmax(self.values, axis=1)
        found = first if self.classes is None else np.take_along_axis(self.classes, first[:, None], 1)[:, 0]
        return np.asarray(found, np.int64)

    def _log_probabilities(self) -> Array:
        values = np.asarray(self.values, np.float64)
        total = logsumexp(values, axis=1) if self.log_normaliser is None else self.log_normaliser.astype(np.float64)
        return np.minimum(values - total[:, None], 0.0)

    def top(self, k: int = N_LARGEST) -> tuple[Array, Array]:
        """Find the likeliest classes of each example.

        Args:
            k: How many; fewer are given where fewer are kept.

        Returns:
            The classes ``(n, ≤ k)`` int64 and their probabilities ``(n, ≤ k)`` float64, falling.
        """
        order = np.argsort(-self.values, axis=1, kind="stable")[:, :k]
        classes = order if self.classes is None else np.take_along_axis(self.classes, order, 1)
        return classes.astype(np.int64), np.exp(np.take_along_axis(self._log_probabilities(), order, 1))

    def log_probability(self, classes: Array) -> Array:
        """Find the log-probability of a class per example.

        Args:
            classes: ``(n,)`` integers.

        Returns:
            ``(n,)`` float64; NaN where the class is none of the outputs, or its logit is not kept.
        """
        own = np.arange(self.values.shape[1])[None] if self.classes is None else self.classes
        hit = own == np.asarray(classes)[:, None]
        return np.where(hit.any(1), np.where(hit, self._log_probabilities(), 0.0).sum(1), np.nan)

    @property
    def confidence(self) -> Array:
        """``(n,)`` float64 probability of the likeliest class."""
        return np.exp(self._log_probabilities().max(1))

    # ---- beside other outputs of the same examples ---------------------------------------------------------

    @property
    def numbers(self) -> Tensor:
        """``(n, k)`` float32, or ``(n, k + 1)`` with the normaliser: all that is kept, to compare."""
        kept = torch.from_numpy(np.array(self.values, np.float32))
        if self.log_normaliser is None:
            return kept
        return torch.cat([kept, torch.from_numpy(np.array(self.log_normaliser))[:, None]], 1)

    def numbers_of(self, outputs: Tensor) -> Tensor:
        """Compute :attr:`numbers` of other outputs ``(n, C)`` of these examples, in their dtype, on the processor."""
        if self.classes is None:
            return outputs.cpu()
        kept = torch.from_numpy(np.array(self.classes, np.int64)).to(outputs.device)
        wide = outputs.to(torch.promote_types(outputs.dtype, torch.float32))
        return torch.cat([wide.gather(1, kept), wide.logsumexp(1, keepdim=True)], 1).cpu()

    def restored(self, outputs: Tensor) -> Tensor:
        """Return outputs ``(n, C)`` of the same examples as float64, with the kept numbers where both differ.

        An example whose outputs are what is kept, once they are rounded to float32, stays as it is.
        """
        shape = (len(self), self.values.shape[1])
        classes = np.broadcast_to(np.arange(shape[1]), shape) if self.classes is None else self.classes
        kept = torch.from_numpy(classes.astype(np.int64)).to(outputs.device)
        stored = torch.from_numpy(np.array(self.values, np.float32)).to(outputs.device)
        own = outputs.gather(1, kept)
        same = (own.to(torch.float32) == stored).all(dim=1)
        return outputs.double().scatter(1, kept, torch.where(same[:, None], own.double(), stored.double()))


def largest(outputs: Tensor, over_classes: bool) -> tuple[Tensor, ...]:
    """Reduce outputs ``(b, C)``, on their device, to copies of what is kept of them.

    Returns:
        The first one or three arguments of :class:`Logits`; outputs that are not ``over_classes`` are kept whole.
    """
    wide = outputs.detach().to(torch.float32, copy=True)
    if outputs.shape[1] <= MOST_OUTPUTS or not over_classes:
        return (wide,)
    values, classes = wide.topk(N_LARGEST, dim=1)
    return values, classes.to(torch.int32), wide.logsumexp(1)


def joined(parts: Sequence[Mapping[str, Array]]) -> dict[str, Array]:
    """Join arrays of several groups of examples, at least one, by name; take a single number from the first group."""
    return {
        name: array if array.ndim == 0 else np.concatenate([part[name] for part in parts])
        for name, array in parts[0].items()
    }
