"""What recording adds to the time of a model of Flux.1's size, compared with other ways to calibrate.

The model is diffusers' Flux.1-dev with random weights, with qkv projections fused as in the original checkpoint, in
bfloat16, on 4,096 + 512 tokens, eager. One evaluation is one step of a sampler. Ways alternate, in reverse order every
second round, with a device synchronization before and after each. Medians are compared.

    off          nothing
    on           convert_to_quant.recorder.record, all statistics
    absmax only  a hook with torch.maximum(seen, x.abs().amax()): the least that torch can do
    ModelOpt     nvidia-modelopt's max calibration of the inputs (mtq.quantize with FP8_DEFAULT_CFG), if installed
    comfy-dit    a hook with the operations of comfy-dit-quantizer's: float32 copy, isinf, isnan, amax, then the 99.9th
                 percentile, standard deviation, minimum and maximum of 131,072 random values, each read by `.item()`

The absmax of every layer is compared with that of a plain hook in the same evaluation.

    python benchmarks/recorder.py [--repeats 9] [--double 19 --single 38] [--json FILE]
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor, nn

from convert_to_quant.recorder import find_linears, record

IMAGE_SIDE, TEXT_TOKENS = 64, 512
"""Side of the image in tokens."""
TARGET = 0.05
"""Maximum of the additional time, as a fraction."""


def build(double: int, single: int, device: torch.device, **sizes: int) -> nn.Module:
    """Flux.1 with random weights in bfloat16.

    Args:
        double: number of double blocks.
        single: number of single blocks.
        device: where the weights are.
        **sizes: that differ from Flux.1's, by the names of diffusers' configuration.
    """
    with torch.device("meta"):
        model = FluxTransformer2DModel(num_layers=double, num_single_layers=single, guidance_embeds=True, **sizes)
    model.fuse_qkv_projections()
    for module in list(model.modules()):
        for name in ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj"):
            if hasattr(module, name):
                delattr(module, name)  # replaced by the fused projection
    model.to(torch.bfloat16).to_empty(device=device).requires_grad_(False).eval()
    generator = torch.Generator(device).manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2:
            parameter.normal_(0, parameter.shape[1] ** -0.5, generator=generator)
        else:
            parameter.fill_("norm" in name and name.endswith("weight"))
    return model


def example(model: nn.Module, side: int, text: int, device: torch.device) -> dict[str, Any]:
    """Inputs of the model for an image of side × side tokens."""
    generator = torch.Generator(device).manual_seed(1)
    config: Any = model.config

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device, dtype=torch.bfloat16)

    rows = torch.arange(side, device=device)
    places = torch.stack(torch.meshgrid(0 * rows[:1], rows, rows, indexing="ij"), -1).reshape(-1, 3)
    return {
        "hidden_states": draw(1, side * side, config.in_channels),
        "encoder_hidden_states": draw(1, text, config.joint_attention_dim),
        "pooled_projections": draw(1, config.pooled_projection_dim),
        "timestep": torch.tensor([0.5], device=device, dtype=torch.bfloat16),
        "guidance": torch.tensor([3.5], device=device, dtype=torch.bfloat16),
        "img_ids": places,
        "txt_ids": torch.zeros(text, 3, device=device),
    }


@contextmanager
def hooked(model: nn.Module, hook: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Call a hook with name and input of every linear layer."""
    with ExitStack() as stack:
        for name, module in find_linears(model).items():

            def watch(_: nn.Module, args: tuple[Tensor, ...], name: str = name) -> None:
                hook(name, args[0])

            stack.callback(module.register_forward_pre_hook(watch).remove)
        yield


class AbsmaxOnly:
    """The least work possible with torch's own operations."""

    def __init__(self) -> None:
        self.seen: dict[str, Tensor] = {}

    def __call__(self, name: str, x: Tensor) -> None:
        """Measure a layer's input."""
        absmax = x.abs().amax()
        self.seen[name] = torch.maximum(self.seen[name], absmax) if name in self.seen else absmax


class ComfyDit:
    """The operations of comfy-dit-quantizer's hook, transfers to the host included."""

    SMALL, SAMPLE = 524_288, 131_072

    def __init__(self) -> None:
        self.seen: dict[str, list[float]] = {}

    def __call__(self, name: str, x: Tensor) -> None:
        """Measure a layer's input."""
        wide = x.float()
        if wide.isinf().any() or wide.isnan().any():
            return
        magnitudes = wide.abs()
        absmax = magnitudes.amax().item()
        if magnitudes.numel() > self.SMALL:
            chosen = torch.randperm(magnitudes.numel(), device=x.device)[: self.SAMPLE]
            magnitudes = magnitudes.flatten()[chosen]
        figures = (torch.quantile(magnitudes, 0.999), magnitudes.std(), magnitudes.min(), magnitudes.max())
        values = [absmax, *(figure.item() for figure in figures)]
        self.seen[name] = [max(pair) for pair in zip(values, self.seen.get(name, values), strict=True)]


def check(model: nn.Module, inputs: Mapping[str, Any]) -> int:
    """Assert that the recorder's absmax equal those of a hook in the same evaluation; returns the number of layers."""
    by_hand = AbsmaxOnly()
    with record(model) as recording, hooked(model, by_hand):
        model(**inputs)
    found = recording.statistics()
    assert set(by_hand.seen) == set(found.names)
    for name, absmax in zip(found.names, found.absmax, strict=True):
        assert absmax == by_hand.seen[name].float().item(), name
    assert (found.nonfinite == 0).all()
    return len(found.names)


def time_all(
    ways: Mapping[str, Callable[[], AbstractContextManager[object]]],
    models: Mapping[str, nn.Module],
    inputs: Mapping[str, Any],
    repeats: int,
) -> dict[str, list[tuple[float, float]]]:
    """Seconds of each evaluation by way: until the host has issued it, and until the device has finished."""
    times: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
    for turn in range(repeats + 2):
        for way in list(ways) if turn % 2 else list(ways)[::-1]:
            with ways[way]():
                torch.cuda.synchronize()
                begin = time.perf_counter()
                models.get(way, models["off"])(**inputs)
                issued = time.perf_counter()
                torch.cuda.synchronize()
                done = time.perf_counter()
            if turn >= 2:
                times[way].append((issued - begin, done - begin))
    return times


def with_modelopt(model: nn.Module, run: Callable[[nn.Module], None]) -> None:
    """Call `run` with a model that has the same weights, while ModelOpt calibrates it."""
    import modelopt.torch.quantization as mtq

    twin = copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})
    mtq.quantize(twin, mtq.FP8_DEFAULT_CFG, forward_loop=run)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--double", type=int, default=19)
    parser.add_argument("--single", type=int, default=38)
    parser.add_argument("--json", type=Path, help="write all times to this file")
    options = parser.parse_args()

    device = torch.device("cuda")
    model = build(options.double, options.single, device)
    inputs = example(model, IMAGE_SIDE, TEXT_TOKENS, device)
    weights = sum(parameter.numel() for parameter in model.parameters())
    installed = {name: _version(name) for name in ("torch", "triton", "nvidia-modelopt")}
    print(f"{torch.cuda.get_device_name()}, {', '.join(f'{name} {version}' for name, version in installed.items())}")
    times: dict[str, list[tuple[float, float]]] = {}

    def measure(calibrating: nn.Module | None) -> None:
        with torch.inference_mode():
            layers = check(model, inputs)
            print(f"{weights / 1e9:.1f} billion weights; absmax equal to a hook's on {layers} layers")
            absmax_only, comfy_dit = AbsmaxOnly(), ComfyDit()
            ways: dict[str, Callable[[], AbstractContextManager[object]]] = {
                "off": nullcontext,
                "on": lambda: record(model),
                "absmax only": lambda: hooked(model, absmax_only),
                "comfy-dit": lambda: hooked(model, comfy_dit),
            }
            models: dict[str, nn.Module] = {"off": model}
            if calibrating is not None:
                ways["ModelOpt"] = nullcontext
                models["ModelOpt"] = calibrating
            times.update(time_all(ways, models, inputs, options.repeats))

    if installed["nvidia-modelopt"] == "none":
        measure(None)
    else:
        with_modelopt(model, measure)

    base = statistics.median(done for _, done in times["off"])
    print("\nway           ms     (least to most)     more time   host ms")
    for way, runs in times.items():
        totals = [done * 1e3 for _, done in runs]
        median, host = statistics.median(totals), statistics.median(issued for issued, _ in runs) * 1e3
        more = median / 1e3 / base - 1
        print(f"{way:12} {median:7.1f} ({min(totals):7.1f} to {max(totals):7.1f}) {more:11.1%} {host:9.1f}")
    if options.json:
        options.json.write_text(json.dumps({"versions": installed, "seconds": times}, indent=1))
    more = statistics.median(done for _, done in times["on"]) / base - 1
    print(f"\nrecording adds {more:.1%}; the target is at most {TARGET:.0%}: {'met' if more <= TARGET else 'MISSED'}")
    sys.exit(more > TARGET)


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "none"


if __name__ == "__main__":
    main()
