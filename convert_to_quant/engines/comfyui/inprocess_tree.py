"""Imports a ComfyUI tree into this process: its models and samplers, without its server, nodes and frontend.

ComfyUI is a program, not a package. While it is imported it parses the command line for its device, finds its modules
in its own folder, and logs to the root logger. Here it gets its own command line, its folder is on the path while in
use, and its warnings are collected.

Nothing is written to its folder, not even compiled modules.

Limits. A process can use one tree and one kind of device, since ComfyUI decides at its first import. Its other flags
(precision, memory) keep their defaults.
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

from ...errors import CalibrationError, Error, OptionError, StrPath, UnsupportedModelError
from ...options import COMFYUI_VARIABLE as VARIABLE

REQUIRED_FILES = ("comfy/sd.py", "comfy/model_detection.py")
"""Files that identify a ComfyUI tree."""

VERSION_FILE = "comfyui_version.py"

FLAGS = {"cpu": ("--cpu",), "cuda": ()}
"""Kind of device -> ComfyUI's command-line flags."""

OUT_OF_MEMORY = ("OutOfMemoryError", "MemoryError")


def folder_of(given: StrPath | None) -> Path:
    """Absolute path of the ComfyUI tree to use.

    Raises:
        OptionError: no folder is given, or it is not a ComfyUI tree.
    """
    named = given or os.environ.get(VARIABLE)
    if not named:
        raise OptionError(
            "the ComfyUI engine needs ComfyUI", hint=f"set --comfyui-dir DIR or the environment variable {VARIABLE}"
        )
    folder = Path(named).expanduser().resolve()
    missing = [name for name in REQUIRED_FILES if not (folder / name).is_file()]
    if missing:
        raise OptionError(
            f"{folder} is not a ComfyUI tree: it has no {missing[0]}",
            hint="name the folder that contains ComfyUI's main.py",
        )
    return folder


def version(folder: Path) -> str:
    """Version of a tree, such as "0.33.0", or "unknown"."""
    try:
        text = (folder / VERSION_FILE).read_text(encoding="utf-8")
    except OSError:
        return "unknown"
    found = re.search(r'__version__\s*=\s*"([^"]+)"', text)
    return found.group(1) if found else "unknown"


class Messages(logging.Handler):
    """Collects ComfyUI's warnings and errors."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: dict[str, None] = {}

    def emit(self, record: logging.LogRecord) -> None:
        """Add one."""
        self.texts.setdefault(" ".join(record.getMessage().split()))


@contextmanager
def imported(folder: Path, device: str) -> Iterator[Messages]:
    """Make ComfyUI importable inside the block, on a device.

    Args:
        folder: its tree; see `folder_of`.
        device: "cpu", "cuda", or "cuda:N".

    Yields:
        Its warnings, as they occur.

    Raises:
        OptionError: the device is unknown or missing, or this process already runs ComfyUI on another kind of device
            or from another tree.
        CalibrationError: ComfyUI cannot be imported, or lacks a module that is imported inside the block.
    """
    kind, numbered, number = device.partition(":")
    if kind not in FLAGS or (numbered and not (kind == "cuda" and number.isdecimal())):
        raise OptionError(f"ComfyUI runs on {' or '.join(FLAGS)} here, not on {device!r}")
    root, messages = logging.getLogger(), Messages()
    with ExitStack() as stack:
        root.addHandler(messages)  # else they go to stderr
        stack.callback(root.removeHandler, messages)
        stack.enter_context(redirect_stdout(sys.stderr))
        stack.callback(setattr, sys, "dont_write_bytecode", sys.dont_write_bytecode)
        sys.dont_write_bytecode = True
        sys.path.insert(0, str(folder))
        stack.callback(sys.path.remove, str(folder))
        if kind == "cuda":
            import torch

            if int(number or 0) >= (count := torch.cuda.device_count()):
                raise OptionError(f"device {device!r} cannot be used: torch finds {count} CUDA devices")
            stack.enter_context(torch.cuda.device(int(number or 0)))  # ComfyUI uses torch's current device
        _import(folder, kind)
        try:
            yield messages
        except ImportError as error:
            if (error.name or "").partition(".")[0] != "comfy":
                raise
            raise CalibrationError(
                f"ComfyUI {version(folder)} lacks a module: {error}", path=folder, hint="update ComfyUI"
            ) from error


def _import(folder: Path, kind: str) -> None:
    """Import ComfyUI with its own command line, or check the one that is already imported."""
    if (cli_args := sys.modules.get("comfy.cli_args")) is not None:
        there, was = Path(str(cli_args.__file__)).resolve().parents[1], "cpu" if cli_args.args.cpu else "cuda"
        if there != folder:
            raise OptionError(f"this process already runs ComfyUI from {there}, not from {folder}")
        if was != kind:
            raise OptionError(f"this process already runs ComfyUI on {was}, not on {kind}")
        return
    argv = sys.argv
    sys.argv = ["main.py", *FLAGS[kind]]
    try:
        importlib.import_module("comfy.options").enable_args_parsing()
        importlib.import_module("comfy.sd")
    except Exception as error:  # any of its many dependencies may raise anything
        raise CalibrationError(
            f"ComfyUI cannot be imported: {_summary(error)}",
            path=folder,
            hint="use ComfyUI's Python, or install its requirements.txt",
        ) from error
    finally:
        sys.argv = argv


@contextmanager
def understood(doing: str, path: StrPath, family: str | None = None) -> Iterator[None]:
    """Convert any error of ComfyUI to one of ours; add the file to our own.

    Args:
        doing: "load", "run" and the like.
        path: of the model's file.
        family: ComfyUI's name of the model, if known.

    Raises:
        CalibrationError: out of memory.
        UnsupportedModelError: any other error.
    """
    try:
        yield
    except CalibrationError as error:
        raise type(error)(error.problem, path=error.path or path, tensor=error.tensor, hint=error.hint) from None
    except Error:
        raise
    except Exception as error:
        what = f"{family} model" if family else "model"
        if type(error).__name__ in OUT_OF_MEMORY:
            raise CalibrationError(
                f"ComfyUI cannot {doing} this {what}, out of memory: {_summary(error)}",
                path=path,
                hint="try a smaller --height and --width, or fewer --frames",
            ) from error
        raise UnsupportedModelError(f"ComfyUI cannot {doing} this {what}: {_summary(error)}", path=path) from error


def _summary(error: Exception) -> str:
    """An error's type, the first line of its message, and its place: the last one in ComfyUI, or else the last one."""
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), "no message")
    frames = traceback.extract_tb(error.__traceback__)
    home = next(iter(getattr(sys.modules.get("comfy"), "__path__", ())), os.devnull)
    inside = [frame for frame in frames if Path(frame.filename).is_relative_to(home)]
    last = (inside or frames)[-1]
    file = Path("comfy", Path(last.filename).relative_to(home)).as_posix() if inside else Path(last.filename).name
    return f"{type(error).__name__}: {line} [{file}:{last.lineno}]"
