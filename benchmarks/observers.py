"""Input scales by the calibrators of other tools, on the inputs of our benchmark's calibration.

Run it in an environment with one of the tools, this package, torch and diffusers (see docs/accuracy.md).
`fidelity.py --observers FILE` reads its results.

    python benchmarks/observers.py modelopt -o modelopt.json
    python benchmarks/observers.py llmcompressor -o llmcompressor.json

Calibrators are configured as in the tools' FP8 recipes: ModelOpt's `MaxCalibrator` for E4M3 per tensor, as in
`FP8_DEFAULT_CFG`; llm-compressor's "static_minmax" and "mse" observers for symmetric 8-bit float per tensor, as in its
static FP8 scheme. Each gets the inputs of every FP8 layer, one call per noise level and image with its negative, as
when the tools calibrate a pipeline. Their result is the input scale.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import emoji_models as emoji
import torch
from torch import Tensor

FP8_MAX = 448.0


class ModelOpt:
    """ModelOpt's max calibration."""

    package = "nvidia-modelopt"
    methods = ("max",)

    def __init__(self, _method: str) -> None:
        from modelopt.torch.quantization.calib import MaxCalibrator

        self.calibrator = MaxCalibrator(num_bits=(4, 3), axis=None, unsigned=False)

    def see(self, x: Tensor) -> None:
        """Add one input."""
        self.calibrator.collect(x)

    def scale(self) -> float:
        """What the tool makes of all inputs."""
        return float(self.calibrator.compute_amax()) / FP8_MAX


class LlmCompressor:
    """llm-compressor's observers of activations."""

    package = "llmcompressor"
    methods = ("static_minmax", "mse")

    def __init__(self, method: str) -> None:
        from compressed_tensors.quantization import QuantizationArgs
        from llmcompressor.observers import Observer

        args = QuantizationArgs(
            num_bits=8, type="float", symmetric=True, strategy="tensor", dynamic=False, observer=method
        )
        self.observer = Observer.load_from_registry(method, base_name="input", args=args)

    def see(self, x: Tensor) -> None:
        """Add one input."""
        self.observer(x)

    def scale(self) -> float:
        """What the tool makes of all inputs."""
        return float(self.observer.get_qparams()["scale"])


TOOLS: dict[str, Callable[[str], Any]] = {"modelopt": ModelOpt, "llmcompressor": LlmCompressor}


def scales(tool: Any, variant: str, prompt_count: int) -> dict[str, dict[str, float]]:
    """Input scale by method and layer."""
    with emoji.models(variant) as models:
        model = models.set(emoji.Choice({}, frozenset(models.present)))
        found = {method: {layer: tool(method) for layer in models.present} for method in tool.methods}
        seen = set()
        for module in model.linears.values():
            layer = module.stored.layer.name
            if layer in models.present and layer not in seen:  # the parts of a fused layer share one input
                seen.add(layer)

                def watch(_: Any, inputs: tuple[Tensor, ...], layer: str = layer) -> None:
                    for calibrators in found.values():
                        calibrators[layer].see(inputs[0])

                module.register_forward_pre_hook(watch)
        for _ in emoji.guided_way(model, emoji.CALIBRATION_PROMPTS[:prompt_count], batch=1):
            pass
        return {method: {layer: one.scale() for layer, one in each.items()} for method, each in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tool", choices=TOOLS)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--variants", nargs="+", default=emoji.VARIANTS, choices=emoji.VARIANTS)
    parser.add_argument("--prompts", type=int, default=len(emoji.CALIBRATION_PROMPTS))
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    tool = TOOLS[args.tool]
    result = {
        "tool": tool.package,  # type: ignore[attr-defined]
        "version": importlib.metadata.version(tool.package),  # type: ignore[attr-defined]
        "torch": torch.__version__,
        "prompts": args.prompts,
        "variants": {},
    }
    for variant in args.variants:
        result["variants"][variant] = scales(tool, variant, args.prompts)
        args.output.write_text(json.dumps(result, indent=1))
        print(variant, flush=True)


if __name__ == "__main__":
    main()
