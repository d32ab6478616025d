"""A diffusion transformer that runs straight from its checkpoint, in diffusers' own class.

Why it exists. To see what a model's layers really receive, or what quantization does to its predictions, it has to
run; and running it should need no configuration, no second copy of the weights and no download.

How it works. Each step is checked before the next:
    plan      which family it is, where every weight of the diffusers class lies in the checkpoint (`provenance.py`),
              and its configuration from the shapes; every checkpoint tensor must have a place
    skeleton  the class without its large weights; every parameter must have a source of its shape
    load      every linear layer becomes a `CheckpointLinear` that reads its rows from the checkpoint when it runs; the
              small rest is loaded

Memory. On a CPU weights stay in the file's pages, on a GPU as the file's own bytes: a 12B model in FP8 takes 12 GB,
plus one layer's numbers and its activations. Models whose weights are small when dequantized (`KEEP_BYTES`) keep them.

Numbers. float32 on a CPU, bfloat16 on a GPU, which is what readers compute in. Ranges differ by about a bfloat16
rounding (0.4 %) between the two, far less than what one more sample moves them.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .. import families, names
from ..checkpoint import Checkpoint
from ..errors import OptionError, UnsupportedModelError
from ..families.rules import both_ways, index
from ..families.running import Architecture, Geometry, Inputs, Shapes, Signal, diffusion_time
from ..identity import identify
from ..layers import Layer, LayerTable, dequantize, find_layers, input_scale
from ..lora import LoraMatch
from ..telling import plural
from .devices import find_device
from .provenance import Piece, renamed
from .quantized_linear import ARITHMETICS, Arithmetic, CheckpointLinear, StoredWeight

STATIC = ("comfyui", "comfyui_divide")
"""Arithmetics with a scale from the file, where its format has one."""

KEEP_BYTES = 1 << 29
"""Dequantized weights of the whole model up to this size are kept instead of being made anew at every step."""

LEAST_SIGNAL = 0.05
"""Of an image in noise: in less, what a model that predicts noise says of the image is nothing."""

COMFYUI = "observe --comfyui-dir DIR may run it in ComfyUI"
"""What can be done about a layout that is not known here."""


@dataclass(frozen=True)
class Plan:
    """How a checkpoint runs, found without reading a weight.

    Attributes:
        family: name of its family.
        architecture: how that family is run.
        config: arguments of the transformer class.
        sources: model tensor name -> where its rows lie, by bare tensor names.
        shapes: model tensor name -> its shape, as the sources give it.
        table: the checkpoint's layers.
        full_names: bare tensor name -> as the checkpoint spells it.
    """

    family: str
    architecture: Architecture
    config: Mapping[str, Any]
    sources: Mapping[str, tuple[Piece, ...]]
    shapes: Shapes
    table: LayerTable
    full_names: Mapping[str, str]


def plan(checkpoint: Checkpoint, table: LayerTable | None = None) -> Plan:
    """Find out how to run a checkpoint, of which the table of layers may be known already.

    Raises:
        UnsupportedModelError: its family is unknown, or has no engine, or its layout is not the one diffusers knows.
    """
    table = find_layers(checkpoint) if table is None else table
    found = identify(checkpoint, table)
    shapes, family = found.shapes, found.family
    if family is None:
        unfit = found.kind not in (None, "diffusion")
        problem = f"no diffusion model: {found.title}" if unfit else "its tensor names fit no known family"
        raise UnsupportedModelError(problem, path=checkpoint.path, hint=None if unfit else found.hint or COMFYUI)
    architecture = family.runs(found.variant)
    if architecture is None:
        name = f"{family.title.partition(' (')[0]}{found.variant and f' ({found.variant})'}"
        raise UnsupportedModelError(f"{name} is not run here", path=checkpoint.path, hint=COMFYUI)
    foreign = [layer for layer in table.foreign.values() if table.owns(layer.name)]
    if foreign:
        raise UnsupportedModelError(
            f"{plural(len(foreign), 'layer')} in {foreign[0].form}, which cannot be dequantized here",
            path=checkpoint.path,
            tensor=foreign[0].name,
            hint=COMFYUI,
        )
    sources = _sources(family, architecture, shapes)
    model_shapes = {name: _joined_shape(pieces, shapes) for name, pieces in sources.items()}
    try:
        config = architecture.config({**shapes, **model_shapes})
    except (KeyError, IndexError, ValueError, ZeroDivisionError, StopIteration) as error:
        why = f": it has no {error.args[0]}" if isinstance(error, KeyError) else ""
        problem = f"not the layout of {family.title} that is known here{why}"
        raise UnsupportedModelError(problem, path=checkpoint.path, hint=COMFYUI) from None
    full_names = {bare: name for name, bare in names.strip_prefix(checkpoint.tensors)[1].items()}
    return Plan(family.name, architecture, config, sources, model_shapes, table, full_names)


def _sources(family: families.Family, architecture: Architecture, shapes: Shapes) -> dict[str, tuple[Piece, ...]]:
    """Where every tensor of the diffusers model lies, by bare names as the checkpoint spells them."""
    used = {
        name: shape
        for name, shape in shapes.items()
        if name not in architecture.ignored and not re.fullmatch(architecture.optional, name)
    }
    spellings = index(both_ways(family.spellings))
    return renamed(used, (index(architecture.names), index(family.names)), spellings)


def _joined_shape(pieces: Sequence[Piece], shapes: Shapes) -> tuple[int, ...]:
    """Shape of a model tensor put together from its sources."""
    shape = shapes[pieces[0].tensor]
    return (sum(piece.stop - piece.start for piece in pieces), *shape[1:]) if shape else ()


def supports(checkpoint: Checkpoint, table: LayerTable | None = None) -> str | None:
    """Why this engine cannot run a checkpoint, in one line; None where it can."""
    try:
        skeleton(plan(checkpoint, table))
    except UnsupportedModelError as error:
        return error.problem if error.tensor is None else f"{error.tensor}: {error.problem}"
    return None


class _LargeWeightsOnMeta(TorchFunctionMode):
    """Leaves uninitialized matrices without memory: they are the weights that linear layers are about to fill.

    Tables that a class computes (rotary frequencies and the like) are made as always.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.empty and kwargs.get("device") is None:
            shape = args[0] if args and not isinstance(args[0], int) else args
            if len(shape) > 1:
                kwargs = {**kwargs, "device": "meta"}
        return func(*args, **kwargs)


def skeleton(plan: Plan) -> nn.Module:
    """The transformer class with its large weights missing, checked against the plan.

    Raises:
        UnsupportedModelError: a parameter has no source, a source no parameter, or a shape differs.
    """
    import diffusers

    with _LargeWeightsOnMeta(), torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # what diffusers deprecates in its own classes
        try:  # the class itself is imported here, and with it what diffusers needs for it
            transformer = getattr(diffusers, plan.architecture.transformer)
            model = plan.architecture.build(transformer, plan.config)
        except (RuntimeError, ValueError, TypeError) as error:
            reason = str(error).splitlines()[-1]
            raise UnsupportedModelError(f"diffusers cannot build it: {reason}", hint=COMFYUI) from error
    wanted = model.state_dict()
    missing = [name for name in wanted if name not in plan.sources]
    left = [pieces[0].tensor for name, pieces in plan.sources.items() if name not in wanted]
    for problem, found in (("has no source in the checkpoint", missing), ("has no place in diffusers' model", left)):
        if found:
            more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
            raise UnsupportedModelError(problem + more, tensor=found[0], hint=COMFYUI)
    for name, value in wanted.items():
        shape = plan.shapes[name]
        if shape != tuple(value.shape):
            raise UnsupportedModelError(
                f"shape {list(value.shape)} was expected from the other tensors' shapes, found {list(shape)}",
                tensor=plan.sources[name][0].tensor,
                hint=COMFYUI,
            )
    return model.eval().requires_grad_(False)


@dataclass(frozen=True, eq=False)
class Denoiser:
    """A diffusion transformer that runs from its checkpoint.

    Attributes:
        plan: how it was put together.
        model: diffusers' module.
        linears: its linear layers by diffusers' module name.
        device, dtype: where and in what it computes.
    """

    plan: Plan
    model: nn.Module
    linears: Mapping[str, CheckpointLinear]
    device: torch.device
    dtype: torch.dtype

    @cached_property
    def layers(self) -> dict[str, CheckpointLinear]:
        """Checkpoint layer -> the module that sees its input first (a fused layer feeds several, alike)."""
        fed = [(layer.name, module) for module in self.linears.values() for layer, _ in module.stored.pieces]
        return {**dict(fed), **dict(reversed(fed))}

    def latent_shape(self, geometry: Geometry) -> tuple[int, ...]:
        """Shape of one sample's latents."""
        return self.plan.architecture.latents(self.plan.config, geometry)

    def signals(self, geometry: Geometry) -> dict[str, Signal]:
        """The conditioning that the model takes."""
        return self.plan.architecture.signals(self.plan.config, geometry)

    @torch.no_grad()
    def velocity(self, latents: Tensor, sigma: float, conditioning: Mapping[str, Tensor], geometry: Geometry) -> Tensor:
        """The predicted velocity, noise minus image.

        Args:
            latents: [batch, *latent shape].
            sigma: noise level in [0, 1].
            conditioning: by name, each [batch, ...].
            geometry: of the latents.

        Returns:
            float32, as `latents`, on the same device as these.
        """
        prediction = self.plan.architecture.prediction
        flows = prediction == "velocity"
        length = 1.0 if flows else math.hypot(1 - sigma, sigma)
        signal, noise = (1 - sigma) / length, sigma / length
        latents = latents / length
        inputs = Inputs(
            self.plan.config,
            geometry,
            latents.to(self.device, self.dtype),
            sigma if flows else diffusion_time(signal),
            {
                name: value.to(self.device, self.dtype if value.is_floating_point() else None)
                for name, value in conditioning.items()
            },
        )
        output = self.model(**self.plan.architecture.arguments(inputs), return_dict=False)
        output = output[0] if isinstance(output, tuple) and len(output) == 1 else output
        predicted: Tensor = self.plan.architecture.velocity(output).float().to(latents.device)
        predicted = predicted[:, -latents.shape[1] :]  # some classes give what became of the text before it
        if flows:
            return predicted
        if prediction == "noise":
            return predicted - (latents - noise * predicted) / max(signal, LEAST_SIGNAL)
        return (noise * latents + signal * predicted) - (signal * latents - noise * predicted)

    @contextmanager
    def adapted(self, adapters: LoraMatch | None) -> Iterator[None]:
        """Add adapters to the weights of layers, inside the block."""
        for module in self.linears.values():
            module.stored.adapters = adapters
        try:
            yield
        finally:
            for module in self.linears.values():
                module.stored.adapters = None


def load(
    checkpoint: Checkpoint,
    table: LayerTable | None = None,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    arithmetic: Arithmetic = "dequantize",
) -> Denoiser:
    """Make a checkpoint run.

    Args:
        checkpoint: the open checkpoint; must stay open.
        table: its layers, where they are known already.
        device: where to compute.
        dtype: to compute in; bfloat16 on a GPU and float32 on a CPU by default.
        arithmetic: how quantized layers compute; see `quantized_linear`.

    Raises:
        OptionError: unknown arithmetic or device.
        UnsupportedModelError: it cannot be run.
    """
    if arithmetic not in ARITHMETICS:
        raise OptionError(f"unknown arithmetic {arithmetic!r}", hint=f"one of {', '.join(ARITHMETICS)}")
    where = find_device(device)
    number = dtype or (torch.float32 if where.type == "cpu" else torch.bfloat16)
    found = plan(checkpoint, table)
    model = skeleton(found)
    by_weight = {layer.weight.name: layer for layer in found.table.linear()}
    dense_bytes = sum(4 * layer.out_features * layer.in_features for layer in by_weight.values())
    keep = where.type == "cpu" and dense_bytes <= KEEP_BYTES

    def value(name: str) -> Tensor:
        parts = found.sources[name]
        return torch.cat([_stored_rows(checkpoint, by_weight, found.full_names[part.tensor], part) for part in parts])

    linears: dict[str, CheckpointLinear] = {}
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear):
            pieces = [
                (_layer(by_weight, found, piece), slice(piece.start, piece.stop))
                for piece in found.sources[name + names.WEIGHT]
            ]
            layer = pieces[0][0]
            static = arithmetic in STATIC and not layer.dynamic
            linears[name] = CheckpointLinear(
                StoredWeight(checkpoint, pieces, where, keep),
                None if module.bias is None else value(name + names.BIAS),
                number,
                arithmetic=arithmetic,
                input_scale=input_scale(checkpoint, layer) if static else None,
                full_precision=layer.weight_scale is None or layer.full_precision,
            )
            parent, _, child = name.rpartition(".")
            model.get_submodule(parent)._modules[child] = linears[name]

    parameters = {name for name, _ in model.named_parameters()}
    rest = {
        name: value(name).reshape(old.shape).to(number if name in parameters else old.dtype)
        for name, old in model.state_dict().items()
        if name in found.sources
    }
    model.load_state_dict(rest, strict=False, assign=True)
    return Denoiser(found, model.to(where), linears, where, number)


def _layer(by_weight: Mapping[str, Layer], plan: Plan, piece: Piece) -> Layer:
    name = plan.full_names[piece.tensor]
    if name not in by_weight:
        raise UnsupportedModelError("a linear layer's weight was expected to be a matrix", tensor=name)
    return by_weight[name]


def _stored_rows(checkpoint: Checkpoint, by_weight: Mapping[str, Layer], name: str, piece: Piece) -> Tensor:
    """Rows of any float tensor of the file, float32 on the CPU."""
    if name in by_weight:
        return torch.from_numpy(dequantize(checkpoint, by_weight[name], slice(piece.start, piece.stop)))
    values = torch.from_numpy(checkpoint.float32(name))
    return values[piece.start : piece.stop] if values.ndim else values.reshape(1)
