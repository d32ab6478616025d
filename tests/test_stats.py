"""Statistics: exact merging, honest files, and what is read off histograms."""

from __future__ import annotations

import itertools
import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from safetensors import safe_open

from convert_to_quant.checkpoint import Entry, open_checkpoint, write_checkpoint
from convert_to_quant.errors import StatisticsError
from convert_to_quant.kernels import BINS, NONFINITE_BIN
from convert_to_quant.stats import (
    BIN_CENTRES,
    BIN_EDGES,
    COLUMNS,
    METADATA_KEY,
    SAMPLED,
    Statistics,
    merge,
    sigma_bin,
)

LAYERS = {"b.attn": (8, 4), "a.mlp": (16, 8), "c": (4, 4)}


def random_statistics(seed: int, layers: dict[str, tuple[int, int]] = LAYERS) -> Statistics:
    """Columns that contradict each other nowhere."""
    rng = np.random.default_rng(seed)
    size = len(layers)
    columns: dict[str, Any] = {
        name: rng.integers(0, 1 << 31, (size, *column.shape)).astype(column.dtype) for name, column in COLUMNS.items()
    }
    for name in ("histogram", "row_histogram"):
        columns[name] = rng.integers(0, 100, (size, BINS)) * (rng.random((size, BINS)) < 0.01)
        columns[name][:, NONFINITE_BIN:] = 0
    columns["histogram"][:, NONFINITE_BIN] = rng.integers(0, 3, size)
    columns["rows"] = columns["row_histogram"].sum(1)
    columns["sigma_count"][:, 1:] = 0
    columns["sigma_count"][:, 0] = columns["histogram"][:, :NONFINITE_BIN].sum(1)
    return Statistics(layers, **columns).with_facts(samples=seed + 1, seed=seed, engine="test")


def of_values(values: NDArray[Any]) -> Statistics:
    """Statistics of one layer [1, n] that saw these values, as far as histograms and absmax go; one value per row."""
    values = np.abs(np.asarray(values, np.float32))
    bins = np.bincount(values.view(np.uint32) >> 19, minlength=BINS).astype(np.int64)[None]
    empty = Statistics.empty({"layer": (1, values.size)})
    absmax = empty.sigma_absmax.copy()
    absmax[0, 8] = values.max(initial=0)
    return empty.replace(histogram=bins, row_histogram=bins, sigma_absmax=absmax)


def test_bins_are_the_upper_bits_of_float32():
    edges = BIN_EDGES[:-1].astype(np.float32)
    assert (edges == BIN_EDGES[:-1]).all()
    assert (edges.view(np.uint32) >> 19 == np.arange(NONFINITE_BIN)).all()
    below = np.nextafter(edges[1:], np.float32(0))
    assert (below.view(np.uint32) >> 19 == np.arange(NONFINITE_BIN - 1)).all()
    assert BIN_EDGES[-1] == 2.0**128
    octave = BIN_EDGES[np.searchsorted(BIN_EDGES, 1.0) :][:17]
    assert octave.tolist() == [1 + step / 16 for step in range(17)]
    assert (BIN_CENTRES - BIN_EDGES[:-1] == BIN_EDGES[1:] - BIN_CENTRES).all()


@pytest.mark.parametrize(
    ("sigma", "column"),
    [
        *[(0.0, 0), (1e-9, 0), (0.125, 0), (0.1251, 1), (0.5, 3), (0.875, 6), (0.876, 7), (1.0, 7), (None, 8)],
        *[(1.0001, 8), (-0.1, 8), (float("nan"), 8), (float("inf"), 8), (999.0, 8)],
    ],
)
def test_noise_levels_have_eight_bins_and_one_for_the_unknown(sigma, column):
    assert sigma_bin(sigma) == column


def test_merging_is_the_same_in_every_order_and_grouping():
    runs = [random_statistics(seed) for seed in range(4)]
    whole = merge(*runs)
    for order in itertools.permutations(runs):
        assert merge(*order) == whole
        assert merge(merge(*order[:2]), merge(*order[2:])) == whole
        assert merge(order[0], merge(order[1], merge(order[2], order[3]))) == whole
    assert (whole.samples, whole.provenance) == (10, {"seed": ("0", "1", "2", "3"), "engine": ("test",)})
    assert merge(whole) == whole
    assert merge(whole, runs[0]) != whole


@pytest.mark.parametrize("name", COLUMNS)
def test_every_column_adds_up_except_the_two_maxima(name):
    parts = [random_statistics(seed) for seed in range(3)]
    if name.endswith("histogram"):
        parts = [part.replace(**{name: getattr(part, name) + 1}) for part in parts]  # a bin that all have
    columns = [getattr(part, name).astype(object) for part in parts]
    together = getattr(merge(*parts), name)
    if name in ("sigma_absmax", "rows_per_sample"):
        assert np.array_equal(together, np.maximum(np.maximum(columns[0], columns[1]), columns[2]))
    else:
        assert np.array_equal(together, sum(columns))


def test_mean_squares_are_those_of_each_noise_level_and_of_all_together():
    empty = Statistics.empty({"x": (1, 2), "y": (1, 2)})
    count, squares = empty.sigma_count.copy(), empty.sigma_squares.copy()
    for column, (values, square_sum) in {0: (4, 1), 3: (2, 50), 8: (10, 200)}.items():
        count[0, column] = values
        squares[0, column] = square_sum
    seen = empty.replace(sigma_count=count, sigma_squares=squares, rows=np.array([8, 0]))
    assert seen.sigma_mean_square.tolist() == [[0.25, 0, 0, 25.0, 0, 0, 0, 0, 20.0], [0.0] * 9]
    assert seen.sum_of_squares.tolist() == [251.0, 0.0]
    assert seen.mean_square.tolist() == [251 / 16, 0.0]


def test_statistics_are_equal_only_where_everything_is():
    stats = random_statistics(0)
    assert stats == random_statistics(0)
    assert stats != "statistics"
    others = [
        *(stats.replace(**{name: np.roll(getattr(stats, name), 1, 0)}) for name in COLUMNS),
        stats.replace(samples=9),
        stats.replace(left_out=("z",)),
        stats.with_facts(engine="another"),
        stats.take(reversed(LAYERS)),
    ]
    assert all(other != stats for other in others)


def test_facts_and_layers_left_out_are_added_to_those_before():
    stats = random_statistics(0).with_facts(engine={"b", "a"}, lora=[2, 1, 1])
    assert stats.provenance == {"seed": ("0",), "engine": ("a", "b"), "lora": ("1", "2")}
    assert stats.samples == 1
    left = stats.replace(left_out=("old",))
    assert merge(left, random_statistics(1).replace(left_out=("older",))).left_out == ("old", "older")
    assert left.for_layers({"c": (4, 4), "x": (1, 1)}, force=True).left_out == ("old", "x")


def test_a_model_is_known_by_names_and_shapes():
    known = random_statistics(0).fingerprint
    assert random_statistics(1).fingerprint == known
    for layers in ({**LAYERS, "c": (4, 5)}, {**LAYERS, "c": (5, 4)}, {"b.attn": (8, 4), "a.mlp": (16, 8), "d": (4, 4)}):
        assert random_statistics(0, layers).fingerprint != known
    a = random_statistics(0)  # in another order it is the same model
    b = random_statistics(1).take(reversed(LAYERS))
    assert a.fingerprint == b.fingerprint
    assert merge(a, b) == merge(b, a)
    assert merge(a, b).names == tuple(sorted(LAYERS))
    assert merge(a, b).take(LAYERS) == merge(a, random_statistics(1))


def test_different_models_are_refused_and_forcing_keeps_what_matches():
    a = random_statistics(0)
    b = random_statistics(1, {"a.mlp": (16, 8), "c": (4, 5), "d": (1, 1)})
    with pytest.raises(StatisticsError) as caught:
        merge(a, b)
    assert str(caught.value) == (
        "made for different models: 3 of 4 layers differ in name or shape: b.attn, c, d "
        "(--force keeps the layers that all of them have)"
    )
    forced = merge(a, b, force=True)
    assert forced.names == ("a.mlp",)
    assert forced.left_out == ("b.attn", "c", "d")
    assert np.array_equal(forced.histogram[0], a.histogram[1] + b.histogram[0])
    with pytest.raises(StatisticsError, match="no layer is common to all of them"):
        merge(a, random_statistics(1, {"z": (1, 1)}), force=True)
    with pytest.raises(StatisticsError, match="no statistics to merge"):
        merge()


def test_weights_tell_models_of_the_same_shapes_apart():
    rng = np.random.default_rng(3)
    own, other = ({name: rng.standard_normal(SAMPLED).astype(np.float32) for name in LAYERS} for _ in range(2))
    noisy = {name: values * (1 + 0.3 * rng.standard_normal(SAMPLED)).astype(np.float32) for name, values in own.items()}
    a, b, c = (random_statistics(0).replace(weights=weights) for weights in (own, noisy, {**own, "c": other["c"]}))
    a, c = a.replace(path=Path("a.safetensors")), c.replace(path=Path("c.safetensors"))
    merged = merge(a, b, random_statistics(1))
    assert merged == merge(b, a, random_statistics(1))
    assert merged.weights.keys() == own.keys()
    with pytest.raises(StatisticsError) as caught:
        merge(a, b, c)
    problem = "made for another model than a.safetensors: 1 of 3 layers differ in weights: c"
    assert str(caught.value) == f"c.safetensors: {problem} (--force keeps the layers that all of them have)"
    assert merge(a, c, force=True).left_out == ("c",)
    assert a.for_layers(LAYERS, force=True, weights=c.weights).left_out == ("c",)
    assert not a.other_weights({name: 0 * values for name, values in other.items()})  # nothing can be said of these
    assert a.other_weights({name: 10 * values for name, values in own.items()}) == own.keys()


def test_statistics_are_used_on_models_whose_layers_they_know():
    stats = random_statistics(0)
    some = {"c": (4, 4), "b.attn": (8, 4)}
    assert stats.for_layers(some) == stats.take(some)
    with pytest.raises(StatisticsError, match=r"1 of 2 layers differ in name or shape: x \(--force uses"):
        stats.for_layers({"c": (4, 4), "x": (1, 1)})
    forced = stats.for_layers({"c": (4, 4), "x": (1, 1)}, force=True)
    assert (forced.names, forced.left_out) == (("c",), ("x",))
    with pytest.raises(StatisticsError, match="no layer matches in name and shape"):
        stats.for_layers({"c": (5, 5)}, force=True)
    with pytest.raises(StatisticsError, match="no such layer"):
        stats.index("x")


@settings(deadline=None)
@given(values=hnp.arrays(np.float32, st.integers(1, 80), elements=st.floats(0, 2.0**100, width=32)), q=st.floats(0, 1))
def test_a_quantile_lies_in_the_bin_of_the_values_own(values, q):
    found = of_values(values).quantiles(q)[0]
    rank = max(int(np.ceil(Fraction(q) * len(values))), 1)
    value = np.sort(values)[rank - 1]
    number = int(np.float32(value).view(np.uint32)) >> 19
    assert BIN_EDGES[number] <= found <= BIN_EDGES[number + 1]
    assert found <= values.max()


def test_the_last_quantile_is_absmax_and_an_empty_histogram_has_none():
    assert of_values(np.array([1.0, 2.01])).quantiles(1.0)[0] == np.float32(2.01)
    assert Statistics.empty({"x": (1, 1)}).quantiles(0.5).tolist() == [0.0]
    # The q-quantile is where a share q lies below: at the end of a bin, not in the next bin that holds anything.
    apart = of_values(np.array([1.0, 2.0]))
    assert [apart.quantiles(q)[0] for q in (0, 0.25, 0.5, 0.75)] == [1.0, 1 + 1 / 32, 1 + 1 / 16, 2.0]
    uniform = of_values(1 + np.arange(1600) / 1600)
    assert uniform.quantiles(0.5)[0] == pytest.approx(1.5, abs=1e-3)
    assert uniform.quantiles(0.25) == pytest.approx([1.25], abs=1e-3)


def test_rows_below_a_threshold_are_counted_exactly_at_edges_and_zero_rows_never():
    stats = of_values(np.array([0, 0, 0.25, 0.5, 1.0, 1.0, 2.0, 3e38]))
    for threshold, share in [(0.25, 0), (0.5, 1 / 8), (1.0, 2 / 8), (2.0, 4 / 8), (1e30, 5 / 8), (np.inf, 6 / 8)]:
        assert stats.rows_below(threshold).tolist() == [share]
    assert stats.rows_below(np.array([1 + 1 / 32])).tolist() == [3 / 8]  # half of the bin that holds two
    assert Statistics.empty({"x": (1, 1)}).rows_below(1.0).tolist() == [0.0]


def test_a_file_gives_back_everything(tmp_path):
    stats = random_statistics(5).replace(left_out=("old",))
    path = tmp_path / "s.safetensors"
    stats.save(path, {"progress": "17"})
    loaded = Statistics.load(path)
    assert loaded == stats
    assert (loaded.metadata, loaded.path) == ({"progress": "17"}, path)
    assert merge(loaded, random_statistics(6)) == merge(random_statistics(6), stats)
    random_statistics(6).save(path)
    assert Statistics.load(path) == random_statistics(6)


def test_other_tools_can_read_the_file(tmp_path):
    stats = random_statistics(0)
    stats.save(tmp_path / "s.safetensors")
    with safe_open(tmp_path / "s.safetensors", "np") as file:
        head = json.loads(file.metadata()[METADATA_KEY])
        assert list(head["layers"]) == list(LAYERS)
        assert np.array_equal(file.get_tensor("absmax"), stats.absmax)
        assert np.array_equal(file.get_tensor("histogram"), stats.histogram)
        assert np.array_equal(file.get_tensor("sum_of_squares"), stats.sum_of_squares)
        assert np.array_equal(file.get_tensor("nonfinite"), stats.nonfinite)


def edited(path: Path, drop: str | None = None, head: dict[str, Any] | None = None, **columns: NDArray[Any]) -> Path:
    """A statistics file with something in it changed."""
    random_statistics(0).save(path)
    with open_checkpoint(path) as checkpoint:
        entries = {name: Entry.of(checkpoint.bits(name).copy()) for name in checkpoint.tensors if name != drop}
        whole = json.loads(checkpoint.metadata[METADATA_KEY])
    entries |= {name: Entry.of(array) for name, array in columns.items()}
    write_checkpoint(path, entries, {METADATA_KEY: json.dumps({**whole, **(head or {})})})
    return path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"drop": "zeros"}, "zeros: the column is missing"),
        ({"zeros": np.zeros(4, np.int64)}, r"zeros: int64 \[3\] expected, found I64 \[4\]"),
        ({"zeros": np.zeros(3, np.int32)}, r"zeros: int64 \[3\] expected, found I32 \[3\]"),
        ({"zeros": np.full(3, -1)}, "zeros: damaged: finite numbers were expected, none below 0"),
        ({"rows": np.zeros(3, np.int64)}, "damaged: the row histogram and the rows disagree"),
        ({"histogram": np.zeros((3, BINS), np.int64)}, "damaged: the histogram and the counts disagree"),
        *(
            ({"sigma_absmax": np.full((3, 9), bad, np.float32)}, "sigma_absmax: damaged: finite numbers")
            for bad in (np.inf, np.nan, -1)
        ),
        ({"sigma_squares": np.full((3, 9), np.nan)}, "sigma_squares: damaged: finite numbers"),
        ({"head": {"fingerprint": "0"}}, "damaged: the fingerprint is not that of the layers"),
        ({"head": {"format_version": 2}}, r"statistics of format 2; this version reads format 1 \(update"),
        *(({"head": {"samples": bad}}, "'samples' in the header should be a count") for bad in ("many", -3, True)),
        *(
            ({"head": {"layers": {"a": [1, 2], "b": bad, "c": [1, 2]}}}, r"b: damaged: \[out, in\] expected")
            for bad in (3, [-1, 2], [True, 2])
        ),
        ({"head": {"provenance": {"x": 5}}}, "'provenance' in the header should be lists of texts by name"),
        ({"head": {"left_out": [1, "a"]}}, "'left_out' in the header should be a list of texts"),
    ],
)
def test_a_damaged_file_is_refused(tmp_path, change, message):
    path = edited(tmp_path / "s.safetensors", **change)
    with pytest.raises(StatisticsError, match=message) as caught:
        Statistics.load(path)
    assert str(caught.value).startswith(str(path))


def test_a_checkpoint_is_not_taken_for_statistics(tmp_path):
    path = tmp_path / "model.safetensors"
    for metadata, message in (({}, "not a statistics file"), ({METADATA_KEY: "{"}, "not JSON")):
        write_checkpoint(path, {"x": Entry.of(np.zeros(1))}, metadata)
        with pytest.raises(StatisticsError, match=message):
            Statistics.load(path)
