"""`comfyui observe` against ComfyUI's own server, and what the double of that server says of its nodes."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from contextlib import closing
from typing import Any

import comfyui_server as double
import pytest
from comfyui_server import assert_same, node
from processes import Server, painting, sampling, until

from convert_to_quant.cli import main
from convert_to_quant.engines.comfyui.workflow import NodeType
from convert_to_quant.stats import Statistics

pytestmark = pytest.mark.comfyui


def recorded(server: Any, nodes: dict[str, Any], prompts: list[str], seeds: list[int], sampler: str) -> Statistics:
    """The same by hand: our nodes in the workflow, queued run by run, and the file that they save."""
    model = nodes[sampler]["inputs"]["model"]
    prefix = f"by_hand/{sampler}_{time.monotonic_ns()}"
    for prompt, seed in zip(prompts, seeds, strict=True):
        run = json.loads(json.dumps(nodes))
        run["yes"]["inputs"]["text"] = prompt
        for each in run.values():
            if "seed" in each["inputs"]:
                each["inputs"]["seed"] = seed
        run["record"] = node("ConvertToQuantRecordActivations", model=model, statistics_file="", reset=False)
        run[sampler]["inputs"]["model"] = ["record", 0]
        run["save"] = node("ConvertToQuantSaveActivationStats", stats=["record", 1], latent=[sampler, 0],
                           filename_prefix=prefix)  # fmt: skip
        assert server.run(run)[0]["status"]["status_str"] == "success", server.said()
    return Statistics.load(server.work / "output" / f"{prefix}_00001_.safetensors")


@pytest.fixture
def drive(server, tmp_path):
    """drive(workflow, flag, ...): our command on the server, into stats.safetensors."""

    def drive(nodes: dict[str, Any], *flags: str) -> int:
        (tmp_path / "workflow.json").write_text(json.dumps(nodes))
        words = ["comfyui", "observe", "--server", server.address, "--workflow", str(tmp_path / "workflow.json")]
        return main([*words, "-o", str(tmp_path / "stats.safetensors"), *flags])

    return drive


def test_statistics_are_those_of_the_nodes_own_runs(drive, server, tmp_path):
    (tmp_path / "prompts.txt").write_text("tulip\n\nbear face\n")
    files = ("--prompts", str(tmp_path / "prompts.txt"), "--json", str(tmp_path / "r.json"))
    by_hand = recorded(server, painting(), ["tulip", "tulip", "bear face", "bear face"], [7, 8, 9, 10], "paint")
    before = set((server.work / "output").rglob("*.*"))

    for _ in range(2):  # the second time everything is in ComfyUI's cache
        assert drive(painting(), *files, "--seeds", "2", "--seed", "7") == 0, server.said()
        assert_same(Statistics.load(tmp_path / "stats.safetensors"), by_hand)

    assert by_hand.samples == 4
    report = json.loads((tmp_path / "r.json").read_text())
    assert (report["idle_runs"], report["models"][0]["samples"]) == (0, 4)
    new = set((server.work / "output").rglob("*.*")) - before
    assert {path.parent.name for path in new} == {"activation_stats"}  # no image or latent was written


def test_two_models_are_recorded_apart(drive, server, tmp_path):
    nodes = painting()
    nodes["other"] = node("UNETLoader", unet_name="sub/hot.safetensors", weight_dtype="default")
    nodes["again"] = sampling(["other", 0], ["paint", 0], 2)
    by_hand = {name: recorded(server, nodes, ["strawberry"] * 2, [42, 43], name) for name in ("paint", "again")}

    assert drive(nodes, "--seeds", "2") == 0, server.said()

    assert not (tmp_path / "stats.safetensors").exists()
    assert_same(Statistics.load(tmp_path / "stats_plain.safetensors"), by_hand["paint"])
    assert_same(Statistics.load(tmp_path / "stats_hot.safetensors"), by_hand["again"])
    assert (by_hand["again"].absmax != by_hand["paint"].absmax).any()


@pytest.mark.parametrize(
    ("name", "changed", "said"),
    [
        ("load", node("UNETLoader", unet_name="gone.safetensors", weight_dtype="default"),
         "rejected the workflow: node load (UNETLoader): Value not in list: unet_name: 'gone"),
        ("size", node("EmptySD3LatentImage", width=99999, height=128, batch_size=1),
         "rejected the workflow: node size (EmptySD3LatentImage): Value 99999 bigger than max of 16384: width"),
        ("yes", node("CLIPTextEncode", text="break", clip=["clip", 0]),
         "failed in node yes (CLIPTextEncode) of type CLIPTextEncode: ValueError: these words break it"),
        ("size", node("FancySize"), "node size (FancySize): the server has no node of type FancySize"),
    ],
)  # fmt: skip
def test_a_run_that_is_refused_or_fails_is_told(drive, tmp_path, capsys, name, changed, said):
    assert drive({**painting(), name: changed}) == 1
    assert said in capsys.readouterr().err
    assert not (tmp_path / "stats.safetensors").exists()


def test_ctrl_c_leaves_the_server_as_it_was(server, tmp_path):
    nodes = painting()
    nodes["paint"]["inputs"]["steps"] = 5000
    (tmp_path / "workflow.json").write_text(json.dumps(nodes))
    known = set(server.get("/history"))
    words = [sys.executable, "-m", "convert_to_quant", "comfyui", "observe", "--server", server.address]
    words += ["--workflow", str(tmp_path / "workflow.json"), "-o", str(tmp_path / "stats.safetensors")]
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True) as process:
        assert until(lambda: server.get("/queue")["queue_running"] and "/5000 [" in server.said())
        process.send_signal(signal.SIGINT)
        assert process.stderr is not None
        said = process.stderr.read()
    assert process.returncode == 130, said
    assert "Traceback" not in said

    (run,) = until(lambda: set(server.get("/history")) - known)
    assert server.get(f"/history/{run}")[run]["status"]["messages"][-1][0] == "execution_interrupted"
    assert server.get("/queue") == {"queue_running": [], "queue_pending": []}
    assert not (tmp_path / "stats.safetensors").exists()


def test_totals_are_whole_on_a_server_that_remembers_nothing(server, tree, tmp_path):
    by_hand = recorded(server, painting(), ["strawberry"] * 2, [42, 43], "paint")
    (tmp_path / "workflow.json").write_text(json.dumps(painting()))
    (tmp_path / "base").mkdir()
    for name in ("custom_nodes", "models"):
        (tmp_path / "base" / name).symlink_to(server.work / name)
    with closing(Server(tree, tmp_path / "base", "--cache-none")) as forgetful:
        words = ["comfyui", "observe", "--server", forgetful.address, "--workflow", str(tmp_path / "workflow.json")]
        assert main([*words, "-o", str(tmp_path / "stats.safetensors"), "--seeds", "2"]) == 0, forgetful.said()
    assert_same(Statistics.load(tmp_path / "stats.safetensors"), by_hand)


# The nodes of the server's double are ComfyUI's

INVENTED = {"KSampler (Efficient)"}
"""Nodes of the double that ComfyUI does not have: they are other people's."""


@pytest.mark.parametrize("name", double.NODES.keys() - INVENTED)
def test_the_doubles_nodes_are_comfyuis(server, name):
    ours = NodeType.read(double.node_info(double.node_class(double.NODES[name], None)))
    real = NodeType.read(server.get(f"/object_info/{name}")[name])

    assert ours.outputs == real.outputs
    assert [side.lower() for side in ours.output_names] == [side.lower() for side in real.output_names]
    for key, said in ours.inputs.items():
        assert said.kind == real.inputs[key].kind, key
        for option in ("multiline", "dynamicPrompts", "control_after_generate"):
            assert said.options.get(option, False) == (real.inputs[key].options.get(option) or False), key
