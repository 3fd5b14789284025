"""FisherWriter: the same in memory and on disk, whatever the shards; refusals say why; nothing is lost."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import signal
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from npeff.components.loading import describe, load
from npeff.errors import (
    ArgumentError,
    DataError,
    ForeignFileError,
    NewerFileError,
    ResumeError,
    StorageError,
    TruncatedFileError,
)
from npeff.fishers.shards import FisherWriter
from npeff.storage import files
from processes import all_returned
from stored_samples import assert_same, blocks_of, fishers_of, header_of

FISHERS = fishers_of(ranks=(2, 1, 3, 0, 2, 2, 1, 1))
HEADER = header_of(FISHERS)
BLOCKS = blocks_of(FISHERS, 2)  # four batches
DIGESTS = [f"digest {i}" for i in range(len(BLOCKS))]


def write(out, *, until=None, blocks=BLOCKS, header=HEADER, **options):
    """Go through the batches as compute_fishers does; stop before batch ``until``, keeping the shards."""
    computed = 0
    with FisherWriter(out, header, **options) as writer:
        for index, (block, digest) in enumerate(zip(blocks, DIGESTS, strict=True)):
            if index == until:
                return computed
            if not writer.skip(digest, len(block.norms)):
                writer.append(block, digest)
                computed += 1
        return writer.finish(FISHERS.coverage)


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    out = tmp_path_factory.mktemp("expected") / "f.h5"
    write(out)
    return out.read_bytes()


def test_in_memory():
    assert_same(write(None), FISHERS)


@pytest.mark.parametrize("sparse", [True, False])
@pytest.mark.parametrize("kind", ["low_rank", "diagonal"])
def test_memory_and_disk_agree(tmp_path, kind, sparse):
    fishers = fishers_of(kind, sparse=sparse, ranks=(2, 1, 3, 0, 2, 2, 1, 1))
    blocks, header = blocks_of(fishers, 2), header_of(fishers)
    assert_same(write(None, blocks=blocks, header=header), fishers)
    found = write(tmp_path / "f.h5", blocks=blocks, header=header, shard_bytes=1)
    assert_same(found, fishers)
    assert found.path == tmp_path / "f.h5"
    assert os.listdir(tmp_path) == ["f.h5"]
    assert_same(load(tmp_path / "f.h5", verify=True), fishers)


@settings(max_examples=12, deadline=None)
@given(stops=st.lists(st.integers(0, 4), max_size=4), shard_bytes=st.sampled_from([1, 300, 600, 10**9]))
def test_any_interruptions_and_shard_sizes_give_the_same_bytes(tmp_path_factory, expected, stops, shard_bytes):
    out = tmp_path_factory.mktemp("any") / "f.h5"
    for stop in stops:
        write(out, until=stop, shard_bytes=shard_bytes)
    assert_same(write(out, shard_bytes=shard_bytes), FISHERS)
    assert out.read_bytes() == expected
    assert os.listdir(out.parent) == ["f.h5"]


def test_shards_close_by_size_and_by_time(tmp_path):
    def shards(**options):
        out = tmp_path / f"{len(os.listdir(tmp_path))}.h5"
        write(out, until=3, **options)
        return len(list(Path(f"{out}.parts").glob("shard-*.h5")))

    assert shards(shard_bytes=1) == 3
    assert shards(shard_seconds=0) == 3
    assert shards() == 1  # leaving the context writes the open one


def test_resuming_computes_only_what_is_missing(tmp_path):
    out = tmp_path / "f.h5"
    assert write(out, until=3) == 3
    assert describe(out)["n_examples"] == 6 and describe(out)["content"] == "unfinished fishers"
    with FisherWriter(out, HEADER) as writer:
        assert writer.examples_done == 6
        assert [writer.skip(d, 2) for d in DIGESTS] == [True, True, True, False]
        writer.append(BLOCKS[3], DIGESTS[3])
        assert writer.examples_done == 8
        assert_same(writer.finish(FISHERS.coverage), FISHERS)


def test_an_error_in_a_batch_keeps_those_before(tmp_path):
    out = tmp_path / "f.h5"
    with pytest.raises(KeyboardInterrupt), FisherWriter(out, HEADER) as writer:
        writer.append(BLOCKS[0], DIGESTS[0])
        raise KeyboardInterrupt
    with FisherWriter(out, HEADER) as writer:
        assert writer.skip(DIGESTS[0], 2) and not writer.skip(DIGESTS[1], 2)


def test_an_error_in_the_first_batch_leaves_nothing(tmp_path):
    with pytest.raises(DataError), FisherWriter(tmp_path / "f.h5", HEADER):
        raise DataError("NaN")
    assert not os.listdir(tmp_path)


def test_the_same_command_again_is_a_no_op(tmp_path, expected):
    out = tmp_path / "f.h5"
    write(out)
    stat = out.stat()
    with FisherWriter(out, HEADER) as writer:
        assert_same(writer.finished, FISHERS)
        assert writer.examples_done == len(FISHERS)
        with pytest.raises(ResumeError, match="call skip"):
            writer.append(BLOCKS[0], DIGESTS[0])
        assert writer.finish() is writer.finished
    assert out.stat() == stat and out.read_bytes() == expected
    assert os.listdir(tmp_path) == ["f.h5"]
    with FisherWriter(out, HEADER) as writer, pytest.raises(ResumeError, match="its contents differ"):
        writer.skip("other", 2)
    with FisherWriter(out, HEADER) as writer:
        assert all(writer.skip(digest, 2) for digest in DIGESTS[:3])
        with pytest.raises(ResumeError, match="ended after 3 batches, but 4"):
            writer.finish()
        assert writer.skip(DIGESTS[3], 2)
        with pytest.raises(ResumeError, match="goes on after the 4 batches"):
            writer.skip("more", 2)
        assert writer.finish() is writer.finished


def test_a_file_saved_by_hand_counts_as_finished(tmp_path):
    out = FISHERS.save(tmp_path / "f.h5")
    with FisherWriter(out, HEADER) as writer:
        assert all(writer.skip(digest, 2) for digest in DIGESTS)
        assert_same(writer.finish(), FISHERS)


@pytest.mark.parametrize("finished", [True, False])
def test_other_settings_are_refused_and_named(tmp_path, finished):
    out = tmp_path / "f.h5"
    write(out, until=None if finished else 2)
    header = json.loads(json.dumps(HEADER))
    header["provenance"]["model"]["digest"] = "11aa"
    header["provenance"]["options"] |= {"rank": 2}
    wanted = (
        r"provenance.model.digest: \"00ff\" then, \"11aa\" now; provenance.options.rank: null then, 2 now. "
        rf"Use the same settings .* choose another out .* or remove .*{'f.h5' if finished else 'f.h5.parts'} "
        r"to start anew"
    )
    before = sorted(p.name for p in tmp_path.rglob("*"))
    with pytest.raises(ResumeError, match=wanted):
        write(out, header=header)
    assert sorted(p.name for p in tmp_path.rglob("*")) == before
    assert_same(write(out), FISHERS)  # the right settings still continue


def test_many_differences_are_counted(tmp_path):
    out = tmp_path / "f.h5"
    write(out)
    with pytest.raises(ResumeError, match=r"\(and 2 more\)"):
        write(out, header={**HEADER, "provenance": {str(i): i for i in range(5)}})


def test_other_data_is_refused_at_the_batch(tmp_path):
    out = tmp_path / "f.h5"
    write(out, until=3)
    with FisherWriter(out, HEADER) as writer:
        assert writer.skip(DIGESTS[0], 2)
        with pytest.raises(ResumeError, match=r"batch 1 is not the one .*its contents differ"):
            writer.skip("other", 2)
        with pytest.raises(ResumeError, match=r"batch 1 .*2 examples then, 5 now"):
            writer.skip(DIGESTS[1], 5)
        with pytest.raises(ResumeError, match="ended after 1 batches, but 3"):
            writer.finish()
        with pytest.raises(ResumeError, match="call skip"):
            writer.append(BLOCKS[1], DIGESTS[1])
    assert_same(write(out), FISHERS)


def test_no_data(tmp_path):
    for out in (None, tmp_path / "f.h5"):
        with pytest.raises(DataError, match="at least one example"), FisherWriter(out, HEADER) as writer:
            writer.finish()
    assert not os.listdir(tmp_path)


def test_a_header_that_is_no_json():
    with pytest.raises(ArgumentError, match="header: expected strings"):
        FisherWriter(None, {**HEADER, "provenance": {"model": object()}})


# --- what is already there ------------------------------------------------------------------------


def test_other_files_are_not_overwritten(tmp_path):
    out = tmp_path / "f.h5"
    out.write_bytes(b"my notes")
    with pytest.raises(ForeignFileError, match="not overwritten"):
        FisherWriter(out, HEADER)
    assert out.read_bytes() == b"my notes" and os.listdir(tmp_path) == ["f.h5"]
    with pytest.raises(StorageError, match="does not exist; create it"):
        FisherWriter(tmp_path / "no" / "f.h5", HEADER)
    with pytest.raises(StorageError, match="folder"):
        FisherWriter(tmp_path, HEADER)


def test_a_folder_that_is_not_ours_is_left_alone(tmp_path):
    parts = tmp_path / "f.h5.parts"
    parts.mkdir()
    (parts / "thesis.tex").write_text("precious")
    with pytest.raises(StorageError, match=r"holds thesis.tex"):
        FisherWriter(tmp_path / "f.h5", HEADER)
    assert os.listdir(parts) == ["thesis.tex"]
    shutil.rmtree(parts)
    parts.write_text("a file")
    with pytest.raises(StorageError, match="but is a file"):
        FisherWriter(tmp_path / "f.h5", HEADER)


def test_damaged_shards_are_named_with_the_remedy(tmp_path, expected):
    out = tmp_path / "f.h5"
    write(out, until=3, shard_bytes=1)
    parts = tmp_path / "f.h5.parts"
    second = parts / "shard-000001.h5"
    raw = second.read_bytes()
    second.write_bytes(raw[:-9])
    with pytest.raises(TruncatedFileError, match=r"shard-000001.h5: .*remove this shard and those after it"):
        write(out)
    second.unlink()
    with pytest.raises(StorageError, match=r"shard-000001.h5 is missing; remove shard-000002.h5 and those after"):
        write(out)
    (parts / "shard-000002.h5").unlink()  # what the message says
    write(out)
    assert out.read_bytes() == expected


def test_a_shard_with_a_wrong_bit_never_reaches_the_final_file(tmp_path):
    out = tmp_path / "f.h5"
    write(out, until=3, shard_bytes=1)
    shard = tmp_path / "f.h5.parts" / "shard-000000.h5"
    from npeff.storage.container import open_container

    raw = bytearray(shard.read_bytes())
    raw[open_container(shard).specs["norms"].offset] ^= 1
    shard.write_bytes(raw)
    with pytest.raises(StorageError, match=r"shard-000000.h5: dataset 'norms' is damaged"):
        write(out)
    assert not out.exists()


def test_a_newer_or_damaged_header(tmp_path):
    out = tmp_path / "f.h5"
    write(out, until=3)
    header = tmp_path / "f.h5.parts" / "header.json"
    document = json.loads(header.read_text())
    header.write_text(json.dumps({**document, "format_version": 3}))
    with pytest.raises(NewerFileError, match="upgrade npeff"):
        write(out)
    header.write_text("{")
    with pytest.raises(StorageError, match=r"damaged.*remove .*parts to start anew"):
        write(out)


def test_left_over_parts_of_a_finished_file_are_removed(tmp_path):
    out, parts = tmp_path / "f.h5", tmp_path / "f.h5.parts"
    write(out, until=3, shard_bytes=1)
    shutil.copytree(parts, tmp_path / "copy")
    write(out)
    shutil.copytree(tmp_path / "copy", parts)  # as if killed just after the rename
    with FisherWriter(out, HEADER) as writer:
        assert writer.finished is not None
    assert not parts.exists()
    # … but not the unfinished work of other settings
    shutil.copytree(tmp_path / "copy", parts)
    document = json.loads((parts / "header.json").read_text())
    document["header"]["provenance"]["model"]["digest"] = "another"
    (parts / "header.json").write_text(json.dumps(document))
    with FisherWriter(out, HEADER) as writer:
        assert writer.finished is not None
    assert len(list(parts.glob("shard-*.h5"))) == 3


# --- two at once ----------------------------------------------------------------------------------


def test_two_writers_in_one_process(tmp_path):
    with FisherWriter(tmp_path / "f.h5", HEADER) as writer:
        writer.append(BLOCKS[0], DIGESTS[0])
        with pytest.raises(StorageError, match=rf"this process \(pid {os.getpid()}\) is already writing"):
            FisherWriter(tmp_path / "f.h5", HEADER)
    FisherWriter(tmp_path / "f.h5", HEADER).close()


def test_two_processes(tmp_path):
    """The second is told the pid of the first, and may go on once that one is dead."""
    out = tmp_path / "f.h5"
    read, write_end = os.pipe()
    other = os.fork()
    if other == 0:
        with FisherWriter(out, HEADER, shard_bytes=1) as writer:
            writer.append(BLOCKS[0], DIGESTS[0])
            os.write(write_end, b"ready")
            time.sleep(60)
            os._exit(0)
    try:
        assert os.read(read, 5) == b"ready"
        with pytest.raises(StorageError, match=rf"another process \(pid {other} on .*\) is already writing"):
            write(out)
    finally:
        os.kill(other, signal.SIGKILL)
        os.waitpid(other, 0)
        os.close(read)
        os.close(write_end)
    assert_same(write(out), FISHERS)


def test_forked_children_do_not_keep_the_lock(tmp_path):
    with FisherWriter(tmp_path / "f.h5", HEADER, shard_bytes=1) as writer:
        writer.append(BLOCKS[0], DIGESTS[0])
        read, child_holds = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(child_holds)
            os.read(read, 1)
            os._exit(0)
    try:
        FisherWriter(tmp_path / "f.h5", HEADER).close()
    finally:
        os.close(child_holds)
        os.waitpid(child, 0)
        os.close(read)


# --- a full disk ----------------------------------------------------------------------------------


def test_disk_full_keeps_finished_shards(tmp_path, monkeypatch, expected):
    out = tmp_path / "f.h5"

    def full(path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with FisherWriter(out, HEADER, shard_bytes=1) as writer:
        writer.append(BLOCKS[0], DIGESTS[0])
        monkeypatch.setattr(files.os, "fsync", full)
        message = r"shard-000001.h5: the disk is full .* 1 finished shards \(2 examples\) are safe in .*Free"
        with pytest.raises(StorageError, match=message):
            writer.append(BLOCKS[1], DIGESTS[1])
    monkeypatch.undo()
    assert sorted(os.listdir(f"{out}.parts")) == ["header.json", "shard-000000.h5"]
    with monkeypatch.context() as patch:
        patch.setattr(files.os, "replace", lambda a, b: full(b) if Path(b) == out else os.rename(a, b))
        with pytest.raises(StorageError, match=r"f.h5: the disk is full .* All 8 examples are safe in .*f.h5.parts"):
            write(out)
    assert not out.exists()
    write(out)
    assert out.read_bytes() == expected


def write_with_limit(rank: int, out: Path, limit: int) -> str:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        write(out, shard_bytes=1)
    except StorageError as error:
        return str(error)
    return "written"


def test_a_real_file_size_limit(tmp_path, expected):
    """Not simulated: the kernel refuses to write past a limit, as it does on a full disk."""
    write(tmp_path / "sizes.h5", until=3, shard_bytes=1)
    sizes = [path.stat().st_size for path in tmp_path.glob("sizes.h5.parts/shard-*")]
    shutil.rmtree(tmp_path / "sizes.h5.parts")
    between = (max(sizes) + len(expected)) // 2
    assert max(sizes) < between < len(expected)
    out = tmp_path / "f.h5"
    for limit, wanted in ((1000, "may not grow further"), (between, "All 8 examples are safe")):
        (said,) = all_returned(1, write_with_limit, out, limit)
        assert wanted in said
        assert not list(tmp_path.rglob("*.tmp"))
    write(out)
    assert out.read_bytes() == expected


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission(tmp_path):
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(StorageError, match="cannot be written"):
            FisherWriter(tmp_path / "f.h5", HEADER)
    finally:
        tmp_path.chmod(0o700)


def test_kept_unfinished_work(tmp_path):
    formats = Path(__file__).parents[1] / "formats"
    fishers = fishers_of()
    shutil.copytree(formats / "v2" / "unfinished.h5.parts", tmp_path / "f.h5.parts")
    with FisherWriter(tmp_path / "f.h5", header_of(fishers)) as writer:
        blocks = blocks_of(fishers, 2)
        assert [writer.skip(f"batch {i}", 2) for i in range(3)] == [True, True, False]
        writer.append(blocks[2], "batch 2")
        assert_same(writer.finish(fishers.coverage), fishers)
    shutil.copytree(formats / "v1" / "unfinished.h5.parts", tmp_path / "g.h5.parts")
    with pytest.raises(StorageError, match=r"of an older npeff \(version 1\).*remove .*g.h5.parts to start anew"):
        FisherWriter(tmp_path / "g.h5", header_of(fishers))


def test_a_file_that_appears_during_the_work_is_not_overwritten(tmp_path, expected):
    out = tmp_path / "f.h5"
    with FisherWriter(out, HEADER) as writer:
        for block, digest in zip(BLOCKS, DIGESTS, strict=True):
            writer.append(block, digest)
        out.write_bytes(b"mine")
        with pytest.raises(StorageError, match=r"appeared there .* all 8 examples are in .*f.h5.parts"):
            writer.finish(FISHERS.coverage)
    assert out.read_bytes() == b"mine"
    out.unlink()
    write(out)
    assert out.read_bytes() == expected
