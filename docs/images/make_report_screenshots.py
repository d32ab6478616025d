"""The screenshots of `convert_to_quant report` in docs/: the embedded model as it is, hot, and with outlier tokens.

    python docs/images/make_report_screenshots.py [VARIANT...]

Each variant is written, converted, observed and reported by the commands that users run, and its page is opened in a
Chromium (named by CHROMIUM, or found on the path), which needs `pip install playwright`. Takes some minutes.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

from PIL import Image
from playwright.sync_api import Browser, sync_playwright

from convert_to_quant.report import figures, page
from convert_to_quant.stats import Statistics

FOLDER = Path(__file__).parent
sys.path.insert(0, str(FOLDER.parents[1] / "benchmarks"))
from emoji_models import write_variant  # noqa: E402

LARGEST_BYTES = 250_000
BEST = "--best --bits 6.5 --gpu rtx40 --actcal-samples 3 --actcal-steps 2"


@dataclass(frozen=True)
class Shot:
    """One screenshot.

    Attributes:
        file: its name.
        variant: of the emoji model.
        state: the page's hash.
        last: the element that it ends with.
        width: of the window, in CSS pixels.
        density: pixels per CSS pixel.
        dark: dark colours.
        tallest: where it ends at the latest, in CSS pixels.
        mix: of the best mix of formats at 6.5 bits per weight, in place of FP8.
    """

    file: str
    variant: str
    state: str = ""
    last: str = "#picture"
    width: int = 1200
    density: float = 1.5
    dark: bool = False
    tallest: int = 2400
    mix: bool = False


SHOTS = (
    Shot("report_plain.png", "plain"),
    Shot("report_hot.png", "hot", "#view=both"),
    Shot("report_outlier_tokens.png", "outlier-tokens", "#view=real"),
    Shot("report_dark.png", "hot", last="#levels", density=1, dark=True),
    Shot("report_phone.png", "hot", width=390, density=2, tallest=1500),
    Shot("report_mix.png", "hot", last="#alone", mix=True),
)


def make_page(shot: Shot, folder: Path) -> Path:
    """Write, convert, observe and report a variant."""
    variant, best = shot.variant, BEST.split() if shot.mix else []
    kinds = ("bf16", "mix" if best else "fp8", "stats")
    source, model, statistics = (folder / f"{variant}_{kind}.safetensors" for kind in kinds)
    seen = source if best else model
    write_variant(variant, source)
    for arguments in (["-i", source, "-o", model, *best], ["observe", seen, "-o", statistics, "--samples", "8"]):
        command = [sys.executable, "-m", "convert_to_quant", *map(str, arguments)]
        subprocess.run(command, check=True, capture_output=True)
    report = figures.build(figures.Source(Statistics.load(statistics), model))
    path = folder / f"{model.stem}.html"
    path.write_text(page.render(report.document()), encoding="utf-8")
    return path


def shoot(browser: Browser, path: Path, shot: Shot) -> Image.Image:
    """The page from its top to the end of an element, in as few colours as it needs."""
    context = browser.new_context(
        viewport={"width": shot.width, "height": 900},
        device_scale_factor=shot.density,
        color_scheme="dark" if shot.dark else "light",
        reduced_motion="reduce",
    )
    tab = context.new_page()
    tab.goto(path.as_uri() + shot.state)
    box = tab.locator(shot.last).bounding_box()
    assert box is not None
    height = box["y"] + box["height"] + 24
    clip = {"x": 0, "y": 0, "width": shot.width, "height": min(height, shot.tallest)}
    picture = tab.screenshot(full_page=True, clip=clip)  # type: ignore[arg-type]
    context.close()
    return (
        Image.open(BytesIO(picture))
        .convert("RGB")
        .quantize(256, Image.Quantize.MAXCOVERAGE, kmeans=3, dither=Image.Dither.NONE)
    )


def main(variants: list[str]) -> None:
    """Make the screenshots of some variants, or of all."""
    found = filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome")))
    chromium = os.environ.get("CHROMIUM") or next(found, None)
    with tempfile.TemporaryDirectory() as name, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        pages: dict[tuple[str, bool], Path] = {}
        for shot in SHOTS:
            if variants and shot.variant not in variants:
                continue
            if (shot.variant, shot.mix) not in pages:
                pages[shot.variant, shot.mix] = make_page(shot, Path(name))
            target = FOLDER / shot.file
            shoot(browser, pages[shot.variant, shot.mix], shot).save(target, optimize=True)
            size = target.stat().st_size
            print(f"{shot.file}: {size:,} bytes")
            assert size <= LARGEST_BYTES
        browser.close()


if __name__ == "__main__":
    main(sys.argv[1:])
