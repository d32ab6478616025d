"""A double of ComfyUI's server, over real HTTP, that runs workflows with our own nodes.

It follows ComfyUI 0.33: `server.py` (routes and answers), `execution.py` (validation, order and
content of messages, what fails how, the queue and the history) and `comfy_execution/caching.py` (what a node's result
is remembered by). `tests/comfyui/test_drive.py` holds it to the real server. Models are those of the double of
ComfyUI's interfaces in `tests/comfyui_nodes/conftest.py`; the other nodes are as small as can be.
"""

from __future__ import annotations

import asyncio
import copy
import importlib.util
import json
import sys
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from aiohttp import web

SAMPLERS, SCHEDULERS = ["euler", "dpmpp_2m"], ["simple", "normal"]
SEED = ("INT", {"default": 0, "min": 0, "max": 2**64 - 1, "control_after_generate": True})
TEXT = ("STRING", {"multiline": True, "dynamicPrompts": True})
MODELS = ["flux.safetensors", "folder/wan_high.safetensors", "wan_low.safetensors", "broken.safetensors"]
STEPS = ("INT", {"default": 20, "min": 1, "max": 10000})


class InterruptProcessingException(Exception):  # noqa: N818 - ComfyUI's name
    """Somebody cancelled."""


def node(
    required: dict[str, Any], outputs: dict[str, str], run: Callable[..., Any], *,
    optional: dict[str, Any] | None = None, output_node: bool = False, category: str = "test",
) -> type:  # fmt: skip
    """A class of nodes, as ComfyUI's are (V1)."""

    def wrap(kind: Any) -> Any:
        return kind if isinstance(kind, tuple) else (kind, {})

    inputs = {"required": {name: wrap(kind) for name, kind in required.items()}}
    if optional:
        inputs["optional"] = {name: wrap(kind) for name, kind in optional.items()}
    content = {
        "INPUT_TYPES": classmethod(lambda _: copy.deepcopy(inputs)),
        "RETURN_TYPES": tuple(outputs.values()),
        "RETURN_NAMES": tuple(outputs),
        "FUNCTION": "run",
        "OUTPUT_NODE": output_node,
        "CATEGORY": category,
        "run": lambda _, **given: run(**given),
    }
    return type("Node", (), content)


class Nodes:
    """What the double's server has: ComfyUI's nodes by name, type and place, and ours.

    Attributes:
        happen: called at each step of each sampling with (model file, step).
        failure: what a sampler raises.
    """

    def __init__(self, comfyui: Any, server: Double) -> None:
        from convert_to_quant.comfyui_nodes.nodes import NODE_CLASS_MAPPINGS

        self.comfyui, self.server = comfyui, server
        self.models: dict[str, Any] = {}
        self.happen: Callable[[int], None] = lambda _: None
        self.failure: Exception | None = None
        self.sampled: list[tuple[str, int]] = []
        cond, sample = "CONDITIONING", self.sample
        both = {"positive": cond, "negative": cond}
        sampling = {"steps": STEPS, "cfg": "FLOAT", "sampler_name": (SAMPLERS, {}), "scheduler": (SCHEDULERS, {})}

        def first(**given: Any) -> Any:
            """Pass on what comes in first."""
            return (next(iter(given.values())),)

        def patched(model: Any, clip: Any = None, **_: Any) -> Any:
            return (model.clone(), clip)

        def guide(model: Any, **_: Any) -> Any:
            return (model,)

        def sample_guided(noise: int, guider: Any, latent_image: Any, sigmas: int = 3, **_: Any) -> Any:
            return sample(guider, seed=noise, steps=sigmas, latent_image=latent_image) * 2

        multiline = ("STRING", {"multiline": True})
        fixed = ("INT", {"control_after_generate": "fixed"})
        lora = {"lora_name": (["style.safetensors"], {})}
        self.classes: dict[str, type] = {
            "UNETLoader": node(
                {"unet_name": (MODELS, {}), "weight_dtype": (["default"], {})},
                {"MODEL": "MODEL"},
                lambda unet_name, **_: (self.load(unet_name),),
            ),
            "CheckpointLoaderSimple": node(
                {"ckpt_name": (MODELS, {})},
                {"MODEL": "MODEL", "CLIP": "CLIP", "VAE": "VAE"},
                lambda ckpt_name: (self.load(ckpt_name), "clip", "vae"),
            ),
            "LoraLoaderModelOnly": node(
                {"model": "MODEL", **lora, "strength_model": "FLOAT"}, {"MODEL": "MODEL"}, patched
            ),
            "LoraLoader": node({"model": "MODEL", "clip": "CLIP", **lora}, {"MODEL": "MODEL", "CLIP": "CLIP"}, patched),
            "ModelMergeSimple": node(
                {"model1": "MODEL", "model2": "MODEL", "ratio": "FLOAT"},
                {"MODEL": "MODEL"},
                lambda model1, **_: patched(model1),
            ),
            "ComfySwitchNode": node(
                {"switch": "BOOLEAN", "on_false": "COMFY_MATCHTYPE_V3", "on_true": "COMFY_MATCHTYPE_V3"},
                {"output": "COMFY_MATCHTYPE_V3"},
                lambda switch, on_false, on_true: (on_true if switch else on_false,),
            ),
            "DualCLIPLoader": node(
                {"clip_name1": (["t5xxl.safetensors"], {}), "clip_name2": (["clip_l.safetensors"], {})},
                {"CLIP": "CLIP"},
                first,
            ),
            "VAELoader": node({"vae_name": (["ae.safetensors"], {})}, {"VAE": "VAE"}, first),
            "CLIPTextEncode": node({"text": TEXT, "clip": "CLIP"}, {cond: cond}, first),
            "CLIPTextEncodeFlux": node(
                {"clip": "CLIP", "clip_l": TEXT, "t5xxl": TEXT, "guidance": "FLOAT"}, {cond: cond}, first
            ),
            "CLIPTextEncodeSDXL": node(
                {"clip": "CLIP", "width": "INT", "text_g": TEXT, "text_l": TEXT}, {cond: cond}, first
            ),
            "TextEncodeBooguEdit": node(
                {"clip": "CLIP", "prompt": TEXT, "negative_prompt": TEXT},
                both,
                lambda prompt, negative_prompt, **_: (prompt, negative_prompt),
            ),
            "ConditioningZeroOut": node({"conditioning": cond}, {cond: cond}, first),
            "ConditioningCombine": node({"conditioning_1": cond, "conditioning_2": cond}, {cond: cond}, first),
            "FluxGuidance": node({"conditioning": cond, "guidance": "FLOAT"}, {cond: cond}, first),
            "GLIGENTextBoxApply": node(
                {"conditioning_to": cond, "clip": "CLIP", "text": TEXT, "width": "INT"}, {cond: cond}, first
            ),
            "WanTrackToVideo": node(
                {**both, "tracks": multiline},
                {**both, "latent": "LATENT"},
                lambda positive, negative, **_: (positive, negative, self.latent()),
            ),
            "WanInfiniteTalkToVideo": node(
                {"model": "MODEL", **both},
                {"model": "MODEL", **both, "latent": "LATENT", "trim_image": "INT"},
                lambda model, positive, negative: (model, positive, negative, self.latent(), 0),
            ),
            "ControlNetApplyAdvanced": node(
                {**both, "strength": "FLOAT"}, both, lambda positive, negative, **_: (positive, negative)
            ),
            "PrimitiveStringMultiline": node({"value": multiline}, {"STRING": "STRING"}, first),
            "PrimitiveInt": node({"value": fixed}, {"INT": "INT"}, first),
            "EmptyLatentImage": node(
                {"width": "INT", "height": "INT", "batch_size": "INT"},
                {"LATENT": "LATENT"},
                lambda batch_size, **_: (self.latent(batch_size),),
            ),
            "AddNoise": node(
                {"model": "MODEL", "noise": "NOISE", "latent_image": "LATENT"},
                {"LATENT": "LATENT"},
                lambda latent_image, **_: (latent_image,),
            ),
            "VAEDecode": node({"samples": "LATENT", "vae": "VAE"}, {"IMAGE": "IMAGE"}, first),
            "SaveImage": node(
                {"images": "IMAGE", "filename_prefix": "STRING"},
                {"images": "IMAGE"},
                lambda images, **_: {"ui": {"images": []}, "result": (images,)},
                output_node=True,
            ),
            "KSampler": node(
                {"model": "MODEL", "seed": SEED, **sampling, **both, "latent_image": "LATENT"},
                {"LATENT": "LATENT"},
                sample,
            ),
            "KSamplerAdvanced": node(
                {"model": "MODEL", "add_noise": (["enable", "disable"], {}), "noise_seed": SEED, **sampling, **both,
                 "latent_image": "LATENT", "start_at_step": "INT", "end_at_step": "INT"},
                {"LATENT": "LATENT"},
                sample,
            ),
            "KSampler (Efficient)": node(
                {"model": "MODEL", "seed": SEED, **both, "latent_image": "LATENT"},
                {"MODEL": "MODEL", "LATENT": "LATENT"},
                lambda model, **given: (model, *sample(model, **given)),
            ),
            "BasicGuider": node({"model": "MODEL", "conditioning": cond}, {"GUIDER": "GUIDER"}, guide),
            "DualModelGuider": node(
                {"model": "MODEL", "positive": cond, "cfg": "FLOAT"},
                {"GUIDER": "GUIDER"},
                guide,
                optional={"model_negative": "MODEL", "negative": cond},
            ),
            "RandomNoise": node({"noise_seed": SEED}, {"NOISE": "NOISE"}, first),
            "DisableNoise": node({}, {"NOISE": "NOISE"}, lambda: (0,)),
            "BasicScheduler": node(
                {"model": "MODEL", "scheduler": (SCHEDULERS, {}), "steps": STEPS},
                {"SIGMAS": "SIGMAS"},
                lambda steps, **_: (steps,),
            ),
            "KSamplerSelect": node({"sampler_name": (SAMPLERS, {})}, {"SAMPLER": "SAMPLER"}, first),
            "SamplerCustomAdvanced": node(
                {"noise": "NOISE", "guider": "GUIDER", "sampler": "SAMPLER", "sigmas": "SIGMAS",
                 "latent_image": "LATENT"},
                {"output": "LATENT", "denoised_output": "LATENT"},
                sample_guided,
            ),
            **NODE_CLASS_MAPPINGS,
        }  # fmt: skip

    def load(self, name: str) -> Any:
        """A model: the same while it is remembered."""
        if name == "broken.safetensors":
            raise RuntimeError("header too large\nTry another file")
        self.models.setdefault(name, self.comfyui.model())
        return self.models[name]

    @staticmethod
    def latent(batch: int = 1) -> dict[str, Any]:
        return {"samples": torch.zeros(batch, 5, 16)}

    def sample(
        self, model: Any, latent_image: Any, seed: int = 0, noise_seed: int = 0, steps: int = 3, **_: Any
    ) -> Any:
        """Sample on noise: the steps that ComfyUI shows are the model's calls."""
        seed = seed or noise_seed
        name = next(name for name, loaded in self.models.items() if loaded.model is model.model)
        self.sampled.append((name, seed))
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(latent_image["samples"].shape, generator=generator)

        def happen(step: int) -> None:
            self.happen(step)
            if self.failure is not None:
                raise self.failure
            self.server.step()

        sigmas = tuple(1 - step / steps for step in range(steps))
        return ({"samples": self.comfyui.guider(model, happen).sample(noise, sigmas)},)


def node_info(name: str, kind: Any) -> dict[str, Any]:
    """What `/object_info` says of a class (server.py, node_info)."""
    inputs = kind.INPUT_TYPES()
    return {
        "input": inputs,
        "input_order": {group: list(those) for group, those in inputs.items()},
        "output": kind.RETURN_TYPES,
        "output_is_list": [False] * len(kind.RETURN_TYPES),
        "output_name": getattr(kind, "RETURN_NAMES", kind.RETURN_TYPES),
        "name": name,
        "display_name": name,
        "category": kind.CATEGORY,
        "output_node": getattr(kind, "OUTPUT_NODE", False),
    }


def is_link(value: Any) -> bool:
    return (
        isinstance(value, list) and len(value) == 2 and isinstance(value[0], str) and isinstance(value[1], (int, float))
    )


def problem(kind: str, message: str, details: str, **extra: Any) -> dict[str, Any]:
    return {"type": kind, "message": message, "details": details, "extra_info": extra}


class Double:
    """A running server, and the strings that a test pulls.

    Args:
        comfyui: the double of ComfyUI's interfaces.
        cache: how it remembers results: "ram" (everything), "classic" (what the last workflow had), or "none".

    Attributes:
        address: its URL.
        requests: method and path of all that was asked, in order.
        answer_with: a path -> what answers instead.
    """

    def __init__(self, comfyui: Any, cache: str = "ram", prefix: str = "") -> None:
        self.comfyui, self.cache, self.prefix = comfyui, cache, prefix
        self.nodes = Nodes(comfyui, self)
        self.requests: list[str] = []
        self.answer_with: dict[str, Callable[[web.Request], Any]] = {}
        self.queue: list[list[Any]] = []
        self.running: list[list[Any]] = []
        self.history: dict[str, Any] = {}
        self.prompts: list[dict[str, Any]] = []
        self.outputs: dict[Any, Any] = {}
        self.objects: dict[Any, Any] = {}
        self.interrupted = False
        self.client: str | None = None
        self.number = 0
        self._mutex = threading.Condition()
        self._closed = False
        self._ready = threading.Event()
        self._loop = asyncio.new_event_loop()
        self._threads = [threading.Thread(target=run, daemon=True) for run in (self._serve, self._work)]
        for thread in self._threads:
            thread.start()
        assert self._ready.wait(10), "it did not start"

    # the server

    def _serve(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_until_complete(self._start())
        self._ready.set()
        self._loop.run_forever()
        self._loop.run_until_complete(self._runner.cleanup())
        self._loop.run_until_complete(self._loop.shutdown_asyncgens())
        self._loop.close()

    async def _start(self) -> None:
        application = web.Application(middlewares=[self._middleware], client_max_size=1 << 26)
        for prefix in ("", "/api"):
            application.add_routes(
                [
                    web.get(f"{self.prefix}{prefix}/system_stats", self._system_stats),
                    web.get(f"{self.prefix}{prefix}/object_info", self._object_info),
                    web.get(f"{self.prefix}{prefix}/object_info/{{name}}", self._object_info),
                    web.post(f"{self.prefix}{prefix}/prompt", self._post_prompt),
                    web.get(f"{self.prefix}{prefix}/queue", self._get_queue),
                    web.post(f"{self.prefix}{prefix}/queue", self._post_queue),
                    web.post(f"{self.prefix}{prefix}/interrupt", self._post_interrupt),
                    web.get(f"{self.prefix}{prefix}/history", self._get_history),
                    web.get(f"{self.prefix}{prefix}/history/{{name}}", self._get_history),
                    web.get(f"{self.prefix}{prefix}/view", self._view),
                ]
            )
        self._runner = web.AppRunner(application, access_log=None, shutdown_timeout=0.1)
        await self._runner.setup()
        self._site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await self._site.start()
        port = self._runner.addresses[0][1]
        self.address = f"http://127.0.0.1:{port}{self.prefix}"

    def close(self) -> None:
        """End it, whatever it is doing."""
        if self._closed:
            return
        self.interrupted = self._closed = True
        with self._mutex:
            self._mutex.notify_all()
        self._loop.call_soon_threadsafe(self._loop.stop)
        for thread in self._threads:
            thread.join(10)
            assert not thread.is_alive()

    @web.middleware
    async def _middleware(self, request: web.Request, handler: Any) -> Any:
        path = request.path.removeprefix(self.prefix)
        self.requests.append(f"{request.method} {path}")
        if path in self.answer_with:
            answer = self.answer_with[path](request)
            return await answer if asyncio.iscoroutine(answer) else answer
        return await handler(request)

    async def _system_stats(self, _request: web.Request) -> Any:
        return web.json_response({"system": {"os": "posix", "comfyui_version": "0.33.0"}, "devices": []})

    async def _object_info(self, request: web.Request) -> Any:
        wanted = request.match_info.get("name")
        return web.json_response(
            {name: node_info(name, kind) for name, kind in self.nodes.classes.items() if wanted in (None, name)}
        )

    async def _post_prompt(self, request: web.Request) -> Any:
        said = await request.json()
        prompt = said["prompt"]
        self.number += 1
        error, outputs, node_errors = validate(prompt, self.nodes.classes)
        if error is not None:
            return web.json_response({"error": error, "node_errors": node_errors}, status=400)
        name = str(uuid.uuid4())
        extra = {"client_id": said["client_id"]} if "client_id" in said else {}
        extra["create_time"] = int(time.time() * 1000)
        self.prompts.append(copy.deepcopy(prompt))
        self.put([self.number, name, prompt, extra, outputs])
        return web.json_response({"prompt_id": name, "number": self.number, "node_errors": node_errors})

    def put(self, item: list[Any]) -> None:
        """Queue a run."""
        with self._mutex:
            self.queue.append(item)
            self._mutex.notify_all()

    async def _get_queue(self, _request: web.Request) -> Any:
        with self._mutex:
            return web.json_response({"queue_running": self.running, "queue_pending": self.queue})

    async def _post_queue(self, request: web.Request) -> Any:
        said = await request.json()
        with self._mutex:
            self.queue = [item for item in self.queue if item[1] not in said.get("delete", ())]
        return web.Response(status=200)

    async def _post_interrupt(self, request: web.Request) -> Any:
        try:
            said = await request.json()
        except json.JSONDecodeError:
            said = {}
        wanted = said.get("prompt_id")
        if wanted is None or any(item[1] == wanted for item in self.running):
            self.interrupted = True
        return web.Response(status=200)

    async def _get_history(self, request: web.Request) -> Any:
        wanted = request.match_info.get("name")
        return web.json_response({name: entry for name, entry in self.history.items() if wanted in (None, name)})

    async def _view(self, request: web.Request) -> Any:
        query = request.rel_url.query
        filename, folder = (
            query.get("filename", ""),
            {"output": self.comfyui.root / "output"}[query.get("type", "output")],
        )
        if not filename or filename[0] == "/" or ".." in filename:
            return web.Response(status=400)
        folder = (folder / query.get("subfolder", "")).resolve()
        if not folder.is_relative_to((self.comfyui.root / "output").resolve()):
            return web.Response(status=403)
        path = folder / Path(filename).name
        return web.FileResponse(path) if path.is_file() else web.Response(status=404)

    # the worker

    def _work(self) -> None:
        while True:
            with self._mutex:
                while not self.queue and not self._closed:
                    self._mutex.wait()
                if self._closed:
                    return
                item = self.queue.pop(0)
                self.running.append(item)
            _number, name, prompt, extra, outputs = item
            entry = self._execute(name, copy.deepcopy(prompt), extra, outputs)
            with self._mutex:
                self.running.remove(item)
                self.history[name] = {"prompt": item, **entry}

    def _execute(self, run: str, prompt: dict[str, Any], extra: dict[str, Any], outputs: list[str]) -> dict[str, Any]:
        self.interrupted = self._closed
        self.client = extra.get("client_id")
        messages: list[Any] = []

        def message(kind: str, data: dict[str, Any]) -> None:
            messages.append([kind, {"prompt_id": run, **data, "timestamp": int(time.time() * 1000)}])

        message("execution_start", {})
        keys = {name: self._key(prompt, name, set()) for name in prompt}
        if self.cache == "classic":
            self.outputs = {key: value for key, value in self.outputs.items() if key in keys.values()}
        self.objects = {key: value for key, value in self.objects.items() if key[0] in prompt}
        missed = {name for name in prompt if keys[name] not in self.outputs}
        message("execution_cached", {"nodes": [name for name in prompt if name not in missed]})
        shown: dict[str, Any] = {}
        executed: list[str] = []
        results: dict[str, Any] = {}
        failed = None
        for name in order(prompt, outputs):
            failed = self._run(prompt, name, keys[name], results, shown)
            if failed is not None:
                kind, data = failed
                told = {"node_id": name, "node_type": prompt[name]["class_type"], "executed": executed, **data}
                message(kind, told)
                break
            if name in missed:
                executed.append(name)
        else:
            message("execution_success", {})
        meta = {name: {"node_id": name, "display_node": name} for name in shown}
        status = {"status_str": "error" if failed else "success", "completed": not failed, "messages": messages}
        return {"outputs": shown, "meta": meta, "status": status}

    def _run(
        self, prompt: dict[str, Any], name: str, key: Any, results: dict[str, Any], shown: dict[str, Any]
    ) -> tuple[str, dict[str, Any]] | None:
        if key in self.outputs:
            results[name], ui = self.outputs[key]
            if ui is not None:
                shown[name] = ui
            return None
        kind = self.nodes.classes[prompt[name]["class_type"]]
        declared = kind.INPUT_TYPES()  # type: ignore[attr-defined]
        known = {given for group in ("required", "optional") for given in declared.get(group, {})}
        given = {
            said: results[value[0]][value[1]] if is_link(value) else value
            for said, value in prompt[name]["inputs"].items()
            if is_link(value) or said in known
        }
        given |= {said: name for said, what in declared.get("hidden", {}).items() if what == "UNIQUE_ID"}
        try:
            if self.interrupted:
                raise InterruptProcessingException
            held = self.objects.setdefault((name, kind), kind()) if self.cache != "none" else kind()
            found = getattr(held, kind.FUNCTION)(**given)  # type: ignore[attr-defined]
        except InterruptProcessingException:
            return "execution_interrupted", {}
        except Exception as error:
            told = type(error).__qualname__ if type(error).__module__ == "builtins" else (
                f"{type(error).__module__}.{type(error).__qualname__}"
            )  # fmt: skip
            return "execution_error", {
                "exception_message": f"{error}\n",
                "exception_type": told,
                "traceback": traceback.format_tb(error.__traceback__),
                "current_inputs": {},
                "current_outputs": [],
            }
        ui = found.get("ui") if isinstance(found, dict) else None
        results[name] = found.get("result", ()) if isinstance(found, dict) else found
        if ui is not None:
            shown[name] = ui
        if self.cache != "none":
            self.outputs[key] = (results[name], ui)
        return None

    def step(self) -> None:
        """A sampler's step is done."""
        if self.interrupted:
            raise InterruptProcessingException

    def _key(self, prompt: dict[str, Any], name: str, above: set[str]) -> Any:
        """What a result is remembered by: class, IS_CHANGED, values of all inputs, and the same of what is before."""
        kind = self.nodes.classes[prompt[name]["class_type"]]
        inputs = prompt[name]["inputs"]
        changed: Any = False
        if hasattr(kind, "IS_CHANGED"):
            declared = kind.INPUT_TYPES()  # type: ignore[attr-defined]
            known = {given for group in ("required", "optional") for given in declared.get(group, {})}
            changed = kind.IS_CHANGED(
                **{said: None if is_link(value) else value for said, value in inputs.items() if said in known}
            )
            changed = object() if changed != changed else changed  # noqa: PLR0124 - NaN is like nothing, not even itself
        own = name if "UNIQUE_ID" in kind.INPUT_TYPES().get("hidden", {}).values() else None  # type: ignore[attr-defined]
        said = tuple(
            (key, (self._key(prompt, value[0], above), value[1]) if is_link(value) else value)
            for key, value in sorted(inputs.items())
        )
        return kind, changed, own, said


def order(prompt: dict[str, Any], outputs: list[str]) -> list[str]:
    """Nodes that outputs need, each behind what it needs."""
    found: list[str] = []

    def visit(name: str) -> None:
        for value in prompt[name]["inputs"].values():
            if is_link(value):
                visit(value[0])
        if name not in found:
            found.append(name)

    for name in outputs:
        visit(name)
    return found


def validate(
    prompt: dict[str, Any], classes: dict[str, type]
) -> tuple[dict[str, Any] | None, list[str], dict[str, Any]]:
    """What ComfyUI refuses of a workflow (execution.py, validate_prompt): error, good outputs, errors by node."""
    outputs = []
    for name, said in prompt.items():
        kind = classes.get(said["class_type"])
        if kind is None:
            told = said.get("_meta", {}).get("title", said["class_type"])
            message = f"Node '{told}' not found. The custom node may not be installed."
            return (
                problem(
                    "missing_node_type", message, f"Node ID '#{name}'", node_id=name, class_type=said["class_type"]
                ),
                [],
                {},
            )
        if getattr(kind, "OUTPUT_NODE", False):
            outputs.append(name)
    if not outputs:
        return problem("prompt_no_outputs", "Prompt has no outputs", ""), [], {}
    good, node_errors = [], {}
    for output in outputs:
        bad = {name: errors for name in order(prompt, [output]) if (errors := list(errors_of(prompt, name, classes)))}
        if not bad:
            good.append(output)
        for name, errors in bad.items():
            entry = {"errors": errors, "dependent_outputs": [], "class_type": prompt[name]["class_type"]}
            node_errors.setdefault(name, entry)["dependent_outputs"].append(output)
    if good:
        return None, good, node_errors
    lines = "\n".join(
        f"{error['message']}: {error['details']}" for each in node_errors.values() for error in each["errors"]
    )
    return problem("prompt_outputs_failed_validation", "Prompt outputs failed validation", lines), [], node_errors


def errors_of(prompt: dict[str, Any], name: str, classes: dict[str, type]) -> Iterator[dict[str, Any]]:
    """What ComfyUI refuses of one node (execution.py, validate_inputs)."""
    kind: Any = classes[prompt[name]["class_type"]]
    inputs, declared = prompt[name]["inputs"], kind.INPUT_TYPES()
    for group in ("required", "optional"):
        for said, entry in declared.get(group, {}).items():
            wanted, options = entry[0], entry[1] if len(entry) > 1 else {}
            if said not in inputs:
                if group == "required":
                    yield problem("required_input_missing", "Required input is missing", said, input_name=said)
                continue
            value = inputs[said]
            if is_link(value):
                received = classes[prompt[value[0]]["class_type"]].RETURN_TYPES[value[1]]  # type: ignore[attr-defined]
                if received != wanted and not {received, wanted} & {"*", "COMFY_MATCHTYPE_V3"}:
                    detail = f"{said}, received_type({received}) mismatch input_type({wanted})"
                    message = "Return type mismatch between linked nodes"
                    yield problem("return_type_mismatch", message, detail, input_name=said)
            elif isinstance(wanted, list) and value not in wanted:
                yield problem(
                    "value_not_in_list", "Value not in list", f"{said}: {value!r} not in {wanted}", input_name=said
                )
            elif "max" in options and value > options["max"]:
                message = f"Value {value} bigger than max of {options['max']}"
                yield problem("value_bigger_than_max", message, said, input_name=said)
    if hasattr(kind, "VALIDATE_INPUTS") and "filename_prefix" in inputs:
        answer = kind.VALIDATE_INPUTS(filename_prefix=inputs["filename_prefix"])
        if answer is not True:
            message = "Custom validation failed for node"
            yield problem(
                "custom_validation_failed", message, f"filename_prefix - {answer}", input_name="filename_prefix"
            )


def interfaces() -> Any:
    """`tests/comfyui_nodes/conftest.py`, which has the double of ComfyUI's interfaces."""
    path = Path(__file__).parents[2] / "comfyui_nodes" / "conftest.py"
    spec = importlib.util.spec_from_file_location("comfyui_interfaces", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module
