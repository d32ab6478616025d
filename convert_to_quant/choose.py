"""The best format for every layer under a size, by what trial runs measured.

What is wanted is the highest mean of the velocity's SQNR in dB over moments m (noise levels, ways of conditioning):

    minimize Σ_m log Σ_layer damage(layer, format, m)    subject to    Σ_layer bytes(layer, format) ≤ limit

The logarithm is what makes it the mean of figures in dB: without it the moments that suffer most, which need not be
those of real prompts, decide alone (docs/experiments.md). It is bounded from above by its tangent, a sum over layers
with weights 1 / (damage of all at m), so a few rounds of weighted sums lead to it (majorize and minimize).

A weighted sum is minimized by a price λ: each layer takes what has the least damage + λ · bytes, and the least λ whose
choice fits is found by bisection. That choice is the best there is for the bytes that it takes (Everett, Operations
Research 1963), which are a little fewer than the limit; the rest is spent on the swaps that save most per byte.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .errors import OptionError

ROUNDS = 8
TINY = 1e-12


@dataclass(frozen=True)
class Offer:
    """What a layer could become.

    Attributes:
        format: a key of `formats.FORMATS`, or "" for what it is now.
        nbytes: what that takes of the limit.
        damage: relative error energy of the velocity at every moment, [M].
        microseconds: what its products take, where that is limited, too.
    """

    format: str
    nbytes: int
    damage: NDArray[np.float64]
    microseconds: float = 0.0


Choice = dict[str, Offer]


def choose(offers: Mapping[str, Sequence[Offer]], limit_bytes: float, limit_microseconds: float = math.inf) -> Choice:
    """Choose one offer for every layer.

    Args:
        offers: by layer, one at least.
        limit_bytes: for all of them together.
        limit_microseconds: the same.

    Returns:
        The choice, by layer.

    Raises:
        OptionError: even the smallest offers are larger, or no choice that fits is so fast.

    >>> w4, w8 = (lambda d: Offer("w4", 4, np.array([d]))), (lambda d: Offer("w8", 8, np.array([d])))
    >>> found = choose({"a": [w4(0.5), w8(0.1)], "b": [w4(0.2), w8(0.1)]}, 12)
    >>> {layer: offer.format for layer, offer in found.items()}
    {'a': 'w8', 'b': 'w4'}
    """
    least = sum(min(offer.nbytes for offer in some) for some in offers.values())
    if least > limit_bytes:
        raise OptionError(f"the smallest formats take {least:,} bytes, and {max(limit_bytes, 0):,.0f} were asked for")
    table = [sorted(some, key=lambda offer: offer.nbytes) for some in offers.values()]  # of equals the smallest
    there = np.array([[place < len(some) for place in range(max(map(len, table)))] for some in table])
    damage_MLK = np.zeros((len(table[0][0].damage), *there.shape))
    costs, limits = np.zeros((2, *there.shape)), (limit_microseconds, limit_bytes)
    for row, some in enumerate(table):
        for place, offer in enumerate(some):
            damage_MLK[:, row, place], costs[:, row, place] = offer.damage, (offer.microseconds, offer.nbytes)

    weights, best, best_db = np.ones(len(damage_MLK)), None, -math.inf
    for _ in range(ROUNDS):
        worth = np.where(there, np.tensordot(weights, damage_MLK, 1), np.inf)
        places = _least(worth, costs, limits)
        if places is None:
            raise OptionError(
                "no mix of formats of that size is so fast", hint="ask for less speed, or other --formats"
            )
        found = dict(
            zip(
                offers,
                (table[row][place] for row, place in enumerate(_spend(places, worth, costs, limits))),
                strict=True,
            )
        )
        damage = total_damage(found)
        if best is None or decibels(damage) > best_db:
            best, best_db = found, decibels(damage)
        weights = 1 / (damage + TINY)
        weights /= weights.sum()
    assert best is not None
    return best


def total_damage(choice: Choice) -> NDArray[np.float64]:
    """The sum of the layers' damages, [M]."""
    total: NDArray[np.float64] = np.sum([offer.damage for offer in choice.values()], axis=0, dtype=np.float64)
    return total


def total_bytes(choice: Choice) -> int:
    """What the layers take."""
    return sum(offer.nbytes for offer in choice.values())


def decibels(damage: NDArray[np.float64]) -> float:
    """The mean over moments of the ratio of signal to error, in dB."""
    return float(np.mean(-10 * np.log10(damage + TINY)))


def _taken(table_LK: NDArray[np.float64], places: NDArray[np.intp]) -> NDArray[np.float64]:
    """What each layer has at its place, [L]."""
    found: NDArray[np.float64] = np.take_along_axis(table_LK, places[:, None], 1)[:, 0]
    return found


def _least(
    worth_LK: NDArray[np.float64], costs: NDArray[np.float64], limits: Sequence[float]
) -> NDArray[np.intp] | None:
    """The places of the least total worth; of several limits each has its price, found inside the one before.

    Args:
        worth_LK: of each layer's offers.
        costs: of them by limit, [C, L, K].
        limits: for their sums, [C].

    Returns:
        [L]; None where nothing fits.
    """
    if not len(costs):
        first: NDArray[np.intp] = worth_LK.argmin(1)
        return first

    def at(price: float) -> NDArray[np.intp] | None:
        found = _least(worth_LK + price * costs[0], costs[1:], limits[1:])
        return found if found is not None and _taken(costs[0], found).sum() <= limits[0] else None

    chosen = at(0.0)
    if chosen is None:
        low, high = 2.0**-100, 2.0**20  # damage per byte or microsecond
        chosen = at(high)
        while chosen is not None and high / low > 1 + 1e-9:
            price = math.sqrt(low * high)
            found = at(price)
            if found is None:
                low = price
            else:
                chosen, high = found, price
    return chosen


def _spend(
    places: NDArray[np.intp], worth_LK: NDArray[np.float64], costs: NDArray[np.float64], limits: Sequence[float]
) -> NDArray[np.intp]:
    """Swap while what is left pays for it: always what saves most for its share of what may be spent."""
    places = places.copy()
    while True:
        saved = _taken(worth_LK, places)[:, None] - worth_LK
        more = np.array([cost - _taken(cost, places)[:, None] for cost in costs])
        left = [limit - _taken(cost, places).sum() for cost, limit in zip(costs, limits, strict=True)]
        fits = (saved > 0) & np.all([each <= rest for each, rest in zip(more, left, strict=True)], axis=0)
        if not fits.any():
            return places
        spent = sum(each.clip(min=0) / limit for each, limit in zip(more, limits, strict=True))
        row, place = np.unravel_index(np.where(fits, saved / (spent + TINY), 0).argmax(), fits.shape)
        places[row] = place
