"""How long choosing scales takes: statistics of 1,000 layers, each method, median of some repeats.

Solving is what a user does again and again with one recording, so it should feel immediate: under 2 seconds for 1,000
layers. The statistics are drawn at random, with as many occupied bins (a few hundred) as real inputs have.

    python benchmarks/solve.py [--layers 1000] [--repeats 5]
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time

import numpy as np

from convert_to_quant.kernels import BINS
from convert_to_quant.options import SolveOptions
from convert_to_quant.solve import METHODS, Present, solve
from convert_to_quant.stats import Statistics

SHAPE = (3072, 3072)
VALUES = 1 << 16


def recorded(layers: int) -> Statistics:
    """Statistics of layers whose inputs are normal, each at a magnitude of its own; one row per 64 values."""
    random = np.random.default_rng(0)
    empty = Statistics.empty({f"blocks.{number}": SHAPE for number in range(layers)})
    columns = {name: getattr(empty, name) for name in ("histogram", "row_histogram", "sigma_absmax", "sigma_count")}
    normal = np.abs(random.standard_normal((VALUES // 64, 64))).astype(np.float32)
    for number in range(layers):
        values = normal * np.float32(10 ** random.uniform(-3, 4))
        columns["histogram"][number] = np.bincount(values.reshape(-1).view(np.uint32) >> 19, minlength=BINS)
        columns["row_histogram"][number] = np.bincount(values.max(1).view(np.uint32) >> 19, minlength=BINS)
        columns["sigma_absmax"][number, 0] = values.max()
        columns["sigma_count"][number, 0] = VALUES
    ones = np.ones(layers, np.int64)
    return empty.replace(**columns, calls=ones, rows=VALUES // 64 * ones, rows_per_sample=64 * ones)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    observed = recorded(args.layers)
    present = {name: Present(1.0, False, SHAPE) for name in observed.layers}
    for method in METHODS:
        seconds = []
        for _ in range(args.repeats):
            start = time.perf_counter()
            results = solve(observed, present, SolveOptions(method=method, full_precision_budget=0.05))
            seconds.append(time.perf_counter() - start)
        assert all(result.scale_after != 1.0 for result in results)
        print(
            f"{args.layers} layers, {method:10}  {statistics.median(seconds):.2f} s "
            f"({min(seconds):.2f} to {max(seconds):.2f}), numpy {np.__version__}, {platform.machine()}"
        )


if __name__ == "__main__":
    main()
