"""The parameters of a model: where each parameter of a Fisher lies in the flat vector; digests that notice changes.

Between two digests of its contents, version counters, which are cheap, notice changes of a model.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
import time
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor, nn

from npeff.batches.tensor_trees import update_with_tensor
from npeff.errors import ArgumentError, ModelError

# What a module's repr says of this process rather than of the model: addresses, and devices in parameter lists.
_PASSING = re.compile(r" at 0x[0-9a-fA-F]+| \((?:GPU|cuda|mps|xpu)[ :\d]*\)")


@dataclass(frozen=True)
class Parameter:
    """One parameter tensor's place in the flat vector: elements ``offset … offset + numel − 1`` in C order."""

    name: str
    shape: tuple[int, ...]
    offset: int

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def slice(self) -> slice:
        """The parameter's elements in a flat parameter vector."""
        return slice(self.offset, self.offset + self.numel)


class Parameters(tuple[Parameter, ...]):
    """The selected parameters of a model, in the model's order, laid end to end."""

    @classmethod
    def of(cls, named_shapes: Iterable[tuple[str, Sequence[int]]]) -> Parameters:
        """Lay parameters out end to end.

        Args:
            named_shapes: ``(name, shape)`` in the wanted order.

        Returns:
            Parameters whose offsets start at 0 and leave no gap.
        """
        items, offset = [], 0
        for name, shape in named_shapes:
            item = Parameter(name, tuple(int(size) for size in shape), offset)
            items.append(item)
            offset += item.numel
        return cls(items)

    def __repr__(self) -> str:
        return f"Parameters({len(self)} tensors, {self.n_parameters:,} elements)"

    @property
    def n_parameters(self) -> int:
        """Length of the flat parameter vector, m."""
        return self[-1].offset + self[-1].numel if self else 0

    @property
    def names(self) -> tuple[str, ...]:
        """Parameter names in order."""
        return tuple(item.name for item in self)

    @cached_property
    def _by_name(self) -> dict[str, Parameter]:
        return {item.name: item for item in self}

    def named(self, name: str) -> Parameter:
        """Look a parameter up by name.

        Raises:
            ArgumentError: No parameter has that name.
        """
        if name not in self._by_name:
            raise ArgumentError(
                f"parameter {name!r} is not among the {len(self)} selected ones: {', '.join(self.names[:8])}…"
            )
        return self._by_name[name]

    def block(self, name: str) -> slice:
        """Return the elements of parameter ``name`` in the flat vector."""
        return self.named(name).slice

    def locate(self, index: int) -> tuple[str, tuple[int, ...]]:
        """Find the name and multi-index of flat element ``index``.

        Raises:
            ArgumentError: ``index`` lies outside the vector.
        """
        if not 0 <= index < self.n_parameters:
            raise ArgumentError(f"index: expected 0 ≤ index < {self.n_parameters}, got {index}")
        # Empty tensors share their offset with the next one: bisect_right lands on the last, the one that holds it.
        item = self[bisect_right(self, index, key=lambda item: item.offset) - 1]
        return item.name, tuple(int(i) for i in np.unravel_index(index - item.offset, item.shape))

    def unflatten(self, vector: npt.NDArray[Any]) -> dict[str, npt.NDArray[Any]]:
        """Cut a flat vector ``(n_parameters,)`` into parameter-shaped arrays (views).

        Raises:
            ArgumentError: The vector has another length.
        """
        if vector.shape != (self.n_parameters,):
            raise ArgumentError(f"vector: expected shape ({self.n_parameters},), got {vector.shape}")
        return {item.name: vector[item.slice].reshape(item.shape) for item in self}

    def to_json(self) -> list[Mapping[str, Any]]:
        """Describe the parameters for JSON: the name and the shape of each, in order."""
        return [{"name": item.name, "shape": list(item.shape)} for item in self]

    @classmethod
    def from_json(cls, description: Iterable[Mapping[str, Any]]) -> Parameters:
        """Make Parameters of what :meth:`to_json` gave."""
        return cls.of((str(item["name"]), item["shape"]) for item in description)


def model_digest(model: nn.Module) -> str:
    """Compute blake2b over the printed modules, and names, shapes, dtypes and bytes of parameters and buffers."""
    digest = hashlib.blake2b(_PASSING.sub("", repr(model)).encode(), digest_size=16)
    entries = model.state_dict(keep_vars=True)
    here = all(entry.device.type == "cpu" for entry in entries.values() if isinstance(entry, Tensor))
    # What lies on a device is brought here one tensor at a time.
    with ThreadPoolExecutor(max(1, (os.cpu_count() or 1) // 2)) as threads:
        found = threads.map(_digest, entries.values()) if here else map(_digest, entries.values())
        for name, part in zip(entries, found, strict=True):
            digest.update(name.encode())
            digest.update(part)
    return digest.hexdigest()


def _digest(entry: object) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    if isinstance(entry, Tensor):
        update_with_tensor(digest, entry)
    else:
        digest.update(repr(entry).encode())
    return digest.digest()


class ModelWatch:
    """Notices changes to a model while work goes on.

    ``check`` compares autograd's version counters (free) and, from time to time, so that it costs at most 2 %
    of the time, the digest. A module that goes from ``eval()`` to ``train()``, or back, has changed too.

    Attributes:
        digest: The model's digest at the start.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        start = time.perf_counter()
        self.digest = model_digest(model)
        self._cost = time.perf_counter() - start
        self._checked = time.perf_counter()
        self._versions = self._read()
        self._training = self._modes()
        self._seen = self._glance()

    def _read(self) -> dict[str, tuple[int, int]]:
        return {
            name: (id(tensor), -1 if tensor.is_inference() else tensor._version)
            for name, tensor in self._model.state_dict(keep_vars=True).items()
            if isinstance(tensor, Tensor)
        }

    def _modes(self) -> dict[str, bool]:
        return {name: module.training for name, module in self._model.named_modules()}

    def _glance(self) -> list[object]:
        """Modules and stored tensors by identity, modes and versions, without the names that only messages need."""
        seen: list[object] = []
        modules, known = [self._model], set()
        while modules:
            module = modules.pop()
            if id(module) in known:
                continue
            known.add(id(module))
            seen += id(module), module.training
            passing = module._non_persistent_buffers_set
            for name, tensor in chain(module._parameters.items(), module._buffers.items()):
                if tensor is not None and name not in passing:
                    seen += id(tensor), -1 if tensor.is_inference() else tensor._version
            modules += [child for child in module._modules.values() if child is not None]
        return seen

    def check(self, *, thorough: bool = False) -> None:
        """Compare the model with what it was at the start.

        Args:
            thorough: Compare the digest in any case.

        Raises:
            ModelError: Something changed.
        """
        due = thorough or time.perf_counter() - self._checked > 50 * self._cost
        glance = self._glance()
        if glance == self._seen and not due:
            return
        if self._modes() != self._training:
            raise ModelError(
                "model: its training mode changed while Fishers were computed (model.train() or model.eval() was "
                "called); call model.eval() before, and leave it so until the end, or compute with a copy"
            )
        now = self._read()
        changed = [name for name, version in self._versions.items() if now.get(name) != version] + [
            name for name in now if name not in self._versions
        ]
        if changed or due:
            same = model_digest(self._model) == self.digest
            if not same:
                what = f"{', '.join(changed[:5])} changed" if changed else "its contents changed"
                raise ModelError(
                    f"model: {what} while Fishers were computed; what is already written belongs to the "
                    "model as it was at the start. Compute with a copy of the model, or after training"
                )
            self._checked = time.perf_counter()
            self._versions = now
        self._seen = glance
