"""Random inputs for ComfyUI's models instead of prompts, images and sounds, as their families' records declare them."""

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

IMAGES, IDS = 1 << 31, 1 << 32
"""Offsets of random streams for images and token ids, beyond any trajectory's number."""

NOT_GENERATIVE: Mapping[str, str] = {
    "RT_DETR_v4": "it detects objects",
    "SAM3": "it segments images",
    "DepthAnything3": "it estimates depth",
}
"""Models that ComfyUI loads but that generate nothing from noise."""


def conditions_of(classes: Iterable[str]) -> Conditions:
    """The inputs of a model besides latents.

    Args:
        classes: names of its class in `comfy.model_base` and of its bases, nearest first. Their entries are merged.

    Raises:
        UnsupportedModelError: there is no entry, or the model does not generate from noise.
    """
    names = list(classes)
    idle = next((NOT_GENERATIVE[name] for name in names if name in NOT_GENERATIVE), None)
    if idle is not None:
        raise UnsupportedModelError(f"ComfyUI's {names[0]} is not a diffusion model: {idle}")
    if names[0] != BASE:
        names = names[: names.index(BASE)] if BASE in names else names
    entries = [CONDITIONS[name] for name in names if name in CONDITIONS]
    if not entries:
        raise UnsupportedModelError(
            f"the inputs of ComfyUI's {names[0]} model are unknown here",
            hint="record it in ComfyUI, with the Record Activations node",
        )
    return reduce(lambda inherited, own: own.over(inherited), reversed(entries))


def wanted(conditions: Conditions, scene: Scene) -> dict[str, tuple[Want, tuple[int, ...]]]:
    """A model's inputs and their shapes."""
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
    """A random conditioning, in the form of ComfyUI's nodes."""
    entries = wanted(conditions, scene)
    signals = {name: Signal(shape) for name, (want, shape) in entries.items() if want.kind == "noise"}
    values: dict[str, Tensor] = noise.conditioning(signals, way, seed, number)
    for place, (name, (want, shape)) in enumerate(entries.items()):
        if want.kind in ("encoded", "signal"):
            drawn = noise.latents(shape, seed, IMAGES + number * len(entries) + place)
            values[name] = as_encoded(drawn) if want.kind == "encoded" else drawn
        elif want.kind == "ids":
            rng = np.random.default_rng((seed, IDS + number * len(entries) + place))
            values[name] = torch.from_numpy(rng.integers(measure(want.below, scene), size=(1, *shape)))
        elif want.kind == "ones":
            values[name] = torch.ones((1, *shape), dtype=torch.int64)
    return {**conditions.settings, **{name: want.form(values[name]) for name, (want, _) in entries.items()}}
