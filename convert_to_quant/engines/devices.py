"""The devices that models run on, checked in one place and before any work.

Sums of what layers receive are kept in float64, so that they add up to the same in any order. Apple's `mps` has none,
so it is not offered.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from ..errors import OptionError

if TYPE_CHECKING:
    import torch

_NAME = re.compile(r"(cpu|cuda|xpu)(:\d+)?")
_KNOWN = "cpu, cuda, cuda:0 or xpu"


def check_name(name: str) -> None:
    """Refuse what names no device that is offered, whether it is there or not; torch is not loaded.

    Raises:
        OptionError: it does not.
    """
    if name.partition(":")[0] == "mps":
        raise OptionError(
            f"device {name!r} cannot be used: it has no float64, in which statistics are kept", hint=_KNOWN
        )
    if not _NAME.fullmatch(name):
        raise OptionError(f"unknown device {name!r}", hint=_KNOWN)


def find_device(name: str | torch.device) -> torch.device:
    """A device that is there.

    Args:
        name: "cpu", "cuda", "cuda:1", "xpu" and so on.

    Raises:
        OptionError: it is unknown, or torch cannot use it here.
    """
    check_name(str(name))
    try:
        import torch

        device = torch.device(name)
        torch.empty(0, device=device)
    except (ImportError, RuntimeError, AssertionError) as error:
        raise OptionError(
            f"device {str(name)!r} cannot be used: {str(error).splitlines()[0]}",
            hint="without a device the model runs on the CPU",
        ) from None
    return device
