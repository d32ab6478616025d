"""Statistics under one file's layer names, mapped to the layers of another file of the same model.

Statistics have the names of the model that ran. A checkpoint of the same model may have another prefix, its authors'
names where ComfyUI renames layers while loading (HunyuanVideo), or diffusers' layout, which splits fused layers.
`families` knows which layer is a part of which. Parts of a fused layer share its input, and so its statistics.

Weights are compared only under the same name: under another, their rows may be in another order.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import numpy as np
from numpy.typing import NDArray

from . import families, names
from .checkpoint import Checkpoint
from .layers import Layer, LayerTable, dequantize
from .stats import Shape, Statistics, sampled_place


def for_checkpoint(statistics: Statistics, table: LayerTable, *, force: bool = False) -> Statistics:
    """Statistics of the diffusion model's quantized layers, under their names in a checkpoint, in file order.

    Args:
        statistics: with module names, or layer names of another file of the same model.
        table: the checkpoint's layers.
        force: list missing layers in `left_out` instead of raising.

    Raises:
        StatisticsError: layers are missing; with `force`, all are.
    """
    return fitting(statistics, table, table.diffusion, force=force)


def fitting(
    statistics: Statistics, table: LayerTable, layers: Mapping[str, Layer], *, force: bool = False
) -> Statistics:
    """The same for any of a checkpoint's layers; compares a few of their weights."""
    wanted, checkpoint = {name: layer.shape for name, layer in layers.items()}, table.marks.checkpoint
    found = respell(statistics, wanted, table.prefix)
    weights = sample_weights(checkpoint, (layers[name] for name in found.weights))
    return found.for_layers(wanted, force, weights=weights, model=checkpoint.path)


def knowing_weights(statistics: Statistics, table: LayerTable) -> Statistics:
    """Statistics of a checkpoint, with a few of its weights to recognize the model."""
    layers = (layer for layer in table.linear() if layer.name in statistics.layers)
    return statistics.replace(weights=sample_weights(table.marks.checkpoint, layers))


def respell(statistics: Statistics, layers: Mapping[str, Shape], prefix: str = "") -> Statistics:
    """The statistics of those layers that were recorded under any known name.

    Args:
        statistics: of the same model.
        layers: name in a file -> [out, in].
        prefix: of the diffusion model in that file.

    Returns:
        Statistics under the names given, in their order.
    """
    _, bare = names.strip_prefix(statistics.layers)
    originals = {name: original for original, name in bare.items()} | {name: name for name in statistics.layers}
    recorded = {name: statistics.layers[original] for name, original in originals.items()}
    wanted = {names.unwrap(name.removeprefix(prefix)): shape for name, shape in layers.items()}
    found = _same_inputs(recorded, wanted)
    sources = {name: originals[found[own]] for name, own in zip(layers, wanted, strict=True) if own in found}
    sources |= {name: name for name, shape in layers.items() if statistics.layers.get(name) == shape}
    sources = {name: sources[name] for name in layers if name in sources}
    facts = dict(statistics.provenance)
    if "depends_on_conditioning" in facts:
        moving = set(facts["depends_on_conditioning"])
        facts["depends_on_conditioning"] = tuple(sorted(name for name, source in sources.items() if source in moving))
    numbers = [statistics.index(source) for source in sources.values()]
    return statistics.replace(
        layers={name: layers[name] for name in sources},
        weights={
            name: statistics.weights[sources[name]]
            for name, own in zip(layers, wanted, strict=True)
            if name in sources and sources[name] in statistics.weights and sources[name] in (name, originals.get(own))
        },
        provenance=facts,
        **statistics.columns(numbers),
    )


def _same_inputs(recorded: Mapping[str, Shape], wanted: Mapping[str, Shape]) -> dict[str, str]:
    """Wanted layer -> a recorded layer with the same input: itself, or else a whole or a part of it."""
    found = {name: name for name, shape in wanted.items() if recorded.get(name) == shape}
    if len(found) < len(wanted):
        for name, target in families.diffusers_targets(recorded).items():
            if wanted.get(name) == _shape(recorded, target):
                found.setdefault(name, target.layer)
    if len(found) < len(wanted):
        for name, target in families.diffusers_targets(wanted).items():
            if recorded.get(name) == _shape(wanted, target):
                found.setdefault(target.layer, name)
    return found


def _shape(layers: Mapping[str, Shape], target: families.Target) -> Shape:
    """[out, in] of a part of a layer."""
    out_features, in_features = layers[target.layer]
    if target.rows is not None:
        out_features = target.rows[1] - target.rows[0]
    return out_features, in_features


def sample_weights(checkpoint: Checkpoint, layers: Iterable[Layer]) -> dict[str, NDArray[np.float32]]:
    """A few real weights per layer, to recognize the model (`stats.sampled_place`): float32 [64].

    Layers whose sample is empty or not finite are left out.
    """
    samples = {}
    for layer in layers:
        if math.prod(layer.shape):
            row, columns = sampled_place(layer.shape)
            sample = dequantize(checkpoint, layer, slice(row, row + 1))[0, columns]
            if np.isfinite(sample).all():
                samples[layer.name] = sample
    return samples
