"""SAFR's loss: token importance (VMASK), penalties of overlap and interaction, and hooks that read any transformer."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from npeff.errors import ArgumentError, DataError, ModelError, check_integer, check_number


def importance_loss(x: Tensor, mask: Tensor | None = None, *, cosine: bool = False) -> Tensor:
    """Compute ``L_imp = mean_i ‖(x̂_i · x_j)_{j≠i}‖₂ / √d``, x̂ = x/‖x‖ (Chang, Deng, Chen 2025, arXiv 2501.16374).

    x are the embeddings times their mask r (:class:`VMask`): a token that the mask drops is the zero vector and
    overlaps nothing. The mean is over the real tokens of an example, then over examples. An example with one real token
    counts 0.

    Args:
        x: ``(batch, n, d)``.
        mask: ``(batch, n)``, true for real tokens; all by default.
        cosine: x̂_j in place of x_j: then no change of the embeddings' scale changes the loss.

    Returns:
        A scalar.

    Raises:
        ArgumentError: Wrong shapes.
        DataError: An example is all padding.
    """
    if x.ndim != 3:
        raise ArgumentError(f"x: expected embeddings (batch, n, d), got shape {tuple(x.shape)}")
    real = token_mask(mask, x)
    x = x * real[..., None]
    norms = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    units = x / torch.where(norms > 0, norms, torch.ones_like(norms))
    overlaps = units @ (units if cosine else x).transpose(-1, -2)
    diagonal = torch.eye(x.shape[1], dtype=torch.bool, device=x.device)
    lengths = torch.linalg.vector_norm(overlaps.masked_fill(diagonal, 0), dim=-1)
    return ((lengths * real).sum(1) / real.sum(1)).mean() / x.shape[2] ** 0.5


def interaction_loss(attention: Tensor, mask: Tensor | None = None) -> Tensor:
    """Compute ``L_inter``, the mean over heads and pairs i≠k of ``C_ik (1 − J_ik)``, ``J_ik = Σ_j A_ij A_kj``.

    SAFR's penalty of interaction (arXiv 2501.16374): a pair that attention correlates (C large) costs little where both
    tokens attend alike (J large). Columns of padding are taken out of A and the rows scaled to sum 1 again, which gives
    C, and A in J.

    Args:
        attention: ``(batch, heads, n, n)`` weights, row i over what token i attends to.
        mask: ``(batch, n)``, true for real tokens; all by default.

    Returns:
        A scalar: the mean over pairs, then heads, then examples.

    Raises:
        ArgumentError: Wrong shapes.
        DataError: An example is all padding, or has rows without a finite sum.
    """
    if attention.ndim != 4 or attention.shape[2] != attention.shape[3]:
        raise ArgumentError(f"attention: expected weights (batch, heads, n, n), got shape {tuple(attention.shape)}")
    real = token_mask(mask, attention[:, 0])
    pairs = real[:, :, None] * real[:, None, :]
    A = torch.where(pairs[:, None] > 0, attention, torch.zeros_like(attention))
    if not torch.isfinite(A).all():
        raise DataError(
            "attention: the weights of real tokens hold NaN or infinity; the model met an example without real "
            "tokens, or diverged"
        )
    sums = A.sum(-1, keepdim=True)
    C = A / torch.where(sums > 0, sums, torch.ones_like(sums))  # attention dropout may have taken a whole row
    J = C @ C.transpose(-1, -2)
    pairs = pairs * (1 - torch.eye(A.shape[-1], device=A.device, dtype=pairs.dtype))
    per_head = (C * (1 - J) * pairs[:, None]).sum((-1, -2)) / pairs.sum((-1, -2)).clamp_min(1)[:, None]
    return per_head.mean()


def token_mask(mask: Any, like: Tensor) -> Tensor:
    """Return the mask ``(batch, n)`` as numbers 0 and 1 in the dtype and on the device of ``like (batch, n, …)``.

    Raises:
        ArgumentError: It is of another shape, or holds something else than truth values.
        DataError: An example is all padding.
    """
    if mask is None:
        return like.new_ones(like.shape[:2])
    mask = torch.as_tensor(mask)
    if mask.shape != like.shape[:2]:
        raise ArgumentError(f"mask: expected shape {tuple(like.shape[:2])} (batch, n), got {tuple(mask.shape)}")
    real = mask.to(like.device) != 0
    if mask.dtype != torch.bool and not bool(((mask == 0) | (mask == 1)).all()):
        raise ArgumentError("mask: expected True or 1 for real tokens and False or 0 for padding, got other values")
    empty = torch.nonzero(~real.any(1)).flatten()
    if len(empty):
        raise DataError(
            f"mask: example {int(empty[0])} of the batch is all padding; leave it out, or, if your mask is true for "
            "padding, pass its inverse"
        )
    return real.to(like.dtype)


class VMask(nn.Module):
    """A mask that learns with the task which tokens matter (Chen & Ji 2020, arXiv 2010.00667).

    ``logits = W₂ tanh(W₁ e)``, ``x = r · e``. In training r is 0 or 1, a hard Gumbel-softmax sample whose gradient is
    the soft one's; in evaluation r is the softmax's probability to keep the token. Padding is left as it is: the losses
    take the token mask.

    Args:
        dim: Elements of an embedding.
        hidden: Rows of W₁; by default ``dim``.
        temperature: Of the Gumbel-softmax.

    Attributes:
        keep: ``(batch, n)`` probability of each token of the last batch to be kept, with its gradient.

    Raises:
        ArgumentError: A size or the temperature is not positive.
    """

    def __init__(self, dim: int, hidden: int | None = None, temperature: float = 1.0) -> None:
        super().__init__()
        hidden = dim if hidden is None else hidden
        check_integer("dim", dim)
        check_integer("hidden", hidden)
        check_number("temperature", temperature)
        self.inner, self.outer = nn.Linear(dim, hidden), nn.Linear(hidden, 2)
        self.temperature = temperature
        self.keep: Tensor | None = None

    def forward(self, embeddings: Tensor) -> Tensor:
        """Mask embeddings ``(batch, n, dim)``."""
        logits = self._logits(embeddings)
        self.keep = torch.softmax(logits, -1)[..., 0]
        r = F.gumbel_softmax(logits, self.temperature, hard=True)[..., 0] if self.training else self.keep
        return embeddings * r[..., None]

    def __getstate__(self) -> dict[str, Any]:
        """Leave ``keep`` out of copies and pickles: tensors with a graph have neither."""
        return {**self.__dict__, "keep": None}

    def importance(self, embeddings: Tensor) -> Tensor:
        """Compute the probability of each token to be kept, in the shape of the embeddings ``(…, dim)`` without dim."""
        return torch.softmax(self._logits(embeddings), -1)[..., 0]

    def _logits(self, embeddings: Tensor) -> Tensor:
        logits: Tensor = self.outer(torch.tanh(self.inner(embeddings)))
        return logits

    def entropy(self, mask: Tensor) -> Tensor:
        """Compute the mean entropy of the last batch's masks over real tokens, in nats, at most log 2.

        The training subtracts a multiple of it that falls to 0: early on masks stay undecided, and tokens get tried.

        Args:
            mask: ``(batch, n)`` numbers 0 and 1.
        """
        if self.keep is None:
            return mask.new_zeros(())
        least = max(1e-6, torch.finfo(self.keep.dtype).eps)  # so that 1 − least is not 1 in half precision either
        p = self.keep.clamp(least, 1 - least)
        h = -(p * p.log() + (1 - p) * (1 - p).log())
        return ((h * mask).sum(1) / mask.sum(1)).mean()


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
            check_number(name, value, zero=True)
        if not isinstance(model, nn.Module):
            raise ArgumentError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
        if vmask is not None and not isinstance(vmask, VMask):
            raise ArgumentError(f"vmask: expected a VMask or None, got {type(vmask).__name__}")
        if isinstance(attention, str) or not isinstance(attention, Sequence | nn.ModuleList):
            attention = attention if attention == "auto" else [attention]
        if interaction and not len(attention):
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
        self._handles: list[RemovableHandle] = []

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
                *(handle for name, module in self._attention for handle in _tap(name, module, self._weights)),
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
        """Compute L_imp and L_inter of the model's last forward pass, means over modules and calls.

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
    if which != "auto":
        return [_find_module(model, item, "attention") for item in which]
    found = [(name, module) for name, module in model.named_modules() if _is_attention(module)]
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


def _tap(name: str, module: nn.Module, into: list[Tensor]) -> list[RemovableHandle]:
    """Collect the weights ``(batch, heads, n, n)`` of one attention module, whose callers get what they asked for."""
    asked: list[tuple[bool, bool]] = []

    def ask(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Make nn.MultiheadAttention return the weights of every head."""
        given = inspect.signature(nn.MultiheadAttention.forward).bind(module, *args, **kwargs).arguments
        del given["self"]
        asked.append((bool(given.get("need_weights", True)), bool(given.get("average_attn_weights", True))))
        return (), {**given, "need_weights": True, "average_attn_weights": False}

    def take(_: nn.Module, __: Any, output: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor | None]:
        result, weights = output
        into.append(weights if weights.ndim == 4 else weights[None])
        needed, averaged = asked.pop()
        return result, None if not needed else weights.mean(-3) if averaged else weights

    def look(module: nn.Module, _: Any, output: Any) -> None:
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
                f"attention: module {name!r} ({type(module).__name__}) returned no attention weights (batch, heads, n, "
                "n). A Hugging Face model needs attn_implementation='eager' (from_pretrained or config), fused "
                "attention has none; otherwise name other modules, or pass attention=() with interaction=0"
            )
        into.append(found[-1])

    if isinstance(module, nn.MultiheadAttention):
        return [module.register_forward_pre_hook(ask, with_kwargs=True), module.register_forward_hook(take)]
    return [module.register_forward_hook(look)]
