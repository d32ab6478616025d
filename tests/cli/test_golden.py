"""Golden screens: the output of commands, compared with the files in tests/golden.

    GOLDEN=write python -m pytest tests/cli/test_golden.py     writes them; review the difference before a commit

Folder and version are masked, and on screens with measurements all digits.
"""

from __future__ import annotations

import contextlib
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from convert_to_quant import __version__
from convert_to_quant.cli import COMMANDS, build_parser

SMALL = "--height 32 --width 48 --text-tokens 5 --steps 2 --samples 2"

HELP = {
    "overview": "",
    **{
        " ".join(names): f"{' '.join(names)} --help"
        for command in COMMANDS
        for names in [
            [command],
            *([command, name] for name in getattr(build_parser(command).subcommands(), "choices", ())),
        ]
    },
}
SCREENS = {
    "convert": "-i flux.safetensors -o out.safetensors",
    "convert dry": "-i flux.safetensors -o out.safetensors --dry-run",
    "convert calibrated": "-i flux.safetensors -o out.safetensors --actcal --actcal-samples 1",
    "calibrate dry": "-i fp8.safetensors --in-place --actcal --actcal-engine layer --dry-run -v",
    "inspect": "inspect flux.safetensors fp8.safetensors",
    "inspect layers": "inspect fp8.safetensors --layers",
    "observe": "observe flux.safetensors -o stats.safetensors --samples 1 --steps 2 --height 32 --width 48",
    "apply": "apply fp8.safetensors stats.safetensors -o out.safetensors",
    "apply dry": "apply fp8.safetensors stats.safetensors -o out.safetensors --dry-run -v",
    "merge": "merge stats.safetensors stats.safetensors -o merged.safetensors",
    "check": f"check flux.safetensors fp8.safetensors {SMALL}",
    "report": "report stats.safetensors fp8.safetensors",
    "report dry": "report stats.safetensors fp8.safetensors -o report.html --dry-run",
    "comfyui install": "comfyui install ComfyUI",
    "comfyui install dry": "comfyui install ComfyUI --dry-run",
    "error": "inspect none.safetensors",
    "misuse": "inspct fp8.safetensors",
}
MASKED = {"convert calibrated", "calibrate dry", "apply", "apply dry", "check", "report", "report dry"}
"""Screens with measurements, whose digits are masked."""


OBSERVED: list[bytes] = []
"""The statistics file of all screens."""


@pytest.fixture
def here(fp8_file, monkeypatch, done):
    """Run in a folder with models and statistics."""
    folder = fp8_file.parent
    (folder / "ComfyUI" / "custom_nodes").mkdir(parents=True)
    (folder / "ComfyUI" / "main.py").touch()
    (folder / "ComfyUI" / "nodes.py").touch()
    monkeypatch.chdir(folder)
    stats = folder / "stats.safetensors"
    if not OBSERVED:
        done(*SCREENS["observe"].split())
        OBSERVED.append(stats.read_bytes())
    stats.write_bytes(OBSERVED[0])
    return folder


@pytest.fixture
def shown(ctq, tmp_path):
    """shown(words): the output of a command."""

    def run(words: str) -> str:
        outcome = ctq(*words.split())
        said = "".join(f"2> {line}\n" for line in outcome.err.splitlines())
        return f"$ convert_to_quant {words}\n{mask(outcome.out + said, tmp_path)}exit code {outcome.code}\n"

    return run


def mask(text: str, folder: Path) -> str:
    """A screen without folder, version and seconds."""
    text = text.replace(str(folder), "FOLDER").replace(__version__, "VERSION")
    return re.sub(r"( → .* in )\d+ s$", r"\1# s", text, flags=re.MULTILINE)


def without_digits(text: str) -> str:
    """A screen without numbers and the column widths that depend on them, except in calls and names."""
    figure = re.compile(r"(?<![\w.-])\d[\d.e+-]*(?![\w>])")
    return "\n".join(
        line if line.startswith(("$ ", "exit ")) else re.sub(r" {2,}|─+", lambda run: run[0][:2], figure.sub("#", line))
        for line in text.split("\n")
    )


CODES = {"0": "</>", "1": "<bold>", "2": "<dim>", "31": "<red>", "32": "<green>", "33": "<yellow>"}


def readable(text: str) -> str:
    """A screen with readable escape sequences."""
    return re.sub(r"\x1b\[(\d+)m", lambda code: CODES[code[1]], text).replace("</><bold>", "")


@pytest.mark.parametrize("name", HELP)
def test_help(golden, name, ctq):
    outcome = ctq(*HELP[name].split())
    assert outcome.err == ""
    golden(f"help {name}", outcome.out)


@pytest.mark.parametrize("name", SCREENS)
def test_screens(golden, name, here, shown):
    text = shown(SCREENS[name])
    golden(f"screen {name}", without_digits(text) if name in MASKED else text)


def test_the_demo(golden, shown, tmp_path, monkeypatch):
    from convert_to_quant import demo

    figures = {"plain": (49.8, 30.1, 30.4, 41.0, 29.1), "hot": (49.2, 6.7, 30.1, 37.7, 25.2)}  # of 2026-11-26
    files = {}
    for way, count in zip(demo.WAYS, (18_216_520, 9_583_440, 9_582_360, 9_579_536, 6_387_760), strict=True):
        files[way] = tmp_path / way
        with files[way].open("wb") as file:
            file.truncate(count)
    rows = [
        SimpleNamespace(
            variant=name,
            files=files,
            fidelity={way: SimpleNamespace(sqnr_db=db) for way, db in zip(demo.WAYS, figure, strict=True)},
        )
        for name, figure in figures.items()
    ]
    found = SimpleNamespace(rows=rows, options=demo.DemoOptions(), picture=Path("demo/demo.png"), seconds=60.0)
    found.to_json = dict
    monkeypatch.setattr(demo, "run", lambda *_, **__: found)
    monkeypatch.chdir(tmp_path)
    for words in ("demo", "demo --dry-run"):
        golden(f"screen {words}", shown(words))


@pytest.mark.parametrize(
    ("name", "width"),
    [("inspect layers", 100), ("inspect layers", 60), ("check", 100)],
)
def test_screens_on_a_terminal(golden, terminal, name, width, here, done, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("TERM", "xterm")
    with contextlib.redirect_stdout(terminal()) as screen:
        done(*SCREENS[name].split())
    text = mask(f"$ convert_to_quant {SCREENS[name]}\n{readable(screen.getvalue())}", here)
    golden(f"terminal {name} {width}", without_digits(text) if name in MASKED else text)
