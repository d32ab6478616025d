"""Makes the images of docs/comfyui.md, and docs/workflows in the editor's format, with ComfyUI's own frontend.

    COMFYUI_DIR=/path/to/ComfyUI COMFYUI_PYTHON=/its/python python docs/images/make_comfyui_screenshots.py

ComfyUI's Python needs this package and comfyui-frontend-package; this one needs Playwright and an installed Chromium
(CHROMIUM names it). The server runs on the CPU with its own base directory, so that the ComfyUI folder stays unchanged.
The emoji model, with the activation ranges of a large one, replaces Flux.1-dev: its files have Flux's names, and
`tests/comfyui/stand_ins.py` replaces the text encoder and the VAE. Everything else is real, and every graph has run.

The source is a workflow in API format. The frontend lays it out as a graph, this script places the nodes and adds
notes, and the frontend reads the result again: it must send exactly the API file to the server.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.sync_api import Page, sync_playwright

from convert_to_quant import emoji
from convert_to_quant.cli import main as command
from convert_to_quant.comfyui_nodes import pack
from convert_to_quant.emoji.rerange import RERANGINGS, write_reranged

DOCS = Path(__file__).parents[1]
TESTS = DOCS.parent / "tests" / "comfyui"
WORKFLOWS = DOCS / "workflows"
LARGEST_BYTES = 250_000
WIDTH = 1500
"""Width of the window in CSS pixels; images have 1.5 times as many."""

Box = tuple[int, int, int, int]
"""x, y, width, height on the graph."""


@dataclass(frozen=True)
class Drawing:
    """How a workflow is laid out.

    Attributes:
        places: box of each node.
        notes: texts beside the nodes, and their boxes.
        frames: titles of groups of nodes, and their boxes.
    """

    places: Mapping[str, Box]
    notes: tuple[tuple[Box, str], ...]
    frames: tuple[tuple[Box, str], ...]


RECORD_NOTE = """\
### Record
1. Choose your files; *Load Diffusion Model*: the **16-bit** model if you can.
2. LoRAs go between *Load Diffusion Model* and *Record Activations*.
3. Press **Run** a few times, with prompts of the kind that you use. Each image adds to the same statistics file.
"""
CALIBRATE_NOTE = """\
### Calibrate
Choose the **FP8** file of the same model. Press **Run** to write a new file next to it, whose name ends in \
_calibrated. Press **R** to list it in *Load Diffusion Model*.
"""
REPORT_NOTE = """\
### Report
The inputs of every layer on the range of FP8, with the file's current scales and with calibrated ones. \
The same report as a searchable page is in ComfyUI's output folder.
"""
FILE_NOTE = "\nSet *statistics_file* to the name of your statistics file in ComfyUI's output folder."

_RECORDING: dict[str, Box] = {
    "1": (0, 0, 320, 82), "2": (0, 140, 320, 130), "3": (0, 330, 320, 58), "8": (0, 450, 320, 106),
    "4": (370, 0, 320, 102), "5": (370, 160, 320, 120), "6": (370, 340, 320, 58), "7": (370, 456, 320, 100),
    "9": (740, 0, 300, 262), "10": (740, 330, 300, 46),
    "11": (1090, 0, 320, 310), "12": (1090, 380, 320, 176),
}  # fmt: skip
_RECORD_FRAME = ((-20, -80, 1450, 656), "Sample, and record layer inputs")

DRAWINGS: Mapping[str, Drawing] = {
    "flux_record": Drawing(_RECORDING, (((-340, -40, 300, 200), RECORD_NOTE),), (_RECORD_FRAME,)),
    "calibrate": Drawing(
        {"1": (0, 0, 480, 340)},
        (((-340, -40, 300, 200), CALIBRATE_NOTE + FILE_NOTE),),
        (((-20, -80, 520, 440), "Calibrate"),),
    ),
    "report": Drawing(
        {"1": (0, 0, 440, 470), "2": (480, 0, 980, 790)},
        (((0, 550, 440, 240), REPORT_NOTE + FILE_NOTE),),
        (((-20, -80, 1500, 890), "Report"),),
    ),
    "flux_record_and_calibrate": Drawing(
        {**_RECORDING, "13": (1480, 0, 440, 400), "14": (1980, 0, 440, 470), "15": (2460, 0, 980, 790)},
        (
            ((-340, -40, 300, 200), RECORD_NOTE),
            ((1480, 480, 440, 130), CALIBRATE_NOTE),
            ((1980, 550, 440, 130), REPORT_NOTE),
        ),
        (_RECORD_FRAME, ((1460, -80, 480, 710), "Calibrate"), ((1960, -80, 1500, 890), "Report")),
    ),
}

STAND_IN_VALUES: Mapping[str, Mapping[str, Any]] = {
    "8": {"width": 128, "height": 128},
    "9": {"steps": 12, "cfg": 2.0, "seed": 3, "control_after_generate": "fixed"},
    "5": {"text": "grinning cat face with smiling eyes"},
}
"""Values for the emoji model instead of Flux.1-dev's."""

SETTINGS: Mapping[str, Any] = {
    "Comfy.TutorialCompleted": True,
    "Comfy.Minimap.Visible": False,
    "Comfy.Graph.CanvasInfo": False,
    "Comfy.Workflow.ShowMissingModelsWarning": False,
    "Comfy.VueNodes.Enabled": False,
    "Comfy.AppBuilder.VueNodeSwitchDismissed": True,
    "Comfy.NodeBadge.NodeSourceBadgeMode": "None",
}
"""No tutorial, no templates, no minimap."""


@contextmanager
def serving(work: Path) -> Iterator[str]:
    """Run ComfyUI with our pack, the stand-ins and their files; yields its address."""
    for folder in ("custom_nodes", "models/diffusion_models", "models/text_encoders", "models/vae", "input", "output"):
        (work / folder).mkdir(parents=True)
    (work / "user" / "default").mkdir(parents=True)
    (work / "user" / "default" / "comfy.settings.json").write_text(json.dumps(SETTINGS))
    for name in ("text_encoders/clip_l", "text_encoders/t5xxl_fp16", "vae/ae"):
        (work / "models" / f"{name}.safetensors").touch()
    models = work / "models" / "diffusion_models"
    write_reranged(emoji.WEIGHTS, models / "flux1-dev.safetensors", RERANGINGS["hot"])
    files = (models / "flux1-dev.safetensors", models / "flux1-dev-fp8.safetensors")
    if command(["-i", str(files[0]), "-o", str(files[1]), "--quiet"]) != 0:
        raise SystemExit("the stand-in could not be converted")
    shutil.copy(TESTS / "stand_ins.py", work / "custom_nodes")
    pack.install(pack.find(work)[0])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    python = os.environ.get("COMFYUI_PYTHON", sys.executable)
    flags = ["--cpu", "--supports-fp8-compute", "--listen", "127.0.0.1", "--port", str(port), "--disable-api-nodes",
             "--database-url", "sqlite:///:memory:"]  # fmt: skip
    server = subprocess.Popen([python, TESTS / "driver.py", os.environ["COMFYUI_DIR"], work, *flags])
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(300):
            if server.poll() is not None:
                raise SystemExit((work / "log").read_text()[-4000:])
            try:
                urllib.request.urlopen(address, timeout=10).close()
                break
            except urllib.error.URLError:
                time.sleep(0.3)
        yield address
    finally:
        server.terminate()
        server.wait()


@contextmanager
def editor(address: str) -> Iterator[Page]:
    """The frontend in a browser, loaded."""
    flags = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=os.environ.get("CHROMIUM", shutil.which("chromium")), args=flags
        )
        page = browser.new_page(viewport={"width": WIDTH, "height": 900}, device_scale_factor=1.5)
        page.goto(address, wait_until="load")
        page.wait_for_function("window.app?.extensionManager && document.querySelector('canvas')", timeout=60_000)
        page.wait_for_timeout(4000)
        yield page
        browser.close()


def as_graph(page: Page, api: Mapping[str, Any], drawing: Drawing) -> dict[str, Any]:
    """A workflow in API format as the frontend would save it, laid out."""
    page.evaluate("api => window.app.loadApiJson(api, 'workflow')", api)
    page.wait_for_timeout(1500)
    graph: dict[str, Any] = page.evaluate("() => window.app.graph.serialize()")
    for node in graph["nodes"]:
        x, y, width, height = drawing.places[str(node["id"])]
        node["pos"], node["size"] = [x, y], [width, height]
        node["title"] = api[str(node["id"])]["_meta"]["title"]
    for (x, y, width, height), text in drawing.notes:
        graph["last_node_id"] += 1
        note = {"id": graph["last_node_id"], "type": "MarkdownNote", "title": "What to do", "widgets_values": [text]}
        drawn = {"pos": [x, y], "size": [width, height], "color": "#432", "bgcolor": "#653"}
        graph["nodes"].append({**note, **drawn, "flags": {}, "order": 0, "mode": 0, "inputs": [], "outputs": []})
    graph["groups"] = [
        {"id": number, "title": title, "bounding": list(box), "color": "#3f789e", "font_size": 22, "flags": {}}
        for number, (box, title) in enumerate(drawing.frames, 1)
    ]
    graph["extra"] = {}
    found: dict[str, Any] = without_empty(graph)
    return found


def without_empty(value: Any) -> Any:
    """The same without null values, except for missing links, which the frontend writes as null."""
    if isinstance(value, dict):
        return {k: without_empty(v) for k, v in value.items() if v is not None or k in ("link", "links")}
    return [without_empty(item) for item in value] if isinstance(value, list) else value


def missing_nodes(page: Page) -> list[str]:
    """Node types that the frontend does not know."""
    found: list[str] = page.evaluate(
        "() => window.app.graph.nodes.filter(node => node.has_errors).map(node => node.type)"
    )
    return found


def sent_by(page: Page) -> dict[str, Any]:
    """The workflow that the frontend would send to the server."""
    return without_titles(page.evaluate("() => window.app.graphToPrompt()")["output"])


def without_titles(api: Mapping[str, Any]) -> dict[str, Any]:
    """A workflow in API format without titles."""
    return {key: {"class_type": node["class_type"], "inputs": node["inputs"]} for key, node in api.items()}


def show(page: Page, graph: Mapping[str, Any], name: str = "workflow") -> None:
    """Open a graph under a name."""
    page.evaluate("([graph, name]) => window.app.loadGraphData(graph, true, true, name)", [graph, name])
    page.wait_for_timeout(1500)


def run(page: Page, address: str, values: Mapping[str, Mapping[str, Any]] = STAND_IN_VALUES) -> None:
    """Set widgets, press Run, and wait until the server is done."""
    page.evaluate(
        """values => {
           for (const [id, named] of Object.entries(values))
             for (const widget of window.app.graph.getNodeById(id)?.widgets ?? [])
               if (widget.name in named) widget.value = named[widget.name] }""",
        values,
    )
    before = len(history(address))
    page.evaluate("() => window.app.queuePrompt(0, 1)")
    for _ in range(600):
        if len(history(address)) > before:
            break
        page.wait_for_timeout(300)
    last = list(history(address).values())[-1]
    if last["status"]["status_str"] != "success":
        raise SystemExit(json.dumps(last["status"], indent=1))
    page.wait_for_timeout(2500)


def history(address: str) -> dict[str, Any]:
    """The server's finished runs."""
    with urllib.request.urlopen(f"{address}/history", timeout=60) as answer:
        found: dict[str, Any] = json.load(answer)
    return found


def screenshot(page: Page, name: str, box: Box) -> None:
    """Save an image of a box of the graph, in a window of the necessary height."""
    left, top, right, bottom = 75, 95, 20, 65  # room for the window's bars
    scale = (WIDTH - left - right) / box[2]
    page.set_viewport_size({"width": WIDTH, "height": round(box[3] * scale) + top + bottom})
    page.evaluate(
        """([x, y, scale, left, top]) => {
           const ds = window.app.canvas.ds;
           ds.scale = scale;
           ds.offset[0] = left / scale - x;
           ds.offset[1] = top / scale - y;
           window.app.canvas.setDirty(true, true) }""",
        [box[0], box[1], scale, left, top],
    )
    page.wait_for_timeout(7000)  # until notifications disappear
    image = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
    smaller = (image, *(image.quantize(colors, kmeans=3, dither=Image.Dither.NONE) for colors in (256, 128)))
    files = []
    for candidate in smaller:
        file = io.BytesIO()
        candidate.save(file, "PNG", optimize=True)
        files.append(file.getvalue())
    (DOCS / "images" / f"comfyui_{name}.png").write_bytes(next(file for file in files if len(file) <= LARGEST_BYTES))


SCREENSHOTS: Mapping[str, tuple[str, Box]] = {
    "record": ("flux_record", (-360, -100, 1810, 700)),
    "calibrate": ("calibrate", (-360, -100, 900, 470)),
    "report": ("report", (-40, -100, 1540, 920)),
}
"""Image -> its workflow, and a box. Each workflow runs on the files of those before it."""


def main() -> None:
    """Write all images and workflows."""
    with tempfile.TemporaryDirectory() as folder, serving(Path(folder)) as address:
        graphs = {}
        with editor(address) as page:
            for name, drawing in DRAWINGS.items():
                api = json.loads((WORKFLOWS / f"{name}_api.json").read_text(encoding="utf-8"))
                graphs[name] = as_graph(page, api, drawing)
                show(page, graphs[name])
                if missing_nodes(page) or sent_by(page) != without_titles(api):
                    raise SystemExit(f"{name}: misses {missing_nodes(page)}, would send {json.dumps(sent_by(page))}")
                text = json.dumps(graphs[name], indent=1) + "\n"
                (WORKFLOWS / f"{name}.json").write_text(text, encoding="utf-8")
        for name, (workflow, box) in SCREENSHOTS.items():
            with editor(address) as page:
                show(page, graphs[workflow], workflow)
                run(page, address)
                screenshot(page, name, box)


if __name__ == "__main__":
    main()
