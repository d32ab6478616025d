"""Measurements against direct counts over the raw values."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from observing import NORMAL, OUTLIER_TOKEN, observed

from convert_to_quant.errors import CalibrationError, StatisticsError, TensorError
from convert_to_quant.options import SolveOptions
from convert_to_quant.report import figures
from convert_to_quant.report.document import AXIS_LOW, CELLS, CELLS_PER_OCTAVE, State, encode_shares
from convert_to_quant.report.figures import Source, build, cell_shares, with_risk
from convert_to_quant.report.page import render
from convert_to_quant.stats import Statistics
from convert_to_quant.trials import Trials

RNG = np.random.default_rng(5)
WIDE = (RNG.choice([-1, 1], (96, 32)) * 2.0 ** RNG.uniform(-14, 12, (96, 32))).astype(np.float32)
WIDE[:3] = 0
WIDE[3:6] = 2.0**-7  # rows that are lost at a scale of 1
WIDE[6:11] = 2.0**-3  # and at 4096 / 448 only


def figures_of(report, name="a", side=0):
    return next(layer for layer in report.layers if layer.name == name).sides[side]


@pytest.fixture
def seen():
    """The figures of a layer that saw these inputs, in a checkpoint if one is named."""
    return lambda inputs, model=None: figures_of(build(Source(observed({"a": inputs}), model)))


@pytest.fixture
def wide(seen):
    return seen({0.9: WIDE[:40], 0.2: WIDE[40:]})


def test_shares_at_a_scale_are_those_of_the_raw_values(wide):
    # Every threshold at a scale of 1 is an edge of a bin, so the histogram knows it exactly.
    size = np.abs(WIDE)
    assert wide.before.scale == 1.0
    assert wide.before.clipped == pytest.approx((size > 448).mean(), abs=1e-6)
    assert wide.before.vanished == pytest.approx(((size < 2.0**-10) & (size > 0)).mean())
    row_absmax = size.max(1)
    assert wide.before.rows_lost == pytest.approx(((row_absmax < 2.0**-4) & (row_absmax > 0)).mean())
    assert wide.after.rows_lost == pytest.approx(8 / 96)
    assert wide.zeros == (size == 0).mean()


def test_signal_to_noise_is_that_of_torchs_own_cast(wide):
    for state in (wide.before, wide.after):
        scaled = torch.from_numpy(WIDE.astype(np.float64) / state.scale).clamp(-448, 448)
        error = WIDE - scaled.float().to(torch.float8_e4m3fn).double().numpy() * state.scale
        expected = 10 * math.log10(np.sum(WIDE.astype(np.float64) ** 2) / np.sum(error**2))
        assert state.sqnr_db == pytest.approx(expected, abs=0.5)


def test_sizes_are_those_of_the_raw_values(wide):
    size = np.abs(WIDE)
    assert wide.absmax == size.max()
    assert wide.rms == pytest.approx(np.sqrt((WIDE.astype(np.float64) ** 2).mean()))
    assert wide.median == pytest.approx(np.median(size), rel=2 ** (1 / 16) - 1)
    assert wide.p999 == pytest.approx(np.quantile(size, 0.999), rel=0.1)
    assert (wide.rows, wide.rows_per_sample, wide.calls) == (96, 56, 2)
    assert wide.multiply_adds == 96 * 16 * 32


def test_noise_levels_have_their_own_ranges_the_noisiest_first(wide):
    expected = [None] * 8
    expected[0], expected[6] = np.abs(WIDE[:40]).max(), np.abs(WIDE[40:]).max()  # sigma 0.9 and 0.2
    assert list(wide.sigma_absmax) == expected
    assert wide.sigma_rms[6] == pytest.approx(np.sqrt((WIDE[40:].astype(np.float64) ** 2).mean()))


def test_an_octave_of_cells_holds_the_share_of_the_values_in_it():
    shares = cell_shares(observed({"a": WIDE}).histogram)[0]
    size = np.abs(WIDE)
    for octave in range(AXIS_LOW, AXIS_LOW + CELLS // CELLS_PER_OCTAVE):
        first = (octave - AXIS_LOW) * CELLS_PER_OCTAVE
        counted = ((size >= 2.0**octave) & (size < 2.0 ** (octave + 1))).mean()
        assert shares[first : first + CELLS_PER_OCTAVE].sum() == pytest.approx(counted, abs=1e-12)
    assert shares.sum() == pytest.approx((size > 0).mean())


def test_what_lies_beyond_the_axis_is_in_its_last_cells():
    shares = cell_shares(observed({"a": np.array([[2.0**-100, 2.0**100, 1.0, 0.0]])}).histogram)[0]
    assert np.flatnonzero(shares).tolist() == [0, -AXIS_LOW * CELLS_PER_OCTAVE, CELLS - 1]
    assert shares.sum() == pytest.approx(0.75)


def test_rows_have_a_density_of_their_own(seen):
    rows = np.array([[1.0, 0.1], [16.0, 0.1], [16.0, 0.0]])
    shares = cell_shares(observed({"a": rows}).row_histogram)[0]
    origin = -AXIS_LOW * CELLS_PER_OCTAVE
    assert shares[origin : origin + 2].sum() == pytest.approx(1 / 3)
    assert shares[origin + 16 : origin + 18].sum() == pytest.approx(2 / 3)
    assert (seen(rows).row_density == encode_shares(shares)).all()


@pytest.mark.parametrize(
    ("rows", "risk"),
    [
        (NORMAL, ""),
        (NORMAL * 1000, "clips"),
        (NORMAL * 0.0003, "vanishes"),
        (NORMAL * 0.002, "coarse"),
        (OUTLIER_TOKEN, "tokens lost"),
        (np.full((4, 32), 464.0), ""),  # rounds to 448 all the same
        (np.full((4, 32), 900.0), "clips"),
        (np.zeros((4, 32)), ""),
    ],
)
def test_each_way_to_fail_at_a_scale_has_its_name(seen, rows, risk):
    found = seen(rows)
    assert (found.before.risk, found.after.risk) == (risk, "")


def test_a_few_clipped_values_at_no_cost_are_reported_but_no_risk(seen):
    rows = np.full((100, 32), 300.0)
    rows[0, 0] = 500
    before = seen(rows).before
    assert (before.risk, before.clipped) == ("", pytest.approx(1 / 3200))


@pytest.mark.parametrize(
    ("state", "risk"),
    [
        (State(0.0, False), "no scale"),
        (State(0.0, True), ""),
        *((State(1.0, False, 31.0, 0.0, 0.0, rows_lost=share), "") for share in (0.2, 0.5)),
        (State(1.0, False, 31.0, 0.0, 0.0, rows_lost=0.51), "tokens lost"),
    ],
)
def test_a_scale_of_0_and_most_tokens_lost_are_risks(state, risk):
    assert with_risk(state, 5.0).risk == risk


def test_without_a_checkpoint_every_observed_layer_stands_at_1():
    report = build(Source(observed({"b": NORMAL, "a": NORMAL, "c": None})))
    assert [layer.name for layer in report.layers] == ["a", "b", "c"]
    assert {figures_of(report, name).before.scale for name in "abc"} == {1.0}
    assert (figures_of(report, "c").source, report.sides[0].model) == ("none", None)


def test_block_2_stands_before_block_10():
    ordered = ["a.9.1", "a.10.0", "b.1.a", "b.2.a", "b.10.a", "b." + "9" * 5000]  # more digits than int() reads
    report = build(Source(observed(dict.fromkeys(reversed(ordered), NORMAL))))
    assert [layer.name for layer in report.layers] == ordered


def test_a_report_is_the_same_every_time_and_leaves_statistics_as_they_are():
    statistics = observed({"a": NORMAL, "b": WIDE})
    assert build(Source(statistics)).document() == build(Source(statistics)).document()
    assert statistics == observed({"a": NORMAL, "b": WIDE})


@pytest.fixture
def model(save, build):
    def model(*layers, prefix="", name="fp8.safetensors", **settings):
        tensors, metadata = build.quantized([prefix + layer for layer in layers], "tensor", **settings)
        for plain in ("norm_out", "never_observed"):
            tensors[f"{prefix}{plain}.weight"] = np.ones((16, 32), np.float32)
        return save(name, tensors, metadata)

    return model


def test_a_checkpoint_says_what_its_layers_have_now(model):
    path = model("blocks.0.a", "blocks.1.a", input_scale=0.25)
    report = build(Source(observed({"blocks.0.a": NORMAL, "blocks.1.a": NORMAL, "norm_out": NORMAL}), path))
    assert [layer.name for layer in report.layers] == ["blocks.0.a", "blocks.1.a", "norm_out"]
    before = figures_of(report, "blocks.0.a").before
    assert (before.scale, before.rows_lost, report.sides[0].model) == (0.25, 0.0, "fp8.safetensors")
    plain = figures_of(report, "norm_out")
    assert (plain.stored, plain.inputs, plain.unused) == ("F32", "not quantized", "high precision, as stored")


def test_a_layer_is_left_alone_on_its_own_side(model):
    first, second = observed({"a": NORMAL}), observed({"a": NORMAL, "norm_out": NORMAL})
    report = build(Source(first, model("a")), Source(second, model("a", name="other.safetensors")))
    assert [one is None for one in report.layers[1].sides] == [True, False]
    page = render(report.document())
    assert page.index("unchanged: F32") > page.index('class="side">B: ')


def test_names_may_have_another_prefix(model):
    path = model("blocks.0.a", prefix="model.diffusion_model.")
    report = build(Source(observed({"blocks.0.a": NORMAL}), path))
    assert figures_of(report, "model.diffusion_model.blocks.0.a").absmax == np.abs(NORMAL).max()


def test_a_layer_in_full_precision_is_at_no_risk_but_its_cost_in_fp8_is_reported(seen, model):
    before = seen(1000 * NORMAL, model("a", full_precision_matrix_mult=True)).before
    assert (before.full_precision, before.risk) == (True, "")
    assert before.clipped > 0
    assert before.sqnr_db < 15


def test_a_layer_whose_scale_no_reader_uses_is_at_no_risk_and_says_so(seen, save, build):
    tensors, _ = build.quantized(["a"], "none")
    found = seen(1000 * NORMAL, save("unmarked.safetensors", tensors))
    assert found.before.risk == ""
    assert "scale dropped" in found.unused


def test_a_layer_without_a_scale_that_may_have_one_has_none_before_and_one_after(save, build):
    tensors = {"a.weight": np.zeros((16, 16), np.uint8), "a.weight_scale": ("F8_E4M3", np.zeros((128, 4), np.uint8)),
               "a.weight_scale_2": np.float32(1), "a.comfy_quant": build.mark(format="nvfp4")}  # fmt: skip
    report = figures.build(Source(observed({"a": 1000 * NORMAL}), save("nvfp4.safetensors", tensors)))
    found = figures_of(report, "a")
    assert (found.before.scale, found.before.sqnr_db, found.before.risk) == (None, None, "")
    assert found.after.scale * 2688 > 1.49 * found.absmax
    assert found.changed
    assert found.after.sqnr_db == pytest.approx(20, abs=1)
    assert found.after.log2_scale == pytest.approx(np.log2(found.after.scale * 2688 / 448))  # as FP8's zones are drawn
    small = {**tensors, "a.input_scale": np.float32(found.absmax / 2688 / 8)}
    report = figures.build(Source(observed({"a": 1000 * NORMAL}), save("small.safetensors", small)))
    assert figures_of(report, "a").before.risk == "clips"


def test_a_layer_that_has_no_input_scale_has_a_row_that_says_so(save, build):
    tensors, metadata = build.quantized(["a"], "header")
    tensors |= {"b.weight": np.ones((16, 32), np.int8), "b.weight_scale": np.float32(1),
                "b.comfy_quant": build.mark(format="int8_tensorwise")}  # fmt: skip
    path = save("mixed.safetensors", tensors, metadata)
    report = figures.build(Source(observed({"a": NORMAL, "b": NORMAL}), path))
    found = figures_of(report, "b")
    assert (found.stored, found.inputs, found.bits) == ("int8", "scaled per token", pytest.approx(8, abs=0.1))
    assert (found.before.scale, found.after.scale, found.changed, found.before.risk) == (None, None, False, "")
    assert found.absmax == np.abs(NORMAL).max()


def test_trials_say_what_every_size_and_format_keeps_and_what_a_file_of_them_does(save, build):
    statistics = observed({"a": NORMAL, "b": NORMAL})
    trials = Trials.empty(("a", "b"), ("int8", "nvfp4"), ("noise, 1",))
    trials.error[:], trials.count[:] = 1e-3, 1
    trials.damage[:, 0], trials.damage[:, 1] = 1e-4, 1e-2
    alone = figures.build(Source(statistics, trials=trials))
    assert alone.layers[0].alone_db == {"int8": 40.0, "nvfp4": 20.0}
    mix = alone.sides[0].mix
    assert mix["uniform"]["int8"] == [pytest.approx(9.0, abs=1), pytest.approx(37, abs=0.1)]
    assert "bits" not in mix
    tensors = {f"{name}.{what}": value for name in "ab" for what, value in {
        "weight": np.ones((16, 32), np.int8), "weight_scale": np.ones((16, 1), np.float32),
        "comfy_quant": build.mark(format="int8_tensorwise"),
    }.items()}  # fmt: skip
    path = save("mixed.safetensors", tensors)
    report = figures.build(Source(statistics, path, trials=trials))
    mix = report.sides[0].mix
    assert [mix["bits"], mix["expected_db"]] == mix["uniform"]["int8"]
    assert mix["other_bytes"] == pytest.approx(path.stat().st_size - mix["bits"] * 1024 / 8)
    kept = f"{mix['bits']:.2f} bits per weight, 37.0 dB expected on noise"
    assert report.verdict.headline == f"A mix of formats at {kept}."
    assert [figures_of(report, name).stored for name in "ab"] == ["int8", "int8"]
    assert figures_of(report, "a").more


def test_layers_that_were_never_observed_have_a_row_without_measurements(model):
    report = build(Source(observed({"a": NORMAL, "b": None}), model("a", "b", input_scale=2.0)))
    unseen = figures_of(report, "b")
    assert (unseen.source, unseen.before.scale, unseen.absmax, unseen.density) == ("none", 2.0, None, None)
    assert "never visited" in unseen.reason
    assert report.sides[0].notes == ()  # its row says so


def test_text_encoders_in_the_same_file_have_no_row(save, build):
    tensors, metadata = build.quantized(["model.diffusion_model.a", "text_encoders.t5xxl.b"], "tensor")
    path = save("all_in_one.safetensors", tensors, metadata)
    assert [layer.name for layer in figures.build(Source(model=path)).layers] == ["model.diffusion_model.a"]
    del tensors["model.diffusion_model.a.weight"], tensors["model.diffusion_model.a.comfy_quant"]
    tensors["model.diffusion_model.c.weight"] = np.ones((16, 32), np.float32)
    path = save("text_encoder.safetensors", tensors, metadata)
    with pytest.raises(TensorError, match="FP8 layers"):
        figures.build(Source(model=path))


@pytest.mark.parametrize("scale", [0.0, math.nan, math.inf, -1.0, ("BF16", np.array(0x3F80, np.uint16)), [1.0, 1.0]])
def test_a_scale_that_comfyui_cannot_use_is_a_risk(save, build, scale):
    tensors, metadata = build.quantized(["a", "b"], "tensor")
    tensors["a.input_scale"] = scale if isinstance(scale, tuple) else np.float32(scale)
    path = save("bad.safetensors", tensors, metadata)
    report = figures.build(Source(observed({"a": NORMAL, "b": NORMAL}), path))
    before, after = figures_of(report).before, figures_of(report).after
    assert (before.scale, before.risk, before.sqnr_db, after.risk) == (0.0, "no scale", None, "")
    assert report.verdict.headline == "1 of 2 FP8 layers at risk at the current scales, none after calibration."
    assert figures_of(report, "b").before.risk == ""


@pytest.mark.parametrize("other_format", [False, True])
def test_the_first_sides_scales_and_format_meet_the_second_sides_inputs(save, build, other_format):
    loud = NORMAL * 8
    e5m2 = {
        "a.weight": build.fp8(np.ones((16, 32), np.float32), "F8_E5M2"),
        "a.weight_scale": np.float32(1.0),
        "a.comfy_quant": build.mark(format="float8_e5m2"),
    }
    second = Source(observed({"a": loud}), save("e5m2.safetensors", e5m2) if other_format else None)
    report = figures.build(Source(observed({"a": NORMAL}), options=SolveOptions(margin=1)), second)
    crossed = report.layers[0].crossed
    assert crossed.scale == pytest.approx(np.abs(NORMAL).max() / 448)
    assert crossed.clipped == pytest.approx((np.abs(loud) > 448 * crossed.scale).mean(), abs=2e-3)
    assert crossed.risk == "clips"


def test_the_same_inputs_are_not_crossed():
    report = build(*(Source(observed({"a": WIDE}), options=SolveOptions(margin=margin)) for margin in (1, 2)))
    assert report.layers[0].crossed is None


def test_sides_match_by_name_without_prefix_and_may_lack_layers():
    first = observed({"diffusion_model.a": NORMAL, "diffusion_model.b": NORMAL})
    report = build(Source(first), Source(observed({"a": 2 * NORMAL, "c": NORMAL})))
    assert [layer.name for layer in report.layers] == ["diffusion_model.a", "diffusion_model.b", "c"]
    assert [[side is not None for side in layer.sides] for layer in report.layers] == [
        [True, True], [True, False], [False, True]]  # fmt: skip
    assert [layer.crossed is not None for layer in report.layers] == [True, False, False]


@pytest.mark.parametrize(
    ("sources", "labels"),
    [
        (lambda one, two: (Source(one, files=("x.safetensors",)), Source(two, files=("y.safetensors",))), ["x", "y"]),
        (lambda one, _: (Source(one), Source(one, options=SolveOptions(margin=2))), ["defaults", "--margin 2"]),
        (lambda one, _: (Source(one, options=SolveOptions(keep=("a",))), Source(one)), ["--keep a", "defaults"]),
        (lambda one, _: (Source(one), Source(one)), ["A", "B"]),
        (lambda one, two: (Source(one, label="mine"), Source(two, label="theirs")), ["mine", "theirs"]),
    ],
)
def test_sides_are_called_by_what_tells_them_apart(sources, labels):
    report = build(*sources(observed({"a": NORMAL}), observed({"a": WIDE})))
    assert [side.label for side in report.sides] == labels
    assert report.title == " against ".join(labels)


def test_files_of_one_name_are_called_by_their_folders(tmp_path):
    for folder, inputs in (("portraits", NORMAL), ("places", WIDE)):
        (tmp_path / folder).mkdir()
        observed({"a": inputs}).save(tmp_path / folder / "stats.safetensors")
    loaded = [Statistics.load(tmp_path / folder / "stats.safetensors") for folder in ("portraits", "places")]
    assert build(*map(Source, loaded)).title == "portraits/stats against places/stats"


def test_what_cannot_be_shown_is_refused(model, save):
    normal, other = observed({"a": NORMAL}), observed({"b": NORMAL})
    plain = save("plain.safetensors", {"a.weight": np.ones((16, 32), np.float32)})
    for sources, error, words in (
        ([Source(normal), Source(other)], StatisticsError, "statistics and statistics have no layer in common"),
        ([Source(other, model("a"))], StatisticsError, "made for another model"),
        ([Source(observed({"a": np.full((1, 32), np.nan)}))], CalibrationError, "a: its inputs had 32 NaN or infinite"),
        ([Source(normal, plain)], TensorError, "FP8 layers"),
        ([Source(model=plain)], TensorError, "FP8 layers"),
    ):
        with pytest.raises(error, match=words):
            build(*sources)
