"""The images of the concepts page, measured on the embedded emoji model.

    python docs/figures.py

writes docs/images/concepts_fp8.svg (which values FP8 represents, and one layer's inputs at four scales) and
docs/images/concepts_damage.png (what the model generates with input scales that are too small or too large), in about
three minutes on two cores. Every number in them is computed here.
"""

from __future__ import annotations

import math
import sys
import tempfile
from bisect import bisect_left
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.figure import Figure

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

# --- the values of FP8, and a layer's inputs

LAYER = "double_blocks.0.img_attn.proj"
VARIANTS = {"hot": "large inputs", "cold": "small inputs"}
LOWEST, HIGHEST = -16, 16
"""log2 of |x| / scale at the ends of the axis."""
ZONES = (
    (LOWEST, -10, "becomes 0", "#fbe3e4"),  # 2^-10 is half of the smallest code
    (-10, -6, "equal steps", "#fff3d6"),
    (-6, math.log2(E4M3FN.max), "8 steps per octave", "#e2f3e5"),
    (math.log2(E4M3FN.max), HIGHEST, "becomes 448", "#fbe3e4"),
)
INK, FADED, AREA = "#1f2328", "#59636e", "#3b6ea8"


def number_line(inputs: Mapping[str, tuple[Statistics, float]]) -> Figure:
    """Codes of FP8, and below them the distribution of LAYER's inputs, by statistics and scale."""
    figure = Figure((9.6, 4.7))
    axes = figure.add_axes((0.02, 0.11, 0.96, 0.76), xlim=(LOWEST, HIGHEST), ylim=(0, len(inputs) + 0.8), yticks=[])
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0, colors=FADED)
    axes.set_title("Every value of float8_e4m3fn, and one layer's inputs at four scales\n", loc="left", color=INK)
    for low, high, words, color in ZONES:
        axes.axvspan(low, high, color=color, linewidth=0)
        axes.text((low + high) / 2, len(inputs) + 0.85, words, ha="center", color=INK)
    axes.vlines(np.log2(E4M3FN.values[1:0x7F]), len(inputs) + 0.2, len(inputs) + 0.6, color=INK, linewidth=0.8)
    axes.text(-10.2, len(inputs) + 0.3, "the 126 positive codes", ha="right", color=FADED)
    log2 = np.linspace(LOWEST, HIGHEST, 129)
    for base, (name, (statistics, scale)) in enumerate(reversed(inputs.items())):
        one = statistics.take([LAYER])
        errors = expected_errors(one, np.array([scale]), [E4M3FN])
        edges = np.log2(BIN_EDGES[1:] / scale)
        density = one.histogram[0, 1:NONFINITE_BIN] / np.diff(edges)  # bins are equally wide within an octave only
        height = np.interp(log2, (edges[:-1] + edges[1:]) / 2, density / density.max())
        axes.fill_between(log2, base, base + 0.85 * height, color=AREA, alpha=0.75, linewidth=0)
        shares = {"clipped": float(errors.clipped[0]), "vanish": float(errors.vanished[0])}
        losses = [f"{share:.0%} {what}" for what, share in shares.items() if share >= 0.005]
        x, align = (LOWEST + 0.3, "left") if log2[height.argmax()] > 0 else (HIGHEST - 0.3, "right")
        axes.text(x, base + 0.5, name, ha=align, color=INK)
        axes.text(x, base + 0.2, ", ".join([*losses, f"{errors.sqnr_db[0]:.1f} dB"]), ha=align, color=FADED)
    ticks = range(LOWEST + 2, HIGHEST, 4)
    axes.set_xticks(ticks, [f"$2^{{{tick}}}$" for tick in ticks])
    axes.set_xlabel("|x| / scale", color=FADED)
    return figure


# --- images from wrong scales

TARGETS_DB = (30.0, 20.0, 10.0, 3.0)
"""The first is that of scales of largest input / 448."""
DIRECTIONS = {
    sheet.Heading("scales too small", "large values\nare clipped"): -1,
    sheet.Heading("scales too large", "small values\nbecome 0"): 1,
}
LARGEST_OCTAVES, TRIED = 24, 512
"""The largest change of scales, and how many up to it can be found."""
MEASURED, LEVELS = 4, 4


def factor_text(factor: float) -> str:
    """A factor with two digits, or in hundreds."""
    return f"{float(f'{factor:.2g}'):,.2g}" if factor < 10 else f"{round(factor, -2):,.0f}"


def damage_sheet(folder: Path) -> None:
    """Find the factors on all input scales that leave TARGETS_DB, and draw what the model then generates."""
    files, calibration = demo.make_files("plain", folder)
    scales = {r.layer: r.range / E4M3FN.max for r in calibration.results if r.range and not r.full_precision_after}
    conditioning = demo.prompt_conditioning(prompts.NAMES)
    measured = {name: values[:MEASURED] for name, values in conditioning.items()}
    options = demo.DemoOptions()

    @contextmanager
    def damaged(factor: float) -> Iterator[Denoiser]:
        path = folder / "damaged.safetensors"
        wrong = {layer: scale * factor for layer, scale in scales.items()}
        patch_model_with_scales(files[demo.CALIBRATED], wrong, path)
        with open_checkpoint(path) as checkpoint:
            yield load(checkpoint, dtype=torch.float32, arithmetic="comfyui")

    with open_checkpoint(WEIGHTS) as original:
        reference = load(original, dtype=torch.float32)

        def sqnr_db(factor: float) -> float:
            with damaged(factor) as model:
                found = velocity_fidelity(
                    reference,
                    model,
                    measured,
                    demo.GEOMETRY,
                    guidance=options.guidance,
                    steps=LEVELS,
                    seed=options.seed,
                )
                return found.sqnr_db

        rows = []
        for heading, direction in DIRECTIONS.items():
            factors = [2.0 ** (direction * LARGEST_OCTAVES * number / TRIED) for number in range(TRIED)]
            cells = []
            for target_db in TARGETS_DB:
                smaller = bisect_left(factors, -target_db, key=lambda factor: -sqnr_db(factor)) - 1 if cells else 0
                factor = factors[smaller]
                left_db = sqnr_db(factor)
                with damaged(factor) as model:
                    _, images = demo.compare(reference, model, conditioning, options)
                print(f"{heading.name}: factor {factor:.3g} leaves {left_db:.1f} dB", file=sys.stderr)
                cells.append(sheet.Cell(list(images), f"{left_db:.1f} dB, scales x {factor_text(factor)}"))
            rows.append((heading, cells))
    columns = [sheet.Heading(f"{target_db:.0f} dB", "") for target_db in TARGETS_DB]
    title = sheet.Heading(
        "Image quality by SQNR",
        "One model in FP8, all input scales (largest input / 448) multiplied by one factor. dB: SQNR of the "
        "predicted velocity.",
    )
    sheet.draw(title, columns, rows).save(IMAGES / "concepts_damage.png", optimize=True)


def main() -> None:
    """Write both images."""
    mpl.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "concepts", "font.family": "sans-serif"})
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        inputs = {}
        for variant, words in VARIANTS.items():
            _, calibration = demo.make_files(variant, folder)
            assert calibration.statistics is not None
            own = calibration.statistics.take([LAYER]).absmax[0] / E4M3FN.max
            scales = {"1.0": 1.0, f"{own:.2g}": own}
            inputs |= {f"{words}, scale {text}": (calibration.statistics, scale) for text, scale in scales.items()}
        number_line(inputs).savefig(IMAGES / "concepts_fp8.svg", metadata={"Date": None})
        damage_sheet(folder)


if __name__ == "__main__":
    main()
