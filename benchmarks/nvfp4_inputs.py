"""Image quality of NVFP4 with static input scales, or with factors per input channel, against dynamic scales.

    python benchmarks/nvfp4_inputs.py [--factors] [VARIANT ...]

Velocity SQNR in dB of variants of the emoji model (`emoji_models.py`), with all block linears in NVFP4, layers with one
token per image in full precision, and 8 prompts × 4 noise levels. Static scales are a margin × absmax / 2688 over the
16 images × 4 noise levels of `--actcal`, and the scales of `--actcal` itself.

With --factors, inputs are multiplied by `pre_quant_scale` = w^b / x^a and scaled dynamically. x is a channel's absmax
on noise, w that of its weight column; the geometric mean of the factors is 1. Weights are divided by them before
rounding.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping
from pathlib import Path

import emoji_models as emoji
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from convert_to_quant import names
from convert_to_quant.calibrate_activation_scales import calibrate_model
from convert_to_quant.checkpoint import Checkpoint, open_checkpoint
from convert_to_quant.convert import convert, plan_conversion
from convert_to_quant.engines.denoiser import Denoiser, load
from convert_to_quant.fidelity import velocity_fidelity
from convert_to_quant.options import CalibrationOptions, ConvertOptions

PROMPTS, LEVELS = 8, 4
MARGINS = (1.0, 1.5, 2.0, 4.0, 16.0)
EXPONENTS = ((0.5, 0.5), (0.25, 0.25), (0.25, 0.75), (0.0, 0.5), (0.0, -0.25))
"""b and a."""


def to_nvfp4(source: Path, output: Path) -> Path:
    with open_checkpoint(source) as checkpoint:
        convert(checkpoint, plan_conversion(checkpoint, ConvertOptions(format="nvfp4")), output)
    return output


def kept(reference: Denoiser, file: Checkpoint, exact: frozenset[str], scales: Mapping[str, float]) -> float:
    """Decibels of a file with these input scales; without any, inputs are scaled dynamically per image."""
    model = load(file, dtype=torch.float32, arithmetic="comfyui")
    for module in model.linears.values():
        layer = module.stored.layer
        module.full_precision = layer.weight_scale is None or layer.name in exact
        if layer.name in scales:
            module.input_scale = torch.tensor(scales[layer.name])
    fed = emoji.conditioning(reference, emoji.HELD_OUT_PROMPTS[:PROMPTS])
    return velocity_fidelity(
        reference, model, fed, emoji.GEOMETRY, guidance=emoji.GUIDANCE, steps=LEVELS, seed=emoji.HELD_OUT_SEED,
        batch=PROMPTS if scales else 1,
    ).sqnr_db  # fmt: skip


def with_factors(source: Path, output: Path, factors: Mapping[str, Tensor]) -> None:
    """Divide weights by factors, quantize them, and add the factors to the file."""
    tensors, divided = load_file(source), output.with_suffix(".divided.safetensors")
    for layer, factor in factors.items():
        tensors[layer + names.WEIGHT] = tensors[layer + names.WEIGHT].float() / factor
    save_file(tensors, divided)
    quantized = load_file(to_nvfp4(divided, output))
    save_file(quantized | {layer + names.PRE_QUANT_SCALE: factor for layer, factor in factors.items()}, output)


def measure(variant: str, folder: Path, *, factors: bool) -> None:
    source, output = folder / "source.safetensors", folder / "nvfp4.safetensors"
    emoji.write_variant(variant, source)
    with open_checkpoint(source) as original, open_checkpoint(to_nvfp4(source, output)) as file:
        reference = load(original, dtype=torch.float32)
        calibration = calibrate_model(file, CalibrationOptions())
        statistics, exact = calibration.statistics, emoji.full_precision_of(calibration.results)
        assert statistics is not None
        print(f"{variant}: dynamic {kept(reference, file, exact, {}):.2f} dB", flush=True)
        if not factors:
            for margin in MARGINS:
                scales = {result.layer: margin * result.range / 2688 for result in calibration.results}
                print(
                    f"{variant}: {margin:g} × absmax / 2688 {kept(reference, file, exact, scales):.2f} dB", flush=True
                )
            print(f"{variant}: --actcal {kept(reference, file, exact, calibration.scales):.2f} dB", flush=True)
            return
        seen = dict(zip(statistics.names, statistics.channel_absmax, strict=True))
        weights = {layer: tensor.float() for layer, tensor in load_file(source).items()}
        for b, a in EXPONENTS:
            made = {}
            for layer in seen.keys() - exact:
                factor = weights[layer + names.WEIGHT].abs().amax(0).clamp(min=1e-6) ** b
                factor /= torch.tensor(seen[layer]).clamp(min=1e-6) ** a
                made[layer] = factor / factor.log().mean().exp()
            with_factors(source, folder / "factors.safetensors", made)
            with open_checkpoint(folder / "factors.safetensors") as scaled:
                print(f"{variant}: w^{b:g} / x^{a:g} {kept(reference, scaled, exact, {}):.2f} dB", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("variants", nargs="*", default=["plain", "hot", "spiky"], metavar="VARIANT")
    parser.add_argument("--factors", action="store_true")
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    for variant in args.variants:
        with tempfile.TemporaryDirectory() as folder:
            measure(variant, Path(folder), factors=args.factors)


if __name__ == "__main__":
    main()
