"""Simulated FP8 arithmetic against FP8 matrix units, on the emoji model.

All fidelity results in this project multiply E4M3 values in float32 (`engines.quantized_linear`). This benchmark also
runs the same files with `torch._scaled_mm` on a CUDA device, along the same reference trajectories:

    multiply   x · (1 / s) in bfloat16, ComfyUI's eager quantizer
    divide     x / s in float32, ComfyUI's CUDA and Triton quantizers

on each re-ranging of the emoji model, calibrated on noise. Results are the SQNR of the velocity in dB. Between layers
both compute in bfloat16, as ComfyUI does; "float32" is the simulation with float32 between layers, as in the accuracy
tables; "weights" quantizes no inputs. Requirement: simulated and real results differ by at most 0.1 dB.

Then the error of the device's sums in single matmuls of Flux.1's sizes, in dB, which bounds the difference in a large
model (its rows are 12 to 60 times as long as the emoji model's).

    python benchmarks/fp8_matmul.py [--prompts 32] [--steps 8]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from importlib import metadata

import emoji_models as emoji
import torch

from convert_to_quant.emoji import prompts
from convert_to_quant.emoji.rerange import RERANGINGS
from convert_to_quant.engines.denoiser import load
from convert_to_quant.engines.quantized_linear import Arithmetic, CheckpointLinear
from convert_to_quant.fidelity import velocity_fidelity
from convert_to_quant.formats import DEFAULT

TOLERANCE_DB = 0.1

WAYS: Mapping[str, tuple[torch.dtype, Arithmetic]] = {
    "weights": (torch.bfloat16, "dequantize"),
    "float32": (torch.float32, "comfyui_divide"),
    "divide": (torch.bfloat16, "comfyui_divide"),
    "multiply": (torch.bfloat16, "comfyui"),
}

PAIRS = ("float32", "divide", "multiply")
"""Ways that run both simulated and real."""


def compare(variant: str, count: int, steps: int, device: str) -> tuple[dict[str, tuple[float, float]], int, int]:
    """SQNR and its standard error by way; number of layers that multiply in FP8, and of all quantized layers."""
    names = (prompts.NAMES * count)[:count]  # each repeat starts from other noise
    found = {}
    with emoji.models(variant, device) as models:
        calibrated = emoji.choice_of(models.calibrated(device=device))
        conditioning = emoji.conditioning(models.reference, names)
        for way, (dtype, arithmetic) in WAYS.items():
            models.quantized = load(models.checkpoint, device=device, dtype=dtype, arithmetic="comfyui")
            model = models.set(replace(calibrated, arithmetic=arithmetic))
            quantized = [module for module in model.linears.values() if not module.full_precision]
            fitting = [module for module in quantized if fits(module)]
            for name in (way, f"{way}, real") if way in PAIRS else (way,):
                if name != way:
                    for module in fitting:
                        module.product = partial(real_product, module)  # type: ignore[method-assign]
                result = velocity_fidelity(
                    models.reference, model, conditioning, models.geometry, steps=steps, batch=count
                )
                found[name] = (result.sqnr_db, result.standard_error_db)
    return found, len(fitting), len(quantized)


def fits(module: CheckpointLinear) -> bool:
    """Whether matrix units can multiply a layer's codes."""
    layer = module.stored.layer
    shape = (module.out_features, module.in_features)
    return len(module.stored.pieces) == 1 and layer.granularity == "tensor" and DEFAULT.takes(shape)


def real_product(module: CheckpointLinear, x: torch.Tensor, _index: int) -> torch.Tensor:
    """`CheckpointLinear.product` on matrix units."""
    levels, weight_scale, _ = module.stored.multiplied(0)
    codes, scale = DEFAULT.inputs(x, module.input_scale, module.arithmetic)
    y: torch.Tensor = torch._scaled_mm(
        codes.reshape(-1, module.in_features),
        levels.t(),
        scale_a=scale.reshape(()),
        scale_b=weight_scale[0, 0],
        out_dtype=torch.float32,
    )
    return y.reshape(*x.shape[:-1], module.out_features)


def sum_errors(rows: int, outs: int, ins: int) -> dict[str, float]:
    """SQNR in dB of one matmul of random codes on the device, against exact sums."""
    generator = torch.Generator("cuda").manual_seed(0)
    x, w = (
        torch.randn(shape, generator=generator, device="cuda").mul(100).clamp(-448, 448).to(torch.float8_e4m3fn)
        for shape in ((rows, ins), (outs, ins))
    )
    one = torch.ones((), device="cuda")
    exact = x.double() @ w.double().t()

    def sqnr_db(y: torch.Tensor) -> float:
        return float(10 * torch.log10(exact.square().sum() / (y.double() - exact).square().sum()))

    found = {"float32": sqnr_db(x.float() @ w.float().t()), "bfloat16 of exact": sqnr_db(exact.bfloat16())}
    for fast in (False, True):
        for dtype in (torch.float32, torch.bfloat16):
            y = torch._scaled_mm(x, w.t(), scale_a=one, scale_b=one, out_dtype=dtype, use_fast_accum=fast)
            found[f"{'fast ' if fast else ''}FP8 -> {str(dtype)[6:]}"] = sqnr_db(y)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--variants", nargs="+", default=list(RERANGINGS))
    options = parser.parse_args()

    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, diffusers {metadata.version('diffusers')}")
    print(f"SQNR of the velocity in dB, {options.prompts} prompts x {options.steps} noise levels (standard error)\n")
    ways = [name for way in WAYS for name in ((way, f"{way}, real") if way in PAIRS else (way,))]
    print("variant " + "".join(f"{way:>16}" for way in ways) + f"   real - simulated: {', '.join(PAIRS)}   FP8 layers")
    worst = 0.0
    for variant in options.variants:
        found, real, quantized = compare(variant, options.prompts, options.steps, "cuda")
        assert real, "no layer multiplied in FP8"
        gaps = [found[f"{way}, real"][0] - found[way][0] for way in PAIRS]
        worst = max(worst, *map(abs, gaps))
        cells = "".join(f"{db:9.2f} ({error:.2f})".rjust(16) for db, error in found.values())
        print(f"{variant:8}{cells}   {', '.join(f'{gap:+.3f}' for gap in gaps):>35}   {real:5} of {quantized}")

    print("\nsums of one matmul, dB against exact sums")
    for rows, outs, ins in ((512, 3072, 256), (512, 3072, 3072), (512, 3072, 15360)):
        print(f"{rows} x {outs} x {ins}: " + ", ".join(f"{k} {v:.1f}" for k, v in sum_errors(rows, outs, ins).items()))
    verdict = "met" if worst <= TOLERANCE_DB else "MISSED"
    print(f"\nlargest difference {worst:.3f} dB; the target is at most {TOLERANCE_DB}: {verdict}")
    sys.exit(worst > TOLERANCE_DB)


if __name__ == "__main__":
    main()
