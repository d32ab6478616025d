"""Model inputs and device, shared by the commands that run a model."""

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
    """Add the options for model inputs and device, with defaults; return their group.

    `several` allows several files of prompt embeddings.
    """
    shown = parser.add_argument_group("model input and device")
    more: dict[str, Any] = {"action": "append", "default": []} if several else {"default": NOISE}
    words = f"prompt embeddings{'; repeatable' if several else ' from a file'} (noise)"
    shown.add_argument("--conditioning", metavar="noise|FILE", help=words, **more)
    add_options(shown, RunOptions, seed=seed, **defaults)
    return shown


def embeddings_of(args: argparse.Namespace) -> list[str]:
    """The given files of prompt embeddings."""
    said = args.conditioning if isinstance(args.conditioning, list) else [args.conditioning]
    return [name for name in said if name != NOISE]


def check_device(name: str) -> None:
    """Refuse an unknown or missing device; torch, which takes a second to import, is not needed for most."""
    if name not in ("auto", "cpu"):
        find_device(name)


def settle(args: argparse.Namespace, checkpoint: Checkpoint, *, runs: bool = True) -> None:
    """Choose the device and the inputs that the user left open, and print them with the memory that the model needs.

    A large model on a CPU gets smaller inputs. If the model does not run, the device defaults to the CPU, as copying is
    limited by the disk.
    """
    from ..layers import find_layers

    if not runs:
        args.device = "cpu" if args.device == "auto" else args.device
        return
    args.device = str(device := find_device(args.device))
    stored = sum(info.nbytes for info in checkpoint.tensors.values())
    if device.type == "cuda":
        import torch

        free, _ = torch.cuda.mem_get_info(device)
        tell = note if stored > free else say
        where = f"{args.device} ({torch.cuda.get_device_name(device)})"
        tell(f"running on {where}: the model needs {size(stored)}, {size(free)} of GPU memory is free")
    elif sum(layer.out_features * layer.in_features for layer in find_layers(checkpoint).linear()) >= CPU_LARGE_WEIGHTS:
        asked = args.height, args.width, args.frames, args.text_tokens
        if not any(asked):
            args.height = args.width = CPU_SIDE_PIXELS
            args.text_tokens = None if getattr(args, "conditioning", NOISE) != NOISE else CPU_TEXT_TOKENS
        args.steps = args.steps or CPU_STEPS
        pixels = "" if any(asked) else f"{args.width} × {args.height} pixels, "
        note(f"large model on {args.device}: using {pixels}{plural(args.steps, 'noise level')} (options override this)")
        free_bytes = free_memory()
        if free_bytes is not None and stored > free_bytes:
            note(f"{size(stored)} do not fit into {size(free_bytes)} of free memory: each evaluation reads the file")
    args.steps = args.steps or STEPS


def free_memory() -> int | None:
    """Bytes available without swapping; None except on Linux."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")), None)


def check_running_options(args: argparse.Namespace, needing: Iterable[str], excluded: Mapping[str, Any]) -> None:
    """Refuse numbers out of range, a missing device, and options that contradict --pipeline.

    Args:
        args: the options.
        needing: options that need --pipeline.
        excluded: options that cannot be combined with it, and whether they were given.
    """
    options_of(RunOptions, args)
    check_device(args.device)
    if embeddings_of(args) and args.text_tokens is not None:
        raise OptionError("--text-tokens is for noise: --conditioning FILE determines the length")
    if args.pipeline is not None and args.prompts is None:
        raise OptionError("--pipeline needs --prompts FILE")
    for name in needing:
        if args.pipeline is None and getattr(args, name.replace("-", "_")) is not None:
            raise OptionError(f"--{name} needs --pipeline")
    for name, given in {"conditioning": embeddings_of(args), **excluded}.items():
        if args.pipeline is not None and given:
            raise OptionError(f"--{name} cannot be combined with --pipeline")


def geometry_of(args: argparse.Namespace, family: str) -> Geometry:
    """The requested size in tokens of a model family."""
    from ..engines.sizes import geometry

    return geometry(family, args.height, args.width, args.frames, args.text_tokens)
