"""The nodes in ComfyUI's own server, installed by our command, driven by workflows over HTTP."""

from __future__ import annotations

import asyncio
import json
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from comfyui_server import node
from processes import painting, sampling

from convert_to_quant.comfyui_nodes.nodes import NODE_CLASS_MAPPINGS
from convert_to_quant.stats import Statistics

pytestmark = pytest.mark.comfyui


def recording(seed: int, prefix: str, **calibration: Any) -> dict[str, Any]:
    """The same with our nodes."""
    return {
        **painting("sub/hot.safetensors", seed=seed, prefix=prefix),
        "paint": sampling(["record", 0], ["size", 0], seed),
        "record": node("ConvertToQuantRecordActivations", model=["load", 0]),
        "save": node(
            "ConvertToQuantSaveActivationStats", stats=["record", 1], latent=["paint", 0], filename_prefix="stats/hot"
        ),
        "calibrate": node(
            "ConvertToQuantCalibrateFP8Checkpoint",
            **{
                "checkpoint": "diffusion_models/sub/hot-fp8.safetensors", "method": "absmax", "margin": 1.0,
                "full_precision_budget": 0.0, "output_name": "", "overwrite": False, "stats": ["save", 0],
                **calibration,
            },
        ),
    }  # fmt: skip


def latents(server: Any, prefix: str) -> Any:
    from safetensors.torch import load_file

    (path,) = (server.work / "output").glob(f"{prefix}_0*.latent")
    return load_file(path)["latent_tensor"]


def test_the_installed_nodes_are_offered(server):
    offered = server.get("/object_info")
    for name in NODE_CLASS_MAPPINGS:
        assert offered[name]["category"] == "convert_to_quant"
        assert offered[name]["python_module"] == "custom_nodes.convert_to_quant"
    lists = offered["ConvertToQuantCalibrateFP8Checkpoint"]["input"]["required"]["checkpoint"][0]
    names = ("flux1-dev-fp8", "flux1-dev", "plain", "sub/hot-fp8", "sub/hot")
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


def test_the_example_workflows_run_one_after_the_other(server):
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
    assert "at risk at the current scales, none after calibration" in done["outputs"]["1"]["text"][0]
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


def test_progress_texts_reach_the_editor(server):
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


def test_one_workflow_paints_records_saves_and_calibrates(server, figure):
    import torch

    from convert_to_quant.fidelity import sqnr_db

    models = server.work / "models" / "diffusion_models" / "sub"
    before = (models / "hot-fp8.safetensors").read_bytes()
    plain, errors = server.run(painting("sub/hot.safetensors", prefix="plain"))
    assert (plain["status"]["status_str"], errors) == ("success", {})

    done, errors = server.run(recording(1, "recorded"))

    assert (done["status"]["status_str"], errors) == ("success", {}), server.said()
    assert torch.equal(latents(server, "recorded"), latents(server, "plain"))
    statistics = Statistics.load(server.work / "output" / "stats" / "hot_00001_.safetensors")
    assert (statistics.samples, set(statistics.calls.tolist())) == (1, {4})
    (text,) = done["outputs"]["calibrate"]["text"]
    assert text.startswith("sub/hot-fp8_calibrated.safetensors\ncalibrated 32 of 32 layers")
    assert (models / "hot-fp8.safetensors").read_bytes() == before

    # Another seed adds to the same recording. Its checkpoint exists now, so that node is refused and the rest runs.
    done, errors = server.run(recording(2, "again"))
    assert done["status"]["status_str"] == "success"
    assert list(errors) == ["calibrate"]
    assert "already exists" in json.dumps(errors)
    assert Statistics.load(server.work / "output" / "stats" / "hot_00001_.safetensors").samples == 2

    # The new file is in ComfyUI's list, and paints what the original paints, better than the old one does.
    quality_db = {}
    for name in ("hot-fp8", "hot-fp8_calibrated"):
        done, errors = server.run(painting(f"sub/{name}.safetensors", prefix=name))
        assert (done["status"]["status_str"], errors) == ("success", {})
        found = float(sqnr_db(latents(server, "plain"), latents(server, name)).mean())
        quality_db[name] = figure(f"{name}.safetensors over HTTP: latents after 4 steps", found)
    assert quality_db["hot-fp8_calibrated"] > quality_db["hot-fp8"] + 10


@pytest.mark.parametrize(
    "said",
    [
        {"output_name": "../../escape"},
        {"output_name": "/tmp/escape"},
        {"output_name": "sub/hot-fp8", "overwrite": True},
        {"checkpoint": "diffusion_models/../../input/start.safetensors"},
    ],
)
def test_workflows_that_would_write_elsewhere_are_refused_before_they_run(server, said):
    before = sorted(server.work.rglob("*.safetensors"))
    workflow = recording(3, "refused", **said)
    del workflow["keep"]
    workflow["save"]["inputs"]["filename_prefix"] = "../escape"

    refused = server.get("/prompt", {"prompt": workflow})

    assert refused["error"]["type"] == "prompt_outputs_failed_validation"
    assert {"save", "calibrate"} <= set(refused["node_errors"])
    assert sorted(server.work.rglob("*.safetensors")) == before
