"""Image quality by number format and by mix of formats: tables of docs/formats.md and docs/accuracy.md.

    python benchmarks/formats.py --model qwen-image.safetensors --device cuda --jobs 7 --json formats.json
    python benchmarks/formats.py --from formats.json --write docs/accuracy.md --write-formats docs/formats.md

Models: six variants of the emoji model (`emoji_models.py`), and others with `--model` that were trained on the same
images and prompts. Results are the SQNR of the predicted velocity in dB against the original computed in float32, over
prompts that no choice has observed, at every noise level, with guidance. Layers compute as readers do
(`engines.trials.Simulated`, which tests compare with comfy-kitchen).

Per model: one format for all layers, NVFP4 also with the scales of `--weight-scale mse` (four over six); the mixes of
`--best`, which runs the model on noise, at several sizes for three GPUs; and mixes of the same sizes chosen by

    output     least squared error of the layers' own outputs, instead of the velocity's
    weights    least relative error of the weights, which needs no run
    ends       a manual rule: 8 bits for the first and last blocks, fewer in between
    random     chance

Requirement: no mix at 8 bits is more than 0.2 dB below the best single format of the GPU, and `AIMS` hold. Exits with 1
otherwise.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import emoji_models as emoji
import numpy as np
import torch
from fidelity import exit_code, measured, result_of, run_parser, write_between_markers
from measure import table

from convert_to_quant import best
from convert_to_quant.choose import CANDIDATES, Choice, Mixes
from convert_to_quant.emoji import prompts
from convert_to_quant.engines import denoiser, trials
from convert_to_quant.errors import OptionError
from convert_to_quant.families.running import Geometry
from convert_to_quant.fidelity import check_latents, sqnr_db
from convert_to_quant.formats import FORMATS
from convert_to_quant.formats.rotation import rotate
from convert_to_quant.options import BestOptions, ConvertOptions, RunOptions

GPUS = ("any", "rtx40", "rtx50")
BITS = (4.5, 5.0, 5.5, 6.0, 6.5, 7.0, 8.0, 10.0)
COMPARED = ("output", "weights", "ends", "random")
COMPARED_BITS = (5.5, 6.5, 8.0)
AIMS: Mapping[tuple[str, str], float] = {
    ("rtx40", "plain"): 38.5, ("rtx40", "hot"): 35.0, ("rtx40", emoji.OUTLIER_TOKENS): 35.0,
    ("rtx50", "spiky"): 30.3, ("rtx50", "wild"): 30.3,
}  # fmt: skip
"""GPU and model -> dB at 8 bits."""

UNDER_ONE_FORMAT_DB = 0.2
FOUR_OVER_SIX = "nvfp4, four over six"


class Judge:
    """Measures mixes of a model on prompts."""

    def __init__(self, model: denoiser.Denoiser, geometry: Geometry, count: int) -> None:
        latents = check_latents(model, geometry, count, emoji.HELD_OUT_SEED)
        way = list(emoji.guided_way(model, prompts.HELD_OUT[:count], geometry, latents=latents, batch=count))
        moments = [trials.Moment({"prompts": 2 * count}, at.latents, at.sigma, at.conditioning) for at in way]
        self.wanted = [at.velocity for at in way]
        self.bench = trials.Bench(model, geometry, moments)
        self.bench.run()

    def sqnr_db(self, mix: Mapping[str, trials.Candidate]) -> float:
        """Result of layers in formats."""
        return self.judge({name: self.simulated(name, each) for name, each in mix.items()})

    def simulated(self, name: str, candidate: trials.Candidate, method: str = "absmax") -> trials.Simulated:
        """A layer in a format, with scales by one method."""
        weight_OI = self.bench.weight(name)
        return trials.Simulated(weight_OI, candidate, candidate.format.quantized(weight_OI, method))

    def judge(self, simulated: Mapping[str, trials.Simulated]) -> float:
        """Result of layers that are already quantized."""
        (found,) = self.bench.trials([{name: each.product for name, each in simulated.items()}], 0)
        return float(torch.cat([sqnr_db(v, u) for v, u in zip(self.wanted, found, strict=True)]).mean())


def measure(variant: str, device: str, geometry: Geometry, count: int) -> dict[str, Any]:
    """Every format and every mix, and the time it took."""
    with emoji.checkpoint_of(variant) as checkpoint:
        model = denoiser.load(checkpoint, device=device, dtype=torch.float32)
        judge = Judge(model, geometry, count)
        found: dict[str, Any] = {"uniform": {}, "best": {}, "compared": {}, "seconds": {}}
        for gpu in GPUS:
            start = time.perf_counter()
            options = BestOptions(bits=8.0, gpu=gpu)
            chosen = best.plan_best(checkpoint, ConvertOptions(), options, RunOptions(device=device))
            found["seconds"][gpu] = round(time.perf_counter() - start, 1)
            layers = {name: chosen.plan.table.plain[name] for name in chosen.mixes.weights}
            formats = [FORMATS[name] for name in CANDIDATES]
            could = best.candidates(layers, best.input_scales(checkpoint, layers, chosen.statistics), formats)
            of = {(name, each.format.name): each for name, some in could.items() for each in some}

            def judged(choice: Choice, of: Any = of, mixes: Mixes = chosen.mixes) -> float:
                return judge.sqnr_db({name: of[name, fmt] for name, fmt in mixes.by_layer(choice).items() if fmt})

            if not found["uniform"]:
                for name in CANDIDATES:
                    mix = {layer: of[layer, name] for layer in layers if (layer, name) in of}
                    found["uniform"][name] = judge.sqnr_db(mix)
                    if name == "nvfp4":
                        made = {layer: judge.simulated(layer, each, "mse") for layer, each in mix.items()}
                        found["uniform"][FOUR_OVER_SIX] = judge.judge(made)
            found["best"][gpu] = curve(chosen.mixes, judged, BITS)
            if gpu == "rtx40":
                for way, mixes in others(checkpoint, chosen, layers).items():
                    found["compared"][way] = curve(mixes, judged, COMPARED_BITS)
        return found


def curve(mixes: Mixes, judged: Any, sizes: Sequence[float]) -> dict[str, Any]:
    """Bits per weight -> dB on prompts, dB expected on noise, and the mix."""
    found: dict[str, Any] = {}
    for bits in sizes:
        try:
            choice = mixes.choose_bits(bits)
        except OptionError:  # not even the smallest formats fit
            continue
        counts: dict[str, int] = {}
        for fmt in mixes.by_layer(choice).values():
            counts[fmt] = counts.get(fmt, 0) + 1
        found[f"{bits:g}"] = {
            "sqnr_db": judged(choice), "counts": counts,
            **dict(zip(("bits", "expected_db"), mixes.point(choice), strict=True)),
        }  # fmt: skip
    return found


def others(checkpoint: Any, chosen: best.Best, layers: Mapping[str, Any]) -> dict[str, Mixes]:
    """The same mixes, with other estimates of damage."""
    tried, random, mixes = chosen.trials, np.random.default_rng(0), chosen.mixes
    damage = {way: np.where(np.isfinite(mixes.damage[:1]), 0.0, np.inf) for way in COMPARED}
    for row, (name, layer) in enumerate(layers.items()):
        weight = torch.from_numpy(checkpoint.float32(layer.weight.name))
        end = min(row, len(layers) - 1 - row) / len(layers)
        for place in np.flatnonzero(np.isfinite(mixes.damage[0, row, :-1])).tolist():
            fmt = FORMATS[mixes.formats[place]]
            made = trials.Simulated(weight, trials.Candidate(fmt))
            error = (made.levels.float() * made.scale - rotate(weight, made.group)).square().sum()
            error /= weight.square().sum()
            output = tried.error[tried.layers.index(name), tried.formats.index(fmt.name)].mean()
            # The fewer bits, the worse, and the worse the nearer to an end.
            judged = {"output": float(output), "weights": float(error), "random": float(random.random()),
                      "ends": 4.0**-fmt.bits * (1 + 1e3 * (end < 0.15)) * layer.weight.elements}  # fmt: skip
            for way, value in judged.items():
                damage[way][0, row, place] = value
    return {way: replace(mixes, damage=each, expected=each) for way, each in damage.items()}


def markdown(models: Mapping[str, Any], *columns: str, rows: Iterator[tuple[str, ...]]) -> str:
    """A table of some columns and one for each model."""
    return table([*columns, *map(title, models)], rows)


def uniform_table(result: Mapping[str, Any]) -> str:
    """Formats down, models across."""
    models = result["models"]

    def rows() -> Iterator[tuple[str, ...]]:
        for name in next(iter(models.values()))["uniform"]:
            fmt = FORMATS[name.partition(",")[0]]
            yield name, f"{fmt.bits:g}", fmt.cards, *(f"{found['uniform'][name]:.1f}" for found in models.values())

    return markdown(models, "format", "bits", "GPUs", rows=rows())


def best_table(result: Mapping[str, Any]) -> str:
    """GPUs and sizes down, models across: on prompts, and as expected from noise."""
    models = result["models"]

    def rows() -> Iterator[tuple[str, ...]]:
        for gpu, bits in product(GPUS, BITS):
            points = [found["best"][gpu].get(f"{bits:g}") for found in models.values()]
            cells = ("–" if p is None else f"{p['sqnr_db']:.1f} ({p['expected_db']:.1f})" for p in points)
            yield gpu, f"{bits:g}", *cells

    return markdown(models, "GPU", "bits", rows=rows())


def compared_table(result: Mapping[str, Any]) -> str:
    """Ways to choose down, models across."""
    models = result["models"]

    def rows() -> Iterator[tuple[str, ...]]:
        for bits, way in product(COMPARED_BITS, ("damage", *COMPARED)):
            curves = (f["best"]["rtx40"] if way == "damage" else f["compared"][way] for f in models.values())
            points = [points.get(f"{bits:g}") for points in curves]
            cells = ("–" if point is None else f"{point['sqnr_db']:.1f}" for point in points)
            yield f"**{way}**" if way == "damage" else way, f"{bits:g}", *cells

    return markdown(models, "chosen by", "bits", rows=rows())


def title(model: str) -> str:
    """Name of a model, for people."""
    return Path(model).stem


def shortfalls(result: Mapping[str, Any]) -> list[str]:
    """Missed requirements."""
    missed = []
    for model, found in result["models"].items():
        for gpu in GPUS:
            point = found["best"][gpu].get("8")
            got = -np.inf if point is None else point["sqnr_db"]
            taken = [name for name in best.CANDIDATES if gpu in FORMATS[name].native and FORMATS[name].bits <= 8]
            single = max(found["uniform"][name] for name in taken)
            wanted = max(single - UNDER_ONE_FORMAT_DB, AIMS.get((gpu, title(model)), -np.inf))
            if got < wanted:
                missed.append(f"{title(model)}, {gpu}, 8 bits: {got:.2f} dB, required {wanted:.2f}")
    return missed


def main() -> int:
    parser = run_parser(__doc__, 16)
    parser.add_argument("--model", action="append", default=[], help="a further model, 128 × 128 pixels")
    parser.add_argument("--write-formats", type=Path, help="write the table of formats into this document")
    args = parser.parse_args()
    given = (args.device, emoji.GEOMETRY, args.prompts)
    result = result_of(args, "models", measure, [*args.variants, *args.model], *given)
    for name, made in (("best", best_table), ("chosen", compared_table)):
        write_between_markers(args.write, name, f"{measured(result)}\n\n{made(result)}")
    write_between_markers(args.write_formats, "kept", f"{measured(result)}\n\n{uniform_table(result)}")
    print(uniform_table(result), best_table(result), compared_table(result), sep="\n\n")
    print({title(name): found["seconds"] for name, found in result["models"].items()})
    return exit_code(shortfalls(result))


if __name__ == "__main__":
    raise SystemExit(main())
