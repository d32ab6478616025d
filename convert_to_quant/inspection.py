"""What a checkpoint is and what is wrong with it, from its headers and scales: few weights are read, nothing is run.

FP8 files of the same model can differ in ways that readers ignore or fail on during generation. `inspect_checkpoint`
reports them beforehand: per layer the format, bits, granularity, quantization config, input scale, and what ComfyUI
does with it (a key of `READINGS`); per file a `Problem` for each kind of `KINDS` that it has.

An input scale is *suspicious* if its range, the largest value of the format times the scale, is outside 4e-4 to 1.8e6;
published ranges lie between about 1 and 6.6e4.

A weight scale is *absurd* if the largest weight, estimated as the largest scale times the reach of the format
(`Format.range`), is outside 2⁻²⁰ to 2¹⁴. Weights of real layers reach 1e-3 to a few hundred; 1/s instead of s makes
every FP8 layer whose largest weight is below 12 exceed 2¹⁴. A scale of at most 1.0 is never too large, since a plain
cast uses a small part of a wide format. If a scale is outside, up to 64 KiB of the codes are read: if all are 0, any
scale is fine; otherwise their largest value (for NVFP4 the largest block scale) replaces the reach. Of MXFP8, which
has only block scales, up to 64 KiB of them are read.

A codebook is *missing* in W4A8 if the group scales are as large as only a codebook makes them: readers without one take
codes for -8 to 7, times a scale of at most 127; with one, for numbers below 1, so scales are eight times as large.

A weight is *misshapen* if its rows do not match its bias, if it alone among the blocks is transposed, or if it does
not match the norms of its block.

Limits. A plausible scale can still be wrong, and so can a layer without bias that is transposed in every block: only
running the model shows that. The header metadata of shards is read as one.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from . import names, packings
from .checkpoint import Checkpoint, TensorInfo, open_checkpoint
from .checkpoint.reader import INTEGER_DTYPES
from .choose import read_figures
from .damaged import all_zero, not_finite
from .errors import StrPath
from .formats import DEFAULT, DEFAULT_GRID, FLOAT_GRIDS, FORMATS, recognize
from .formats.fp8 import QUANTOPS
from .formats.int8 import ROWS as INT8
from .formats.record import FLOAT_SCALES, Format, Grid, Packed
from .formats.w4a8 import LEAST_CODE
from .identity import identify
from .layers import FOLDED, ForeignLayer, Layer, LayerError, LayerTable, find_layers, input_scale
from .marks import full_precision
from .misshapen import misshapen
from .problems import CALIBRATE, KINDS, LARGEST_WEIGHT, LEAST_WEIGHT, PRODUCTS, READINGS, Problem
from .telling import plural
from .untrusted import JSONError, parse_json

InputState = Literal["calibrated", "guessed", "one", "missing", "suspicious", "unused"]

LEAST_INPUT_SCALE = 2.0**-20
LARGEST_INPUT_SCALE = 2.0**12
"""Limits for FP8; scales of other grids are compared by the range that they give."""

_SAMPLE_RUNS, _SAMPLE_BYTES = 4, 1 << 14


@dataclass(frozen=True)
class LayerView:
    """One linear layer, as readers see it.

    Attributes:
        name: as in the file.
        shape: (out, in) of its weight; as stored if the layer cannot be read.
        format: "int8_tensorwise", "nvfp4", ...; the dtype if it is not quantized.
        title: the format in words: "INT8 ConvRot, groups of 256".
        reading: what ComfyUI does with it, a key of `READINGS`.
        read_as: the key of `formats.FORMATS` of its weight; None if it is not quantized or cannot be read.
        bits: per weight, in the file; None if it cannot be read.
        block: the weights that share one scale; None without scale, or if it cannot be read.
        scaling: the block in a word.
        marked_by: where its quantization config is: "header", "tensor", "legacy".
        input_state: the state of its input scale; None if its format has none or it is not quantized.
        input_scale: its value; None if missing or unreadable.
    """

    name: str
    shape: tuple[int, ...]
    format: str
    title: str
    reading: str
    read_as: str | None = None
    bits: float | None = None
    block: tuple[int, int] | None = None
    scaling: Literal["tensor", "row", "block"] | None = None
    marked_by: tuple[str, ...] = ()
    input_state: InputState | None = None
    input_scale: float | None = None


@dataclass(frozen=True)
class Mix:
    """How this tool chose a format for every layer, according to the file.

    Attributes:
        gpu: the GPU that it was chosen for.
        conditioning, samples, seed: of the trial run.
        figures: its measured quality, and that of alternatives; see `choose.read_figures`.
    """

    gpu: str | None = None
    conditioning: str | None = None
    samples: int | None = None
    seed: int | None = None
    figures: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Made:
    """How this tool made a file, according to the file.

    Attributes:
        version: of the tool.
        converted: whether it quantized weights.
        engine: "model", "layer" or "statistics" if it calibrated input scales, else None.
        conditioning: what the model was run on instead of prompts ("noise"), if known.
        samples, seed: of the calibration.
        guessed: layers whose scales were simulated although others were measured.
        unmeasured: layers that a measured calibration left unchanged.
        depends_on_conditioning: layers whose ranges depend on the conditioning, which noise only approximates.
        lora: adapters that the ranges cover.
        mix: how formats were chosen, if they were; this also measured the input scales.
    """

    version: str | None = None
    converted: bool = False
    engine: str | None = None
    conditioning: str | None = None
    samples: int | None = None
    seed: int | None = None
    guessed: tuple[str, ...] = ()
    unmeasured: tuple[str, ...] = ()
    depends_on_conditioning: tuple[str, ...] = ()
    lora: tuple[str, ...] = ()
    mix: Mix | None = None

    def measured(self, layer: str) -> bool:
        """Whether the input scale of a layer was measured, even if it is 1.0."""
        measured = self.mix is not None or self.engine in ("model", "statistics")
        return measured and layer not in self.unmeasured + self.guessed


@dataclass(frozen=True)
class Inspection:
    """What a checkpoint is.

    Attributes:
        path: the file that was opened.
        files: number of files.
        sharded: whether it was opened through an index.
        size_bytes: of all files.
        tensors: number of tensors.
        prefix: the prefix of the diffusion model's tensor names.
        family: key of `families.FAMILIES`, a kind of `identity.Kind`, or None.
        title: the family in words.
        variant: the member of the family; "" if there is only one.
        banks: number of banks of experts.
        blocks: repeated blocks of a model of no known family.
        parts: what else the file contains: "VAE", ...
        layers: its linear layers, in file order.
        header_marks: number of layers with a quantization config in the header.
        header_version: format version of these configs: "1.0" is ComfyUI's, "1.1" SGLang's; None if missing.
        tensor_marks: number of comfy_quant tensors.
        legacy_markers: the `scaled_fp8` tensors, the model's first -> their sizes; 2 turns FP8 matmuls off.
        made: how this tool made it; None if unknown.
        problems: what is wrong, the worst first.
        folded: whether its channels were scaled, so that adapters must be as well; see `folding`.
    """

    path: Path
    files: int
    sharded: bool
    size_bytes: int
    tensors: int
    prefix: str
    family: str | None
    title: str
    variant: str
    banks: int
    blocks: tuple[str, ...]
    parts: tuple[str, ...]
    layers: tuple[LayerView, ...]
    header_marks: int
    header_version: str | None
    tensor_marks: int
    legacy_markers: Mapping[str, int]
    made: Made | None
    problems: tuple[Problem, ...]
    folded: bool = False

    @property
    def readings(self) -> dict[str, int]:
        """Number of layers by reading, in the order of `READINGS`."""
        counts = Counter(layer.reading for layer in self.layers)
        return {reading: counts[reading] for reading in READINGS if counts[reading]}

    @property
    def formats(self) -> dict[str, Format]:
        """The formats of its quantized layers, by key of `formats.FORMATS`."""
        return {layer.read_as: FORMATS[layer.read_as] for layer in self.layers if layer.read_as is not None}

    @property
    def bits_per_weight(self) -> float | None:
        """Average over all quantized layers, scales included; None if there are none."""
        sizes = [(layer.bits, math.prod(layer.shape)) for layer in self.layers if layer.read_as is not None]
        weights = sum(count for _, count in sizes)
        return sum((bits or 0.0) * count for bits, count in sizes) / weights if weights else None

    @property
    def input_states(self) -> dict[InputState, int]:
        """Number of quantized layers by state of the input scale."""
        return dict(Counter(layer.input_state for layer in self.layers if layer.input_state is not None))

    @property
    def doubts(self) -> tuple[Problem, ...]:
        """What counts as a problem under --strict: input scales that were not measured."""
        guessed = tuple(layer.name for layer in self.layers if layer.input_state == "guessed")
        if guessed:
            return (Problem("guessed", guessed),)
        products = [layer for layer in self.layers if layer.reading in PRODUCTS]
        calibrated = self.made is not None and (self.made.engine or self.made.mix)  # even if all scales are 1.0
        if products and not calibrated and all(layer.input_state in ("one", "missing") for layer in products):
            return (Problem("uncalibrated", tuple(layer.name for layer in products)),)
        return ()

    @property
    def advice(self) -> tuple[str, ...]:
        """What to do although nothing is wrong, one sentence each."""
        sentences = []
        if at_one := self.readings.get("fp8-at-one", 0):
            sentences.append(
                f"{at_one} of {at_one + self.readings.get('fp8', 0)} FP8 matmuls have no measured input scale, so "
                f"inputs beyond {DEFAULT_GRID.max:g} are clipped and tiny ones vanish; calibrate: {CALIBRATE}"
            )
        if guessed := self.input_states.get("guessed", 0):
            sentences.append(f"{plural(guessed, 'input scale')} guessed, which may be far off; measure: {CALIBRATE}")
        if self.folded:
            sentences.append(FOLDED)
        if self.sharded:
            sentences.append("ComfyUI does not read shard indexes: merge the shards into one file")
        return tuple(sentences)

    def to_json(self) -> dict[str, Any]:
        """Everything as JSON values."""
        return {
            **asdict(self),
            "path": str(self.path),
            "advice": list(self.advice),
            "readings": self.readings,
            "input_scales": self.input_states,
            "bits_per_weight": self.bits_per_weight,
            "formats": {name: {"title": fmt.title, "read_by": fmt.read_by, "cards": fmt.cards}
                        for name, fmt in self.formats.items()},
            "problems": [problem.to_json() for problem in self.problems],
            "doubts": [problem.to_json() for problem in self.doubts],
        }  # fmt: skip


def inspect_file(path: StrPath) -> Inspection:
    """Inspect a `.safetensors` file, or shards by their `.safetensors.index.json`.

    Raises:
        CheckpointError: the file is not a readable safetensors file.
    """
    with open_checkpoint(path) as checkpoint:
        return inspect_checkpoint(checkpoint)


def inspect_checkpoint(checkpoint: Checkpoint) -> Inspection:
    """Inspect an open checkpoint; reads little more than its scales and quantization configs."""
    table = find_layers(checkpoint, collect_problems=True)
    found = identify(checkpoint, table)
    made = made_of(checkpoint.metadata)
    survey = _Survey(checkpoint, table, found.encoder, made or Made())
    layers = survey.views()
    for problem in survey.other_problems():
        survey.report(*problem)
    marks = table.marks
    markers = sorted(marks.legacy.markers.values(), key=lambda info: info is not marks.legacy.marker)
    parts = [] if found.encoder else [names.other_part(name) for name in checkpoint.tensors if not table.owns(name)]
    return Inspection(
        path=checkpoint.path,
        files=len(checkpoint.files),
        sharded=checkpoint.sharded,
        size_bytes=checkpoint.size_bytes,
        tensors=len(checkpoint.tensors),
        prefix=table.prefix,
        family=found.key,
        title=found.title + (f" ({found.hint})" if found.hint else ""),
        variant=found.variant,
        banks=len(found.banks),
        blocks=tuple(map(str, found.structure.main)) if found.kind == "diffusion" and found.family is None else (),
        parts=tuple(dict.fromkeys(part for part in parts if part is not None)),
        layers=tuple(layers),
        header_marks=len(marks.header.configs),
        header_version=version if isinstance(version := marks.header.fields.get("format_version"), str) else None,
        tensor_marks=len(marks.tensor.found),
        legacy_markers={info.name: info.elements for info in markers},
        made=made,
        problems=tuple(survey.found[kind] for kind in KINDS if kind in survey.found),
        folded=names.FOLDING_KEY in checkpoint.metadata,
    )


@dataclass
class _Survey:
    """One walk over the layers of a table that collects problems."""

    checkpoint: Checkpoint
    table: LayerTable
    whole_text_encoder: bool
    made: Made
    found: dict[str, Problem] = field(default_factory=dict)

    def report(self, kind: str, tensor: str, detail: str | None = None) -> None:
        """Record a problem."""
        known = self.found.get(kind, Problem(kind, ()))
        self.found[kind] = Problem(kind, (*known.tensors, tensor), known.detail or detail)

    def views(self) -> list[LayerView]:
        """Every layer, in file order."""
        table = self.table
        views = {layer.name: self.quantized(layer) for layer in table.quantized.values()}
        for layer in table.raw.values():
            views[layer.name] = self.view(layer, "cast")
            self.report("raw-fp8", layer.name)
        views |= {name: self.foreign(layer) for name, layer in table.foreign.items() if name not in self.packed}
        for layer in table.plain.values():
            views[layer.name] = self.view(layer, "high-precision")
        for error in table.problems:
            if not isinstance(error, LayerError) or error.tensor is None:
                raise error  # the whole file cannot be read
            self.report(error.kind, error.tensor, error.problem)
            name = _layer_of(error.tensor)
            if weight := self.checkpoint.tensors.get(name + names.WEIGHT):
                fmt = recognize(name, weight.dtype, self.checkpoint.tensors)
                said, title = (fmt.marked, fmt.title) if fmt else (weight.dtype, weight.dtype)
                views[name] = LayerView(name, weight.shape, said, title, "error", marked_by=table.marks.kinds(name))
        markers = (table.marks.legacy.marker_of(view.name) for view in views.values() if view.reading == "marker")
        for name in dict.fromkeys(marker.name for marker in markers if marker is not None):
            self.report("marker-disables-fp8", name)
        for name, (weight, program) in self.packed.items():
            self.report("packed", name, program)
            views[name] = LayerView(name, weight.shape, program, program, "packed")
        owners = {weight.name: name for name, (weight, _) in self.packed.items()}
        order = dict.fromkeys(owners.get(key, key.removesuffix(names.WEIGHT)) for key in self.checkpoint.tensors)
        return [views[name] for name in order if name in views]

    @cached_property
    def packed(self) -> dict[str, tuple[TensorInfo, str]]:
        """Layers packed by another program, which ComfyUI cannot read -> the weight and the program."""
        found = {}
        for key, info in self.checkpoint.tensors.items():
            packed = packings.packed_by(key, self.checkpoint)
            name = key.removesuffix(names.WEIGHT)
            if packed is None and name != key and info.dtype in INTEGER_DTYPES and info.shape:  # codes of some kind
                known = name in self.table.foreign or name in self.table.quantized
                packed = None if known else (name, f"integers ({info.dtype})")
            if packed is not None and not self.table.marks.kinds(packed[0]):
                found[packed[0]] = info, packed[1]
        return found

    def view(self, layer: Layer, reading: str, **more: Any) -> LayerView:
        """The view of a readable layer."""
        fmt = layer.format
        said = layer.config.get("format") or (fmt.marked if fmt else layer.weight.dtype)
        read_as = fmt.name if fmt else None
        return LayerView(layer.name, layer.shape, said, layer.title, reading, read_as, layer.bits, **more)

    def foreign(self, layer: ForeignLayer) -> LayerView:
        """The view of a layer in a format that is only recognized or unknown; reports its problems."""
        name, form, fmt, marked_by = layer.name, layer.form, layer.format, self.table.marks.kinds(layer.name)
        missing = [name + key for key in (fmt.scales if fmt else ()) if name + key not in self.checkpoint]
        reading = "error"
        if not marked_by and len(layer.weight.shape) == 2:
            self.report("unmarked", name, form)
            reading = "scale-dropped"
        elif marked_by and len(layer.weight.shape) == 3 and form.endswith("-dimensional"):
            whole = full_precision(self.table.marks.of(name).config(name))
            quantized = "experts-at-one" if form.startswith("float8") else "foreign"
            reading = "full-precision" if whole else quantized  # as ComfyUI's `MoEExperts` reads them
        elif not marked_by or form.endswith("-dimensional"):
            reading = "foreign"  # not 2-D, for example a convolution
        elif fmt is None or not fmt.since:
            self.report("mark-unknown", name, form if fmt is None else f"{form}, of {fmt.reader}")
        elif layer.weight.dtype not in fmt.dtypes:
            self.report("mark-format", name, f"declared as {form}, but stored as {layer.weight.dtype}")
        elif missing:
            self.report("weight-scale-missing", name, f"declared as {form}, but {missing[0]} is missing")
        else:
            reading = "foreign"
        return LayerView(name, layer.weight.shape, form, fmt.title if fmt else form, reading, marked_by=marked_by)

    def weight_problem(self, layer: Layer) -> tuple[str, str, str] | None:
        """Kind, tensor and detail of an implausible weight scale; see the module docstring."""
        fmt, tensors = layer.format, self.checkpoint.tensors
        assert fmt is not None
        assert layer.weight_scale is not None
        if names.CODEBOOK in fmt.optional and names.CODEBOOK not in layer.parts:
            largest = float(np.nanmax(self.scales(fmt, tensors[layer.weight_scale]), initial=0.0))
            if largest * -LEAST_CODE > 2 * fmt.range:
                return "codebook-missing", layer.name, f"{layer.weight_scale} is up to {largest:g}"
        key = f"{layer.name}{fmt.ranged_by}" if isinstance(fmt, Packed) else layer.weight_scale
        scales = self.scales(fmt, tensors[key])
        if np.isnan(scales).any():
            return "scale-value", key, "some are NaN"
        scale, reach = float(scales.max(initial=0.0)), fmt.range
        if not scales.size or _plausible(scale, reach) or not (codes := self.sample(layer.weight)).any():
            return None
        if fmt.grid is not None:
            values = np.abs(fmt.grid.decode(codes))
            reach = float(values.max(initial=0.0, where=np.isfinite(values)))
        elif fmt.ranged_by == names.WEIGHT_SCALE_2:
            reach *= float(np.nanmax(self.scales(fmt, tensors[layer.weight_scale]), initial=0.0)) / DEFAULT_GRID.max
        if scale == 0.0:
            return "scale-value", key, "0, but the weights are not 0"
        if _plausible(scale, reach):
            return None
        return "weight-scale-absurd", key, f"{scale:.3g} makes weights up to {scale * reach:.3g}"

    def scales(self, fmt: Format, info: TensorInfo) -> NDArray[np.float32]:
        """Scales of a weight as numbers; a sample of one-byte scales, which are many."""
        if info.dtype in FLOAT_SCALES:
            return self.checkpoint.float32(info.name)
        codes = self.sample(info)
        if fmt.scale_dtypes[0] in FLOAT_GRIDS:
            return FLOAT_GRIDS[fmt.scale_dtypes[0]].decode(codes)
        return np.where(codes == 255, np.nan, np.exp2(codes - 127.0)).astype(np.float32)  # E8M0

    def sample(self, weight: TensorInfo) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """A sample of a tensor's bytes, spread over it."""
        if weight.nbytes <= _SAMPLE_RUNS * _SAMPLE_BYTES:
            return self.checkpoint.raw(weight.name)
        starts = np.linspace(0, weight.nbytes - _SAMPLE_BYTES, _SAMPLE_RUNS, dtype=np.int64)
        return np.concatenate([self.checkpoint.raw(weight.name, at, at + _SAMPLE_BYTES) for at in starts.tolist()])

    def quantized(self, layer: Layer) -> LayerView:
        """The view of a quantized layer; reports its problems."""
        fmt, marks = layer.format, self.table.marks
        assert fmt is not None
        if disagreement := marks.disagreement(layer.name):
            self.report("header-disagrees", layer.name, disagreement)
        if marks.header.bare(layer.name) and layer.name not in marks.tensor:
            self.report("header-bare", layer.name)
        if names.PRE_QUANT_SCALE not in fmt.optional and layer.name + names.PRE_QUANT_SCALE in self.checkpoint:
            self.report("pre-quant-scale", layer.name, layer.title)
        assert layer.weight_scale is not None
        scales = self.checkpoint.tensors[layer.weight_scale]
        if layer.config.get("format") == INT8.marked and len(scales.shape) == 1 < scales.elements:
            self.report("scale-flat", scales.name)
        usable = layer.input_scale is not None and layer.input_problem is None
        scale = input_scale(self.checkpoint, layer) if usable else None
        reading = self.reading(layer, scale)
        state: InputState | None = "unused" if layer.input_scale is not None or not layer.dynamic else None
        if reading in PRODUCTS or reading == "per-block-static":
            assert fmt.input_grid is not None
            state = _input_state(scale, fmt.input_grid) if layer.input_problem is None else "suspicious"
            reading = self.judge_input_scale(layer, scale, state) or reading
            if state == "one" and self.made.measured(layer.name):
                state = "calibrated"
                reading = "fp8" if reading == "fp8-at-one" else reading
            if layer.name in self.made.guessed or (state == "calibrated" and self.made.engine == "layer"):
                state = "guessed" if state != "suspicious" else state
        if problem := self.weight_problem(layer):
            self.report(*problem)
            reading = "error"
        return self.view(
            layer,
            reading,
            block=layer.block,
            scaling=layer.granularity,
            marked_by=marks.kinds(layer.name) or (("legacy",) if layer.marking == "legacy" else ()),
            input_state=state,
            input_scale=scale,
        )

    def judge_input_scale(self, layer: Layer, scale: float | None, state: InputState) -> str | None:
        """Report problems of the input scale of an FP8 matmul; returns the reading if they change it."""
        key, problem = layer.input_scale, layer.input_problem
        if key is None:
            return None
        dtype = self.checkpoint.tensors[key].dtype
        if problem is not None:
            self.report("input-" + problem.kind.replace("value", "suspicious"), key, problem.problem)
        elif dtype != "F32":  # weight scales may be any float, which ComfyUI converts
            self.report("input-scale-dtype", key, dtype)
        if problem is None and state == "suspicious":
            self.report("input-scale-suspicious", key, f"{scale:.3g}")
        return "error" if problem is not None or dtype != "F32" or scale == 0 else None

    def reading(self, layer: Layer, scale: float | None) -> str:
        """What ComfyUI does with a quantized layer; the first rule that applies decides."""
        fmt = layer.format
        assert fmt is not None
        part = None if self.table.owns(layer.name) else names.other_part(layer.name)
        if layer.marking == "none":
            row_wise = layer.weight_scale == layer.name + names.WEIGHT_SCALE and layer.granularity == "row"
            known = fmt.name == "nvfp4" or (fmt is DEFAULT and row_wise)
            self.report("unmarked", layer.name, f"{fmt.title}, which diffusers 0.42 and later reads" if known else None)
            return "scale-dropped"
        if layer.marking == "legacy" and part is None and self.table.marks.header.found:
            self.report("two-spellings", layer.name)
            return "scale-dropped"
        if not fmt.since and fmt.reader != QUANTOPS:
            self.report("mark-unknown", layer.name, f"{fmt.marked}, of {fmt.reader}")
            return "error"
        if not fmt.since:
            return "dynamic"
        if not fmt.dynamic and layer.granularity != "tensor":
            self.report("scale-granularity", layer.name, f"one scale per {layer.granularity}")
            return "error"
        if self.whole_text_encoder or (part == "text encoder"):
            return "text-encoder"
        if layer.full_precision:
            return "marker" if layer.marking == "legacy" else "full-precision"
        if fmt.dynamic and not fmt.input_block:
            return "per-token"
        if fmt.dynamic:
            return f"per-block-{fmt.input_block}" if layer.dynamic else "per-block-static"
        # In both cases torch's scaled_mm raises ValueError; ComfyUI only catches RuntimeError and TypeError.
        odd_sides = not fmt.takes(layer.shape)
        if odd_sides:
            self.report("sides", layer.name, f"{layer.out_features} × {layer.in_features}")
        if not fmt.cards:
            self.report("e5m2-product", layer.name)
        if odd_sides or not fmt.cards:
            return "cuda-error"
        return "fp8-at-one" if scale is None or scale == 1.0 else "fp8"

    def other_problems(self) -> Iterator[tuple[str, str, str | None]]:
        """Kind, tensor and detail of what is wrong beside scales and configs of layers."""
        checkpoint, table = self.checkpoint, self.table
        for kind, name, detail in (
            *(("orphaned-scale", name, None) for name in checkpoint if name.endswith(names.SCALES)),
            *(("orphaned-mark", name, None) for name in table.marks.tensor.found),
            *(("orphaned-mark", name, "in the header") for name in table.marks.header.configs),
        ):
            layer = _layer_of(name)
            if layer + names.WEIGHT not in checkpoint and layer not in self.packed:
                yield kind, name, detail
        for linear in table.linear():
            if table.owns(linear.name) and all_zero(checkpoint, linear.weight.name):
                yield "all-zero", linear.name, None
        yield from (("not-finite", name, None) for name in not_finite(checkpoint, table))
        tiles = {one.name: one.format.sides[0] for one in table.quantized.values() if isinstance(one.format, Packed)}
        alone = frozenset(self.packed) | table.foreign.keys()
        for name, detail in misshapen(table.tensor_shapes(checkpoint), alone, tiles):
            yield "misshapen", name, detail
        for word in names.unread_words(table.prefix, checkpoint.tensors):
            yield "wrapped", next(name for name in checkpoint if word in name), word


def _layer_of(tensor: str) -> str:
    """The layer that a tensor belongs to, or the name itself if it is a layer's.

    >>> _layer_of("blocks.0.weight_scale"), _layer_of("blocks.0")
    ('blocks.0', 'blocks.0')
    """
    suffix = next((suffix for suffix in names.LAYER_SUFFIXES if tensor.endswith(suffix)), "")
    return tensor[: len(tensor) - len(suffix)]


def _plausible(scale: float, reach: float) -> bool:
    """Whether a real layer can have this largest scale, given the largest weight at a scale of 1."""
    return scale * reach >= LEAST_WEIGHT and (scale <= 1.0 or scale * reach <= LARGEST_WEIGHT)


def _input_state(scale: float | None, grid: Grid = DEFAULT_GRID) -> InputState:
    """The state of an input scale that is used.

    >>> _input_state(None), _input_state(1.0), _input_state(0.02), _input_state(0.0)
    ('missing', 'one', 'calibrated', 'suspicious')
    """
    if scale is None:
        return "missing"
    if scale == 1.0:
        return "one"
    as_fp8 = scale * (grid.max / DEFAULT_GRID.max)
    return "calibrated" if LEAST_INPUT_SCALE <= as_fp8 <= LARGEST_INPUT_SCALE else "suspicious"


def _of_kinds(found: Mapping[str, Any], kinds: Mapping[str, type]) -> dict[str, Any]:
    return {name: found[name] for name, kind in kinds.items() if type(found.get(name)) is kind}


def made_of(metadata: Mapping[str, str]) -> Made | None:
    """What the metadata says about how this tool made the file; malformed parts are ignored."""
    try:
        said = parse_json(metadata.get(names.PROVENANCE_KEY, "null"))
    except JSONError:
        return None
    if not isinstance(said, dict):
        return None
    calibrate, mix = said.get("calibrate"), said.get("mix")
    found = {**(calibrate if isinstance(calibrate, dict) else {}), "version": said.get("version")}
    run = {"conditioning": str, "samples": int, "seed": int}
    facts = _of_kinds(found, {"version": str, "engine": str, **run})
    if isinstance(mix, dict):
        facts["mix"] = Mix(**_of_kinds(mix, {"gpu": str, **run}), figures=read_figures(mix))
    for name in ("guessed", "unmeasured", "depends_on_conditioning", "lora"):
        if isinstance(found.get(name), list):
            facts[name] = tuple(text for text in found[name] if isinstance(text, str))
    return Made(converted=isinstance(said.get("convert"), dict), **facts)
