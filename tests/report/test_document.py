"""The document: shares as bytes, the bound behind risks, and complete JSON."""

from __future__ import annotations

import base64
import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from observing import observed

from convert_to_quant import __version__
from convert_to_quant.formats import DEFAULT_GRID
from convert_to_quant.report.document import CELLS, encode_shares
from convert_to_quant.report.figures import Source, build


def sqnr_db(values):
    """Of quantizing values at scale 1, by torch's own cast."""
    codes = torch.from_numpy(values).clamp(-448, 448).float().to(torch.float8_e4m3fn).double().numpy()
    error = float(np.sum((values - codes) ** 2))
    return float(10 * np.log10(np.sum(values**2) / error)) if error else float("inf")


@given(arrays.arrays(np.float64, st.integers(1, 40), elements=st.floats(2.0**-6, DEFAULT_GRID.largest_rounded)))
def test_rounding_in_the_normal_range_is_never_worse_than_the_bound_which_is_reached(values):
    assert sqnr_db(values) >= DEFAULT_GRID.worst_rounding_db - 1e-6
    assert sqnr_db(np.array([17 / 16])) == pytest.approx(DEFAULT_GRID.worst_rounding_db)


@given(st.floats(1e-8, 1.0))
def test_a_share_survives_as_a_byte_to_within_four_percent(share):
    level = int(encode_shares(np.array([share]))[0])
    assert 10 ** ((level - 1) * 8 / 254 - 8) == pytest.approx(share, rel=0.037), "as picture.js reads it"


@pytest.fixture
def report():
    rows = np.random.default_rng(0).standard_normal((64, 16))
    inputs = {"blocks.0.a": {1.0: rows, 0.5: 3 * rows}, "blocks.1.a": None, "blocks.2.a": 0 * rows}
    return build(Source(observed(inputs)), options={"files": ("a", "b")})


def test_the_document_is_json_that_says_what_made_it_and_explains_every_risk(report):
    whole = report.document()
    assert json.loads(json.dumps(whole, allow_nan=False)) == whole
    assert (whole["format"], whole["version"], whole["options"]) == (1, __version__, {"files": ["a", "b"]})
    assert whole["sides"][0]["options"]["margin"] is None
    assert list(whole["risks"]) == ["no scale", "clips", "vanishes", "tokens lost", "coarse"]


def test_cells_are_kept_without_the_empty_ones_around_them(report):
    first, text = report.document()["layers"][0]["sides"][0]["density"]
    kept = np.frombuffer(base64.b64decode(text), np.uint8)
    assert min(kept[0], kept[-1]) > 0
    assert (np.pad(kept, (first, CELLS - first - len(kept))) == report.layers[0].sides[0].density).all()


def test_measurements_are_in_the_document_under_their_own_names(report):
    figures, told = report.layers[0].sides[0], report.document()["layers"][0]["sides"][0]
    for name in ("rows", "rows_per_sample", "calls", "multiply_adds", "reason", "cause", "source", "changed", "unused"):
        assert told[name] == getattr(figures, name)
    for name in ("zeros", "absmax", "rms", "median", "p999"):
        assert told[name] == pytest.approx(getattr(figures, name), rel=1e-3)
    for name in ("sqnr_db", "clipped", "vanished", "rows_lost"):
        assert told["before"][name] == pytest.approx(getattr(figures.before, name), rel=1e-3)
    assert figures.calls == 2


def test_what_was_never_observed_has_no_numbers(report):
    _, unseen, zeros = (layer["sides"][0] for layer in report.document()["layers"])
    assert (unseen["density"], unseen["absmax"], unseen["before"]["sqnr_db"]) == (None, None, None)
    assert (zeros["density"], zeros["zeros"]) == (None, 1.0)  # zeros are in no cell
