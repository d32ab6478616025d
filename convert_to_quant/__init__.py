"""Quantized diffusion models that keep the picture: measure, choose formats, convert, calibrate, check.

The names in `__all__` are the public API, flat and lazy: `import convert_to_quant` loads no numpy and no torch; each
name loads its module when it is first used. No name is that of a module, so modules stay importable beside them: the
function `convert.convert` is `convert_checkpoint` here. Errors that a caller can mend derive from `Error`.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "Best": "best",
    "BestOptions": "options",
    "Calibration": "calibrate_activation_scales",
    "CalibrationOptions": "options",
    "Checkpoint": "checkpoint",
    "ConvertOptions": "options",
    "Error": "errors",
    "Fidelity": "fidelity",
    "Geometry": "families.running",
    "Inspection": "inspection",
    "ReportSource": "report.figures:Source",
    "SolveOptions": "options",
    "Statistics": "stats",
    "apply_statistics": "calibrate_activation_scales",
    "build_report": "report.figures:build",
    "calibrate_model": "calibrate_activation_scales",
    "compute_activation_scale": "calibrate_activation_scales",
    "convert_checkpoint": "convert:convert",
    "find_layers": "layers",
    "inspect_checkpoint": "inspection",
    "inspect_file": "inspection",
    "load_lora_tensors": "calibrate_activation_scales",
    "load_model": "engines.denoiser:load",
    "merge_statistics": "stats:merge",
    "open_checkpoint": "checkpoint",
    "patch_model_with_scales": "calibrate_activation_scales",
    "plan_best": "best",
    "plan_conversion": "convert",
    "record": "recorder",
    "render_report": "report.page:render",
    "velocity_fidelity": "fidelity",
}
"""Public name -> its module, and its name there where that says too little here."""

__all__ = ["__version__", *_HOMES]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    """A public name, from its module (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, there = _HOMES[name].partition(":")
    found = globals()[name] = getattr(import_module(f"{__name__}.{module}"), there or name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
