"""Every writer survives every fault that the injector knows: see `injector.py`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import injector

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="forks, and kills what it forked")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> injector.Files:
    """What the writers read."""
    folder = tmp_path_factory.mktemp("inputs")
    injector.make_inputs(folder)
    return injector.look(folder)


@pytest.mark.parametrize("lacking", [name for name in injector.LACKING if name not in injector.DRIVES])
@pytest.mark.parametrize("name", [name for name, writer in injector.WRITERS.items() if not writer.torn])
def test_every_writer_does_its_work_or_says_why_not_where_something_is_missing(
    tmp_path: Path, inputs: injector.Files, name: str, lacking: str
) -> None:
    writer, folder = injector.WRITERS[name], tmp_path / "folder"
    start, words = {**inputs, **dict.fromkeys(writer.older, b"older")}, writer.words.split()
    injector.lay(folder, start)
    assert injector.call(folder, words).code == 0
    good = injector.look(folder)
    injector.lay(folder, start)
    ended = injector.call(folder, words, drive=lacking)
    assert "Traceback" not in ended.said
    needed = lacking in ("no names for unnamed files", "no renaming")
    assert ended.code == (1 if needed else 0), ended.said
    assert ("error: " in ended.said) == needed
    assert injector.look(folder) == (start if needed else good)


def test_what_windows_keeps_or_another_program_has_open_is_refused_in_one_line(
    tmp_path: Path, inputs: injector.Files
) -> None:
    folder, lacking = tmp_path / "folder", "Windows"
    injector.lay(folder, {**inputs, "out.safetensors": b"older"})
    words = ["-i", "bf16.safetensors", "-o"]
    for name in ("aux.safetensors", "COM1", "out.safetensors."):
        ended = injector.call(folder, [*words, name], drive=lacking)
        assert ended.code == 1
        kept = "Windows reserves this name for a device, or drops its last character"
        assert ended.said == f"error: {name}: cannot be written: {kept}\n"
    with (folder / "out.safetensors").open("rb"):
        ended = injector.call(folder, [*words, "out.safetensors"], drive=lacking)
    assert ended.code == 1
    assert "or another program has the file open" in ended.said
    assert injector.look(folder) == {**inputs, "out.safetensors": b"older"}


@pytest.fixture(scope="module")
def swept() -> list[dict[str, Any]]:
    """What the injector found."""
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("injector.py")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_whatever_fails_wherever_a_result_is_the_old_one_or_the_new_one(swept: list[dict[str, Any]]) -> None:
    assert not [f"{one['writer']}, {one['drive']}: {problem}" for one in swept for problem in one["problems"]]


def test_every_writer_is_failed_and_killed_at_every_call_on_both_kinds_of_drive(swept: list[dict[str, Any]]) -> None:
    drives: dict[str, set[str]] = {}
    for one in swept:
        drives.setdefault(one["writer"], set()).add(one["drive"])
        assert one["kills"] == one["calls"] + 1 > 10
        assert one["faults"] >= one["calls"]
    assert len(drives) == 11
    assert all(len(kinds) == 2 for kinds in drives.values())
