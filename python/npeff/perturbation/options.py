"""The options of a perturbation, their checks, and the examples that they choose."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from npeff.components.components import Components
from npeff.errors import ArgumentError, check_integer, check_integers, check_number
from npeff.fishers.options import Likelihood

Array = npt.NDArray[Any]
Combine = Literal["each", "principal"] | Sequence[float]
Forward = Callable[[Any, Any], Any]
Reject = Literal["span", "sequential"]
Signs = Literal["both", 1, -1]

LAMBDAS = (0.1, 0.3, 0.5, 0.7, 0.9)
"""λ of a diagonal interpolation that are tried when none is given."""
FLOOR = 1e-6
"""Least value of the data's Fisher at unit norm: defines the interpolation where neither Fisher sees a parameter."""
TOLERANCE = 0.02
"""Relative distance from a wanted KL at which it counts as reached."""


@dataclass(frozen=True)
class PerturbOptions:
    """The keyword arguments of :func:`npeff.perturb`, which documents them; :func:`npeff.trace` has some of them."""

    magnitude: float | None = None
    target_kl: float | tuple[float, float] = 0.1
    sign: Signs = "both"
    combine: Combine = "each"
    reject: Reject | None = None
    max_sim: float | None = None
    top: int | Sequence[int] | Array = 32
    baseline: int | Literal["all"] | Sequence[int] | Array = 4096
    lam: float | Sequence[float] | None = None
    fisher: Mapping[str, torch.Tensor] | Array | None = None
    floor: float = FLOOR
    n_random: int = 8
    curve: int = 8
    unrelated: Iterable[Any] | None = None
    prompts: int | str | Sequence[str] | None = None
    n_tokens: int = 20
    confidence: float = 0.95
    n_resamples: int = 999
    forward: Forward | None = None
    likelihood: Likelihood | None = None
    device: torch.device | str | None = None
    seed: int = 0
    progress: bool = True

    @classmethod
    def checked(cls, components: Components, given: Mapping[str, Any]) -> PerturbOptions:
        """Make options from keyword arguments, and check them.

        Raises:
            ArgumentError: An option is unknown, or its value is wrong for these components.
        """
        check_components(components)
        known = [field.name for field in fields(cls)]
        if unknown := given.keys() - set(known):
            raise ArgumentError(f"{min(unknown)}: there is no such option; there are {', '.join(known)}")
        options = cls(**given)
        options._check(components.kind)
        return options

    @property
    def signs(self) -> tuple[int, ...]:
        """The signs to try."""
        return (1, -1) if self.sign == "both" else (int(self.sign),)

    @property
    def target_range(self) -> tuple[float, float]:
        """The range for the mean KL on the top examples: as given, or the number ± 2 %."""
        if isinstance(self.target_kl, (tuple, list)):
            low, high = self.target_kl
            return low, high
        return self.target_kl * (1 - TOLERANCE), self.target_kl * (1 + TOLERANCE)

    @property
    def lambdas(self) -> tuple[float, ...]:
        """λ to try for a diagonal component."""
        return LAMBDAS if self.lam is None else tuple(as_numbers("lam", self.lam).ravel().tolist())

    def _check(self, kind: str) -> None:
        if self.magnitude is not None:
            check_number("magnitude", self.magnitude)
        ends = self.target_kl if isinstance(self.target_kl, (tuple, list)) else (self.target_kl, self.target_kl)
        if len(ends) != 2 or isinstance(ends[0], str):
            raise ArgumentError(f"target_kl: expected a number of nats, or (low, high), got {self.target_kl!r}")
        for end in ends:
            check_number("target_kl", end)
        if ends[0] > ends[1]:
            raise ArgumentError(f"target_kl: expected low ≤ high, got {self.target_kl!r}")
        if self.sign not in ("both", 1, -1) or isinstance(self.sign, bool):
            raise ArgumentError(f"sign: expected 'both', 1 or -1, got {self.sign!r}")
        if self.reject not in (None, "span", "sequential"):
            raise ArgumentError(f"reject: expected None, 'span' or 'sequential', got {self.reject!r}")
        if self.max_sim is not None:
            if self.reject is None:
                raise ArgumentError("max_sim: it belongs to reject='span' or reject='sequential'; give that too")
            check_share("max_sim", self.max_sim)
        if isinstance(self.combine, str) and self.combine not in ("each", "principal"):
            raise ArgumentError(f"combine: expected 'each', 'principal' or weights, got {self.combine!r}")
        if kind == "diagonal" and self.reject is not None:
            raise ArgumentError("reject: it belongs to low-rank components; diagonal ones have no direction to reject")
        if kind == "diagonal" and not (isinstance(self.combine, str) and self.combine == "each"):
            raise ArgumentError("combine: it belongs to low-rank components; diagonal ones are summed by their shares")
        if kind == "low_rank" and (self.lam is not None or self.fisher is not None):
            raise ArgumentError("lam, fisher: they belong to diagonal components; leave them out for low-rank ones")
        if not self.lambdas:
            raise ArgumentError("lam: expected a number between 0 and 1, or several, got none")
        for value in self.lambdas:
            check_share("lam", value, open_ends=True)
        check_share("floor", self.floor)
        check_integers(self, {"n_random": 0, "curve": 0, "n_resamples": 0, "seed": 0, "n_tokens": 1})
        prompts = self.prompts
        if isinstance(prompts, int | np.integer):
            check_integer("prompts", prompts, 0)
        elif not isinstance(prompts, Sequence | None) or not all(isinstance(text, str) for text in prompts or ()):
            raise ArgumentError(f"prompts: expected a list of texts, or a number of examples, got {prompts!r}")
        check_share("confidence", self.confidence, open_ends=True)

    # ---- examples --------------------------------------------------------------------------------------------

    def top_rows(self, coefficient: Array) -> Array:
        """Return the rows of the examples with the largest coefficients, all above 0; or the given rows.

        Raises:
            ArgumentError: Given rows do not exist, or no example has a coefficient.
        """
        if not isinstance(self.top, int | np.integer):
            return given_rows("top", self.top, len(coefficient), "a number of examples ≥ 1, or their indices")
        order = np.argsort(-coefficient, kind="stable")[: check_integer("top", self.top)]
        order = order[coefficient[order] > 0]
        if not len(order):
            raise ArgumentError(
                "j: no example has a coefficient on it; choose another component, or give examples: top="
            )
        return order.astype(np.int64)

    def baseline_rows(self, n: int) -> Array:
        """Return the rows of a random sample of the n examples, of all of them, or the given rows.

        Raises:
            ArgumentError: Given rows do not exist.
        """
        wanted = n if isinstance(self.baseline, str) and self.baseline == "all" else self.baseline
        if not isinstance(wanted, int | np.integer):
            return given_rows("baseline", wanted, n, "a number of examples, 'all' or indices")
        if check_integer("baseline", wanted) >= n:
            return np.arange(n, dtype=np.int64)
        generator = np.random.Generator(np.random.Philox(key=self.seed, counter=[0, 0, 2, 0]))
        return np.sort(generator.choice(n, int(wanted), replace=False)).astype(np.int64)


def among(options: type[Any], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Select the fields of a dataclass of options among the arguments of a function."""
    return {field.name: arguments[field.name] for field in fields(options) if field.name in arguments}


def check_components(components: Any) -> None:
    """Refuse what are no Components.

    Raises:
        ArgumentError: Naming the type.
    """
    if not isinstance(components, Components):
        raise ArgumentError(f"components: expected Components, got {type(components).__name__}; see npeff.decompose")


def as_numbers(name: str, values: Any) -> Array:
    """Convert numbers to a float64 array, tensors on any device and with gradients included.

    Raises:
        ArgumentError: They are no numbers.
    """
    try:
        if isinstance(values, torch.Tensor):
            values = values.detach().to("cpu", torch.float64)
        return np.asarray(values, np.float64)
    except (TypeError, ValueError) as error:
        raise ArgumentError(f"{name}: expected numbers, got {repr(values)[:80]}") from error


def given_rows(name: str, rows: Any, n: int, expected: str) -> Array:
    """Return the rows of n that a user gave as indices or as a mask ``(n,)``, each once.

    Raises:
        ArgumentError: They are no such rows.
    """
    try:
        found = np.asarray(rows)
    except (TypeError, ValueError):  # lists of unequal lengths, tensors on another device
        found = np.zeros(0)
    if found.dtype == bool and found.shape == (n,):
        found = np.flatnonzero(found)
    if found.ndim != 1 or not len(found) or found.dtype.kind not in "iu":
        raise ArgumentError(f"{name}: expected {expected}, got {repr(rows)[:80]}")
    if found.min() < 0 or found.max() >= n:
        raise ArgumentError(f"{name}: expected indices below {n}, got {int(found.min())} to {int(found.max())}")
    return np.asarray(list(dict.fromkeys(found.tolist())), np.int64)


def check_share(name: str, value: Any, open_ends: bool = False) -> None:
    """Refuse a value that is no number from 0 to 1, both excluded with ``open_ends``.

    Raises:
        ArgumentError: Naming the argument.
    """
    number = isinstance(value, int | float | np.number) and not isinstance(value, bool)
    if not number or not (0 < float(value) < 1 if open_ends else 0 <= float(value) <= 1):
        raise ArgumentError(f"{name}: expected a number between 0 and 1, got {value!r}")
