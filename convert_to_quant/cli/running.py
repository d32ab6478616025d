"""How commands that run a model ask for what it is shown; shared by them."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..engines import FRAMES, SAMPLES, SIDE_PIXELS, STEPS, TEXT_TOKENS
from ..engines.devices import find_device
from ..errors import OptionError

if TYPE_CHECKING:
    from ..families.running import Geometry

NOISE = "noise"

SHOWN: Mapping[str, Mapping[str, Any]] = {
    "samples": {"metavar": "N", "help": f"images ({SAMPLES})"},
    "height": {"metavar": "PIXELS", "help": f"of each image ({SIDE_PIXELS})"},
    "width": {"metavar": "PIXELS", "help": f"of each image ({SIDE_PIXELS})"},
    "frames": {"metavar": "N", "help": f"of each video ({FRAMES})"},
    "text-tokens": {"metavar": "N", "help": f"length of each prompt ({TEXT_TOKENS})"},
}
"""Number and size of what a model is shown, in every command that runs one."""


def add_shown_arguments(group: Any, prefix: str = "", *, samples: str = "") -> None:
    """Number and size of what the model is shown, and where it runs.

    Args:
        group: gets the options.
        prefix: before each name, "actcal-" or nothing.
        samples: help in place of that of `SHOWN`.
    """
    for name, settings in SHOWN.items():
        words = {**settings, "help": samples} if samples and name == "samples" else settings
        group.add_argument(f"--{prefix}{name}", dest=name.replace("-", "_"), type=int, **words)
    group.add_argument(f"--{prefix}device", dest="device", default="cpu", metavar="DEVICE",
                       help="where to run: cpu, cuda, cuda:1, ... (cpu)")  # fmt: skip


def add_running_arguments(parser: argparse.ArgumentParser, seed: int) -> None:
    """What a model is shown, and where it runs."""
    shown = parser.add_argument_group("what the model is shown, and where")
    shown.add_argument("--conditioning", default=NOISE, metavar="noise|FILE",
                       help="prompt embeddings from a file (noise)")  # fmt: skip
    add_shown_arguments(shown, samples=f"images ({SAMPLES}, or one per prompt)")
    shown.add_argument("--steps", type=int, default=STEPS, metavar="N", help=f"noise levels of each image ({STEPS})")
    shown.add_argument("--seed", type=int, default=seed, metavar="S", help=f"of all noise ({seed})")


def check_device(name: str) -> None:
    """Refuse a device that is unknown or not there, before anything is read; the CPU is, and torch takes a second.

    Raises:
        OptionError: it is.
    """
    if name != "cpu":
        find_device(name)


def check_running_options(args: argparse.Namespace) -> None:
    """Refuse numbers that are out of range, and a device that is not there.

    Raises:
        OptionError: one is.
    """
    check_device(args.device)
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

    return geometry(family, args.height, args.width, args.frames, args.text_tokens)
