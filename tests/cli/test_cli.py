"""Help, flags, dispatch and exit codes."""

from __future__ import annotations

import argparse
import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from convert_to_quant import __version__
from convert_to_quant.cli import COMMANDS, READERS, build_parser, guarded
from convert_to_quant.cli.parsing import Parser
from convert_to_quant.errors import CheckpointError, OptionError

MOST_LINES = 46
LONGER = {"observe": 52, "convert": 72, "check": 51, "card": 53}
"""Commands that run a model have options for its inputs."""


def test_the_module_runs_as_a_program():
    words = [sys.executable, "-m", "convert_to_quant", "--version"]
    outcome = subprocess.run(words, capture_output=True, text=True, check=True)
    assert outcome.stdout == f"convert_to_quant {__version__}\n"


def test_convert_is_the_default_command(ctq, flux_file):
    words = ("-i", flux_file, "--dry-run")
    assert ctq(*words) == ctq("convert", *words)


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"], ["help"]], ids=" ".join)
def test_the_overview_fits_a_screen(ctq, words):
    outcome = ctq(*words)
    lines = outcome.out.splitlines()
    assert (outcome.code, outcome.err) == (0, "")
    assert len(lines) <= 24
    assert max(map(len, lines)) <= 80
    assert lines[2] == "examples:"
    assert [name for name in COMMANDS if f"\n  {name:<12}" not in outcome.out] == []


def leaves(command: str) -> dict[str, Parser]:
    """The parsers of a command's actions, or its own."""
    parser = build_parser(command)
    actions = parser.subcommands()
    return {command: parser} if actions is None else {f"{command} {name}": one for name, one in actions.choices.items()}


@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_short_and_starts_with_examples(ctq, command, monkeypatch):
    assert ctq("help", command) == ctq(command, "--help")
    for names in {command, *leaves(command)}:
        lines = ctq(*names.split(), "--help").out.splitlines()
        assert len(lines) <= LONGER.get(command, MOST_LINES)
        assert [line for line in lines if len(line) > 80] == []
        first_option = next((number for number, line in enumerate(lines) if line.startswith("  -")), len(lines))
        assert next(number for number, line in enumerate(lines) if line.startswith("example")) < first_option
    monkeypatch.setenv("COLUMNS", "60")
    options = ctq(command, "--help").out.partition("\ncommon:")[2].splitlines()
    assert [line for line in options if line.startswith("  -") and len(line) > 60] == []


@pytest.mark.parametrize(("name", "parser"), [one for command in COMMANDS for one in leaves(command).items()])
def test_every_command_has_the_shared_options_and_shows_defaults(name, parser):
    flags = {flag for action in parser._actions for flag in action.option_strings}
    assert {"-q", "-v", "-h", "--quiet", "--verbose", "--json", "--config", "--save-config", "--color", "--version",
            "--help"} <= flags  # fmt: skip
    assert ("--dry-run" in flags) == (name not in READERS)
    for action in parser._actions:
        if action.help != argparse.SUPPRESS and action.default not in (None, False, [], argparse.SUPPRESS):
            default = f"{action.default:g}" if isinstance(action.default, float) else str(action.default)
            assert str(action.help).endswith(f"({default})")
        assert not any("_" in flag for flag in action.option_strings), "the parsers know dashes"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["-o", "a"], "the following arguments are required: -i/--input"),
        (["-i", "a", "--no-such-flag"], "unknown option --no-such-flag"),
        (["-i", "a", "--actcal-sample", "3"], "unknown option --actcal-sample (did you mean --actcal-samples?)"),
        (["--scaling_mod=row"], "unknown option --scaling-mod (did you mean --scaling-mode?)"),
        (["-i", "a", "--actcal-engine", "layr"], "--actcal-engine: invalid choice: 'layr' (did you mean layer?)"),
        (["-i", "a", "--scaling-mode", "?"],
         "--scaling-mode: invalid choice: '?' (choose from tensor, row, block)"),
        (["-i", "a", "--actcal-samples", "many"], "--actcal-samples: invalid int value: 'many'"),
        (["-i", "a", "--comfy-quant", "--legacy"], "--legacy: not allowed with argument --comfy-quant"),
        (["-i"], "-i/--input: expected one argument"),
        (["-i", "a", "b"], "unexpected argument 'b'"),
        (["--actcal", "b"], "unexpected argument 'b' (did you mean -i b?)"),
        (["convert", "a.safetensors", "-o", "b"],
         "unexpected argument 'a.safetensors' (did you mean -i a.safetensors?)"),
        (["-i", "a", "-x"], "unexpected argument '-x'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)  # fmt: skip
def test_usage_errors_exit_with_2_and_refer_to_help(ctq, words, said):
    outcome = ctq(*words)
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err == f"error: {said}\nsee: convert_to_quant convert --help\n"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["inpsect", "f"], "unknown command 'inpsect' (did you mean inspect?)"),
        (["help", "aply"], "unknown command 'aply' (did you mean apply?)"),
        (["x"], "unknown command 'x' (see convert_to_quant --help)"),
        (["a.safetensors", "-o", "b.safetensors"], "a.safetensors is a file, not a command (to convert it: "
         "convert_to_quant -i a.safetensors; to inspect it: convert_to_quant inspect a.safetensors)"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)  # fmt: skip
def test_an_unknown_command_suggests_a_known_one(ctq, words, said):
    outcome = ctq(*words)
    assert (outcome.code, outcome.out, outcome.err) == (2, "", f"error: {said}\n")


@pytest.mark.parametrize(
    ("failure", "code", "said"),
    [
        (CheckpointError("too short", path="a", hint="get it again"), 1, "error: a: too short (get it again)\n"),
        (OptionError("no such thing"), 2, "error: no such thing\n"),
        (KeyboardInterrupt(), 130, "interrupted: outputs are never left incomplete\n"),
    ],
)
def test_errors_become_one_line_and_an_exit_code(capsys, failure, code, said):
    def fail() -> int:
        raise failure

    assert guarded(fail) == code
    assert capsys.readouterr().err == said


def test_a_bug_shows_its_traceback():
    with pytest.raises(ZeroDivisionError):
        guarded(lambda: 1 // 0)


LACK = {
    "Python": MemoryError(),
    "torch": RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory:\nframe #1"),
    "CUDA": RuntimeError("CUDA out of memory. Tried to allocate 20.00 MiB."),
    "threads": RuntimeError("can't start new thread"),
    "the system": OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)),
    "a library": ImportError("libx.so: failed to map segment from shared object"),
}


@pytest.mark.parametrize("failure", LACK.values(), ids=LACK)
@pytest.mark.parametrize("wrapped", [False, True])
def test_out_of_memory_is_one_line(failure, wrapped, capsys):
    def run() -> int:
        try:
            raise failure
        except type(failure):
            if wrapped:
                raise ValueError("while something was made of it") from failure
            raise

    assert guarded(run) == 1
    said = "error: out of memory (close other programs, or use fewer or smaller samples)\n"
    assert capsys.readouterr().err == said


def test_a_closed_pipe_causes_no_message(save, build):
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


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's device that is always full")
@pytest.mark.parametrize("words", [["--help"], ["completion", "bash"]])
def test_a_full_disk_is_one_line(words):
    with Path("/dev/full").open("w") as full:
        program = [sys.executable, "-m", "convert_to_quant", *words]
        outcome = subprocess.run(program, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert (outcome.returncode, outcome.stderr) == (1, "error: the output cannot be written: No space left on device\n")


@pytest.mark.parametrize(("closed", "code", "error"), [(">&-", 1, "error: none: no such file\n"), ("2>&-", 1, "")])
def test_output_for_a_closed_stream_does_not_go_to_the_other(fp8_file, closed, code, error):
    command = f'exec "$@" {closed}'
    words = [sys.executable, "-m", "convert_to_quant", "inspect", str(fp8_file), "none", "--json", "-"]
    outcome = subprocess.run(["sh", "-c", command, "sh", *words], capture_output=True, text=True, check=False)
    assert (outcome.returncode, outcome.stderr) == (code, error)
    assert closed == ">&-" or json.loads(outcome.stdout)["files"]
