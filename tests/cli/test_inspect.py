"""`inspect`: its screen, its table, its JSON, its exit codes, and what it never does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest


@pytest.fixture
def look(ctq):
    """The screen of a file that is no misuse."""

    def look(path: Path, *words: str) -> str:
        outcome = ctq("inspect", path, *words)
        assert (outcome.code, outcome.err) == (0, "")
        return str(outcome.out)

    return look


# golden screens


def test_the_screen_of_a_calibrated_file(golden, look, save, build):
    made = {
        "version": "0.1.0", "convert": {},
        "calibrate": {"engine": "model", "conditioning": "noise", "samples": 64, "seed": 42,
                      "lora": ["style.safetensors"],
                      "depends_on_conditioning": ["double_blocks.0.txt_attn.qkv", "double_blocks.0.txt_mlp.0"]},
    }  # fmt: skip
    tensors, metadata = build.quantized(["double_blocks.0.img_attn.qkv", "double_blocks.0.img_mlp.0"], "header",
                                        input_scale=0.0312)  # fmt: skip
    tensors["double_blocks.0.img_mlp.0.input_scale"] = np.float32(0.25)
    full, marks = build.quantized(["double_blocks.0.img_mod.lin"], "header", full_precision_matrix_mult=True)
    layers = {name: mark for text in (metadata, marks)
              for name, mark in json.loads(text["_quantization_metadata"])["layers"].items()}  # fmt: skip
    path = save("calibrated.safetensors", tensors | full, {
        "_quantization_metadata": json.dumps({"layers": layers}), "convert_to_quant": json.dumps(made)})  # fmt: skip
    golden("inspect calibrated", look(path))


def test_the_screen_of_a_legacy_file_whose_marker_disables_fp8(golden, look, save, build):
    tensors, _ = build.quantized([f"model.diffusion_model.blocks.{i}" for i in range(3)], "legacy")
    tensors["model.diffusion_model.scaled_fp8"] = ("F8_E4M3", np.zeros(2, np.uint8))
    tensors["vae.decoder.weight"] = np.zeros((4, 4), np.float16)
    golden("inspect legacy", look(save("legacy.safetensors", tensors)))


def test_the_screen_of_what_diffusers_writes(golden, look, save_shards, build):
    shards = []
    for name in ("transformer_blocks.0.attn.to_q", "transformer_blocks.1.attn.to_q"):
        tensors, _ = build.quantized([name], "none")
        shards.append({key: np.ones(1, np.float32) if key.endswith("scale") else value
                       for key, value in tensors.items()})  # fmt: skip
    golden("inspect of diffusers", look(save_shards("model", shards)))


def test_the_screen_of_a_file_with_many_formats_and_problems(golden, look, save, build):
    tensors, _ = build.quantized(["blocks.0", "blocks.1"], "tensor", shape=(24, 32))
    more, _ = build.quantized(["blocks.2", "blocks.3", "blocks.4", "blocks.5"], "tensor", input_scale=None)
    tensors |= more
    tensors["blocks.2.input_scale"] = np.float32(0)
    tensors["blocks.3.weight_scale"] = np.float32(np.nan)
    tensors["blocks.4.weight_scale"] = np.ones((2, 2), np.float32)
    tensors["blocks.4.comfy_quant"] = build.mark(format="float8_e4m3fn_blockwise", group_size=8)
    tensors["blocks.4.weight"] = ("F8_E4M3", np.zeros((16, 16), np.uint8))
    tensors["blocks.6.weight"] = np.zeros((16, 16), np.uint8)
    tensors["blocks.6.comfy_quant"] = build.mark(format="nvfp4")
    tensors["blocks.6.weight_scale"] = ("F8_E4M3", np.zeros((128, 4), np.uint8))
    tensors["blocks.6.weight_scale_2"] = np.float32(0.01)
    tensors["blocks.7.weight"] = ("F8_E5M2", np.zeros((16, 16), np.uint8))
    tensors["gone.input_scale"] = np.float32(1)
    golden("inspect many problems", look(save("mixed.safetensors", tensors)))


# the frame


def test_the_table_of_layers(golden, look, save, build):
    tensors, metadata = build.quantized(["blocks.0", "blocks.1"], "both", input_scale=0.125)
    tensors["blocks.1.input_scale"] = np.float32(1)
    tensors["final.weight"] = np.zeros((16, 16), np.float16)
    out = look(save("m.safetensors", tensors, metadata), "--layers")
    golden("inspect layers of several kinds", out.partition("\n\n")[2])


def test_json_on_stdout_is_one_document_and_a_file_leaves_the_screen(look, fp8_file):
    document = json.loads(look(fp8_file, "--json", "-", "--layers"))
    assert document["family"] == "flux1"
    assert document["input_scales"] == {"missing": 13}
    assert {layer["reading"] for layer in document["layers"]} == {"fp8-at-one", "high-precision"}
    report = fp8_file.with_name("report.json")
    assert look(fp8_file, "--json", report) == look(fp8_file)
    assert json.loads(report.read_text())["layers"] == document["layers"]


GUESSED = {"version": "0.1.0", "calibrate": {"engine": "layer", "samples": 64}}


def test_the_screen_of_guessed_scales(golden, look, save, build):
    tensors, _ = build.quantized(["blocks.0"], "tensor", input_scale=0.25)
    golden("inspect guessed", look(save("guessed.safetensors", tensors, {"convert_to_quant": json.dumps(GUESSED)})))


@pytest.mark.parametrize(
    ("marking", "scale", "made", "problem", "doubt"),
    [
        ("tensor", 0.5, {}, "none", "none"),
        ("tensor", 0.5, GUESSED, "none", "input scales are guessed by simulating layers, not measured"),
        ("tensor", 1.0, {}, "none", "input scales were never calibrated: all are 1.0 or missing"),
        ("none", 0.5, {}, "quantized with scales, but", "quantized with scales, but"),
    ],
)
def test_strict_exits_with_1_on_problems_and_unmeasured_scales(ctq, save, build, marking, scale, made, problem, doubt):
    tensors, _ = build.quantized(["blocks.0"], marking, input_scale=scale)
    path = save("m.safetensors", tensors, {"convert_to_quant": json.dumps(made)})
    for words, code, said in (((), 0, problem), (("--strict",), int(doubt != "none"), doubt)):
        outcome = ctq("inspect", path, *words)
        assert outcome.code == code
        assert f"\nproblems      {said}" in outcome.out


def test_names_cannot_drive_the_terminal(look, save):
    path = save(
        "m.safetensors", {"a\x1b[2J\n.weight_scale": np.float32(1), "b\x1b[2J.weight": np.zeros((2, 2), np.float16)}
    )
    out = look(path, "--layers")
    assert "\x1b" not in out
    assert r"a\x1b[2J\n.weight_scale" in out
    assert r"b\x1b[2J" in out


def test_hardly_a_weight_is_read(save, build, monkeypatch, look):
    from convert_to_quant.checkpoint import Checkpoint

    read = []
    raw = Checkpoint.raw

    def watched(self: Checkpoint, name: str, *span: int) -> Any:
        found = raw(self, name, *span)
        read.append((name, found.nbytes))
        return found

    monkeypatch.setattr(Checkpoint, "raw", watched)
    look(save("m.safetensors", *build.quantized(["blocks.0"], "both", shape=(1024, 1024))))
    names = {"blocks.0.weight", "blocks.0.weight_scale", "blocks.0.input_scale", "blocks.0.comfy_quant"}
    assert {name for name, _ in read} == names
    assert sum(nbytes for name, nbytes in read if name == "blocks.0.weight") < 1000


BROKEN = {
    "input-scale-dtype": (np.float16(0.5), np.int32(1)),
    "input-scale-shape": (np.ones(3, np.float32),),
    "input-scale-suspicious": (np.float32(0), np.float32(np.nan), np.float32(-np.inf), np.float32(-1)),
    "marker-disables-fp8": (None,),
    "mark-unreadable": (np.zeros(40, np.uint8),),
    "unmarked": (np.zeros(0, np.uint8),),
}


@pytest.mark.parametrize(("kind", "broken"), [(kind, value) for kind, values in BROKEN.items() for value in values])
def test_a_remedy_that_is_a_command_cures(done, save, build, tmp_path, kind, broken):
    from convert_to_quant.inspection import inspect_file
    from convert_to_quant.problems import KINDS

    tensors, _ = build.quantized(
        ["blocks.0"], {"marker-disables-fp8": "legacy", "unmarked": "none"}.get(kind, "tensor")
    )
    if kind == "marker-disables-fp8":
        tensors["scaled_fp8"] = ("F8_E4M3", np.zeros(2, np.uint8))
    elif kind != "unmarked":
        tensors["blocks.0.comfy_quant" if kind == "mark-unreadable" else "blocks.0.input_scale"] = broken
    path, cured = save("m.safetensors", tensors), tmp_path / "cured.safetensors"
    assert [problem.kind for problem in inspect_file(path).problems] == [kind]
    program, *words = KINDS[kind].remedy.partition(", or")[0].split()
    assert program == "convert_to_quant"
    words = [{"FILE": str(path), "NEW": str(cured)}.get(word, word) for word in words]
    calibrated = "--actcal" in words
    done(*words, *(["--actcal-engine", "layer"] if calibrated else []))
    found = inspect_file(cured if str(cured) in words else path)
    assert (found.problems, found.readings) == ((), {"fp8" if calibrated else "fp8-at-one": 1})


def test_a_folder_is_a_line_for_each_checkpoint_and_shards_are_their_index(ctq, save, build):
    good = save("good.safetensors", *build.quantized(["a"], "tensor", input_scale=0.5))
    bad = save("bad.safetensors", *build.quantized(["a"], "tensor", input_scale=-1.0))
    for name in ("big-00001-of-00001.safetensors", "-1-of-2.safetensors"):
        save(name, *build.quantized(["a"], "tensor", input_scale=0.5))
    shard = "big-00001-of-00001.safetensors"
    names = ["a.weight", "a.weight_scale", "a.input_scale", "a.comfy_quant"]
    index = good.with_name("big.safetensors.index.json")
    index.write_text(json.dumps({"weight_map": dict.fromkeys(names, shard)}))
    good.with_name("notes.txt").write_text("no checkpoint")
    good.with_name("torn.sft").write_bytes(b"torn")
    outcome = ctq("inspect", good.parent)
    rows = outcome.out.splitlines()
    assert [row.split("  ")[0] for row in rows] == ["file", "-1-of-2.safetensors", bad.name, index.name, good.name]
    assert [row.endswith("  none") for row in rows[1:]] == [True, False, True, True]
    assert (outcome.code, len(outcome.err.splitlines())) == (1, 1)
    assert "torn.sft" in outcome.err
    assert len(json.loads(ctq("inspect", good.parent, "--json", "-").out)["files"]) == 5
