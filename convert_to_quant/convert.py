"""Conversion of FP16, BF16 and FP32 checkpoints to other number formats: the plan per layer, and the output file."""

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
from .checkpoint import ALL_ROWS, Checkpoint, CheckpointWriter, Spec, serialize_header, to_float32
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

SIXTEEN_BITS = "the 16-bit original gives better quality"

KEPT_BYTES = 31 << 20
"""Freeing a block of this size makes glibc reuse smaller ones (mallopt(3), M_MMAP_THRESHOLD). Otherwise the kernel maps
and clears every temporary: seven times as many page faults for INT8 ConvRot, 2026-11-26."""


@dataclass(frozen=True)
class Decision:
    """The decision for one layer.

    Attributes:
        layer: the layer in the input.
        format: the new format of its weight; None if it is copied unchanged.
        reason: why it is copied, or why it gets another format than requested.
        input_scale: the input scale to write, if any.
        full_precision: whether its inputs stay unquantized.
        as_it_is: whether its weight already holds codes of the format and only needs a scale of 1.0.
    """

    layer: Layer
    format: Format | None
    reason: str = ""
    input_scale: float | None = None
    full_precision: bool = False
    as_it_is: bool = False


@dataclass(frozen=True)
class ConversionPlan:
    """The plan of a conversion.

    Attributes:
        table: the checkpoint's layers.
        family: the model family whose rules apply.
        identity: the kind of file.
        decisions: for all layers in high precision, then those that were only cast to FP8, in file order.
        options: of the conversion.
        ways: the output's conventions for quantization configs.
        notes: for the user.
        merged: adapters to add to the weights before rounding.
        steps: provenance entries besides "convert", such as how formats were chosen.
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
        """The layers to quantize, and their new formats."""
        return [(each.layer, each.format) for each in self.decisions if each.format is not None]

    @property
    def kept(self) -> list[Layer]:
        """The layers of the diffusion model that stay in high precision."""
        layers = (each.layer for each in self.decisions if each.format is None and each.layer.format is None)
        return [layer for layer in layers if self.table.owns(layer.name) and layer.weight.elements]

    @property
    def merged_only(self) -> list[Layer]:
        """The layers that stay in high precision and that adapters change."""
        return [layer for layer in self.kept if layer.name in self.merged.matched]

    def spelled(self, suffix: str) -> str:
        """A tensor suffix in the output's convention."""
        return self.ways[0].spelled(suffix) or suffix

    @property
    def formats(self) -> dict[Format, int]:
        """Number of layers per format, the most frequent first."""
        return dict(Counter(fmt for _, fmt in self.quantized).most_common())

    @property
    def title(self) -> str:
        """Name of the model in messages."""
        return self.identity.title if self.identity.encoder else self.family.title

    @property
    def no_input_scales(self) -> str:
        """Why there is nothing to calibrate in the output; "" if there is."""
        if self.identity.encoder:
            return f"{self.title}, which ComfyUI runs in full precision, so no input scales are written"
        if not self.formats or any(fmt.static for fmt in self.formats):
            return ""
        titles = " and ".join(dict.fromkeys(fmt.title for fmt in self.formats))
        return f"readers of {titles} layers scale inputs dynamically"

    def summary(self) -> str:
        """One line: number of layers, formats, and model family."""
        weights = sum(math.prod(layer.shape) for layer, _ in self.quantized)
        what, scaled = ", ".join(f"{count} {fmt.name}" for fmt, count in self.formats.items()), ""
        if len(self.formats) == 1:
            (fmt,) = self.formats
            what, scaled = fmt.marked if fmt.grid else fmt.name, f"{fmt.granularity} scales, "
        layers = f"{len(self.quantized)} of {len(self.decisions)} linear layers to {what or self.options.format}"
        return f"{layers} ({weights / 1e6:,.1f} M weights, {scaled}{self.title})"

    def readers(self) -> list[str]:
        """Readers of each format except the default, and GPUs on which it is fast."""
        others = [fmt for fmt in self.formats if fmt is not DEFAULT]
        return [f"{fmt.title} is read by {fmt.read_by}, and fast on {fmt.cards}" for fmt in others]


def plan_conversion(checkpoint: Checkpoint, options: ConvertOptions, loras: Sequence[Lora] = ()) -> ConversionPlan:
    """Decide for every layer whether and how it is quantized; adapters are merged first.

    Raises:
        CheckpointError: there is nothing to convert, or a layer cannot be read.
        OptionError: the preset does not exist, or the input uses another convention for quantization configs.
        LoraError: an adapter does not fit, or a file matches nothing.
        TensorError: an adapter changes a quantized layer that is not requantized.
    """
    table = find_layers(checkpoint)
    merged = match_checkpoint(loras, checkpoint, table, beside=True) if loras else LoraMatch({})
    found = identify(checkpoint, table)
    if options.preset is None and found.kind in ("vae", "adapter", "statistics", "packed"):
        raise CheckpointError(f"nothing to convert: {found.title}", path=checkpoint.path,
                              hint="convert the original" if found.kind == "packed" else None)  # fmt: skip
    if found.encoder:
        options = replace(options, input_scale=False)  # no program reads them
    family = families.family(options.preset) if options.preset is not None else found.family or families.GENERIC
    keeps = partial(found.kept_because, family=family)
    bare = names.strip_prefix(checkpoint.tensors)[1]
    notes = [*table.notes, *(found.notes if options.preset is None else [])]
    if banks := found.banks:
        which = f"{len(banks)}, first: {banks[0]}"
        notes.append(f"expert banks are copied unchanged ({which}): readers of FP8 banks use no measured input scale")
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
            problem = f"a LoRA changes this layer, which is already {named([each.layer])} and would not be requantized"
            hint = "merge into the 16-bit original" + ("" if options.requantize else ", or add --requantize")
            raise TensorError(problem, path=checkpoint.path_of(name), tensor=name, hint=hint)
    counts = {named(each.layer for each in again): len(again), "other formats": len(table.foreign)}
    if any(counts.values()):
        kept = ", ".join(f"{count} in {kind}" for kind, count in counts.items() if count)
        more = "; --requantize quantizes them again" if any(each.format for each in again) else ""
        notes.append(f"layers that are already quantized are copied unchanged: {kept}{more}")
    ways: tuple[Way, ...] = ()
    if any(decision.format for decision in decisions):
        target = "legacy" if options.legacy else "comfy"
        ways = table.marks.anew(target) if options.requantize else table.marks.to_write(options.legacy)
    notes += [] if table.quantized or table.raw or table.foreign else _say_little(found, decisions)
    notes += merged.notes() if loras else []
    return ConversionPlan(table, family, found, decisions, options, ways, notes, merged)


def _say_little(found: Identity, decisions: list[Decision]) -> list[str]:
    """A note if most of a model's blocks would stay in high precision."""
    weights = found.structure.block_weights(found.shapes)
    share = sum(math.prod(each.layer.shape) for each in decisions if each.format) / max(weights, 1)
    if share >= 0.5 or not weights or any(each.layer.format for each in decisions):
        return []
    reasons = Counter(each.reason for each in decisions if not each.format and each.reason != OUTSIDE)
    most = f" ({reasons.most_common(1)[0][0]})" if reasons else ""
    return [
        f"only {share:.0%} of the weights in repeated blocks would be quantized; the rest stays in high precision{most}"
    ]


def _as_it_is(decision: Decision) -> Decision:
    """Declare a layer that was only cast, with a scale of 1.0, if it is in the requested format."""
    layer, fmt = decision.layer, decision.format
    if fmt is None:
        return decision
    if fmt is DEFAULT and layer.format is DEFAULT:
        return replace(decision, reason="a plain cast: declared with a scale of 1.0", as_it_is=True)
    return replace(decision, format=None, reason=f"already a plain cast to {layer.title}")


def _say_cast(cast: list[Decision]) -> list[str]:
    """A note on layers that were only cast."""
    if not cast:
        return []
    declared = sum(each.as_it_is for each in cast)
    done = f"{declared} of them declared with a scale of 1.0" if declared else "copied unchanged"
    what = f"plain casts to {named(each.layer for each in cast)} without scales: {plural(len(cast), 'layer')}"
    return [f"{what}, {done}; {SIXTEEN_BITS}, and --requantize quantizes them again"]


def _say_again(checkpoint: Checkpoint, layers: list[Layer]) -> list[str]:
    """A note on layers that are requantized; their formats must be unambiguous."""
    for layer in layers:
        if layer.marking == "none":
            determined(checkpoint, layer.name)
    return [f"requantized: {plural(len(layers), 'layer')} in {named(layers)}; {SIXTEEN_BITS}"] if layers else []


def _decide(
    layer: Layer,
    bare: Mapping[str, str],
    keeps: Callable[[str], str | None],
    options: ConvertOptions,
    *,
    changed: bool = False,
) -> Decision:
    """Quantize a layer, or give the first reason not to; a `changed` layer is also requantized to its own format."""
    part, bare_weight = names.other_part(layer.name), bare.get(layer.weight.name)
    if bare_weight is None or (part is not None and bare_weight == layer.weight.name):
        return Decision(layer, None, f"part of a {part}" if part else "outside the diffusion model")
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
        return Decision(layer, None, f"already {fmt.title}")
    return Decision(layer, fmt, reason if fmt is not wanted else "")


def _is_in(layer: Layer, fmt: Format) -> bool:
    """Whether a layer is in a format, in any convention."""
    if isinstance(fmt, Packed) or layer.format is None:
        return layer.format is fmt
    return layer.format.mark == fmt.mark and layer.granularity == fmt.granularity


def _carried(checkpoint: Checkpoint, decision: Decision) -> Decision:
    """Carry over the full precision of a quantized layer, and its input scale, rescaled to cover the same range."""
    layer, fmt = decision.layer, decision.format
    scale = None
    if fmt is not None and layer.format is not None and layer.static and layer.input_problem is None:
        found = input_scale(checkpoint, layer)
        scale = None if found == 1.0 else found * layer.format.range / fmt.range  # 1.0 is a default, not measured
    return replace(decision, input_scale=scale, full_precision=layer.full_precision)


def _lay_out(checkpoint: Checkpoint, plan: ConversionPlan) -> layout.Layout:
    """Lay out the output's tensors, each beside the input tensor whose shard it joins."""
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
            stray = layer.format is None and name in checkpoint  # `lay_out` refuses it
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
    if options.requantize:  # other quantized layers get configs in the same convention
        kept, declared, unmarked = layout.remark(checkpoint, plan.table, plan.ways, configs)
        made, configs, dropped = made | kept, configs | declared, dropped | unmarked
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
    """Size in bytes of the file that `convert` would write."""
    output = _lay_out(checkpoint, plan)
    return len(serialize_header(lay_out(output.specs), output.metadata)) + sum(s.nbytes for s in output.specs.values())


PROVENANCE_ROOM_BYTES = 1024
"""Padding for the provenance of a later in-place calibration, besides layer names."""


def provenance_room(layers: Iterable[str]) -> str:
    """Padding for the provenance of a calibration of some layers."""
    return " " * (PROVENANCE_ROOM_BYTES + sum(len(name) + len('"", ') for name in layers))


def provenance(metadata: Mapping[str, str], **steps: Any) -> str:
    """The provenance entry of a header: options by step ("convert", "calibrate"), besides those of the input's."""
    before: Any = {}
    with contextlib.suppress(JSONError):  # only informative, so errors do not matter
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
        checkpoint: the input, still open.
        plan: made for it.
        output: a `.safetensors` path, or `.safetensors.index.json` to keep the input's shards.
        device: where torch computes; see `quantize_weight`.
        rounding: returns a layer's stored tensors by suffix, or None to round to nearest; called in one thread, in plan
            order.
        progress: called with the number of input bytes processed.
        before_commit: called with the complete but uncommitted output, which it may read and overwrite (calibration);
            if it raises, there is no output.

    Raises:
        TensorError: a weight has NaN or infinite values.
        OutputError: the output cannot be written or is the input, or there is nothing to convert.
    """
    if not plan.quantized:
        problem = f"nothing to convert: no layer would become {plan.options.record.title}"
        more = "; --actcal calibrates the existing FP8 layers" if plan.table.static else ""
        raise OutputError(problem, path=checkpoint.path, hint=f"--dry-run shows the reason for each layer{more}")

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
                source = _Widened(checkpoint, layer, plan.merged)  # one per job: it caches rows
                weight = replace(layer.weight, dtype="F32", shape=layer.shape)
                high = Layer(layer.name, weight, None, "plain", layer.shape)
            quantize_weight(source, high, fmt, plan.options, sink, device=place)

        return layer.weight.nbytes, work

    np.empty(KEPT_BYTES, np.uint8)
    place = None if device == "cpu" else torch.device(device)
    jobs = [job(each.layer, each.format) for each in plan.decisions if each.format and not each.as_it_is]
    jobs += [(0, partial(refuse_not_finite, checkpoint, each)) for each in plan.kept]
    jobs += [(each.weight.nbytes, partial(_merge_kept, checkpoint, each, plan.merged)) for each in plan.merged_only]
    layout.write(checkpoint, _lay_out(checkpoint, plan), output, jobs, progress=progress, before_commit=before_commit,
                 threads=_threads(place, WORKERS if rounding is None else 1))  # fmt: skip


@contextlib.contextmanager
def _threads(device: torch.device | None, count: int) -> Iterator[ThreadPoolExecutor]:
    """Worker threads: torch starts no further ones if there are several, and each has its own stream on a GPU."""
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
    """Merge adapters into a weight that stays in high precision."""
    name, view = layer.weight.name, MergedCheckpoint(checkpoint, [layer], merged)
    for band in spans(layer.out_features, rows_at_a_time(layer, Packed.ROWS)):
        write(name, view.bits(name, band), band.start * layer.weight.nbytes // layer.out_features)


def _rounded(checkpoint: Checkpoint, tensor: str, values: NDArray[np.float32]) -> NDArray[Any]:
    """Round merged values to the dtype of the tensor that they replace."""
    dtype = checkpoint.tensors[tensor].dtype
    with np.errstate(over="ignore"):
        rounded = narrow_bfloat16(values) if dtype == "BF16" else values.astype(BIT_DTYPES[dtype])
    if not np.isfinite(to_float32(rounded, dtype)).all():
        problem, hint = f"the merged weight has NaN or infinite values in {dtype}", "is the LoRA's strength too large?"
        raise TensorError(problem, path=checkpoint.path_of(tensor), tensor=tensor, hint=hint)
    return rounded


class MergedCheckpoint(Checkpoint):
    """A view of a high-precision checkpoint with adapters merged into some layers, rounded to its dtypes."""

    def __init__(self, checkpoint: Checkpoint, layers: Iterable[Layer], merged: LoraMatch) -> None:
        vars(self).update(vars(checkpoint))
        self.checkpoint, self.merged = checkpoint, merged
        self.changed = {layer.weight.name: layer for layer in layers if layer.name in merged.matched}

    def bits(self, name: str, rows: slice = ALL_ROWS) -> NDArray[Any]:
        """See `Checkpoint`."""
        if name in self.merged.beside:
            return _rounded(self.checkpoint, name, self.merged.changed_tensor(self.checkpoint, name))[rows]
        if name not in self.changed:
            return self.checkpoint.bits(name, rows)
        source = _Widened(self.checkpoint, self.changed[name], self.merged)
        return _rounded(self.checkpoint, name, source.bits(name, rows))


def surviving(checkpoint: Checkpoint, written: Checkpoint, plan: ConversionPlan) -> Survival:
    """How much of the adapters' change of the input's weights survives in the quantized layers of the output."""
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
    """A view of a layer's weight as float32, dequantized and with adapters merged.

    It computes whole tiles and caches the last ones, in which most bands begin or end, and sampled rows lie.
    """

    rows_together = Packed.ROWS

    def __init__(self, checkpoint: Checkpoint, layer: Layer, merged: LoraMatch) -> None:
        vars(self).update(vars(checkpoint))
        self.checkpoint, self.layer, self.merged = checkpoint, layer, merged
        self.made, self.made_OI = slice(0, 0), np.empty((0, layer.in_features), np.float32)

    def bits(self, _name: str, rows: slice = ALL_ROWS) -> NDArray[np.float32]:
        """Rows of the weight, float32 [rows, in]."""
        start, stop, _ = rows.indices(self.layer.out_features)
        if not self.made.start <= start <= stop <= self.made.stop:
            self.made = whole_tiles(self.layer, start, stop)
            weight_OI = dequantize(self.checkpoint, self.layer, self.made).reshape(-1, self.layer.in_features)
            self.made_OI = merge_rows(self.merged, self.layer.name, weight_OI, (self.made.start, self.made.stop))
        return np.array(self.made_OI[start - self.made.start : stop - self.made.start])
