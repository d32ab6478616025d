"""Every parser answers or refuses: see `fuzzer.py`, whose first inputs of a fixed seed these are."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import fuzzer

INPUTS = 100
pytestmark = pytest.mark.skipif(not hasattr(fuzzer.signal, "SIGPROF"), reason="counts seconds of computing")


@pytest.mark.parametrize("target", fuzzer.TARGETS)
def test_the_corpus_is_read(target: str, tmp_path: Path) -> None:
    assert {fuzzer.read(target, content, tmp_path) for content in fuzzer.seeds(target)} == {None}


@pytest.mark.parametrize("target", fuzzer.TARGETS)
def test_only_errors_of_ours_come_out_of_what_others_wrote(target: str) -> None:
    found = fuzzer.fuzz(target, inputs=INPUTS)
    assert found.findings == {}
    assert 0 < found.taken < found.inputs == INPUTS, "sound enough to be read, and wrong enough to be refused"


def test_the_same_seed_gives_the_same_inputs() -> None:
    first, again, other = (list(zip(range(20), fuzzer.inputs_of("header", seed))) for seed in (0, 0, 1))  # noqa: B905
    assert first == again != other
