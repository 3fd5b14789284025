"""Notice changes of a model: digests of its contents, and version counters, which are cheap, in between."""

from __future__ import annotations

import hashlib
import os
import re
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import chain

from torch import Tensor, nn

from npeff.batches.tensor_trees import update_with_tensor
from npeff.errors import ModelError

# What a module's repr says of this process rather than of the model: addresses, and devices in parameter lists.
_PASSING = re.compile(r" at 0x[0-9a-fA-F]+| \((?:GPU|cuda|mps|xpu)[ :\d]*\)")


def model_digest(model: nn.Module) -> str:
    """Compute blake2b over the printed modules, and names, shapes, dtypes and bytes of parameters and buffers."""
    digest = hashlib.blake2b(_PASSING.sub("", repr(model)).encode(), digest_size=16)
    entries = model.state_dict(keep_vars=True)
    with ThreadPoolExecutor(max(1, (os.cpu_count() or 1) // 2)) as threads:
        for name, found in zip(entries, threads.map(_digest, entries.values()), strict=True):
            digest.update(name.encode())
            digest.update(found)
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
