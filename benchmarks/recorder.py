"""What recording costs a model of Flux.1's size, beside what other ways to calibrate cost it.

The model is Flux.1's transformer as its own checkpoint spells it: hidden size 3072, 24 heads, 19 double and 38 single
blocks with fused qkv, norms, rotary embedding, attention, GELU and modulation, on 4,096 + 512 tokens in bfloat16, run
eagerly; its 304 linear layers hold 11.9 billion random weights. One evaluation is what a sampler's step costs. Ways to
watch it take turns, forwards and backwards, each between two waits for the device; medians are compared.

    off          nothing
    on           convert_to_quant.recorder.record, all statistics
    absmax only  a hook with torch.maximum(seen, x.abs().amax()), no bookkeeping: the least that torch can do
    ModelOpt     nvidia-modelopt's own max calibration of the inputs (mtq.quantize with FP8_DEFAULT_CFG), if installed
    comfy-dit    a hook that does what comfy-dit-quantizer's does: float32 copy, isinf, isnan, amax, then the 99.9th
                 percentile, standard deviation, minimum and maximum of 131,072 values drawn by a permutation of all,
                 every figure read back (`.item()`)

The absmax of every layer is compared with that of a hook put on by hand in the same evaluation.

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
from torch import Tensor, nn
from torch.nn.functional import layer_norm, rms_norm, scaled_dot_product_attention, silu

from convert_to_quant.recorder import find_linears, record

SIZES = (3072, 24, 12288)
"""Hidden size, heads, hidden size of an MLP."""
IMAGE_TOKENS, TEXT_TOKENS = 4096, 512
TARGET = 0.05
"""Recording may add this share of the time."""


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return (1 + scale) * layer_norm(x, x.shape[-1:], eps=1e-6) + shift


def rotate(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Rotary embedding in float32, by pairs of channels."""
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([even * cosines - odd * sines, even * sines + odd * cosines], -1)
    return turned.flatten(-2).to(x.dtype)


class Heads(nn.Module):
    """From qkv [batch, tokens, 3 · hidden] to q, k, v [batch, heads, tokens, hidden / heads], q and k normalized."""

    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query_norm = nn.Parameter(torch.ones(hidden // heads))
        self.key_norm = nn.Parameter(torch.ones(hidden // heads))

    def forward(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Q, k, v."""
        q, k, v = qkv.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        width = q.shape[-1:]
        return rms_norm(q, width, self.query_norm, 1e-6), rms_norm(k, width, self.key_norm, 1e-6), v


def attend(q: Tensor, k: Tensor, v: Tensor, turns: tuple[Tensor, Tensor]) -> Tensor:
    mixed = scaled_dot_product_attention(rotate(q, *turns), rotate(k, *turns), v)
    return mixed.transpose(1, 2).flatten(2)


class Stream(nn.Module):
    """One of the two streams of a double block."""

    def __init__(self, hidden: int, heads: int, mlp: int) -> None:
        super().__init__()
        self.mod = nn.Linear(hidden, 6 * hidden)
        self.qkv = nn.Linear(hidden, 3 * hidden)
        self.heads = Heads(hidden, heads)
        self.proj = nn.Linear(hidden, hidden)
        self.mlp = nn.Sequential(nn.Linear(hidden, mlp), nn.GELU(approximate="tanh"), nn.Linear(mlp, hidden))


class DoubleBlock(nn.Module):
    """Two streams that attend together."""

    def __init__(self, hidden: int, heads: int, mlp: int) -> None:
        super().__init__()
        self.img, self.txt = Stream(hidden, heads, mlp), Stream(hidden, heads, mlp)

    def forward(self, img: Tensor, txt: Tensor, vector: Tensor, turns: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """The streams after the block."""
        streams, states = (self.txt, self.img), (txt, img)
        mods = [stream.mod(silu(vector))[:, None].chunk(6, -1) for stream in streams]
        parts = [
            stream.heads(stream.qkv(modulate(x, mod[0], mod[1])))
            for stream, x, mod in zip(streams, states, mods, strict=True)
        ]
        mixed = attend(*(torch.cat(pair, 2) for pair in zip(*parts, strict=True)), turns)
        results = []
        for stream, x, mod, rows in zip(
            streams, states, mods, mixed.split([txt.shape[1], img.shape[1]], 1), strict=True
        ):
            y = x + mod[2] * stream.proj(rows)
            results.append(y + mod[5] * stream.mlp(modulate(y, mod[3], mod[4])))
        return results[1], results[0]


class SingleBlock(nn.Module):
    """One stream; attention and MLP side by side."""

    def __init__(self, hidden: int, heads: int, mlp: int) -> None:
        super().__init__()
        self.mod = nn.Linear(hidden, 3 * hidden)
        self.linear1 = nn.Linear(hidden, 3 * hidden + mlp)
        self.heads = Heads(hidden, heads)
        self.gelu = nn.GELU(approximate="tanh")
        self.linear2 = nn.Linear(hidden + mlp, hidden)
        self.widths = (3 * hidden, mlp)

    def forward(self, x: Tensor, vector: Tensor, turns: tuple[Tensor, Tensor]) -> Tensor:
        """The streams after the block."""
        shift, scale, gate = self.mod(silu(vector))[:, None].chunk(3, -1)
        qkv, wide = self.linear1(modulate(x, shift, scale)).split(self.widths, -1)
        return x + gate * self.linear2(torch.cat([attend(*self.heads(qkv), turns), self.gelu(wide)], -1))


class Stack(nn.Module):
    """Flux.1's blocks."""

    def __init__(self, hidden: int, heads: int, mlp: int, double: int, single: int) -> None:
        super().__init__()
        self.double_blocks = nn.ModuleList(DoubleBlock(hidden, heads, mlp) for _ in range(double))
        self.single_blocks = nn.ModuleList(SingleBlock(hidden, heads, mlp) for _ in range(single))

    def forward(self, img: Tensor, txt: Tensor, vector: Tensor, turns: tuple[Tensor, Tensor]) -> Tensor:
        """The streams after the block."""
        for block in self.double_blocks:
            img, txt = block(img, txt, vector, turns)
        x = torch.cat([txt, img], 1)
        for block in self.single_blocks:
            x = block(x, vector, turns)
        return x[:, txt.shape[1] :]


def build(blocks: tuple[int, int], sizes: tuple[int, int, int], device: torch.device) -> Stack:
    """A stack of (double, single) blocks and (hidden, heads, mlp) sizes, with random weights in bfloat16."""
    hidden, heads, _ = sizes
    with torch.device("meta"):
        model = Stack(*sizes, *blocks).to(torch.bfloat16)
    model.to_empty(device=device).requires_grad_(False).eval()
    generator = torch.Generator(device).manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.normal_(0, parameter.shape[1] ** -0.5, generator=generator)
        else:
            parameter.fill_(1 if len(parameter) == hidden // heads else 0)
    return model


def example(sizes: tuple[int, int, int], image: int, text: int, device: torch.device) -> tuple[Any, ...]:
    """Inputs of the stack."""
    hidden, heads, _ = sizes
    generator = torch.Generator(device).manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device, dtype=torch.bfloat16)

    rates = 1e4 ** -torch.linspace(0, 1, hidden // heads // 2, device=device)
    angles = torch.arange(image + text, device=device)[:, None] * rates
    return draw(1, image, hidden), draw(1, text, hidden), draw(1, hidden), (angles.cos(), angles.sin())


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
    """The least that torch's own operations can do."""

    def __init__(self) -> None:
        self.seen: dict[str, Tensor] = {}

    def __call__(self, name: str, x: Tensor) -> None:
        """Look at a layer's input."""
        absmax = x.abs().amax()
        self.seen[name] = torch.maximum(self.seen[name], absmax) if name in self.seen else absmax


class ComfyDit:
    """The operations of comfy-dit-quantizer's hook, and its transfers to the host."""

    SMALL, SAMPLE = 524_288, 131_072

    def __init__(self) -> None:
        self.seen: dict[str, list[float]] = {}

    def __call__(self, name: str, x: Tensor) -> None:
        """Look at a layer's input."""
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


def check(model: nn.Module, inputs: tuple[Any, ...]) -> int:
    """Assert that the recorder's absmax are those of a hook in the same evaluation; returns how many layers."""
    by_hand = AbsmaxOnly()
    with record(model) as recording, hooked(model, by_hand):
        model(*inputs)
    found = recording.statistics()
    assert set(by_hand.seen) == set(found.names)
    for name, absmax in zip(found.names, found.absmax, strict=True):
        assert absmax == by_hand.seen[name].float().item(), name
    assert (found.nonfinite == 0).all()
    return len(found.names)


def time_all(
    ways: Mapping[str, Callable[[], AbstractContextManager[object]]],
    models: Mapping[str, nn.Module],
    inputs: tuple[Any, ...],
    repeats: int,
) -> dict[str, list[tuple[float, float]]]:
    """Seconds of each evaluation by way: until the host has issued it, and until the device has done it."""
    times: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
    for turn in range(repeats + 2):
        for way in list(ways) if turn % 2 else list(ways)[::-1]:
            with ways[way]():
                torch.cuda.synchronize()
                begin = time.perf_counter()
                models.get(way, models["off"])(*inputs)
                issued = time.perf_counter()
                torch.cuda.synchronize()
                done = time.perf_counter()
            if turn >= 2:
                times[way].append((issued - begin, done - begin))
    return times


def with_modelopt(model: Stack, run: Callable[[nn.Module], None]) -> None:
    """Call `run` with a model of the same weights that ModelOpt is calibrating at that moment."""
    import modelopt.torch.quantization as mtq

    twin = copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})
    mtq.quantize(twin, mtq.FP8_DEFAULT_CFG, forward_loop=run)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--double", type=int, default=19)
    parser.add_argument("--single", type=int, default=38)
    parser.add_argument("--json", type=Path, help="also write every single time to this file")
    options = parser.parse_args()

    device = torch.device("cuda")
    model = build((options.double, options.single), SIZES, device)
    inputs = example(SIZES, IMAGE_TOKENS, TEXT_TOKENS, device)
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
