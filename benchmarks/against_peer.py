"""This package against another package with the same import name on PyPI, convert-to-quant 1.3.4.

Cases, each on the same files:

    start-up   `--help`, which every command pays, and a dry run.
    convert    bf16 to FP8 with one scale per tensor. The peer's `--simple` also computes a "bias correction" from
               random inputs; `--calib_samples 1` shortens it, so both are measured.
    convert F  bf16 to INT8 ConvRot, NVFP4 and MXFP8: time and memory only. Tests compare the bytes with
               comfy-kitchen's.
    calibrate  activation scales of an FP8 checkpoint from random inputs, one layer at a time, to a new file.
    rewrite    the same file with other activation scales, against `cp`, the physical limit of a rewrite; and the same
               scales set in place.

The files have Flux.1's layer names and shapes (hidden size 3072), fewer blocks and random values, and are in memory
(/dev/shm), so that disks do not count. Both packages quantize the same layers: the peer gets `--exclude-layers` with
what our preset keeps. Results are checked with the safetensors library alone.

Times include start-up, except in "rewrite", which is timed inside the process after imports.

    python benchmarks/against_peer.py --peer-python ~/peer/bin/python --json results.json

creates the environment of `--peer-python` if it does not exist (about 1 GB from PyPI). Needs 12 GB of free memory.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import lzma
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import venv
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from measure import Command, CommandFailedError, Contender, Run, alternate, in_fresh_process, machine, summary, versions

REPOSITORY = Path(__file__).resolve().parent.parent
LAYOUTS = REPOSITORY / "tests" / "data" / "layouts.json.xz"
PEER = "convert-to-quant==1.3.4"
PEER_TORCH = "torch==2.13.0"
PEER_UNDECLARED = ("numpy", "safetensors", "packaging", "tqdm")
"""Imported by the peer, but not declared."""

BLOCK = re.compile(r"(double|single)_blocks\.(\d+)\.")
E4M3_MAX = 448.0
FOLDER_PREFIX = "convert_to_quant-bench-"

Shapes = dict[str, tuple[int, ...]]
Row = dict[str, Any]


# --- Files


def flux_shapes(double_blocks: int, single_blocks: int) -> Shapes:
    """Every tensor of a Flux.1 checkpoint with this many blocks: name -> shape."""
    layout = json.loads(lzma.decompress(LAYOUTS.read_bytes()))["flux1_dev"]
    counts = {"double": double_blocks, "single": single_blocks}

    def is_in(name: str) -> bool:
        block = BLOCK.match(name)
        return block is None or int(block[2]) < counts[block[1]]

    return {name: tuple(shape) for name, (_, shape) in layout.items() if is_in(name)}


def random_weights(shapes: Shapes) -> Iterator[tuple[str, Any]]:
    """Normal values of variance 1/in, in bfloat16. They repeat after 17 million: drawing two billion takes too long."""
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
    """Write an FP8 checkpoint of random values in ComfyUI's layout, with input scales of 1.0."""
    import torch
    from safetensors.torch import save_file

    config = json.dumps({"format": "float8_e4m3fn"}).encode()
    tensors = {}
    for name, values in random_weights(shapes):
        tensors[name] = values
        if values.ndim == 2 and BLOCK.match(name):
            layer = name.removesuffix(".weight")
            scale = values.abs().max().float() / E4M3_MAX
            tensors[name] = (values.float() / scale).to(torch.float8_e4m3fn)
            tensors |= {f"{layer}.weight_scale": scale, f"{layer}.input_scale": torch.ones(())}
            tensors[f"{layer}.comfy_quant"] = torch.tensor(list(config), dtype=torch.uint8)
    save_file(tensors, path)


def make_file(make: Callable[[Path, Shapes], None], path: Path, blocks: tuple[int, int]) -> None:
    """Write a Flux.1 with (double, single) blocks."""
    make(path, flux_shapes(*blocks))


# --- Checks, with the safetensors library alone


def check_conversion(original: Path, converted: Path) -> Row:
    """All block layers are FP8, at least 25 dB from the original; nothing else is missing."""
    import torch
    from safetensors.torch import load_file

    before, after = load_file(original), load_file(converted)
    assert before.keys() <= after.keys(), "tensors are missing"
    names = [name for name, values in before.items() if BLOCK.match(name) and values.ndim == 2]
    energy = error = 0.0
    for name in names:
        codes, rows = after[name], before[name][:256].double()
        assert codes.dtype == torch.float8_e4m3fn, f"{name} is {codes.dtype}"
        assert codes.shape == before[name].shape, f"{name} has shape {list(codes.shape)}"
        energy += float(rows.square().sum())
        error += float((rows - codes[:256].double() * after[f"{name}_scale"].double()).square().sum())
    sqnr_db = 10 * math.log10(energy / error)
    assert sqnr_db > 25, f"weights are {sqnr_db:.1f} dB from the original"
    return {"layers": len(names), "weight_sqnr_db": round(sqnr_db, 2)}


def check_calibration(original: Path, calibrated: Path) -> Row:
    """All input scales are finite and positive; all other tensors are byte-identical."""
    import torch
    from safetensors.torch import load_file

    before, after = load_file(original), load_file(calibrated)
    scales = {name: float(values) for name, values in after.items() if name.endswith(".input_scale")}
    for name, values in before.items():
        if name.endswith(".input_scale"):
            assert 0 < scales[name] < math.inf, f"{name} is {scales[name]}"
        elif not name.endswith(".comfy_quant"):
            assert (values.dtype, values.shape) == (after[name].dtype, after[name].shape), f"{name} has another shape"
            one, other = (tensor.reshape(-1).view(torch.uint8) for tensor in (values, after[name]))
            assert torch.equal(one, other), f"{name} has other bytes"
    return {"layers": len(scales), "changed": sum(float(before[name]) != scale for name, scale in scales.items())}


# --- Cases

# New input scales for every FP8 layer. The time is that of the work, after imports.
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


@dataclass(frozen=True)
class Case:
    """Contenders for one job, the first of which the others are compared with.

    Attributes:
        commands: contender -> command line. IN and OUT are the source and the contender's own output, which is a copy
            of the source if IN is not named; "peer" and "ours" are the command lines of the packages, "PEER" the peer's
            interpreter, "PATCH" ours with `PATCH_CODE`.
        check: compares the source with an output.
        fp8: whether the source is FP8.
        rounds: repeats per requested repeat: short jobs need more.
    """

    commands: Mapping[str, str]
    check: Callable[[Path, Path], Row] | None = None
    fp8: bool = False
    rounds: int = 1


CONVERT = (
    "peer -i IN -o OUT --simple --comfy_quant "
    "--exclude-layers ^(img_in|txt_in|time_in|vector_in|guidance_in|final_layer)"
)
PEER_FORMATS = {"int8-convrot": "--int8 --convrot", "nvfp4": "--nvfp4", "mxfp8": "--mxfp8"}
"""Formats that both packages write -> the peer's flags."""

CASES: Mapping[str, Case] = {
    "start-up": Case(
        {"peer --help": "peer --help", "ours --help": "ours --help", "ours --dry-run": "ours -i IN -o OUT --dry-run"},
        rounds=2,
    ),
    "convert": Case(
        {
            "peer --simple": CONVERT,
            "peer --simple --calib_samples 1": f"{CONVERT} --calib_samples 1",
            "ours": "ours -i IN -o OUT",
        },
        check_conversion,
    ),
    **{
        f"convert {name}": Case({"peer": f"{CONVERT} {flags}", "ours": f"ours -i IN -o OUT --format {name}"})
        for name, flags in PEER_FORMATS.items()
    },
    "calibrate": Case(
        {
            "peer": "PEER -m convert_to_quant.calibrate_activation_scales IN -o OUT",
            "ours": "ours -i IN -o OUT --actcal --actcal-engine layer",
        },
        check_calibration,
        fp8=True,
    ),
    "rewrite": Case(
        {"cp": "cp IN OUT", "ours": "PATCH IN OUT", "ours in place": "PATCH OUT OUT"},
        check_calibration,
        fp8=True,
        rounds=3,
    ),
}


class Target(NamedTuple):
    """Maximum of a number: `limit`, or `limit` times that of another contender."""

    case: str
    contender: str
    number: str
    limit: float
    measure: str | None = None


TARGETS = (
    Target("start-up", "ours --help", "seconds", 0.3),
    Target("start-up", "ours --dry-run", "seconds", 0.3),
    Target("convert", "ours", "seconds", 1 / 6, "peer --simple"),
    Target("convert", "ours", "seconds", 1 / 6, "peer --simple --calib_samples 1"),
    Target("convert", "ours", "megabytes", 800),
    *(Target(f"convert {name}", "ours", "megabytes", 800) for name in PEER_FORMATS),
    Target("calibrate", "ours", "seconds", 1 / 4, "peer"),
    Target("calibrate", "ours", "megabytes", 600),
    Target("rewrite", "ours", "seconds", 1.3, "cp"),
    Target("rewrite", "ours in place", "seconds", 0.1),
)


def verdicts(rows: Sequence[Row]) -> Iterator[tuple[str, bool]]:
    """Each target whose rows were measured, and whether it is met."""
    found = {(row["case"], row["contender"], key): row["seconds"]["median"] if key == "seconds" else row[key]
             for row in rows for key in ("seconds", "megabytes")}  # fmt: skip
    for case, contender, number, limit, measure in TARGETS:
        value, base = found.get((case, contender, number)), found.get((case, measure, number)) if measure else 1.0
        if value is not None and base is not None:
            against = f" ({limit:.3g} x {measure})" if measure else ""
            yield (
                f"{case}, {contender}: {value:.3g} {number}, at most {limit * base:.3g}{against}",
                value <= limit * base,
            )


# --- Measuring


def contender_of(name: str, words: Sequence[str], options: argparse.Namespace, source: Path, output: Path) -> Contender:
    """A contender by the words of `Case.commands`; it runs in a folder that contains neither package."""
    peer, ours = options.peer_python, str(options.ours_python)
    stands_for = {
        "IN": [str(source)],
        "OUT": [str(output)],
        "PEER": [str(peer)],
        "peer": [str(peer.parent / "convert_to_quant")],  # its package cannot be run with -m
        "ours": [ours, "-m", "convert_to_quant"],
        "PATCH": [ours, "-c", PATCH_CODE],
    }
    arguments = [each for word in words for each in stands_for.get(word, [word])]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    if ours in arguments:
        environment["PYTHONPATH"] = str(REPOSITORY)

    def prepare() -> None:
        output.unlink(missing_ok=True)
        if "OUT" in words and "IN" not in words:
            shutil.copyfile(source, output)

    def seconds(done: Run) -> float:
        return float(done.output) if "PATCH" in words else done.seconds

    return Contender(name, Command(arguments, output.parent, environment), prepare, seconds)


def measure_case(name: str, source: Path, folder: Path, options: argparse.Namespace) -> Iterator[Row]:
    """Measure and check one case: one row per contender."""
    case = CASES[name]
    outputs = {who: folder / f"{number}.safetensors" for number, who in enumerate(case.commands)}
    chosen = [
        contender_of(who, words.split(), options, source, outputs[who])
        for who, words in case.commands.items()
        if options.only is None or re.search(options.only, who)
    ]

    def progress(line: str) -> None:
        print(f"  {name}: {line}", file=sys.stderr, flush=True)

    for measured in alternate(chosen, options.repeats * case.rounds, progress):
        who = measured.contender.name
        row = {"case": name, "contender": who, "seconds": summary(measured.seconds),
               "megabytes": measured.peak_rss_bytes / 1e6, "command": measured.contender.command.arguments}  # fmt: skip
        if case.check is not None and who != "cp":
            try:
                row["check"] = in_fresh_process(case.check, source, outputs[who])
            except (AssertionError, KeyError) as error:
                row["wrong"] = str(error)
        yield row
    for output in outputs.values():
        output.unlink(missing_ok=True)


def measure_all(options: argparse.Namespace, folder: Path) -> tuple[list[Row], list[str]]:
    """Rows of the cases that ran, and the errors of those that failed."""
    neutral = folder / "neutral"
    neutral.mkdir()
    packages = ("convert_to_quant", "torch", "numpy", "safetensors")
    setting = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "machine": machine(),
        "ours": {**versions(options.ours_python, packages, neutral), "convert_to_quant": our_version()},
        "peer": versions(options.peer_python, packages, neutral),
    }
    touch_memory(folder, 1_000_000_000 if options.small else 8_000_000_000)
    rows: list[Row] = []
    failures: list[str] = []
    for fp8, make, blocks in ((False, make_bfloat16, (1, 3)), (True, make_fp8, (2, 6))):
        names = [name for name in options.cases if CASES[name].fp8 == fp8]
        if names:
            source = folder / "flux.safetensors"
            in_fresh_process(make_file, make, source, (1, 0) if options.small else blocks)
        for name in names:
            try:
                rows += [row | setting for row in measure_case(name, source, neutral, options)]
            except CommandFailedError as error:  # go on with the other cases
                failures.append(f"{name}: {error}")
                print(failures[-1], file=sys.stderr)
    return rows, failures


def ensure_peer(python: Path) -> None:
    """Create the peer's environment if `python` does not exist."""
    if not python.exists():
        folder = python.parent.parent
        print(f"creating an environment for {PEER} in {folder}", file=sys.stderr)
        venv.create(folder, with_pip=True)
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", PEER_TORCH, PEER, *PEER_UNDECLARED], check=True)


@contextlib.contextmanager
def workspace(directory: Path) -> Iterator[Path]:
    """A folder for gigabytes that is always removed; folders of killed runs are removed now."""
    for old in directory.glob(f"{FOLDER_PREFIX}*"):
        if not Path("/proc", old.name.removeprefix(FOLDER_PREFIX).split("-")[0]).exists():
            shutil.rmtree(old, ignore_errors=True)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    with tempfile.TemporaryDirectory(prefix=f"{FOLDER_PREFIX}{os.getpid()}-", dir=directory) as folder:
        yield Path(folder)


def touch_memory(folder: Path, size_bytes: int) -> None:
    """Fill memory once: a virtual machine gets its pages at the first touch, at a tenth of the speed."""
    path, chunk = folder / "touch", bytes(1 << 24)
    with path.open("wb") as file:
        file.writelines(chunk for _ in range(size_bytes // len(chunk)))
    path.unlink()


def our_version() -> str:
    """The commit, with a "+" if files have changed since."""
    git = ["git", "-C", str(REPOSITORY), "describe", "--always", "--dirty=+"]
    return subprocess.run(git, check=False, capture_output=True, text=True).stdout.strip() or "unknown"


def print_table(rows: Sequence[Row]) -> None:
    print(f"{'':42}{'seconds':>10}{'spread':>20}{'x':>7}{'memory':>12}   result")
    first = {row["case"]: row["seconds"]["median"] for row in reversed(rows)}
    for row in rows:
        seconds = row["seconds"]
        spread = f"{seconds['min']:.3g} - {seconds['max']:.3g}"
        result = f"WRONG: {row['wrong']}" if "wrong" in row else str(row.get("check", ""))
        print(
            f"{row['case'] + ': ' + row['contender']:42}{seconds['median']:10.3g}{spread:>20}"
            f"{seconds['median'] / first[row['case']]:7.3f}{row['megabytes']:9,.0f} MB   {result}"
        )


def main() -> int:
    parser = argparse.ArgumentParser(description="Compare with convert-to-quant 1.3.4 from PyPI.")
    parser.add_argument("--peer-python", type=Path, required=True, help="the peer's interpreter; created if missing")
    parser.add_argument("--ours-python", type=Path, default=Path(sys.executable))
    parser.add_argument("--directory", type=Path, default=Path("/dev/shm"), help="folder for files (%(default)s)")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), metavar="CASE", help=", ".join(CASES))
    parser.add_argument("--only", metavar="REGEX", help="contenders to measure, by their names in the table")
    parser.add_argument("--small", action="store_true", help="files of 0.8 GB, to try the benchmark itself")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    options = parser.parse_args()
    options.peer_python, options.ours_python = options.peer_python.absolute(), options.ours_python.absolute()
    ensure_peer(options.peer_python)
    with workspace(options.directory) as folder:
        rows, failures = measure_all(options, folder)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
    print_table(rows)
    missed = failures
    for sentence, met in verdicts(rows):
        print(f"{'met   ' if met else 'MISSED'}  {sentence}")
        missed += [] if met else [sentence]
    return 1 if missed or any("wrong" in row for row in rows if row["contender"].startswith("ours")) else 0


if __name__ == "__main__":
    sys.exit(main())
