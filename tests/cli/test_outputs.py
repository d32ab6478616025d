"""Outputs that are pipes, devices or sockets are refused or written to, never replaced.

Texts are not read from them either: reading a pipe would wait for a writer. Every node is created by the test, in its
own folder. Never aim such a test at a node of the machine.
"""

from __future__ import annotations

import json
import os
import re
import socket
import stat
from pathlib import Path

import numpy as np
import pytest

from convert_to_quant.errors import OptionError

LAYER = ("--actcal", "--actcal-engine", "layer")
SPECIAL = {"pipe": "a pipe", "device": "a device", "disk": "a device", "socket": "a socket"}


def node(path: Path, kind: str) -> Path:
    """Create a special file. The device has the numbers of /dev/null, the disk those of no driver."""
    try:
        if kind == "pipe":
            os.mkfifo(path)
        elif kind == "device":
            os.mknod(path, 0o666 | stat.S_IFCHR, os.makedev(1, 3))
        elif kind == "disk":
            os.mknod(path, 0o666 | stat.S_IFBLK, os.makedev(250, 250))
        else:
            with socket.socket(socket.AF_UNIX) as end:
                end.bind(os.path.relpath(path))  # a socket's path has at most 107 bytes
    except PermissionError:
        pytest.skip(f"no permission to make a {kind}")
    return path


@pytest.fixture
def inputs(tmp_path, save, build, statistics, monkeypatch):
    """A checkpoint in bfloat16, one in FP8, its statistics, and a workflow."""
    monkeypatch.chdir(tmp_path)
    weights = {f"blocks.{i}.weight": ("BF16", build.to_bfloat16(np.ones((16, 32)))) for i in range(2)}
    tensors, metadata = build.quantized(["blocks.0", "blocks.1"], "tensor")
    stats = tmp_path / "stats.safetensors"
    statistics({"blocks.0": (16, 32), "blocks.1": (16, 32)}).save(stats)
    workflow = tmp_path / "workflow.json"
    workflow.write_text("{}")
    return {
        "bf16": save("bf16.safetensors", weights),
        "fp8": save("fp8.safetensors", tensors, metadata),
        "stats": stats,
        "workflow": workflow,
    }


OUTPUTS = {
    "convert -o": ("-i", "bf16", "-o", "OUT"),
    "convert and calibrate -o": ("-i", "bf16", "-o", "OUT", *LAYER),
    "calibrate -o": ("-i", "fp8", "-o", "OUT", *LAYER),
    "apply -o": ("apply", "fp8", "stats", "-o", "OUT"),
    "dequantize -o": ("dequantize", "fp8", "-o", "OUT"),
    "merge -o": ("merge", "stats", "-o", "OUT"),
    "observe -o": ("observe", "bf16", "-o", "OUT"),
    "check --save-conditioning": (
        "check", "bf16", "fp8", "--pipeline", ".", "--prompts", "workflow", "--save-conditioning", "OUT",
    ),
    "observe -o, its partial file": ("observe", "bf16", "-o", "WITHOUT_PARTIAL"),
    "comfyui -o": ("comfyui", "observe", "--server", "http://127.0.0.1:1", "--workflow", "workflow", "-o", "OUT"),
    "report -o": ("report", "stats", "-o", "OUT"),
    "report --png": ("report", "stats", "--png", "OUT"),
    "--save-config": ("-i", "bf16", "-o", "new.safetensors", "--save-config", "OUT"),
}  # fmt: skip
RUNNERS = ("observe", "comfyui", "check")
"""Commands that need a model that runs, or a server."""
SAID = {
    "convert -o": ("wrote OUT", "would replace OUT"),
    "calibrate -o": ("wrote OUT", None),
    "dequantize -o": ("wrote OUT", "would replace OUT"),
    "merge -o": ("wrote OUT", None),
    "report -o": ("wrote OUT", None),
}
TOTALS = r"[\d.]+ (bytes|kB) → [\d.]+ (bytes|kB) in \d+ s"
STREAMS = {
    "inspect --json": ("inspect", "fp8", "--json", "OUT"),
    "convert --json": ("-i", "bf16", "--dry-run", "--json", "OUT"),
    "apply --json": ("apply", "fp8", "stats", "--dry-run", "--json", "OUT"),
    "report --json": ("report", "stats", "--json", "OUT"),
    "report --csv": ("report", "stats", "--csv", "OUT"),
    "merge --json": ("merge", "stats", "--dry-run", "-o", "merged.safetensors", "--json", "OUT"),
}


def words_of(call: tuple[str, ...], inputs: dict[str, Path], output: Path) -> list[str]:
    places = {**inputs, "OUT": output, "WITHOUT_PARTIAL": str(output).removesuffix(".partial")}
    return [str(places.get(word, word)) for word in call]


REFUSED = [(name, kind) for name in OUTPUTS for kind in SPECIAL]
REFUSED += [(name, kind) for name in STREAMS for kind in ("disk", "socket")]


@pytest.mark.parametrize(("name", "kind"), REFUSED)
def test_an_output_that_is_a_special_file_is_refused_before_any_work(
    refused, inputs, tmp_path, monkeypatch, name, kind
):
    monkeypatch.setattr("convert_to_quant.convert.convert", None)
    monkeypatch.setattr("convert_to_quant.calibrate_activation_scales.calibrate_model", None)
    output = node(tmp_path / "special.partial", kind)
    before = output.lstat()
    message = f"{output}: cannot be written: {SPECIAL[kind]}, not a file\n"
    refused(message, *words_of((OUTPUTS | STREAMS)[name], inputs, output))
    assert os.path.samestat(output.lstat(), before)
    assert output.lstat().st_mode == before.st_mode


@pytest.mark.parametrize("linked", [False, True], ids=["pipe", "link to a pipe"])
@pytest.mark.parametrize("call", STREAMS.values(), ids=STREAMS)
def test_a_report_goes_into_a_pipe(done, inputs, tmp_path, call, linked):
    pipe = output = node(tmp_path / "pipe", "pipe")
    if linked:
        output = tmp_path / "link"
        output.symlink_to(pipe)
    with os.fdopen(os.open(pipe, os.O_RDONLY | os.O_NONBLOCK), encoding="utf-8") as reader:
        done(*words_of(call, inputs, output))
        text = reader.read()  # fits into the pipe's buffer
    assert "blocks.0" in text
    if "--csv" not in call:
        json.loads(text)
    assert pipe.is_fifo()
    assert output.is_symlink() == linked


@pytest.mark.parametrize("call", STREAMS.values(), ids=STREAMS)
def test_a_pipe_without_a_reader_is_an_error(ctq, inputs, tmp_path, call):
    output = node(tmp_path / "pipe", "pipe")
    outcome = ctq(*words_of(call, inputs, output))
    assert outcome.code == 1
    assert f"error: {output}: cannot be written: no program reads from this pipe\n" in outcome.err
    assert output.is_fifo()


@pytest.mark.parametrize("call", STREAMS.values(), ids=STREAMS)
def test_a_report_goes_into_a_character_device(done, inputs, tmp_path, call):
    output = node(tmp_path / "device", "device")
    done(*words_of(call, inputs, output))
    assert output.is_char_device()


@pytest.mark.parametrize("old", [None, b"old"], ids=["new", "there already"])
@pytest.mark.parametrize(
    "call", [call for call in (OUTPUTS | STREAMS).values() if call[0] not in RUNNERS], ids=" ".join
)
def test_a_link_as_output_is_followed(done, inputs, tmp_path, call, old):
    (tmp_path / "disk").mkdir()
    target, link = tmp_path / "disk" / "target", tmp_path / "link"
    link.symlink_to("disk/target")
    if old is not None:
        target.write_bytes(old)
        target.chmod(0o640)
    done(*words_of(call, inputs, link))
    assert link.readlink() == Path("disk/target")
    assert target.is_file()
    assert target.read_bytes() != old
    assert [path.name for path in target.parent.iterdir()] == ["target"]
    if old is not None:
        assert stat.S_IMODE(target.stat().st_mode) == 0o640


@pytest.mark.parametrize("kind", SPECIAL)
def test_texts_are_not_read_from_special_files(ctq, tmp_path, monkeypatch, kind):
    from convert_to_quant.cli.shared import read_prompts

    monkeypatch.chdir(tmp_path)
    text = node(tmp_path / "text", kind)
    said = f"cannot be read: {SPECIAL[kind]}, not a file"
    recording = ("comfyui", "observe", "--server", "http://127.0.0.1:1", "-o", "x.safetensors")

    assert ctq("--config", text).err == f"error: {text}: the configuration {said}\n"
    assert ctq(*recording, "--workflow", text).err == f"error: {text}: {said} (in ComfyUI, use File > Export (API))\n"
    with pytest.raises(OptionError, match=said):
        read_prompts(text)


@pytest.mark.parametrize("call", SAID)
def test_replacing_a_file_is_reported(ctq, inputs, tmp_path, call):
    output, (wrote, would) = tmp_path / "out.safetensors", SAID[call]
    words = words_of(OUTPUTS[call], inputs, output)
    before = sorted(path.name for path in tmp_path.iterdir())
    for said in (wrote, wrote.replace("wrote", "replaced")):
        told = ctq(*words).err
        assert said.replace("OUT", str(output)) in told
        assert "report" in call or "merge" in call or re.fullmatch(TOTALS, told.splitlines()[-1])
    dry = ctq(*words, "--dry-run").err
    assert would is None or would.replace("OUT", str(output)) in dry
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*before, output.name])


def test_leftovers_of_an_interrupted_run_are_removed_with_a_note(ctq, inputs, tmp_path):
    left = tmp_path / ".convert_to_quant.0123456789abcdef.tmp"
    left.write_bytes(bytes(1234))
    outcome = ctq("-i", inputs["bf16"], "-o", tmp_path / "out.safetensors")
    assert outcome.err.startswith(f"note: removed {left} (1,234 bytes), left by an interrupted run\n")
    assert not left.exists()
