"""`convert_to_quant check REFERENCE QUANTIZED`: how close a quantized model stays to its original."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from itertools import cycle, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import CalibrationError, OptionError
from ..options import SAMPLES
from ..telling import plural
from .output import decibels, error, note, print_table, progress_bar, say, write_json, wrote
from .running import add_running_arguments, check_running_options, embeddings_of, geometry_of, settle
from .shared import read_prompts
from .terminal import Styled

if TYPE_CHECKING:
    from torch import Tensor

    from ..checkpoint import Checkpoint
    from ..engines.denoiser import Denoiser
    from ..engines.prompts import Prompts
    from ..fidelity import Fidelity, Scene

ARITHMETICS = ("comfyui", "comfyui-divide", "dequantize", "dynamic-tensor", "dynamic-row")
SEED = 43
"""Calibration never uses this noise, nor that of any other seed (`fidelity.noise_scenes`)."""

WORST_LAYERS = 20
EXACT = Styled("exact", "good")
MEANINGS = (
    (25.0, "the same image, details differ on close inspection"),
    (15.0, "the same image, with small changes"),
    (6.5, "the subject is there, the image is damaged"),
    (float("-inf"), "ruin"),
)
"""Least mean SQNR in dB -> what images look like: docs/concepts.md, with limits between the rows of its table."""

DOUBTFUL_DB = 20.0
"""Below this mean, the file probably has a problem."""

BELOW = 1
"""Exit code for a model below --at-least."""

ARITHMETIC_WORDS = """\
arithmetics of quantized layers:
  comfyui         ComfyUI on a CPU: inputs are divided in their own dtype
  comfyui-divide  ComfyUI's CUDA kernels: inputs are divided in float32
  dequantize      only weights are quantized
  dynamic-tensor  one input scale per call
  dynamic-row     one input scale per token
"""

DESCRIPTION = """\
Run a reference and a quantized model side by side. Reports the SQNR of the predicted velocity in dB per noise level (30
is good, 10 is ruin) and the PSNR of the final latents. Without prompts, both run on noise that calibration never uses,
at two sizes: the given one and a quarter of its tokens."""
EPILOG = """\
examples:
  convert_to_quant check bf16.safetensors fp8.safetensors --device cuda
  convert_to_quant check bf16.safetensors fp8.safetensors --at-least 25 --layers
  convert_to_quant check bf16.safetensors fp8.safetensors \\
      --pipeline FLUX.1-dev --prompts prompts.txt

"""
EPILOG += ARITHMETIC_WORDS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("reference", metavar="REFERENCE", help="the original model")
    parser.add_argument("quantized", metavar="QUANTIZED", help="the same model, quantized")
    wanted = parser.add_argument_group("report")
    wanted.add_argument("--layers", action="store_true", help=f"list the {WORST_LAYERS} worst layers (-v: all)")
    wanted.add_argument("--at-least", type=float, metavar="DB", help=f"exit code {BELOW} if the mean SQNR is lower")
    add_comparing_arguments(parser, wanted)


def add_comparing_arguments(parser: argparse.ArgumentParser, wanted: Any, **defaults: Any) -> None:
    """Add the options of a comparison: arithmetic and guidance to the group `wanted`, and the models' input."""
    wanted.add_argument("--arithmetic", choices=ARITHMETICS, default=ARITHMETICS[0], metavar="WHICH",
                        help="how layers compute; see below (comfyui)")  # fmt: skip
    wanted.add_argument("--guidance", type=float, default=1.0, metavar="G",
                        help="classifier-free guidance scale; 1 is off (1)")  # fmt: skip
    shown = add_running_arguments(parser, SEED, several=True, **defaults)
    shown.add_argument("--pipeline", metavar="DIR", help="diffusers pipeline that embeds the prompts")
    shown.add_argument("--prompts", metavar="FILE", help="text file with one prompt per line")
    shown.add_argument("--save-conditioning", metavar="FILE", help="save the embeddings for --conditioning")


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    check_options(args)
    found = measure(args)
    write_json(args.json, found.to_json())
    if args.json != "-":
        print_levels(found)
        if args.layers:
            print_layers(found, None if args.verbose else WORST_LAYERS)
    say_meaning(found, args)
    say_predicted(args.quantized)
    if args.at_least is not None and found.sqnr_db < args.at_least:
        error(f"{args.quantized}: {found.sqnr_db:.2f} dB, expected at least {args.at_least:g} dB")
        return BELOW
    return 0


def check_options(args: argparse.Namespace) -> None:
    """Refuse options that conflict or have no effect, and numbers that are not finite.

    Raises:
        OptionError: an option is refused.
        CalibrationError: --pipeline is not a pipeline folder.
    """
    check_running_options(args, ("prompts", "save-conditioning"), {})
    for flag, number in (("--at-least", args.at_least), ("--guidance", args.guidance)):
        if number is not None and not math.isfinite(number):
            raise OptionError(f"{flag} should be a finite number, found {number}")
    if args.pipeline is not None:
        from ..engines.pipeline import require_pipeline

        require_pipeline(args.pipeline)


def measure(
    args: argparse.Namespace, default: Sequence[Prompts] = (), finished: Callable[[Tensor, Tensor], None] | None = None
) -> Fidelity:
    """Run both models.

    Args:
        args: the options.
        default: prompts to use if the options name none; without any, noise.
        finished: see `fidelity.scenes_fidelity`.
    """
    from ..checkpoint import open_checkpoint
    from ..engines.denoiser import load
    from ..fidelity import scenes_fidelity

    with open_checkpoint(args.reference) as first, open_checkpoint(args.quantized) as second:
        settle(args, first)
        given = prompts_of(args, first) or default  # before the models are loaded, since text encoders are large
        reference = load(first, device=args.device)
        quantized = load(second, device=args.device, arithmetic=args.arithmetic.replace("-", "_"))
        refuse_another_model(reference, quantized, args)
        refuse_wrong_order(reference, quantized, args)
        scenes = shown(reference, given, args)
        with progress_bar("checking") as progress:
            return scenes_fidelity(reference, quantized, scenes, guidance=args.guidance, steps=args.steps,
                                   layer_errors=args.layers, progress=progress, finished=finished)  # fmt: skip


def refuse_another_model(reference: Denoiser, quantized: Denoiser, args: argparse.Namespace) -> None:
    """Refuse to compare models of different families or sizes.

    Raises:
        CalibrationError: they differ.
    """
    one, other = reference.plan, quantized.plan
    names = sorted(one.shapes.keys() | other.shapes.keys())
    different = next((name for name in names if one.shapes.get(name) != other.shapes.get(name)), None)
    if one.family != other.family:
        problem = f"expected family {one.family} as in {args.reference}, found {other.family}"
    elif different is not None:
        wanted, found = (str(list(plan.shapes.get(different, ()))).replace("[]", "missing") for plan in (one, other))
        problem = f"{different}: expected {wanted} as in {args.reference}, found {found}"
    else:
        return
    raise CalibrationError(f"not the same model: {problem}", path=args.quantized)


def refuse_wrong_order(reference: Denoiser, quantized: Denoiser, args: argparse.Namespace) -> None:
    """Refuse swapped models, and note what results mean if both or neither are quantized.

    In a quantized reference only the weights are quantized, so swapped models would look better than they are.

    Raises:
        CalibrationError: only the reference is quantized.
    """
    first, second = (
        any(module.stored.layer.format is not None for module in model.layers.values())
        for model in (reference, quantized)
    )
    if first and not second:
        raise CalibrationError(
            f"the reference has quantized layers, but {args.quantized} has none",
            path=args.reference,
            hint=f"swap them: check {args.quantized} {args.reference}",
        )
    if first:
        note("both models have quantized layers: results compare them with each other, not with the original")
    elif not second:
        note("neither model has quantized layers: results compare their weights")


def prompts_of(args: argparse.Namespace, reference: Checkpoint) -> list[Prompts]:
    """Prompt embeddings named by the options: one for each file, or for each text length from a pipeline.

    Raises:
        CalibrationError, OptionError: see `engines.pipeline.encode`; embeddings of several lengths cannot be saved.
        CheckpointError: a file cannot be read.
        OutputError: --save-conditioning cannot be written.
        UnsupportedModelError: the reference cannot be run.
    """
    from ..engines.denoiser import plan
    from ..engines.prompts import Prompts

    if args.pipeline is None:
        return [Prompts.load(path) for path in embeddings_of(args)]
    from ..engines.pipeline import encode

    texts = read_prompts(Path(args.prompts))
    model = plan(reference)
    with progress_bar("embedding") as progress:
        signals = model.architecture.signals(model.config, geometry_of(args, model.family))
        found = encode(args.pipeline, texts, signals, negative=args.guidance != 1, text_tokens=args.text_tokens,
                       device=args.device, progress=progress)  # fmt: skip
    if args.save_conditioning is not None:
        if len(found) > 1:
            raise OptionError(
                f"{args.prompts}: one file cannot hold embeddings of {len(found)} different lengths",
                hint="save one prompt per file and repeat --conditioning FILE",
            )
        found[0].save(args.save_conditioning)
        say(f"{wrote(args.save_conditioning)}: the embeddings of {plural(len(texts), 'prompt')}")
    return found


def shown(reference: Denoiser, given: Sequence[Prompts], args: argparse.Namespace) -> list[Scene]:
    """Inputs of both models: noise at two sizes, or one scene for each of the given prompt embeddings."""
    from ..engines import noise
    from ..engines.diffusers import BATCH_TOKENS
    from ..engines.prompts import NEGATIVE, Prompts
    from ..fidelity import Scene, check_latents, noise_scenes

    geometry = geometry_of(args, reference.plan.family)
    if not given:
        return noise_scenes(reference, geometry, args.samples or SAMPLES, seed=args.seed)

    def fitted(one: Prompts, prefix: str = "") -> Prompts:
        tensors = {name.removeprefix(prefix): value for name, value in one.tensors.items()
                   if name.startswith(NEGATIVE) == bool(prefix)}  # fmt: skip
        return Prompts(tensors, source=one.source).fitted(reference, geometry)

    prompts = [fitted(one) for one in given]
    turns = [(place, row) for place, one in enumerate(prompts) for row in range(one.count)]
    order = list(islice(cycle(turns), args.samples or len(turns)))
    latents = check_latents(reference, geometry, len(order), args.seed)
    scenes = []
    for place, (one, own) in enumerate(zip(given, prompts, strict=True)):
        if any(name.startswith(NEGATIVE) for name in one.tensors):
            negative = {name: value[:1] for name, value in fitted(one, NEGATIVE).tensors.items()}
        else:
            negative = noise.conditioning(reference.signals(own.geometry), noise.SILENT, args.seed, 0)
        if numbers := [number for number, (turn, _) in enumerate(order) if turn == place]:
            rows = [order[number][1] for number in numbers]
            conditioning = {name: value[rows] for name, value in own.tensors.items()}
            batch = max(BATCH_TOKENS // own.geometry.tokens, 1)
            scenes.append(Scene(latents[numbers], conditioning, own.geometry, negative, batch))
    return scenes


def meaning(found: Fidelity) -> str:
    """The mean SQNR in words."""
    return next(words for least, words in MEANINGS if found.sqnr_db >= least)


def say_meaning(found: Fidelity, args: argparse.Namespace) -> None:
    """Say what the mean looks like, what to do if it is low, and what results on noise are worth."""
    from ..fidelity import EXACT_DB, OFF_BY_DB

    if found.sqnr_db >= EXACT_DB:
        say("no difference")
        return
    where = f" (convert_to_quant inspect {args.quantized} may find the cause)" if found.sqnr_db < DOUBTFUL_DB else ""
    say(f"{found.sqnr_db:.1f} dB on average, {found.worst_db:.1f} at worst: {meaning(found)}{where}")
    if args.pipeline is None and not embeddings_of(args):
        say(f"measured on noise; real prompts can differ by {OFF_BY_DB} dB (use --pipeline or --conditioning)")


def say_predicted(path: str) -> None:
    """Say which SQNR the file's mix of formats was chosen for, to compare with the result."""
    from ..checkpoint import open_checkpoint
    from ..choose import keeps
    from ..inspection import made_of

    with open_checkpoint(path) as checkpoint:
        made = made_of(checkpoint.metadata)
    if made is not None and made.mix is not None and (words := keeps(made.mix.figures)):
        say(f"its mix of formats was chosen for {words} on {made.mix.conditioning or 'given conditioning'}")


def print_levels(found: Fidelity) -> None:
    """Print the velocity SQNR per noise level and size, and the PSNR of the final latents."""
    from ..fidelity import EXACT_DB

    def told(ratio: float | None) -> str:
        return EXACT if ratio is not None and ratio >= EXACT_DB else decibels(ratio, 2)

    def row(name: str, mean: float, deviation: float | None, worst: float | None) -> tuple[str, str, str, str]:
        spread = deviation is not None and mean < EXACT_DB and found.prompts > 1  # one prompt has no spread
        return name, told(mean), f"{deviation:.2f} dB" if spread else "-", told(worst)

    rows = [row(f"{one.sigma:.3f}", one.sqnr_db, one.standard_error_db, one.worst_db) for one in found.levels]
    for size in found.sizes if len(found.sizes) > 1 else ():
        tokens = f"{size.geometry.height} x {size.geometry.width} + {size.geometry.text_tokens} tokens"
        rows.append(row(tokens, size.sqnr_db, None, size.worst_db))
    rows.append(row("mean", found.sqnr_db, found.standard_error_db, found.worst_db))
    rows.append(row("final PSNR", found.psnr_db, found.psnr_standard_error_db, None))
    print_table(("sigma", "SQNR", "standard error", "worst"), rows, right=(1, 2, 3))


def print_layers(found: Fidelity, most: int | None) -> None:
    """Print the errors of the worst layers: means over tokens, and over the whole tensor."""
    rows = [
        (one.layer, str(one.rows), f"{one.mean:.3%}", f"{one.worst:.3%}", f"{one.whole:.3%}")
        for one in found.layers[:most]
    ]
    print_table(("layer", "tokens", "mean error", "worst 1 %", "whole tensor"), rows, right=(1, 2, 3, 4))
