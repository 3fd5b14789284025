"""What a slip of the pen, a damaged file or someone else's file does to saving and loading: one clear error."""

import errno
import stat
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

import npeff
from npeff.components.loading import describe
from npeff.errors import ArgumentError, StorageError
from npeff.storage.container import refuse_npeff_file
from npeff.storage.files import atomic, check_target, explain
from report_cases import components_of


@pytest.fixture
def components():
    return components_of(n=12)


@pytest.fixture
def saved(components, tmp_path):
    return components.save(tmp_path / "c.h5")


def replace_dataset(path, name, value, **options):
    with h5py.File(path, "r+") as file:
        del file[name]
        file.create_dataset(name, data=value, **options)


# ---- what is not overwritten -------------------------------------------------------------------------------


def test_npeff_files_are_not_overwritten_by_other_formats(components, saved, tmp_path):
    before = saved.read_bytes()
    with pytest.raises(StorageError, match="holds Fishers or Components, and is not overwritten"):
        refuse_npeff_file(saved)
    with pytest.raises(StorageError, match="not overwritten; choose another name"):
        components.save_state_dict(0, saved)
    assert saved.read_bytes() == before
    with h5py.File(saved, "r+") as file:
        file.attrs["format_version"] = 99
    with pytest.raises(StorageError, match="not overwritten"):
        refuse_npeff_file(saved)
    other = tmp_path / "other.h5"
    with h5py.File(other, "w") as file:
        file["coefficients"] = np.zeros(3)
    refuse_npeff_file(other)
    refuse_npeff_file(tmp_path / "absent")


def test_state_dict_appears_whole_with_the_usual_mode(components, tmp_path):
    plain = tmp_path / "plain"
    plain.write_text("x")
    path = components.save_state_dict(0, tmp_path / "g.safetensors")
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)
    want = components.state_dict(0)
    got = load_file(path)
    assert set(got) == set(want)
    assert all(torch.equal(torch.from_numpy(got[name]), want[name]) for name in want)
    with pytest.raises(StorageError, match="does not exist"):
        components.save_state_dict(0, tmp_path / "absent" / "g.safetensors")


def test_symbolic_link_stays_and_its_file_is_replaced(components, tmp_path):
    (tmp_path / "there").mkdir()
    link, real = tmp_path / "link.h5", tmp_path / "there" / "real.h5"
    link.symlink_to(real)
    components.save(link)
    assert link.is_symlink() and real.is_file()
    assert npeff.load(link).n_components == components.n_components
    with atomic(link) as scratch:
        scratch.write_text("x")
    assert link.is_symlink() and real.read_text() == "x"
    lost = tmp_path / "lost.h5"
    lost.symlink_to(tmp_path / "absent" / "real.h5")
    with pytest.raises(StorageError, match="absent does not exist"):
        check_target(lost)


def test_devices_are_not_replaced():
    with pytest.raises(StorageError, match="a device or pipe is there"):
        check_target(Path("/dev/null"))


def test_limit_of_file_size_is_no_full_disk(tmp_path):
    text = str(explain(tmp_path / "f.h5", OSError(errno.EFBIG, "File too large"), "Kept."))
    assert "may not grow further" in text and "ulimit -f" in text and "disk is full" not in text


@pytest.mark.parametrize("path", [3, None, b"f.h5", "a\0b", "\ud800"])
def test_what_is_no_path(components, path):
    for use in (npeff.load, components.save, lambda path: components.save_state_dict(0, path)):
        if use == components.save and not isinstance(path, str):
            continue
        with pytest.raises(ArgumentError, match="path: expected a path"):
            use(path)


def test_name_too_long(components):
    for use in (npeff.load, components.save):
        with pytest.raises(StorageError, match="too long"):
            use("x" * 300)


# ---- damaged and foreign files -----------------------------------------------------------------------------


@pytest.mark.parametrize("text", [b"\xff\xfe{}", b"{no json", b"[]", b"{}", b"3"])
def test_damaged_header(saved, text):
    replace_dataset(saved, "meta", np.bytes_(text))
    with pytest.raises(StorageError, match="damaged"):
        npeff.load(saved)


def test_header_of_variable_length(saved):
    replace_dataset(saved, "meta", "{}", dtype=h5py.string_dtype())
    with pytest.raises(StorageError, match="'meta' has the type object, which npeff never writes"):
        npeff.load(saved)


@pytest.mark.parametrize("text", [b"\xff", b"[1]", b"{"])
def test_damaged_checksums(saved, text):
    replace_dataset(saved, "checksums", np.bytes_(text))
    with pytest.raises(StorageError, match="'checksums' is damaged"):
        npeff.load(saved, verify=True)


def test_attribute_that_is_no_text(saved):
    with h5py.File(saved, "r+") as file:
        file.attrs.create("written_by", np.bytes_(b"\xff\xfe"))
        file.attrs.create("kind", np.bytes_(b"\xff\xfe"))
    assert npeff.load(saved).n_components


@pytest.mark.parametrize("value", ["text", 3.0, [["a"]], np.zeros(4)])
def test_published_layout_of_something_else(tmp_path, value):
    path = tmp_path / "w.h5"
    with h5py.File(path, "w") as file:
        file["data/W"] = value
        file["data/G"] = np.zeros((2, 3))
        file["data/new_to_old_col_indices"] = np.arange(3)
        file["data"].attrs["n_parameters"] = 3
    with pytest.raises(StorageError, match=r"damaged|not as npeff"):
        npeff.load(path)
    describe(path)
