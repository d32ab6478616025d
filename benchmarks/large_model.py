"""Time and GPU memory of `--best` and `--round` on a model of Flux.1's size.

    python benchmarks/large_model.py --device cuda --round w4a8 --json large_model.json

The model has Flux.1's 12 billion weights, random, in bfloat16, in memory (/dev/shm). It is observed, tried in every
format of the GPU, and written as the best mix of 8 bits per weight. With `--round FORMAT` it is instead run and rounded
to one format, like `--format FORMAT --round`.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from against_peer import flux_shapes, make_bfloat16
from fidelity import machine_of

from convert_to_quant import best
from convert_to_quant.checkpoint import open_checkpoint
from convert_to_quant.convert import convert, plan_conversion
from convert_to_quant.engines import diffusers, moments
from convert_to_quant.layers import Layer
from convert_to_quant.options import BestOptions, ConvertOptions, RunOptions


def best_mix(source: Path, output: Path, device: str, gpu: str) -> dict[str, Any]:
    """`--best` at 8 bits: seconds of its steps, and the mix."""
    start = time.perf_counter()
    with open_checkpoint(source) as checkpoint:
        options, shown = BestOptions(gpu=gpu), RunOptions(device=device)
        plan = best.plan_any(checkpoint)
        layers = {layer.name: layer for layer, _ in plan.quantized}
        statistics = diffusers.observe(checkpoint, plan.table, shown, layers=list(layers)).statistics
        seen = time.perf_counter()
        solved = best.input_scales(checkpoint, layers, statistics)
        model = best.TrialModel(checkpoint, plan, shown)
        tried = model.try_formats(best.candidates(layers, solved, best.formats_for(options)))
        measured = time.perf_counter()
        chosen = best.plan_best(checkpoint, ConvertOptions(), options, shown, (statistics, tried))
        ready = time.perf_counter()
        kept_db = model.measured_db(best.candidates_of(chosen.plan))
        del model
        checked = time.perf_counter()
        convert(checkpoint, chosen.plan, output, device=device)
        end = time.perf_counter()
    steps = {"observe": seen - start, "trials": measured - seen, "choose": ready - measured,
             "measure the mix": checked - ready, "write": end - checked}  # fmt: skip
    return {"seconds": steps, "layers": len(chosen.choice), "weights": chosen.mixes.elements,
            "measured_db": kept_db, "counts": chosen.counts(), "bits": chosen.bits}  # fmt: skip


def rounded(source: Path, output: Path, device: str, fmt: str) -> dict[str, Any]:
    """`--format FORMAT --round`: seconds of its steps."""
    start, running = time.perf_counter(), 0.0
    with open_checkpoint(source) as checkpoint:
        plan = plan_conversion(checkpoint, ConvertOptions(format=fmt))
        layers = [layer for layer, _ in plan.quantized]
        gathering = moments.Gathering(checkpoint, plan.table, layers, RunOptions(device=device))
        loaded = time.perf_counter()

        def moments_of(layer: Layer) -> torch.Tensor | None:
            nonlocal running
            before = time.perf_counter()
            found = gathering.moments_of(layer)
            if device != "cpu":
                torch.cuda.synchronize()
            running += time.perf_counter() - before
            return found

        convert(checkpoint, plan, output, device=device, rounding=moments.Rounding(checkpoint, moments_of))
        end = time.perf_counter()
    steps = {"load": loaded - start, "gather moments": running, "round and write": end - loaded - running}
    return {"seconds": steps, "layers": len(layers), "bands": len(gathering.bands)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--gpu", default="rtx40", help="GPU for `--best`")
    parser.add_argument("--round", metavar="FORMAT", help="round to this format, instead of `--best`")
    parser.add_argument("--blocks", type=int, nargs=2, default=(19, 38), help="double and single blocks")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with TemporaryDirectory(dir="/dev/shm") as folder:
        source, output = Path(folder, "bf16.safetensors"), Path(folder, "output.safetensors")
        make_bfloat16(source, flux_shapes(*args.blocks))
        result = {"machine": machine_of(args.device)}
        if args.round:
            result |= rounded(source, output, args.device, args.round)
        else:
            result |= best_mix(source, output, args.device, args.gpu)
        result["seconds"]["all"] = sum(result["seconds"].values())
        result["gpu_gib"] = torch.cuda.max_memory_allocated() / 2**30 if args.device != "cpu" else None
        result["file_bytes"] = output.stat().st_size
    print(json.dumps(result, indent=1))
    if args.json is not None:
        args.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
