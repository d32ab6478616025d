"""What ComfyUI's models are shown in place of prompts, images and sounds: what their families' records say, drawn."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import reduce
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...errors import UnsupportedModelError
from ...families import CONDITIONS
from ...families.comfyui import BASE, Conditions, Scene, Want, Wrap, as_it_is, measure
from ...families.running import Signal
from .. import noise

PICTURES, IDS = 1 << 31, 1 << 32
"""Images and token numbers of trajectory n are drawn with the numbers of trajectories that no run reaches."""

NOTHING_TO_PAINT: Mapping[str, str] = {
    "RT_DETR_v4": "it finds objects in images",
    "SAM3": "it cuts objects out of images",
    "DepthAnything3": "it measures the depth of images",
}
"""Models that ComfyUI loads and that make nothing of noise."""


def conditions_of(classes: Iterable[str]) -> Conditions:
    """What a model takes.

    Args:
        classes: names of its class of `comfy.model_base` and of those that it derives from, nearest first.

    Returns:
        The entries of all of them in one.

    Raises:
        UnsupportedModelError: there is no entry, or the model makes no images from noise.
    """
    names = list(classes)
    idle = next((NOTHING_TO_PAINT[name] for name in names if name in NOTHING_TO_PAINT), None)
    if idle is not None:
        raise UnsupportedModelError(f"ComfyUI's {names[0]} is not a diffusion model: {idle}")
    if names[0] != BASE:
        names = names[: names.index(BASE)] if BASE in names else names
    entries = [CONDITIONS[name] for name in names if name in CONDITIONS]
    if not entries:
        raise UnsupportedModelError(
            f"what ComfyUI's {names[0]} takes besides latents is not known here",
            hint="record it in ComfyUI with the Record Activations node",
        )
    return reduce(lambda inherited, own: own.over(inherited), reversed(entries))


def wanted(conditions: Conditions, scene: Scene) -> dict[str, tuple[Want, tuple[int, ...]]]:
    """What a model in a scene wants, with shapes in numbers.

    Raises:
        UnsupportedModelError: the network does not have a part that tells a size.
    """
    return {
        name: (want, tuple(measure(size, scene) for size in want.shape))
        for name, want in conditions.wants.items()
        if want is not None and (want.only_with is None or scene.part(want.only_with) is not None)
    }


def draw(
    conditions: Conditions,
    scene: Scene,
    way: noise.Conditioning,
    seed: int,
    number: int,
    *,
    as_encoded: Wrap = as_it_is,
) -> dict[str, Any]:
    """A conditioning as ComfyUI's nodes attach it.

    Args:
        conditions: what the model takes.
        scene: what is sampled.
        way: how loud it is.
        seed: of the run.
        number: of the trajectory.
        as_encoded: makes of latents as the network sees them those that a VAE gives.

    Returns:
        {name: what stands there}.
    """
    entries = wanted(conditions, scene)
    signals = {name: Signal(shape) for name, (want, shape) in entries.items() if want.kind == "noise"}
    values: dict[str, Tensor] = noise.conditioning(signals, way, seed, number)
    for place, (name, (want, shape)) in enumerate(entries.items()):
        if want.kind in ("encoded", "signal"):
            drawn = noise.latents(shape, seed, PICTURES + number * len(entries) + place)
            values[name] = as_encoded(drawn) if want.kind == "encoded" else drawn
        elif want.kind == "ids":
            rng = np.random.default_rng((seed, IDS + number * len(entries) + place))
            values[name] = torch.from_numpy(rng.integers(measure(want.below, scene), size=(1, *shape)))
        elif want.kind == "ones":
            values[name] = torch.ones((1, *shape), dtype=torch.int64)
    return {**conditions.settings, **{name: want.form(values[name]) for name, (want, _) in entries.items()}}
