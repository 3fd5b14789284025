"""The terms of SAFR's loss: token importance (VMASK), and the penalties of overlap and of interaction."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from npeff.errors import ArgumentError, DataError


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
    """Give the mask ``(batch, n)`` as numbers 0 and 1 in the dtype and on the device of ``like (batch, n, …)``.

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
    """Learn with the task which tokens matter (Chen & Ji 2020, arXiv 2010.00667).

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
        for name, value in (("dim", dim), ("hidden", hidden), ("temperature", temperature)):
            if not value > 0:
                raise ArgumentError(f"{name}: expected a number > 0, got {value!r}")
        self.inner, self.outer = nn.Linear(dim, hidden), nn.Linear(hidden, 2)
        self.temperature = temperature
        self.keep: Tensor | None = None

    def forward(self, embeddings: Tensor) -> Tensor:
        """Mask embeddings ``(batch, n, dim)``."""
        logits = self.outer(torch.tanh(self.inner(embeddings)))
        self.keep = torch.softmax(logits, -1)[..., 0]
        r = F.gumbel_softmax(logits, self.temperature, hard=True)[..., 0] if self.training else self.keep
        return embeddings * r[..., None]

    def importance(self, embeddings: Tensor) -> Tensor:
        """Compute the probability of each token to be kept, in the shape of the embeddings ``(…, dim)`` without dim."""
        return torch.softmax(self.outer(torch.tanh(self.inner(embeddings))), -1)[..., 0]

    def entropy(self, mask: Tensor) -> Tensor:
        """Mean entropy of the last batch's masks over real tokens, in nats, at most log 2.

        The training subtracts a multiple of it that falls to 0: early on masks stay undecided, and tokens get tried.

        Args:
            mask: ``(batch, n)`` numbers 0 and 1.
        """
        if self.keep is None:
            return mask.new_zeros(())
        p = self.keep.clamp(1e-6, 1 - 1e-6)
        h = -(p * p.log() + (1 - p) * (1 - p).log())
        return ((h * mask).sum(1) / mask.sum(1)).mean()
