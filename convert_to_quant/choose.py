"""The best format for every layer under a size, by what trial runs measured.

What is wanted is the highest mean of the velocity's SQNR in dB over moments m (noise levels, ways of conditioning):

    minimize Σ_m log Σ_layer damage(layer, format, m)    subject to    Σ_layer bytes(layer, format) ≤ limit

The logarithm is what makes it the mean of figures in dB: without it the moments that suffer most, which need not be
those of real prompts, decide alone (docs/experiments.md). It is bounded from above by its tangent, a sum over layers
with weights 1 / (damage of all at m), so a few rounds of weighted sums lead to it (majorize and minimize).

A weighted sum is minimized by a price λ: each layer takes what has the least damage + λ · bytes, and the least λ whose
choice fits is found by bisection. That choice is the best there is for the bytes that it takes (Everett, Operations
Research 1963), which are a little fewer than the limit; the rest is spent on the swaps that save most per byte.

`Mixes` are all choices of one model: what each size keeps, and every format alone. Statistics with trials suffice.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .checkpoint import Spec
from .errors import OptionError
from .formats import FORMATS
from .formats.record import GPUS, Format
from .trials import Trials, decibels

ROUNDS = 8
TINY = 1e-12
CODEBOOK_BYTES = 64
CURVE_BITS = (4.5, 5.0, 5.5, 6.0, 6.5, 7.0, 8.0, 10.0)
MORE_BITS = 0.5
MOST_BITS, MOST_DB = 64, 400
"""What a file may say of itself: of more, no chart could be drawn."""

CANDIDATES = ("fp8", "int8", "int8-convrot", "mxfp8", "nvfp4", "w6a8", "w4a8", "convrot-w4a4")
"""What is tried. One scale for a whole weight is never better than one for each of its rows, so INT8 is here once."""

Microseconds = Callable[[str, str], float]
"""What a layer's products take in a format, "" for what it is now."""

Point = tuple[float, float]
"""Bits per weight, scales included, and dB."""


@dataclass(frozen=True)
class Offer:
    """What a layer could become.

    Attributes:
        format: a key of `formats.FORMATS`, or "" for what it is now.
        nbytes: what that takes of the limit.
        damage: relative error energy of the velocity at every moment, [M].
        microseconds: what its products take, where that is limited, too.
        measured: whether the damage was, and the offer may be chosen; else it is estimated (`Trials.estimated_damage`).
    """

    format: str
    nbytes: int
    damage: NDArray[np.float64]
    microseconds: float = 0.0
    measured: bool = True


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
            hint = "ask for less speed, or other --formats"
            raise OptionError("no mix of formats of that size is so fast", hint=hint)
        places = _spend(places, worth, costs, limits)
        found = {layer: row[place] for layer, row, place in zip(offers, table, places, strict=True)}
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


def stored_bytes(fmt: Format, shape: tuple[int, ...]) -> int:
    """What a weight (out, in) takes in a format, scales included."""
    out_features, in_features = shape
    return sum(Spec(dtype, size).nbytes for dtype, size in fmt.storage((out_features, in_features), 0).values())


@dataclass(frozen=True)
class Mixes:
    """All mixes of formats that a model's layers could be in.

    Attributes:
        weights: what each layer's weight is now, by the layer's name.
        offers: what each layer could become, the first of them what it is now.
        limit_microseconds: of the layers' products.
    """

    weights: Mapping[str, Spec]
    offers: Mapping[str, Sequence[Offer]]
    limit_microseconds: float = math.inf

    @staticmethod
    def of(
        weights: Mapping[str, Spec],
        trials: Trials,
        formats: Sequence[Format],
        microseconds: Microseconds | None = None,
        speed: float | None = None,
    ) -> Mixes:
        """What was tried of layers, as offers; products are to be `speed` times as fast as now."""
        nothing, cost = np.zeros(len(trials.moments)), microseconds or (lambda _layer, _fmt: 0.0)
        offers: dict[str, list[Offer]] = {}
        for name, weight in weights.items():
            shape = weight.shape[0], weight.shape[1]
            offers[name] = [Offer("", weight.nbytes, nothing, cost(name, ""))]
            for fmt in formats:
                damage = trials.mean_damage(name, fmt.name)
                expected = trials.estimated_damage(name, fmt.name) if damage is None else damage
                if expected is not None and fmt.takes(shape):
                    size, time = stored_bytes(fmt, shape), cost(name, fmt.name)
                    offers[name].append(Offer(fmt.name, size, expected, time, damage is not None))
        now = sum(some[0].microseconds for some in offers.values())
        return Mixes(weights, offers, math.inf if speed is None else now / speed)

    @cached_property
    def measured(self) -> dict[str, list[Offer]]:
        """The offers that may be chosen."""
        return {name: [offer for offer in some if offer.measured] for name, some in self.offers.items()}

    @cached_property
    def elements(self) -> int:
        """All weights of these layers."""
        return sum(math.prod(weight.shape) for weight in self.weights.values())

    def limit_bytes(self, bits: float) -> float:
        """What layers may take at so many bits per weight.

        As formats are called 8, 6.5 or 4.5 bits: with the scales of their blocks, but without the one scale that each
        row has in nearly all of them, and without codebooks.
        """
        return bits * self.elements / 8 + sum(4 * each.shape[0] + CODEBOOK_BYTES for each in self.weights.values())

    def choose(self, limit_bytes: float) -> Choice:
        """The best of what is chosen from all formats, and from those of them that each card multiplies.

        With more formats `choose` may end at a mix that is a little worse than one of fewer.

        Raises:
            OptionError: even the smallest formats take more, or the fastest that fit.
        """
        some = {offer.format for row in self.measured.values() for offer in row if offer.format}
        kinds = {frozenset(name for name in some if gpu in FORMATS[name].native) for gpu in GPUS} - {frozenset(some)}
        found = [choose(self.measured, limit_bytes, self.limit_microseconds)]
        for kind in kinds:
            fewer = {name: [o for o in row if not o.format or o.format in kind] for name, row in self.measured.items()}
            with suppress(OptionError):  # its smallest formats may take more
                found.append(choose(fewer, limit_bytes, self.limit_microseconds))
        return max(found, key=lambda choice: decibels(total_damage(choice)))

    def choose_bits(self, bits: float) -> Choice:
        """The best choice of at most so many bits per weight.

        Raises:
            OptionError: even the smallest formats take more.
        """
        limit = self.limit_bytes(bits)
        if (over := total_bytes(self.smallest) - limit) > 0:
            least = bits + 8 * over / self.elements
            problem = f"even the smallest formats take {least:.2f} bits per weight, and --bits asks for {bits:g}"
            raise OptionError(problem)
        return self.choose(limit)

    @property
    def smallest(self) -> Choice:
        """What takes least."""
        return {name: min(some, key=lambda offer: offer.nbytes) for name, some in self.measured.items()}

    def larger(self, choice: Choice) -> Choice:
        """The best choice that takes `MORE_BITS` per weight more than another."""
        return self.choose(total_bytes(choice) + MORE_BITS * self.elements / 8)

    def point(self, choice: Choice) -> Point:
        """What a choice takes, and what it keeps of the velocity if the layers' damages add up."""
        return 8 * total_bytes(choice) / self.elements, decibels(total_damage(choice))

    @cached_property
    def curve(self) -> list[Point]:
        """The best mix of every size of `CURVE_BITS` that can be had."""
        found = []
        for bits in CURVE_BITS:
            with suppress(OptionError):
                found.append((bits, self.point(self.choose_bits(bits))[1]))
        return found

    @cached_property
    def uniform(self) -> dict[str, Point]:
        """Every format that all layers could be in."""
        by_name = {name: {offer.format: offer for offer in some} for name, some in self.offers.items()}
        shared = [FORMATS[name] for name in FORMATS if all(name in some for some in by_name.values())]
        return {fmt.name: self.point({layer: some[fmt.name] for layer, some in by_name.items()}) for fmt in shared}

    def figures(self, choice: Choice | None = None) -> dict[str, Any]:
        """What files, reports and other programs are told, as JSON values; without a choice, what there is to choose.

        `weights` is a number of weights, a point is [bits per weight, dB]. `tried` is what each format in one layer
        alone keeps in dB, as far as it was measured; `more` is the mix of half a bit more, or a layer's format in it.
        """
        larger = {} if choice is None else self.larger(choice)
        point = {} if choice is None else dict(zip(("bits", "expected_db"), _rounded(self.point(choice)), strict=True))
        layers: dict[str, dict[str, Any]] = {}
        for name, some in self.offers.items():
            tried = {each.format: round(decibels(each.damage), 2) for each in some if each.format and each.measured}
            layers[name] = {"tried": tried}
            if choice is not None:
                bits = 8 * choice[name].nbytes / math.prod(self.weights[name].shape)
                layers[name] |= {"format": choice[name].format, "bits": round(bits, 3), "more": larger[name].format}
        return {
            **point,
            "weights": self.elements,
            "curve": list(map(_rounded, self.curve)),
            "uniform": {name: _rounded(each) for name, each in self.uniform.items()},
            **({} if choice is None else {"more": _rounded(self.point(larger))}),
            "layers": layers,
        }


def _rounded(point: Point) -> list[float]:
    return [round(point[0], 3), round(point[1], 2)]


def keeps(figures: Mapping[str, Any]) -> str:
    """What a mix keeps of the velocity in words, measured where it was; "" where its figures do not say.

    >>> keeps({"expected_db": 37.46}), keeps({"measured_db": [35.1, 36.3]}), keeps({"measured_db": [44.38, 44.41]})
    ('37.5 dB expected', '35.1 to 36.3 dB measured', '44.4 dB measured')
    """
    if "measured_db" in figures:
        both = dict.fromkeys(f"{db:.1f}" for db in figures["measured_db"])
        return f"{' to '.join(both)} dB measured"
    return f"{figures['expected_db']:.1f} dB expected" if "expected_db" in figures else ""


def read_figures(said: Any) -> dict[str, Any]:
    """What a file says of its mix, as far as it is what `Mixes.figures` makes: a remark, whoever wrote it, not data."""

    def number(value: Any, least: float = -MOST_DB, most: float = MOST_DB) -> bool:
        return type(value) in (int, float) and least <= value <= most

    def pair(value: Any) -> bool:
        return isinstance(value, list) and len(value) == 2 and all(map(number, value))

    def size(value: Any) -> bool:
        return number(value, 0, MOST_BITS)

    def point(value: Any) -> bool:
        return pair(value) and size(value[0])

    def named(value: Any, kind: Callable[[Any], bool]) -> bool:
        return isinstance(value, dict) and all(map(kind, value.values()))

    def layer(value: Any) -> bool:
        return isinstance(value, dict) and named(value.get("tried"), number) and isinstance(value.get("more", ""), str)

    kinds: dict[str, Callable[[Any], bool]] = {
        "bits": size,
        "expected_db": number,
        "measured_db": pair,
        "more": point,
        "weights": lambda value: number(value, 1, 2**60),
        "curve": lambda value: isinstance(value, list) and all(map(point, value)),
        "uniform": lambda value: named(value, point),
        "layers": lambda value: named(value, layer),
    }
    known = said if isinstance(said, dict) else {}
    return {name: known[name] for name, kind in kinds.items() if name in known and kind(known[name])}


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
