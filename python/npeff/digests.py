"""Has the model changed? Digests of its contents, and cheap version counters in between."""

from __future__ import annotations

import hashlib
import time

from torch import Tensor, nn

from npeff.batches import update_with_tensor
from npeff.errors import ModelError


def model_digest(model: nn.Module) -> str:
    """blake2b over names, shapes, dtypes and bytes of parameters and persistent buffers, in order."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in model.state_dict(keep_vars=True).items():
        digest.update(name.encode())
        if isinstance(tensor, Tensor):
            update_with_tensor(digest, tensor)
        else:
            digest.update(repr(tensor).encode())
    return digest.hexdigest()


class ModelWatch:
    """Notices changes to a model while work goes on.

    ``check`` compares autograd's version counters (free) and, from time to time, so that it costs at most 2 %
    of the time, the digest.

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

    def _read(self) -> dict[str, tuple[int, int]]:
        return {
            name: (id(tensor), -1 if tensor.is_inference() else tensor._version)
            for name, tensor in self._model.state_dict(keep_vars=True).items()
            if isinstance(tensor, Tensor)
        }

    def check(self, *, thorough: bool = False) -> None:
        """Compare with the start.

        Args:
            thorough: Compare the digest in any case.

        Raises:
            ModelError: Something changed.
        """
        now = self._read()
        changed = [name for name, version in self._versions.items() if now.get(name) != version] + [
            name for name in now if name not in self._versions
        ]
        due = thorough or time.perf_counter() - self._checked > 50 * self._cost
        if changed or due:
            same = model_digest(self._model) == self.digest
            self._checked = time.perf_counter()
            self._versions = now
            if not same:
                what = f"{', '.join(changed[:5])} changed" if changed else "its contents changed"
                raise ModelError(
                    f"model: {what} while Fishers were computed; what is already written belongs to the "
                    "model as it was at the start. Compute with a copy of the model, or after training"
                )
