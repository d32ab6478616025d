"""Image quality with 16-bit activations in some steps of sampling, the policy called diffusion_step_policy.

    python benchmarks/first_and_last_steps.py [--prompts 12 --steps 20 --device cuda]

Variants of the emoji model, calibrated like `--actcal`, sample held-out prompts from one seed. Weights stay in FP8;
inputs are not quantized in the steps of a policy. Results are the SNR of latents in dB against the original's samples,
mean over prompts ± standard error.
"""

from __future__ import annotations

import argparse
from collections.abc import Collection, Mapping

import emoji_models as emoji
from emoji_models import choice_of
from measure import table
from torch import Tensor

from convert_to_quant.engines.denoiser import Denoiser
from convert_to_quant.engines.quantized_linear import Arithmetic
from convert_to_quant.fidelity import check_latents, mean_and_error, sqnr_db


def sampled(
    model: Denoiser, latents: Tensor, given: Mapping[str, Tensor], steps: int, precise: Collection[int]
) -> Tensor:
    """Final latents of Euler's method. Inputs are not quantized in `precise` steps."""
    for step in range(steps):
        arithmetic: Arithmetic = "dequantize" if step in precise else "comfyui"
        for layer in model.linears.values():
            layer.arithmetic = arithmetic  # no effect on layers in high precision
        latents = latents - model.velocity(latents, 1 - step / steps, given, emoji.GEOMETRY) / steps
    return latents


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", nargs="+", default=["plain", "hot"], metavar="NAME")
    parser.add_argument("--prompts", type=int, default=12, metavar="N")
    parser.add_argument("--steps", type=int, default=20, metavar="N")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    steps = range(args.steps)
    middle = args.steps // 2
    policies: dict[str, Collection[int]] = {
        "none": (), "first 3": steps[:3], "last 3": steps[-3:], "3 + 3": (*steps[:3], *steps[-3:]),
        "first 6": steps[:6], "middle 6": steps[middle - 3 : middle + 3], "last 6": steps[-6:], "all": steps,
    }  # fmt: skip
    rows = []
    for name in args.variants:
        with emoji.models(name, args.device) as models:
            given = emoji.conditioning(models.reference, emoji.HELD_OUT_PROMPTS[: args.prompts])
            start = check_latents(models.reference, emoji.GEOMETRY, args.prompts, emoji.HELD_OUT_SEED)
            wanted = sampled(models.reference, start, given, args.steps, ())
            model = models.set(choice_of(models.calibrated()))
            kept = [sqnr_db(wanted, sampled(model, start, given, args.steps, precise)) for precise in policies.values()]
            rows.append((name, *(f"{mean:.1f} ± {error:.1f}" for mean, error in map(mean_and_error, kept))))
    print(table(("", *policies), rows))


if __name__ == "__main__":
    main()
