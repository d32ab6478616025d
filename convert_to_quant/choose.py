"""The best format for every layer under a size limit, from the results of trial runs.

The goal is the highest mean, over moments m (noise levels, ways of conditioning), of the velocity's SQNR in dB:

    minimize Σ_m log Σ_layer damage(layer, format, m)    subject to    Σ_layer bytes(layer, format) ≤ limit

Without the logarithm, the moments with the largest errors decide alone, and these need not be those of real prompts
(docs/experiments.md). The logarithm is bounded from above by its tangent, which is a weighted sum over layers with
weights 1 / (total damage at m); a few rounds of weighted sums converge (majorize-minimize).

A weighted sum is minimized with a price λ: each layer takes the format with the least damage + λ · bytes, and bisection
finds the least λ whose choice fits. That choice is optimal for the bytes it uses (Everett, Operations Research 1963),
which are slightly below the limit; the rest is spent on the swaps that reduce damage most per byte.

Tables are arrays over moments M, layers L and formats K. A choice is an array [L] of places in `Mixes.formats`.
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
"""Limits on what a file may claim about itself; beyond them no chart can be drawn."""

CANDIDATES = ("fp8", "int8", "int8-convrot", "mxfp8", "nvfp4", "w6a8", "w4a8", "convrot-w4a4")
"""The formats that are tried. INT8 is tried per row only: one scale per weight is never better."""

Float = NDArray[np.float64]
Choice = NDArray[np.intp]

Microseconds = Callable[[str, str], float]
"""The time of a layer's matrix multiplication in a format; "" is high precision."""

Point = tuple[float, float]
"""Bits per weight, scales included, and dB."""


def choose(damage_MLK: Float, costs_CLK: Float, limits: Sequence[float]) -> Choice:
    """Choose one format per layer.

    Args:
        damage_MLK: relative error energy of the velocity at each moment; infinite where a layer cannot be in a format.
        costs_CLK: microseconds and bytes.
        limits: of their sums over layers.

    Returns:
        The choice, [L].

    Raises:
        OptionError: even the smallest formats exceed the size limit, or no choice within it meets the time limit.

    >>> damage = np.array([[[0.5, 0.1], [0.2, 0.1]]])
    >>> choose(damage, np.array([np.zeros((2, 2)), [[4, 8], [4, 8]]]), (math.inf, 12)).tolist()
    [1, 0]
    """
    possible = np.isfinite(damage_MLK).all(0)
    damage_MLK = np.where(possible, damage_MLK, 0)
    least = np.where(possible, costs_CLK[-1], np.inf).min(1).sum()
    if least > limits[-1]:
        raise OptionError(
            f"the smallest formats take {least:,.0f} bytes, more than the limit of {max(limits[-1], 0):,.0f}"
        )
    weights, best, best_db = np.ones(len(damage_MLK)), None, -math.inf
    for _ in range(ROUNDS):
        worth = np.where(possible, np.tensordot(weights, damage_MLK, 1), np.inf)
        choice = _least(worth, costs_CLK, limits)
        if choice is None:
            raise OptionError(
                "no mix of formats meets both limits on size and speed", hint="lower --speed, or allow other --formats"
            )
        choice = _spend(choice, worth, costs_CLK, limits)
        damage = _at(damage_MLK, choice).sum(1)
        if best is None or decibels(damage) > best_db:
            best, best_db = choice, decibels(damage)
        weights = 1 / (damage + TINY)
        weights /= weights.sum()
    assert best is not None
    return best


def _at(table: Float, choice: Choice) -> Float:
    """The entries [..., L] of a table [..., L, K] at a choice."""
    found: Float = table[..., np.arange(len(choice)), choice]
    return found


def _least(worth_LK: Float, costs_CLK: Float, limits: Sequence[float]) -> Choice | None:
    """The choice of the least total worth; None if nothing fits.

    Each limit has its price, found inside that of the limit before.
    """
    if not len(costs_CLK):
        first: Choice = worth_LK.argmin(1)
        return first

    def at(price: float) -> Choice | None:
        found = _least(worth_LK + price * costs_CLK[0], costs_CLK[1:], limits[1:])
        return found if found is not None and _at(costs_CLK[0], found).sum() <= limits[0] else None

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


def _spend(choice: Choice, worth_LK: Float, costs_CLK: Float, limits: Sequence[float]) -> Choice:
    """Swap while the limits allow, each time where damage falls most per share of the limits that it uses."""
    choice, bounds = choice.copy(), np.array(limits)
    while True:
        saved = _at(worth_LK, choice)[:, None] - worth_LK
        taken = _at(costs_CLK, choice)
        more = costs_CLK - taken[..., None]
        fits = (saved > 0) & (more <= (bounds - taken.sum(1))[:, None, None]).all(0)
        if not fits.any():
            return choice
        spent = (more.clip(min=0) / bounds[:, None, None]).sum(0)
        layer, place = np.unravel_index(np.where(fits, saved / (spent + TINY), 0).argmax(), fits.shape)
        choice[layer] = place


def stored_bytes(fmt: Format, shape: tuple[int, ...]) -> int:
    """The size of a weight (out, in) in a format, scales included."""
    out_features, in_features = shape
    return sum(Spec(dtype, size).nbytes for dtype, size in fmt.storage((out_features, in_features), 0).values())


@dataclass(frozen=True, eq=False)
class Mixes:
    """All mixes of formats that a model's layers could be in.

    Attributes:
        weights: the current weight of each layer, by name.
        formats: keys of `formats.FORMATS`, the smallest first; then "", which leaves a layer as it is.
        damage: measured relative error energy of the velocity, [M, L, K]; infinite where a format was not run to the
            end, so that it is never chosen.
        expected: the same with estimates (`Trials.expected_damage`); infinite where nothing is known.
        costs: microseconds and bytes, [2, L, K].
        limit_microseconds: for all layers together.
    """

    weights: Mapping[str, Spec]
    formats: Sequence[str]
    damage: Float
    expected: Float
    costs: Float
    limit_microseconds: float = math.inf

    @staticmethod
    def of(
        weights: Mapping[str, Spec],
        trials: Trials,
        formats: Sequence[Format],
        microseconds: Microseconds = lambda *_: 0.0,
        speed: float | None = None,
    ) -> Mixes:
        """The mixes that trials allow; `speed` is the least speed-up over the current layers."""
        ordered = sorted(formats, key=lambda fmt: fmt.bits)  # of equal damage, the first is chosen
        shape = len(weights), len(ordered) + 1
        damage, expected = np.full((2, len(trials.moments), *shape), np.inf)
        costs = np.zeros((2, *shape))
        for row, (name, weight) in enumerate(weights.items()):
            damage[:, row, -1] = expected[:, row, -1] = 0
            costs[:, row, -1] = microseconds(name, ""), weight.nbytes
            for place, fmt in enumerate(ordered):
                if fmt.takes((weight.shape[0], weight.shape[1])):
                    costs[:, row, place] = microseconds(name, fmt.name), stored_bytes(fmt, weight.shape)
                    for table, known in ((expected, trials.expected_damage), (damage, trials.mean_damage)):
                        if (found := known(name, fmt.name)) is not None:
                            table[:, row, place] = found
        limit = math.inf if speed is None else costs[0, :, -1].sum() / speed
        return Mixes(weights, (*(fmt.name for fmt in ordered), ""), damage, expected, costs, limit)

    @cached_property
    def elements(self) -> int:
        """The number of weights in these layers."""
        return sum(math.prod(weight.shape) for weight in self.weights.values())

    def limit_bytes(self, bits: float) -> float:
        """The size limit for a number of bits per weight.

        Bits count as in the names of formats (8, 6.5, 4.5 bits): with the scales of blocks, but without codebooks and
        the one scale per row that nearly all formats have.
        """
        return bits * self.elements / 8 + sum(4 * each.shape[0] + CODEBOOK_BYTES for each in self.weights.values())

    def choose(self, limit_bytes: float) -> Choice:
        """The best choice from all formats, or from those that one kind of GPU multiplies.

        `choose` is a heuristic over several moments: with more formats it may end at a slightly worse mix.

        Raises:
            OptionError: even the smallest formats exceed the limit, or the fastest that fit are too slow.
        """
        limits = self.limit_microseconds, limit_bytes
        found = [choose(self.damage, self.costs, limits)]
        kinds = {tuple(not name or gpu in FORMATS[name].native for name in self.formats) for gpu in GPUS}
        for kind in kinds - {(True,) * len(self.formats)}:
            with suppress(OptionError):  # its smallest formats may be too large
                found.append(choose(np.where(kind, self.damage, np.inf), self.costs, limits))
        return max(found, key=lambda choice: self.point(choice)[1])

    def choose_bits(self, bits: float) -> Choice:
        """The best choice within a number of bits per weight.

        Raises:
            OptionError: even the smallest formats take more.
        """
        limit = self.limit_bytes(bits)
        if (over := self.total_bytes(self.smallest) - limit) > 0:
            least = bits + 8 * over / self.elements
            raise OptionError(f"even the smallest formats take {least:.2f} bits per weight, more than --bits {bits:g}")
        return self.choose(limit)

    @property
    def smallest(self) -> Choice:
        """The choice with the fewest bytes."""
        smallest: Choice = np.where(np.isfinite(self.damage).all(0), self.costs[1], np.inf).argmin(1)
        return smallest

    def larger(self, choice: Choice) -> Choice:
        """The best choice with `MORE_BITS` per weight more than another."""
        return self.choose(self.total_bytes(choice) + MORE_BITS * self.elements / 8)

    def total_bytes(self, choice: Choice) -> int:
        """The size of all layers."""
        return int(_at(self.costs[1], choice).sum())

    def speed(self, choice: Choice) -> float:
        """The speed-up of a choice over the current layers; 1 if no layer takes time."""
        chosen = _at(self.costs[0], choice).sum()
        return float(self.costs[0, :, -1].sum() / chosen) if chosen else 1.0

    def point(self, choice: Choice) -> Point:
        """Bits per weight of a choice, and the SQNR of the velocity in dB if the damages of layers add up."""
        return 8 * self.total_bytes(choice) / self.elements, decibels(_at(self.expected, choice).sum(1))

    def by_layer(self, choice: Choice) -> dict[str, str]:
        """The format of each layer."""
        return {name: self.formats[place] for name, place in zip(self.weights, choice, strict=True)}

    @cached_property
    def curve(self) -> list[Point]:
        """The best mix at each size of `CURVE_BITS` that can be reached."""
        found = []
        for bits in CURVE_BITS:
            with suppress(OptionError):
                found.append((bits, self.point(self.choose_bits(bits))[1]))
        return found

    @cached_property
    def uniform(self) -> dict[str, Point]:
        """Each format that all layers could be in."""
        known = np.isfinite(self.expected)
        places = {name: place for place, name in enumerate(self.formats) if known[..., place].all()}
        return {name: self.point(np.full(len(self.weights), places[name])) for name in FORMATS if name in places}

    def results(self, choice: Choice | None = None) -> dict[str, Any]:
        """JSON values for files, reports and other programs; without a choice, only what there is to choose from.

        `weights` is a number of weights; a point is [bits per weight, dB]. `tried` is the SQNR in dB with this layer
        alone in each format, where it was measured. `more` is the mix with half a bit more, or a layer's format in it.
        """
        layers: dict[str, dict[str, Any]] = {}
        for row, name in enumerate(self.weights):
            alone = {fmt: self.damage[:, row, place] for place, fmt in enumerate(self.formats) if fmt}
            tried = {fmt: round(decibels(each), 2) for fmt, each in alone.items() if np.isfinite(each).all()}
            layers[name] = {"tried": tried}
        found = {
            "weights": self.elements,
            "curve": list(map(_rounded, self.curve)),
            "uniform": {name: _rounded(each) for name, each in self.uniform.items()},
            "layers": layers,
        }
        if choice is None:
            return found
        larger = self.larger(choice)
        own, more, sizes = self.by_layer(choice), self.by_layer(larger), _at(self.costs[1], choice).tolist()
        for (name, weight), nbytes in zip(self.weights.items(), sizes, strict=True):
            bits = round(8 * nbytes / math.prod(weight.shape), 3)
            layers[name] |= {"format": own[name], "bits": bits, "more": more[name]}
        point = dict(zip(("bits", "expected_db"), _rounded(self.point(choice)), strict=True))
        return {**point, **found, "more": _rounded(self.point(larger))}


def _rounded(point: Point) -> list[float]:
    return [round(point[0], 3), round(point[1], 2)]


def keeps(figures: Mapping[str, Any]) -> str:
    """The quality of a mix in words, measured if it was; "" if its results do not say.

    >>> keeps({"expected_db": 37.46}), keeps({"measured_db": [35.1, 36.3]}), keeps({"measured_db": [44.38, 44.41]})
    ('37.5 dB expected', '35.1 to 36.3 dB measured', '44.4 dB measured')
    """
    if "measured_db" in figures:
        both = dict.fromkeys(f"{db:.1f}" for db in figures["measured_db"])
        return f"{' to '.join(both)} dB measured"
    return f"{figures['expected_db']:.1f} dB expected" if "expected_db" in figures else ""


def read_figures(said: Any) -> dict[str, Any]:
    """The entries of a file's own mix results that have the form of `Mixes.results`. The file is not trusted."""

    def number(value: Any, least: float = -MOST_DB, most: float = MOST_DB) -> bool:
        return type(value) in (int, float) and least <= value <= most

    def pair(value: Any) -> bool:
        return isinstance(value, list) and len(value) == 2 and all(map(number, value))

    def point(value: Any) -> bool:
        return pair(value) and 0 <= value[0] <= MOST_BITS

    def named(value: Any, kind: Callable[[Any], bool]) -> bool:
        return isinstance(value, dict) and all(map(kind, value.values()))

    def layer(value: Any) -> bool:
        return isinstance(value, dict) and named(value.get("tried"), number) and isinstance(value.get("more", ""), str)

    kinds: dict[str, Callable[[Any], bool]] = {
        "bits": lambda value: number(value, 0, MOST_BITS),
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
