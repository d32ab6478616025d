"""What starts at once: help, the overview and inspect load nothing heavy, whoever adds an import."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from convert_to_quant.cli import COMMANDS

HEAVY = {"torch", "diffusers", "transformers", "safetensors", "matplotlib", "rich", "PIL", "shtab"}
WORDS = {
    "overview": [],
    "version": ["--version"],
    "misuse": ["inpsect"],
    **{f"{command} --help": [command, "--help"] for command in COMMANDS},
}

CODE = """
import sys
from convert_to_quant.cli import main
try:
    main(sys.argv[1:])
except SystemExit:
    pass
sys.stderr.write("\\n" + " ".join(sorted({name.partition(".")[0] for name in sys.modules})))
"""


def loaded(*words: str) -> set[str]:
    """The packages that a call loads."""
    done = subprocess.run([sys.executable, "-c", CODE, *words], capture_output=True, text=True, check=True, timeout=60)
    return set(done.stderr.splitlines()[-1].split())


@pytest.mark.parametrize("name", WORDS)
def test_help_loads_nothing_heavy_and_no_numpy(name: str) -> None:
    assert loaded(*WORDS[name]) & (HEAVY | {"numpy"}) == set()


@pytest.mark.parametrize("words", [["inspect"], ["inspect", "--layers"], ["-i"]], ids=" ".join)
def test_what_reads_a_file_loads_numpy_and_nothing_heavy(words: list[str], fp8_file: Path) -> None:
    more = ["--dry-run"] if words == ["-i"] else []
    found = loaded(words[0], str(fp8_file), *words[1:], *more)
    assert "numpy" in found
    assert found & HEAVY == set()
