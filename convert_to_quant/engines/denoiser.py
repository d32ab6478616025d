"""A diffusion transformer that runs straight from its checkpoint, in diffusers' own class.

A model has to run to show the inputs of its layers, or what quantization does to its predictions. Running it here needs
no configuration, no second copy of the weights and no download. Each step is checked before the next:

    plan      the family, where every weight of the diffusers class is in the checkpoint (`provenance.py`), and the
              configuration from the shapes; every checkpoint tensor must have a place
    skeleton  the class without its large weights; every parameter must have a source of its shape
    load      every linear layer becomes a `CheckpointLinear`, which reads its rows from the checkpoint when it runs;
              the small rest is loaded

Memory. On a CPU, weights stay in the file's pages; on a GPU, they are the file's own bytes. A 12B model in FP8 takes
12 GB, plus one layer's dequantized weight and its activations. Models with small weights (`KEEP_BYTES`) keep them
dequantized.

Precision. float32 on a CPU and bfloat16 on a GPU, as readers compute. Ranges differ between the two by about a bfloat16
rounding (0.4 %), far less than one more sample changes them.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .. import names
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
"""Arithmetics that use the file's input scale, for formats that have one."""

KEEP_BYTES = 1 << 29
"""Models whose dequantized weights are at most this large keep them; others dequantize at every step."""

LEAST_SIGNAL = 0.05
"""Least share of the image that a predicted noise is divided by: with less, it says nothing of the image."""

COMFYUI = "observe --comfyui-dir DIR may run it in ComfyUI"
"""Hint for unknown layouts."""


@dataclass(frozen=True)
class Plan:
    """How a checkpoint runs, found without reading a weight.

    Attributes:
        config: arguments of the transformer class.
        sources: model tensor name -> where its rows are, by bare tensor names.
        shapes: model tensor name -> its shape, from the sources.
        full_names: bare tensor name -> name in the checkpoint.
    """

    family: str
    architecture: Architecture
    config: Mapping[str, Any]
    sources: Mapping[str, tuple[Piece, ...]]
    shapes: Shapes
    table: LayerTable
    full_names: Mapping[str, str]


def plan(checkpoint: Checkpoint, table: LayerTable | None = None) -> Plan:
    """Find out how to run a checkpoint; `table` are its layers, if already known.

    Raises:
        UnsupportedModelError: its family is unknown or has no engine, or diffusers does not know its layout.
    """
    table = find_layers(checkpoint) if table is None else table

    def refuse(problem: str, tensor: str | None = None, hint: str | None = COMFYUI) -> UnsupportedModelError:
        return UnsupportedModelError(problem, path=checkpoint.path, tensor=tensor, hint=hint)

    found = identify(checkpoint, table)
    family, shapes = found.family, found.shapes
    if family is None and found.kind not in (None, "diffusion"):
        raise refuse(f"no diffusion model: {found.title}", hint=None)
    if family is None:
        raise refuse("its tensor names fit no known family", hint=found.hint or COMFYUI)
    architecture = family.runs(found.variant)
    if architecture is None:
        name = f"{family.title.partition(' (')[0]}{found.variant and f' ({found.variant})'}"
        raise refuse(f"{name} is not supported by this engine")
    foreign = [layer for layer in table.foreign.values() if table.owns(layer.name)]
    if foreign:
        number = plural(len(foreign), "layer")
        raise refuse(f"{number} in {foreign[0].form}, which cannot be dequantized here", foreign[0].name)
    used = {
        name: shape
        for name, shape in shapes.items()
        if name not in architecture.ignored and not re.fullmatch(architecture.optional, name)
    }
    spellings = index(both_ways(family.spellings))
    sources = renamed(used, (index(architecture.names), index(family.names)), spellings)
    model_shapes = {}
    for name, pieces in sources.items():
        rows = sum(piece.stop - piece.start for piece in pieces)
        shape = shapes[pieces[0].tensor]
        model_shapes[name] = (rows, *shape[1:]) if shape else ()
    try:
        config = architecture.config({**shapes, **model_shapes})
    except (KeyError, IndexError, ValueError, ZeroDivisionError, StopIteration) as error:
        why = f", without {error.args[0]}" if isinstance(error, KeyError) else ""
        raise refuse(f"unknown layout of {family.title}{why}") from None
    full_names = {bare: name for name, bare in names.strip_prefix(checkpoint.tensors)[1].items()}
    return Plan(family.name, architecture, config, sources, model_shapes, table, full_names)


def supports(checkpoint: Checkpoint, table: LayerTable | None = None) -> str | None:
    """Why this engine cannot run a checkpoint, in one line; None if it can."""
    try:
        skeleton(plan(checkpoint, table))
    except UnsupportedModelError as error:
        return error.problem if error.tensor is None else f"{error.tensor}: {error.problem}"
    return None


class _LargeWeightsOnMeta(TorchFunctionMode):
    """Allocates no memory for uninitialized matrices: linear layers fill them later.

    Tables that a class computes (rotary frequencies and the like) are made as usual.
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
    """The transformer class without its large weights, checked against the plan.

    Raises:
        UnsupportedModelError: a parameter has no source, a source has no parameter, or a shape differs.
    """
    import diffusers

    with _LargeWeightsOnMeta(), torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # from diffusers about its own classes
        try:  # this imports the class, and what diffusers needs for it
            transformer = getattr(diffusers, plan.architecture.transformer)
            model = plan.architecture.build(transformer, plan.config)
        except (RuntimeError, ValueError, TypeError) as error:
            reason = str(error).splitlines()[-1]
            raise UnsupportedModelError(f"diffusers cannot build it: {reason}", hint=COMFYUI) from error
    wanted = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    missing = [name for name in wanted if name not in plan.sources]
    left = [pieces[0].tensor for name, pieces in plan.sources.items() if name not in wanted]
    for problem, found in (("has no source in the checkpoint", missing), ("is not part of diffusers' model", left)):
        if found:
            raise UnsupportedModelError(problem, tensor=found[0], hint=COMFYUI)
    for name, shape in wanted.items():
        if plan.shapes[name] != shape:
            problem = (
                f"shape {list(shape)} was expected from the other tensors' shapes, found {list(plan.shapes[name])}"
            )
            raise UnsupportedModelError(problem, tensor=plan.sources[name][0].tensor, hint=COMFYUI)
    return model.eval().requires_grad_(False)


@dataclass(frozen=True, eq=False)
class Denoiser:
    """A diffusion transformer that runs from its checkpoint; `linears` are by diffusers' module name."""

    plan: Plan
    model: nn.Module
    linears: Mapping[str, CheckpointLinear]
    device: torch.device
    dtype: torch.dtype

    @cached_property
    def layers(self) -> dict[str, CheckpointLinear]:
        """Checkpoint layer -> the first module that sees its input (a fused layer feeds several the same)."""
        fed = [(layer.name, module) for module in self.linears.values() for layer, _ in module.stored.pieces]
        return {**dict(fed), **dict(reversed(fed))}

    def latent_shape(self, geometry: Geometry) -> tuple[int, ...]:
        """Shape of one sample's latents."""
        return self.plan.architecture.latents(self.plan.config, geometry)

    def signals(self, geometry: Geometry) -> dict[str, Signal]:
        """The conditioning inputs of the model."""
        return self.plan.architecture.signals(self.plan.config, geometry)

    @torch.no_grad()
    def velocity(self, latents: Tensor, sigma: float, conditioning: Mapping[str, Tensor], geometry: Geometry) -> Tensor:
        """The predicted velocity, noise minus image: float32, with the shape and device of the latents.

        Latents are [batch, *latent shape], sigma is in [0, 1], and each conditioning is [batch, ...].
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
        predicted = predicted[:, -latents.shape[1] :]  # some classes return text tokens before the image
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
    """Load a checkpoint to run it.

    Args:
        checkpoint: the open checkpoint; must stay open.
        table: its layers, if already known.
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

    def stored(piece: Piece) -> tuple[Layer, slice]:
        name = found.full_names[piece.tensor]
        if name not in by_weight:
            raise UnsupportedModelError("the weight of a linear layer should be a matrix", tensor=name)
        return by_weight[name], slice(piece.start, piece.stop)

    def rows(piece: Piece) -> Tensor:
        name = found.full_names[piece.tensor]
        if name in by_weight:
            return torch.from_numpy(dequantize(checkpoint, *stored(piece)))
        values = torch.from_numpy(checkpoint.float32(name))
        return values.reshape(values.shape or (1,))[piece.start : piece.stop]

    def value(name: str) -> Tensor:
        return torch.cat([rows(piece) for piece in found.sources[name]])

    linears: dict[str, CheckpointLinear] = {}
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear):
            pieces = [stored(piece) for piece in found.sources[name + names.WEIGHT]]
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
            setattr(model.get_submodule(parent), child, linears[name])

    parameters = {name for name, _ in model.named_parameters()}
    rest = {
        name: value(name).reshape(old.shape).to(number if name in parameters else old.dtype)
        for name, old in model.state_dict().items()
        if name in found.sources
    }
    model.load_state_dict(rest, strict=False, assign=True)
    return Denoiser(found, model.to(where), linears, where, number)
