"""The measurements in words that a user understands in a minute.

One side: how many layers are at risk as the file is, why, and what calibration changes. A risk is measured damage to a
layer's inputs, not to the image. Two sides: whether a calibration on the first fits the second, and where they differ.

Ranges and scales count as different beyond half an octave (a factor of 1.41). FP8 spans 18 octaves with relative steps,
so a scale that is too large by less only costs as much at the lower end. One that is too small by as much clips, which
is reported separately.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from ..choose import keeps
from ..options import SolveOptions
from ..telling import plural
from .document import Figures, Layer, Level, Risk, Side, State, Verdict

LOST_TOKENS = SolveOptions.row_loss_limit
"""Share of a layer's tokens below 1/16 of its scale above which they are reported."""

TYPICAL_BITS = 8
"""The size whose best mix is reported."""

MOVED_OCTAVES = 0.5

CAUSES = {
    "one row": "with one token per image, where it costs no time",
    "rows lost": "that would lose tokens at any scale",
    "budget": "that gain most for their cost, within the budget",
}
"""Why layers compute in full precision; see `solve.LayerResult.cause`."""

MEASURED = "These risks concern the inputs of layers. convert_to_quant check measures the effect on images."
RATIO = "Median SQNR of layer inputs"
SOME_TOKENS = "Some tokens lost"


class Case(NamedTuple):
    """A layer on one side, and the state in question."""

    name: str
    figures: Figures
    state: State

    @property
    def overshoot(self) -> float:
        """The largest input over the largest value that the scale can represent."""
        octaves = self.figures.octaves_over(self.state)
        return 2**octaves if octaves is not None else 0.0 if self.state.scale else math.inf


def _cases(layers: Sequence[Layer], side: int, which: str) -> list[Case]:
    """The layers of a side with their states "before", "after", or "crossed"."""
    known = [(layer, figures) for layer in layers if (figures := layer.sides[side]) is not None]
    states = [layer.crossed if which == "crossed" else getattr(figures, which) for layer, figures in known]
    return [Case(layer.name, figures, state) for (layer, figures), state in zip(known, states, strict=True) if state]


def judge(sides: Sequence[Side], layers: Sequence[Layer], *, same_inputs: bool = True) -> Verdict:
    """The verdict on one side, or on two; `same_inputs` if both have the same statistics, or none."""
    if len(sides) == 1:
        return _one(sides[0], layers)
    first, second = sides
    level, headline, points = (_two_scales if same_inputs else _two_inputs)(first, second, layers)
    for number, side in enumerate(sides):
        if count := sum(layer.sides[1 - number] is None for layer in layers):
            points.append(f"Only in {side.label}: {plural(count, 'layer')}.")
    return Verdict(level, headline, tuple(points))


def factor(ratio: float) -> str:
    """A ratio for people.

    >>> factor(37.25), factor(4.56), factor(1.034), factor(1e6)
    ('37', '4.6', '1.03', '1,000,000')
    """
    return f"{ratio:,.0f}" if ratio >= 9.95 else f"{ratio:.1f}" if ratio >= 1.95 else f"{ratio:.2f}"


def percent(share: float | None) -> str:
    """A share for people; None is none.

    >>> percent(0.31), percent(0.004), percent(3e-7), percent(0.0)
    ('31 %', '0.4 %', 'under 0.001 %', '0 %')
    """
    share = share or 0
    if 0 < share < 1e-5:
        return "under 0.001 %"
    return f"{100 * share:.2g} %" if share < 0.995 else f"{100 * share:.3g} %"


def _count_risky(cases: Iterable[Case]) -> int:
    return sum(bool(case.state.risk) for case in cases)


def _one(side: Side, layers: Sequence[Layer]) -> Verdict:
    """The verdict on one side."""
    before, after = _cases(layers, 0, "before"), _cases(layers, 0, "after")
    scaled = [case for case in before if not case.state.full_precision and not case.figures.unused]
    unseen = [case.name for case in scaled if not case.figures.seen]
    risky, remaining = _count_risky(scaled), _count_risky(after)
    findings = _findings(scaled)
    where = "at the current scales" if side.model is not None else "at a scale of 1.0"
    level: Level = "good"
    mixed = _mixed(side, layers)
    if mixed and not (risky or remaining):
        headline = mixed.pop(0)
    elif not side.calibrates and scaled:
        level = "warning"
        headline = f"Nothing was observed: whether the input scales of {plural(len(scaled), 'layer')} fit is unknown."
    elif not scaled:
        headline = "No layer uses an input scale, so there is nothing to calibrate."
    elif risky:
        level, then = "bad", f"{remaining:,}" if remaining else "none"
        headline = f"{risky:,} of {plural(len(scaled), 'FP8 layer')} at risk {where}, {then} after calibration."
    else:
        level = "warning" if unseen or remaining or SOME_TOKENS in findings else "good"
        headline = f"None of {plural(len(scaled), 'FP8 layer')} at risk {where}."
    points = [*mixed, *_mix_points(side, layers), *findings.values()]
    ratios = _median_db(scaled), _median_db(case._replace(state=case.figures.after) for case in scaled)
    if None not in ratios:
        points.append(f"{RATIO}: {ratios[0]:.1f} dB {where}, {ratios[1]:.1f} dB after calibration.")
    moved = [new for old, new in zip(before, after, strict=True) if new.state.full_precision > old.state.full_precision]
    if moved:
        causes = Counter(case.figures.cause for case in moved)
        why = "; ".join(f"{causes[cause]:,} {words}" for cause, words in CAUSES.items() if causes[cause])
        points.append(f"Calibration moves {plural(len(moved), 'layer')} to full precision: {why}.")
    if side.model is None:
        points.append("No checkpoint was given. ComfyUI assumes 1.0 for FP8 files without input scales.")
    if risky:
        points.append(MEASURED)
    if unseen and side.calibrates:
        points.append(
            f"No inputs, or only zeros, observed in {plural(len(unseen), 'layer')}, where scales stay as they are "
            f"(first: {unseen[0]})."
        )
    unused = Counter(case.figures.unused for case in before if case.figures.unused and not case.figures.inputs)
    points += [f"Input scale not used in {plural(count, 'layer')}: {why}." for why, count in unused.items()]
    moving = [case.name for case in before if case.figures.conditioning_dependent]
    if moving:
        points.append(
            f"Observed on noise: in {plural(len(moving), 'layer')} the range depends on the conditioning, which noise "
            f"only approximates (first: {moving[0]})."
        )
    return Verdict(level, headline, tuple(points))


def _mixed(side: Side, layers: Sequence[Layer]) -> list[str]:
    """The quality of a mix of formats, and the number of layers in each; nothing for other files."""
    if "bits" not in side.mix:
        return []
    stored = Counter(figures.stored for layer in layers if (figures := layer.sides[0]) is not None)
    counted = ", ".join(f"{count:,} in {name}" for name, count in stored.most_common())
    chosen = f"; chosen for {side.mix['gpu']}" if side.mix.get("gpu") else ""
    quality = f", {words} on {side.mix.get('on', 'noise')}" if (words := keeps(side.mix)) else ""
    return [f"A mix of formats at {side.mix['bits']:.2f} bits per weight{quality}.", f"Layers: {counted}{chosen}."]


def _mix_points(side: Side, layers: Sequence[Layer]) -> list[str]:
    """The alternatives to a mix, one sentence each."""
    mix, points = side.mix, []
    if "bits" in mix and "expected_db" in mix and "more" in mix:
        bits, expected_db = mix["more"]
        moved = sum(
            figures is not None and figures.more not in ("", figures.stored) for (figures,) in (x.sides for x in layers)
        )
        gain = expected_db - mix["expected_db"]
        points.append(
            f"Half a bit more per weight ({bits:.2f}) is expected to add {gain:.1f} dB; it changes "
            f"{plural(moved, 'layer')}."
        )
    elif mix.get("curve"):
        bits, expected_db = max(mix["curve"], key=lambda point: (point[0] <= TYPICAL_BITS, point[0]))
        points.append(f"Best mix with {bits:g} bits per weight: {expected_db:.1f} dB expected.")
    uniform = mix.get("uniform", {})
    if uniform:
        best = max(uniform, key=lambda name: uniform[name][1])
        bits, expected_db = uniform[best]
        points.append(f"Best single format: {best}, {expected_db:.1f} dB expected with {bits:.2f} bits per weight.")
    return points


class Finding(NamedTuple):
    """Something to report of layers: what it is, how much of it a layer has (None: none), and the worst case."""

    what: str
    size: Callable[[Case], float | None]
    detail: Callable[[Case], str]


def _of_risk(risk: Risk, size: Callable[[Case], float | None]) -> Callable[[Case], float | None]:
    return lambda case: (size(case) or 0.0) if case.state.risk == risk else None


def _harmless(loss: str, least: float) -> Callable[[Case], float | None]:
    """Layers that lose more than a share of something, without a risk."""

    def size(case: Case) -> float | None:
        share: float = getattr(case.state, loss) or 0.0
        return share if share > least and not case.state.risk and not case.state.full_precision else None

    return size


FEW_CODES = "lie below 1/16 of the scale, where FP8 has few codes"
FINDINGS = (
    Finding("No usable scale", _of_risk("no scale", lambda _: 0),
            lambda case: f"inputs become infinite or NaN, or ComfyUI fails (first: {case.name})."),
    Finding("Clipping", _of_risk("clips", lambda case: case.overshoot),
            lambda case: f"inputs reach up to {factor(case.overshoot)} times the largest FP8 value ({case.name}: "
                         f"{percent(case.state.clipped)} of values clipped, SQNR {case.state.sqnr_db or 0:.0f} dB)."),
    Finding("Most values rounded to 0", _of_risk("vanishes", lambda case: case.state.vanished),
            lambda case: f"up to {percent(case.state.vanished)} of a layer's values ({case.name})."),
    Finding("Most tokens lost", _of_risk("tokens lost", lambda case: case.state.rows_lost),
            lambda case: f"up to {percent(case.state.rows_lost)} {FEW_CODES} ({case.name})."),
    Finding("Coarse steps", _of_risk("coarse", lambda case: -(case.state.sqnr_db or 0)),
            lambda case: "inputs lie among the smallest steps of FP8, SQNR down to "
                         f"{case.state.sqnr_db or 0:.0f} dB ({case.name})."),
    Finding(SOME_TOKENS, _harmless("rows_lost", LOST_TOKENS),
            lambda case: f"up to {percent(case.state.rows_lost)} {FEW_CODES} ({case.name}). "
                         "Whether the image needs them is unknown."),
    Finding("Harmless clipping", _harmless("clipped", 0),
            lambda case: f"up to {percent(case.state.clipped)} of values, {factor(case.overshoot)} times "
                         f"the largest FP8 value ({case.name})."),
)  # fmt: skip
"""What is reported of a layer's inputs, the worst first."""


def _findings(cases: Sequence[Case]) -> dict[str, str]:
    """A sentence for each finding that occurs, with the worst layer, by what it is."""
    sentences = {}
    for what, size, detail in FINDINGS:
        found = [(case, value) for case in cases if (value := size(case)) is not None]
        if found:
            worst, _ = max(found, key=lambda entry: entry[1])
            sentences[what] = f"{what} in {plural(len(found), 'layer')}: {detail(worst)}"
    return sentences


def _median_db(cases: Iterable[Case]) -> float | None:
    states = [case.state for case in cases if not case.state.full_precision]
    ratios = [state.sqnr_db for state in states if state.sqnr_db is not None]
    return statistics.median(ratios) if ratios else None


def _two_inputs(first: Side, second: Side, layers: Sequence[Layer]) -> tuple[Level, str, list[str]]:
    """Whether scales calibrated on the first side's inputs fit the second's."""
    crossed = _cases(layers, 1, "crossed")
    risky = _count_risky(crossed)
    level: Level = "bad" if risky else "good" if crossed else "warning"
    fit, share = ("do not fit", f"{risky:,}") if risky else ("also fit", "none")
    headline = f"Scales calibrated on {first.label} {fit} {second.label}: {share} of {plural(len(crossed), 'layer')} "
    headline += "at risk."
    if not crossed:
        headline = f"No layer was observed in both {first.label} and {second.label}."
    points = list(_findings(crossed).values())
    ranges = [
        (layer.name, one.absmax, other.absmax)
        for layer in layers
        if (one := layer.sides[0]) is not None and (other := layer.sides[1]) is not None
    ]
    points += _moved("range", first, second, ranges)
    if risky:
        points.append(MEASURED)
        points.append("To cover both, merge the statistics (convert_to_quant merge) and calibrate on the result.")
    for number, side in enumerate((first, second)):
        if side.model is not None:
            cases = _cases(layers, number, "before")
            points.append(f"Layers at risk at the current scales of {side.model}: {_share(cases)}.")
    return level, headline, points


def _share(cases: Sequence[Case]) -> str:
    return f"{_count_risky(cases):,} of {len(cases):,}"


def _two_scales(first: Side, second: Side, layers: Sequence[Layer]) -> tuple[Level, str, list[str]]:
    """Where two calibrations of the same inputs differ: two files, or two ways to solve."""
    points: list[str] = []
    headline = ""
    level: Level = "good"
    shared = [layer for layer in layers if None not in layer.sides]
    kinds = {"before": "current scale", "after": "new scale"} if second.calibrates else {"before": "scale"}
    for which, noun in kinds.items():
        mine, theirs = (_cases(shared, number, which) for number in (0, 1))
        pairs = [(one.name, one.state, other.state) for one, other in zip(mine, theirs, strict=True)]
        differing = sum(one.scale != other.scale for _, one, other in pairs)
        precise = [name for name, one, other in pairs if one.full_precision != other.full_precision]
        if not differing and not precise:
            continue
        if not headline:
            headline = f"{noun.capitalize()}s differ in {differing:,} of {plural(len(pairs), 'layer')} between "
            headline += f"{first.label} and {second.label}."
            if _count_risky((*mine, *theirs)):
                level = "bad"
                headline = f"Layers at risk: {_share(mine)} ({first.label}), {_share(theirs)} ({second.label})."
        points += _moved(noun, first, second, [(name, one.scale, other.scale) for name, one, other in pairs])
        if precise:
            points.append(f"Full precision differs in {plural(len(precise), 'layer')} (first: {precise[0]}).")
        middles = _median_db(mine), _median_db(theirs)
        if None not in middles:
            ratios = f"{middles[0]:.1f} dB ({first.label}), {middles[1]:.1f} dB ({second.label})"
            points.append(f"{RATIO} at the {noun}: {ratios}.")
    return level, headline or f"{first.label} and {second.label} have the same scales and precision.", points


def _moved(noun: str, first: Side, second: Side, values: Sequence[tuple[str, float | None, float | None]]) -> list[str]:
    """How many values of the second side differ from the first side's by more than half an octave, and which way."""
    octaves = [(math.log2(theirs / mine), name) for name, mine, theirs in values if mine and theirs]
    if not octaves:
        return []
    parts, count = [], 0
    for word, sign in (("larger", 1), ("smaller", -1)):
        entries = [(sign * moved, name) for moved, name in octaves if sign * moved > MOVED_OCTAVES]
        if entries:
            count += len(entries)
            most, name = max(entries)
            parts.append(f"{len(entries):,} {word} (up to {factor(2**most)} times: {name})")
    layers = plural(len(octaves), "layer")
    said = f"From {first.label} to {second.label}, the {noun} differs by more than half an octave (1.4 times) in "
    said += f"{f'{count:,}' if count else 'none'} of {layers}"
    return [f"{said}: {', '.join(parts)}." if parts else f"{said}."]
