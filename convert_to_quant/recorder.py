"""Records the inputs of a model's linear layers while any code runs it.

    with record(model) as recording:
        for sigma in schedule:
            recording.at(sigma)
            model(...)
    statistics = recording.statistics(samples=1, seed=0)

Forward pre-hooks pass what each layer multiplies by its weight (`linear_calls`: its input, or an activation of it) to
`kernels.accumulate`, which adds to totals on the input's own device. No hook waits for the device; the host reads
values once, in `statistics`. Inside ComfyUI, two of its functions are watched as well, since they compute layers
without calling them. Layers that ran without an observed input are "unseen" in the provenance of the statistics.

Tokens per sample. Shapes show which layers get one token per image, once the batch size is known: it is the first
dimension of the model's first input with three dimensions or more, or the length of a list of inputs. Set
`Recording.batch` to override it. If it is unknown, an input [tokens, in_features] counts as one sample.

Limits. Compiled models run uncompiled while they are recorded, since hooks that are added later have no effect. Inputs
are recorded as the hook gets them: under autocast, a float32 input before it is cast. Synchronize work on several CUDA
streams before `statistics`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from .errors import CalibrationError
from .formats import DEFAULT, of_mark
from .kernels import SIGMA_BINS, UNKNOWN_SIGMA, accumulate
from .kernels.reference import Totals
from .linear_calls import comfyui_watched, multiplied, outside_allocation_graphs, read_call
from .stats import CHANNELS, COLUMNS, Shape, Statistics, merge, sampled_place, sigma_bin

Sigma = float | Tensor | None
Names = Mapping[str, str | Sequence[str]] | Callable[[str], str | Sequence[str] | None]

COMPILED_PREFIX = "_orig_mod."
"""Prefix of torch.compile in the names of modules."""


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear layer. ComfyUI's quantized layers are not nn.Linear, but have its attributes."""
    # The type comes first: a property may dequantize the whole weight whenever it is read.
    has_weight = hasattr(type(module), "weight") or hasattr(module, "weight")
    return has_weight and isinstance(getattr(module, "in_features", None), int)


def find_linears(model: nn.Module) -> dict[str, nn.Module]:
    """The outermost linear layers of a model, without the parts of LoRA wrappers.

    Returns:
        Module name without the prefix of torch.compile -> module, in the model's order; a module with several names has
        its first.
    """
    found: dict[str, nn.Module] = {}
    inside: set[nn.Module] = set()
    for name, module in model.named_modules():  # each once, before its children
        if module not in inside and is_linear(module):
            found[f"{name}.".replace(COMPILED_PREFIX, "").rstrip(".")] = module
            inside.update(module.modules())
    return found


def module_shape(module: nn.Module) -> Shape:
    """[out_features, in_features] of a linear layer."""
    out_features = getattr(module, "out_features", None)
    if not isinstance(out_features, int):
        out_features = int(module.weight.shape[0])  # type: ignore[index]
    return out_features, int(module.in_features)  # type: ignore[arg-type]


def sample_modules(linears: Mapping[str, nn.Module]) -> dict[str, NDArray[np.float32]]:
    """A few weights of modules from `find_linears`, the same as `naming.sample_weights` reads from a file.

    Returns:
        By name, float32 [64]; without modules in other formats than FP8, on the meta device, or not finite.
    """
    samples = {}
    for name, module in linears.items():
        weight: Any = module.weight
        kind = getattr(module, "quant_format", None)
        if kind is not None:
            if of_mark({"format": kind}) is not DEFAULT:
                continue
            weight = weight.dequantize()
        shape = module_shape(module)
        if weight.is_floating_point() and not weight.is_meta and weight.shape == shape and weight.numel():
            row, columns = sampled_place(shape)
            sample: NDArray[np.float32] = weight.detach()[row].float().cpu().numpy()[columns]
            if np.isfinite(sample).all():
                samples[name] = sample
    return samples


def layers_to_record(known: Iterable[str], quantized: Iterable[str], feeds: Mapping[str, Sequence[str]]) -> list[str]:
    """Names of the layers to record: the quantized ones, or all known layers that modules feed if none is quantized."""
    fed = {layer for layers in feeds.values() for layer in layers}
    return list(quantized) or [name for name in known if name in fed]


class Recording:
    """The totals of a recording, and its settings. Stays readable after the block.

    Args:
        layers: layer name -> shape of its weight; the rows of the statistics.
        slots: module name -> the layers that its input feeds.

    Attributes:
        batch: samples in each input; None to infer it.
    """

    def __init__(self, layers: Mapping[str, Shape], slots: Mapping[str, Sequence[str]]) -> None:
        self.layers = dict(layers)
        self.batch: int | None = None
        # The last slot stays empty, for layers that no module feeds.
        self._widths = [*(next((self.layers[layer][1] for layer in fed), 0) for fed in slots.values()), 0]
        self._slot_of = {layer: number for number, fed in enumerate(slots.values()) for layer in fed}
        self._found_batch: int | None = None
        self._sigma: Sigma = None
        self.clear()

    def clear(self) -> None:
        """Drop everything recorded so far."""
        self._ran: set[int] = set()
        self._totals: dict[torch.device, Totals] = {}
        self._sigma_bins: dict[torch.device, Tensor] = {}
        self._host = {name: np.zeros(len(self._widths), np.int64) for name in ("calls", "rows", "rows_per_sample")}

    def at(self, sigma: Sigma) -> None:
        """Set the noise level of the next inputs.

        Args:
            sigma: in [0, 1]; a number, or a tensor of one or more elements on any device, without waiting for it; None
                if unknown. Different levels in one batch, and levels outside [0, 1], count as unknown.
        """
        self._sigma = sigma
        self._sigma_bins = {}

    @property
    def unseen(self) -> tuple[str, ...]:
        """Layers that ran without an observed input."""
        unseen = {module for module in self._ran if not self._host["calls"][module]}
        return tuple(layer for layer in self.layers if self._slot_of.get(layer) in unseen)

    def observe(self, module: int, x: Tensor, multiplied: Iterable[Tensor] | None = None) -> None:
        """Add one input of the module with this number: x, or the blocks of rows that the weight multiplies instead."""
        if not x.is_floating_point() or x.is_meta:
            return
        rows = x.numel() // x.shape[-1] if x.ndim and x.shape[-1] else 0
        samples = self.batch or self._found_batch or (x.shape[0] if x.ndim > 2 else 1)
        host = self._host
        host["calls"][module] += 1
        host["rows"][module] += rows
        host["rows_per_sample"][module] = max(host["rows_per_sample"][module], -(-rows // max(samples, 1)))
        if not rows:
            return
        with torch.no_grad(), outside_allocation_graphs():
            self._prepare(x.device)
            for part in (x,) if multiplied is None else multiplied:
                accumulate(self._totals[x.device], module, self._sigma_bins[x.device], part)

    def _prepare(self, device: torch.device) -> None:
        """Allocate the totals and the column of the noise level on a device."""
        if device not in self._totals:
            self._totals[device] = Totals(self._widths, device)
        if device not in self._sigma_bins:
            self._sigma_bins[device] = _sigma_bin_on(self._sigma, self._totals[device])

    def statistics(self, samples: int = 0, **facts: object) -> Statistics:
        """The statistics so far, on the host. Waits for the devices.

        Args:
            samples: images that the model ran for.
            **facts: provenance; see `Statistics.with_facts`.
        """
        totals = list(self._totals.values()) or [Totals(self._widths, torch.device("cpu"))]
        sources = [self._slot_of.get(layer, -1) for layer in self.layers]
        columns: dict[str, Any] = {name: array[sources] for name, array in self._host.items()}
        for name in COLUMNS.keys() - columns.keys():
            columns[name] = COLUMNS[name].merge.reduce([getattr(each, name).cpu().numpy() for each in totals])[sources]
        channels = [
            np.maximum.reduce([bits.view(torch.float32).cpu().numpy() for bits in slot])
            for slot in zip(*(each.channel_bits for each in totals), strict=True)
        ]
        columns[CHANNELS] = tuple(channels[source] for source in sources)
        unseen = {"unseen": self.unseen} if self.unseen else {}
        return Statistics(self.layers, **columns).with_facts(samples, **unseen, **facts)

    def all_reduce(self, samples: int = 0, group: Any = None, **facts: object) -> Statistics:
        """The merged statistics of all processes of a torch.distributed group; every process must call it.

        `samples` and `facts` are those of this process; see `statistics`, and `all_reduce` of this module.
        """
        return all_reduce(self.statistics(samples, **facts), group)


def _sigma_bin_on(sigma: Sigma, totals: Totals) -> Tensor:
    """The column of a noise level, int64 [1] on the totals' device; does not wait for CUDA totals."""
    device = totals.sigma_numbers.device
    if isinstance(sigma, Tensor):
        level = sigma.detach().to(torch.float64).reshape(-1)
        known = ((level >= 0) & (level <= 1) & (level == level[:1])).all()
        column = (torch.ceil(level[:1] * SIGMA_BINS) - 1).clamp(min=0)
        bin_number = torch.where(known, column, UNKNOWN_SIGMA).to(torch.int64)
        return bin_number.to(device, non_blocking=device.type != "cpu")  # a CPU must not read it too early
    number = sigma_bin(sigma)
    return totals.sigma_numbers[number : number + 1]


def _samples_in(values: Iterable[Any]) -> tuple[int, torch.device] | tuple[None, None]:
    """Samples and device of a model's inputs: of the first with three dimensions or more, or the first list."""
    for value in values:
        if isinstance(value, Tensor) and value.ndim > 2:
            return value.shape[0], value.device
        if isinstance(value, (list, tuple)) and value and all(isinstance(part, Tensor) for part in value):
            return len(value), value[0].device
    return None, None


@contextmanager
def record(
    model: nn.Module,
    layers: Iterable[str] | Mapping[str, Shape] | None = None,
    names: Names | None = None,
    sigma: Callable[[tuple[Any, ...], dict[str, Any]], Sigma] | None = None,
) -> Iterator[Recording]:
    """Record the inputs of a model's linear layers while the block runs.

    Args:
        model: any module; its linear layers are nn.Linear, and whatever has `in_features` and `weight`.
        layers: the layers of the statistics. A mapping gives the weight shapes of the checkpoint (those of modules that
            are parts of a fused layer differ), and may contain layers that no module feeds. Names without shapes must
            all be fed, and get the modules' shapes. By default, every layer that a module feeds.
        names: module name -> the layer or layers that its input feeds (none: not recorded), as a mapping or a
            function; by default a module feeds the layer of its own name. If several modules feed one layer, the first
            in the model's order is recorded: the parts of a fused layer share one input.
        sigma: gives the noise level of each call of `model`, from its positional and keyword arguments; or use
            `Recording.at`.

    Yields:
        The recording.

    Raises:
        CalibrationError: a module in `names` does not exist or is not linear, a layer without a shape is not fed, or no
            module is left.
    """
    linears = find_linears(model)
    wanted = None if layers is None else dict.fromkeys(layers)
    slots, shapes = _plan(linears, wanted, names)
    unknown = [layer for layer in wanted or () if layer not in shapes]
    if isinstance(layers, Mapping):
        table = {layer: (int(shape[0]), int(shape[1])) for layer, shape in layers.items()}
    elif unknown:
        raise CalibrationError(f"no module feeds this layer (1 of {len(unknown)})", tensor=unknown[0])
    else:
        table = {layer: shapes[layer] for layer in wanted or shapes}
    recording = Recording(table, slots)

    modules = {linears[name]: (number, fed[0]) for number, (name, fed) in enumerate(slots.items())}
    seen_already: set[nn.Module] = set()

    def watch_model(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        recording._found_batch, device = _samples_in((*args, *kwargs.values()))
        if sigma is not None:
            recording.at(sigma(args, kwargs))
        if device is not None and device.type != "meta":  # before any block, see `outside_allocation_graphs`
            with outside_allocation_graphs():
                recording._prepare(device)

    def watch(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        if module in seen_already:
            return
        ran(module)
        number, layer = modules[module]
        x, activation = read_call(layer, args, kwargs)
        if x is not None:
            recording.observe(number, x, multiplied(layer, int(module.in_features), x, activation))  # type: ignore[arg-type]

    @contextmanager
    def bypass(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[None]:
        if module in modules:
            watch(module, args, kwargs)
        seen_already.add(module)
        try:
            yield
        finally:
            seen_already.discard(module)

    def ran(module: nn.Module) -> None:
        if module in modules:
            recording._ran.add(modules[module][0])

    with ExitStack() as stack:
        if "torch._dynamo" in sys.modules and hasattr(torch.compiler, "set_stance"):
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.callback(modules.clear)  # late calls of `bypass` and `ran` have no effect
        stack.callback(model.register_forward_pre_hook(watch_model, with_kwargs=True).remove)
        for module in modules:
            stack.callback(module.register_forward_pre_hook(watch, with_kwargs=True).remove)
        stack.enter_context(comfyui_watched(bypass, ran))
        yield recording


def _plan(
    linears: Mapping[str, nn.Module], wanted: Collection[str] | None, names: Names | None
) -> tuple[dict[str, list[str]], dict[str, Shape]]:
    """Modules to record -> their layers, and the shapes of these layers in the modules."""
    if isinstance(names, Mapping):
        unknown = [name for name in names if name not in linears]
        if unknown:
            raise CalibrationError(
                f"no linear module of that name in the model ({len(unknown)} of {len(names)})", tensor=unknown[0]
            )
        names = names.get
    slots: dict[str, list[str]] = {}
    shapes: dict[str, Shape] = {}
    for name, module in linears.items():
        fed = name if names is None else names(name)
        for layer in [fed] if isinstance(fed, str) else fed or ():
            if layer not in shapes and (wanted is None or layer in wanted):
                slots.setdefault(name, []).append(layer)
                shapes[layer] = module_shape(module)
    if not slots:
        raise CalibrationError(f"none of the model's {len(linears)} linear modules has a layer to record")
    return slots, shapes


def all_reduce(statistics: Statistics, group: Any = None) -> Statistics:
    """Merge the statistics of all processes of a torch.distributed group (gloo or nccl); every process must call it.

    Raises:
        StatisticsError: the processes recorded different models.
    """
    return merge(*gather(statistics.replace(metadata={}, path=None), group))


def gather(value: Any, group: Any = None) -> list[Any]:
    """The values of all processes of a torch.distributed group, by rank; [value] without a group."""
    from torch import distributed

    if not (distributed.is_available() and distributed.is_initialized()):
        return [value]
    everyone: list[Any] = [None] * distributed.get_world_size(group)
    distributed.all_gather_object(everyone, value, group)
    return everyone
