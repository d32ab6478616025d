"""Repairs missing and broken quantization configs where a layer's tensors determine its format.

A config is broken if it is missing, empty, all NUL, not JSON, or names no known format. The format then follows from
the layer's other config, if header and tensor both have one, or from the dtypes and shapes of its tensors
(`layers.determined`). In place, a config is repaired in its own tensor if that has room, else in the header, which
readers prefer.
"""

from __future__ import annotations

from dataclasses import dataclass

from . import names
from .checkpoint import Checkpoint
from .errors import TensorError
from .formats import of_mark
from .layers import PLAIN_DTYPES, LayerError, LayerTable, determined, find_layers
from .marks import Config
from .patch import Patch


@dataclass(frozen=True)
class Repair:
    """The repair of one quantization config.

    Attributes:
        layer: the layer, or the header entry.
        found: what is wrong.
        becomes: the format that the config will name.
        where: where the config will be: "tensor", "header" or both.
    """

    layer: str
    found: str
    becomes: str
    where: str


def plan_repair(checkpoint: Checkpoint, *, in_place: bool) -> tuple[list[Repair], Patch]:
    """Find broken quantization configs and plan their repair.

    Args:
        checkpoint: the quantized checkpoint.
        in_place: whether no tensor may be added or grow.

    Returns:
        The repairs, and the patch that makes them.

    Raises:
        TensorError: a layer with a broken config fits several formats or none, or its scale does not have the name that
            readers of configs expect.
    """
    table = find_layers(checkpoint, collect_problems=True)
    marks = table.marks
    patch = Patch(checkpoint, metadata=dict(checkpoint.metadata))
    patch.seen.update({name: checkpoint.raw(name).tobytes() for name in marks.tensor.found})
    repairs: list[Repair] = []
    entries: dict[str, Config] = {}
    unreadable = any(isinstance(one, LayerError) and one.kind == "header-unreadable" for one in table.problems)
    if unreadable:
        repairs.append(Repair(marks.header.found[0], "cannot be read", "all layers", "header"))
    for weight in (name for name in checkpoint if name.endswith(names.WEIGHT)):
        layer = weight.removesuffix(names.WEIGHT)
        said = _said(table, layer)
        good = next((config for config, fault in said.values() if not fault), None)
        if good is not None and unreadable:
            entries[layer] = good
        places = [place for place, (_, fault) in said.items() if fault]
        if not places and (said or layer in marks.legacy or not _is_scaled(checkpoint, layer)):
            continue
        config = good or _settled(checkpoint, layer, said)
        faults = "; ".join(said[place][1] for place in places) or "no config"
        tensor = marks.tensor.changed(layer, config)
        if not places:
            places = ["header"] if in_place else ["tensor", *(["header"] if marks.header.found else [])]
            tensor = marks.tensor.beside(layer, config)
        elif in_place and any(spec.nbytes != checkpoint.tensors[name].nbytes for name, (spec, _) in tensor.items()):
            if "header" in said and "header" not in places:
                continue  # it has no room, and the header takes precedence
            places = ["header"]
        for name, (spec, data) in tensor.items() if "tensor" in places else ():
            patch.put(name, spec, data, weight)
        if "header" in places or unreadable:
            entries[layer] = config
        repairs.append(Repair(layer, faults, str(config["format"]), " and ".join(places)))
    more = {layer: config for layer, config in entries.items() if layer not in marks.header}
    changed = marks.header.changed(entries, more)
    patch.metadata.update({key: text.rstrip() if in_place and more else text for key, text in changed.items()})
    return repairs, patch


def _is_scaled(checkpoint: Checkpoint, layer: str) -> bool:
    """Whether a layer has codes with scales, so that it needs a config."""
    weight = checkpoint.tensors[layer + names.WEIGHT]
    scaled = any(layer + scale in checkpoint for scale in (*names.WEIGHT_SCALES, names.S_REL))
    return scaled and weight.dtype not in PLAIN_DTYPES and len(weight.shape) == 2


def _said(table: LayerTable, layer: str) -> dict[str, tuple[Config, str]]:
    """A layer's configs by place ("header", "tensor"), each with what is wrong with it ("" for nothing)."""
    marks, found = table.marks, {}
    if layer in marks.header:
        config = marks.header.config(layer)
        found["header"] = config, _fault(config)
    if layer in marks.tensor:
        try:
            config = marks.tensor.config(layer)
            found["tensor"] = config, _fault(config)
        except LayerError as error:
            raw = marks.checkpoint.raw(error.tensor or "")
            found["tensor"] = {}, "not JSON" if raw.any() else "all NUL" if raw.size else "empty"
    return found


def _fault(config: Config) -> str:
    """What is wrong with a config; "" for nothing."""
    said = config.get("format")
    if not isinstance(said, str):
        return "no format"
    return "" if of_mark(config) else f"unknown format ({said})"


def _settled(checkpoint: Checkpoint, layer: str, said: dict[str, tuple[Config, str]]) -> Config:
    """The config of a layer according to its tensors and what is left of its configs."""
    left = {key: value for config, _ in said.values() for key, value in config.items()}
    found = determined(checkpoint, layer, left if said else None)
    if found.weight_scale is not None and found.weight_scale not in (layer + scale for scale in found.parts):
        raise TensorError("readers of quantization configs expect this scale under another name", path=checkpoint.path,
                          tensor=found.weight_scale, hint="convert_to_quant migrate --to comfy renames it")  # fmt: skip
    return found.config
