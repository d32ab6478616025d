"""Every option of showing, calibrating, solving and converting, declared once: type, default, words and range.

The command line, `--config` (through the command line's parsers) and ComfyUI's nodes are made of the same fields, and
whoever makes the dataclasses in Python gets the same checks. `--help` comes through here, so numpy is not loaded.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections.abc import Mapping
from threading import Lock
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, TypeVar, get_args

from . import names
from .errors import OptionError

if TYPE_CHECKING:
    from .formats.record import Format

SAMPLES, STEPS = 16, 4
"""What a model is shown by default: images, and noise levels on the way of each from noise to image. A sample is one
image, an evaluation one call of the network: `STEPS` per sample. Outliers of few tokens differ between images more than
between levels: of 64 evaluations 8 images missed up to nine tenths of a range that 16 images saw (docs/experiments.md).
"""

SIDE_PIXELS, FRAMES, TEXT_TOKENS = 256, 1, 64
"""Default size of an image or video, and length of its text."""

CPU_STEPS, CPU_SIDE_PIXELS, CPU_TEXT_TOKENS = 2, 128, 32
"""What a CPU shows a large model by default: ranges hardly move with either (docs/experiments.md), and it is a seventh
of the work.
"""

CPU_LARGE_WEIGHTS = 10**8
"""Weights from which a model is large in that sense: a third of one double block of Flux.1."""

COMFYUI_VARIABLE = "COMFYUI_DIR"
"""Environment variable that names a ComfyUI's folder where no flag does."""

DEFAULT_FORMAT = "fp8"  # `formats.DEFAULT`, spelled out so that help needs no numpy
DEFAULT_ROWS = 64
"""Tokens of input that each guessed layer is shown."""

Engine = Literal["auto", "model", "layer"]
"""What finds the ranges. "auto" is "model": the one that measures; it never guesses by itself."""
Method = Literal["absmax", "percentile"]
"""Keys of `solve.METHODS`."""
ScalingMode = Literal["tensor", "row", "block"]
WeightScale = Literal["absmax", "mse"]

_DEVICE = re.compile(r"(cpu|cuda|xpu)(:\d+)?|auto")
DEVICES = "cpu, cuda, cuda:0 or xpu"


class Range(NamedTuple):
    """The numbers that an option takes, and how it is said that one is not among them."""

    rule: str
    kind: type
    least: float
    most: float = sys.float_info.max
    hint: str = ""


BLOCK = Range("--block_size should be at least 1 and below 65536", int, 1, 65535)
BITS = Range("--bits should be between 3 and 16", float, 3, 16)
SPEED = Range("--speed should be above 0", float, math.ulp(0.0))
COUNT = Range("{name} should be at least 1", int, 1)
MARGIN = Range("a margin should be at least 1", float, 1, hint="below 1 clips what was seen")
PERCENTILE = Range("a percentile should be above 0 and at most 100", float, math.ulp(0.0), 100)
SEED = Range("a seed should not be negative", int, 0)
SHARE = Range("--{flag} should be a share between 0 and 1", float, 0, 1)


class Option(NamedTuple):
    """A field of options, and how the command line offers it.

    Attributes:
        default: None where something else decides; then `words` say what.
        words: its help, to which a default is added; without any it is not offered.
        metavar: what stands for its value.
        within: the numbers that it takes, or the words.
        flag: where it is not the field's name; of a switch that turns something off, "no-" and the name.
    """

    default: Any
    words: str = ""
    metavar: str | None = None
    within: Range | tuple[str, ...] | None = None
    flag: str = ""


option: Any = Option
"""An `Option` for the value of a field, whatever the field's type."""

if TYPE_CHECKING or "dataclasses" in sys.modules:
    from dataclasses import dataclass
else:  # importing it and making five of them takes a third of the time of `--help`, which needs none

    def dataclass(**_: bool):
        """Leave it to `Options.__new__`."""
        return lambda kind: kind


_COMPLETING = Lock()


class Options:
    """Frozen dataclasses that are checked when they are made: choices, ranges, regular expressions.

    A class becomes a dataclass when the first of its objects is made, if not before.
    """

    declared: ClassVar[dict[str, Option]] = {}

    def __init_subclass__(cls) -> None:
        cls.declared = dict(cls.declared)
        for name, one in list(vars(cls).items()):
            if isinstance(one, Option):
                cls.declared[name] = one._replace(flag=one.flag or name.replace("_", "-"))
                setattr(cls, name, one.default)

    def __new__(cls, *_: Any, **__: Any) -> Any:
        """An object that is not checked yet."""
        from dataclasses import dataclass

        with _COMPLETING:
            for kind in reversed(cls.__mro__[:-1]):
                if "__dataclass_fields__" not in vars(kind):
                    dataclass(frozen=True)(kind)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        for field, one in self.declared.items():
            value, name = getattr(self, field), field.replace("_", " ")
            if isinstance(one.within, Range):
                if value is not None and not one.within.least <= value <= one.within.most:
                    rule = one.within.rule.format(name=name, flag=one.flag)
                    raise OptionError(f"{rule}, found {value}", hint=one.within.hint)
            elif one.within is not None and value not in one.within:
                raise OptionError(f"unknown {name} {value!r}", hint=f"{name}s: {', '.join(one.within)}")
            if isinstance(value, tuple):
                names.check_patterns("--" + one.flag, value)


@dataclass(frozen=True)
class ShownOptions(Options):
    """What a model is shown, and where it runs.

    Attributes:
        samples: images that the model is shown; `SAMPLES` where None.
        height, width, frames, text_tokens: of the images, in pixels, or videos. Where all are None, the default
            geometry of `engines.diffusers`; those that are None beside others, the defaults above.
        steps: noise levels of each image; `STEPS` where None.
        device: where the model runs; "auto" is a GPU where there is one.
    """

    samples: int | None = option(None, f"number of images ({SAMPLES}, or one per prompt)", "N", COUNT)
    steps: int | None = option(None, f"noise levels per image ({STEPS})", "N", COUNT)
    height: int | None = option(None, f"image height ({SIDE_PIXELS})", "PIXELS", COUNT)
    width: int | None = option(None, f"image width ({SIDE_PIXELS})", "PIXELS", COUNT)
    frames: int | None = option(None, f"frames of a video ({FRAMES})", "N", COUNT)
    text_tokens: int | None = option(None, f"length of a prompt ({TEXT_TOKENS})", "N", COUNT)
    device: str = option("auto", "cpu, cuda, cuda:1, ...; a GPU first", "DEVICE")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_device_name(self.device)

    @property
    def size(self) -> tuple[int | None, ...]:
        """As `engines.sizes.geometry` takes it."""
        return self.height, self.width, self.frames, self.text_tokens


@dataclass(frozen=True)
class RunOptions(ShownOptions):
    """What a model is shown that is run to be observed or compared.

    Attributes:
        seed: of all noise.
    """

    seed: int = option(42, "random seed", "S", SEED)


@dataclass(frozen=True)
class CalibrationOptions(ShownOptions):
    """How to calibrate.

    Attributes:
        samples: images that the model is shown; tokens of input for a guess. Where None, `SAMPLES` and `DEFAULT_ROWS`.
        margin: factor ≥ 1 on ranges; where None, headroom that costs nothing for what was seen, and 8 for what was
            simulated.
        engine: "model" (or "auto") runs the network; "layer" guesses each layer's range from its weight.
        percentile: of simulated magnitudes; 99.9 where None. Real ranges are never cut.
        seed: of all noise.
        float16_safe: no scale below 2⁻¹⁵.
        one_row_full_precision: whether layers that see one token per image compute in full precision.
        steps, height, width, frames, text_tokens, device: see `ShownOptions`.
    """

    samples: int | None = option(
        None, f"number of images ({SAMPLES}), or tokens per guess ({DEFAULT_ROWS})", "N", COUNT
    )
    margin: float | None = option(None, "headroom factor on ranges (automatic)", "M", MARGIN)
    engine: Engine = option("auto", "model: run it; layer: guess from weights", "ENGINE", get_args(Engine))
    percentile: float | None = option(None, "percentile of guessed magnitudes (99.9)", "P", PERCENTILE)
    seed: int = option(42, "random seed", "S", SEED)
    float16_safe: bool = option(False, "no scale below 2⁻¹⁵")
    one_row_full_precision: bool = option(True)


@dataclass(frozen=True)
class SolveOptions(Options):
    """How scales are chosen.

    Attributes:
        method: see the docstring of `solve`.
        percentile: for the method of that name, in (0, 100].
        margin: factor ≥ 1 on the range before it becomes a scale. None for headroom that costs nothing, by "absmax",
            and for 1 by the other methods.
        full_precision_budget: share of all multiply-adds that may move to full precision for quality.
        row_loss_limit: largest share of lost tokens that a layer may have in FP8.
        keep: regular expressions; layers in which one is found keep their scale and precision.
        float16_safe: raise scales to 2⁻¹⁵.
        one_row_full_precision: whether layers that see one token per image compute in full precision.
    """

    method: Method = option("absmax", "absmax or percentile", "METHOD", get_args(Method))
    percentile: float = option(99.9, "percentile for that method", "P", PERCENTILE)
    margin: float | None = option(None, "headroom factor on ranges (automatic)", "M", MARGIN)
    full_precision_budget: float = option(0.0, "multiply-adds allowed in full precision", "SHARE", SHARE)
    row_loss_limit: float = option(0.01, "full precision where more tokens vanish", "SHARE", SHARE)
    keep: tuple[str, ...] = option((), "leave matching layers unchanged; repeatable", "REGEX")
    float16_safe: bool = option(False, "no scale below 2⁻¹⁵")
    one_row_full_precision: bool = option(True)

    @property
    def finds_headroom(self) -> bool:
        """Whether each layer's margin is found from its channels and its weight (`headroom`)."""
        return self.margin is None and self.method == "absmax"


@dataclass(frozen=True)
class ConvertOptions(Options):
    """How to convert.

    Attributes:
        format: one of `formats.WRITTEN`.
        layer_format: "REGEX=NAME"; layers in whose names the expression is found become NAME, the first that fits.
        preset: family whose table of kept layers is used; detected where None.
        exclude: regular expressions; layers in which one is found stay in high precision.
        scaling_mode: one scale per tensor, row or block, for "fp8".
        block_size: side of the square blocks.
        weight_scale: how scales are chosen.
        round: round weights for what layers receive while the model runs on noise (`rounding`).
        requantize: round layers anew that are quantized in another format.
        input_scale: leave room for input scales, so that calibration can set them in place; legacy files get 1.0.
        legacy: write the older `scaled_fp8` layout instead of comfy_quant.
    """

    format: str = option(DEFAULT_FORMAT, "number format; a wrong name lists them", "NAME")
    layer_format: tuple[str, ...] = option((), "format of matching layers; repeatable", "REGEX=NAME")
    preset: str | None = option(None, "model family whose rules apply (detected)", "FAMILY")
    exclude: tuple[str, ...] = option((), "do not quantize matching layers; repeatable", "REGEX", flag="exclude-layers")
    scaling_mode: ScalingMode = option("tensor", "fp8 scales per tensor, row or block", "MODE", get_args(ScalingMode))
    block_size: int = option(64, "side of a block in mode block", "N", BLOCK)
    weight_scale: WeightScale = option("absmax", "absmax, or mse for least error", "METHOD", get_args(WeightScale))
    round: bool = option(False, "round weights by running the model")
    requantize: bool = option(False, "round quantized layers anew, too")
    input_scale: bool = option(True, "leave no room for input scales", flag="no-input-scale")
    legacy: bool = option(False)

    def __post_init__(self) -> None:
        super().__post_init__()
        from .formats import WRITTEN

        for name in (self.format, *(name for _, name in self.layer_formats)):
            if name not in WRITTEN:
                raise OptionError(f"no format {name!r} that can be written", hint=f"one of {', '.join(WRITTEN)}")
        if self.scaling_mode != "tensor" and self.format != DEFAULT_FORMAT:
            raise OptionError(f"--scaling_mode is for {DEFAULT_FORMAT}, and {self.format} says how it is scaled")
        if self.round and self.weight_scale != "absmax":
            raise OptionError("--round finds scales itself; leave --weight-scale out")
        if self.legacy and self.scaling_mode != "tensor":
            raise OptionError(f"legacy files know one scale per tensor only, not --scaling_mode {self.scaling_mode}")
        if self.legacy and (self.format != DEFAULT_FORMAT or self.layer_format):
            raise OptionError(f"legacy files hold {DEFAULT_FORMAT} only, in all layers")

    @property
    def layer_formats(self) -> list[tuple[str, str]]:
        """The pairs of `layer_format`."""
        pairs = [text.rpartition("=") for text in self.layer_format]
        if not all(pattern and name for pattern, _, name in pairs):
            raise OptionError("--layer-format takes REGEX=NAME", hint="for example '.*mlp.*=int8-convrot'")
        return [(pattern, name) for pattern, _, name in pairs]

    def record_of(self, layer: str) -> Format:
        """The format that is asked for a layer."""
        from .formats import FORMATS

        names = (name for pattern, name in self.layer_formats if re.search(pattern, layer))
        name = next(names, None)
        return self.record if name is None else FORMATS[name]

    @property
    def record(self) -> Format:
        """The format."""
        from .formats import FORMATS

        return FORMATS[self.format if self.scaling_mode == "tensor" else f"{self.format}-{self.scaling_mode}"]


@dataclass(frozen=True)
class BestOptions(Options):
    """How the best file of a size is found.

    Attributes:
        bits: per weight of the layers that can be quantized, as `choose.Mixes` counts them; 8 where neither it nor
            `file_size` is given.
        file_size: of the whole file, "8GB"; 1 GB is 10⁹ bytes.
        gpu: a key of `formats.record.GPUS`.
        speed: of the layers' products on that card, against 16 bits.
        only: keys of `formats.FORMATS` to choose from, with commas; those of `choose.CANDIDATES` where None.
    """

    bits: float | None = option(None, "per quantized weight (8)", "N", BITS)
    file_size: str | None = option(None, "of the file: 8GB, 700MB", "SIZE", flag="size")
    gpu: str = option("any", "fast on: any, rtx20..50, h100, l40s, mi300, rdna3..4", "NAME")
    speed: float | None = option(None, "at least so many times as fast as 16 bits", "N", SPEED)
    only: str | None = option(None, "to choose from, with commas (all of the card)", "NAMES", flag="formats")

    def __post_init__(self) -> None:
        super().__post_init__()
        from .formats import FORMATS
        from .formats.record import GPUS

        if self.gpu not in GPUS:
            raise OptionError(f"unknown card {self.gpu!r}", hint=f"one of {', '.join(GPUS)}")
        unknown = [name for name in self.formats if name not in FORMATS]
        if unknown:
            raise OptionError(f"unknown format {unknown[0]!r}", hint=f"one of {', '.join(FORMATS)}")
        if self.bits is not None and self.file_size is not None:
            raise OptionError("--bits and --size both limit the file; give one")
        self.size_bytes  # noqa: B018  # refuses what it cannot read

    @property
    def formats(self) -> tuple[str, ...]:
        """What may be chosen; everything where empty."""
        return tuple(name.strip() for name in self.only.split(",")) if self.only else ()

    @property
    def bits_wanted(self) -> float:
        """Bits per weight, where no size is given."""
        return 8.0 if self.bits is None else self.bits

    @property
    def size_bytes(self) -> int | None:
        """`file_size` in bytes."""
        if self.file_size is None:
            return None
        found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) ?([kMG]?)B", self.file_size.strip())
        if found is None:
            raise OptionError(f"--size {self.file_size!r} is no size", hint="for example 8GB or 700MB")
        return int(float(found[1]) * {"": 1, "k": 10**3, "M": 10**6, "G": 10**9}[found[2]])


def check_device_name(name: str) -> None:
    """Refuse what names no device that is offered, whether it is there or not; torch is not loaded.

    Raises:
        OptionError: it does not.
    """
    if name.partition(":")[0] == "mps":
        raise OptionError(
            f"device {name!r} cannot be used: it has no float64, in which statistics are kept", hint=DEVICES
        )
    if not _DEVICE.fullmatch(name):
        raise OptionError(f"unknown device {name!r}", hint=DEVICES)


Kind = TypeVar("Kind", bound=Options)


def offered(kind: type[Options]) -> dict[str, Option]:
    """The options that a command line offers, by their names in the parsed one."""
    return {one.flag.replace("-", "_"): one for one in kind.declared.values() if one.words}


def add_options(group: Any, kind: type[Options], prefix: str = "", **defaults: Any) -> None:
    """Offer options on a command line.

    Args:
        group: of a parser.
        kind: whose fields.
        prefix: before each name that takes a value, "actcal-" or nothing.
        defaults: that differ from the fields'.
    """
    for destination, one in offered(kind).items():
        default, words = defaults.get(destination, one.default), one.words
        if one.default is None and default is not None:
            words = words.rpartition(" (")[0]  # which says what None stands for
        if isinstance(default, bool):
            group.add_argument(f"--{one.flag}", dest=destination, action="store_true", help=words)
            continue
        settings: dict[str, Any] = {"metavar": one.metavar, "dest": destination, "default": default}
        if isinstance(default, tuple):
            settings |= {"action": "append", "default": list(default)}
        elif isinstance(one.within, Range):
            settings["type"] = one.within.kind
        else:
            settings["choices"] = one.within
        if default not in (None, ()):
            words += f" ({default})" if isinstance(default, str) else f" ({default:g})"
        flag = f"--{prefix}{one.flag}"
        if one.flag == "device" and prefix:  # converting runs there, too
            group.add_argument(flag, **(settings | {"default": argparse.SUPPRESS, "help": argparse.SUPPRESS}))
            flag = "--device"
        group.add_argument(flag, help=words, **settings)


def flags_of(options: Options) -> list[str]:
    """The words of a command line that say how options differ from the defaults.

    >>> flags_of(SolveOptions(margin=2.0, keep=("img", "txt"), float16_safe=True))
    ['--margin', '2', '--keep', 'img', '--keep', 'txt', '--float16-safe']
    """
    words = []
    for name, one in offered(type(options)).items():
        value = getattr(options, name)
        for each in value if isinstance(value, tuple) else (value,):
            if value != one.default:
                words.append(f"--{one.flag}")
                words += [] if value is True else [f"{each:g}" if isinstance(each, float) else str(each)]
    return words


def options_of(kind: type[Kind], args: argparse.Namespace) -> Kind:
    """The options that a command line asked for; what it does not offer has its default.

    Raises:
        OptionError: one is out of range.
    """
    found = {}
    for name, one in kind.declared.items():
        destination = one.flag.replace("-", "_")
        if hasattr(args, destination):
            value = getattr(args, destination)
            value = not value if one.flag.startswith("no-") else value
            found[name] = tuple(value) if isinstance(value, list) else value
    return kind(**found)


def inputs_of(kind: type[Options], shown: Mapping[str, Mapping[str, Any]]) -> dict[str, tuple[Any, dict[str, Any]]]:
    """Options as the inputs of a node of ComfyUI. One that something else decides by default is 0 then.

    Args:
        kind: whose fields.
        shown: names of fields, and what ComfyUI is told beyond type, default and range.
    """
    made: dict[str, tuple[Any, dict[str, Any]]] = {}
    for name, more in shown.items():
        one = kind.declared[name]
        if isinstance(one.within, Range):
            default, least = (0.0, 0.0) if one.default is None else (one.default, float(one.within.least))
            numbers = {"default": default, "min": least, "max": float(one.within.most), "step": 0.01}
            made[name] = ("FLOAT", {**numbers, **more})
        elif one.within is not None:
            made[name] = (list(one.within), {"default": one.default, **more})
    return made
