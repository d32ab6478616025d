"""Another program under our module's name: `convert-to-quant` on PyPI.

Why it exists. Ours is the distribution `calibrated-quant`. That one installs a package `convert_to_quant` and commands
`convert_to_quant` and `ctq` too. Where both are installed, the later one has replaced files of the other, and
uninstalling either removes files of both.

Limits. Only we tell: once the other one was installed over ours, its program answers to the commands.
"""

from __future__ import annotations

import sys
from contextlib import suppress
from pathlib import Path

OUR_COMMAND = "convert_to_quant.cli:main"
"""What tells an installation of ours, from before the distribution was renamed, from the other program."""

_BY_ITSELF = "not needed here: the model's family is detected, and --preset FAMILY names another"
_ENCODER = "not needed here: text encoders and parts of vision are told by their layers"
_EXACT = "not needed here: rounding is exact, or measured with --round, without steps of learning"
_FORMATS = "use --format NAME for all layers, --layer-format REGEX=NAME for some"
_MIGRATE = "use convert_to_quant migrate MODEL -o OUT --to comfy"
_REPAIR = "use convert_to_quant repair MODEL"
_LORA = "not here: the error of rounding is not written as a LoRA; --round lessens it"
_FULL = "not needed here: calibration finds the layers that need it"
_VERBOSE = "-v takes no value"

_ANSWERS = {
    "--fp8": "not needed here: FP8 is the default",
    "--int8": "use --format int8",
    "--nvfp4": "use --format nvfp4",
    "--mxfp8": "use --format mxfp8",
    "--convrot --dynamic-convrot --convrot-group-size": "use --format int8-convrot, in the largest groups that fit",
    "--make-hybrid-mxfp8 --tensor-scales": "not here: --format mxfp8 writes what ComfyUI itself reads",
    "--fallback --fallback-block-size --fallback-simple": _FORMATS,
    "--custom-layers --custom-type --custom-block-size --custom-scaling-mode --custom-simple --custom-heur": _FORMATS,
    "--custom-convrot --custom-convrot-group-size --layer-config --fullmatch": _FORMATS,
    "--full-precision-matrix-mult -fpmm --full-precision-mm --custom-full-precision-mm --custom-fpmm": _FULL,
    "--output-dtype --preserve-layers": "not needed here: what is not quantized keeps its dtype",
    "--hp-filter": "use --exclude-layers REGEX",
    "--group-size": "use --scaling-mode block --block-size N",
    "--heur": "not needed here: --best measures which format suits a layer",
    "--simple --full-matrix --calib-cpu --optimizer --num-iter --lr --use-speed --lr-schedule --lr-gamma": _EXACT,
    "--lr-patience --lr-factor --lr-min --lr-cooldown --lr-threshold --lr-adaptive-mode --lr-threshold-mode": _EXACT,
    "--lr-shape-influence --early-stop-loss -esloss --early-stop-lr -eslr --early-stop-stall -esstall": _EXACT,
    "--scale-refinement --scale-optimization --top-p --min-k --max-k --manual-seed": _EXACT,
    "--extract-lora --lora-rank --lora-target --lora-depth --lora-ar-threshold --lora-output": _LORA,
    "--calib-samples": "use --actcal --actcal-samples N",
    "--input-scale": "not needed here: --actcal measures and writes them",
    "--input-scales": "use convert_to_quant apply MODEL STATS, of what convert_to_quant observe saw",
    "--convert-fp8-scaled --convert-int8-scaled": _MIGRATE,
    "--legacy-input-add": "use --actcal, which writes measured ones",
    "--cleanup-fp8-scaled --edit-quant --remove-keys --add-keys --quant-filter": _REPAIR,
    "--scaled-fp8-marker": "use --enable-fp8-matmul for a marker that lets FP8 products be used",
    "--no-normalize-scales --save-quant-metadata": "not needed here: files are written as ComfyUI reads them",
    "--low-memory -lm --verbose-pinned": "not needed here: files are streamed",
    "--help-advanced --help-experimental --help-filters --help-learned --help-lora --help-modes": "use --help",
    "--distillation-large --distillation-small --nerf-large --nerf-small --radiance --wan --hunyuan": _BY_ITSELF,
    "--qwen --zimage --zimage-refiner --flux2 --krea2 --ideogram4 --minimaxh3 --boogu --ltxv2": _BY_ITSELF,
    "--anima --lens": _BY_ITSELF,
    "--gemma4 --qwen-vlm --qwen35 --t5xxl --mistral --visual --generic-text": _ENCODER,
    "DEBUG VERBOSE NORMAL MINIMAL": _VERBOSE,
    "analyze": "--dry-run takes no value",
    "create-template": "use --save-config FILE",
}
FLAGS = {word: answer for words, answer in _ANSWERS.items() for word in words.split()}
"""The other program's flags (1.3.4) that are not ours, and values that ours do not take -> what to do instead."""


def neighbour() -> str | None:
    """A line about the other program, where it is installed.

    Its folder of metadata is looked for by name: 0.4 ms, where `importlib.metadata` takes 17 (2026-11-26).
    """
    for folder in sys.path:
        with suppress(OSError):  # a folder that may not be read holds nothing that could be imported
            for info in Path(folder).glob("convert_to_quant-*.dist-info"):
                commands = info / "entry_points.txt"
                if commands.is_file() and OUR_COMMAND in commands.read_text(encoding="utf-8", errors="replace"):
                    continue
                version = info.name.removesuffix(".dist-info").partition("-")[2]
                return (
                    f"another program, convert-to-quant {version}, is installed under our module's name, and each "
                    "replaces files of the other: pip uninstall convert-to-quant, then install calibrated-quant again"
                )
    return None
