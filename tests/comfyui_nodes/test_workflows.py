"""The example workflows: our nodes as they are, and the same graph in both of ComfyUI's formats.

ComfyUI's own nodes are looked up in the real one (tests/comfyui/test_server.py).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from convert_to_quant.comfyui_nodes.nodes import NODE_CLASS_MAPPINGS

FOLDER = Path(__file__).parents[2] / "docs" / "workflows"
NAMES = sorted(path.name.removesuffix("_api.json") for path in FOLDER.glob("*_api.json"))

NOTE = "MarkdownNote"
"""Lives in the editor alone."""

WIDGETS_OF_THE_EDITOR = {"control_after_generate"}


def api(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((FOLDER / f"{name}_api.json").read_text(encoding="utf-8"))
    return found


def graph(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    return found


def test_every_workflow_is_there_in_both_formats():
    wanted = {f"{name}{ending}.json" for name in NAMES for ending in ("", "_api")}
    assert {path.name for path in FOLDER.iterdir()} == wanted
    used = {node["class_type"] for name in NAMES for node in api(name).values()}
    alone = {"ConvertToQuantSaveConditioning", "ConvertToQuantQuantizeCheckpoint"}
    assert used >= NODE_CLASS_MAPPINGS.keys() - alone


@pytest.mark.parametrize("name", NAMES)
def test_our_nodes_are_used_as_they_are(comfyui, name):
    workflow = api(name)
    used = [node for node in workflow.values() if node["class_type"] in NODE_CLASS_MAPPINGS]
    assert used
    for node in used:
        kind: Any = NODE_CLASS_MAPPINGS[node["class_type"]]
        inputs = kind.INPUT_TYPES()
        described = {**inputs["required"], **inputs.get("optional", {})}
        given = node["inputs"]
        assert inputs["required"].keys() <= given.keys() <= described.keys()
        for key, (wanted, settings) in described.items():
            if key in given and not isinstance(given[key], list) and "default" in settings:
                assert type(given[key]) is type(settings["default"])
                assert not isinstance(wanted, list) or given[key] in wanted
        for source, number in (value for value in given.values() if isinstance(value, list)):
            giver = NODE_CLASS_MAPPINGS.get(workflow[source]["class_type"])
            assert giver is None or number < len(giver.RETURN_TYPES)  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", NAMES)
def test_the_editors_file_says_what_the_servers_file_says(name):
    laid_out = graph(name)
    links = {link[0]: link for link in laid_out["links"]}
    found = {}
    for node in laid_out["nodes"]:
        if node["type"] == NOTE:
            continue
        inputs = {
            key: value
            for key, value in node.get("widgets_values_named", {}).items()
            if key not in WIDGETS_OF_THE_EDITOR
        }
        assert list(node.get("widgets_values_named", {}).values()) == node.get("widgets_values", [])
        for slot, given in enumerate(node["inputs"]):
            if given.get("link") is not None:
                number, source, output, target, at, kind = links.pop(given["link"])
                assert (number, target, at, kind) == (given["link"], node["id"], slot, given["type"])
                inputs[given["name"]] = [str(source), output]
        found[str(node["id"])] = {"class_type": node["type"], "inputs": inputs}

    assert links == {}
    assert found == {
        key: {"class_type": node["class_type"], "inputs": node["inputs"]} for key, node in api(name).items()
    }


@pytest.mark.parametrize("name", NAMES)
def test_nodes_of_a_graph_do_not_lie_on_each_other(name):
    title = 30
    boxes = [(x, y - title, x + width, y + height) for node in graph(name)["nodes"]
             for x, y, width, height in [(*node["pos"], *node["size"])]]  # fmt: skip
    for number, (left, top, right, bottom) in enumerate(boxes):
        for other in boxes[:number]:
            assert right <= other[0] or left >= other[2] or bottom <= other[1] or top >= other[3]
