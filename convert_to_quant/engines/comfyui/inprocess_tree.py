"""A ComfyUI tree, imported into this process: its models and samplers without its server, its nodes and its window.

ComfyUI is a program, not a package. It reads its device from the command line while it is imported, finds its modules
in its own folder, and logs to the root logger. Here it gets a command line of its own, its folder on the path as long
as it works, and what it says is kept for whoever wants to show it.

Nothing is written into its folder, compiled modules included.

Limits. What ComfyUI chose at its first import stays until the process ends: one tree and one kind of device per
process. Its own flags (precision, memory) are at their defaults.
"""

from __future__ import annotations

import importlib
import logging
import os
import re
import sys
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from pathlib import Path
from types import ModuleType
from typing import Any

from ...errors import CalibrationError, Error, OptionError, StrPath, UnsupportedModelError
from ...options import COMFYUI_VARIABLE as VARIABLE

MARKS = ("comfy/sd.py", "comfy/model_detection.py")
"""Files that make a folder a ComfyUI tree."""

VERSION_FILE = "comfyui_version.py"

FLAGS = {"cpu": ("--cpu",), "cuda": ()}
"""Kind of device -> what ComfyUI's command line says of it."""

OUT_OF_MEMORY = ("OutOfMemoryError", "MemoryError")


def folder_of(given: StrPath | None) -> Path:
    """The ComfyUI tree to use.

    Args:
        given: the folder that was asked for; None takes the environment's.

    Returns:
        Its absolute path.

    Raises:
        OptionError: none is named, or what is named is no ComfyUI tree.
    """
    named = given or os.environ.get(VARIABLE)
    if not named:
        raise OptionError(
            "the ComfyUI engine needs a ComfyUI", hint=f"--comfyui-dir DIR, or {VARIABLE} in the environment"
        )
    folder = Path(named).expanduser().resolve()
    missing = [mark for mark in MARKS if not (folder / mark).is_file()]
    if missing:
        raise OptionError(
            f"{folder} is no ComfyUI tree: there is no {missing[0]} in it",
            hint="name the folder that holds ComfyUI's main.py",
        )
    return folder


def version(folder: Path) -> str:
    """What a tree calls itself: "0.33.0"; "unknown" where it does not say."""
    try:
        text = (folder / VERSION_FILE).read_text(encoding="utf-8")
    except OSError:
        return "unknown"
    found = re.search(r'__version__\s*=\s*"([^"]+)"', text)
    return found.group(1) if found else "unknown"


class Messages(logging.Handler):
    """Keeps ComfyUI's warnings and errors.

    Attributes:
        said: what was said, each text once.
    """

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.said: dict[str, None] = {}

    def emit(self, record: logging.LogRecord) -> None:
        """Take one down."""
        self.said.setdefault(" ".join(record.getMessage().split()))


@contextmanager
def imported(folder: Path, device: str) -> Iterator[Messages]:
    """ComfyUI, importable inside the block, and computing on a device.

    Args:
        folder: its tree; see `folder_of`.
        device: "cpu", "cuda", or "cuda:N".

    Yields:
        What it says, as it says it.

    Raises:
        OptionError: the device is none of these or is not there, or ComfyUI runs on another kind, or from another
            tree, in this process already.
        CalibrationError: it cannot be imported, or lacks a part that is asked for inside the block.
    """
    kind, numbered, number = device.partition(":")
    if kind not in FLAGS or (numbered and not (kind == "cuda" and number.isdecimal())):
        raise OptionError(f"ComfyUI runs here on {' or '.join(FLAGS)}, not on {device!r}")
    with ExitStack() as stack:
        messages = stack.enter_context(_quiet())
        stack.enter_context(redirect_stdout(sys.stderr))
        stack.enter_context(_on_path(folder))
        if kind == "cuda":
            stack.enter_context(_card(device, int(number or 0)))
        _import(folder, kind)
        try:
            yield messages
        except ImportError as error:
            if (error.name or "").partition(".")[0] != "comfy":
                raise
            raise CalibrationError(
                f"ComfyUI {version(folder)} lacks what is needed of it: {error}", path=folder, hint="update ComfyUI"
            ) from error


@contextmanager
def _card(device: str, number: int) -> Iterator[None]:
    """The card that ComfyUI takes for its own: it asks torch for the current one."""
    import torch

    if number >= torch.cuda.device_count():
        raise OptionError(f"device {device!r} cannot be used: torch finds {torch.cuda.device_count()} CUDA devices")
    with torch.cuda.device(number):
        yield


@contextmanager
def _quiet() -> Iterator[Messages]:
    """Take the root logger's messages, which would go to stderr."""
    root, messages = logging.getLogger(), Messages()
    root.addHandler(messages)
    try:
        yield messages
    finally:
        root.removeHandler(messages)


@contextmanager
def _on_path(folder: Path) -> Iterator[None]:
    """The tree's own modules come first inside, and none of them leaves a compiled file behind."""
    no_bytecode = sys.dont_write_bytecode
    sys.dont_write_bytecode = True
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        sys.dont_write_bytecode = no_bytecode


def _import(folder: Path, kind: str) -> None:
    """Import ComfyUI with a command line of its own, or check the one that is there."""
    if "comfy.cli_args" in sys.modules:
        _check_present(sys.modules["comfy.cli_args"], folder, kind)
        return
    argv = sys.argv
    sys.argv = ["main.py", *FLAGS[kind]]
    try:
        importlib.import_module("comfy.options").enable_args_parsing()
        importlib.import_module("comfy.sd")
    except Exception as error:  # it is a program with a hundred dependencies: any of them may raise anything
        raise CalibrationError(
            f"ComfyUI cannot be imported: {_said(error)}",
            path=folder,
            hint="run with the Python that runs ComfyUI, or install what its requirements.txt names",
        ) from error
    finally:
        sys.argv = argv


def _check_present(cli_args: ModuleType, folder: Path, kind: str) -> None:
    """Refuse a ComfyUI that was started otherwise."""
    there = Path(str(cli_args.__file__)).resolve().parents[1]
    if there != folder:
        raise OptionError(f"ComfyUI runs from {there} in this process already, not from {folder}")
    was = "cpu" if cli_args.args.cpu else "cuda"
    if was != kind:
        raise OptionError(f"ComfyUI runs on {was} in this process already, not on {kind}")


@contextmanager
def understood(doing: str, path: StrPath, family: str | None = None) -> Iterator[None]:
    """Whatever ComfyUI raises inside, as one of our errors with its message.

    Args:
        doing: "load", "run" and the like.
        path: of the model's file.
        family: what ComfyUI calls the model, where that is known.

    Raises:
        CalibrationError: memory ran out.
        UnsupportedModelError: anything else.
    """
    try:
        yield
    except Error:
        raise
    except Exception as error:
        what = f"{family} model" if family else "model"
        if type(error).__name__ in OUT_OF_MEMORY:
            raise CalibrationError(
                f"memory ran out while ComfyUI was to {doing} this {what}: {_said(error)}",
                path=path,
                hint="a smaller --height and --width, or fewer --frames",
            ) from error
        raise UnsupportedModelError(f"ComfyUI cannot {doing} this {what}: {_said(error)}", path=path) from error


def _said(error: Exception) -> str:
    """Its kind, the first line of its message, and where it was raised."""
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), "no message")
    return f"{type(error).__name__}: {line} {_place(error)}"


def _place(error: Exception) -> str:
    """Where it was raised: the last of ComfyUI's own files on the way, or the last of all."""
    frames: list[Any] = list(traceback.extract_tb(error.__traceback__))
    inside = [frame for frame in frames if "comfy" in Path(frame.filename).parts] or frames
    name = Path(inside[-1].filename)
    parts = name.parts
    shown = "/".join(parts[len(parts) - 1 - parts[::-1].index("comfy") :]) if "comfy" in parts else name.name
    return f"[{shown}:{inside[-1].lineno}]"
