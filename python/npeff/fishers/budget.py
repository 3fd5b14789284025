"""Choose how many sequences of a batch to take at a time, so that what is kept of them fits into a given memory."""

from __future__ import annotations

import torch
from torch import Tensor

from npeff.batches.batches import Batch
from npeff.gradients.eligibility import check_independence
from npeff.gradients.engine import PerExampleGradients
from npeff.models.devices import available_bytes

KEPT_BYTES = 512 << 20
"""Most bytes of output gradients where no memory is given."""

_PROBED = 2
"""Examples of a trial."""


class Budget:
    """Finds batch sizes: half of the memory for what autograd keeps of a forward pass, half for output gradients.

    Cotangents, made before there are output gradients, may take as much as these. The former is measured by a trial on
    two examples for every new shape of the inputs, the latter known from the first batch of that shape.

    With ``memory=None`` activations take what they take, and output gradients 512 MB at most, on a CUDA device a
    quarter of the free memory if that is more: small pieces leave a device idle.
    """

    def __init__(self, engine: PerExampleGradients, memory: int | None) -> None:
        self._engine = engine
        self._for_activations = None if memory is None else memory // 2
        device = next(iter(engine.tensors.values())).device
        most = max(KEPT_BYTES, available_bytes(device) // 4) if device.type == "cuda" else KEPT_BYTES
        self._for_gradients = most if memory is None else min(most, memory // 2)
        self._activations: dict[object, int] = {}
        self._gradients: dict[object, int] = {}
        self._compared = False

    def sequences_at_once(self, batch: Batch) -> int:
        """Return the most sequences of a batch that fit in memory, at least one, as estimated before its forward pass.

        Where examples are no places, each counts as a sequence.
        """
        n = batch.n_sequences
        if n <= 1 or not batch.sliceable:
            return n
        shapes = batch.shapes()
        most = min(n, self._for_gradients // self._gradients.get(shapes, 1))
        if self._for_activations is not None:
            if shapes not in self._activations:
                self._activations[shapes] = self._kept_of_one(self._few(batch))
            most = min(most, self._for_activations // self._activations[shapes])
        return max(1, most)

    def sequences_after(self, batch: Batch, gradients: int) -> int:
        """Return the most sequences that fit, given the bytes of one example's output gradients or cotangents."""
        n = batch.n_sequences
        if n <= 1 or not batch.sliceable:
            return n
        shapes = batch.shapes()
        self._gradients[shapes] = max(1, gradients)
        return max(1, min(n, self._for_gradients // self._gradients[shapes]))

    def places_at_once(self, gradients: int) -> int:
        """Return the most places that fit whose output gradients, or cotangents, take so many bytes each."""
        return self._for_gradients // max(1, gradients)

    def pieces(self, batch: Batch, most: int) -> list[tuple[int, int]]:
        """Cut a batch into equal pieces of at most ``most`` sequences; return the start and the end of each.

        Raises:
            ModelError: The first example alone has other logits than beside its neighbour, so the cut is wrong. Larger
                pieces are compared with their own examples when their rules are chosen.
        """
        n = batch.n_sequences
        step = -(-n // -(-n // most))
        if step == 1 and not self._compared:
            self._compared = True
            few = self._few(batch)
            with self._engine.recording(), torch.no_grad():
                logits = self._engine.run(few)
                check_independence(self._engine.run, few, logits, self._engine.precision or logits.dtype)
        return [(start, min(start + step, n)) for start in range(0, n, step)]

    def _few(self, batch: Batch) -> Batch:
        return batch.take(batch.one_each()[:_PROBED])

    def _kept_of_one(self, few: Batch) -> int:
        weights = {tensor.untyped_storage().data_ptr() for tensor in self._engine.model.parameters()}
        kept: dict[int, int] = {}

        def note(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with self._engine.recording(), torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            logits = self._engine.forward(few)
        del logits
        return max(1, sum(kept.values()) // few.n_sequences)
