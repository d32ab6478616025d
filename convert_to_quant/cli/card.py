"""`convert_to_quant card REFERENCE QUANTIZED -o DIR`: a model card with the results of `check` and images."""

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
Compare a quantized model with its original, as check does, and write a model card into a folder: README.md with
velocity SQNR per noise level, latent SNR of samples from the same noise, sizes, formats, hashes, and how it was
measured; and card.json. For the embedded emoji model it also shows and compares images (PSNR, SSIM, and LPIPS if the
package lpips is installed)."""
EPILOG = """\
examples:
  convert_to_quant card bf16.safetensors fp8.safetensors -o card --device cuda \\
      --pipeline FLUX.1-dev --prompts prompts.txt
  convert_to_quant card demo/plain_bf16.safetensors \\
      demo/plain_fp8_calibrated.safetensors -o card --guidance 2

"""
EPILOG += check.ARITHMETIC_WORDS

STEPS = 8
"""Default number of noise levels, as in docs/accuracy.md."""

EMOJI_SIDE_PIXELS = 128
"""Size of the emoji model for --height and --width, as if its tokens were Flux.1's."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("reference", metavar="REFERENCE", help="the original model")
    parser.add_argument("quantized", metavar="QUANTIZED", help="the same model, quantized")
    wanted = parser.add_argument_group("card")
    wanted.add_argument("-o", "--output", required=True, metavar="DIR", help="folder for the model card")
    check.add_comparing_arguments(parser, wanted, steps=STEPS)
    parser.set_defaults(at_least=None, layers=False)


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    check.check_options(args)
    folder = Path(args.output)

    from .. import card
    from ..checkpoint import open_checkpoint, write_bytes

    with open_checkpoint(args.reference) as original, open_checkpoint(args.quantized) as quantized:
        decoded = card.can_decode(original)
        outputs = [folder / name for name in (card.PAGE, card.DOCUMENT, *([card.PICTURE] if decoded else []))]
        if args.dry_run:
            say(f"dry run: {'; '.join(wrote(path, would=True) for path in outputs)}; nothing was written")
            write_json(args.json, {"outputs": [str(path) for path in outputs], "dry_run": True})
            return 0
        card.make_folder(folder)
        foresee(outputs)
        document = {"name": quantized.path.name.partition(".")[0], **facts(original, quantized)}
    if decoded:
        args.height, args.width = args.height or EMOJI_SIDE_PIXELS, args.width or EMOJI_SIDE_PIXELS
    given = [card.emoji_prompts()] if decoded else []
    samples = card.Samples(decoded=decoded)
    document |= measured(check.measure(args, given, samples.add), args, prompts=decoded)
    document |= {"latents": samples.latents(), "images": samples.compare(), "command": shlex.join(call(args))}
    if document["images"] is not None:
        card.write_picture(folder / card.PICTURE, *samples.images(), document)
    write_bytes(folder / card.PAGE, card.markdown(document).encode("utf-8", "backslashreplace"))
    # Not by `write_json`, which adds options with local paths: the model card is published.
    write_bytes(folder / card.DOCUMENT, (json.dumps(document, indent=2) + "\n").encode())
    write_json(args.json, document)
    say(f"velocity SQNR {document['fidelity']['sqnr_db']:.1f} dB, latent SNR {document['latents']['snr_db']:.1f} dB: "
        f"{document['meaning']}")  # fmt: skip
    for path in outputs if document["images"] is not None else outputs[:2]:
        say(wrote(path))
    return 0


def facts(original: Checkpoint, quantized: Checkpoint) -> dict[str, Any]:
    """Facts about both files: hashes, formats, and how the quantized one was made."""
    from .. import card
    from ..inspection import inspect_checkpoint

    found = inspect_checkpoint(quantized)
    with progress_bar("hashing", unit="bytes") as progress:
        hashed = card.file_facts((original, quantized), progress)
    made = "How the file was made is not recorded." if found.made is None else f"Made by {made_line(found.made)}."
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
    """The results, the inputs, and the method in words."""
    from ..fidelity import OFF_BY_DB

    noise = not (prompts or args.pipeline or embeddings_of(args))
    kind = f"{plural(found.prompts, 'sample')} of noise instead of prompts (real prompts can differ by {OFF_BY_DB} dB)"
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
        f"as `{args.arithmetic}`. Velocities are compared at the states that the original passes through; latents and "
        "images are what each model reaches by its own steps. Results are means over samples ± their standard error. "
        f"convert_to_quant {__version__}.",
    }


def call(args: argparse.Namespace) -> Iterator[str]:
    """The words of this call, with file names instead of paths."""
    yield from ("convert_to_quant", "card", Path(args.reference).name, Path(args.quantized).name, "-o", "card")
    for key, value in args.in_force.items():
        if key in TALK or key in ("output", "reference", "quantized"):
            continue
        for one in value if isinstance(value, list) else [value]:
            yield f"--{key}"
            yield Path(one).name if isinstance(one, str) else f"{one:g}"
