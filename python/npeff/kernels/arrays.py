"""Check numpy, torch and CuPy arguments (the last by DLPack), and return results of the same kind."""

from __future__ import annotations

import functools
import operator
import warnings
from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from typing import Any, ParamSpec, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.dlpack import from_dlpack

from npeff.errors import ArgumentError

Array = npt.NDArray[Any]
Operand = Array | torch.Tensor
A = TypeVar("A", npt.NDArray[Any], torch.Tensor)
P = ParamSpec("P")
R = TypeVar("R")

MOST_COLUMNS = 1 << 48
"""Columns that a matrix may have."""
MOST_INDEX = 1 << 62
"""Flat indices end there."""
ALL_FINITE = 2**63 - 1
"""What kernels write in the place of a row's number when nothing non-finite was found."""


def dtype_name(x: Operand) -> str:
    """Return the name of the dtype, ``"float32"``, ``"int64"``, …, of either kind."""
    return _name(x.dtype)


@functools.cache
def _name(dtype: torch.dtype | np.dtype[Any]) -> str:
    return str(dtype).removeprefix("torch.") if isinstance(dtype, torch.dtype) else dtype.name


def check(x: A, name: str, dtypes: tuple[str, ...], shape: tuple[int | None, ...]) -> A:
    """Check dtype and shape of x, and return x itself without gradient; None stands for any length.

    What cannot be read in place is copied: an address that is no multiple of the element's size, and a tensor whose
    sign is only noted (the negative bit).

    Raises:
        ArgumentError: Dtype or shape does not fit, or x is no ordinary array in memory; the message names the argument.
    """
    x = _ordinary(x, name)
    if dtype_name(x) not in dtypes:
        raise ArgumentError(f"{name}: expected {' or '.join(dtypes)}, got {dtype_name(x)}")
    if len(x.shape) != len(shape) or any([want not in (None, got) for want, got in zip(shape, x.shape, strict=True)]):
        expected = ", ".join("any" if want is None else str(want) for want in shape)
        raise ArgumentError(f"{name}: expected shape ({expected}), got {tuple(x.shape)}")
    if isinstance(x, torch.Tensor):
        x = x.resolve_neg().detach()
        misaligned = x.device.type == "cpu" and x.numel() > 0 and x.data_ptr() % x.element_size() != 0
        return x.clone() if misaligned else x
    return x if x.flags.aligned else x.copy()


def check_output(out: A, name: str, dtype: str, shape: tuple[int, ...], **others: Operand | None) -> A:
    """Check that an array can be written to: C-contiguous, writable, and apart from the others.

    Args:
        out: The array.
        name: Of the argument.
        dtype: That it must have.
        shape: That it must have.
        **others: Arguments that it must not share memory with.

    Returns:
        The array itself; for a tensor, a view of it.

    Raises:
        ArgumentError: The array cannot be written to; the message names the argument.
    """
    x = _ordinary(out, name)
    if dtype_name(x) != dtype:
        raise ArgumentError(f"{name}: expected {dtype}, got {dtype_name(x)}")
    if tuple(x.shape) != shape:
        raise ArgumentError(f"{name}: expected shape {shape}, got {tuple(x.shape)}")
    if isinstance(x, torch.Tensor):
        if x.is_inference() and not torch.is_inference_mode_enabled():
            raise ArgumentError(f"{name}: expected a tensor that can be written to, got an inference tensor; clone it")
        if x.requires_grad:
            raise ArgumentError(f"{name}: expected a tensor without gradient, got one that requires it; detach it")
        aligned = x.device.type != "cpu" or x.numel() == 0 or x.data_ptr() % x.element_size() == 0
        usable = x.is_contiguous() and not x.is_neg() and aligned
    else:
        if not x.flags.writeable:
            raise ArgumentError(f"{name}: expected a writable array, got a read-only one")
        usable = x.flags.c_contiguous and x.flags.aligned and x.dtype.isnative
    if not usable:
        raise ArgumentError(
            f"{name}: expected a C-contiguous array in native byte order, got one with other strides, alignment or "
            "order; leave it out for a fresh one"
        )
    for other, given in others.items():
        if given is not None and _overlap(x, given):
            raise ArgumentError(f"{name}: must not be the same memory as {other}, nor overlap it; use a copy")
    return x


def _ordinary(x: A, name: str) -> A:
    """The array as an ndarray or a plain tensor that has memory.

    Raises:
        ArgumentError: It is none.
    """
    if isinstance(x, np.ndarray):
        if isinstance(x, np.ma.MaskedArray):
            raise ArgumentError(f"{name}: expected an array without a mask, got a masked array; fill it with .filled()")
        return np.asarray(x)
    if not isinstance(x, torch.Tensor):
        raise ArgumentError(f"{name}: expected a torch tensor or a numpy array, got {type(x).__name__}")
    if x.is_nested or x.layout is not torch.strided or x.is_quantized:
        found = "a nested one" if x.is_nested else "a quantised one" if x.is_quantized else f"one of layout {x.layout}"
        raise ArgumentError(f"{name}: expected a dense tensor, got {found}; make it dense first")
    if x.device.type != "cpu":
        return x
    try:
        if type(x) is torch.Tensor:
            empty = x.numel() > 0 and x.data_ptr() == 0
        else:
            with warnings.catch_warnings(), torch._C.DisableTorchFunctionSubclass():
                warnings.simplefilter("ignore")  # torch warns of asking fake tensors
                x = x.as_subclass(torch.Tensor)
                empty = x.numel() > 0 and x.data_ptr() == 0
    except Exception as error:  # what torch raises differs from wrapper to wrapper
        raise ArgumentError(f"{name}: expected a tensor that lies in memory, got one that does not ({error})") from None
    if empty:
        raise ArgumentError(f"{name}: expected a tensor that lies in memory, got one that does not (a fake tensor?)")
    return x


def _overlap(a: Operand, b: Operand) -> bool:
    """Whether the two may share a byte: whether what they span does."""
    (at, begin, end), (there, other_begin, other_end) = _span(a), _span(b)
    return at == there and begin < other_end and other_begin < end


def _span(x: Operand) -> tuple[str, int, int]:
    """Device, first address, and the address behind the last byte."""
    if isinstance(x, torch.Tensor):
        size, start, device = x.element_size(), x.data_ptr() if x.numel() else 0, str(x.device)
        steps = [size * step for step in x.stride()]
    else:
        size, start, device = x.itemsize, int(x.__array_interface__["data"][0]), "cpu"
        steps = list(x.strides)
    if 0 in x.shape:
        return device, 0, 0
    reach = [step * (length - 1) for step, length in zip(steps, x.shape, strict=True)]
    return device, start + sum(min(r, 0) for r in reach), start + sum(max(r, 0) for r in reach) + size


def integer(value: Any, name: str, least: int, most: int) -> int:
    """Return the value as an int within bounds.

    Raises:
        ArgumentError: The value is no such integer; the message names the argument.
    """
    try:
        number = operator.index(value)
    except Exception:  # arrays and tensors raise what they like
        number = None
    if number is None or isinstance(value, bool | np.bool_):
        got = repr(value) if isinstance(value, str | float | bool | None) else type(value).__name__
        raise ArgumentError(f"{name}: expected an integer, got {got}")
    if not least <= number <= most:
        bounds = f"≥ {least}" if number < least and most >= 1 << 40 else f"{least} … {most}"
        raise ArgumentError(f"{name}: expected {bounds}, got {number}")
    return number


def flag(value: Any, name: str) -> bool:
    """Return the value as a bool.

    Raises:
        ArgumentError: The value is no bool; the message names the argument.
    """
    if not isinstance(value, bool | np.bool_):
        raise ArgumentError(f"{name}: expected True or False, got {type(value).__name__}")
    return bool(value)


def same_device(**operands: Operand | None) -> torch.device:
    """Return the one device of all operands (numpy is CPU).

    Raises:
        ArgumentError: The operands are on several devices, or on one without data; the message says which is where.
    """
    devices = {name: device_of(x) for name, x in operands.items() if x is not None}
    if len(set(devices.values())) > 1:
        where = ", ".join(f"{name} on {device}" for name, device in devices.items())
        raise ArgumentError(f"expected all arguments on one device, got {where}; move them with .to(device)")
    name, device = next(iter(devices.items()))
    if device.type == "meta":
        raise ArgumentError(f"{name}: expected a tensor that lies in memory, got one on the meta device")
    return device


def device_of(x: Operand) -> torch.device:
    """Return the device of either kind."""
    return x.device if isinstance(x, torch.Tensor) else torch.device("cpu")


def contiguous(x: A) -> A:
    """Return x, copied when it is not C-contiguous and aligned in native byte order.

    Raises:
        MemoryError: There is not enough for the copy.
    """
    if isinstance(x, torch.Tensor):
        try:
            return x.contiguous()
        except RuntimeError as error:  # torch has no other one for memory
            raise MemoryError(f"no memory for a contiguous copy of shape {tuple(x.shape)} ({error})") from None
    return np.require(x, x.dtype.newbyteorder("="), ["C", "A"])


def empty(shape: tuple[int, ...], dtype: str, device: torch.device) -> Operand:
    """Allocate uninitialised memory for a kernel: a tensor on a device, an array on the CPU, which is read faster."""
    if device.type == "cpu":
        return np.empty(shape, dtype)
    return torch.empty(shape, dtype=getattr(torch, dtype), device=device)


def on_host(x: Operand) -> Array:
    """Return x as a C-contiguous array."""
    same_device(x=x)
    return contiguous(x.cpu().numpy() if isinstance(x, torch.Tensor) else x)


def as_tensor(x: Operand) -> torch.Tensor:
    """Return x as a tensor in shared memory, but copy a read-only array (torch has no read-only tensors)."""
    if isinstance(x, torch.Tensor):
        return x
    x = contiguous(x)
    return torch.from_numpy(x if x.flags.writeable else x.copy())


def like(model: A, result: Operand) -> A:
    """Return the result as a tensor if the model is one, else as an array, in shared memory."""
    if isinstance(model, torch.Tensor):
        return result if isinstance(result, torch.Tensor) else torch.from_numpy(result)
    return result.numpy() if isinstance(result, torch.Tensor) else result


def is_cupy(x: object) -> bool:
    """Say whether x is a CuPy array (without importing CuPy)."""
    return type(x).__module__.partition(".")[0] == "cupy" and hasattr(x, "__dlpack__")


def accepts_cupy(function: Callable[P, R]) -> Callable[P, R]:
    """Let a function of tensors take CuPy arrays: results are then CuPy arrays, too; no copies.

    The work goes to CuPy's current stream of the arrays' device.
    """

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        found = next((x for x in (*args, *kwargs.values()) if is_cupy(x)), None)
        if found is None:
            return function(*args, **kwargs)
        with _stream_of(found):
            tensors = [_to_torch(x) for x in args]
            named = {name: _to_torch(x) for name, x in kwargs.items()}
            return _to_cupy(function(*tensors, **named))

    return call


def _stream_of(x: Any) -> Any:
    import cupy

    if not torch.cuda.is_available():
        raise ArgumentError(
            "CuPy arrays are handed to torch, whose build here has no CUDA; install a CUDA build of torch"
        )
    device = torch.device("cuda", x.device.id)
    with x.device:
        pointer = cupy.cuda.get_current_stream().ptr
    side = torch.cuda.ExternalStream(pointer, device=device)  # type: ignore[no-untyped-call]
    return torch.cuda.stream(side)


def _to_torch(x: Any) -> Any:
    return from_dlpack(x) if is_cupy(x) else x


def _to_cupy(x: Any) -> Any:
    if isinstance(x, torch.Tensor):
        import cupy

        return cupy.from_dlpack(x.detach())
    if isinstance(x, tuple):
        return tuple(_to_cupy(entry) for entry in x)
    if is_dataclass(x) and not isinstance(x, type):
        return replace(x, **{field.name: _to_cupy(getattr(x, field.name)) for field in fields(x)})
    return x
