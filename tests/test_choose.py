"""The choice of formats, compared with every choice there is."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from convert_to_quant.choose import Choice, Mixes, choose, read_figures
from convert_to_quant.errors import OptionError
from convert_to_quant.trials import decibels

Float = NDArray[np.float64]


def test_the_results_that_a_file_claims_are_read_as_far_as_they_are_well_formed():
    layers = {"a": {"tried": {"w4": 30.0}, "more": "w8", "format": "w4"}, "b": {"tried": {}}}
    said = {"bits": 6.5, "expected_db": 30, "measured_db": [29.0, 31.0], "curve": [[4.5, 20.0]], "uniform": {}}
    said |= {"more": [7.0, 33.0], "weights": 100, "layers": layers}
    assert read_figures({**said, "unknown": 1}) == said
    for name, wrong in {
        "bits": "6.5", "curve": [[1e9, 20.0]], "expected_db": float("nan"), "measured_db": [1.0], "uniform": {"w4": 3},
        "more": 7.0, "weights": True, "layers": {"a": {"tried": {"w4": "x"}}},
    }.items():  # fmt: skip
        assert read_figures({**said, name: wrong}) == {key: value for key, value in said.items() if key != name}
    assert read_figures([]) == read_figures(None) == {}


class Table:
    """Random layers in 4 to 16 bits: four bits more do at most a third of the damage, and save less each time."""

    def __init__(self, seed: int, layers: int, *, moments: int = 1, sizes: Sequence[int] = (2, 6)) -> None:
        random = np.random.default_rng(seed)
        self.nbytes = random.choice(sizes, layers)[:, None] * np.array([4.0, 8, 12, 16])
        falls = random.uniform(0.02, 0.33, (moments, layers, 4)).cumprod(2)
        self.damage = 10 ** random.uniform(-2, 2, (layers, 1)) * random.uniform(0.5, 2, (moments, layers, 1)) * falls

    def choose(self, limit: float) -> Choice:
        chosen = choose(self.damage, np.array([np.zeros_like(self.nbytes), self.nbytes]), (math.inf, limit))
        assert self.total(chosen) <= limit
        return chosen

    def total(self, choice: Sequence[int] | Choice) -> float:
        return float(self.nbytes[np.arange(len(choice)), choice].sum())

    def hurt(self, choice: Sequence[int] | Choice) -> Float:
        return np.asarray(self.damage[:, np.arange(len(choice)), choice].sum(1))

    def every(self, limit: float) -> Iterator[Float]:
        """The damages of all choices that fit."""
        choices = itertools.product(range(4), repeat=len(self.nbytes))
        return (self.hurt(choice) for choice in choices if self.total(choice) <= limit)


@given(st.integers(0, 10**6), st.integers(1, 5), st.floats(0.25, 1))
def test_layers_of_one_size_get_the_least_damage_that_there_is(seed, layers, share):
    table = Table(seed, layers, sizes=(5,))
    limit = share * table.nbytes[:, -1].sum()
    assert table.hurt(table.choose(limit))[0] == pytest.approx(min(table.every(limit))[0], rel=1e-9)


@given(st.integers(0, 10**6), st.integers(1, 5), st.floats(0.25, 1))
def test_layers_of_any_size_get_the_least_damage_of_one_swap_less(seed, layers, share):
    table = Table(seed, layers)
    limit = share * table.nbytes[:, -1].sum()
    swap = (table.nbytes[:, -1] - table.nbytes[:, 0]).max()
    others = min((hurt[0] for hurt in table.every(limit - swap)), default=np.inf)
    assert table.hurt(table.choose(limit))[0] <= others * (1 + 1e-9)


def test_several_moments_get_nearly_the_best_mean_in_decibels():
    short_db = []
    for seed in range(40):
        table = Table(seed, 4, moments=3, sizes=(5,))
        limit = (0.3 + seed % 7 / 10) * table.nbytes[:, -1].sum()
        short_db.append(max(map(decibels, table.every(limit))) - decibels(table.hurt(table.choose(limit))))
    assert max(short_db) < 0.5
    assert np.mean(short_db) < 0.02


def test_a_size_below_the_smallest_formats_is_refused():
    table = Table(0, 4, moments=2)
    least, most = table.nbytes[:, 0].sum(), table.nbytes[:, -1].sum()
    assert (table.choose(least).tolist(), table.choose(most).tolist()) == ([0] * 4, [3] * 4)
    with pytest.raises(OptionError, match=rf"smallest formats take {least:.0f} bytes, more than the limit of"):
        table.choose(least - 1)


def test_layers_that_take_no_time_cannot_get_faster():
    none = np.zeros((2, 1, 2))
    assert Mixes({}, ("w4", ""), none[:1], none[:1], none).speed((0,)) == 1.0
