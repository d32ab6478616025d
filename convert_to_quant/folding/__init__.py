"""Equalizes channels: moves per-channel factors from a layer's inputs into its weight, exactly.

A format with one scale per token (INT8) or per tensor (FP8) gives every channel of an input the step size of the
largest channel. If channels differ, the small ones lose their precision. But the size of a channel is arbitrary:
multiplying the tensors that produce it and dividing those that read it does not change what the network computes
(`families.folds` lists where).

    observe      the inputs of layers on noise, per channel
    find         a factor for each channel, from these and from the columns that read it; none if channels are already
                 equal (`factors`)
    fold         a checkpoint that reads as if it had been trained that way (`folded`); convert it like any other

Limits. Adapters for the original no longer fit: their changes need the same scaling (`adapters`), and no reader does
that by itself. Only layers in high precision are folded, before they are rounded.
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
    """A checkpoint with equalized channels, or the checkpoint itself if its channels are already equal.

    The model runs in float32: in bfloat16 a small 1 + scale is only rounding error, and so are the ranges behind it.

    Args:
        checkpoint: the open checkpoint; must stay open.
        layers: names of the layers to quantize.
        shown: images, and the device.
        progress: called after every evaluation.

    Raises:
        CheckpointError: it is already folded.
        OptionError: none of the layers reads channels that can be scaled.
        UnsupportedModelError: the model cannot be run.
    """
    from torch import float32

    from ..engines import denoiser, diffusers, trials

    if names.FOLDING_KEY in checkpoint.metadata:  # the header has room for one folding
        raise CheckpointError("its channels are already folded", path=checkpoint.path, hint="leave out --fold")
    shown = shown or RunOptions()
    table = find_layers(checkpoint)
    plan = denoiser.plan(checkpoint, table)
    groups = find_groups(checkpoint, plan, layers)
    if not groups:
        problem = f"no layer to quantize reads channels that can be folded in {plan.family}"
        raise OptionError(problem, path=checkpoint.path, hint="leave out --fold")
    read = {plan.full_names[place.tensor].removesuffix(names.WEIGHT) for group in groups for place in group.columns}
    wanted = [name for name in table.plain if name in read]
    with trials.tensor_float_32():
        seen = diffusers.observe(checkpoint, table, shown, dtype=float32, layers=wanted, progress=progress)
    exponents = find_exponents(checkpoint, groups, seen.statistics, table.prefix)
    found = [replace(group, exponents=each) for group, each in zip(groups, exponents, strict=True) if each.any()]
    return fold_checkpoint(checkpoint, found) if found else checkpoint
