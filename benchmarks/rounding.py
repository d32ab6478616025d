"""Image quality by rounding with second moments of inputs, and by folding: a table of docs/rounding.md.

    python benchmarks/rounding.py --model qwen-image.safetensors --device cuda --jobs 7 --json rounding.json
    python benchmarks/rounding.py --from rounding.json --write docs/rounding.md

Models, prompts and results (SQNR of the velocity in dB against the original in float32, with layers computing as
readers do) are those of `formats.py`. Moments and ranges come from noise. Per model, every layer in one format, and the
mixes of `--best` for an RTX 50:

    nearest             each weight to nearest
    rounded             `--round`
    rounded on prompts  the same with moments of 32 other prompts, each also with an empty prompt, as under guidance:
                        `observe --moments --conditioning`
    folded              `--fold`: channels equalized first, then to nearest
    folded and rounded  `--fold --round`

and a random LoRA on INT8 ConvRot, of rank 8 and a tenth of each weight's norm, whose down factors mix the weight's
rows:

    LoRA         on the original model, and on the folded one with the LoRA folded (rows "nearest" and "folded")
    unconverted  the folded model in float32 with the original LoRA, as ComfyUI would apply it
    exact        the folded model in float32 without a LoRA, against the original

Requirement: `AIMS` hold; rounding is at most 0.1 dB below nearest; a LoRA on a folded file is at most 1 dB below one on
a file that is not folded. Exits with 1 otherwise.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import emoji_models as emoji
import numpy as np
import torch
from fidelity import exit_code, measured, result_of, run_parser, write_between_markers
from formats import Judge, markdown, title

from convert_to_quant import best, folding
from convert_to_quant.checkpoint import Checkpoint, Entry, write_checkpoint
from convert_to_quant.engines import denoiser, diffusers, moments
from convert_to_quant.engines.prompts import Prompts
from convert_to_quant.engines.trials import Simulated
from convert_to_quant.errors import OptionError
from convert_to_quant.fidelity import sqnr_db
from convert_to_quant.formats import FORMATS
from convert_to_quant.lora import load_lora, match_loras
from convert_to_quant.options import BestOptions, ConvertOptions, RunOptions

WAYS = ("nearest", "rounded", "folded", "folded and rounded")
ON_PROMPTS = "rounded on prompts"
BITS = (4.5, 5.0, 5.5, 6.5, 8.0)
GPU = "rtx50"
INT8 = "int8-convrot"
ALL_AIMED = ("plain", "hot", "spiky", "cold", "wild")
AIMS: Mapping[tuple[str, str], Mapping[str, float]] = {
    ("w4a8", "rounded"): {"plain": 27.5},
    ("nvfp4", "rounded"): {"plain": 20.0},
    (INT8, "rounded"): {"plain": 39.0},
    ("fp8", "rounded"): {"plain": 30.8},
    ("best, 5 bits", "rounded"): {"plain": 30.5},
    (INT8, "folded"): dict.fromkeys(ALL_AIMED, 41.0),
    ("best, 8 bits", "folded and rounded"): dict.fromkeys((*ALL_AIMED, emoji.OUTLIER_TOKENS), 41.5),
}
"""Row and column -> dB by model."""

EXACT, LORA_UNDER, TOLERANCE_DB = 115.0, 1.0, 0.1
RANK, SHARE = 8, 0.1


def measure(variant: str, shown: RunOptions, count: int, formats: list[str], mixes: bool) -> dict[str, Any]:
    """Every row of the table in dB, and the time and memory it took."""
    device, begun = shown.device, time.perf_counter()
    with emoji.checkpoint_of(variant) as original, TemporaryDirectory() as folder:
        plan = best.plan_any(original)
        layers = {layer.name: layer for layer, _ in plan.quantized}
        folded = folding.fold(original, layers, shown)
        lora, converted = (Path(folder, f"{name}.safetensors") for name in ("lora", "converted"))
        write_lora(original, layers, lora)
        if folded is not original:
            folding.fold_lora(load_lora(lora), folded, converted)
        pairs = {"nearest": (original, lora), "folded": (folded, converted)}
        rows: dict[str, dict[str, float]] = {}
        wanted: dict[str, list[torch.Tensor]] = {}
        for way, (checkpoint, adapter) in pairs.items():
            if way == "folded" and folded is original:  # its channels are even
                for row in rows.values():
                    row |= {WAYS[WAYS.index(known) + 2]: db for known, db in row.items() if known in WAYS}
                break
            model = denoiser.load(checkpoint, device=device, dtype=torch.float32)
            layers = {name: model.plan.table.plain[name] for name in layers}
            judge = Judge(model, emoji.GEOMETRY, count)
            rows.setdefault("exact", {})[way] = agreement(wanted.setdefault("plain", judge.wanted), judge.wanted)
            judge.wanted = wanted["plain"]
            seen = diffusers.observe(checkpoint, plan.table, shown, dtype=torch.float32, layers=layers).statistics
            scales = best.input_scales(checkpoint, layers, seen)
            could = best.candidates(layers, scales, [FORMATS[name] for name in best.CANDIDATES])
            of = {(layer, each.format.name): each for layer, some in could.items() for each in some}
            gather = partial(moments.Gathering, checkpoint, model.plan.table, list(layers.values()), shown)
            gatherings = {WAYS[WAYS.index(way) + 1]: gather()}
            if way == "nearest":
                words = emoji.conditioning(model, emoji.CALIBRATION_PROMPTS)
                gatherings[ON_PROMPTS] = gather(prompts=Prompts(emoji.with_nothing(words)))
            wholes = {name: {layer: name for layer in layers if (layer, name) in of} for name in formats}
            wholes |= best_mixes(checkpoint, shown) if mixes else {}
            for name, mix in wholes.items():
                row = rows.setdefault(name, {})
                row[way] = judge.sqnr_db({layer: of[layer, fmt] for layer, fmt in mix.items()})
                for how, gathering in gatherings.items():
                    rounding = moments.Rounding(checkpoint, gathering.moments_of)
                    row[how] = judge.judge({
                        layer: Simulated(judge.bench.weight(layer), of[layer, fmt],
                                         on(device, rounding(layers[layer], FORMATS[fmt])))
                        for layer, fmt in mix.items()
                    })  # fmt: skip
            fits, wrong = (match_loras([load_lora(path)], model.plan.table.shapes()) for path in (adapter, lora))
            with model.adapted(fits):
                judge = Judge(model, emoji.GEOMETRY, count)
                judge.wanted = wanted.setdefault("LoRA", judge.wanted)
                mix = {layer: of[layer, INT8] for layer in layers if (layer, INT8) in of}
                rows.setdefault("LoRA", {})[way] = judge.sqnr_db(mix)
            with model.adapted(wrong):
                (applied,) = judge.bench.trials([{}], 0)
                rows.setdefault("unconverted", {})[way] = agreement(judge.wanted, applied)
        return {"rows": rows, "seconds": round(time.perf_counter() - begun), "memory_bytes": memory_bytes(device)}


def best_mixes(checkpoint: Checkpoint, shown: RunOptions) -> dict[str, dict[str, str]]:
    """The mixes of `--best`, as formats by layer."""
    chosen = best.plan_best(checkpoint, ConvertOptions(), BestOptions(gpu=GPU), shown)
    found = {}
    for bits in BITS:
        with suppress(OptionError):  # not even the smallest formats fit
            choice = chosen.mixes.choose_bits(bits)
            found[f"best, {bits:g} bits"] = {name: fmt for name, fmt in chosen.mixes.by_layer(choice).items() if fmt}
    return found


def on(device: str, parts: Mapping[str, torch.Tensor] | None) -> dict[str, torch.Tensor] | None:
    """The stored parts of a weight, on the device; None for rounding to nearest."""
    return parts and {suffix: part.to(device) for suffix, part in parts.items()}


def agreement(wanted: list[torch.Tensor], found: list[torch.Tensor]) -> float:
    """SQNR in dB; 300 if bit-identical."""
    every = torch.cat([sqnr_db(v, u) for v, u in zip(wanted, found, strict=True)])
    return float(every.clamp(max=300).mean())


def write_lora(checkpoint: Checkpoint, layers: Iterable[str], path: Path) -> None:
    """Write a random LoRA whose down factors are mixtures of the weights' rows."""
    random = np.random.default_rng(0)
    entries = {}
    for name in layers:
        weight_OI = checkpoint.float32(name + ".weight")
        rows_O = np.linalg.norm(weight_OI, axis=1, keepdims=True)
        mixing_RO = random.standard_normal((RANK, len(weight_OI)), np.float32)
        down_RI = mixing_RO @ (weight_OI / np.maximum(rows_O, 1e-30)) / np.sqrt(len(weight_OI))
        up_OR = rows_O * random.standard_normal((len(weight_OI), RANK), np.float32)
        size = SHARE * np.linalg.norm(weight_OI) / np.linalg.norm(up_OR @ down_RI)
        entries[name + ".lora_A.weight"] = Entry.of(down_RI.astype(np.float32))
        entries[name + ".lora_B.weight"] = Entry.of((size * up_OR).astype(np.float32))
    write_checkpoint(path, entries)


def memory_bytes(device: str) -> int:
    """Peak memory of this process on the device."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def table(result: Mapping[str, Any]) -> str:
    """Formats and rounding down, models across."""
    models = result["models"]

    def rows() -> Iterator[tuple[str, ...]]:
        for name, ways in next(iter(models.values()))["rows"].items():
            for way in ways:
                dbs = [found["rows"].get(name, {}).get(way) for found in models.values()]
                yield name, way, *("–" if db is None else "same" if db >= 300 else f"{db:.1f}" for db in dbs)

    return markdown(models, "format", "rounding", rows=rows())


def shortfalls(result: Mapping[str, Any]) -> list[str]:
    """Missed requirements."""
    missed = []
    for model, found in result["models"].items():
        rows = found["rows"]
        least = {("exact", "folded"): EXACT, ("LoRA", "folded"): rows["LoRA"]["nearest"] - LORA_UNDER}
        for name, row in rows.items():
            if "rounded" in row:
                least[name, "rounded"] = row["nearest"] - TOLERANCE_DB
        least |= {where: aims[title(model)] for where, aims in AIMS.items() if title(model) in aims}
        missed += [
            f"{title(model)}, {name}, {way}: {rows[name][way]:.2f} dB, required {db:.2f}"
            for (name, way), db in least.items()
            if rows.get(name, {}).get(way, db) < db
        ]
    return missed


def main() -> int:
    parser = run_parser(__doc__, 16)
    parser.add_argument("--model", action="append", default=[], help="a further model, 128 × 128 pixels")
    parser.add_argument("--formats", nargs="*", default=list(best.CANDIDATES), choices=best.CANDIDATES)
    parser.add_argument("--samples", type=int, help="images for ranges, moments and trials")
    parser.add_argument("--no-mixes", action="store_true", help="leave out the mixes")
    args = parser.parse_args()
    given = (RunOptions(device=args.device, samples=args.samples), args.prompts, args.formats, not args.no_mixes)
    result = result_of(args, "models", measure, [*args.variants, *args.model], *given)
    write_between_markers(args.write, "rounding", f"{measured(result)}\n\n{table(result)}")
    print(table(result))
    for model, found in result["models"].items():
        print(f"{title(model)}: {found['seconds']} s, {found['memory_bytes'] / 1e9:.1f} GB")
    return exit_code(shortfalls(result))


if __name__ == "__main__":
    raise SystemExit(main())
