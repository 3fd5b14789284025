"""The CUDA kernels, called by keyword through :class:`npeff.kernels.dispatch.Compiled`; ``help()`` lists the arguments.

Imports without a driver; there is no such module in a build without CUDA. Arrays are C-contiguous torch tensors on one
device (DLPack); outputs are filled on ``stream``, and nothing is waited for.
"""

from typing import Any, TypedDict

class Device(TypedDict):
    index: int
    name: str
    capability: tuple[int, int]
    memory: int

def device_count() -> int: ...
def absence() -> str: ...
def toolkit() -> tuple[int, int]: ...
def usable(device: int) -> str: ...
def devices() -> list[Device]: ...
def __getattr__(name: str) -> Any: ...
