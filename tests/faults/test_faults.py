"""Every writer survives every fault of `injector.py`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import injector

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="forks and kills processes")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Inputs of the writers."""
    folder = tmp_path_factory.mktemp("inputs")
    injector.make_inputs(folder)
    return injector.look(folder)


@pytest.mark.parametrize("lacking", [name for name in injector.LACKING if name not in injector.DRIVES])
@pytest.mark.parametrize("name", [name for name, writer in injector.WRITERS.items() if not writer.torn])
def test_every_writer_works_or_fails_cleanly_where_a_feature_is_missing(tmp_path, inputs, name, lacking):
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


def test_reserved_and_open_files_on_windows_are_refused_in_one_line(tmp_path, inputs):
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
def swept():
    """Results of the injector."""
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("injector.py")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_after_any_fault_every_file_is_the_old_or_the_new_one(swept):
    assert not [f"{one['writer']}, {one['drive']}: {problem}" for one in swept for problem in one["problems"]]


def test_every_call_of_every_writer_fails_and_is_killed_on_both_kinds_of_drive(swept):
    drives = {}
    for one in swept:
        drives.setdefault(one["writer"], set()).add(one["drive"])
        assert one["kills"] == one["calls"] + 1 > 10
        assert one["faults"] >= one["calls"]
    assert len(drives) == 11
    assert all(len(kinds) == 2 for kinds in drives.values())
