"""The folder that makes ComfyUI find our nodes: one small file in `custom_nodes` that imports the installed package.

The file's first line carries the SHA-256 of the rest. So a file of ours, of whatever version, is told from one that
somebody else wrote or changed, and only what is ours is replaced or removed.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path

from ..checkpoint import is_left_over, write_bytes
from ..errors import OptionError, OutputError
from .folders import prepare

NAME = "convert_to_quant"
FILE = "__init__.py"
CACHE = "__pycache__"
MARK = "# convert_to_quant pack, sha256 "

BODY = '''\
"""ComfyUI nodes of convert_to_quant. Removed by: convert_to_quant comfyui uninstall COMFYUI_DIR"""

import logging
import sys

try:
    from convert_to_quant.comfyui_nodes.nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS
except ImportError as error:  # told in one line: what is raised here, ComfyUI prints with a traceback
    missing = (error.name or "convert_to_quant").partition(".")[0]
    what = "PATH_OF_ITS_REPOSITORY_OR_WHEEL" if missing == "convert_to_quant" else missing
    logging.error(
        f"convert_to_quant has no nodes here: {error}. To install {missing} for this ComfyUI, run  "
        f'"{sys.executable}" -s -m pip install {what}  and restart ComfyUI'
    )
    NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS = {}, {}

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
'''


def content() -> bytes:
    """The file, with its mark."""
    return _mark(BODY.encode()) + BODY.encode()


def install(comfyui: Path, *, dry_run: bool = False) -> Path:
    """Write the pack, or write it anew over a former version of it.

    Args:
        comfyui: ComfyUI's folder, or another base directory with `custom_nodes` in it.
        dry_run: check everything, and touch nothing.

    Returns:
        The pack's folder.

    Raises:
        OptionError: there is no `custom_nodes` in it.
        OutputError: something else has the pack's name, or it cannot be written.
    """
    folder, _ = _checked(comfyui)
    if not dry_run:
        prepare(folder / FILE)
        write_bytes(folder / FILE, content())
    return folder


def uninstall(comfyui: Path, *, dry_run: bool = False) -> Path:
    """Remove the pack, and nothing else.

    Args:
        comfyui: as for `install`.
        dry_run: as for `install`.

    Returns:
        The folder that was removed.

    Raises:
        OptionError: there is no `custom_nodes`, or no pack in it.
        OutputError: the folder is not what `install` wrote, or cannot be removed.
    """
    folder, exists = _checked(comfyui)
    if not exists:
        raise OptionError(f"{folder} does not exist: nothing to remove")
    if dry_run:
        return folder
    try:
        shutil.rmtree(folder)
    except OSError as error:
        raise OutputError(f"cannot be removed: {error.strerror}", path=folder) from None
    return folder


def _checked(comfyui: Path) -> tuple[Path, bool]:
    """The pack's folder, and whether it is there: with an unchanged file of ours and what Python made of it, or not."""
    packs, hint = comfyui / "custom_nodes", "move it away yourself if you do not need it"
    if not packs.is_dir():
        raise OptionError(f"there is no folder {packs}", hint="name ComfyUI's folder, which has custom_nodes in it")
    folder = packs / NAME
    if not os.path.lexists(folder):
        return folder, False
    if folder.is_symlink() or not folder.is_dir():
        raise OutputError("not the folder that install makes, so it is left alone", path=folder, hint=hint)
    inside = [path for path in folder.rglob("*") if not is_left_over(path.name)]
    if not inside:  # an install that was killed between its two steps
        return folder, True
    ours = {path for path in (folder / FILE, *(folder / CACHE).glob("__init__.*.pyc")) if path.is_file()}
    ours |= {path for path in inside if path == folder / CACHE and path.is_dir()}
    strangers = [path for path in inside if path.is_symlink() or path not in ours]
    if strangers:
        raise OutputError("install did not write this, so it is left alone", path=strangers[0], hint=hint)
    try:
        first, newline, rest = (folder / FILE).read_bytes().partition(b"\n")
    except OSError:
        first, newline, rest = b"", b"", b""
    if first + newline != _mark(rest):
        raise OutputError("install did not write this, or it was changed since", path=folder / FILE, hint=hint)
    return folder, True


def _mark(body: bytes) -> bytes:
    return f"{MARK}{hashlib.sha256(body).hexdigest()}\n".encode()
