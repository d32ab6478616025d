"""Second moments of what layers receive, Σ x xᵀ, gathered while a model runs on noise; for `rounding`.

They are large (a layer of 15,360 inputs has 0.9 GB), so nothing stores them, and no more are held than fit a budget:
layers are taken in turn, as many together as fit, and the model runs anew for each of these bands. What costs little is
running the model.

Products of bfloat16 inputs are exact in TF32 and are added up in float32. Sums of parts are added in float32, too: H is
symmetric and damped before it is factored in float64 (`rounding.solver`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from threading import Lock

import torch
from torch import Tensor, nn

from ..checkpoint import Checkpoint
from ..errors import CalibrationError
from ..families.running import Geometry
from ..formats.record import Format
from ..layers import Layer, LayerTable, dequantize
from ..options import SAMPLES, STEPS, RunOptions
from ..rounding import round_weight
from . import denoiser, diffusers, sizes
from .trials import tensor_float_32

ROWS_PER_INPUT = 8
"""Tokens that a model is shown at least for each input of its widest layer."""

MOST_SAMPLES = 256
BUDGET_BYTES = {"cpu": 1 << 30, "cuda": 16 << 30}
"""Moments held at a time."""


@torch.no_grad()
def gather(
    model: denoiser.Denoiser,
    layers: Sequence[str],
    geometry: Geometry,
    samples: int,
    shown: RunOptions,
) -> dict[str, Tensor]:
    """Second moments of the inputs of layers while the model paints from noise.

    Args:
        model: in high precision.
        layers: names of layers of its checkpoint.
        geometry: of the images.
        samples: how many.
        shown: noise levels, and the seed.

    Returns:
        {layer: float32 [in, in]} on the model's device; without layers that the model does not run.
    """
    found: dict[str, Tensor] = {}
    with ExitStack() as stack:
        stack.enter_context(tensor_float_32())
        for layer in layers:
            if layer in model.layers:
                stack.callback(model.layers[layer].register_forward_pre_hook(_adding(found, layer)).remove)
        for part in diffusers.parts(samples, geometry):
            assert part.way is not None
            latents, conditioning = diffusers.draw(model, geometry, part.way, shown.seed, part.numbers)
            for _ in diffusers.trajectory(model, latents, conditioning, geometry, shown.steps or STEPS):
                pass
    return found


def _adding(found: dict[str, Tensor], layer: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    """A hook that adds the moments of a module's input to those of a layer."""

    def add(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        x = args[0].flatten(0, -2).float()
        if layer in found:
            found[layer].addmm_(x.T, x)
        else:
            found[layer] = x.T @ x

    return add


class Rounding:
    """Rounds the layers of a checkpoint one after the other, by moments of what they receive on noise.

    Args:
        checkpoint: the open checkpoint, which can be run.
        table: its layers.
        layers: those that will be rounded, in their order.
        shown: what the model is shown, and where it runs.
    """

    def __init__(self, checkpoint: Checkpoint, table: LayerTable, layers: Sequence[Layer], shown: RunOptions) -> None:
        self.checkpoint, self.shown = checkpoint, shown
        self.model = denoiser.load(checkpoint, table, device=shown.device)
        family = self.model.plan.family
        self.geometry = sizes.asked(family, shown.size) or diffusers.GEOMETRY
        budget = BUDGET_BYTES.get(self.model.device.type, BUDGET_BYTES["cpu"])
        self.bands = list(_bands(layers, budget))
        rows = ROWS_PER_INPUT * max(layer.in_features for layer in layers)
        enough = -(-rows // (self.geometry.tokens * (shown.steps or STEPS)))
        self.samples = shown.samples or min(max(SAMPLES, enough), MOST_SAMPLES)
        self.band: list[str] = []
        self.moments: dict[str, Tensor] = {}
        self.lock = Lock()

    def moments_of(self, layer: str) -> Tensor | None:
        """The moments of a layer; those of all others of its band are gathered at once. None where it does not run."""
        if layer not in self.band:
            self.moments = {}
            self.band = next(names for names in self.bands if layer in names)
            self.moments = gather(self.model, self.band, self.geometry, self.samples, self.shown)
        return self.moments.get(layer)

    def __call__(self, layer: Layer, fmt: Format) -> dict[str, Tensor] | None:
        """What is stored of a layer, by suffix; None where the model does not run it, or nothing can be rounded.

        Raises:
            CalibrationError: the inputs of the layer are not finite.
        """
        with self.lock:
            moments = self.moments_of(layer.name) if fmt.roundable else None
            weight_OI = torch.from_numpy(dequantize(self.checkpoint, layer))
            if moments is None or not weight_OI.isfinite().all():
                return None
            if not moments.isfinite().all():
                raise CalibrationError(
                    "its inputs have infinities or NaN", path=self.checkpoint.path, tensor=layer.name
                )
            rounded = round_weight(weight_OI.to(self.model.device), moments, fmt)
            return {suffix: part.cpu() for suffix, part in rounded.items()}


def _bands(layers: Sequence[Layer], budget: int) -> Iterator[list[str]]:
    """Names of layers whose moments fit a budget together."""
    band: list[str] = []
    held = 0
    for layer in layers:
        size = 4 * layer.in_features**2
        if band and held + size > budget:
            yield band
            band, held = [], 0
        band.append(layer.name)
        held += size
    if band:
        yield band
