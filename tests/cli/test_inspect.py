"""`inspect`: its screen, its table, its JSON, its exit codes, and what it never does."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from textwrap import dedent
from typing import Any

import numpy as np
import pytest

from convert_to_quant import __version__
from convert_to_quant.cli.inspect import WIDTH


def screen(text: str) -> str:
    """A screen as the tests write it."""
    return dedent(text).lstrip("\n").replace("VERSION", __version__)


@pytest.fixture
def look(ctq: Any) -> Callable[..., str]:
    """The screen of a file that is no misuse."""

    def look(path: Path, *words: str) -> str:
        outcome = ctq("inspect", path, *words)
        assert (outcome.code, outcome.err) == (0, "")
        return str(outcome.out)

    return look


# golden screens


def test_the_screen_of_a_file_in_high_precision(look: Any, flux_file: Path) -> None:
    assert look(flux_file) == screen("""
        flux.safetensors: 142.5 kB, 48 tensors
        model         Flux.1 (dev, schnell, Kontext, Fill, Krea)
        layers        21 BF16
        in ComfyUI    21 layers: high precision, as stored
        problems      none
        """)


def test_the_screen_of_a_converted_file(look: Any, fp8_file: Path) -> None:
    assert look(fp8_file) == screen("""
        fp8.safetensors: 97.6 kB, 87 tensors
        model         Flux.1 (dev, schnell, Kontext, Fill, Krea)
        layers        13 float8_e4m3fn, one scale per tensor
                      8 BF16
        marked by     header (13 layers) and comfy_quant tensors (13)
        input scales  13 at 1.0
        made by       convert_to_quant VERSION: converted
        in ComfyUI    13 layers: FP8 product, inputs at scale 1.0
                      8 layers: high precision, as stored
                      (with FP8 hardware; elsewhere all in full precision)
        advice        13 of 13 FP8 products have no measured input scale, so inputs
                      beyond 448 are clipped and tiny ones vanish:
                      convert_to_quant -i FILE -o NEW --actcal
        problems      none
        """)


def test_the_screen_of_a_calibrated_file(look: Any, save: Any, build: Any) -> None:
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
    assert look(path) == screen("""
        calibrated.safetensors: 3.1 kB, 9 tensors
        model         unknown
        layers        3 float8_e4m3fn, one scale per tensor
        marked by     header (3 layers)
        input scales  2 calibrated (0.0312 to 0.25), 1 not used
        made by       convert_to_quant 0.1.0: converted; calibrated by running the model
                      on noise (64 samples, seed 42); for use with style.safetensors;
                      the ranges of 2 layers depend on the conditioning (first:
                      double_blocks.0.txt_attn.qkv)
        in ComfyUI    2 layers: FP8 product, inputs scaled by input_scale
                      1 layer: full precision (full_precision_matrix_mult)
                      (with FP8 hardware; elsewhere all in full precision)
        problems      none
        """)


def test_the_screen_of_a_legacy_file_whose_marker_disables_fp8(look: Any, save: Any, build: Any) -> None:
    tensors, _ = build.quantized([f"model.diffusion_model.blocks.{i}" for i in range(3)], "legacy")
    tensors["model.diffusion_model.scaled_fp8"] = ("F8_E4M3", np.zeros(2, np.uint8))
    tensors["vae.decoder.weight"] = np.zeros((4, 4), np.float16)
    assert look(save("legacy.safetensors", tensors)) == screen("""
        legacy.safetensors: 2.8 kB, 11 tensors
        model         unknown; names begin with model.diffusion_model.; also in the
                      file: VAE
        layers        3 float8_e4m3fn, one scale per tensor
                      1 F16
        marked by     legacy marker model.diffusion_model.scaled_fp8 (2 elements)
        input scales  3 not used
        in ComfyUI    3 layers: full precision (legacy marker of 2 elements)
                      1 layer: high precision, as stored
        problems      the legacy marker has 2 elements: no FP8 products, and input
                      scales are ignored (model.diffusion_model.scaled_fp8)
                        do: convert_to_quant -i FILE -o NEW --actcal --enable-fp8-matmul
        """)


def test_the_screen_of_what_diffusers_writes(look: Any, save_shards: Any, build: Any, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"quantization_config": {"quant_method": "modelopt"}}')
    shards = []
    for name in ("transformer_blocks.0.attn.to_q", "transformer_blocks.1.attn.to_q"):
        tensors, _ = build.quantized([name], "none")
        shards.append({key: np.ones(1, np.float32) if key.endswith("scale") else value
                       for key, value in tensors.items()})  # fmt: skip
    assert look(save_shards("model", shards)) == screen("""
        model.safetensors.index.json: 1.7 kB, 2 files, 6 tensors
        model         unknown
        layers        2 float8_e4m3fn, one scale per tensor
        marked by     nothing; config.json beside it has a quantization_config
                      (modelopt)
        input scales  2 not used
        in ComfyUI    2 layers: scale dropped: codes are taken for weights, so noise
        advice        ComfyUI reads no shard indexes: join the shards into one file for
                      it
        problems      quantized, with scales, but without a mark: ComfyUI drops the
                      scales and paints noise, or does not load it (2 times, first:
                      transformer_blocks.0.attn.to_q)
                        do: use it where it was made for, or convert the original with
                          convert_to_quant
        """)


def test_the_screen_of_a_file_with_many_formats_and_problems(look: Any, save: Any, build: Any) -> None:
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
    assert look(save("mixed.safetensors", tensors)) == screen("""
        mixed.safetensors: 7.0 kB, 27 tensors
        model         unknown
        layers        4 float8_e4m3fn, one scale per tensor
                      1 float8_e4m3fn_blockwise, one scale per block of 8 × 8
                      1 float8_e4m3fn, not readable (see problems)
                      1 nvfp4
                      1 float8_e5m2, without scale
        marked by     comfy_quant tensors (7)
        input scales  2 at 1.0, 1 missing (read as 1.0), 1 suspicious, 1 not used
        in ComfyUI    1 layer: FP8 product, inputs at scale 1.0
                      1 layer: only with the ComfyUI-QuantOps nodes, which scale inputs
                      as they come
                      1 layer: kernels of its own format
                      2 layers: FP8 product, which fails on CUDA
                      2 layers: an error, or silently something else (see problems)
                      1 layer: codes are the weights, cast to the precision of the model
                      (with FP8 hardware; elsewhere all in full precision)
        advice        1 of 1 FP8 products have no measured input scale, so inputs beyond
                      448 are clipped and tiny ones vanish:
                      convert_to_quant -i FILE -o NEW --actcal
        problems      a scale is 0, NaN, infinite or negative (blocks.3.weight_scale,
                      scales should be finite and not negative, found nan)
                        do: convert the original again
                      scales without a weight (gone.input_scale)
                        do: a part of the model is missing or renamed: get the file
                          again
                      an input scale is 0, not finite or absurd: inputs vanish, saturate
                      or become NaN (blocks.2.input_scale, 0)
                        do: convert_to_quant -i FILE -o NEW --actcal
                      sides are no multiples of 16: FP8 products fail on CUDA (2 times,
                      first: blocks.0, 24 × 32)
                        do: convert the original again; convert_to_quant leaves such
                          layers in high precision
                      FP8 weights without scale and mark: a plain cast, which loses
                      small weights, without FP8 products (blocks.7)
                        do: convert the original with convert_to_quant
        """)


# the frame


def test_the_table_of_layers(look: Any, save: Any, build: Any) -> None:
    tensors, metadata = build.quantized(["blocks.0", "blocks.1"], "both", input_scale=0.125)
    tensors["blocks.1.input_scale"] = np.float32(1)
    tensors["final.weight"] = np.zeros((16, 16), np.float16)
    out = look(save("m.safetensors", tensors, metadata), "--layers")
    assert out.partition("\n\n")[2] == screen("""
        layer     shape    format         scale   marked by          input scale                in ComfyUI
        blocks.0  16 × 32  float8_e4m3fn  tensor  header and tensor        0.125  calibrated    fp8
        blocks.1  16 × 32  float8_e4m3fn  tensor  header and tensor            1  not measured  fp8-at-one
        final     16 × 16  F16            -       -                            -                high-precision
        """)


def test_no_line_is_wider_than_a_terminal(look: Any, fp8_file: Path) -> None:
    assert max(map(len, look(fp8_file).splitlines())) <= WIDTH


def test_json_on_stdout_is_one_document_and_nothing_else(look: Any, fp8_file: Path) -> None:
    document = json.loads(look(fp8_file, "--json", "-", "--layers"))
    assert document["family"] == "flux1"
    assert document["input_scales"] == {"one": 13}
    assert {layer["reading"] for layer in document["layers"]} == {"fp8-at-one", "high-precision"}


def test_json_in_a_file_leaves_the_screen(look: Any, fp8_file: Path, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    assert look(fp8_file, "--json", str(report)) == look(fp8_file)
    assert json.loads(report.read_text(encoding="utf-8"))["problems"] == []


def test_the_report_never_replaces_the_model(ctq: Any, fp8_file: Path) -> None:
    before = fp8_file.read_bytes()
    outcome = ctq("inspect", fp8_file, "--json", fp8_file)
    assert (outcome.code, outcome.out) == (1, "")
    assert outcome.err.startswith("error: ")
    assert fp8_file.read_bytes() == before


def test_the_screen_of_guessed_scales(look: Any, ctq: Any, save: Any, build: Any) -> None:
    tensors, _ = build.quantized(["blocks.0"], "tensor", input_scale=0.25)
    made = {"version": "0.1.0", "calibrate": {"engine": "layer", "samples": 64}}
    path = save("guessed.safetensors", tensors, {"convert_to_quant": json.dumps(made)})
    assert look(path) == screen("""
        guessed.safetensors: 1.0 kB, 4 tensors
        model         unknown
        layers        1 float8_e4m3fn, one scale per tensor
        marked by     comfy_quant tensors (1)
        input scales  1 guessed (0.25 to 0.25)
        made by       convert_to_quant 0.1.0: input scales guessed by simulating each
                      layer (64 samples)
        in ComfyUI    1 layer: FP8 product, inputs scaled by input_scale
                      (with FP8 hardware; elsewhere all in full precision)
        advice        1 input scales are guesses from the weights, which may be far off:
                      convert_to_quant -i FILE -o NEW --actcal, or observe
        problems      none
        """)
    strict = ctq("inspect", path, "--strict")
    assert strict.code == 1
    assert "problems      input scales are guesses from simulated layers, not measured\n" in strict.out


def test_strict_finds_a_file_that_was_never_calibrated(ctq: Any, fp8_file: Path) -> None:
    strict = ctq("inspect", fp8_file, "--strict")
    assert (strict.code, ctq("inspect", fp8_file).code) == (1, 0)
    assert "input scales were never calibrated: all are 1.0 or missing" in " ".join(strict.out.split())


def test_strict_exits_with_1_where_there_are_problems_and_only_there(ctq: Any, save: Any, build: Any) -> None:
    good = save("good.safetensors", *build.quantized(["blocks.0"], "tensor", input_scale=0.5))
    bad = save("bad.safetensors", *build.quantized(["blocks.0"], "none"))
    assert [ctq("inspect", path, "--strict").code for path in (good, bad)] == [0, 1]
    assert ctq("inspect", bad).code == 0
    assert ctq("inspect", bad, "--strict").out == ctq("inspect", bad).out


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.safetensors", b"", "not a safetensors file: only 0 bytes long"),
        ("a.safetensors", b"\x00" * 64, "not a safetensors file: the header does not begin with '{'"),
        ("a.ckpt", b"PK\x03\x04" + b"\x00" * 20, "a pickled checkpoint"),
        ("a.safetensors.index.json", b"{", "not a shard index: it is not JSON"),
        ("a.safetensors.index.json", b'{"weight_map": {"x": "../x.safetensors"}}', "files in its own folder"),
        ("a.safetensors.index.json", b'{"weight_map": {"x": "x.safetensors"}}', "no such file"),
    ],
)
def test_a_bad_file_is_one_line_on_stderr(ctq: Any, tmp_path: Path, name: str, content: bytes, said: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    outcome = ctq("inspect", path)
    assert (outcome.code, outcome.out) == (1, "")
    assert outcome.err.startswith(f"error: {tmp_path}")
    assert said in outcome.err
    assert outcome.err.count("\n") == 1


def test_names_cannot_drive_the_terminal(look: Any, save: Any) -> None:
    path = save(
        "m.safetensors", {"a\x1b[2J\n.weight_scale": np.float32(1), "b\x1b[2J.weight": np.zeros((2, 2), np.float16)}
    )
    out = look(path, "--layers")
    assert "\x1b" not in out
    assert r"a\x1b[2J\n.weight_scale" in out
    assert r"b\x1b[2J" in out


@pytest.mark.parametrize("words", [[], ["--layers"], ["--json", "-"]], ids=" ".join)
def test_nothing_heavy_is_imported(fp8_file: Path, words: list[str]) -> None:
    code = (
        "import sys\nfrom convert_to_quant.cli import main\nassert main(sys.argv[1:]) == 0\n"
        "heavy = ('torch', 'diffusers', 'transformers', 'rich', 'safetensors', 'PIL')\n"
        "print([name for name in heavy if name in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code, "inspect", str(fp8_file), *words],
                          capture_output=True, text=True, check=True)  # fmt: skip
    assert done.stdout
    assert done.stderr == "[]\n"


def test_no_weight_is_read(save: Any, build: Any, monkeypatch: pytest.MonkeyPatch, look: Any) -> None:
    from convert_to_quant.checkpoint.reader import CheckpointFile

    read = []
    raw = CheckpointFile.raw

    def watched(self: CheckpointFile, info: Any) -> Any:
        read.append(info.name)
        return raw(self, info)

    monkeypatch.setattr(CheckpointFile, "raw", watched)
    look(save("m.safetensors", *build.quantized(["blocks.0"], "both")))
    assert set(read) == {"blocks.0.weight_scale", "blocks.0.input_scale", "blocks.0.comfy_quant"}


BROKEN = {
    "input-scale-dtype": (np.float16(0.5), np.int32(1)),
    "input-scale-shape": (np.ones(3, np.float32),),
    "input-scale-suspicious": (np.float32(0), np.float32(np.nan), np.float32(-np.inf), np.float32(-1)),
    "marker-disables-fp8": (None,),
}


@pytest.mark.parametrize(("kind", "broken"), [(kind, value) for kind, values in BROKEN.items() for value in values])
def test_a_remedy_that_is_a_command_cures(
    ctq: Any, save: Any, build: Any, tmp_path: Path, kind: str, broken: Any
) -> None:
    from convert_to_quant.inspection import KINDS, inspect_file

    if kind == "marker-disables-fp8":
        tensors, _ = build.quantized(["blocks.0"], "legacy")
        tensors["scaled_fp8"] = ("F8_E4M3", np.zeros(2, np.uint8))
    else:
        tensors, _ = build.quantized(["blocks.0"], "tensor")
        tensors["blocks.0.input_scale"] = broken
    path, cured = save("m.safetensors", tensors), tmp_path / "cured.safetensors"
    assert [problem.kind for problem in inspect_file(path).problems] == [kind]
    program, *words = KINDS[kind].remedy.split()
    assert program == "convert_to_quant"
    words = [{"FILE": str(path), "NEW": str(cured)}.get(word, word) for word in words]
    assert ctq(*words, "--actcal-engine", "layer").code == 0
    found = inspect_file(cured)
    assert (found.problems, found.readings) == ((), {"fp8": 1})
