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
    """

    format: str
    nbytes: int
    damage: NDArray[np.float64]


Choice = dict[str, Offer]


def choose(offers: Mapping[str, Sequence[Offer]], limit_bytes: float) -> Choice:
    """Choose one offer for every layer.

    Args:
        offers: by layer, one at least.
        limit_bytes: for all of them together.

    Returns:
        The choice, by layer.

    Raises:
        OptionError: even the smallest offers are larger.

    >>> w4, w8 = (lambda d: Offer("w4", 4, np.array([d]))), (lambda d: Offer("w8", 8, np.array([d])))
    >>> found = choose({"a": [w4(0.5), w8(0.1)], "b": [w4(0.2), w8(0.1)]}, 12)
    >>> {layer: offer.format for layer, offer in found.items()}
    {'a': 'w8', 'b': 'w4'}
    """
    least = sum(min(offer.nbytes for offer in some) for some in offers.values())
    if least > limit_bytes:
        raise OptionError(f"the smallest formats take {least:,} bytes, and {max(limit_bytes, 0):,.0f} were asked for")
    moments = len(next(iter(offers.values()))[0].damage)
    weights, best, best_db = np.ones(moments), None, -math.inf
    for _ in range(ROUNDS):
        found = _least(offers, weights, limit_bytes)
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


def _least(offers: Mapping[str, Sequence[Offer]], weights: NDArray[np.float64], limit_bytes: float) -> Choice:
    """The choice of the least weighted damage."""
    weighed = {layer: [(float(weights @ each.damage), each) for each in some] for layer, some in offers.items()}

    def at(price: float) -> Choice:
        return {
            layer: min(some, key=lambda pair: (pair[0] + price * pair[1].nbytes, pair[1].nbytes))[1]
            for layer, some in weighed.items()
        }

    chosen = at(0.0)
    if total_bytes(chosen) > limit_bytes:
        low, high = 2.0**-100, 2.0**20  # damage per byte
        chosen = {layer: min(some, key=lambda each: each.nbytes) for layer, some in offers.items()}
        while high / low > 1 + 1e-9:
            price = math.sqrt(low * high)
            found = at(price)
            if total_bytes(found) <= limit_bytes:
                chosen, high = found, price
            else:
                low = price
    return _spend(chosen, weighed, limit_bytes - total_bytes(chosen))


def _spend(chosen: Choice, weighed: Mapping[str, Sequence[tuple[float, Offer]]], left: float) -> Choice:
    """Swap while what is left pays for it: always what saves most per byte."""
    chosen = dict(chosen)
    worth = {layer: next(w for w, each in weighed[layer] if each is chosen[layer]) for layer in chosen}
    while True:
        swaps = [
            ((worth[layer] - w) / max(each.nbytes - chosen[layer].nbytes, 1), layer, w, each)
            for layer, some in weighed.items()
            for w, each in some
            if w < worth[layer] and each.nbytes - chosen[layer].nbytes <= left
        ]
        if not swaps:
            return chosen
        _, layer, worth_now, offer = max(swaps, key=lambda swap: swap[0])
        left -= offer.nbytes - chosen[layer].nbytes
        chosen[layer], worth[layer] = offer, worth_now
