"""The verdict's words."""

from __future__ import annotations

import numpy as np
import pytest
from observing import NORMAL, OUTLIER_TOKEN, observed

from convert_to_quant.options import SolveOptions
from convert_to_quant.report.figures import Source, build

TOP = float(np.abs(NORMAL).max())
FINE = "None of 2 FP8 layers at risk at a scale of 1.0."


def verdict(*sources):
    return build(*sources).verdict


def of(inputs, **options):
    return verdict(Source(observed(inputs), **options))


def said(found, words):
    """The one point that has these words."""
    (point,) = [point for point in found.points if words in point]
    return point


def test_layers_at_risk_come_first_with_the_worst_of_them():
    found = of({"large": 1000 * NORMAL, "larger": 2000 * NORMAL, "small": 0.0003 * NORMAL, "fine": NORMAL})
    headline = "3 of 4 FP8 layers at risk at a scale of 1.0, none after calibration."
    assert (found.level, found.headline) == ("bad", headline)
    times = round(2000 * TOP / 448)
    assert found.points[0].startswith(
        f"Clipping in 2 layers: inputs reach up to {times} times the largest FP8 value (larg"
    )
    assert found.points[1].startswith("Most values rounded to 0 in 1 layer: up to ")
    assert found.points[1].endswith(" of a layer's values (small).")
    assert "convert_to_quant check measures the effect on images." in said(found, "These risks")


def test_a_few_lost_tokens_are_no_risk_and_most_of_them_are():
    some = np.concatenate([np.full((20, 32), 0.01, np.float32), np.full((80, 32), 400.0, np.float32)])
    found = of({"some": some, "fine": NORMAL})
    assert (found.level, found.headline) == ("warning", FINE)
    assert said(found, "Some tokens") == (
        "Some tokens lost in 1 layer: up to 20 % lie below 1/16 of the scale, where FP8 has few codes (some). Whether "
        "the image needs them is unknown."
    )
    most = of({"outlier": OUTLIER_TOKEN})
    assert most.headline == "1 of 1 FP8 layer at risk at a scale of 1.0, none after calibration."
    assert said(most, "Most tokens lost").startswith("Most tokens lost in 1 layer: up to 99 % lie below")


def test_no_risk_is_good():
    found = of({"a": NORMAL, "b": 2 * NORMAL})
    assert (found.level, found.headline) == ("good", FINE)
    assert not [point for point in found.points if "risk" in point]
    assert said(found, "No checkpoint").endswith("ComfyUI assumes 1.0 for FP8 files without input scales.")


def test_full_precision_has_its_reasons():
    found = of({"outlier": OUTLIER_TOKEN, "modulation": NORMAL[:1], "fine": NORMAL})
    assert said(found, "full precision") == (
        "Calibration moves 2 layers to full precision: 1 with one token per image, where it costs no time; 1 that "
        "would lose tokens at any scale."
    )


def test_a_risk_that_calibration_leaves_is_counted():
    found = of({"a": 1000 * NORMAL, "b": 1000 * NORMAL}, options=SolveOptions(keep=("a",)))
    assert found.headline == "2 of 2 FP8 layers at risk at a scale of 1.0, 1 after calibration."


def test_layers_that_were_never_observed_are_named_and_need_attention():
    found = of({"a": NORMAL, "b": None, "c": 0 * NORMAL})
    assert found.level == "warning"
    words = "No inputs, or only zeros, observed in 2 layers, where scales stay as they are (first: b)."
    assert words in found.points


def test_noise_is_called_noise():
    statistics = observed({"a": NORMAL}).with_facts(conditioning="noise", depends_on_conditioning=["a"])
    found = verdict(Source(statistics))
    assert "in 1 layer the range depends on the conditioning" in said(found, "Observed on noise")


@pytest.mark.parametrize(
    ("factor", "moved"), [(1.4, None), (1.5, "larger"), (1 / 1.4, None), (1 / 1.5, "smaller"), (0, "")]
)
def test_a_range_differs_beyond_half_an_octave(factor, moved):
    found = verdict(*(Source(observed({"a": size * NORMAL}), label=label) for label, size in (("A", 1), ("B", factor))))
    if moved == "":  # no range to compare with
        assert not [point for point in found.points if "range" in point]
        return
    words = f"in 1 of 1 layer: 1 {moved} (up to 1.50 times: a)." if moved else "in none of 1 layer."
    assert (
        said(found, "half an octave")
        == f"From A to B, the range differs by more than half an octave (1.4 times) {words}"
    )


def test_scales_fit_the_other_inputs_or_a_way_out_is_named():
    tight, rest = SolveOptions(margin=1), {"c": NORMAL}
    mine = Source(observed({"a": NORMAL, "b": NORMAL, **rest}), label="mine", options=tight)
    fits = verdict(mine, Source(observed({"a": 0.9 * NORMAL, "b": NORMAL, **rest}), label="the LoRA"))
    headline = "Scales calibrated on mine also fit the LoRA: none of 3 layers at risk."
    assert (fits.level, fits.headline) == ("good", headline)
    found = verdict(mine, Source(observed({"a": 8 * NORMAL, "b": NORMAL / 8, **rest}), label="the LoRA"))
    headline = "Scales calibrated on mine do not fit the LoRA: 1 of 3 layers at risk."
    assert (found.level, found.headline) == ("bad", headline)
    assert found.points[0].startswith("Clipping in 1 layer: inputs reach up to 8.0 times the largest FP8 value (a: ")
    assert said(found, "half an octave").endswith(
        "in 2 of 3 layers: 1 larger (up to 8.0 times: a), 1 smaller (up to 8.0 times: b)."
    )
    assert said(found, "merge").startswith("To cover both, merge the statistics")


def test_layers_of_one_side_only_are_counted():
    first = Source(observed({"a": NORMAL, "b": NORMAL}), label="mine")
    second = Source(observed({"a": NORMAL, "c": NORMAL, "d": NORMAL}), label="theirs")
    assert verdict(first, second).points[-2:] == ("Only in mine: 1 layer.", "Only in theirs: 2 layers.")


def test_two_ways_to_solve_are_compared_by_what_they_choose():
    statistics = observed({"a": NORMAL, "b": NORMAL})
    found = verdict(Source(statistics), Source(statistics, options=SolveOptions(margin=8, keep=("b",))))
    headline = "New scales differ in 2 of 2 layers between defaults and --margin 8 --keep b."
    assert (found.level, found.headline) == ("good", headline)
    assert "2 larger (up to" in said(found, "half an octave")
    same = verdict(Source(statistics), Source(statistics))
    assert (same.level, same.headline, same.points) == ("good", "A and B have the same scales and precision.", ())


@pytest.fixture
def model(save, build):
    return lambda name, **settings: save(f"{name}.safetensors", *build.quantized(["a", "b"], "tensor", **settings))


def test_two_checkpoints_differ_in_scales_or_in_risk(model):
    one, two = model("one"), model("two", input_scale=8.0)
    found = verdict(Source(model=one), Source(model=two))
    assert (found.level, found.headline) == ("good", "Scales differ in 2 of 2 layers between one and two.")
    assert "2 larger (up to 8.0 times: " in said(found, "octave")
    statistics = observed({"a": 1000 * NORMAL, "b": NORMAL})
    found = verdict(*(Source(statistics, model=path) for path in (one, two)))
    assert (found.level, found.headline) == ("bad", "Layers at risk: 1 of 2 (one), 0 of 2 (two).")


def test_a_checkpoint_in_full_precision_needs_no_scale_and_one_alone_is_not_judged(model):
    statistics = observed({"a": 1000 * NORMAL, "b": NORMAL})
    found = verdict(Source(statistics, model=model("one", full_precision_matrix_mult=True)))
    assert (found.level, found.headline) == ("good", "No layer uses an input scale, so there is nothing to calibrate.")
    found = verdict(Source(model=model("two")))
    headline = "Nothing was observed: whether the input scales of 2 layers fit is unknown."
    assert (found.level, found.headline) == ("warning", headline)
