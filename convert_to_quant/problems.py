"""What ComfyUI does with a layer, and what may be wrong with a checkpoint: the tables of `inspection`.

The facts about ComfyUI were found by running version 0.33 and by reading its source.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from .formats import DEFAULT

LEAST_WEIGHT = 2.0**-20
LARGEST_WEIGHT = 2.0**14
"""Between them lies the largest weight of any real layer."""


READINGS: Mapping[str, str] = {
    "fp8": "FP8 product, inputs scaled by input_scale",
    "fp8-at-one": "FP8 product, inputs at scale 1.0",
    "experts-at-one": "experts in one bank: FP8 product, inputs at scale 1.0 always",
    "full-precision": "full precision (full_precision_matrix_mult)",
    "marker": "full precision (legacy marker of 2 elements)",
    "text-encoder": "full precision (text encoders always are)",
    "per-token": "product in its own format, inputs scaled per token",
    "per-block-16": "product in its own format, inputs scaled per block of 16",
    "per-block-32": "product in its own format, inputs scaled per block of 32",
    "per-block-static": "product in its own format, inputs scaled per block of 16 under input_scale",
    "dynamic": "only with the ComfyUI-QuantOps nodes, which scale inputs as they come, per token",
    "foreign": "kernels of its own format",
    "packed": "nothing: another program packed it",
    "cuda-error": "FP8 product, which fails on CUDA",
    "error": "an error, or silently something else (see problems)",
    "scale-dropped": "scale dropped: codes are taken for weights, so noise",
    "cast": "codes are the weights, cast to the precision of the model",
    "high-precision": "high precision, as stored",
}
"""What ComfyUI does with a layer."""

PRODUCTS = frozenset({"fp8", "fp8-at-one", "cuda-error"})
"""Readings in which the inputs become FP8 by input_scale."""

DYNAMIC = frozenset({"dynamic", "per-token", "per-block-16", "per-block-32", "foreign", "experts-at-one"})
"""Readings in which there is no input_scale."""

_RECONVERT = "convert the original again"
CALIBRATE = "convert_to_quant -i FILE -o NEW --actcal"


class Kind(NamedTuple):
    """A kind of problem: what is wrong and what comes of it, and what to do."""

    title: str
    remedy: str = _RECONVERT


KINDS: Mapping[str, Kind] = {
    "header-unreadable": Kind("the header's _quantization_metadata cannot be read", f"{_RECONVERT}, or download again"),
    "mark-unreadable": Kind("a mark is empty, names no format, or is no JSON: the model does not load"),
    "mark-format": Kind(
        "a mark names another format than the weight is stored in: ComfyUI casts the numbers, mostly to noise"
    ),
    "legacy-e5m2": Kind(f"float8_e5m2 in a legacy file, read as {DEFAULT.marked}: silently wrong"),
    "weight-scale-missing": Kind("marked as quantized without a weight scale: the model does not load"),
    "scale-value": Kind("a scale is 0, NaN, infinite or negative"),
    "scale-dtype": Kind("a scale is of a dtype that its format does not have"),
    "scale-shape": Kind("a scale has a shape that fits no rule of its format: ComfyUI fails, or paints noise"),
    "rotation-group": Kind("inputs cannot be rotated in groups of the size that the mark names: ComfyUI fails"),
    "codebook-missing": Kind("W4A8 without the codebook that its scales are made for: weights are far too large"),
    "scale-flat": Kind(
        "INT8 scales of shape [out], not [out, 1]: products are right, but LoRAs and full precision fail or are wrong"
    ),
    "pre-quant-scale": Kind("a pre_quant_scale beside a format in which ComfyUI does not read it: outputs are wrong"),
    "mark-unknown": Kind(
        "a mark names a format that ComfyUI does not know: the model does not load",
        f"{_RECONVERT}, or use the program or the nodes that the format belongs to",
    ),
    "packed": Kind(
        "layers that another program packed: ComfyUI cannot read them",
        "load the file with the nodes of that program, or convert the original",
    ),
    "weight-scale-absurd": Kind(
        f"a weight scale makes weights beyond {LARGEST_WEIGHT:,.0f} or within {LEAST_WEIGHT:.0e}, as no model has them"
    ),
    "misshapen": Kind(
        "a weight is transposed, flattened, or of another model: the model does not load",
        "get the file again, or convert the original",
    ),
    "all-zero": Kind("weights that are all zero, as downloads that stopped leave them", "download the file again"),
    "not-finite": Kind(
        "norms or biases with NaN or infinite values: the file is damaged, or its training diverged",
        "get the file again",
    ),
    "scale-granularity": Kind(
        "float8 with scales per row or block: ComfyUI fails, or silently computes something else",
        f"{_RECONVERT} with --scaling-mode tensor",
    ),
    "header-bare": Kind(
        "the header names layers without the prefix that they have in the file: ComfyUI's Load Checkpoint misses such "
        "marks and paints noise; Load Diffusion Model finds them",
        "load it as a diffusion model, or convert the original again",
    ),
    "two-spellings": Kind(
        "legacy layers in a file whose header marks others: ComfyUI drops the scales of the legacy layers"
    ),
    "wrapped": Kind(
        "names hold words that wrappers of modules left (torch.compile, FSDP): ComfyUI does not find the model in them",
        "take these words out of the names",
    ),
    "unmarked": Kind(
        "quantized, with scales, but without a mark: ComfyUI drops the scales and paints noise, or does not load it",
        "convert_to_quant migrate FILE -o NEW --to comfy adds marks; or use it where it was made for",
    ),
    "orphaned-scale": Kind("scales without a weight", "a part of the model is missing or renamed: get the file again"),
    "orphaned-mark": Kind("marks without a weight", "a part of the model is missing or renamed: get the file again"),
    "header-disagrees": Kind("header and comfy_quant tensor disagree; ComfyUI lets the header win, others may not"),
    "marker-disables-fp8": Kind(
        "the legacy marker has 2 elements: no FP8 products, and input scales are ignored",
        f"{CALIBRATE} --enable-fp8-matmul",
    ),
    "input-scale-dtype": Kind("an input scale is not float32: ComfyUI fails at the first step", CALIBRATE),
    "input-scale-shape": Kind("an input scale has several values where one is read", CALIBRATE),
    "input-scale-suspicious": Kind(
        "an input scale is 0, not finite or absurd: inputs vanish, saturate or become NaN", CALIBRATE
    ),
    "sides": Kind(
        f"sides are no multiples of {DEFAULT.sides[0]}: FP8 products fail on CUDA",
        f"{_RECONVERT}; convert_to_quant leaves such layers in high precision",
    ),
    "e5m2-product": Kind(
        "float8_e5m2 for weights and inputs: FP8 products fail on CUDA, which multiplies no two of that format",
        f"{_RECONVERT}, to {DEFAULT.marked}",
    ),
    "raw-fp8": Kind(
        "FP8 weights without scale and mark: a plain cast, which loses small weights, without FP8 products",
        f"convert the original with convert_to_quant; or {CALIBRATE}, which marks the weights as they are",
    ),
    "guessed": Kind("input scales are guesses from simulated layers, not measured", f"{CALIBRATE}, or observe"),
    "uncalibrated": Kind("input scales were never calibrated: all are 1.0 or missing", CALIBRATE),
}
"""Every kind of problem, the worst first. The first nine are those of `layers.ProblemKind`; the last two are doubts,
which count only for those who ask for strictness."""


@dataclass(frozen=True)
class Problem:
    """Something that is wrong, once for all layers that have it.

    Attributes:
        kind: a key of `KINDS`.
        tensors: the tensors or layers that have it, in file order.
        detail: what was found at the first of them, where the kind does not say it all.
    """

    kind: str
    tensors: tuple[str, ...]
    detail: str | None = None

    @property
    def title(self) -> str:
        """What is wrong and what comes of it."""
        return KINDS[self.kind].title

    @property
    def remedy(self) -> str:
        """What to do."""
        return KINDS[self.kind].remedy

    def to_json(self) -> dict[str, Any]:
        """Everything as JSON values."""
        return {**asdict(self), "title": self.title, "remedy": self.remedy}
