"""FP16, BF16 and FP32 checkpoints to another number format: which layers, with which scale, and the file.

A weight W becomes codes C = round(clamp(W / s, ±max)) on the format's grid and a scale s, so that W ≈ C · s. One s
serves the whole weight (tensor), a row of it (row), or a block of it (block), as the format has it.

    absmax   s = max|W| / max: nothing is clipped, the largest weight becomes the largest code.
    mse      the s of least Σ (W - C·s)² between a half and twice that. FP8 is a float, so where s falls on its grid
             matters little and clipping matters much; the search says exactly how much.

The mse search is exact. For fixed codes the error is a parabola in s, and a code changes only where |W|/s crosses a
midpoint m between two code values, at s = |W|/m. So the axis of s falls into intervals, in each of which
error(s) = Σ w² - 2 s Σ w·c + s² Σ c² for known sums; sorted breakpoints and running sums give them all, and with them
the global minimum. A 16-bit weight has at most 32,768 magnitudes, so a histogram stands for it; a float32 weight is
binned to bfloat16 for the search (not for the codes).

16-bit weights under one scale are a table look-up (65,536 entries, made with `Grid.encode`, so bit for bit the same).
Work is streamed in chunks straight to the output, layers side by side in threads: memory does not grow with the file.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from . import __version__, families, layout, names
from .checkpoint import (
    ALL_ROWS,
    Checkpoint,
    CheckpointWriter,
    Spec,
    refuse_same_file,
    serialize_header,
    to_float32,
)
from .checkpoint.reader import BIT_DTYPES
from .checkpoint.writer import lay_out
from .errors import CheckpointError, OutputError, TensorError
from .families.base import OUTSIDE
from .formats import DEFAULT, FORMATS
from .formats.packing import round_up
from .formats.record import CHUNK, TORCH_NAMES, Format, Packed, narrow_bfloat16, scale_grid, spans
from .identity import Identity, identify
from .layers import Layer, LayerTable, dequantize, determined, find_layers, input_scale, named, scales_per_row
from .layout import WORKERS, Sink
from .lazy_torch import torch
from .lora import Lora, LoraMatch, Survival, match_checkpoint, merge_rows
from .marks import SCALE_BYTES, Config, Way, scale_room, with_full_precision
from .options import ConvertOptions
from .telling import Advance, plural
from .untrusted import JSONError, parse_json

if TYPE_CHECKING:
    from torch import Tensor

BAND_VALUES = 1 << 18
"""Values per step where scales differ within a weight: about 1 MB of float32, which a core's cache holds."""

DEVICE_BAND_VALUES = 1 << 23
"""The same on a GPU: enough to occupy it."""

STAGED_BYTES = 1 << 24
"""What a thread copies to a GPU at a time."""

MSE_SECONDS_PER_WEIGHT = 5e-6
"""What the exact search takes per weight where scales differ within a weight; measured on one core, 2026-11-22."""

KEPT_BYTES = 31 << 20
"""A block of this size that was freed tells glibc to keep smaller ones (mallopt(3), M_MMAP_THRESHOLD). Else the kernel
maps and clears every temporary anew: seven times as many page faults for INT8 ConvRot, 2026-11-26."""

_LARGEST_BFLOAT16 = 0x7F7F


@dataclass(frozen=True)
class Decision:
    """What becomes of one layer.

    Attributes:
        layer: the layer as it is in the input.
        format: what its weight becomes; None where it stays as it is.
        reason: why it stays, or why it gets another format than the one asked for.
        input_scale: where the file is to hold one; None where readers shall find it, or take it for 1.0.
        full_precision: its inputs are not quantized.
        as_it_is: its weight is codes of the format already, without a scale, and gets 1.0 for one.
    """

    layer: Layer
    format: Format | None
    reason: str = ""
    input_scale: float | None = None
    full_precision: bool = False
    as_it_is: bool = False

    @property
    def quantize(self) -> bool:
        """Whether its weight is quantized."""
        return self.format is not None


@dataclass(frozen=True)
class ConversionPlan:
    """What will become of a checkpoint; nothing has been written yet.

    Attributes:
        table: its layers.
        family: the family whose table decided.
        identity: what the file is.
        decisions: one for every layer in high precision, then those that were only cast to FP8, in file order.
        options: how.
        ways: how the file says it; one or several that agree.
        notes: what a user should know.
        merged: adapters that are added to weights before these are rounded.
        steps: what the file's provenance says beside "convert": how formats were chosen.
    """

    table: LayerTable
    family: families.Family
    identity: Identity
    decisions: list[Decision]
    options: ConvertOptions
    ways: tuple[Way, ...]
    notes: list[str]
    merged: LoraMatch = field(default_factory=lambda: LoraMatch({}))
    steps: Mapping[str, Any] = field(default_factory=dict)

    @property
    def quantized(self) -> list[tuple[Layer, Format]]:
        """The layers that are quantized, and what they become."""
        return [(each.layer, each.format) for each in self.decisions if each.format is not None]

    @property
    def kept(self) -> list[Layer]:
        """The layers of the diffusion model that stay in high precision."""
        layers = (each.layer for each in self.decisions if each.format is None and each.layer.format is None)
        return [layer for layer in layers if self.table.owns(layer.name) and layer.weight.elements]

    @property
    def merged_only(self) -> list[Layer]:
        """The layers that adapters change and that stay in high precision."""
        return [layer for layer in self.kept if layer.name in self.merged.matched]

    def spelled(self, suffix: str) -> str:
        """A suffix as the file spells it."""
        return self.ways[0].spelled(suffix) or suffix

    @property
    def formats(self) -> dict[Format, int]:
        """How many layers become what, the most frequent first."""
        return dict(Counter(fmt for _, fmt in self.quantized).most_common())

    @property
    def title(self) -> str:
        """What is converted, for people."""
        return self.identity.title if self.identity.encoder else self.family.title

    @property
    def no_input_scales(self) -> str:
        """Why there is nothing to calibrate in what is written; "" where there is."""
        if self.identity.encoder:
            return f"{self.title}, which ComfyUI runs in full precision, so no input scales are written"
        if not self.formats or any(fmt.static for fmt in self.formats):
            return ""
        titles = " and ".join(dict.fromkeys(fmt.title for fmt in self.formats))
        return f"readers of {titles} layers scale inputs as they come"

    def summary(self) -> str:
        """One line: how many layers, into what, and which family's table decided."""
        weights = sum(layer.out_features * layer.in_features for layer, _ in self.quantized)
        words = [fmt.marked if fmt.grid else fmt.name for fmt in self.formats]
        if len(words) > 1:
            words = [f"{count} {fmt.name}" for fmt, count in self.formats.items()]
        scaled = f"{next(iter(self.formats)).granularity} scales, " if len(words) == 1 else ""
        return (
            f"{len(self.quantized)} of {len(self.decisions)} linear layers to "
            f"{', '.join(words) or self.options.format} "
            f"({weights / 1e6:,.1f} M weights, {scaled}{self.title})"
        )

    def told(self) -> list[str]:
        """Its notes, and what adapters matched."""
        return [*self.notes, *(self.merged.notes() if self.merged.loras else ())]

    def readers(self) -> list[str]:
        """What reads each format beside the default one, and where it is fast."""
        others = [fmt for fmt in self.formats if fmt is not DEFAULT]
        return [f"{fmt.title} is read by {fmt.read_by}, and fast on {fmt.cards}" for fmt in others]


def plan_conversion(checkpoint: Checkpoint, options: ConvertOptions, loras: Sequence[Lora] = ()) -> ConversionPlan:
    """Decide for every layer whether it is quantized.

    Args:
        checkpoint: what to convert.
        options: how.
        loras: adapters to merge first.

    Returns:
        The plan.

    Raises:
        CheckpointError: the checkpoint's layers cannot be read.
        OptionError: the preset does not exist.
        LoraError: an adapter does not fit, or a file matches nothing.
        TensorError: an adapter changes a quantized layer that is not rounded anew.
    """
    table = find_layers(checkpoint)
    merged = match_checkpoint(loras, checkpoint, table, beside=True) if loras else LoraMatch({})
    found = identify(checkpoint, table)
    if options.preset is None and found.kind in ("vae", "adapter", "statistics", "packed"):
        raise CheckpointError(f"nothing to convert in it: {found.title}", path=checkpoint.path,
                              hint="convert the original" if found.kind == "packed" else None)  # fmt: skip
    if found.encoder:
        options = replace(options, input_scale=False)  # which nothing reads
    family = families.family(options.preset) if options.preset is not None else found.family or families.GENERIC
    keeps = partial(found.kept_because, family=family)
    bare = names.strip_prefix(checkpoint.tensors)[1]
    notes = [*table.notes, *(found.notes if options.preset is None else [])]
    if banks := found.banks:
        which = f"{len(banks)}, first: {banks[0]}"
        notes.append(f"banks of experts stay as they are ({which}): readers of FP8 banks use no measured input scale")
    decide = partial(_decide, bare=bare, keeps=keeps, options=options)
    here = [*table.quantized.values(), *(table.raw.values() if options.requantize else ())]
    again = [_carried(checkpoint, decide(each, changed=each.name in merged.matched)) for each in here]
    cast = [] if options.requantize else [_as_it_is(decide(layer)) for layer in table.raw.values()]
    notes += _say_cast(cast)
    decisions = [*map(decide, table.plain.values()), *cast]
    if options.requantize:
        decisions += again
        again = [each for each in again if each.format is None]
        notes += _say_again(checkpoint, [each.layer for each in decisions if each.format and each.layer.format])
    for each in (*cast, *again):
        if each.layer.name in merged.matched:
            raise _cannot_merge(checkpoint, each, options)
    counts = {named(each.layer for each in again): len(again), "other formats": len(table.foreign)}
    if any(counts.values()):
        kept = ", ".join(f"{count} in {kind}" for kind, count in counts.items() if count)
        more = "; --requantize rounds them anew" if any(each.format for each in again) else ""
        notes.append(f"already quantized layers stay as they are: {kept}{more}")
    ways: tuple[Way, ...] = ()
    if any(decision.quantize for decision in decisions):
        target = "legacy" if options.legacy else "comfy"
        ways = table.marks.anew(target) if options.requantize else table.marks.to_write(options.legacy)
    if options.weight_scale == "mse":
        weights = sum(
            each.layer.weight.elements
            for each in decisions
            if each.format and each.format.granularity != "tensor" and not isinstance(each.format, Packed)
        )
        minutes = weights * MSE_SECONDS_PER_WEIGHT / 60
        if minutes > 1:
            notes.append(f"an exact search for every row or block takes about {minutes:.0f} core minutes")
    notes += [] if table.quantized or table.raw or table.foreign else _say_little(found, decisions)
    return ConversionPlan(table, family, found, decisions, options, ways, notes, merged)


def _say_little(found: Identity, decisions: list[Decision]) -> list[str]:
    """What a user should know where most of a model's blocks would stay in high precision."""
    weights = found.structure.block_weights(found.shapes)
    quantized = [each.layer for each in decisions if each.format]
    share = sum(layer.out_features * layer.in_features for layer in quantized) / max(weights, 1)
    if share >= 0.5 or not weights or any(each.layer.format for each in decisions):
        return []
    reasons = Counter(each.reason for each in decisions if not each.format and each.reason != OUTSIDE)
    most = f" ({reasons.most_common(1)[0][0]})" if reasons else ""
    return [f"only {share:.0%} of the weights in repeated blocks would be quantized; the rest stays as it is{most}"]


def _cannot_merge(checkpoint: Checkpoint, decision: Decision, options: ConvertOptions) -> TensorError:
    layer = decision.layer
    return TensorError(
        f"a LoRA changes this layer, which is {named([layer])} already and would not be rounded anew",
        path=checkpoint.path_of(layer.weight.name),
        tensor=layer.weight.name,
        hint="merge into the original in 16 bits" + ("" if options.requantize else ", or add --requantize"),
    )


def _as_it_is(decision: Decision) -> Decision:
    """What becomes of a layer that was only cast: a scale of 1.0 and a mark, where it is in the format asked for."""
    layer, fmt = decision.layer, decision.format
    if fmt is None:
        return decision
    if fmt is DEFAULT and layer.format is DEFAULT:
        return replace(decision, reason="a plain cast: marked as it is, with a scale of 1.0", as_it_is=True)
    return replace(decision, format=None, reason=f"a plain cast to {layer.title} already")


def _say_cast(cast: list[Decision]) -> list[str]:
    """What a user should know of layers that were only cast."""
    if not cast:
        return []
    marked = sum(each.as_it_is for each in cast)
    done = f"{marked} of them are marked as they are, with a scale of 1.0" if marked else "they stay as they are"
    what = f"{plural(len(cast), 'layer')} are a plain cast to {named(each.layer for each in cast)} without scales"
    return [f"{what}: {done}; the original in 16 bits keeps more, and --requantize rounds them anew"]


def _say_again(checkpoint: Checkpoint, layers: list[Layer]) -> list[str]:
    """What a user should know of quantized layers that are rounded anew."""
    for layer in layers:
        if layer.marking == "none":
            determined(checkpoint, layer.name)
    count = f"{plural(len(layers), 'layer')} in {named(layers)}"
    return [f"rounded a second time: {count}; the original in 16 bits keeps more"] if layers else []


def _decide(
    layer: Layer,
    bare: Mapping[str, str],
    keeps: Callable[[str], str | None],
    options: ConvertOptions,
    *,
    changed: bool = False,
) -> Decision:
    """Quantize a layer, or the first reason not to; one that is `changed` is rounded anew to its own format, too."""
    part, bare_weight = names.other_part(layer.name), bare.get(layer.weight.name)
    if bare_weight is None or (part is not None and bare_weight == layer.weight.name):
        return Decision(layer, None, f"belongs to a {part}" if part else "outside the diffusion model")
    excluded = next((pattern for pattern in options.exclude if re.search(pattern, layer.name)), None)
    if excluded is not None:
        return Decision(layer, None, f"excluded by {excluded!r}")
    kept = keeps(bare_weight[: -len(names.WEIGHT)])
    if kept is not None:
        return Decision(layer, None, kept)
    if layer.weight.elements == 0:
        return Decision(layer, None, "has no elements")
    wanted = fmt = options.record_of(layer.name)
    reason = ""
    while not fmt.takes(layer.shape):
        sides = f"{layer.out_features} × {layer.in_features}"
        reason = reason or f"{sides}: {fmt.title} needs {fmt.needs}"
        if not fmt.fallback:
            return Decision(layer, None, reason)
        fmt = FORMATS[fmt.fallback]
    if layer.format is not None and layer.marking != "raw" and not changed and _is_in(layer, fmt):
        return Decision(layer, None, f"is {fmt.title} already")
    return Decision(layer, fmt, reason if fmt is not wanted else "")


def _is_in(layer: Layer, fmt: Format) -> bool:
    """Whether a layer is in a format, however it is marked."""
    if isinstance(fmt, Packed) or layer.format is None:
        return layer.format is fmt
    return layer.format.mark == fmt.mark and layer.granularity == fmt.granularity


def _carried(checkpoint: Checkpoint, decision: Decision) -> Decision:
    """A decision about a quantized layer with what it keeps: full precision, and an input scale for the same range."""
    layer, fmt = decision.layer, decision.format
    scale = None
    if fmt is not None and layer.format is not None and layer.static and layer.input_problem is None:
        found = input_scale(checkpoint, layer)
        scale = None if found == 1.0 else found * layer.format.range / fmt.range  # 1.0 was measured by nobody
    return replace(decision, input_scale=scale, full_precision=layer.full_precision)


def _lay_out(checkpoint: Checkpoint, plan: ConversionPlan) -> layout.Layout:
    """The output's tensors, each with the input tensor whose shard it follows."""
    options = plan.options
    made: dict[str, dict[str, tuple[Spec, layout.Source]]] = {
        layer.weight.name: {layer.weight.name: (Spec.like(layer.weight), None)} for layer in plan.merged_only
    }
    view = MergedCheckpoint(checkpoint, (), plan.merged)
    for name in plan.merged.beside:
        made[name] = {name: (Spec.like(checkpoint.tensors[name]), view.bits(name).tobytes())}
    configs: dict[str, Config] = {}
    dropped: set[str] = set()
    without_scale = []
    for decision in plan.decisions:
        layer, fmt = decision.layer, decision.format
        if fmt is None:
            continue
        config = with_full_precision(fmt.config(layer.shape, options.block_size), decision.full_precision)
        tensors: dict[str, tuple[Spec, layout.Source]] = {
            layer.name + plan.spelled(suffix): (Spec(dtype, shape), None)
            for suffix, (dtype, shape) in fmt.storage(layer.shape, options.block_size).items()
        }
        if decision.as_it_is:
            tensors[layer.weight.name] = (Spec.like(layer.weight), layer.weight.name)
            tensors[layer.name + plan.spelled(names.WEIGHT_SCALE)] = (Spec("F32", ()), np.float32(1).tobytes())
        spare_bytes = 0
        if options.input_scale and fmt.static and not (fmt.dynamic and decision.input_scale is None):
            name = layer.name + plan.ways[0].input_scale
            stray = layer.format is None and name in checkpoint  # which is refused
            if decision.input_scale is None and plan.ways[0].leaves_room and not stray:
                spare_bytes = SCALE_BYTES
                without_scale.append(layer.name)
            else:
                scale = np.float32(1.0 if decision.input_scale is None else decision.input_scale)
                tensors[name] = (Spec("F32", ()), scale.tobytes())
        for way in plan.ways:
            tensors.update(way.beside(layer.name, config, spare_bytes=spare_bytes))
        made[layer.weight.name], configs[layer.name] = tensors, config
        if layer.format is not None:
            dropped.update(layout.beside(checkpoint, layer.name))
    metadata: Mapping[str, str] = checkpoint.metadata
    if options.requantize:  # what stays is marked like the rest
        kept, told, unmarked = layout.remark(checkpoint, plan.table, plan.ways, configs)
        made, configs, dropped = made | kept, configs | told, dropped | unmarked
        metadata = plan.table.marks.other_metadata
    marked = layout.mark_once(made, configs, plan.ways, metadata)
    if without_scale:
        marked[names.QUANTIZATION_METADATA] += scale_room(without_scale)
    step = asdict(options) | {"family": plan.family.name}
    if plan.merged.loras:
        step["merged"] = [{"file": lora.path.name, "strength": lora.strength} for lora in plan.merged.loras]
    room = provenance_room(layer.name for layer, _ in plan.quantized)
    marked[names.PROVENANCE_KEY] = provenance(checkpoint.metadata, convert=step, **plan.steps) + room
    return layout.lay_out(checkpoint, made, dropped, marked)


def written_bytes(checkpoint: Checkpoint, plan: ConversionPlan) -> int:
    """The size of the file that `convert` would write, in bytes."""
    output = _lay_out(checkpoint, plan)
    return len(serialize_header(lay_out(output.specs), output.metadata)) + sum(s.nbytes for s in output.specs.values())


PROVENANCE_ROOM_BYTES = 1024
"""Spaces that leave room for a later calibration to say, in place, how it was done; layer names come on top."""


def provenance_room(layers: Iterable[str]) -> str:
    """Spaces for what a calibration says of layers."""
    return " " * (PROVENANCE_ROOM_BYTES + sum(len(name) + len('"", ') for name in layers))


def provenance(metadata: Mapping[str, str], **steps: Any) -> str:
    """The header entry that says which tool, with which options, made a file.

    Args:
        metadata: of the input, whose own steps are kept unless they are taken anew.
        **steps: options by step ("convert", "calibrate").
    """
    before: Any = {}
    with contextlib.suppress(JSONError):  # whoever wrote it, it is a remark, not data
        before = parse_json(metadata.get(names.PROVENANCE_KEY, "{}"))
    return json.dumps({**(before if isinstance(before, dict) else {}), **steps, "version": __version__}, sort_keys=True)


def convert(
    checkpoint: Checkpoint,
    plan: ConversionPlan,
    output: Path,
    *,
    device: str = "cpu",
    rounding: Callable[[Layer, Format], Mapping[str, Tensor] | None] | None = None,
    progress: Advance | None = None,
    before_commit: Callable[[CheckpointWriter], None] | None = None,
) -> None:
    """Write the converted checkpoint.

    Args:
        checkpoint: the input.
        plan: what becomes of it.
        output: a `.safetensors` path, or `.safetensors.index.json` to keep the input's shards.
        device: where torch computes; see `quantize_weight`.
        rounding: finds what is stored of a layer, by suffix; each weight goes to nearest where it finds nothing.
        progress: told how many input bytes were done.
        before_commit: called with the complete but still unnamed output, which it may read and change in place
            (calibration); if it raises, there is no output.

    Raises:
        TensorError: a weight has NaN or infinite values; the file is not written.
        OutputError: the output cannot be written, or is the input.
    """
    refuse_same_file(output, [checkpoint.path, *(file.path for file in checkpoint.files)])
    if not plan.quantized:
        raise OutputError(
            f"nothing to convert: no layer would become {plan.options.record.title}",
            path=checkpoint.path,
            hint="--dry-run says why, per layer"
            + ("; --actcal calibrates the FP8 layers that are there" if plan.table.static else ""),
        )

    def job(layer: Layer, fmt: Format) -> layout.Job:
        def work(write: Sink) -> None:
            def sink(suffix: str, data: NDArray[Any], start: int) -> None:
                write(layer.name + plan.spelled(suffix), data, start)

            rounded = None if rounding is None else rounding(layer, fmt)
            if rounded is not None:
                for suffix, tensor in rounded.items():
                    sink(suffix, _bytes_of(tensor), 0)
                return
            source, high = checkpoint, layer
            if layer.format is not None or layer.name in plan.merged.matched:
                source = _Widened(checkpoint, layer, plan.merged)  # here: it holds the rows it made last
                weight = replace(layer.weight, dtype="F32", shape=layer.shape)
                high = Layer(layer.name, weight, None, "plain", layer.shape)
            quantize_weight(source, high, fmt, plan.options, sink, device=place)

        return layer.weight.nbytes, work

    np.empty(KEPT_BYTES, np.uint8)
    place = None if device == "cpu" else torch.device(device)
    computes = place is not None or any(isinstance(fmt, Packed) for fmt in plan.formats)
    jobs = [job(each.layer, each.format) for each in plan.decisions if each.format and not each.as_it_is]
    jobs += [(0, partial(_check_kept, checkpoint, each)) for each in plan.kept]
    jobs += [(each.weight.nbytes, partial(_merge_kept, checkpoint, each, plan.merged)) for each in plan.merged_only]
    layout.write(checkpoint, _lay_out(checkpoint, plan), output, jobs, progress=progress, before_commit=before_commit,
                 threads=_threads(place) if computes else None)  # fmt: skip


@contextlib.contextmanager
def _threads(device: torch.device | None) -> Iterator[ThreadPoolExecutor]:
    """Threads in which torch starts no further ones, each with a stream of its own on a GPU."""
    before = torch.get_num_threads()

    def begin() -> None:
        torch.set_num_threads(1)
        if device is not None and device.type == "cuda":
            torch.cuda.set_stream(torch.cuda.Stream(device))  # type: ignore[no-untyped-call]

    try:
        with ThreadPoolExecutor(WORKERS, initializer=begin) as pool:
            yield pool
    finally:
        torch.set_num_threads(before)


def _check_kept(checkpoint: Checkpoint, layer: Layer, _write: Sink) -> None:
    """Refuse a weight that is copied and would spoil every image."""
    rows = _Rows(checkpoint, layer, DEFAULT)
    rows.absmax(spans(layer.out_features, rows.step), layer.shape)


def _merge_kept(checkpoint: Checkpoint, layer: Layer, merged: LoraMatch, write: Sink) -> None:
    """Merge adapters into a weight that stays in high precision, rounded once to its dtype."""
    source = _Widened(checkpoint, layer, merged)
    row_bytes = layer.weight.nbytes // layer.out_features
    for band in spans(layer.out_features, max(1, BAND_VALUES // layer.in_features)):
        write(layer.weight.name, _rounded(checkpoint, layer.weight.name, source.bits("", band)), band.start * row_bytes)


def _rounded(checkpoint: Checkpoint, tensor: str, values: NDArray[np.float32]) -> NDArray[Any]:
    """Merged values, rounded to the dtype of the tensor that they are to replace."""
    dtype = checkpoint.tensors[tensor].dtype
    with np.errstate(over="ignore"):
        rounded = narrow_bfloat16(values) if dtype == "BF16" else values.astype(BIT_DTYPES[dtype])
    if not np.isfinite(to_float32(rounded, dtype)).all():
        raise TensorError(
            f"what is merged has NaN or infinite values in {dtype}",
            path=checkpoint.path_of(tensor),
            tensor=tensor,
            hint="is the LoRA's strength too large?",
        )
    return rounded


class MergedCheckpoint(Checkpoint):
    """A checkpoint in high precision that reads as if adapters were merged into it, rounded to its dtypes.

    Args:
        checkpoint: the open checkpoint.
        layers: those whose weights may be asked for.
        merged: what changes them.
    """

    def __init__(self, checkpoint: Checkpoint, layers: Iterable[Layer], merged: LoraMatch) -> None:
        vars(self).update(vars(checkpoint))
        self.checkpoint, self.merged = checkpoint, merged
        self.changed = {layer.weight.name: layer for layer in layers if layer.name in merged.matched}

    def bits(self, name: str, rows: slice = ALL_ROWS) -> NDArray[Any]:
        """As of the checkpoint, merged."""
        if name in self.merged.beside:
            return _rounded(self.checkpoint, name, self.merged.changed_tensor(self.checkpoint, name))[rows]
        if name not in self.changed:
            return self.checkpoint.bits(name, rows)
        source = _Widened(self.checkpoint, self.changed[name], self.merged)
        return _rounded(self.checkpoint, name, source.bits(name, rows))


def surviving(checkpoint: Checkpoint, written: Checkpoint, plan: ConversionPlan) -> Survival:
    """How much of what adapters add is left in the quantized layers of a converted file.

    Args:
        checkpoint: the input.
        written: the output.
        plan: what was done.

    Returns:
        The sum over all quantized layers that adapters change, against the input's weights.
    """
    table = find_layers(written)

    def of(layer: Layer) -> Survival:
        survival = Survival()
        for band in spans(layer.out_features, round_up(max(1, BAND_VALUES // layer.in_features), Packed.ROWS)):
            weight_OI = dequantize(checkpoint, layer, band).reshape(-1, layer.in_features)
            merged_OI = merge_rows(plan.merged, layer.name, weight_OI, (band.start, band.stop))
            survival.add(weight_OI, merged_OI, dequantize(written, table.quantized[layer.name], band))
        return survival

    with ThreadPoolExecutor(WORKERS) as pool:
        changed = (layer for layer, _ in plan.quantized if layer.name in plan.merged.matched)
        return sum(pool.map(of, changed), Survival())


class _Widened(Checkpoint):
    """A checkpoint in which a layer's weight reads as float32, dequantized and with adapters merged, by rows.

    Whole tiles are made, and each but once where bands follow one another.
    """

    def __init__(self, checkpoint: Checkpoint, layer: Layer, merged: LoraMatch) -> None:
        vars(self).update(vars(checkpoint))
        self.checkpoint, self.layer, self.merged = checkpoint, layer, merged
        self.start, self.ahead = 0, np.empty((0, layer.in_features), np.float32)

    def bits(self, _name: str, rows: slice = ALL_ROWS) -> NDArray[np.float32]:
        """The weight, float32 [rows, in]."""
        start, stop, _ = rows.indices(self.layer.out_features)
        return self.band(start, stop)

    def band(self, start: int, stop: int) -> NDArray[np.float32]:
        """Rows from `start` to `stop`, or to the last, float32 [rows, in]."""
        if not self.start <= start <= self.start + len(self.ahead):
            self.start, self.ahead = start - start % Packed.ROWS, self.ahead[:0]
        made = self.start + len(self.ahead)
        if stop > made:
            rows = slice(made, min(round_up(stop, Packed.ROWS), self.layer.out_features))
            weight_OI = dequantize(self.checkpoint, self.layer, rows).reshape(-1, self.layer.in_features)
            more = merge_rows(self.merged, self.layer.name, weight_OI, (rows.start, rows.stop))
            behind = min(start - self.start, len(self.ahead))
            self.ahead = np.concatenate([self.ahead[behind:], more])
            self.start += behind
        return np.array(self.ahead[start - self.start : stop - self.start])


def quantize_weight(
    checkpoint: Checkpoint,
    layer: Layer,
    fmt: Format,
    options: ConvertOptions,
    sink: Sink,
    *,
    device: torch.device | None = None,
) -> NDArray[np.float32] | None:
    """Quantize one weight, streaming it out.

    Args:
        checkpoint: where it is.
        layer: a layer in high precision.
        fmt: the format.
        options: block size, and how scales are chosen.
        sink: called with codes and scales, chunk by chunk, those of each tensor in order.
        device: where torch computes; None for the CPU, without torch where a format needs none. The bytes are the
            same, but for formats that rotate: sums have another order on a GPU.

    Returns:
        The weight scale of a format that is not packed, float32 [n_out, n_in], one per block: (1, 1) for tensor,
        (out, 1) for row.

    Raises:
        TensorError: the weight has NaN or infinite values.
    """
    rows = _Rows(checkpoint, layer, fmt) if device is None else _RowsOnDevice(checkpoint, layer, fmt, device)
    if isinstance(fmt, Packed):
        _quantize_packed(rows, layer, fmt, options, sink)
        return None
    if device is None and fmt.granularity == "tensor" and layer.weight.dtype in ("BF16", "F16"):
        scale = _quantize_by_table(rows, layer, fmt, options, sink)
    else:
        scale = _quantize_by_bands(rows, layer, fmt, options, sink)
    sink(names.WEIGHT_SCALE, scale, 0)
    return scale


def _quantize_by_table(
    rows: _Rows, layer: Layer, fmt: Format, options: ConvertOptions, sink: Sink
) -> NDArray[np.float32]:
    """One scale for 16-bit weights: two passes over the file's bits, no arithmetic per weight."""
    meanings = _meanings(layer.weight.dtype)
    bands = list(spans(layer.out_features, max(1, CHUNK // layer.in_features)))
    scale = fmt.weight_scales(rows.absmax(bands, layer.shape))
    if options.weight_scale == "mse":
        scale = _least_squares_grid(rows, layer, scale, fmt, block=layer.shape, bands=bands)
    with np.errstate(invalid="ignore", over="ignore"):
        table = fmt.codes.encode(meanings / scale.reshape(()))
    for band in bands:
        codes = np.take(table, rows.bits(band).view(np.uint16), mode="clip")
        sink(names.WEIGHT, codes, band.start * layer.in_features)
    return scale


def _meanings(dtype: str) -> NDArray[np.float32]:
    """What the 65,536 patterns of a 16-bit dtype mean."""
    patterns = np.arange(1 << 16, dtype=np.uint16)
    return to_float32(patterns.view(np.float16) if dtype == "F16" else patterns, dtype)


def _quantize_by_bands(
    rows: _Rows, layer: Layer, fmt: Format, options: ConvertOptions, sink: Sink
) -> NDArray[np.float32]:
    """Scales per row or block, or weights of more than 16 bits, or a GPU: a band of rows at a time.

    All bands that share a scale are read before the first is quantized; those of rows are still in the cache then.
    """
    block = fmt.block(layer.shape, options.block_size)
    scale = np.empty(scale_grid(layer.shape, block), np.float32)
    for bands in _bands(layer, block[0], rows.step):
        blocks = slice(bands[0].start // block[0], -(-bands[-1].stop // block[0]))
        scale[blocks] = fmt.weight_scales(rows.absmax(bands, block))
        if options.weight_scale == "mse":
            scale[blocks] = _least_squares_grid(rows, layer, scale[blocks], fmt, block=block, bands=bands)
        for band in bands:
            codes = rows.codes(band, scale, block, fits=options.weight_scale == "absmax")
            sink(names.WEIGHT, codes, band.start * layer.in_features)
    return scale


def _quantize_packed(rows: _Rows, layer: Layer, fmt: Packed, options: ConvertOptions, sink: Sink) -> None:
    """Packed formats."""

    def largest() -> float:
        return float(rows.absmax(list(spans(layer.out_features, rows.step)), layer.shape).item())

    done: Counter[str] = Counter()
    for suffix, piece in fmt.pieces(largest, layer.shape, rows, options.weight_scale, rows.step):
        data = _bytes_of(piece)
        sink(suffix, data, done[suffix])
        done[suffix] += data.nbytes


class _Rows:
    """Rows of a weight, on the CPU: numpy does what needs no torch.

    Args:
        checkpoint: where it is.
        layer: a layer in high precision.
        fmt: what it is to become.

    Attributes:
        step: how many rows to deal with at a time.
    """

    def __init__(self, checkpoint: Checkpoint, layer: Layer, fmt: Format) -> None:
        self.checkpoint, self.layer, self.fmt = checkpoint, layer, fmt
        self.step = max(1, BAND_VALUES // layer.in_features)
        self.last: tuple[slice, NDArray[Any]] | None = None

    def bits(self, band: slice) -> NDArray[Any]:
        """As `Checkpoint.bits` gives them; a band that is asked for again is not read again."""
        if self.last is None or self.last[0] != band:
            self.last = band, self.checkpoint.bits(self.layer.weight.name, band)
        return self.last[1]

    def absmax(self, bands: Iterable[slice], block: tuple[int, int]) -> NDArray[np.float32]:
        """The largest magnitude of each block of bands, which are whole blocks or parts of one; float32 [n_out, n_in].

        Raises:
            TensorError: a weight is NaN or infinite.
        """
        absmax: NDArray[np.float32] = np.max([self.band_absmax(band, block) for band in bands], axis=0)
        if not np.isfinite(absmax).all():
            raise TensorError(
                "the weight has NaN or infinite values",
                path=self.checkpoint.path_of(self.layer.weight.name),
                tensor=self.layer.weight.name,
                hint=f"{self.fmt.title} cannot repair them; the input file is damaged or its training diverged",
            )
        return absmax

    def band_absmax(self, band: slice, block: tuple[int, int]) -> NDArray[np.float32]:
        """The same of one band, unchecked."""
        return _block_absmax(self.bits(band), self.layer.weight.dtype, block)

    def codes(self, band: slice, scale: NDArray[np.float32], block: tuple[int, int], *, fits: bool) -> NDArray[Any]:
        """A band's codes under the scales [n_out, n_in] of all blocks; `fits` where none is clipped."""
        weight_OI = to_float32(self.bits(band), self.layer.weight.dtype)
        np.divide(weight_OI, scales_per_row(scale, replace(self.layer, block=block), band), out=weight_OI)
        return self.fmt.codes.encode(weight_OI, fits=fits)

    def __call__(self, rows: Any) -> Tensor:
        """Rows by a slice or by their numbers, in the file's dtype, known to be finite."""
        bands = [rows] if isinstance(rows, slice) else [slice(row, row + 1) for row in rows.tolist()]
        self.absmax(bands, self.layer.shape)
        bits = np.concatenate([self.bits(band) for band in bands]) if len(bands) > 1 else self.bits(bands[0])
        return torch.from_numpy(bits.view(np.uint8)).view(getattr(torch, TORCH_NAMES[self.layer.weight.dtype]))


class _RowsOnDevice(_Rows):
    """Rows of a weight that is read into the memory of a device once, through pinned memory.

    A thread waits for each of its copies; other threads copy or compute meanwhile, each on a stream of its own.
    """

    def __init__(self, checkpoint: Checkpoint, layer: Layer, fmt: Format, device: torch.device) -> None:
        super().__init__(checkpoint, layer, fmt)
        self.step = max(1, DEVICE_BAND_VALUES // layer.in_features)
        self.weight = _on_device(checkpoint, layer, device)
        if isinstance(fmt, Packed):
            self.absmax([ALL_ROWS], layer.shape)

    def band_absmax(self, band: slice, block: tuple[int, int]) -> NDArray[np.float32]:
        absmax: NDArray[np.float32] = _block_absmax_of(self.weight[band], block).cpu().numpy()
        return absmax

    def codes(self, band: slice, scale: NDArray[np.float32], block: tuple[int, int], *, fits: bool) -> NDArray[Any]:  # noqa: ARG002
        weight_OI = self.weight[band]
        scales = torch.from_numpy(scale[band.start // block[0] : -(-band.stop // block[0])]).to(weight_OI.device)
        per_row = scales.repeat_interleave(block[0], 0)[band.start % block[0] :][: len(weight_OI)]
        if per_row.shape[1] > 1:
            per_row = per_row.repeat_interleave(block[1], 1)[:, : self.layer.in_features]
        return _bytes_of(self.fmt.codes.round(weight_OI.float() / per_row))

    def __call__(self, rows: Any) -> Tensor:
        return self.weight[rows]


def _on_device(checkpoint: Checkpoint, layer: Layer, device: torch.device) -> Tensor:
    """A weight in the memory of a device, in the file's dtype."""
    dtype = getattr(torch, TORCH_NAMES[layer.weight.dtype])
    weight = torch.empty(layer.shape, dtype=dtype, device=device)
    rows = min(layer.out_features, max(1, STAGED_BYTES // (layer.in_features * dtype.itemsize)))
    staged = torch.empty((rows, layer.in_features), dtype=dtype, pin_memory=device.type == "cuda")
    for band in spans(layer.out_features, rows):
        part = staged[: band.stop - band.start]
        np.copyto(part.view(torch.uint8).numpy(), checkpoint.bits(layer.weight.name, band).view(np.uint8))
        weight[band].copy_(part)
    return weight


def _bytes_of(tensor: Tensor) -> NDArray[Any]:
    """A tensor of float32, or of the bytes of what numpy has no dtype for."""
    data: NDArray[Any] = _to_host(tensor.view(torch.uint8) if tensor.element_size() == 1 else tensor).numpy()
    return data


def _to_host(tensor: Tensor) -> Tensor:
    """A contiguous copy in memory that a GPU writes directly; the tensor itself on the CPU."""
    if tensor.device.type != "cuda":
        return tensor.cpu().contiguous()
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor)


def _block_absmax_of(weight_OI: Tensor, block: tuple[int, int]) -> Tensor:
    """Largest magnitude per block, float32 [n_out, n_in]."""
    rows, columns = scale_grid((weight_OI.shape[0], weight_OI.shape[1]), block)
    missing = (0, columns * block[1] - weight_OI.shape[1], 0, rows * block[0] - weight_OI.shape[0])
    magnitudes = weight_OI.abs()
    if any(missing):
        magnitudes = torch.nn.functional.pad(magnitudes, missing)
    return magnitudes.reshape(rows, block[0], columns, block[1]).amax((1, 3)).float()


def _bands(layer: Layer, block_out: int, rows: int) -> Iterator[list[slice]]:
    """Rows of a weight in steps that share no scale: a band of whole blocks, or several of one block that is larger."""
    step = max(block_out, rows - rows % block_out)
    for together in spans(layer.out_features, step):
        yield [
            slice(together.start + part.start, together.start + part.stop)
            for part in spans(together.stop - together.start, max(rows, step) if rows >= block_out else rows)
        ]


def _block_absmax(bits: NDArray[Any], dtype: str, block: tuple[int, int]) -> NDArray[np.float32]:
    """Largest magnitude per block of a band of rows; NaN where a block has one.

    Bits without the sign order magnitudes: finite, then infinity, then NaN. So only the largest are widened.
    """
    if block[0] >= bits.shape[0] and block[1] >= bits.shape[1]:
        bits, block = bits.reshape(1, -1), (1, bits.size)  # three times as fast as row by row
    unsigned, signed = bits.view(f"u{bits.itemsize}"), bits.view(f"i{bits.itemsize}")
    without_sign = np.iinfo(unsigned.dtype).max >> 1
    rows, columns = bits.shape
    if block[1] >= columns:  # the largest as signed numbers is positive, as unsigned ones negative: no temporary
        negative = (unsigned.max(axis=1, keepdims=True) & without_sign).view(signed.dtype)
        magnitudes = np.maximum(signed.max(axis=1, keepdims=True), negative)
    else:
        magnitudes = np.maximum.reduceat(unsigned & without_sign, np.arange(0, columns, block[1]), axis=1)
    if block[0] > 1:
        magnitudes = np.maximum.reduceat(magnitudes, np.arange(0, rows, block[0]), axis=0)
    return to_float32(magnitudes.view(bits.dtype), dtype)


def _least_squares_grid(
    rows: _Rows,
    layer: Layer,
    absmax_scale: NDArray[np.float32],
    fmt: Format,
    *,
    block: tuple[int, int],
    bands: Sequence[slice],
) -> NDArray[np.float32]:
    """The least-squares scale of every block in some bands."""
    if scale_grid(layer.shape, block) == (1, 1):
        counts = np.zeros(1 << 15, np.int64)
        for bits in map(rows.bits, bands):
            if layer.weight.dtype in ("BF16", "F16"):
                both_signs = np.bincount(bits.reshape(-1).view(np.uint16), minlength=1 << 16)
                counts += both_signs[: 1 << 15] + both_signs[1 << 15 :]
                continue
            weight_OI = to_float32(bits, layer.weight.dtype)
            rounded = (np.abs(weight_OI).view(np.uint32).reshape(-1) + np.uint32(0x8000)) >> np.uint32(16)
            rounded = np.minimum(rounded, np.uint32(_LARGEST_BFLOAT16))  # what is above would round to infinity
            counts += np.bincount(rounded, minlength=1 << 15)
        used = np.flatnonzero(counts)
        magnitudes = _meanings("F16" if layer.weight.dtype == "F16" else "BF16")[used].astype(np.float64)
        return least_squares_scale(magnitudes, counts[used], absmax_scale, fmt).reshape(1, 1)
    scale = np.empty_like(absmax_scale)
    start, stop = bands[0].start, bands[-1].stop
    whole_blocks = [slice(at, min(at + block[0], stop)) for at in range(start, stop, block[0])]
    for number, bits in enumerate(map(rows.bits, whole_blocks)):
        weight_OI = to_float32(bits, layer.weight.dtype)
        for column, span in enumerate(spans(layer.in_features, block[1])):
            values, counts = np.unique(np.abs(weight_OI[:, span]), return_counts=True)
            found = least_squares_scale(values.astype(np.float64), counts, absmax_scale[number, column], fmt)
            scale[number, column] = found
    return scale


def least_squares_scale(
    magnitudes: NDArray[np.float64], counts: NDArray[np.int64], absmax_scale: Any, fmt: Format = DEFAULT
) -> NDArray[np.float32]:
    """The scale s of least Σ count · (|w| - s · code(|w| / s))² between half and twice `absmax_scale`.

    Args:
        magnitudes: distinct |w|, float64 [n].
        counts: how often each occurs, [n].
        absmax_scale: max|w| / max, the scale at which nothing is clipped.
        fmt: the format.

    Returns:
        float32 scalar. Never worse than `absmax_scale` itself.

    At 7/6 the code before the last means the largest weight exactly, and 0.1 lies nearer to a code than at 1:

    >>> weights = np.array([0.1, DEFAULT.codes.max])
    >>> round(float(least_squares_scale(weights, np.array([1000, 1]), np.float32(1.0))), 5)
    1.16667
    """
    start = np.asarray(absmax_scale, np.float32).reshape(())
    nonzero = magnitudes > 0
    magnitudes, weights = magnitudes[nonzero], counts[nonzero].astype(np.float64)
    if not len(magnitudes):
        return start
    low, high = float(start) / 2, float(start) * 2
    levels, midpoints = fmt.codes.levels, fmt.codes.midpoints

    # As s grows from low to high, |w| / s falls through the midpoints in ((|w| / high), (|w| / low)): one event each.
    first = np.searchsorted(midpoints, magnitudes / high, side="right")
    last = np.searchsorted(midpoints, magnitudes / low, side="left")
    events = last - first
    owner = np.repeat(np.arange(len(magnitudes)), events)
    crossed = np.arange(len(owner)) - np.repeat(np.cumsum(events) - events, events) + first[owner]
    position = magnitudes[owner] / midpoints[crossed]
    order = np.argsort(position, kind="stable")
    owner, crossed, position = owner[order], crossed[order], position[order]

    top = levels[last]
    dot = np.concatenate([[np.sum(weights * magnitudes * top)], weights[owner] * magnitudes[owner]])
    square = np.concatenate([[np.sum(weights * top**2)], weights[owner]])
    dot[1:] *= levels[crossed] - levels[crossed + 1]
    square[1:] *= levels[crossed] ** 2 - levels[crossed + 1] ** 2
    dot, square = np.cumsum(dot), np.cumsum(square)

    edges = np.concatenate([[low], position, [high]])
    best_inside = np.clip(np.divide(dot, square, out=np.full_like(dot, low), where=square > 0), edges[:-1], edges[1:])
    saved = best_inside * (2 * dot - best_inside * square)  # Σ w² - error: the constant does not matter
    found = np.maximum(np.float32(best_inside[int(np.argmax(saved))]), np.float32(fmt.least_scale))

    def error(scale: np.float32) -> float:
        codes = fmt.codes.encode((magnitudes / np.float64(scale)).astype(np.float32))
        real = fmt.codes.decode(codes).astype(np.float64) * np.float64(scale)
        return float(np.sum(weights * (magnitudes - real) ** 2))

    return np.asarray(found if error(found) < error(np.float32(start)) else start, np.float32)
