"""How commands that run a model ask for what it is shown; shared by them."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from ..engines.devices import find_device
from ..errors import OptionError
from ..options import RunOptions, add_options, options_of

if TYPE_CHECKING:
    from ..families.running import Geometry

NOISE = "noise"


def add_running_arguments(parser: argparse.ArgumentParser, seed: int, *, several: bool = False, **defaults: Any) -> Any:
    """What a model is shown, and where it runs.

    Args:
        parser: of the command.
        seed: the default.
        several: files of embeddings may be named; see `embeddings_of`.
        **defaults: of further options, by field.

    Returns:
        Their group, for more of the kind.
    """
    shown = parser.add_argument_group("model input and device")
    more: dict[str, Any] = {"action": "append", "default": []} if several else {"default": NOISE}
    words = f"prompt embeddings{'; repeatable' if several else ' from a file'} (noise)"
    shown.add_argument("--conditioning", metavar="noise|FILE", help=words, **more)
    add_options(shown, RunOptions, seed=seed, **defaults)
    return shown


def embeddings_of(args: argparse.Namespace) -> list[str]:
    """The files of prompt embeddings that a call names."""
    said = args.conditioning if isinstance(args.conditioning, list) else [args.conditioning]
    return [name for name in said if name != NOISE]


def check_device(name: str) -> None:
    """Refuse a device that is unknown or not there, before anything is read; the CPU is, and torch takes a second.

    Raises:
        OptionError: it is.
    """
    if name != "cpu":
        find_device(name)


def check_running_options(args: argparse.Namespace, needing: Iterable[str], excluded: Mapping[str, Any]) -> None:
    """Refuse numbers that are out of range, a device that is not there, and what a pipeline needs or does without.

    Args:
        args: the options.
        needing: options that need a pipeline.
        excluded: options that do not go with one, and whether they were given.

    Raises:
        OptionError: one is.
    """
    options_of(RunOptions, args)
    check_device(args.device)
    if embeddings_of(args) and args.text_tokens is not None:
        raise OptionError("--text-tokens is for noise: the conditioning's file says how long the text is")
    if args.pipeline is not None and args.prompts is None:
        raise OptionError("--pipeline needs --prompts FILE")
    for name in needing:
        if args.pipeline is None and getattr(args, name.replace("-", "_")) is not None:
            raise OptionError(f"--{name} needs --pipeline")
    for name, given in {"conditioning": embeddings_of(args), **excluded}.items():
        if args.pipeline is not None and given:
            raise OptionError(f"--{name} does not go with --pipeline")


def geometry_of(args: argparse.Namespace, family: str) -> Geometry:
    """The size that was asked for, in tokens of a family of models."""
    from ..engines.sizes import geometry

    return geometry(family, args.height, args.width, args.frames, args.text_tokens)
