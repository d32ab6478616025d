"""Quantized layers: which tensors belong to one, and the real values of its weight.

A quantized linear layer X is a 2-D `X.weight` in codes of a format (`formats`), the format's scales (real = code value
× scale), and optionally `X.input_scale`, `X.bias` and a quantization config that tells readers to use them (`marks`).
FP8 weights without scale and config ("raw") mean their code values; norms and convolutions cast like that are
not layers. Layers in formats that are only recognized (AWQ, SVDQuant) or unknown are "foreign": listed, but left alone.

The block (b_out, b_in) is the weights that share a scale: (out, in) is tensor-wise, (1, in) row-wise, anything else
block-wise. It follows from shapes: a scale (n_out, n_in) fits a weight (out, in) if ceil(out / b_out) = n_out and
ceil(in / b_in) = n_in. If several blocks fit, the file's `group_size` or `block_size` decides, then a square power of
two, then an exact divisor; otherwise it is an error.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor

from . import formats, names
from .checkpoint import ALL_ROWS, Checkpoint, TensorInfo, to_float32
from .errors import CheckpointError, TensorError
from .formats import FLOAT_GRIDS
from .formats.packing import round_up
from .formats.record import FLOAT_SCALES, TORCH_NAMES, Format, Packed, scale_grid
from .formats.rotation import LARGEST_GROUP, is_group, rotate
from .lazy_torch import torch
from .marks import Config, Marking, Marks, describes, first, full_precision, said_block
from .telling import plural

PLAIN_DTYPES = frozenset({"BF16", "F16", "F32", "F64"})


ProblemKind = Literal[
    "header-unreadable",
    "mark-unreadable",
    "mark-format",
    "legacy-e5m2",
    "weight-scale-missing",
    "scale-shape",
    "scale-dtype",
    "scale-value",
    "rotation-group",
]


class LayerError(TensorError):
    """A layer cannot be used as it is declared or scaled."""

    def __init__(self, kind: ProblemKind, problem: str, *, path: Path, tensor: str, hint: str | None = None) -> None:
        self.kind = kind
        super().__init__(problem, path=path, tensor=tensor, hint=hint)


@dataclass(frozen=True)
class Layer:
    """A linear layer.

    Attributes:
        name: in the checkpoint, with prefix, without `.weight`.
        weight: its weight, of shape (out, in).
        format: of the weight; None in high precision.
        marking: convention that declares it quantized, see `marks`; "raw" FP8 and "plain" weights have none.
        block: (b_out, b_in), the weights that share one scale; (out, in) with one scale or none.
        weight_scale, input_scale, bias: names of its other tensors, or None.
        parts: the tensors that make up its weight, by suffix; the weight is the first.
        input_problem: why its input scale cannot be used; calibration replaces it.
        config: its quantization config.
        full_precision: `full_precision_matrix_mult`: its inputs are never quantized.
    """

    name: str
    weight: TensorInfo
    format: Format | None
    marking: Marking
    block: tuple[int, int]
    weight_scale: str | None = None
    input_scale: str | None = None
    bias: str | None = None
    input_problem: LayerError | None = None
    config: Config = field(default_factory=dict)
    full_precision: bool = False
    parts: Mapping[str, TensorInfo] = field(default_factory=dict)

    @cached_property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the unpacked weight."""
        packed = self.format is not None and self.format.shape(self.weight.shape, shapes_of(self.parts))
        return packed or (self.weight.shape[0], self.weight.shape[1])

    @property
    def out_features(self) -> int:
        """Rows of the weight."""
        return self.shape[0]

    @property
    def in_features(self) -> int:
        """Columns of the weight: channels of an input token."""
        return self.shape[1]

    @property
    def group(self) -> int:
        """Size of the groups of input channels that readers rotate; 0 for none."""
        return 0 if self.format is None else self.format.group(self.config)

    @property
    def title(self) -> str:
        """Format for people: "INT8 ConvRot, groups of 256", or the dtype in high precision."""
        if self.format is None:
            return self.weight.dtype
        usual = self.group == LARGEST_GROUP and self.format.sides[1] == LARGEST_GROUP  # the default
        return self.format.title + (f", groups of {self.group}" if self.group and not usual else "")

    @property
    def bits(self) -> float:
        """Bits per weight in the file, scales included."""
        elements = max(math.prod(self.shape), 1)
        return 8 * sum(info.nbytes for info in (self.parts or {names.WEIGHT: self.weight}).values()) / elements

    @property
    def granularity(self) -> Literal["tensor", "row", "block"]:
        """How finely the weight is scaled."""
        if self.block == self.shape:
            return "tensor"
        return "row" if self.block == (1, self.in_features) else "block"

    @property
    def static(self) -> bool:
        """Whether calibration can measure its input_scale; not if readers multiply inputs by factors first."""
        return self.format is not None and self.format.static and names.PRE_QUANT_SCALE not in self.parts

    @property
    def dynamic(self) -> bool:
        """Whether readers compute the scale of this layer's inputs, because there is no input_scale that they use."""
        fmt = self.format
        return fmt is not None and fmt.dynamic and not (fmt.static and self.input_scale is not None)


@dataclass(frozen=True)
class ForeignLayer:
    """A quantized layer in a format that this tool leaves alone: recognized or, where `format` is None, unknown."""

    name: str
    form: str
    weight: TensorInfo
    format: Format | None = None


@dataclass
class LayerTable:
    """The layers of a checkpoint.

    Attributes:
        prefix: of the diffusion model's names.
        marks: the file's quantization configs.
        quantized: layers in codes with a weight scale, in file order.
        raw: FP8 weights without scale and quantization config.
        plain: 2-D weights in high precision.
        foreign: layers in other quantized formats.
        notes: messages for the user.
        problems: errors, if they are collected.
    """

    prefix: str
    marks: Marks
    quantized: dict[str, Layer] = field(default_factory=dict)
    raw: dict[str, Layer] = field(default_factory=dict)
    plain: dict[str, Layer] = field(default_factory=dict)
    foreign: dict[str, ForeignLayer] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    problems: list[CheckpointError] = field(default_factory=list)

    @property
    def diffusion(self) -> dict[str, Layer]:
        """Quantized layers of the diffusion model."""
        return {name: layer for name, layer in self.quantized.items() if self.owns(name)}

    @property
    def static(self) -> dict[str, Layer]:
        """Those of `diffusion` whose input scale calibration can measure."""
        return {name: layer for name, layer in self.diffusion.items() if layer.static}

    def owns(self, name: str) -> bool:
        """Whether a tensor or layer belongs to the diffusion model, not to a text encoder or VAE in the same file."""
        return name.startswith(self.prefix) and (self.prefix != "" or names.other_part(name) is None)

    def linear(self) -> Iterator[Layer]:
        """Every layer that this tool can read, quantized or not."""
        for table in (self.quantized, self.raw, self.plain):
            yield from table.values()

    def shapes(self) -> dict[str, tuple[int, int]]:
        """(out, in) of every layer of `linear`, by name."""
        return {layer.name: layer.shape for layer in self.linear()}

    def tensor_shapes(self, checkpoint: Checkpoint) -> dict[str, tuple[int, ...]]:
        """Shapes of all tensors but scales and quantization configs: (out, in) for weights, also packed ones."""
        weights = {layer + names.WEIGHT: shape for layer, shape in self.shapes().items()}
        return {name: weights.get(name, info.shape) for name, info in checkpoint.tensors.items() if not describes(name)}


def shapes_of(parts: Mapping[str, TensorInfo]) -> dict[str, tuple[int, ...]]:
    """Shapes by suffix."""
    return {suffix: info.shape for suffix, info in parts.items()}


def named(layers: Iterable[Layer]) -> str:
    """Formats of layers, for people: "FP8", or "FP8, INT8 and NVFP4"."""
    titles = ", ".join(dict.fromkeys(layer.format.title for layer in layers if layer.format is not None))
    others, comma, last = titles.rpartition(", ")
    return f"{others} and {last}" if comma else last


def infer_block(
    weight_shape: tuple[int, int], scale_shape: tuple[int, ...], said: tuple[int, int] | None = None
) -> tuple[int, int] | None:
    """The block (b_out, b_in) that a weight scale's shape implies, or that the file declares (`said`), if it fits.

    Scales have shape (), (1,), (1, 1), (out,), (out, 1), (n_out, n_in), or (out, n, 1) for n groups per row.

    Returns:
        None if no block fits, or several do and nothing decides.

    >>> infer_block((256, 128), (4, 2))
    (64, 64)
    >>> infer_block((100, 64), (2, 1))
    (64, 64)
    >>> infer_block((256, 128), (256,))
    (1, 128)
    """
    out_features, in_features = weight_shape
    if math.prod(scale_shape) == 1:
        return weight_shape
    if scale_shape in ((out_features,), (out_features, 1)):
        return 1, in_features
    if len(scale_shape) == 3 and scale_shape[2] == 1:
        scale_shape = scale_shape[:2]
    if len(scale_shape) != 2:
        return None
    if said is not None and scale_grid(weight_shape, said) == scale_shape:
        return said
    square = next((size for size in _POWERS if scale_grid(weight_shape, (size, size)) == scale_shape), None)
    block_out, block_in = (square or _likely_size(*sides) for sides in zip(weight_shape, scale_shape, strict=True))
    return (block_out, block_in) if block_out and block_in else None


_POWERS = [1 << power for power in range(31)]


def _likely_size(size: int, count: int) -> int | None:
    """The block along one dimension if no square fits: an exact divisor, else a power of two."""
    if count and size % count == 0:
        return size // count
    return next((power for power in _POWERS if -(-size // power) == count), None)


def find_layers(checkpoint: Checkpoint, *, collect_problems: bool = False) -> LayerTable:
    """Find the linear layers of a checkpoint and how each is quantized.

    With `collect_problems`, problems are added to the table and their layers left out, instead of raising the first.

    Raises:
        CheckpointError: an unreadable quantization config; a declared layer without weight scale; a weight scale of
            another shape, or with negative or non-finite values. Such input scales are only noted.
    """
    return _Finder(checkpoint, collect_problems).run()


class _Finder:
    """One walk over a checkpoint's names."""

    def __init__(self, checkpoint: Checkpoint, collect_problems: bool) -> None:
        self.checkpoint = checkpoint
        self.collect_problems = collect_problems
        prefix, _ = names.strip_prefix(checkpoint.tensors)
        self.wrappers = names.unread_words(prefix, checkpoint.tensors)
        self.table = LayerTable(prefix, Marks(checkpoint, prefix, self.error))

    def run(self) -> LayerTable:
        table = self.table
        header = table.marks.header
        self.guard(header.read)
        for name, info in self.checkpoint.tensors.items():
            if name.endswith(names.WEIGHT) and info.shape:
                self.guard(partial(self.add, name[: -len(names.WEIGHT)], info))
        for name in (name for name in header.configs if name + names.WEIGHT not in self.checkpoint):
            table.notes.append(f"{name}: declared as quantized in the header, but its weight is missing")
        if self.wrappers:
            words = " and ".join(self.wrappers)
            table.notes.append(f"tensor names contain {words}, which ComfyUI does not recognize: remove it from them")
        if names.FOLDING_KEY in self.checkpoint.metadata:
            table.notes.append(FOLDED)
        unmarked = [layer.name for layer in table.quantized.values() if layer.marking == "none"]
        if unmarked:
            kind = named(table.quantized[name] for name in unmarked)
            table.notes.append(
                f"{plural(len(unmarked), f'{kind} layer')} with scales but without quantization config (first: "
                f"{unmarked[0]}): ComfyUI ignores the scales"
            )
        return table

    def guard(self, step: Callable[[], None]) -> None:
        """Run a step; collect its problem, if asked to."""
        try:
            step()
        except CheckpointError as error:
            if not self.collect_problems:
                raise
            self.table.problems.append(error)

    def error(self, kind: ProblemKind, tensor: str, problem: str, hint: str | None = None) -> LayerError:
        path = self.checkpoint.path_of(tensor) if tensor in self.checkpoint else self.checkpoint.path
        return LayerError(kind, problem, path=path, tensor=tensor, hint=hint)

    def add(self, name: str, weight: TensorInfo) -> None:
        """Sort one weight into the table."""
        weight_scale = first(self.checkpoint, name, names.WEIGHT_SCALES)
        way = self.table.marks.of(name)
        config = way.config(name)
        said = config.get("format")
        if way.kind != "none" and not isinstance(said, str):
            raise self.error("mark-unreadable", name, f"its quantization config names no format: {json.dumps(config)}")
        suffixes = (names.WEIGHT, *names.WEIGHT_PARTS)
        parts = {part: info for part in suffixes if (info := self.checkpoint.tensors.get(name + part))}
        fmt = formats.of_mark(config, shapes_of(parts))
        if said is None:
            fmt = formats.recognize(name, weight.dtype, self.checkpoint.tensors)
        if fmt is None and weight.dtype in PLAIN_DTYPES and said is None:
            if len(weight.shape) == 2:
                self.table.plain[name] = self.complete(Layer(name, weight, None, "plain", (0, 0)))
        elif fmt is not None and fmt.readable:
            parts = {part: info for part, info in parts.items() if part in (names.WEIGHT, *fmt.scales, *fmt.optional)}
            self.add_quantized(Layer(name, weight, fmt, way.kind, (0, 0), weight_scale, config=config, parts=parts))
        elif said is not None or weight_scale is not None:
            form = said or (fmt.marked if fmt else weight.dtype)
            self.table.foreign[name] = ForeignLayer(name, form, weight, fmt)

    def add_quantized(self, layer: Layer) -> None:
        """Sort a weight in codes into the table."""
        fmt, weight = layer.format, layer.weight
        assert fmt is not None
        said = layer.config.get("format")
        if weight.dtype not in fmt.dtypes:
            if layer.marking == "legacy" and weight.dtype in FLOAT_GRIDS:
                found = FLOAT_GRIDS[weight.dtype].name
                problem = f"legacy scaled_fp8 files are always read as {fmt.marked}, but this is {found}"
                raise self.error("legacy-e5m2", weight.name, problem, "convert the original again")
            raise self.error("mark-format", weight.name, f"declared as {said}, but stored as {weight.dtype}")
        first_scale = fmt.scales[0]
        missing = [suffix for suffix in fmt.scales if suffix not in layer.parts]
        if not isinstance(fmt, Packed) and layer.weight_scale is not None:  # under any of its names
            missing = [suffix for suffix in missing if suffix != first_scale]
        if said is not None and missing:
            problem = f"declared as {said}, but {missing[0]} is missing"
            raise self.error("weight-scale-missing", layer.name, problem, "convert it again")
        if len(weight.shape) != 2:
            if layer.weight_scale is None:
                return  # a norm or convolution that was cast
            form = f"{fmt.marked}, {len(weight.shape)}-dimensional"
            self.table.foreign[layer.name] = ForeignLayer(layer.name, form, weight)
        elif isinstance(fmt, Packed):
            self.table.quantized[layer.name] = self.complete_packed(layer, fmt)
        elif layer.weight_scale is None:
            self.table.raw[layer.name] = self.complete(replace(layer, marking="raw"))
        else:
            self.table.quantized[layer.name] = self.complete(layer)

    def complete(self, layer: Layer) -> Layer:
        """Complete a layer from shapes and its other tensors, and check its scales."""
        shape = layer.shape
        block = shape
        if layer.weight_scale is not None:
            info = self.checkpoint.tensors[layer.weight_scale]
            inferred = infer_block(shape, info.shape, said_block(layer.config))
            if inferred is None:
                problem = f"a weight scale of shape {list(info.shape)} does not fit a weight of shape {list(shape)}"
                expected = "expected one value, one per row, or one per block"
                raise self.error("scale-shape", layer.weight_scale, f"{problem}; {expected}")
            block = inferred
            self.check_scale(layer.weight_scale)
        return self.with_input(replace(layer, block=block))

    def complete_packed(self, layer: Layer, fmt: Packed) -> Layer:
        """The same for a packed format, whose parts have one shape each."""
        if fmt.shape(layer.weight.shape, shapes_of(layer.parts)) is None:
            shapes = ", ".join(f"{suffix} {list(info.shape)}" for suffix, info in layer.parts.items())
            raise self.error("scale-shape", layer.name, f"these shapes do not fit a {fmt.title} layer: {shapes}")
        for suffix, (dtype, shape) in fmt.storage(layer.shape, 0).items():
            info = layer.parts.get(suffix)
            if info is None or suffix == names.WEIGHT:
                continue  # optional
            flat = (shape[0],) if shape[1:] == (1,) else shape  # which readers accept, too
            single = math.prod(info.shape) == math.prod(shape) == 1
            if info.shape not in (shape, flat) and not single:
                problem = f"for a {fmt.title} weight of shape {list(layer.shape)}, expected shape {list(shape)}"
                raise self.error("scale-shape", info.name, f"{problem}, found {list(info.shape)}")
            if suffix == names.CODEBOOK:
                self.check_scale(info.name, signed=True)
            elif dtype == "F32":
                self.check_scale(info.name)
            elif info.dtype not in fmt.scale_dtypes:
                raise self.error("scale-dtype", info.name, f"expected {dtype}, found {info.dtype}")
        factors = layer.parts.get(names.PRE_QUANT_SCALE)
        if factors is not None:
            if factors.shape != (layer.in_features,):
                problem = f"expected one value for each of {layer.in_features} inputs"
                raise self.error("scale-shape", factors.name, f"{problem}, found shape {list(factors.shape)}")
            self.check_scale(factors.name)
        group = fmt.group(layer.config)
        if group and not is_group(group, layer.in_features):
            problem = f"inputs cannot be rotated in groups of {group}: expected a power of 4 that divides"
            raise self.error("rotation-group", layer.name, f"{problem} {layer.in_features}")
        weight_scale = layer.name + fmt.scales[0]
        return self.with_input(replace(layer, block=fmt.block(layer.shape, 0), weight_scale=weight_scale))

    def with_input(self, layer: Layer) -> Layer:
        """Add its input scale, its bias, and its config's setting for inputs."""
        input_scale = first(self.checkpoint, layer.name, names.INPUT_SCALES) if layer.format is not None else None
        input_problem = None
        if input_scale is not None:
            info = self.checkpoint.tensors[input_scale]
            try:
                if info.elements != 1:
                    problem = f"expected one value, found shape {list(info.shape)}"
                    raise self.error("scale-shape", input_scale, problem)
                self.check_scale(input_scale)
            except LayerError as error:  # the weight does not need it
                input_problem = error
                self.table.notes.append(f"{input_scale}: {error.problem}: unusable until a calibration replaces it")
        return replace(
            layer,
            input_scale=input_scale,
            input_problem=input_problem,
            bias=first(self.checkpoint, layer.name, (names.BIAS,)),
            full_precision=full_precision(layer.config),
        )

    def check_scale(self, key: str, *, signed: bool = False) -> None:
        info = self.checkpoint.tensors[key]
        if info.dtype not in FLOAT_SCALES:
            raise self.error("scale-dtype", key, f"a scale should be float32, found {info.dtype}")
        scales = self.checkpoint.float32(key)
        good = np.isfinite(scales) & (signed | (scales >= 0))
        if not good.all():
            wanted = "finite" if signed else "finite and not negative"
            raise self.error("scale-value", key, f"scales should be {wanted}, found {scales[~good].flat[0]}")


def possible(checkpoint: Checkpoint, name: str, said: Config) -> list[Layer]:
    """A layer in each format that its tensors fit, with the config that would declare it.

    `said` is a quantization config that names no known format, but perhaps "convrot" and the like.
    """
    weight = checkpoint.tensors[name + names.WEIGHT]
    weight_scale = first(checkpoint, name, names.WEIGHT_SCALES)
    parts = {part: info for part in names.WEIGHT_PARTS if (info := checkpoint.tensors.get(name + part))}
    there = {*parts, *([names.WEIGHT_SCALE] if weight_scale else [])}
    parts[names.WEIGHT] = weight
    finder = _Finder(checkpoint, collect_problems=False)
    found = []
    for fmt in formats.FORMATS.values():
        needed = parts.keys() if isinstance(fmt, Packed) else there  # whose parts have one name each
        complete = set(fmt.scales) <= needed and there <= {*fmt.scales, *fmt.optional}
        shape = fmt.shape(weight.shape, shapes_of(parts)) if complete and weight.dtype in fmt.dtypes else None
        if not fmt.readable or shape is None or (isinstance(fmt, Packed) and not fmt.takes(shape)):
            continue
        config = {**fmt.config(shape, 0), **{key: value for key, value in said.items() if key != "format"}}
        layer = Layer(name, weight, fmt, "none", shape, weight_scale, config=config, parts=parts)
        with contextlib.suppress(LayerError):
            if isinstance(fmt, Packed):
                found.append(finder.complete_packed(layer, fmt))
                continue
            layer = finder.complete(replace(layer, config=said))
            flat = len(checkpoint.tensors[weight_scale or ""].shape) < 3
            if flat and layer.granularity == (fmt.granularity or ("" if fmt.dynamic else "tensor")):
                found.append(replace(layer, config={**config, **fmt.config(shape, layer.block[0])}))
    hinted = [layer for layer in found if any(said.get(key) == value for key, value in _marked(layer).items())]
    return hinted or found


def _marked(layer: Layer) -> Config:
    """Entries of the format's quantization config besides its name."""
    return {key: value for key, value in (layer.format.mark if layer.format else {}).items() if key != "format"}


def determined(checkpoint: Checkpoint, name: str, said: Config | None = None) -> Layer:
    """A layer in the only format that its tensors fit, with the config that would declare it.

    `said` is its quantization config, if that names no known format.

    Raises:
        TensorError: its tensors fit several formats, or none.
    """
    found = possible(checkpoint, name, said or {})
    titles = [layer.format.title for layer in found if layer.format is not None]
    if said is None and any(layer.input_scale and names.WEIGHT_SCALE_2 in layer.parts for layer in found):
        titles.append("NVFP4 in the order of codes that diffusers reads")
    if len(titles) == 1:
        return found[0]
    problem = f"fit several formats: {', '.join(titles)}" if titles else "fit no supported format"
    raise TensorError(
        f"no quantization config names its format, and its tensors {problem}",
        path=checkpoint.path_of(name + names.WEIGHT),
        tensor=name,
        hint="use a file with quantization configs, or convert the original",
    )


def scales_per_row(scale: NDArray[np.float32], layer: Layer, rows: slice) -> NDArray[np.float32]:
    """A layer's weight scale, float32 in the file's shape, expanded to broadcast against contiguous rows of the weight.

    Returns:
        float32 [rows, 1] if a row has one scale, else [rows, in].
    """
    start, stop, _ = rows.indices(layer.out_features)
    block_out, block_in = layer.block
    grid = scale.reshape(scale_grid(layer.shape, layer.block))
    per_row: NDArray[np.float32] = grid[np.arange(start, stop) // block_out]
    if per_row.shape[1] > 1:
        per_row = np.repeat(per_row, block_in, axis=1)[:, : layer.in_features]
    return per_row


FOLDED = (
    "its channels are equalized: LoRAs and statistics of the original do not fit it (adapt a LoRA with "
    "convert_to_quant lora fold)"
)
"""A note for users of checkpoints with equalized channels."""


def dequantize(checkpoint: Checkpoint, layer: Layer, rows: slice = ALL_ROWS) -> NDArray[np.float32]:
    """Real weights in contiguous rows of a layer: code values × scale, or the stored values in high precision.

    Returns:
        A new array, float32 [rows, in].

    Raises:
        TensorError: the weight is not a float tensor.
    """
    if isinstance(layer.format, Packed):
        start, stop, _ = rows.indices(layer.out_features)
        tiles = whole_tiles(layer, start, stop)
        weight = dense(layer, read_parts(checkpoint, layer, tiles))
        return np.array(weight[start - tiles.start : stop - tiles.start].numpy())
    bits = checkpoint.bits(layer.weight.name, rows)
    weight_OI = to_float32(bits, layer.weight.dtype) if layer.format is None else layer.format.codes.decode(bits)
    if layer.weight_scale is not None and weight_OI.size:
        with np.errstate(over="ignore"):  # non-finite weights are reported where they are used
            weight_OI *= scales_per_row(checkpoint.float32(layer.weight_scale), layer, rows)
    return weight_OI


def whole_tiles(layer: Layer, start: int, stop: int) -> slice:
    """Rows of a packed weight, extended to whole tiles of scales."""
    return slice(start - start % Packed.ROWS, min(round_up(stop, Packed.ROWS), layer.out_features))


def read_parts(checkpoint: Checkpoint, layer: Layer, rows: slice = ALL_ROWS) -> dict[str, Tensor]:
    """Copies of the stored tensors of a quantized layer by suffix, on the CPU; of tensors with rows, only `rows`.

    In a packed format these are contiguous `whole_tiles`.
    """
    start, stop, _ = rows.indices(layer.out_features)
    parts = {}
    for suffix, info in layer.parts.items():
        span, shape = (0, info.nbytes), info.shape
        if suffix not in names.WHOLE_WEIGHT and (start, stop) != (0, layer.out_features) and math.prod(shape) > 1:
            # Tiles are padded.
            last = stop if shape[0] == layer.out_features else min(round_up(stop, Packed.ROWS), shape[0])
            row_bytes = info.nbytes // shape[0]
            span, shape = (start * row_bytes, last * row_bytes), (last - start, *shape[1:])
        dtype = getattr(torch, TORCH_NAMES[info.dtype])
        parts[suffix] = torch.from_numpy(checkpoint.raw(info.name, *span)).view(dtype).reshape(shape)
    return parts


def dense(layer: Layer, parts: Mapping[str, Tensor]) -> Tensor:
    """Real weights, float32 [rows, in], of a packed layer from `read_parts`, on any device."""
    assert layer.format is not None
    levels, scale = layer.format.decode(parts, layer.config)
    weight_OI: Tensor = rotate(levels.float() * scale, layer.group)
    factors = parts.get(names.PRE_QUANT_SCALE)
    return weight_OI if factors is None else weight_OI * factors.float()


def input_scale(checkpoint: Checkpoint, layer: Layer) -> float:
    """The scale of a layer's input; 1.0 if the file has none, as in ComfyUI.

    Raises:
        LayerError: its dtype, shape or value is invalid.
    """
    if layer.input_scale is None:
        return 1.0
    if layer.input_problem is not None:
        raise layer.input_problem
    return float(checkpoint.float32(layer.input_scale).reshape(()))
