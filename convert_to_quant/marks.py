"""Quantization configs: how a file declares which layers are quantized, one class per convention.

    header   `_quantization_metadata` in the file's header: JSON for all layers
    tensor   `X.comfy_quant` beside `X.weight`: JSON for one layer
    legacy   one `scaled_fp8` tensor for the whole model; scales are named `.scale_weight` and `.scale_input`
    none     scales without any declaration: ComfyUI drops them

If several declare a layer, ComfyUI uses the first of this list. A layer's config is a dict as in a comfy_quant tensor:
`{"format": "float8_e4m3fn", "full_precision_matrix_mult": true}`. No other module knows how these are spelled.

Files are written with a header and tensors that agree, or in the legacy convention. JSON is padded with spaces, so that
a later calibration can set `full_precision_matrix_mult` in place. The padding also leaves a placeholder for an input
scale: the scale can take the end of the comfy_quant tensor, and its header entry the end of the header's padding. The
file holds no input scale until then, because some readers take every existing scale for a measured one.
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
from .untrusted import parse_json

Refuse = Callable[[Literal["header-unreadable", "mark-unreadable"], str, str], Error]
Marking = Literal["header", "tensor", "legacy", "none", "raw", "plain"]
Config = Mapping[str, Any]
Written = dict[str, tuple[Spec, bytes]]

QUANTIZATION_METADATA = "_quantization_metadata"
"""Header entry (JSON) with the quantization configs of all layers."""

FULL_PRECISION = "full_precision_matrix_mult"
_FULL_PRECISION_TEXT = f', "{FULL_PRECISION}": true'
SCALE_BYTES = 4
"""Size of an input scale, which is float32."""

SPARE_BYTES = 8
"""Padding that marks a placeholder for an input scale: more than rounding up to a multiple of 8 leaves by itself."""


def full_precision(config: Config) -> bool:
    """Whether a layer's inputs are never quantized."""
    return bool(config.get(FULL_PRECISION, False))


def with_full_precision(config: Config, wanted: bool) -> Config:
    """A copy of a config with full precision on or off; off is written by leaving the key out."""
    rest = {key: value for key, value in config.items() if key != FULL_PRECISION}
    return {**rest, FULL_PRECISION: True} if wanted else rest


def said_block(config: Config) -> tuple[int, int] | None:
    """The block of weights that share a scale, if the config gives it as one size or two."""
    for key in ("block_size", "group_size"):
        said = config.get(key)
        if isinstance(said, int) and not isinstance(said, bool) and said > 0:
            return said, said
        if isinstance(said, list) and len(said) == 2 and all(isinstance(size, int) and size > 0 for size in said):
            return said[0], said[1]
    return None


def describes(name: str) -> bool:
    """Whether a tensor is a scale or part of a quantization config, and not of the network itself."""
    return name.endswith((*names.SCALES, names.COMFY_QUANT)) or _is_marker(name)


def _is_marker(name: str) -> bool:
    return f".{name}".endswith(f".{names.LEGACY_MARKER}")


def first(checkpoint: Checkpoint, layer: str, suffixes: tuple[str, ...]) -> str | None:
    """The first existing tensor of a layer with one of these suffixes."""
    return next((layer + suffix for suffix in suffixes if layer + suffix in checkpoint), None)


def _room_for_full_precision(text: bytes) -> int:
    """Bytes by which a config's JSON may grow when full precision is set."""
    return 0 if FULL_PRECISION.encode() in text else len(_FULL_PRECISION_TEXT)


def has_scale_room(data: bytes) -> bool:
    """Whether a comfy_quant tensor has a placeholder for an input scale at its end."""
    text = data.rstrip(b" ")
    return len(data) - len(text) - _room_for_full_precision(text) >= SPARE_BYTES


def header_text(configs: Mapping[str, Config]) -> str:
    """The header entry for some layers, padded so that each can get `full_precision_matrix_mult`."""
    text = json.dumps({"format_version": "1.0", "layers": configs})
    missing = sum(FULL_PRECISION not in config for config in configs.values())
    return text + " " * (missing * stored_bytes(_FULL_PRECISION_TEXT))


def leave_scale_room(metadata: dict[str, str], layers: Collection[str]) -> None:
    """Pad the header for the tensor entries of the input scales that some layers may get."""
    far = 10**12
    infos = [TensorInfo(layer + names.INPUT_SCALE, "F32", (), far, far + SCALE_BYTES) for layer in layers]
    if infos:
        metadata[QUANTIZATION_METADATA] += " " * len(serialize_header(infos, {}))


def take_room(metadata: dict[str, str], most_bytes: int) -> None:
    """Remove up to `most_bytes` of padding from the header entry."""
    if text := metadata.get(QUANTIZATION_METADATA):
        metadata[QUANTIZATION_METADATA] = text[: max(len(text.rstrip(" ")), len(text) - most_bytes)]


def mark_beside(checkpoint: Checkpoint, weight: str) -> TensorInfo | None:
    """The comfy_quant tensor of a layer, by the name of its weight."""
    return checkpoint.tensors.get(weight.removesuffix(names.WEIGHT) + names.COMFY_QUANT)


def stored_bytes(text: str) -> int:
    """Size of a text as a string in a header, where its quotation marks are escaped."""
    return len(json.dumps(text, ensure_ascii=False).encode("utf-8")) - len('""')


@dataclass(eq=False)
class Way:
    """A convention for declaring layers, applied to one checkpoint; this base class declares nothing.

    Attributes:
        checkpoint: the open checkpoint.
        prefix: prefix of the diffusion model's tensor names.
        refuse: makes an error from its kind, the tensor or header entry, and the problem.
        kind: name of the convention.
        weight_scale, input_scale: suffixes of scales in files written this way.
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
        """The config of a layer that it declares."""
        return {}

    def beside(self, _layer: str, _config: Config, *, spare_bytes: int = 0) -> Written:  # noqa: ARG002
        """Tensors to write beside a layer's weight, with some more padding where they have any."""
        return {}

    def once(self, _configs: Mapping[str, Config]) -> tuple[Written, dict[str, str]]:
        """Tensors and header entries to write once for all layers."""
        return {}, {}

    def spelled(self, suffix: str) -> str | None:
        """The suffix of a layer's tensor in this convention; None if `beside` writes the tensor, or it is dropped."""
        spelled = {**dict.fromkeys(names.WEIGHT_SCALES, self.weight_scale),
                   **dict.fromkeys(names.INPUT_SCALES, self.input_scale)}  # fmt: skip
        return None if suffix == names.COMFY_QUANT else spelled.get(suffix, suffix)

    def cannot(self, _layer: str, _config: Config, _granularity: str | None) -> str | None:
        """Why it cannot declare a layer with this config and granularity; None if it can."""
        return None


@dataclass(eq=False)
class Header(Way):
    """JSON for all layers in the header; empty until `read`.

    Attributes:
        fields: the whole entry; the keys of its "layers" are as written there.
        configs: the same by the file's layer names; also of layers that the file lacks.
    """

    kind = "header"
    fields: dict[str, Any] = field(default_factory=lambda: {"format_version": "1.0", "layers": {}})
    configs: dict[str, Config] = field(default_factory=dict)

    @property
    def found(self) -> list[str]:
        """The key of the header entry, if it exists."""
        return [key for key in self.checkpoint.metadata if key == QUANTIZATION_METADATA]

    def read(self) -> None:
        """Read the entry; raises an Error if it is not JSON, or its layers are not objects."""
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
        """Whether the entry names a layer without its prefix."""
        return layer in self.configs and layer not in self.fields["layers"]

    def __contains__(self, layer: str) -> bool:
        return layer in self.configs

    def config(self, layer: str) -> Config:
        """See `Way`."""
        return self.configs[layer]

    def once(self, configs: Mapping[str, Config]) -> tuple[Written, dict[str, str]]:
        """The entry. It overrides comfy_quant tensors, so the layers that it had before stay in it."""
        return {}, {QUANTIZATION_METADATA: header_text({**self.fields["layers"], **configs})}

    def changed(self, configs: Mapping[str, Config], more: Mapping[str, Config] | None = None) -> dict[str, str]:
        """The entry with new configs for some of its layers, under the same names and, if it fits, of the same length.

        Args:
            configs: by layer; layers that the entry lacks are skipped.
            more: layers to add.
        """
        layers = {name: configs.get(self._in_file(name), config) for name, config in self.fields["layers"].items()}
        layers.update(more or {})
        if layers == self.fields["layers"]:
            return {}
        text = json.dumps({**self.fields, "layers": layers})
        before = self.checkpoint.metadata.get(QUANTIZATION_METADATA, "")
        room_bytes = stored_bytes(before) - stored_bytes(text)
        return {QUANTIZATION_METADATA: text + " " * room_bytes if room_bytes >= 0 else header_text(layers)}


class Tensor(Way):
    """JSON for one layer in a tensor beside its weight."""

    kind = "tensor"

    @property
    def found(self) -> list[str]:
        """All such tensors."""
        return [name for name in self.checkpoint if name.endswith(names.COMFY_QUANT)]

    def __contains__(self, layer: str) -> bool:
        return layer + names.COMFY_QUANT in self.checkpoint

    def config(self, layer: str) -> Config:
        """The config of a layer; raises an Error if it is not a JSON object."""
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
        """The tensor: padded to `room_bytes` if it fits, else with room for full precision and `spare_bytes`."""
        text = json.dumps(config).encode("utf-8")
        if len(text) > room_bytes:
            room_bytes = len(text) + _room_for_full_precision(text) + spare_bytes
            room_bytes += -room_bytes % 8
        data = text.ljust(room_bytes)
        return {layer + names.COMFY_QUANT: (Spec("U8", (len(data),)), data)}

    def changed(self, layer: str, config: Config) -> Written:
        """A layer's existing tensor with a new config and, if it fits, of the same size."""
        info = self.checkpoint.tensors.get(layer + names.COMFY_QUANT)
        return {} if info is None else self.beside(layer, config, room_bytes=info.nbytes)


class Legacy(Way):
    """One marker tensor for the whole model, which is always in the default format, and older names of scales."""

    kind = "legacy"
    weight_scale = names.WEIGHT_SCALE_LEGACY
    input_scale = names.INPUT_SCALE_LEGACY

    @cached_property
    def markers(self) -> dict[str, TensorInfo]:
        """All markers, by the prefix of the tensor names that each covers."""
        found = {name: info for name, info in self.checkpoint.tensors.items() if _is_marker(name)}
        return {name.removesuffix(names.LEGACY_MARKER): info for name, info in found.items()}

    @property
    def marker(self) -> TensorInfo | None:
        """The marker of the diffusion model, else the first one."""
        return self.markers.get(self.prefix) or next(iter(self.markers.values()), None)

    def marker_of(self, layer: str) -> TensorInfo | None:
        """The marker that covers a layer: the one with the longest prefix of its name."""
        fitting = [prefix for prefix in self.markers if layer.startswith(prefix)]
        return self.markers[max(fitting, key=len)] if fitting else None

    def spells(self, layer: str) -> bool:
        """Whether a layer's weight scale has the legacy name, with or without a marker."""
        return first(self.checkpoint, layer, names.WEIGHT_SCALES) == layer + self.weight_scale

    def __contains__(self, layer: str) -> bool:
        return self.spells(layer) and self.marker_of(layer) is not None

    def config(self, layer: str) -> Config:
        """See `Way`."""
        return with_full_precision(DEFAULT.mark, disables_fp8(self.marker_of(layer)))

    def once(self, configs: Mapping[str, Config]) -> tuple[Written, dict[str, str]]:
        """The marker, if the checkpoint has none yet: of 2 elements if all layers compute in full precision."""
        full = [layer for layer, config in configs.items() if full_precision(config)]
        if 0 < len(full) < len(configs):
            problem = f"{len(full)} of {len(configs)} layers are declared to compute in full precision, but a legacy"
            raise TensorError(f"{problem} file declares all or none", path=self.checkpoint.path, tensor=full[0])
        if self.markers:
            return {}, {}
        elements = 2 if full else 0
        return {self.prefix + names.LEGACY_MARKER: (Spec(DEFAULT.dtypes[0], (elements,)), bytes(elements))}, {}

    def cannot(self, layer: str, config: Config, granularity: str | None) -> str | None:
        """See `Way`."""
        if not layer.startswith(self.prefix):
            return "a legacy file declares the diffusion model only, and this layer is outside it"
        if of_mark(config) is DEFAULT and granularity == "tensor":
            return None
        said = config.get("format")
        return f"a legacy file holds {DEFAULT.marked} with one scale per tensor only, and this is {said}"


class Unmarked(Way):
    """FP8 with one scale per row and no declaration, which diffusers reads since 0.42; it scales inputs per token."""

    def spelled(self, suffix: str) -> str | None:
        """Only the weight is kept: `beside` writes its scale, and input scales are dropped."""
        return suffix if suffix == names.WEIGHT else None

    def beside(self, layer: str, _config: Config, *, spare_bytes: int = 0) -> Written:  # noqa: ARG002
        """The weight scale, one value per row."""
        weight_scale = first(self.checkpoint, layer, names.WEIGHT_SCALES)
        assert weight_scale is not None
        rows = self.checkpoint.tensors[layer + names.WEIGHT].shape[0]
        scale = np.broadcast_to(self.checkpoint.float32(weight_scale).reshape(-1), rows)
        return {layer + self.weight_scale: (Spec("F32", (rows,)), scale.tobytes())}

    def cannot(self, _layer: str, config: Config, granularity: str | None) -> str | None:
        """See `Way`."""
        fmt = of_mark(config)
        if fmt is not None and fmt.grid is DEFAULT.grid and granularity in ("tensor", "row"):
            return None
        said = config.get("format")
        return f"diffusers reads {DEFAULT.marked} with one scale per tensor or row only, and this is {said}"


def disables_fp8(marker: TensorInfo | None) -> bool:
    """Whether a legacy marker makes ComfyUI compute in full precision and ignore input scales."""
    return marker is not None and marker.elements == 2


class Marks:
    """The quantization configs of a checkpoint; its arguments are those of `Way`."""

    def __init__(self, checkpoint: Checkpoint, prefix: str, refuse: Refuse) -> None:
        self.checkpoint = checkpoint
        given = (checkpoint, prefix, refuse)
        self.header, self.tensor, self.legacy, self.none = Header(*given), Tensor(*given), Legacy(*given), Way(*given)
        self.fresh, self.fresh_legacy, self.unmarked = Header(*given), Legacy(*given), Unmarked(*given)
        self.fresh_legacy.markers = {}  # existing markers are dropped where every config is rewritten

    def of(self, layer: str) -> Way:
        """The convention that ComfyUI uses for a layer."""
        return next(way for way in (self.header, self.tensor, self.legacy, self.none) if layer in way)

    def kinds(self, layer: str) -> tuple[Marking, ...]:
        """Where a layer has a config: "header", "tensor", both or neither."""
        return tuple(way.kind for way in (self.header, self.tensor) if layer in way)

    def to_write(self, legacy: bool) -> tuple[Way, ...]:
        """The conventions of an output that keeps the existing configs.

        Raises:
            OptionError: the checkpoint uses the other convention. If a file had both, ComfyUI would drop the scales of
                its legacy layers.
        """
        marked = [*self.tensor.found, *self.header.found]
        if self.legacy.markers and not legacy:
            problem, hint = "is a legacy scaled_fp8 file", "add --legacy"
        elif legacy and marked:
            problem, hint = f"has quantization configs ({marked[0]})", "drop --legacy"
        else:
            return (self.legacy,) if legacy else (self.tensor, self.header)
        raise OptionError(f"the input {problem}, and one file cannot use both conventions", hint=hint)

    @property
    def markers(self) -> set[str]:
        """Names of all legacy markers."""
        return {info.name for info in self.legacy.markers.values()}

    @property
    def other_metadata(self) -> dict[str, str]:
        """The header's metadata without quantization configs."""
        return {key: text for key, text in self.checkpoint.metadata.items() if key not in self.header.found}

    def anew(self, target: str) -> tuple[Way, ...]:
        """The conventions of an output in which every config is rewritten, by a name of `TARGETS`."""
        return {
            "comfy": (self.tensor, self.fresh),
            "header": (self.fresh,),
            "legacy": (self.fresh_legacy,),
            "diffusers": (self.unmarked,),
        }[target]

    def input_scale(self, layer: str) -> str:
        """The name of a layer's input scale, existing or new, in the same convention as its weight scale."""
        new = layer + (self.legacy if self.legacy.spells(layer) else self.none).input_scale
        return first(self.checkpoint, layer, names.INPUT_SCALES) or new

    def disagreement(self, layer: str) -> str | None:
        """How a layer's header and tensor configs contradict each other, if it has both."""
        if layer not in self.header or layer not in self.tensor:
            return None
        try:
            said = self.tensor.config(layer)
        except Error as error:
            return f"the tensor cannot be read: {error.problem}"
        # A missing key for full precision means false.
        header, tensor = ({FULL_PRECISION: False, **config} for config in (self.header.config(layer), said))
        other = next((key for key in sorted({*header, *tensor}) if header.get(key) != tensor.get(key)), None)
        return other and f"{other}: {json.dumps(header.get(other))} and {json.dumps(tensor.get(other))}"
