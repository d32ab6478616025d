"""The choice of formats, held to every choice there is."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from convert_to_quant.choose import Choice, Offer, choose, read_figures, total_bytes, total_damage
from convert_to_quant.errors import OptionError
from convert_to_quant.trials import decibels

Table = dict[str, list[Offer]]


def test_what_a_stranger_s_file_says_of_its_mix_is_taken_as_far_as_it_is_well_formed() -> None:
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


def table(seed: int, layers: int, *, moments: int = 1, sizes: Sequence[int] = (2, 6)) -> Table:
    """Random offers of 4 to 16 bits: four bits more do at most a third of the damage, and save less each time."""
    random = np.random.default_rng(seed)
    made: Table = {}
    for number in range(layers):
        size, damage = int(random.choice(sizes)), 10 ** random.uniform(-2, 2) * random.uniform(0.5, 2, moments)
        made[f"layer{number}"] = []
        for bits in (4, 8, 12, 16):
            made[f"layer{number}"].append(Offer(f"w{bits}", bits * size, damage))
            damage = damage * random.uniform(0.02, 0.33, moments)
    return made


def every(offers: Table, limit: float) -> Iterator[Choice]:
    """All choices that fit."""
    choices = (dict(zip(offers, some, strict=True)) for some in itertools.product(*offers.values()))
    return (choice for choice in choices if total_bytes(choice) <= limit)


def bytes_at(offers: Table, place: int) -> int:
    """What all layers take in the first (0) or last (-1) of their offers."""
    return total_bytes({name: some[place] for name, some in offers.items()})


@given(st.integers(0, 10**6), st.integers(1, 5), st.floats(0.25, 1))
def test_layers_of_one_size_get_the_least_damage_that_there_is(seed: int, layers: int, share: float) -> None:
    offers = table(seed, layers, sizes=(5,))
    limit = share * bytes_at(offers, -1)
    chosen = choose(offers, limit)
    assert total_bytes(chosen) <= limit
    least = min(total_damage(other)[0] for other in every(offers, limit))
    assert total_damage(chosen)[0] == pytest.approx(least, rel=1e-9)


@given(st.integers(0, 10**6), st.integers(1, 5), st.floats(0.25, 1))
def test_layers_of_any_size_get_the_least_damage_of_one_swap_less(seed: int, layers: int, share: float) -> None:
    offers = table(seed, layers)
    limit = share * bytes_at(offers, -1)
    chosen = choose(offers, limit)
    assert total_bytes(chosen) <= limit
    swap = max(some[-1].nbytes - some[0].nbytes for some in offers.values())
    others = [total_damage(other)[0] for other in every(offers, limit - swap)]
    assert total_damage(chosen)[0] <= min(others, default=np.inf) * (1 + 1e-9)


def test_several_moments_get_nearly_the_best_mean_in_decibels() -> None:
    short_db = []
    for seed in range(40):
        offers = table(seed, 4, moments=3, sizes=(5,))
        limit = (0.3 + seed % 7 / 10) * bytes_at(offers, -1)
        best_db = max(decibels(total_damage(other)) for other in every(offers, limit))
        short_db.append(best_db - decibels(total_damage(choose(offers, limit))))
    assert max(short_db) < 0.5
    assert np.mean(short_db) < 0.02


def test_a_size_below_the_smallest_formats_is_refused() -> None:
    offers = table(0, 4, moments=2)
    least = bytes_at(offers, 0)
    assert {offer.format for offer in choose(offers, least).values()} == {"w4"}
    assert {offer.format for offer in choose(offers, bytes_at(offers, -1)).values()} == {"w16"}
    with pytest.raises(OptionError, match=rf"the smallest formats take {least} bytes, and {least - 1} were asked for"):
        choose(offers, least - 1)
