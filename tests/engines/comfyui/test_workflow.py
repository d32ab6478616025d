"""Workflows as graphs: which models, prompts and seeds are found, where our nodes go, and what stays as it was."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
from comfyui_server import node

from convert_to_quant.comfyui_nodes.nodes import NODE_CLASS_MAPPINGS, RecordActivations, SaveActivationStats
from convert_to_quant.engines.comfyui import workflow
from convert_to_quant.engines.comfyui.workflow import Model, NodeType, Place, Plan, parse, plain, plan
from convert_to_quant.errors import CalibrationError

Nodes = dict[str, Any]
Types = dict[str, NodeType]

RECORD, SAVE = "convert_to_quant_record_1", "convert_to_quant_save_1"


def sampler(model: list[Any], positive: list[Any], latent: list[Any], **more: Any) -> dict[str, Any]:
    """A KSampler."""
    return node("KSampler", model=model, positive=positive, negative=["no", 0], latent_image=latent, seed=1, steps=3,
                cfg=1.0, sampler_name="euler", scheduler="simple", **more)  # fmt: skip


BASE = {
    "load": node("CheckpointLoaderSimple", ckpt_name="flux.safetensors"),
    "yes": node("CLIPTextEncode", clip=["load", 1], text="a cat"),
    "no": node("CLIPTextEncode", clip=["load", 1], text="ugly"),
    "size": node("EmptyLatentImage", width=64, height=64, batch_size=1),
}


def found(nodes: Nodes, types: Types) -> Plan:
    """The plan of a workflow, which it leaves as it is."""
    before = copy.deepcopy(nodes)
    made = plan(nodes, types)
    assert nodes == before
    return made


def samplers(plan: Plan) -> tuple[str, ...]:
    """All that are recorded, each once."""
    return tuple(dict.fromkeys(sampler for model in plan.models for sampler in model.samplers))


def sources(plan: Plan) -> list[tuple[str, ...]]:
    """The loaders of each model."""
    return [model.loaders for model in plan.models]


def recorded(plan: Plan) -> list[str]:
    """The nodes whose MODELs are recorded."""
    return [said["inputs"]["model"][0] for said in plan.nodes.values() if said["class_type"] == workflow.RECORD]


def test_the_nodes_are_called_as_our_pack_calls_them():
    assert NODE_CLASS_MAPPINGS[workflow.RECORD] is RecordActivations
    assert NODE_CLASS_MAPPINGS[workflow.SAVE] is SaveActivationStats
    assert all(name.startswith(workflow.OURS) for name in NODE_CLASS_MAPPINGS)


def test_a_recorder_goes_between_the_loras_and_the_sampler(flux, types):
    made = found(flux, types)

    assert made.models == (Model("flux", ("1",), ("9",), (SAVE,)),)
    queued = made.queued("session", "folder")
    assert queued[RECORD]["inputs"] == {"model": ["4", 0], "recording": "session"}
    assert queued[SAVE]["inputs"] == {"stats": [RECORD, 1], "latent": ["9", 0], "filename_prefix": "folder/flux"}
    assert queued["9"]["inputs"]["model"] == [RECORD, 0]


def test_nothing_else_changes_and_only_what_sampling_needs_is_queued(flux, types):
    made = found(flux, types)
    queued = made.queued("session", "folder")

    assert made.left_out() == ("3", "10", "11")  # VAE, decoding, saving
    kept = {name: flux[name] for name in flux if name not in made.left_out()}
    kept["9"] = {**flux["9"], "inputs": {**flux["9"]["inputs"], "model": [RECORD, 0]}}
    assert {name: queued[name] for name in queued if name not in (RECORD, SAVE)} == kept


def test_a_run_has_its_prompt_and_seed_and_the_plan_stays(flux, types):
    made = found(flux, types)
    assert (made.texts, made.seeds) == ((Place("5", "text"),), (Place("9", "seed"),))

    queued = made.queued("session", "folder", "a dog", 7)

    assert queued["5"]["inputs"]["text"] == "a dog"
    assert queued["9"]["inputs"]["seed"] == 7
    assert queued["7"]["inputs"]["text"] == "blurry"
    again = made.queued("session", "folder")
    assert (again["5"]["inputs"]["text"], again["9"]["inputs"]["seed"]) == ("a lighthouse", 1)


def test_a_guider_is_where_the_model_goes_in(types):
    nodes = {
        **BASE,
        "guide": node("BasicGuider", model=["load", 0], conditioning=["yes", 0]),
        "noise": node("RandomNoise", noise_seed=3),
        "sigmas": node("BasicScheduler", model=["load", 0], scheduler="simple", steps=4),
        "select": node("KSamplerSelect", sampler_name="euler"),
        "sample": node("SamplerCustomAdvanced", noise=["noise", 0], guider=["guide", 0], sampler=["select", 0],
                       sigmas=["sigmas", 0], latent_image=["size", 0]),
    }  # fmt: skip
    made = found(nodes, types)

    assert samplers(made) == ("sample",)
    queued = made.queued("session", "folder")
    assert queued["guide"]["inputs"]["model"] == [RECORD, 0]
    assert queued["sigmas"]["inputs"]["model"] == ["load", 0]
    assert (made.texts, made.seeds) == ((Place("yes", "text"),), (Place("noise", "noise_seed"),))


def test_a_model_for_the_negative_prompt_alone_is_left_alone(types):
    nodes = {
        **BASE,
        "other": node("UNETLoader", unet_name="wan_low.safetensors", weight_dtype="default"),
        "guide": node("DualModelGuider", model=["load", 0], positive=["yes", 0], negative=["no", 0], cfg=2.0,
                      model_negative=["other", 0]),
        "noise": node("DisableNoise"),
        "sample": node("SamplerCustomAdvanced", noise=["noise", 0], guider=["guide", 0], latent_image=["size", 0]),
    }  # fmt: skip
    made = found(nodes, types)

    assert sources(made) == [("load",)]
    assert made.queued("", "")["guide"]["inputs"]["model_negative"] == ["other", 0]
    assert made.seeds == ()


@pytest.mark.parametrize(
    ("kind", "inputs"),
    [
        ("AddNoise", {"model": ["load", 0], "noise": ["noise", 0], "latent_image": ["size", 0]}),
        ("WanInfiniteTalkToVideo", {"model": ["load", 0], "positive": ["yes", 0], "negative": ["no", 0]}),
    ],
)
def test_what_only_prepares_sampling_is_no_sampler(types, kind, inputs):
    nodes = {**BASE, "noise": node("RandomNoise", noise_seed=3), "prepare": node(kind, **inputs)}
    slot = types[kind].outputs.index("LATENT")

    assert samplers(found({**nodes, "sample": sampler(["load", 0], ["yes", 0], ["prepare", slot])}, types)) == (
        "sample",
    )
    with pytest.raises(CalibrationError, match="no sampler"):
        plan(nodes, types)


def test_a_sampler_that_passes_its_model_on_is_one(types):
    one = node("KSampler (Efficient)", model=["load", 0], seed=1, positive=["yes", 0], negative=["no", 0],
               latent_image=["size", 0])  # fmt: skip
    made = found({**BASE, "sample": one}, types)
    assert samplers(made) == ("sample",)
    assert made.queued("", "")[SAVE]["inputs"]["latent"] == ["sample", 1]


def test_one_recorder_is_saved_behind_its_last_sampler(types):
    nodes = {
        **BASE,
        "first": sampler(["load", 0], ["yes", 0], ["size", 0]),
        "second": sampler(["load", 0], ["yes", 0], ["first", 0]),
    }
    (model,) = found(nodes, types).models
    assert (model.samplers, model.saves) == (("first", "second"), (SAVE,))
    assert found(nodes, types).queued("", "")[SAVE]["inputs"]["latent"] == ["second", 0]

    nodes["second"]["inputs"]["latent_image"] = ["size", 0]
    assert len(found(nodes, types).models[0].saves) == 2


def lora(model: str) -> dict[str, Any]:
    return node("LoraLoaderModelOnly", model=[model, 0], lora_name="style.safetensors", strength_model=1.0)


def switch(off: str, on: str) -> dict[str, Any]:
    return node("ComfySwitchNode", switch=True, on_false=[off, 0], on_true=[on, 0])


@pytest.mark.parametrize(
    ("nodes", "loaders", "before"),
    [
        ({"way": lora("load"), "first": sampler(["load", 0], ["yes", 0], ["size", 0])}, ("load",), ["way", "load"]),
        ({"way": node("ModelMergeSimple", model1=["load", 0], model2=["other", 0], ratio=0.5)}, ("load", "other"),
         ["way"]),
        ({"way": switch("load", "other")}, ("load", "other"), ["way"]),
        ({"way": switch("inner", "inner"), "inner": switch("load", "other")}, ("load", "other"), ["way"]),
        ({"way": lora("inner"), "inner": lora("way")}, ("way",), ["way"]),
    ],
    ids=["with and without a LoRA", "merge", "switch", "switch of a switch", "a cycle, which the server rejects"],
)  # fmt: skip
def test_one_model_is_recorded_whatever_its_way_to_samplers(types, nodes, loaders, before):
    other = node("UNETLoader", unet_name="wan_low.safetensors", weight_dtype="default")
    made = found({**BASE, "other": other, "sample": sampler(["way", 0], ["yes", 0], ["size", 0]), **nodes}, types)
    assert (sources(made), recorded(made)) == ([loaders], before)


def test_models_of_one_file_name_keep_apart(wan, types):
    wan["1"]["inputs"]["unet_name"] = "high\\Model.GGUF"
    wan["2"]["inputs"]["unet_name"] = "low/model.safetensors"
    assert [model.name for model in found(wan, types).models] == ["Model", "model_2"]


def test_a_file_name_cannot_lead_anywhere(flux, types):
    flux["1"]["inputs"]["unet_name"] = "../../\x1b[2J..\\evil name?.safetensors"
    (model,) = found(flux, types).models
    assert model.name == "evil_name"
    assert plain("." * 300 + "x" * 300) == "x" * 100


# Prompts


@pytest.mark.parametrize(
    ("nodes", "texts"),
    [
        ({"way": node("CLIPTextEncodeFlux", clip=["load", 1], clip_l="a", t5xxl="a", guidance=3.0)},
         [("way", "clip_l"), ("way", "t5xxl")]),
        ({"way": node("CLIPTextEncodeSDXL", clip=["load", 1], width=64, text_g="a", text_l="a")},
         [("way", "text_g"), ("way", "text_l")]),
        ({"way": node("TextEncodeBooguEdit", clip=["load", 1], prompt="a", negative_prompt="b")}, [("way", "prompt")]),
        ({"way": node("ConditioningCombine", conditioning_1=["yes", 0], conditioning_2=["more", 0]),
          "more": node("CLIPTextEncode", clip=["load", 1], text="b")}, [("yes", "text"), ("more", "text")]),
        ({"way": node("ControlNetApplyAdvanced", positive=["yes", 0], negative=["no", 0], strength=1.0)},
         [("yes", "text")]),
        ({"way": node("GLIGENTextBoxApply", conditioning_to=["yes", 0], clip=["load", 1], text="box", width=3)},
         [("way", "text"), ("yes", "text")]),
        ({"way": node("WanTrackToVideo", positive=["yes", 0], negative=["no", 0], tracks="[[1, 2]]")},
         [("yes", "text")]),
        ({"way": node("ComfySwitchNode", switch=True, on_false=["yes", 0], on_true=["more", 0]),
          "more": node("CLIPTextEncode", clip=["load", 1], text="b")}, [("yes", "text"), ("more", "text")]),
    ],
    ids=lambda value: value["way"]["class_type"] if isinstance(value, dict) else "",
)  # fmt: skip
def test_prompts_are_found_on_the_positive_way(types, nodes, texts):
    made = found({**BASE, **nodes, "sample": sampler(["load", 0], ["way", 0], ["size", 0])}, types)
    assert [(place.node, place.input) for place in made.texts] == texts


def test_a_prompt_from_a_text_node_is_replaced_where_it_is_encoded(types):
    nodes = {
        **BASE,
        "words": node("PrimitiveStringMultiline", value="a cat"),
        "yes": node("CLIPTextEncode", clip=["load", 1], text=["words", 0]),
        "no": node("CLIPTextEncode", clip=["load", 1], text=["words", 0]),
        "sample": sampler(["load", 0], ["yes", 0], ["size", 0]),
    }
    made = found(nodes, types)

    assert made.queued("", "")["yes"]["inputs"]["text"] == ["words", 0]
    queued = made.queued("", "", "a dog")
    assert queued["yes"]["inputs"]["text"] == "a dog"
    assert queued["no"]["inputs"]["text"] == ["words", 0]


def test_a_negative_made_of_the_positive_is_no_reason_to_leave_it(types):
    nodes = {**BASE, "no": node("ConditioningZeroOut", conditioning=["yes", 0]),
             "sample": sampler(["load", 0], ["yes", 0], ["size", 0])}  # fmt: skip
    assert found(nodes, types).texts == (Place("yes", "text"),)


def test_a_negative_output_is_not_followed(types):
    nodes = {**BASE, "edit": node("TextEncodeBooguEdit", clip=["load", 1], prompt="a", negative_prompt="b"),
             "sample": sampler(["load", 0], ["edit", 1], ["size", 0])}  # fmt: skip
    assert found(nodes, types).texts == ()


def test_a_linked_seed_is_replaced_where_it_is_used(types):
    nodes = {**BASE, "number": node("PrimitiveInt", value=5), "sample": sampler(["load", 0], ["yes", 0], ["size", 0])}
    nodes["sample"]["inputs"]["seed"] = ["number", 0]
    made = found(nodes, types)
    assert made.seeds == (Place("sample", "seed"),)
    assert "number" not in made.queued("", "", seed=3)


# Workflows that have our nodes, or cannot be used


def test_our_own_nodes_are_taken_out_first(flux, types):
    plain_plan = found(flux, types)
    ours = copy.deepcopy(flux)
    ours["20"] = node(workflow.RECORD, model=["1", 0], statistics_file="old", reset=True)
    ours["4"]["inputs"]["model"] = ["20", 0]
    ours["21"] = node(workflow.RECORD, model=["4", 0])
    ours["9"]["inputs"]["model"] = ["21", 0]
    ours["22"] = node(workflow.SAVE, stats=["21", 1], latent=["9", 0], filename_prefix="stats")
    ours["23"] = node("ConvertToQuantCalibrateFP8Checkpoint", checkpoint="x", stats=["22", 0])

    assert found(ours, types).queued("s", "f") == plain_plan.queued("s", "f")


def test_ids_of_new_nodes_are_new(flux, types):
    flux[RECORD] = node("VAELoader", vae_name="ae.safetensors")
    assert "convert_to_quant_record_2" in found(flux, types).queued("", "")


def test_a_circle_ends(types):
    nodes = {**BASE, "a": sampler(["load", 0], ["yes", 0], ["b", 0]), "b": sampler(["load", 0], ["yes", 0], ["a", 0])}
    assert samplers(found(nodes, types)) == ("a", "b")


@pytest.mark.parametrize("output", ["-1", "-5"])
def test_an_output_that_no_node_has_is_no_link(flux, types, output):
    flux["4"]["inputs"]["model"] = ["1", "OUTPUT"]
    nodes = parse(json.dumps(flux).replace('"OUTPUT"', output))
    assert sources(found(nodes, types)) == [("4",)]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "w.json: not JSON .*File > Export"),
        ("[" * 100_000, "w.json: not JSON .*File > Export"),
        ("[]", "w.json: not a workflow: expected a JSON object of nodes"),
        ("{}", "w.json: not a workflow"),
        ('{"last_node_id": 3, "nodes": [], "links": []}', "format of ComfyUI's editor.*File > Export"),
        ('{"1": {"class_type": "KSampler"}}', "w.json: node 1: not a node: expected class_type and inputs"),
        ('{"1": 3}', "w.json: node 1: not a node"),
        ('{"1": {"class_type": "VAEDecode", "inputs": {"samples": ["2", 0]}}}',
         r"w.json: node 1 \(VAEDecode\): its input samples is linked to node 2, which is missing"),
    ],
)  # fmt: skip
def test_what_is_no_workflow_in_api_format_is_refused(text, said):
    with pytest.raises(CalibrationError, match=said):
        parse(text, "w.json")


def test_no_sampler_is_told_with_what_is_unknown(flux, types):
    flux["9"]["class_type"] = "Magic\x1bSampler"
    with pytest.raises(
        CalibrationError, match=r"w.json: no sampler: .*missing custom nodes on the server: Magic\\x1bSampler"
    ):
        plan(flux, types, "w.json")


def test_an_unknown_node_matters_only_where_it_is_needed(flux, types):
    flux["11"]["class_type"] = "FancySave"
    assert samplers(found(flux, types)) == ("9",)

    flux["4"]["class_type"] = "FancyLora"
    with pytest.raises(
        CalibrationError, match=r"w.json: node 4 \(FancyLora\): the server has no node of type FancyLora"
    ):
        plan(flux, types, "w.json")


@pytest.mark.parametrize(
    "change", [lambda info: info["input"].update(required=None), lambda info: info.pop("output_name")]
)
def test_types_are_read_from_what_servers_leave_out(change):
    text = ["STRING", {"multiline": True}]
    info = {"input": {"required": {"a": ["INT"], "b": [["x", "y"]]}, "optional": {"c": text}},
            "output": ["MODEL", ["x"]], "output_name": ["a", "b"]}  # fmt: skip
    change(info)
    kind = NodeType.read(info)
    assert kind.inputs["c"].options == {"multiline": True}
    assert kind.outputs == ("MODEL", "COMBO")
    assert len(kind.output_names) == 2
