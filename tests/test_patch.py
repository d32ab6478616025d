"""Scales into files: what changes, what never does, and crashes at every step."""

from __future__ import annotations

import errno
import fcntl
import itertools
import json
import math
import os
import re
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors
from on_disk import contents, failing, listing

from convert_to_quant import patch as patch_module
from convert_to_quant.checkpoint import open_checkpoint
from convert_to_quant.checkpoint.undo import Edit, undo_path, undo_record
from convert_to_quant.convert import convert, plan_conversion
from convert_to_quant.errors import Error, OutputError
from convert_to_quant.layers import find_layers
from convert_to_quant.names import PROVENANCE_KEY
from convert_to_quant.options import ConvertOptions
from convert_to_quant.patch import LayerChange, apply_in_place, plan_patch, recover, rewrite

SCALE = LayerChange(input_scale=0.125)
FULL = LayerChange(full_precision=True)


def planned(checkpoint, changes, **options):
    return plan_patch(checkpoint, find_layers(checkpoint), changes, **options)


def rewritten(source: Path, output: Path, changes, **options):
    with open_checkpoint(source) as checkpoint:
        patch = planned(checkpoint, changes, **options)
        rewrite(patch, output)
    return patch


def in_place(source: Path, changes, **options) -> int:
    with open_checkpoint(source) as checkpoint:
        return apply_in_place(planned(checkpoint, changes, **options))


def refused(call, *args, **options) -> str:
    """The message with which a call is refused, which changes no file of the folders that it is given."""
    folders = {path.parent for path in args if isinstance(path, Path)}
    before = {path: path.read_bytes() for folder in folders for path in folder.iterdir() if path.is_file()}
    with pytest.raises(Error) as caught:
        call(*args, **options)
    after = {path: path.read_bytes() for folder in folders for path in folder.iterdir() if path.is_file()}
    assert after == before
    return str(caught.value)


def layer_of(path: Path, name: str = "x"):
    with open_checkpoint(path) as checkpoint:
        return find_layers(checkpoint).quantized[name]


def places(path: Path, *names: str) -> set[int]:
    """Byte positions of tensors in a file of one."""
    with open_checkpoint(path) as checkpoint:
        start = checkpoint.files[0].header.data_start
        infos = [checkpoint.tensors[name] for name in names]
    return {start + position for info in infos for position in range(info.start, info.stop)}


def differing(before: bytes, after: bytes) -> set[int]:
    assert len(before) == len(after)
    return {position for position, pair in enumerate(zip(before, after, strict=True)) if pair[0] != pair[1]}


@pytest.fixture
def converted(tmp_path, save, build, request) -> Path:
    """A file as our own converter makes it, with room for everything, and with input scales or room for them."""
    generator = np.random.default_rng(0)
    tensors = {f"blocks.{i}.x.weight": ("BF16", build.to_bfloat16(generator.normal(size=(16, 32)))) for i in range(3)}
    source, path = save("bf16.safetensors", tensors, {"title": "t"}), tmp_path / "fp8.safetensors"
    with open_checkpoint(source) as checkpoint:
        plan = plan_conversion(checkpoint, ConvertOptions())
        scale = getattr(request, "param", 1.0)
        plan = replace(plan, decisions=[replace(each, input_scale=scale) for each in plan.decisions])
        convert(checkpoint, plan, path)
    source.unlink()
    return path


SCALES_OR_ROOM = pytest.mark.parametrize("converted", [1.0, None], ids=["scales", "room for them"], indirect=True)


# rewriting


@pytest.mark.parametrize("marking", ["tensor", "header", "both", "none", "legacy"])
@pytest.mark.parametrize("had_scale", [True, False], ids=["changed", "new"])
def test_a_rewrite_sets_the_scale_and_leaves_every_other_tensor_byte_identical(
    tmp_path, save, build, marking, had_scale
):
    tensors, metadata = build.quantized(["x", "y"], marking, input_scale=1.0 if had_scale else None)
    tensors |= {"norm.weight": np.ones(3, np.float32), "odd": np.uint8([1, 2, 3]), "scalar": np.float64(1)}
    if marking == "legacy":
        tensors["scaled_fp8"] = ("F8_E4M3", np.zeros(0, np.uint8))
    source, output = save("in.safetensors", tensors, metadata | {"k": "v"}), tmp_path / "out.safetensors"
    original = source.read_bytes()
    rewritten(source, output, {"x": SCALE}, metadata={"how": "so"})
    key = "x.scale_input" if marking == "legacy" else "x.input_scale"
    before, after = contents(source), contents(output)
    assert after.pop(key) == ("F32", (), np.float32(0.125).tobytes())
    before.pop(key, None)
    assert after == before
    assert source.read_bytes() == original
    with open_checkpoint(output) as checkpoint:
        assert checkpoint.metadata == metadata | {"k": "v", "how": "so"}
    assert layer_of(output).marking == layer_of(source).marking


@pytest.mark.parametrize("old", [np.ones((), np.float32), np.ones(1, np.float32), np.ones((1, 1), np.float32),
                                 np.float16(1), ("BF16", np.uint16(0x3F80)), np.float64(1)])  # fmt: skip
def test_a_scale_keeps_its_shape_but_becomes_float32_because_readers_crash_on_others(tmp_path, save, build, old):
    source = save("in.safetensors", build.quantized(["x"], "tensor")[0] | {"x.input_scale": old})
    output = tmp_path / "out.safetensors"
    rewritten(source, output, {"x": SCALE})
    assert contents(output)["x.input_scale"] == ("F32", getattr(old, "shape", ()), np.float32(0.125).tobytes())
    if getattr(old, "dtype", None) == np.float32:
        in_place(source, {"x": SCALE})
        assert contents(source) == contents(output)
    else:
        problem = refused(in_place, source, {"x": SCALE})
        assert re.search(r"x.input_scale: cannot be changed in place: it is .* and must become F32 \[\]", problem)


def test_shards_are_rewritten_as_shards_or_as_one_file(tmp_path, save_shards, build):
    shards = [build.quantized([name], "tensor", input_scale=None)[0] for name in "xyz"]
    source, index = save_shards("in", shards, {"k": "v"}), tmp_path / "out.safetensors.index.json"
    for output in (index, tmp_path / "one.safetensors"):
        rewritten(source, output, {"y": SCALE})
        assert contents(output)["y.input_scale"][2] == np.float32(0.125).tobytes()
    with open_checkpoint(index) as checkpoint:
        assert [file.path.name[:9] for file in checkpoint.files] == ["out-00001", "out-00002", "out-00003"]
        assert checkpoint.path_of("y.input_scale") == checkpoint.path_of("y.weight")
        assert checkpoint.metadata == {"k": "v"}
    assert contents(index) == contents(output)


# what cannot be planned


UNREADABLE = "an input scale must be finite and positive in float32, found"
NOT_QUANTIZED = "the file has no quantized layer of this name"
IMPOSSIBLE = [
    *(("x", LayerChange(scale), f"{UNREADABLE} {scale}") for scale in (0.0, -1.0, math.nan, math.inf, 1e39, 1e-46)),
    *((name, SCALE, NOT_QUANTIZED) for name in ("y", "plain", "raw", "foreign", "")),
    ("int8", SCALE, "readers scale its inputs dynamically, so it has no input scale"),
]


@pytest.mark.parametrize(("name", "change", "problem"), IMPOSSIBLE)
def test_a_change_that_no_reader_could_use_is_refused(save, build, name, change, problem):
    tensors, _ = build.quantized(["x"], "tensor")
    tensors |= {"plain.weight": np.ones((4, 4), np.float16), "raw.weight": ("F8_E4M3", np.ones((4, 4), np.uint8)),
                "foreign.weight": np.ones((4, 4), np.uint8), "foreign.comfy_quant": build.mark(format="banana"),
                "int8.weight": np.ones((4, 4), np.int8), "int8.weight_scale": np.float32(1),
                "int8.comfy_quant": build.mark(format="int8_tensorwise")}  # fmt: skip
    source = save("in.safetensors", tensors)
    with open_checkpoint(source) as checkpoint:
        assert refused(planned, checkpoint, {name: change}) == f"{source}: {name}: {problem}"


# full precision


@pytest.mark.parametrize("prefix", ["", "diffusion_model."])
@pytest.mark.parametrize("marking", ["tensor", "header", "both", "bare header"])
@pytest.mark.parametrize("wanted", [True, False])
def test_header_and_comfy_quant_agree_after_full_precision_changed(*, tmp_path, save, build, marking, prefix, wanted):
    config = {} if wanted else {"full_precision_matrix_mult": True}
    names = [prefix + "x", prefix + "y"]
    tensors, metadata = build.quantized(names, "both" if marking == "bare header" else marking, **config)
    if marking == "bare header":
        metadata = {key: text.replace(prefix, "") if prefix else text for key, text in metadata.items()}
    source, output = save("in.safetensors", tensors, metadata), tmp_path / "out.safetensors"
    rewritten(source, output, {names[0]: LayerChange(full_precision=wanted)})
    expected = {"format": "float8_e4m3fn"} | ({"full_precision_matrix_mult": True} if wanted else {})
    with open_checkpoint(output) as checkpoint:
        table = find_layers(checkpoint)
        assert table.quantized[names[0]].full_precision is wanted
        assert table.quantized[names[1]].full_precision is not wanted
        if marking != "header":
            assert json.loads(checkpoint.raw(f"{names[0]}.comfy_quant").tobytes()) == expected
        if marking != "tensor":
            layers = json.loads(checkpoint.metadata["_quantization_metadata"])["layers"]
            assert layers["x" if marking == "bare header" else names[0]] == expected
            assert len(layers) == 2
        else:
            assert "_quantization_metadata" not in checkpoint.metadata
    before, after = contents(source), contents(output)
    before.pop(f"{names[0]}.comfy_quant", None)
    after.pop(f"{names[0]}.comfy_quant", None)
    assert after == before


def test_where_header_and_tensor_disagreed_both_say_the_new_word(tmp_path, save, build):
    tensors, _ = build.quantized(["x"], "tensor", note="old")
    header = {"layers": {"x": {"format": "float8_e4m3fn", "kept": 1}}}
    source = save("in.safetensors", tensors, {"_quantization_metadata": json.dumps(header)})
    rewritten(source, tmp_path / "out.safetensors", {"x": FULL})
    expected = {"format": "float8_e4m3fn", "kept": 1, "full_precision_matrix_mult": True}
    with open_checkpoint(tmp_path / "out.safetensors") as checkpoint:
        assert json.loads(checkpoint.raw("x.comfy_quant").tobytes()) == expected
        assert json.loads(checkpoint.metadata["_quantization_metadata"])["layers"]["x"] == expected


# legacy markers


NOT_HEEDED = (
    "the marker scaled_fp8 has 2 elements: ComfyUI computes every layer in full precision and ignores the input "
    "scales; --enable-fp8-matmul changes that"
)
REPLACED = "the marker scaled_fp8 now lets ComfyUI use FP8 matmuls and the input scales"
NO_MARKER = "--enable-fp8-matmul: the file has no legacy marker, so there is nothing to enable"
UNSAID = "1 layer should compute in full precision (first: x), but the file has no quantization configs to declare it"
LEGACY_UNSAID = (
    "1 layer should compute in full precision (first: x), but a legacy file cannot declare it for single layers: "
    "convert the original without --legacy"
)
NOTED = [
    ("none", None, FULL, False, [UNSAID]),
    ("legacy", 0, FULL, False, [LEGACY_UNSAID]),
    ("legacy", 2, FULL, False, [NOT_HEEDED]),
    ("legacy", 2, LayerChange(0.125, full_precision=False), False, [NOT_HEEDED]),
    ("legacy", 2, FULL, True, [LEGACY_UNSAID, REPLACED]),
    ("legacy", 2, SCALE, True, [REPLACED]),
    ("tensor", 2, SCALE, False, []),
    ("tensor", None, SCALE, True, [NO_MARKER]),
]


@pytest.mark.parametrize(("marking", "elements", "change", "enable", "notes"), NOTED)
def test_what_a_legacy_marker_means_for_a_change_is_noted(*, save, build, marking, elements, change, enable, notes):
    tensors, _ = build.quantized(["x", "y"], marking)
    if elements is not None:
        tensors["scaled_fp8"] = ("F8_E4M3", np.zeros(elements, np.uint8))
    source = save("in.safetensors", tensors)
    output = source.with_name("out.safetensors")
    patch = rewritten(source, output, {"x": change, "y": LayerChange()}, enable_fp8_matmul=enable)
    assert patch.notes == notes
    if elements is not None:
        kept = 0 if REPLACED in notes else elements
        assert contents(output)["scaled_fp8"] == ("F8_E4M3", (kept,), bytes(kept))
    if marking == "legacy":
        assert (layer_of(output).marking, layer_of(output).full_precision) == ("legacy", NOT_HEEDED in notes)
    if REPLACED in notes:
        assert refused(in_place, source, {"x": change}, enable_fp8_matmul=True) == (
            f"{source}: scaled_fp8: cannot be changed in place: it is F8_E4M3 [2] and must become F8_E4M3 [0] "
            "(write a new file with -o instead)"
        )


# in place


@SCALES_OR_ROOM
def test_in_place_a_file_becomes_what_a_rewrite_makes_and_nothing_but_scales_marks_and_header_change(
    converted, tmp_path
):
    def stripped(path: Path) -> tuple[dict, dict]:
        """All but what is left of room."""
        with open_checkpoint(path) as checkpoint:
            metadata = {key: text.rstrip() for key, text in checkpoint.metadata.items()}
        return metadata, {name: (dtype, data.rstrip(b" ")) for name, (dtype, _, data) in contents(path).items()}

    names = [f"blocks.{i}.x" for i in range(3)]
    told = {PROVENANCE_KEY: json.dumps({"version": "0", "short": True})}
    before, output = converted.read_bytes(), tmp_path / "out.safetensors"
    changing = [name for name in contents(converted) if name.endswith((".input_scale", ".comfy_quant"))]
    allowed = places(converted, *changing) | set(range(8, min(places(converted, "blocks.0.x.weight_scale"))))
    for full, scales in ((True, (0.25, 0.5, 0.75)), (False, (1.5, 2.5, 3.5))):  # then where the first has put them
        changes = {name: LayerChange(scale, full) for name, scale in zip(names, scales, strict=True)}
        rewritten(converted, output, changes, metadata=told)
        assert in_place(converted, changes, metadata=told) >= 4
        assert stripped(converted) == stripped(output)
        with safetensors.safe_open(converted, "np") as read:
            assert [read.get_tensor(f"{name}.input_scale").item() for name in names] == list(scales)
        assert [layer_of(converted, name).full_precision for name in names] == [full] * 3
    assert differing(before, converted.read_bytes()) <= allowed
    assert in_place(output, dict.fromkeys(names, FULL)) == 4, "a rewrite keeps room"


def test_provenance_that_has_no_room_is_left_out_but_everything_else_is_done(converted):
    name = "blocks.1.x"
    with open_checkpoint(converted) as checkpoint:
        said = checkpoint.metadata[PROVENANCE_KEY]
    long = {PROVENANCE_KEY: "long" * 1000}
    assert in_place(converted, {name: SCALE}, metadata=long) == 1
    assert in_place(converted, {name: FULL}, metadata=long) == 2
    assert layer_of(converted, name).full_precision
    with open_checkpoint(converted) as checkpoint:
        assert checkpoint.metadata[PROVENANCE_KEY] == said


TENSOR = "x.{}: cannot be changed in place: {} (write a new file with -o instead)"
MARK = TENSOR.format("comfy_quant", "it is U8 [36] and must become U8 [72]")
NO_SCALE = TENSOR.format("input_scale", "the file has no such tensor yet")
NO_ROOM = "cannot be changed in place: the header has 232 bytes and needs 4233 (write a new file with -o instead)"


@pytest.mark.parametrize(
    ("change", "options", "problem"),
    [(FULL, {}, MARK), (SCALE, {}, NO_SCALE), (LayerChange(), {"metadata": {"other": "long" * 1000}}, NO_ROOM)],
    ids=["a mark", "a new scale", "metadata"],
)
def test_what_has_no_room_in_place_is_refused(save, build, change, options, problem):
    # The mark of 36 bytes ends where a scale could stand, had it any spaces.
    source = save("in.safetensors", *build.quantized(["x"], "tensor", input_scale=None, n=""))
    assert refused(in_place, source, {"x": change}, **options) == f"{source}: {problem}"


@pytest.mark.parametrize(
    ("change", "places"), [(FULL, 1), (LayerChange(full_precision=False), 0)], ids=["another", "what it says already"]
)
def test_a_mark_of_another_tool_keeps_its_size_and_its_spaces_where_it_can(save, build, change, places):
    mark = np.frombuffer(b'{ "format" : "float8_e4m3fn" }'.ljust(101), np.uint8)
    source = save("in.safetensors", build.quantized(["x"], "none")[0] | {"x.comfy_quant": mark})
    before = source.read_bytes()
    assert in_place(source, {"x": change}) == places
    assert contents(source)["x.comfy_quant"][1] == (101,)
    assert layer_of(source).full_precision is bool(places)
    assert (source.read_bytes() == before) is not bool(places)


def test_shards_are_changed_in_place_each_in_its_own_file(save_shards, build, tmp_path):
    index = save_shards("m", [build.quantized([name], "tensor")[0] for name in "xyz"])
    before = {path: path.read_bytes() for path in sorted(tmp_path.iterdir())}
    assert in_place(index, {"x": SCALE, "y": LayerChange(1.0), "z": LayerChange(3.0)}) == 2, "y has this scale already"
    changed = [path.name for path, content in before.items() if path.read_bytes() != content]
    assert changed == ["m-00001-of-00003.safetensors", "m-00003-of-00003.safetensors"]
    assert contents(index)["z.input_scale"][2] == np.float32(3).tobytes()


def test_a_header_entry_is_changed_in_every_shard_that_has_it(build, save_shards, tmp_path):
    tensors, metadata = build.quantized(["x", "y"], "header")
    metadata["_quantization_metadata"] += " " * 200
    names = [[name for name in tensors if name.startswith(layer)] for layer in "xy"]
    index = save_shards("m", [{name: tensors[name] for name in part} for part in names], metadata)
    first = tmp_path / "m-00001-of-00002.safetensors"
    for has_entry, edits in ((True, 2), (False, 1)):
        if not has_entry:
            first.write_bytes(build.file_bytes({name: tensors[name] for name in names[0]}))
        assert in_place(index, {"x": LayerChange(full_precision=has_entry)}) == edits
        for path in sorted(tmp_path.glob("*.safetensors"))[not has_entry :]:
            with safetensors.safe_open(path, "np") as shard:
                layers = json.loads(shard.metadata()["_quantization_metadata"])["layers"]
                assert layers["x"].get("full_precision_matrix_mult", False) is has_entry


def test_shards_of_another_folder_are_refused_in_place(save_shards, build, tmp_path):
    index = save_shards("m", [build.quantized(["x"], "tensor")[0]])
    (tmp_path / "elsewhere").mkdir()
    shard = tmp_path / "m-00001-of-00001.safetensors"
    real = shard.rename(tmp_path / "elsewhere" / "x.safetensors")
    shard.symlink_to(real)
    problem = "cannot be changed in place: it is not in the folder of m.safetensors.index"
    assert problem in refused(in_place, index, {"x": SCALE})


# crashes


# tests/faults fails and kills a change in place at every call; these are the messages, and what is restored from what.


class Killed(BaseException):
    """As after kill -9: nothing of ours cleans up."""


EIO = OSError(errno.EIO, os.strerror(errno.EIO))

CHANGES = {f"blocks.{i}.x": LayerChange(0.3 + i, full_precision=True) for i in range(2)}


def broken_at(monkeypatch, step: int, error: BaseException, *, lasting: bool = False) -> None:
    """Let a write or sync fail after half of its bytes, and with `lasting` all later ones."""
    calls = itertools.count()

    def breaking(real):
        def call(fd, *written):
            number = next(calls)
            if number == step or (lasting and number > step):
                for data, offset in [written] if written else ():
                    real(fd, memoryview(data)[: len(data) // 2], offset)
                raise error
            return real(fd, *written)

        return call

    for name in ("pwrite", "fsync"):
        monkeypatch.setattr(os, name, breaking(getattr(os, name)))


ENDS = {
    "once": "{0}: cannot be changed in place: Input/output error; it is unchanged",
    "lasting": "{1}: the change failed (Input/output error), and so did restoring the old bytes, which are in this "
    "file (the next in-place command restores them first)",
}


@pytest.mark.parametrize("step", [3, 5])
@pytest.mark.parametrize("how", ENDS)
@SCALES_OR_ROOM
def test_after_a_failed_change_the_old_bytes_are_there_or_come_back(converted, monkeypatch, how, step):
    original, undo, lasting = converted.read_bytes(), undo_path(converted), how == "lasting"
    with monkeypatch.context() as patched:
        broken_at(patched, step, EIO, lasting=lasting)
        with pytest.raises(OutputError) as caught:
            in_place(converted, CHANGES)
    assert str(caught.value) == ENDS[how].format(converted, undo)
    assert undo.exists() is lasting
    assert lasting or converted.read_bytes() == original
    assert recover(converted) is lasting
    assert converted.read_bytes() == original
    assert listing(converted.parent) == [converted.name]


def interrupted(path: Path, monkeypatch, step: int = 4, changes=CHANGES) -> Path:
    """Interrupt a change in place; gives the undo file that it leaves."""
    with monkeypatch.context() as patched:
        broken_at(patched, step, Killed())
        with pytest.raises(Killed):
            in_place(path, changes)
    undo = undo_path(path)
    assert undo.exists()
    return undo


def half_done(path: Path, undo: Path) -> str:
    return (
        f"{path}: an in-place change was interrupted and left it half done; the old bytes are in {undo} (any "
        f"command with --in-place restores them first, for example `convert_to_quant -i {path} --actcal --in-place`)"
    )


def test_a_change_that_was_interrupted_after_we_opened_the_file_is_noticed(converted, monkeypatch):
    with open_checkpoint(converted) as checkpoint:
        patch = planned(checkpoint, CHANGES)
        undo = interrupted(converted, monkeypatch)
        found = converted.read_bytes()
        for change in (lambda: apply_in_place(patch), lambda: rewrite(patch, converted.with_name("o"))):
            assert refused(change) == half_done(converted, undo)
    assert converted.read_bytes() == found
    assert listing(converted.parent) == [converted.name, undo.name]


def test_an_interrupted_change_is_found_through_every_symbolic_link(converted, monkeypatch, tmp_path):
    original = converted.read_bytes()
    (tmp_path / "other").mkdir()
    link = tmp_path / "other" / "link.safetensors"
    link.symlink_to(converted)
    for changed, found in ((link, converted), (converted, link)):
        interrupted(changed, monkeypatch)
        assert recover(found)
        assert converted.read_bytes() == original


def test_shards_are_recovered_together_and_none_is_read_before(save_shards, build, tmp_path, monkeypatch):
    index = save_shards("m", [build.quantized([name], "tensor")[0] for name in "xyz"])
    original = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    for step in range(3, 8):
        undo = interrupted(index, monkeypatch, step, {name: LayerChange(5.0) for name in "xyz"})
        for path in [index, *tmp_path.glob("*.safetensors")]:
            assert refused(open_checkpoint, path) == half_done(path, undo)
        alone = refused(recover, tmp_path / "m-00001-of-00003.safetensors")
        assert "belongs to another file, formerly called m-0000" in alone
        assert recover(index)
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == original


def test_nothing_to_recover_is_nothing(converted):
    (circle := converted.with_name("circle")).symlink_to("circle")
    for path in (converted, converted.with_name("missing"), circle):
        assert recover(path) is False


def sealed(record: object) -> bytes:
    """An undo file of any content, with the checksum that it should have."""
    body = json.dumps(record).encode()
    return f"{zlib.crc32(body):08x}\n".encode() + body


def unbelieved(path: Path) -> str:
    """Why the undo file of a checkpoint is not believed; nothing is changed."""
    hint = f" (nothing was restored; check its contents, or remove it if {path.name} is a new file or a copy)"
    return refused(recover, path).removeprefix(f"{path}: the undo file {undo_path(path).name} ").removesuffix(hint)


def test_a_damaged_undo_file_puts_nothing_back(converted, monkeypatch):
    undo = interrupted(converted, monkeypatch)
    good = undo.read_bytes()
    flipped = [good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :] for at in (0, 5, 9, len(good) // 2, len(good) - 1)]
    for damaged in (*flipped, b"", good[:5], good[: len(good) // 2]):
        undo.write_bytes(damaged)
        problem = f"{undo}: the undo file is damaged; nothing was restored (check its contents)"
        assert refused(recover, converted) == problem


FILE = {"name": "fp8.safetensors", "inode": 1, "bytes": 10}
STRANGE = {
    "a list": [],
    "an older format": {"format": 1, "files": [FILE], "changes": []},
    "no files": {"format": 2, "changes": []},
    "a file twice": {"format": 2, "files": [FILE, FILE], "changes": []},
    "an endless inode": {"format": 2, "files": [FILE | {"inode": math.inf}], "changes": []},
    "a change of a file that it does not name": {"format": 2, "files": [FILE], "changes": [[1, 0, "AA==", "AA=="]]},
    "a change before the file": {"format": 2, "files": [FILE], "changes": [[0, -1, "AA==", "AA=="]]},
    "no base64": {"format": 2, "files": [FILE], "changes": [[0, 0, "A", "AA=="]]},
}


@pytest.mark.parametrize("record", STRANGE.values(), ids=STRANGE)
def test_an_undo_file_that_is_not_ours_is_refused_also_where_its_checksum_is_right(converted, record):
    undo = undo_path(converted)
    undo.write_bytes(sealed(record))
    assert refused(recover, converted) == f"{undo}: the undo file was not written by this version (check its contents)"


@pytest.mark.parametrize("kind", ["folder", "pipe", "link"])
def test_an_undo_file_that_is_no_file_is_refused(converted, monkeypatch, kind):
    undo = undo_path(converted)
    if kind == "folder":
        undo.mkdir()
    elif kind == "pipe":
        os.mkfifo(undo)
    else:
        interrupted(converted, monkeypatch).rename(converted.with_name("elsewhere"))
        undo.symlink_to("elsewhere")
    problem = f"{undo}: the undo file cannot be read: not a regular file, or too large"
    assert refused(recover, converted) == problem
    assert refused(open_checkpoint, converted) == half_done(converted, undo)


def hostile(converted: Path, victim: Path, changes: list[tuple[int, bytes, bytes]]) -> Path:
    """An undo file for a checkpoint, well made in every way, of somebody's own changes."""
    undo = undo_path(converted)
    with victim.open("rb") as file:
        edits = [Edit(0, offset, new, old) for offset, old, new in changes]
        undo.write_bytes(undo_record([(victim, file.fileno())], edits))
    return undo


def test_an_undo_file_cannot_write_into_another_file_of_the_folder(converted):
    victim = converted.with_name("run.sh")
    victim.write_bytes(b"echo safe")
    undo = hostile(converted, victim, [(5, b"evil", b"safe")])
    assert refused(recover, converted) == (
        f"{converted}: its undo file would replace {undo.name}, which belongs to another file in this folder (change "
        "that file in place first to restore its old bytes)"
    )
    with converted.open("rb") as file, victim.open("rb") as other:  # beside changes of the checkpoint itself
        subjects = [(converted, file.fileno()), (victim, other.fileno())]
        undo.write_bytes(undo_record(subjects, [Edit(1, 5, b"safe", b"evil")]))
    assert unbelieved(converted) == "belongs to another file, formerly called run.sh"


def test_an_undo_file_from_elsewhere_is_refused_although_every_byte_is_known(converted, monkeypatch):
    undo = interrupted(converted, monkeypatch)
    kept = converted.rename(converted.parent.with_name("kept"))  # so that its inode is not taken again
    converted.write_bytes(kept.read_bytes())
    assert unbelieved(converted) == f"belongs to another file, formerly called {converted.name}"
    assert refused(open_checkpoint, converted) == half_done(converted, undo)


BEYOND = "changes more than metadata, input scales and quantization configs"


# The tensor in whose place the bytes are, or where they are in the file, and their number.
ELSEWHERE = [("weight", 4), ("weight_scale", 4), ("input_scale", 2), ("input_scale", 5), (0, 4), (-1, 3)]


@pytest.mark.parametrize(("place", "count"), ELSEWHERE)
def test_an_undo_file_cannot_write_into_anything_but_metadata_scales_and_marks(converted, place, count):
    content = converted.read_bytes()
    start = min(places(converted, f"blocks.1.x.{place}")) if isinstance(place, str) else place % len(content)
    hostile(converted, converted, [(start, bytes(count), content[start : start + count].ljust(count))])
    assert unbelieved(converted) == f"{BEYOND}: the {count} bytes at {start}"


@SCALES_OR_ROOM
@pytest.mark.parametrize("swap", ["old", "both"])
def test_an_undo_file_cannot_change_what_the_header_says_of_tensors(converted, swap):
    content = converted.read_bytes()
    length = int.from_bytes(content[:8], "little")
    text = content[8 : 8 + length]
    swapped = text.replace(b'blocks.0.x.weight"', b"?").replace(b'blocks.1.x.weight"', b'blocks.0.x.weight"')
    swapped = swapped.replace(b"?", b'blocks.1.x.weight"')
    assert len(swapped) == length
    hostile(converted, converted, [(8, swapped, swapped if swap == "both" else text)])
    assert unbelieved(converted) == f"{BEYOND}: the tensors in the header"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_an_undo_file_of_another_user_is_refused(converted, monkeypatch):
    os.chown(interrupted(converted, monkeypatch), 1234, 1234)
    assert unbelieved(converted) == "belongs to another user, 1234"
    os.chown(converted, 1234, 1234)
    assert recover(converted)


def test_an_undo_file_has_the_mode_and_the_owner_of_the_file(converted, monkeypatch):
    if os.geteuid() == 0:
        os.chown(converted, 1234, 4321)
    converted.chmod(0o640)
    found, kept = interrupted(converted, monkeypatch).stat(), converted.stat()
    assert (found.st_mode, found.st_uid) == (kept.st_mode, kept.st_uid)


def test_a_renamed_file_is_found_and_recovered_and_a_new_one_of_the_old_name_is_read(converted, monkeypatch, save):
    original = converted.read_bytes()
    undo = interrupted(converted, monkeypatch)
    renamed = converted.rename(converted.with_name("renamed.safetensors"))
    assert refused(open_checkpoint, renamed) == half_done(renamed, undo)
    converted.write_bytes(original)
    with open_checkpoint(converted):
        pass
    for attempt in (lambda: recover(converted), lambda: in_place(converted, CHANGES)):
        assert "its undo file would replace fp8.safetensors.undo, which belongs to" in refused(attempt)
    assert recover(renamed)
    assert renamed.read_bytes() == converted.read_bytes() == original
    assert listing(converted.parent) == [converted.name, renamed.name]
    assert in_place(converted, CHANGES) == 5


def test_a_file_whose_undo_file_would_have_too_long_a_name_is_refused_before_any_work(converted):
    long = converted.rename(converted.with_name("m" * 251))
    problem = f"{long}: the name of its undo file, {undo_path(long).name}, is too long (rename the checkpoint first)"
    assert refused(recover, long) == refused(in_place, long, CHANGES) == problem
    assert in_place(long.rename(long.with_name("m" * 250)), CHANGES) == 5


def test_undo_files_of_other_models_in_the_folder_say_nothing_of_this_one(converted, monkeypatch):
    undo = interrupted(converted, monkeypatch)
    other = converted.with_name("other.safetensors")
    assert recover(converted)
    other.write_bytes(converted.read_bytes())
    interrupted(converted, monkeypatch)
    for name in ("a.undo", "b.undo"):
        converted.with_name(name).write_bytes(b"rubbish")
    assert in_place(other, CHANGES) == 5
    assert undo.exists()


def test_a_file_that_another_process_is_changing_is_left_alone(converted, monkeypatch):
    before = converted.read_bytes()
    message = f"{converted}: another process is changing this file (wait until it has finished)"
    with converted.open("rb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        assert refused(in_place, converted, CHANGES) == message
    interrupted(converted, monkeypatch, step=2)
    with converted.open("rb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        assert refused(recover, converted) == message
        assert refused(open_checkpoint, converted) == message  # and not that it is half done
    assert recover(converted)
    assert converted.read_bytes() == before


@pytest.mark.parametrize("how", ["replaced", "rewritten", "touched", "replaced by a copy"])
def test_a_file_that_changed_since_it_was_opened_is_left_alone(converted, how):
    with open_checkpoint(converted) as checkpoint:
        patch = planned(checkpoint, CHANGES)
        content = bytes(60_000) if how == "replaced" else converted.read_bytes()
        if how == "touched":
            os.utime(converted, ns=(0, 0))
        else:
            new = converted if how == "rewritten" else converted.with_name("new")
            if how == "rewritten":
                os.utime(converted, ns=(0, 0))
            new.write_bytes(content)
            new.rename(converted)
        assert refused(apply_in_place, patch) == changed_meanwhile(converted)
    assert converted.read_bytes() == content
    assert listing(converted.parent) == [converted.name]


def changed_meanwhile(path: Path) -> str:
    return f"{path}: it was changed or replaced since it was opened, so nothing was written (run the command again)"


@pytest.mark.parametrize("full", [True, False], ids=["scales and marks", "scales"])
def test_of_two_changes_planned_before_either_is_written_the_second_is_refused(converted, full):
    """Within one tick of the system's clock too, which is what the equal times stand for."""
    names = [f"blocks.{i}.x" for i in range(3)]
    was = converted.stat().st_mtime_ns
    with open_checkpoint(converted) as one, open_checkpoint(converted) as other:
        first = planned(one, {names[0]: LayerChange(0.25, full), names[1]: LayerChange(1.0)})
        second = planned(other, {names[0]: LayerChange(1.0), names[1]: LayerChange(0.5)})
        assert apply_in_place(first) > 0
        written = converted.read_bytes()
        os.utime(converted, ns=(was, was))
        assert refused(apply_in_place, second) == changed_meanwhile(converted)
    assert converted.read_bytes() == written
    assert listing(converted.parent) == [converted.name]


def test_the_undo_file_and_its_name_are_on_the_disk_before_the_first_write_and_gone_after_the_last(
    converted, monkeypatch
):
    """A name is on the disk only when its folder is: without that, a power cut leaves changes and no undo file."""
    undo = undo_path(converted)
    model, folder = converted.stat().st_ino, converted.parent.stat().st_ino
    events: list[tuple[str, bool]] = []

    def noted(what, real):
        def call(fd, *rest):
            inode = os.fstat(fd).st_ino
            name = "model" if inode == model else "folder" if inode == folder else "undo"
            with converted.open("rb") as other, pytest.raises(BlockingIOError):  # nobody else may change it meanwhile
                fcntl.flock(other, fcntl.LOCK_SH | fcntl.LOCK_NB)
            events.append((f"{what} {name}", undo.exists()))
            return real(fd, *rest)

        return call

    for what, name in (("write", "pwrite"), ("sync", "fsync")):
        monkeypatch.setattr(os, name, noted(what, getattr(os, name)))
    assert in_place(converted, CHANGES) == 5
    assert events == [
        ("write undo", False),
        ("sync undo", False),
        ("sync folder", True),
        *[("write model", True)] * 5,
        ("sync model", True),
        ("sync folder", False),
    ]


def test_another_file_in_the_place_of_an_interrupted_one_is_not_touched(converted, monkeypatch):
    original = converted.read_bytes()
    place = min(places(converted, "blocks.1.x.input_scale"))
    interrupted(converted, monkeypatch)
    converted.write_bytes(original + b"1")
    assert unbelieved(converted) == "belongs to a file of another size"
    converted.write_bytes(original[:place] + np.float32(77).tobytes() + original[place + 4 :])
    assert unbelieved(converted) == f"belongs to another file: the bytes at {place} do not match"
    converted.write_bytes(original)  # a fresh copy of the file itself is recovered by doing nothing
    assert recover(converted)
    assert converted.read_bytes() == original
    interrupted(converted, monkeypatch)
    converted.unlink()
    assert refused(recover, converted) == f"{converted}: no such file"


@pytest.mark.parametrize("meanwhile", ["another undo file", "the other process is done"])
def test_what_is_there_when_we_get_the_lock_is_what_counts(converted, monkeypatch, meanwhile):
    undo = interrupted(converted, monkeypatch)
    half_done, content = converted.read_bytes(), undo.read_bytes()
    real_lock = patch_module.lock

    def lock(fd: int) -> None:
        if meanwhile == "another undo file":
            undo.write_bytes(sealed({**json.loads(content.split(b"\n", 1)[1]), "changes": []}))
        else:
            undo.unlink()
        real_lock(fd)

    monkeypatch.setattr(patch_module, "lock", lock)
    assert recover(converted) is (meanwhile == "another undo file")
    assert converted.read_bytes() == half_done


def test_a_file_that_may_not_be_written_is_refused(converted, monkeypatch):
    to_write = failing(errno.EACCES, lambda path, flags, *_: Path(path) == converted and flags & os.O_RDWR, os.open)
    monkeypatch.setattr(os, "open", to_write)
    assert refused(in_place, converted, CHANGES) == f"{converted}: cannot be changed in place: Permission denied"
