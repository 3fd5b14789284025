"""The whole pipeline on handwritten digits, in about a minute."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import torch

import npeff
from npeff.errors import StorageError
from npeff.fishers.parts import discard_parts
from npeff.models import datasets
from npeff.models import networks as models
from npeff.storage.files import Lock, atomic

TRAINED_ON = 1200
"""The network sees the first 1200 digits; the other 597, by other writers, are new to it."""

TARGETS = '''"""MODEL and DATA of the npeff demo, for the command line: digits.py:model, digits.py:data."""

from pathlib import Path

import torch

from npeff.models import datasets
from npeff.models import networks as models


def model():
    """The network that the demo trained."""
    net = models.digits_cnn()
    net.load_state_dict(torch.load(Path(__file__).with_name("model.pt"), weights_only=True))
    return net.eval()


def data():
    """All 1797 digits, in batches of (images, labels)."""
    return datasets.digits()
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
    data, folder = datasets.digits(), Path(out)
    lock = _prepare(folder)
    threads = torch.get_num_threads()
    # Everything here is small: more threads gain little, and on a busy machine they wait for each other.
    torch.set_num_threads(1)
    try:
        return _pipeline(data, folder, n_components, seed, epochs, max_examples, say, progress)
    finally:
        torch.set_num_threads(threads)
        lock.release()


def _pipeline(
    data: datasets.Images,
    folder: Path,
    n_components: int,
    seed: int,
    epochs: int,
    max_examples: int | None,
    say: Callable[[str], object],
    progress: bool,
) -> Path:
    began = time.perf_counter()

    def step(message: str) -> None:
        say(f"{time.perf_counter() - began:5.1f} s  {message}")

    torch.manual_seed(seed)
    model = models.train(models.digits_cnn(), data.first(TRAINED_ON), epochs=epochs, learning_rate=3e-3, seed=seed)
    with atomic(folder / "model.pt") as scratch:
        torch.save(model.state_dict(), scratch)
    unseen = models.accuracy(model, data.take(slice(TRAINED_ON, None)))
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
    say(f"  npeff decompose {folder / 'fishers.h5'} --components 16 --out {folder / 'sixteen.h5'}")
    page_too = folder / "sixteen.html"
    say(f"  npeff report {folder / 'sixteen.h5'} --data {folder / 'digits.py'}:data --out {page_too}")
    return page


def _prepare(folder: Path) -> Lock:
    """Make the folder, take it for this process, and clear what an earlier demo left, but nothing else.

    Raises:
        StorageError: It holds files of the same names that no demo made, or cannot be written; or a demo runs there.
    """
    marker, made = (
        folder / "digits.py",
        [folder / name for name in ("model.pt", "fishers.h5", "components.h5")],
    )
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
