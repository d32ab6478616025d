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
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

from ..choose import keeps
from ..options import SolveOptions
from ..telling import plural
from .document import Figures, Layer, Level, Risk, Side, State, Verdict

LOST_TOKENS = SolveOptions.row_loss_limit
"""Share of a layer's tokens under 1/16 of its scale from which on they are told."""

TYPICAL_BITS = 8
"""The size of which is told what the best mix keeps."""

MOVED_OCTAVES = 0.5
"""A range or a scale that differs by more has moved."""

CAUSES = {
    "one row": "with one token per image, where that costs nothing",
    "rows lost": "where tokens would be lost at any scale",
    "budget": "among the worst for what they cost, within the budget",
}
"""Why layers compute in full precision; see `solve.LayerResult.cause`."""

MEASURED = "These are risks to the inputs of layers; convert_to_quant check measures what they cost the image."


class Case(NamedTuple):
    """A layer's name, its figures on one side, and the state in question."""

    name: str
    figures: Figures
    state: State

    @property
    def overshoot(self) -> float:
        """How far the largest input lies beyond the largest code times the scale, as a factor."""
        octaves = self.figures.octaves_over(self.state)
        return 2**octaves if octaves is not None else 0.0 if self.state.scale else math.inf

    @property
    def decibels(self) -> str:
        """Signal to noise in words."""
        return f"{round(self.state.sqnr_db or 0)} dB of signal to noise"


def _cases(layers: Sequence[Layer], side: int, which: str) -> list[Case]:
    """The layers of a side with their states "before", "after", or "crossed"."""
    known = [(layer, figures) for layer in layers if (figures := layer.sides[side]) is not None]
    states = [layer.crossed if which == "crossed" else getattr(figures, which) for layer, figures in known]
    return [Case(layer.name, figures, state) for (layer, figures), state in zip(known, states, strict=True) if state]


def judge(sides: Sequence[Side], layers: Sequence[Layer], *, same_inputs: bool = True) -> Verdict:
    """The verdict on one side or two; `same_inputs` where both were observed on the same, or not at all."""
    if len(sides) == 1:
        return _one(sides[0], layers)
    first, second = sides
    level, headline, points = (_two_scales if same_inputs else _two_inputs)(first, second, layers)
    for number, side in enumerate(sides):
        if count := sum(layer.sides[1 - number] is None for layer in layers):
            points.append(f"Only in {side.label}: {plural(count, 'layer')}.")
    return Verdict(level, headline, tuple(points))


def factor(ratio: float) -> str:
    """A ratio as people read it.

    >>> factor(37.25), factor(4.56), factor(1.034), factor(1e6)
    ('37', '4.6', '1.03', '1,000,000')
    """
    return f"{ratio:,.0f}" if ratio >= 9.95 else f"{ratio:.1f}" if ratio >= 1.95 else f"{ratio:.2f}"


def percent(share: float | None) -> str:
    """A share as people read it; None is none.

    >>> percent(0.31), percent(0.004), percent(3e-7), percent(0.0)
    ('31 %', '0.4 %', 'under 0.001 %', '0 %')
    """
    share = share or 0
    if 0 < share < 1e-5:
        return "under 0.001 %"
    return f"{100 * share:.2g} %" if share < 0.995 else f"{100 * share:.3g} %"


def _is(count: int) -> str:
    return "is" if count == 1 else "are"


def _count_risky(cases: Iterable[Case]) -> int:
    return sum(bool(case.state.risk) for case in cases)


def _one(side: Side, layers: Sequence[Layer]) -> Verdict:
    """The verdict on one side."""
    before, after = _cases(layers, 0, "before"), _cases(layers, 0, "after")
    present = [case for case in before if not case.state.full_precision and not case.figures.unused]
    unseen = [case.name for case in present if not case.figures.seen]
    risky, remaining = _count_risky(present), _count_risky(after)
    lost = _lost_tokens(present)
    where = "at the present scales" if side.model is not None else "at a scale of 1.0"
    level: Level = "good"
    mixed = _mixed(side, layers)
    if mixed and not (risky or remaining):
        headline = mixed.pop(0)
    elif not side.calibrates and present:
        level = "warning"
        headline = f"Nothing was observed, so it is unknown whether {plural(len(present), 'scale')} fit."
    elif not present:
        headline = "No layer quantizes its inputs by an input scale, so there is nothing to calibrate."
    elif risky:
        level, then = "bad", f"{remaining:,} {_is(remaining)}" if remaining else "none is"
        headline = f"{risky:,} of {len(present):,} FP8 layers {_is(risky)} at risk {where}; calibrated, {then}."
    else:
        level = "warning" if unseen or remaining or lost else "good"
        headline = f"None of {plural(len(present), 'FP8 layer')} is at risk {where}."
    points = [*mixed, *_mix_points(side, layers), *_risks(present), *lost, *_mild(present)]
    ratios = _median_db(present), _median_db(case._replace(state=case.figures.after) for case in present)
    if None not in ratios:
        points.append(f"{RATIO}, median over layers: {ratios[0]:.1f} dB now, {ratios[1]:.1f} dB calibrated.")
    moved = [new for old, new in zip(before, after, strict=True) if new.state.full_precision > old.state.full_precision]
    if moved:
        causes = Counter(case.figures.cause for case in moved)
        why = "; ".join(f"{causes[cause]:,} {words}" for cause, words in CAUSES.items() if causes[cause])
        points.append(f"Calibration moves {plural(len(moved), 'layer')} to full precision: {why}.")
    if side.model is None:
        points.append("No checkpoint was given: 1.0 is what ComfyUI reads from an FP8 file without input scales.")
    if risky:
        points.append(MEASURED)
    if unseen and side.calibrates:
        keep = "saw no inputs, or only zeros, and " + ("keeps its scale" if len(unseen) == 1 else "keep their scales")
        points.append(f"{plural(len(unseen), 'layer')} {keep} (first: {unseen[0]}).")
    unused = Counter(case.figures.unused for case in before if case.figures.unused and not case.figures.inputs)
    for why, count in unused.items():
        points.append(f"No reader uses the input scale of {plural(count, 'layer')}: {why}.")
    moving = [case.name for case in before if case.figures.conditioning_dependent]
    if moving:
        points.append(
            f"Observed on noise: the ranges of {plural(len(moving), 'layer')} depend on the conditioning, which noise "
            f"only imitates (first: {moving[0]})."
        )
    return Verdict(level, headline, tuple(points))


def _mixed(side: Side, layers: Sequence[Layer]) -> list[str]:
    """What a mix of formats keeps, and how many layers are in which; nothing where there is none."""
    if "bits" not in side.mix:
        return []
    stored = Counter(figures.stored for layer in layers if (figures := layer.sides[0]) is not None)
    counted = ", ".join(f"{count:,} in {name}" for name, count in stored.most_common())
    chosen = f"; chosen for {side.mix['gpu']}" if side.mix.get("gpu") else ""
    kept = f", {words} on {side.mix.get('on', 'noise')}" if (words := keeps(side.mix)) else ""
    return [f"A mix of formats at {side.mix['bits']:.2f} bits per weight{kept}.", f"Layers: {counted}{chosen}."]


def _mix_points(side: Side, layers: Sequence[Layer]) -> list[str]:
    """What else there was to choose, in a sentence each."""
    mix, points = side.mix, []
    if "bits" in mix and "expected_db" in mix and "more" in mix:
        bits, expected_db = mix["more"]
        moved = sum(
            figures is not None and figures.more not in ("", figures.stored) for (figures,) in (x.sides for x in layers)
        )
        gain = expected_db - mix["expected_db"]
        points.append(
            f"Half a bit more per weight ({bits:.2f}) is expected to keep {gain:.1f} dB more; "
            f"{plural(moved, 'layer')} would change."
        )
    elif mix.get("curve"):
        bits, expected_db = max(mix["curve"], key=lambda point: (point[0] <= TYPICAL_BITS, point[0]))
        points.append(f"The best mix of {bits:g} bits per weight is expected to keep {expected_db:.1f} dB.")
    uniform = mix.get("uniform", {})
    best = max(uniform, key=lambda name: uniform[name][1], default=None)
    if best is not None:
        bits, expected_db = uniform[best]
        kept = f"{expected_db:.1f} dB expected at {bits:.2f} bits per weight"
        points.append(f"Of one format for all layers {best} keeps most: {kept}.")
    return points


RATIO = "Signal to noise of a layer's inputs"


class Words(NamedTuple):
    """What one layer and several do under a risk, by what the worst of them is found, and what is said of it."""

    one: str
    several: str
    badness: Callable[[Case], float]
    detail: Callable[[Case], str]


WORDS: Mapping[Risk, Words] = {
    "no scale": Words("has no usable scale", "have no usable scale", lambda _: 0,
                      lambda case: f"inputs become infinite or NaN, or ComfyUI fails (first: {case.name})"),
    "clips": Words("clips", "clip", lambda case: case.overshoot,
                   lambda case: f"inputs reach up to {factor(case.overshoot)} times what FP8 holds there ({case.name}: "
                                f"{percent(case.state.clipped)} of its values are cut off, {case.decibels})"),
    "vanishes": Words("vanishes", "vanish", lambda case: case.state.vanished or 0,
                      lambda case: f"up to {percent(case.state.vanished)} of a layer's values become 0 ({case.name})"),
    "tokens lost": Words("loses tokens", "lose tokens", lambda case: case.state.rows_lost or 0,
                         lambda case: f"up to {percent(case.state.rows_lost)} of a layer's tokens lie under 1/16 of "
                                      f"its scale, where few codes are ({case.name})"),
    "coarse": Words("is coarse", "are coarse", lambda case: -(case.state.sqnr_db or 0),
                    lambda case: f"inputs lie among the smallest steps, down to {case.decibels} ({case.name})"),
}  # fmt: skip
"""The words for each risk, the worst first."""


def _risks(cases: Sequence[Case], would: bool = False) -> list[str]:
    """One sentence for each risk that occurs, with the layer that has most of it."""
    sentences = []
    for risk, words in WORDS.items():
        found = [case for case in cases if case.state.risk == risk]
        if found:
            verb = f"would {words.several}" if would else words.one if len(found) == 1 else words.several
            sentences.append(f"{plural(len(found), 'layer')} {verb}: {words.detail(max(found, key=words.badness))}.")
    return sentences


def _harmless(cases: Sequence[Case], loss: str, least: float) -> list[Case]:
    """Layers that lose more than a share of something and are at no risk, the one that loses most first."""
    losses = [
        (getattr(case.state, loss) or 0, case)
        for case in cases
        if not case.state.risk and not case.state.full_precision
    ]
    return [case for share, case in sorted(losses, key=lambda entry: -entry[0]) if share > least]


def _lost_tokens(cases: Sequence[Case]) -> list[str]:
    """Layers that lose some tokens, which costs the image something only if it needs them."""
    found = _harmless(cases, "rows_lost", LOST_TOKENS)
    return [
        f"In {plural(len(found), 'layer')} some tokens lie under 1/16 of the scale, where few codes are (most: "
        f"{percent(case.state.rows_lost)} in {case.name}); whether the image needs them is not known."
        for case in found[:1]
    ]


def _mild(cases: Sequence[Case], would: bool = False) -> list[str]:
    """Layers that clip without a cost."""
    found = _harmless(cases, "clipped", 0)
    verb = "would clip" if would else "clips" if len(found) == 1 else "clip"
    return [
        f"{plural(len(found), 'layer')} {verb} a few values, which costs hardly anything (most: {case.name}: "
        f"{percent(case.state.clipped)}, up to {factor(case.overshoot)} times what FP8 holds)."
        for case in found[:1]
    ]


def _median_db(cases: Iterable[Case]) -> float | None:
    states = [case.state for case in cases if not case.state.full_precision]
    figures = [state.sqnr_db for state in states if state.sqnr_db is not None]
    return statistics.median(figures) if figures else None


def _at_risk(cases: Sequence[Case], side: Side) -> str:
    """How many layers of a side are at risk, as a clause."""
    count = _count_risky(cases)
    share = f"{count:,} of {plural(len(cases), 'layer')} {_is(count)}" if count else "no layer is"
    return f"{share} at risk in {side.label}"


def _two_inputs(first: Side, second: Side, layers: Sequence[Layer]) -> tuple[Level, str, list[str]]:
    """Whether scales calibrated on the first side's inputs hold for the second's."""
    crossed = _cases(layers, 1, "crossed")
    risky = _count_risky(crossed)
    level: Level = "bad" if risky else "good" if crossed else "warning"
    fit, share = ("do not fit", f"{risky:,}") if risky else ("also fit", "none")
    headline = (f"Scales calibrated on {first.label} {fit} {second.label}: {share} of {plural(len(crossed), 'layer')} "
                "would be at risk.")  # fmt: skip
    if not crossed:
        headline = f"No layer was seen both in {first.label} and in {second.label}."
    points = [*_risks(crossed, would=True), *_lost_tokens(crossed), *_mild(crossed, would=True)]
    ranges = [
        (layer.name, one.absmax, other.absmax)
        for layer in layers
        if (one := layer.sides[0]) is not None and (other := layer.sides[1]) is not None
    ]
    points += _moved("range", second, ranges)
    if risky:
        points.append(MEASURED)
        points.append("Merge both (convert_to_quant merge) and calibrate on the result: it covers both.")
    for number, side in enumerate((first, second)):
        if side.model is not None:
            clause = _at_risk(_cases(layers, number, "before"), side)
            points.append(f"At the present scales of {side.model}, {clause}.")
    return level, headline, points


def _two_scales(first: Side, second: Side, layers: Sequence[Layer]) -> tuple[Level, str, list[str]]:
    """Where two calibrations of the same inputs differ: two files, or two ways to solve."""
    points: list[str] = []
    headline = ""
    level: Level = "good"
    shared = [layer for layer in layers if None not in layer.sides]
    kinds = {"before": "present scale", "after": "new scale"} if second.calibrates else {"before": "scale"}
    for which, noun in kinds.items():
        mine, theirs = (_cases(shared, number, which) for number in (0, 1))
        pairs = [(one.name, one.state, other.state) for one, other in zip(mine, theirs, strict=True)]
        differing = sum(one.scale != other.scale for _, one, other in pairs)
        precise = [name for name, one, other in pairs if one.full_precision != other.full_precision]
        if not differing and not precise:
            continue
        if not headline:
            headline = f"{differing:,} of {plural(len(pairs), noun)} {'differs' if differing == 1 else 'differ'} "
            headline += f"between {first.label} and {second.label}."
            if _count_risky((*mine, *theirs)):
                level, headline = "bad", f"{_at_risk(mine, first)}, {_at_risk(theirs, second)}."
                headline = headline[0].upper() + headline[1:]
        points += _moved(noun, second, [(name, one.scale, other.scale) for name, one, other in pairs])
        if precise:
            points.append(f"Full precision differs in {plural(len(precise), 'layer')} (first: {precise[0]}).")
        middles = _median_db(mine), _median_db(theirs)
        if None not in middles:
            ratios = f"{middles[0]:.1f} dB in {first.label}, {middles[1]:.1f} dB in {second.label}"
            points.append(f"{RATIO} at its {noun}, median over layers: {ratios}.")
    return level, headline or f"{first.label} and {second.label} have the same scales and precisions.", points


def _moved(noun: str, second: Side, values: Sequence[tuple[str, float | None, float | None]]) -> list[str]:
    """Which figures of the second side differ from the first side's by more than half an octave, and which way."""
    octaves = [(math.log2(theirs / mine), name) for name, mine, theirs in values if mine and theirs]
    parts = []
    for word, sign in (("larger", 1), ("smaller", -1)):
        entries = [(sign * moved, name) for moved, name in octaves if sign * moved > MOVED_OCTAVES]
        if entries:
            most, name = max(entries)
            parts.append(f"{len(entries):,} {_is(len(entries))} {word} (by up to {factor(2**most)} times: {name})")
    total = plural(len(octaves), noun)
    if parts:
        return [f"Of {total}, {' and '.join(parts)} in {second.label} by more than half an octave."]
    return [f"None of {total} differs by more than half an octave (1.4 times)."] if octaves else []
