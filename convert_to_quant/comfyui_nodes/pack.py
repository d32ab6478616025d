"""The pack in ComfyUI's `custom_nodes`: a folder with one small file that imports the installed package.

The file's first line contains the SHA-256 of the rest. This identifies our file in any version, so that only what
`install` wrote is replaced or removed.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from itertools import chain
from pathlib import Path

from ..checkpoint import is_left_over, write_bytes
from ..errors import OptionError, OutputError
from .folders import prepare

NAME = "convert_to_quant"
FILE = "__init__.py"
CACHE = "__pycache__"
MARK = "# convert_to_quant pack, sha256 "

BODY = '''\
"""ComfyUI nodes of convert_to_quant. To remove them: convert_to_quant comfyui uninstall COMFYUI_DIR"""

import logging
import sys

try:
    from convert_to_quant.comfyui_nodes.nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS
except ImportError as error:  # logged in one line: ComfyUI would print a traceback
    missing = (error.name or "convert_to_quant").partition(".")[0]
    what = "PATH_OF_ITS_REPOSITORY_OR_WHEEL" if missing == "convert_to_quant" else missing
    logging.error(
        f"convert_to_quant cannot load its nodes: {error}. To install {missing} for this ComfyUI, run  "
        f'"{sys.executable}" -s -m pip install {what}  and restart ComfyUI'
    )
    NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS = {}, {}

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
'''


def content() -> bytes:
    """The file, first line included."""
    return _first_line(BODY.encode()) + BODY.encode()


def find(comfyui: Path) -> tuple[Path, bool]:
    """The pack's folder in a ComfyUI, and whether it exists.

    Args:
        comfyui: ComfyUI's folder, or another base directory that contains `custom_nodes`.

    Raises:
        OptionError: there is no `custom_nodes`.
        OutputError: the folder contains anything that `install` did not write.
    """
    packs = comfyui / "custom_nodes"
    if not packs.is_dir():
        raise OptionError(f"there is no folder {packs}", hint="name ComfyUI's folder, which contains custom_nodes")
    folder = packs / NAME
    if not os.path.lexists(folder):
        return folder, False
    for path in chain([folder], folder.rglob("*")):
        if not _is_ours(path, folder):
            hint = "move it away if you do not need it"
            raise OutputError("comfyui install did not write this, or it was changed since", path=path, hint=hint)
    return folder, True


def install(folder: Path) -> None:
    """Write the pack to the folder that `find` returned, over any version of it."""
    prepare(folder / FILE)
    write_bytes(folder / FILE, content())


def uninstall(folder: Path) -> None:
    """Remove the folder that `find` returned."""
    try:
        shutil.rmtree(folder)
    except OSError as error:
        raise OutputError(f"cannot be removed: {error.strerror}", path=folder) from None


def _is_ours(path: Path, folder: Path) -> bool:
    """Whether a path at or below the pack's folder is an unchanged file of ours, or what Python made of it."""
    if path.is_symlink():
        return False
    if path in (folder, folder / CACHE):
        return path.is_dir()
    if path == folder / FILE and path.is_file():
        first, newline, rest = path.read_bytes().partition(b"\n")
        return first + newline == _first_line(rest)
    compiled = path.parent == folder / CACHE and path.match("__init__.*.pyc")
    return path.is_file() and (compiled or is_left_over(path.name))


def _first_line(body: bytes) -> bytes:
    return f"{MARK}{hashlib.sha256(body).hexdigest()}\n".encode()
