"""Quantized checkpoints rewritten without rounding: in BF16, or with other quantization configs."""

from __future__ import annotations

import numpy as np

from . import names
from .checkpoint import Checkpoint, Spec
from .convert import provenance, provenance_room
from .errors import TensorError
from .formats.record import Packed, narrow_bfloat16, spans
from .layers import Layer, dequantize, find_layers, named
from .layout import Job, Layout, Sink, Tensors, beside, config_of, lay_out, mark_once, remark
from .quantize import rows_at_a_time
from .telling import plural


def plan_bfloat16(checkpoint: Checkpoint) -> tuple[Layout, list[Job], str]:
    """Plan to dequantize every readable layer to BF16.

    Args:
        checkpoint: the quantized checkpoint.

    Returns:
        The layout and jobs for `layout.write`, and a summary in words.

    Raises:
        TensorError: no layer can be dequantized; a layer has no quantization config, and its tensors fit several
            formats.
    """
    table = find_layers(checkpoint)
    layers = [*table.quantized.values(), *table.raw.values()]
    if not layers:
        problem = "nothing to dequantize: no layer is quantized in a supported format"
        raise TensorError(problem, path=checkpoint.path)
    dropped: set[str] = set() if any(name in table.marks.legacy for name in table.foreign) else table.marks.markers
    for layer in table.quantized.values():
        config_of(checkpoint, table, layer)
        dropped.update(beside(checkpoint, layer.name))
    made: dict[str, Tensors] = {
        layer.weight.name: {layer.weight.name: (Spec("BF16", layer.shape), None)} for layer in layers
    }
    metadata = table.marks.other_metadata
    foreign = {name: config for name, config in table.marks.header.configs.items() if name in table.foreign}
    if foreign:
        metadata.update(table.marks.fresh.once(foreign)[1])
    metadata[names.PROVENANCE_KEY] = provenance(checkpoint.metadata, dequantize={"from": named(layers)})
    done = f"{plural(len(layers), 'layer')} in {named(layers)} to BF16"
    left = f"; {len(table.foreign)} in other formats copied unchanged" if table.foreign else ""
    jobs = [_dequantizing(checkpoint, layer) for layer in layers]
    return lay_out(checkpoint, made, dropped, metadata), jobs, done + left


def _dequantizing(checkpoint: Checkpoint, layer: Layer) -> Job:
    """The job of dequantizing a layer to BF16, in bands of whole tiles of scales."""

    def work(sink: Sink) -> None:
        for band in spans(layer.out_features, rows_at_a_time(layer, Packed.ROWS)):
            sink(layer.weight.name, narrow_bfloat16(dequantize(checkpoint, layer, band)),
                 band.start * layer.in_features * 2)  # fmt: skip

    return layer.weight.nbytes, work


def plan_migration(checkpoint: Checkpoint, target: str, *, input_scales: bool = False) -> tuple[Layout, str, list[str]]:
    """Plan to rewrite the quantization configs of all layers in another convention; weights stay the same.

    Args:
        checkpoint: the quantized checkpoint.
        target: one of `names.TARGETS`.
        input_scales: add placeholder input scales, which a calibration can overwrite in place.

    Returns:
        The layout for `layout.write`, a summary in words, and notes on what the target cannot express.

    Raises:
        TensorError: no layer is quantized; the target cannot express a layer; a layer has no quantization config, and
            its tensors fit several formats.
    """
    table = find_layers(checkpoint)
    ways = table.marks.anew(target)
    made, configs, dropped = remark(checkpoint, table, ways)
    if not configs:
        hint = "convert_to_quant -i FILE -o NEW adds configs to a plain cast to FP8" if table.raw else None
        raise TensorError("nothing to migrate: no layer is quantized with a scale", path=checkpoint.path, hint=hint)
    for layer in table.static.values() if input_scales else ():
        scale, tensors = layer.name + ways[0].input_scale, made[layer.weight.name]
        if not layer.dynamic and (scale not in tensors or layer.input_problem or tensors[scale][0].dtype != "F32"):
            tensors[scale] = Spec("F32", ()), np.float32(1).tobytes()
    metadata = mark_once(made, configs, ways, table.marks.other_metadata)
    room = provenance_room(table.static if input_scales else ())
    metadata[names.PROVENANCE_KEY] = provenance(checkpoint.metadata, migrate={"to": target}) + room
    notes = list(table.notes)
    if target == "diffusers":
        scales = sum(layer.input_scale is not None for layer in table.quantized.values())
        full = sum(layer.full_precision for layer in table.quantized.values())
        lost = {"input scale": scales, "full-precision flag": full}
        left = " and ".join(plural(count, noun) for noun, count in lost.items() if count)
        notes += [f"{left} left out: diffusers scales the inputs of every layer per token"] * bool(left)
    return (
        lay_out(checkpoint, made, dropped, metadata),
        f"{plural(len(configs), 'layer')} in the {target} convention",
        notes,
    )
