"""The package `convert-to-quant` on PyPI, which conflicts with ours.

Our distribution is `calibrated-quant`, but both install a module `convert_to_quant` and commands `convert_to_quant` and
`ctq`. The one installed later replaces files of the other, and uninstalling either removes files of both. We can warn
only while our files are in place.
"""

from __future__ import annotations

import sys
from contextlib import suppress
from pathlib import Path

OUR_COMMAND = "convert_to_quant.cli:main"
"""Identifies installations of ours from before the distribution was renamed."""

_INSTEAD = {
    "use --format int8": "--int8",
    "use --format nvfp4": "--nvfp4",
    "use --format mxfp8": "--mxfp8",
    "use --format int8-convrot": "--convrot --dynamic-convrot",
    "use --layer-format REGEX=NAME": "--fallback --custom-layers --custom-type --layer-config",
    "use --exclude-layers REGEX": "--hp-filter --preserve-layers",
    "use --scaling-mode block --block-size N": "--group-size",
    "use --best": "--heur",
    "use --round": "--optimizer --num-iter --calib-cpu",
    "use --actcal": "--input-scale --legacy-input-add",
    "use --actcal-samples N": "--calib-samples",
    "use convert_to_quant apply MODEL STATS": "--input-scales",
    "use convert_to_quant migrate MODEL -o OUT --to comfy": "--convert-fp8-scaled --convert-int8-scaled",
    "use convert_to_quant repair MODEL": "--cleanup-fp8-scaled --edit-quant",
    "use --enable-fp8-matmul": "--scaled-fp8-marker",
    "not needed here": "--fp8 --simple --lr --full-matrix --full-precision-matrix-mult --low-memory "
    "--save-quant-metadata --no-normalize-scales --t5xxl --mistral --visual",
    "detected; --preset FAMILY overrides": "--flux2 --krea2 --qwen --wan --hunyuan --zimage --ltxv2 --anima",
}
FLAGS = {flag: instead for instead, flags in _INSTEAD.items() for flag in flags.split()}
"""Flags of the other package (1.3.4) -> ours."""


def conflicting_package() -> str | None:
    """A warning about the other package if it is installed.

    Globbing for its metadata takes 0.4 ms, `importlib.metadata` 17 ms (2026-11-26).
    """
    for folder in sys.path:
        with suppress(OSError):  # nothing can be imported from a folder that cannot be read
            for info in Path(folder).glob("convert_to_quant-*.dist-info"):
                commands = info / "entry_points.txt"
                if commands.is_file() and OUR_COMMAND in commands.read_text(encoding="utf-8", errors="replace"):
                    continue
                version = info.name.removesuffix(".dist-info").partition("-")[2]
                return (
                    f"the package convert-to-quant {version} uses our module's name, and each replaces files of the "
                    "other: pip uninstall convert-to-quant, then reinstall calibrated-quant"
                )
    return None
