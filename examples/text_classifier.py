"""A small transformer that classifies texts, its vocabulary, and its training with SAFR.

The scripts on SAFR share this module: ``examples/safr_reviews.py``, ``benchmarks/safr.py`` and the tests.
"""

from __future__ import annotations

import copy
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, get_args

import torch
from scipy.stats import mannwhitneyu
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from npeff.companions.safr import SAFRRegularizer, VMask
from npeff.errors import ArgumentError, DataError, ModelError

_WORD = re.compile(r"[a-z0-9]+(?:'[a-z]+)?|[!?]")
PADDING, UNKNOWN = 0, 1
Split = tuple[Tensor, Tensor, Tensor]
"""Token ids ``(n, length)``, mask ``(n, length)`` true for real tokens, labels ``(n,)``."""


def words_of(text: str) -> list[str]:
    """Lower-case words, numbers, and the signs ! and ?."""
    return _WORD.findall(text.lower())


@dataclass(frozen=True)
class WordVocabulary:
    """Words by id; 0 is padding, 1 any unknown word.

    Attributes:
        words: Names by id.
    """

    words: tuple[str, ...]

    @classmethod
    def of(cls, texts: Iterable[str], size: int = 8000, least: int = 2) -> WordVocabulary:
        """The most frequent words of some texts, ties by spelling.

        Args:
            texts: Training texts.
            size: At most so many ids.
            least: A word must occur so often.

        Raises:
            ArgumentError: ``size`` is below 3.
        """
        if size < 3:
            raise ArgumentError(f"size: expected at least 3, got {size!r}")
        counts = Counter(word for text in texts for word in words_of(text))
        known = sorted((word for word, n in counts.items() if n >= least), key=lambda word: (-counts[word], word))
        return cls(("<pad>", "<unknown>", *known[: size - 2]))

    def __len__(self) -> int:
        return len(self.words)

    @cached_property
    def _ids(self) -> dict[str, int]:
        return {word: i for i, word in enumerate(self.words)}

    def encode(self, texts: Sequence[str], length: int = 64) -> tuple[Tensor, Tensor]:
        """Texts as ids and mask, ``(n, length)`` int64 and bool; longer texts are cut.

        Raises:
            DataError: A text has no word.
        """
        ids = torch.zeros(len(texts), length, dtype=torch.int64)
        for i, text in enumerate(texts):
            found = [self._ids.get(word, UNKNOWN) for word in words_of(text)[:length]]
            if not found:
                raise DataError(f"texts: text {i} has no word ({text[:40]!r}); leave it out")
            ids[i, : len(found)] = torch.tensor(found)
        return ids, ids != PADDING


PLANTED = 6
"""Words of each class in planted texts."""


def planted(n: int, seed: int, vocabulary: int = 120, length: int = 16) -> Split:
    """Draw texts in which two of the ids 2…13 decide the class; everything else is chance. Id 0 pads."""
    rng = torch.Generator().manual_seed(seed)
    labels = torch.randint(2, (n,), generator=rng)
    ids = torch.randint(2 + 2 * PLANTED, vocabulary, (n, length), generator=rng)
    for i in range(n):
        where = torch.randperm(10, generator=rng)[:2]
        ids[i, where] = 2 + labels[i] * PLANTED + torch.randint(PLANTED, (2,), generator=rng)
    mask = torch.arange(length) < torch.randint(10, length + 1, (n,), generator=rng)[:, None]
    return ids * mask, mask, labels


def mask_auc(model: TransformerClassifier, split: Split) -> float:
    """Probability that the mask keeps a planted token rather than another one."""
    ids, mask, _ = split
    keep = model.vmask.importance(model.embed(ids))[mask].detach().numpy()
    own = ((ids >= 2) & (ids < 2 + 2 * PLANTED))[mask].numpy()
    return float(mannwhitneyu(keep[own], keep[~own]).statistic / (own.sum() * (~own).sum()))


class TransformerClassifier(nn.Module):
    """Token embeddings → VMASK → plus positions → transformer encoder → mean over real tokens → linear.

    Args:
        vocabulary: Number of token ids; id 0 is padding.
        classes: Number of labels.
        dim: Elements of an embedding.
        heads: Of every layer.
        feedforward: Elements of a layer's hidden vector.
        layers: Number of them.
        length: Longest example, in tokens.
        dropout: In training.
        scale: Standard deviation of the initial embeddings.
    """

    def __init__(
        self,
        vocabulary: int,
        classes: int = 2,
        *,
        dim: int = 256,
        heads: int = 8,
        feedforward: int = 1024,
        layers: int = 1,
        length: int = 64,
        dropout: float = 0.1,
        scale: float = 0.1,
    ) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, dim, padding_idx=0)
        self.position = nn.Embedding(length, dim)
        with torch.no_grad():
            self.embed.weight.mul_(scale)
            self.position.weight.mul_(scale)
        self.vmask = VMask(dim)
        layer = nn.TransformerEncoderLayer(dim, heads, feedforward, dropout, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.head = nn.Linear(dim, classes)

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """Logits.

        Args:
            ids: ``(batch, n)`` int64.
            mask: ``(batch, n)`` bool, true for real tokens; by default where ids are not 0.

        Raises:
            DataError: An example is all padding.
        """
        mask = ids != 0 if mask is None else mask.bool()
        if not bool(mask.any(1).all()):
            raise DataError("mask: an example of the batch is all padding; leave it out")
        x = self.vmask(self.embed(ids)) + self.position(torch.arange(ids.shape[1], device=ids.device))
        x = self.encoder(x, src_key_padding_mask=~mask)
        real = mask[..., None].to(x.dtype)
        logits: Tensor = self.head((x * real).sum(1) / real.sum(1))
        return logits


@dataclass
class History:
    """A training, epoch by epoch; the model holds the best epoch's weights.

    Attributes:
        validation_loss: Cross-entropy on the validation data.
        accuracy: On the validation data.
        terms: The regulariser's terms, averaged over the epoch's batches.
        best: Epoch whose weights came back, from 0: the best on the validation data since the entropy's weight is 0.
    """

    validation_loss: list[float] = field(default_factory=list)
    accuracy: list[float] = field(default_factory=list)
    terms: list[dict[str, float]] = field(default_factory=list)
    best: int = 0


Keep = Literal["loss", "accuracy"]


def train_classifier(
    model: nn.Module,
    regularizer: SAFRRegularizer,
    train: Split,
    validation: Split,
    *,
    epochs: int = 30,
    patience: int = 3,
    learning_rate: float = 1e-4,
    batch_size: int = 32,
    entropy: float = 0.1,
    keep: Keep = "loss",
    seed: int = 0,
    progress: bool = True,
    after_epoch: Callable[[int, History], Any] | None = None,
) -> History:
    """Train by Adam until some epochs bring nothing better on the validation data; the best weights are restored.

    The weight of the mask's entropy falls linearly from ``entropy`` to 0 over the first half of ``epochs``, and
    patience counts from there: a lower loss with an undecided mask would end the training too soon.

    Args:
        model: Called as ``model(ids, mask)``; trained in place, left in evaluation mode.
        regularizer: Of this model; its weights may all be 0. Hooks are in place during training only, unless they were
            before.
        train: Examples to learn.
        validation: Examples to decide when to stop.
        epochs: At most so many.
        patience: Epochs without a better one.
        learning_rate: Of Adam.
        batch_size: Examples per step.
        entropy: β at the beginning.
        keep: What is best: the lowest validation loss, or the highest validation accuracy. Cross-entropy rises early,
            from a few confident errors, while accuracy stands; what the regulariser does takes longer.
        seed: Decides the order of the examples, and with torch's global state the samples of the mask and dropout.
        progress: Show a progress bar.
        after_epoch: Called with the epoch and the history so far.

    Raises:
        ArgumentError: ``epochs``, ``patience`` or ``batch_size`` is below 1, a split is empty, or ``keep`` is another.
        ModelError: The loss is not finite.
    """
    for name, value in (("epochs", epochs), ("patience", patience), ("batch_size", batch_size)):
        if value < 1:
            raise ArgumentError(f"{name}: expected a number ≥ 1, got {value!r}")
    if keep not in get_args(Keep):
        raise ArgumentError(f"keep: expected 'loss' or 'accuracy', got {keep!r}")
    for name, split in (("train", train), ("validation", validation)):
        if not len(split[2]):
            raise ArgumentError(f"{name}: expected examples, got none")
    generator = torch.Generator().manual_seed(seed)
    own = {id(p): p for module in (model, regularizer) for p in module.parameters()}
    optimizer = torch.optim.Adam(own.values(), learning_rate)
    history, lowest = History(), (float("inf"), float("inf"))
    best: list[dict[str, Any]] = []
    annealed = max(1, epochs // 2)
    attached, given = regularizer.attached, regularizer.entropy
    regularizer.attach()
    try:
        for epoch in tqdm(range(epochs), disable=not progress, desc="training", unit="epoch"):
            regularizer.entropy = entropy * max(0.0, 1 - epoch / annealed)
            history.terms.append(_epoch(model, regularizer, optimizer, train, batch_size, generator))
            loss, accuracy = evaluate(model, validation)
            history.validation_loss.append(loss)
            history.accuracy.append(accuracy)
            found = (loss, -accuracy) if keep == "loss" else (-accuracy, loss)
            if found < lowest or (epoch <= annealed and entropy > 0):
                lowest, history.best = found, epoch
                best = [copy.deepcopy(module.state_dict()) for module in (model, regularizer)]
            if after_epoch is not None:
                after_epoch(epoch, history)
            if epoch - history.best >= patience:
                break
    finally:
        regularizer.entropy = given
        if not attached:
            regularizer.detach()
        for module, state in zip((model, regularizer), best, strict=False):
            module.load_state_dict(state)
        model.eval()
        regularizer.eval()
    return history


def _epoch(
    model: nn.Module,
    regularizer: SAFRRegularizer,
    optimizer: torch.optim.Optimizer,
    train: Split,
    batch_size: int,
    generator: torch.Generator,
) -> dict[str, float]:
    ids, mask, labels = train
    model.train()
    regularizer.train()
    totals = {"task": 0.0, "importance": 0.0, "interaction": 0.0, "entropy": 0.0}
    order = torch.randperm(len(labels), generator=generator)
    for batch in torch.split(order, batch_size):
        width = int(mask[batch].sum(1).max())  # no columns of padding alone
        optimizer.zero_grad()
        task = F.cross_entropy(model(ids[batch, :width], mask[batch, :width]), labels[batch])
        loss = task + regularizer.penalty(mask[batch, :width])
        if not torch.isfinite(loss):
            raise ModelError(f"training: the loss is {float(loss)}; lower learning_rate or the regulariser's weights")
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        for name, value in {"task": task.item(), **regularizer.terms}.items():
            totals[name] += value * len(batch) / len(labels)
    return totals


@torch.no_grad()
def evaluate(model: nn.Module, split: Split, batch_size: int = 256) -> tuple[float, float]:
    """Mean cross-entropy and accuracy, in evaluation mode; the model is left in the mode it had."""
    ids, mask, labels = split
    was = model.training
    model.eval()
    logits = torch.cat(
        [model(i, m) for i, m in zip(torch.split(ids, batch_size), torch.split(mask, batch_size), strict=True)]
    )
    model.train(was)
    return float(F.cross_entropy(logits, labels)), float((logits.argmax(1) == labels).float().mean())


@torch.no_grad()
def measure(model: nn.Module, regularizer: SAFRRegularizer, split: Split, batch_size: int = 256) -> dict[str, float]:
    """Both losses, and L_imp in its scale-invariant form, on a split, in evaluation mode.

    Returns:
        ``importance``, ``importance_cosine``, ``interaction``, ``loss`` and ``accuracy``.
    """
    ids, mask, labels = split
    found = dict.fromkeys(("importance", "importance_cosine", "interaction"), 0.0)
    attached, modes = regularizer.attached, (model.training, regularizer.training)
    regularizer.attach()
    model.eval()
    regularizer.eval()
    try:
        for i, m in zip(torch.split(ids, batch_size), torch.split(mask, batch_size), strict=True):
            model(i, m)
            imp, inter = regularizer.losses(m, cosine=False)
            values = imp, regularizer.losses(m, cosine=True)[0], inter
            for name, value in zip(found, values, strict=True):
                found[name] += float(value) * len(i) / len(labels)
    finally:
        if not attached:
            regularizer.detach()
        model.train(modes[0])
        regularizer.train(modes[1])
    loss, accuracy = evaluate(model, split, batch_size)
    return {**found, "loss": loss, "accuracy": accuracy}
