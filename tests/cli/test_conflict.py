"""The package on PyPI with our module's name: a warning wherever it is installed, and hints for its flags."""

from __future__ import annotations

import sys

import pytest

from convert_to_quant.cli import build_parser
from convert_to_quant.cli.conflict import FLAGS

THEIRS = "[console_scripts]\nconvert_to_quant = convert_to_quant.convert_to_quant:main\n"
OURS = "[console_scripts]\nconvert_to_quant = convert_to_quant.cli:main\n"


@pytest.mark.parametrize(
    ("name", "entry_points", "warned"),
    [
        ("convert_to_quant-1.3.4", THEIRS, True),
        ("convert_to_quant-1.3.4", None, True),
        ("convert_to_quant-0.1.0", OURS, False),
        ("calibrated_quant-0.1.0", OURS, False),
    ],
)
def test_only_the_other_package_causes_a_warning(name, entry_points, warned, ctq, fp8_file, tmp_path, monkeypatch):
    info = tmp_path / "site packages" / f"{name}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").touch()
    if entry_points is not None:
        (info / "entry_points.txt").write_text(entry_points)
    places = [tmp_path / "none", info / "METADATA", info.parent]  # a missing folder and a file come first
    monkeypatch.setattr(sys, "path", [*map(str, places), *sys.path])
    told = ctq("inspect", fp8_file).err
    assert told.startswith("note: the package convert-to-quant 1.3.4 uses our module's name") == warned
    assert told.endswith("pip uninstall convert-to-quant, then reinstall calibrated-quant\n") == warned
    assert ctq("inspect", fp8_file, "--quiet").err == ""


@pytest.mark.parametrize(
    ("flag", "hint"), [("--calib_samples", "use --actcal-samples N"), ("--low-memory", "not needed here")]
)
def test_flags_of_the_other_package_get_a_hint(ctq, flag, hint):
    assert FLAGS.keys().isdisjoint(build_parser("convert")._option_string_actions)
    outcome = ctq("-i", "in.safetensors", flag, 8)
    said = f"error: unknown option {flag.replace('_', '-')} ({hint})"
    assert (outcome.code, outcome.err.splitlines()[0]) == (2, said)
