"""GPTQ of llm-compressor and ModelOpt against `--round`, on the same weights and moments: a table of docs/rounding.md.

    pip install --no-deps --target ~/tools llmcompressor==0.14.0.1 compressed-tensors==0.20.0 nvidia-modelopt==0.47.0
        accelerate datasets dill loguru multiprocess omegaconf antlr4-python3-runtime==4.9.3 pandas pulp pyarrow xxhash
    python benchmarks/other_rounding.py --site ~/tools --model qwen-image.safetensors

Moments come from noise. Each tool rounds each layer with its default damping, column order and scales. For formats with
rotation, tools get the rotated weight and moments.

    nearest            each weight to nearest
    published          GPTQ as published: columns in order, 1 % damping, scales of rounding to nearest
    feedback           `--round`
    llm-compressor     `quantize_weight` of its GPTQModifier, with the scales of its observer
    ModelOpt           `mtq.quantize` with "gptq", of a layer whose input is a square root of the moments
    learned            a file that convert-to-quant 1.3.4 made of the model (`--learned nvfp4=FILE`)

Results: squared error of a layer's output, tr(ΔW H ΔWᵀ) / tr(W H Wᵀ), in dB (median over layers); SQNR of the velocity
on held-out prompts, with all layers rounded; seconds per layer, on a CPU those of the process alone. `--large OUT IN`
instead rounds one weight of this size in its own process: seconds, and memory besides the tool, the weight and the
moments. A tool that is missing or cannot round to a format has no row; stderr says why.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from itertools import product
from pathlib import Path
from typing import Any

import emoji_models as emoji
import torch
from formats import Judge
from measure import in_fresh_process, table
from torch import Tensor

from convert_to_quant import best
from convert_to_quant.checkpoint import open_checkpoint
from convert_to_quant.convert import plan_conversion
from convert_to_quant.engines import denoiser, diffusers, moments, trials
from convert_to_quant.formats import FORMATS
from convert_to_quant.formats.record import Format
from convert_to_quant.formats.rotation import rotate
from convert_to_quant.layers import Layer, dequantize, find_layers
from convert_to_quant.options import SAMPLES, ConvertOptions, RunOptions
from convert_to_quant.rounding import round_weight
from convert_to_quant.rounding.solver import error_of, rotated_moments

Tool = Callable[[Tensor, Tensor, Format], Tensor]
"""Weight, moments and format -> rounded weight, [out, in]; all rotated if the format has a rotation."""

PUBLISHED_DAMPING = 0.01
E4M3, E2M1 = (4, 3), (2, 1)
SCHEMES: Mapping[str, tuple[Mapping[str, Any], Mapping[Any, Any]]] = {
    "fp8": ({"num_bits": 8, "type": "float", "strategy": "tensor"}, {"num_bits": E4M3, "axis": None}),
    "int8": ({"num_bits": 8, "strategy": "channel"}, {"num_bits": 8, "axis": 0}),
    "int8-convrot": ({"num_bits": 8, "strategy": "channel"}, {"num_bits": 8, "axis": 0}),
    "convrot-w4a4": ({"num_bits": 4, "strategy": "channel"}, {"num_bits": 4, "axis": 0}),
    "nvfp4": (
        {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}
        | dict.fromkeys(("scale_dtype", "zp_dtype"), torch.float8_e4m3fn),
        {"num_bits": E2M1, "block_sizes": {-1: 16, "type": "static", "scale_bits": E4M3}},
    ),
}
"""Format -> its settings in llm-compressor and in ModelOpt. Neither has W4A8 and W6A8."""


def own(method: Callable[[Tensor, Tensor, Format], Mapping[str, Tensor]]) -> Tool:
    """A method of this package. It rotates by itself."""

    def rounded(weight_OI: Tensor, moments_II: Tensor, fmt: Format) -> Tensor:
        config = fmt.config((weight_OI.shape[0], weight_OI.shape[1]), 0)
        group = fmt.group(config)
        levels, scale = fmt.decode(
            method(rotate(weight_OI, group), rotated_moments(moments_II, group).float(), fmt), config
        )
        return levels.float() * scale

    return rounded


def llm_compressor(weight_OI: Tensor, moments_II: Tensor, fmt: Format) -> Tensor:
    """The core of its GPTQModifier."""
    from compressed_tensors.quantization import QuantizationArgs
    from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight
    from llmcompressor.observers import Observer

    arguments = QuantizationArgs(symmetric=True, actorder="static", **SCHEMES[fmt.name][0])
    observer = Observer.load_from_registry("memoryless_minmax", base_name="weight", args=arguments)
    observer(weight_OI)
    found = observer.get_qparams()
    shared = found.get("global_scale")
    scaled = moments_II / moments_II.diagonal().mean()
    rounded, _, _ = quantize_weight(
        weight_OI[None].clone(), scaled[None], found["scale"][None], found["zero_point"][None],
        None if shared is None else shared.reshape(1), arguments,
    )  # fmt: skip
    return rounded[0]


def model_opt(weight_OI: Tensor, moments_II: Tensor, fmt: Format) -> Tensor:
    """The whole procedure, on one layer."""
    import modelopt.torch.quantization as mtq

    layer = torch.nn.Linear(weight_OI.shape[1], weight_OI.shape[0], bias=False, device=weight_OI.device)
    layer.weight.data = weight_OI.clone()
    values, vectors = torch.linalg.eigh(moments_II.double())
    shown = (values.clamp(min=0).sqrt().unsqueeze(1) * vectors.T).float()
    quantizers = [
        {"quantizer_name": "*", "enable": False},
        {"quantizer_name": "*weight_quantizer", "cfg": SCHEMES[fmt.name][1], "enable": True},
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        mtq.quantize(
            torch.nn.Sequential(layer), {"quant_cfg": quantizers, "algorithm": {"method": "gptq"}}, lambda m: m(shown)
        )
    rounded: Tensor = layer.weight.data
    return rounded


def published(weight_OI: Tensor, moments_II: Tensor, fmt: Format) -> dict[str, Tensor]:
    """GPTQ as published (Frantar et al., arXiv 2210.17323), column by column, with scales of rounding to nearest."""
    parts = fmt.quantized(weight_OI)
    lattice = fmt.lattice(parts)
    group = fmt.group(fmt.config((weight_OI.shape[0], weight_OI.shape[1]), 0))
    left = rotate(weight_OI, group) / lattice.unit
    damped = rotated_moments(moments_II, group)
    damped = damped + PUBLISHED_DAMPING * damped.diagonal().mean() * torch.eye(len(damped)).to(damped)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    factor = torch.linalg.cholesky(inverse, upper=True).float()
    for column in range(left.shape[1]):
        levels = lattice.levels(lattice.numbers[:, column // lattice.group if lattice.group else 0])
        at = torch.searchsorted((levels[:, 1:] + levels[:, :-1]) / 2, left[:, column : column + 1].contiguous())
        error = (left[:, column : column + 1] - levels.gather(1, at)) / factor[column, column]
        left[:, column + 1 :] -= error * factor[column, column + 1 :]
        lattice.positions[:, column] = at[:, 0]
    return fmt.stored(lattice, parts)


TOOLS: Mapping[str, Tool] = {
    "nearest": own(lambda weight_OI, _, fmt: fmt.quantized(weight_OI)),
    "published": own(published),
    "feedback": own(round_weight),
    "llm-compressor": llm_compressor,
    "ModelOpt": model_opt,
}


class Real(trials.Simulated):
    """A layer with a weight that a tool rounded."""

    def __init__(self, weight_OI: Tensor, candidate: trials.Candidate, rounded_OI: Tensor) -> None:
        super().__init__(weight_OI, candidate)
        self.levels, self.scale = rounded_OI, torch.ones(1, 1, device=rounded_OI.device)


def learned(path: Path, layers: Mapping[str, Layer]) -> Iterator[tuple[str, Tensor]]:
    """Weights of a file that another tool wrote."""
    with open_checkpoint(path) as checkpoint:
        quantized = find_layers(checkpoint).quantized
        for name in layers:
            if name in quantized:
                yield name, torch.from_numpy(dequantize(checkpoint, quantized[name]))


def measure(args: argparse.Namespace) -> Iterator[tuple[str, ...]]:
    """Rows of format, tool, dB of layers, dB of the velocity, seconds per layer; "–" if not measured."""
    with emoji.checkpoint_of(args.model) as checkpoint:
        model = denoiser.load(checkpoint, device=args.device, dtype=torch.float32)
        judge = Judge(model, emoji.GEOMETRY, args.prompts)
        plan = plan_conversion(checkpoint, ConvertOptions(format="int8"))
        layers = {layer.name: layer for layer, _ in plan.quantized[:: args.every]}
        seen = diffusers.observe(checkpoint, plan.table, RunOptions(device=args.device), layers=list(layers)).statistics
        gathering = moments.Gathering(
            checkpoint, plan.table, list(layers.values()), RunOptions(device=args.device, samples=3 * SAMPLES)
        )
        gathered = {name: own for name, layer in layers.items() if (own := gathering.moments_of(layer)) is not None}
        could = best.candidates(layers, best.input_scales(checkpoint, layers, seen), [FORMATS[n] for n in args.formats])
        files = dict(each.split("=", 1) for each in args.learned)
        for fmt, tool in product(args.formats, (*args.tools, "learned")):
            given = dict(learned(Path(files[fmt]), layers)) if tool == "learned" and fmt in files else {}
            ratios, mix, seconds = [], {}, 0.0
            for name, candidate in ((n, c) for n, some in could.items() for c in some if c.format.name == fmt):
                group = candidate.format.group(candidate.format.config(layers[name].shape, 0))
                weight_OI = judge.bench.weight(name)
                rotated_OI, form = rotate(weight_OI, group), rotated_moments(gathered[name], group).float()
                start = clock(args.device)
                if tool in TOOLS:
                    rounded_OI = attempted(tool, rotated_OI, form, fmt)
                elif name in given:
                    rounded_OI = rotate(given[name].to(form), group)
                else:
                    continue
                seconds += clock(args.device) - start
                if rounded_OI is None:
                    break
                energy = error_of(rotated_OI, 0 * rotated_OI, form).sum()
                ratios.append(10 * float((energy / error_of(rotated_OI, rounded_OI, form).sum()).log10()))
                mix[name] = Real(weight_OI, candidate, rounded_OI)
            if mix:
                is_whole = args.every == 1 and len(mix) == len(layers)
                velocity = f"{judge.judge(mix):.1f}" if is_whole else "–"
                took = "–" if tool == "learned" else f"{seconds / len(mix):.2f}"
                yield fmt, tool, f"{statistics.median(ratios):.1f}", velocity, took


def attempted(tool: str, weight_OI: Tensor, form: Tensor, fmt: str) -> Tensor | None:
    """A weight rounded by a tool; None, with the reason on stderr, if it fails."""
    try:
        return TOOLS[tool](weight_OI, form, FORMATS[fmt])
    except (ImportError, RuntimeError) as error:
        print(f"{fmt}, {tool}: {type(error).__name__}: {error}", file=sys.stderr)
        return None


def large(tool: str, fmt: str, args: argparse.Namespace) -> tuple[str, ...]:
    """Row of format, tool, seconds and GB for one weight, after a small one that loads the tool."""
    sys.path.append(args.site)
    torch.set_grad_enabled(False)
    generator = torch.Generator(device=args.device).manual_seed(0)
    figures = []
    for rows, columns in ((256, 256), args.large):
        weight_OI = torch.randn(rows, columns, device=args.device, generator=generator) / 50
        place = torch.arange(columns, device=args.device)
        form = 0.5 ** (place - place.unsqueeze(1)).abs()
        before, start = peak_bytes(args.device, reset=True), clock(args.device)
        if attempted(tool, weight_OI, form, fmt) is not None:
            seconds = clock(args.device) - start
            figures = [f"{seconds:.2f}", f"{(peak_bytes(args.device) - before) / 1e9:.2f}"]
    return fmt, tool, *(figures or ("–", "–"))


def clock(device: str) -> float:
    """Seconds: process time on a CPU, which may be shared; else wall-clock time after synchronization."""
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def peak_bytes(device: str, *, reset: bool = False) -> int:
    """Peak memory of this process on the device; `reset` resets it."""
    if device != "cpu":
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated()
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    return 1024 * int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--site", default="", help="folder with the other tools")
    parser.add_argument("--model", default="plain", help="variant of the emoji model, or a file for 128 × 128 pixels")
    parser.add_argument("--formats", nargs="+", default=list(SCHEMES), choices=SCHEMES)
    parser.add_argument("--tools", nargs="+", default=list(TOOLS), choices=TOOLS)
    parser.add_argument("--learned", action="append", default=[], metavar="FORMAT=FILE")
    parser.add_argument("--every", type=int, default=1, help="use every n-th layer; above 1, without velocity")
    parser.add_argument("--prompts", type=int, default=16, help="held-out prompts")
    parser.add_argument("--large", nargs=2, type=int, metavar=("OUT", "IN"), help="measure one weight instead")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    sys.path.append(args.site)
    torch.set_grad_enabled(False)
    if args.large:
        heads: tuple[str, ...] = ("format", "tool", "seconds", "GB")
        found = (in_fresh_process(large, tool, fmt, args) for fmt, tool in product(args.formats, args.tools))
    else:
        heads, found = ("format", "tool", "layers, dB", "velocity, dB", "seconds per layer"), measure(args)
    print(table(heads, ()), flush=True)
    for cells in found:
        print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
