"""Image quality by each way of choosing input scales: the table of docs/accuracy.md.

    python benchmarks/fidelity.py --json fidelity.json --observers modelopt.json llmcompressor.json
    python benchmarks/fidelity.py --from fidelity.json --write docs/accuracy.md

Measures every method on six variants of the emoji model (`emoji_models.py`). Every linear layer of every block has FP8
weights and FP8 inputs, unless a method keeps it in full precision. Results are the SQNR of the predicted velocity in dB
against the same weights in BF16 computed in float32 (`convert_to_quant.fidelity`), over prompts that no method has
observed, at every noise level, with guidance, and standard errors over prompts. All methods get the same prompts and
states, so differences are more precise than single results.

Requirement: on every variant, the default of `--actcal` is at most 0.3 dB below dynamic scales per tensor. Exits with 1
otherwise.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import emoji_models as emoji
import numpy as np
import torch
from emoji_models import Choice, Models, choice_of
from measure import table as markdown

from convert_to_quant import __version__
from convert_to_quant.checkpoint import Checkpoint
from convert_to_quant.engines.layer import generator, percentile_of
from convert_to_quant.formats import DEFAULT_GRID
from convert_to_quant.layers import dequantize, find_layers
from convert_to_quant.options import SolveOptions

TOLERANCE_DB = 0.3
SCALES_ONLY: Mapping[str, Any] = {"one_row_full_precision": False, "row_loss_limit": 1.0}
"""Options of `solve` that keep every layer in FP8."""

WEIGHTS_ONLY, DYNAMIC, OURS = "weights_only", "dynamic_tensor", "noise"

METHODS: Mapping[str, str] = {
    WEIGHTS_ONLY: "*FP8 weights, 16-bit inputs: the upper limit*",
    DYNAMIC: "dynamic per tensor",
    "dynamic_row": "dynamic per token",
    "one": "1.0",
    "absmax": "absmax",
    "absmax_2": "absmax × 2",
    "absmax_8": "absmax × 8",
    "percentile_99.99": "percentile 99.99",
    "percentile_99.9": "percentile 99.9",
    "modelopt_max": "ModelOpt 0.47, max",
    "llmcompressor_static_minmax": "llm-compressor 0.14, static_minmax",
    "llmcompressor_mse": "llm-compressor 0.14, mse",
    "output": "range of the layer's output, from weights (hand-off)",
    "layer": "simulated from weights (our layer engine)",
    "noise_scales": "ours, noise, without full precision",
    "prompts": "ours, prompts",
    OURS: "**ours, noise: the default**",
}
"""Key in the JSON -> name in the table, in the table's order."""

SEES: Mapping[str, str] = {
    "one": "nothing", "output": "weights", "layer": "weights", "noise_scales": "noise", OURS: "noise",
    DYNAMIC: "each input", "dynamic_row": "each input", WEIGHTS_ONLY: "",
}  # fmt: skip
"""What a method observes; the others observe real prompts."""


def choices(models: Models, observers: Mapping[str, Any]) -> dict[str, Callable[[], Choice]]:
    """How each method sets the layers of a model."""
    prompts = models.seen_on()
    noise = models.calibrated()

    def solved(**options: Any) -> Callable[[], Choice]:
        return lambda: choice_of(models.solve(prompts, SolveOptions(**options)))

    table: dict[str, Callable[[], Choice]] = {
        WEIGHTS_ONLY: lambda: Choice({}, frozenset(models.present)),
        DYNAMIC: lambda: Choice({}, arithmetic="dynamic_tensor"),
        "dynamic_row": lambda: Choice({}, arithmetic="dynamic_row"),
        "one": lambda: Choice({}),
        "absmax": solved(**SCALES_ONLY),
        "absmax_2": solved(margin=2.0, **SCALES_ONLY),
        "absmax_8": solved(margin=8.0, **SCALES_ONLY),
        "percentile_99.99": solved(method="percentile", percentile=99.99, **SCALES_ONLY),
        "percentile_99.9": solved(method="percentile", percentile=99.9, **SCALES_ONLY),
        "output": lambda: Choice(dict(_output_ranges(models.checkpoint))),
        "layer": lambda: choice_of(models.calibrated(engine="layer")),
        "noise_scales": lambda: choice_of(noise, full_precision=False),
        "prompts": solved(),
        OURS: lambda: choice_of(noise),
    }
    for key, by_variant in observers.items():
        if models.variant in by_variant:
            table[key] = lambda scales=by_variant[models.variant]: Choice(scales)  # type: ignore[misc]
    return table


def _output_ranges(checkpoint: Checkpoint) -> Iterator[tuple[str, float]]:
    """The hand-off's literal formula as scales: the 99.9th percentile of |X·Wᵀ| for 64 normal rows X, / 448."""
    for name, layer in find_layers(checkpoint).diffusion.items():
        unit_RI = generator(42, name).standard_normal((64, layer.in_features), dtype=np.float32)
        outputs = np.abs(unit_RI @ dequantize(checkpoint, layer, slice(None)).T)
        yield name, percentile_of(outputs, 99.9) / DEFAULT_GRID.max


def measure(
    variant: str, device: str, observers: Mapping[str, Any], wanted: Sequence[str], count: int
) -> dict[str, Any]:
    """Fidelity of every method on one variant."""
    found: dict[str, Any] = {}
    with emoji.models(variant, device) as models:
        total = sum(out * into for out, into in (state.shape for state in models.present.values()))
        for key, make in choices(models, observers).items():
            if key not in wanted:
                continue
            start = time.perf_counter()
            choice = make()
            result = models.fidelity(choice, emoji.HELD_OUT_PROMPTS[:count])
            found[key] = {
                **result.to_json(),
                "full_precision": sorted(choice.full_precision),
                "full_precision_weights": sum(
                    models.present[n].shape[0] * models.present[n].shape[1] for n in choice.full_precision
                ) / total,
                "scales": dict(choice.scales),
                "seconds": round(time.perf_counter() - start, 1),
            }  # fmt: skip
    return found


def load_observers(paths: list[Path]) -> dict[str, Any]:
    """Scales of other tools: method key -> variant -> layer -> scale."""
    found: dict[str, dict[str, Any]] = {}
    for path in paths:
        file = json.loads(path.read_text())
        for variant, methods in file["variants"].items():
            for method, scales in methods.items():
                found.setdefault(f"{file['tool'].removeprefix('nvidia-')}_{method}", {})[variant] = scales
    return found


def table(result: Mapping[str, Any]) -> str:
    """Methods down, variants across."""
    rows = []
    for key, title in METHODS.items():
        cells = [_cell(found.get(key)) for found in result["variants"].values()]
        if any(cells):
            rows.append((title, SEES.get(key, "real prompts"), *cells))
    return markdown(("input_scale from", "observes", *result["variants"]), rows)


def _cell(found: Mapping[str, Any] | None) -> str:
    return "" if found is None else f"{found['sqnr_db']:.2f} ± {found['standard_error_db']:.2f}"


def report(result: Mapping[str, Any]) -> str:
    """The generated part of the document."""
    return f"{measured(result, ', ± standard error over prompts')}\n\n{table(result)}\n\n{verdict(result)[0]}"


def measured(result: Mapping[str, Any], more: str = "") -> str:
    """How the results of a run were measured."""
    run = result["run"]
    return (
        f"SQNR of the velocity in dB over {run['prompts']} prompts at {run['levels']} noise levels{more}. "
        f"{run['date']}, {run['machine']}; Python {run['python']}, torch {run['torch']}. `{run['command']}`"
    )


def verdict(result: Mapping[str, Any]) -> tuple[str, bool]:
    """The default against dynamic scales per tensor, and whether it meets the requirement."""
    gaps = {
        variant: found[OURS]["sqnr_db"] - found[DYNAMIC]["sqnr_db"]
        for variant, found in result["variants"].items()
        if OURS in found and DYNAMIC in found
    }
    text = ", ".join(f"{variant} {gap:+.2f}" for variant, gap in gaps.items())
    return f"The default minus dynamic per tensor, in dB: {text}.", all(gap >= -TOLERANCE_DB for gap in gaps.values())


def write_between_markers(path: Path | None, name: str, text: str) -> None:
    """Write generated text between `<!-- name -->` and `<!-- /name -->` of a document, if one is named."""
    if path is None:
        return
    document = path.read_text(encoding="utf-8")
    pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
    if not pattern.search(document):
        raise SystemExit(f"{path} has no <!-- {name} --> ... <!-- /{name} -->")
    path.write_text(pattern.sub(lambda found: f"{found[1]}{text}\n{found[2]}", document), encoding="utf-8")


def machine_of(device: str) -> str:
    """The hardware, for people."""
    if device != "cpu":
        return f"one {torch.cuda.get_device_name()}"
    return f"{len(os.sched_getaffinity(0))} cores of {platform.machine()}"


def run_parser(doc: str | None, prompts: int) -> argparse.ArgumentParser:
    """Options of a benchmark over variants."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", nargs="*", default=list(emoji.VARIANTS), choices=emoji.VARIANTS)
    parser.add_argument("--prompts", type=int, default=prompts, help="held-out prompts")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--jobs", type=int, default=1, help="variants in parallel")
    parser.add_argument("--json", type=Path, help="write all results to this file")
    parser.add_argument("--from", dest="source", type=Path, help="use the JSON of an earlier run")
    parser.add_argument("--write", type=Path, help="write the tables into this document")
    return parser


def prepare_process() -> None:
    """Settings of each process that measures."""
    torch.set_grad_enabled(False)
    torch.set_num_threads(2)


def exit_code(missed: Sequence[str]) -> int:
    """Print the missed requirements; 1 if there are any."""
    print("\n".join(missed) or "All requirements hold.")
    return 1 if missed else 0


def result_of(
    args: argparse.Namespace, key: str, work: Callable[..., Any], names: Sequence[str], *arguments: Any, **more: Any
) -> dict[str, Any]:
    """Results of an earlier run (`--from`), or of a new one with each model in its own process; saved with `--json`.

    Args:
        args: of `run_parser`.
        key: entry of the results by model.
        work: measures a model, from its name and `arguments`.
        names: of the models.
        *arguments: of `work`.
        **more: further entries.
    """
    if args.source is not None:
        result: dict[str, Any] = json.loads(args.source.read_text())
    else:
        with ProcessPoolExecutor(args.jobs, get_context("spawn"), prepare_process) as pool:
            futures = {name: pool.submit(work, name, *arguments) for name in names}
            found = {name: future.result() for name, future in futures.items()}
        facts = {
            "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
            "command": "python " + " ".join(Path(word).name if word.startswith("/") else word for word in sys.argv),
            "machine": machine_of(args.device),
            "version": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "prompts": args.prompts,
            "levels": emoji.LEVELS,
        }
        result = {"run": facts, **more, key: found}
    if args.json is not None:
        args.json.write_text(json.dumps(result, indent=1))
    return result


def main() -> int:
    parser = run_parser(__doc__, len(emoji.HELD_OUT_PROMPTS))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--observers", type=Path, nargs="*", default=[], help="files of observers.py")
    args = parser.parse_args()
    observers = load_observers(args.observers)
    result = result_of(args, "variants", measure, args.variants, args.device, observers, args.methods, args.prompts)
    write_between_markers(args.write, "fidelity", report(result))
    text, holds = verdict(result)
    print(table(result))
    print(text, "Within the limit." if holds else f"MORE THAN {TOLERANCE_DB} dB BELOW.")
    return 0 if holds else 1


if __name__ == "__main__":
    raise SystemExit(main())
