"""`convert_to_quant check REFERENCE QUANTIZED`: how much of what a model paints survived quantization."""

from __future__ import annotations

import argparse
import math
from typing import TYPE_CHECKING

from ..errors import CalibrationError, OptionError
from ..options import SAMPLES
from .output import decibels, error, note, print_table, progress_bar, say, write_json
from .running import NOISE, add_running_arguments, check_running_options, geometry_of
from .terminal import Styled

if TYPE_CHECKING:
    from ..engines.denoiser import Denoiser
    from ..fidelity import Fidelity, Scene

ARITHMETICS = ("comfyui", "comfyui-divide", "dequantize", "dynamic-tensor", "dynamic-row")
SEED = 43
"""Any other gives other noise, none of which a calibration can have seen (`fidelity.noise_scenes`)."""

WORST_LAYERS = 20
EXACT = Styled("exact", "good")
MEANINGS = (
    (25.0, "the same picture, details differ on close inspection"),
    (15.0, "the same picture, with small changes"),
    (6.5, "the subject is there, the picture is damaged"),
    (float("-inf"), "ruin"),
)
"""What a mean SQNR in dB, from here on, looks like: the table of docs/concepts.md, cut between its lines."""

DOUBTFUL_DB = 20.0
"""Below this mean something is likely wrong with the file."""

BELOW = 1
"""Exit code of a model that is worse than asked for."""

DESCRIPTION = """\
Run a reference and a quantized model side by side and say how close the quantized one stays: the SQNR of the predicted
velocity in dB per noise level (30 is good, 10 is ruin), and the PSNR of the latents that each reaches by itself. On
noise, of another kind than calibration sees, it checks two sizes: the one asked for, and a quarter of its tokens."""
EPILOG = """\
examples:
  convert_to_quant check bf16.safetensors fp8.safetensors --device cuda
  convert_to_quant check bf16.safetensors fp8.safetensors --at-least 25 --layers
  convert_to_quant check bf16.safetensors fp8.safetensors \\
      --conditioning embeddings.safetensors

arithmetics of quantized layers:
  comfyui         as ComfyUI on a CPU: inputs are divided in their own dtype
  comfyui-divide  as ComfyUI's CUDA kernels: inputs are divided in float32
  dequantize      weights are quantized, inputs are not
  dynamic-tensor  scales from each input itself; dynamic-row: from each row
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's flags."""
    parser.add_argument("reference", metavar="REFERENCE", help="the model as it should be")
    parser.add_argument("quantized", metavar="QUANTIZED", help="the same model, quantized")
    wanted = parser.add_argument_group("what to say")
    wanted.add_argument("--layers", action="store_true", help=f"errors of the {WORST_LAYERS} worst layers (-v: all)")
    wanted.add_argument("--at-least", type=float, metavar="DB", help=f"exit code {BELOW} if the mean SQNR is below")
    wanted.add_argument("--arithmetic", choices=ARITHMETICS, default=ARITHMETICS[0], metavar="WHICH",
                        help="how layers compute, see below (comfyui)")  # fmt: skip
    wanted.add_argument("--guidance", type=float, default=1.0, metavar="G",
                        help="of classifier-free guidance; 1 is none (1)")  # fmt: skip
    add_running_arguments(parser, seed=SEED)


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    check_running_options(args)
    for flag, number in (("--at-least", args.at_least), ("--guidance", args.guidance)):
        if number is not None and not math.isfinite(number):
            raise OptionError(f"{flag} should be a finite number, found {number}")
    found = measure(args)
    if args.json:
        write_json(args.json, found.to_json())
    if args.json != "-":
        print_levels(found)
        if args.layers:
            print_layers(found, None if args.verbose else WORST_LAYERS)
    say_meaning(found, args)
    if args.at_least is not None and found.sqnr_db < args.at_least:
        error(f"{args.quantized}: {found.sqnr_db:.2f} dB, at least {args.at_least:g} dB were asked for")
        return BELOW
    return 0


def measure(args: argparse.Namespace) -> Fidelity:
    """Run both models."""
    from ..checkpoint import open_checkpoint
    from ..engines.denoiser import load
    from ..fidelity import scenes_fidelity

    with open_checkpoint(args.reference) as first, open_checkpoint(args.quantized) as second:
        reference = load(first, device=args.device)
        quantized = load(second, device=args.device, arithmetic=args.arithmetic.replace("-", "_"))
        refuse_another_model(reference, quantized, args)
        refuse_wrong_order(reference, quantized, args)
        scenes = shown(reference, args)
        with progress_bar("checking") as progress:
            return scenes_fidelity(
                reference,
                quantized,
                scenes,
                guidance=args.guidance,
                steps=args.steps,
                layer_errors=args.layers,
                progress=progress,
            )


def refuse_another_model(reference: Denoiser, quantized: Denoiser, args: argparse.Namespace) -> None:
    """Refuse to compare models of different families or sizes.

    Raises:
        CalibrationError: they are.
    """
    one, other = reference.plan, quantized.plan
    problem = None
    if one.family != other.family:
        problem = f"its family is {other.family}, that of {args.reference} is {one.family}"
    for name in sorted(one.shapes.keys() | other.shapes.keys()) if problem is None else ():
        wanted, found = one.shapes.get(name), other.shapes.get(name)
        if wanted != found:
            problem = f"{name} is {_shape(found)}, in {args.reference} it is {_shape(wanted)}"
            break
    if problem is not None:
        raise CalibrationError(f"another model: {problem}", path=args.quantized, hint="compare a model with itself")


def refuse_wrong_order(reference: Denoiser, quantized: Denoiser, args: argparse.Namespace) -> None:
    """Refuse an FP8 reference of a model in high precision, and say what a figure means that has no such reference.

    A reference in FP8 computes with its weights alone, so swapped models would look better than they are.

    Raises:
        CalibrationError: they are swapped.
    """
    first, second = (
        any(module.stored.layer.format is not None for module in model.layers.values())
        for model in (reference, quantized)
    )
    if first and not second:
        raise CalibrationError(
            f"it is the reference and has quantized layers, while {args.quantized} has none: the reference comes first",
            path=args.reference,
            hint=f"convert_to_quant check {args.quantized} {args.reference}",
        )
    if first:
        note("both models have quantized layers: the figures say how far apart they are, not how far from the original")
    elif not second:
        note("neither model has quantized layers: the figures say how far apart their weights are")


def _shape(shape: tuple[int, ...] | None) -> str:
    return "missing" if shape is None else str(list(shape))


def shown(reference: Denoiser, args: argparse.Namespace) -> list[Scene]:
    """What both models are shown: noise of two sizes, or prompts of the size asked for."""
    from ..engines import noise
    from ..engines.diffusers import BATCH_TOKENS
    from ..engines.prompts import NEGATIVE, Prompts
    from ..fidelity import Scene, check_latents, noise_scenes

    geometry = geometry_of(args, reference.plan.family)
    if args.conditioning == NOISE:
        return noise_scenes(reference, geometry, args.samples or SAMPLES, seed=args.seed)
    given = Prompts.load(args.conditioning)
    positive = {name: value for name, value in given.tensors.items() if not name.startswith(NEGATIVE)}
    prompts = Prompts(positive, source=given.source).fitted(reference, geometry)
    empty = {name.removeprefix(NEGATIVE): given.tensors[name] for name in given.tensors.keys() - positive.keys()}
    if empty:
        fitted = Prompts(empty, source=given.source).fitted(reference, geometry).tensors
        negative = {name: value[:1] for name, value in fitted.items()}
    else:
        negative = noise.conditioning(reference.signals(prompts.geometry), noise.SILENT, args.seed, 0)
    rows = [number % prompts.count for number in range(args.samples or prompts.count)]
    return [
        Scene(
            check_latents(reference, prompts.geometry, len(rows), args.seed),
            {name: value[rows] for name, value in prompts.tensors.items()},
            prompts.geometry,
            negative,
            max(BATCH_TOKENS // prompts.geometry.tokens, 1),
        )
    ]


def say_meaning(found: Fidelity, args: argparse.Namespace) -> None:
    """The mean in words, where to look if they are bad, and what figures on noise are worth."""
    from ..fidelity import EXACT_DB, OFF_BY_DB

    if found.sqnr_db >= EXACT_DB:
        say("both compute the same")
        return
    meaning = next(words for least, words in MEANINGS if found.sqnr_db >= least)
    where = f" (convert_to_quant inspect {args.quantized} may say why)" if found.sqnr_db < DOUBTFUL_DB else ""
    say(f"{found.sqnr_db:.1f} dB on average, {found.worst_db:.1f} at worst: {meaning}{where}")
    if args.conditioning == NOISE:
        say(f"seen on noise, which can be {OFF_BY_DB} dB from real use: --conditioning FILE takes prompt embeddings")


def print_levels(found: Fidelity) -> None:
    """Velocity SQNR per noise level and size, their mean and worst, and the final latents' PSNR."""
    from ..fidelity import EXACT_DB

    def error_of(deviation: float) -> str:
        return f"{deviation:.2f} dB" if found.prompts > 1 else "-"  # one picture has no spread

    def told(ratio: float | None) -> str:
        return "-" if ratio is None else EXACT if ratio >= EXACT_DB else decibels(ratio, 2)

    rows: list[tuple[str, float, float | None, float | None]] = [
        (f"{level.sigma:.3f}", level.sqnr_db, level.standard_error_db, level.worst_db) for level in found.levels
    ]
    for size in found.sizes if len(found.sizes) > 1 else ():
        tokens = f"{size.geometry.height} x {size.geometry.width} + {size.geometry.text_tokens} tokens"
        rows.append((tokens, size.sqnr_db, None, size.worst_db))
    rows.append(("mean", found.sqnr_db, found.standard_error_db, found.worst_db))
    rows.append(("final PSNR", found.psnr_db, found.psnr_standard_error_db, None))
    print_table(
        ("sigma", "SQNR", "standard error", "worst"),
        [
            (name, told(mean), "-" if deviation is None or mean >= EXACT_DB else error_of(deviation), told(worst))
            for name, mean, deviation, worst in rows
        ],
        right=(1, 2, 3),
    )


def print_layers(found: Fidelity, most: int | None) -> None:
    """Row errors of layers, worst first."""
    print_table(
        ("layer", "rows", "mean error", "worst 1 %", "whole tensor"),
        [
            (layer.layer, str(layer.rows), f"{layer.mean:.3%}", f"{layer.worst:.3%}", f"{layer.whole:.3%}")
            for layer in found.layers[:most]
        ],
        right=(1, 2, 3, 4),
    )
