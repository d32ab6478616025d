"""Tables, messages, colors and progress, in a pipe and on a terminal."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest

from convert_to_quant.cli import output
from convert_to_quant.cli import terminal as terminals
from convert_to_quant.cli.terminal import Styled


@pytest.fixture(autouse=True)
def plain(monkeypatch):
    """A terminal with colors, and no earlier command."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(terminals, "_when", "auto")
    monkeypatch.setattr(output, "_quiet", False)


@pytest.mark.parametrize(
    ("when", "environment", "wanted"),
    [
        ("auto", {}, (True, False)),
        ("auto", {"NO_COLOR": "1"}, (False, False)),
        ("auto", {"NO_COLOR": ""}, (True, False)),
        ("auto", {"FORCE_COLOR": "1"}, (True, True)),
        ("auto", {"FORCE_COLOR": "0"}, (True, False)),
        ("auto", {"FORCE_COLOR": "1", "NO_COLOR": "1"}, (False, False)),
        ("auto", {"TERM": "dumb"}, (False, False)),
        ("always", {"NO_COLOR": "1"}, (True, True)),
        ("never", {"FORCE_COLOR": "1"}, (False, False)),
    ],
)
def test_precedence_of_color_settings(terminal, monkeypatch, when, environment, wanted):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    terminals.choose_color(["demo", "--color", when])
    assert (terminals.has_color(terminal()), terminals.has_color(io.StringIO())) == wanted


def test_colors_show_quality_and_do_not_move_columns(capsys, monkeypatch):
    rows = [(f"{db}", output.decibels(db)) for db in (125.0, 25.0, 24.9, 20.0, 19.9)]
    output.print_table(("layer", "SQNR"), rows, right=(1,))
    plain_text = capsys.readouterr().out
    monkeypatch.setenv("FORCE_COLOR", "1")
    output.print_table(("layer", "SQNR"), rows, right=(1,))
    coloured = capsys.readouterr().out
    assert plain_text.startswith("layer      SQNR\n125.0  125.0 dB\n25.0    25.0 dB\n")
    assert re.findall(r"\x1b\[(3\d)m(.*?)\x1b", coloured) == [
        ("32", "125.0 dB"), ("32", " 25.0 dB"), ("33", " 24.9 dB"), ("33", " 20.0 dB"), ("31", " 19.9 dB")
    ]  # fmt: skip
    assert re.sub(r"\x1b\[\d+m", "", coloured) == plain_text


@pytest.mark.parametrize(("width", "gone"), [(200, ""), (24, "why"), (14, "range, why")])
def test_a_narrow_terminal_omits_columns_with_a_note(terminal, monkeypatch, width, gone):
    stream = terminal()
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("NO_COLOR", "1")
    rows = [("blocks.0", "1.5", "because of it")]
    output.print_table(("layer", "range", "why"), rows, right=(1,), optional=(2, 1))
    shown = stream.getvalue()
    assert "blocks.0" in shown
    assert ("because of it" in shown, "1.5" in shown) == ("why" not in gone, "range" not in gone)
    assert " ".join(shown.split()).endswith(f"no room for: {gone} (a pipe, a file and --json have them)") == bool(gone)
    assert max(map(len, shown.splitlines())) <= width


def test_a_terminal_gets_aligned_columns_and_no_line_that_is_too_long(terminal, monkeypatch):
    stream = terminal()
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setenv("COLUMNS", "50")
    monkeypatch.setenv("NO_COLOR", "1")
    output.print_table(("file", "note"), [("模型.safetensors", "wide"), ("long_" * 12, "one two " * 9)])
    head, rule, wide, *lines = stream.getvalue().splitlines()
    assert set(rule) in ({"─"}, {"-"})
    assert head.index("note") == wide.index("wide") + 2, "two letters are two columns wide"
    assert max(map(len, [head, rule, *lines])) <= 50


def test_messages_are_wrapped_only_on_a_terminal(terminal, monkeypatch):
    monkeypatch.setenv("COLUMNS", "20")
    text = "calibrated 32 of 32  layers of a-file-with-a-long-name.safetensors"
    for stream in (terminal(), io.StringIO()):
        output.configure()  # which forgets what was noted
        monkeypatch.setattr(sys, "stderr", stream)
        output.say(text)
        output.note(text)
        lines = re.sub(r"\x1b\[\d+m", "", stream.getvalue()).splitlines()
        if stream.isatty():
            assert lines == [
                "calibrated 32 of 32", "layers of", "a-file-with-a-long-name.safetensors",
                "note: calibrated 32", "of 32  layers of", "a-file-with-a-long-name.safetensors",
            ]  # fmt: skip
        else:
            assert lines == [text, f"note: {text}"]


def test_control_characters_are_escaped(terminal, capsys, monkeypatch):
    evil = "a\x1b[2J\nb"
    output.print_table(("layer",), [(evil,), (Styled(evil, "bad"),)])
    output.say(evil)
    output.note(evil)
    output.error(evil)
    out, err = capsys.readouterr()
    assert out == "layer\n" + 2 * "a\\x1b[2J\\nb\n"
    assert err == "a\\x1b[2J\\nb\nnote: a\\x1b[2J\\nb\nerror: a\\x1b[2J\\nb\n"
    stream = terminal()
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setenv("NO_COLOR", "1")
    output.print_table(("layer",), [(evil,)])
    assert "\x1b[2J" not in stream.getvalue()


def test_quiet_prints_only_errors_and_data(capsys):
    output.configure(quiet=True)
    output.say("talk")
    output.note("talk")
    output.error("wrong")
    output.print_table(("data",), [("1",)])
    out, err = capsys.readouterr()
    assert (out, err) == ("data\n1\n", "error: wrong\n")


def test_long_work_reports_the_time_left_without_a_terminal(capsys, monkeypatch):
    now = 0.0
    monkeypatch.setattr(output, "SECONDS_BETWEEN_LINES", 30.0)
    monkeypatch.setattr(output.time, "monotonic", lambda: now)

    def work(seconds: float, resumed: int = 0) -> list[str]:
        nonlocal now
        with output.progress_bar("at work") as progress:
            for done in range(resumed, 41):
                progress(done, 40)
                now += seconds
        return capsys.readouterr().err.splitlines()

    assert work(0.7) == []
    assert work(3.0) == [
        "at work: 2%, about 2 min left",
        "at work: 28%, about 87 s left",
        "at work: 52%, about 57 s left",
        "at work: 78%, about 27 s left",
    ]
    assert work(2.0, resumed=20)[0] == "at work: 52%, about 38 s left"
    output.configure(quiet=True)
    assert work(3.0) == []


def on_a_terminal(*words: str, stdout: Path) -> str:
    """Output of a command on a pseudo-terminal, with stdout in a file."""
    ours, theirs = pty.openpty()
    program = [sys.executable, "-m", "convert_to_quant", *words]
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100"}
    with (
        stdout.open("w") as data,
        subprocess.Popen(program, stdout=data, stderr=theirs, stdin=subprocess.DEVNULL, env=environment) as process,
    ):
        os.close(theirs)
        shown = b""
        while True:
            try:
                part = os.read(ours, 1 << 16)
            except OSError:  # how Linux says that the other end is closed
                break
            if not part:
                break
            shown += part
    os.close(ours)
    assert process.returncode == 0, shown
    return shown.decode()


def test_a_nested_bar_replaces_the_outer_one_and_a_file_gets_a_plain_table(fp8_file, flux_file):
    table, output = flux_file.with_name("table.txt"), flux_file.with_name("out.safetensors")
    words = ["-i", str(flux_file), "-o", str(output), "--actcal", "--actcal-engine", "layer", "-v"]
    shown = on_a_terminal(*words, stdout=table)
    assert "converting" in shown
    assert "calibrating" in shown.partition("converting")[2]
    assert "converting" not in shown.partition("calibrating")[2]
    text = table.read_text(encoding="utf-8")
    assert "scale before" in text
    assert "\x1b" not in text
    assert "scale before" not in shown


def test_characters_that_a_stream_cannot_encode_are_escaped(flux_file):
    words = [sys.executable, "-m", "convert_to_quant", "-i", str(flux_file), "--dry-run"]
    outcome = subprocess.run(words, capture_output=True, env={**os.environ, "PYTHONIOENCODING": "ascii"}, check=False)
    assert (outcome.returncode, b"32 \\xd7 16" in outcome.stdout) == (0, True), outcome.stderr


@pytest.mark.parametrize("name", ["\xe9\U0001f600.safetensors", os.fsdecode(b"\xff.safetensors")])
def test_documents_are_json_with_any_file_name_and_encoding(fp8_file, name):
    path, report = fp8_file.rename(fp8_file.with_name(name)), fp8_file.with_name("report.json")
    words = [sys.executable, "-m", "convert_to_quant", "inspect", str(path), "--json"]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    outcome = subprocess.run([*words, "-"], capture_output=True, env=environment, check=True)
    assert json.loads(outcome.stdout)["path"] == str(path)
    subprocess.run([*words, str(report)], env=environment, check=True)
    assert json.loads(report.read_text(encoding="utf-8"))["path"] == str(path)
