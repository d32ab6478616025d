"""Every writer survives every fault that the injector knows: see `injector.py`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="forks, and kills what it forked")


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
