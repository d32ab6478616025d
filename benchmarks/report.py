"""Time of choosing scales for 1,000 layers, and of a report on them, without a checkpoint.

Users repeat both with one recording, so they should feel immediate: under 2 seconds for scales by any method, about a
second for a report. Reading the statistics file is the reference. The statistics are random, with as many occupied
bins (a few hundred) as real inputs.

    python benchmarks/report.py [--layers 1000] [--repeats 5] [--picture]
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from convert_to_quant.kernels import BINS
from convert_to_quant.options import SolveOptions
from convert_to_quant.report import figures
from convert_to_quant.solve import METHODS, Present, solve
from convert_to_quant.stats import SIGMA_COLUMNS, Statistics

SHAPE = (3072, 3072)
ROWS, WIDTH, LEVELS = 128, 64, 8
PARTS = ("attn.qkv", "attn.proj", "mlp.0", "mlp.2")


def recorded(layers: int, seed: int = 0) -> Statistics:
    """Statistics of an imaginary model: magnitudes grow with depth and differ between the layers of a block.

    Inputs are normal, at eight noise levels. In a few layers one token in 64 is 10,000 times larger, as in Z-Image's
    MLPs.
    """
    random = np.random.default_rng(seed)
    names = [f"blocks.{number // len(PARTS)}.{PARTS[number % len(PARTS)]}" for number in range(layers)]
    empty = Statistics.empty(dict.fromkeys(names, SHAPE))
    histogram, row_histogram = empty.histogram, empty.row_histogram
    squares = np.zeros((layers, SIGMA_COLUMNS))
    normal = np.abs(random.standard_normal((LEVELS, ROWS, WIDTH))).astype(np.float32)
    for number in range(layers):
        depth, part = number / layers, number % len(PARTS)
        magnitude = 2.0 ** (8 * depth + 5 * part - 8 + random.normal(0, 0.7))
        values = normal * np.float32(magnitude) * np.linspace(0.5, 1.5, LEVELS, dtype=np.float32)[:, None, None]
        if random.random() < 0.02:
            values[:, ::64] *= 1e4
        histogram[number] = np.bincount(values.reshape(-1).view(np.uint32) >> 19, minlength=BINS)
        row_histogram[number] = np.bincount(values.max(2).reshape(-1).view(np.uint32) >> 19, minlength=BINS)
        empty.sigma_absmax[number, :LEVELS] = values.max((1, 2))
        empty.sigma_count[number, :LEVELS] = ROWS * WIDTH
        squares[number, :LEVELS] = (values.astype(np.float64) ** 2).sum((1, 2))
    ones = np.ones(layers, np.int64)
    return empty.replace(
        sigma_squares=squares, calls=LEVELS * ones, rows=LEVELS * ROWS * ones, rows_per_sample=ROWS * ones
    ).with_facts(samples=8, engine="model", conditioning="noise")


def timed(repeats: int, work: Callable[[], Any]) -> list[float]:
    """Seconds of each run."""
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return seconds


def with_budget(method: str) -> SolveOptions:
    """Options of a method, with a budget, which takes longest."""
    return SolveOptions(method=method, full_precision_budget=0.05)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--picture", action="store_true", help="also time the image; needs matplotlib")
    args = parser.parse_args()
    observed = recorded(args.layers)
    present = {name: Present(1.0, False, SHAPE) for name in observed.layers}
    assert all(
        result.scale_after != 1.0 for method in METHODS for result in solve(observed, present, with_budget(method))
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "stats.safetensors"
        observed.save(path)
        made = figures.build(figures.Source(observed))
        text = json.dumps(made.document(), separators=(",", ":"))
        assert len(made.layers) == args.layers
        assert sum(layer.sides[0].before.risk != "" for layer in made.layers if layer.sides[0]) > args.layers / 10
        works: dict[str, Callable[[], Any]] = {
            "read the statistics": lambda: Statistics.load(path),
            **{f"solve, {method}": partial(solve, observed, present, with_budget(method)) for method in METHODS},
            "figures and document": lambda: figures.build(figures.Source(observed)).document(),
        }
        if args.picture:
            from convert_to_quant.report import picture

            works["picture"] = lambda: picture.draw(made)
        for name, work in works.items():
            seconds = timed(args.repeats, work)
            print(
                f"{args.layers} layers, {name:20}  {statistics.median(seconds):.2f} s "
                f"({min(seconds):.2f} to {max(seconds):.2f}), numpy {np.__version__}, {platform.machine()}"
            )
    print(f"document: {len(text) / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
