"""This package against its neighbour of the same name on PyPI (convert-to-quant 1.3.4), on the same files in one run.

What is compared, and what for:

    start-up   `--help`: what every call pays.
    convert    a bf16 checkpoint to FP8, one scale per tensor. The neighbour's `--simple` is the same work plus a "bias
               correction" by random inputs; `--calib_samples 1` cuts that short, so both are given.
    convert F  the same to INT8 ConvRot, NVFP4 and MXFP8. Nothing but time and memory is looked at: the bytes
               are held against comfy-kitchen's by the tests.
    calibrate  activation scales of an FP8 checkpoint, one layer at a time from random inputs, written to a new file.
    rewrite    the same file with other activation scales, against `cp` of it: the physical limit of a rewrite.
    in place   the same scales set within the file.

The files are Flux.1's own layers (hidden size 3072, all names and shapes real, fewer blocks) with random values, and
they lie in memory (/dev/shm), so that disks do not count. Both sides quantize the same layers: the neighbour is told to
exclude what our preset keeps. The results are checked here, by code that shares nothing with either side: scales finite
and positive, weights close to the original's (in dB), everything else untouched.

Start-up counts, except in "rewrite" and "in place": there the call is timed inside its process, after imports.

    python benchmarks/against_peer.py --peer-python ~/peer/bin/python --json results.json

makes the environment of `--peer-python` if there is none (about 1 GB from PyPI). 12 GB of free memory are needed.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import math
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import venv
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
from measure import (
    Command,
    CommandFailedError,
    Contender,
    Run,
    alternate,
    in_fresh_process,
    machine,
    run,
    versions,
)
from numpy.typing import NDArray

REPOSITORY = Path(__file__).resolve().parent.parent
PEER = "convert-to-quant==1.3.4"
PEER_TORCH = "torch==2.13.0"
# What the neighbour imports and does not declare.
PEER_UNDECLARED = ("numpy", "safetensors", "packaging", "tqdm")

HIDDEN = 3072
BLOCK_LAYER = re.compile(r"(double|single)_blocks\.")
PEER_EXCLUDES = r"^(img_in|txt_in|time_in|vector_in|guidance_in|final_layer)"
E4M3_MAX = 448.0
BFLOAT16_INFINITY = 0x7F80
FOLDER_PREFIX = "convert_to_quant-bench-"

Shapes = dict[str, tuple[int, ...]]
Check = dict[str, Any]
"""What a check found: figures by name, and under "problems" a list of sentences, empty where all is well."""


# --- The files


def flux_shapes(double_blocks: int, single_blocks: int) -> Shapes:
    """Every tensor of a Flux.1 checkpoint with this many blocks: name -> shape."""

    def linear(name: str, out_features: int, in_features: int) -> Shapes:
        return {f"{name}.weight": (out_features, in_features), f"{name}.bias": (out_features,)}

    h, head = HIDDEN, 128
    shapes: Shapes = {}
    for name, in_features in (("time_in", 256), ("vector_in", 768), ("guidance_in", 256)):
        shapes |= linear(f"{name}.in_layer", h, in_features) | linear(f"{name}.out_layer", h, h)
    shapes |= linear("img_in", h, 64) | linear("txt_in", h, 4096)
    for index in range(double_blocks):
        for side in ("img", "txt"):
            block = f"double_blocks.{index}.{side}"
            shapes |= linear(f"{block}_mod.lin", 6 * h, h)
            shapes |= linear(f"{block}_attn.qkv", 3 * h, h) | linear(f"{block}_attn.proj", h, h)
            shapes |= linear(f"{block}_mlp.0", 4 * h, h) | linear(f"{block}_mlp.2", h, 4 * h)
            shapes |= {f"{block}_attn.norm.{which}_norm.scale": (head,) for which in ("query", "key")}
    for index in range(single_blocks):
        block = f"single_blocks.{index}"
        shapes |= linear(f"{block}.linear1", 7 * h, h) | linear(f"{block}.linear2", h, 5 * h)
        shapes |= linear(f"{block}.modulation.lin", 3 * h, h)
        shapes |= {f"{block}.norm.{which}_norm.scale": (head,) for which in ("query", "key")}
    return shapes | linear("final_layer.linear", 64, h) | linear("final_layer.adaLN_modulation.1", 2 * h, h)


@cache
def _random_pool() -> NDArray[np.float32]:
    return np.random.default_rng(1).standard_normal(1 << 24, dtype=np.float32)


def random_values(shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Normal values of variance 1/in, as a trained layer has them to the order of magnitude.

    They repeat after 17 million, which no contender notices: drawing two billion would take longer than the bench.
    """
    values = np.resize(_random_pool(), shape)
    values *= np.float32(1 / math.sqrt(shape[-1]))
    return values


def bfloat16_bits(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Upper halves of float32: bfloat16, cut instead of rounded, which random values cannot tell."""
    return (values.view(np.uint32) >> 16).astype(np.uint16)


def write_safetensors(path: Path, plan: Mapping[str, tuple[str, tuple[int, ...], int]], data: Iterator[bytes]) -> None:
    """Write a file tensor by tensor: plan is name -> (dtype, shape, bytes), data its contents in the same order."""
    header: dict[str, object] = {}
    offset = 0
    for name, (dtype, shape, size_bytes) in plan.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + size_bytes]}
        offset += size_bytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.writelines(data)
    assert path.stat().st_size == 8 + len(text) + offset


def make_bfloat16(path: Path, shapes: Shapes) -> None:
    """Write a bf16 checkpoint of random values."""
    plan = {name: ("BF16", shape, 2 * math.prod(shape)) for name, shape in shapes.items()}
    write_safetensors(path, plan, (bfloat16_bits(random_values(shape)).tobytes() for shape in shapes.values()))


def e4m3_values() -> NDArray[np.float32]:
    """The 256 values of float8_e4m3fn by definition: sign, 4 bits of exponent (bias 7), 3 of mantissa, no infinity."""
    code = np.arange(256)
    exponent, mantissa = (code >> 3) & 15, code & 7
    magnitude = np.where(exponent == 0, mantissa * 2.0**-9, (8 + mantissa) * 2.0 ** (exponent - 10.0))
    magnitude[(code & 127) == 127] = np.nan
    return np.where(code < 128, magnitude, -magnitude).astype(np.float32)


def make_fp8(path: Path, shapes: Shapes) -> None:
    """Write an FP8 checkpoint of random values in ComfyUI's layout, its input scales still 1.0."""
    positive = e4m3_values()[:127].astype(np.float64)
    edges = (positive[1:] + positive[:-1]) / 2
    marker = json.dumps({"format": "float8_e4m3fn"}).encode()
    plan: dict[str, tuple[str, tuple[int, ...], int]] = {}
    for name, shape in shapes.items():
        if len(shape) == 2 and BLOCK_LAYER.match(name):
            layer = name.removesuffix(".weight")
            plan[name] = ("F8_E4M3", shape, math.prod(shape))
            plan |= {f"{layer}.weight_scale": ("F32", (), 4), f"{layer}.input_scale": ("F32", (), 4)}
            plan[f"{layer}.comfy_quant"] = ("U8", (len(marker),), len(marker))
        else:
            plan[name] = ("BF16", shape, 2 * math.prod(shape))

    def data() -> Iterator[bytes]:
        scale = 1.0
        for name, (dtype, shape, _) in plan.items():
            if dtype == "F8_E4M3":
                # A table over all finite bf16 magnitudes: rounding 65,536 values is cheaper than rounding 100 million.
                bits = bfloat16_bits(random_values(shape))
                scale = float((np.uint32((bits & 0x7FFF).max()) << np.uint32(16)).view(np.float32)) / E4M3_MAX
                patterns = (np.arange(BFLOAT16_INFINITY, dtype=np.uint32) << 16).view(np.float32).astype(np.float64)
                magnitudes = np.searchsorted(edges, np.minimum(patterns / scale, E4M3_MAX)).astype(np.uint8)
                codes = np.where(bits >> 15, np.uint8(128), np.uint8(0))
                codes |= np.take(magnitudes, bits & 0x7FFF)
                yield codes.tobytes()
            elif name.endswith("_scale"):
                yield struct.pack("<f", scale if name.endswith(".weight_scale") else 1.0)
            elif dtype == "U8":
                yield marker
            else:
                yield bfloat16_bits(random_values(shape)).tobytes()

    write_safetensors(path, plan, data())


# --- Checks, by a reader of their own


@dataclass(frozen=True)
class Tensors:
    """A safetensors file, read by the letter of its format."""

    entries: dict[str, tuple[str, tuple[int, ...], int, int]]
    data: NDArray[np.uint8]

    @classmethod
    def of(cls, path: Path) -> Tensors:
        """Map a file."""
        mapped = np.memmap(path, np.uint8, "r")
        length = int(mapped[:8].view("<u8")[0])
        header = json.loads(bytes(mapped[8 : 8 + length]))
        header.pop("__metadata__", None)
        entries = {name: (e["dtype"], tuple(e["shape"]), *e["data_offsets"]) for name, e in header.items()}
        return cls(entries, mapped[8 + length :])

    def raw(self, name: str) -> NDArray[np.uint8]:
        """A tensor's bytes."""
        _, _, begin, end = self.entries[name]
        return self.data[begin:end]

    def scalar(self, name: str) -> float | None:
        """The value of a float32 tensor of one element; None where there is no such tensor."""
        if name not in self.entries or self.entries[name][0] != "F32" or self.raw(name).size != 4:
            return None
        return float(self.raw(name).copy().view("<f4")[0])

    def fp8_weights(self) -> list[str]:
        """Layers with an FP8 weight."""
        return [
            n.removesuffix(".weight") for n, e in self.entries.items() if e[0] == "F8_E4M3" and n.endswith(".weight")
        ]


def _good(scale: float | None) -> bool:
    return scale is not None and math.isfinite(scale) and scale > 0


def check_conversion(original: Path, converted: Path, rows: int = 256) -> Check:
    """Compare a converted file with the original.

    Returns:
        layers: number of FP8 layers; weight_sqnr_db: signal to quantization noise of their first `rows` rows;
        problems: sentences, empty where all is well.
    """
    before, after = Tensors.of(original), Tensors.of(converted)
    decoded = e4m3_values()
    signal = noise = 0.0
    problems = []
    for layer in after.fp8_weights():
        scale = after.scalar(f"{layer}.weight_scale") or after.scalar(f"{layer}.scale_weight")
        if not _good(scale):
            problems.append(f"{layer}: weight scale is {scale}")
            continue
        _, shape, _, _ = after.entries[f"{layer}.weight"]
        if shape != before.entries[f"{layer}.weight"][1]:
            problems.append(f"{layer}: shape {shape}")
            continue
        count = min(rows, shape[0]) * shape[1]
        bits = before.raw(f"{layer}.weight")[: 2 * count].view("<u2").astype(np.uint32)
        expected = (bits << 16).view(np.float32)
        found = decoded[after.raw(f"{layer}.weight")[:count]] * np.float32(scale or math.nan)
        signal += float(np.square(expected, dtype=np.float64).sum())
        noise += float(np.square(expected - found, dtype=np.float64).sum())
    wanted = {n.removesuffix(".weight") for n, e in before.entries.items() if len(e[1]) == 2 and BLOCK_LAYER.match(n)}
    if missing := wanted - set(after.fp8_weights()):
        problems.append(f"{len(missing)} of {len(wanted)} block layers are not FP8")
    if lost := set(before.entries) - set(after.entries):
        problems.append(f"{len(lost)} tensors are missing")
    sqnr_db = 10 * math.log10(signal / noise) if noise > 0 else math.inf
    if not sqnr_db > 25:
        problems.append(f"weights are {sqnr_db:.1f} dB from the original")
    return {"layers": len(after.fp8_weights()), "weight_sqnr_db": round(sqnr_db, 2), "problems": problems}


def check_calibration(original: Path, calibrated: Path) -> Check:
    """Compare a calibrated file with the one before.

    Returns:
        layers: number of FP8 layers with an input scale; changed: how many of these changed; input_scale_median;
        problems: sentences, empty where all is well.
    """
    before, after = Tensors.of(original), Tensors.of(calibrated)
    problems = []
    scales = {layer: after.scalar(f"{layer}.input_scale") for layer in before.fp8_weights()}
    problems += [f"{layer}: input scale is {scale}" for layer, scale in scales.items() if not _good(scale)]
    for name, (dtype, shape, _, _) in before.entries.items():
        if name.endswith((".input_scale", ".comfy_quant")):
            continue
        if name not in after.entries or after.entries[name][:2] != (dtype, shape):
            problems.append(f"{name} is missing or has another type or shape")
        elif not np.array_equal(before.raw(name), after.raw(name)):
            problems.append(f"{name} has other bytes")
    changed = sum(before.scalar(f"{layer}.input_scale") != scale for layer, scale in scales.items())
    median = float(np.median([scale for scale in scales.values() if scale is not None] or [math.nan]))
    return {"layers": len(scales), "changed": changed, "input_scale_median": median, "problems": problems}


# --- The contenders


@dataclass(frozen=True)
class Tools:
    """How to call either side, each with its own interpreter from a folder where neither package lies."""

    ours: Path
    peer: Path
    folder: Path

    def ours_python(self, *arguments: str | Path) -> Command:
        """Our interpreter, with this repository's package."""
        environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
        return Command([str(self.ours), *map(str, arguments)], self.folder, environment)

    def ours_command(self, *arguments: str | Path) -> Command:
        """Our command line."""
        return self.ours_python("-m", "convert_to_quant", *arguments)

    def peer_python(self, *arguments: str | Path) -> Command:
        """The neighbour's interpreter."""
        return self._peer(self.peer, *arguments)

    def peer_script(self, *arguments: str | Path) -> Command:
        """The neighbour's console script: its package cannot be run with `-m`."""
        return self._peer(self.peer.parent / "convert_to_quant", *arguments)

    def _peer(self, *arguments: str | Path) -> Command:
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        return Command([*map(str, arguments)], self.folder, environment)


def ensure_peer(python: Path) -> None:
    """Make the neighbour's environment where `python` does not exist yet: torch first, then the package beside it."""
    if not python.exists():
        folder = python.parent.parent
        print(f"making an environment for {PEER} in {folder}", file=sys.stderr)
        venv.create(folder, with_pip=True)
        for packages in ((PEER_TORCH,), (PEER_TORCH, PEER, *PEER_UNDECLARED)):
            subprocess.run([str(python), "-m", "pip", "install", "--quiet", *packages], check=True)


@contextlib.contextmanager
def workspace(directory: Path) -> Iterator[Path]:
    """A folder for gigabytes that goes away whatever happens; folders of killed runs go away now."""
    for old in directory.glob(f"{FOLDER_PREFIX}*"):
        pid = old.name.removeprefix(FOLDER_PREFIX).split("-")[0]
        if not Path(f"/proc/{pid}").exists():
            shutil.rmtree(old, ignore_errors=True)

    def stop(number: int, _frame: FrameType | None) -> None:
        sys.exit(128 + number)

    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, stop)
    with tempfile.TemporaryDirectory(prefix=f"{FOLDER_PREFIX}{os.getpid()}-", dir=directory) as folder:
        yield Path(folder)


@dataclass(frozen=True)
class Case:
    """Contenders for one job, the first of which is the measure of the others.

    Attributes:
        name: The job.
        contenders: Measured in turns.
        bytes_in: Size of the file that each reads.
        outputs: Contender -> the file that it writes, if any.
        checks: Contender -> what looks at its result, after all repeats.
        rounds: Repeats per repeat asked for: short jobs need more.
    """

    name: str
    contenders: tuple[Contender, ...]
    bytes_in: int = 0
    outputs: Mapping[str, Path] = field(default_factory=dict)
    checks: Mapping[str, Callable[[], Check]] = field(default_factory=dict)
    rounds: int = 1


def startup_case(tools: Tools, source: Path) -> Case:
    def without_torch(*arguments: str | Path) -> Callable[[], Check]:
        def check() -> Check:
            traced = run(tools.ours_python("-X", "importtime", "-m", "convert_to_quant", *arguments))
            imports = {line.split("|")[-1].strip() for line in traced.errors.splitlines() if "|" in line}
            return {"modules": len(imports), "problems": ["it imports torch"] if "torch" in imports else []}

        return check

    plan = ("-i", source, "-o", tools.folder / "never-written.safetensors", "--dry-run")
    return Case(
        "start-up",
        (
            Contender("peer --help", tools.peer_script("--help")),
            Contender("ours --help", tools.ours_command("--help")),
            Contender("ours --dry-run", tools.ours_command(*plan)),
        ),
        checks={"ours --help": without_torch("--help"), "ours --dry-run": without_torch(*plan)},
        rounds=2,
    )


def convert_case(tools: Tools, source: Path) -> Case:
    names = ("peer --simple", "peer --simple --calib_samples 1", "ours")
    outputs = {name: tools.folder / f"converted-{index}.safetensors" for index, name in enumerate(names)}
    peer = ("-i", source, "--simple", "--comfy_quant", "--exclude-layers", PEER_EXCLUDES)
    commands = {
        names[0]: tools.peer_script(*peer, "-o", outputs[names[0]]),
        names[1]: tools.peer_script(*peer, "-o", outputs[names[1]], "--calib_samples", "1"),
        names[2]: tools.ours_command("-i", source, "-o", outputs[names[2]]),
    }
    return Case(
        "convert",
        tuple(Contender(name, commands[name], prepare=partial(_remove, outputs[name])) for name in names),
        bytes_in=source.stat().st_size,
        outputs=outputs,
        checks={name: partial(in_fresh_process, check_conversion, source, outputs[name]) for name in names},
    )


PEER_FORMATS = {"int8-convrot": ("--int8", "--convrot"), "nvfp4": ("--nvfp4",), "mxfp8": ("--mxfp8",)}
"""What the neighbour calls the formats that both write."""


def format_case(name: str, tools: Tools, source: Path) -> Case:
    outputs = {who: tools.folder / f"{who}-{name}.safetensors" for who in ("peer", "ours")}
    peer = ("--simple", "--comfy_quant", "--exclude-layers", PEER_EXCLUDES, *PEER_FORMATS[name])
    commands = {
        "peer": tools.peer_script("-i", source, "-o", outputs["peer"], *peer),
        "ours": tools.ours_command("-i", source, "-o", outputs["ours"], "--format", name),
    }
    return Case(
        f"convert {name}",
        tuple(Contender(who, commands[who], prepare=partial(_remove, outputs[who])) for who in outputs),
        bytes_in=source.stat().st_size,
        outputs=outputs,
    )


def calibrate_case(tools: Tools, source: Path) -> Case:
    names = ("peer", "ours")
    outputs = {name: tools.folder / f"calibrated-{index}.safetensors" for index, name in enumerate(names)}
    peer_module = "convert_to_quant.calibrate_activation_scales"
    layer_engine = ("-i", source, "--actcal", "--actcal-engine", "layer")
    commands = {
        names[0]: tools.peer_python("-m", peer_module, source, "-o", outputs[names[0]]),
        names[1]: tools.ours_command(*layer_engine, "-o", outputs[names[1]]),
    }
    return Case(
        "calibrate",
        tuple(Contender(name, commands[name], prepare=partial(_remove, outputs[name])) for name in names),
        bytes_in=source.stat().st_size,
        outputs=outputs,
        checks={name: partial(in_fresh_process, check_calibration, source, outputs[name]) for name in names},
    )


def _remove(path: Path) -> None:
    path.unlink(missing_ok=True)


# What a rewrite and a change in place do without anything else: new input scales for every FP8 layer. Imports come
# first, so that the time is that of the work.
PATCH_CODE = """
import sys, time
from pathlib import Path
from convert_to_quant.checkpoint import open_checkpoint
from convert_to_quant.layers import find_layers
from convert_to_quant.patch import LayerChange, apply_in_place, plan_patch, rewrite
source, output = Path(sys.argv[1]), Path(sys.argv[2])
scale = 0.5 + time.time() % 1  # another one each time, or there would be nothing to change
started = time.perf_counter()
with open_checkpoint(source) as checkpoint:
    table = find_layers(checkpoint)
    patch = plan_patch(checkpoint, table, {name: LayerChange(input_scale=scale) for name in table.quantized})
    rewrite(patch, output) if output != source else apply_in_place(patch)
print(time.perf_counter() - started)
"""


def _printed_seconds(done: Run) -> float:
    return float(done.output)


def rewrite_case(tools: Tools, source: Path) -> Case:
    outputs = {name: tools.folder / f"rewritten-{name}.safetensors" for name in ("cp", "ours")}
    commands = {
        "cp": Command(["cp", str(source), str(outputs["cp"])], tools.folder),
        "ours": tools.ours_python("-c", PATCH_CODE, source, outputs["ours"]),
    }
    return Case(
        "rewrite",
        (
            Contender("cp", commands["cp"], prepare=partial(_remove, outputs["cp"])),
            Contender("ours", commands["ours"], prepare=partial(_remove, outputs["ours"]), seconds_of=_printed_seconds),
        ),
        bytes_in=source.stat().st_size,
        outputs=outputs,
        checks={"ours": partial(in_fresh_process, check_calibration, source, outputs["ours"])},
        rounds=3,
    )


def in_place_case(tools: Tools, source: Path) -> Case:
    changed = tools.folder / "changed.safetensors"
    shutil.copyfile(source, changed)
    return Case(
        "in place",
        (Contender("ours", tools.ours_python("-c", PATCH_CODE, changed, changed), seconds_of=_printed_seconds),),
        bytes_in=source.stat().st_size,
        outputs={"ours": changed},
        checks={"ours": partial(in_fresh_process, check_calibration, source, changed)},
        rounds=3,
    )


# --- Targets, tables, and the way through


@dataclass(frozen=True)
class Target:
    """What a row must not exceed: `limit` times the measure's figure, or `limit` itself where there is no measure."""

    case: str
    contender: str
    figure: str
    limit: float
    measure: str | None = None

    def judge(self, rows: Mapping[tuple[str, str], Check]) -> tuple[str, bool] | None:
        """The target as a sentence and whether it is met; None where its rows were not measured."""
        row = rows.get((self.case, self.contender))
        if row is None or (self.measure and (self.case, self.measure) not in rows):
            return None
        found, limit, against = _figure(row, self.figure), self.limit, ""
        if self.measure:
            limit *= _figure(rows[self.case, self.measure], self.figure)
            against = f" = {self.limit:.3g} x {self.measure}"
        unit = 1e6 if self.figure.endswith("_bytes") else 1.0
        name = {"seconds": "s", "peak_rss_bytes": "MB resident", "peak_private_bytes": "MB private"}[self.figure]
        sentence = f"{self.case}, {self.contender}: {found / unit:.3g} {name}, at most {limit / unit:.3g}{against}"
        return sentence, found <= limit


def _figure(row: Check, name: str) -> float:
    return float(row["seconds"]["median"] if name == "seconds" else row[name])


TARGETS = (
    Target("start-up", "ours --help", "seconds", 0.3),
    Target("start-up", "ours --dry-run", "seconds", 0.3),
    Target("convert", "ours", "seconds", 1 / 6, "peer --simple"),
    Target("convert", "ours", "seconds", 1 / 6, "peer --simple --calib_samples 1"),
    Target("convert", "ours", "peak_rss_bytes", 800e6),
    *(Target(f"convert {name}", "ours", "peak_rss_bytes", 800e6) for name in PEER_FORMATS),
    Target("calibrate", "ours", "seconds", 1 / 4, "peer"),
    Target("calibrate", "ours", "peak_rss_bytes", 600e6),
    Target("rewrite", "ours", "seconds", 1.3, "cp"),
    Target("in place", "ours", "seconds", 0.1),
)


def measure_case(case: Case, repeats: int, setting: Check) -> list[Check]:
    """Measure and check one case: one row per contender."""

    def progress(line: str) -> None:
        print(f"  {case.name}: {line}", file=sys.stderr, flush=True)

    rows = []
    for measured in alternate(case.contenders, repeats * case.rounds, progress):
        name = measured.contender.name
        output = case.outputs.get(name)
        rows.append(
            {
                "case": case.name,
                "contender": name,
                "seconds": measured.seconds.as_dict(),
                "peak_rss_bytes": measured.peak_rss_bytes,
                "peak_private_bytes": measured.peak_private_bytes,
                "bytes_in": case.bytes_in,
                "bytes_out": output.stat().st_size if output else 0,
                "check": case.checks[name]() if name in case.checks else {"problems": []},
                "command": list(measured.contender.command.arguments),
                **setting,
            }
        )
    for output in case.outputs.values():
        _remove(output)
    return rows


def print_table(rows: Sequence[Check]) -> None:
    print(f"{'':42}{'seconds':>10}{'spread':>20}{'x':>7}{'resident':>12}{'private':>10}   result")
    first: Check = {}
    for row in rows:
        if row["case"] != first.get("case"):
            first = row
        seconds, private = row["seconds"], row["peak_private_bytes"]
        spread = f"{seconds['min']:.3g} - {seconds['max']:.3g}"
        ratio = seconds["median"] / first["seconds"]["median"]
        memory = f"{row['peak_rss_bytes'] / 1e6:9,.0f} MB{'' if private is None else f'{private / 1e6:7,.0f} MB'}"
        found = {key: value for key, value in row["check"].items() if key != "problems"}
        words = ", ".join(f"{key} {value:.4g}" for key, value in found.items())
        if row["check"]["problems"]:
            words += f"{', ' if words else ''}{len(row['check']['problems'])} PROBLEMS: {row['check']['problems'][0]}"
        name = f"{row['case']}: {row['contender']}"
        print(f"{name:42}{seconds['median']:10.3g}{spread:>20}{ratio:7.3f}{memory}   {words}")


CASES: dict[str, Callable[[Tools, Path], Case]] = {
    "start-up": startup_case,
    "convert": convert_case,
    **{f"convert {name}": partial(format_case, name) for name in PEER_FORMATS},
    "calibrate": calibrate_case,
    "rewrite": rewrite_case,
    "in place": in_place_case,
}
BFLOAT16_CASES = [name for name in CASES if name.startswith(("start-up", "convert"))]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Compare with convert-to-quant 1.3.4 from PyPI.")
    parser.add_argument(
        "--peer-python", type=Path, required=True, help="interpreter of its environment; made if absent"
    )
    parser.add_argument("--ours-python", type=Path, default=Path(sys.executable))
    parser.add_argument(
        "--directory", type=Path, default=Path("/dev/shm"), help="where the files go (default %(default)s)"
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), metavar="CASE", help=", ".join(CASES))
    parser.add_argument("--only", help="regular expression: contenders to measure (their names as in the table)")
    parser.add_argument("--small", action="store_true", help="files of 0.8 GB, to try the bench itself")
    parser.add_argument("--json", type=Path, help="write the rows here")
    return parser.parse_args()


def free_memory_bytes() -> int:
    match = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    return int(match[1]) * 1024 if match else 0


def measure_all(options: argparse.Namespace, folder: Path) -> tuple[list[Check], list[str]]:
    """Make each file once, measure the cases that read it, and remove it.

    Returns:
        Rows of the cases that ran, and a sentence for each that failed.
    """
    neutral = folder / "neutral"
    neutral.mkdir()
    tools = Tools(options.ours_python.absolute(), options.peer_python.absolute(), neutral)
    packages = ("convert_to_quant", "torch", "numpy", "safetensors")
    setting = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "machine": machine(),
        "versions": {
            "ours": {**versions(tools.ours, packages, neutral), "convert_to_quant": our_version()},
            "peer": versions(tools.peer, packages, neutral),
        },
    }
    bfloat16, fp8 = folder / "flux-bf16.safetensors", folder / "flux-fp8.safetensors"
    touch_memory(folder, 1_000_000_000 if options.small else 8_000_000_000)
    rows: list[Check] = []
    failures: list[str] = []
    for source, make, blocks, names in (
        (bfloat16, make_bfloat16, (1, 0) if options.small else (1, 3), BFLOAT16_CASES),
        (fp8, make_fp8, (1, 0) if options.small else (2, 6), [name for name in CASES if name not in BFLOAT16_CASES]),
    ):
        if not set(names) & set(options.cases):
            continue
        print(f"making {source.name}", file=sys.stderr, flush=True)
        in_fresh_process(make, source, flux_shapes(*blocks))
        for name in names:
            if name in options.cases:
                case = CASES[name](tools, source)
                chosen = tuple(c for c in case.contenders if options.only is None or re.search(options.only, c.name))
                try:
                    rows += measure_case(replace(case, contenders=chosen), options.repeats, setting)
                except CommandFailedError as error:  # the other cases are still worth minutes of waiting
                    failures.append(f"{name}: {error}")
                    print(failures[-1], file=sys.stderr)
        source.unlink()
    return rows, failures


def touch_memory(folder: Path, size_bytes: int) -> None:
    """Fill memory once and let it go: a virtual machine gets its pages at the first touch, at a tenth of the speed."""
    path, chunk = folder / "touch", bytes(1 << 24)
    with path.open("wb") as file:
        file.writelines(chunk for _ in range(size_bytes // len(chunk)))
    path.unlink()


def our_version() -> str:
    """The commit, which says more than a version between releases; a "+" behind it where files have changed since."""
    git = ["git", "-C", str(REPOSITORY), "describe", "--always", "--dirty=+"]
    return subprocess.run(git, check=False, capture_output=True, text=True).stdout.strip() or "unknown"


def main() -> int:
    options = parse_arguments()
    if free_memory_bytes() < (3e9 if options.small else 12e9):
        return _fail("not enough free memory: files and the neighbour need 12 GB (--small: 3 GB)")
    try:
        ensure_peer(options.peer_python.absolute())
        with workspace(options.directory) as folder:
            rows, failures = measure_all(options, folder)
    except subprocess.CalledProcessError as error:
        return _fail(str(error))
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
    print_table(rows)
    table = {(row["case"], row["contender"]): row for row in rows}
    verdicts = [verdict for target in TARGETS if (verdict := target.judge(table)) is not None]
    for sentence, met in verdicts:
        print(f"{'met   ' if met else 'MISSED'}  {sentence}")
    ours_wrong = any(row["check"]["problems"] for row in rows if row["contender"].startswith("ours"))
    return 1 if failures or ours_wrong or not all(met for _, met in verdicts) else 0


def _fail(message: str) -> int:
    print(message, file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
