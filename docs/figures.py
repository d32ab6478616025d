"""The images of the concepts page, measured on the embedded emoji model.

    python docs/figures.py

writes docs/images/concepts_fp8.svg (what FP8 can represent, and where a layer's inputs fall at four scales) and
docs/images/concepts_damage.png (what the model paints when input scales are too small or too large). About three
minutes on two cores. Every number in them is computed here.
"""

from __future__ import annotations

import math
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from convert_to_quant import demo
from convert_to_quant.calibrate_activation_scales import patch_model_with_scales
from convert_to_quant.checkpoint import open_checkpoint
from convert_to_quant.emoji import WEIGHTS, prompts, sheet
from convert_to_quant.engines.denoiser import Denoiser, load
from convert_to_quant.fidelity import velocity_fidelity
from convert_to_quant.formats.fp8 import E4M3FN
from convert_to_quant.kernels import NONFINITE_BIN
from convert_to_quant.solve import expected_errors
from convert_to_quant.stats import BIN_EDGES, Statistics

IMAGES = Path(__file__).parent / "images"
LAYER = "double_blocks.0.img_attn.proj"

# --- what FP8 can represent

WIDTH, LEFT, RIGHT, TOP, LINE, STRIP, STRIP_GAP, FOOT = 960, 20, 20, 56, 66, 62, 14, 44
LOWEST, HIGHEST = -16, 16
ZONES = (
    (LOWEST, -10, "becomes 0", "#fbe3e4"),
    (-10, -6, "equal steps", "#fff3d6"),
    (-6, math.log2(E4M3FN.max), "8 steps per octave", "#e2f3e5"),
    (math.log2(E4M3FN.max), HIGHEST, "becomes 448", "#fbe3e4"),
)
"""log2 of |x| / scale: from, to, what happens there, and its color. 2^-10 is half of the smallest code."""

INK, FADED, AREA = "#1f2328", "#59636e", "#3b6ea8"


@dataclass(frozen=True)
class Strip:
    """A layer's inputs at one scale.

    Attributes:
        name: what is said of it.
        log2: of |x| / scale, the middle of each bin but the first, which has the zeros.
        share: of the values per octave, in each bin.
        clipped, vanished: shares of values that become 448, or 0.
        sqnr_db: of the quantized input.
    """

    name: str
    log2: np.ndarray
    share: np.ndarray
    clipped: float
    vanished: float
    sqnr_db: float


def strip(name: str, statistics: Statistics, scale: float) -> Strip:
    """What becomes of the inputs of LAYER at a scale."""
    one = statistics.take([LAYER])
    errors = expected_errors(one, np.array([scale]), [E4M3FN])
    counts = one.histogram[0, 1:NONFINITE_BIN]
    edges = np.log2(BIN_EDGES[1:] / scale)
    return Strip(
        name,
        (edges[:-1] + edges[1:]) / 2,
        counts / counts.sum() / np.diff(edges),  # bins are equally wide within an octave, not on this axis
        float(errors.clipped[0]),
        float(errors.vanished[0]),
        float(errors.sqnr_db[0]),
    )


def number_line(strips: Sequence[Strip]) -> str:
    """The SVG."""
    height = TOP + LINE + len(strips) * (STRIP + STRIP_GAP) + FOOT
    bottom = height - FOOT

    def x(log2: float) -> float:
        return LEFT + (log2 - LOWEST) / (HIGHEST - LOWEST) * (WIDTH - LEFT - RIGHT)

    def text(at_x: float, y: float, words: str, *, color: str = INK, anchor: str = "start", size: int = 14) -> str:
        return (
            f'<text x="{at_x:.1f}" y="{y:.1f}" fill="{color}" text-anchor="{anchor}" font-size="{size}">{words}</text>'
        )

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
        'font-family="system-ui, sans-serif" role="img" aria-label="Which values FP8 keeps at which scale">',
        f'<rect width="{WIDTH}" height="{height}" rx="8" fill="#ffffff"/>',
    ]
    for low, high, words, color in ZONES:
        parts.append(f'<rect x="{x(low):.1f}" y="{TOP - 28}" width="{x(high) - x(low):.1f}" '
                     f'height="{bottom - TOP + 28}" fill="{color}"/>')  # fmt: skip
        parts.append(text((x(low) + x(high)) / 2, TOP - 10, words, anchor="middle"))
    parts.append(text(LEFT, 20, "Every value that float8_e4m3fn has, and one layer's inputs at four scales", size=15))
    codes = E4M3FN.values[1:0x7F]
    ticks = "".join(f"M{x(math.log2(value)):.1f} {TOP + 6}v30" for value in codes)
    parts.append(f'<path d="{ticks}" stroke="{INK}" stroke-width="0.8" fill="none"/>')
    parts.append(text(x(-10) - 6, TOP + 26, "the 126 positive codes", color=FADED, anchor="end"))
    for number, one in enumerate(strips):
        base = TOP + LINE + number * (STRIP + STRIP_GAP) + STRIP
        parts += drawn(one, x, base)
        losses = [f"{one.clipped:.0%} clipped"] * (one.clipped >= 0.005)
        losses += [f"{one.vanished:.0%} vanish"] * (one.vanished >= 0.005)
        words = ", ".join([*losses, f"{one.sqnr_db:.1f} dB"])
        left = float(one.log2[np.argmax(one.share)]) > 0
        at_x, anchor = (LEFT + 8, "start") if left else (WIDTH - RIGHT - 8, "end")
        parts.append(text(at_x, base - 26, one.name, anchor=anchor))
        parts.append(text(at_x, base - 8, words, color=FADED, anchor=anchor))
    for log2 in range(LOWEST + 2, HIGHEST, 4):
        parts.append(text(x(log2), bottom + 18, f"2<tspan dy='-5' font-size='10'>{log2}</tspan>",
                          color=FADED, anchor="middle"))  # fmt: skip
    parts.append(text(WIDTH / 2, bottom + 36, "|x| / scale", color=FADED, anchor="middle"))
    return "\n".join([*parts, "</svg>", ""])


def drawn(one: Strip, x: Callable[[float], float], base: float) -> Iterator[str]:
    """The distribution of one strip as an area on its base line."""
    used = (one.log2 > LOWEST) & (one.log2 < HIGHEST) & (one.share > 0)
    tall = STRIP / one.share.max()
    points = [f"{x(log2):.1f} {base - tall * share:.1f}" for log2, share in zip(one.log2[used], one.share[used])]  # noqa: B905
    first, last = x(float(one.log2[used][0])), x(float(one.log2[used][-1]))
    yield f'<path d="M{first:.1f} {base}L{"L".join(points)}L{last:.1f} {base}z" fill="{AREA}" fill-opacity="0.75"/>'
    yield f'<path d="M{LEFT} {base}H{WIDTH - RIGHT}" stroke="{FADED}" stroke-width="0.5"/>'


# --- what the model paints with wrong scales

TARGETS_DB = (30.0, 20.0, 10.0, 3.0)
FACTORS = {"scales too small": -1, "scales too large": 1}
EXPLAINED = {"scales too small": "large values\nare clipped", "scales too large": "small values\nbecome 0"}
LARGEST_OCTAVES = 24.0
SEARCH_STEPS = 9
MEASURED, LEVELS = 4, 4


def damaged(factor: float, scales: Mapping[str, float], source: Path, folder: Path) -> Path:
    """The model with all of its input scales multiplied by a factor."""
    path = folder / "damaged.safetensors"
    patch_model_with_scales(source, {layer: scale * factor for layer, scale in scales.items()}, path)
    return path


def told(factor: float) -> str:
    """A factor for people: two digits, or hundreds."""
    return f"{float(f'{factor:.2g}'):,.2g}" if factor < 10 else f"{round(factor, -2):,.0f}"


def damage_sheet(folder: Path) -> None:
    """Search the factors that leave about so many dB, paint with them, and draw."""
    files, calibration = demo.make_files("plain", folder)
    scales = {r.layer: r.scale_after for r in calibration.results if r.range and not r.full_precision_after}
    conditioning = demo.prompt_conditioning(prompts.NAMES)
    measured = {name: values[:MEASURED] for name, values in conditioning.items()}
    options = demo.DemoOptions()
    with open_checkpoint(WEIGHTS) as original:
        reference = load(original, dtype=torch.float32)

        def with_model(factor: float, use: Callable[[Denoiser], object]) -> object:
            with open_checkpoint(damaged(factor, scales, files[demo.CALIBRATED], folder)) as checkpoint:
                return use(load(checkpoint, dtype=torch.float32, arithmetic="comfyui"))

        def fidelity_db(model: Denoiser) -> float:
            found = velocity_fidelity(
                reference, model, measured, demo.GEOMETRY, guidance=options.guidance, steps=LEVELS, seed=options.seed
            )
            return found.sqnr_db

        def search(direction: int, target_db: float) -> float:
            low, high = 0.0, LARGEST_OCTAVES
            for _ in range(SEARCH_STEPS):
                middle = (low + high) / 2
                if with_model(2.0 ** (direction * middle), fidelity_db) > target_db:  # type: ignore[operator]
                    low = middle
                else:
                    high = middle
            return 2.0 ** (direction * low)

        rows = []
        for name, direction in FACTORS.items():
            cells = []
            for target_db in TARGETS_DB:
                factor = 1.0 if target_db == TARGETS_DB[0] else search(direction, target_db)
                left_db = with_model(factor, fidelity_db)
                _, images = with_model(factor, lambda model: demo.compare(reference, model, conditioning, options))
                print(f"{name}: factor {factor:.3g} leaves {left_db:.1f} dB", file=sys.stderr)
                cells.append(sheet.Cell(list(images), f"{left_db:.1f} dB, scales x {told(factor)}"))  # type: ignore[call-overload]
            rows.append((sheet.Heading(name, EXPLAINED[name]), cells))
    columns = [sheet.Heading(f"{target_db:.0f} dB", "") for target_db in TARGETS_DB]
    title = sheet.Heading(
        "What is left of the picture at so many dB",
        "One model in FP8, all of its input scales multiplied by one factor. dB: SQNR of the predicted velocity.",
    )
    sheet.draw(title, columns, rows).save(IMAGES / "concepts_damage.png", optimize=True)


def main() -> None:
    """Write both."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        strips = []
        for variant, words in (("hot", "large inputs"), ("cold", "small inputs")):
            _, calibration = demo.make_files(variant, folder)
            assert calibration.statistics is not None
            scale = next(result.scale_after for result in calibration.results if result.layer == LAYER)
            strips.append(strip(f"{words}, scale 1.0", calibration.statistics, 1.0))
            strips.append(strip(f"{words}, scale {scale:.2g}", calibration.statistics, scale))
        (IMAGES / "concepts_fp8.svg").write_text(number_line(strips), encoding="utf-8")
        damage_sheet(folder)


if __name__ == "__main__":
    main()
