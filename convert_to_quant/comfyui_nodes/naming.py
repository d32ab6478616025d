"""Statistics by ComfyUI's module names, put onto the layers of a checkpoint file.

Most families load under their own names, so a name is its own. ComfyUI renames HunyuanVideo's layers and fuses those of
files in diffusers' layout while it loads them. The table that knows such spellings (`names`) is asked what part of
which recorded layer a name in the file means. Parts of a fused layer share its input, so they share its statistics.
"""

from __future__ import annotations

from .. import names
from ..layers import Layer, LayerTable
from ..stats import COLUMNS, Statistics


def for_checkpoint(statistics: Statistics, table: LayerTable) -> tuple[Statistics, tuple[str, ...]]:
    """Statistics by the names and shapes of a checkpoint's FP8 layers.

    Args:
        statistics: by module names, or by the layer names of another file of the same model.
        table: the checkpoint's layers.

    Returns:
        The statistics of the layers that were found, in file order, and the names of the diffusion model's FP8 layers
        that were not. Text encoders in the same file are in neither: nothing reads their input scales.
    """
    _, bare = names.strip_prefix(statistics.layers)
    recorded = {name: original for original, name in bare.items()}
    targets = names.diffusers_targets({name: statistics.layers[original] for name, original in recorded.items()})
    sources: dict[str, str] = {}
    missing = []
    for layer in table.quantized.values():
        if not layer.name.startswith(table.prefix):
            continue
        name = layer.name.removeprefix(table.prefix)
        target = names.Target(name) if name in recorded else targets.get(name)
        if target is not None and _shape(statistics, recorded[target.layer], target) == _shape_of(layer):
            sources[layer.name] = recorded[target.layer]
        else:
            missing.append(layer.name)
    numbers = [statistics.index(source) for source in sources.values()]
    moving = set(statistics.provenance.get("depends_on_conditioning", ()))
    facts = dict(statistics.provenance)
    if moving:
        facts["depends_on_conditioning"] = tuple(sorted(name for name, source in sources.items() if source in moving))
    found = statistics.replace(
        layers={name: _shape_of(table.quantized[name]) for name in sources},
        provenance=facts,
        **{column: getattr(statistics, column)[numbers] for column in COLUMNS},
    )
    return found, tuple(missing)


def _shape(statistics: Statistics, layer: str, target: names.Target) -> tuple[int, int]:
    """[out, in] of the part of a recorded layer."""
    out_features, in_features = statistics.layers[layer]
    if target.rows is not None:
        out_features = target.rows[1] - target.rows[0]
    return out_features, in_features


def _shape_of(layer: Layer) -> tuple[int, int]:
    return layer.out_features, layer.in_features
