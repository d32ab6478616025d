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
_EXACT = "not needed here: rounding is exact or measured, without steps of learning"
FLAGS = {
    "--fp8": "not needed here: FP8 is the default",
    "--int8": "use --format int8",
    "--nvfp4": "use --format nvfp4",
    "--mxfp8": "use --format mxfp8",
    "--convrot": "use --format int8-convrot",
    "--simple": _EXACT,
    "--num-iter": _EXACT,
    "--optimizer": _EXACT,
    "--lr": _EXACT,
    "--calib-samples": "use --actcal --actcal-samples N",
    "--heur": "not needed here: --best measures which format suits a layer",
    "--input-scale": "not needed here: they are written, and --actcal measures them",
    "--save-quant-metadata": "not needed here: it is written",
    "--low-memory": "not needed here: files are streamed",
    **dict.fromkeys(("--wan", "--qwen", "--hunyuan", "--zimage", "--flux2", "--radiance"), _BY_ITSELF),
}
"""The other program's common flags that are not ours -> what to do instead, for those who come from there."""


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
