"""The CUDA kernels. Imports without a driver; there is no such module in a build without CUDA."""

from typing import TypedDict

class Device(TypedDict):
    index: int
    name: str
    capability: tuple[int, int]
    memory: int

def device_count() -> int: ...
def absence() -> str: ...
def devices() -> list[Device]: ...
