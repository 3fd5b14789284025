"""Small real data for demos, tests and benchmarks: images that need no download."""

from __future__ import annotations

import gzip
import struct
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from npeff.errors import ArgumentError, DataError, StorageError, TruncatedFileError

FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
FASHION_CLASSES = (
    "T-shirt",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)

_IDX_TYPES = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}


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
        """A subset in the given order: a slice, indices or a mask over examples."""
        return replace(self, inputs=self.inputs[which], labels=self.labels[which])

    def first(self, n: int) -> Images:
        """The first ``n`` examples (all, when there are fewer)."""
        return self.take(slice(n))


def digits(batch_size: int = 128) -> Images:
    """Handwritten digits, 1797 images of 8×8, bundled with scikit-learn.

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


def fashion_mnist(
    split: Literal["train", "test"] = "train", batch_size: int = 128, root: str | Path = FASHION_MNIST
) -> Images:
    """Fashion-MNIST, 60000 (train) or 10000 (test) images of 28×28 in ten classes.

    Args:
        split: ``"train"`` or ``"test"``.
        batch_size: Examples per batch.
        root: Folder of the four ``*-ubyte.gz`` files; by default where Debian's package puts them.

    Returns:
        The examples in the order of the files.

    Raises:
        ArgumentError: ``split`` is neither.
        DataError: The folder or a file is missing, or images and labels do not belong together.
    """
    if split not in ("train", "test"):
        raise ArgumentError(f"split: expected 'train' or 'test', got {split!r}")
    prefix = Path(root) / ("train" if split == "train" else "t10k")
    paths = [Path(f"{prefix}-{part}-ubyte.gz") for part in ("images-idx3", "labels-idx1")]
    for path in paths:
        if not path.is_file():
            raise DataError(
                f"Fashion-MNIST: {path} does not exist. On Debian and Ubuntu: apt-get install "
                "dataset-fashion-mnist; elsewhere put the four files of "
                "github.com/zalandoresearch/fashion-mnist in a folder and pass root="
            )
    pixels, labels = (read_idx(path) for path in paths)
    if pixels.ndim != 3 or labels.ndim != 1 or len(pixels) != len(labels):
        raise DataError(
            f"Fashion-MNIST: {paths[0].name} has shape {pixels.shape} and {paths[1].name} {labels.shape}; "
            "they do not belong together"
        )
    inputs = torch.from_numpy(pixels.astype(np.float32)[:, None] / 255)
    return Images(inputs, torch.from_numpy(labels.astype(np.int64)), FASHION_CLASSES, batch_size)


def read_idx(path: str | Path) -> npt.NDArray[Any]:
    """Read an array in idx format, gzipped or plain.

    The format: two zero bytes, one for the type, one for the number of dimensions, a big-endian uint32 per
    dimension, then the values big-endian in C order.

    Args:
        path: The file; ``.gz`` files are unpacked.

    Returns:
        The array, in native byte order.

    Raises:
        StorageError: The file is missing or not idx.
        TruncatedFileError: The file ends before its values do.
    """
    path = Path(path)
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except EOFError as error:
        raise TruncatedFileError(f"{path}: ends in the middle of its gzip stream; fetch it again") from error
    except OSError as error:
        raise StorageError(f"{path}: cannot be read: {error}") from error
    if len(raw) < 4 or raw[:2] != b"\0\0" or raw[2] not in _IDX_TYPES:
        raise StorageError(f"{path}: not an idx file (it starts with {raw[:4]!r})")
    header = 4 + 4 * raw[3]
    if len(raw) < header:
        raise TruncatedFileError(f"{path}: ends within its header")
    shape = struct.unpack(f">{raw[3]}I", raw[4:header])
    dtype = np.dtype(_IDX_TYPES[raw[2]])
    expected = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    if len(raw) - header < expected:
        raise TruncatedFileError(
            f"{path}: expected {expected} bytes of values for shape {shape}, got {len(raw) - header}"
        )
    values = np.frombuffer(raw, dtype, count=expected // dtype.itemsize, offset=header)
    return values.reshape(shape).astype(dtype.newbyteorder("="))
