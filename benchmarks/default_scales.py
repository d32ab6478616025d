"""Image quality with default input scales, on real prompts and by `check`, over models and seeds.

    python benchmarks/default_scales.py --model tiny-qwen-image.safetensors --height 128 --width 128 --device cuda

Models: six variants of the emoji model (`emoji_models.py`), and others with `--model` that were trained on the same
images and prompts (`emoji.prompts`), all of one size. Per model, the SQNR of the velocity in dB with

    1.0         as in most files
    dynamic     per tensor; no file can request this from ComfyUI
    before      the default until 2026-11-26: absmax of 8 images × 8 noise levels, without headroom
    default     `--actcal`, for each seed

on prompts that no method has observed, and on the noise of `check`.

Requirement: with every model and seed the default is at most 0.2 dB below 1.0, if 1.0 clips nothing on the prompts, and
on average over seeds at most 0.3 dB below dynamic scales. Exits with 1 otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import emoji_models as emoji
from emoji_models import Choice, Models, choice_of
from fidelity import exit_code, measured, result_of, run_parser, write_between_markers
from measure import table as markdown

from convert_to_quant.emoji import prompts
from convert_to_quant.engines import diffusers
from convert_to_quant.families.running import Geometry
from convert_to_quant.fidelity import noise_scenes, scenes_fidelity
from convert_to_quant.options import RunOptions, SolveOptions

UNDER_ONE_DB, UNDER_DYNAMIC_DB = 0.2, 0.3
CHECKED_IMAGES = 8
ROWS = {"one": "1.0", "dynamic": "dynamic per tensor", "before": "before", "default": "**default**"}


def before(models: Models, seed: int) -> Choice:
    """The default until 2026-11-26."""
    seen = diffusers.observe(
        models.checkpoint, models.table, RunOptions(samples=8, steps=8, seed=seed, device="cpu")
    ).statistics
    return choice_of(models.solve(seen, SolveOptions(margin=1.0)))


def measure(variant: str, device: str, seeds: Sequence[int], geometry: Geometry, count: int) -> dict[str, Any]:
    """Every method on one model: dB on prompts and by `check`, by seed."""
    with emoji.models(variant, device, emoji.GEOMETRY if variant in emoji.VARIANTS else geometry) as models:
        scenes = noise_scenes(models.reference, models.geometry, CHECKED_IMAGES)
        choices = {
            "one": [Choice({})],
            "dynamic": [Choice({}, arithmetic="dynamic_tensor")],
            "before": [before(models, seed) for seed in seeds],
            "default": [choice_of(models.calibrated(seed=seed)) for seed in seeds],
        }
        found: dict[str, Any] = {"clips_one": bool((models.seen_on().absmax > 448).any())}
        for key, several in choices.items():
            found[key] = {
                "prompts": [models.fidelity(choice, emoji.HELD_OUT_PROMPTS[:count]).sqnr_db for choice in several]
            }
            if key != "dynamic":
                checked = scenes_fidelity(models.reference, models.set(several[0]), scenes)
                found[key] |= {"checked": [checked.sqnr_db], "checked_worst": [checked.worst_db]}
        return found


def table(result: Mapping[str, Any], column: str) -> str:
    """Methods down, models across: mean over seeds, and the minimum in brackets if seeds differ."""
    models = result["models"]
    dbs = {title: [found[key].get(column, []) for found in models.values()] for key, title in ROWS.items()}
    rows = ((title, *map(_cell, some)) for title, some in dbs.items() if any(some))
    return markdown(("input_scale from", *(Path(name).stem for name in models)), rows)


def _cell(figures: list[float]) -> str:
    mean, least = sum(figures) / len(figures), min(figures)
    return f"{mean:.2f}" + (f" ({least:.2f})" if mean - least > 0.05 else "")


def failures(result: Mapping[str, Any]) -> list[str]:
    """Missed requirements."""
    missed = []
    for name, found in result["models"].items():
        default, (one,), (dynamic,) = (found[key]["prompts"] for key in ("default", "one", "dynamic"))
        if not found["clips_one"] and min(default) < one - UNDER_ONE_DB:
            missed.append(f"{name}: {min(default):.2f} dB with one seed, {one:.2f} with 1.0")
        if sum(default) / len(default) < dynamic - UNDER_DYNAMIC_DB:
            missed.append(f"{name}: {sum(default) / len(default):.2f} dB, {dynamic:.2f} with dynamic scales")
    return missed


def report(result: Mapping[str, Any]) -> str:
    """The generated part of the document."""
    seeds = f"; mean over {len(result['seeds'])} seeds of the calibration's noise, the minimum in brackets"
    return (
        f"{measured(result, seeds)}\n\n{table(result, 'prompts')}\n\n"
        f"The files of the first seed by `check`, on noise: mean over levels, sizes and samples,\n\n"
        f"{table(result, 'checked')}\n\nand the worst sample at the worst level:\n\n{table(result, 'checked_worst')}"
    )


def main() -> int:
    parser = run_parser(__doc__, 24)
    parser.add_argument("--model", nargs="*", default=[], help="further models")
    parser.add_argument("--height", type=int, default=128, help="of the further models' images, in pixels")
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 1, 2, 3])
    args = parser.parse_args()
    geometry = Geometry(args.height // 16, args.width // 16, 1, prompts.TOKENS)
    given = (args.device, args.seeds, geometry, args.prompts)
    result = result_of(args, "models", measure, [*args.variants, *args.model], *given, seeds=args.seeds)
    write_between_markers(args.write, "default", report(result))
    print(report(result))
    return exit_code(failures(result))


if __name__ == "__main__":
    raise SystemExit(main())
