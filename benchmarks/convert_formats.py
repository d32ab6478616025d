"""Time of converting to each format, relative to a floor: reading every weight and writing as many bytes.

The floor uses the same process, threads and writer, and alternates with each format:

    on the CPU    reads each weight, computes its `torch.aminmax`, and writes as many bytes as its codes and scales.
    on a GPU      copies each weight to the GPU, copies as many bytes back, and writes them. Computes nothing.

The model has Flux.1's layers (`against_peer.flux_shapes`) with random values, in memory (/dev/shm), in any size.
Imports and the first use of the GPU are not timed. Files are always removed.

    python benchmarks/convert_formats.py --gigabytes 1.7
    python benchmarks/convert_formats.py --gigabytes 24 --device cuda --json convert_cuda.json

Prints one line of JSON per format: seconds, the floor's seconds, the median ratio, and the peak resident memory of a
process that only converts.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from against_peer import flux_shapes, make_bfloat16, our_version, touch_memory, workspace
from measure import in_fresh_process, machine

from convert_to_quant import convert as conversion
from convert_to_quant import quantize
from convert_to_quant.checkpoint import Checkpoint, Spec, open_checkpoint
from convert_to_quant.formats import WRITTEN
from convert_to_quant.formats.record import Format, spans
from convert_to_quant.layers import Layer
from convert_to_quant.layout import Sink
from convert_to_quant.names import WEIGHT
from convert_to_quant.options import ConvertOptions

BLOCK_BYTES = 0.7e9, 0.3e9
"""Of a double and a single block in bfloat16."""

BASE = {"fp8-row": "row", "fp8-block": "block"}


def shapes_of(size_bytes: float) -> dict[str, tuple[int, ...]]:
    """Flux.1 of about this size, with two single blocks per double block."""
    double = max(1, round(size_bytes / (BLOCK_BYTES[0] + 2 * BLOCK_BYTES[1])))
    return flux_shapes(double, max(0, round((size_bytes - double * BLOCK_BYTES[0]) / BLOCK_BYTES[1])))


def floor(
    checkpoint: Checkpoint,
    layer: Layer,
    fmt: Format,
    options: ConvertOptions,
    sink: Sink,
    *,
    device: torch.device | None = None,
) -> None:
    """Replaces `quantize_weight`: everything but the arithmetic."""
    stored = {suffix: Spec(*spec).nbytes for suffix, spec in fmt.storage(layer.shape, options.block_size).items()}
    if device is None:
        raw = checkpoint.raw(layer.weight.name)
        for span in spans(len(raw), 1 << 19):
            torch.aminmax(torch.from_numpy(raw[span]).view(torch.bfloat16))
    else:
        weight = quantize.on_device(checkpoint, layer, device).view(torch.uint8).reshape(-1)
        torch.cuda.current_stream(device).synchronize() if device.type == "cuda" else None
    for suffix, size in stored.items():
        for span in spans(size, 1 << 23):
            part = slice(span.start, span.stop) if suffix == WEIGHT else slice(0, span.stop - span.start)
            data = raw[part] if device is None else quantize.bytes_of(weight[part])
            sink(suffix, data, span.start)


def seconds_of(source: Path, output: Path, name: str, device: str, quantize: Any) -> float:
    """One conversion."""
    options = ConvertOptions(format="fp8" if name in BASE else name, scaling_mode=BASE.get(name, "tensor"))
    output.unlink(missing_ok=True)
    conversion.quantize_weight = quantize
    with open_checkpoint(source) as checkpoint:
        plan = conversion.plan_conversion(checkpoint, options)
        started = time.perf_counter()
        conversion.convert(checkpoint, plan, output, device=device)
        return time.perf_counter() - started


def peak_bytes(source: Path, output: Path, name: str, device: str) -> int:
    """Peak resident memory of a process that only converts."""
    seconds_of(source, output, name, device, conversion.quantize_weight)
    lines = Path("/proc/self/status").read_text().splitlines()  # getrusage includes the parent's
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def main() -> None:
    parser = argparse.ArgumentParser(description="Time conversions to every format against reading and writing.")
    parser.add_argument("--gigabytes", type=float, default=1.7)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--formats", nargs="+", default=[*WRITTEN[:1], *BASE, *WRITTEN[1:]], metavar="NAME")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--directory", type=Path, default=Path("/dev/shm"))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    setting = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "machine": machine(),
        "card": torch.cuda.get_device_name(args.device) if args.device.startswith("cuda") else None,
        "versions": {"convert_to_quant": our_version(), "torch": torch.__version__, "numpy": np.__version__},
    }
    ours, rows = conversion.quantize_weight, []
    with workspace(args.directory) as folder:
        source, output = folder / "in.safetensors", folder / "out.safetensors"
        touch_memory(folder, int(args.gigabytes * 2e9))
        in_fresh_process(make_bfloat16, source, shapes_of(args.gigabytes * 1e9))
        for name in dict.fromkeys(args.formats):
            seconds_of(source, output, name, args.device, ours)  # warm
            times: dict[Any, list[float]] = {floor: [], ours: []}
            for turn in range(args.repeats):
                for which in (floor, ours) if turn % 2 == 0 else (ours, floor):
                    times[which].append(seconds_of(source, output, name, args.device, which))
            row = {
                "format": name,
                "bytes": source.stat().st_size,
                "seconds": round(statistics.median(times[ours]), 3),
                "floor_seconds": round(statistics.median(times[floor]), 3),
                "ratio": round(statistics.median(a / b for a, b in zip(times[ours], times[floor], strict=True)), 2),
                "peak_rss_bytes": in_fresh_process(peak_bytes, source, output, name, args.device),
            }
            rows.append(row | setting)
            print(json.dumps(row), flush=True)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
