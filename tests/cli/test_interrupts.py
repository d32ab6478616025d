"""Real signals: one line, the shell's exit code, and no files left behind."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time

import pytest

from convert_to_quant import cli
from convert_to_quant.cli.interrupts import MOMENT_SECONDS, interruptible

STALLS = {
    "convert": ("convert_to_quant.convert", "quantize_weight", ["-i", "BF16", "-o", "OUT"]),
    "calibrate": ("convert_to_quant.engines.layer", "input_range",
                  ["-i", "FP8", "-o", "OUT", "--actcal", "--actcal-engine", "layer"]),
    "observe": ("convert_to_quant.engines.noise", "latents", ["observe", "BF16", "-o", "OUT"]),
}  # fmt: skip
"""A function in which each command is stalled."""

STALL = """
import importlib, os, sys, time
from convert_to_quant import cli
module, name, seconds, first = importlib.import_module(sys.argv[1]), sys.argv[2], float(sys.argv[3]), int(sys.argv[4])
function = getattr(module, name)
calls = 0
def stall(*words, **more):
    global calls
    calls += 1
    if calls >= first:
        os.write(1, b"at work\\n")
        time.sleep(seconds)
    return function(*words, **more)
setattr(module, name, stall)
sys.argv[1:] = sys.argv[5:]
sys.exit(cli.main())
"""


@pytest.fixture
def stalled(flux_file, fp8_file):
    """Start a command and wait until it is stalled."""

    def start(command: str, seconds: float, *more: str, call: int = 1) -> subprocess.Popen[str]:
        module, function, words = STALLS[command]
        places = {"BF16": flux_file, "FP8": fp8_file, "OUT": flux_file.with_name("out.safetensors")}
        program = [sys.executable, "-c", STALL, module, function, str(seconds), str(call)]
        program += [str(places.get(word, word)) for word in (*words, *more)]
        process = subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        assert process.stdout is not None
        assert process.stdout.readline() == "at work\n"
        return process

    return start


@pytest.mark.parametrize(
    ("command", "number", "code"),
    [
        ("convert", signal.SIGINT, 130),
        ("convert", signal.SIGTERM, 143),
        ("calibrate", signal.SIGINT, 130),
        ("observe", signal.SIGTERM, 143),  # which takes seconds to load; SIGINT ends it below
    ],
)
def test_a_signal_leaves_nothing(stalled, folder, command, number, code):
    before = folder()
    process = stalled(command, 0.3)
    process.send_signal(number)
    out, error = process.communicate(timeout=60)
    assert process.returncode == code
    assert error == "interrupted: outputs are never left incomplete\n"
    assert out.count("at work") < 10, "of 13 layers: work that was queued is not done first"
    assert folder() == before


def test_saved_progress_of_an_observation_is_kept(stalled, flux_file):
    small = ("--height", "32", "--width", "32", "--text-tokens", "4", "--samples", "2", "--steps", "1")
    process = stalled("observe", 0.3, *small, "--save-every", "0", call=3)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    partial = flux_file.with_name("out.safetensors.partial")
    assert partial.exists()
    assert error.splitlines() == [
        f"note: progress is saved in {partial}; continue with --resume",
        "interrupted: outputs are never left incomplete",
    ]


def test_a_second_signal_exits_at_once(stalled, folder):
    before = folder()
    process = stalled("convert", 60)  # the first signal waits for its threads
    process.send_signal(signal.SIGINT)
    time.sleep(MOMENT_SECONDS + 0.3)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=30)
    assert process.returncode == 130
    assert folder() == before


def test_a_duplicate_signal_counts_once(stalled, folder):
    before = folder()
    process = stalled("convert", 0.3)
    process.send_signal(signal.SIGINT)
    time.sleep(0.05)  # else the kernel takes both for one
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert error == "interrupted: outputs are never left incomplete\n"
    assert folder() == before


def test_handlers_are_restored(done):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    done("--help")
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_in_a_thread_the_command_line_works_without_signals(capsys):
    codes: list[int] = []
    thread = threading.Thread(target=lambda: codes.append(cli.main(["--help"])))
    thread.start()
    thread.join()
    assert codes == [0]
    assert capsys.readouterr().out


def test_a_signal_that_is_ignored_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with interruptible():
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        with pytest.raises(KeyboardInterrupt), interruptible():
            signal.raise_signal(signal.SIGTERM)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
