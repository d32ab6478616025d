"""Second moments Σ x xᵀ of layer inputs, gathered while a model generates images; for `rounding`.

They are large (0.9 GB for a layer of 15,360 inputs), so a run gathers only as many as fit a budget: it takes layers in
bands that fit together, and runs the model again for each band. Running the model is the cheap part. Layers that are
called with the same tensor share their moments. Moments are used at once, or written to disk (`rounding.kept`).

The model runs in float32, on a GPU in TF32: in bfloat16 a small 1 + scale is only rounding error. Sums are float32; H
is symmetric, and damped before it is factored in float64 (`rounding.solver`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial, reduce

import torch
from torch import Tensor, nn

from ..checkpoint import Checkpoint
from ..errors import CalibrationError
from ..formats.record import Format
from ..layers import Layer, LayerTable, dequantize
from ..options import SAMPLES, RunOptions
from ..rounding import KeptMoments, round_weight
from ..telling import Progress, advance
from . import denoiser
from .diffusers import Images
from .prompts import Prompts
from .trials import tensor_float_32

IMAGES = 4 * SAMPLES
"""Least number of images: with moments of 48, a 5-bit mix reaches 30.5 dB on "plain"; with 64, 30.7 dB."""
TOKENS_PER_INPUT = 8
"""Least number of tokens for each input of the widest layer."""

MOST_SAMPLES = 256
BUDGET_BYTES = 1 << 30
"""Moments held at a time on a CPU. On a GPU they may take half of the memory that the model and rounding leave free."""
WORK_BYTES = 52
"""GPU memory for rounding, times the square of a layer's inputs: six and a half float64 matrices."""

MomentsOf = Callable[[Layer], Tensor | None]
"""From a layer to its moments, float32 [in, in]; None if there are none."""


class Gathering:
    """Second moments of the inputs of a checkpoint's layers while it generates images.

    Args:
        checkpoint: the open checkpoint, which can be run.
        table: its layers.
        layers: the layers to gather, in order.
        shown: the images, and the device.
        prompts: conditioning instead of noise.
        done: names of layers whose moments are known already.
        share: which of the other layers this process gathers: its number, and the number of processes.
        progress: called after every evaluation.

    Attributes:
        bands: names of the layers that are gathered together.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        table: LayerTable,
        layers: Sequence[Layer],
        shown: RunOptions,
        *,
        prompts: Prompts | None = None,
        done: Collection[str] = (),
        share: tuple[int, int] = (0, 1),
        progress: Progress | None = None,
    ) -> None:
        self.model = denoiser.load(checkpoint, table, device=shown.device, dtype=torch.float32)
        widest = max((layer.in_features for layer in layers), default=0)
        budget = BUDGET_BYTES
        if self.model.device.type == "cuda":  # weights are copied there when they are first needed
            weights = sum(layer.weight.nbytes for layer in table.linear())
            budget = (torch.cuda.mem_get_info(self.model.device)[0] - weights - WORK_BYTES * widest**2) // 2
        self.bands = _bands([layer for layer in layers if layer.name not in done], budget)[share[0] :: share[1]]
        self.band: Sequence[str] = ()
        self.moments: dict[str, Tensor] = {}
        images = Images.of(self.model, shown, 1, prompts)
        enough = -(-TOKENS_PER_INPUT * widest // (images.geometry.tokens * images.steps))
        samples = shown.samples or min(max(IMAGES, enough), MOST_SAMPLES)
        self.images = replace(images, samples=max(samples, images.samples))
        self.tick = advance(progress, len(self.bands) * len(self.images.batches) * images.steps)

    def moments_of(self, layer: Layer) -> Tensor | None:
        """The moments of a layer; gathers its whole band at once. None if the layer does not run."""
        if layer.name not in self.band:
            self.moments = {}
            self.band = next(names for names in self.bands if layer.name in names)
            self.moments = {name: moments for names, moments in self.gather(self.band).items() for name in names}
        return self.moments.get(layer.name)

    @torch.no_grad()
    def gather(self, layers: Sequence[str]) -> dict[tuple[str, ...], Tensor]:
        """Run the model: {layers that share an input: float32 [in, in]} on its device; only layers that run."""
        moments: dict[str, Tensor] = {}
        owner: dict[str, str] = {}  # of layers that are called with one tensor, the first
        last: tuple[str, Tensor | None] = "", None

        def add(layer: str, _: nn.Module, args: tuple[Tensor, ...]) -> None:
            nonlocal last
            before, tensor = last
            last = layer, args[0]
            if owner.setdefault(layer, owner[before] if tensor is args[0] else layer) == layer:
                x = args[0].flatten(0, -2).float()
                moments[layer] = moments[layer].addmm_(x.T, x) if layer in moments else x.T @ x

        with ExitStack() as stack:
            stack.enter_context(tensor_float_32())
            for layer in layers:
                if layer in self.model.layers:
                    hook = self.model.layers[layer].register_forward_pre_hook(partial(add, layer))
                    stack.callback(hook.remove)
            for batch in self.images.batches:
                for _ in self.images.trajectory(batch.numbers):
                    self.tick(1)
        return {tuple(name for name in owner if owner[name] == first): found for first, found in moments.items()}


def kept_on(device: str | torch.device, parts: Sequence[KeptMoments]) -> MomentsOf:
    """A function that gives the moments of a layer from earlier runs, added up, on a device."""

    def moments_of(layer: Layer) -> Tensor | None:
        found = [torch.from_numpy(own).to(device) for part in parts if (own := part.read(layer)) is not None]
        return reduce(torch.add, found) if found else None

    return moments_of


@dataclass(frozen=True)
class Rounding:
    """Rounds the layers of a checkpoint by the second moments of their inputs.

    Call it for layers in order, since moments are gathered for bands of layers, and from one thread. It rounds on the
    device of the moments.
    """

    checkpoint: Checkpoint
    moments_of: MomentsOf

    def __call__(self, layer: Layer, fmt: Format) -> dict[str, Tensor] | None:
        """The stored tensors of a layer, by suffix; None if it has no moments, or cannot be rounded.

        Raises:
            CalibrationError: the inputs of the layer are not finite.
            CheckpointError, StatisticsError: moments on disk cannot be read, or are not of this layer.
        """
        moments = self.moments_of(layer) if fmt.roundable else None
        if moments is None:
            return None
        weight_OI = torch.from_numpy(dequantize(self.checkpoint, layer)).to(moments.device)
        if not weight_OI.isfinite().all():
            return None
        if not moments.isfinite().all():
            raise CalibrationError("its inputs have infinities or NaN", path=self.checkpoint.path, tensor=layer.name)
        return {suffix: part.cpu() for suffix, part in round_weight(weight_OI, moments, fmt).items()}


def _bands(layers: Sequence[Layer], budget: int) -> list[list[str]]:
    """Names of consecutive layers whose moments fit a budget together."""
    bands: list[list[str]] = []
    held = budget
    for layer in layers:
        size = 4 * layer.in_features**2
        if held + size > budget:
            bands.append([])
            held = 0
        bands[-1].append(layer.name)
        held += size
    return bands
