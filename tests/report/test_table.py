"""The CSV: stable columns, one line per layer and side, numbers that are those of the report."""

from __future__ import annotations

import csv
import io

import numpy as np
import pytest
from observing import NORMAL, observed

from convert_to_quant import __version__
from convert_to_quant.options import SolveOptions
from convert_to_quant.report import table
from convert_to_quant.report.figures import Source, build

COLUMNS = """
layer side label out_features in_features source rows rows_per_sample calls multiply_adds zeros_share absmax rms median
p999
scale_before full_precision_before sqnr_before_db clipped_before_share vanished_before_share rows_lost_before_share
beyond_before_octaves risk_before
scale_after full_precision_after sqnr_after_db clipped_after_share vanished_after_share rows_lost_after_share
beyond_after_octaves risk_after
scale_crossed full_precision_crossed sqnr_crossed_db clipped_crossed_share vanished_crossed_share
rows_lost_crossed_share beyond_crossed_octaves risk_crossed
changed cause reason unused conditioning_dependent
absmax_sigma_0.875_to_1 absmax_sigma_0.75_to_0.875 absmax_sigma_0.625_to_0.75 absmax_sigma_0.5_to_0.625
absmax_sigma_0.375_to_0.5 absmax_sigma_0.25_to_0.375 absmax_sigma_0.125_to_0.25 absmax_sigma_0_to_0.125
alone_fp8_db alone_int8_db alone_int8-convrot_db alone_mxfp8_db alone_nvfp4_db alone_w6a8_db alone_w4a8_db
alone_convrot-w4a4_db format bits inputs format_with_more
tool options
"""


def read(*sources):
    return list(csv.DictReader(io.StringIO(table.render(build(*sources)))))


def test_columns_are_these_and_stay_these():
    # Spreadsheets and scripts know them by name: add, but never rename.
    assert list(table.COLUMNS) == COLUMNS.split()


def test_every_layer_and_side_has_a_line_with_the_reports_numbers():
    statistics = observed({"a": 1000 * NORMAL, "b": NORMAL, "c": None})
    sources = (Source(statistics), Source(statistics, options=SolveOptions(margin=2)))
    lines = read(*sources)
    assert [(line["layer"], line["side"]) for line in lines] == [(name, side) for name in "abc" for side in "AB"]
    figures = build(*sources).layers[0].sides[1]
    assert float(lines[1]["absmax"]) == pytest.approx(float(np.abs(1000 * NORMAL).max()))
    assert float(lines[1]["scale_after"]) == pytest.approx(figures.after.scale, rel=1e-8)
    assert float(lines[1]["sqnr_before_db"]) == pytest.approx(figures.before.sqnr_db)
    assert lines[0]["risk_before"] == "clips"
    assert float(lines[0]["beyond_before_octaves"]) == pytest.approx(np.log2(np.abs(1000 * NORMAL).max() / 448))
    assert lines[0]["changed"] == "true"
    assert lines[4]["sqnr_before_db"] == lines[4]["absmax"] == ""


def test_crossed_columns_are_on_the_side_of_the_inputs():
    lines = read(Source(observed({"a": NORMAL}), options=SolveOptions(margin=1)), Source(observed({"a": 8 * NORMAL})))
    assert [line["risk_crossed"] for line in lines] == ["", "clips"]
    assert lines[1]["scale_crossed"] == lines[0]["scale_after"]
    assert float(lines[1]["beyond_crossed_octaves"]) == pytest.approx(3, abs=1e-5)


def test_every_line_says_what_made_it():
    (line,) = read(Source(observed({"a": NORMAL}), options=SolveOptions(margin=1.5, keep=("x", "y"))))
    assert line["tool"] == f"convert_to_quant {__version__}"
    assert line["options"].startswith("method=absmax; percentile=99.9; margin=1.5; ")
    assert "; keep=x y; " in line["options"]


@pytest.mark.parametrize("name", ['a,"b"', "a\nb", "模型", "a;b", "=1+1", "+a", "-a", "@SUM(a)", "\ta"])
def test_any_name_survives_and_none_is_a_formula(name):
    safe = name[0] not in "=+-@\t"
    assert read(Source(observed({name: NORMAL})))[0]["layer"] == (name if safe else "'" + name)
