"""All errors that bad input or a failing machine can cause.

    Error                        exit code 1
    ├── OptionError              exit code 2: invalid option, value or combination
    ├── CheckpointError          a file is not a usable checkpoint
    │   ├── HeaderError          its safetensors header is missing, truncated or wrong
    │   ├── PickleError          it is a pickle (.ckpt, .pt), which would run code
    │   ├── TensorError          a tensor or layer has an invalid value, shape or dtype
    │   └── NoStaticScaleError   no layer has a static input scale
    ├── LoraError                an adapter does not fit the checkpoint
    ├── CalibrationError         layer inputs could not be observed
    │   └── UnsupportedModelError  no engine can run this model
    ├── StatisticsError          a statistics file cannot be read, merged or applied
    └── OutputError              an output cannot be written; the input is unchanged

The command line prints these errors in one line and exits with their code. All others are bugs and show a traceback.
"""

from __future__ import annotations

from os import PathLike
from typing import ClassVar

StrPath = str | PathLike[str]


MOST_NAME, MOST_PROBLEM = 300, 1000
"""Maximum length of a tensor's name and of the problem in a message, as both may come from a file."""


def cut(text: str, most: int) -> str:
    """A text, shortened in the middle.

    >>> cut("blocks.0.attention.weight", 20)
    'block...ntion.weight'
    """
    if len(text) <= most:
        return text
    first = (most - 3) // 3
    return f"{text[:first]}...{text[first + 3 - most :]}"


class Error(Exception):
    """Base of all errors that a user can cause and fix.

    Args:
        problem: what failed, expected and found.
        path: the file.
        tensor: the tensor or layer.
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
    """An option, its value, or a combination of options is invalid."""

    exit_code = 2


class CheckpointError(Error):
    """A file is not a usable checkpoint."""


class HeaderError(CheckpointError):
    """The safetensors header is missing, truncated, or contradicts itself or the file."""


class PickleError(CheckpointError):
    """The file is a pickle, which is refused because reading it would run code."""


class TensorError(CheckpointError):
    """A tensor or layer has an invalid value, shape or dtype."""


class NoStaticScaleError(CheckpointError):
    """No layer of the checkpoint has a static input scale: its inputs are scaled dynamically."""


class LoraError(Error):
    """An adapter does not fit the checkpoint."""


class CalibrationError(Error):
    """Layer inputs could not be observed."""


class UnsupportedModelError(CalibrationError):
    """No engine can run this model."""


class StatisticsError(Error):
    """A statistics file cannot be read, merged or applied."""


class OutputError(Error):
    """An output cannot be written. The input is unchanged, and no incomplete file is left."""
