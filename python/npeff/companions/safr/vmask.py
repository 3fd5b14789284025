"""VMASK: which tokens matter, learnt with the task (Chen & Ji 2020, arXiv 2010.00667)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from npeff.errors import ArgumentError


class VMask(nn.Module):
    """``logits = W₂ tanh(W₁ e)``, ``x = r · e``: r a sample in training, a probability in evaluation.

    In training r is 0 or 1, a hard Gumbel-softmax sample whose gradient is the soft one's; in evaluation it is the
    softmax's probability to keep the token. Padding is left as it is: the losses take the token mask.

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
        """The probability of each token to be kept, ``(batch, n)`` or as the embeddings ``(…, dim)`` have it."""
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
