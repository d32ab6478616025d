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
        OptionError: none is named, or what is named is not a ComfyUI tree.
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
            f"{folder} is not a ComfyUI tree: it has no {missing[0]}",
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
    root, messages = logging.getLogger(), Messages()
    with ExitStack() as stack:
        root.addHandler(messages)  # or they would go to stderr
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
            stack.enter_context(torch.cuda.device(int(number or 0)))  # ComfyUI asks torch for the current one
        _import(folder, kind)
        try:
            yield messages
        except ImportError as error:
            if (error.name or "").partition(".")[0] != "comfy":
                raise
            raise CalibrationError(
                f"ComfyUI {version(folder)} lacks what is needed of it: {error}", path=folder, hint="update ComfyUI"
            ) from error


def _import(folder: Path, kind: str) -> None:
    """Import ComfyUI with a command line of its own, or refuse the one that is there if it was started otherwise."""
    if (cli_args := sys.modules.get("comfy.cli_args")) is not None:
        there, was = Path(str(cli_args.__file__)).resolve().parents[1], "cpu" if cli_args.args.cpu else "cuda"
        if there != folder:
            raise OptionError(f"ComfyUI runs from {there} in this process already, not from {folder}")
        if was != kind:
            raise OptionError(f"ComfyUI runs on {was} in this process already, not on {kind}")
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


@contextmanager
def understood(doing: str, path: StrPath, family: str | None = None) -> Iterator[None]:
    """Whatever ComfyUI raises inside, as one of our errors with its message; our own say which file it was.

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
    except CalibrationError as error:
        raise type(error)(error.problem, path=error.path or path, tensor=error.tensor, hint=error.hint) from None
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
    """Its kind, the first line of its message, and the last line of ComfyUI's own files on the way, or of all files."""
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), "no message")
    frames = traceback.extract_tb(error.__traceback__)
    inside = [frame for frame in frames if "comfy" in Path(frame.filename).parts]
    last = (inside or frames)[-1]
    file = Path(last.filename)
    shown = "comfy/" + file.as_posix().rpartition("/comfy/")[2] if inside else file.name
    return f"{type(error).__name__}: {line} [{shown}:{last.lineno}]"
