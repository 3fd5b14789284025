"""Check the devices that can be computed on here."""

from __future__ import annotations

import torch

from npeff.errors import ArgumentError


def has_own_memory(device: torch.device) -> bool:
    """Tell whether a device has memory of its own, and works asynchronously."""
    return device.type == "cuda"


def usable_device(device: torch.device | str) -> torch.device:
    """Check that a device can hold tensors.

    Args:
        device: ``"cpu"``, ``"cuda"``, ``"cuda:1"``, … or a ``torch.device``.

    Returns:
        The device.

    Raises:
        ArgumentError: It does not exist, or cannot be used here.
    """
    try:
        found = torch.device(device)
        if found.type == "meta":
            raise NotImplementedError("tensors on it have no values")
        torch.empty(1, device=found)
    except (RuntimeError, AssertionError, NotImplementedError, TypeError, ImportError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].split(". ")[0].rstrip(".")
        raise ArgumentError(
            f"device: {device!r} cannot be used here ({reason}); `npeff doctor` says what can"
        ) from error
    return found
