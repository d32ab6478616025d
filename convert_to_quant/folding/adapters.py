"""LoRA files made to fit a folded checkpoint, exactly.

A folded weight is W' = diag(r) W diag(1 / c), with r for the channels that it gives and c for those that it reads. What
an adapter adds must be scaled likewise: diag(r) B A diag(1 / c). So B's rows are multiplied and A's columns divided, by
powers of two.
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
from .folded import Folded, Scaling, read_groups


def fold_lora(lora: Lora, like: Checkpoint, output: Path | None, *, progress: Advance | None = None) -> str:
    """Write an adapter as it has to be for a folded checkpoint.

    Args:
        lora: made for the original.
        like: the folded checkpoint.
        output: the new file; None to write nothing.
        progress: told how many bytes were done.

    Returns:
        One line: how many adapters, and how many of them were scaled.

    Raises:
        CheckpointError: the checkpoint is not folded.
        LoraError: the adapter is folded already, matches nothing, or changes a folded layer in a way that is not
            known here.
        OutputError: the output cannot be written.
    """
    groups = read_groups(like)
    if not groups:
        raise CheckpointError("its channels are not folded, so LoRAs fit it as they are", path=like.path)
    if names.FOLDED_FOR_KEY in lora.checkpoint.metadata:
        raise LoraError("it is folded already", path=lora.path, hint="give the original")
    table = find_layers(like)
    model, folded = Scaling.of(groups, table.prefix), Scaling()
    match = match_loras([lora], table.shapes())
    for finding in (*match.unsupported, *match.ambiguous):
        if any(layer + names.WEIGHT in {*model.rows, *model.columns} for layer in finding.layers):
            problem = f"changes {finding.layers[0]}, which is folded, and cannot be converted: {finding.reason}"
            raise LoraError(problem, path=lora.path, tensor=finding.name)
    for layer, deltas in match.matched.items():
        rows, columns = (
            exponents(layer + names.WEIGHT, count)
            for exponents, count in zip((model.of_rows, model.of_columns), table.shapes()[layer], strict=True)
        )
        for delta in deltas:
            own = rows if delta.rows is None else rows[slice(*delta.rows)]
            own = np.roll(own, len(own) // 2) if delta.swap_halves else own
            if own.any():
                folded.rows[delta.adapter.up] = [(0, own, False)]
            if columns.any():
                folded.columns[delta.adapter.down] = [(0, columns)]
    adapters = [delta.adapter for deltas in match.matched.values() for delta in deltas]
    scaled = sum(adapter.up in folded.rows or adapter.down in folded.columns for adapter in adapters)
    if output is not None:
        metadata = {**lora.checkpoint.metadata, names.FOLDED_FOR_KEY: folding_of(like) or ""}
        view = Folded(lora.checkpoint, folded, metadata)
        write(view, lay_out(view, {}, (), metadata), output, progress=progress)
    return f"{scaled} of {plural(len(adapters), 'adapter')} scaled for {like.path.name}"
