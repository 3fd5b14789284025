"""Companions of NPEFF: contributions of the input, influence of training examples, and units easier to read."""

from importlib import import_module as _import_module

_NAMES = ("influence", "linearize", "rollback", "safr")  # imported at first use


def __getattr__(name: str) -> object:
    """Import a companion.

    Raises:
        AttributeError: There is no such companion.
    """
    if name in _NAMES:
        return _import_module(f"npeff.companions.{name}")
    raise AttributeError(f"module 'npeff.companions' has no attribute {name!r}")


def __dir__() -> list[str]:
    """List the companions."""
    return sorted(_NAMES)
