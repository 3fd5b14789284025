"""A CUDA device that is not there: tensors that say they are on it, and refuse to meet those of the processor.

Each holds a tensor of the processor, on which the work is done; copies to and from the device, and operations that wait
for it, go through this module. With the CUDA kernels emulated (see emulated_device), the whole way from a model on a
device to a decomposition runs on a machine without one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map

from npeff.kernels import streams

aten = torch.ops.aten
CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
COPIES = {aten._to_copy.default, aten.copy_.default}
TO_HOST = "copied to the host"
WAITS = {aten._local_scalar_dense.default, aten.nonzero.default, aten.equal.default, aten.masked_select.default}


class FakeTensor(torch.Tensor):
    """A tensor on the device.

    Attributes:
        inner: What it holds, on the processor.
    """

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> FakeTensor:
        # Said to be the processor's to autograd, which would want threads of the device; cuda to all others.
        made = torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, inner.stride(), inner.storage_offset(), dtype=inner.dtype, device="cpu"
        )
        made.inner = inner
        return made

    device = property(lambda self: CUDA)  # type: ignore[assignment]
    is_cuda = property(lambda self: True)  # type: ignore[assignment]

    def __repr__(self) -> str:  # type: ignore[override]
        return f"FakeTensor({self.inner!r})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return carried_out(func, args, kwargs or {})


def to(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """Tensor.to, where one of those concerned is on the device."""
    device, dtype = kwargs.get("device"), kwargs.get("dtype")
    for given in args:
        if isinstance(given, torch.Tensor):
            device, dtype = given.device, given.dtype
        elif isinstance(given, torch.dtype):
            dtype = given
        elif isinstance(given, str | torch.device):
            device = torch.device(given)
    return moved(x, x.device if device is None else torch.device(device), dtype)


def moved(x: torch.Tensor, device: torch.device, dtype: torch.dtype | None) -> torch.Tensor:
    """A copy on the device, or the tensor itself."""
    if device.type == x.device.type:
        return x if dtype in (None, x.dtype) else aten._to_copy(x, dtype=dtype)
    return (_There if device.type == "cuda" else _Here).apply(x, dtype or x.dtype)


class _There(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        return FakeTensor(x.detach().to(dtype, copy=True))

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        return unwrapped(gradient), None


class _Here(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: FakeTensor, dtype: torch.dtype) -> torch.Tensor:
        if FakeDevice.current is not None:
            FakeDevice.current.waits.append(TO_HOST)
        return x.inner.detach().to(dtype, copy=True)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        return FakeTensor(gradient), None


def unwrapped(x: Any) -> Any:
    return x.inner if isinstance(x, FakeTensor) else x


def carried_out(func: Any, args: Any, kwargs: Any) -> Any:
    """An operation of the device, on what its tensors hold."""
    flat, _ = tree_flatten((args, kwargs))
    far = [x for x in flat if isinstance(x, FakeTensor)]
    stray = [x for x in flat if isinstance(x, torch.Tensor) and not isinstance(x, FakeTensor) and x.dim() > 0]
    if stray and func is not aten.copy_.default:
        raise RuntimeError(f"{func}: expected all tensors on one device, got some of shape {stray[0].shape} here")
    if func in WAITS and FakeDevice.current is not None:
        FakeDevice.current.waits.append(str(func))
    out = func(*tree_map(unwrapped, args), **tree_map(unwrapped, kwargs))
    name = func._schema.name
    if name.endswith("_") and not name.endswith("__"):
        return args[0]
    held = {id(x.inner): x for x in far}
    return tree_map(lambda x: held.get(id(x), FakeTensor(x)) if isinstance(x, torch.Tensor) else x, out)


class FakeDevice(TorchFunctionMode):
    """Within it, there is a device.

    Attributes:
        waits: The operations that waited for it.
    """

    current: FakeDevice | None = None

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.numpy and isinstance(args[0], FakeTensor):
            raise TypeError("can't convert a tensor on a device to numpy; use Tensor.cpu() first")
        if func is torch.Tensor.tolist and isinstance(args[0], FakeTensor):
            self.waits.append(TO_HOST)
            return args[0].inner.tolist()
        if func is torch.Tensor.cpu:
            return moved(args[0], CPU, None)
        if func is torch.Tensor.cuda:
            return moved(args[0], CUDA, None)
        if func is torch.Tensor.to:
            return to(*args, **kwargs)
        if func is torch.nn.functional.one_hot and isinstance(args[0], FakeTensor):
            return FakeTensor(func(args[0].inner, *args[1:], **kwargs))  # it makes a tensor on the device by itself
        device = kwargs.get("device")
        if device is not None and torch.device(device).type == "cuda":
            if not any(isinstance(x, FakeTensor) for x in args):
                return FakeTensor(func(*args, **{**kwargs, "device": CPU}))
            kwargs["device"] = CPU  # of one on the device already
        return func(*args, **kwargs)


class _Nothing:
    """A stream, or an event: there is nothing to wait for."""

    cuda_stream = 0

    def __init__(self, *args: Any, **options: Any) -> None: ...

    def wait_stream(self, stream: Any) -> None: ...
    def record(self, stream: Any = None) -> None: ...
    def synchronize(self) -> None: ...


@contextmanager
def fake_device(monkeypatch: pytest.MonkeyPatch, memory: int = 1 << 34) -> Iterator[FakeDevice]:
    """Within it, ``device="cuda"`` can be computed on."""
    with monkeypatch.context() as patch:
        for name in ("Stream", "Event"):
            patch.setattr(torch.cuda, name, _Nothing)
        patch.setattr(torch.cuda, "current_stream", lambda device=None: _Nothing())
        patch.setattr(torch.cuda, "current_device", lambda: 0)
        patch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
        patch.setattr(torch.cuda, "mem_get_info", lambda device=None: (memory, memory))
        patch.setattr(torch.cuda, "memory_reserved", lambda device=None: 0)
        patch.setattr(torch.cuda, "memory_allocated", lambda device=None: 0)
        patch.setattr(FakeTensor, "record_stream", lambda self, stream: None, raising=False)
        patch.setattr(streams, "PINNED", False)
        # Module.to() makes new parameters: the old ones' memory cannot become the device's.
        patch.setattr(torch.__future__, "_overwrite_module_params_on_conversion", True)
        with FakeDevice() as mode:
            patch.setattr(FakeDevice, "current", mode)
            yield mode
