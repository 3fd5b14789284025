"""Fashion-MNIST and a small network for it, for the examples and the benchmarks."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from npeff.demo import Images
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


def fashion_cnn() -> nn.Sequential:
    """A network for 28×28 images: two convolutions with pooling, two dense layers, 114 314 parameters.

    Returns:
        ``(b, 1, 28, 28)`` float32 → ``(b, 10)`` logits.
    """
    return nn.Sequential(
        nn.Conv2d(1, 16, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(1568, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )


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
