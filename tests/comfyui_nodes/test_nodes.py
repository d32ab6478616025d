"""The nodes against a double of ComfyUI: what they give, when they run again, and what they refuse."""

from __future__ import annotations

import inspect
import math
import re
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from convert_to_quant.checkpoint import open_checkpoint
from convert_to_quant.comfyui_nodes import nodes
from convert_to_quant.comfyui_nodes.nodes import (
    NODE_CLASS_MAPPINGS,
    NODE_DISPLAY_NAME_MAPPINGS,
    ActivationReport,
    CalibrateFP8Checkpoint,
    QuantizeCheckpoint,
    RecordActivations,
    SaveActivationStats,
    SaveConditioning,
    solving,
)
from convert_to_quant.convert import convert, plan_conversion
from convert_to_quant.engines.prompts import Prompts
from convert_to_quant.errors import (
    CalibrationError,
    NoStaticScaleError,
    OptionError,
    OutputError,
    StatisticsError,
    UnsupportedModelError,
)
from convert_to_quant.formats import FORMATS
from convert_to_quant.layers import find_layers, input_scale
from convert_to_quant.options import ConvertOptions, RunOptions, SolveOptions
from convert_to_quant.recorder import find_linears
from convert_to_quant.report import figures, page, picture
from convert_to_quant.stats import Statistics

LATENT: dict[str, Any] = {"samples": None}
NAME = "diffusion_models/flux.safetensors"


def weights_of(model: Any) -> dict[str, Any]:
    """The weights of a double's layers, float32 [out, in]."""
    return {name: module.weight.numpy() for name, module in find_linears(model.model.diffusion_model).items()}


@pytest.fixture
def checkpoint(comfyui, build):
    """The FP8 file of the double's model, in ComfyUI's list."""
    tensors: dict[str, Any] = {}
    for name, weight in weights_of(comfyui.model()).items():
        tensors |= build.quantized([name], "tensor", shape=weight.shape)[0]
        tensors[f"{name}.weight"] = build.fp8(weight / tensors[f"{name}.weight_scale"])
    path: Path = comfyui.models / "flux.safetensors"
    path.write_bytes(build.file_bytes(tensors))
    return path


@pytest.fixture
def recorded(comfyui, noise):
    """What Record Activations gives as stats, after one sampling."""
    model, stats = RecordActivations().record(comfyui.model())
    comfyui.guider(model).sample(noise)
    return stats


def scales(path: Path) -> dict[str, float]:
    with open_checkpoint(path) as opened:
        return {name: input_scale(opened, layer) for name, layer in find_layers(opened).quantized.items()}


def saved(stats: Any, prefix: str = "a") -> str:
    """The file that Save Activation Stats writes."""
    file: str = SaveActivationStats().save(stats, LATENT, prefix)["result"][1]
    return file


# What ComfyUI asks of every node.


@pytest.mark.parametrize("name", NODE_CLASS_MAPPINGS)
def test_nodes_say_what_comfyui_asks(comfyui, name):
    node: Any = NODE_CLASS_MAPPINGS[name]
    inputs = node.INPUT_TYPES()
    function = dict(inspect.signature(getattr(node, node.FUNCTION)).parameters)
    shown = {**inputs["required"], **inputs.get("optional", {})}
    if function.pop("inputs", None) or function.pop("more", None):
        known = {**inspect.signature(SolveOptions().__init__).parameters, **inspect.signature(solving).parameters}
        known |= inspect.signature(node.write).parameters if hasattr(node, "write") else {}
        function |= {key: known[key] for key in shown if key in known}

    assert node.CATEGORY == "convert_to_quant"
    assert NODE_DISPLAY_NAME_MAPPINGS[name]
    assert node.DESCRIPTION
    assert len(node.RETURN_TYPES) == len(node.RETURN_NAMES) == len(node.OUTPUT_TOOLTIPS)
    assert set(function) - {"self"} == {*shown, *inputs.get("hidden", {})}
    assert inputs.get("hidden", {}) in ({}, {"unique_id": "UNIQUE_ID"})  # the text itself: ComfyUI compares it
    assert [key for key, (_, settings) in shown.items() if not settings["tooltip"]] == []
    for key in inputs.get("optional", {}):
        assert function[key].default is not inspect.Parameter.empty
    for key, (kind, settings) in shown.items():
        if kind in ("STRING", "BOOLEAN", "FLOAT"):
            assert function[key].default in (inspect.Parameter.empty, settings["default"])


def test_record_runs_again_only_to_reset_and_save_always():
    unchanged = RecordActivations.IS_CHANGED(statistics_file="a")
    assert unchanged == RecordActivations.IS_CHANGED(reset=False, statistics_file="a")
    assert math.isnan(float(RecordActivations.IS_CHANGED(reset=True)))
    assert math.isnan(SaveActivationStats.IS_CHANGED(filename_prefix="a"))


@pytest.mark.parametrize("node", [CalibrateFP8Checkpoint, ActivationReport])
def test_calibrate_and_report_run_again_when_what_they_read_changes(comfyui, checkpoint, statistics, node):
    statistics(comfyui.shapes).save(comfyui.root / "output" / "s.safetensors")

    def now() -> str:
        found: str = node.IS_CHANGED(checkpoint=NAME, statistics_file="s", margin=1.0)
        return found

    first = now()
    assert now() == first
    statistics(comfyui.shapes, 2.0).save(comfyui.root / "output" / "s.safetensors")
    second = now()
    checkpoint.write_bytes(checkpoint.read_bytes() + b"\0")
    assert len({first, second, now()}) == 3
    assert node.IS_CHANGED(checkpoint="diffusion_models/none.safetensors") == ""
    assert node.IS_CHANGED(checkpoint="none", statistics_file="s") not in ("", first, second)


# Record and Save.


def test_saved_statistics_are_what_was_recorded(comfyui, recorded):
    answer = SaveActivationStats().save(recorded, LATENT, "runs/flux")

    passed_on, file = answer["result"]
    assert file == "runs/flux_00001_.safetensors"
    assert passed_on == Statistics.load(comfyui.root / "output" / file) == recorded.statistics()
    assert answer["ui"]["text"] == [f"3 layers, 2 samples: {file}"]
    (told,) = answer["ui"]["statistics"]
    assert told == {
        "filename": "flux_00001_.safetensors", "subfolder": "runs", "type": "output", "recording": recorded.recording,
        "samples": 2,
    }  # fmt: skip


def test_save_tells_of_layers_that_ran_unseen(comfyui):
    layers = {**comfyui.shapes, "other": (4, 4)}
    stats = Statistics.empty(layers).with_facts(unseen=["other"])
    told = SaveActivationStats().save(stats, LATENT, "a")["ui"]
    assert told["statistics"][0]["recording"] == ""  # it comes from no recorder
    assert told["text"][0].endswith("\ncould not see the inputs of 1 layer that ran (first: other)")


def test_one_recording_is_one_file_and_another_gets_the_next_number(comfyui, recorded, noise, statistics):
    first = saved(recorded)
    model, stats = RecordActivations().record(comfyui.model(), statistics_file=first)  # goes on from it
    assert stats.recording != recorded.recording
    assert stats.statistics().samples == 2
    comfyui.guider(model).sample(noise)

    assert [saved(recorded), saved(recorded, "b")] == ["a_00001_.safetensors", "b_00001_.safetensors"]
    assert [saved(stats), saved(stats), saved(statistics(comfyui.shapes))] == [
        "a_00002_.safetensors", "a_00002_.safetensors", "a_00003_.safetensors"
    ]  # fmt: skip
    assert Statistics.load(comfyui.root / "output" / "a_00002_.safetensors").samples == 4


def test_a_file_that_took_the_place_of_ours_is_not_replaced(comfyui, recorded, statistics):
    first = comfyui.root / "output" / saved(recorded)
    first.rename(first.with_name("kept.safetensors"))
    other = statistics(comfyui.shapes, 7.0)
    assert saved(other) == first.name

    assert [saved(recorded), saved(recorded)] == ["a_00002_.safetensors"] * 2
    assert Statistics.load(first) == other


def test_nothing_is_saved_where_nothing_was_recorded(comfyui):
    _, stats = RecordActivations().record(comfyui.model())
    with pytest.raises(CalibrationError, match=r"nothing was recorded yet .*connect the MODEL"):
        saved(stats)
    assert list((comfyui.root / "output").iterdir()) == []


def test_progress_is_shown_on_the_node_where_a_server_runs(comfyui, recorded):
    shown: list[tuple[str, str]] = []
    server = SimpleNamespace(send_progress_text=lambda text, node: shown.append((node, text)))
    comfyui.modules.server.PromptServer.instance = server

    SaveActivationStats().save(recorded, LATENT, "a", unique_id="7")

    assert shown == [("7", "3 layers, 2 samples: a_00001_.safetensors")]


# Calibrate.


def test_calibrated_scales_are_the_recorded_ranges(comfyui, checkpoint, recorded):
    before = checkpoint.read_bytes()
    statistics = recorded.statistics()

    answer = CalibrateFP8Checkpoint().make(checkpoint=NAME, margin=1.5, stats=statistics)

    file, text = answer["result"]
    assert file == "flux_calibrated.safetensors"
    assert text.startswith("calibrated 3 of 3 layers, 0 in full precision, scales ")
    wanted = dict(zip(statistics.names, (1.5 * statistics.absmax.astype(float) / 448).tolist(), strict=True))
    assert scales(comfyui.models / file) == pytest.approx(wanted, rel=1e-6)
    assert checkpoint.read_bytes() == before


def test_statistics_come_from_a_file_as_well(comfyui, checkpoint, statistics):
    statistics(comfyui.shapes, 448.0).save(comfyui.root / "output" / "s.safetensors")

    CalibrateFP8Checkpoint().make(checkpoint=NAME, statistics_file="s", output_name="new/name", margin=1.0)

    assert list(scales(comfyui.models / "new" / "name.safetensors").values()) == [1.0, 2.0, 3.0]


def test_statistics_come_from_exactly_one_place_and_after_sampling(recorded):
    with pytest.raises(OptionError, match=r"run before the sampler .*Save Activation Stats"):
        solving(stats=recorded)
    assert solving(stats=recorded, latent=LATENT)[1] == recorded.statistics()
    for given in ({}, {"stats": recorded.statistics(), "statistics_file": "s"}):
        with pytest.raises(OptionError, match="connect stats or set statistics_file, but not both"):
            solving(**given)


def test_an_existing_file_is_replaced_only_if_asked(comfyui, checkpoint, recorded):
    output = comfyui.models / "flux_calibrated.safetensors"
    output.write_bytes(b"precious")
    node, statistics = CalibrateFP8Checkpoint(), recorded.statistics()

    with pytest.raises(OutputError, match="already exists"):
        node.make(checkpoint=NAME, stats=statistics)
    assert output.read_bytes() == b"precious"
    _, text = node.make(checkpoint=NAME, stats=statistics, overwrite=True)["result"]
    assert "replaced the existing file of that name" in text
    assert len(scales(output)) == 3


def test_layers_that_were_not_recorded_are_named_and_kept_if_asked(comfyui, checkpoint, recorded):
    first, *rest = comfyui.shapes
    partial = recorded.statistics().take([first])
    node = CalibrateFP8Checkpoint()

    with pytest.raises(StatisticsError, match=rf"2 of 3 layers differ .*{rest[0]}.*allow_partial") as caught:
        node.make(checkpoint=NAME, stats=partial)
    assert all(name in str(caught.value) for name in rest)
    file, text = node.make(checkpoint=NAME, stats=partial, allow_partial=True, margin=1.5)["result"]
    assert text.splitlines()[1:] == [f"{name}: not in these statistics: keeps its scale" for name in rest]
    found = scales(comfyui.models / file)
    assert [found[name] for name in rest] == [1.0, 1.0]
    assert found[first] != 1.0


# Save Conditioning.


def entry(tokens: int = 7, prompts: int = 1, **more: Any) -> Any:
    """As ComfyUI's text encoders give it."""
    return [torch.randn(prompts, tokens, 24), {"pooled_output": torch.randn(prompts, 20), **more}]


def test_a_saved_conditioning_is_what_check_reads(comfyui):
    mask = torch.ones(2, 7, dtype=torch.int64)
    cond = [entry(attention_mask=mask[:1], guidance=3.5), entry(attention_mask=mask[:1])]
    cond[0][0] = cond[0][0].bfloat16()

    answer = SaveConditioning().save(cond, "mine/prompt")

    assert answer["result"] == ("mine/prompt_00001_.safetensors",)
    assert answer["ui"]["text"] == ["2 prompts: mine/prompt_00001_.safetensors"]
    found = Prompts.load(comfyui.root / "output" / answer["result"][0])
    assert found.count == 2
    assert found.tensors.keys() == {"prompt_embeds", "pooled_prompt_embeds", "prompt_attention_mask"}
    assert torch.equal(found.tensors["prompt_embeds"], torch.cat([cond[0][0].float(), cond[1][0]]))
    assert torch.equal(found.tensors["pooled_prompt_embeds"], torch.cat([more["pooled_output"] for _, more in cond]))
    assert torch.equal(found.tensors["prompt_attention_mask"], mask)
    assert SaveConditioning().save(cond, "mine/prompt")["result"] == ("mine/prompt_00002_.safetensors",)


def test_a_conditioning_without_a_pooled_vector_has_none_in_its_file(comfyui):
    (file,) = SaveConditioning().save([entry(prompts=2, pooled_output=None)], "prompt")["result"]
    assert Prompts.load(comfyui.root / "output" / file).tensors.keys() == {"prompt_embeds"}


@pytest.mark.parametrize(
    ("cond", "found"),
    [
        ([entry(7), entry(9)], r"prompt_embeds \[7, 24\], pooled.* \[20\]; prompt_embeds \[9, 24\], pooled"),
        (
            [entry(7), entry(7, pooled_output=None)],
            r"prompt_embeds \[7, 24\], pooled.* \[20\]; prompt_embeds \[7, 24\] ",
        ),
        ([], "found none"),
    ],
)
def test_prompts_that_differ_do_not_go_into_one_file(comfyui, cond, found):
    with pytest.raises(OptionError, match=f"the same length and parts.*{found}"):
        SaveConditioning().save(cond, "prompt")
    assert list((comfyui.root / "output").iterdir()) == []


# Names that lead out of ComfyUI's folders; see test_folders.py for more.


@pytest.mark.parametrize(
    ("node", "inputs", "said"),
    [
        (SaveActivationStats, {"latent": LATENT, "filename_prefix": "../a"}, "is not a file name below"),
        (SaveConditioning, {"filename_prefix": "../a"}, "is not a file name below"),
        (CalibrateFP8Checkpoint, {"checkpoint": NAME, "output_name": "../a"}, "is not a file name below"),
        (ActivationReport, {"filename_prefix": "..\\a"}, "is not a file name below"),
        (ActivationReport, {"checkpoint": "diffusion_models/../../x.safetensors"}, "ComfyUI lists no checkpoint"),
    ],
)
def test_names_outside_of_comfyuis_folders_are_refused(comfyui, checkpoint, recorded, node, inputs, said):
    before = sorted(comfyui.root.rglob("*"))
    given = {"conditioning": [entry()]} if node is SaveConditioning else {"stats": recorded.statistics()}
    with pytest.raises(OptionError, match=said):
        getattr(node(), node.FUNCTION)(**given, **inputs)
    assert sorted(comfyui.root.rglob("*")) == before


SOURCE = "diffusion_models/sub/flux.safetensors"


@pytest.mark.parametrize(
    ("node", "inputs", "said"),
    [
        *((node, {"filename_prefix": "a/b"}, "") for node in (SaveActivationStats, SaveConditioning, ActivationReport)),
        *((node, {}, "") for node in NODE_CLASS_MAPPINGS.values() if hasattr(node, "VALIDATE_INPUTS")),
        *((node, {"filename_prefix": "../a"}, "is not a file name below")
          for node in (SaveActivationStats, SaveConditioning, ActivationReport)),
        (SaveActivationStats, {"filename_prefix": ""}, "is not a file name below"),
        (ActivationReport, {"filename_prefix": ""}, ""),
        *((CalibrateFP8Checkpoint, {"checkpoint": name, "output_name": output, "overwrite": overwrite}, said)
          for name, output, overwrite, said in (
              (NAME, "", False, ""), (None, "", False, ""), (NAME, "taken", True, ""),
              (NAME, "taken", False, "already exists"), (NAME, "flux", True, "same file as the input"),
              (NAME, "../../escape", False, "is not a file name below"),
              ("diffusion_models/../../x.safetensors", "", False, "ComfyUI lists no checkpoint"))),
        *((QuantizeCheckpoint, {"checkpoint": SOURCE, "output_name": out, "overwrite": overwrite, "format": fmt}, said)
          for out, overwrite, fmt, said in (
              ("", True, "int8", ""), ("", False, "int8", "already exists"), ("", False, None, ""),
              ("sub/flux", True, "int8", "same file as the input"),
              ("", False, "fp8-row", "'fp8-row' is not a format that ComfyUI reads"),
              ("", False, "", "'' is not a format"))),
        (QuantizeCheckpoint, {"checkpoint": SOURCE, "exclude": "("}, "is not a regular expression"),
    ],
)  # fmt: skip
def test_inputs_are_checked_before_anything_is_sampled(comfyui, checkpoint, original, node, inputs, said):
    for name in ("taken", "sub/flux_int8"):
        (comfyui.models / f"{name}.safetensors").touch()
    refused = node.VALIDATE_INPUTS(**inputs)  # ComfyUI asks for the text once per input
    if said:
        assert [said in str(refused), str(refused), str(refused)] == [True, "see above", "see above"]
    else:
        assert refused is True


# Report.


def expected(statistics: Any, model: Path | None, **options: Any) -> Any:
    """The report without ComfyUI."""
    return figures.build(figures.Source(statistics, model, SolveOptions(**options)))


@pytest.mark.parametrize(("name", "margin"), [("none", 1.0), (NAME, 1.0), (NAME, 4.0)])
def test_the_report_is_a_picture_a_verdict_and_a_page(comfyui, checkpoint, recorded, name, margin):
    wanted = expected(recorded.statistics(), None if name == "none" else checkpoint, margin=margin)
    before = checkpoint.read_bytes()

    answer = ActivationReport().draw(checkpoint=name, margin=margin, stats=recorded, latent=LATENT)

    image, verdict = answer["result"]
    drawn = np.asarray(picture.draw(wanted))
    assert (image.dtype, tuple(image.shape)) == (torch.float32, (1, *drawn.shape))
    assert np.array_equal((image[0].numpy() * 255).round().astype(np.uint8), drawn)
    assert verdict == answer["ui"]["text"][0] == "\n".join((wanted.verdict.headline, *wanted.verdict.points))
    assert answer["ui"]["pages"] == [
        {"filename": "report_00001_.html", "subfolder": "activation_stats", "type": "output"}
    ]
    written = comfyui.root / "output" / "activation_stats" / "report_00001_.html"
    assert written.read_text(encoding="utf-8") == page.render(wanted.document())
    assert checkpoint.read_bytes() == before


def test_a_report_can_go_without_a_page_and_never_replaces_one(comfyui, recorded):
    statistics = recorded.statistics()
    assert ActivationReport().draw(stats=statistics, filename_prefix=" ")["ui"]["pages"] == []
    assert list((comfyui.root / "output").iterdir()) == []
    for _ in range(2):
        ActivationReport().draw(stats=statistics, filename_prefix="a/b")
    assert sorted(path.name for path in (comfyui.root / "output" / "a").iterdir()) == [
        "b_00001_.html",
        "b_00002_.html",
    ]


# Quantize.


@pytest.fixture
def original(comfyui, build):
    """The double's model in 32 bits, in ComfyUI's list."""
    path: Path = comfyui.models / "sub" / "flux.safetensors"
    path.parent.mkdir()
    weights = {f"{name}.weight": weight for name, weight in weights_of(comfyui.model()).items()}
    path.write_bytes(build.file_bytes(weights))
    return path


@pytest.fixture
def small_run(monkeypatch):
    """ "best" shows the model little."""
    small = partial(RunOptions, samples=3, steps=1, height=32, width=32, text_tokens=4)
    monkeypatch.setattr(nodes, "RunOptions", small)


def formats(path: Path) -> dict[str, str]:
    """The format of each quantized layer."""
    with open_checkpoint(path) as opened:
        return {name: layer.format.name for name, layer in find_layers(opened).quantized.items() if layer.format}


def quantized(name: str = "int8-convrot", **inputs: Any) -> tuple[str, str]:
    """The new file, and the report."""
    with torch.inference_mode():  # as ComfyUI runs nodes
        told = QuantizeCheckpoint().make(checkpoint="diffusion_models/sub/flux.safetensors", format=name, **inputs)
    assert told["ui"]["text"] == ["\n".join(told["result"])]
    file, report = told["result"]
    return file, report


def test_a_checkpoint_is_quantized_beside_itself(comfyui, original):
    before = original.read_bytes()

    file, report = quantized(exclude="\n img_mlp \n", unique_id="7")

    assert file == "sub/flux_int8-convrot.safetensors"
    assert formats(comfyui.models / file) == {next(iter(comfyui.shapes)): "int8-convrot"}
    assert report.startswith("1 of 3 linear layers to int8-convrot")
    assert "ConvRot is read by ComfyUI since" in report
    assert original.read_bytes() == before
    total = sum(4 * out * within for out, within in comfyui.shapes.values())
    assert comfyui.progress[-1] == ("7", total, total)


class Cancelled(BaseException):
    """ComfyUI's cancelling is no Exception."""


@pytest.mark.parametrize(
    ("format_name", "share"),
    [("int8-convrot", 0.0), *(("best", share) for share in (0.0, 0.3, 0.7, 1.0))],
    ids=["writing", "best begins", "best observes", "best tries", "best writes"],
)
def test_cancelling_ends_the_work_and_leaves_nothing(
    comfyui, original, build, flux_tensors, small_run, format_name, share
):
    original.write_bytes(build.file_bytes(flux_tensors()))

    def reached() -> float:
        return max((done / of for _, done, of in comfyui.progress), default=0.0)

    def cancel() -> None:
        if reached() >= share:
            raise Cancelled

    comfyui.modules.model_management.throw_exception_if_processing_interrupted = cancel
    with pytest.raises(Cancelled):
        quantized(format_name)
    assert share <= reached() <= share + 0.1
    assert list(original.parent.iterdir()) == [original]


def test_fp8_inputs_get_scales_of_statistics_where_they_are_given(comfyui, original, statistics):
    file, report = quantized("fp8")
    assert "input scales are not set: connect stats" in report
    assert set(scales(comfyui.models / file).values()) == {1.0}

    recorded = statistics(comfyui.shapes, 44.8)
    file, report = quantized("fp8", stats=recorded, output_name="mine")
    assert "calibrated 2 of 2 layers" in report
    assert file == "mine.safetensors"
    assert 1.0 not in scales(comfyui.models / file).values()

    assert "statistics were not used" in quantized("int8", stats=recorded)[1]
    with pytest.raises(StatisticsError, match="made for another model"):
        quantized("fp8", stats=statistics({"other": (48, 16)}), output_name="not")
    assert not (comfyui.models / "not.safetensors").exists()


def test_best_is_a_mix_of_the_size_that_was_asked_for(comfyui, original, build, flux_tensors, small_run, statistics):
    original.write_bytes(build.file_bytes(flux_tensors()))

    file, report = quantized("best", bits=7.0, gpu="rtx50", exclude="double_blocks", unique_id="7")
    with open_checkpoint(comfyui.models / file) as written:
        seen = statistics({name: layer.shape for name, layer in find_layers(written).quantized.items()})
    drawn = ActivationReport().draw(checkpoint=f"diffusion_models/{file}", stats=seen)["result"][1]
    assert "A mix of formats at " in drawn
    assert "Half a bit more per weight" in drawn

    found = formats(comfyui.models / file)
    assert file == "sub/flux_best.safetensors"
    assert len(set(found.values())) > 1
    assert all(name.startswith("single_blocks") and FORMATS[fmt].native >= {"rtx50"} for name, fmt in found.items())
    assert re.search(r"[\d.]+ bits per weight, [\d.-]+ to [\d.-]+ dB measured on noise", report)
    assert "NVFP4 is read by ComfyUI since" in report
    assert {(node, done == of) for node, done, of in comfyui.progress} == {("7", False), ("7", True)}


def test_best_says_where_a_model_cannot_be_run(comfyui, original):
    with pytest.raises(UnsupportedModelError, match="cannot be run, so nothing was chosen"):
        quantized("best")
    assert list(original.parent.iterdir()) == [original]


def test_calibrate_and_report_take_a_mix_of_formats(comfyui, original, recorded):
    with open_checkpoint(original) as opened:
        for name, mix in {"mix": ("mlp=int8-convrot",), "int8": (".=int8",)}.items():
            plan = plan_conversion(opened, ConvertOptions(layer_format=mix))
            convert(opened, plan, comfyui.models / f"{name}.safetensors")
    fp8, *_ = comfyui.shapes
    given = {"checkpoint": "diffusion_models/mix.safetensors", "stats": recorded.statistics(), "margin": 1.5}

    file, text = CalibrateFP8Checkpoint().make(**given)["result"]
    assert text.startswith("calibrated 1 of 1 layers")
    assert "left alone: 1 INT8 ConvRot layer, whose inputs readers scale dynamically" in text
    with open_checkpoint(comfyui.models / "mix.safetensors") as before, open_checkpoint(comfyui.models / file) as after:
        changed = {name for name in before if before.raw(name).tobytes() != after.raw(name).tobytes()}
        assert [name for name in after if name not in before] == [f"{fp8}.input_scale"]
    assert changed == set()
    assert ActivationReport().draw(**given)["result"][1].startswith("None of 1 FP8 layer ")

    given["checkpoint"] = "diffusion_models/int8.safetensors"
    with pytest.raises(NoStaticScaleError, match="readers of its INT8 layers scale inputs dynamically"):
        CalibrateFP8Checkpoint().make(**given)
    text = ActivationReport().draw(**given)["result"][1]
    assert text.startswith("No layer uses an input scale")
