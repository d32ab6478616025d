"""Trial runs: how much each number format of each layer would change a model's velocity.

The damage by a format depends on the layer's inputs, and on everything behind the layer. Weights show neither, so every
layer is tried in every format while the model generates images in high precision. Two relative energies result, at the
layer's own inputs:

    output error   ‖y - y'‖² / ‖y‖² of the layer's own output y
    damage         ‖v - v'‖² / ‖v‖² of the velocity v, with only this layer in that format

The output error needs no further run, and ranks formats of one size correctly. Between sizes only the damage does
(docs/formats.md). So of the formats of one size, only the best by output error runs to the end: the best among those
that each GPU multiplies.

Speed. A trial in one block replays the outputs of the blocks before it from the reference run. Trials of one block run
side by side in one batch.

Limits. The damages of layers add up only roughly to the damage of all, and both depend on the image size; `damage_of`
measures a mix. Measuring every layer again around a mix and choosing again gave no better mixes (docs/experiments.md).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import linear

from ..families.running import Geometry
from ..formats import FORMATS
from ..formats.record import Format, Parts
from ..formats.rotation import rotate
from ..telling import Advance, Progress, advance
from ..trials import Trials
from .denoiser import Denoiser
from .diffusers import Images, trajectory
from .prompts import Prompts
from .quantized_linear import CheckpointLinear, multiply

ARITHMETIC = "comfyui_divide"
TINY = torch.finfo(torch.float32).tiny
TOGETHER_TOKENS = 1 << 15
"""Tokens of all images that run side by side, each for another trial."""

Product = Callable[[Tensor, slice], Tensor]
"""Replaces a layer: from x [..., in] to float32 [..., rows], for some rows of the weight, without bias."""


@dataclass(frozen=True)
class Candidate:
    """A format that a layer could be in, its static input scale if any, and whether its inputs are not quantized."""

    format: Format
    input_scale: float | None = None
    full_precision: bool = False


@dataclass(frozen=True)
class Moment:
    """One evaluation of the model, on images with several ways of conditioning.

    Attributes:
        ways: name of each way -> number of its images, which are adjacent in the batch.
        latents: [batch, *latent shape].
        sigma: noise level.
        conditioning: by name, each [batch, ...].
    """

    ways: Mapping[str, int]
    latents: Tensor
    sigma: float
    conditioning: Mapping[str, Tensor]


class Simulated:
    """A layer's weight, float32 [out, in], in a format, multiplied as readers do.

    `parts` are its stored tensors by suffix; rounded to nearest by default.
    """

    def __init__(self, weight_OI: Tensor, candidate: Candidate, parts: Parts | None = None) -> None:
        self.format = candidate.format
        self.full_precision = candidate.full_precision
        self.static = None
        if candidate.input_scale is not None:
            self.static = torch.tensor(candidate.input_scale, device=weight_OI.device)
        config = self.format.config((weight_OI.shape[0], weight_OI.shape[1]), 0)
        self.group = self.format.group(config)
        self.levels, self.scale = self.format.decode(parts or self.format.quantized(weight_OI), config)
        if self.full_precision:
            self.levels = rotate(self.levels.float() * self.scale, self.group)

    def product(self, x: Tensor, rows: slice = slice(None)) -> Tensor:
        """From x [..., in] to float32 [..., rows], without bias."""
        levels, scale = self.levels[rows], self.scale[rows] if len(self.scale) > 1 else self.scale
        if self.full_precision:
            return linear(x, levels.to(x.dtype)).float()
        codes, x_scale = self.format.inputs(rotate(x, self.group), self.static, ARITHMETIC)
        return multiply(codes, x_scale, levels, scale)


class Bench:
    """A model in high precision to run trials on, each at the same moments. It keeps the outputs of its blocks.

    It calls `tick` with 0 before every evaluation; an exception from it ends the run.
    """

    def __init__(self, denoiser: Denoiser, geometry: Geometry, moments: Sequence[Moment]) -> None:
        self.denoiser = denoiser
        self.geometry = geometry
        self.moments = moments
        self.modules: dict[str, list[tuple[CheckpointLinear, int]]] = {}
        for module in denoiser.linears.values():
            for index, (layer, _) in enumerate(module.stored.pieces):
                self.modules.setdefault(layer.name, []).append((module, index))
        self.blocks = blocks_of(denoiser.model)
        self.block_of = {module: block for block in self.blocks for module in block.modules()}
        self.tick: Advance = lambda _: None
        self.outputs: list[dict[nn.Module, Any]] = []
        self.order: list[nn.Module] = []
        self.images = len(moments[0].latents)
        self.together = max(1, TOGETHER_TOKENS // (self.images * geometry.tokens))

    @property
    def shown(self) -> list[tuple[str, int]]:
        """Name and number of images of each way of conditioning at each moment, in order."""
        return [(f"{way}, {m.sigma:g}", count) for m in self.moments for way, count in m.ways.items()]

    def place(self, layer: str) -> int:
        """Position of the block that contains a layer, in the order in which blocks run; 0 if there is none."""
        block = self.block(layer)
        return self.order.index(block) if block in self.order else 0

    def block(self, layer: str) -> nn.Module | None:
        """The block that contains all of a layer; None if there is none."""
        blocks = {self.block_of.get(module) for module, _ in self.modules[layer]}
        return blocks.pop() if len(blocks) == 1 else None

    def run(self) -> list[Tensor]:
        """Run every moment, keep the outputs of the blocks, and return the velocities."""
        self.outputs, velocities, calls = [], [], 0

        def keep(block: nn.Module, _: Any, output: Any) -> None:
            nonlocal calls
            calls += 1
            self.outputs[-1][block] = output

        with ExitStack() as stack:
            for block in self.blocks:
                stack.callback(block.register_forward_hook(keep).remove)
            for moment in self.moments:
                self.outputs.append({})
                velocities.append(self._velocity(moment))
        # A block that runs twice cannot be skipped.
        self.order = list(self.outputs[0]) if calls == sum(map(len, self.outputs)) else []
        if not self._replays(velocities[0]):
            self.order = []
        return velocities

    def _replays(self, velocity: Tensor) -> bool:
        """Whether the model accepts the kept outputs of its blocks, for two copies of a batch as well."""
        try:
            with self._skipped(len(self.order), self.outputs[0], 2):
                again = self._velocity(self.moments[0], 2)
        except (RuntimeError, ValueError, IndexError, TypeError, AttributeError):
            return False
        return torch.allclose(again, torch.cat([velocity] * 2), rtol=1e-3, atol=1e-3 * float(velocity.abs().max()))

    def trials(self, changes: Sequence[Mapping[str, Product]], place: int) -> list[list[Tensor]]:
        """The velocities at every moment with some layers replaced, by change; several changes run in one batch.

        `place` is the position of the first block that contains any of the layers.
        """
        found: list[list[Tensor]] = [[] for _ in changes]
        for start in range(0, len(changes), self.together):
            chosen = changes[start : start + self.together]
            try:
                with self._replaced(chosen):
                    for moment, outputs in zip(self.moments, self.outputs, strict=True):
                        with self._skipped(place, outputs, len(chosen)):
                            velocities = self._velocity(moment, len(chosen)).chunk(len(chosen))
                        for mine, velocity in zip(found[start:], velocities, strict=False):
                            mine.append(velocity)
            except _UnbatchedError:
                self.together = 1
                return self.trials(changes, place)
        return found

    def inputs(self, place: int, layers: Sequence[str]) -> dict[str, list[Tensor]]:
        """The inputs of layers of one block at every moment; those of several calls are joined, [tokens, in]."""
        seen: dict[str, list[Tensor]] = {layer: [] for layer in layers}
        for moment, outputs in zip(self.moments, self.outputs, strict=True):
            calls: dict[str, list[Tensor]] = {layer: [] for layer in layers}
            with ExitStack() as stack:
                for layer, met in calls.items():
                    module, _ = self.modules[layer][0]
                    hook = module.register_forward_pre_hook(lambda _, args, met=met: met.append(args[0]))
                    stack.callback(hook.remove)
                stack.enter_context(self._skipped(place, outputs))
                self._velocity(moment)
            for layer, met in calls.items():
                module, _ = self.modules[layer][0]
                rows = [x.flatten(0, -2) for x in met] or [module.dtype_witness.new_zeros(0, module.in_features)]
                seen[layer].append(met[0] if len(met) == 1 else torch.cat(rows))
        return seen

    def weight(self, layer: str) -> Tensor:
        """The whole weight of a layer, float32 [out, in] on the device."""
        parts = sorted(self.modules[layer], key=lambda part: part[0].stored.pieces[part[1]][1].start)
        return torch.cat([module.stored.part(index) for module, index in parts])

    def _velocity(self, moment: Moment, copies: int = 1) -> Tensor:
        self.tick(0)
        conditioning = {name: torch.cat([value] * copies) for name, value in moment.conditioning.items()}
        latents = torch.cat([moment.latents] * copies)
        return self.denoiser.velocity(latents, moment.sigma, conditioning, self.geometry)

    def _replaced(self, changes: Sequence[Mapping[str, Product]]) -> AbstractContextManager[None]:
        """Replace layers inside the block: each part of a batch has the layers of one change."""
        touched = {module for change in changes for layer in change for module, _ in self.modules[layer]}

        def piece(module: CheckpointLinear, index: int, parts: Sequence[Tensor]) -> Tensor:
            layer, rows = module.stored.pieces[index]
            own = [change.get(layer.name) for change in changes]
            given = {n: product(parts[n], rows) for n, product in enumerate(own) if product is not None}
            others = [n for n in range(len(parts)) if n not in given]
            if others:
                weight_OI = module.stored.part(index).to(module.dtype)
                plain = linear(torch.cat([parts[n] for n in others]), weight_OI).float()
                given |= dict(zip(others, plain.chunk(len(others)), strict=True))
            return torch.cat([given[n] for n in range(len(parts))])

        def forward(module: CheckpointLinear, x: Tensor) -> Tensor:
            if len(changes) > 1 and len(x) != len(changes) * self.images:
                raise _UnbatchedError
            parts = x.to(module.dtype).chunk(len(changes))
            y = torch.cat([piece(module, index, parts) for index in range(len(module.stored.pieces))], -1)
            return (y if module.bias is None else y + module.bias.float()).to(module.dtype)

        return _forwards({module: partial(forward, module) for module in touched})

    def _skipped(self, place: int, outputs: Mapping[nn.Module, Any], copies: int = 1) -> AbstractContextManager[None]:
        """Blocks before a position return their kept outputs, inside the block."""

        def again(output: Any, *_: Any, **__: Any) -> Any:
            return _repeated(output, self.images, copies)

        return _forwards({block: partial(again, outputs[block]) for block in self.order[:place]})


@contextmanager
def _forwards(replacements: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Replace `forward` of modules, inside the block."""
    for module, forward in replacements.items():
        module.forward = forward
    try:
        yield
    finally:
        for module in replacements:
            del module.forward


def _repeated(output: Any, images: int, copies: int) -> Any:
    """The output of a block for several copies of its batch."""
    if isinstance(output, tuple):
        return tuple(_repeated(each, images, copies) for each in output)
    batched = isinstance(output, Tensor) and output.ndim and len(output) % images == 0
    return torch.cat([output] * copies) if batched else output


class _UnbatchedError(Exception):
    """The first dimension of a layer's input is not the batch."""


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The blocks that a model runs one after the other: the members of its outermost lists of modules."""
    found: list[nn.Module] = []
    inside: set[nn.Module] = set()
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and module not in inside:
            found += list(module)
            inside.update(part for block in module for part in block.modules())
    return found


def relative_energies(
    moments: Sequence[Moment], wanted: Sequence[Tensor], found: Sequence[Tensor]
) -> NDArray[np.float64]:
    """Σ over images of ‖v - v'‖² / ‖v‖², by moment and way, [M]; `wanted` and `found` by moment, [batch, ...]."""
    sums = []
    for moment, plain, other in zip(moments, wanted, found, strict=True):
        images = sum(moment.ways.values())
        rows = images if len(plain) % images == 0 else 1  # experts see some tokens of all images
        v, u = (x.float().reshape(rows, x.numel() // rows) for x in (plain, other))
        error, energy = (v - u).square().sum(1), v.square().sum(1)
        ratios = (error / energy.clamp(min=TINY)).double().expand(images)
        sums += [float(part.sum()) for part in torch.split(ratios, [*moment.ways.values()])]
    return np.array(sums)


@torch.no_grad()
def run_trials(
    bench: Bench,
    candidates: Mapping[str, Sequence[Candidate]],
    *,
    share: tuple[int, int] = (0, 1),
    progress: Progress | None = None,
) -> Trials:
    """Try every candidate of every layer.

    `share` is the number of this process and the number of processes; each takes every n-th layer, and their trials
    add up. `progress` is called after the candidates of a layer, and before every evaluation.
    """
    offered = {candidate.format.name for some in candidates.values() for candidate in some}
    formats = tuple(name for name in FORMATS if name in offered)
    trials = Trials.empty(tuple(candidates), formats, tuple(name for name, _ in bench.shown))
    images = np.array([count for _, count in bench.shown])
    mine = list(candidates)[share[0] :: share[1]]
    bench.tick = advance(progress, sum(len(candidates[layer]) for layer in mine))
    reference = bench.run()
    together: dict[nn.Module | None, list[str]] = {}
    for layer in mine:
        together.setdefault(bench.block(layer), []).append(layer)
    for layers in sorted(together.values(), key=lambda layers: bench.place(layers[0])):
        place = bench.place(layers[0])
        seen = bench.inputs(place, layers)
        pending: list[tuple[str, Simulated]] = []
        for layer in layers:
            weight_OI, row = bench.weight(layer), trials.layers.index(layer)
            plain = [linear(x.float(), weight_OI) for x in seen[layer]]
            best: dict[tuple[str, float], tuple[float, Simulated]] = {}
            for candidate in candidates[layer]:
                simulated = Simulated(weight_OI, candidate)
                error = trials.error[row, formats.index(candidate.format.name)]
                error += relative_energies(bench.moments, plain, [simulated.product(x) for x in seen[layer]])
                for gpu in candidate.format.native:
                    kind = gpu, candidate.format.bits
                    if kind not in best or error.sum() < best[kind][0]:
                        best[kind] = float(error.sum()), simulated
            pending += [(layer, each) for each in dict.fromkeys(each for _, each in best.values())]
            del seen[layer]
            if len(pending) >= bench.together or layer == layers[-1]:
                found = bench.trials([{name: each.product} for name, each in pending], place)
                for (name, each), velocities in zip(pending, found, strict=True):
                    column = trials.layers.index(name), formats.index(each.format.name)
                    trials.damage[column] += relative_energies(bench.moments, reference, velocities)
                    trials.count[column] += images
                pending = []
            bench.tick(len(candidates[layer]))
    return trials


@torch.no_grad()
def damage_of(bench: Bench, mix: Mapping[str, Candidate]) -> NDArray[np.float64]:
    """The damage of a mix of formats, by layer, at every moment, [M]."""

    def product(layer: str, candidate: Candidate, x: Tensor, rows: slice) -> Tensor:
        # Rounded every time: the weights of all layers together may not fit into memory.
        return Simulated(bench.weight(layer), candidate).product(x, rows)

    wanted = bench.run()
    (found,) = bench.trials([{layer: partial(product, layer, candidate) for layer, candidate in mix.items()}], 0)
    images = [count for _, count in bench.shown]
    damage: NDArray[np.float64] = relative_energies(bench.moments, wanted, found) / np.array(images)
    return damage


@torch.no_grad()
def moments(
    denoiser: Denoiser, geometry: Geometry, images: int, levels: int, seed: int, *, prompts: Prompts | None = None
) -> list[Moment]:
    """Evaluations of a model while it generates images with each way of conditioning in turn; see `Images`."""
    shown = Images(denoiser, geometry, max(images, prompts.count if prompts else 0), levels, seed, prompts)
    ways = shown.ways
    latents, signals = shown.start([number for numbers in ways.values() for number in numbers])
    images_of = {way: len(numbers) for way, numbers in ways.items()}
    return [
        Moment(images_of, state, sigma, signals)
        for sigma, state, _ in trajectory(denoiser, latents, signals, geometry, levels)
    ]


@contextmanager
def tensor_float_32() -> Iterator[None]:
    """Multiply float32 in TF32 on GPUs that support it, inside the block.

    bfloat16 would hide the effect of 8 bits on one layer: its rounding alone changes the velocity by -35 to -40 dB.
    """
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
