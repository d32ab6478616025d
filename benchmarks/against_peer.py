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
import statistics
import subprocess
import sys
import tempfile
import venv
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

from measure import (
    Command,
    CommandFailedError,
    Contender,
    Run,
    alternate,
    in_fresh_process,
    machine,
    run,
    summary,
    versions,
)

REPOSITORY = Path(__file__).resolve().parent.parent
PEER = "convert-to-quant==1.3.4"
PEER_TORCH = "torch==2.13.0"
# What the neighbour imports and does not declare.
PEER_UNDECLARED = ("numpy", "safetensors", "packaging", "tqdm")

HIDDEN = 3072
BLOCK_LAYER = re.compile(r"(double|single)_blocks\.")
PEER_EXCLUDES = r"^(img_in|txt_in|time_in|vector_in|guidance_in|final_layer)"
E4M3_MAX = 448.0
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


def random_weights(shapes: Shapes) -> Iterator[tuple[str, Any]]:
    """Normal values of variance 1/in, as trained layers have them to the order of magnitude, in bfloat16 by name.

    They repeat after 17 million, which no contender notices: drawing two billion would take longer than the bench.
    """
    import torch

    pool = torch.randn(1 << 24, generator=torch.Generator().manual_seed(1))
    for name, shape in shapes.items():
        count = math.prod(shape)
        values = pool.repeat(-(-count // len(pool)))[:count].reshape(shape)
        yield name, (values / math.sqrt(shape[-1])).bfloat16()


def make_bfloat16(path: Path, shapes: Shapes) -> None:
    """Write a bf16 checkpoint of random values."""
    from safetensors.torch import save_file

    save_file(dict(random_weights(shapes)), path)


def make_fp8(path: Path, shapes: Shapes) -> None:
    """Write an FP8 checkpoint of random values in ComfyUI's layout, its input scales still 1.0."""
    import torch
    from safetensors.torch import save_file

    marker = json.dumps({"format": "float8_e4m3fn"}).encode()
    tensors = {}
    for name, values in random_weights(shapes):
        tensors[name] = values
        if values.ndim == 2 and BLOCK_LAYER.match(name):
            layer = name.removesuffix(".weight")
            scale = values.abs().max().float() / E4M3_MAX
            tensors[name] = (values.float() / scale).to(torch.float8_e4m3fn)
            tensors |= {f"{layer}.weight_scale": scale, f"{layer}.input_scale": torch.ones(())}
            tensors[f"{layer}.comfy_quant"] = torch.tensor(list(marker), dtype=torch.uint8)
    save_file(tensors, path)


# --- Checks, by the library of the format alone


def fp8_layers(file: Any) -> list[str]:
    """Layers of an open file with an FP8 weight."""
    names = [name for name in file.keys() if name.endswith(".weight")]  # noqa: SIM118  # it is no mapping
    return [name.removesuffix(".weight") for name in names if file.get_slice(name).get_dtype() == "F8_E4M3"]


def scalar(file: Any, *names: str) -> float:
    """The value of the first of some tensors that is there and has one element; NaN where none is."""
    there = set(file.keys())
    values = (file.get_tensor(name) for name in names if name in there)
    return next((float(value) for value in values if value.numel() == 1), math.nan)


def check_conversion(original: Path, converted: Path, rows: int = 256) -> Check:
    """Compare a converted file with the original.

    Returns:
        layers: number of FP8 layers; weight_sqnr_db: signal to quantization noise of their first `rows` rows;
        problems: sentences, empty where all is well.
    """
    from safetensors import safe_open

    signal = noise = 0.0
    problems = []
    with safe_open(original, "pt") as before, safe_open(converted, "pt") as after:
        layers = fp8_layers(after)
        for layer in layers:
            scale = scalar(after, f"{layer}.weight_scale", f"{layer}.scale_weight")
            weight, wanted = (file.get_slice(f"{layer}.weight") for file in (after, before))
            if not 0 < scale < math.inf:
                problems.append(f"{layer}: weight scale is {scale}")
            elif weight.get_shape() != wanted.get_shape():
                problems.append(f"{layer}: shape {weight.get_shape()}")
            else:
                expected = wanted[:rows].double()
                signal += float(expected.square().sum())
                noise += float((expected - weight[:rows].double() * scale).square().sum())
        names = set(before.keys())
        blocks = {name.removesuffix(".weight") for name in names if BLOCK_LAYER.match(name) and is_matrix(before, name)}
        if missing := blocks - set(layers):
            problems.append(f"{len(missing)} of {len(blocks)} block layers are not FP8")
        if lost := names - set(after.keys()):
            problems.append(f"{len(lost)} tensors are missing")
    sqnr_db = 10 * math.log10(signal / noise) if noise > 0 else math.inf
    if not sqnr_db > 25:
        problems.append(f"weights are {sqnr_db:.1f} dB from the original")
    return {"layers": len(layers), "weight_sqnr_db": round(sqnr_db, 2), "problems": problems}


def is_matrix(file: Any, name: str) -> bool:
    """Whether a tensor of an open file has two dimensions."""
    return len(file.get_slice(name).get_shape()) == 2


def check_calibration(original: Path, calibrated: Path) -> Check:
    """Compare a calibrated file with the one before.

    Returns:
        layers: number of FP8 layers with an input scale; changed: how many of these changed; input_scale_median;
        problems: sentences, empty where all is well.
    """
    import torch
    from safetensors import safe_open

    with safe_open(original, "pt") as before, safe_open(calibrated, "pt") as after:
        layers = [f"{layer}.input_scale" for layer in fp8_layers(before)]
        scales = {name: scalar(after, name) for name in layers}
        problems = [f"{name} is {scale}" for name, scale in scales.items() if not 0 < scale < math.inf]
        changed = sum(scalar(before, name) != scale for name, scale in scales.items())
        there = set(after.keys())
        for name in before.keys():  # noqa: SIM118
            if name.endswith((".input_scale", ".comfy_quant")):
                continue
            one, other = before.get_tensor(name), after.get_tensor(name) if name in there else None
            if other is None or (one.dtype, one.shape) != (other.dtype, other.shape):
                problems.append(f"{name} is missing or has another type or shape")
            elif not torch.equal(*(tensor.reshape(-1).view(torch.uint8) for tensor in (one, other))):
                problems.append(f"{name} has other bytes")
    median = statistics.median(scales.values())
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
        outputs: Contender -> the file that it writes, if any.
        checks: Contender -> what looks at its result, after all repeats.
        rounds: Repeats per repeat asked for: short jobs need more.
    """

    name: str
    contenders: tuple[Contender, ...]
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


def writing_case(
    name: str,
    tools: Tools,
    source: Path,
    commands: Mapping[str, Callable[[Path], Command]],
    *,
    check: Callable[[Path, Path], Check] | None = None,
    seconds_of: Callable[[Run], float] = lambda done: done.seconds,
    rounds: int = 1,
) -> Case:
    """A case whose contenders each write a file: from the file's path to the command, and what looks at it."""
    outputs = {who: tools.folder / f"{name}-{number}.safetensors" for number, who in enumerate(commands)}
    return Case(
        name,
        tuple(
            Contender(who, make(outputs[who]), partial(outputs[who].unlink, missing_ok=True), seconds_of)
            for who, make in commands.items()
        ),
        outputs,
        {who: partial(in_fresh_process, check, source, path) for who, path in outputs.items() if check},
        rounds,
    )


def convert_case(tools: Tools, source: Path) -> Case:
    peer = ("-i", source, "--simple", "--comfy_quant", "--exclude-layers", PEER_EXCLUDES, "-o")
    commands = {
        "peer --simple": lambda path: tools.peer_script(*peer, path),
        "peer --simple --calib_samples 1": lambda path: tools.peer_script(*peer, path, "--calib_samples", "1"),
        "ours": lambda path: tools.ours_command("-i", source, "-o", path),
    }
    return writing_case("convert", tools, source, commands, check=check_conversion)


PEER_FORMATS = {"int8-convrot": ("--int8", "--convrot"), "nvfp4": ("--nvfp4",), "mxfp8": ("--mxfp8",)}
"""What the neighbour calls the formats that both write."""


def format_case(name: str, tools: Tools, source: Path) -> Case:
    peer = ("-i", source, "--simple", "--comfy_quant", "--exclude-layers", PEER_EXCLUDES, *PEER_FORMATS[name], "-o")
    commands = {
        "peer": lambda path: tools.peer_script(*peer, path),
        "ours": lambda path: tools.ours_command("-i", source, "--format", name, "-o", path),
    }
    return writing_case(f"convert {name}", tools, source, commands)


def calibrate_case(tools: Tools, source: Path) -> Case:
    layer_engine = ("-i", source, "--actcal", "--actcal-engine", "layer", "-o")
    peer = ("-m", "convert_to_quant.calibrate_activation_scales", source, "-o")
    commands = {
        "peer": lambda path: tools.peer_python(*peer, path),
        "ours": lambda path: tools.ours_command(*layer_engine, path),
    }
    return writing_case("calibrate", tools, source, commands, check=check_calibration)


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


def printed_seconds(done: Run) -> float:
    """What a program says that its work took; all of a run that says nothing."""
    return float(done.output or done.seconds)


def rewrite_case(tools: Tools, source: Path) -> Case:
    commands = {
        "cp": lambda path: Command(["cp", str(source), str(path)], tools.folder),
        "ours": lambda path: tools.ours_python("-c", PATCH_CODE, source, path),
    }
    return writing_case(
        "rewrite", tools, source, commands, check=check_calibration, seconds_of=printed_seconds, rounds=3
    )


def in_place_case(tools: Tools, source: Path) -> Case:
    changed = tools.folder / "changed.safetensors"
    shutil.copyfile(source, changed)
    return Case(
        "in place",
        (Contender("ours", tools.ours_python("-c", PATCH_CODE, changed, changed), seconds_of=printed_seconds),),
        {"ours": changed},
        {"ours": partial(in_fresh_process, check_calibration, source, changed)},
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
        name = {"seconds": "s", "peak_rss_bytes": "MB"}[self.figure]
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
        rows.append(
            {
                "case": case.name,
                "contender": name,
                "seconds": summary(measured.seconds),
                "peak_rss_bytes": measured.peak_rss_bytes,
                "check": case.checks[name]() if name in case.checks else {"problems": []},
                "command": list(measured.contender.command.arguments),
                **setting,
            }
        )
    for output in case.outputs.values():
        output.unlink(missing_ok=True)
    return rows


def print_table(rows: Sequence[Check]) -> None:
    print(f"{'':42}{'seconds':>10}{'spread':>20}{'x':>7}{'memory':>12}   result")
    first: Check = {}
    for row in rows:
        if row["case"] != first.get("case"):
            first = row
        seconds = row["seconds"]
        spread = f"{seconds['min']:.3g} - {seconds['max']:.3g}"
        ratio = seconds["median"] / first["seconds"]["median"]
        memory = f"{row['peak_rss_bytes'] / 1e6:9,.0f} MB"
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
