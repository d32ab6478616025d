"""A ComfyUI server that runs in this process; see `double.py`."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

spec = importlib.util.spec_from_file_location("comfyui_double", Path(__file__).with_name("double.py"))
assert spec is not None
assert spec.loader is not None
double = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = double
spec.loader.exec_module(double)

comfyui = double.interfaces().comfyui


@pytest.fixture
def serve(comfyui: Any) -> Iterator[Callable[..., Any]]:
    """serve(cache="classic"): a running double."""
    running: list[Any] = []

    def start(**how: Any) -> Any:
        running.append(double.Double(comfyui, **how))
        return running[-1]

    yield start
    for one in running:
        one.close()


@pytest.fixture
def types(comfyui: Any) -> dict[str, Any]:
    """What the double's nodes take and give, as `plan` wants it."""
    from convert_to_quant.engines.comfyui.workflow import NodeType

    classes = double.Nodes(comfyui, None).classes
    return {name: NodeType.read(double.node_info(name, kind)) for name, kind in classes.items()}


def node(kind: str, title: str | None = None, **inputs: Any) -> dict[str, Any]:
    meta = {} if title is None else {"_meta": {"title": title}}
    return {"class_type": kind, "inputs": inputs, **meta}


@pytest.fixture
def flux() -> dict[str, Any]:
    """A workflow as users have them: Flux with a LoRA, painting into ComfyUI's output folder."""
    return {
        "1": node("UNETLoader", "Load Diffusion Model", unet_name="flux.safetensors", weight_dtype="default"),
        "2": node("DualCLIPLoader", clip_name1="t5xxl.safetensors", clip_name2="clip_l.safetensors"),
        "3": node("VAELoader", vae_name="ae.safetensors"),
        "4": node("LoraLoaderModelOnly", model=["1", 0], lora_name="style.safetensors", strength_model=1.0),
        "5": node("CLIPTextEncode", "Prompt", clip=["2", 0], text="a lighthouse"),
        "6": node("FluxGuidance", conditioning=["5", 0], guidance=3.5),
        "7": node("CLIPTextEncode", "Negative", clip=["2", 0], text="blurry"),
        "8": node("EmptyLatentImage", width=64, height=64, batch_size=1),
        "9": node("KSampler", "Paint", model=["4", 0], positive=["6", 0], negative=["7", 0], latent_image=["8", 0],
                  seed=1, steps=3, cfg=1.0, sampler_name="euler", scheduler="simple"),
        "10": node("VAEDecode", samples=["9", 0], vae=["3", 0]),
        "11": node("SaveImage", images=["10", 0], filename_prefix="ComfyUI"),
    }  # fmt: skip


@pytest.fixture
def wan() -> dict[str, Any]:
    """Two models, one behind the other: Wan's high and low noise."""
    sampling = {"cfg": 1.0, "sampler_name": "euler", "scheduler": "simple", "steps": 4}
    text = {"positive": ["5", 0], "negative": ["6", 0]}
    return {
        "1": node("UNETLoader", unet_name="folder/wan_high.safetensors", weight_dtype="default"),
        "2": node("UNETLoader", unet_name="wan_low.safetensors", weight_dtype="default"),
        "3": node("DualCLIPLoader", clip_name1="t5xxl.safetensors", clip_name2="clip_l.safetensors"),
        "5": node("CLIPTextEncode", clip=["3", 0], text="a river"),
        "6": node("CLIPTextEncode", clip=["3", 0], text="static"),
        "7": node("EmptyLatentImage", width=64, height=64, batch_size=1),
        "8": node("KSamplerAdvanced", model=["1", 0], noise_seed=5, add_noise="enable", latent_image=["7", 0],
                  start_at_step=0, end_at_step=2, **sampling, **text),
        "9": node("KSamplerAdvanced", model=["2", 0], noise_seed=0, add_noise="disable", latent_image=["8", 0],
                  start_at_step=2, end_at_step=4, **sampling, **text),
        "10": node("VAELoader", vae_name="ae.safetensors"),
        "11": node("VAEDecode", samples=["9", 0], vae=["10", 0]),
        "12": node("SaveImage", images=["11", 0], filename_prefix="film"),
    }  # fmt: skip
