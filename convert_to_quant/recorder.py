"""Watching the inputs of a model's linear layers while it runs, by whatever code runs it.

    with record(model) as recording:
        for sigma in schedule:
            recording.at(sigma)
            model(...)
    statistics = recording.statistics(samples=1, seed=0)

Forward pre-hooks hand what each layer multiplies by its weight (`linear_calls`: its input, or an activation of it) to
`kernels.accumulate`, which adds to totals on the input's own device. No hook waits for the device; values come to the
host once, in `statistics`. Hooks leave with the block, whatever ended it.

Inside ComfyUI two of its functions are watched as well, since they compute layers without calling them. A layer that
ran while no input of it was seen is named: `Recording.unseen`, and "unseen" in the statistics' provenance.

Rows per sample. Which layers see one row per image follows from shapes alone, once the batch size is known: it is the
first dimension of the first input of the model that has three dimensions or more, or the length of a list of inputs;
`Recording.batch` overrides it. Where it stays unknown, an input [tokens, in_features] counts as one sample.

Compiled models run uncompiled while they are watched: hooks put on after compilation would not be seen.

Limits. An input is recorded as the hook sees it: under autocast a float32 input is recorded before it is cast. Work on
several CUDA streams at once is not ordered against `statistics`; synchronize them first.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from .errors import CalibrationError, StatisticsError
from .formats import DEFAULT, of_mark
from .kernels import SIGMA_BINS, UNKNOWN_SIGMA, accumulate
from .kernels.reference import Totals
from .linear_calls import comfyui_watched, multiplied, outside_allocation_graphs, read_call
from .stats import CHANNELS, COLUMNS, Shape, Statistics, merge, sampled_place, sigma_bin

Sigma = float | Tensor | None
Names = Mapping[str, str | Sequence[str]] | Callable[[str], str | Sequence[str] | None]

COMPILED_PREFIX = "_orig_mod."
"""What torch.compile puts into the names of the modules it wraps."""


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a linear layer, or quacks like one: ComfyUI's quantized layers are no nn.Linear."""
    if isinstance(module, nn.Linear):
        return True
    # The type is asked first: a property may make the whole weight anew whenever it is read.
    return isinstance(getattr(module, "in_features", None), int) and (
        hasattr(type(module), "weight") or hasattr(module, "weight")
    )


def find_linears(model: nn.Module) -> dict[str, nn.Module]:
    """The linear layers of a model, outermost first found: the parts of a LoRA wrapper are not layers of their own.

    Returns:
        Module name, without what torch.compile adds to it -> module, in the model's order; a module that stands in
        several places, under its first name.
    """
    found: dict[str, nn.Module] = {}
    inside: set[nn.Module] = set()
    for name, module in model.named_modules():  # each once, and before what it is made of
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
    """A few weights of modules that `find_linears` found, as `naming.sample_weights` reads them from a file.

    Returns:
        By name, float32 [64]; without those that are in another format than FP8, on no device, or not finite.
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
    """Names of the layers that a run records: the quantized ones, or those that modules feed if none is quantized.

    Args:
        known: all layers of a checkpoint.
        quantized: those of the diffusion model that are quantized.
        feeds: module of the network -> the layers that its input feeds.
    """
    fed = {layer for layers in feeds.values() for layer in layers}
    return list(quantized) or [name for name in known if name in fed]


class Recording:
    """What `record` gives: totals so far, and the knobs of the run. Stays readable after the block.

    Args:
        layers: layer name -> shape of its weight: the rows of the statistics.
        slots: module name -> the layers that its input feeds.

    Attributes:
        layers: as given.
        batch: samples in each input, if the user of this class says so; None to find out.
    """

    def __init__(self, layers: Mapping[str, Shape], slots: Mapping[str, Sequence[str]]) -> None:
        self.layers = dict(layers)
        self.batch: int | None = None
        # One slot more than modules: what stays empty, for the layers that none feeds.
        self._widths = [*(next((self.layers[layer][1] for layer in fed), 0) for fed in slots.values()), 0]
        self._slot_of = {layer: number for number, fed in enumerate(slots.values()) for layer in fed}
        self._found_batch: int | None = None
        self._sigma: Sigma = None
        self.clear()

    def clear(self) -> None:
        """Forget everything seen so far."""
        self._ran: set[int] = set()
        self._totals: dict[torch.device, Totals] = {}
        self._sigma_bins: dict[torch.device, Tensor] = {}
        self._host = {name: np.zeros(len(self._widths), np.int64) for name in ("calls", "rows", "rows_per_sample")}

    def at(self, sigma: Sigma) -> AbstractContextManager[object]:
        """Tell the noise level of the inputs to come.

        Args:
            sigma: in [0, 1]; a number, or a tensor of one or more elements on any device, which is not waited for;
                None if unknown. Different levels in one batch, and levels outside [0, 1], count as unknown.

        Returns:
            A context manager, for those who want the former level back at the end of a block.
        """
        level = ExitStack()
        level.callback(self._set_sigma, self._sigma)
        self._set_sigma(sigma)
        return level

    def _set_sigma(self, sigma: Sigma) -> None:
        self._sigma = sigma
        self._sigma_bins = {}

    @property
    def unseen(self) -> tuple[str, ...]:
        """Layers that ran so far, and of which no input was seen."""
        unseen = {module for module in self._ran if not self._host["calls"][module]}
        return tuple(layer for layer in self.layers if self._slot_of.get(layer) in unseen)

    def observe(self, module: int, x: Tensor, multiplied: Iterable[Tensor] | None = None) -> None:
        """Add one input of the module with this number, which multiplies x by its weight, or these blocks of rows."""
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
        """Make what is kept on a device: the totals, and the column of the noise level."""
        if device not in self._totals:
            self._totals[device] = Totals(self._widths, device)
        if device not in self._sigma_bins:
            self._sigma_bins[device] = _sigma_bin_on(self._sigma, self._totals[device])

    def statistics(self, samples: int = 0, **facts: object) -> Statistics:
        """What was seen so far, on the host. Waits for the devices.

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
        """What all processes of a torch.distributed group saw together; every process must call it.

        Args:
            samples: images that the model ran for in this process.
            group: the process group; by default all processes.
            **facts: provenance of this process; see `Statistics.with_facts`.

        Returns:
            The same statistics in every process. This recording itself is unchanged.

        Raises:
            StatisticsError: the processes recorded different models.
        """
        return all_reduce(self.statistics(samples, **facts), group)


def _sigma_bin_on(sigma: Sigma, totals: Totals) -> Tensor:
    """The column of a noise level as int64 [1] on the totals' device; waits for no CUDA device if that is one."""
    device = totals.sigma_numbers.device
    if isinstance(sigma, Tensor):
        level = sigma.detach().to(torch.float64).reshape(-1)
        known = ((level >= 0) & (level <= 1) & (level == level[:1])).all()
        column = (torch.ceil(level[:1] * SIGMA_BINS) - 1).clamp(min=0)
        bin_number = torch.where(known, column, UNKNOWN_SIGMA).to(torch.int64)
        return bin_number.to(device, non_blocking=device.type != "cpu")  # the host must not read what is still coming
    number = sigma_bin(sigma)
    return totals.sigma_numbers[number : number + 1]


def _samples_in(values: Iterable[Any]) -> tuple[int, torch.device] | tuple[None, None]:
    """How many samples a model's inputs hold, and where: the first with three dimensions or more, or a list."""
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
        layers: the layers of the statistics. A mapping gives the weight shapes as the checkpoint has them (a module
            that feeds a part of a fused layer has another), and may name layers that no module feeds; names alone
            must all be fed and take the modules' shapes. By default every layer that a module feeds.
        names: module name -> the layer or layers that its input feeds (none: not recorded), as a mapping or a
            function; by default a module feeds the layer of its own name. Where several modules feed one layer, the
            first in the model's order is recorded for it: the parts of a fused layer share one input.
        sigma: asked at each call of `model`, with its positional and keyword arguments, for the noise level;
            `Recording.at` can tell it instead.

    Yields:
        The recording.

    Raises:
        CalibrationError: `names` has a module that the model lacks or that is not linear, `layers` are names and one
            is not fed, or no module is left.
    """
    linears = find_linears(model)
    wanted = None if layers is None else dict.fromkeys(layers)
    slots, shapes = _plan(linears, wanted, names)
    unknown = [layer for layer in wanted or () if layer not in shapes]
    if isinstance(layers, Mapping):
        table = {layer: (int(shape[0]), int(shape[1])) for layer, shape in layers.items()}
    elif unknown:
        raise CalibrationError(f"no module feeds this layer ({len(unknown)} like it)", tensor=unknown[0])
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
        if module not in modules:
            yield
            return
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
        stack.callback(modules.clear)  # whoever still holds `bypass` or `ran` tells nothing more
        stack.callback(model.register_forward_pre_hook(watch_model, with_kwargs=True).remove)
        for module in modules:
            stack.callback(module.register_forward_pre_hook(watch, with_kwargs=True).remove)
        stack.enter_context(comfyui_watched(bypass, ran))
        yield recording


def _plan(
    linears: Mapping[str, nn.Module], wanted: Collection[str] | None, names: Names | None
) -> tuple[dict[str, list[str]], dict[str, Shape]]:
    """Which modules to record for which layers, and the shapes of those layers as the modules have them."""
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
        raise CalibrationError(f"none of the {len(linears)} linear modules of the model is to be recorded")
    return slots, shapes


def all_reduce(statistics: Statistics, group: Any = None) -> Statistics:
    """Merge the statistics of all processes of a torch.distributed group; every process must call it.

    Args:
        statistics: of this process.
        group: the process group, gloo or nccl; by default all processes.

    Returns:
        The same statistics in every process.

    Raises:
        StatisticsError: the processes recorded different models.
    """
    everyone: list[Statistics] = gather(statistics.replace(metadata={}, path=None), group)
    for rank, other in enumerate(everyone):
        if list(other.layers.items()) != list(everyone[0].layers.items()):
            raise StatisticsError(f"process {rank} recorded another model than process 0")
    return merge(*everyone)


def gather(value: Any, group: Any = None) -> list[Any]:
    """What every process of a torch.distributed group passes here, by rank; [value] where there is no group."""
    from torch import distributed

    if not (distributed.is_available() and distributed.is_initialized()):
        return [value]
    everyone: list[Any] = [None] * distributed.get_world_size(group)
    distributed.all_gather_object(everyone, value, group)
    return everyone
