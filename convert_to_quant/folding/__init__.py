"""Channels evened out: per-channel factors moved from a layer's inputs into its weight, exactly.

Why it exists. A format with one scale per token (INT8) or per tensor (FP8) gives every channel of an input the step of
the largest. Where channels differ, the small ones drown. How large a channel is, is a matter of spelling: what gives
the channels can be multiplied and what reads them divided, and the network computes what it computed
(`families.folds` says where).

    observe      what layers receive on noise, per channel
    find         a factor for each channel, from that and from the columns that read it; none where channels are even
                 already (`factors`)
    fold         a checkpoint that reads as if it had been trained that way (`folded`); convert it as any other

Limits. Adapters that were trained on the original no longer fit: what they add has to be scaled likewise (`adapters`),
and no reader does that by itself. Only layers in high precision are folded, before they are rounded.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from .. import names
from ..checkpoint import Checkpoint
from ..errors import CheckpointError, OptionError
from ..layers import find_layers
from ..options import RunOptions
from ..telling import Progress
from .adapters import fold_lora
from .factors import find_exponents
from .folded import Folded, fold_checkpoint, read_groups
from .groups import find_groups

__all__ = ["Folded", "find_groups", "fold", "fold_checkpoint", "fold_lora", "read_groups"]


def fold(
    checkpoint: Checkpoint,
    layers: Collection[str],
    shown: RunOptions | None = None,
    *,
    progress: Progress | None = None,
) -> Checkpoint:
    """A checkpoint with its channels evened out, found by running it in float32; itself where they are even already.

    In bfloat16 a small 1 + scale is nothing but rounding, and so are the ranges behind it. The checkpoint must stay
    open; `layers` are those that will be quantized.

    Raises:
        CheckpointError: it is folded already.
        OptionError: none of the layers reads channels that can be scaled.
        UnsupportedModelError: the model cannot be run.
    """
    from torch import float32

    from ..engines import denoiser, diffusers, trials

    if names.FOLDING_KEY in checkpoint.metadata:  # which would no longer say all
        raise CheckpointError("its channels are folded already", path=checkpoint.path, hint="leave out --fold")
    shown = shown or RunOptions()
    table = find_layers(checkpoint)
    plan = denoiser.plan(checkpoint, table)
    groups = find_groups(checkpoint, plan, layers)
    if not groups:
        if not find_groups(checkpoint, plan, list(table.plain)):
            raise OptionError("this model cannot be folded", path=checkpoint.path, hint="leave out --fold")
        problem = f"no layer of {plan.family} that is to be quantized reads channels that can be folded"
        raise OptionError(problem, hint="leave out --fold")
    read = {plan.full_names[place.tensor].removesuffix(names.WEIGHT) for group in groups for place in group.columns}
    wanted = [name for name in table.plain if name in read]
    with trials.tensor_float_32():
        seen = diffusers.observe(checkpoint, table, shown, dtype=float32, layers=wanted, progress=progress)
    exponents = find_exponents(checkpoint, groups, seen.statistics, table.prefix)
    found = [replace(group, exponents=each) for group, each in zip(groups, exponents, strict=True) if each.any()]
    return fold_checkpoint(checkpoint, found) if found else checkpoint
