"""How commands that run a model ask for what it is shown; shared by them."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..engines.devices import find_device
from ..errors import OptionError
from ..options import (
    CPU_LARGE_WEIGHTS,
    CPU_SIDE_PIXELS,
    CPU_STEPS,
    CPU_TEXT_TOKENS,
    STEPS,
    RunOptions,
    add_options,
    options_of,
)
from ..telling import plural, size
from .output import note, say

if TYPE_CHECKING:
    from ..checkpoint import Checkpoint
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
    """Refuse a device that is unknown or not there, before anything is read; some are, and torch takes a second.

    Raises:
        OptionError: it is.
    """
    if name not in ("auto", "cpu"):
        find_device(name)


def settle(args: argparse.Namespace, checkpoint: Checkpoint) -> None:
    """Decide where a model runs and what it is shown, as far as the call did not; say it, and what memory it takes.

    Args:
        args: the options; `device` and `steps` are told afterwards, and sizes too where a CPU shows less of a large
            model than a GPU would.
        checkpoint: the model.
    """
    from ..layers import find_layers

    args.device = str(device := find_device(args.device))
    stored = sum(info.nbytes for info in checkpoint.tensors.values())
    if device.type == "cuda":
        import torch

        free, _ = torch.cuda.mem_get_info(device)
        tell = note if stored > free else say
        where = f"{args.device} ({torch.cuda.get_device_name(device)})"
        tell(f"running on {where}: the model takes {size(stored)}, and {size(free)} of its memory are free")
    elif sum(layer.out_features * layer.in_features for layer in find_layers(checkpoint).linear()) >= CPU_LARGE_WEIGHTS:
        asked = args.height, args.width, args.frames, args.text_tokens
        if not any(asked):
            args.height = args.width = CPU_SIDE_PIXELS
            args.text_tokens = None if getattr(args, "conditioning", NOISE) != NOISE else CPU_TEXT_TOKENS
        args.steps = args.steps or CPU_STEPS
        pixels = "" if any(asked) else f"{args.width} × {args.height} pixels, "
        note(f"a large model on {args.device}: {pixels}{plural(args.steps, 'noise level')} (options set others)")
        free_bytes = free_memory()
        if free_bytes is not None and stored > free_bytes:
            note(f"its {size(stored)} do not fit the {size(free_bytes)} of free memory: each evaluation reads the file")
    args.steps = args.steps or STEPS


def settle_at_rest(args: argparse.Namespace) -> None:
    """Decide the device where no model runs and the call names none: the CPU, since what copies waits for the disk."""
    if args.device == "auto":
        args.device = "cpu"


def free_memory() -> int | None:
    """Bytes that programs can have without swapping, where the system says it as Linux does."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")), None)


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
