"""How a file says that its layers are quantized: one object per way of saying it, and nothing else knows spellings.

    header   `_quantization_metadata` in the file's header, JSON about all layers
    tensor   `X.comfy_quant` beside `X.weight`, JSON about one layer
    legacy   one `scaled_fp8` tensor for the whole model; scales are spelled `.scale_weight`, `.scale_input`
    none     scales without any mark: ComfyUI drops them

Where several speak of a layer, ComfyUI heeds the first of this list. What is said of one layer is its config, as in a
comfy_quant tensor: `{"format": "float8_e4m3fn", "full_precision_matrix_mult": true}`.

Files are written with headers and tensors that agree, or in the legacy way. JSON gets spaces behind it, which leave
room for `full_precision_matrix_mult`, so that a later calibration can set that in place. A layer without an input scale
gets room for one as well: the end of its comfy_quant tensor becomes the scale, and the end of the header's entry what
the header says of it. So readers that take every scale that is there for a measured one find none.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, ClassVar, Literal

import numpy as np

from . import names
from .checkpoint import Checkpoint, Spec, TensorInfo
from .checkpoint.header import serialize_header
from .errors import Error, OptionError, TensorError
from .formats import DEFAULT, of_mark
from .untrusted import JSONError, parse_json

Refuse = Callable[[Literal["header-unreadable", "mark-unreadable"], str, str], Error]
Marking = Literal["header", "tensor", "legacy", "none", "raw", "plain"]
Config = Mapping[str, Any]
Written = dict[str, tuple[Spec, bytes]]

FULL_PRECISION = "full_precision_matrix_mult"
_FULL_PRECISION_TEXT = f', "{FULL_PRECISION}": true'
SCALE_BYTES = 4
"""Of an input scale, which is float32."""

SPARE_BYTES = 8
"""Behind what a mark may say, where a scale has room: more than rounding to a multiple of 8 leaves by itself."""


def full_precision(config: Config) -> bool:
    """Whether a layer's inputs are never quantized."""
    return bool(config.get(FULL_PRECISION, False))


def with_full_precision(config: Config, wanted: bool) -> Config:
    """A config that says otherwise the same. Not to speak of full precision says that there is none."""
    rest = {key: value for key, value in config.items() if key != FULL_PRECISION}
    return {**rest, FULL_PRECISION: True} if wanted else rest


def said_block(config: Config) -> tuple[int, int] | None:
    """The block of weights that share a scale, if a config names it, as one size or two."""
    for key in ("block_size", "group_size"):
        said = config.get(key)
        if isinstance(said, int) and not isinstance(said, bool) and said > 0:
            return said, said
        if isinstance(said, list) and len(said) == 2 and all(isinstance(size, int) and size > 0 for size in said):
            return said[0], said[1]
    return None


def describes(name: str) -> bool:
    """Whether a tensor is a scale or a mark, and so no part of the network."""
    return name.endswith((*names.SCALES, names.COMFY_QUANT)) or _is_marker(name)


def _is_marker(name: str) -> bool:
    return f".{name}".endswith(f".{names.LEGACY_MARKER}")


def first(checkpoint: Checkpoint, layer: str, suffixes: tuple[str, ...]) -> str | None:
    """The first of a layer's possible tensors that exists."""
    return next((layer + suffix for suffix in suffixes if layer + suffix in checkpoint), None)


def tensor_bytes(config: Config, room_bytes: int = 0, spare_bytes: int = 0) -> bytes:
    """A config as the bytes of a comfy_quant tensor: JSON, padded with spaces.

    They fill `room_bytes`, if that is enough, and else what any later form needs and `spare_bytes`, rounded up to a
    multiple of 8.
    """
    text = json.dumps(config).encode("utf-8")
    if len(text) > room_bytes:
        room_bytes = len(text) + (0 if FULL_PRECISION in config else len(_FULL_PRECISION_TEXT)) + spare_bytes
        room_bytes += -room_bytes % 8
    return text.ljust(room_bytes)


def has_scale_room(data: bytes) -> bool:
    """Whether an input scale can take the end of a comfy_quant tensor, and no later form of its text needs it."""
    text = data.rstrip(b" ")
    needed_bytes = len(text) + (0 if FULL_PRECISION.encode() in text else len(_FULL_PRECISION_TEXT))
    return len(data) - needed_bytes >= SPARE_BYTES


def header_text(configs: Mapping[str, Config]) -> str:
    """The header entry that marks layers, with room for `full_precision_matrix_mult` in each of them."""
    text = json.dumps({"format_version": "1.0", "layers": configs})
    missing = sum(FULL_PRECISION not in config for config in configs.values())
    return text + " " * (missing * stored_bytes(_FULL_PRECISION_TEXT))


def leave_scale_room(metadata: dict[str, str], layers: Collection[str]) -> None:
    """Leave room in a header, for what it will say of the input scales of layers that have none yet."""
    far = 10**12
    infos = [TensorInfo(layer + names.INPUT_SCALE, "F32", (), far, far + SCALE_BYTES) for layer in layers]
    if infos:
        metadata[names.QUANTIZATION_METADATA] += " " * len(serialize_header(infos, {}))


def take_room(metadata: dict[str, str], most_bytes: int) -> None:
    """Take some of the room that was left in a header."""
    if text := metadata.get(names.QUANTIZATION_METADATA):
        metadata[names.QUANTIZATION_METADATA] = text[: max(len(text.rstrip(" ")), len(text) - most_bytes)]


def mark_beside(checkpoint: Checkpoint, weight: str) -> TensorInfo | None:
    """The comfy_quant tensor of a layer, by the name of its weight."""
    return checkpoint.tensors.get(weight.removesuffix(names.WEIGHT) + names.COMFY_QUANT)


def stored_bytes(text: str) -> int:
    """Bytes that a text takes inside a header, where each of its quotation marks is escaped."""
    return len(json.dumps(text, ensure_ascii=False).encode("utf-8")) - len('""')


@dataclass(eq=False)
class Way:
    """A way of saying what layers are, in one checkpoint; this one says nothing, and the others refine it.

    Attributes:
        checkpoint: the open checkpoint.
        prefix: what stands before the diffusion model's own names.
        refuse: makes an error from its kind, what is wrong, and the tensor or header entry.
        kind: what it is called.
        weight_scale, input_scale: how scales are spelled where a file is written so.
    """

    checkpoint: Checkpoint
    prefix: str
    refuse: Refuse
    kind: ClassVar[Marking] = "none"
    weight_scale: ClassVar[str] = names.WEIGHT_SCALE
    input_scale: ClassVar[str] = names.INPUT_SCALE

    def __contains__(self, layer: str) -> bool:
        return True

    def config(self, _layer: str) -> Config:
        """What is said of one of its layers."""
        return {}

    def beside(self, _layer: str, _config: Config, *, spare_bytes: int = 0) -> Written:  # noqa: ARG002
        """Tensors to write beside a layer's weight, with spare bytes behind what they say where it leaves room."""
        return {}

    def once(self, _configs: Mapping[str, Config]) -> tuple[Written, dict[str, str]]:
        """Tensors and header entries to write once for all layers."""
        return {}, {}

    def spelled(self, suffix: str) -> str | None:
        """What a layer's tensor is called where a file is marked so; None where `beside` makes it, or it goes."""
        spelled = {**dict.fromkeys(names.WEIGHT_SCALES, self.weight_scale),
                   **dict.fromkeys(names.INPUT_SCALES, self.input_scale)}  # fmt: skip
        return None if suffix == names.COMFY_QUANT else spelled.get(suffix, suffix)

    def cannot(self, _layer: str, _config: Config, _granularity: str | None) -> str | None:
        """Why it cannot say what a layer is, whose config and granularity are these; None where it can."""
        return None


@dataclass(eq=False)
class Header(Way):
    """JSON about all layers in the header; `read` it first, else it is silent.

    Attributes:
        fields: all of it; its "layers" are under the names that it uses.
        configs: what it says by the names that the file uses; also of layers that the file lacks.
    """

    kind = "header"
    fields: dict[str, Any] = field(default_factory=lambda: {"format_version": "1.0", "layers": {}})
    configs: dict[str, Config] = field(default_factory=dict)

    @property
    def found(self) -> list[str]:
        """The header entry, where there is one."""
        return [key for key in self.checkpoint.metadata if key == names.QUANTIZATION_METADATA]

    def read(self) -> None:
        """Find out what it says; an Error where it is no JSON, or its layers are no objects."""
        for key in self.found:
            text, unreadable = self.checkpoint.metadata[key], partial(self.refuse, "header-unreadable", key)
            fields = parse_json(text, unreadable)
            layers = fields.get("layers") if isinstance(fields, dict) else None
            if not isinstance(layers, dict) or not all(isinstance(entry, dict) for entry in layers.values()):
                raise unreadable('"layers" should map layer names to objects')
            self.fields, self.configs = fields, {self._in_file(name): config for name, config in layers.items()}

    def _in_file(self, name: str) -> str:
        prefixed = self.prefix + name
        bare = name + names.WEIGHT not in self.checkpoint and prefixed + names.WEIGHT in self.checkpoint
        return prefixed if bare else name

    def bare(self, layer: str) -> bool:
        """Whether it names a layer without the prefix that the layer has in the file."""
        return layer in self.configs and layer not in self.fields["layers"]

    def __contains__(self, layer: str) -> bool:
        return layer in self.configs

    def config(self, layer: str) -> Config:
        """What it says of a layer."""
        return self.configs[layer]

    def once(self, configs: Mapping[str, Config]) -> tuple[Written, dict[str, str]]:
        """The entry. It overrides comfy_quant tensors, so layers that it had before stay in it."""
        return {}, {names.QUANTIZATION_METADATA: header_text({**self.fields["layers"], **configs})}

    def changed(self, configs: Mapping[str, Config], more: Mapping[str, Config] | None = None) -> dict[str, str]:
        """The entry with other configs of some layers, in the names and, where it fits, the length that it had.

        Args:
            configs: of layers; those that it does not name are left out.
            more: of layers that it does not name, and shall.
        """
        layers = {name: configs.get(self._in_file(name), config) for name, config in self.fields["layers"].items()}
        layers.update(more or {})
        if layers == self.fields["layers"]:
            return {}
        text = json.dumps({**self.fields, "layers": layers})
        before = self.checkpoint.metadata.get(names.QUANTIZATION_METADATA, "")
        room_bytes = stored_bytes(before) - stored_bytes(text)
        return {names.QUANTIZATION_METADATA: text + " " * room_bytes if room_bytes >= 0 else header_text(layers)}


class Tensor(Way):
    """JSON about one layer in a tensor beside it."""

    kind = "tensor"

    @property
    def found(self) -> list[str]:
        """All such tensors."""
        return [name for name in self.checkpoint if name.endswith(names.COMFY_QUANT)]

    def __contains__(self, layer: str) -> bool:
        return layer + names.COMFY_QUANT in self.checkpoint

    def config(self, layer: str) -> Config:
        """What it says of a layer; an Error where it is no JSON object."""
        key = layer + names.COMFY_QUANT
        raw = self.checkpoint.raw(key).tobytes()
        unreadable = partial(self.refuse, "mark-unreadable", key)
        if not raw.strip(b"\0"):
            raise unreadable(f"all of its {len(raw)} bytes are 0" if raw else "it is empty")
        config = parse_json(raw, lambda problem: unreadable(f"{problem}, found {raw[:40]!r}"))
        if not isinstance(config, dict):
            raise unreadable(f"should be a JSON object, found {raw[:40]!r}")
        return config

    def beside(self, layer: str, config: Config, *, room_bytes: int = 0, spare_bytes: int = 0) -> Written:
        """The tensor, of `room_bytes` where it fits."""
        data = tensor_bytes(config, room_bytes, spare_bytes)
        return {layer + names.COMFY_QUANT: (Spec("U8", (len(data),)), data)}

    def changed(self, layer: str, config: Config) -> Written:
        """The tensor of a layer, if it has one, with another config and, where it fits, the size that it had."""
        info = self.checkpoint.tensors.get(layer + names.COMFY_QUANT)
        return {} if info is None else self.beside(layer, config, room_bytes=info.nbytes)


class Legacy(Way):
    """One tensor for the whole model, which is always in the default format, and another spelling of scales."""

    kind = "legacy"
    weight_scale = names.WEIGHT_SCALE_LEGACY
    input_scale = names.INPUT_SCALE_LEGACY

    @cached_property
    def markers(self) -> dict[str, TensorInfo]:
        """All such tensors, by the prefix of the names that each is about."""
        found = {name: info for name, info in self.checkpoint.tensors.items() if _is_marker(name)}
        return {name.removesuffix(names.LEGACY_MARKER): info for name, info in found.items()}

    @property
    def marker(self) -> TensorInfo | None:
        """The marker of the diffusion model, or the only one that there is."""
        return self.markers.get(self.prefix) or next(iter(self.markers.values()), None)

    def marker_of(self, layer: str) -> TensorInfo | None:
        """The marker that is about a layer: the one whose prefix is the longest that the layer's name has."""
        fitting = [prefix for prefix in self.markers if layer.startswith(prefix)]
        return self.markers[max(fitting, key=len)] if fitting else None

    def spells(self, layer: str) -> bool:
        """Whether a layer's weight scale is spelled so, with or without a marker."""
        return first(self.checkpoint, layer, names.WEIGHT_SCALES) == layer + self.weight_scale

    def __contains__(self, layer: str) -> bool:
        return self.spells(layer) and self.marker_of(layer) is not None

    def config(self, layer: str) -> Config:
        """What the marker says of each of its layers."""
        return with_full_precision(DEFAULT.mark, disables_fp8(self.marker_of(layer)))

    def once(self, configs: Mapping[str, Config]) -> tuple[Written, dict[str, str]]:
        """The marker, where the checkpoint has none yet: of 2 elements where all layers compute in full precision."""
        full = [layer for layer, config in configs.items() if full_precision(config)]
        if 0 < len(full) < len(configs):
            problem = f"{len(full)} of {len(configs)} layers are marked to compute in full precision, and a legacy"
            raise TensorError(f"{problem} file says it of all or none", path=self.checkpoint.path, tensor=full[0])
        if self.markers:
            return {}, {}
        elements = 2 if full else 0
        return {self.prefix + names.LEGACY_MARKER: (Spec(DEFAULT.dtypes[0], (elements,)), bytes(elements))}, {}

    def cannot(self, layer: str, config: Config, granularity: str | None) -> str | None:
        """Whatever is not in the default format, or not of the diffusion model."""
        if not layer.startswith(self.prefix):
            return "a legacy file marks the diffusion model only, and this layer is outside it"
        if of_mark(config) is DEFAULT and granularity == "tensor":
            return None
        said = config.get("format")
        return f"a legacy file holds {DEFAULT.marked} with one scale per tensor only, and this is {said}"


class Unmarked(Way):
    """FP8 with one scale per row and no mark, as diffusers reads it since 0.42; it scales inputs row by row."""

    def spelled(self, suffix: str) -> str | None:
        """Scales of inputs go, and those of the weight are made anew."""
        return suffix if suffix == names.WEIGHT else None

    def beside(self, layer: str, _config: Config, *, spare_bytes: int = 0) -> Written:  # noqa: ARG002
        """One scale for each row."""
        weight_scale = first(self.checkpoint, layer, names.WEIGHT_SCALES)
        assert weight_scale is not None
        rows = self.checkpoint.tensors[layer + names.WEIGHT].shape[0]
        scale = np.broadcast_to(self.checkpoint.float32(weight_scale).reshape(-1), rows)
        return {layer + self.weight_scale: (Spec("F32", (rows,)), scale.tobytes())}

    def cannot(self, _layer: str, config: Config, granularity: str | None) -> str | None:
        """Whatever has no codes of the default format, or another scale than one per tensor or row."""
        fmt = of_mark(config)
        if fmt is not None and fmt.grid is DEFAULT.grid and granularity in ("tensor", "row"):
            return None
        said = config.get("format")
        return f"diffusers reads {DEFAULT.marked} with one scale per tensor or row only, and this is {said}"


def disables_fp8(marker: TensorInfo | None) -> bool:
    """Whether a legacy marker, if there is one, makes ComfyUI compute in full precision and ignore input scales."""
    return marker is not None and marker.elements == 2


class Marks:
    """All that a checkpoint says of its layers; the arguments are those of `Way`."""

    def __init__(self, checkpoint: Checkpoint, prefix: str, refuse: Refuse) -> None:
        self.checkpoint = checkpoint
        told = (checkpoint, prefix, refuse)
        self.header, self.tensor, self.legacy, self.none = Header(*told), Tensor(*told), Legacy(*told), Way(*told)
        self.fresh, self.fresh_legacy, self.unmarked = Header(*told), Legacy(*told), Unmarked(*told)
        self.fresh_legacy.markers = {}  # where every mark is written anew, whatever marker there is goes

    def of(self, layer: str) -> Way:
        """The way that ComfyUI heeds for a layer."""
        return next(way for way in (self.header, self.tensor, self.legacy, self.none) if layer in way)

    def kinds(self, layer: str) -> tuple[Marking, ...]:
        """What names a layer to mark it: "header", "tensor", both, or nothing."""
        return tuple(way.kind for way in (self.header, self.tensor) if layer in way)

    def to_write(self, legacy: bool) -> tuple[Way, ...]:
        """The ways in which a file is written; an OptionError where the checkpoint is marked otherwise already.

        Of a file that has both, ComfyUI drops the scales of the legacy layers.
        """
        marked = [*self.tensor.found, *self.header.found]
        if self.legacy.markers and not legacy:
            problem, hint = "is a legacy scaled_fp8 file", "add --legacy"
        elif legacy and marked:
            problem, hint = f"marks layers as comfy_quant does ({marked[0]})", "drop --legacy"
        else:
            return (self.legacy,) if legacy else (self.tensor, self.header)
        raise OptionError(f"the input {problem}, and one file cannot hold both spellings", hint=hint)

    @property
    def markers(self) -> set[str]:
        """Names of all legacy markers."""
        return {info.name for info in self.legacy.markers.values()}

    @property
    def other_metadata(self) -> dict[str, str]:
        """The header's metadata that marks nothing."""
        return {key: text for key, text in self.checkpoint.metadata.items() if key not in self.header.found}

    def anew(self, target: str) -> tuple[Way, ...]:
        """The ways of a file in which every mark is written anew, by a name of `TARGETS`."""
        return {
            "comfy": (self.tensor, self.fresh),
            "header": (self.fresh,),
            "legacy": (self.fresh_legacy,),
            "diffusers": (self.unmarked,),
        }[target]

    def input_scale(self, layer: str) -> str:
        """The input scale that a layer has, or that a new one is called, as its weight scale is spelled."""
        new = layer + (self.legacy if self.legacy.spells(layer) else self.none).input_scale
        return first(self.checkpoint, layer, names.INPUT_SCALES) or new

    def disagreement(self, layer: str) -> str | None:
        """How header and tensor contradict each other, where both speak of a layer."""
        if layer not in self.header or layer not in self.tensor:
            return None
        try:
            said = parse_json(self.checkpoint.raw(layer + names.COMFY_QUANT).tobytes())
        except JSONError:
            return "the tensor is not JSON"
        if not isinstance(said, dict):
            return "the tensor is no JSON object"
        # No entry for full precision says the same as false.
        header, tensor = ({FULL_PRECISION: False, **config} for config in (self.header.config(layer), said))
        other = next((key for key in sorted({*header, *tensor}) if header.get(key) != tensor.get(key)), None)
        return other and f"{other}: {json.dumps(header.get(other))} and {json.dumps(tensor.get(other))}"
