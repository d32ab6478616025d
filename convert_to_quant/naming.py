"""Statistics by one file's layer names, put onto the layers of another file of the same model.

Names are those of the model that ran. A checkpoint of the same model may have another prefix; may be named as its
authors do where ComfyUI renames layers while it loads them (HunyuanVideo); or may be in diffusers' layout, which splits
what others fuse, or the other way round. The tables that know such spellings (`families`) say which layer is a part
of which. Parts of a fused layer share its input, so they share its statistics, and any one of them has the whole's.

Weights are compared only between layers of one name: under another spelling their rows may stand in another order.
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
    """Statistics by the names and shapes of a checkpoint's FP8 layers.

    Text encoders in the same file are left out: nothing reads their input scales.

    Args:
        statistics: by module names, or by the layer names of another file of the same model.
        table: the checkpoint's layers.
        force: take the layers that were found, and put the others into `left_out`, instead of raising.

    Returns:
        The statistics of the diffusion model's FP8 layers, in file order.

    Raises:
        StatisticsError: some layers were not found, and the message names them; with `force`, none was.
    """
    return fitting(statistics, table, table.diffusion, force=force)


def fitting(
    statistics: Statistics, table: LayerTable, layers: Mapping[str, Layer], *, force: bool = False
) -> Statistics:
    """The same for some of a checkpoint's layers, quantized or not; some of their weights are read and compared."""
    wanted, checkpoint = {name: layer.shape for name, layer in layers.items()}, table.marks.checkpoint
    found = respell(statistics, wanted, table.prefix)
    weights = sample_weights(checkpoint, (layers[name] for name in found.weights))
    return found.for_layers(wanted, force, weights=weights, model=checkpoint.path)


def knowing_weights(statistics: Statistics, table: LayerTable) -> Statistics:
    """Statistics that were observed of a checkpoint, with a few of its weights, which tell its model from others."""
    layers = (layer for layer in table.linear() if layer.name in statistics.layers)
    return statistics.replace(weights=sample_weights(table.marks.checkpoint, layers))


def respell(statistics: Statistics, layers: Mapping[str, Shape], prefix: str = "") -> Statistics:
    """The statistics of those of these layers that were recorded under any spelling that is known.

    Args:
        statistics: of the same model.
        layers: name in a file -> [out, in].
        prefix: of the diffusion model in that file; every name carries it.

    Returns:
        Statistics by the names given, in their order.
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
    """For each wanted layer, one that was recorded and receives the same: itself, or else a whole or a part of it."""
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
    """A few real weights of layers, by which statistics know their model again: see `stats.sampled_place`.

    Args:
        checkpoint: where they are.
        layers: of `LayerTable.linear()`.

    Returns:
        By name, float32 [64]; without those that are empty or not finite.
    """
    samples = {}
    for layer in layers:
        if math.prod(layer.shape):
            row, columns = sampled_place(layer.shape)
            sample = dequantize(checkpoint, layer, slice(row, row + 1))[0, columns]
            if np.isfinite(sample).all():
                samples[layer.name] = sample
    return samples
