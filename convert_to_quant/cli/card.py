"""`convert_to_quant card REFERENCE QUANTIZED -o DIR`: a page for a model hub, with what `check` measures and images."""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import __version__
from ..telling import plural
from . import check
from .inspect import format_lines, made_line
from .output import foresee, progress_bar, say, write_json, wrote
from .running import embeddings_of
from .shared import TALK

if TYPE_CHECKING:
    from ..checkpoint import Checkpoint
    from ..fidelity import Fidelity

DESCRIPTION = """\
Compare a quantized model with its original, as check does, and write a page for a model hub into a folder: README.md
with velocity SQNR per noise level, the latent SNR of samples from the same noise, sizes, formats, hashes and how it was
measured, and card.json. Where images can be made of the latents (the embedded emoji model) they are shown and compared
(PSNR, SSIM, and LPIPS if the package lpips is installed)."""
EPILOG = """\
examples:
  convert_to_quant card bf16.safetensors fp8.safetensors -o card --device cuda \\
      --pipeline FLUX.1-dev --prompts prompts.txt
  convert_to_quant card demo/plain_bf16.safetensors \\
      demo/plain_fp8_calibrated.safetensors -o card --guidance 2

"""
EPILOG += check.ARITHMETIC_WORDS

STEPS = 8
"""Default of the noise levels: those of the figures in docs/accuracy.md."""

EMOJI_SIDE_PIXELS = 128
"""What --height and --width call the emoji model's size, as if its tokens were Flux.1's."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's flags."""
    parser.add_argument("reference", metavar="REFERENCE", help="the original model")
    parser.add_argument("quantized", metavar="QUANTIZED", help="the same model, quantized")
    wanted = parser.add_argument_group("card")
    wanted.add_argument("-o", "--output", required=True, metavar="DIR", help="folder for the card")
    check.add_comparing_arguments(parser, wanted, steps=STEPS)
    parser.set_defaults(at_least=None, layers=False)


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    check.check_options(args)
    folder = Path(args.output)

    from .. import card
    from ..checkpoint import open_checkpoint, write_bytes
    from ..demo import make_folder

    with open_checkpoint(args.reference) as original, open_checkpoint(args.quantized) as quantized:
        painted = card.paints(original)
        outputs = [folder / name for name in (card.PAGE, card.DOCUMENT, *([card.PICTURE] if painted else []))]
        if args.dry_run:
            say(f"dry run: {'; '.join(wrote(path, would=True) for path in outputs)}; nothing was written")
            write_json(args.json, {"outputs": [str(path) for path in outputs], "dry_run": True})
            return 0
        make_folder(folder)
        foresee(outputs)
        document = {"name": quantized.path.name.partition(".")[0], **facts(original, quantized)}
    if painted:
        args.height, args.width = args.height or EMOJI_SIDE_PIXELS, args.width or EMOJI_SIDE_PIXELS
    given = [card.emoji_prompts()] if painted else []
    samples = card.Samples(paints=painted)
    document |= measured(check.measure(args, given, samples.add), args, prompts=painted)
    document |= {"latents": samples.latents(), "images": samples.compare(), "command": shlex.join(call(args))}
    if document["images"] is not None:
        card.write_picture(folder / card.PICTURE, *samples.images(), document)
    write_bytes(folder / card.PAGE, card.markdown(document).encode("utf-8", "backslashreplace"))
    # It is published, so it does not say where files were here, as the options of `made_by` would.
    write_bytes(folder / card.DOCUMENT, (json.dumps(document, indent=2) + "\n").encode())
    write_json(args.json, document)
    say(f"velocity SQNR {document['fidelity']['sqnr_db']:.1f} dB, latent SNR {document['latents']['snr_db']:.1f} dB: "
        f"{document['meaning']}")  # fmt: skip
    for path in outputs if document["images"] is not None else outputs[:2]:
        say(wrote(path))
    return 0


def facts(original: Checkpoint, quantized: Checkpoint) -> dict[str, Any]:
    """What both files are, by their headers and their bytes."""
    from .. import card
    from ..inspection import inspect_checkpoint

    found = inspect_checkpoint(quantized)
    with progress_bar("hashing", unit="bytes") as progress:
        hashed = card.file_facts((original, quantized), progress)
    made = "The file does not say how it was made." if found.made is None else f"Made by {made_line(found.made)}."
    return {
        "video": card.makes_videos(original),
        "original": {"files": hashed[0]},
        "quantized": {
            "files": hashed[1],
            "title": found.title,
            "formats": list(found.formats),
            "layers": format_lines(found),
            "bits_per_weight": found.bits_per_weight,
        },
        "made": made,
    }


def measured(found: Fidelity, args: argparse.Namespace, *, prompts: bool) -> dict[str, Any]:
    """What was measured, on what, and how."""
    from ..fidelity import OFF_BY_DB

    noise = not (prompts or args.pipeline or embeddings_of(args))
    kind = f"{plural(found.prompts, 'sample')} of noise in place of prompts (real use can differ by {OFF_BY_DB} dB)"
    sizes = " and ".join(
        f"{size.height} × {size.width} image tokens and {size.text_tokens} text tokens"
        for size in (one.geometry for one in found.sizes)
    )
    return {
        "fidelity": found.to_json(),
        "meaning": check.meaning(found),
        "shown": f"{kind if noise else plural(found.prompts, 'prompt')}: {sizes}",
        "method": f"Both models start from the same noise (seed {args.seed}) and take "
        f"{plural(found.steps, 'Euler step')}, guidance {found.guidance:g}, on {args.device}; quantized layers compute "
        f"as `{args.arithmetic}`. The velocity is compared at the states that the original passes through; latents and "
        "images are what each model reaches by its own steps. Figures are means over samples ± their standard error. "
        f"convert_to_quant {__version__}.",
    }


def call(args: argparse.Namespace) -> Iterator[str]:
    """The words of this call, without the folders that files are in."""
    yield from ("convert_to_quant", "card", Path(args.reference).name, Path(args.quantized).name, "-o", "card")
    for key, value in args.in_force.items():
        if key in TALK or key in ("output", "reference", "quantized"):
            continue
        for one in value if isinstance(value, list) else [value]:
            yield f"--{key}"
            yield Path(one).name if isinstance(one, str) else f"{one:g}"
