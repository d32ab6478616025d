"""Second moments of what layers receive, Σ x xᵀ, gathered while a model paints; for `rounding`.

They are large (a layer of 15,360 inputs has 0.9 GB), so no more are held than fit a budget: layers are taken in turn,
as many together as fit, and the model runs anew for each of these bands. What costs little is running the model.
Layers that are called with one tensor share theirs. They are used at once, or kept on disk (`rounding.kept`).

The model runs in float32, on a GPU in TF32: in bfloat16 a small 1 + scale is nothing but rounding. Sums are float32: H
is symmetric and damped before it is factored in float64 (`rounding.solver`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack
from functools import reduce

import torch
from torch import Tensor, nn

from ..checkpoint import Checkpoint
from ..errors import CalibrationError
from ..formats.record import Format
from ..layers import Layer, LayerTable, dequantize
from ..options import SAMPLES, STEPS, RunOptions
from ..rounding import KeptMoments, round_weight
from ..telling import Progress, advance
from . import denoiser, diffusers, sizes
from .prompts import Prompts
from .trials import tensor_float_32

IMAGES = 4 * SAMPLES
"""Images that a model is shown at least: a mix of 5 bits keeps 30.5 dB of "plain" by the moments of 48, 30.7 of 64."""
ROWS_PER_INPUT = 8
"""Tokens that it is shown at least for each input of its widest layer."""

MOST_SAMPLES = 256
BUDGET_BYTES = 1 << 30
"""Moments held at a time on a CPU; on a GPU they may take half of what model and rounding leave free."""
WORK_BYTES = 52
"""What rounding takes of a GPU for the square of a layer's inputs: six and a half float64 matrices."""

MomentsOf = Callable[[Layer], Tensor | None]
"""From a layer to its moments, float32 [in, in]; None where there are none."""


class Gathering:
    """Second moments of what the layers of a checkpoint receive while it paints.

    Args:
        checkpoint: the open checkpoint, which can be run.
        table: its layers.
        layers: those that are asked for, in their order.
        shown: what the model is shown, and where it runs.
        prompts: conditioning in place of noise.
        done: those of them whose moments are known.
        share: of the rest: which, and of how many processes.
        progress: told how many of all evaluations are done.

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
        self.geometry = sizes.asked(self.model.plan.family, shown.size) or diffusers.GEOMETRY
        self.prompts = prompts and prompts.fitted(self.model, self.geometry)
        self.geometry = self.prompts.geometry if self.prompts else self.geometry
        widest = max((layer.in_features for layer in layers), default=0)
        budget = BUDGET_BYTES
        if self.model.device.type == "cuda":  # weights are copied there when they are first needed
            weights = sum(layer.weight.nbytes for layer in table.linear())
            budget = (torch.cuda.mem_get_info(self.model.device)[0] - weights - WORK_BYTES * widest**2) // 2
        self.bands = list(_bands([layer for layer in layers if layer.name not in done], budget))[share[0] :: share[1]]
        self.band: Sequence[str] = ()
        self.moments: dict[str, Tensor] = {}
        self.steps, self.seed = shown.steps or STEPS, shown.seed
        enough = -(-ROWS_PER_INPUT * widest // (self.geometry.tokens * self.steps))
        samples = shown.samples or min(max(IMAGES, enough), MOST_SAMPLES)
        samples = max(samples, prompts.count) if prompts else samples
        self.batches = [numbers for _, numbers in diffusers.batches(samples, self.geometry, self.prompts)]
        self.tick = advance(progress, len(self.bands) * len(self.batches) * self.steps)

    def moments_of(self, layer: Layer) -> Tensor | None:
        """The moments of a layer; those of all others of its band are gathered at once. None where it does not run."""
        if layer.name not in self.band:
            self.moments = {}
            self.band = next(names for names in self.bands if layer.name in names)
            self.moments = {name: moments for names, moments in self.gather(self.band).items() for name in names}
        return self.moments.get(layer.name)

    @torch.no_grad()
    def gather(self, layers: Sequence[str]) -> dict[tuple[str, ...], Tensor]:
        """Run the model for some layers.

        Returns:
            {layers that receive one input: float32 [in, in]} on the model's device, without those that do not run.
        """
        inputs = _Inputs()
        with ExitStack() as stack:
            stack.enter_context(tensor_float_32())
            for layer in layers:
                if layer in self.model.layers:
                    stack.callback(self.model.layers[layer].register_forward_pre_hook(inputs.adding(layer)).remove)
            for numbers in self.batches:
                latents, conditioning = diffusers.start(self.model, self.geometry, self.seed, numbers, self.prompts)
                for _ in diffusers.trajectory(self.model, latents, conditioning, self.geometry, self.steps):
                    self.tick(1)
        return {
            tuple(layer for layer, first in inputs.first.items() if first == owner): moments
            for owner, moments in inputs.moments.items()
        }


class _Inputs:
    """The moments of what modules receive; those of modules that are called with one tensor are added once."""

    def __init__(self) -> None:
        self.moments: dict[str, Tensor] = {}
        self.first: dict[str, str] = {}
        self.last: tuple[str, Tensor | None] = "", None

    def adding(self, layer: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        """A hook for the module of a layer."""

        def add(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            before, seen = self.last
            first = self.first.setdefault(layer, self.first[before] if seen is args[0] else layer)
            if first == layer:
                x = args[0].flatten(0, -2).float()
                known = self.moments.get(layer)
                self.moments[layer] = x.T @ x if known is None else known.addmm_(x.T, x)
            self.last = layer, args[0]

        return add


def kept_on(device: str | torch.device, parts: Sequence[KeptMoments]) -> MomentsOf:
    """What gives the moments of a layer that earlier runs kept, added up, on a device."""

    def moments_of(layer: Layer) -> Tensor | None:
        found = [torch.from_numpy(own).to(device) for part in parts if (own := part.read(layer)) is not None]
        return reduce(torch.add, found) if found else None

    return moments_of


class Rounding:
    """Rounds the layers of a checkpoint one after the other, by the second moments of what they receive.

    In their order, since moments are gathered for some that follow each other; and in one thread.

    Args:
        checkpoint: the open checkpoint.
        moments_of: gives those of a layer, on the device that rounds.
    """

    def __init__(self, checkpoint: Checkpoint, moments_of: MomentsOf) -> None:
        self.checkpoint, self.moments_of = checkpoint, moments_of

    def __call__(self, layer: Layer, fmt: Format) -> dict[str, Tensor] | None:
        """What is stored of a layer, by suffix; None where it has no moments, or nothing can be rounded.

        Raises:
            CalibrationError: the inputs of the layer are not finite.
            CheckpointError, StatisticsError: moments that were kept cannot be read, or are not of this layer.
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
