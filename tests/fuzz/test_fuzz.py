"""Every parser accepts or refuses the first inputs of `fuzzer.py` with a fixed seed."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
import fuzzer

INPUTS = 100
pytestmark = pytest.mark.skipif(not hasattr(fuzzer.signal, "SIGPROF"), reason="measures CPU time")


@pytest.mark.parametrize("target", fuzzer.TARGETS)
def test_the_corpus_is_read(target, tmp_path):
    assert {fuzzer.read(target, content, tmp_path) for content in fuzzer.seeds(target)} == {None}


@pytest.mark.parametrize("target", fuzzer.TARGETS)
def test_parsers_raise_only_our_errors(target):
    found = fuzzer.fuzz(target, inputs=INPUTS)
    assert found.findings == {}
    assert 0 < found.taken < found.inputs == INPUTS, "some inputs are valid, and some are not"


def test_the_same_seed_gives_the_same_inputs():
    first, again, other = (list(zip(range(20), fuzzer.inputs_of("header", seed))) for seed in (0, 0, 1))  # noqa: B905
    assert first == again != other
