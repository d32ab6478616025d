"""A double of ComfyUI's server, over real HTTP, that runs workflows with our own nodes.

It follows ComfyUI 0.33 as far as our client looks: `server.py` (routes and answers), `execution.py` (what fails how,
the queue and the history, but no validation) and `comfy_execution/caching.py` (what a node's result is remembered by).
What its nodes take and give is held to the real ones in `tests/comfyui/test_drive.py`, where the client also runs on
the real server. Models are those of `comfyui_modules`, the double of ComfyUI's interfaces; few of the nodes do
anything.
"""

from __future__ import annotations

import copy
import json
import threading
import urllib.parse
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
import torch
from comfyui_modules import comfyui

__all__ = ["comfyui", "flux", "serve", "types", "wan"]

MODELS = ["flux.safetensors", "folder/wan_high.safetensors", "wan_low.safetensors", "broken.safetensors"]
KINDS: Mapping[str, Any] = {
    "ANY": ("COMFY_MATCHTYPE_V3", {}),
    "FIXED": ("INT", {"control_after_generate": "fixed"}),
    "LINES": ("STRING", {"multiline": True}),
    "SEED": ("INT", {"default": 0, "min": 0, "max": 2**64 - 1, "control_after_generate": True}),
    "STEPS": ("INT", {"default": 20, "min": 1, "max": 10000}),
    "TEXT": ("STRING", {"multiline": True, "dynamicPrompts": True}),
    "ADD": (["enable", "disable"], {}),
    "DTYPES": (["default"], {}),
    "FILES": (["t5xxl.safetensors", "clip_l.safetensors", "ae.safetensors", "style.safetensors"], {}),
    "MODELS": (MODELS, {}),
    "SAMPLERS": (["euler", "dpmpp_2m"], {}),
    "SCHEDULERS": (["simple", "normal"], {}),
}
"""What stands for a type with options, or a list of choices. Anything else is a type itself."""

SAMPLING = "steps:STEPS cfg:FLOAT sampler_name:SAMPLERS scheduler:SCHEDULERS"
BOTH = "positive:CONDITIONING negative:CONDITIONING"
NODES: Mapping[str, str] = {
    "UNETLoader": "unet_name:MODELS weight_dtype:DTYPES -> MODEL",
    "CheckpointLoaderSimple": "ckpt_name:MODELS -> MODEL CLIP VAE",
    "LoraLoaderModelOnly": "model:MODEL lora_name:FILES strength_model:FLOAT -> MODEL",
    "LoraLoader": "model:MODEL clip:CLIP lora_name:FILES -> MODEL CLIP",
    "ModelMergeSimple": "model1:MODEL model2:MODEL ratio:FLOAT -> MODEL",
    "ComfySwitchNode": "switch:BOOLEAN on_false:ANY on_true:ANY -> output:COMFY_MATCHTYPE_V3",
    "DualCLIPLoader": "clip_name1:FILES clip_name2:FILES -> CLIP",
    "VAELoader": "vae_name:FILES -> VAE",
    "CLIPTextEncode": "text:TEXT clip:CLIP -> CONDITIONING",
    "CLIPTextEncodeFlux": "clip:CLIP clip_l:TEXT t5xxl:TEXT guidance:FLOAT -> CONDITIONING",
    "CLIPTextEncodeSDXL": "clip:CLIP width:INT text_g:TEXT text_l:TEXT -> CONDITIONING",
    "TextEncodeBooguEdit": f"clip:CLIP prompt:TEXT negative_prompt:TEXT -> {BOTH}",
    "ConditioningZeroOut": "conditioning:CONDITIONING -> CONDITIONING",
    "ConditioningCombine": "conditioning_1:CONDITIONING conditioning_2:CONDITIONING -> CONDITIONING",
    "FluxGuidance": "conditioning:CONDITIONING guidance:FLOAT -> CONDITIONING",
    "GLIGENTextBoxApply": "conditioning_to:CONDITIONING clip:CLIP text:TEXT width:INT -> CONDITIONING",
    "WanTrackToVideo": f"{BOTH} tracks:LINES -> {BOTH} latent:LATENT",
    "WanInfiniteTalkToVideo": f"model:MODEL {BOTH} -> model:MODEL {BOTH} latent:LATENT trim_image:INT",
    "ControlNetApplyAdvanced": f"{BOTH} strength:FLOAT -> {BOTH}",
    "PrimitiveStringMultiline": "value:LINES -> STRING",
    "PrimitiveInt": "value:FIXED -> INT",
    "EmptyLatentImage": "width:INT height:INT batch_size:INT -> LATENT",
    "AddNoise": "model:MODEL noise:NOISE latent_image:LATENT -> LATENT",
    "VAEDecode": "samples:LATENT vae:VAE -> IMAGE",
    "SaveImage": "images:IMAGE filename_prefix:STRING -> images:IMAGE",
    "KSampler": f"model:MODEL seed:SEED {SAMPLING} {BOTH} latent_image:LATENT -> LATENT",
    "KSamplerAdvanced": f"model:MODEL add_noise:ADD noise_seed:SEED {SAMPLING} {BOTH} latent_image:LATENT "
    "start_at_step:INT end_at_step:INT -> LATENT",
    "KSampler (Efficient)": f"model:MODEL seed:SEED {BOTH} latent_image:LATENT -> MODEL LATENT",
    "BasicGuider": "model:MODEL conditioning:CONDITIONING -> GUIDER",
    "DualModelGuider": "model:MODEL positive:CONDITIONING cfg:FLOAT ?model_negative:MODEL ?negative:CONDITIONING "
    "-> GUIDER",
    "RandomNoise": "noise_seed:SEED -> NOISE",
    "DisableNoise": " -> NOISE",
    "BasicScheduler": "model:MODEL scheduler:SCHEDULERS steps:STEPS -> SIGMAS",
    "KSamplerSelect": "sampler_name:SAMPLERS -> SAMPLER",
    "SamplerCustomAdvanced": "noise:NOISE guider:GUIDER sampler:SAMPLER sigmas:SIGMAS latent_image:LATENT -> "
    "output:LATENT denoised_output:LATENT",
}  # fmt: skip
"""Inputs (? for optional ones) and outputs, as name:type; an output without a name is called as its type."""


class InterruptProcessingException(Exception):  # noqa: N818 - ComfyUI's name
    """Somebody cancelled."""


def node_class(said: str, run: Callable[..., tuple[Any, ...]] | None) -> Any:
    """A class of nodes, as ComfyUI's are (V1). Without `run` it gives, for each output, the input of its type or the
    first.
    """
    before, _, after = said.partition("->")
    declared: dict[str, dict[str, Any]] = {"required": {}, "optional": {}}
    for name, kind in (word.split(":") for word in before.split()):
        declared["optional" if name[0] == "?" else "required"][name.lstrip("?")] = KINDS.get(kind, (kind, {}))
    outputs = {name: kind or name for name, _, kind in (word.partition(":") for word in after.split())}

    def pass_on(**given: Any) -> tuple[Any, ...]:
        kinds = {kind: given[name] for name, (kind, _) in declared["required"].items() if isinstance(kind, str)}
        return tuple(kinds.get(kind, next(iter(given.values()))) for kind in outputs.values())

    content = {
        "INPUT_TYPES": classmethod(lambda _: copy.deepcopy(declared)),
        "RETURN_TYPES": tuple(outputs.values()),
        "RETURN_NAMES": tuple(outputs),
        "FUNCTION": "run",
        "OUTPUT_NODE": "filename_prefix" in declared["required"],
        "run": lambda _, **given: (run or pass_on)(**given),
    }
    return type("Node", (), content)


def node_classes(**runs: Callable[..., tuple[Any, ...]]) -> dict[str, Any]:
    """All that the server has, by name: ComfyUI's and ours; and what some of ComfyUI's do."""
    from convert_to_quant.comfyui_nodes.nodes import NODE_CLASS_MAPPINGS

    return {**{name: node_class(said, runs.get(name)) for name, said in NODES.items()}, **NODE_CLASS_MAPPINGS}


def node_info(kind: Any) -> dict[str, Any]:
    """What `/object_info` says of a class, as far as our client reads it."""
    return {"input": kind.INPUT_TYPES(), "output": kind.RETURN_TYPES, "output_name": kind.RETURN_NAMES}


def is_link(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and isinstance(value[0], str) and isinstance(value[1], int)


def inputs_of(kind: Any) -> dict[str, Any]:
    """What a class takes, required or not."""
    declared = kind.INPUT_TYPES()
    return {**declared.get("required", {}), **declared.get("optional", {})}


Answer = tuple[int, bytes, Mapping[str, str]]
"""Status, content and headers."""


def answer(content: Any = b"", status: int = 200, **headers: str) -> Answer:
    """Bytes as they are, anything else as JSON."""
    return status, content if isinstance(content, bytes) else json.dumps(content).encode(), headers


class Double:
    """A running server, and the strings that a test pulls.

    Args:
        interfaces: the double of ComfyUI's interfaces.
        remembers: what its nodes gave.
        prefix: before its paths.

    Attributes:
        address: its URL.
        classes: see `node_classes`.
        requests: method and path of all that was asked, in order.
        answer_with: a path -> what answers instead, from the query.
        happen: called at each step of each sampling with its number.
        sampled: model file and seed of each sampling.
    """

    def __init__(self, interfaces: Any, remembers: bool = True, prefix: str = "") -> None:
        self.comfyui, self.remembers = interfaces, remembers
        self.classes = node_classes(
            UNETLoader=lambda unet_name, **_: (self.load(unet_name),),
            EmptyLatentImage=lambda batch_size, **_: ({"samples": torch.zeros(batch_size, 5, 16)},),
            KSampler=self.sample,
            KSamplerAdvanced=self.sample,
        )
        self.models: dict[str, Any] = {}
        self.happen: Callable[[int], Any] = lambda _: None
        self.sampled: list[tuple[str, int]] = []
        self.requests: list[str] = []
        self.answer_with: dict[str, Callable[[dict[str, str]], Answer]] = {}
        self.queue: list[list[Any]] = []
        self.running: list[list[Any]] = []
        self.history: dict[str, Any] = {}
        self.prompts: list[dict[str, Any]] = []
        self.outputs: dict[Any, Any] = {}
        self.interrupted = False
        self.client: str | None = None
        self._mutex = threading.Condition()
        self._closed = False
        double = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: Any) -> None:
                """Nothing."""

            def do_GET(self) -> None:
                path, _, query = self.path.removeprefix(prefix).partition("?")
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                double.requests.append(f"{self.command} {path}")
                given = dict(urllib.parse.parse_qsl(query, keep_blank_values=True))
                if path in double.answer_with:
                    status, content, headers = double.answer_with[path](given)
                else:
                    route = path.strip("/").partition("/")
                    name = f"_{self.command}_{route[0]}".lower()
                    argument = json.loads(body) if body else given or urllib.parse.unquote(route[2])
                    status, content, headers = getattr(double, name)(argument)
                self.send_response(status)
                for key, text in headers.items():
                    self.send_header(key, text)
                self.end_headers()
                self.wfile.write(content)

            do_POST = do_GET  # noqa: N815 - the library's name

        class Server(ThreadingHTTPServer):
            daemon_threads, block_on_close = True, False

            def handle_error(self, *_: Any) -> None:
                """A client that no longer listens."""

        self._http = Server(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self._http.server_address[1]}{prefix}"
        serving = threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True)
        self._threads = [serving, threading.Thread(target=self._work, daemon=True)]
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """End it, whatever it is doing."""
        if self._closed:
            return
        self.interrupted = self._closed = True
        with self._mutex:
            self._mutex.notify_all()
        self._http.shutdown()
        self._http.server_close()
        for thread in self._threads:
            thread.join(10)
            assert not thread.is_alive()

    def load(self, name: str) -> Any:
        """A model: the same while it is remembered."""
        if name == "broken.safetensors":
            raise RuntimeError("header too large\nTry another file")
        self.models.setdefault(name, self.comfyui.model())
        return self.models[name]

    def sample(
        self, model: Any, latent_image: Any, seed: int = 0, noise_seed: int = 0, steps: int = 3, **_: Any
    ) -> tuple[Any]:
        """Sample on noise: the steps that ComfyUI shows are the model's calls."""
        seed = seed or noise_seed
        self.sampled.append((next(name for name, one in self.models.items() if one.model is model.model), seed))
        noise = torch.randn(latent_image["samples"].shape, generator=torch.Generator().manual_seed(seed))

        def happen(step: int) -> None:
            self.happen(step)
            if self.interrupted:
                raise InterruptProcessingException

        sigmas = tuple(1 - step / steps for step in range(steps))
        return ({"samples": self.comfyui.guider(model, happen).sample(noise, sigmas)},)

    # the server

    def _get_system_stats(self, _: Any) -> Answer:
        return answer({"system": {"comfyui_version": "0.33.0"}})

    def _get_object_info(self, name: str) -> Answer:
        return answer({name: node_info(self.classes[name])} if name in self.classes else {})

    def _post_prompt(self, said: Any) -> Answer:
        prompt = said["prompt"]
        outputs = [name for name, node in prompt.items() if self.classes[node["class_type"]].OUTPUT_NODE]
        name, number = str(uuid.uuid4()), len(self.prompts) + 1
        self.prompts.append(prompt)
        with self._mutex:
            self.queue.append([number, name, prompt, {"client_id": said["client_id"]}, outputs])
            self._mutex.notify_all()
        return answer({"prompt_id": name, "number": number, "node_errors": {}})

    def _get_queue(self, _: Any) -> Answer:
        with self._mutex:
            return answer({"queue_running": self.running, "queue_pending": self.queue})

    def _post_queue(self, said: Any) -> Answer:
        with self._mutex:
            self.queue = [item for item in self.queue if item[1] not in said["delete"]]
        return answer()

    def _post_interrupt(self, said: Any) -> Answer:
        if any(item[1] == said["prompt_id"] for item in self.running):
            self.interrupted = True
        return answer()

    def _get_history(self, name: str) -> Answer:
        return answer({name: self.history[name]} if name in self.history else {})

    def _get_view(self, query: Any) -> Answer:
        root = (self.comfyui.root / "output").resolve()
        path = (root / query["subfolder"] / query["filename"]).resolve()
        assert path.is_relative_to(root)
        return answer(path.read_bytes()) if path.is_file() else answer(status=404)

    # the worker

    def _work(self) -> None:
        while True:
            with self._mutex:
                self._mutex.wait_for(lambda: self.queue or self._closed)
                if self._closed:
                    return
                item = self.queue.pop(0)
                self.running.append(item)
            entry = self._execute(*item[2:])
            with self._mutex:
                self.running.remove(item)
                self.history[item[1]] = entry

    def _execute(self, prompt: dict[str, Any], extra: dict[str, Any], outputs: list[str]) -> dict[str, Any]:
        """Run what outputs need, or remember what it gave: the entry in the history."""
        self.interrupted, self.client = self._closed, extra["client_id"]
        found: dict[str, tuple[Any, Any]] = {}
        running = ""

        def run(name: str) -> Any:
            nonlocal running
            key, inputs = self._key(prompt, name), prompt[name]["inputs"]
            if name not in found and key in self.outputs:
                found[name] = self.outputs[key]
            if name not in found:
                kind = self.classes[prompt[name]["class_type"]]
                given = {said: run(value[0])[value[1]] for said, value in inputs.items() if is_link(value)}
                given |= {
                    said: value for said, value in inputs.items() if said in inputs_of(kind) and said not in given
                }
                given |= dict.fromkeys(kind.INPUT_TYPES().get("hidden", {}), name)
                running = name
                if self.interrupted:
                    raise InterruptProcessingException
                told = getattr(kind(), kind.FUNCTION)(**given)
                told = told if isinstance(told, dict) else {"result": told}
                found[name] = told.get("result", ()), told.get("ui")
                if self.remembers:
                    self.outputs[key] = found[name]
            return found[name][0]

        messages = []
        try:
            for name in outputs:
                run(name)
        except Exception as error:
            what = "interrupted" if isinstance(error, InterruptProcessingException) else "error"
            said = {"exception_message": f"{error}\n", "exception_type": type(error).__qualname__}
            node = {"node_id": running, "node_type": prompt[running]["class_type"]}
            messages = [[f"execution_{what}", {**node, **said}]]
        shown = {name: ui for name, (_, ui) in found.items() if ui is not None}
        return {"outputs": shown, "status": {"status_str": "error" if messages else "success", "messages": messages}}

    def _key(self, prompt: dict[str, Any], name: str) -> Any:
        """What a result is remembered by: class, IS_CHANGED, values of all inputs, and the same of what is before."""
        kind = self.classes[prompt[name]["class_type"]]
        inputs = prompt[name]["inputs"]
        changed: Any = False
        if hasattr(kind, "IS_CHANGED"):
            known = inputs_of(kind)
            changed = kind.IS_CHANGED(**{key: None if is_link(value) else value for key, value in inputs.items()
                                         if key in known})  # fmt: skip
            changed = object() if changed != changed else changed  # noqa: PLR0124 - NaN is like nothing, not even itself
        own = name if "UNIQUE_ID" in kind.INPUT_TYPES().get("hidden", {}).values() else None
        said = tuple(
            (key, (self._key(prompt, value[0]), value[1]) if is_link(value) else value)
            for key, value in sorted(inputs.items())
        )
        return kind, changed, own, said


@pytest.fixture
def serve(comfyui: Any) -> Iterator[Callable[..., Double]]:
    """serve(remembers=False): a running double."""
    running: list[Double] = []

    def start(**how: Any) -> Double:
        running.append(Double(comfyui, **how))
        return running[-1]

    yield start
    for one in running:
        one.close()


@pytest.fixture
def types(comfyui: Any) -> dict[str, Any]:
    """What the double's nodes take and give, as `plan` wants it."""
    from convert_to_quant.engines.comfyui.workflow import NodeType

    return {name: NodeType.read(node_info(kind)) for name, kind in node_classes().items()}


def assert_same(one: Any, other: Any) -> None:
    """Statistics are the same but for where they come from."""
    assert replace(one, provenance={}) == replace(other, provenance={})


def node(kind: str, title: str | None = None, **inputs: Any) -> dict[str, Any]:
    """A node of a workflow."""
    return {"class_type": kind, "inputs": inputs, **({"_meta": {"title": title}} if title else {})}


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
    more = {"cfg": 1.0, "sampler_name": "euler", "scheduler": "simple", "steps": 4, "positive": ["5", 0],
            "negative": ["6", 0]}  # fmt: skip
    return {
        "1": node("UNETLoader", unet_name="folder/wan_high.safetensors", weight_dtype="default"),
        "2": node("UNETLoader", unet_name="wan_low.safetensors", weight_dtype="default"),
        "3": node("DualCLIPLoader", clip_name1="t5xxl.safetensors", clip_name2="clip_l.safetensors"),
        "5": node("CLIPTextEncode", clip=["3", 0], text="a river"),
        "6": node("CLIPTextEncode", clip=["3", 0], text="static"),
        "7": node("EmptyLatentImage", width=64, height=64, batch_size=1),
        "8": node("KSamplerAdvanced", model=["1", 0], noise_seed=5, add_noise="enable", latent_image=["7", 0],
                  start_at_step=0, end_at_step=2, **more),
        "9": node("KSamplerAdvanced", model=["2", 0], noise_seed=0, add_noise="disable", latent_image=["8", 0],
                  start_at_step=2, end_at_step=4, **more),
        "10": node("VAELoader", vae_name="ae.safetensors"),
        "11": node("VAEDecode", samples=["9", 0], vae=["10", 0]),
        "12": node("SaveImage", images=["11", 0], filename_prefix="film"),
    }  # fmt: skip
