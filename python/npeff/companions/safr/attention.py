"""Attention weights out of unmodified models: which modules have them, and how they are made to give them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from npeff.errors import ArgumentError, ModelError


def attention_modules(model: nn.Module, which: str | Sequence[str | nn.Module] = "auto") -> list[tuple[str, nn.Module]]:
    """The modules whose attention weights count.

    Args:
        model: Any module.
        which: Names or modules; ``"auto"``: every ``nn.MultiheadAttention``, and every innermost module whose class is
            named ``…Attention``, as in Hugging Face's models.

    Returns:
        Names and modules.

    Raises:
        ArgumentError: A name is none of the model's modules.
        ModelError: ``"auto"`` finds none.
    """
    named = dict(model.named_modules())
    if isinstance(which, str) and which != "auto":
        which = [which]
    if not isinstance(which, str):
        return [find_module(model, item, "attention") for item in which]
    found = [(name, module) for name, module in named.items() if _is_attention(module)]
    inner = [(name, module) for name, module in found if not any(map(_is_attention, list(module.modules())[1:]))]
    if not inner:
        raise ModelError(
            "attention: no module of the model is an nn.MultiheadAttention or of a class named …Attention; pass the "
            "names of those whose output holds weights (batch, heads, n, n), or attention=() with interaction=0"
        )
    return inner


def find_module(model: nn.Module, which: str | nn.Module, argument: str) -> tuple[str, nn.Module]:
    """One module of the model, by name or itself.

    Raises:
        ArgumentError: It is none of the model's modules.
    """
    for name, module in model.named_modules():
        if module is which or (isinstance(which, str) and name == which):
            return name, module
    import difflib

    names = [name for name, _ in model.named_modules() if name]
    near = difflib.get_close_matches(str(which), names, n=3) if isinstance(which, str) else names[:3]
    hint = f"; it has {', '.join(map(repr, near or names[:5]))} …" if names else ""
    raise ArgumentError(
        f"{argument}: the model has no module {which if isinstance(which, str) else type(which).__name__!r}{hint}"
    )


def _is_attention(module: nn.Module) -> bool:
    return isinstance(module, nn.MultiheadAttention) or type(module).__name__.endswith("Attention")


class AttentionTap:
    """Collects the weights of one attention module, and leaves its callers what they asked for.

    Args:
        name: Of the module, for messages.
        module: The module.
        into: Where weights ``(batch, heads, n, n)`` go, forward by forward.
    """

    def __init__(self, name: str, module: nn.Module, into: list[Tensor]) -> None:
        self._name, self._into = name, into
        self._asked: list[tuple[bool, bool]] = []
        self._handles: list[RemovableHandle] = []
        if isinstance(module, nn.MultiheadAttention):
            self._handles.append(module.register_forward_pre_hook(self._ask, with_kwargs=True))
            self._handles.append(module.register_forward_hook(self._take))
        else:
            self._handles.append(module.register_forward_hook(self._look))

    def remove(self) -> None:
        """Leave the module as it was."""
        for handle in self._handles:
            handle.remove()

    def _ask(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Make nn.MultiheadAttention return the weights of every head."""
        names = (
            "query",
            "key",
            "value",
            "key_padding_mask",
            "need_weights",
            "attn_mask",
            "average_attn_weights",
            "is_causal",
        )
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        self._asked.append((bool(given.get("need_weights", True)), bool(given.get("average_attn_weights", True))))
        return (), {**given, "need_weights": True, "average_attn_weights": False}

    def _take(
        self, module: nn.Module, args: tuple[Any, ...], output: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor | None]:
        result, weights = output
        self._into.append(weights if weights.ndim == 4 else weights[None])
        needed, averaged = self._asked.pop()
        return result, None if not needed else weights.mean(-3) if averaged else weights

    def _look(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Find the weights in the output of any other attention module.

        Raises:
            ModelError: It gives none.
        """
        parts = output if isinstance(output, tuple | list) else (output,)
        found = [
            part for part in parts if isinstance(part, Tensor) and part.ndim == 4 and part.shape[2] == part.shape[3]
        ]
        if not found:
            raise ModelError(
                f"attention: module {self._name!r} ({type(module).__name__}) returned no attention weights (batch, "
                "heads, n, n). A Hugging Face model needs attn_implementation='eager' (from_pretrained or config), "
                "fused attention has none; otherwise name other modules, or pass attention=() with "
                "interaction=0"
            )
        self._into.append(found[-1])
