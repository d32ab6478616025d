"""The nodes in ComfyUI's second form: the same as in the first, from one description."""

from __future__ import annotations

import asyncio
import math
from types import SimpleNamespace
from typing import Any

import pytest
from torch import Tensor

from convert_to_quant.comfyui_nodes import v3
from convert_to_quant.comfyui_nodes.nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS, RecordActivations
from convert_to_quant.stats import Statistics


@pytest.fixture
def classes(comfyui: Any) -> dict[str, Any]:
    """The classes that the entry point lists, by the names that workflows know."""

    async def listed() -> list[Any]:
        extension = await v3.comfy_entrypoint()
        found: list[Any] = await extension.get_node_list()
        return found

    return {one.define_schema().node_id: one for one in asyncio.run(listed())}


@pytest.mark.parametrize("name", NODE_CLASS_MAPPINGS)
def test_both_forms_say_the_same(classes: dict[str, Any], name: str) -> None:
    first: Any = NODE_CLASS_MAPPINGS[name]
    schema = classes[name].define_schema()

    assert classes.keys() == NODE_CLASS_MAPPINGS.keys()
    assert schema.display_name == NODE_DISPLAY_NAME_MAPPINGS[name]
    assert (schema.category, schema.description) == (first.CATEGORY, first.DESCRIPTION)
    assert schema.is_output_node == getattr(first, "OUTPUT_NODE", False)
    described = first.INPUT_TYPES()
    assert [one.id for one in schema.inputs] == [*described["required"], *described.get("optional", {})]
    for one in schema.inputs:
        kind, settings = described["optional" if one.optional else "required"][one.id]
        listed = {"options": kind} if isinstance(kind, list) else {}
        assert (one.kind, one.settings) == ("COMBO" if listed else kind, {**listed, **settings})
    assert [one.kind for one in schema.outputs] == list(first.RETURN_TYPES)
    assert [one.display_name for one in schema.outputs] == list(first.RETURN_NAMES)
    assert [one.tooltip for one in schema.outputs] == list(first.OUTPUT_TOOLTIPS)
    assert schema.hidden == list(described.get("hidden", {}).values())


def test_they_run_and_show_progress(
    comfyui: Any, classes: dict[str, Any], noise: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    record, save = (classes[f"ConvertToQuant{name}"] for name in ("RecordActivations", "SaveActivationStats"))
    shown: list[tuple[str, str]] = []
    server = SimpleNamespace(send_progress_text=lambda text, node: shown.append((node, text)))
    comfyui.modules.server.PromptServer.instance = server
    monkeypatch.setattr(save, "hidden", SimpleNamespace(unique_id="7"))

    model, stats = record.execute(model=comfyui.model())
    comfyui.guider(model).sample(noise)
    file = save.execute(stats=stats, latent={}, filename_prefix="a")["result"][1]

    assert shown == [("7", f"3 layers, 2 samples: {file}")]
    assert Statistics.load(comfyui.root / "output" / file) == stats.statistics()


def test_they_run_again_and_refuse_as_the_first_form_does(comfyui: Any, classes: dict[str, Any]) -> None:
    record, save, calibrate = (classes[name] for name in list(NODE_CLASS_MAPPINGS)[:3])

    assert math.isnan(record.fingerprint_inputs(reset=True))
    assert record.fingerprint_inputs(reset=False) == RecordActivations.IS_CHANGED()
    assert not hasattr(record, "validate_inputs")
    assert math.isnan(save.fingerprint_inputs())
    assert "is no file name below" in save.validate_inputs("../a")
    assert "ComfyUI lists no checkpoint" in calibrate.validate_inputs("diffusion_models/none", "", False)
