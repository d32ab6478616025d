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

_ANSWERS = {
    "not needed here: FP8 is the default": "--fp8",
    "use --format int8": "--int8",
    "use --format nvfp4": "--nvfp4",
    "use --format mxfp8": "--mxfp8",
    "use --format int8-convrot, in the largest groups that fit": "--convrot --dynamic-convrot --convrot-group-size",
    "not here: --format mxfp8 writes what ComfyUI itself reads": "--make-hybrid-mxfp8 --tensor-scales",
    "use --format NAME for all layers, --layer-format REGEX=NAME for some": """
        --fallback --fallback-block-size --fallback-simple --custom-layers --custom-type --custom-block-size
        --custom-scaling-mode --custom-simple --custom-heur --custom-convrot --custom-convrot-group-size
        --layer-config --fullmatch""",
    "not needed here: calibration finds the layers that need it": """
        --full-precision-matrix-mult -fpmm --full-precision-mm --custom-full-precision-mm --custom-fpmm""",
    "not needed here: what is not quantized keeps its dtype": "--output-dtype --preserve-layers",
    "use --exclude-layers REGEX": "--hp-filter",
    "use --scaling-mode block --block-size N": "--group-size",
    "not needed here: --best measures which format suits a layer": "--heur",
    "not needed here: rounding is exact, or measured with --round, without steps of learning": """
        --simple --full-matrix --calib-cpu --optimizer --num-iter --lr --use-speed --lr-schedule --lr-gamma
        --lr-patience --lr-factor --lr-min --lr-cooldown --lr-threshold --lr-adaptive-mode --lr-threshold-mode
        --lr-shape-influence --early-stop-loss -esloss --early-stop-lr -eslr --early-stop-stall -esstall
        --scale-refinement --scale-optimization --top-p --min-k --max-k --manual-seed""",
    "not here: the error of rounding is not written as a LoRA; --round lessens it": """
        --extract-lora --lora-rank --lora-target --lora-depth --lora-ar-threshold --lora-output""",
    "use --actcal --actcal-samples N": "--calib-samples",
    "not needed here: --actcal measures and writes them": "--input-scale",
    "use convert_to_quant apply MODEL STATS, of what convert_to_quant observe saw": "--input-scales",
    "use convert_to_quant migrate MODEL -o OUT --to comfy": "--convert-fp8-scaled --convert-int8-scaled",
    "use --actcal, which writes measured ones": "--legacy-input-add",
    "use convert_to_quant repair MODEL": "--cleanup-fp8-scaled --edit-quant --remove-keys --add-keys --quant-filter",
    "use --enable-fp8-matmul for a marker that lets FP8 products be used": "--scaled-fp8-marker",
    "not needed here: files are written as ComfyUI reads them": "--no-normalize-scales --save-quant-metadata",
    "not needed here: files are streamed": "--low-memory -lm --verbose-pinned",
    "use --help": "--help-advanced --help-experimental --help-filters --help-learned --help-lora --help-modes",
    "not needed here: the model's family is detected, and --preset FAMILY names another": """
        --distillation-large --distillation-small --nerf-large --nerf-small --radiance --wan --hunyuan --qwen
        --zimage --zimage-refiner --flux2 --krea2 --ideogram4 --minimaxh3 --boogu --ltxv2 --anima --lens""",
    "not needed here: text encoders and parts of vision are told by their layers": """
        --gemma4 --qwen-vlm --qwen35 --t5xxl --mistral --visual --generic-text""",
    "-v takes no value": "DEBUG VERBOSE NORMAL MINIMAL",
    "--dry-run takes no value": "analyze",
    "use --save-config FILE": "create-template",
}
FLAGS = {word: answer for answer, words in _ANSWERS.items() for word in words.split()}
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
