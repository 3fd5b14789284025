"""Arrays in, the same kind out: numpy and torch at the kernels' door."""

from __future__ import annotations

from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from npeff.errors import ArgumentError

Array = npt.NDArray[Any]
Operand = Array | torch.Tensor
A = TypeVar("A", npt.NDArray[Any], torch.Tensor)


def dtype_name(x: Operand) -> str:
    """``"float32"``, ``"int64"``, … for either kind."""
    return str(x.dtype).removeprefix("torch.") if isinstance(x, torch.Tensor) else x.dtype.name


def check(x: A, name: str, dtypes: tuple[str, ...], shape: tuple[int | None, ...]) -> A:
    """The array x itself (without gradient), once dtype and shape fit; None stands for any length.

    Raises:
        ArgumentError: It has not; the message names the argument.
    """
    if not isinstance(x, torch.Tensor | np.ndarray):
        raise ArgumentError(f"{name}: expected a torch tensor or a numpy array, got {type(x).__name__}")
    if dtype_name(x) not in dtypes:
        raise ArgumentError(f"{name}: expected {' or '.join(dtypes)}, got {dtype_name(x)}")
    if len(x.shape) != len(shape) or any(want not in (None, got) for want, got in zip(shape, x.shape, strict=True)):
        expected = ", ".join("any" if want is None else str(want) for want in shape)
        raise ArgumentError(f"{name}: expected shape ({expected}), got {tuple(x.shape)}")
    return x.detach() if isinstance(x, torch.Tensor) else x


def same_device(**operands: Operand | None) -> torch.device:
    """The one device of all operands (numpy is CPU).

    Raises:
        ArgumentError: They are on several; the message says which is where.
    """
    devices = {name: device_of(x) for name, x in operands.items() if x is not None}
    if len(set(devices.values())) > 1:
        where = ", ".join(f"{name} on {device}" for name, device in devices.items())
        raise ArgumentError(f"expected all arguments on one device, got {where}; move them with .to(device)")
    return next(iter(devices.values()))


def device_of(x: Operand) -> torch.device:
    """Device of either kind."""
    return x.device if isinstance(x, torch.Tensor) else torch.device("cpu")


def contiguous(x: A) -> A:
    """x, copied when it is not C-contiguous in native byte order."""
    if isinstance(x, torch.Tensor):
        return x.contiguous()
    return np.ascontiguousarray(x, x.dtype.newbyteorder("="))


def as_tensor(x: Operand) -> torch.Tensor:
    """X as a tensor: shared memory, but a copy of a read-only array (torch has no read-only tensors)."""
    if isinstance(x, torch.Tensor):
        return x
    x = contiguous(x)
    return torch.from_numpy(x if x.flags.writeable else x.copy())


def like(model: A, result: Operand) -> A:
    """The result as a tensor if the model is one, else as an array; shared memory."""
    if isinstance(model, torch.Tensor):
        return result if isinstance(result, torch.Tensor) else torch.from_numpy(result)
    return result.numpy() if isinstance(result, torch.Tensor) else result
