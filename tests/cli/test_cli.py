"""The command line's frame: help, flags, dispatch, exit codes, and what it imports."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from convert_to_quant import __version__
from convert_to_quant.cli import COMMANDS, build_parser, flag_spelling, guarded
from convert_to_quant.errors import CheckpointError, OptionError

HEAVY = ("torch", "numpy", "rich", "diffusers", "safetensors")


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["merge", "--help"]], ids=" ".join)
def test_help_imports_nothing_heavy(words: list[str]) -> None:
    code = (
        "import sys\n"
        "from convert_to_quant.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit as stop: assert not stop.code\n"
        f"print([name for name in {HEAVY} if name in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=True)
    assert done.stdout
    assert done.stderr == "[]\n"


def test_the_module_runs_as_a_program() -> None:
    words = [sys.executable, "-m", "convert_to_quant", "--version"]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert done.stdout == f"convert_to_quant {__version__}\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(ctq: Any, command: str) -> None:
    outcome = ctq(command, "--help")
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out.startswith("usage: convert_to_quant ")


def test_convert_is_the_command_that_needs_no_name(ctq: Any) -> None:
    assert ctq("--help") == ctq("convert", "--help")


def test_dashes_and_underscores_are_the_same_in_every_flag() -> None:
    for command in COMMANDS:
        parser = build_parser(command)
        flags = [flag for action in parser._actions for flag in action.option_strings if flag.startswith("--")]
        assert flags
        for flag in flags:
            assert "_" not in flag, "the parsers know dashes"
            assert flag_spelling("--" + flag[2:].replace("-", "_")) == flag


def test_underscores_in_values_stay() -> None:
    assert flag_spelling("--actcal_lora=my_lora.safetensors") == "--actcal-lora=my_lora.safetensors"
    assert flag_spelling("my_file.safetensors") == "my_file.safetensors"
    assert flag_spelling("-o") == "-o"


def test_both_spellings_convert_alike(ctq: Any, flux_file: Path) -> None:
    outputs = []
    for name, sep in (("a", "-"), ("b", "_")):
        outputs.append(flux_file.with_name(f"{name}.safetensors"))
        words = [f"--scaling{sep}mode", "block", f"--block{sep}size=32", f"--exclude{sep}layers", "txt_mlp"]
        assert ctq("-i", flux_file, "-o", outputs[-1], *words).code == 0
    assert outputs[0].read_bytes() == outputs[1].read_bytes()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "the following arguments are required: -i/--input"),
        (["-i", "a", "--no-such-flag"], "unrecognized arguments: --no-such-flag"),
        (["-i", "a", "--actcal", "--actcal-engine", "magic"], "argument --actcal-engine: invalid choice: 'magic'"),
        (["-i", "a", "--scaling-mode", "column"], "argument --scaling-mode: invalid choice: 'column'"),
        (["-i", "a", "--actcal-samples", "many"], "argument --actcal-samples: invalid int value: 'many'"),
        (["-i", "a", "--comfy-quant", "--legacy"], "--legacy: not allowed with argument --comfy-quant"),
        (["-i", "a", "--actcal-s", "3"], "unrecognized arguments: --actcal-s"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_misuse_exits_2_and_says_what_is_wrong(ctq: Any, words: list[str], said: str) -> None:
    outcome = ctq(*words)
    assert outcome.code == 2
    assert said in outcome.err
    assert outcome.out == ""


def test_errors_become_one_line_and_their_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    def fail(error: BaseException) -> Any:
        raise error

    assert guarded(lambda: fail(CheckpointError("too short", path="a.safetensors", hint="get it again"))) == 1
    assert capsys.readouterr().err == "error: a.safetensors: too short (get it again)\n"
    assert guarded(lambda: fail(OptionError("no such thing"))) == 2
    assert capsys.readouterr().err == "error: no such thing\n"
    assert guarded(lambda: fail(KeyboardInterrupt())) == 130
    assert capsys.readouterr().err == "interrupted: an output is written whole or not at all\n"


def test_a_bug_shows_its_traceback() -> None:
    with pytest.raises(ZeroDivisionError):
        guarded(lambda: 1 // 0)


def test_a_reader_that_goes_away_is_no_error_message(save: Callable[..., Path], build: Any) -> None:
    path = save("m.safetensors", *build.quantized(["blocks.0"], "both"))  # so little to say that it waits in a buffer
    words = [sys.executable, "-m", "convert_to_quant", "-i", str(path), "--dry-run", "--json", "-"]
    words += ["--actcal", "--actcal-engine", "layer"]
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=buffered) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        error = process.stderr.read()
    assert process.returncode == 1
    assert "Traceback" not in error
    assert "BrokenPipe" not in error
