"""A stand-in for npeff._cuda whose device is the processor: the blocks of the CUDA kernels, played in shuffled orders.

What lies between the kernels and the user (plans, workspaces, deferred checks, ordered writing) then runs as it would
for a model on a device.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch

import blocks
from far_device import near
from npeff.decomposition import space_choice
from npeff.kernels import cuda, dispatch
from npeff.models import devices


def _array(x: torch.Tensor) -> np.ndarray | torch.Tensor:
    x = x.detach()
    return x if x.dtype == torch.bfloat16 else x.numpy()


class PlayedCuda:
    """The functions of npeff._cuda, on CPU tensors.

    Attributes:
        calls: How often each was called.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.calls: dict[str, int] = {}
        self._selectors: dict[int, Any] = {}

    def __getattribute__(self, name: str) -> Any:
        found = super().__getattribute__(name)
        if name.startswith("_") or not callable(found):
            return found
        return lambda *args: found(*(near(x) for x in args))

    def _count(self, name: str) -> None:
        self.calls[name] = self.calls.get(name, 0) + 1

    # ---- top-k: the selectors live here, under the address of the memory that was given for them ----------------

    def topk_bytes(self, n: int, k: int) -> int:
        return 16

    def topk_reset(self, memory: torch.Tensor, n: int, k: int, keep_zeros: bool, stream: int) -> None:
        self._selectors[memory.data_ptr()] = blocks.Selectors(n, k, keep_zeros, self.seed)
        memory.view(torch.int64).fill_(-1)

    def topk_push(self, memory: torch.Tensor, n: int, k: int, keep_zeros: bool, block: torch.Tensor,
                  targets: torch.Tensor, bases: torch.Tensor, order: torch.Tensor, starts: torch.Tensor,
                  scratch: torch.Tensor, stream: int) -> None:  # fmt: skip
        self._count("topk_push")
        assert len(scratch) == len(block)
        check_plan(targets, bases, order, starts, n)
        selectors = self._selectors[memory.data_ptr()]
        selectors.push(_array(block), bases.numpy(), targets.numpy())
        status = memory.view(torch.int64)
        if selectors.status()[0] >= 0 > int(status[0]):
            status.copy_(torch.tensor(selectors.status()))

    def topk_finish(self, memory: torch.Tensor, n: int, k: int, keep_zeros: bool,
                    counts: torch.Tensor, indices: torch.Tensor, values: torch.Tensor,
                    stream: int) -> None:  # fmt: skip
        self._selectors[memory.data_ptr()].finish(counts.numpy(), indices.numpy(), values.numpy())
        self._selectors[memory.data_ptr()] = blocks.Selectors(n, k, keep_zeros, self.seed)

    # ---- sketches ---------------------------------------------------------------------------------------------

    def sketch_workspace(self, device: int, dtype: str, d: int, copies: int, n_rows: int, width: int) -> int:
        return 1

    def sketch_rows(self, d: int, copies: int, seed: int, block: torch.Tensor, bases: torch.Tensor,
                    order: torch.Tensor, starts: torch.Tensor, workspace: torch.Tensor, sums: torch.Tensor,
                    stream: int) -> None:  # fmt: skip
        self._count("sketch_rows")
        targets = _targets(order, starts)
        check_plan(targets, bases, order, starts, len(sums))
        blocks.sketch_rows(d, copies, seed, _array(block), bases.numpy(), targets.numpy(), sums.numpy(), self.seed)

    def sketch_matrix_workspace(self, device: int, dtype: str, d: int, n_rows: int, width: int) -> int:
        return 1

    def sketch_matrix(self, d: int, weight: float, block: torch.Tensor, row_places: torch.Tensor,
                      column_places: torch.Tensor, first: torch.Tensor, order: torch.Tensor, starts: torch.Tensor,
                      workspace: torch.Tensor, sums: torch.Tensor, stream: int) -> None:  # fmt: skip
        self._count("sketch_matrix")
        targets = _targets(order, starts)
        check_plan(targets, first, order, starts, len(sums))
        blocks.sketch_matrix(d, weight, _array(block), row_places.numpy(), column_places.numpy(), first.numpy(),
                             targets.numpy(), sums.numpy(), self.seed)  # fmt: skip

    def sketch_csr(self, d: int, copies: int, seed: int, indptr: torch.Tensor, indices: torch.Tensor,
                   values: torch.Tensor, n_columns: int, sums: torch.Tensor, stream: int) -> None:  # fmt: skip
        self._count("sketch_csr")
        csr = (indptr.numpy(), indices.numpy(), values.numpy())
        blocks.sketch_csr(d, copies, seed, *csr, n_columns, sums.numpy(), self.seed)

    def sketch_finish(self, sums: torch.Tensor, scale: float, out: torch.Tensor, bad: torch.Tensor,
                      stream: int) -> None:  # fmt: skip
        row = blocks.sketch_finish(sums.numpy(), scale, out.numpy(), self.seed)
        if row >= 0:
            bad.fill_(min(row, int(bad)))

    # ---- sparse products, sums over examples, non-negative least squares -----------------------------------------

    def spmm(self, indptr: torch.Tensor, indices: torch.Tensor, values: torch.Tensor, dense: torch.Tensor,
             out: torch.Tensor, stream: int) -> None:  # fmt: skip
        self._count("spmm")
        blocks.spmm(indptr.numpy(), indices.numpy(), values.numpy(), _array(dense), out.numpy(), self.seed)

    def gram_panel(self, indptr: torch.Tensor, indices: torch.Tensor, values: torch.Tensor, n_columns: int,
                   k: torch.Tensor, stream: int) -> None:  # fmt: skip
        self._count("gram_panel")
        lower = np.zeros(k.shape, np.float32)
        blocks.gram(indptr.numpy(), indices.numpy(), values.numpy(), n_columns, lower, self.seed)
        k += torch.from_numpy(np.tril(lower))

    def mirror(self, k: torch.Tensor, stream: int) -> None:
        self._count("mirror")
        k.copy_(k.tril() + k.tril(-1).T)

    def cross(self, p: torch.Tensor, row_offsets: torch.Tensor, out: torch.Tensor, stream: int) -> None:
        self._count("cross")
        blocks.cross(_array(p), row_offsets.numpy(), out.numpy(), self.seed)

    def spread_multiply(self, w: torch.Tensor, p: torch.Tensor, row_offsets: torch.Tensor, out: torch.Tensor,
                        stream: int) -> None:  # fmt: skip
        self._count("spread_multiply")
        blocks.spread_multiply(_array(w), _array(p), row_offsets.numpy(), out.numpy(), self.seed)

    def nnls_workspace(self, device: int, n: int, r: int) -> int:
        return 1

    def nnls(self, gram: torch.Tensor, cross: torch.Tensor, w: torch.Tensor, kkt: torch.Tensor | None,
             max_sweeps: int, tol: float, workspace: torch.Tensor, status: torch.Tensor,
             stream: int) -> None:  # fmt: skip
        self._count("nnls")
        residual = np.empty(len(w), w.numpy().dtype) if kkt is None else kkt.numpy()
        bad, sweeps = blocks.nnls(
            gram.numpy(), cross.contiguous().numpy(), w.numpy(), residual, max_sweeps, tol, 0, self.seed
        )
        status.copy_(torch.tensor([cuda.ALL_FINITE if bad < 0 else bad, sweeps]))


def _targets(order: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
    """The target of each row, from the rows by target."""
    targets = torch.empty_like(order)
    targets[order] = torch.repeat_interleave(torch.arange(len(starts) - 1), starts.diff())
    return targets


def check_plan(targets: torch.Tensor, bases: torch.Tensor, order: torch.Tensor, starts: torch.Tensor, n: int) -> None:
    """A plan says which rows each target has, by ascending base."""
    assert starts[0] == 0 and starts[-1] == len(order) and len(starts) == n + 1
    for target in range(n):
        mine = order[starts[target] : starts[target + 1]]
        assert (targets[mine] == target).all() and (bases[mine].diff() >= 0).all()


@contextmanager
def played(monkeypatch: pytest.MonkeyPatch, seed: int = 1, memory: int = 1 << 34) -> Iterator[PlayedCuda]:
    """Within it, CPU tensors are served as those of a device with so many bytes of memory are."""
    with kernels(monkeypatch, seed, ("cpu",)) as module, monkeypatch.context() as patch:
        patch.setattr(devices, "has_own_memory", lambda device: True)
        patch.setattr(space_choice, "available_bytes", lambda device: memory)
        yield module


@contextmanager
def kernels(monkeypatch: pytest.MonkeyPatch, seed: int, types: tuple[str, ...]) -> Iterator[PlayedCuda]:
    """Within it, the played kernels serve devices of these types."""
    module = PlayedCuda(seed)
    with monkeypatch.context() as patch:
        patch.setattr(dispatch, "cuda", lambda device: module if device.type in types else None)
        patch.setattr(dispatch, "cuda_reason", lambda device: "" if device.type in types else "not played")
        patch.setattr(cuda, "stream", lambda x: 0)
        patch.setattr(cuda, "index_of", lambda x: 0)
        yield module
