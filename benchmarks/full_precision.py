r"""Image quality by the share of layers in full precision: the curves of docs/accuracy.md.

    python benchmarks/full_precision.py --json full_precision.json
    python benchmarks/full_precision.py --from full_precision.json --plot docs/images/accuracy_budget.png \
        --write docs/accuracy.md

On each variant of the emoji model, with default scales (from noise), a budget of compute (MACs) is spent greedily in
five orders. Layers that no longer fit are skipped.

    ours            `--full-precision-budget`, without the limits that move layers by default
    random          the mean of several draws
    first and last  blocks from both ends inwards, the last one first
    whole tensor    by the expected error over a layer's whole input, largest first
    whole output    by the measured error over a layer's whole output, largest first

Requirement: ours is best within `TOLERANCE_DB`, and on "outlier-tokens" the default limit on lost tokens alone gives
25 dB. Exits with 1 otherwise.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence, Set
from itertools import product
from pathlib import Path
from typing import Any

import emoji_models as emoji
import numpy as np
from emoji_models import Choice, Models
from fidelity import SCALES_ONLY, exit_code, measured, result_of, run_parser, write_between_markers
from measure import table as markdown

from convert_to_quant.calibrate_activation_scales import calibrate_model
from convert_to_quant.fidelity import velocity_fidelity
from convert_to_quant.options import CalibrationOptions, SolveOptions

BUDGETS = (0.0, 0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.7)
DRAWS = 5
TOLERANCE_DB = 0.1
"""Other prompts change results by more than this."""
RESTORED_DB = 25.0

ORDERS: Mapping[str, str] = {
    "ours": "ours",
    "random": "random",
    "first_last": "first and last blocks",
    "whole_tensor": "whole-tensor error of the input",
    "whole_output": "whole-tensor error of the output",
}


def spend(order: Sequence[str], work: Mapping[str, float], budget: float) -> frozenset[str]:
    """Layers that fit a budget, in an order."""
    bought, left = set(), budget + 1e-9
    for layer in order:
        if work[layer] <= left:
            bought.add(layer)
            left -= work[layer]
    return frozenset(bought)


def ends_first(layers: Sequence[str]) -> list[str]:
    """Layers by block, from the ends inwards: last, first, last but one, ..."""
    blocks = list(dict.fromkeys(layer.split(".")[0] + "." + layer.split(".")[1].zfill(3) for layer in sorted(layers)))
    ranked = {block: min(2 * (len(blocks) - 1 - place), 2 * place + 1) for place, block in enumerate(blocks)}
    return sorted(layers, key=lambda layer: (ranked[layer.split(".")[0] + "." + layer.split(".")[1].zfill(3)], layer))


def measure(variant: str, device: str, prompt_count: int) -> dict[str, Any]:
    """Fidelity and share of compute in full precision, for every order and budget."""
    prompts = emoji.HELD_OUT_PROMPTS[:prompt_count]
    with emoji.models(variant, device) as models:
        calibration = calibrate_model(models.checkpoint, CalibrationOptions())
        seen, results = calibration.statistics, calibration.results
        assert seen is not None
        scales = emoji.scales_of(results)
        total = sum(result.multiply_adds for result in results)
        work = {result.layer: result.multiply_adds / total for result in results}
        known: dict[frozenset[str], float] = {}

        def point(full_precision: Set[str]) -> dict[str, float]:
            chosen = frozenset(full_precision)
            if chosen not in known:
                known[chosen] = models.fidelity(Choice(scales, chosen), prompts).sqnr_db
            return {"share": sum(work[layer] for layer in chosen), "sqnr_db": known[chosen]}

        def ours(budget: float) -> frozenset[str]:
            options = SolveOptions(full_precision_budget=budget, **SCALES_ONLY)
            return emoji.full_precision_of(models.solve(seen, options))

        orders = {
            "first_last": ends_first(list(work)),
            "whole_tensor": [r.layer for r in sorted(results, key=lambda r: (r.sqnr_after_db or 0.0, r.layer))],
            "whole_output": whole_output(models, scales, prompts[:8], work),
        }
        curves = {"ours": [point(ours(budget)) for budget in BUDGETS]}
        for name, order in orders.items():
            curves[name] = [point(spend(order, work, budget)) for budget in BUDGETS]
        draws = [list(np.random.default_rng(draw).permutation(list(work))) for draw in range(DRAWS)]
        curves["random"] = [
            average([point(spend(order, work, budget)) for order in draws]) if budget > 0 else point(set())
            for budget in BUDGETS
        ]
        by_default = emoji.full_precision_of(results)
        lost = frozenset(result.layer for result in results if result.cause == "rows lost")
        return {
            "curves": curves,
            "default": point(by_default),
            "row_loss_limit": {**point(lost), "layers": sorted(lost)},
            "none": point(set()),
            "all": point(set(work)),
        }


def average(points: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Mean of points, and standard deviation of their fidelity."""
    return {
        **{key: statistics.mean(point[key] for point in points) for key in points[0]},
        "deviation_db": statistics.stdev(point["sqnr_db"] for point in points),
    }


def whole_output(
    models: Models, scales: Mapping[str, float], prompts: Sequence[str], work: Mapping[str, float]
) -> list[str]:
    """Layers by the error over their whole output, largest first."""
    errors = velocity_fidelity(
        models.reference,
        models.set(Choice(scales)),
        emoji.conditioning(models.reference, prompts),
        emoji.GEOMETRY,
        guidance=emoji.GUIDANCE,
        seed=emoji.CALIBRATION_SEED,
        layer_errors=True,
    ).layers
    whole = {error.layer: error.whole for error in errors}
    return sorted(work, key=lambda layer: (-whole.get(layer, 0.0), layer))


def shortfalls(result: Mapping[str, Any]) -> list[str]:
    """Where ours is not best, or the limit on lost tokens does not restore quality."""
    missed = []
    for variant, found in result["variants"].items():
        ours = found["curves"]["ours"]
        for name, points in found["curves"].items():
            for budget, mine, other in zip(BUDGETS, ours, points, strict=True):
                if mine["sqnr_db"] < other["sqnr_db"] - TOLERANCE_DB:
                    gap = mine["sqnr_db"] - other["sqnr_db"]
                    missed.append(f"{variant}: at a budget of {budget:.0%} {ORDERS[name]} is better by {-gap:.2f} dB")
    if emoji.OUTLIER_TOKENS in result["variants"]:
        restored = result["variants"][emoji.OUTLIER_TOKENS]["row_loss_limit"]["sqnr_db"]
        if restored < RESTORED_DB:
            missed.append(f"{emoji.OUTLIER_TOKENS}: the limit on lost tokens gives {restored:.1f} dB")
    return missed


def table(result: Mapping[str, Any]) -> str:
    """Fidelity by order and budget, one block of rows per variant."""
    budgets = [number for number, budget in enumerate(BUDGETS) if budget in (0.0, 0.01, 0.05, 0.1, 0.2, 0.3, 0.5)]
    rows = []
    for (variant, found), (name, title) in product(result["variants"].items(), ORDERS.items()):
        dbs = [point["sqnr_db"] for point in found["curves"][name]]
        rows.append((variant, title, *(f"{db:.2f}" for db in (*(dbs[n] for n in budgets), statistics.mean(dbs)))))
    return markdown(("model", "order", *(f"{BUDGETS[number]:.0%}" for number in budgets), "mean"), rows)


def limits(result: Mapping[str, Any]) -> str:
    """Fidelity and share of compute by the limits that move layers by default."""
    columns = {"none": "all in FP8", "row_loss_limit": "limit on lost tokens alone", "default": "the default",
               "all": "all in full precision"}  # fmt: skip
    rows = (
        (variant, *(f"{found[key]['sqnr_db']:.2f} ({found[key]['share']:.1%})" for key in columns))
        for variant, found in result["variants"].items()
    )
    return markdown(("", *columns.values()), rows)


def plot(result: Mapping[str, Any], path: Path) -> None:
    """Plot the curves, one panel per variant."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    styles = {
        "ours": {"color": "#0969da", "linewidth": 2.6, "marker": "o", "markersize": 4, "zorder": 5},
        "random": {"color": "#8c959f", "linewidth": 1.4, "linestyle": "--"},
        "first_last": {"color": "#bf3989", "linewidth": 1.4},
        "whole_tensor": {"color": "#bc4c00", "linewidth": 1.4},
        "whole_output": {"color": "#1a7f37", "linewidth": 1.4, "linestyle": "-."},
    }
    figure, axes = pyplot.subplots(2, 3, figsize=(13, 7.2), layout="constrained", sharex=True)
    for axis, (variant, found) in zip(axes.flat, result["variants"].items(), strict=False):
        for name, title in ORDERS.items():
            points = found["curves"][name]
            shares = [100 * budget for budget in BUDGETS]
            axis.plot(shares, [point["sqnr_db"] for point in points], label=title, **styles[name])
        axis.axhline(found["all"]["sqnr_db"], color="#d0d7de", linewidth=1, zorder=0)
        star = found["default"]
        axis.plot(
            [100 * star["share"]], [star["sqnr_db"]], "*", color="black", markersize=11, zorder=6, label="default"
        )
        axis.set_title(variant)
        axis.grid(alpha=0.25)
    for axis in axes[:, 0]:
        axis.set_ylabel("SQNR of the velocity, dB")
    for axis in axes[1]:
        axis.set_xlabel("budget of full precision, % of compute")
    axes.flat[0].legend(fontsize=8)
    figure.savefig(path, dpi=110)


def report(result: Mapping[str, Any]) -> str:
    """The generated part of the document."""
    missed = shortfalls(result) or [f"Ours is best everywhere, within {TOLERANCE_DB} dB."]
    how = measured(result, "; the budget is a share of the compute (MACs)")
    return "\n\n".join([how, table(result), "\n".join(missed), limits(result)])


def main() -> int:
    parser = run_parser(__doc__, 32)
    parser.add_argument("--plot", type=Path, help="write the plot to this file; needs matplotlib")
    args = parser.parse_args()
    result = result_of(args, "variants", measure, args.variants, args.device, args.prompts)
    if args.plot is not None:
        plot(result, args.plot)
    write_between_markers(args.write, "budget", report(result))
    print(table(result))
    print(limits(result))
    return exit_code(shortfalls(result))


if __name__ == "__main__":
    raise SystemExit(main())
