"""`convert_to_quant -i IN -o OUT`: convert to another format, calibrate an FP8 checkpoint, or both in one run."""

from __future__ import annotations

import argparse
import shlex
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..engines.devices import find_device
from ..errors import OptionError, StatisticsError
from ..options import BestOptions, CalibrationOptions, ConvertOptions, RunOptions, add_options, offered, options_of
from ..telling import advance
from .calibration import (
    add_calibration_arguments,
    calibrate,
    calibrate_output,
    finish,
    opened,
    say_totals,
)
from .dequantize import write_layout
from .output import note, print_table, progress_bar, say, write_json, wrote
from .running import settle

if TYPE_CHECKING:
    from ..best import Best
    from ..checkpoint import Checkpoint, CheckpointWriter
    from ..convert import ConversionPlan, Decision
    from ..engines.moments import Rounding
    from ..lora import Lora, Survival
    from ..rounding import KeptMoments

DESCRIPTION = "Convert a checkpoint to another number format, calibrate an FP8 checkpoint, or both."
EPILOG = """\
examples:
  convert_to_quant -i flux_bf16.safetensors -o flux_fp8.safetensors --actcal
  convert_to_quant -i fp8.safetensors -o calibrated.safetensors --actcal
  convert_to_quant -i flux_bf16.safetensors --format int8 --dry-run -v

formats:
  fp8, fp8-row, fp8-block, int8, int8-tensor, int8-convrot, convrot-w4a4, mxfp8,
  nvfp4, w4a8, w6a8
"""

FOR_INPUTS = ("actcal",)
FOR_RUNS = ("actcal", "best", "round", "fold")
NEEDS: Mapping[str, Sequence[str]] = {
    **dict.fromkeys(("in-place", "enable-fp8-matmul", "float16-safe", "mark", "actcal-lora"), FOR_INPUTS),
    **{f"actcal-{one.flag}": FOR_INPUTS for one in offered(CalibrationOptions).values()},
    **{f"actcal-{one.flag}": FOR_RUNS for one in offered(RunOptions).values()},
    **{one.flag: ("best",) for one in offered(BestOptions).values()},
    "from": ("best", "round"),
}
"""Options that have no effect without one of others."""

EXCLUDES: Mapping[str, Mapping[str, str]] = {
    "best": dict.fromkeys(
        ("format", "layer-format", "scaling-mode", "weight-scale", "legacy", "actcal"), "--best chooses the formats"
    ),
    "actcal": {"no-input-scale": "--actcal writes input scales"},
    "round": {"merge-lora": "merge first, in 16 bits"},
    "fold": {
        "from": "the statistics are of the model before folding",
        **dict.fromkeys(("merge-lora", "actcal-lora"), "convert the LoRA with convert_to_quant lora fold"),
    },
}
"""Options that cannot be combined, and why."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.usage = "convert_to_quant -i MODEL -o OUT [options]"
    files = parser.add_argument_group("files")
    files.add_argument("-i", "--input", required=True, metavar="MODEL",
                       help="checkpoint, or the index of its shards")  # fmt: skip
    files.add_argument("-o", "--output", metavar="OUT", help="new file, or a new index for shards")
    files.add_argument("--in-place", action="store_true", help="write input scales into MODEL itself")

    calibration = parser.add_argument_group("calibration (input scales)")
    calibration.add_argument("--actcal", action="store_true", help="measure the input scale of every FP8 layer")
    add_calibration_arguments(calibration, "actcal-")
    calibration.add_argument("--enable-fp8-matmul", action="store_true",
                             help="replace a legacy marker that disables FP8")  # fmt: skip

    conversion = parser.add_argument_group("conversion (FP16, BF16 and FP32 weights)")
    add_options(conversion, ConvertOptions)
    conversion.add_argument("--merge-lora", action="append", default=[], metavar="FILE[:STRENGTH]",
                            help="merge a LoRA before quantizing; repeatable")  # fmt: skip
    conversion.add_argument("--fold", action="store_true",
                            help="equalize channels before quantizing")  # fmt: skip
    best = parser.add_argument_group("best mix of formats (found by running the model)")
    best.add_argument("--best", action="store_true", help="choose the best format for each layer")
    add_options(best, BestOptions)
    best.add_argument("--from", dest="statistics", action="append", default=[], metavar="STATS",
                      help="statistics from observe --trials or --moments, instead of a run; repeatable")  # fmt: skip

    layout = conversion.add_mutually_exclusive_group()
    layout.add_argument("--comfy-quant", action="store_true", help="write comfy_quant configs (default)")
    layout.add_argument("--legacy", action="store_true", help="write the legacy scaled_fp8 convention")


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    from ..layers import find_layers
    from ..lora import open_loras

    check_combination(args.in_force)
    with opened(args) as (checkpoint, adapters), open_loras(args.merge_lora) as merged:
        settle_run(args, checkpoint)
        if not args.actcal or args.requantize or not find_layers(checkpoint).diffusion:
            return convert_file(checkpoint, args, adapters, merged)
        converting = {"legacy", *(one.flag for one in offered(ConvertOptions).values())}
        if unused := ", ".join(f"--{flag}" for flag in args.in_force if flag in converting):
            note(f"the input is already quantized and is only calibrated; no effect: {unused}")
        if merged:
            raise OptionError("--merge-lora cannot change weights that are already quantized",
                              hint="merge into the 16-bit original, or add --requantize")  # fmt: skip
        return calibrate_file(checkpoint, args, adapters)


def check_combination(flags: Mapping[str, Any]) -> None:
    """Refuse options that have no effect or contradict each other."""
    for flag in flags:
        needed = NEEDS.get(flag, ())
        if needed and flags.keys().isdisjoint(needed):
            raise OptionError(f"--{flag} needs --{' or --'.join(needed)}")
        for other, reason in EXCLUDES.get(flag, {}).items():
            if other in flags:
                raise OptionError(f"--{flag} and --{other} cannot be combined", hint=reason)


def settle_run(args: argparse.Namespace, checkpoint: Checkpoint) -> None:
    """Choose the device and, if the model runs, its inputs; load second moments of earlier runs."""
    measures = not args.statistics if args.best else args.actcal and args.engine != "layer"
    args.moments = kept_moments(checkpoint, args) if args.round else []
    if args.moments and not (measures or args.fold):
        args.device = str(find_device(args.device))
    else:
        settle(args, checkpoint, runs=measures or args.fold or args.round)


def folded(checkpoint: Checkpoint, args: argparse.Namespace, options: ConvertOptions) -> Checkpoint:
    """The checkpoint with equalized channels; FP8 layers need --actcal, as their inputs change."""
    from dataclasses import replace

    from ..convert import plan_conversion
    from ..folding import fold

    plan = plan_conversion(checkpoint, replace(options, format="int8") if args.best else options)
    if not (args.best or args.actcal or args.no_input_scale) and not all(fmt.dynamic for fmt in plan.formats):
        raise OptionError("--fold changes the inputs of FP8 layers, so --actcal has to measure their scales")
    with progress_bar("folding") as progress:
        found = fold(checkpoint, [layer.name for layer, _ in plan.quantized], options_of(RunOptions, args),
                     progress=progress)  # fmt: skip
    if found is checkpoint:
        note("the channels are already equal, so nothing was folded and LoRAs need no conversion")
    return found


def calibrate_file(checkpoint: Checkpoint, args: argparse.Namespace, adapters: Sequence[Lora]) -> int:
    """Calibrate an FP8 checkpoint."""
    from ..calibrate_activation_scales import plan_in_place, static_table
    from ..migration import plan_migration

    table = static_table(checkpoint)
    if args.mark and any(layer.marking == "none" for layer in table.diffusion.values()):
        layout, done, _ = plan_migration(checkpoint, "comfy", input_scales=True)
        if not args.dry_run:
            finishing = calibrate_output(checkpoint, args, adapters)
            return write_layout(checkpoint, layout, (), done, args, before_commit=finishing)
    if args.in_place:
        # Fails before minutes of work if a scale has no place in the file.
        plan_in_place(checkpoint, table, dict.fromkeys(table.static, 1.0), enable_fp8_matmul=args.enable_fp8_matmul)
    return finish(checkpoint, calibrate(checkpoint, args, adapters), args)


def convert_file(
    checkpoint: Checkpoint, args: argparse.Namespace, adapters: Sequence[Lora], merged: Sequence[Lora]
) -> int:
    """Convert a checkpoint, and calibrate the new file before it is renamed to its final name."""
    from ..calibrate_activation_scales import static_table
    from ..checkpoint import INDEX_SUFFIX
    from ..convert import plan_conversion
    from ..layers import find_layers
    from ..lora import match_checkpoint

    if args.in_place:
        if find_layers(checkpoint).raw:
            static_table(checkpoint)  # explains why a plain cast cannot be calibrated
        raise OptionError("--in-place calibrates FP8 checkpoints only; use -o OUT to convert this one")
    options = options_of(ConvertOptions, args)
    source = folded(checkpoint, args, options) if args.fold else checkpoint
    best = best_mix(source, args, options, merged) if args.best else None
    plan = best.plan if best else plan_conversion(source, options, merged)
    sharded = (args.output or "").endswith(INDEX_SUFFIX)
    calibrated = to_calibrate(source, plan, args, sharded=sharded) if args.actcal else None
    plan, calibrating = calibrated or plan, calibrated is not None
    if adapters:  # fails before the work if one does not fit
        match_checkpoint(adapters, source, plan.table)
    note(*plan.notes)
    if args.verbose or args.dry_run:
        if best:
            print_mix(best, talk=args.json == "-")
        else:
            print_plan(plan, talk=args.json == "-")
    mix = {"best": best.to_json()} if best else {}
    summary = best.summary() if best else plan.summary()
    if args.dry_run:
        write_json(args.json, {**plan_json(plan), **mix})
        would = "" if args.output is None else f"; {wrote(args.output, would=True)}"
        say(f"dry run: {summary}{would}; nothing was written")
        return 0

    output = Path(args.output)
    survival = write_plan(source, plan, args, calibrate_output(source, args, adapters) if calibrating else None)
    if not calibrating:
        write_json(args.json, {**plan_json(plan, survival), **mix})
    say(f"{summary}; {wrote(output)}")
    if survival.delta_energy:
        say(f"merged change after rounding: correlation {survival.correlation:.3f}, {survival.decibels:.1f} dB")
    note(*plan.readers())
    unmeasured = (not fmt.dynamic and layer.input_scale is None for layer, fmt in plan.quantized)
    if not (calibrating or best) and options.input_scale and any(unmeasured):
        how = "-o NEW" if sharded else "--in-place"
        command = f"convert_to_quant -i {shlex.quote(str(output))} --actcal {how}"
        note(f"input scales are not measured, so ComfyUI uses 1.0 (to measure them: {command})")
    say_totals(source, output)
    return 0


def best_mix(checkpoint: Checkpoint, args: argparse.Namespace, options: ConvertOptions, merged: Sequence[Lora]) -> Best:
    """Find the best mix of formats by running the model, or from statistics of earlier runs."""
    from ..best import load_measured, plan_best

    measured = load_measured(*args.statistics) if args.statistics else None
    with progress_bar("measuring") as progress:
        return plan_best(checkpoint, options, options_of(BestOptions, args), options_of(RunOptions, args), measured,
                         loras=merged, progress=progress)  # fmt: skip


def to_calibrate(
    checkpoint: Checkpoint, plan: ConversionPlan, args: argparse.Namespace, *, sharded: bool
) -> ConversionPlan | None:
    """The plan with a place for every input scale to be measured, or None if no layer has one.

    Plain casts and models that cannot be run are refused.
    """
    from dataclasses import replace

    from ..calibrate_activation_scales import refuse_unrunnable, static_table

    if needless := plan.no_input_scales:
        note(f"nothing to calibrate: {needless}")
        return None
    if plan.table.raw and not plan.quantized:
        static_table(checkpoint)  # explains why a plain cast cannot be calibrated
    if args.engine != "layer":
        refuse_unrunnable(checkpoint)
    decisions = [
        replace(each, input_scale=each.input_scale or 1.0)
        if sharded or (each.format is not None and each.format.dynamic)
        else each
        for each in plan.decisions
    ]
    return replace(plan, decisions=decisions)


def print_mix(best: Best, *, talk: bool) -> None:
    """Print each layer's format and the alternatives, then the expected quality of other sizes and formats."""
    document, rows = best.to_json(), []
    for decision in best.plan.decisions:
        name, measured = decision.layer.name, document["layers"].get(decision.layer.name)
        bits = alone = others = ""
        reason = decision.reason
        if measured is not None:
            tried, chosen = measured["tried"], measured["format"]
            others = ", ".join(f"{fmt} {tried[fmt]:.1f}" for fmt in sorted(tried, key=tried.get, reverse=True)
                               if fmt != chosen)  # fmt: skip
            bits = f"{measured['bits']:.2f}"
            if chosen:
                alone, reason = f"{tried[chosen]:.1f} dB", "least damage for its size"
        rows.append((name, becomes(decision), bits, alone, others, reason))
    print_table(("layer", "format", "bits", "SQNR alone", "other formats, dB", "reason"), rows,
                right=(2, 3), optional=(4, 2, 3), talk=talk)  # fmt: skip

    sizes = [
        *(("best mix", *point) for point in best.mixes.curve),
        *((f"all {name}", *point) for name, point in best.mixes.uniform.items()),
        ("this file", best.bits, best.expected_db),
        ("half a bit more", *document["more"]),
    ]
    cells = [(name, f"{bits:.2f}", f"{db:.1f} dB") for name, bits, db in sorted(sizes, key=lambda size: size[1])]
    print_table(("formats", "bits per weight", "expected SQNR on noise"), cells, right=(1, 2), talk=talk)


def becomes(decision: Decision) -> str:
    """The format or dtype of a layer in the new file."""
    return decision.layer.weight.dtype if decision.format is None else decision.format.name


def write_plan(
    checkpoint: Checkpoint,
    plan: ConversionPlan,
    args: argparse.Namespace,
    calibrate_output: Callable[[CheckpointWriter], None] | None = None,
) -> Survival:
    """Convert with a progress bar; return how much of merged adapters survives rounding."""
    from ..convert import convert, surviving
    from ..lora import Survival

    survival = Survival()

    def finish_output(writer: CheckpointWriter) -> None:
        nonlocal survival
        if plan.merged.matched:
            with writer.reopen(checkpoint.path) as written:
                survival = surviving(checkpoint, written, plan)
        if calibrate_output is not None:
            calibrate_output(writer)

    rounding = rounding_of(checkpoint, plan, args) if plan.options.round and plan.quantized else None
    total = sum(info.nbytes for info in checkpoint.tensors.values())
    with progress_bar("converting", unit="bytes") as progress:
        told = advance(progress, total)
        convert(checkpoint, plan, Path(args.output), device=args.device, rounding=rounding, progress=told,
                before_commit=finish_output)  # fmt: skip
    return survival


def kept_moments(checkpoint: Checkpoint, args: argparse.Namespace) -> list[KeptMoments]:
    """The second moments in the files of --from, if all have them; without --best they must."""
    from ..layers import find_layers
    from ..naming import fitting
    from ..rounding import KeptMoments
    from ..stats import Statistics

    found, table = [], find_layers(checkpoint)
    layers = {layer.name: layer for layer in table.linear()}
    for path in args.statistics:
        statistics = Statistics.load(path)
        kept = KeptMoments.of(statistics)
        if kept is not None:
            fitting(statistics, table, {name: layers[name] for name in kept.files if name in layers} or layers)
            found.append(kept)
        elif not args.best:
            raise StatisticsError("the file has no second moments", path=statistics.path,
                                  hint="create it with observe --moments")  # fmt: skip
    return found if len(found) == len(args.statistics) else []


def rounding_of(checkpoint: Checkpoint, plan: ConversionPlan, args: argparse.Namespace) -> Rounding:
    """Rounding of the plan's layers by second moments, from files or by running the model."""
    from ..calibrate_activation_scales import refuse_unrunnable
    from ..engines.moments import Gathering, Rounding, kept_on

    if args.moments:
        return Rounding(checkpoint, kept_on(args.device, args.moments))
    refuse_unrunnable(checkpoint, plan.table, "rounded", "omit --round")
    layers = [layer for layer, _ in plan.quantized]
    return Rounding(checkpoint, Gathering(checkpoint, plan.table, layers, options_of(RunOptions, args)).moments_of)


def print_plan(plan: ConversionPlan, *, talk: bool) -> None:
    """Print each layer and its new format."""
    rows = []
    for decision in plan.decisions:
        layer = decision.layer
        shape = f"{layer.out_features} × {layer.in_features}"
        rows.append((layer.name, shape, layer.weight.dtype, becomes(decision), decision.reason))
    print_table(("layer", "shape", "dtype", "new format", "reason"), rows, optional=(2, 1), talk=talk)


def plan_json(plan: ConversionPlan, survival: Survival | None = None) -> dict[str, Any]:
    """The plan as JSON values, with the survival of merged adapters."""
    merged = {**plan.merged.as_json(), "survival": survival and survival.as_json()}
    return {
        **({"merged": merged} if plan.merged.loras else {}),
        "family": plan.family.name,
        "notes": plan.notes,
        "counts": dict(Counter("quantized" if d.format else "kept" for d in plan.decisions)),
        "layers": [
            {
                "layer": decision.layer.name,
                "shape": list(decision.layer.weight.shape),
                "dtype": decision.layer.weight.dtype,
                "quantize": decision.format is not None,
                "format": decision.format and decision.format.name,
                "reason": decision.reason,
            }
            for decision in plan.decisions
        ],
    }
