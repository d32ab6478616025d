"""How commands that run a model ask for what it is shown; shared by them."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from ..errors import OptionError

if TYPE_CHECKING:
    from ..engines.noise import Geometry

NOISE = "noise"
SIDE_PIXELS, FRAMES, TEXT_TOKENS = 256, 1, 64
PICTURES = 8


def add_running_arguments(parser: argparse.ArgumentParser, seed: int) -> None:
    """What a model is shown, and where it runs."""
    shown = parser.add_argument_group("what the model is shown, and where")
    shown.add_argument("--conditioning", default=NOISE, metavar="noise|FILE",
                       help="prompt embeddings from a file (noise)")  # fmt: skip
    shown.add_argument("--samples", type=int, metavar="N", help=f"pictures ({PICTURES}, or one per prompt)")
    shown.add_argument("--steps", type=int, default=8, metavar="N", help="noise levels of each picture (8)")
    shown.add_argument("--height", type=int, metavar="PIXELS", help=f"of each picture ({SIDE_PIXELS})")
    shown.add_argument("--width", type=int, metavar="PIXELS", help=f"of each picture ({SIDE_PIXELS})")
    shown.add_argument("--frames", type=int, metavar="N", help=f"of each film ({FRAMES})")
    shown.add_argument("--text-tokens", type=int, metavar="N", help=f"length of each prompt ({TEXT_TOKENS})")
    shown.add_argument("--seed", type=int, default=seed, metavar="S", help=f"of all noise ({seed})")
    shown.add_argument("--device", default="cpu", metavar="DEVICE", help="where to run: cpu, cuda, cuda:1, ... (cpu)")


def check_running_options(args: argparse.Namespace) -> None:
    """Refuse numbers that are out of range.

    Raises:
        OptionError: one is.
    """
    for name in ("samples", "steps", "height", "width", "frames", "text_tokens"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise OptionError(f"--{name.replace('_', '-')} should be at least 1, found {value}")
    if args.seed < 0:
        raise OptionError(f"a seed should not be negative, found {args.seed}")
    if args.conditioning != NOISE and args.text_tokens is not None:
        raise OptionError("--text-tokens is for noise: the conditioning's file says how long the text is")


def geometry_of(args: argparse.Namespace, family: str) -> Geometry:
    """The size that was asked for, in tokens of a family of models."""
    from ..engines.sizes import geometry

    return geometry(
        family,
        args.height or SIDE_PIXELS,
        args.width or SIDE_PIXELS,
        args.frames or FRAMES,
        args.text_tokens or TEXT_TOKENS,
    )
