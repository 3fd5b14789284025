"""SAFR on any transformer: hooks read the embeddings and the attention weights of an unmodified model."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Sequence
from types import TracebackType
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from npeff.companions.safr.losses import VMask, importance_loss, interaction_loss, token_mask
from npeff.errors import ArgumentError, ModelError


class SAFRRegularizer(nn.Module):
    """``L = L_CE + λ_imp L_imp + λ_inter L_inter − β H(mask)``: everything but L_CE (arXiv 2501.16374).

    ::

        safr = SAFRRegularizer(model, embeddings="embed", vmask=VMask(256))
        optimizer = Adam([*model.parameters(), *safr.parameters()], 1e-4)
        with safr:                                  # hooks in place
            logits = model(ids, mask)
            loss = cross_entropy(logits, labels) + safr.penalty(mask)

    With a ``vmask`` the embeddings that the model goes on with are masked, in training and afterwards: use the trained
    model under :meth:`attach`. A model that has a :class:`VMask` of its own is given as ``embeddings="name of it"``.

    Args:
        model: Any module; its parameters stay its own.
        embeddings: The module, or its name, whose output ``(batch, n, d)`` is x (before ``vmask``): token embeddings.
        attention: Modules or names; ``"auto"`` finds them, ``()`` for none. They must give their weights:
            ``nn.MultiheadAttention`` is made to; Hugging Face models need ``attn_implementation="eager"``.
        vmask: Put behind ``embeddings``; None where the model has its own, or for x unmasked.
        importance: λ_imp.
        interaction: λ_inter.
        cosine: Use the scale-invariant L_imp: otherwise smaller embeddings lower it too.
        entropy: β; anneal it by setting the attribute of that name.

    Attributes:
        terms: The last penalty's ``importance``, ``interaction`` and ``entropy``, unweighted, detached.

    Raises:
        ArgumentError: There is no such module, or a weight is negative.
        ModelError: No attention module was found.
    """

    def __init__(
        self,
        model: nn.Module,
        embeddings: str | nn.Module,
        attention: str | Sequence[str | nn.Module] = "auto",
        *,
        vmask: VMask | None = None,
        importance: float = 1.0,
        interaction: float = 1.0,
        cosine: bool = False,
        entropy: float = 0.0,
    ) -> None:
        super().__init__()
        for name, value in (("importance", importance), ("interaction", interaction), ("entropy", entropy)):
            if not 0 <= value < float("inf"):
                raise ArgumentError(f"{name}: expected a weight ≥ 0, got {value!r}")
        if interaction and not isinstance(attention, str) and not len(attention):
            raise ArgumentError("attention: interaction > 0 needs attention modules; name them, or pass interaction=0")
        _, source = _find_module(model, embeddings, "embeddings")
        own = source if isinstance(source, VMask) else None
        self._parts = (model, source, vmask or own)  # a tuple, so that the model's parameters are not ours
        self._attention = _attention_modules(model, attention)
        self.vmask = vmask
        self.importance, self.interaction, self.cosine, self.entropy = importance, interaction, cosine, entropy
        self.terms: dict[str, float] = {}
        self._x: list[Tensor] = []
        self._weights: list[Tensor] = []
        self._handles: list[RemovableHandle | _AttentionTap] = []

    @property
    def attached(self) -> bool:
        """Whether the hooks are in place."""
        return bool(self._handles)

    def attach(self) -> SAFRRegularizer:
        """Put the hooks in place, until :meth:`detach`."""
        if not self._handles:
            model, source, _ = self._parts
            self._handles = [
                model.register_forward_pre_hook(self._forget),
                source.register_forward_hook(self._embed),
                *(_AttentionTap(name, module, self._weights) for name, module in self._attention),
            ]
        return self

    def detach(self) -> None:
        """Take the hooks away: the model is as it was, and unmasked."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._forget()

    def __enter__(self) -> SAFRRegularizer:
        return self.attach()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()

    def _forget(self, *_: Any) -> None:
        self._x.clear()
        self._weights.clear()

    def _embed(self, module: nn.Module, args: Any, output: Any) -> Any:
        """Mask the embeddings and keep them.

        Raises:
            ModelError: The module's output is no (batch, n, d) tensor.
        """
        if not isinstance(output, Tensor) or output.ndim != 3 or not output.is_floating_point():
            came = f"shape {tuple(output.shape)}" if isinstance(output, Tensor) else type(output).__name__
            raise ModelError(
                f"embeddings: expected a module whose output is a float tensor (batch, n, d), {type(module).__name__} "
                f"gave {came}"
            )
        x = output if self.vmask is None else self.vmask(output)
        self._x.append(x)
        return x

    def losses(self, mask: Tensor | None = None, *, cosine: bool | None = None) -> tuple[Tensor, Tensor]:
        """L_imp and L_inter of the model's last forward pass, means over what was called several times.

        Args:
            mask: ``(batch, n)``, true for real tokens; all by default.
            cosine: The scale-invariant L_imp; by default as constructed.

        Raises:
            ModelError: The hooks are not in place, or the model has not run since.
            ArgumentError: The mask does not fit.
            DataError: An example is all padding.
        """
        if not self._x:
            state = "run the model first" if self._handles else "use it as 'with regularizer:', or call attach()"
            raise ModelError(f"SAFRRegularizer: no embeddings were seen; {state}")
        if self._attention and not self._weights:
            raise ModelError(
                f"SAFRRegularizer: attention modules {[name for name, _ in self._attention]} were not called by the "
                "last forward pass; a fused path went around them (Hugging Face: attn_implementation='eager')"
            )
        flat = self.cosine if cosine is None else cosine
        imp = sum((importance_loss(x, mask, cosine=flat) for x in self._x), self._x[0].new_zeros(())) / len(self._x)
        if not self._weights:
            return imp, imp.new_zeros(())
        each = [interaction_loss(weights, mask) for weights in self._weights]
        return imp, sum(each, each[0].new_zeros(())) / len(each)

    def penalty(self, mask: Tensor | None = None) -> Tensor:
        """Compute ``λ_imp L_imp + λ_inter L_inter − β H`` of the model's last forward pass: add it to the task's loss.

        Args:
            mask: ``(batch, n)``, true for real tokens; all by default.

        Raises:
            ModelError: See :meth:`losses`.
            ArgumentError: See :meth:`losses`.
            DataError: See :meth:`losses`.
        """
        imp, inter = self.losses(mask)
        masker = self._parts[2]
        entropy = masker.entropy(token_mask(mask, self._x[0])) if masker is not None else imp.new_zeros(())
        self.terms = {"importance": imp.item(), "interaction": inter.item(), "entropy": entropy.item()}
        return self.importance * imp + self.interaction * inter - self.entropy * entropy


def _attention_modules(model: nn.Module, which: str | Sequence[str | nn.Module]) -> list[tuple[str, nn.Module]]:
    """Find the modules whose attention weights count, with their names.

    ``"auto"`` takes every ``nn.MultiheadAttention``, and every innermost module whose class is named ``…Attention``, as
    in Hugging Face's models.

    Raises:
        ArgumentError: A name is none of the model's modules.
        ModelError: ``"auto"`` finds none.
    """
    named = dict(model.named_modules())
    if isinstance(which, str) and which != "auto":
        which = [which]
    if not isinstance(which, str):
        return [_find_module(model, item, "attention") for item in which]
    found = [(name, module) for name, module in named.items() if _is_attention(module)]
    inner = [(name, module) for name, module in found if not any(map(_is_attention, list(module.modules())[1:]))]
    if not inner:
        raise ModelError(
            "attention: no module of the model is an nn.MultiheadAttention or of a class named …Attention; pass the "
            "names of those whose output holds weights (batch, heads, n, n), or attention=() with interaction=0"
        )
    return inner


def _find_module(model: nn.Module, which: str | nn.Module, argument: str) -> tuple[str, nn.Module]:
    """Find one module of the model, by its name or by itself.

    Raises:
        ArgumentError: It is none of the model's modules.
    """
    for name, module in model.named_modules():
        if module is which or (isinstance(which, str) and name == which):
            return name, module
    names = [name for name, _ in model.named_modules() if name]
    near = difflib.get_close_matches(str(which), names, n=3) if isinstance(which, str) else names[:3]
    hint = f"; it has {', '.join(map(repr, near or names[:5]))} …" if names else ""
    raise ArgumentError(
        f"{argument}: the model has no module {which if isinstance(which, str) else type(which).__name__!r}{hint}"
    )


def _is_attention(module: nn.Module) -> bool:
    return isinstance(module, nn.MultiheadAttention) or type(module).__name__.endswith("Attention")


class _AttentionTap:
    """Collects the weights of one attention module; its callers still get what they asked for.

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
        given = inspect.signature(nn.MultiheadAttention.forward).bind(module, *args, **kwargs).arguments
        del given["self"]
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
