"""`convert_to_quant -i IN -o OUT`: convert to another format, calibrate an FP8 checkpoint, or both in one run."""

from __future__ import annotations

import argparse
import shlex
from collections import Counter
from collections.abc import Callable, Sequence
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
    check_target,
    finish,
    note_damage,
    note_ending,
    recover_input,
    require_target,
    say_totals,
)
from .dequantize import write_layout
from .output import note, print_table, progress_bar, say, write_json, wrote
from .running import check_device, settle, settle_at_rest
from .shared import check_shards

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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's flags."""
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
    from ..checkpoint import open_checkpoint
    from ..layers import find_layers
    from ..lora import open_loras

    check_flags(args)
    require_target(args)
    if args.actcal:
        options_of(CalibrationOptions, args)  # says what is out of range
    check_device(args.device)
    recover_input(args)
    with (
        open_checkpoint(args.input) as checkpoint,
        open_loras(args.lora) as adapters,
        open_loras(args.merge_lora) as merged,
    ):
        check_shards(checkpoint, args)
        note_damage(checkpoint)
        settle_run(args, checkpoint)
        if not args.actcal or args.requantize or not find_layers(checkpoint).diffusion:
            return convert_file(checkpoint, args, adapters, merged)
        converting = {"legacy", *(one.flag for one in offered(ConvertOptions).values())}
        if unused := ", ".join(f"--{flag}" for flag in args.in_force if flag in converting):
            note(f"the input is quantized already, so nothing is converted and {unused} does nothing")
        if merged:
            raise OptionError("--merge-lora changes weights, and the input is quantized already",
                              hint="merge into the original in 16 bits, or add --requantize")  # fmt: skip
        return calibrate_file(checkpoint, args, adapters)


def check_flags(args: argparse.Namespace) -> None:
    """Refuse flags that contradict each other or do nothing.

    Raises:
        OptionError: they do.
    """
    folds_loras = args.fold and (args.merge_lora or args.lora)
    rules = (
        (args.in_place and not args.actcal, "--in-place needs --actcal: only scales can be written in place", None),
        (args.enable_fp8_matmul and not args.actcal,
         "--enable-fp8-matmul needs --actcal: without input scales FP8 products would use 1.0", None),
        (args.float16_safe and not args.actcal,
         "--float16-safe needs --actcal: it is about the input scales that --actcal finds", None),
        (args.actcal and args.no_input_scale, "--no-input-scale leaves out what --actcal is asked to find", None),
        (args.merge_lora and args.round, "--merge-lora and --round cannot be combined", None),
        (args.fold and args.statistics, "--fold changes what --from was observed of: the model as it is",
         "leave out --from"),
        (folds_loras, "--fold takes no LoRA", "convert, then make LoRAs fit with convert_to_quant lora fold"),
    )  # fmt: skip
    for wrong, problem, hint in rules:
        if wrong:
            raise OptionError(problem, hint=hint)
    mixing = {one.flag for one in offered(BestOptions).values()}
    showing = {f"actcal-{one.flag}" for one in offered(RunOptions).values()}
    for flag in args.in_force:
        if flag in mixing and not args.best:
            raise OptionError(f"--{flag} needs --best")
        if flag == "from" and not (args.best or args.round):
            raise OptionError("--from needs --best or --round")
        if args.best and flag in ("actcal", "format", "layer-format", "scaling-mode", "legacy", "weight-scale"):
            raise OptionError(f"--{flag} and --best both say what layers become; give one")
        if args.best and flag.startswith("actcal-") and flag not in showing:
            raise OptionError(f"--{flag} is for --actcal, and --best would not use it")
        if flag.startswith("actcal-") and not (args.actcal or args.best or args.round or args.fold):
            raise OptionError(f"--{flag} needs --actcal")


def settle_run(args: argparse.Namespace, checkpoint: Checkpoint) -> None:
    """Decide whether the model runs, where, and what it is shown; and find the moments that need no run."""
    measures = not args.statistics if args.best else args.actcal and args.engine != "layer"
    args.moments = kept_moments(checkpoint, args) if args.round else []
    if measures or args.fold or (args.round and not args.moments):
        settle(args, checkpoint)
    elif args.round:
        args.device = str(find_device(args.device))
    else:
        settle_at_rest(args)


def folded(checkpoint: Checkpoint, args: argparse.Namespace, options: ConvertOptions) -> Checkpoint:
    """The file with its channels evened out.

    Raises:
        OptionError: FP8 layers would keep input scales of what they received before.
    """
    from dataclasses import replace

    from ..convert import plan_conversion
    from ..folding import fold

    plan = plan_conversion(checkpoint, replace(options, format="int8") if args.best else options)
    if not (args.best or args.actcal or args.no_input_scale) and not all(fmt.dynamic for fmt in plan.formats):
        problem = "--fold changes what FP8 layers receive, so their input scales have to be measured"
        raise OptionError(problem, hint="add --actcal")
    with progress_bar("folding") as progress:
        found = fold(checkpoint, [layer.name for layer, _ in plan.quantized], options_of(RunOptions, args),
                     progress=progress)  # fmt: skip
    if found is checkpoint:
        note("its channels are even already, so nothing is folded, and LoRAs fit it as they are")
    return found


def calibrate_file(checkpoint: Checkpoint, args: argparse.Namespace, adapters: Sequence[Lora]) -> int:
    """Calibrate a file that is FP8 already."""
    from ..calibrate_activation_scales import plan_in_place, static_table
    from ..migration import plan_migration

    check_target(checkpoint, args)
    table = static_table(checkpoint)
    if args.mark and any(layer.marking == "none" for layer in table.diffusion.values()):
        layout, done, _ = plan_migration(checkpoint, "comfy", input_scales=True)
        if not args.dry_run:
            finishing = calibrate_output(checkpoint, args, adapters)
            return write_layout(checkpoint, layout, (), done, args, before_commit=finishing)
    if args.in_place:
        # Whether every scale has a place shows before minutes of work as well as after.
        plan_in_place(checkpoint, table, dict.fromkeys(table.static, 1.0), enable_fp8_matmul=args.enable_fp8_matmul)
    return finish(checkpoint, calibrate(checkpoint, args, adapters), args)


def convert_file(
    checkpoint: Checkpoint, args: argparse.Namespace, adapters: Sequence[Lora], merged: Sequence[Lora]
) -> int:
    """Convert a file in high precision, and calibrate it before it gets its name."""
    from ..calibrate_activation_scales import static_table
    from ..checkpoint import INDEX_SUFFIX
    from ..convert import plan_conversion
    from ..layers import find_layers
    from ..lora import match_checkpoint

    if args.in_place:
        if find_layers(checkpoint).raw:
            static_table(checkpoint)  # says why a plain cast cannot be calibrated
        raise OptionError("--in-place calibrates a model that is FP8 already, and this one is not; use -o OUT")
    options = options_of(ConvertOptions, args)
    source = folded(checkpoint, args, options) if args.fold else checkpoint
    best = best_mix(source, args, options, merged) if args.best else None
    plan = plan_conversion(source, options, merged) if best is None else best.plan
    sharded = (args.output or "").endswith(INDEX_SUFFIX)
    calibrated = to_calibrate(source, plan, args, sharded=sharded) if args.actcal else None
    plan, calibrating = calibrated or plan, calibrated is not None
    if adapters:  # an adapter that does not fit shows before the work as well as after
        match_checkpoint(adapters, source, plan.table)
    note(*plan.told())
    if args.verbose or args.dry_run:
        if best is None:
            print_plan(plan, talk=args.json == "-")
        else:
            print_mix(best, talk=args.json == "-")
    mix = {} if best is None else {"best": best.to_json()}
    summary = plan.summary() if best is None else best.summary()
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
        figures = f"correlation {survival.correlation:.3f}, {survival.decibels:.1f} dB"
        say(f"what rounding leaves of the merged change: {figures}")
    note_ending(output)
    note(*plan.readers())
    unmeasured = (not fmt.dynamic and layer.input_scale is None for layer, fmt in plan.quantized)
    if not (calibrating or best) and options.input_scale and any(unmeasured):
        how = "-o NEW" if sharded else "--in-place"
        there = f"convert_to_quant -i {shlex.quote(str(output))} --actcal {how}"
        note(f"its input scales are not measured, and ComfyUI takes 1.0 for them ({there} measures them)")
    say_totals(source, output)
    return 0


def best_mix(checkpoint: Checkpoint, args: argparse.Namespace, options: ConvertOptions, merged: Sequence[Lora]) -> Best:
    """Find the best mix of formats, by running the model or by what earlier runs measured."""
    from ..best import load_measured, plan_best

    measured = load_measured(*args.statistics) if args.statistics else None
    with progress_bar("measuring") as progress:
        return plan_best(checkpoint, options, options_of(BestOptions, args), options_of(RunOptions, args), measured,
                         loras=merged, progress=progress)  # fmt: skip


def to_calibrate(
    checkpoint: Checkpoint, plan: ConversionPlan, args: argparse.Namespace, *, sharded: bool
) -> ConversionPlan | None:
    """A plan with places for the scales that a calibration finds, where no room is left; None where it finds none.

    Raises:
        CheckpointError: there is nothing to calibrate.
        UnsupportedModelError: the model cannot be run.
    """
    from dataclasses import replace

    from ..calibrate_activation_scales import refuse_unrunnable, static_table

    if needless := plan.no_input_scales:
        note(f"nothing to calibrate: {needless}")
        return None
    if plan.table.raw and not plan.quantized:
        static_table(checkpoint)  # says why a plain cast cannot be calibrated either
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
    """Every layer, what becomes of it, and what it alone keeps of the velocity in this format and in the others.

    Then what other sizes would keep, and what one format for all layers would.
    """
    figures, rows = best.to_json(), []
    for decision in best.plan.decisions:
        name, told = decision.layer.name, figures["layers"].get(decision.layer.name)
        if told is None:
            rows.append((name, becomes(decision), "", "", "", decision.reason))
            continue
        tried, chosen = told["tried"], told["format"]
        best_first = sorted(tried, key=tried.get, reverse=True)
        others = ", ".join(f"{fmt} {tried[fmt]:.1f}" for fmt in best_first if fmt != chosen)
        alone = f"{tried[chosen]:.1f} dB" if chosen else ""
        why = "least damage for its size" if chosen else decision.reason
        rows.append((name, becomes(decision), f"{told['bits']:.2f}", alone, others, why))
    head = ("layer", "format", "bits", "alone keeps", "others, dB", "why")
    print_table(head, rows, right=(2, 3), optional=(4, 2, 3), talk=talk)

    sizes = [("best mix", *point) for point in best.mixes.curve]
    sizes += [(f"all {name}", *point) for name, point in best.mixes.uniform.items()]
    sizes += [("this file", best.bits, best.expected_db), ("half a bit more", *figures["more"])]
    cells = [(name, f"{bits:.2f}", f"{db:.1f} dB") for name, bits, db in sorted(sizes, key=lambda size: size[1])]
    print_table(("formats", "bits per weight", "expected on noise"), cells, right=(1, 2), talk=talk)


def becomes(decision: Decision) -> str:
    """What a layer is stored in afterwards."""
    return decision.layer.weight.dtype if decision.format is None else decision.format.name


def write_plan(
    checkpoint: Checkpoint,
    plan: ConversionPlan,
    args: argparse.Namespace,
    calibrate_output: Callable[[CheckpointWriter], None] | None = None,
) -> Survival:
    """Convert with a progress bar; what rounding leaves of adapters that are merged."""
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
    """The second moments that earlier runs of this model kept, if all of --from did.

    Raises:
        StatisticsError: they are of another model; or there are none, and nothing else to use of --from.
    """
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
            problem = "it holds no second moments"
            raise StatisticsError(problem, path=statistics.path, hint="make it with observe --moments")
    return found if len(found) == len(args.statistics) else []


def rounding_of(checkpoint: Checkpoint, plan: ConversionPlan, args: argparse.Namespace) -> Rounding:
    """What rounds the layers of a plan: by what was kept, or by running the model."""
    from ..calibrate_activation_scales import refuse_unrunnable
    from ..engines.moments import Gathering, Rounding, kept_on

    if args.moments:
        return Rounding(checkpoint, kept_on(args.device, args.moments))
    refuse_unrunnable(checkpoint, plan.table, "run to be rounded", "leave --round out")
    layers = [layer for layer, _ in plan.quantized]
    return Rounding(checkpoint, Gathering(checkpoint, plan.table, layers, options_of(RunOptions, args)).moments_of)


def print_plan(plan: ConversionPlan, *, talk: bool) -> None:
    """Every layer and what becomes of it; see `print_table`."""
    rows = []
    for decision in plan.decisions:
        layer = decision.layer
        shape = f"{layer.out_features} × {layer.in_features}"
        rows.append((layer.name, shape, layer.weight.dtype, becomes(decision), decision.reason))
    print_table(("layer", "shape", "dtype", "becomes", "why"), rows, optional=(2, 1), talk=talk)


def plan_json(plan: ConversionPlan, survival: Survival | None = None) -> dict[str, Any]:
    """The plan as JSON values, with what is left of merged adapters."""
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
