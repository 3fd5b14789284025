"""Run the whole pipeline on handwritten digits, in about a minute."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

import npeff
from npeff.errors import ArgumentError, StorageError
from npeff.fishers.parts import discard_parts
from npeff.storage.files import Lock, atomic

TRAINED_ON = 1200
"""The network sees the first 1200 digits; the other 597, by other writers, are new to it."""

TARGETS = '''"""MODEL and DATA of the npeff demo, for the command line: digits.py:model, digits.py:data."""

from pathlib import Path

import torch

from npeff import demo


def model():
    """The network that the demo trained."""
    net = demo.digits_cnn()
    net.load_state_dict(torch.load(Path(__file__).with_name("model.pt"), weights_only=True))
    return net.eval()


def data():
    """All 1797 digits, in batches of (images, labels)."""
    return demo.digits()
'''


def run_demo(
    out: str | Path,
    *,
    n_components: int = 32,
    seed: int = 0,
    epochs: int = 8,
    max_examples: int | None = None,
    say: Callable[[str], object] = print,
    progress: bool = True,
) -> Path:
    """Train a small CNN on the digits, compute its Fishers, decompose them, write the page.

    Args:
        out: Folder for ``model.pt``, ``digits.py``, ``fishers.h5``, ``components.h5`` and
            ``report/index.html``; made if missing. What an earlier demo left there is replaced.
        n_components: How many components.
        seed: Of the weights, the shuffling and the decomposition.
        epochs: Of training.
        max_examples: Fishers of so many examples (all 1797).
        say: Called with each line meant for the user.
        progress: Show progress bars.

    Returns:
        The page.

    Raises:
        ArgumentError: scikit-learn is not installed.
        StorageError: The folder holds files that no demo made, or cannot be written.
    """
    data, folder, began = digits(), Path(out), time.perf_counter()
    lock = _prepare(folder)
    threads = torch.get_num_threads()
    # Everything here is small: more threads gain little, and on a busy machine they wait for each other.
    torch.set_num_threads(1)

    def step(message: str) -> None:
        say(f"{time.perf_counter() - began:5.1f} s  {message}")

    try:
        torch.manual_seed(seed)
        model = train(digits_cnn(), data.first(TRAINED_ON), epochs=epochs, learning_rate=3e-3, seed=seed)
        with atomic(folder / "model.pt") as scratch:
            torch.save(model.state_dict(), scratch)
        unseen = accuracy(model, data.take(slice(TRAINED_ON, None)))
        n_unseen = len(data.labels) - TRAINED_ON
        step(f"trained a CNN on {TRAINED_ON} digits; accuracy on {n_unseen} unseen ones {unseen:.1%}")

        fishers = npeff.compute_fishers(
            model,
            data,
            energy=0.95,
            compress=npeff.TopK(8192),
            max_examples=max_examples,
            seed=seed,
            out=folder / "fishers.h5",
            progress=progress,
        )
        step(
            f"computed the Fishers of {len(fishers):,} digits: {fishers.rows.n_rows:,} rows, "
            f"{fishers.n_parameters:,} parameters"
        )

        components = npeff.decompose(fishers, n_components, seed=seed, progress=progress)
        components.save(folder / "components.h5")
        step(f"decomposed them into {n_components} components, relative loss {components.loss:.4f}")

        page = npeff.report(
            components, data, folder / "report", title="How a small network reads digits", progress=progress
        )
        step(f"wrote the page: {page}")
        say("")
        say("The same data, by hand:")
        say(f"  npeff decompose {folder / 'fishers.h5'} --n-components 16 --out {folder / 'sixteen.h5'}")
        say(
            f"  npeff report {folder / 'sixteen.h5'} --data {folder / 'digits.py'}:data --out {folder / 'sixteen.html'}"
        )
        return page
    finally:
        torch.set_num_threads(threads)
        lock.release()


def _prepare(folder: Path) -> Lock:
    """Make the folder, take it for this process, and clear what an earlier demo left, but nothing else.

    Raises:
        StorageError: It holds files of the same names that no demo made, or cannot be written; or a demo runs there.
    """
    marker = folder / "digits.py"
    made = [folder / name for name in ("model.pt", "fishers.h5", "components.h5")]
    there = [path.name for path in made if os.path.lexists(path)]
    ours = marker.is_file() and marker.read_text(encoding="utf-8", errors="replace").startswith(TARGETS.splitlines()[0])
    if (there or os.path.lexists(marker)) and not ours:
        raise StorageError(
            f"{folder}: holds {', '.join(there or [marker.name])}, not from a demo; choose another folder with --out"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = Lock(folder / "demo.lock", f"running the demo in {folder}")
    except StorageError:
        raise
    except OSError as error:
        raise StorageError(f"{folder}: cannot be written: {error.strerror or error}") from error
    try:
        # The marker first: were the demo interrupted, the next one still knows the folder as its own.
        with atomic(marker) as scratch:
            scratch.write_text(TARGETS, encoding="utf-8")
        for path in made:
            path.unlink(missing_ok=True)
        discard_parts(folder / "fishers.h5")
    except BaseException:
        lock.release()
        raise
    return lock


@dataclass(frozen=True, eq=False)
class Images:
    """Labelled images, iterated as batches ``(inputs, labels)`` in a fixed order, as often as wanted.

    Attributes:
        inputs: ``(n, 1, height, width)`` float32 in [0, 1].
        labels: ``(n,)`` int64.
        class_names: One name per class.
        batch_size: Examples per batch; the last batch may be smaller.
    """

    inputs: torch.Tensor
    labels: torch.Tensor
    class_names: tuple[str, ...]
    batch_size: int = 128

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for start in range(0, len(self.labels), self.batch_size):
            batch = slice(start, start + self.batch_size)
            yield self.inputs[batch], self.labels[batch]

    def __len__(self) -> int:
        """Number of batches."""
        return -(-len(self.labels) // self.batch_size)

    def __repr__(self) -> str:
        shape = " × ".join(map(str, self.inputs.shape))
        return f"Images({shape}, {len(self.class_names)} classes, batches of {self.batch_size})"

    def take(self, which: slice | npt.NDArray[Any] | torch.Tensor) -> Images:
        """Take a subset in the given order: a slice, indices or a mask over examples."""
        return replace(self, inputs=self.inputs[which], labels=self.labels[which])

    def first(self, n: int) -> Images:
        """Take the first ``n`` examples (all, when there are fewer)."""
        return self.take(slice(n))


def digits(batch_size: int = 128) -> Images:
    """Load handwritten digits: 1797 images of 8×8, bundled with scikit-learn.

    Args:
        batch_size: Examples per batch.

    Returns:
        All examples in the order of the file.

    Raises:
        ArgumentError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ArgumentError(
            "the digits come with scikit-learn, which is not installed: pip install 'npeff[demo]'"
        ) from error
    bunch = load_digits()
    inputs = torch.from_numpy(np.asarray(bunch.images, np.float32)[:, None] / 16)
    return Images(inputs, torch.from_numpy(np.asarray(bunch.target, np.int64)), tuple("0123456789"), batch_size)


def digits_cnn() -> nn.Sequential:
    """Make a network for 8×8 digits: two convolutions, two dense layers, 38 282 parameters.

    Returns:
        ``(b, 1, 8, 8)`` float32 → ``(b, 10)`` logits.
    """
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(512, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )


def train(
    model: nn.Module,
    data: Images,
    *,
    epochs: int,
    learning_rate: float = 1e-3,
    batch_size: int = 64,
    weight_decay: float = 1e-4,
    seed: int = 0,
    after_epoch: Callable[[int, float], None] | None = None,
) -> nn.Module:
    """Fit a classifier with AdamW on cross-entropy; the same seed gives the same order of examples.

    Args:
        model: Maps ``data.inputs`` to logits ``(n, C)``.
        data: What to fit.
        epochs: Passes over the data.
        learning_rate: Falls to zero along a cosine.
        batch_size: Examples per step.
        weight_decay: AdamW's.
        seed: Of the shuffling; the weights are as given.
        after_epoch: Called with the epoch (from 1) and its mean loss.

    Returns:
        The same model, in evaluation mode.
    """
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), learning_rate, weight_decay=weight_decay)
    steps = epochs * -(-len(data.labels) // batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, steps))
    model.train()
    for epoch in range(1, epochs + 1):
        total = 0.0
        order = torch.randperm(len(data.labels), generator=generator)
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            loss = nn.functional.cross_entropy(model(data.inputs[batch]), data.labels[batch])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
            total += float(loss.detach()) * len(batch)
        if after_epoch:
            after_epoch(epoch, total / len(data.labels))
    return model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, data: Images) -> float:
    """Compute the share of examples whose largest logit is the label's."""
    hits = sum(int((model(inputs).argmax(1) == labels).sum()) for inputs, labels in data)
    return hits / max(1, len(data.labels))
