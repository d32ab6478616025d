"""Every error that bad input or a bad machine can cause, as one tree.

    Error                        exit code 1
    ├── OptionError              exit code 2: the call itself is wrong (a flag, a range, a name)
    ├── CheckpointError          a file cannot be read as a checkpoint
    │   ├── HeaderError          its safetensors header is missing, cut off, or lies
    │   ├── PickleError          it is a pickle (.ckpt, .pt); pickles run code, so it is never opened
    │   ├── TensorError          a tensor or a layer in it has a value, shape or dtype that cannot be used
    │   └── NoStaticScaleError   readers scale the inputs of all its layers as they come
    ├── LoraError                an adapter cannot be used with this checkpoint
    ├── CalibrationError         activations could not be observed
    │   └── UnsupportedModelError  no engine can run this model
    ├── StatisticsError          a statistics file cannot be read, merged or applied
    └── OutputError              a result cannot be written; the input is untouched

The command line turns these, and only these, into one line on stderr and an exit code. Everything else is a bug
and shows its traceback.
"""

from __future__ import annotations

from os import PathLike
from typing import ClassVar

StrPath = str | PathLike[str]


MOST_NAME, MOST_PROBLEM = 300, 1000
"""Letters of a tensor's name, and of what is wrong, that a message shows: files say both, and at any length."""


def cut(text: str, most: int) -> str:
    """A text, or its beginning and its end where it is longer.

    >>> cut("blocks.0.attention.weight", 20)
    'block...ntion.weight'
    """
    if len(text) <= most:
        return text
    first = (most - 3) // 3
    return f"{text[:first]}...{text[first + 3 - most :]}"


class Error(Exception):
    """Base of all errors that a user can cause and mend.

    Args:
        problem: what failed, and what was expected and found.
        path: the file it failed in.
        tensor: the tensor or layer it failed at.
        hint: what to try.

    >>> str(Error("2 values expected, 3 found", path="a.safetensors", tensor="x.weight", hint="convert it again"))
    'a.safetensors: x.weight: 2 values expected, 3 found (convert it again)'
    """

    exit_code: ClassVar[int] = 1

    def __init__(
        self, problem: str, *, path: StrPath | None = None, tensor: str | None = None, hint: str | None = None
    ) -> None:
        self.problem = problem
        self.path = path
        self.tensor = tensor
        self.hint = hint
        where = "".join(f"{part}: " for part in (path, tensor and cut(tensor, MOST_NAME)) if part is not None)
        super().__init__(where + cut(problem, MOST_PROBLEM) + (f" ({hint})" if hint else ""))


class OptionError(Error):
    """The call itself is wrong: an unknown preset, a percentile of 0, flags that exclude each other."""

    exit_code = 2


class CheckpointError(Error):
    """A file cannot be read as a checkpoint."""


class HeaderError(CheckpointError):
    """The safetensors header is missing, cut off, or contradicts itself or the file."""


class PickleError(CheckpointError):
    """The file is a pickle. Opening a pickle runs the code in it, so it is refused unread."""


class TensorError(CheckpointError):
    """A tensor or a layer holds a value, shape or dtype that cannot be used."""


class NoStaticScaleError(CheckpointError):
    """Readers scale the inputs of all of a checkpoint's layers as they come, which is no fault of it."""


class LoraError(Error):
    """An adapter cannot be used with this checkpoint."""


class CalibrationError(Error):
    """Activations could not be observed."""


class UnsupportedModelError(CalibrationError):
    """No engine can run this model."""


class StatisticsError(Error):
    """A statistics file cannot be read, merged or applied."""


class OutputError(Error):
    """A result cannot be written. The input is untouched and nothing half-written is left."""
