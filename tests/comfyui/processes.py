"""ComfyUI in processes of its own, as tests talk to it; see `driver.py`."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from comfyui_server import node

if TYPE_CHECKING:
    from torch import Tensor

VARIABLE = "COMFYUI_DIR"


class Process:
    """A process that answers requests in lines of JSON.

    Args:
        work: its folder, which gets its log.
        script: of this folder.
        words: its arguments.
        hidden: variables of the environment that it does not get.
    """

    talks = True

    def __init__(self, work: Path, script: str, *words: str | Path, hidden: Collection[str] = ()) -> None:
        self.work = work
        self.log = (work / "log").open("w")
        self.process = subprocess.Popen(
            [sys.executable, Path(__file__).with_name(script), *map(str, words)],
            stdin=subprocess.PIPE if self.talks else subprocess.DEVNULL,
            stdout=subprocess.PIPE if self.talks else self.log,
            stderr=self.log,
            text=True,
            env={name: text for name, text in os.environ.items() if name not in hidden} | {"OMP_NUM_THREADS": "1"},
        )

    def said(self) -> str:
        """The end of its log."""
        return (self.work / "log").read_text()[-4000:]

    def ask(self, command: str, **arguments: Any) -> dict[str, Any]:
        """Send one request; what is raised there fails the test."""
        process: Any = self.process
        process.stdin.write(json.dumps({"command": command, **arguments}) + "\n")
        process.stdin.flush()
        line = process.stdout.readline()
        assert line, f"the process ended:\n{self.said()}"
        answer: dict[str, Any] = json.loads(line)
        assert "error" not in answer, answer["error"]
        result: dict[str, Any] = answer["result"]
        return result

    def close(self) -> None:
        """End the process."""
        for pipe in filter(None, (self.process.stdin, self.process.stdout)):
            pipe.close()
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.log.close()


class ComfyUI(Process):
    """ComfyUI in its process."""

    def __init__(self, tree: Path, work: Path) -> None:
        super().__init__(work, "driver.py", tree, work, "--cpu", "--supports-fp8-compute")

    def load(self, path: Path, key: str, **how: Any) -> dict[str, Any]:
        """Load a file; `key` names the model from then on."""
        return self.ask("load", path=str(path), key=key, **how)

    def run(self, command: str, key: str, inputs: Mapping[str, Tensor], **how: Any) -> dict[str, Tensor]:
        """Run a loaded model on tensors; ComfyUI has nothing to warn about."""
        from safetensors.torch import load_file, save_file

        save_file({name: value.contiguous() for name, value in inputs.items()}, self.work / "inputs.safetensors")
        output = self.work / "output.safetensors"
        told = self.ask(command, key=key, inputs=str(self.work / "inputs.safetensors"), output=str(output), **how)
        assert told["warnings"] == []
        found: dict[str, Tensor] = load_file(output)
        return found


def until(condition: Callable[[], Any], seconds: float = 120) -> Any:
    """Wait for something; what it gives, or None in the end."""
    end = time.monotonic() + seconds
    while not (found := condition()) and time.monotonic() < end:
        time.sleep(0.1)
    return found


def request(address: str, body: Any = None) -> Any:
    """GET, or POST JSON; the answer, also of a refusal."""
    data = None if body is None else json.dumps(body).encode()
    asked = urllib.request.Request(address, data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(asked, timeout=60) as answer:
            return json.loads(answer.read() or "null")
    except urllib.error.HTTPError as refusal:
        with refusal:
            return json.load(refusal)


class Server(Process):
    """ComfyUI's own server, in its process."""

    talks = False

    def __init__(self, tree: Path, work: Path, *flags: str) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        self.address = f"http://127.0.0.1:{port}"
        (work / "front").mkdir(exist_ok=True)
        (work / "front" / "index.html").touch()
        words = ("serve", tree, work, "--cpu", "--listen", "127.0.0.1", "--port", port, "--disable-api-nodes",
                 "--database-url", "sqlite:///:memory:", "--front-end-root", work / "front", *flags)  # fmt: skip
        super().__init__(work, "driver.py", *words)

    def get(self, path: str, body: Any = None) -> Any:
        """See `request`."""
        return request(self.address + path, body)

    def wait_until_it_answers(self) -> None:
        def answers() -> bool:
            assert self.process.poll() is None, self.said()
            try:
                return bool(self.get("/system_stats"))
            except urllib.error.URLError:
                return False

        assert until(answers), self.said()

    def run(self, workflow: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Queue a workflow as it is and wait: its history, and what validation refused of it."""
        queued = self.get("/prompt", {"prompt": workflow})
        assert "prompt_id" in queued, queued
        return self.finish(queued["prompt_id"]), queued["node_errors"]

    def finish(self, prompt: str) -> dict[str, Any]:
        """Wait for a prompt; its history."""
        history = until(lambda: self.get(f"/history/{prompt}"))
        assert history, self.said()
        found: dict[str, Any] = history[prompt]
        return found

    def close(self) -> None:
        """End the process."""
        self.process.terminate()
        super().close()


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
