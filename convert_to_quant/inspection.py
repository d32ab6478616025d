"""What a checkpoint is, from its headers and its scales alone: no weight is read, nothing is run.

Why it exists. Two FP8 files of the same model look alike and behave differently: one is marked in its header and one in
tensors, one has input scales and one leaves them at 1.0, one carries a marker that turns FP8 products off. Readers
either say nothing about it or fail in the middle of a picture. This module says it before.

What it answers, layer by layer and in sum: the format and how finely it is scaled, what marks it, its input scale, and
what ComfyUI does with it (a key of `READINGS`). What is wrong is a `Problem` of a kind of `KINDS`, with what to do.
The facts about ComfyUI were found by running version 0.33 and by reading its source.

An input scale is *suspicious* where no network that was ever measured has such ranges. The range is 448 times the
scale; published ranges of real layers lie between about 1 and 6.6e4. Outside 2⁻²⁰ to 2¹² (ranges of 4e-4 to 1.8e6) the
scale is taken for a mistake: it was multiplied or divided once too often, or never set.

Limits. A scale of a believable size may still be wrong: only running the model shows that. Header metadata of shards is
read as one.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from . import families, names, stats
from .checkpoint import Checkpoint, open_checkpoint
from .convert import FULL_PRECISION_KEY, PROVENANCE_KEY, SIDE_MULTIPLE
from .errors import StrPath
from .fp8 import BY_SAFETENSORS_DTYPE, E5M2
from .layers import Layer, LayerError, LayerTable, find_layers, input_scale
from .untrusted import JSONError, parse_json

InputState = Literal["calibrated", "one", "missing", "suspicious", "unused"]

LEAST_INPUT_SCALE = 2.0**-20
LARGEST_INPUT_SCALE = 2.0**12

READINGS: Mapping[str, str] = {
    "fp8": "FP8 product, inputs scaled by input_scale",
    "fp8-at-one": "FP8 product, inputs at scale 1.0",
    "full-precision": "full precision (full_precision_matrix_mult)",
    "marker": "full precision (legacy marker of 2 elements)",
    "text-encoder": "full precision (text encoders always are)",
    "dynamic": "only with the ComfyUI-QuantOps nodes, which scale inputs as they come",
    "foreign": "kernels of its own format",
    "cuda-error": "FP8 product, which fails on CUDA",
    "error": "an error, or silently something else (see problems)",
    "scale-dropped": "scale dropped: codes are taken for weights, so noise",
    "cast": "codes are the weights, cast to the precision of the model",
    "high-precision": "high precision, as stored",
}
"""What ComfyUI does with a layer."""

PRODUCTS = frozenset({"fp8", "fp8-at-one", "cuda-error"})
"""Readings in which the inputs are quantized too."""

_RECONVERT = "convert the original again"
_CALIBRATE = "convert_to_quant -i FILE -o NEW --actcal"


@dataclass(frozen=True)
class Kind:
    """A kind of problem.

    Attributes:
        title: what is wrong and what comes of it.
        remedy: what to do.
    """

    title: str
    remedy: str


KINDS: Mapping[str, Kind] = {
    "header-unreadable": Kind("the header's _quantization_metadata cannot be read", f"{_RECONVERT}, or download again"),
    "mark-unreadable": Kind("a mark cannot be read, so the model does not load", _RECONVERT),
    "mark-format": Kind("a mark names another format than the weight has", _RECONVERT),
    "legacy-e5m2": Kind("float8_e5m2 in a legacy file, read as float8_e4m3fn: silently wrong", _RECONVERT),
    "weight-scale-missing": Kind("marked as quantized without a weight scale: the model does not load", _RECONVERT),
    "scale-value": Kind("a scale is NaN, infinite or negative", _RECONVERT),
    "scale-dtype": Kind("a scale is no float", _RECONVERT),
    "scale-shape": Kind("a scale has a shape that fits no rule", _RECONVERT),
    "scale-granularity": Kind(
        "float8 with scales per row or block: ComfyUI fails, or silently computes something else",
        f"{_RECONVERT} with --scaling-mode tensor",
    ),
    "header-bare": Kind(
        "the header names layers without the prefix that they have in the file: ComfyUI's Load Checkpoint misses such "
        "marks and paints noise; Load Diffusion Model finds them",
        "load it as a diffusion model, or convert the original again",
    ),
    "two-spellings": Kind(
        "legacy layers in a file whose header marks others: ComfyUI drops the scales of the legacy layers", _RECONVERT
    ),
    "unmarked": Kind(
        "FP8 with scales but without a mark: ComfyUI drops the scales and paints noise",
        "use it where it was made for, or convert the original with convert_to_quant",
    ),
    "orphaned-scale": Kind("scales without a weight", "a part of the model is missing or renamed: get the file again"),
    "orphaned-mark": Kind("marks without a weight", "a part of the model is missing or renamed: get the file again"),
    "header-disagrees": Kind(
        "header and comfy_quant tensor disagree; ComfyUI lets the header win, others may not", _RECONVERT
    ),
    "marker-disables-fp8": Kind(
        "the legacy marker has 2 elements: no FP8 products, and input scales are ignored",
        f"{_CALIBRATE} --enable-fp8-matmul",
    ),
    "input-scale-dtype": Kind("an input scale is not float32: ComfyUI fails at the first step", _CALIBRATE),
    "input-scale-shape": Kind("an input scale has several values where one is read", _CALIBRATE),
    "input-scale-suspicious": Kind(
        "an input scale is 0, not finite or absurd: inputs vanish, saturate or become NaN", _CALIBRATE
    ),
    "sides": Kind(
        f"sides are no multiples of {SIDE_MULTIPLE}: FP8 products fail on CUDA",
        f"{_RECONVERT}; convert_to_quant leaves such layers in high precision",
    ),
    "e5m2-product": Kind(
        "float8_e5m2 for weights and inputs: FP8 products fail on CUDA, which multiplies no two of that format",
        f"{_RECONVERT}, to float8_e4m3fn",
    ),
    "raw-fp8": Kind(
        "FP8 weights without scale and mark: a plain cast, which loses small weights, without FP8 products",
        "convert the original with convert_to_quant",
    ),
}
"""Every kind of problem, the worst first. The first eight are those of `layers.ProblemKind`."""

INPUT_SCALE_KINDS: Mapping[str, str] = {
    "scale-dtype": "input-scale-dtype",
    "scale-shape": "input-scale-shape",
    "scale-value": "input-scale-suspicious",
}
"""Problems of scales -> the same of input scales, which a calibration cures."""

TEXT_ENCODERS: Mapping[str, tuple[str, ...]] = {
    "T5": ("encoder.block.0.layer.0.SelfAttention.q.weight",),
    "CLIP": ("text_model.encoder.layers.0.self_attn.q_proj.weight",),
    "language model": ("model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight"),
}
"""Files that hold nothing but a text encoder: what it is, and tensors by which it shows."""

_OTHER_PREFIXES = tuple(part.prefix for part in families.OTHER_PARTS)
_LORA_PARTS = (".lora_A.", ".lora_B.", ".lora_up.", ".lora_down.", ".lora.up.", ".lora.down.")
_PACKED_WEIGHT = ".weight_packed"
"""Under this name compressed-tensors keeps two 4-bit weights per byte; its scales are no orphans."""

_SCALES = tuple(
    suffix for suffix in names.LAYER_SUFFIXES if suffix not in (names.WEIGHT, names.BIAS, names.COMFY_QUANT)
)
_NO_CONFIG_BEYOND_BYTES = 1 << 20


@dataclass(frozen=True)
class LayerView:
    """One linear layer, as readers see it.

    Attributes:
        name: as the file has it.
        shape: of its weight as stored, (out, in) except in packed formats.
        format: "float8_e4m3fn", "nvfp4", ...; the dtype where it is not quantized.
        block: the weights that share one scale; None without scale, or where the layer cannot be read.
        scaling: the same in a word.
        marked_by: "header", "tensor", "legacy".
        reading: what ComfyUI does with it, a key of `READINGS`.
        input_state: what its input scale is; None where it is not quantized.
        input_scale: its value; None where it is missing or cannot be read.
    """

    name: str
    shape: tuple[int, ...]
    format: str
    reading: str
    block: tuple[int, int] | None = None
    scaling: Literal["tensor", "row", "block"] | None = None
    marked_by: tuple[str, ...] = ()
    input_state: InputState | None = None
    input_scale: float | None = None


@dataclass(frozen=True)
class Problem:
    """Something that is wrong, once for all layers that have it.

    Attributes:
        kind: a key of `KINDS`.
        tensors: the tensors or layers that have it, in file order.
        detail: what was found at the first of them, where the kind does not say it all.
    """

    kind: str
    tensors: tuple[str, ...]
    detail: str | None = None

    @property
    def title(self) -> str:
        """What is wrong and what comes of it."""
        return KINDS[self.kind].title

    @property
    def remedy(self) -> str:
        """What to do."""
        return KINDS[self.kind].remedy

    def to_json(self) -> dict[str, Any]:
        """Everything as JSON values."""
        return {**asdict(self), "title": self.title, "remedy": self.remedy}


@dataclass(frozen=True)
class Made:
    """How this tool made a file, by the file's own word.

    Attributes:
        version: of the tool.
        converted: whether it quantized weights.
        engine: "model", "layer" or "statistics" where it calibrated input scales, else None.
        conditioning: what the model was shown in place of prompts ("noise"), where that is known.
        samples, seed: of the calibration.
        depends_on_conditioning: layers whose ranges move with the conditioning, which noise only imitates.
        lora: adapters that the ranges cover.
    """

    version: str | None = None
    converted: bool = False
    engine: str | None = None
    conditioning: str | None = None
    samples: int | None = None
    seed: int | None = None
    depends_on_conditioning: tuple[str, ...] = ()
    lora: tuple[str, ...] = ()


@dataclass(frozen=True)
class Inspection:
    """What a checkpoint is.

    Attributes:
        path: what was opened.
        files: number of its files.
        sharded: whether it was opened through an index.
        size_bytes: of all its files.
        tensors: number of its tensors.
        prefix: what stands before the diffusion model's own names.
        family: key of `families.FAMILIES`, "text-encoder", "adapter", or None.
        title: the same for people.
        parts: what else the file holds: "VAE", ...
        layers: its linear layers, in file order.
        header_marks: number of layers that the header marks.
        tensor_marks: number of comfy_quant tensors.
        legacy_marker: name of the `scaled_fp8` tensor.
        legacy_marker_elements: its size; 2 turns FP8 products off.
        further_markers: names of such tensors of other parts of the file.
        quantization_config: the method that a config.json beside the file names, where it has one.
        made: how this tool made it; None where it did not, or the file does not say.
        problems: what is wrong, the worst first.
    """

    path: Path
    files: int
    sharded: bool
    size_bytes: int
    tensors: int
    prefix: str
    family: str | None
    title: str
    parts: tuple[str, ...]
    layers: tuple[LayerView, ...]
    header_marks: int
    tensor_marks: int
    legacy_marker: str | None
    legacy_marker_elements: int | None
    further_markers: tuple[str, ...]
    quantization_config: str | None
    made: Made | None
    problems: tuple[Problem, ...]

    @property
    def readings(self) -> dict[str, int]:
        """How many layers ComfyUI reads how, in the order of `READINGS`."""
        counts = Counter(layer.reading for layer in self.layers)
        return {reading: counts[reading] for reading in READINGS if counts[reading]}

    @property
    def input_states(self) -> dict[InputState, int]:
        """How many quantized layers have which input scale."""
        return dict(Counter(layer.input_state for layer in self.layers if layer.input_state is not None))

    @property
    def advice(self) -> tuple[str, ...]:
        """What to do although nothing is wrong, one sentence each."""
        sentences = []
        at_one = self.readings.get("fp8-at-one", 0)
        if at_one:
            sentences.append(
                f"{at_one} of {at_one + self.readings.get('fp8', 0)} FP8 products have no measured input scale, so "
                f"inputs beyond 448 are clipped and tiny ones vanish: {_CALIBRATE}"
            )
        if self.sharded:
            sentences.append("ComfyUI reads no shard indexes: join the shards into one file for it")
        return tuple(sentences)

    def to_json(self) -> dict[str, Any]:
        """Everything as JSON values."""
        return {
            **asdict(self),
            "path": str(self.path),
            "advice": list(self.advice),
            "readings": self.readings,
            "input_scales": self.input_states,
            "problems": [problem.to_json() for problem in self.problems],
        }


def inspect_file(path: StrPath) -> Inspection:
    """Find out what a file is.

    Args:
        path: a `.safetensors` file or the `.safetensors.index.json` of shards.

    Returns:
        What it is, its problems included.

    Raises:
        CheckpointError: it is no readable safetensors file.
    """
    with open_checkpoint(path) as checkpoint:
        return inspect_checkpoint(checkpoint)


def inspect_checkpoint(checkpoint: Checkpoint) -> Inspection:
    """Find out what an open checkpoint is.

    Args:
        checkpoint: the checkpoint; only scales and marks of it are read.

    Returns:
        What it is, its problems included.
    """
    table = find_layers(checkpoint, collect_problems=True)
    family, title = _identify(checkpoint)
    survey = _Survey(checkpoint, table, whole_text_encoder=family == "text-encoder")
    layers = survey.views()
    survey.look_for_orphans()
    marker = table.legacy_marker
    parts = (families.other_part(name) for name in checkpoint.tensors if name.startswith(_OTHER_PREFIXES))
    return Inspection(
        path=checkpoint.path,
        files=len(checkpoint.files),
        sharded=checkpoint.sharded,
        size_bytes=sum(file.header.data_start + file.header.data_bytes for file in checkpoint.files),
        tensors=len(checkpoint.tensors),
        prefix=table.prefix,
        family=family,
        title=title,
        parts=tuple(dict.fromkeys(part.title for part in parts if part is not None)),
        layers=tuple(layers),
        header_marks=len(table.header_marks),
        tensor_marks=sum(name.endswith(names.COMFY_QUANT) for name in checkpoint.tensors),
        legacy_marker=None if marker is None else marker.name,
        legacy_marker_elements=None if marker is None else marker.elements,
        further_markers=tuple(other.name for other in table.legacy_markers.values() if other is not marker),
        quantization_config=_config_beside(checkpoint.path),
        made=_made(checkpoint.metadata),
        problems=tuple(survey.problems()),
    )


def _identify(checkpoint: Checkpoint) -> tuple[str | None, str]:
    """The family and its name for people."""
    if stats.METADATA_KEY in checkpoint.metadata:
        return "statistics", "statistics of what layers received, not a model (convert_to_quant report shows them)"
    bare = names.strip_prefix(checkpoint.tensors)[1]
    shapes = {name: checkpoint.tensors[full].shape for full, name in bare.items()}
    family = families.detect(shapes, shapes)
    if family is not None:
        return family.name, family.title
    for kind, tensors in TEXT_ENCODERS.items():
        if all(name in shapes for name in tensors):
            return "text-encoder", f"text encoder ({kind})"
    if any(part in name for name in checkpoint.tensors for part in _LORA_PARTS):
        return "adapter", "adapter (LoRA), not a model"
    return None, "unknown"


@dataclass
class _Survey:
    """One walk over the layers of a table, which collects what is wrong."""

    checkpoint: Checkpoint
    table: LayerTable
    whole_text_encoder: bool
    found: dict[str, list[str]] = field(default_factory=dict)
    details: dict[str, str] = field(default_factory=dict)

    def report(self, kind: str, tensor: str, detail: str | None = None) -> None:
        """Note a problem."""
        self.found.setdefault(kind, []).append(tensor)
        if detail is not None:
            self.details.setdefault(kind, detail)

    def problems(self) -> Iterator[Problem]:
        """What was found, the worst first."""
        for kind in KINDS:
            if kind in self.found:
                yield Problem(kind, tuple(self.found[kind]), self.details.get(kind))

    def views(self) -> list[LayerView]:
        """Every layer, in file order."""
        table = self.table
        views = {}
        for layer in table.quantized.values():
            views[layer.name] = self.quantized(layer)
        for layer in table.raw.values():
            assert layer.format is not None
            views[layer.name] = LayerView(layer.name, layer.weight.shape, layer.format.name, "cast")
            self.report("raw-fp8", layer.name)
        for foreign in table.foreign.values():
            views[foreign.name] = LayerView(
                foreign.name, foreign.weight.shape, foreign.format, "foreign", marked_by=self.marked_by(foreign.name)
            )
        for layer in table.plain.values():
            views[layer.name] = LayerView(layer.name, layer.weight.shape, layer.weight.dtype, "high-precision")
        for error in table.problems:
            if not isinstance(error, LayerError) or error.tensor is None:
                raise error  # not about a layer: the file cannot be read
            self.report(error.kind, error.tensor, error.problem)
            name = _layer_of(error.tensor)
            weight = self.checkpoint.tensors.get(name + names.WEIGHT)
            if weight is not None:
                fmt = BY_SAFETENSORS_DTYPE.get(weight.dtype)
                views[name] = LayerView(name, weight.shape, fmt.name if fmt else weight.dtype, "error",
                                        marked_by=self.marked_by(name))  # fmt: skip
        markers = (table.marker_of(view.name) for view in views.values() if view.reading == "marker")
        for name in dict.fromkeys(marker.name for marker in markers if marker is not None):
            self.report("marker-disables-fp8", name)
        order = (name[: -len(names.WEIGHT)] for name in self.checkpoint.tensors if name.endswith(names.WEIGHT))
        return [views[name] for name in order if name in views]

    def marked_by(self, name: str) -> tuple[str, ...]:
        """What marks a layer."""
        header, tensor = name in self.table.header_marks, name + names.COMFY_QUANT in self.checkpoint
        return (*(["header"] if header else []), *(["tensor"] if tensor else []))

    def quantized(self, layer: Layer) -> LayerView:
        """An FP8 layer, and its problems."""
        assert layer.format is not None
        marked_by = self.marked_by(layer.name) or (("legacy",) if layer.marking == "legacy" else ())
        if marked_by == ("header", "tensor"):
            self.compare_marks(layer)
        if layer.marking == "header" and layer.name in self.table.bare_marks and layer.comfy_quant is None:
            self.report("header-bare", layer.name)
        usable = layer.input_scale is not None and layer.input_problem is None
        scale = input_scale(self.checkpoint, layer) if usable else None
        reading = self.reading(layer, scale)
        state: InputState = "unused"
        if reading in PRODUCTS:
            state = _input_state(scale) if layer.input_problem is None else "suspicious"
            reading = self.judge_input_scale(layer, scale, state) or reading
        said = layer.config.get("format")
        return LayerView(
            layer.name,
            layer.weight.shape,
            said if isinstance(said, str) else layer.format.name,
            reading,
            layer.block,
            layer.granularity,
            marked_by,
            state,
            scale,
        )

    def judge_input_scale(self, layer: Layer, scale: float | None, state: InputState) -> str | None:
        """Report what is wrong with the input scale of an FP8 product; the reading that comes of it, if another."""
        key, problem = layer.input_scale, layer.input_problem
        if key is None:
            return None
        dtype = self.checkpoint.tensors[key].dtype
        if problem is not None:
            self.report(INPUT_SCALE_KINDS[problem.kind], key, problem.problem)
        elif dtype != "F32":  # a weight scale may be any float: ComfyUI converts that one
            self.report("input-scale-dtype", key, dtype)
        if problem is None and state == "suspicious":
            self.report("input-scale-suspicious", key, f"{scale:.3g}")
        return "error" if problem is not None or dtype != "F32" or scale == 0 else None

    def reading(self, layer: Layer, scale: float | None) -> str:
        """What ComfyUI does with an FP8 layer, by its first fact that decides."""
        part = families.other_part(layer.name)
        if layer.marking == "none":
            self.report("unmarked", layer.name)
            return "scale-dropped"
        if layer.marking == "legacy" and part is None and names.QUANTIZATION_METADATA in self.checkpoint.metadata:
            self.report("two-spellings", layer.name)
            return "scale-dropped"
        if layer.dynamic:
            return "dynamic"
        if layer.granularity != "tensor":
            self.report("scale-granularity", layer.name, f"one scale per {layer.granularity}")
            return "error"
        if self.whole_text_encoder or (part is not None and part.title == "text encoder"):
            return "text-encoder"
        if layer.full_precision:
            return "marker" if layer.marking == "legacy" else "full-precision"
        # Both are a ValueError of torch's scaled_mm, of which ComfyUI catches RuntimeError and TypeError.
        odd_sides = layer.out_features % SIDE_MULTIPLE or layer.in_features % SIDE_MULTIPLE
        if odd_sides:
            self.report("sides", layer.name, f"{layer.out_features} × {layer.in_features}")
        if layer.format is E5M2:
            self.report("e5m2-product", layer.name)
        if odd_sides or layer.format is E5M2:
            return "cuda-error"
        return "fp8-at-one" if scale is None or scale == 1.0 else "fp8"

    def compare_marks(self, layer: Layer) -> None:
        """Look whether the header and the comfy_quant tensor of a layer say the same."""
        assert layer.comfy_quant is not None
        text = self.checkpoint.raw(layer.comfy_quant).tobytes()
        try:
            mark = parse_json(text)
        except JSONError:
            self.report("header-disagrees", layer.name, "the tensor is not JSON")
            return
        if not isinstance(mark, dict):
            self.report("header-disagrees", layer.name, "the tensor is no JSON object")
            return
        # No entry for full precision says the same as false.
        header, tensor = ({FULL_PRECISION_KEY: False, **config} for config in (layer.config, mark))
        for key in sorted({*header, *tensor}):
            if header.get(key) != tensor.get(key):
                said = (json.dumps(header.get(key)), json.dumps(tensor.get(key)))
                self.report("header-disagrees", layer.name, f"{key}: {said[0]} and {said[1]}")
                return

    def look_for_orphans(self) -> None:
        """Look for scales and marks whose weight is not there."""
        tensors = self.checkpoint.tensors
        for name in tensors:
            if name.endswith((*_SCALES, names.COMFY_QUANT)) and not self.has_weight(_layer_of(name)):
                self.report("orphaned-mark" if name.endswith(names.COMFY_QUANT) else "orphaned-scale", name)
        for name in self.table.header_marks:
            if not self.has_weight(name):
                self.report("orphaned-mark", name, "in the header")

    def has_weight(self, layer: str) -> bool:
        """Whether a layer of this name has a weight."""
        return layer + names.WEIGHT in self.checkpoint or layer + _PACKED_WEIGHT in self.checkpoint


def _layer_of(tensor: str) -> str:
    """The layer that a tensor belongs to, or the name itself where it is a layer's.

    >>> _layer_of("blocks.0.weight_scale"), _layer_of("blocks.0")
    ('blocks.0', 'blocks.0')
    """
    suffix = next((suffix for suffix in names.LAYER_SUFFIXES if tensor.endswith(suffix)), "")
    return tensor[: len(tensor) - len(suffix)]


def _input_state(scale: float | None) -> InputState:
    """What an input scale that is used is worth.

    >>> _input_state(None), _input_state(1.0), _input_state(0.02), _input_state(0.0)
    ('missing', 'one', 'calibrated', 'suspicious')
    """
    if scale is None:
        return "missing"
    if scale == 1.0:
        return "one"
    return "calibrated" if LEAST_INPUT_SCALE <= scale <= LARGEST_INPUT_SCALE else "suspicious"


def _config_beside(path: Path) -> str | None:
    """The quantization method that a diffusers config.json in the same folder names."""
    config = path.with_name("config.json")
    try:
        if not config.is_file() or config.stat().st_size > _NO_CONFIG_BEYOND_BYTES:
            return None
        content = parse_json(config.read_bytes())
    except (OSError, JSONError):  # a remark of a neighbour; the checkpoint does not need it
        return None
    quantization = content.get("quantization_config") if isinstance(content, dict) else None
    if not isinstance(quantization, dict):
        return None
    words = (quantization.get(key) for key in ("quant_method", "quant_type", "quant_algo", "fmt"))
    return " ".join(word for word in words if isinstance(word, str)) or "unnamed"


def _made(metadata: Mapping[str, str]) -> Made | None:
    """What this tool wrote about itself, as far as it is well formed: whoever wrote it, it is a remark, not data."""
    try:
        said = parse_json(metadata.get(PROVENANCE_KEY, "null"))
    except JSONError:
        return None
    if not isinstance(said, dict):
        return None
    calibrate = said.get("calibrate")
    calibrate = calibrate if isinstance(calibrate, dict) else {}
    return Made(
        version=_typed(said.get("version"), str),
        converted=isinstance(said.get("convert"), dict),
        engine=_typed(calibrate.get("engine"), str),
        conditioning=_typed(calibrate.get("conditioning"), str),
        samples=_typed(calibrate.get("samples"), int),
        seed=_typed(calibrate.get("seed"), int),
        depends_on_conditioning=_texts(calibrate.get("depends_on_conditioning")),
        lora=_texts(calibrate.get("lora")),
    )


def _typed(value: Any, kind: type[Any]) -> Any:
    """A value, if it is of the kind that it should be."""
    return value if type(value) is kind else None


def _texts(value: Any) -> tuple[str, ...]:
    """The texts in a list."""
    return tuple(text for text in value if isinstance(text, str)) if isinstance(value, list) else ()
