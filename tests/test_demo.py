"""The data and networks of the demo, and the Fashion-MNIST of the examples and benchmarks."""

import builtins
import gzip
import importlib.util
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from npeff import demo
from npeff.errors import ArgumentError, DataError, StorageError, TruncatedFileError

EXAMPLES = Path(__file__).parents[1] / "examples"
spec = importlib.util.spec_from_file_location("fashion_data", EXAMPLES / "fashion_data.py")
fashion_data = importlib.util.module_from_spec(spec)
spec.loader.exec_module(fashion_data)


def write_idx(path, array, code):
    header = bytes([0, 0, code, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    raw = header + array.astype(array.dtype.newbyteorder(">")).tobytes()
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)
    return path


def fashion_folder(folder, n_images=5, n_labels=5):
    rng = np.random.default_rng(0)
    for prefix in ("train", "t10k"):
        images = rng.integers(0, 256, (n_images, 28, 28), np.uint8)
        write_idx(folder / f"{prefix}-images-idx3-ubyte.gz", images, 0x08)
        labels = np.arange(n_labels, dtype=np.uint8)
        write_idx(folder / f"{prefix}-labels-idx1-ubyte.gz", labels, 0x08)
    return folder


@pytest.mark.parametrize(
    ("dtype", "code"),
    [("u1", 0x08), ("i1", 0x09), ("i2", 0x0B), ("i4", 0x0C), ("f4", 0x0D), ("f8", 0x0E)],
)
@pytest.mark.parametrize("shape", [(7,), (3, 4), (2, 3, 5), (0, 4)])
@pytest.mark.parametrize("name", ["a.gz", "a"])
def test_idx_round_trip(tmp_path, dtype, code, shape, name):
    array = (np.arange(np.prod(shape)) - 3).astype(dtype).reshape(shape)
    found = fashion_data.read_idx(write_idx(tmp_path / name, array, code))
    assert found.dtype == array.dtype and found.dtype.isnative
    np.testing.assert_array_equal(found, array)


def test_idx_that_is_none(tmp_path):
    path = write_idx(tmp_path / "a.gz", np.zeros((4, 4), np.uint8), 0x08)
    raw = path.read_bytes()
    path.write_bytes(raw[:-12])
    with pytest.raises(TruncatedFileError, match="gzip stream"):
        fashion_data.read_idx(path)
    path.write_bytes(b"<html>not here</html>")
    with pytest.raises(StorageError, match="cannot be read"):
        fashion_data.read_idx(path)
    plain = write_idx(tmp_path / "a", np.zeros((4, 4), np.uint8), 0x08)
    plain.write_bytes(plain.read_bytes()[:-1])
    with pytest.raises(TruncatedFileError, match=r"expected 16 bytes of values for shape \(4, 4\), got 15"):
        fashion_data.read_idx(plain)
    plain.write_bytes(b"PK\3\4")
    with pytest.raises(StorageError, match="not an idx file"):
        fashion_data.read_idx(plain)
    with pytest.raises(StorageError, match="cannot be read"):
        fashion_data.read_idx(tmp_path / "absent")


@pytest.mark.parametrize("split", ["train", "test"])
def test_fashion_mnist(tmp_path, split):
    data = fashion_data.fashion_mnist(split, root=fashion_folder(tmp_path), batch_size=2)
    assert data.inputs.shape == (5, 1, 28, 28) and data.inputs.dtype == torch.float32
    assert data.inputs.min() >= 0 and 0.9 < data.inputs.max() <= 1
    assert data.labels.tolist() == [0, 1, 2, 3, 4]
    assert len(data.class_names) == 10


def test_fashion_mnist_that_is_missing_or_mixed_up(tmp_path):
    with pytest.raises(DataError, match="apt-get install dataset-fashion-mnist"):
        fashion_data.fashion_mnist(root=tmp_path)
    with pytest.raises(DataError, match="do not belong together"):
        fashion_data.fashion_mnist(root=fashion_folder(tmp_path, n_labels=4))
    with pytest.raises(ArgumentError, match="split"):
        fashion_data.fashion_mnist("validation", root=tmp_path)


@pytest.mark.skipif(not fashion_data.FASHION_MNIST.is_dir(), reason="Debian's dataset-fashion-mnist is not installed")
def test_fashion_mnist_of_debian():
    data = fashion_data.fashion_mnist("test")
    assert data.inputs.shape == (10_000, 1, 28, 28)
    assert torch.bincount(data.labels).tolist() == [1000] * 10


def test_digits():
    data = demo.digits(batch_size=1000)
    assert data.inputs.shape == (1797, 1, 8, 8) and float(data.inputs.max()) == 1
    assert [len(labels) for _, labels in data] == [1000, 797] and len(data) == 2
    assert [len(labels) for _, labels in data] == [1000, 797], "can be iterated again"


def test_digits_without_scikit_learn(monkeypatch):
    real = builtins.__import__

    def refuse(name, *args, **kwargs):
        if name.startswith("sklearn"):
            raise ImportError("no sklearn")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ArgumentError, match=r"pip install 'npeff\[demo\]'"):
        demo.digits()


def test_subsets():
    data = demo.digits()
    assert data.first(10).labels.tolist() == data.labels[:10].tolist()
    assert data.take(torch.tensor([5, 3])).labels.tolist() == data.labels[[5, 3]].tolist()
    assert len(data.first(0)) == 0 and list(data.first(0)) == []
    assert "1797" in repr(data)


def test_networks():
    assert demo.digits_cnn()(torch.zeros(2, 1, 8, 8)).shape == (2, 10)
    fashion = fashion_data.fashion_cnn()
    assert fashion(torch.zeros(2, 1, 28, 28)).shape == (2, 10)
    assert sum(p.numel() for p in fashion.parameters()) >= 100_000


def test_training_is_reproducible_and_learns():
    data = demo.digits().first(128)
    losses, nets = [], []
    for _ in range(2):
        torch.manual_seed(0)
        net = demo.train(
            demo.digits_cnn(),
            data,
            epochs=3,
            learning_rate=1e-2,
            seed=1,
            after_epoch=lambda epoch, loss: losses.append(loss),
        )
        nets.append(net)
    assert losses[2] < losses[0] and losses[:3] == losses[3:]
    assert not nets[0].training
    for a, b in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        torch.testing.assert_close(a, b)
    assert demo.accuracy(nets[0], data) > 0.3
