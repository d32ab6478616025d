"""The Triton kernel that measures a layer's input, against its definition in torch and a copy of the input.

Inputs are those of Flux.1's linear layers (4,096 + 512 tokens). Counts, histograms and absmax must be equal, and sums
close; `tests/kernels/test_triton.py` tests other shapes, dtypes, strides and values. The kernel reads x once, so read
bandwidth is its limit. References are a kernel that reads x and sums its words, and a device-to-device copy, which also
writes ("of copy" compares bytes per second). Times are on the device's clock, after a write of 512 MiB has evicted x
from the L2 cache.

    python benchmarks/recorder_kernel.py [--repeats 30] [--sweep]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
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


def check(x: Tensor) -> float:
    """Assert that kernel and definition agree on x; returns the relative difference of their sums of squares."""
    totals = [Totals([x.shape[-1]], x.device) for _ in range(2)]
    for total, accumulate in zip(totals, (kernel.accumulate, reference.accumulate), strict=True):
        accumulate(total, 0, total.sigma_numbers[:1], x)
    for name in EXACT:
        assert torch.equal(*(getattr(total, name) for total in totals)), name
    assert torch.equal(*(total.channel_bits[0] for total in totals))
    ours, theirs = (float(total.sigma_squares.sum()) for total in totals)
    assert abs(ours - theirs) < 1e-5 * theirs, (ours, theirs)
    return abs(ours - theirs) / theirs


def seconds(work: Callable[[], object], repeats: int, flush: Tensor) -> list[float]:
    """Device time of each run, with x not in the cache."""
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
    """Three kinds of inputs: normal, with a long tail and many zeros as after a GELU, and constant."""
    x = torch.randn(rows, columns, device="cuda")
    return {
        "normal": x.bfloat16(),
        "gelu": torch.nn.functional.gelu(4 * x).bfloat16(),
        "constant": torch.ones_like(x).bfloat16(),
    }


@triton.jit
def _read_words(words, sums, size, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Sum all words: the least work of a kernel that reads x."""
    lanes = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.int32)
    for start in range(tl.program_id(0) * BLOCK, size, tl.num_programs(0) * BLOCK):
        total += tl.load(words + start + lanes, mask=start + lanes < size, other=0)
    tl.store(sums + tl.program_id(0), tl.sum(total, axis=0))


def plain_read(x: Tensor) -> Callable[[], object]:
    """A kernel that reads x and does almost nothing else."""
    words = x.view(torch.int32)
    programs = 8 * torch.cuda.get_device_properties(x.device).multi_processor_count
    sums = torch.empty(programs, dtype=torch.int32, device=x.device)
    return lambda: _read_words[(programs,)](words, sums, words.numel(), BLOCK=4096, num_warps=4)


def measure(x: Tensor, repeats: int, flush: Tensor) -> tuple[dict[str, list[float]], float]:
    """Times of kernel, plain read, copy and definition, alternating, and the host's time per call."""
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
    parser.add_argument("--sweep", action="store_true", help="also measure other tile sizes")
    options = parser.parse_args()

    device = torch.cuda.get_device_properties(0)
    print(f"{device.name}, {device.multi_processor_count} multiprocessors, torch {torch.__version__}, ", end="")
    print(f"triton {metadata.version('triton')}; the kernel works here: {kernel.works()}")
    worst = 0.0
    flush = torch.empty(512 << 20, dtype=torch.uint8, device="cuda")
    print(
        "\nrows  columns  values    kernel us (max)    GB/s  of copy  of read   read us   copy us  torch us   host us"
    )
    for rows, columns in LAYERS:
        for kind, x in inputs(rows, columns).items():
            worst = max(worst, check(x))
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
    print(f"counts, histograms and absmax equal the definition's; sums of squares are within {worst:.1e}")
    if options.sweep:
        sweep(options.repeats, flush)


SWEEP = (
    *((4, 4, 256, 4), (2, 4, 256, 4), (1, 4, 1024, 4), (4, 8, 256, 8), (2, 8, 256, 8), (2, 4, 512, 8)),
    *((1, 4, 1024, 8), (2, 4, 1024, 8), (1, 8, 1024, 8), (2, 2, 1024, 8), (2, 4, 1024, 16), (1, 8, 1024, 16)),
)
"""Loads, rows and columns of a tile, warps."""


def sweep(repeats: int, flush: Tensor) -> None:
    """Print microseconds with other tiles on three layers, by programs per multiprocessor."""
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
