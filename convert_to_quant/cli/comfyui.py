"""`convert_to_quant comfyui install|uninstall DIR`: our nodes into a ComfyUI, and out of it."""

from __future__ import annotations

import argparse
from pathlib import Path

from .output import say

DESCRIPTION = "Put our nodes into a ComfyUI: a small folder in custom_nodes that imports this installed package."
EPILOG = """\
examples:
  convert_to_quant comfyui install ~/ComfyUI
  convert_to_quant comfyui uninstall ~/ComfyUI

Run it with the Python that runs ComfyUI, so that the nodes find this package. uninstall removes what install wrote,
and refuses a folder that holds anything else.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument("action", choices=("install", "uninstall"), help="what to do")
    parser.add_argument("folder", metavar="DIR", help="ComfyUI's folder, which has custom_nodes in it")


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    from ..comfyui_nodes import pack

    folder = Path(args.folder)
    if args.action == "install":
        say(f"wrote {pack.install(folder)}: restart ComfyUI, and find the nodes under convert_to_quant")
    else:
        say(f"removed {pack.uninstall(folder)}")
    return 0
