"""FP16, BF16 and FP32 checkpoints to another number format: which layers become what, and the file."""

from __future__ import annotations

import contextlib
import json
import math
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
from .checkpoint import ALL_ROWS, Checkpoint, CheckpointWriter, Spec, refuse_same_file, serialize_header, to_float32
from .checkpoint.reader import BIT_DTYPES
from .checkpoint.writer import lay_out
from .errors import CheckpointError, OutputError, TensorError
from .families.base import OUTSIDE
from .formats import DEFAULT, FORMATS
from .formats.record import Format, Packed, narrow_bfloat16, spans
from .identity import Identity, identify
from .layers import Layer, LayerTable, dequantize, determined, find_layers, input_scale, named, whole_tiles
from .layout import WORKERS, Sink
from .lazy_torch import torch
from .lora import Lora, LoraMatch, Survival, match_checkpoint, merge_rows
from .marks import SPARE_BYTES, Config, Way, leave_scale_room, with_full_precision
from .options import ConvertOptions
from .quantize import bytes_of, quantize_weight, refuse_not_finite, rows_at_a_time
from .telling import Advance, plural
from .untrusted import JSONError, parse_json

if TYPE_CHECKING:
    from torch import Tensor

MSE_SECONDS_PER_WEIGHT = 5e-6
"""What the exact search takes per weight where scales differ within a weight; measured on one core, 2026-11-22."""

KEPT_BYTES = 31 << 20
"""A block of this size that was freed tells glibc to keep smaller ones (mallopt(3), M_MMAP_THRESHOLD). Else the kernel
maps and clears every temporary anew: seven times as many page faults for INT8 ConvRot, 2026-11-26."""


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
        weights = sum(math.prod(layer.shape) for layer, _ in self.quantized)
        what, scaled = ", ".join(f"{count} {fmt.name}" for fmt, count in self.formats.items()), ""
        if len(self.formats) == 1:
            (fmt,) = self.formats
            what, scaled = fmt.marked if fmt.grid else fmt.name, f"{fmt.granularity} scales, "
        layers = f"{len(self.quantized)} of {len(self.decisions)} linear layers to {what or self.options.format}"
        return f"{layers} ({weights / 1e6:,.1f} M weights, {scaled}{self.title})"

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
            name = each.layer.weight.name
            problem = f"a LoRA changes this layer, which is {named([each.layer])} already and would not be rounded anew"
            hint = "merge into the original in 16 bits" + ("" if options.requantize else ", or add --requantize")
            raise TensorError(problem, path=checkpoint.path_of(name), tensor=name, hint=hint)
    counts = {named(each.layer for each in again): len(again), "other formats": len(table.foreign)}
    if any(counts.values()):
        kept = ", ".join(f"{count} in {kind}" for kind, count in counts.items() if count)
        more = "; --requantize rounds them anew" if any(each.format for each in again) else ""
        notes.append(f"already quantized layers stay as they are: {kept}{more}")
    ways: tuple[Way, ...] = ()
    if any(decision.format for decision in decisions):
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
    share = sum(math.prod(each.layer.shape) for each in decisions if each.format) / max(weights, 1)
    if share >= 0.5 or not weights or any(each.layer.format for each in decisions):
        return []
    reasons = Counter(each.reason for each in decisions if not each.format and each.reason != OUTSIDE)
    most = f" ({reasons.most_common(1)[0][0]})" if reasons else ""
    return [f"only {share:.0%} of the weights in repeated blocks would be quantized; the rest stays as it is{most}"]


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
        scale, spare_bytes = decision.input_scale, 0
        if options.input_scale and fmt.static and (scale is not None or not fmt.dynamic):
            name = layer.name + plan.ways[0].input_scale
            stray = layer.format is None and name in checkpoint  # which is refused
            if scale is None and plan.ways[0].kind == "tensor" and not stray:
                spare_bytes = SPARE_BYTES
                without_scale.append(layer.name)
            else:
                tensors[name] = (Spec("F32", ()), np.float32(1.0 if scale is None else scale).tobytes())
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
    leave_scale_room(marked, without_scale)
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
        rounding: finds what is stored of a layer, by suffix; each weight goes to nearest where it finds nothing. It is
            asked in one thread, in the order of the plan.
        progress: told how many input bytes were done.
        before_commit: called with the complete but still unnamed output, which it may read and change in place
            (calibration); if it raises, there is no output.

    Raises:
        TensorError: a weight has NaN or infinite values; the file is not written.
        OutputError: the output cannot be written, or is the input.
    """
    refuse_same_file(output, [checkpoint.path, *(file.path for file in checkpoint.files)])
    if not plan.quantized:
        problem = f"nothing to convert: no layer would become {plan.options.record.title}"
        more = "; --actcal calibrates the FP8 layers that are there" if plan.table.static else ""
        raise OutputError(problem, path=checkpoint.path, hint=f"--dry-run says why, per layer{more}")

    def job(layer: Layer, fmt: Format) -> layout.Job:
        def work(write: Sink) -> None:
            def sink(suffix: str, data: NDArray[Any], start: int) -> None:
                write(layer.name + plan.spelled(suffix), data, start)

            rounded = None if rounding is None else rounding(layer, fmt)
            if rounded is not None:
                for suffix, tensor in rounded.items():
                    sink(suffix, bytes_of(tensor), 0)
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
    jobs += [(0, partial(refuse_not_finite, checkpoint, each)) for each in plan.kept]
    jobs += [(each.weight.nbytes, partial(_merge_kept, checkpoint, each, plan.merged)) for each in plan.merged_only]
    threads = _threads(place, WORKERS if rounding is None else 1) if computes or rounding else None
    layout.write(checkpoint, _lay_out(checkpoint, plan), output, jobs, progress=progress, before_commit=before_commit,
                 threads=threads)  # fmt: skip


@contextlib.contextmanager
def _threads(device: torch.device | None, count: int) -> Iterator[ThreadPoolExecutor]:
    """Threads in which torch starts no further ones where there are several, each with a stream of its own on a GPU."""
    before = torch.get_num_threads()

    def begin() -> None:
        torch.set_num_threads(1 if count > 1 else before)
        if device is not None and device.type == "cuda":
            torch.cuda.set_stream(torch.cuda.Stream(device))  # type: ignore[no-untyped-call]

    try:
        with ThreadPoolExecutor(count, initializer=begin) as pool:
            yield pool
    finally:
        torch.set_num_threads(before)


def _merge_kept(checkpoint: Checkpoint, layer: Layer, merged: LoraMatch, write: Sink) -> None:
    """Merge adapters into a weight that stays in high precision, rounded once to its dtype."""
    source = _Widened(checkpoint, layer, merged)
    row_bytes = layer.weight.nbytes // layer.out_features
    for band in spans(layer.out_features, rows_at_a_time(layer, Packed.ROWS)):
        write(layer.weight.name, _rounded(checkpoint, layer.weight.name, source.bits("", band)), band.start * row_bytes)


def _rounded(checkpoint: Checkpoint, tensor: str, values: NDArray[np.float32]) -> NDArray[Any]:
    """Merged values, rounded to the dtype of the tensor that they are to replace."""
    dtype = checkpoint.tensors[tensor].dtype
    with np.errstate(over="ignore"):
        rounded = narrow_bfloat16(values) if dtype == "BF16" else values.astype(BIT_DTYPES[dtype])
    if not np.isfinite(to_float32(rounded, dtype)).all():
        problem, hint = f"what is merged has NaN or infinite values in {dtype}", "is the LoRA's strength too large?"
        raise TensorError(problem, path=checkpoint.path_of(tensor), tensor=tensor, hint=hint)
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
    """How much of what adapters add to the input's weights is left in the quantized layers of the output, over all."""
    table = find_layers(written)

    def of(layer: Layer) -> Survival:
        survival = Survival()
        for band in spans(layer.out_features, rows_at_a_time(layer, Packed.ROWS)):
            weight_OI = dequantize(checkpoint, layer, band).reshape(-1, layer.in_features)
            merged_OI = merge_rows(plan.merged, layer.name, weight_OI, (band.start, band.stop))
            survival.add(weight_OI, merged_OI, dequantize(written, table.quantized[layer.name], band))
        return survival

    with ThreadPoolExecutor(WORKERS) as pool:
        changed = (layer for layer, _ in plan.quantized if layer.name in plan.merged.matched)
        return sum(pool.map(of, changed), Survival())


class _Widened(Checkpoint):
    """A checkpoint in which a layer's weight reads as float32, dequantized and with adapters merged, by rows.

    Whole tiles are made, and the last ones are kept: most bands begin or end with them, and sampled rows lie in them.
    """

    rows_together = Packed.ROWS

    def __init__(self, checkpoint: Checkpoint, layer: Layer, merged: LoraMatch) -> None:
        vars(self).update(vars(checkpoint))
        self.checkpoint, self.layer, self.merged = checkpoint, layer, merged
        self.made, self.made_OI = slice(0, 0), np.empty((0, layer.in_features), np.float32)

    def bits(self, _name: str, rows: slice = ALL_ROWS) -> NDArray[np.float32]:
        """The weight, float32 [rows, in]."""
        start, stop, _ = rows.indices(self.layer.out_features)
        if not self.made.start <= start <= stop <= self.made.stop:
            self.made = whole_tiles(self.layer, start, stop)
            weight_OI = dequantize(self.checkpoint, self.layer, self.made).reshape(-1, self.layer.in_features)
            self.made_OI = merge_rows(self.merged, self.layer.name, weight_OI, (self.made.start, self.made.stop))
        return np.array(self.made_OI[start - self.made.start : stop - self.made.start])
