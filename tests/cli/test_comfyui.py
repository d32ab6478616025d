"""`comfyui install|uninstall|observe` as commands: what they say, write and refuse."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import comfyui_server as doubles
import pytest

from convert_to_quant.comfyui_nodes import pack
from convert_to_quant.engines.comfyui import server as client
from convert_to_quant.stats import Statistics

comfyui, serve, flux, wan = doubles.comfyui, doubles.serve, doubles.flux, doubles.wan


@pytest.fixture
def double(serve, monkeypatch):
    """A running server."""
    monkeypatch.setattr(client, "LATER_SECONDS", 0.05)
    return serve()


@pytest.fixture
def work(tmp_path):
    """Where the user's files are, away from the server's."""
    folder = tmp_path / "home"
    folder.mkdir()
    return folder


@pytest.fixture
def observe(ctq, double, work):
    """observe(workflow, flag, ...): the command on the double, into work/stats.safetensors."""

    def run(nodes: Any, *flags: object) -> Any:
        (work / "workflow.json").write_bytes(nodes if isinstance(nodes, bytes) else json.dumps(nodes).encode())
        words = ["comfyui", "observe", "--server", double.address, "--workflow", work / "workflow.json"]
        return ctq(*words, "-o", work / "stats.safetensors", *flags)

    return run


def written(work: Path) -> set[str]:
    return {path.name for path in work.iterdir()} - {"workflow.json", "prompts.txt"}


SCREEN = """\
model     node 1 (Load Diffusion Model)
          sampled by node 9 (Paint), recorded into {work}/stats.safetensors
prompts   node 5 (Prompt) text
seeds     node 9 (Paint) seed
left out  node 3 (VAELoader), node 10 (VAEDecode), node 11 (SaveImage)
"""


def test_a_workflow_is_observed(observe, flux, work, double):
    outcome = observe(flux)

    assert (outcome.code, outcome.out) == (0, "")
    assert outcome.err == (
        SCREEN.format(work=work)
        + "runs      4, seeds 42 to 45\n"
        + f"observed 3 layers over 4 samples; wrote {work}/stats.safetensors\n"
    )
    assert Statistics.load(work / "stats.safetensors").samples == 4
    assert written(work) == {"stats.safetensors"}
    assert len(double.prompts) == 4


def test_prompts_and_seeds_and_the_report(observe, flux, work, double):
    (work / "prompts.txt").write_text("a dog\n\n  a cat \n", encoding="utf-8-sig")  # as some editors write it

    outcome = observe(flux, "--prompts", work / "prompts.txt", "--seeds", "2", "--seed", "7", "--json", "-", "-q")

    assert (outcome.code, outcome.err) == (0, "")
    report = json.loads(outcome.out)
    assert report["runs"] == [
        {"prompt": prompt, "seed": seed} for prompt, seed in (("a dog", 7), ("a dog", 8), ("a cat", 9), ("a cat", 10))
    ]
    (model,) = report["models"]
    assert (model["name"], model["loaders"], model["samplers"]) == ("flux", ["1"], ["9"])
    assert (model["samples"], model["layers"], model["visited"]) == (4, 3, 3)
    assert model["statistics"] == str(work / "stats.safetensors")
    assert (report["prompts"], report["seeds"]) == ([{"node": "5", "input": "text"}], [{"node": "9", "input": "seed"}])
    assert report["left_out"] == ["3", "10", "11"]
    assert (report["dry_run"], report["idle_runs"]) == (False, 0)
    assert [prompt["5"]["inputs"]["text"] for prompt in double.prompts] == ["a dog", "a dog", "a cat", "a cat"]


def test_a_dry_run_says_what_it_found_and_queues_nothing(observe, flux, work, double):
    outcome = observe(flux, "--dry-run")

    assert outcome.code == 0
    assert outcome.out == SCREEN.format(work=work) + "runs      4, seeds 42 to 45\n"
    assert outcome.err == "dry run: nothing was queued or written\n"
    assert written(work) == set()
    assert {asked.partition(" ")[0] for asked in double.requests} == {"GET"}

    report = json.loads(observe(flux, "--dry-run", "--json", "-").out)
    assert report["dry_run"]
    assert "samples" not in report["models"][0]


def test_a_dry_run_names_the_files_that_the_server_does_not_list(observe, flux, double):
    flux["3"]["inputs"]["vae_name"] = "other_ae.safetensors"  # recording needs no VAE
    assert observe(flux, "--dry-run").code == 0
    flux["1"]["inputs"]["unet_name"] = "flux_dev.safetensors"
    flux["2"]["inputs"]["clip_name1"] = "t5.safetensors"
    outcome = observe(flux, "--dry-run")
    assert outcome.code == 1
    assert (
        "missing on the server: node 1 (Load Diffusion Model) unet_name: flux_dev.safetensors; node 2 (" in outcome.err
    )
    assert {asked.partition(" ")[0] for asked in double.requests} == {"GET"}


def test_several_models_get_a_file_each(observe, wan, work):
    outcome = observe(wan, "--seeds", "1")

    assert outcome.code == 0
    assert written(work) == {"stats_wan_high.safetensors", "stats_wan_low.safetensors"}
    for name, sampler in (("high", 8), ("low", 9)):
        assert f"sampled by node {sampler} (KSamplerAdvanced), recorded into {work}/stats_wan_{name}" in outcome.err
        assert f"observed 3 layers over 1 sample; wrote {work}/stats_wan_{name}.safetensors" in outcome.err


def test_layers_that_never_ran_are_told(observe, flux, comfyui, double):
    first = next(iter(comfyui.shapes))
    double.load("flux.safetensors").model.diffusion_model.magnitudes.pop(first)
    assert f"1 layer never ran (first: {first})" in observe(flux, "--seeds", "1").err


def test_layers_that_ran_unseen_are_told(observe, flux, comfyui, double, monkeypatch):
    """ComfyUI casts a layer's weight and multiplies by it without calling the layer."""
    first = next(iter(comfyui.shapes))
    ops: Any = ModuleType("comfy.ops")
    ops.cast_bias_weight = lambda layer, _: (layer.weight, None)
    monkeypatch.setitem(sys.modules, "comfy.ops", ops)
    network = double.load("flux.safetensors").model.diffusion_model
    network.magnitudes.pop(first)
    network.register_forward_pre_hook(
        lambda _, args: ops.cast_bias_weight(network.get_submodule(first), args[0]) and None
    )

    said = observe(flux, "--seeds", "1").err

    assert f"could not see the inputs of 1 layer that ran (first: {first})" in said
    assert "never ran" not in said


@pytest.mark.parametrize(
    ("flags", "code", "said"),
    [
        ("--prompts gone", 2, "gone: the prompts cannot be read: No such file or directory\n"),
        ("--server localhost:8188", 2, "localhost:8188 is not a server address"),
        ("--server http://127.0.0.1:9", 1, "http://127.0.0.1:9: no answer: "),
        ("--workflow gone", 1, "gone: cannot be read: No such file"),
    ],
)
def test_what_cannot_be_done_is_refused_and_nothing_is_written(
    observe, flux, work, double, monkeypatch, flags, code, said
):
    monkeypatch.chdir(work)
    outcome = observe(flux, *flags.split())
    assert (outcome.code, outcome.out, written(work)) == (code, "", set())
    assert outcome.err.startswith(f"error: {said}")
    assert "POST /prompt" not in double.requests


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b'{"nodes": [], "links": []}', "which a server cannot run (in ComfyUI, use File > Export (API))"),
        (b"\xef\xbb\xbf[]", "not a workflow: expected a JSON object of nodes"),
        (b"\x89PNG\r\n\x1a\n\xff", "cannot be read: not UTF-8 text (in ComfyUI, use File > Export (API))"),
    ],
)
def test_what_is_no_workflow_is_refused(observe, work, content, said):
    outcome = observe(content)
    assert (outcome.code, outcome.out, written(work)) == (1, "", set())
    assert outcome.err.startswith(f"error: {work}/workflow.json: ")
    assert said in outcome.err


def test_a_failed_run_leaves_no_file(observe, flux, work, double):
    flux["1"]["inputs"]["unet_name"] = "broken.safetensors"
    outcome = observe(flux)
    assert (outcome.code, outcome.out, written(work)) == (1, "", set())
    problem = "the run failed in node 1 (Load Diffusion Model) of type UNETLoader: RuntimeError: header too large"
    assert outcome.err.splitlines()[-1] == f"error: {double.address}: {problem} Try another file"


def test_ctrl_c_leaves_nothing(observe, flux, work, double, monkeypatch):
    from convert_to_quant.engines.comfyui.server import Server

    def interrupted(self: Any, run: str) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(Server, "_wait", interrupted)
    outcome = observe(flux)
    assert outcome.code == 130
    assert outcome.err.splitlines()[-1].startswith("interrupted")
    assert written(work) == set()
    assert "GET /queue" in double.requests


# install, uninstall


def test_install_and_uninstall(ctq, done, tmp_path):
    folder = tmp_path / "custom_nodes" / pack.NAME
    folder.parent.mkdir()
    after = ": restart ComfyUI and find the nodes under convert_to_quant\n"
    for would, wrote in (("write", "wrote"), ("replace", "replaced")):
        before = folder.exists()
        said = done("comfyui", "install", tmp_path, "--dry-run").err
        assert said == f"dry run: would {would} {folder}; nothing was changed\n"
        assert folder.exists() == before
        outcome = done("comfyui", "install", tmp_path, "--json", "-")
        assert json.loads(outcome.out)["folder"] == str(folder)
        assert outcome.err == f"{wrote} {folder}{after}"
    assert (folder / pack.FILE).read_bytes() == pack.content()
    said = done("comfyui", "uninstall", tmp_path, "--dry-run").err
    assert said == f"dry run: would remove {folder}; nothing was changed\n"
    assert folder.exists()
    assert done("comfyui", "uninstall", tmp_path).err == f"removed {folder}\n"
    assert not folder.exists()
    assert "nothing to remove" in ctq("comfyui", "uninstall", tmp_path).err
