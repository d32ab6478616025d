"""The whole workflow on a real model in a minute: convert, calibrate, mix formats, run, compare.

It shows that a quantized model still generates good images, and what calibration and a choice of formats gain. Three
files of the embedded emoji model (`emoji`) compute the same function: one as trained, one with the activation ranges of
large models ("hot"), one with far smaller ones ("cold"). Each is converted as on the command line, without data, and
runs

    in BF16                 the file before conversion, inputs rounded to bfloat16
    in FP8 with scale 1.0   as most FP8 files, and as ComfyUI reads missing scales: converted, not calibrated
    in FP8, calibrated      converted with --actcal
    in the best mix         converted with --best, as large as the FP8 file
    in a smaller mix        converted with --best --round, two thirds as large

Layers compute as in ComfyUI (`engines.quantized_linear`). Results are the SQNR of the predicted velocity in dB
(`fidelity`); the reference in every row is the embedded model in float32, so the BF16 row shows how exact a re-ranging
is, and which difference is invisible. Images are what each model generates by its own steps from the same noise. Four
prompts are few: `check` on the prompts written beside the models gives the number in docs/accuracy.md.

Limits. Everything else (norms, attention, sums) is float32, so that models differ in linear layers only, and because
"cold" needs it (`emoji.rerange`); a GPU would compute it in bfloat16. Formats are tried on fewer and smaller images
than in `--best` by default (`TRIED`), which takes a twentieth of the time.
"""

from __future__ import annotations

import io
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from . import __version__
from .best import plan_best
from .calibrate_activation_scales import Calibration, calibrate_model, patch_model_with_scales
from .card import emoji_prompts, make_folder
from .checkpoint import open_checkpoint, write_bytes
from .convert import convert, plan_conversion
from .emoji import SIDE_TOKENS, WEIGHTS, prompts, sheet, to_pictures
from .emoji.rerange import RERANGINGS, write_reranged
from .engines.diffusers import Denoiser, load
from .engines.moments import Gathering, Rounding
from .families.running import Geometry
from .fidelity import Fidelity, Scene, check_latents, scenes_fidelity
from .options import SAMPLES, STEPS, BestOptions, CalibrationOptions, ConvertOptions, RunOptions
from .telling import KEPT_DB, LOST_DB, Progress, advance, size

if TYPE_CHECKING:
    from PIL import Image

GEOMETRY = Geometry(height=SIDE_TOKENS, width=SIDE_TOKENS, frames=1, text_tokens=prompts.TOKENS)
PICTURE = "demo.png"
PROMPTS = "prompts.safetensors"

BF16, SCALE_ONE, CALIBRATED, BEST, SMALLER = "bf16", "fp8_scale_1", "fp8_calibrated", "best", "best_smaller"
WAYS: Mapping[str, sheet.Heading] = {
    BF16: sheet.Heading("original", "in BF16"),
    SCALE_ONE: sheet.Heading("FP8, scale 1.0", "as most FP8 files are"),
    CALIBRATED: sheet.Heading("FP8, calibrated", "--actcal, without data"),
    BEST: sheet.Heading("best mix", "--best, as large as FP8"),
    SMALLER: sheet.Heading("best mix", "--best --round,\ntwo thirds of FP8"),
}
"""How each model runs, in the order of the table and the image."""

SHARES: Mapping[str, float] = {BEST: 1, SMALLER: 2 / 3}
"""Sizes of the mixes, relative to the FP8 file."""

ROUNDED = SMALLER
"""The mix that is converted with --round."""

GPU = "rtx40"
"""The GPU that mixes are chosen for."""

TRIED = RunOptions(samples=3, steps=2, height=128, width=128, text_tokens=prompts.TOKENS)
"""How formats are tried: one image for each kind of conditioning, as large as those generated."""

TITLE = sheet.Heading(
    "Calibrated FP8 preserves image quality; the best mix of formats is closer still, or smaller",
    "One trained model in three files that compute the same function: only the ranges of layer inputs differ.\n"
    "dB: how close a file stays to the original on these prompts (SQNR of the velocity; 30 is close, 10 is ruin).",
)


@dataclass(frozen=True)
class DemoOptions:
    """What the demo runs.

    Attributes:
        variants: re-rangings of the model, names in `emoji.rerange.RERANGINGS`.
        names: emoji to generate and to measure fidelity on.
        steps: Euler steps per image, which are the noise levels of fidelity.
        guidance: strength of classifier-free guidance.
        samples: images for calibration and rounding, whose other options are the defaults.
        tried: options of the trials of formats.
        seed: of the latents; calibration has its own.
    """

    variants: tuple[str, ...] = ("plain", "hot", "cold")
    names: tuple[str, ...] = prompts.NAMES[:4]
    steps: int = 8
    guidance: float = 2.0
    samples: int = SAMPLES
    tried: RunOptions = TRIED
    seed: int = 0


@dataclass(frozen=True)
class Row:
    """Results of one variant of the model by way: files, layers by format, fidelity, and images.

    Images are uint8 [names, height, width, 3].
    """

    variant: str
    files: Mapping[str, Path]
    calibration: Calibration
    mixes: Mapping[str, Mapping[str, int]]
    fidelity: Mapping[str, Fidelity]
    images: Mapping[str, NDArray[np.uint8]]

    def to_json(self) -> dict[str, Any]:
        """Everything but the images, as JSON values."""
        return {
            "variant": self.variant,
            "summary": RERANGINGS[self.variant].summary,
            "files": {way: str(path) for way, path in self.files.items()},
            "mixes": self.mixes,
            "fidelity": {way: fidelity.to_json() for way, fidelity in self.fidelity.items()},
            "calibration": self.calibration.to_json(),
        }


@dataclass(frozen=True)
class Demo:
    """Results of the demo, a row for each variant of the model."""

    options: DemoOptions
    rows: tuple[Row, ...]
    picture: Path
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """Everything but the images, as JSON values."""
        return {
            "version": __version__,
            "options": asdict(self.options),
            "rows": [row.to_json() for row in self.rows],
            "picture": str(self.picture),
            "seconds": round(self.seconds, 1),
        }


def run(folder: Path, options: DemoOptions | None = None, *, progress: Progress | None = None) -> Demo:
    """Run the demo into a folder, which is created if missing.

    The folder then contains all models, the image, and embeddings of the prompts that calibration never uses, for
    `check --conditioning`.

    Raises:
        OutputError: a file cannot be written.
    """
    options = options or DemoOptions()
    start = time.perf_counter()
    make_folder(folder)
    work = _work(options, progress or (lambda _done, _total: None))
    rows = tuple(_row(variant, folder, options, work) for variant in options.variants)
    picture = folder / PICTURE
    encoded = io.BytesIO()
    draw(rows).save(encoded, "PNG", optimize=True)
    write_bytes(picture, encoded.getvalue())
    emoji_prompts().save(folder / PROMPTS)
    return Demo(options, rows, picture, time.perf_counter() - start)


def sizes(rows: tuple[Row, ...]) -> dict[str, str]:
    """Size of the file of each way; those of the variants look the same."""
    return {way: size(path.stat().st_size) for way, path in rows[0].files.items()}


def draw(rows: tuple[Row, ...]) -> Image.Image:
    """The images side by side: a line for each way to run the model, a column for each variant."""

    def cell(row: Row, way: str) -> sheet.Cell:
        sqnr_db = row.fidelity[way].sqnr_db
        color = sheet.GOOD if sqnr_db > KEPT_DB else sheet.BAD if sqnr_db < LOST_DB else sheet.INK
        return sheet.Cell(list(row.images[way]), f"{sqnr_db:.1f} dB", color)

    columns = [sheet.Heading(row.variant, RERANGINGS[row.variant].summary) for row in rows]
    taken = sizes(rows)
    said = [sheet.Heading(f"{heading.name}: {taken[way]}", heading.explanation) for way, heading in WAYS.items()]
    cells = [[cell(row, way) for row in rows] for way in WAYS]
    return sheet.draw(TITLE, columns, list(zip(said, cells, strict=True)), lines=1)


def _work(options: DemoOptions, progress: Progress) -> Iterator[Progress]:
    """Progress of each part of the work in turn, in evaluations of one sample of the demo's size."""
    calibration = 5 * options.samples * STEPS  # its images are about five times as large
    trials = rounding = 400  # measured on two cores
    comparison = 3 * (2 if options.guidance != 1 else 1) * len(options.names) * options.steps
    parts = [calibration, trials, rounding, *[comparison] * len(WAYS)] * len(options.variants)
    total = sum(parts)

    def part(start: int, length: int) -> Progress:
        return lambda done, of: progress(round(start + length * done / of), total)

    return map(part, accumulate(parts, initial=0), parts)


def _row(variant: str, folder: Path, options: DemoOptions, work: Iterator[Progress]) -> Row:
    """Make one variant's files, run them, and compare."""
    files, calibration = make_files(variant, folder, options.samples, next(work))
    files |= {way: file_of(variant, way, folder) for way in SHARES}
    mixes = _make_mixes(files, options, work)
    conditioning = prompt_conditioning(options.names)
    fidelity, images = {}, {}
    with models(files) as (reference, runs):
        for way, model in runs.items():
            fidelity[way], images[way] = compare(reference, model, conditioning, options, next(work))
    return Row(variant, files, calibration, mixes, fidelity, images)


def file_of(variant: str, way: str, folder: Path) -> Path:
    """The path of a variant's file of a way."""
    return folder / f"{variant}_{way}.safetensors"


def make_files(
    variant: str, folder: Path, samples: int = SAMPLES, progress: Progress | None = None
) -> tuple[dict[str, Path], Calibration]:
    """Re-range the model, convert it to FP8, and calibrate it, the latter two as on the command line.

    Returns:
        The original and FP8 files by way, and the calibration.

    Raises:
        OutputError: a file cannot be written.
    """
    files = {way: file_of(variant, way, folder) for way in (BF16, SCALE_ONE, CALIBRATED)}
    write_reranged(WEIGHTS, files[BF16], RERANGINGS[variant])
    with open_checkpoint(files[BF16]) as checkpoint:
        convert(checkpoint, plan_conversion(checkpoint, ConvertOptions()), files[SCALE_ONE])
    calibration = calibrate_model(files[SCALE_ONE], CalibrationOptions(samples=samples), progress=progress)
    patch_model_with_scales(files[SCALE_ONE], calibration, files[CALIBRATED])
    return files, calibration


def _make_mixes(files: Mapping[str, Path], options: DemoOptions, work: Iterator[Progress]) -> dict[str, dict[str, int]]:
    """Convert to the best mixes of formats, chosen from one set of trials; see `Row.mixes`."""
    fp8_bytes = files[CALIBRATED].stat().st_size
    measured, mixes = None, {}
    with open_checkpoint(files[BF16]) as checkpoint:
        for way, share in SHARES.items():
            asked = BestOptions(file_size=f"{int(share * fp8_bytes)}B", gpu=GPU)
            progress = None if measured else next(work)
            best = plan_best(checkpoint, ConvertOptions(), asked, options.tried, measured, progress=progress)
            measured, mixes[way] = (best.statistics, best.trials), best.counts()
            rounding, told = None, None
            if way == ROUNDED:
                layers = [layer for layer, _ in best.plan.quantized]
                gathering = Gathering(
                    checkpoint, best.plan.table, layers, replace(options.tried, samples=options.samples, steps=None)
                )
                rounding = Rounding(checkpoint, gathering.moments_of)
                total = sum(info.nbytes for info in checkpoint.tensors.values())
                told = advance(next(work), total)
            convert(checkpoint, best.plan, files[way], rounding=rounding, progress=told)
    return mixes


class _Reference(Denoiser):
    """A model that caches its velocities, since all ways are compared at the same states."""

    def __init__(self, model: Denoiser) -> None:
        vars(self).update(vars(model), said={})

    def velocity(self, latents: Tensor, sigma: float, conditioning: Mapping[str, Tensor], geometry: Geometry) -> Tensor:
        """The model's velocity."""
        said: dict[tuple[Any, ...], Tensor] = vars(self)["said"]
        shown = sigma, geometry, *(each.numpy().tobytes() for each in (latents, *conditioning.values()))
        if shown not in said:
            said[shown] = super().velocity(latents, sigma, conditioning, geometry)
        return said[shown]


@contextmanager
def models(files: Mapping[str, Path]) -> Iterator[tuple[Denoiser, dict[str, Denoiser]]]:
    """Open one variant's files: the reference, and the model of each way."""
    with ExitStack() as stack:

        def opened(path: Path) -> Denoiser:
            return load(stack.enter_context(open_checkpoint(path)), dtype=torch.float32, arithmetic="comfyui")

        runs = {way: opened(path) for way, path in files.items()}
        for linear in runs[BF16].linears.values():
            linear.register_forward_pre_hook(lambda _, inputs: (inputs[0].bfloat16().float(),))
        yield _Reference(opened(WEIGHTS)), runs


def prompt_conditioning(names: tuple[str, ...]) -> dict[str, Tensor]:
    """Emoji names as conditioning of the model, each [names, ...]."""
    context, pooled = prompts.embed_all(names)
    return {"encoder_hidden_states": torch.from_numpy(context), "pooled_projections": torch.from_numpy(pooled)}


def compare(
    reference: Denoiser,
    model: Denoiser,
    conditioning: Mapping[str, Tensor],
    options: DemoOptions,
    progress: Progress | None = None,
) -> tuple[Fidelity, NDArray[np.uint8]]:
    """Generate images with classifier-free guidance against the empty prompt, and compare with the reference.

    Returns:
        The comparison, and the model's images: RGB, uint8 [images, height, width, 3].
    """
    latents = check_latents(reference, GEOMETRY, len(next(iter(conditioning.values()))), options.seed)
    reached: list[Tensor] = []
    fidelity = scenes_fidelity(
        reference, model, [Scene(latents, conditioning, GEOMETRY)], guidance=options.guidance, steps=options.steps,
        progress=progress, finished=lambda _, own: reached.append(own),
    )  # fmt: skip
    return fidelity, to_pictures(torch.cat(reached).numpy())
