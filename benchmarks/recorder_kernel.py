"""The Triton kernel that measures a layer's input, against its definition in torch and against a copy of the input.

First both measure inputs of many shapes, dtypes, strides and special values: counts, histograms and absmax must be
equal, sums close. Then they are timed on the inputs of Flux.1's linear layers (4,096 + 512 tokens). The kernel reads x
once, so its limit is the bandwidth of reading. Two yardsticks: a kernel that reads x and adds up its words, and a
device-to-device copy, which reads and writes ("of copy" compares bytes per second). Each timing is on the device's
clock, after a write of 512 MiB has put x out of the L2 cache.

    python benchmarks/recorder_kernel.py [--repeats 30] [--sweep]
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from importlib import metadata

import torch
import triton
import triton.language as tl
from torch import Tensor

from convert_to_quant.kernels import reference
from convert_to_quant.kernels import triton as kernel
from convert_to_quant.kernels.reference import Totals

EXACT = ("sigma_absmax", "sigma_count", "zeros", "histogram", "row_histogram")
LAYERS = ((4608, 3072), (4608, 12288), (4608, 15360), (4096, 5120), (4608, 2560), (512, 3072), (1, 3072))


def cases() -> Iterator[tuple[str, Tensor]]:
    """Inputs to agree on."""
    generator = torch.Generator("cuda").manual_seed(0)
    shapes = [(1, 1), (1, 3072), (7,), (3, 100), (4, 64, 128), (2, 5, 3, 384), (4608, 3072), (33, 15360), (257, 1000)]
    for dtype, shape in itertools.product((torch.bfloat16, torch.float16, torch.float32, torch.float64), shapes):
        values = torch.randn(shape, generator=generator, device="cuda", dtype=torch.float32)
        yield f"{dtype} {shape}", (values * torch.rand_like(values).sub(0.5).mul(8).exp()).to(dtype)
    x = torch.randn(6, 70, 512, generator=generator, device="cuda")
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        y = x.to(dtype)
        yield f"{dtype} middle rows", y[:, 3:60]
        yield f"{dtype} every other row", y[:, ::2]
        yield f"{dtype} odd columns", y[..., 1:500]
        yield f"{dtype} every other column", y[..., ::2]
        yield f"{dtype} transposed", y.transpose(1, 2)
        yield f"{dtype} batch and rows swapped", y.transpose(0, 1)
        yield f"{dtype} expanded", y[:1].expand(5, 70, 512)
    for name, dtype, integer in (("bfloat16", torch.bfloat16, torch.int16), ("float16", torch.float16, torch.int16)):
        patterns = torch.arange(-(1 << 15), 1 << 15, device="cuda").to(integer)
        yield f"every {name}", patterns.view(dtype).reshape(64, 1024)
    bits = torch.randint(-(1 << 31), 1 << 31, (512, 1024), generator=generator, device="cuda").to(torch.int32)
    yield "random float32 patterns", bits.view(torch.float32)
    for scale in (1e-38, 1e-30, 1e-12, 1e15, 1e30):
        yield f"float32 around {scale}", x[0] * scale
    for value in (0.0, -0.0, 1.0, float("inf"), float("nan"), 1e-45):
        yield f"all {value}", torch.full((64, 1024), value, device="cuda")


def check(x: Tensor) -> float:
    """Assert that both agree on x, and return how far their sums of squares are apart, relative."""
    totals = [Totals([x.shape[-1]] * 3, x.device) for _ in range(2)]
    for total, accumulate in zip(totals, (kernel.accumulate, reference.accumulate), strict=True):
        for sigma in (2, 8):
            accumulate(total, 1, total.sigma_numbers[sigma : sigma + 1], x)
    ours, theirs = totals
    for name in EXACT:
        a, b = getattr(ours, name), getattr(theirs, name)
        if not torch.equal(a, b):
            where = (a != b).nonzero()[:5].tolist()
            raise AssertionError(
                f"{name} differs at {where}: {[(a[tuple(i)].item(), b[tuple(i)].item()) for i in where]}"
            )
    channels = [total.channel_bits[1].view(torch.float32) for total in totals]
    torch.testing.assert_close(*channels, rtol=0, atol=0, equal_nan=True)
    squares = [total.sigma_squares[1].sum().item() for total in totals]
    difference = abs(squares[0] - squares[1]) / max(squares[1], 1e-300)
    assert difference < 1e-5, squares
    return difference


def seconds(work: Callable[[], object], repeats: int, flush: Tensor) -> list[float]:
    """Time on the device of each of several runs, x out of its cache."""
    times = []
    for _ in range(repeats + 3):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        flush.zero_()
        begin.record()
        work()
        end.record()
        times.append((begin, end))
    torch.cuda.synchronize()
    return sorted(begin.elapsed_time(end) / 1e3 for begin, end in times[3:])


def inputs(rows: int, columns: int) -> dict[str, Tensor]:
    """Inputs of three kinds: even, with a long tail and many zeros as after a GELU, and one value only."""
    x = torch.randn(rows, columns, device="cuda")
    return {
        "normal": x.bfloat16(),
        "gelu": torch.nn.functional.gelu(4 * x).bfloat16(),
        "constant": torch.ones_like(x).bfloat16(),
    }


@triton.jit
def _read_words(words, sums, size, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Add up all words: the least that a kernel which reads x must do."""
    lanes = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.int32)
    for start in range(tl.program_id(0) * BLOCK, size, tl.num_programs(0) * BLOCK):
        total += tl.load(words + start + lanes, mask=start + lanes < size, other=0)
    tl.store(sums + tl.program_id(0), tl.sum(total, axis=0))


def plain_read(x: Tensor) -> Callable[[], object]:
    """A kernel that reads x and does next to nothing with it."""
    words = x.view(torch.int32)
    programs = 8 * torch.cuda.get_device_properties(x.device).multi_processor_count
    sums = torch.empty(programs, dtype=torch.int32, device=x.device)
    return lambda: _read_words[(programs,)](words, sums, words.numel(), BLOCK=4096, num_warps=4)


def measure(x: Tensor, repeats: int, flush: Tensor) -> tuple[dict[str, list[float]], float]:
    """Times of kernel, plain read, copy and definition, alternating in one run, and the host's time per call."""
    totals = Totals([x.shape[-1]] * 2, x.device)
    sigma = totals.sigma_numbers[2:3]
    target = torch.empty_like(x)
    ways: dict[str, tuple[Callable[[], object], int]] = {
        "kernel": (lambda: kernel.accumulate(totals, 1, sigma, x), repeats // 3),
        "read": (plain_read(x), repeats // 3),
        "copy": (lambda: target.copy_(x), repeats // 3),
        "torch": (lambda: reference.accumulate(totals, 1, sigma, x), max(1, repeats // 10)),
    }
    times: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(3):
        for way, (run, count) in ways.items():
            times[way] += seconds(run, count, flush)
    begin = time.perf_counter()
    for _ in range(50):
        kernel.accumulate(totals, 1, sigma, x)
    host = (time.perf_counter() - begin) / 50
    torch.cuda.synchronize()
    return {way: sorted(runs) for way, runs in times.items()}, host


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--sweep", action="store_true", help="also try other tile sizes")
    options = parser.parse_args()

    device = torch.cuda.get_device_properties(0)
    print(f"{device.name}, {device.multi_processor_count} multiprocessors, torch {torch.__version__}, ", end="")
    print(f"triton {metadata.version('triton')}; the kernel works here: {kernel.works()}")
    worst, number = 0.0, 0
    for name, x in cases():
        try:
            worst = max(worst, check(x))
        except AssertionError as error:
            raise SystemExit(f"disagreement on {name}: {error}") from error
        number += 1
    print(f"agreement: counts, histograms and absmax equal on {number} inputs; sums of squares within {worst:.1e}")

    flush = torch.empty(512 << 20, dtype=torch.uint8, device="cuda")
    print(
        "\nrows  columns  values    kernel us (max)    GB/s  of copy  of read   read us   copy us  torch us   host us"
    )
    for rows, columns in LAYERS:
        for kind, x in inputs(rows, columns).items():
            times, host = measure(x, options.repeats, flush)
            median = {way: statistics.median(runs) for way, runs in times.items()}
            of_copy = median["copy"] / (2 * median["kernel"])
            print(
                f"{rows:4} {columns:8}  {kind:8} {median['kernel'] * 1e6:10.1f} ({times['kernel'][-1] * 1e6:5.1f})"
                f" {x.nbytes / median['kernel'] / 1e9:7.0f}  {of_copy:7.0%}  {median['read'] / median['kernel']:7.0%}"
                + "".join(f" {median[way] * 1e6:9.1f}" for way in ("read", "copy", "torch"))
                + f" {host * 1e6:9.1f}"
            )
            if kind == "normal" and rows * columns < 1 << 20:
                break
    if options.sweep:
        sweep(options.repeats, flush)


SWEEP = (
    *((4, 4, 256, 4), (2, 4, 256, 4), (1, 4, 1024, 4), (4, 8, 256, 8), (2, 8, 256, 8), (2, 4, 512, 8)),
    *((1, 4, 1024, 8), (2, 4, 1024, 8), (1, 8, 1024, 8), (2, 2, 1024, 8), (2, 4, 1024, 16), (1, 8, 1024, 16)),
)
"""Loads, rows and columns of a tile, warps."""


def sweep(repeats: int, flush: Tensor) -> None:
    """Other tiles: microseconds on three of the layers by programs per multiprocessor."""
    big = [inputs(*shape)["normal"] for shape in ((512, 3072), (4608, 3072), (4608, 15360))]
    places = (1, 2, 3, 4, 6, 8)
    print(f"\n(loads, rows, columns, warps): us at 512 x 3072 / 4608 x 3072 / 4608 x 15360 with {places} programs each")
    for config in SWEEP:
        kernel.TILE_LOADS, kernel.TILE_ROWS, kernel.TILE_COLUMNS, kernel.WARPS = config
        kernel._tile.cache_clear()
        cells = []
        for kernel.PROGRAMS_PER_MULTIPROCESSOR in places:
            figures = []
            for x in big:
                totals = Totals([x.shape[-1]], x.device)
                run = partial(kernel.accumulate, totals, 0, totals.sigma_numbers[:1], x)
                figures.append(statistics.median(seconds(run, repeats // 2, flush)) * 1e6)
            cells.append("/".join(f"{figure:.1f}" for figure in figures))
        print(f"{config}: {'  '.join(cells)}")


if __name__ == "__main__":
    main()
