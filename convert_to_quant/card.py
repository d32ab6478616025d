"""A model card for a quantized model: how close it stays to its original, in measurements and images.

"FP8" on a model hub gives the size of a file, not its quality. A model card gives both, measured in one run on the two
files: velocity SQNR per noise level (`fidelity`), and of samples that both models generate from the same noise:

    latent SNR    10 log10(mean(z²) / mean((z - z')²)) of the final latents z and z', in dB
    PSNR          10 log10(255² / mean((x - x')²)) of the images x and x', in dB
    SSIM          Wang et al. 2004: Gaussian windows of 11 × 11 pixels (sigma 1.5), mean over channels
    LPIPS         AlexNet's, if the package `lpips` is installed (it downloads its weights)

Limits. Images need a decoder. The embedded emoji model has one (`emoji.to_pictures`); other models are compared by
their latents alone, and the model card says so.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from .checkpoint import Checkpoint, open_checkpoint, write_bytes
from .emoji import SIDE_TOKENS, WEIGHTS, prompts, sheet, to_pictures
from .engines.denoiser import plan
from .engines.prompts import Prompts
from .errors import OutputError
from .families.running import Geometry
from .fidelity import EXACT_DB, mean_and_error, psnr_db, sqnr_db
from .telling import Advance, Progress, advance

Images = NDArray[np.uint8]

SHOWN = 8
"""Number of images per model in the model card."""

PICTURE, PAGE, DOCUMENT = "images.png", "README.md", "card.json"

WINDOW = np.exp(-0.5 * (np.arange(-5, 6) / 1.5) ** 2)
"""Window of SSIM along one dimension, not normalized."""

CHUNK_BYTES = 1 << 22


def make_folder(folder: Path) -> None:
    """Create a folder for outputs if it is missing.

    Raises:
        OutputError: it cannot be created.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"the folder cannot be created: {error.strerror}", path=folder) from None


def can_decode(original: Checkpoint) -> bool:
    """Whether a model's latents can be decoded to images: it has the shapes of the embedded emoji model."""
    with open_checkpoint(WEIGHTS) as emoji:
        return plan(original).shapes == plan(emoji).shapes


def emoji_prompts() -> Prompts:
    """Embeddings for the emoji model of the prompts that calibration never uses."""
    tensors = zip(("prompt_embeds", "pooled_prompt_embeds"), prompts.embed_all(prompts.HELD_OUT), strict=True)
    return Prompts({name: torch.from_numpy(values) for name, values in tensors})


def makes_videos(checkpoint: Checkpoint) -> bool:
    """Whether the shape of a model's latents depends on the number of frames."""
    found = plan(checkpoint)
    one, two = (found.architecture.latents(found.config, Geometry(frames=frames)) for frames in (1, 2))
    return one != two


class Samples:
    """Final latents and images that both models reach by their own steps, collected batch by batch.

    Args:
        decoded: whether to decode the latents to images.
    """

    def __init__(self, *, decoded: bool) -> None:
        self.decoded = decoded
        self.ratios_db: list[torch.Tensor] = []
        self.pairs: list[tuple[Images, Images]] = []

    def add(self, reference: torch.Tensor, quantized: torch.Tensor) -> None:
        """Add final latents, [batch, ...] each."""
        self.ratios_db.append(sqnr_db(reference, quantized).cpu())
        if self.decoded and reference.shape[1:] == (SIDE_TOKENS**2, 64):
            one, other = (to_pictures(latents.float().cpu().numpy()) for latents in (reference, quantized))
            self.pairs.append((one, other))

    def latents(self) -> dict[str, float]:
        """The latent SNR: mean over samples, its standard error, and the worst sample."""
        ratios_db = torch.cat(self.ratios_db)
        mean, error = mean_and_error(ratios_db)
        return {"snr_db": mean, "standard_error_db": error, "worst_db": float(ratios_db.min())}

    def images(self) -> tuple[Images, Images]:
        """Images of the original and of the quantized model, RGB [images, height, width, 3]."""
        one, other = (np.concatenate(side) for side in zip(*self.pairs, strict=True))
        return one, other

    def compare(self) -> dict[str, Any] | None:
        """Mean PSNR, SSIM and LPIPS of the images; None without images."""
        if not self.pairs:
            return None
        one, other = self.images()
        ratios_db = psnr_db(torch.from_numpy(one), torch.from_numpy(other), peak=255.0)
        return {
            "count": len(one),
            "height": one.shape[1],
            "width": one.shape[2],
            "psnr_db": float(ratios_db.mean()),
            "ssim": float(ssim(one, other).mean()),
            "lpips": lpips(one, other),
        }


def ssim(one: Images, other: Images) -> NDArray[np.float64]:
    """Structural similarity of images; see the module docstring.

    Args:
        one: RGB, [images, height, width, 3], at least 11 × 11 pixels.
        other: the same shape.

    Returns:
        [images], at most 1, which means no difference.

    >>> grey = np.full((1, 16, 16, 3), 100, np.uint8)
    >>> ssim(grey, grey).item(), round(ssim(grey, grey + np.uint8(100)).item(), 3)
    (1.0, 0.8)
    """
    weights = WINDOW / WINDOW.sum()

    def blurred(values: NDArray[np.float64]) -> NDArray[np.float64]:
        for axis in (1, 2):
            values = np.lib.stride_tricks.sliding_window_view(values, len(weights), axis) @ weights
        return values

    x, y = one.astype(np.float64), other.astype(np.float64)
    mean_x, mean_y = blurred(x), blurred(y)
    variances = blurred(x * x) + blurred(y * y) - mean_x**2 - mean_y**2
    covariance = blurred(x * y) - mean_x * mean_y
    small, large = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    structure = (2 * covariance + large) / (variances + large)
    result: NDArray[np.float64] = ((2 * mean_x * mean_y + small) / (mean_x**2 + mean_y**2 + small) * structure).mean(
        (1, 2, 3)
    )
    return result


def lpips(one: Images, other: Images) -> float | None:
    """Mean perceptual distance of images [images, height, width, 3]; None without the package `lpips`."""
    if importlib.util.find_spec("lpips") is None:
        return None
    network = importlib.import_module("lpips").LPIPS(net="alex", verbose=False)
    pair = (torch.from_numpy(images).movedim(-1, 1).float() / 127.5 - 1 for images in (one, other))
    with torch.no_grad():
        return float(network(*pair).mean())


def file_facts(checkpoints: Sequence[Checkpoint], progress: Progress) -> list[list[dict[str, Any]]]:
    """Name, size and SHA-256 of each file of the checkpoints, which are read whole."""
    sizes = [file.place.stat().st_size for checkpoint in checkpoints for file in checkpoint.files]
    add = advance(progress, sum(sizes))
    return [
        [{"name": file.path.name, "bytes": file.place.stat().st_size, "sha256": _sha256(file.place, add)}
         for file in checkpoint.files]
        for checkpoint in checkpoints
    ]  # fmt: skip


def _sha256(path: Path, add: Advance) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(CHUNK_BYTES):
            digest.update(chunk)
            add(len(chunk))
    return digest.hexdigest()


def write_picture(path: Path, one: Images, other: Images, document: Mapping[str, Any]) -> None:
    """Draw the first images of both models side by side into a file.

    Raises:
        OutputError: the file cannot be written.
    """
    images = document["images"]
    title = sheet.Heading(
        document["name"], "The same prompts from the same noise, generated by the original and by this file."
    )
    columns = [sheet.Heading(which, document[which]["files"][0]["name"]) for which in ("original", "quantized")]
    cells = [
        sheet.Cell(list(one[:SHOWN]), "the reference"),
        sheet.Cell(list(other[:SHOWN]), f"PSNR {images['psnr_db']:.1f} dB, SSIM {images['ssim']:.3f}"),
    ]
    encoded = io.BytesIO()
    sheet.draw(title, columns, [(sheet.Heading("", ""), cells)]).save(encoded, "PNG", optimize=True)
    write_bytes(path, encoded.getvalue())


def markdown(document: Mapping[str, Any]) -> str:
    """The model card as Markdown with front matter.

    Args:
        document: the content of `card.json`.
    """
    return "\n".join([*_front_matter(document), *_body(document)]) + "\n"


def _front_matter(document: Mapping[str, Any]) -> Iterator[str]:
    yield "---"
    yield "# base_model: OWNER/NAME of the original on the hub"
    yield "# license: that of the original"
    yield "base_model_relation: quantized"
    yield f"pipeline_tag: text-to-{'video' if document['video'] else 'image'}"
    yield "tags:"
    yield from (f"- {tag}" for tag in ("comfyui", "quantized", *document["quantized"]["formats"]))
    yield "---"


def _body(document: Mapping[str, Any]) -> Iterator[str]:
    fidelity, latents, images = (document[name] for name in ("fidelity", "latents", "images"))
    yield from (f"# {document['name']}", "", f"{document['quantized']['title']}, quantized: {document['meaning']}.")
    if images is not None:
        yield from ("", f"![The same prompts, generated by the original and by this file]({PICTURE})")
    yield from ("", "## Files", "")
    rows = [
        (f"{which}: {file['name']}", f"{file['bytes']:,}", f"`{file['sha256']}`")
        for which in ("original", "quantized")
        for file in document[which]["files"]
    ]
    yield from _table(("file", "bytes", "SHA-256"), rows, right=(1,))
    yield from ("", "Layers of the quantized file:", "", *(f"- {line}" for line in document["quantized"]["layers"]))
    yield from ("", document["made"])
    yield from ("", "## How close it stays", "", f"Measured on {document['shown']}.", "")
    figures = [
        ("velocity SQNR, mean", _db(fidelity["sqnr_db"], fidelity["standard_error_db"])),
        ("velocity SQNR, worst", _db(fidelity["worst_db"])),
        ("latent SNR", _db(latents["snr_db"], latents["standard_error_db"])),
        ("latent PSNR", _db(fidelity["psnr_db"], fidelity["psnr_standard_error_db"])),
    ]
    if images is not None:
        figures += [("image PSNR", _db(images["psnr_db"])), ("image SSIM", f"{images['ssim']:.4f}")]
        if images["lpips"] is not None:
            figures.append(("image LPIPS", f"{images['lpips']:.4f}"))
    yield from _table(("measure", "value"), figures)
    if images is None:
        yield from ("", "Images were not compared: there is no decoder for latents of this model and size.")
    yield from ("", "Velocity SQNR by noise level, from noise (1) to image (0):", "")
    levels = [
        (f"{one['sigma']:.3f}", _db(one["sqnr_db"], one["standard_error_db"]), _db(one["worst_db"]))
        for one in fidelity["levels"]
    ]
    yield from _table(("sigma", "mean", "worst"), levels, right=(0, 1, 2))
    yield from ("", "## How it was measured", "", document["method"], "", "```console", document["command"], "```", "")
    yield f"`{DOCUMENT}` contains all measurements."


def _db(value: float, error: float | None = None) -> str:
    return "no difference" if value >= EXACT_DB else f"{value:.1f}{f' ± {error:.1f}' if error else ''} dB"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> Iterator[str]:
    yield f"| {' | '.join(head)} |"
    yield f"|{'|'.join('--:' if column in right else '---' for column in range(len(head)))}|"
    yield from (f"| {' | '.join(row)} |" for row in rows)
