"""Commands on a model with layers in every format that can be written."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from safetensors.torch import load_file, save_file

from convert_to_quant.checkpoint import open_checkpoint
from convert_to_quant.convert import convert, plan_conversion
from convert_to_quant.emoji import WEIGHTS
from convert_to_quant.formats import FORMATS, WRITTEN
from convert_to_quant.inspection import inspect_file
from convert_to_quant.layers import find_layers
from convert_to_quant.options import ConvertOptions

SMALL = ("--height", 32, "--width", 32, "--text-tokens", 4, "--steps", 1)
ACTCAL = ("--actcal-height", 32, "--actcal-width", 32, "--actcal-text-tokens", 4, "--actcal-samples", 3)
LAYER = ("--actcal", "--actcal-engine", "layer")
FIRST_BLOCKS = ("double_blocks.0.", "single_blocks.0.")


@pytest.fixture(scope="session")
def originals(tmp_path_factory):
    """The first blocks of the emoji model in 16 bits and in each format."""
    folder = tmp_path_factory.mktemp("formats")
    kept = {
        name: tensor
        for name, tensor in load_file(WEIGHTS).items()
        if "_blocks." not in name or name.startswith(FIRST_BLOCKS)
    }
    save_file(kept, folder / "original.safetensors")
    with open_checkpoint(folder / "original.safetensors") as checkpoint:
        for name in WRITTEN:
            plan = plan_conversion(checkpoint, ConvertOptions(format=name))
            if FORMATS[name].static and not FORMATS[name].dynamic:  # places for scales
                plan = replace(plan, decisions=[replace(each, input_scale=1.0) for each in plan.decisions])
            convert(checkpoint, plan, folder / f"{name}.safetensors")
    return folder


@pytest.fixture
def mixed(originals, tmp_path):
    """The model with layers in all formats, and the format of each layer."""
    tensors, formats = load_file(originals / "original.safetensors"), {}
    by_format = {name: load_file(originals / f"{name}.safetensors") for name in WRITTEN}
    marked = [key.removesuffix(".comfy_quant") for key in by_format["fp8"] if key.endswith(".comfy_quant")]
    for number, layer in enumerate(marked):
        formats[layer] = WRITTEN[number % len(WRITTEN)]
        own = by_format[formats[layer]].items()
        tensors |= {key: tensor for key, tensor in own if key.startswith(f"{layer}.")}
    save_file(tensors, tmp_path / "mixed.safetensors")
    return tmp_path / "mixed.safetensors", formats


def test_every_layer_is_read_as_it_was_written(mixed, ctq):
    path, formats = mixed
    found = inspect_file(path)
    read = {layer.name: layer.read_as for layer in found.layers if layer.read_as is not None}
    assert read == {layer: name.replace("int8-tensor", "int8") for layer, name in formats.items()}
    assert set(formats.values()) == set(WRITTEN)
    assert {problem.kind for problem in found.problems} == set()
    screen = ctq("inspect", path).out
    assert all(FORMATS[name].title in screen for name in WRITTEN)


def by_guessing(done, path, out):
    done("-i", path, "-o", out, *LAYER)
    return out


def by_running(done, path, out):
    done("-i", path, "-o", out, "--actcal", *ACTCAL, "--actcal-margin", 2)
    return out


def in_place(done, path, _out):
    said = done("-i", path, "--in-place", *LAYER).err
    assert "no place for an input_scale in" in " ".join(said.split())
    return path


def by_statistics(done, path, out):
    stats = out.with_name("stats.safetensors")
    done("observe", path, "-o", stats, *SMALL, "--samples", 3)
    done("report", stats, path, "-o", out.with_name("report.html"))
    done("apply", path, stats, "-o", out, "--margin", 2)
    return out


@pytest.mark.parametrize("calibrate", [by_guessing, by_running, in_place, by_statistics])
def test_only_static_scales_change(mixed, done, contents, tmp_path, calibrate):
    path, formats = mixed
    before = contents(path)
    after = contents(calibrate(done, path, tmp_path / "out.safetensors"))
    static = [layer for layer, name in formats.items() if FORMATS[name].static]
    scales = {f"{layer}.input_scale" for layer in static}
    assert after.keys() == before.keys() | (set() if calibrate is in_place else scales)
    changed = {name for name in after if before.get(name) != after[name]}
    assert changed <= scales | {f"{layer}.comfy_quant" for layer in static}
    assert scales & after.keys() <= changed


@pytest.mark.parametrize("name", [name for name in WRITTEN if FORMATS[name].static])
def test_static_scales_are_measured_while_converting_and_have_headroom(originals, done, tmp_path, name):
    fmt, out, found = FORMATS[name], tmp_path / "out.safetensors", tmp_path / "found.json"
    original = originals / "original.safetensors"
    words = ("-i", original, "-o", out, "--format", name, "--actcal", *ACTCAL, "--json", found)
    done(*words)
    for layer in json.loads(found.read_text())["layers"]:
        assert layer["scale_after"] * fmt.input_grid.max >= 1.499 * layer["range"] > 0
        assert layer["clipped_after"] == 0
    assert set(inspect_file(out).input_states) == {"calibrated", "unused"}  # one-token layers are in full precision


@pytest.mark.parametrize("name", [name for name in WRITTEN if FORMATS[name].static])
def test_in_place_needs_a_place_for_the_scale(originals, ctq, tmp_path, name):
    path = tmp_path / "file.safetensors"
    path.write_bytes((originals / f"{name}.safetensors").read_bytes())
    said = ctq("-i", path, "--in-place", *LAYER)
    assert said.code == FORMATS[name].dynamic
    if FORMATS[name].dynamic:
        place = "input_scale: cannot be changed in place: the file has no such tensor yet (write a new file with -o"
        assert place in " ".join(said.err.split())
        assert path.read_bytes() == (originals / f"{name}.safetensors").read_bytes()


@pytest.mark.parametrize("name", [name for name in WRITTEN if not FORMATS[name].static])
def test_a_report_without_static_scales_has_a_row_per_layer(originals, done, tmp_path, statistics, name):
    path, document, stats = originals / f"{name}.safetensors", tmp_path / "report.json", tmp_path / "stats.safetensors"
    with open_checkpoint(path) as checkpoint:
        table = find_layers(checkpoint)
        statistics(table.shapes()).save(stats)
    told = done("report", stats, path, "--json", document).err
    layers = {layer["name"]: layer["sides"][0] for layer in json.loads(document.read_text())["layers"]}
    assert "there is nothing to calibrate" in " ".join(told.split())
    assert {layer for layer, one in layers.items() if one["stored"] in FORMATS} == table.quantized.keys()
    assert all(one["inputs"] and one["absmax"] for one in layers.values())


def test_all_formats_are_checked_together(mixed, originals, done, tmp_path):
    report = tmp_path / "check.json"
    done("check", originals / "original.safetensors", mixed[0], *SMALL, "--samples", 1, "--json", report)
    assert 3 < json.loads(report.read_text())["sqnr_db"] < 40
