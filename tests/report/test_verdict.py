"""What the figures mean, in words."""

from __future__ import annotations

import numpy as np
import pytest
from observing import LOUD_TOKEN, NORMAL, observed

from convert_to_quant.options import SolveOptions
from convert_to_quant.report.figures import Source, build

TOP = float(np.abs(NORMAL).max())


def verdict(*sources):
    return build(*sources).verdict


def said(points, words):
    """The one point that has these words."""
    (found,) = [point for point in points if words in point]
    return found


def test_what_is_at_risk_stands_first_and_what_calibration_makes_of_it():
    inputs = {"loud": 1000 * NORMAL, "louder": 2000 * NORMAL, "silent": 0.0003 * NORMAL, "fine": NORMAL}
    found = verdict(Source(observed(inputs)))
    headline = "3 of 4 FP8 layers are at risk at a scale of 1.0; calibrated, none is."
    assert (found.level, found.headline) == ("bad", headline)
    times = round(2000 * TOP / 448)
    assert found.points[0].startswith(f"2 layers clip: inputs reach up to {times} times what FP8 holds there (louder: ")
    assert found.points[1].startswith("1 layer vanishes: up to ")
    assert found.points[1].endswith("of a layer's values become 0 (silent).")


def test_a_few_lost_tokens_are_told_and_no_risk():
    some = np.concatenate([np.full((20, 32), 0.01, np.float32), np.full((80, 32), 400.0, np.float32)])
    found = verdict(Source(observed({"some": some, "fine": NORMAL})))
    assert found.headline == "None of 2 FP8 layers is at risk at a scale of 1.0."
    assert found.level == "warning"
    assert said(found.points, "some tokens") == (
        "In 1 layer some tokens lie under 1/16 of the scale, where few codes are (most: 20 % in some); whether the "
        "image needs them is not known."
    )
    assert verdict(Source(observed({"loud token": LOUD_TOKEN}))).headline.startswith("1 of 1 FP8 layers is at risk")


def test_a_risk_is_said_to_be_one_of_inputs_and_no_risk_is_good():
    measured = "These are risks to the inputs of layers; convert_to_quant check measures what they cost the image."
    assert measured in verdict(Source(observed({"a": 1000 * NORMAL}))).points
    found = verdict(Source(observed({"a": NORMAL, "b": 2 * NORMAL})))
    assert measured not in found.points
    assert (found.level, found.headline) == ("good", "None of 2 FP8 layers is at risk at a scale of 1.0.")
    assert said(found.points, "No checkpoint was given").endswith("from an FP8 file without input scales.")


def test_full_precision_has_its_reasons():
    statistics = observed({"loud token": LOUD_TOKEN, "modulation": NORMAL[:1], "fine": NORMAL})
    found = verdict(Source(statistics))
    assert said(found.points, "full precision") == (
        "Calibration moves 2 layers to full precision: 1 with one token per image, where that costs nothing; 1 "
        "where tokens would be lost at any scale."
    )


def test_a_risk_that_calibration_leaves_is_counted():
    options = SolveOptions(keep=("a",))
    found = verdict(Source(observed({"a": 1000 * NORMAL, "b": 1000 * NORMAL}), options=options))
    assert found.headline == "2 of 2 FP8 layers are at risk at a scale of 1.0; calibrated, 1 is."


def test_layers_that_were_never_seen_are_named_and_worth_a_warning():
    found = verdict(Source(observed({"a": NORMAL, "b": None, "c": 0 * NORMAL})))
    assert found.level == "warning"
    assert "2 layers saw no inputs, or only zeros, and keep their scales (first: b)." in found.points


def test_ranges_that_no_layer_has_on_both_sides_are_not_compared():
    found = verdict(Source(observed({"a": NORMAL})), Source(observed({"a": 0 * NORMAL})))
    assert not [point for point in found.points if "range" in point]


def test_noise_is_said_to_be_noise():
    statistics = observed({"a": NORMAL}).with_facts(conditioning="noise", depends_on_conditioning=["a"])
    found = verdict(Source(statistics))
    assert "the ranges of 1 layer depend on the conditioning" in said(found.points, "Observed on noise")


@pytest.mark.parametrize(("factor", "moved"), [(1.4, False), (1.5, True), (1 / 1.4, False), (1 / 1.5, True)])
def test_a_range_has_moved_beyond_half_an_octave(factor, moved):
    found = verdict(Source(observed({"a": NORMAL})), Source(observed({"a": factor * NORMAL})))
    point = said(found.points, "half an octave")
    assert point.startswith("Of 1 range, 1 is" if moved else "None of 1 range")
    assert (("larger" if factor > 1 else "smaller") in point) == moved


def test_scales_that_hold_for_the_other_inputs_are_good():
    found = verdict(
        Source(observed({"a": NORMAL}), label="mine"), Source(observed({"a": 0.9 * NORMAL}), label="the LoRA")
    )
    headline = "Scales calibrated on mine also fit the LoRA: none of 1 layer would be at risk."
    assert (found.level, found.headline) == ("good", headline)


def test_scales_that_do_not_hold_for_the_other_inputs_are_bad_and_a_way_out_is_named():
    tight = SolveOptions(margin=1)
    first = Source(observed({"a": NORMAL, "b": NORMAL, "c": NORMAL}), label="mine", options=tight)
    second = Source(observed({"a": 8 * NORMAL, "b": NORMAL / 8, "c": NORMAL}), label="the LoRA")
    found = verdict(first, second)
    headline = "Scales calibrated on mine do not fit the LoRA: 1 of 3 layers would be at risk."
    assert (found.level, found.headline) == ("bad", headline)
    assert found.points[0].startswith("1 layer would clip: inputs reach up to 8.0 times what FP8 holds there (a: ")
    assert said(found.points, "half an octave") == (
        "Of 3 ranges, 1 is larger (by up to 8.0 times: a) and 1 is smaller (by up to 8.0 times: b) in the LoRA by more "
        "than half an octave."
    )
    assert said(found.points, "Merge").startswith("Merge both")


def test_layers_of_one_side_only_are_counted():
    first = Source(observed({"a": NORMAL, "b": NORMAL}), label="mine")
    second = Source(observed({"a": NORMAL, "c": NORMAL, "d": NORMAL}), label="theirs")
    points = verdict(first, second).points
    assert points[-2:] == ("Only in mine: 1 layer.", "Only in theirs: 2 layers.")


def test_two_ways_to_solve_are_compared_by_what_they_choose():
    statistics = observed({"a": NORMAL, "b": NORMAL})
    found = verdict(Source(statistics), Source(statistics, options=SolveOptions(margin=8, keep=("b",))))
    headline = "2 of 2 new scales differ between margin automatic, keep nothing and margin 8, keep b."
    assert (found.level, found.headline) == ("good", headline)
    assert "2 are larger (by up to" in said(found.points, "half an octave")


def test_the_same_twice_differs_in_nothing():
    statistics = observed({"a": NORMAL})
    found = verdict(Source(statistics), Source(statistics))
    assert (found.level, found.points) == ("good", ())
    assert found.headline == "A and B have the same scales and precisions."


@pytest.fixture
def model(save, build):
    return lambda name, **settings: save(f"{name}.safetensors", *build.quantized(["a", "b"], "tensor", **settings))


def test_two_checkpoints_without_statistics_say_where_their_scales_differ(model):
    found = verdict(Source(model=model("one")), Source(model=model("two", input_scale=4.0)))
    assert (found.level, found.headline) == ("good", "2 of 2 scales differ between one and two.")
    assert said(found.points, "octave").startswith("Of 2 scales, 2 are larger (by up to 4.0 times: ")


def test_two_checkpoints_with_statistics_say_which_is_at_risk(model):
    statistics = observed({"a": 1000 * NORMAL, "b": NORMAL})
    sources = [Source(statistics, model=model(name, input_scale=scale)) for name, scale in (("one", 1), ("two", 8))]
    found = verdict(*sources)
    assert (found.level, found.headline) == ("bad", "1 of 2 layers is at risk in one, no layer is at risk in two.")


def test_a_checkpoint_in_full_precision_needs_no_scale(model):
    statistics = observed({"a": 1000 * NORMAL, "b": NORMAL})
    found = verdict(Source(statistics, model=model("one", full_precision_matrix_mult=True)))
    headline = "No layer quantizes its inputs by an input scale, so there is nothing to calibrate."
    assert (found.level, found.headline) == ("good", headline)


def test_a_checkpoint_alone_is_not_judged(model):
    found = verdict(Source(model=model("one")))
    assert (found.level, found.headline) == ("warning", "Nothing was observed, so it is unknown whether 2 scales fit.")
