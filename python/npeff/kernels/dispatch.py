"""Choose which implementation of a kernel runs, and say why it is not a faster one. No other module decides this.

The native module holds the CPU kernels for three instruction sets and picks the best one the processor
has. ``NPEFF_KERNELS`` (``reference``, ``base``, ``avx2`` or ``avx512``) asks for another.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

from npeff.errors import ArgumentError
from npeff.kernels import arrays
from npeff.short_repr import short_repr

KERNELS = (
    "topk",
    "convolution_gradients",
    "nnls",
    "spmm",
    "csr_transpose",
    "sparse_gram",
    "outer_gram",
    "fisher_norms",
    "cross",
    "sketch",
)
"""Names of the kernels that have a native implementation."""

SERVED_OTHERWISE = {
    "convolution_gradients": "a batched product: torch's own runs on the device",
    "csr_transpose": "a sort: torch's own runs on the device",
    "outer_gram": "products of matrices: torch's own run on the device",
    "fisher_norms": "computed on the processor, from copies of the rows",
}
"""Kernels whose public function has no CUDA kernel behind it, and who serves CUDA tensors."""

MOST_THREADS = 4096
"""Threads that a kernel may have."""

SMALL_STEP = 16 << 20
"""Bytes read by a step below which one thread is faster than several."""

ISAS = ("avx512", "avx2", "base")
"""Instruction sets, fastest first."""

_native: ModuleType | None
_native_missing = ""
try:
    from npeff import _native
except ImportError as error:  # a source tree that was never built
    _native, _native_missing = None, str(error)

_forced: str | None = None
_threads: int | None = None


@dataclass(frozen=True)
class KernelInfo:
    """One line of :func:`report`.

    Attributes:
        kernel: Name of the kernel, as in ``npeff.kernels``.
        device: ``"cpu"`` or ``"cuda"``.
        implementation: ``"avx512"``, ``"avx2"``, ``"base"``, ``"cuda"``, or ``"reference"`` (plain torch).
        reason: Why nothing faster is used; empty where nothing faster exists.
    """

    kernel: str
    device: str
    implementation: str
    reason: str

    __repr__ = short_repr


def use(implementation: str | None) -> None:
    """Use the given implementation from now on; None: the fastest that this machine has.

    Args:
        implementation: ``"reference"``, ``"base"``, ``"avx2"``, ``"avx512"`` or None.

    Raises:
        ArgumentError: There is no such implementation here.
    """
    global _forced
    if not (implementation is None or (isinstance(implementation, str) and implementation == "reference")):
        if not isinstance(implementation, str) or implementation not in ISAS:
            raise ArgumentError(f"implementation: expected reference, base, avx2 or avx512, got {implementation!r}")
        if _native is None or not _native.has_isa(implementation):
            raise ArgumentError(
                f"implementation: {implementation} is not available here; available: {', '.join(available())}"
            )
    if _native is not None and implementation != "reference":
        _native.use_isa(implementation or next(isa for isa in ISAS if _native.has_isa(isa)))
    _forced = implementation


def available() -> list[str]:
    """List the implementations that run on this machine, fastest first; ``"reference"`` always runs."""
    return [*(isa for isa in ISAS if _native is not None and _native.has_isa(isa)), "reference"]


def native() -> ModuleType | None:
    """Return the native module when its kernels are to be used on CPU tensors, else None."""
    return None if _forced == "reference" else _native


@dataclass(frozen=True)
class Compiled:
    """The compiled kernels that serve some arrays, native or CUDA: they are called by name, with keywords alone.

    Attributes:
        module: ``npeff._native`` or ``npeff._cuda``, or an object of theirs.
        run: The last argument of each: the number of threads, or the address of the caller's current stream.
        on_device: Whether it is ``npeff._cuda``: nothing waits for the device.
    """

    module: Any
    run: dict[str, int]
    on_device: bool

    def __call__(self, name: str, /, **arguments: Any) -> Any:
        """Call the function of that name; tensors of the processor go in as arrays."""
        if not self.on_device:
            arguments = {name: x.numpy() if isinstance(x, torch.Tensor) else x for name, x in arguments.items()}
        return getattr(self.module, name)(**arguments, **self.run)


def on_host() -> Compiled | None:
    """Return the native kernels when they are to be used, else None: plain torch then."""
    module = native()
    return None if module is None else Compiled(module, {"threads": num_threads()}, False)


def on_device(device: torch.device) -> Compiled | None:
    """Return the CUDA kernels when they are to be used on tensors of that device, else None: plain torch then."""
    module = cuda(device)
    return None if module is None else Compiled(module, {"stream": stream(device)}, True)


def compiled(x: arrays.Operand, *here: str) -> Compiled | None:
    """Return the compiled kernels that serve an array, else None: plain torch then.

    Args:
        x: The array; numpy arrays are the processor's.
        *here: The dtypes that the native kernel takes, float32 alone by default.
    """
    if isinstance(x, torch.Tensor) and (there := on_device(x.device)) is not None:
        return there
    served = arrays.device_of(x).type == "cpu" and arrays.dtype_name(x) in (here or ("float32",))
    return on_host() if served else None


def stream(device: torch.device) -> int:
    """Return the address of the caller's current stream on a device; 0 on the processor."""
    return int(torch.cuda.current_stream(device).cuda_stream) if device.type == "cuda" else 0


def cuda(device: torch.device) -> ModuleType | None:
    """Return ``npeff._cuda`` when its kernels are to be used on tensors of that device, else None: plain torch then."""
    return None if cuda_reason(device) else _cuda_module()[0]


def cuda_reason(device: torch.device) -> str:
    """Say why plain torch serves tensors of that device; empty where the CUDA kernels do."""
    if device.type != "cuda":
        return f"{device.type} is not a CUDA device"
    if _forced == "reference":
        return "asked for plain torch"
    module, reason = _cuda_module()
    if module is None:
        return reason
    return _unusable(torch.cuda.current_device() if device.index is None else device.index)


@functools.cache
def _cuda_module() -> tuple[ModuleType | None, str]:
    try:
        from npeff import _cuda
    except ImportError as error:
        return None, f"npeff._cuda was not built or cannot be loaded ({error})"
    if _cuda.device_count() == 0:
        return None, f"no usable device: {_cuda.absence()}"
    return _cuda, ""


@functools.cache
def _unusable(index: int) -> str:
    module, _ = _cuda_module()
    assert module is not None
    return str(module.usable(index))


def implementation() -> str:
    """Return what CPU arrays run on: ``"avx512"``, ``"avx2"``, ``"base"`` or ``"reference"``."""
    module = native()
    return "reference" if module is None else str(module.isa())


def set_num_threads(n: int | None) -> None:
    """Set the number of threads of the native kernels; None: as many as torch (``torch.get_num_threads()``).

    Raises:
        ArgumentError: n is below 1 or above 4096.
    """
    global _threads
    try:
        _threads = None if n is None else arrays.integer(n, "n", 1, MOST_THREADS)
    except ArgumentError:
        raise ArgumentError(
            f"n: expected a number of threads from 1 to {MOST_THREADS}, or None for torch's, got {n!r}"
        ) from None


def num_threads() -> int:
    """Return the number of threads that the native kernels use."""
    return _threads if _threads is not None else min(torch.get_num_threads(), MOST_THREADS)


@contextmanager
def threads_for(step_bytes: int) -> Iterator[None]:
    """Use one torch thread where a step reads less than SMALL_STEP bytes; restore the number afterwards.

    There, waiting for the other threads takes longer than the work; on a machine whose cores are busy, many times so.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1 if step_bytes < SMALL_STEP else before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def report() -> list[KernelInfo]:
    """List the implementation in use per kernel and device, and why it is not a faster one (``npeff doctor``)."""
    cpu, cpu_reason = implementation(), _cpu_reason()
    lines = [KernelInfo(kernel, "cpu", cpu, cpu_reason) for kernel in KERNELS]
    return lines + [_cuda_info(kernel) for kernel in KERNELS]


def _cuda_info(kernel: str) -> KernelInfo:
    module, reason = _cuda_module()
    if module is not None and not torch.cuda.is_available():
        reason = "this build of torch has no CUDA: there are no CUDA tensors to serve"
    reason = reason or cuda_reason(torch.device("cuda"))
    reason = reason or SERVED_OTHERWISE.get(kernel, "")
    return KernelInfo(kernel, "cuda", "reference" if reason else "cuda", reason)


def _cpu_reason() -> str:
    if _native is None:
        return f"the native module is missing: {_native_missing}"
    if _forced is not None:
        return f"asked for ({'NPEFF_KERNELS' if _forced == os.environ.get('NPEFF_KERNELS') else 'use()'})"
    lacking = [isa for isa in ISAS[: ISAS.index(_native.isa())] if not _native.has_isa(isa)]
    return f"this processor or build lacks {' and '.join(lacking)}" if lacking else ""


use(os.environ.get("NPEFF_KERNELS") or None)
