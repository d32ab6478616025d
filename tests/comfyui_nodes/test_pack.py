"""The pack in custom_nodes: written, imported as ComfyUI does it, and removed; never anything else."""

from __future__ import annotations

import runpy
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from convert_to_quant.comfyui_nodes import pack
from convert_to_quant.comfyui_nodes.nodes import NODE_CLASS_MAPPINGS
from convert_to_quant.errors import OptionError, OutputError


@pytest.fixture
def home(tmp_path):
    """A ComfyUI folder with somebody else's pack in it."""
    (tmp_path / "custom_nodes" / "another").mkdir(parents=True)
    (tmp_path / "custom_nodes" / "another" / "__init__.py").write_text("NODE_CLASS_MAPPINGS = {}\n")
    return tmp_path


def files(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def installed(home: Path) -> Path:
    """The pack's folder, after `comfyui install`."""
    folder, _ = pack.find(home)
    pack.install(folder)
    return folder


def test_the_installed_pack_gives_the_nodes_and_leaves_without_a_trace(home):
    before = files(home)
    assert pack.find(home) == (home / "custom_nodes" / "convert_to_quant", False)

    folder = installed(home)
    assert runpy.run_path(str(folder / pack.FILE))["NODE_CLASS_MAPPINGS"] is NODE_CLASS_MAPPINGS
    (folder / "__pycache__").mkdir(exist_ok=True)
    (folder / "__pycache__" / "__init__.cpython-312.pyc").touch()

    assert pack.find(home) == (folder, True)
    pack.uninstall(folder)
    assert files(home) == before
    assert not folder.exists()


@pytest.mark.parametrize(
    ("missing", "what"),
    [
        ("convert_to_quant.comfyui_nodes.nodes", "PATH_OF_ITS_REPOSITORY_OR_WHEEL"),
        ("some_package", "some_package"),
    ],
)
def test_the_pack_says_in_one_line_what_is_missing(home, monkeypatch, caplog, missing, what):
    class Nowhere:
        """Nodes that cannot be imported."""

        def __getattr__(self, _: str) -> Any:
            raise ModuleNotFoundError(f"No module named {missing!r}", name=missing)

    folder = installed(home)
    monkeypatch.setitem(sys.modules, "convert_to_quant.comfyui_nodes.nodes", Nowhere())  # type: ignore[arg-type]
    assert runpy.run_path(str(folder / pack.FILE))["NODE_CLASS_MAPPINGS"] == {}
    (line,) = caplog.messages
    package, command = missing.partition(".")[0], f'"{sys.executable}" -s -m pip install {what}'
    said = f"convert_to_quant cannot load its nodes: No module named {missing!r}. To install {package} for this ComfyUI"
    assert line == f"{said}, run  {command}  and restart ComfyUI"


def test_installing_again_renews_what_another_version_wrote(home, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(pack, "BODY", "an older version\n")
        installed(home)

    assert (installed(home) / "__init__.py").read_bytes() == pack.content()


def test_an_install_that_was_killed_can_be_repeated_or_removed(home):
    (home / "custom_nodes" / "convert_to_quant").mkdir()
    folder = installed(home)
    (folder / "__init__.py").rename(folder / ".convert_to_quant.0123456789abcdef.tmp")
    assert pack.find(home) == (folder, True)


SPOILED: Mapping[str, Callable[[Path], object]] = {
    "changed": lambda folder: (folder / "__init__.py").write_bytes(pack.content() + b"mine = 1\n"),
    "somebody's": lambda folder: (folder / "__init__.py").write_text("from .nodes import NODE_CLASS_MAPPINGS\n"),
    "more in it": lambda folder: (folder / "notes.txt").touch(),
    "more in its cache": lambda folder: (folder / "__pycache__" / "other.pyc").mkdir(parents=True),
    "cache is a link": lambda folder: (folder / "__pycache__").symlink_to(folder.parent / "another"),
    "cache is a file": lambda folder: (folder / "__pycache__").touch(),
    "link": lambda folder: folder.symlink_to(folder.rename(folder.with_name("elsewhere"))),
    "file": lambda folder: (shutil.rmtree(folder), folder.touch()),
}


@pytest.mark.parametrize("how", SPOILED)
def test_what_is_not_ours_is_refused(home, how):
    SPOILED[how](installed(home))
    with pytest.raises(OutputError, match=r"comfyui install did not write this, or it was changed since"):
        pack.find(home)


def test_a_folder_that_is_no_comfyui_is_refused(tmp_path):
    with pytest.raises(OptionError, match=r"there is no folder .*custom_nodes"):
        pack.find(tmp_path)
