"""What tests do with files: convert them, look into them, and let calls of the system fail."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from convert_to_quant.checkpoint import open_checkpoint
from convert_to_quant.convert import convert, plan_conversion
from convert_to_quant.errors import Error
from convert_to_quant.options import ConvertOptions


def listing(folder: Path) -> list[str]:
    """The names in a folder."""
    return sorted(path.name for path in folder.iterdir())


def contents(path: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """The dtype, shape and bytes of every tensor of a checkpoint."""
    with open_checkpoint(path) as checkpoint:
        return {name: (i.dtype, i.shape, checkpoint.raw(name).tobytes()) for name, i in checkpoint.tensors.items()}


def converted(source: Path, output: Path, **options: Any) -> list[str]:
    """Convert a file; the plan's notes."""
    with open_checkpoint(source) as checkpoint:
        plan = plan_conversion(checkpoint, ConvertOptions(**options))
        convert(checkpoint, plan, output)
    return plan.notes


def failing(number: int, when: Callable[..., bool] = lambda *_, **__: True, real: Any = None) -> Callable[..., Any]:
    """A call of the system that fails with an error, always or when its arguments say so."""

    def call(*arguments: Any, **more: Any) -> Any:
        if when(*arguments, **more):
            raise OSError(number, os.strerror(number))
        return real(*arguments, **more)

    return call


@contextlib.contextmanager
def refused(error: type[Error] = Error) -> Iterator[list[str]]:
    """What is refused, and with which message."""
    message: list[str] = []
    with pytest.raises(error) as caught:
        yield message
    message.append(str(caught.value))
