"""What `--best` takes on a model of Flux.1's size: time of every step, and memory of the GPU.

    python benchmarks/best_large.py --device cuda --json best_large.json

The model has Flux.1's 12 billion weights, random, in bfloat16, in memory (/dev/shm). It is observed, tried in every
format that the card multiplies, and written as the best mix of 8 bits per weight.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from against_peer import flux_shapes, make_bfloat16
from fidelity import machine_of

from convert_to_quant import best
from convert_to_quant.checkpoint import open_checkpoint
from convert_to_quant.convert import convert, plan_conversion
from convert_to_quant.engines import diffusers
from convert_to_quant.options import BestOptions, ConvertOptions, RunOptions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--gpu", default="rtx40")
    parser.add_argument("--blocks", type=int, nargs=2, default=(19, 38), help="double and single blocks")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    seconds: dict[str, float] = {}
    with TemporaryDirectory(dir="/dev/shm") as folder:
        source, output = Path(folder, "bf16.safetensors"), Path(folder, "best.safetensors")
        make_bfloat16(source, flux_shapes(*args.blocks))
        start = time.perf_counter()
        with open_checkpoint(source) as checkpoint:
            options, shown = BestOptions(gpu=args.gpu), RunOptions(device=args.device)
            plan = plan_conversion(checkpoint, ConvertOptions(format="int8"))
            layers = {layer.name: layer for layer, _ in plan.quantized}
            statistics = diffusers.observe_shown(checkpoint, plan.table, shown, layers=list(layers))
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
            convert(checkpoint, chosen.plan, output, device=args.device)
            end = time.perf_counter()
        seconds = {
            "observe": seen - start, "trials": measured - seen, "choose": ready - measured,
            "measure the mix": checked - ready, "write": end - checked,
            "all": end - start,
        }  # fmt: skip
        result = {
            "machine": machine_of(args.device), "seconds": seconds, "layers": len(chosen.choice),
            "weights": chosen.mixes.elements, "measured_db": kept_db, "counts": chosen.counts(), "bits": chosen.bits,
            "gpu_gib": torch.cuda.max_memory_allocated() / 2**30 if args.device != "cpu" else None,
            "file_bytes": output.stat().st_size,
        }  # fmt: skip
    print(json.dumps(result, indent=1))
    if args.json is not None:
        args.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
