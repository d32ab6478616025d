"""The whole way on a real model in a minute: convert, calibrate, mix formats, run, look.

Why it exists. Whoever makes quantized checkpoints wants to see that the result still paints, and what calibration and a
choice of formats are for. The embedded emoji model (`emoji`) is trained, and three files of it compute the same
function: as it was trained, and with the activation ranges of large models ("hot") or far smaller ones ("cold"). Each
is converted exactly as the command line does it, without data, and then its linear layers run

    in BF16                 the file before conversion, inputs rounded to bfloat16
    in FP8 with scale 1.0   what most FP8 files carry, and ComfyUI takes where there is none: converted, not calibrated
    in FP8, calibrated      converted with --actcal
    in the best mix         converted with --best, the file as large as the one in FP8
    in a smaller one        converted with --best --round, the file two thirds as large

Layers compute as ComfyUI does (`engines.quantized_linear`). The figures are the SQNR of the predicted velocity, in dB,
along the way of the embedded model in float32 (`fidelity`), which is the reference in every row: so the BF16 row says
how well a re-ranging preserves the function, and what difference nobody minds. The images are what each model reaches
on its own, from the same noise in as many steps. Four prompts are few: `check` on the prompts that are written beside
the models gives the figure of docs/accuracy.md.

Limits. All else (norms, attention, sums) is float32 everywhere, so that models differ in nothing but linear layers, and
because "cold" needs it (`emoji.rerange`). A GPU would compute it in bfloat16. Formats are tried on fewer and smaller
images than `--best` takes by default (`TRIED`), which takes a twentieth of the time.
"""

from __future__ import annotations

import io
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from . import __version__
from .best import plan_best
from .calibrate_activation_scales import Calibration, calibrate_model, patch_model_with_scales
from .checkpoint import Entry, open_checkpoint, write_bytes, write_checkpoint
from .convert import convert, plan_conversion
from .emoji import SIDE_TOKENS, WEIGHTS, prompts, sheet, to_pictures
from .emoji.rerange import RERANGINGS, write_reranged
from .engines.diffusers import Denoiser, load
from .engines.moments import Gathering, Rounding
from .errors import OptionError, OutputError
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
"""How each model is run, in the order of the table and of the picture."""

SHARES: Mapping[str, float] = {BEST: 1, SMALLER: 2 / 3}
"""Sizes of mixes, of the FP8 file's."""

ROUNDED = SMALLER
"""The mix that is rounded by running the model."""

GPU = "rtx40"
"""The card that mixes are chosen for."""

TRIED = RunOptions(samples=3, steps=2, height=128, width=128, text_tokens=prompts.TOKENS)
"""What formats are tried on: one image of each way of conditioning, as large as what is painted."""

TITLE = sheet.Heading(
    "Calibrated, FP8 keeps the picture; the best mix of formats keeps more, or is smaller",
    "One trained model in three files that compute the same function: only the sizes of what its layers read differ.\n"
    "dB: how closely a file follows the original on these prompts (SQNR of the velocity; 30 is close, 10 is ruin).",
)


@dataclass(frozen=True)
class DemoOptions:
    """What the demo runs.

    Attributes:
        variants: re-rangings of the model, names in `emoji.rerange.RERANGINGS`.
        names: emoji to paint, and to measure fidelity on.
        steps: Euler steps of an image, and noise levels that fidelity is measured at.
        guidance: strength of classifier-free guidance.
        samples: images that calibration and rounding show the model; their other options are the defaults.
        tried: what formats are tried on.
        seed: of the latents. Calibration has its own.
    """

    variants: tuple[str, ...] = ("plain", "hot", "cold")
    names: tuple[str, ...] = prompts.NAMES[:4]
    steps: int = 8
    guidance: float = 2.0
    samples: int = SAMPLES
    tried: RunOptions = TRIED
    seed: int = 0

    def __post_init__(self) -> None:
        unknown = [name for name in self.variants if name not in RERANGINGS]
        if unknown:
            raise OptionError(f"unknown re-ranging {unknown[0]!r}", hint=f"one of {', '.join(RERANGINGS)}")


@dataclass(frozen=True)
class Row:
    """One variant of the model, and how it fares by way: files, layers by format, fidelity, and images.

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
    """What the demo found, a row for each variant of the model."""

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
    """Run the demo into a folder, which is made where it is missing.

    The folder then holds every model in every way, the picture, and embeddings of the prompts that no calibration sees,
    for `check --conditioning`. Progress is told in evaluations of one sample of the demo's size.

    Raises:
        OutputError: a file cannot be written.
        OptionError: an option is out of range.
    """
    options = options or DemoOptions()
    start = time.perf_counter()
    make_folder(folder)
    work = _Work(options, progress)
    rows = tuple(_row(variant, folder, options, work) for variant in options.variants)
    picture = folder / PICTURE
    encoded = io.BytesIO()
    draw(rows).save(encoded, "PNG", optimize=True)
    write_bytes(picture, encoded.getvalue())
    held_out = zip(("prompt_embeds", "pooled_prompt_embeds"), prompts.embed_all(prompts.HELD_OUT), strict=True)
    write_checkpoint(folder / PROMPTS, {name: Entry.of(values) for name, values in held_out}, {})
    return Demo(options, rows, picture, time.perf_counter() - start)


def make_folder(folder: Path) -> None:
    """Make a folder for outputs, where it is missing.

    Raises:
        OutputError: it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"the folder cannot be made: {error.strerror}", path=folder) from None


def sizes(rows: tuple[Row, ...]) -> dict[str, str]:
    """By way: what its file takes. Those of the variants differ by less than what shows."""
    return {way: size(path.stat().st_size) for way, path in rows[0].files.items()}


def draw(rows: tuple[Row, ...]) -> Image.Image:
    """The images side by side, one line per way to run the model and one column per variant."""

    def cell(row: Row, way: str) -> sheet.Cell:
        sqnr_db = row.fidelity[way].sqnr_db
        color = sheet.GOOD if sqnr_db > KEPT_DB else sheet.BAD if sqnr_db < LOST_DB else sheet.INK
        return sheet.Cell(list(row.images[way]), f"{sqnr_db:.1f} dB", color)

    columns = [sheet.Heading(row.variant, RERANGINGS[row.variant].summary) for row in rows]
    taken = sizes(rows)
    said = [sheet.Heading(f"{heading.name}: {taken[way]}", heading.explanation) for way, heading in WAYS.items()]
    cells = [[cell(row, way) for row in rows] for way in WAYS]
    return sheet.draw(TITLE, columns, list(zip(said, cells, strict=True)), lines=1)


class _Work:
    """Progress over everything, in evaluations of one sample of the demo's size."""

    def __init__(self, options: DemoOptions, progress: Progress | None) -> None:
        sides = 2 if options.guidance != 1 else 1
        self.calibration = 5 * options.samples * STEPS  # on images about so much larger
        self.comparison = 3 * sides * len(options.names) * options.steps
        self.trials = self.rounding = 400  # either took about as long as so many, on two cores
        mixes = self.trials + self.rounding
        self.total = len(options.variants) * (self.calibration + mixes + len(WAYS) * self.comparison)
        self.finished = 0.0
        self.report = progress or (lambda _done, _total: None)

    def part(self, size: float) -> Progress:
        """What reports on the next part of the work, which has this size."""
        start = self.finished
        self.finished += size
        return lambda done, total: self.report(round(start + size * done / total), round(self.total))


def _row(variant: str, folder: Path, options: DemoOptions, work: _Work) -> Row:
    """Make one variant's files, run them, and compare."""
    files, calibration = make_files(variant, folder, options.samples, work.part(work.calibration))
    files |= {way: file_of(variant, way, folder) for way in SHARES}
    mixes = _make_mixes(files, options, work)
    conditioning = prompt_conditioning(options.names)
    fidelity, images = {}, {}
    with models(files) as (reference, runs):
        for way, model in runs.items():
            fidelity[way], images[way] = compare(
                reference, model, conditioning, options, progress=work.part(work.comparison)
            )
    return Row(variant, files, calibration, mixes, fidelity, images)


def file_of(variant: str, way: str, folder: Path) -> Path:
    """Where a variant's file of a way goes."""
    return folder / f"{variant}_{way}.safetensors"


def make_files(
    variant: str, folder: Path, samples: int = SAMPLES, progress: Progress | None = None
) -> tuple[dict[str, Path], Calibration]:
    """Re-range, convert to FP8 and calibrate on some images, the latter two as the command line does it.

    Returns:
        The files of the original and of FP8, by way, and what calibration found.

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


def _make_mixes(files: Mapping[str, Path], options: DemoOptions, work: _Work) -> dict[str, dict[str, int]]:
    """Convert to the best mixes of formats, all from one set of trials; see `Row.mixes`."""
    fp8_bytes = files[CALIBRATED].stat().st_size
    measured, mixes = None, {}
    with open_checkpoint(files[BF16]) as checkpoint:
        for way, share in SHARES.items():
            asked = BestOptions(file_size=f"{int(share * fp8_bytes)}B", gpu=GPU)
            progress = None if measured else work.part(work.trials)
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
                told = advance(work.part(work.rounding), total)
            convert(checkpoint, best.plan, files[way], rounding=rounding, progress=told)
    return mixes


class _Reference(Denoiser):
    """A model that does not compute anew what it has said before: every way is compared along one."""

    def __init__(self, model: Denoiser) -> None:
        vars(self).update(vars(model), said={})

    def velocity(self, latents: Tensor, sigma: float, conditioning: Mapping[str, Tensor], geometry: Geometry) -> Tensor:
        """As of the model."""
        said: dict[tuple[Any, ...], Tensor] = vars(self)["said"]
        shown = sigma, geometry, *(each.numpy().tobytes() for each in (latents, *conditioning.values()))
        if shown not in said:
            said[shown] = super().velocity(latents, sigma, conditioning, geometry)
        return said[shown]


@contextmanager
def models(files: Mapping[str, Path]) -> Iterator[tuple[Denoiser, dict[str, Denoiser]]]:
    """Open one variant's files: the reference, and the model of each way, computing as it says."""
    with ExitStack() as stack:

        def opened(path: Path) -> Denoiser:
            return load(stack.enter_context(open_checkpoint(path)), dtype=torch.float32, arithmetic="comfyui")

        runs = {way: opened(path) for way, path in files.items()}
        for linear in runs[BF16].linears.values():
            linear.register_forward_pre_hook(lambda _, inputs: (inputs[0].bfloat16().float(),))
        yield _Reference(opened(WEIGHTS)), runs


def prompt_conditioning(names: tuple[str, ...]) -> dict[str, Tensor]:
    """Names of emoji as the model engine takes them, each [names, ...]."""
    context, pooled = prompts.embed_all(names)
    return {"encoder_hidden_states": torch.from_numpy(context), "pooled_projections": torch.from_numpy(pooled)}


def compare(
    reference: Denoiser,
    model: Denoiser,
    conditioning: Mapping[str, Tensor],
    options: DemoOptions,
    progress: Progress | None = None,
) -> tuple[Fidelity, NDArray[np.uint8]]:
    """Paint with classifier-free guidance against the empty prompt, and compare with the reference on the way.

    Returns:
        The comparison, and what the model painted: RGB, uint8 [images, height, width, 3].
    """
    latents = check_latents(reference, GEOMETRY, len(next(iter(conditioning.values()))), options.seed)
    reached: list[Tensor] = []
    fidelity = scenes_fidelity(
        reference, model, [Scene(latents, conditioning, GEOMETRY)], guidance=options.guidance, steps=options.steps,
        progress=progress, finished=lambda _, own: reached.append(own),
    )  # fmt: skip
    return fidelity, to_pictures(torch.cat(reached).numpy())
