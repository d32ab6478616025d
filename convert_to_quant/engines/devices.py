"""Checks the devices that models run on, in one place and before any work.

Sums over layer inputs are float64, so that they add up to the same in any order. Apple's `mps` has no float64, so it is
not offered.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..errors import OptionError
from ..options import check_device_name

if TYPE_CHECKING:
    import torch


def find_device(name: str | torch.device) -> torch.device:
    """A device that torch can use.

    Args:
        name: "cpu", "cuda", "cuda:1", "xpu" and so on; "auto" is "cuda" where torch has it, else "cpu".

    Raises:
        OptionError: it is unknown, or torch cannot use it.
    """
    check_device_name(str(name))
    try:
        import torch

        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
        torch.empty(0, device=device)
    except (ImportError, RuntimeError, AssertionError) as error:
        raise OptionError(
            f"device {str(name)!r} cannot be used: {str(error).splitlines()[0]}",
            hint="the default is a GPU if there is one, else the CPU",
        ) from None
    return device
