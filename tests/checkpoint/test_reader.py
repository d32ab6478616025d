"""Reading: one file or shards, lazily, and nothing that is not a checkpoint."""

from __future__ import annotations

import errno
import json
import os
import pickle
import socket
import stat
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from on_disk import failing

from convert_to_quant.checkpoint import open_checkpoint, to_float32
from convert_to_quant.checkpoint.reader import BIT_DTYPES, FLOAT_DTYPES
from convert_to_quant.errors import CheckpointError, HeaderError, PickleError, TensorError


def refused(path: Path, error: type[CheckpointError] = CheckpointError, *, named: Path | None = None) -> str:
    """The message with which a path is refused, which begins with it, or with the shard that is at fault."""
    with pytest.raises(error) as caught:
        open_checkpoint(path)
    assert str(caught.value).startswith(f"{named or path}: ")
    return str(caught.value).removeprefix(f"{named or path}: ")


TORCH_DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "I16": torch.int16, "I32": torch.int32, "I64": torch.int64,
    "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip


def test_a_file_of_the_safetensors_library_reads_the_same_in_every_dtype(tmp_path):
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for dtype, torch_dtype in TORCH_DTYPES.items():
        for shape in ((), (0,), (3, 0), (3,), (2, 3, 5)):
            tensors[f"{dtype}{list(shape)}"] = (torch.randn(shape, generator=generator) * 3).to(torch_dtype)
    path = tmp_path / "all.safetensors"
    safetensors.torch.save_file(tensors, path, {"a": "ä"})
    with open_checkpoint(path) as checkpoint:
        assert (checkpoint.path, checkpoint.sharded, checkpoint.metadata) == (path, False, {"a": "ä"})
        assert {*checkpoint} == tensors.keys()
        for name, tensor in tensors.items():
            info, bits = checkpoint.tensors[name], checkpoint.bits(name)
            assert checkpoint.path_of(name) == path
            assert (TORCH_DTYPES[info.dtype], info.shape) == (tensor.dtype, tuple(tensor.shape))
            assert (bits.dtype, bits.shape) == (np.dtype(BIT_DTYPES[info.dtype]), info.shape)
            assert bits.tobytes() == tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
            if info.dtype in FLOAT_DTYPES:
                values = checkpoint.float32(name)
                assert values.flags.writeable
                np.testing.assert_array_equal(values, tensor.float().numpy(), strict=True)


def test_what_numpy_or_float32_cannot_hold_is_refused_by_name_and_only_when_read(save):
    path = save("a.safetensors", {"ids": np.arange(3), "x": ("F8_E4M3FNUZ", np.zeros(8, np.uint8))})
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.raw("x").tobytes() == bytes(8)
        with pytest.raises(TensorError, match=r"a\.safetensors: ids: expected a float tensor, found I64"):
            checkpoint.float32("ids")
        with pytest.raises(TensorError, match=r"a\.safetensors: x: F8_E4M3FNUZ tensors are not supported"):
            checkpoint.bits("x")


def test_float16_and_float64_become_float32_as_torch_makes_them_without_a_warning():
    bits = np.arange(1 << 16, dtype=np.uint16)
    theirs = torch.from_numpy(bits.view(np.int16).copy()).view(torch.float16).float().numpy()
    np.testing.assert_array_equal(to_float32(bits.view(np.float16), "F16"), theirs)
    np.testing.assert_array_equal(to_float32(np.float64([1e300, -1e300]), "F64"), np.float32([np.inf, -np.inf]))


@pytest.mark.parametrize("rows", [slice(None), slice(0, 2), slice(1, 3), slice(2, 9), slice(3, 3)])
@pytest.mark.parametrize("shape", [(3, 5), (3,), (3, 0), (3, 2, 2)])
def test_rows_of_a_tensor_are_those_of_the_whole(save, shape, rows):
    weight = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    with open_checkpoint(save("a.safetensors", {"odd": np.zeros(3, np.uint8), "w": weight})) as checkpoint:
        found = checkpoint.bits("w", rows)
        np.testing.assert_array_equal(found, weight[rows])
        assert found.flags.aligned, "which compiled code on some machines needs"


# what is not there, or is no file


@pytest.mark.parametrize("name", ["a.safetensors", "a.safetensors.index.json"])
def test_what_is_no_file_is_said_to_be_none(tmp_path, name):
    path = tmp_path / name
    assert refused(path) == "no such file"
    path.mkdir()
    assert refused(path) == "a folder, not a file"
    path.rmdir()
    path.symlink_to(name)
    assert refused(path) == "cannot be read: Too many levels of symbolic links"


@pytest.mark.parametrize("name", ["a.safetensors", "a.safetensors.index.json"])
@pytest.mark.parametrize("kind", ["pipe", "device", "socket"])
def test_a_special_file_is_refused_unopened(tmp_path, monkeypatch, kind, name):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / name
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as end:
            end.bind(name)  # relative, since a socket's path has at most 107 bytes
    else:
        try:
            os.mknod(path, 0o666 | stat.S_IFCHR, os.makedev(1, 3))
        except PermissionError:
            pytest.skip("no permission to make a device")
    assert refused(path) == f"a {kind}, not a file"


def test_a_file_that_is_replaced_or_removed_after_it_was_opened_is_read_on(save):
    path = save("a.safetensors", {"x": np.zeros(100, np.uint8)})
    with open_checkpoint(path) as checkpoint:
        save("b.safetensors", {"x": np.ones(100, np.uint8)}).rename(path)
        assert not checkpoint.bits("x").any()
        path.unlink()
        values = checkpoint.bits("x")
        checkpoint.refuse_changed()
    checkpoint.close()  # twice is harmless
    assert not values.any(), "they outlive the checkpoint"


AGAIN = r"\(run the command again when nothing writes to it\)"


def test_a_file_that_becomes_shorter_or_whose_disk_fails_is_named(save, monkeypatch):
    path = save("a.safetensors", {"x": np.zeros(100, np.uint8)})
    with open_checkpoint(path) as checkpoint:
        os.truncate(path, path.stat().st_size - 1)
        with pytest.raises(CheckpointError, match=rf"a\.safetensors: the file shrank while it was read {AGAIN}"):
            checkpoint.raw("x")
        with pytest.raises(CheckpointError, match=rf"a\.safetensors: the file changed while it was read {AGAIN}"):
            checkpoint.refuse_changed()
    with open_checkpoint(save("b.safetensors", {"x": np.zeros(100, np.uint8)})) as checkpoint:
        monkeypatch.setattr(os, "preadv", failing(errno.EIO), raising=False)
        with pytest.raises(CheckpointError, match=r"b\.safetensors: cannot be read: Input/output error"):
            checkpoint.bits("x")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_read_permission_is_refused(save):
    path = save("a.safetensors", {})
    path.chmod(0)
    assert refused(path) == "cannot be read: Permission denied"


# pickles


class Trap:
    """Unpickling it makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


UNOPENED = (
    "a pickled checkpoint; opening one runs the code in it, so it was not opened "
    "(convert it to safetensors in a sandbox first)"
)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5, "an archive of torch.save"])
def test_a_pickle_is_refused_unread_by_its_content(protocol, tmp_path):
    path, opened = tmp_path / "a.safetensors", tmp_path / "opened"
    if isinstance(protocol, int):
        path.write_bytes(pickle.dumps({"x": Trap(opened)}, protocol))
    else:
        torch.save({"x": Trap(opened)}, path)
    assert refused(path, PickleError) == UNOPENED
    assert not opened.exists()
    if isinstance(protocol, int):
        pickle.loads(path.read_bytes())
        assert opened.exists(), "the trap does not work"


@pytest.mark.parametrize("name", ["a.ckpt", "a.pt", "a.pth", "a.bin", "a.PT"])
def test_a_file_with_the_suffix_of_a_pickle_is_refused_too(save, name):
    assert refused(save(name, {"x": np.zeros(1, np.float32)}), PickleError) == UNOPENED


@pytest.mark.parametrize("length", [640, 896, 1152, 1408])
def test_a_header_whose_length_begins_like_a_pickle_is_none(length, tmp_path):
    text = b'{"x":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}'.ljust(length)
    content = length.to_bytes(8, "little") + text + b"\7"
    assert content[0] == 0x80
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    with open_checkpoint(path) as checkpoint:
        assert checkpoint.bits("x") == [7]


# shards


def test_metadata_of_shards_is_merged_and_the_first_file_wins(tmp_path, save):
    save("1.safetensors", {"a": np.uint8([1])}, {"k": "first", "x": "1"})
    save("2.safetensors", {"b": np.uint8([2])}, {"k": "second", "y": "2"})
    index = tmp_path / "m.safetensors.index.json"
    index.write_text('{"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}')
    with open_checkpoint(index) as checkpoint:
        assert (checkpoint.metadata, checkpoint.sharded) == ({"k": "first", "x": "1", "y": "2"}, True)


def test_a_folder_or_a_lone_shard_says_what_to_name(save_shards, save, tmp_path):
    lone = "one of 2 shards of a model, which is only read as a whole"
    index = save_shards("m", [{"a": np.float32([1])}, {"b": np.float32([2])}])
    shard = tmp_path / "m-00002-of-00002.safetensors"
    assert refused(tmp_path) == f"a folder, not a file (use {index.name})"
    assert refused(shard) == f"{lone} (use {index.name})"
    (tmp_path / "pipeline").mkdir()
    (tmp_path / "model").mkdir()
    for file in (index, *tmp_path.glob("*.safetensors")):
        file.rename(tmp_path / "model" / file.name)
    assert refused(tmp_path) == f"a folder, not a file (use model/{index.name})"
    (tmp_path / "model" / index.name).unlink()
    through = f"shards are read through their index: download {index.name} too, and use that"
    assert refused(tmp_path / "model") == f"a folder, not a file ({through})"
    assert refused(tmp_path / "model" / shard.name) == f"{lone} ({through})"
    save("pipeline/one.safetensors", {})
    assert refused(tmp_path / "pipeline") == "a folder, not a file (use one.safetensors)"
    open_checkpoint(save("m-00001-of-00001.safetensors", {})).close()


SHAPE = 'not a shard index: "weight_map" should map tensor names to file names'
BAD_INDEXES = {
    "not JSON": (b"{", "not a shard index: it is not JSON (Expecting property name"),
    "a list": (b"[]", SHAPE),
    "a weight_map that is a list": (b'{"weight_map": ["a"]}', SHAPE),
    "a weight_map of numbers": (b'{"weight_map": {"a": 1}}', SHAPE),
    "a shard by its path": (b'{"weight_map": {"a": "sub/1.safetensors"}}', "found 'sub/1.safetensors'"),
    "a shard anywhere": (
        b'{"weight_map": {"a": "/etc/passwd"}}', "its shards should be files in its own folder, found '/etc/passwd'"),
    "a shard name that is too long": (json.dumps({"weight_map": {"a": "x" * 256}}).encode(), "found 'xxx"),
    "its folder as a shard": (b'{"weight_map": {"a": "."}}', "found '.'"),
    "a shard name with a NUL": (b'{"weight_map": {"a": "1\\u0000.safetensors"}}', "found '1\\x00.safetensors'"),
}  # fmt: skip


@pytest.mark.parametrize(("content", "message"), BAD_INDEXES.values(), ids=BAD_INDEXES)
def test_a_bad_index_is_refused_by_its_own_message(content, message, tmp_path):
    path = tmp_path / "m.safetensors.index.json"
    path.write_bytes(content)
    assert message in refused(path)


FAULTS = {
    "missing": "no such file (it is listed in m.safetensors.index.json; 1 of 2 shards are missing: download them too)",
    "cut off": "b: truncated: bytes 0..4 extend beyond",
}


@pytest.mark.parametrize(("fault", "problem"), FAULTS.items())
def test_a_shard_that_is_at_fault_is_named(save_shards, tmp_path, fault, problem):
    index = save_shards("m", [{"a": np.float32([1])}, {"b": np.float32([2])}])
    shard = tmp_path / "m-00002-of-00002.safetensors"
    content = shard.read_bytes()
    shard.unlink()
    if fault == "cut off":
        shard.write_bytes(content[:-1])
    assert refused(index, named=shard).startswith(problem)


def test_a_tensor_that_its_shard_lacks_is_named(save_shards):
    index = save_shards("m", [{"a": np.float32([1])}, {"b": np.float32([2])}])
    said = json.loads(index.read_text())
    first, second = said["weight_map"].values()
    for wrong in ({"c": first}, {"a": second, "b": first}):
        index.write_text(json.dumps({"weight_map": said["weight_map"] | wrong}))
        name, shard = next(iter(wrong.items()))
        assert refused(index) == f"{name}: the index lists it in {shard}, which does not contain it"


def test_a_tensor_in_two_shards_is_refused(save_shards, tmp_path):
    index = save_shards("m", [{"c": np.float32([1]), "a": np.float32([1])}, {"a": np.float32([2])}])
    second = tmp_path / "m-00002-of-00002.safetensors"
    assert refused(index, HeaderError, named=second) == "a: is also in m-00001-of-00002.safetensors"
