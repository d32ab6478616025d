"""What ComfyUI does with a layer, and what can be wrong with a checkpoint: the tables of `inspection`.

The facts about ComfyUI come from running version 0.33 and from its source.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from .formats import DEFAULT

LEAST_WEIGHT, LARGEST_WEIGHT = 2.0**-20, 2.0**14
"""The largest weight of a real layer lies between them."""


READINGS: Mapping[str, str] = {
    "fp8": "FP8 matmul, inputs scaled by input_scale",
    "fp8-at-one": "FP8 matmul, inputs at scale 1.0",
    "experts-at-one": "bank of experts: FP8 matmul, inputs always at scale 1.0",
    "full-precision": "full precision (full_precision_matrix_mult)",
    "marker": "full precision (the legacy marker has 2 elements)",
    "text-encoder": "full precision (as in all text encoders)",
    "per-token": "matmul in the layer's format, inputs scaled per token",
    "per-block-16": "matmul in the layer's format, inputs scaled per block of 16",
    "per-block-32": "matmul in the layer's format, inputs scaled per block of 32",
    "per-block-static": "matmul in the layer's format, inputs scaled by input_scale and per block of 16",
    "dynamic": "only with the ComfyUI-QuantOps nodes, which scale inputs per token",
    "foreign": "kernels of the layer's format",
    "packed": "not readable (packed by another program)",
    "cuda-error": "FP8 matmul, which fails on CUDA",
    "error": "an error, or silently wrong results (see problems)",
    "scale-dropped": "scale dropped: the codes are used as weights, which gives noise",
    "cast": "codes used as weights, cast to the model's precision",
    "high-precision": "high precision, as stored",
}
"""What ComfyUI does with a layer."""

PRODUCTS = frozenset({"fp8", "fp8-at-one", "cuda-error"})
"""Readings in which input_scale quantizes the inputs to FP8."""

DYNAMIC = frozenset({"dynamic", "per-token", "per-block-16", "per-block-32", "foreign", "experts-at-one"})
"""Readings without an input_scale."""

_RECONVERT = "convert the original again"
_DOWNLOAD = "download the file again"
_REPAIR = f"convert_to_quant repair FILE, or {_RECONVERT}"
CALIBRATE = "convert_to_quant -i FILE -o NEW --actcal"


class Kind(NamedTuple):
    """A kind of problem: what is wrong, what follows from it, and how to fix it."""

    title: str
    remedy: str = _RECONVERT


KINDS: Mapping[str, Kind] = {
    "header-unreadable": Kind("_quantization_metadata in the header cannot be parsed", _REPAIR),
    "mark-unreadable": Kind(
        "a quantization config is empty, not JSON, or names no format: the model does not load", _REPAIR
    ),
    "mark-format": Kind(
        "a quantization config names another format than the weight is stored in: ComfyUI casts the codes, mostly to "
        "noise"
    ),
    "legacy-e5m2": Kind(f"float8_e5m2 in a legacy file, which is read as {DEFAULT.marked}: weights are silently wrong"),
    "weight-scale-missing": Kind("declared as quantized, but without a weight scale: the model does not load"),
    "scale-value": Kind("a scale is 0, negative, NaN, or infinite"),
    "scale-dtype": Kind("a scale has a dtype that its format does not allow"),
    "scale-shape": Kind("a scale has a shape that its format does not allow: ComfyUI fails or generates noise"),
    "rotation-group": Kind("inputs cannot be rotated in groups of the size in the quantization config: ComfyUI fails"),
    "codebook-missing": Kind("W4A8 without the codebook that its scales need: weights are far too large"),
    "scale-flat": Kind(
        "INT8 scales have shape [out] instead of [out, 1]: matmuls work, but LoRAs and full precision fail or are wrong"
    ),
    "pre-quant-scale": Kind("a pre_quant_scale in a format for which ComfyUI ignores it: outputs are wrong"),
    "mark-unknown": Kind(
        "a quantization config names a format that ComfyUI does not support: the model does not load",
        f"{_RECONVERT}, or use the program or nodes that the format is made for",
    ),
    "packed": Kind(
        "layers packed by another program, which ComfyUI cannot read",
        "load the file with that program's nodes, or convert the original",
    ),
    "weight-scale-absurd": Kind(
        f"a weight scale makes the largest weight exceed {LARGEST_WEIGHT:,.0f} or fall below {LEAST_WEIGHT:.0e}, as in "
        "no real model"
    ),
    "misshapen": Kind(
        "a weight is transposed, flattened, or from another model: the model does not load",
        f"{_DOWNLOAD}, or convert the original",
    ),
    "all-zero": Kind("weights are all zero, as an interrupted download leaves them", _DOWNLOAD),
    "not-finite": Kind("norms or biases have NaN or infinite values: damaged file or diverged training", _DOWNLOAD),
    "scale-granularity": Kind(
        "FP8 with one scale per row or block: ComfyUI fails or computes silently wrong results",
        f"{_RECONVERT} with --scaling-mode tensor",
    ),
    "header-bare": Kind(
        "the header names layers without their prefix: ComfyUI's Load Checkpoint ignores these configs and generates "
        "noise; Load Diffusion Model reads them",
        f"load the file as a diffusion model, or {_RECONVERT}",
    ),
    "two-spellings": Kind(
        "legacy layers in a file whose header declares other layers: ComfyUI drops the scales of the legacy layers"
    ),
    "wrapped": Kind(
        "tensor names contain words of module wrappers (torch.compile, FSDP): ComfyUI does not recognize the model",
        "remove these words from the names",
    ),
    "unmarked": Kind(
        "quantized with scales, but without a quantization config: ComfyUI drops the scales and generates noise, or "
        "does not load the model",
        "convert_to_quant migrate FILE -o NEW --to comfy, or use the file in the program it is made for",
    ),
    "orphaned-scale": Kind("scales without a weight: part of the model is missing or renamed", _DOWNLOAD),
    "orphaned-mark": Kind("quantization configs without a weight: part of the model is missing or renamed", _DOWNLOAD),
    "header-disagrees": Kind("header and comfy_quant tensor disagree: ComfyUI uses the header, other readers may not"),
    "marker-disables-fp8": Kind(
        "the legacy marker has 2 elements, which turns FP8 matmuls off: input scales are ignored",
        f"{CALIBRATE} --enable-fp8-matmul",
    ),
    "input-scale-dtype": Kind("an input scale is not float32: ComfyUI fails at the first step", CALIBRATE),
    "input-scale-shape": Kind("an input scale has several values instead of one", CALIBRATE),
    "input-scale-suspicious": Kind(
        "an input scale is 0, negative, not finite, or implausible: inputs vanish, saturate, or become NaN", CALIBRATE
    ),
    "sides": Kind(
        f"dimensions are not multiples of {DEFAULT.sides[0]}: FP8 matmuls fail on CUDA",
        f"{_RECONVERT}; convert_to_quant leaves such layers in high precision",
    ),
    "e5m2-product": Kind(
        "float8_e5m2 weights and inputs: FP8 matmuls fail on CUDA, which cannot multiply two float8_e5m2 matrices",
        f"{_RECONVERT} to {DEFAULT.marked}",
    ),
    "raw-fp8": Kind(
        "FP8 weights without scale and quantization config, from a plain cast: small weights are lost, and ComfyUI "
        "uses no FP8 matmuls",
        f"convert the original, or use {CALIBRATE} to declare and calibrate the weights as they are",
    ),
    "guessed": Kind("input scales are guessed by simulating layers, not measured", f"{CALIBRATE}, or observe"),
    "uncalibrated": Kind("input scales were never calibrated: all are 1.0 or missing", CALIBRATE),
}
"""Every kind of problem, the worst first. The first nine are those of `layers.ProblemKind`; the last two are doubts,
which count only under --strict."""


@dataclass(frozen=True)
class Problem:
    """Something wrong, reported once for all layers that have it.

    Attributes:
        kind: a key of `KINDS`.
        tensors: the tensors or layers that have it, in file order.
        detail: what was found in the first of them; None where the kind says it all.
    """

    kind: str
    tensors: tuple[str, ...]
    detail: str | None = None

    @property
    def title(self) -> str:
        """What is wrong and what follows from it."""
        return KINDS[self.kind].title

    @property
    def remedy(self) -> str:
        """How to fix it."""
        return KINDS[self.kind].remedy

    def to_json(self) -> dict[str, Any]:
        """Everything as JSON values."""
        return {**asdict(self), "title": self.title, "remedy": self.remedy}
