"""Options for running, calibrating, solving and converting, declared once: type, default, help text and range.

The command line, `--config` and the ComfyUI nodes are generated from the same fields, and the dataclasses run the same
checks in Python. `--help` imports this module, so it must not import numpy.
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
from .methods import METHODS

if TYPE_CHECKING:
    from .formats.record import Format

SAMPLES, STEPS = 16, 4
"""Default number of images (samples), and of noise levels per image; each level is one evaluation of the network.
Outlier tokens differ more between images than between noise levels: with 64 evaluations, 8 images missed up to nine
tenths of a range that 16 images covered (docs/experiments.md).
"""

SIDE_PIXELS, FRAMES, TEXT_TOKENS = 256, 1, 64
"""Default image side in pixels, number of frames, and prompt length in tokens."""

CPU_STEPS, CPU_SIDE_PIXELS, CPU_TEXT_TOKENS = 2, 128, 32
"""Smaller defaults for a large model on a CPU: a seventh of the work, and ranges hardly move (docs/experiments.md)."""

CPU_LARGE_WEIGHTS = 10**8
"""Number of weights from which a model counts as large: a third of one double block of Flux.1."""

COMFYUI_VARIABLE = "COMFYUI_DIR"
"""Environment variable with the ComfyUI folder, used when no flag gives one."""

DEFAULT_FORMAT = "fp8"  # `formats.DEFAULT`, which needs numpy
DEFAULT_ROWS = 64
"""Input tokens simulated per guessed layer."""

Engine = Literal["auto", "model", "layer"]
"""How ranges are found. "auto" means "model", which measures; guessing must be requested."""
ScalingMode = Literal["tensor", "row", "block"]
WeightScale = Literal["absmax", "mse"]

_DEVICE = re.compile(r"(cpu|cuda|xpu)(:\d+)?|auto")
DEVICES = "cpu, cuda, cuda:0 or xpu"


class Range(NamedTuple):
    """The numbers that an option accepts, and the message for any other."""

    rule: str
    kind: type
    least: float
    most: float = sys.float_info.max
    hint: str = ""


BLOCK = Range("--block-size should be at least 1 and below 65536", int, 1, 65535)
BITS = Range("--bits should be between 3 and 16", float, 3, 16)
SPEED = Range("--speed should be above 0", float, math.ulp(0.0))
COUNT = Range("{name} should be at least 1", int, 1)
MARGIN = Range("a margin should be at least 1", float, 1, hint="below 1 clips observed values")
PERCENTILE = Range("a percentile should be above 0 and at most 100", float, math.ulp(0.0), 100)
SEED = Range("a seed should not be negative", int, 0)
SHARE = Range("--{flag} should be a share between 0 and 1", float, 0, 1)


class Option(NamedTuple):
    """A field of `Options`, and its command-line flag.

    Attributes:
        default: None if it is decided at run time; `words` then says how.
        words: help text, to which the default is added; without it there is no flag.
        metavar: placeholder for the value.
        within: accepted numbers or choices.
        flag: if it is not the field's name; "no-NAME" for a switch that turns something off.
    """

    default: Any
    words: str = ""
    metavar: str | None = None
    within: Range | tuple[str, ...] | None = None
    flag: str = ""


option: Any = Option
"""`Option`, assignable to a field of any type."""

if TYPE_CHECKING or "dataclasses" in sys.modules:
    from dataclasses import dataclass
else:  # importing dataclasses and building these takes a third of the time of `--help`, which needs none

    def dataclass(**_: bool):
        """Defer to `Options.__new__`."""
        return lambda kind: kind


_COMPLETING = Lock()


class Options:
    """Frozen dataclasses that check their values: choices, ranges, regular expressions.

    A class becomes a dataclass when its first object is created.
    """

    declared: ClassVar[dict[str, Option]] = {}

    def __init_subclass__(cls) -> None:
        cls.declared = dict(cls.declared)
        for name, one in list(vars(cls).items()):
            if isinstance(one, Option):
                cls.declared[name] = one._replace(flag=one.flag or name.replace("_", "-"))
                setattr(cls, name, one.default)

    def __new__(cls, *_: Any, **__: Any) -> Any:
        """Turn the class into a dataclass first."""
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
    """The inputs that a model runs on, and its device.

    Attributes:
        samples: number of images; None means `SAMPLES`.
        steps: noise levels per image; None means `STEPS`.
        height, width: in pixels.
        frames: of a video.
        text_tokens: prompt length. If the size is None altogether, `engines.diffusers` decides it; otherwise None means
            the default above.
        device: "auto" prefers a GPU.
    """

    samples: int | None = option(None, f"number of images ({SAMPLES}, or one per prompt)", "N", COUNT)
    steps: int | None = option(None, f"noise levels per image ({STEPS})", "N", COUNT)
    height: int | None = option(None, f"image height ({SIDE_PIXELS})", "PIXELS", COUNT)
    width: int | None = option(None, f"image width ({SIDE_PIXELS})", "PIXELS", COUNT)
    frames: int | None = option(None, f"number of video frames ({FRAMES})", "N", COUNT)
    text_tokens: int | None = option(None, f"prompt length in tokens ({TEXT_TOKENS})", "N", COUNT)
    device: str = option("auto", "cpu, cuda or cuda:N; auto prefers a GPU", "DEVICE")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_device_name(self.device)

    @property
    def size(self) -> tuple[int | None, ...]:
        """Arguments of `engines.sizes.geometry`."""
        return self.height, self.width, self.frames, self.text_tokens


@dataclass(frozen=True)
class RunOptions(ShownOptions):
    """The inputs of a model that is observed or compared.

    Attributes:
        seed: of all noise; for the others, see `ShownOptions`.
    """

    seed: int = option(42, "random seed", "S", SEED)


@dataclass(frozen=True)
class CalibrationOptions(RunOptions):
    """How to calibrate.

    Attributes:
        samples: number of images (None means `SAMPLES`), or input tokens per guess (`DEFAULT_ROWS`).
        margin: factor ≥ 1 on ranges. None means free headroom for observed ranges, and 8 for guessed ones.
        engine: "model" (or "auto") runs the network; "layer" guesses each layer's range from its weight.
        percentile: of guessed magnitudes; None means 99.9. Observed ranges are never cut.
        float16_safe: raise scales to at least 2⁻¹⁵.
        one_row_full_precision: whether layers with one token per image compute in full precision.
        steps, height, width, frames, text_tokens, device, seed: see `RunOptions`.
    """

    samples: int | None = option(
        None, f"number of images ({SAMPLES}), or tokens per guess ({DEFAULT_ROWS})", "N", COUNT
    )
    margin: float | None = option(None, "headroom factor, 1 for none (automatic)", "M", MARGIN)
    engine: Engine = option("auto", "model: run it; layer: guess from weights", "ENGINE", get_args(Engine))
    percentile: float | None = option(None, "percentile of guessed magnitudes (99.9)", "P", PERCENTILE)
    float16_safe: bool = option(False, "raise every scale to at least 2⁻¹⁵")
    one_row_full_precision: bool = option(True)


@dataclass(frozen=True)
class SolveOptions(Options):
    """How scales are chosen.

    Attributes:
        method: see `solve`.
        percentile: for the method of that name, in (0, 100].
        margin: factor ≥ 1 on the range. None means free headroom for "absmax", and 1 for other methods.
        full_precision_budget: share of the compute (MACs) that may move to full precision for quality.
        row_loss_limit: largest share of lost tokens in FP8; layers above it compute in full precision.
        keep: regular expressions; matching layers keep their scale and precision.
        float16_safe: raise scales to at least 2⁻¹⁵.
        one_row_full_precision: whether layers with one token per image compute in full precision.
    """

    method: str = option("absmax", " or ".join(METHODS), "METHOD", tuple(METHODS))
    percentile: float = option(99.9, "for --method percentile", "P", PERCENTILE)
    margin: float | None = option(None, "headroom factor, 1 for none (automatic)", "M", MARGIN)
    full_precision_budget: float = option(0.0, "share of compute allowed in full precision", "SHARE", SHARE)
    row_loss_limit: float = option(0.01, "lost tokens that force full precision", "SHARE", SHARE)
    keep: tuple[str, ...] = option((), "leave matching layers unchanged; repeatable", "REGEX")
    float16_safe: bool = option(False, "raise every scale to at least 2⁻¹⁵")
    one_row_full_precision: bool = option(True)

    @property
    def finds_headroom(self) -> bool:
        """Whether `headroom` finds each layer's margin from its channels and weight."""
        return self.margin is None and self.method == "absmax"


@dataclass(frozen=True)
class ConvertOptions(Options):
    """How to convert.

    Attributes:
        format: one of `formats.WRITTEN`.
        layer_format: "REGEX=NAME": matching layers become NAME; the first match counts.
        preset: model family that decides which layers stay; None means detect it.
        exclude: regular expressions; matching layers stay in high precision.
        scaling_mode: one scale per tensor, row or block, for "fp8".
        block_size: side of the square blocks.
        weight_scale: how weight scales are chosen.
        round: round weights to preserve layer outputs, measured while the model runs on noise (`rounding`).
        requantize: also convert layers that are quantized in another format.
        input_scale: write placeholder input scales, which calibration sets in place; 1.0 in legacy files.
        legacy: write the `scaled_fp8` convention instead of comfy_quant.
    """

    format: str = option(DEFAULT_FORMAT, "number format; see below", "NAME")
    layer_format: tuple[str, ...] = option((), "format for matching layers; repeatable", "REGEX=NAME")
    preset: str | None = option(None, "model family whose rules apply (detected)", "FAMILY")
    exclude: tuple[str, ...] = option((), "do not quantize matching layers; repeatable", "REGEX", flag="exclude-layers")
    scaling_mode: ScalingMode = option("tensor", "FP8 scale per tensor, row or block", "MODE", get_args(ScalingMode))
    block_size: int = option(64, "block size for --scaling-mode block", "N", BLOCK)
    weight_scale: WeightScale = option("absmax", "absmax, or mse for least error", "METHOD", get_args(WeightScale))
    round: bool = option(False, "optimize rounding by running the model")
    requantize: bool = option(False, "convert quantized layers, too")
    input_scale: bool = option(True, "omit placeholder input scales", flag="no-input-scale")
    legacy: bool = option(False)

    def __post_init__(self) -> None:
        super().__post_init__()
        from .formats import WRITTEN

        for name in (self.format, *(name for _, name in self.layer_formats)):
            if name not in WRITTEN:
                raise OptionError(f"unknown or read-only format {name!r}", hint=f"one of {', '.join(WRITTEN)}")
        if self.scaling_mode != "tensor" and self.format != DEFAULT_FORMAT:
            raise OptionError(f"--scaling-mode is for {DEFAULT_FORMAT}; {self.format} has its own scaling")
        if self.round and self.weight_scale != "absmax":
            raise OptionError("--round chooses the weight scales; omit --weight-scale")
        if self.legacy and self.scaling_mode != "tensor":
            raise OptionError(f"legacy files support one scale per tensor only, not --scaling-mode {self.scaling_mode}")
        if self.legacy and (self.format != DEFAULT_FORMAT or self.layer_format):
            raise OptionError(f"legacy files support {DEFAULT_FORMAT} only")

    @property
    def layer_formats(self) -> list[tuple[str, str]]:
        """`layer_format` as pairs of regular expression and format."""
        pairs = [text.rpartition("=") for text in self.layer_format]
        if not all(pattern and name for pattern, _, name in pairs):
            raise OptionError("--layer-format should be REGEX=NAME", hint="for example '.*mlp.*=int8-convrot'")
        return [(pattern, name) for pattern, _, name in pairs]

    def record_of(self, layer: str) -> Format:
        """The requested format of a layer."""
        from .formats import FORMATS

        names = (name for pattern, name in self.layer_formats if re.search(pattern, layer))
        name = next(names, None)
        return self.record if name is None else FORMATS[name]

    @property
    def record(self) -> Format:
        """The requested format."""
        from .formats import FORMATS

        return FORMATS[self.format if self.scaling_mode == "tensor" else f"{self.format}-{self.scaling_mode}"]


@dataclass(frozen=True)
class BestOptions(Options):
    """How the best mix of formats is chosen.

    Attributes:
        bits: per weight of the quantizable layers, as `choose.Mixes` counts them; 8 without `file_size`.
        file_size: of the whole file, as in "8GB"; 1 GB is 10⁹ bytes.
        gpu: a key of `formats.record.GPUS`.
        speed: minimum speedup of the layers' matrix multiplications on that GPU over 16 bits.
        only: comma-separated keys of `formats.FORMATS`; None means `choose.CANDIDATES`.
    """

    bits: float | None = option(None, "target bits per quantized weight (8)", "N", BITS)
    file_size: str | None = option(None, "target file size, such as 8GB or 700MB", "SIZE", flag="size")
    gpu: str = option("any", "target GPU: rtx20..50, h100, l40s, mi300 or rdna3..4", "NAME")
    speed: float | None = option(None, "minimum speedup over 16 bits", "N", SPEED)
    only: str | None = option(None, "comma-separated candidates (all of the GPU)", "NAMES", flag="formats")

    def __post_init__(self) -> None:
        super().__post_init__()
        from .formats import FORMATS
        from .formats.record import GPUS

        if self.gpu not in GPUS:
            raise OptionError(f"unknown GPU {self.gpu!r}", hint=f"one of {', '.join(GPUS)}")
        unknown = [name for name in self.formats if name not in FORMATS]
        if unknown:
            raise OptionError(f"unknown format {unknown[0]!r}", hint=f"one of {', '.join(FORMATS)}")
        if self.bits is not None and self.file_size is not None:
            raise OptionError("--bits and --size both limit the file size; give one")
        self.size_bytes  # noqa: B018  # raises if it is invalid

    @property
    def formats(self) -> tuple[str, ...]:
        """The candidates; empty means all."""
        return tuple(name.strip() for name in self.only.split(",")) if self.only else ()

    @property
    def bits_wanted(self) -> float:
        """Bits per weight without `file_size`."""
        return 8.0 if self.bits is None else self.bits

    @property
    def size_bytes(self) -> int | None:
        """`file_size` in bytes."""
        if self.file_size is None:
            return None
        found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) ?([kMG]?)B", self.file_size.strip())
        if found is None:
            raise OptionError(f"--size {self.file_size!r} is not a size", hint="for example 8GB or 700MB")
        return int(float(found[1]) * {"": 1, "k": 10**3, "M": 10**6, "G": 10**9}[found[2]])


def check_device_name(name: str) -> None:
    """Refuse an unsupported device name without loading torch; the device may still be missing.

    Raises:
        OptionError: the name is not supported.
    """
    if name.partition(":")[0] == "mps":
        raise OptionError(
            f"device {name!r} is not supported: it lacks float64, which the statistics need", hint=DEVICES
        )
    if not _DEVICE.fullmatch(name):
        raise OptionError(f"unknown device {name!r}", hint=DEVICES)


Kind = TypeVar("Kind", bound=Options)


def offered(kind: type[Options]) -> dict[str, Option]:
    """The options with flags, by their names in the parsed arguments."""
    return {one.flag.replace("-", "_"): one for one in kind.declared.values() if one.words}


def add_options(group: Any, kind: type[Options], prefix: str = "", **defaults: Any) -> None:
    """Add flags for options to a parser.

    Args:
        group: argument group of the parser.
        kind: the options.
        prefix: of every flag with a value: "actcal-" or nothing.
        defaults: that differ from the fields'.
    """
    for destination, one in offered(kind).items():
        default, words = defaults.get(destination, one.default), one.words
        if one.default is None and default is not None:
            words = words.rpartition(" (")[0]  # the meaning of None
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
        if one.flag == "device" and prefix:  # conversion uses it, too
            group.add_argument(flag, **(settings | {"default": argparse.SUPPRESS, "help": argparse.SUPPRESS}))
            flag = "--device"
        group.add_argument(flag, help=words, **settings)


def flags_of(options: Options) -> list[str]:
    """The flags that set options to other values than the defaults.

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
    """The options from parsed arguments; fields without a flag have their defaults.

    Raises:
        OptionError: a value is out of range.
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
    """Options as inputs of a ComfyUI node; 0 stands for a default of None.

    Args:
        kind: the options.
        shown: names of fields, and ComfyUI settings besides type, default and range.
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
