"""`convert_to_quant observe MODEL -o STATS`: run a model and record statistics of its layer inputs."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from ..errors import OptionError
from ..options import COMFYUI_VARIABLE
from .output import configure, note
from .running import NOISE, add_running_arguments, check_running_options

ENGINES = ("auto", "diffusers", "comfyui")
DESCRIPTION = """\
Run a model, quantized or in high precision, and record statistics of the inputs of its linear layers. `apply` chooses
input scales from them."""
EPILOG = """\
examples:
  convert_to_quant observe flux.safetensors -o stats.safetensors --device cuda
  convert_to_quant observe sdxl.safetensors -o stats.safetensors \\
      --comfyui-dir ~/ComfyUI
  convert_to_quant observe --pipeline FLUX.1-dev --prompts prompts.txt \\
      -o stats.safetensors

Noise needs at least 3 images. --pipeline without MODEL records layers under both naming schemes. Under torchrun, the
processes share the work.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("input", nargs="?", metavar="MODEL", help="checkpoint; optional with --pipeline")
    parser.add_argument("-o", "--output", required=True, metavar="STATS", help="statistics file to write")
    parser.add_argument("--lora", action="append", default=[], metavar="FILE[:STRENGTH]",
                        help="apply a LoRA while recording; repeatable")  # fmt: skip
    parser.add_argument("--resume", action="store_true", help="continue an interrupted run, or start one")
    parser.add_argument("--save-every", type=float, default=120.0, metavar="SECONDS",
                        help="save progress this often (120)")  # fmt: skip
    parser.add_argument("--trials", action="store_true",
                        help="also try every format per layer, for --best")  # fmt: skip
    parser.add_argument("--moments", action="store_true",
                        help="also record second moments, for --round")  # fmt: skip
    engine = parser.add_argument_group("engine")
    engine.add_argument("--engine", choices=ENGINES, default=ENGINES[0], metavar="WHICH",
                        help="diffusers, comfyui, or whichever can (auto)")  # fmt: skip
    engine.add_argument("--comfyui-dir", metavar="DIR", help=f"ComfyUI folder to run it in (${COMFYUI_VARIABLE})")
    engine.add_argument("--pipeline", metavar="DIR", help="diffusers pipeline, run on real prompts")
    engine.add_argument("--prompts", metavar="FILE", help="text file with one prompt per line")
    engine.add_argument("--component", metavar="NAME", help="pipeline component to record (transformer)")
    add_running_arguments(parser, seed=42)


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    check_options(args)
    from .observing import observe

    if os.environ.get("RANK", "0") != "0":  # only one of several processes prints
        configure(quiet=True)
        args.json = None
    try:
        observe(args)
    except KeyboardInterrupt:
        if partial_of(args.output).exists():
            note(f"progress is saved in {partial_of(args.output)}; continue with --resume")
        raise
    return 0


def check_options(args: argparse.Namespace) -> None:
    """Refuse options that conflict or have no effect, and outputs that cannot be written.

    Raises:
        OptionError: an option is refused.
        OutputError: an output is an input, a folder or a special file, or its folder is missing.
    """
    from ..checkpoint import check_output

    excluded = {"lora": args.lora, "comfyui-dir": args.comfyui_dir, "engine comfyui": args.engine == "comfyui"}
    check_running_options(args, ("prompts", "component"), excluded)
    for flag, given in {"pipeline": args.pipeline, **excluded}.items():
        for asked in ("trials", "moments"):
            if getattr(args, asked) and given:
                raise OptionError(f"--{asked} cannot be combined with --{flag}: it needs the model itself")
    if args.save_every < 0:
        raise OptionError(f"--save-every should not be negative, found {args.save_every:g}")
    if args.pipeline is None and args.input is None:
        raise OptionError("expected a MODEL or --pipeline")
    if args.engine == "diffusers" and args.comfyui_dir:
        raise OptionError("--comfyui-dir cannot be combined with --engine diffusers")
    if args.engine == "comfyui" and args.conditioning != NOISE:
        raise OptionError(
            "--conditioning cannot be combined with --engine comfyui, which runs on noise",
            hint="convert_to_quant comfyui observe runs a workflow on its own prompts",
        )
    check_output(partial_of(args.output))


def partial_of(output: str) -> Path:
    """Where a run saves its progress, if it is the only process."""
    from ..engines.session import PARTIAL_SUFFIX

    return Path(output + PARTIAL_SUFFIX)
