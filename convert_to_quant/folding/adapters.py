"""Makes LoRA files fit a folded checkpoint, exactly.

A folded weight is W' = diag(r) W diag(1 / c), with r for the channels that it produces and c for those that it reads.
The change by an adapter must be scaled likewise: diag(r) B A diag(1 / c). So B's rows are multiplied and A's columns
divided by powers of two.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from .. import names
from ..checkpoint import Checkpoint
from ..errors import CheckpointError, LoraError
from ..layers import find_layers
from ..layout import lay_out, write
from ..lora import Lora, folding_of, match_loras
from ..telling import Advance, plural
from .folded import Folded, Scaling, none, read_groups

ENDINGS = ("", names.WEIGHT, names.BIAS)


def fold_lora(lora: Lora, like: Checkpoint, output: Path | None, *, progress: Advance | None = None) -> str:
    """Write an adapter for the original checkpoint so that it fits the folded one; without an output, only check it.

    Returns:
        One line: how many of the adapters were scaled.

    Raises:
        CheckpointError: the checkpoint is not folded.
        LoraError: the adapter is already folded, matches nothing, or changes a folded layer in an unknown way.
        OutputError: the output cannot be written.
    """
    groups = read_groups(like)
    if not groups:
        raise CheckpointError("its channels are not folded, so LoRAs fit it unchanged", path=like.path)
    if names.FOLDED_FOR_KEY in lora.checkpoint.metadata:
        raise LoraError("it is already folded", path=lora.path, hint="use the original")
    table = find_layers(like)
    shapes = {name: info.shape for name, info in like.tensors.items()}
    shapes |= {layer + names.WEIGHT: shape for layer, shape in table.shapes().items()}
    model, folded = Scaling.of(groups, table.prefix, shapes), Scaling()
    others = {name: shapes[name] for name in model.rows if len(shapes[name]) == 1}
    match = match_loras([lora], table.shapes(), others=others)

    def refuse(name: str, changed: str, why: str) -> LoraError:
        problem = f"it changes {changed}, which is folded, and cannot be converted: {why}"
        return LoraError(problem, path=lora.path, tensor=name)

    for finding in match.left:
        if any(layer + ending in {*model.rows, *model.columns} for layer in finding.layers for ending in ENDINGS):
            raise refuse(finding.name, finding.layers[0], finding.reason)
    for tensor, additions in match.beside.items():
        raise refuse(additions[0].tensor, tensor, "the change is of a bias or norm")
    for layer, deltas in match.matched.items():
        height, width = table.shapes()[layer]
        rows = model.rows.get(layer + names.WEIGHT, none(height))
        columns = model.columns.get(layer + names.WEIGHT, none(width))
        for delta in deltas:
            adapter = delta.adapter
            own = rows[slice(*delta.span(len(rows)))]
            if not (own.any() or columns.any()):
                continue
            if adapter.directions is None or adapter.magnitude_tensor is not None:
                kind = "DoRA" if adapter.magnitude_tensor else adapter.kind.title
                raise refuse(adapter.name, layer, f"{kind} is not supported")
            own = np.roll(own, len(own) // 2) if delta.target.swap_halves else own
            down, up = adapter.directions.tensor, adapter.change.tensor
            if down in folded.columns and (folded.columns[down] != columns).any():
                raise refuse(adapter.name, layer, "the layers that it changes read different channels")
            part = slice(delta.target.first, delta.target.first + len(own))
            folded.rows.setdefault(up, none(adapter.change.shape[0]))[part] = own
            folded.columns[down] = columns
    adapters = [delta.adapter for deltas in match.matched.values() for delta in deltas]
    scaled = sum(adapter.change.tensor in folded.rows for adapter in adapters)
    if output is not None:
        metadata = {**lora.checkpoint.metadata, names.FOLDED_FOR_KEY: folding_of(like) or ""}
        view = Folded(lora.checkpoint, folded, metadata)
        write(view, lay_out(view, {}, (), metadata), output, progress=progress)
    return f"{scaled} of {plural(len(adapters), 'adapter')} scaled for {like.path.name}"
