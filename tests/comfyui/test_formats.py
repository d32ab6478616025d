"""ComfyUI reads every format that we write, and computes what we simulate.

Its CPU kernels ("eager") support every format but two. On a CPU, MXFP8 and NVFP4 are "emulated": weights are
dequantized, and inputs are not quantized. If ComfyUI is told that the hardware supports them, it quantizes inputs and
calls a matmul that torch refuses ("CPU does not support swizzle"). Here that call fails in the way that comfy-kitchen
handles, so that comfy-kitchen multiplies the dequantized codes. Sums of real kernels are not tested.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import driver
import pytest

from convert_to_quant import emoji
from convert_to_quant.checkpoint import open_checkpoint
from convert_to_quant.cli import main
from convert_to_quant.formats import FORMATS, WRITTEN
from convert_to_quant.layers import Layer, dequantize, find_layers
from convert_to_quant.lora import match_loras, open_loras

if TYPE_CHECKING:
    from torch import Tensor

pytestmark = pytest.mark.comfyui

READ = [name for name in WRITTEN if FORMATS[name].since]
MIXED = {
    "img_attn": "w4a8",
    "img_mlp": "nvfp4",
    "img_mod": "int8",
    "txt_attn": "convrot-w4a4",
    "txt_mlp": "mxfp8",
    "txt_mod": "int8-tensor",
    "linear1": "int8-convrot",
    "linear2": "w6a8",
    "modulation": "fp8",
}
"""Which layers have which format in a file that holds all of them."""

FORMATS_OF = {"original": set[str](), "calibrated": {"fp8"}}
"""Other files, and the formats of their layers."""

HARDWARE = {"supports_mxfp8_compute": True, "supports_nvfp4_compute": True}
BFLOAT16 = {"should_use_bf16": True}
SUMS_DB = 120.0
"""Where only the order of float32 sums differs."""
EXACT = ("int8", "int8-tensor", "int8-convrot", "w4a8", "w6a8")
"""Sums of whole numbers have no order, and scales come after: every bit is the same, in any dtype."""
BFLOAT16_DB = {"convrot-w4a4": 46.0, "nvfp4": 42.0}
"""CPU kernels alone round more to bfloat16 than the last sum: the product of 4-bit codes and of each of its scales, and
the scales of NVFP4."""
BFLOAT16_SUM_DB = 48.0
STOCHASTIC_DB = {"nvfp4": 7.0, "w6a8": 5.0}
"""What stochastic rounding loses against rounding to nearest: twice the error, 3 dB. ComfyUI's of NVFP4 adds more, and
at 6 bits the neighbours of a scale are not tried again."""
STOCHASTIC_OTHERS_DB = 4.5


def as_comfyui_holds(layer: Layer) -> tuple[str, list[Any], dict[str, Any]]:
    """Layout, stored weight, and parameters of a layer, by the format that we wrote."""
    out, within = layer.shape
    tiles = [-(-out // 128) * 128]
    rotated = {"convrot_groupsize": 256}
    w4a8 = {"scale": ["float8_e4m3fn", out, within // 16], "s_channel": ["float32", out], "group_size": 16, **rotated}
    return {
        "fp8": ("TensorCoreFP8E4M3Layout", ["float8_e4m3fn", out, within], {"scale": ["float32"]}),
        "int8": ("TensorWiseINT8Layout", ["int8", out, within], {"scale": ["float32", out, 1], "convrot": False}),
        "int8-tensor": ("TensorWiseINT8Layout", ["int8", out, within], {"scale": ["float32"], "convrot": False}),
        "int8-convrot": (
            "TensorWiseINT8Layout",
            ["int8", out, within],
            {"scale": ["float32", out, 1], "convrot": True, **rotated},
        ),
        "mxfp8": (
            "TensorCoreMXFP8Layout",
            ["float8_e4m3fn", out, within],
            {"scale": ["float8_e8m0fnu", *tiles, -(-within // 128) * 4]},
        ),
        "nvfp4": (
            "TensorCoreNVFP4Layout",
            ["uint8", out, within // 2],
            {"scale": ["float32"], "block_scale": ["float8_e4m3fn", *tiles, -(-within // 64) * 4]},
        ),
        "w4a8": ("AsymW4A8Int8Layout", ["int8", out, within // 2], {**w4a8, "codebook": ["float32", 16]}),
        "w6a8": ("AsymW4A8Int8Layout", ["int8", out, within * 3 // 4], {**w4a8, "codebook": None}),
        "convrot-w4a4": (
            "TensorCoreConvRotW4A4Layout",
            ["int8", out, within // 2],
            {"scale": ["float32", out], "quant_group_size": 64, "linear_dtype": "int4", **rotated},
        ),
    }[written_as(layer)]


def written_as(layer: Layer) -> str:
    """The name of a quantized layer's format; INT8 per row and per tensor are one format to readers."""
    assert layer.format is not None
    return "int8-tensor" if (layer.format.name, layer.granularity) == ("int8", "tensor") else layer.format.name


@pytest.fixture(scope="session")
def written(files, tmp_path_factory):
    """written("int8"): the emoji model in a format, by our command line; "mixed" is in all of them, "original" in none,
    and "calibrated" in FP8 with input scales and layers in full precision.
    """
    folder = tmp_path_factory.mktemp("formats")

    @cache
    def write(name: str) -> Path:
        if name in FORMATS_OF:
            made: Path = getattr(files("plain"), name)
            return made
        path = folder / f"{name}.safetensors"
        mixed = [word for part, fmt in MIXED.items() for word in ("--layer-format", f"{part}={fmt}")]
        flags = mixed if name == "mixed" else ["--format", name]
        assert main(["-i", str(emoji.WEIGHTS), "-o", str(path), *flags, "--quiet"]) == 0
        return path

    return write


@dataclass(frozen=True)
class Bench:
    """ComfyUI, our engine, and what both are shown."""

    comfyui: Any
    ours: Any
    shown: Mapping[str, Tensor]

    def run(self, key: str) -> dict[str, Tensor]:
        """Inputs and outputs of all layers in ComfyUI."""
        found: dict[str, Tensor] = self.comfyui.run(driver.evaluate_without_kernels, key, self.shown, record=True)
        return found

    def worst_db(self, outputs: Mapping[tuple[str, str], tuple[Tensor, Tensor]], formats: Mapping[str, str]) -> Any:
        """The worst layer of each format, in dB; those in high precision are "none"."""
        worst: dict[str, float] = {}
        for (_, layer), pair in outputs.items():
            name = formats.get(layer, "none")
            worst[name] = min(worst.get(name, math.inf), self.ours.db(*pair))
        return worst


@pytest.fixture
def bench(comfyui, ours, states):
    """ComfyUI, our engine, and what both are shown."""
    return Bench(comfyui, ours, {name: value[:2] for name, value in states.items()})


def formats_of(path: Path) -> dict[str, str]:
    """The format of every quantized layer."""
    with open_checkpoint(path) as checkpoint:
        return {layer.name: written_as(layer) for layer in find_layers(checkpoint).quantized.values()}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", [*READ, "mixed", *FORMATS_OF])
def test_every_format_is_read_as_written_and_computes_what_we_simulate(bench, written, figure, name, dtype):
    import torch

    path = written(name)
    told = bench.comfyui.load(path, "run", device={**HARDWARE, **(BFLOAT16 if dtype == "bfloat16" else {})})
    assert (told["dtype"], told["warnings"]) == (f"torch.{dtype}", [])
    weights = bench.comfyui.ask(driver.weights, "run")
    with open_checkpoint(path) as checkpoint:
        layers = find_layers(checkpoint).quantized
        assert len(layers) == (32 if name != "original" else 0)
        assert {layer for layer, found in told["layers"].items() if found["quant_format"]} == set(layers)
        for layer in layers.values():
            found = told["layers"][layer.name]
            layout, stored, params = as_comfyui_holds(layer)
            params |= {"orig_dtype": getattr(torch, dtype), "orig_shape": layer.shape}
            assert found["quant_format"] == layer.format.marked
            assert (found["layout"], found["stored"], found["full_precision"]) == (layout, stored, layer.full_precision)
            assert {key: found["params"][key] for key in params} == params
            real = torch.from_numpy(dequantize(checkpoint, layer))
            least_db = math.inf if dtype == "float32" else BFLOAT16_DB["nvfp4"]
            assert bench.ours.db(real, weights[layer.name]) >= least_db

    formats = formats_of(path)
    assert set(formats.values()) == {"mixed": set(READ), **FORMATS_OF}.get(name, {name})
    outputs = bench.ours.outputs(path, bench.run("run"), getattr(torch, dtype), arithmetic="comfyui")
    assert len(outputs) == 60
    for fmt, worst_db in bench.worst_db(outputs, formats).items():
        others_db = SUMS_DB if dtype == "float32" else BFLOAT16_DB.get(fmt, BFLOAT16_SUM_DB)
        if name != "mixed":
            figure(f"{name} in {dtype}: worst layer of {fmt}", worst_db)
        assert worst_db >= (math.inf if fmt in EXACT else others_db), fmt


@pytest.mark.parametrize("why", ["header", "tensors", "no hardware"])
def test_full_precision_is_for_formats_of_floats_alone_in_033(bench, written, changed, tmp_path, why):
    # ComfyUI 0.33 multiplies whole numbers as they are, whatever a mark says; by their source, later versions do not.
    import torch

    def mark(tensors: dict[str, Tensor], header: dict[str, Any]) -> None:
        for name, entry in header.items():
            entry["full_precision_matrix_mult"] = True
            tensors[f"{name}.comfy_quant"] = torch.tensor(list(json.dumps(entry).encode()), dtype=torch.uint8)
            if why == "header":
                del tensors[f"{name}.comfy_quant"]
        if why == "tensors":
            header.clear()

    formats = formats_of(written("mixed"))
    floats = {name for name, fmt in formats.items() if fmt in ("fp8", "mxfp8", "nvfp4")}
    path, device = written("mixed"), {"supports_fp8_compute": False}
    if why != "no hardware":
        path, device = changed(path, tmp_path / "marked.safetensors", mark), HARDWARE
    told = bench.comfyui.load(path, "run", device=device)
    assert told["warnings"] == []
    seen = bench.comfyui.run(driver.evaluate, "run", bench.shown, record=True)

    outputs = bench.ours.outputs(path, seen, torch.float32, arithmetic="comfyui", in_floats=floats)

    assert set(bench.worst_db(outputs, formats)) == {*READ, "none"}
    assert min(bench.worst_db(outputs, formats).values()) >= SUMS_DB
    if why != "no hardware":  # what our reading of the marks says of the others is what they ask for
        marked = bench.worst_db(bench.ours.outputs(path, seen, torch.float32, arithmetic="comfyui"), formats)
        assert {fmt for fmt, worst_db in marked.items() if worst_db >= SUMS_DB} == {"fp8", "mxfp8", "nvfp4", "none"}


def test_static_scales_of_inputs_are_used_in_nvfp4_and_only_there(bench, written, changed, tmp_path):
    import torch

    path, formats = written("mixed"), formats_of(written("mixed"))
    bench.comfyui.load(path, "run", device=HARDWARE)
    seen = bench.run("run")

    def scale(tensors: dict[str, Tensor], _header: dict[str, Any]) -> None:
        for number, (name, fmt) in enumerate(formats.items()):
            x = seen[f"{name}.in"]
            if fmt in ("nvfp4", "mxfp8"):
                tensors[f"{name}.input_scale"] = x.abs().amax() / 2688 * (0.3, 1.0, 4.0)[number % 3]
            if fmt == "nvfp4" and number % 2:
                tensors[f"{name}.pre_quant_scale"] = torch.linspace(0.5, 2.0, x.shape[-1])

    static = changed(path, tmp_path / "static.safetensors", scale)
    assert bench.comfyui.load(static, "run", device=HARDWARE)["warnings"] == []
    seen = bench.run("run")

    outputs = bench.ours.outputs(static, seen, torch.float32, arithmetic="comfyui")
    dynamic = bench.ours.outputs(path, seen, torch.float32, arithmetic="comfyui")

    assert min(bench.worst_db(outputs, formats).values()) >= SUMS_DB
    assert bench.worst_db(dynamic, formats)["nvfp4"] < 20
    assert bench.worst_db(dynamic, formats)["mxfp8"] >= SUMS_DB


@pytest.mark.parametrize("part", [None, 1])
def test_loras_are_rounded_into_loaded_weights_and_added_to_others(bench, written, figure, tmp_path, part):
    import torch
    from safetensors.torch import save_file

    path, lora = written("mixed"), tmp_path / "lora.safetensors"
    formats, adapters = formats_of(path), {}
    generator = torch.Generator().manual_seed(0)
    with open_checkpoint(path) as checkpoint:
        table = find_layers(checkpoint)
        for name, layer in table.quantized.items():
            size = float(abs(dequantize(checkpoint, layer)).mean()) / 5  # rank 4: a third of the weight's norm
            adapters[f"diffusion_model.{name}.lora_A.weight"] = torch.randn(4, layer.in_features, generator=generator)
            adapters[f"diffusion_model.{name}.lora_B.weight"] = size * torch.randn(
                layer.out_features, 4, generator=generator
            )
    save_file(adapters, lora)
    bench.comfyui.load(path, "run", device=HARDWARE)
    assert bench.comfyui.ask(driver.adapt, "run", "adapted", lora, part) == []
    seen = bench.run("adapted")

    def outputs(file: Path, arithmetic: str, match: Any = None) -> Any:
        return bench.ours.outputs(file, seen, torch.float32, match, arithmetic=arithmetic)

    arithmetic = "comfyui" if part is None else "dequantize"
    with open_loras([str(lora)]) as loras:
        adapted = outputs(path, arithmetic, match_loras(loras, table.shapes()))
    with_db, without_db = (bench.worst_db(found, formats) for found in (adapted, outputs(path, arithmetic)))
    assert {fmt for fmt in READ if without_db[fmt] > with_db[fmt] - 3} == set()
    if part is not None:
        assert min(with_db.values()) >= SUMS_DB
        return
    exact, rounded = outputs(emoji.WEIGHTS, "dequantize"), outputs(path, "dequantize")
    lost_db: dict[str, float] = {}
    for key in adapted:
        if key[1] in formats:
            nearest_db = bench.ours.db(exact[key][1], rounded[key][1])
            fmt = formats[key[1]]
            lost_db[fmt] = max(lost_db.get(fmt, 0.0), nearest_db - bench.ours.db(*adapted[key]))
    for fmt, value_db in lost_db.items():
        figure(f"LoRA on {fmt}: lost by stochastic rounding against rounding to nearest, worst layer", value_db)
    assert set(lost_db) == set(READ)
    assert {
        fmt for fmt, value_db in lost_db.items() if value_db > STOCHASTIC_DB.get(fmt, STOCHASTIC_OTHERS_DB)
    } == set()
