"""Scales and precision out of statistics, against brute force with torch's own cast."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pytest
import torch

from convert_to_quant.errors import CalibrationError
from convert_to_quant.formats.fp8 import E4M3FN, E5M2
from convert_to_quant.options import SolveOptions
from convert_to_quant.recorder import Recording
from convert_to_quant.solve import LayerResult, Present, _spend_budget, expected_errors, final_scale, solve
from convert_to_quant.stats import BIN_EDGES, Statistics

SHAPE = (16, 32)


def seen(rows_by_layer: Mapping[str, Any], rows_per_sample: int = 8) -> Statistics:
    """Statistics of layers that saw these rows [rows, in]; None for a layer that never ran."""
    given = {name: torch.tensor(np.atleast_2d(np.zeros(1) if rows is None else rows), dtype=torch.float32)
             for name, rows in rows_by_layer.items()}  # fmt: skip
    recording = Recording({name: (16, rows.shape[1]) for name, rows in given.items()}, {name: [name] for name in given})
    for number, name in enumerate(given):
        if rows_by_layer[name] is not None:
            recording.observe(number, given[name])
    statistics = recording.statistics()
    statistics.rows_per_sample[statistics.visited] = rows_per_sample
    return statistics


def present(*layers: str, scale: float = 1.0) -> dict[str, Present]:
    return dict.fromkeys(layers, Present(scale, False, SHAPE))


def solve_one(rows: Any, state: Present | None = None, rows_per_sample: int = 8, **options: Any) -> LayerResult:
    state = state or Present(1.0, False, SHAPE)
    (result,) = solve(
        seen({"layer": rows}, rows_per_sample), {"layer": state}, SolveOptions(**{"margin": 1.0, **options})
    )
    return result


def quantize(values: np.ndarray, scale: float) -> np.ndarray:
    """What a reader makes of inputs, by torch's own cast, in float64 around it."""
    clamped = torch.from_numpy(values / scale).clamp(-448, 448).float()
    return clamped.to(torch.float8_e4m3fn).double().numpy() * scale


def spread_over_bins(counts: Mapping[int, int], absmax: float, points: int = 4000) -> tuple[np.ndarray, np.ndarray]:
    """Evenly spaced values in each bin, the last one up to absmax, and the weight of each."""
    values, weights = [], []
    for bin_, count in counts.items():
        low, high = BIN_EDGES[bin_], min(BIN_EDGES[bin_ + 1], absmax)
        values.append(low + (high - low) * (np.arange(points) + 0.5) / points)
        weights.append(np.full(points, count / points))
    return np.concatenate(values), np.concatenate(weights)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("factor", [0.2, 1.0, 1.3, 4.0, 500.0], ids=lambda f: f"scale {f} x absmax/448")
def test_expected_errors_equal_brute_force_over_values_spread_evenly_within_bins(seed, factor):
    rng = np.random.default_rng(seed)
    absmax, zeros = float(np.float32(rng.uniform(1, 60))), 700
    top = int(np.float32(absmax).view(np.uint32) >> 19)
    counts = {int(bin_): int(rng.integers(1, 1000)) for bin_ in rng.choice(np.arange(top - 300, top), 40, False)}
    counts[top] = 500
    statistics = seen({"layer": [[absmax]]})
    statistics.histogram[0] = 0
    statistics.histogram[0, [0, *counts]] = [zeros, *counts.values()]
    total = statistics.sigma_count[0, 0] = sum(counts.values()) + zeros
    statistics.zeros[0] = zeros
    values, weights = spread_over_bins(counts, absmax)
    scale = factor * absmax / 448
    found = expected_errors(statistics, np.array([scale]), [E4M3FN])
    brute = np.sum(weights * (values - quantize(values, scale)) ** 2)
    assert 10 ** (-found.sqnr_db[0] / 10) == pytest.approx(brute / statistics.sum_of_squares[0], rel=2e-4)
    assert found.clipped[0] == pytest.approx(np.sum(weights[values > 448 * scale]) / total, abs=1e-3)
    assert found.vanished[0] == pytest.approx(np.sum(weights[values < 2.0**-10 * scale]) / total, abs=1e-3)


def test_at_absmax_nothing_is_clipped_though_the_scale_is_rounded_to_float32():
    for absmax in np.random.default_rng(2).uniform(1, 2, 50).astype(np.float32):
        assert solve_one([[absmax, 0.5]]).clipped_after == 0


def test_absmax_scale_is_margin_times_the_largest_magnitude_over_448_in_float32():
    result, wide = solve_one([[0.1, -3.7], [2.0, 0.0]]), solve_one([[0.1, -3.7], [2.0, 0.0]], margin=2.0)
    assert result.scale_after == float(np.float32(np.float64(np.float32(3.7)) / 448))
    assert wide.scale_after == 2 * result.scale_after
    assert result.range == wide.range == float(np.float32(3.7)), "the margin is no part of the range"
    assert (result.reason, result.source, result.scale_before, wide.reason) == ("absmax", "model", 1.0, "absmax × 2")
    assert result.changed
    same = solve_one([[448.0]])
    assert (same.scale_after, same.changed) == (1.0, False)
    assert replace(same, full_precision_after=True).changed


def test_percentile_scale_is_the_quantile_over_448():
    rows = np.abs(np.random.default_rng(4).standard_normal((100, 100))).astype(np.float32)
    result = solve_one(rows, method="percentile", percentile=90.0)
    assert result.range == pytest.approx(np.quantile(rows, 0.9), rel=1 / 16)
    assert result.scale_after == float(np.float32(result.range / 448))
    assert result.reason == "percentile 90"
    assert result.clipped_after == pytest.approx(0.1, abs=1e-3)
    assert solve_one(rows, method="percentile", percentile=100).scale_after == solve_one(rows).scale_after


def test_percentile_that_falls_on_zeros_keeps_the_scale_and_says_so():
    result = solve_one([[0.0, 0.0, 0.0, 5.0]], method="percentile", percentile=50)
    assert (result.scale_after, result.reason) == (1.0, "its percentile 50 is 0: keeps its scale")


def test_e5m2_inputs_are_solved_on_their_own_grid():
    rows = np.random.default_rng(13).standard_normal((200, 64)).astype(np.float32) * 100
    rows[:2] *= 2.0**-28  # under 32 of E5M2's smallest steps, and E4M3 would lose far larger ones
    rows[2:20] *= 2.0**-14
    state = Present(1.0, False, SHAPE, E5M2)
    result = solve_one(rows, state, row_loss_limit=0.5)
    assert result.format == "float8_e5m2"
    assert result.scale_after == float(np.float32(np.abs(rows).max() / np.float64(57344)))
    for scale, told in ((1.0, result.sqnr_before_db), (result.scale_after, result.sqnr_after_db)):
        cast = torch.from_numpy(rows / np.float32(scale)).clamp(-57344, 57344).to(torch.float8_e5m2).double() * scale
        error = float((cast - torch.from_numpy(rows).double()).square().sum())
        assert told == pytest.approx(10 * np.log10(float(np.sum(rows.astype(np.float64) ** 2)) / error), abs=0.1)
    assert result.clipped_before == 0, "448 is no limit here"
    assert result.rows_lost == pytest.approx(0.01)
    assert solve_one(rows, row_loss_limit=0.5).rows_lost == pytest.approx(0.1)


def test_a_layer_never_seen_keeps_its_scale_and_is_named():
    statistics = seen({"ran": [[1.0]], "never ran": None, "unseen": None}).with_facts(unseen=["unseen", "ran"])
    state = Present(0.25, True, SHAPE)
    results = solve(statistics, dict.fromkeys(["never ran", "ran", "not recorded", "unseen"], state))
    assert {result.layer: result.reason for result in results} == {
        "never ran": "never visited: keeps its scale",
        "ran": "absmax × 1.5",  # another run saw it
        "not recorded": "never visited: keeps its scale",
        "unseen": "ran, but its input could not be seen: keeps its scale",
    }
    for result in (results[0], *results[2:]):
        assert (result.scale_after, result.range, result.source, result.changed) == (0.25, None, "none", False)


@pytest.mark.parametrize("method", ["absmax", "percentile"])
def test_a_layer_seen_only_as_zeros_keeps_its_scale_and_precision(method):
    result = solve_one(np.zeros((3, 4)), Present(0.5, False, SHAPE), 1, method=method, full_precision_budget=1.0)
    assert (result.scale_after, result.full_precision_after, result.range) == (0.5, False, 0.0)
    assert result.reason == "seen only as zeros: keeps its scale"
    json.dumps(asdict(result), allow_nan=False)


def test_a_current_scale_of_zero_is_replaced_and_reported_without_costs():
    result = solve_one([[2.0]], Present(0.0, False, SHAPE))
    assert result.scale_after == float(np.float32(2 / 448))
    assert (result.sqnr_before_db, result.clipped_before, result.vanished_before) == (None, None, None)
    assert result.sqnr_after_db is not None
    json.dumps(asdict(result), allow_nan=False)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_non_finite_inputs_are_an_error_that_names_the_layer(bad):
    statistics = seen({"fine": [[1.0]], "broken": [[1.0, bad, bad]], "also broken": [[bad]]})
    with pytest.raises(CalibrationError) as caught:
        solve(statistics, present("fine", "broken", "also broken"))
    assert str(caught.value) == (
        "broken: its inputs had 2 NaN or infinite values, in 2 layers in all "
        "(the model or its inputs are broken; compute in bfloat16 or float32, not float16)"
    )
    solve(statistics, present("fine"))  # a layer that nobody asks about hurts nobody


def test_a_tiny_scale_is_kept_but_reported_unless_float16_safe_raises_it():
    rows = [[2.0**-15 * 100]]
    kept, raised = solve_one(rows), solve_one(rows, float16_safe=True)
    assert kept.scale_after == float(np.float32(2.0**-15 * 100 / 448))
    assert kept.reason == "absmax; too small for readers that divide in float16 (--float16-safe)"
    assert (raised.scale_after, raised.reason) == (2.0**-15, "absmax")
    with np.errstate(over="ignore"):
        assert np.isinf(np.float16(1 / np.float16(kept.scale_after)))
    assert np.isfinite(np.float16(1) / np.float16(raised.scale_after))


def test_final_scale_is_float32_positive_and_refuses_what_is_not_finite():
    assert final_scale(0.1, "layer") == float(np.float32(0.1))
    assert final_scale(1e-60, "layer") == float(np.finfo(np.float32).tiny)
    assert final_scale(1e-9, "layer", float16_safe=True) == 2.0**-15
    with pytest.raises(CalibrationError, match=r"^layer: an input scale of 1e\+39 is not finite in float32$"):
        final_scale(1e39, "layer")


def test_a_layer_that_would_lose_its_small_rows_computes_in_full_precision():
    rows = np.ones((100, 8))
    rows[0] = 66000.0  # one outlier token: s = 147, so a row of ones lies far under 2^-4 s
    result = solve_one(rows)
    assert (result.full_precision_after, result.cause) == (True, "rows lost")
    assert result.reason == "full precision: 99.0% of its tokens would be lost"
    assert result.rows_lost == pytest.approx(0.99)
    assert result.sqnr_after_db > 25, "the error over the whole tensor hides it"
    assert not solve_one(rows, row_loss_limit=0.995).full_precision_after
    rows = np.array([[448.0], [1.0], [1.0], [2.0**-8]])
    assert not solve_one(rows, row_loss_limit=0.25).full_precision_after, "a quarter is lost, and allowed"
    assert solve_one(rows, row_loss_limit=0.2499).full_precision_after


def test_one_token_layers_compute_in_full_precision_by_default():
    result = solve_one([[1.0, 2.0]], rows_per_sample=1)
    assert (result.full_precision_after, result.cause) == (True, "one row")
    assert result.reason == "full precision: one token per image, which costs nothing"
    assert result.scale_after == float(np.float32(2 / 448)), "its scale is set all the same"
    assert not solve_one([[1.0, 2.0]], rows_per_sample=1, one_row_full_precision=False).full_precision_after
    assert not solve_one([[1.0, 2.0]], rows_per_sample=2).full_precision_after
    assert solve_one([[1.0]], Present(1.0, True, SHAPE)).full_precision_after, "it is never taken away"


def test_kept_layers_keep_their_scale_and_precision():
    rows = np.ones((100, 8))
    rows[0] = 66000.0
    statistics = seen({"blocks.0.mlp": rows, "blocks.1.mlp": rows, "head": rows})
    options = SolveOptions(keep=(r"blocks\.0", "^hea"), full_precision_budget=1.0)
    first, second, head = solve(statistics, present(*statistics.layers, scale=0.125), options)
    for kept in (first, head):
        assert (kept.scale_after, kept.full_precision_after, kept.changed) == (0.125, False, False)
        assert kept.reason == "kept, as --keep asks"
    assert second.full_precision_after
    assert second.scale_after != 0.125


def bought_first(rows: dict[str, Any], share: float, **options: Any) -> set[str]:
    """Layers that a budget moves to full precision."""
    options = {"row_loss_limit": 1.0, "one_row_full_precision": False, **options}
    results = solve(seen(rows), present(*rows), SolveOptions(full_precision_budget=share, **options))
    return {result.layer for result in results if result.full_precision_after}


@pytest.mark.parametrize("share", [0.0, 0.05, 0.1, 0.35, 0.999, 1.0])
def test_the_budget_is_spent_on_the_worst_layers_and_never_exceeded(share):
    """Ten layers of one size, the higher the number the worse its inputs suit FP8."""
    rng = np.random.default_rng(8)
    rows = {}
    for number in range(10):
        rows[f"layer{number}"] = rng.uniform(1, 2, (50, 32)) / 10.0 ** (rng.random((50, 32)) * number)
        rows[f"layer{number}"][:, 0] = 1000.0 * 4.0**number
    results = solve(seen(rows), present(*rows), SolveOptions(row_loss_limit=1.0))
    worst = [result.layer for result in sorted(results, key=lambda result: result.sqnr_after_db)]
    assert {result.multiply_adds for result in results} == {50 * SHAPE[0] * SHAPE[1]}
    assert bought_first(rows, share) == set(worst[: int(share * 10 + 1e-9)])


def test_a_layer_too_large_for_the_budget_leaves_it_to_smaller_ones():
    rng = np.random.default_rng(9)
    # At scale 1 the step is 32 for both, and the signal is smaller where values are.
    worst, fine = rng.uniform(256, 288, (90, 32)), rng.uniform(416, 448, (10, 32))
    worst[0, 0] = fine[0, 0] = 448
    assert bought_first({"large": worst, "small": fine}, 0.2) == {"small"}


def test_the_budget_goes_to_lost_rows_first_although_the_whole_tensor_looks_fine():
    ordinary = np.random.default_rng(11).standard_normal((100, 32))
    outlier = ordinary.copy()
    outlier[0, 0] = 66000.0
    rows = {"blocks.0.outlier": outlier, "blocks.1.a": ordinary, "blocks.1.b": ordinary}
    assert bought_first(rows, 0.34) == {"blocks.0.outlier"}


def test_of_equal_errors_the_budget_goes_to_late_blocks_and_to_small_layers():
    ordinary = np.random.default_rng(12).standard_normal((100, 32))
    blocks = {f"blocks.{number}.a": ordinary for number in range(4)}
    assert bought_first(blocks, 0.25) == {"blocks.3.a"}
    assert bought_first({"double.0.a": ordinary, "double.1.a": ordinary, **blocks}, 4 / 6) == set(blocks)
    assert bought_first({"blocks.0.small": ordinary[:10], "blocks.0.large": ordinary}, 0.95) == {"blocks.0.small"}


@pytest.mark.parametrize(("error", "first"), [(4.1, "large"), (3.9, "small")])
def test_eight_times_the_work_must_be_worth_four_times_the_error(error, first):
    (one,) = solve(seen({"layer": np.ones((10, 32))}), present("layer"))
    results = [replace(one, layer="large", multiply_adds=8000), replace(one, layer="small", multiply_adds=1000)]
    options = SolveOptions(full_precision_budget=8 / 9)  # for either, not for both
    spent = _spend_budget(results, {"large": error, "small": 1.0}, options)
    assert [result.layer for result in spent if result.cause == "budget"] == [first]


def test_full_precision_that_is_needed_is_no_part_of_the_budget():
    rows = np.ones((100, 32))
    rows[0] = 66000.0
    results = solve(seen({"lost": rows, "other": np.ones((100, 32))}), present("lost", "other"),
                    SolveOptions(full_precision_budget=0.5))  # fmt: skip
    assert [result.cause for result in results] == ["rows lost", "budget"]


@pytest.mark.parametrize("exponent", [-6, 0, 5])
def test_lost_rows_are_those_whose_own_largest_value_is_under_a_sixteenth_of_the_scale(exponent):
    rng = np.random.default_rng(exponent + 6)
    rows = rng.standard_normal((200, 32)) * 2.0 ** rng.uniform(-12, 4, (200, 1))
    rows[:20] = 0  # a row of zeros loses nothing
    largest = np.abs(rows.astype(np.float32)).max(1)
    scale = 2.0**exponent  # so the threshold is the edge of a bin
    found, none = (
        expected_errors(seen({"layer": rows}), np.array([one]), [E4M3FN]).rows_lost[0] for one in (scale, 0.0)
    )
    assert found == np.mean((largest < scale / 16) & (largest > 0))
    assert 0 < found < 1
    assert none == 0
