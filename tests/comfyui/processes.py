"""ComfyUI in its own processes."""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import driver
import pytest
from comfyui_server import node
from inprocess_driver import VARIABLE

if TYPE_CHECKING:
    from torch import Tensor

SPAWN = multiprocessing.get_context("spawn")


class Process:
    """A process that calls functions of this folder's modules.

    Args:
        start: called first, with what follows.
    """

    def __init__(self, start: Callable[..., None], *given: Any) -> None:
        self._pool = ProcessPoolExecutor(1, SPAWN, start, given)

    def ask(self, function: Callable[..., Any], *given: Any, **more: Any) -> Any:
        """What a function gives or raises there."""
        return self._pool.submit(function, *given, **more).result()

    def close(self) -> None:
        """End the process."""
        self._pool.shutdown()


class ComfyUI(Process):
    """ComfyUI in its process."""

    def __init__(self, tree: Path, work: Path) -> None:
        super().__init__(driver.start, tree, work, "--cpu", "--supports-fp8-compute")
        self.work = work

    def load(self, path: Path, key: str, **how: Any) -> dict[str, Any]:
        """Load a file; `key` names the model from then on."""
        return dict(self.ask(driver.load, path, key, **how))

    def velocity(self, path: Path, states: Mapping[str, Tensor], **how: Any) -> Tensor:
        """What a file predicts."""
        self.load(path, "run", **how)
        velocity: Tensor = self.run(driver.evaluate, "run", states)["velocity"]
        return velocity

    def run(
        self, function: Callable[..., tuple[dict[str, Any], list[str]]], key: str, given: Mapping[str, Tensor],
        **how: Any,
    ) -> dict[str, Any]:  # fmt: skip
        """Run a loaded model on tensors; ComfyUI has nothing to warn about."""
        found, warnings = self.ask(function, key=key, given=dict(given), **how)
        assert warnings == []
        return dict(found)


def until(condition: Callable[[], Any], seconds: float = 120) -> Any:
    """Wait for something; what it gives, or None in the end."""
    end = time.monotonic() + seconds
    while not (found := condition()) and time.monotonic() < end:
        time.sleep(0.1)
    return found


class Server:
    """ComfyUI's own server, in its process."""

    def __init__(self, tree: Path, work: Path, *flags: str) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = str(free.getsockname()[1])
        self.work, self.address = work, f"http://127.0.0.1:{port}"
        (work / "front").mkdir(exist_ok=True)
        (work / "front" / "index.html").touch()
        words = ("--cpu", "--listen", "127.0.0.1", "--port", port, "--disable-api-nodes", "--database-url",
                 "sqlite:///:memory:", "--front-end-root", str(work / "front"))  # fmt: skip
        self.process = SPAWN.Process(target=driver.serve, args=(tree, work, *words, *flags), daemon=True)
        self.process.start()
        assert until(self._answers), self.said()

    def said(self) -> str:
        """The end of its log."""
        return (self.work / "log").read_text()[-4000:]

    def get(self, path: str, body: Any = None) -> Any:
        """GET, or POST JSON; the answer, also of a refusal."""
        data = None if body is None else json.dumps(body).encode()
        asked = urllib.request.Request(self.address + path, data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(asked, timeout=60) as answer:
                return json.loads(answer.read() or "null")
        except urllib.error.HTTPError as refusal:
            with refusal:
                return json.load(refusal)

    def _answers(self) -> bool:
        assert self.process.is_alive(), self.said()
        try:
            return bool(self.get("/system_stats"))
        except urllib.error.URLError:
            return False

    def run(self, workflow: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Queue a workflow as it is and wait: its history, and what validation refused of it."""
        queued = self.get("/prompt", {"prompt": workflow})
        assert "prompt_id" in queued, queued
        name = queued["prompt_id"]
        history = until(lambda: self.get(f"/history/{name}"))
        assert history, self.said()
        return history[name], queued["node_errors"]

    def close(self) -> None:
        """End the process."""
        self.process.terminate()
        self.process.join(60)
        self.process.kill()


def tree() -> Path:
    """The ComfyUI tree; a test without one is skipped."""
    folder = Path(os.environ.get(VARIABLE) or pytest.skip(f"{VARIABLE} is not set: it should name a ComfyUI tree"))
    if not (folder / "comfy" / "sd.py").is_file():
        pytest.fail(f"{VARIABLE} is {folder}, and there is no comfy/sd.py in it")
    return folder


def painting(
    model: str = "plain.safetensors", text: str = "strawberry", seed: int = 1, prefix: str = "painted"
) -> dict[str, Any]:
    """A workflow as a user would export it, as far as the emoji model goes; see `stand_ins.py`."""
    return {
        "load": node("UNETLoader", unet_name=model, weight_dtype="default"),
        "clip": node("DualCLIPLoader", clip_name1="clip_l.safetensors", clip_name2="t5xxl_fp16.safetensors",
                     type="flux"),
        "yes": node("CLIPTextEncode", text=text, clip=["clip", 0]),
        "no": node("CLIPTextEncode", text="", clip=["clip", 0]),
        "size": node("EmptySD3LatentImage", width=128, height=128, batch_size=1),
        "paint": sampling(["load", 0], ["size", 0], seed),
        "keep": node("SaveLatent", samples=["paint", 0], filename_prefix=prefix),
    }  # fmt: skip


def sampling(model: list[Any], latent: list[Any], seed: int) -> dict[str, Any]:
    """A sampler of such a workflow."""
    return node("KSampler", model=model, seed=seed, steps=4, cfg=2.0, sampler_name="euler", scheduler="simple",
                positive=["yes", 0], negative=["no", 0], latent_image=latent, denoise=1.0)  # fmt: skip
