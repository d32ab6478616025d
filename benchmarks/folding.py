"""What evening out channels keeps of the picture, and whether LoRAs follow: a table of docs/formats.md.

    python benchmarks/folding.py --model qwen-image.safetensors --device cuda --jobs 7 --json folding.json
    python benchmarks/folding.py --from folding.json --write docs/formats.md

Models, prompts and figures are those of `formats.py`. Per model, as it is and folded (`convert_to_quant.folding`): one
format for all layers, and the mix that `--best` chooses at 8 bits. Modulations are in the format, too.

    exact        the folded model in float32, against the original in float32
    LoRA         a LoRA in float32 on all layers that are quantized, against it on the original: INT8 ConvRot of the
                 merged weights, of the model as it is, and of the folded one with the LoRA folded
    unconverted  the folded model in float32 with that LoRA as it is, as ComfyUI would apply it

The LoRA is random, of rank 8 and a tenth of each weight's norm, and reads channels as the weight does.

Requirement: `exact` is at least 115 dB, INT8 ConvRot of the folded model `AIM` dB, and with the LoRA no more than 1 dB
less than without folding. Exit 1 where they do not hold.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import emoji_models as emoji
import numpy as np
import torch
from fidelity import add_run_arguments, facts, in_processes, machine_of, write_between_markers
from formats import Judge, checkpoint_of, markdown, said, title

from convert_to_quant import best, folding
from convert_to_quant.checkpoint import Entry, write_checkpoint
from convert_to_quant.convert import plan_conversion
from convert_to_quant.engines import denoiser, diffusers
from convert_to_quant.fidelity import sqnr_db
from convert_to_quant.formats import FORMATS
from convert_to_quant.lora import load_lora, match_loras
from convert_to_quant.options import BestOptions, ConvertOptions, RunOptions

TRIED = ("int8-convrot", "fp8", "nvfp4", "w4a8")
BEST = "--best, 8 bits"
CARD = "rtx50"
ROWS = (*TRIED, BEST)
INT8 = "int8-convrot"
AIM, EXACT, LORA_UNDER = 41.0, 115.0, 1.0
AIMED = ("plain", "hot", "spiky", "cold", "wild")
RANK, SHARE = 8, 0.1
SETTINGS = ("as it is", "folded")


def measure(variant: str, device: str, count: int, strength: float, mixes: bool) -> dict[str, dict[str, float]]:
    """Every format with and without folding, in dB, and the seconds that folding took."""
    torch.set_grad_enabled(False)
    torch.set_num_threads(2)
    shown = RunOptions(device=device)
    with checkpoint_of(variant) as original, TemporaryDirectory() as folder:
        layers = {layer.name: layer for layer, _ in plan_conversion(original, ConvertOptions(format="int8")).quantized}
        start = time.perf_counter()
        folded = folding.fold(original, layers, shown, strength)
        found: dict[str, Any] = {"seconds": {"folding": round(time.perf_counter() - start, 1)}}
        paths = Path(folder, "lora.safetensors"), Path(folder, "folded.safetensors")
        write_lora(original, layers, paths[0])
        with load_lora(paths[0]).checkpoint:
            folding.fold_lora(load_lora(paths[0]), folded, paths[1])
        wanted: dict[str, list[torch.Tensor]] = {}
        for setting, checkpoint, path in zip(SETTINGS, (original, folded), paths, strict=True):
            model = denoiser.load(checkpoint, device=device, dtype=torch.float32)
            judge = Judge(model, emoji.GEOMETRY, count)
            kept = found[setting] = {"exact": agreement(wanted.setdefault("plain", judge.wanted), judge.wanted)}
            table = {name: layer for name, layer in model.plan.table.plain.items() if name in layers}
            seen = diffusers.observe(checkpoint, device=device, layers=list(table)).statistics
            scales = best.input_scales(checkpoint, table, seen)
            could = best.candidates(table, scales, [FORMATS[name] for name in best.CANDIDATES])
            of = {(layer, each.format.name): each for layer, some in could.items() for each in some}
            for name in TRIED:
                kept[name] = judge.sqnr_db({layer: of[layer, name] for layer in table if (layer, name) in of})
            if mixes:
                chosen = best.plan_best(checkpoint, ConvertOptions(), BestOptions(bits=8.0, gpu=CARD), shown)
                mix = {layer: of[layer, offer.format] for layer, offer in chosen.choice.items() if offer.format}
                kept[BEST] = judge.sqnr_db(mix)
            lora, wrong = (match_loras([load_lora(each)], model.plan.table.shapes()) for each in (path, paths[0]))
            with model.adapted(lora):
                judge = Judge(model, emoji.GEOMETRY, count)
                judge.wanted = wanted.setdefault("LoRA", judge.wanted)
                kept["LoRA"] = judge.sqnr_db({layer: of[layer, INT8] for layer in table if (layer, INT8) in of})
            with model.adapted(wrong):
                (applied,) = judge.bench.trials([{}], 0)
                kept["unconverted"] = agreement(judge.wanted, applied)
    return found


def agreement(wanted: list[torch.Tensor], found: list[torch.Tensor]) -> float:
    """SQNR in dB; that of float64's zero for what is the same to the bit."""
    every = torch.cat([sqnr_db(v, u) for v, u in zip(wanted, found, strict=True)])
    return float(every.clamp(max=300).mean())


def write_lora(checkpoint: Any, layers: Mapping[str, Any], path: Path) -> None:
    """A random LoRA whose down factors are mixtures of the weights' rows."""
    random = np.random.default_rng(0)
    entries = {}
    for name, layer in layers.items():
        weight_OI = checkpoint.float32(layer.weight.name)
        rows_O = np.linalg.norm(weight_OI, axis=1, keepdims=True)
        mixing_RO = random.standard_normal((RANK, len(weight_OI)), np.float32)
        down_RI = mixing_RO @ (weight_OI / np.maximum(rows_O, 1e-30)) / np.sqrt(len(weight_OI))
        up_OR = rows_O * random.standard_normal((len(weight_OI), RANK), np.float32)
        size = SHARE * np.linalg.norm(weight_OI) / np.linalg.norm(up_OR @ down_RI)
        entries[name + ".lora_A.weight"] = Entry.of(down_RI.astype(np.float32))
        entries[name + ".lora_B.weight"] = Entry.of((size * up_OR).astype(np.float32))
    write_checkpoint(path, entries)


def table_of(result: Mapping[str, Any]) -> str:
    """Formats down, models across; as it is, then folded."""
    models = result["models"]

    def rows() -> Iterator[tuple[str, ...]]:
        for row in (*ROWS, "LoRA", "unconverted", "exact"):
            pairs = [[found[setting].get(row) for setting in SETTINGS] for found in models.values()]
            yield row, *(" / ".join("–" if db is None else f"{db:.1f}" for db in pair) for pair in pairs)

    return markdown(models, "as it is / folded", rows=rows())


def shortfalls(result: Mapping[str, Any]) -> list[str]:
    """Where a requirement is missed."""
    missed = []
    for model, found in result["models"].items():
        plain, folded = (found[setting] for setting in SETTINGS)
        least = {"exact": EXACT, "LoRA": plain["LoRA"] - LORA_UNDER}
        if title(model) in AIMED:
            least[INT8] = AIM
        missed += [f"{title(model)}: {row} {folded[row]:.2f} dB, {db:.2f} were asked for"
                   for row, db in least.items() if folded[row] < db]  # fmt: skip
    return missed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", nargs="*", default=list(emoji.VARIANTS), choices=emoji.VARIANTS)
    parser.add_argument("--model", action="append", default=[], help="a further model, 128 × 128 pixels")
    parser.add_argument("--prompts", type=int, default=16, help="held-out prompts")
    parser.add_argument("--strength", type=float, default=folding.STRENGTH, help="of folding, from 0 to 1")
    parser.add_argument("--no-best", action="store_true", help="leave out the mixes, which take longest")
    add_run_arguments(parser)
    args = parser.parse_args()
    if args.source is not None:
        result = json.loads(args.source.read_text())
    else:
        models = [*args.variants, *args.model]
        found = in_processes(measure, models, args.jobs, args.device, args.prompts, args.strength, not args.no_best)
        result = {"run": facts(args, machine_of(args.device)), "models": found}
    if args.json is not None:
        args.json.write_text(json.dumps(result, indent=1))
    if args.write is not None:
        write_between_markers(args.write, "folding", f"{said(result)}\n\n{table_of(result)}")
    print(table_of(result))
    print({title(name): found["seconds"] for name, found in result["models"].items()})
    missed = shortfalls(result)
    print("\n".join(missed) or "Every requirement holds.")
    return 1 if missed else 0


if __name__ == "__main__":
    raise SystemExit(main())
