"""Help, overview and inspect start fast: they load no heavy modules."""

from __future__ import annotations

import subprocess
import sys

import pytest

from convert_to_quant.cli import COMMANDS

HEAVY = {"torch", "diffusers", "transformers", "safetensors", "matplotlib", "rich", "PIL", "shtab"}
SLOW = HEAVY | {"numpy", "dataclasses", "logging"}
"""The last two take 5 ms each, a tenth of the time of help."""

CODE = """
import sys
from convert_to_quant.cli import main
try:
    main(sys.argv[1:])
except SystemExit:
    pass
sys.stderr.write("\\n" + " ".join(sys.modules))
"""


def loaded(*words: str) -> set[str]:
    """The modules that a command loads."""
    outcome = subprocess.run(
        [sys.executable, "-c", CODE, *words], capture_output=True, text=True, check=True, timeout=60
    )
    return set(outcome.stderr.splitlines()[-1].split())


@pytest.mark.parametrize("words", ["", "--version", "inpsect", *(f"{command} --help" for command in COMMANDS)])
def test_help_loads_nothing_slow(words):
    assert loaded(*words.split()) & SLOW == set()


@pytest.mark.parametrize("words", [["inspect"], ["inspect", "--layers"], ["--dry-run", "-i"]], ids=" ".join)
def test_reading_a_file_loads_nothing_heavy(words, fp8_file):
    found = loaded(*words, str(fp8_file))
    assert "numpy" in found
    assert found & HEAVY == set()


def test_inspect_does_not_load_conversion(fp8_file):
    assert loaded("inspect", str(fp8_file)) & {"convert_to_quant.convert", "convert_to_quant.stats"} == set()
