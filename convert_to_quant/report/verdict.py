"""What the figures mean, in words that a user understands in a minute.

One side: how many layers are at risk as the file is, what is wrong with them, and what calibration changes. A risk is
damage to a layer's inputs, which was measured; damage to the image was not. Two sides: whether a calibration on the
first holds for the second, and where they differ.

Moved. A range or a scale counts as moved when it differs by more than half an octave (a factor of 1.41). FP8 spans 18
octaves and its step is relative, so a scale that is too large by less costs nothing but the half octave at the lower
end; one that is too small by as much clips, and how much is said apart.
"""

from __future__ import annotations

import math
import statistics as middle
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence

from ..options import SolveOptions
from ..telling import plural
from .document import Figures, Layer, Level, Risk, Side, State, Verdict

LOST_ROWS = SolveOptions.row_loss_limit
"""Share of a layer's rows under 1/16 of its scale from which on they are told."""

MOVED_OCTAVES = 0.5
"""A range or a scale that differs by more has moved."""

CAUSES = {
    "one row": "with one row per image, where that costs nothing",
    "rows lost": "where rows (tokens) would be lost at any scale",
    "budget": "among the worst for what they cost, within the budget",
}
"""Why layers compute in full precision; see `solve.LayerResult.cause`."""


VERBS: Mapping[Risk, tuple[str, str]] = {
    "no scale": ("has no usable scale", "have no usable scale"),
    "clips": ("clips", "clip"),
    "vanishes": ("vanishes", "vanish"),
    "rows lost": ("loses rows", "lose rows"),
    "coarse": ("is coarse", "are coarse"),
}
"""What one layer and several do under each risk."""


def judge(sides: Sequence[Side], layers: Sequence[Layer], *, same_inputs: bool = True) -> Verdict:
    """The verdict on a report.

    Args:
        sides: one, or two.
        layers: its layers.
        same_inputs: whether both sides were observed on the same inputs, or not at all.
    """
    if len(sides) == 1:
        return _one(sides[0], [figures for layer in layers if (figures := layer.sides[0]) is not None], layers)
    return _two(sides[0], sides[1], layers, same_inputs=same_inputs)


def factor(ratio: float) -> str:
    """A ratio as people read it.

    >>> factor(37.25), factor(4.56), factor(1.034), factor(1e6)
    ('37', '4.6', '1.03', '1,000,000')
    """
    return f"{ratio:,.0f}" if ratio >= 9.95 else f"{ratio:.1f}" if ratio >= 1.95 else f"{ratio:.2f}"


def percent(share: float) -> str:
    """A share as people read it.

    >>> percent(0.31), percent(0.004), percent(3e-7), percent(0.0)
    ('31 %', '0.4 %', 'under 0.001 %', '0 %')
    """
    if 0 < share < 1e-5:
        return "under 0.001 %"
    return f"{100 * share:.2g} %" if share < 0.995 else f"{100 * share:.3g} %"


def _one(side: Side, figures: Sequence[Figures], layers: Sequence[Layer]) -> Verdict:
    """The verdict on one side."""
    rows = [(layer.name, one) for layer, one in zip(layers, figures, strict=True)]
    quantized = [(name, one) for name, one in rows if not one.before.full_precision and not one.unused]
    where = "at the present scales" if side.model is not None else "at a scale of 1.0"
    points: list[str] = []
    if side.model is None:
        points.append("No checkpoint was given: 1.0 is what ComfyUI reads from an FP8 file without input scales.")
    unseen = [name for name, one in quantized if not one.seen]
    present = [(name, one, one.before) for name, one in quantized]
    risky, remaining = _count_risky(present), _count_risky((name, one, one.after) for name, one in rows)
    total = len(quantized)
    level: Level = "good"
    if not side.calibrates:
        level, headline = "warning", f"Nothing was observed, so nothing says whether {plural(total, 'scale')} fit."
    elif not total:
        headline = "No layer quantizes its inputs, so no input scale matters."
    elif risky:
        after = "none is" if not remaining else f"{remaining:,} {'is' if remaining == 1 else 'are'}"
        verb = "is" if risky == 1 else "are"
        level, headline = "bad", f"{risky:,} of {total:,} FP8 layers {verb} at risk {where}; calibrated, {after}."
    else:
        level = "warning" if unseen or remaining else "good"
        headline = f"None of {plural(total, 'FP8 layer')} is at risk {where}."
    lost = _lost_rows(present)
    if lost and level == "good":
        level = "warning"
    points = [*_risks(present), *lost, *_mild(present), *_ratios(quantized), *_precision(rows), *points]
    if risky:
        points.append(MEASURED)
    if unseen and side.calibrates:
        points.append(
            f"Never seen, or only as zeros, so left as they are: {plural(len(unseen), 'layer')} (first: {unseen[0]})."
        )
    for why, count in Counter(one.unused for _, one in rows if one.unused).items():
        points.append(f"No reader uses the input scale of {plural(count, 'layer')}: {why}.")
    moving = [name for name, one in rows if one.conditioning_dependent]
    if moving:
        points.append(
            f"Observed on noise: the ranges of {plural(len(moving), 'layer')} move with the conditioning, which noise "
            f"only imitates (first: {moving[0]})."
        )
    return Verdict(level, headline, tuple(points))


Row = tuple[str, Figures, State]
"""A layer's name, its figures, and the state in question."""


def _count_risky(rows: Iterable[Row]) -> int:
    return sum(bool(state.risk) for _, _, state in rows)


def _overshoot(figures: Figures, state: State) -> float:
    """How far the largest input lies beyond the largest code times the scale, as a factor."""
    octaves = figures.octaves_over(state)
    return 2**octaves if octaves is not None else 0.0 if state.scale else math.inf


def _clipping(row: Row) -> str:
    name, figures, state = row
    times, share = factor(_overshoot(figures, state)), percent(state.clipped or 0)
    cost = f"{share} of its values are cut off, {_decibels(state)} of signal to noise"
    return f"inputs reach up to {times} times what FP8 holds there ({name}: {cost})"


DETAILS: Mapping[Risk, tuple[Callable[[Row], float], Callable[[Row], str]]] = {
    "no scale": (lambda _: 0, lambda row: f"inputs become infinite or NaN, or ComfyUI fails (first: {row[0]})"),
    "clips": (lambda row: _overshoot(row[1], row[2]), _clipping),
    "vanishes": (
        lambda row: row[2].vanished or 0,
        lambda row: f"up to {percent(row[2].vanished or 0)} of a layer's values become 0 ({row[0]})",
    ),
    "rows lost": (
        lambda row: row[2].rows_lost or 0,
        lambda row: (
            f"up to {percent(row[2].rows_lost or 0)} of a layer's rows (tokens) lie under 1/16 of its scale, "
            f"where few codes are ({row[0]})"
        ),
    ),
    "coarse": (
        lambda row: -(row[2].sqnr_db or 0),
        lambda row: f"inputs lie among the smallest steps, down to {_decibels(row[2])} of signal to noise ({row[0]})",
    ),
}
"""By what the worst layer of a risk is found, and what is said of it; the worst risk first."""


def _risks(rows: Sequence[Row], would: bool = False) -> list[str]:
    """One sentence for each risk that occurs, with the layer that has most of it."""
    sentences = []
    for risk, (badness, detail) in DETAILS.items():
        found = [row for row in rows if row[2].risk == risk]
        if found:
            one, several = VERBS[risk]
            verb = f"would {several}" if would else one if len(found) == 1 else several
            sentences.append(f"{plural(len(found), 'layer')} {verb}: {detail(max(found, key=badness))}.")
    return sentences


def _decibels(state: State) -> str:
    return f"{round(state.sqnr_db or 0)} dB"


MEASURED = "At risk are inputs of layers; what that costs the image, convert_to_quant check measures."


def _lost_rows(rows: Sequence[Row]) -> list[str]:
    """Layers that lose some rows, which costs the image something only if it needs them."""
    found = [
        row for row in rows if not row[2].risk and not row[2].full_precision and (row[2].rows_lost or 0) > LOST_ROWS
    ]
    if not found:
        return []
    name, _, state = max(found, key=lambda row: row[2].rows_lost or 0)
    share = percent(state.rows_lost or 0)
    return [
        f"Some rows (tokens) lie under 1/16 of the scale, where few codes are, in {plural(len(found), 'layer')} "
        f"(most: {share} in {name}); whether the image needs them is not known."
    ]


def _mild(rows: Sequence[Row], would: bool = False) -> list[str]:
    """Layers that clip without a cost."""
    found = [row for row in rows if not row[2].risk and not row[2].full_precision and (row[2].clipped or 0) > 0]
    if not found:
        return []
    name, figures, state = max(found, key=lambda row: row[2].clipped or 0)
    verb = "would clip" if would else "clips" if len(found) == 1 else "clip"
    beyond = f"{name}: {percent(state.clipped or 0)}, up to {factor(_overshoot(figures, state))} times what FP8 holds"
    return [f"{plural(len(found), 'layer')} {verb} a few values at hardly a cost (most: {beyond})."]


def _median_db(states: Iterable[State]) -> float | None:
    figures = [state.sqnr_db for state in states if state.sqnr_db is not None and not state.full_precision]
    return middle.median(figures) if figures else None


def _ratios(rows: Sequence[tuple[str, Figures]]) -> list[str]:
    """Signal to noise, before and after."""
    before, after = (_median_db(one.before for _, one in rows), _median_db(one.after for _, one in rows))
    if before is None or after is None:
        return []
    return [f"Signal to noise of a layer's inputs, median over layers: {before:.1f} dB now, {after:.1f} dB calibrated."]


def _precision(rows: Sequence[tuple[str, Figures]]) -> list[str]:
    """Layers that move to full precision, and why."""
    moved = [(name, one) for name, one in rows if one.after.full_precision and not one.before.full_precision]
    if not moved:
        return []
    causes = Counter(one.cause for _, one in moved)
    why = [f"{causes[cause]:,} {words}" for cause, words in CAUSES.items() if causes[cause]]
    return [f"Calibration moves {plural(len(moved), 'layer')} to full precision: {'; '.join(why)}."]


def _two(first: Side, second: Side, layers: Sequence[Layer], *, same_inputs: bool) -> Verdict:
    """The verdict on two sides."""
    points: list[str] = []
    pairs = [
        (layer.name, one, other)
        for layer in layers
        if (one := layer.sides[0]) is not None and (other := layer.sides[1]) is not None
    ]
    apart = [
        f"Only in {side.label}: {plural(count, 'layer')}."
        for number, side in enumerate((first, second))
        if (count := sum(layer.sides[1 - number] is None for layer in layers))
    ]
    if same_inputs:
        level, headline, points = _two_scales(first, second, pairs)
    else:
        level, headline, points = _two_inputs(first, second, layers)
    return Verdict(level, headline, (*points, *apart))


Pair = tuple[str, Figures, Figures]
"""A layer's name, and its figures on both sides."""


def _two_inputs(first: Side, second: Side, layers: Sequence[Layer]) -> tuple[Level, str, list[str]]:
    """Whether scales calibrated on the first side's inputs hold for the second's."""
    crossed = [
        (layer.name, layer.sides[1], layer.crossed)
        for layer in layers
        if layer.crossed is not None and layer.sides[1] is not None
    ]
    risky = _count_risky(crossed)
    level: Level
    if not crossed:
        level, headline = "warning", f"No layer was seen both in {first.label} and in {second.label}."
    elif risky:
        level = "bad"
        share = f"{risky:,} of {plural(len(crossed), 'layer')}"
        headline = f"Scales calibrated on {first.label} do not fit {second.label}: {share} would be at risk."
    else:
        level = "good"
        share = f"none of {plural(len(crossed), 'layer')}"
        headline = f"Scales calibrated on {first.label} also fit {second.label}: {share} would be at risk."
    points = [*_risks(crossed, would=True), *_lost_rows(crossed), *_mild(crossed, would=True)]
    ranges = [
        (layer.name, one.absmax, other.absmax)
        for layer in layers
        if (one := layer.sides[0]) is not None and (other := layer.sides[1]) is not None
        and one.absmax and other.absmax
    ]  # fmt: skip
    if ranges:
        points.append(_moved("range", second, ranges))
    if risky:
        points.append(MEASURED)
        points.append("Merge both (convert_to_quant merge) and calibrate on that: it covers either.")
    for side, number in ((first, 0), (second, 1)):
        if side.model is not None:
            present = [(layer.name, one, one.before) for layer in layers if (one := layer.sides[number]) is not None]
            points.append(f"At the present scales of {side.model}, {_at_risk(present, side)}.")
    return level, headline, points


def _at_risk(rows: Sequence[Row], side: Side) -> str:
    """How many layers of a side are at risk, as a clause."""
    count = _count_risky(rows)
    clause = f"{count:,} of {plural(len(rows), 'layer')} {'is' if count == 1 else 'are'}" if count else "no layer is"
    return f"{clause} at risk in {side.label}"


def _two_scales(first: Side, second: Side, pairs: Sequence[Pair]) -> tuple[Level, str, list[str]]:
    """Where two calibrations of the same inputs differ: two files, or two ways to solve."""
    points: list[str] = []
    headline = ""
    level: Level = "good"
    kinds = {"before": "present scale", "after": "new scale"} if second.calibrates else {"before": "scale"}
    for which, noun in kinds.items():
        mine: list[Row] = [(name, one, getattr(one, which)) for name, one, _ in pairs]
        theirs: list[Row] = [(name, other, getattr(other, which)) for name, _, other in pairs]
        scales = [
            (name, state.scale, other.scale) for (name, _, state), (_, _, other) in zip(mine, theirs, strict=True)
        ]
        precise = [
            name
            for (name, _, state), (_, _, other) in zip(mine, theirs, strict=True)
            if state.full_precision != other.full_precision
        ]
        differing = sum(one != other for _, one, other in scales)
        if not differing and not precise:
            continue
        risky = [_count_risky(rows) for rows in (mine, theirs)]
        share = f"{differing:,} of {plural(len(pairs), noun)} {'differs' if differing == 1 else 'differ'}"
        if not headline:
            level = "bad" if any(risky) else "good"
            headline = f"{share[0].upper()}{share[1:]} between {first.label} and {second.label}."
            if any(risky):
                headline = f"{_at_risk(mine, first)}, {_at_risk(theirs, second)}."
                headline = headline[0].upper() + headline[1:]
        points.append(_moved(noun, second, scales))
        if precise:
            points.append(f"Full precision differs in {plural(len(precise), 'layer')} (first: {precise[0]}).")
        middles = [_median_db(state for _, _, state in rows) for rows in (mine, theirs)]
        if None not in middles:
            ratios = f"{middles[0]:.1f} dB in {first.label}, {middles[1]:.1f} dB in {second.label}"
            points.append(f"Signal to noise of a layer's inputs at its {noun}, median over layers: {ratios}.")
    return level, headline or f"{first.label} and {second.label} have the same scales and precisions.", points


def _moved(noun: str, second: Side, values: Sequence[tuple[str, float, float]]) -> str:
    """Which figures of the second side differ from the first side's by more than half an octave, and which way."""
    octaves = [(math.log2(theirs / mine), name) for name, mine, theirs in values if mine and theirs]
    parts = []
    for word, sign in (("larger", 1), ("smaller", -1)):
        entries = [(sign * moved, name) for moved, name in octaves if sign * moved > MOVED_OCTAVES]
        if entries:
            most, name = max(entries)
            verb = "is" if len(entries) == 1 else "are"
            parts.append(f"{len(entries):,} {verb} {word} (by up to {factor(2**most)} times: {name})")
    if not parts:
        return f"None of {plural(len(octaves), noun)} differs by more than half an octave (1.4 times)."
    return f"Of {plural(len(octaves), noun)}, {' and '.join(parts)} in {second.label} by more than half an octave."
