"""Another program with our module's name is told about, once, wherever it is installed."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from convert_to_quant.cli.neighbour import FLAGS

THEIRS = """\
[console_scripts]
convert-to-quant = convert_to_quant.convert_to_quant:main
convert_to_quant = convert_to_quant.convert_to_quant:main
ctq = convert_to_quant.convert_to_quant:main
"""
OURS = "[console_scripts]\nconvert_to_quant = convert_to_quant.cli:main\nctq = convert_to_quant.cli:main\n"

Install = Callable[..., None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Make a distribution look installed, behind a missing folder and a file on the path."""

    def make(name: str, entry_points: str | None) -> None:
        info = tmp_path / "site packages" / f"{name}.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").touch()
        if entry_points is not None:
            (info / "entry_points.txt").write_text(entry_points)
        places = [tmp_path / "none", info / "METADATA", info.parent]
        monkeypatch.setattr(sys, "path", [*map(str, places), *sys.path])

    return make


@pytest.mark.parametrize("entry_points", [THEIRS, None])
def test_the_other_program_is_told_in_one_line(
    entry_points: str | None, install: Install, ctq: Any, fp8_file: Path
) -> None:
    install("convert_to_quant-1.3.4", entry_points)
    outcome = ctq("inspect", fp8_file)
    assert outcome.code == 0
    assert re.fullmatch(
        r"note: another program, convert-to-quant 1\.3\.4, is installed under our module's name, .*"
        r"pip uninstall convert-to-quant, then install calibrated-quant again\n",
        outcome.err,
    )
    assert ctq("inspect", fp8_file, "--quiet").err == ""
    assert ctq("inspect", "--help").err == ""


@pytest.mark.parametrize("name", ["calibrated_quant-0.1.0", "convert_to_quant-0.1.0"])
def test_ours_under_either_name_is_not_told(name: str, install: Install, ctq: Any, fp8_file: Path) -> None:
    install(name, OURS)
    assert ctq("inspect", fp8_file).err == ""


@pytest.mark.parametrize("flag", FLAGS)
def test_flags_of_the_other_program_are_answered(ctq: Any, flag: str) -> None:
    outcome = ctq("-i", "in.safetensors", flag.replace("-", "_").replace("__", "--", 1))
    told = f"error: {flag} is another program's option ({FLAGS[flag]})"
    assert (outcome.code, outcome.err.splitlines()[0]) == (2, told)
