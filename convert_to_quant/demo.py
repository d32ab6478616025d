"""The whole way on a real model in a minute: convert, calibrate, run, look.

Why it exists. Whoever makes FP8 checkpoints wants to see that the result still paints, and what calibration is for. The
embedded emoji model (`emoji`) is trained, and three files of it compute the same function: as it was trained, and with
the activation ranges of large models ("hot") or far smaller ones ("cold"). Each is converted and calibrated exactly as
the command line does it, without data, and then its linear layers run

    in BF16                 the file before conversion, inputs rounded to bfloat16
    in FP8 with scale 1.0   what most FP8 files carry: converted, never calibrated
    in FP8, calibrated      converted with --actcal

FP8 layers compute as ComfyUI does (`engines.quantized_linear`). The figures are the SQNR of the predicted velocity, in
dB, along the way of the embedded model in float32 (`fidelity`), which is the reference in every row: so the BF16 column
says how well a re-ranging preserves the function, and what difference nobody minds. The images are what each model
reaches on its own. Four prompts are few: `check` on the prompts that are written beside the models gives the figure of
docs/accuracy.md.

Limits. All else (norms, attention, sums) is float32 in every column, so that they differ in nothing but the linear
layers, and because "cold" needs it (`emoji.rerange`). A GPU would compute it in bfloat16.
"""

from __future__ import annotations

import io
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from . import __version__
from .calibrate_activation_scales import Calibration, calibrate_model, patch_model_with_scales
from .checkpoint import Entry, open_checkpoint, write_bytes, write_checkpoint
from .convert import convert, plan_conversion
from .emoji import SIDE_TOKENS, WEIGHTS, prompts, sheet, to_pictures
from .emoji.rerange import RERANGINGS, write_reranged
from .engines import noise
from .engines.diffusers import Denoiser, load
from .errors import OptionError, OutputError
from .families.running import Geometry
from .fidelity import Fidelity, velocity_fidelity
from .options import SAMPLES, STEPS, CalibrationOptions, ConvertOptions
from .telling import Progress

if TYPE_CHECKING:
    from PIL import Image

MEASURED = 4
"""Prompts that the figures are measured on, the first of those that are painted."""

GEOMETRY = Geometry(height=SIDE_TOKENS, width=SIDE_TOKENS, frames=1, text_tokens=prompts.TOKENS)
PICTURE = "demo.png"
PROMPTS = "prompts.safetensors"

BF16, SCALE_ONE, CALIBRATED = "bf16", "fp8_scale_1", "fp8_calibrated"
COLUMNS: Mapping[str, sheet.Heading] = {
    BF16: sheet.Heading("BF16", "the model before conversion"),
    SCALE_ONE: sheet.Heading("FP8, input_scale 1.0", "what most FP8 files carry"),
    CALIBRATED: sheet.Heading("FP8, calibrated", "convert_to_quant --actcal, no data"),
}
"""How each model is run, in the order of the table and of the picture."""

TITLE = sheet.Heading(
    "FP8 has to know the range of what it reads",
    "One trained model, three files that compute the same function: only the sizes of their activations differ.\n"
    f"Figures: how closely a model follows the original's way on {MEASURED} prompts (velocity SQNR; 30 dB is close, "
    "10 dB is ruin).",
)
ROWS: Mapping[str, str] = {
    "plain": "as it was trained",
    "hot": "the same function,\nlayers read inputs\n40 to 900 times\nlarger",
    "cold": "the same function,\nlayers read inputs\n1000 times\nsmaller",
}
"""What the picture says about a re-ranging."""

LOST_DB, KEPT_DB = 20.0, 25.0
"""Captions are red below the first and green above the second."""


@dataclass(frozen=True)
class DemoOptions:
    """What the demo runs.

    Attributes:
        variants: re-rangings of the model, names in `emoji.rerange.RERANGINGS`.
        names: emoji to paint.
        measured: how many of them fidelity is measured on.
        levels: noise levels that it is measured at.
        steps: Euler steps of a picture.
        guidance: strength of classifier-free guidance.
        samples: images that calibration shows the model; its other options are the defaults.
        seed: of the latents. Calibration has its own.
    """

    variants: tuple[str, ...] = ("plain", "hot", "cold")
    names: tuple[str, ...] = prompts.NAMES
    measured: int = MEASURED
    levels: int = 8
    steps: int = 12
    guidance: float = 2.0
    samples: int = SAMPLES
    seed: int = 0

    def __post_init__(self) -> None:
        unknown = [name for name in self.variants if name not in RERANGINGS]
        if unknown:
            raise OptionError(f"unknown re-ranging {unknown[0]!r}", hint=f"one of {', '.join(RERANGINGS)}")


@dataclass(frozen=True)
class Row:
    """One variant of the model, and how it fares.

    Attributes:
        variant: its name.
        files: where its files are, by column.
        calibration: what calibration found.
        fidelity: by column.
        images: by column, uint8 [names, height, width, 3].
    """

    variant: str
    files: Mapping[str, Path]
    calibration: Calibration
    fidelity: Mapping[str, Fidelity]
    images: Mapping[str, NDArray[np.uint8]]

    def to_json(self) -> dict[str, Any]:
        """Everything but the images, as JSON values."""
        return {
            "variant": self.variant,
            "summary": RERANGINGS[self.variant].summary,
            "files": {column: str(path) for column, path in self.files.items()},
            "fidelity": {column: fidelity.to_json() for column, fidelity in self.fidelity.items()},
            "calibration": self.calibration.to_json(),
        }


@dataclass(frozen=True)
class Demo:
    """What the demo found.

    Attributes:
        options: what was run.
        rows: one per variant of the model.
        picture: where the picture is.
        seconds: how long it took.
    """

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
    """Run the demo.

    Args:
        folder: where its files go; made where it is missing.
        options: what to run.
        progress: told how far it is, in evaluations of one sample of the demo's size.

    Returns:
        What it found. The folder then holds each model in BF16 and FP8, with a scale of 1.0 and calibrated, the
        picture, and embeddings of the prompts that no calibration sees, for `check --conditioning`.

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


def draw(rows: tuple[Row, ...]) -> Image.Image:
    """The images side by side, one line per variant of the model and one column per way to run it."""

    def cell(row: Row, column: str) -> sheet.Cell:
        sqnr_db = row.fidelity[column].sqnr_db
        color = sheet.GOOD if sqnr_db > KEPT_DB else sheet.BAD if sqnr_db < LOST_DB else sheet.INK
        return sheet.Cell(list(row.images[column]), f"{sqnr_db:.1f} dB", color)

    said = [sheet.Heading(row.variant, ROWS.get(row.variant, RERANGINGS[row.variant].summary)) for row in rows]
    cells = [[cell(row, column) for column in COLUMNS] for row in rows]
    return sheet.draw(TITLE, list(COLUMNS.values()), list(zip(said, cells, strict=True)))


class _Work:
    """Progress over everything, in evaluations of one sample of the demo's size."""

    def __init__(self, options: DemoOptions, progress: Progress | None) -> None:
        sides = 2 if options.guidance != 1 else 1
        observed_tokens = 5 * GEOMETRY.tokens  # calibration shows the model images about this much larger
        self.calibration = options.samples * STEPS * observed_tokens / GEOMETRY.tokens
        self.comparison = 3 * sides * options.measured * options.levels
        self.painting = sides * len(options.names) * options.steps
        self.total = len(options.variants) * (self.calibration + len(COLUMNS) * (self.comparison + self.painting))
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
    conditioning = prompt_conditioning(options.names)
    measured = {name: values[: options.measured] for name, values in conditioning.items()}
    fidelity, images = {}, {}
    with models(files) as (reference, runs):
        for column, model in runs.items():
            fidelity[column] = velocity_fidelity(
                reference, model, measured, GEOMETRY, guidance=options.guidance, steps=options.levels,
                seed=options.seed, progress=work.part(work.comparison),
            )  # fmt: skip
            images[column] = paint(model, conditioning, options, work.part(work.painting))
    return Row(variant, files, calibration, fidelity, images)


def make_files(
    variant: str, folder: Path, samples: int = SAMPLES, progress: Progress | None = None
) -> tuple[dict[str, Path], Calibration]:
    """Re-range, convert and calibrate; the latter two as the command line does it.

    Args:
        variant: name of the re-ranging.
        folder: where the files go.
        samples: images that calibration shows the model.
        progress: told how far calibration is.

    Returns:
        The file of each column, and what calibration found.

    Raises:
        OutputError: a file cannot be written.
    """
    files = {column: folder / f"{variant}_{column}.safetensors" for column in COLUMNS}
    write_reranged(WEIGHTS, files[BF16], RERANGINGS[variant])
    with open_checkpoint(files[BF16]) as checkpoint:
        convert(checkpoint, plan_conversion(checkpoint, ConvertOptions()), files[SCALE_ONE])
    calibration = calibrate_model(files[SCALE_ONE], CalibrationOptions(samples=samples), progress=progress)
    patch_model_with_scales(files[SCALE_ONE], calibration, files[CALIBRATED])
    return files, calibration


@contextmanager
def models(files: Mapping[str, Path]) -> Iterator[tuple[Denoiser, dict[str, Denoiser]]]:
    """Open one variant's files.

    Args:
        files: of each column.

    Yields:
        The reference, and the model of each column, computing as it says.
    """
    with ExitStack() as stack:
        original = stack.enter_context(open_checkpoint(WEIGHTS))
        opened = {column: stack.enter_context(open_checkpoint(path)) for column, path in files.items()}
        bf16 = load(opened[BF16], dtype=torch.float32)
        for linear in bf16.linears.values():
            linear.register_forward_pre_hook(lambda _, inputs: (inputs[0].bfloat16().float(),))
        fp8 = {
            column: load(opened[column], dtype=torch.float32, arithmetic="comfyui")
            for column in (SCALE_ONE, CALIBRATED)
        }
        yield load(original, dtype=torch.float32), {BF16: bf16, **fp8}


def prompt_conditioning(names: tuple[str, ...]) -> dict[str, Tensor]:
    """Names of emoji as the model engine takes them, each [names, ...]."""
    context, pooled = prompts.embed_all(names)
    return {"encoder_hidden_states": torch.from_numpy(context), "pooled_projections": torch.from_numpy(pooled)}


def paint(
    model: Denoiser,
    conditioning: Mapping[str, Tensor],
    options: DemoOptions,
    progress: Progress = lambda _done, _total: None,
) -> NDArray[np.uint8]:
    """Paint with classifier-free guidance against the empty prompt.

    Args:
        model: the model.
        conditioning: of the images, by name, each [images, ...].
        options: steps, guidance and seed.
        progress: called after every step.

    Returns:
        RGB, uint8 [images, height, width, 3].
    """
    both = {name: torch.cat([value, torch.zeros_like(value)]) for name, value in conditioning.items()}
    count = len(next(iter(conditioning.values())))
    shape = model.latent_shape(GEOMETRY)
    state = torch.cat([noise.latents(shape, options.seed, number) for number in range(count)])
    for step in range(options.steps):
        sigma = 1 - step / options.steps
        positive, negative = model.velocity(torch.cat([state, state]), sigma, both, GEOMETRY).chunk(2)
        state = state - (negative + options.guidance * (positive - negative)) / options.steps
        progress(step + 1, options.steps)
    return to_pictures(state.numpy())
