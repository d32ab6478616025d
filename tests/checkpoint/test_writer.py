"""Writing: a result is complete or does not exist. tests/faults fails every call of every writer."""

from __future__ import annotations

import errno
import itertools
import json
import os
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st
from on_disk import failing, listing, refused

from convert_to_quant.checkpoint import (
    CheckpointWriter,
    Entry,
    Spec,
    open_checkpoint,
    output_files,
    refuse_same_file,
    write_bytes,
    write_checkpoint,
    writer,
)
from convert_to_quant.checkpoint.header import DTYPE_BITS
from convert_to_quant.checkpoint.writer import _copy_once, lay_out
from convert_to_quant.errors import OutputError


@pytest.fixture(params=["unnamed", "sibling"])
def either_kind(request, monkeypatch):
    """Both kinds of temporary file; macOS has no unnamed ones."""
    if request.param == "sibling":
        monkeypatch.delattr(os, "O_TMPFILE", raising=False)


def writing(path: Path, count: int = 100, **options) -> CheckpointWriter:
    """A writer of one tensor, x, of some bytes."""
    return CheckpointWriter([(path, {"x": Spec("U8", (count,))})], {}, **options)


# what is written


def test_golden_bytes_of_a_file(tmp_path):
    path = tmp_path / "a.safetensors"
    entries = {"u": Entry.of(np.uint8([7])), "f": Entry.of(np.float32(1.0)), "b": Entry.of(np.uint16([0x3F80]), "BF16")}
    write_checkpoint(path, entries, {"k": "v"})
    text = (
        b'{"__metadata__":{"k":"v"},"f":{"dtype":"F32","shape":[],"data_offsets":[0,4]},'
        b'"b":{"dtype":"BF16","shape":[1],"data_offsets":[4,6]},"u":{"dtype":"U8","shape":[1],"data_offsets":[6,7]}}'
    )
    padded = text.ljust(len(text) + -len(text) % 8)
    assert path.read_bytes() == len(padded).to_bytes(8, "little") + padded + b"\0\0\x80\x3f\x80\x3f\x07"


def test_the_safetensors_library_reads_the_same(tmp_path, either_kind):
    generator = np.random.default_rng(0)
    dtypes = [np.uint8, np.int8, np.int16, np.int32, np.int64, np.float16, np.float32, np.float64, np.bool_]
    arrays = {
        f"{np.dtype(dtype).name}{list(shape)}": generator.integers(0, 2, shape).astype(dtype)
        for dtype, shape in itertools.product(dtypes, [(), (0,), (3,), (2, 0, 3), (4, 5)])
    }
    path = tmp_path / "a.safetensors"
    write_checkpoint(path, {name: Entry.of(array) for name, array in arrays.items()}, {"ä": "\n\u2028"})
    read = safetensors.numpy.load_file(path)
    assert read.keys() == arrays.keys()
    for name, array in arrays.items():
        assert (read[name].dtype, read[name].shape) == (array.dtype, array.shape)
        np.testing.assert_array_equal(read[name], array)
    with safetensors.safe_open(path, "numpy") as file:
        assert file.metadata() == {"ä": "\n\u2028"}
    assert listing(tmp_path) == ["a.safetensors"]


@given(
    st.lists(
        st.tuples(st.sampled_from([name for name, bits in DTYPE_BITS.items() if bits >= 8]),
                  st.lists(st.integers(0, 5), max_size=3)),
        max_size=12,
    )
)  # fmt: skip
def test_every_tensor_begins_at_a_multiple_of_its_size_without_holes(specs):
    infos = lay_out({str(i): Spec(dtype, tuple(shape)) for i, (dtype, shape) in enumerate(specs)})
    assert [info.start for info in infos] == [0, *(info.stop for info in infos)][: len(infos)]
    for info in infos:
        assert info.start % (DTYPE_BITS[info.dtype] // 8) == 0
    for same in {info.dtype for info in infos}:
        order = [int(info.name) for info in infos if info.dtype == same]
        assert order == sorted(order), "tensors of one width keep their order"


def test_tensors_are_written_in_any_order_in_parts_and_from_threads(tmp_path):
    values = np.arange(4096, dtype=np.float32)
    specs = {f"t{i}": Spec("F32", (4096,)) for i in range(4)}
    parts = [(name, start) for name in reversed(specs) for start in range(4096 - 256, -1, -256)]
    with CheckpointWriter([(tmp_path / "a", specs)], {}) as out, ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda part: out.write(part[0], values[part[1] : part[1] + 256], part[1] * 4), parts))
    for array in safetensors.numpy.load_file(tmp_path / "a").values():
        np.testing.assert_array_equal(array, values)


# copies


@pytest.fixture(params=["in the kernel", "refused by the kernel", "without copy_file_range"])
def any_copy(request, monkeypatch):
    """All ways to copy."""
    if request.param == "refused by the kernel":
        monkeypatch.setattr(os, "copy_file_range", failing(errno.EXDEV), raising=False)
    if request.param == "without copy_file_range":
        monkeypatch.delattr(os, "copy_file_range", raising=False)


def test_tensors_are_copied_byte_for_byte_also_under_new_names(tmp_path, save, any_copy):
    generator = np.random.default_rng(0)
    tensors = {f"t{i}": generator.integers(0, 256, (i * 1000,), np.uint8) for i in range(5)}
    tensors["f"] = generator.normal(size=333).astype(np.float32)
    with open_checkpoint(save("in.safetensors", tensors)) as checkpoint:
        specs = {f"new.{name}": Spec.like(info) for name, info in checkpoint.tensors.items()}
        with CheckpointWriter([(tmp_path / "out", specs | {"one": Spec("U8", (1,))})], {}) as out:
            out.copy(checkpoint, {f"new.{name}": name for name in tensors})
            out.write("one", b"\1")
    read = safetensors.numpy.load_file(tmp_path / "out")
    assert read.keys() == {*specs, "one"}
    for name, array in tensors.items():
        np.testing.assert_array_equal(read[f"new.{name}"], array)


def test_neighbours_are_copied_in_one_piece(tmp_path, save, monkeypatch):
    calls = []
    monkeypatch.setattr(writer, "_copy_once", lambda *args: calls.append(args[2]) or _copy_once(*args))
    names = [f"t{i}" for i in range(9)]
    output = [(tmp_path / "out.safetensors", dict.fromkeys(names, Spec("U8", (100,))))]
    source = save("in.safetensors", dict.fromkeys(names, np.zeros(100, np.uint8)))
    with open_checkpoint(source) as checkpoint, CheckpointWriter(output, {}) as out:
        out.copy(checkpoint, dict(zip(names, names, strict=True)))
    assert calls == [900]


@pytest.mark.parametrize("change", ["shorter", "failing"])
def test_an_input_that_changes_while_it_is_copied_is_named(tmp_path, save, monkeypatch, any_copy, change):
    source, output = save("in.safetensors", {"x": np.zeros(100, np.uint8)}), tmp_path / "out.safetensors"
    with open_checkpoint(source) as checkpoint:
        if change == "shorter":
            os.truncate(source, source.stat().st_size - 1)
            problem = "the file shrank while it was read (run the command again when nothing writes to it)"
        else:
            for call in ("preadv", "copy_file_range"):
                monkeypatch.setattr(os, call, failing(errno.EIO), raising=False)
            problem = "cannot be read: Input/output error"
        with refused() as message, writing(output) as out:
            out.copy(checkpoint, {"x": "x"})
    assert message == [f"{source}: {problem}"]
    assert listing(tmp_path) == ["in.safetensors"]


# whole or not at all


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_exception_leaves_nothing_and_the_old_file_stays(tmp_path, error, either_kind):
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"old")
    with pytest.raises(error), writing(path) as out:  # noqa: PT012
        out.write("x", bytes(100))
        raise error
    assert path.read_bytes() == b"old"
    assert listing(tmp_path) == ["a.safetensors"]


@pytest.fixture
def synced(tmp_path, monkeypatch):
    """What is put on the disk: a folder or a file, and the names in the test's folder at that time."""
    calls, real = [], os.fsync

    def sync(fd: int) -> None:
        names = [name for name in listing(tmp_path) if not name.endswith(".tmp")]
        calls.append(("folder" if stat.S_ISDIR(os.fstat(fd).st_mode) else "file", names))
        real(fd)

    monkeypatch.setattr(os, "fsync", sync)
    return calls


def test_a_file_is_on_the_disk_before_it_has_its_name_and_then_its_name_is(tmp_path, synced, either_kind):
    write_bytes(tmp_path / "a.json", b"{}")
    assert synced == [("file", []), ("folder", ["a.json"])]


def test_the_names_of_all_shards_are_on_the_disk_before_the_index_has_its_own(tmp_path, synced, either_kind):
    index = tmp_path / "m.safetensors.index.json"
    with CheckpointWriter([(tmp_path / name, {}) for name in ("1", "2")], {}, index):
        pass
    before_index = [call for call in synced if call[1] == ["1", "2"]]
    assert before_index == [("folder", ["1", "2"]), ("file", ["1", "2"])]
    assert synced[-1] == ("folder", ["1", "2", index.name])
    assert synced[:2] == [("file", [])] * 2, "a disk that fills up says so before any shard has its name"


@pytest.mark.parametrize("mode", [None, 0o600, 0o666, 0o444])
def test_a_replaced_file_keeps_its_permissions_and_a_new_one_follows_the_umask(tmp_path, mode, either_kind):
    path = tmp_path / "a.safetensors"
    if mode is not None:
        path.write_bytes(b"old")
        path.chmod(mode)
    umask = os.umask(0o027)
    try:
        write_bytes(path, b"new")
    finally:
        os.umask(umask)
    assert (path.read_bytes(), stat.S_IMODE(path.stat().st_mode)) == (b"new", 0o640 if mode is None else mode)


def test_a_link_stays_and_what_it_leads_to_is_replaced(tmp_path, either_kind):
    disk, link = tmp_path / "disk", tmp_path / "a"
    disk.mkdir()
    link.symlink_to(Path("disk", "target"))
    for content in (b"made", b"replaced"):
        write_bytes(link, content)
        assert (disk / "target").read_bytes() == content
        assert link.is_symlink()
        assert (listing(tmp_path), listing(disk)) == (["a", "disk"], ["target"])
    (disk / "target").unlink()
    disk.rmdir()
    with refused() as message:
        write_bytes(link, b"")
    assert message == [f"{link}: cannot be written: the folder {disk} does not exist"]


def test_what_became_a_pipe_meanwhile_is_not_replaced(tmp_path, either_kind):
    path = tmp_path / "a.safetensors"
    with refused() as message, writing(path, 0):
        os.mkfifo(path)
    assert message == [f"{path}: cannot be written: a pipe, not a file"]
    assert path.is_fifo()
    assert listing(tmp_path) == ["a.safetensors"]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_a_file_with_the_longest_name_keeps_its_owner(tmp_path, either_kind):
    path = tmp_path / ("名" * 81 + "." * 12)
    assert len(os.fsencode(path.name)) == 255
    write_bytes(path, b"old")
    os.chown(path, 1234, 4321)
    write_bytes(path, b"new")
    found = path.stat()
    assert (path.read_bytes(), found.st_uid, found.st_gid) == (b"new", 1234, 4321)
    assert listing(tmp_path) == [path.name]


@pytest.mark.parametrize("what", ["no /proc", "a file system without unnamed files"])
def test_where_no_unnamed_file_can_be_a_sibling_is_used(tmp_path, monkeypatch, what):
    if what == "no /proc":
        monkeypatch.setattr(writer, "UNNAMED", tmp_path / "no-proc")
    else:
        unnamed = failing(errno.EOPNOTSUPP, lambda _, flags, *__: flags & os.O_TMPFILE == os.O_TMPFILE, os.open)
        monkeypatch.setattr(os, "open", unnamed)
    with writing(tmp_path / "a.safetensors", 1) as out:
        assert [name.endswith(".tmp") for name in listing(tmp_path)] == [True]
        out.write("x", b"1")
    assert listing(tmp_path) == ["a.safetensors"]


# what kills leave, and what drives lack


def test_the_next_write_removes_what_a_killed_one_left_and_nothing_else(tmp_path, monkeypatch):
    monkeypatch.delattr(os, "O_TMPFILE", raising=False)
    dead, strange = tmp_path / ".convert_to_quant.0123456789abcdef.tmp", tmp_path / ".convert_to_quant.notes.tmp"
    dead.write_bytes(bytes(1234))
    strange.write_bytes(b"")
    with writing(tmp_path / "running", 0):
        running = [name for name in listing(tmp_path) if name not in (dead.name, strange.name)]
        dead.write_bytes(bytes(1234))
        assert writer.rehearse(tmp_path / "a") == [f"removed {dead} (1,234 bytes), left by an interrupted run"]
        assert listing(tmp_path) == sorted([strange.name, *running])
        dead.write_bytes(bytes(1234))
        write_bytes(tmp_path / "a", b"")
        assert dead.name not in listing(tmp_path)
    assert listing(tmp_path) == [strange.name, "a", "running"]


LACKING = {
    "rename": ("replace", errno.ENOSYS, "its file system cannot rename files or write at an offset; use another"),
    "positions": ("pwrite", errno.EOPNOTSUPP, "its file system cannot rename files or write at an offset; use another"),
    "removing": ("unlink", errno.EPERM, "Operation not permitted"),
    "permission": ("open", errno.EACCES, "Permission denied"),
}


@pytest.mark.parametrize(("call", "number", "reason"), LACKING.values(), ids=LACKING)
def test_a_drive_that_lacks_what_writing_needs_is_found_before_the_work(tmp_path, monkeypatch, call, number, reason):
    path, real = tmp_path / "a.safetensors", getattr(os, call)
    monkeypatch.setattr(os, call, failing(number, lambda *words: call != "open" or words[1] & os.O_RDWR, real))
    with refused() as message:
        writer.rehearse(path)
    assert message[0].startswith(f"{path}: cannot be written: {reason}")


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_drive_without_fsync_is_written_to(tmp_path, monkeypatch, number, either_kind):
    monkeypatch.setattr(os, "fsync", failing(number))
    for content in (b"old", b"new"):
        write_bytes(tmp_path / "a", content)
        assert writer.rehearse(tmp_path / "a") == []
        assert (listing(tmp_path), (tmp_path / "a").read_bytes()) == (["a"], content)


# shards


def test_the_index_comes_last_and_says_where_everything_is(tmp_path):
    index = tmp_path / "m.safetensors.index.json"
    specs = {"1.safetensors": {"a": Spec("F32", (2,))}, "2.safetensors": {"b": Spec("U8", ())}}
    with CheckpointWriter([(tmp_path / name, some) for name, some in specs.items()], {"k": "v"}, index) as out:
        out.write("a", np.float32([1, 2]))
        out.write("b", b"\7")
        assert listing(tmp_path) == []
    assert json.loads(index.read_text()) == {
        "metadata": {"total_size": 9}, "weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}  # fmt: skip
    with open_checkpoint(index) as checkpoint:
        assert (checkpoint.metadata, list(checkpoint)) == ({"k": "v"}, ["a", "b"])
        np.testing.assert_array_equal(checkpoint.float32("a"), [1, 2])
    assert listing(tmp_path) == [*specs, index.name]


def shards(folder: Path) -> CheckpointWriter:
    files = [(folder / f"m-{number}.safetensors", {f"{number}": Spec("U8", (0,))}) for number in (1, 2)]
    return CheckpointWriter(files, {}, folder / "m.safetensors.index.json")


EXISTS = (
    "a sharded checkpoint already exists here, and several files cannot be replaced in one step "
    "(delete the index and its shards first, or choose another output)"
)


@pytest.mark.parametrize("when", ["before", "meanwhile"])
def test_a_sharded_checkpoint_is_never_replaced(tmp_path, when, either_kind):
    index = tmp_path / "m.safetensors.index.json"
    if when == "before":
        with shards(tmp_path):
            pass
        before = {path.name: path.stat().st_ino for path in tmp_path.iterdir()}
        with refused() as message:
            writer.check_output(index)
        assert {path.name: path.stat().st_ino for path in tmp_path.iterdir()} == before
    else:
        with refused() as message, shards(tmp_path):
            index.write_bytes(b"of another run")
        assert listing(tmp_path) == [index.name]
    assert message == [f"{index}: {EXISTS}"]


def test_shards_that_no_index_names_are_replaced(tmp_path, either_kind):
    (tmp_path / "m-1.safetensors").write_bytes(b"left by a run that was killed between two names")
    with shards(tmp_path):
        pass
    assert safetensors.numpy.load_file(tmp_path / "m-1.safetensors").keys() == {"1"}


def test_two_runs_do_not_name_shards_in_one_folder_at_a_time(tmp_path):
    fcntl = pytest.importorskip("fcntl")
    fd = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(fd, fcntl.LOCK_EX)
    try:
        with refused() as message, shards(tmp_path):
            pass
    finally:
        os.close(fd)
    place = tmp_path / "m.safetensors.index.json"
    assert message == [f"{place}: another process is writing shards into this folder (run the command again)"]
    assert listing(tmp_path) == []


def test_shards_follow_the_source_shard_for_shard_and_none_is_empty(tmp_path, save_shards):
    output, one = tmp_path / "out.safetensors.index.json", Spec("U8", (1,))
    with open_checkpoint(save_shards("in", [{name: np.uint8([1])} for name in "abc"])) as checkpoint:
        files = output_files(output, checkpoint, lambda name: name[0], {"a": one, "c": one, "c.new": one})
    assert files == ([(tmp_path / "out-00001-of-00002.safetensors", {"a": one}),
                      (tmp_path / "out-00002-of-00002.safetensors", {"c": one, "c.new": one})], output)  # fmt: skip


# where it cannot be written


def refusal(path: Path) -> str:
    with refused() as message:
        write_checkpoint(path, {"x": Entry.of(np.zeros(4, np.float32))})
    assert message[0].startswith(f"{path}: cannot be written: ")
    return message[0].removeprefix(f"{path}: cannot be written: ")


def test_an_output_that_cannot_be_is_refused_with_the_reason(tmp_path, either_kind):
    (tmp_path / "file").write_bytes(b"")
    assert refusal(tmp_path / "missing" / "a") == f"the folder {tmp_path / 'missing'} does not exist"
    assert refusal(tmp_path / "file" / "a") == f"{tmp_path / 'file'} is not a folder"
    assert refusal(tmp_path) == "a folder, not a file"
    assert refusal(tmp_path / ("a" * 300)) == "File name too long"
    assert listing(tmp_path) == ["file"]


def test_what_is_larger_than_the_disk_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    with pytest.raises(OutputError, match=r"it needs 1152921504\.6 GB and the disk has \d+\.\d GB free"):
        writing(tmp_path / "a.safetensors", 1 << 60)
    monkeypatch.setattr(os, "statvfs", lambda _: os.statvfs_result((4096, 4096, 9, 1, 1, 0, 0, 0, 0, 255)))
    with pytest.raises(OutputError, match=r"it needs 12\.5 MB and the disk has 4\.1 kB free"):
        writing(tmp_path / "a.safetensors", 12_500_000)
    with pytest.raises(OutputError, match=r"it needs 6\.\d kB and the disk has 4\.1 kB free"):
        CheckpointWriter([(tmp_path / name, {name: Spec("U8", (3_000,))}) for name in "ab"], {}, tmp_path / "index")
    assert listing(tmp_path) == []


@pytest.mark.parametrize("blocks", [0, 9, None])
def test_a_drive_that_does_not_know_its_room_is_tried(tmp_path, monkeypatch, blocks):
    def statvfs(_):
        if blocks is None:
            raise OSError(errno.EIO, "Input/output error")
        return os.statvfs_result((4096, 4096, blocks, 0, 0, 0, 0, 0, 0, 255))

    monkeypatch.setattr(os, "statvfs", statvfs)
    warning = f"the drive of {tmp_path} reports no free space; trying to write anyway"
    assert writer.rehearse(tmp_path / "a") == ([warning] if blocks else [])
    write_checkpoint(tmp_path / "a.safetensors", {"x": Entry.of(np.zeros(4, np.float32))})


# the input as output


def test_the_input_is_refused_as_output_through_every_link(tmp_path, save):
    source = save("in.safetensors", {})
    (tmp_path / "sub").mkdir()
    symlink, hard_link, copy = tmp_path / "symlink", tmp_path / "hard-link", tmp_path / "copy"
    symlink.symlink_to(source)
    hard_link.hardlink_to(source)
    copy.write_bytes(source.read_bytes())
    for output in (source, symlink, hard_link, tmp_path / "sub" / ".." / "in.safetensors"):
        with refused() as message:
            refuse_same_file(output, [copy, source], hint="name another")
        assert message == [f"{output}: the output is the same file as the input {source} (name another)"]
    refuse_same_file(copy, [source])
    refuse_same_file(tmp_path / "new", [source, copy])
    refuse_same_file(tmp_path / "missing" / "new", [source])
    (tmp_path / "circle").symlink_to("circle")
    refuse_same_file(tmp_path / "circle", [source])
    with pytest.raises(OutputError, match="cannot be written: Too many levels of symbolic links"):
        writer.check_output(tmp_path / "circle")
