"""The nodes in ComfyUI's own server, installed by our command, driven by workflows over HTTP."""

from __future__ import annotations

import asyncio
import json
import shutil
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from comfyui_server import node

from convert_to_quant.cli import main
from convert_to_quant.comfyui_nodes.nodes import NODE_CLASS_MAPPINGS
from convert_to_quant.stats import Statistics

pytestmark = pytest.mark.comfyui

TEST_PACK = '''
import folder_paths, torch
from safetensors.torch import load_file

class Inputs:
    """Conditioning and latents from a file: the emoji model has no text encoder."""
    CATEGORY, FUNCTION = "test", "load"
    RETURN_TYPES = ("CONDITIONING", "CONDITIONING", "LATENT")

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"file": ("STRING", {})}}

    def load(self, file):
        given = load_file(folder_paths.get_input_directory() + "/" + file)
        positive = [[given["context"], {"pooled_output": given["y"]}]]
        negative = [[torch.zeros_like(given["context"]), {"pooled_output": torch.zeros_like(given["y"])}]]
        return positive, negative, {"samples": torch.zeros_like(given["x"])}

NODE_CLASS_MAPPINGS = {"TestInputs": Inputs}
'''


@pytest.fixture(scope="module")
def server(
    serving: Any, files: Callable[[str], Any], ours: Any, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Any]:
    """A server with our pack, the hot model in its lists, and one prompt in its input folder.

    For the example workflows there are stand-ins for Flux.1-dev, its text encoders and its VAE.
    """
    from safetensors.torch import save_file

    work = tmp_path_factory.mktemp("server")
    for folder in ("custom_nodes", "models/diffusion_models", "models/text_encoders", "models/vae", "input", "output"):
        (work / folder).mkdir(parents=True)
    (work / "custom_nodes" / "test_inputs.py").write_text(TEST_PACK)
    shutil.copy(Path(__file__).with_name("stand_ins.py"), work / "custom_nodes")
    for name in ("text_encoders/clip_l", "text_encoders/t5xxl_fp16", "vae/ae"):
        (work / "models" / f"{name}.safetensors").touch()
    assert main(["comfyui", "install", str(work)]) == 0
    made = files("hot")
    shutil.copy(made.original, work / "models" / "diffusion_models" / "hot.safetensors")
    shutil.copy(made.converted, work / "models" / "diffusion_models" / "hot_fp8.safetensors")
    shutil.copy(made.original, work / "models" / "diffusion_models" / "flux1-dev.safetensors")
    shutil.copy(made.converted, work / "models" / "diffusion_models" / "flux1-dev-fp8.safetensors")
    start = {name: value[:1].contiguous() for name, value in ours.start().items()}
    save_file(start, work / "input" / "start.safetensors")
    with serving(work, "--supports-fp8-compute") as running:
        yield running


def painting(model: str, seed: int, prefix: str, behind: str = "load") -> dict[str, Any]:
    """Load a model and paint with it, through the node `behind`."""
    return {
        "load": node("UNETLoader", unet_name=model, weight_dtype="default"),
        "inputs": node("TestInputs", file="start.safetensors"),
        "sampler": node("KSamplerSelect", sampler_name="euler"),
        "sigmas": node("ManualSigmas", sigmas="1, 0.75, 0.5, 0.25, 0"),
        "sample": node(
            "SamplerCustom", model=[behind, 0], add_noise=True, noise_seed=seed, cfg=2.0, positive=["inputs", 0],
            negative=["inputs", 1], sampler=["sampler", 0], sigmas=["sigmas", 0], latent_image=["inputs", 2],
        ),
        "keep": node("SaveLatent", samples=["sample", 0], filename_prefix=prefix),
    }  # fmt: skip


def recording(seed: int, prefix: str, **calibration: Any) -> dict[str, Any]:
    """The same with our nodes."""
    return {
        **painting("hot.safetensors", seed, prefix, "record"),
        "record": node("ConvertToQuantRecordActivations", model=["load", 0]),
        "save": node(
            "ConvertToQuantSaveActivationStats", stats=["record", 1], latent=["sample", 0], filename_prefix="stats/hot"
        ),
        "calibrate": node(
            "ConvertToQuantCalibrateFP8Checkpoint",
            **{
                "checkpoint": "diffusion_models/hot_fp8.safetensors", "method": "absmax", "margin": 1.0,
                "full_precision_budget": 0.0, "output_name": "", "overwrite": False, "stats": ["save", 0],
                **calibration,
            },
        ),
    }  # fmt: skip


def latents(server: Any, prefix: str) -> Any:
    from safetensors.torch import load_file

    (path,) = (server.work / "output").glob(f"{prefix}_*.latent")
    return load_file(path)["latent_tensor"]


def test_the_installed_nodes_are_offered(server: Any) -> None:
    offered = server.get("/object_info")
    for name in NODE_CLASS_MAPPINGS:
        assert offered[name]["category"] == "convert_to_quant"
        assert offered[name]["python_module"] == "custom_nodes.convert_to_quant"
    lists = offered["ConvertToQuantCalibrateFP8Checkpoint"]["input"]["required"]["checkpoint"][0]
    names = ("flux1-dev-fp8", "flux1-dev", "hot", "hot_fp8")
    assert sorted(lists) == [f"diffusion_models/{name}.safetensors" for name in names]


WORKFLOWS = Path(__file__).parents[2] / "docs" / "workflows"
EMOJI: Mapping[str, Mapping[str, Any]] = {
    "EmptySD3LatentImage": {"width": 128, "height": 128},
    "KSampler": {"steps": 4, "cfg": 2.0},
    "CLIPTextEncode": {"text": "strawberry"},
}
"""What the stand-in for Flux.1-dev wants otherwise."""


def example(name: str) -> dict[str, Any]:
    workflow: dict[str, Any] = json.loads((WORKFLOWS / f"{name}_api.json").read_text(encoding="utf-8"))
    for one in workflow.values():
        one["inputs"] |= EMOJI.get(one["class_type"], {})
    return workflow


def test_the_example_workflows_run_one_after_the_other(server: Any) -> None:
    models, output = server.work / "models" / "diffusion_models", server.work / "output"

    done, errors = server.run(example("flux_record"))
    assert (done["status"]["status_str"], errors) == ("success", {}), server.said()
    (told,) = done["outputs"]["12"]["statistics"]
    assert (output / told["subfolder"] / told["filename"]).samefile(output / example("report")["1"]["inputs"][
        "statistics_file"])  # fmt: skip
    fetched = urllib.request.urlopen(f"{server.address}/view?{urllib.parse.urlencode(told)}", timeout=60).read()
    assert fetched == (output / told["subfolder"] / told["filename"]).read_bytes()

    done, errors = server.run(example("report"))
    assert (done["status"]["status_str"], errors) == ("success", {}), server.said()
    assert "at risk at the present scales; calibrated, none is" in done["outputs"]["1"]["text"][0]
    (shown,) = done["outputs"]["2"]["images"]
    assert (server.work / "temp" / shown["filename"]).stat().st_size > 10_000
    (page,) = done["outputs"]["1"]["pages"]
    assert (output / page["subfolder"] / page["filename"]).read_text().startswith("<!doctype html>")

    done, errors = server.run(example("calibrate"))
    assert (done["status"]["status_str"], errors) == ("success", {}), server.said()
    made = (models / "flux1-dev-fp8_calibrated.safetensors").read_bytes()

    whole = example("flux_record_and_calibrate")
    whole["13"]["inputs"]["output_name"] = "again"
    done, errors = server.run(whole)
    assert (done["status"]["status_str"], errors) == ("success", {}), server.said()
    assert {"11", "12", "13", "14", "15"} <= done["outputs"].keys()
    assert (models / "again.safetensors").stat().st_size == len(made)


def test_progress_texts_reach_the_editor(server: Any) -> None:
    import aiohttp

    workflow = recording(5, "told")
    del workflow["calibrate"]
    workflow["save"]["inputs"]["filename_prefix"] = "told/stats"

    async def listen() -> str:
        async with aiohttp.ClientSession() as session, session.ws_connect(f"{server.address}/ws?clientId=test") as told:
            await asyncio.to_thread(server.run, workflow)
            while True:
                message = await told.receive(timeout=30)
                if message.type == aiohttp.WSMsgType.BINARY and message.data[:8] == b"\0\0\0\3\0\0\0\4":
                    return str(message.data[8:].decode())  # a text, for a name of 4 letters

    assert asyncio.run(listen()) == "save40 layers, 1 sample: told/stats_00001_.safetensors"


def test_one_workflow_paints_records_saves_and_calibrates(server: Any, figure: Callable[[str, float], float]) -> None:
    import torch

    from convert_to_quant.fidelity import sqnr_db

    models = server.work / "models" / "diffusion_models"
    before = (models / "hot_fp8.safetensors").read_bytes()
    plain, errors = server.run(painting("hot.safetensors", 1, "plain"))
    assert (plain["status"]["status_str"], errors) == ("success", {})

    done, errors = server.run(recording(1, "recorded"))

    assert (done["status"]["status_str"], errors) == ("success", {}), server.said()
    assert torch.equal(latents(server, "recorded"), latents(server, "plain"))
    statistics = Statistics.load(server.work / "output" / "stats" / "hot_00001_.safetensors")
    assert (statistics.samples, set(statistics.calls.tolist())) == (1, {4})
    (text,) = done["outputs"]["calibrate"]["text"]
    assert text.startswith("hot_fp8_calibrated.safetensors\ncalibrated 32 of 32 FP8 layers")
    assert (models / "hot_fp8.safetensors").read_bytes() == before

    # Another seed adds to the same recording. Its checkpoint exists now, so that node is refused and the rest runs.
    done, errors = server.run(recording(2, "again"))
    assert done["status"]["status_str"] == "success"
    assert list(errors) == ["calibrate"]
    assert "exists already" in json.dumps(errors)
    assert Statistics.load(server.work / "output" / "stats" / "hot_00001_.safetensors").samples == 2

    # The new file is in ComfyUI's list, and paints what the original paints, better than the old one does.
    quality_db = {}
    for name in ("hot_fp8", "hot_fp8_calibrated"):
        done, errors = server.run(painting(f"{name}.safetensors", 1, name))
        assert (done["status"]["status_str"], errors) == ("success", {})
        found = float(sqnr_db(latents(server, "plain"), latents(server, name)).mean())
        quality_db[name] = figure(f"{name}.safetensors over HTTP: latents after 4 steps", found)
    assert quality_db["hot_fp8_calibrated"] > quality_db["hot_fp8"] + 10


@pytest.mark.parametrize(
    "said",
    [
        {"output_name": "../../escape"},
        {"output_name": "/tmp/escape"},
        {"output_name": "hot_fp8", "overwrite": True},
        {"checkpoint": "diffusion_models/../../input/start.safetensors"},
    ],
)
def test_workflows_that_would_write_elsewhere_are_refused_before_they_run(server: Any, said: dict[str, Any]) -> None:
    before = sorted(server.work.rglob("*.safetensors"))
    workflow = recording(3, "refused", **said)
    del workflow["keep"]
    workflow["save"]["inputs"]["filename_prefix"] = "../escape"

    refused = server.get("/prompt", {"prompt": workflow})

    assert refused["error"]["type"] == "prompt_outputs_failed_validation"
    assert {"save", "calibrate"} <= set(refused["node_errors"])
    assert sorted(server.work.rglob("*.safetensors")) == before
