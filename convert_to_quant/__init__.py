"""Quantize diffusion models and preserve image quality: measure, choose formats, convert, calibrate, check.

`__all__` is the public API. It is lazy: importing the package loads neither numpy nor torch, and each name loads its
module on first use. No name equals that of a module, so `convert.convert` is `convert_checkpoint` here. Errors that a
caller can fix derive from `Error`.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_SOURCES = {
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
"""Public name -> module, or module:name if the name differs there."""

__all__ = ["__version__", *_SOURCES]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    """Load a public name (PEP 562)."""
    if name not in _SOURCES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, there = _SOURCES[name].partition(":")
    found = globals()[name] = getattr(import_module(f"{__name__}.{module}"), there or name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
