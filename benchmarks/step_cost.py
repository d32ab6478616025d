"""Time of a matrix multiplication in each format in ComfyUI, on this GPU: the table behind `--speed`.

    COMFYUI_DIR=~/ComfyUI python benchmarks/step_cost.py [--gpu h100 --write convert_to_quant/speeds.json]

Each layer is ComfyUI's class with random weights, called from Python as models call it: kernels of comfy-kitchen, input
quantization included. Results are median microseconds per call; formats alternate. Shapes are Flux.1's, with the tokens
of a 1024 × 1024 image and its text. Formats without native support in ComfyUI on this GPU are left out.

`--write` saves the results in the package's table, under the name of `--gpu`.
"""

from __future__ import annotations

import datetime
import json
from functools import partial
from pathlib import Path

import torch
from comfyui_layers import BF16, entered, kept_db, linear, milliseconds, parser, supported
from measure import table

from convert_to_quant.choose import CANDIDATES
from convert_to_quant.formats.record import GPUS

SHAPES = ((9216, 3072), (12288, 3072), (21504, 3072), (3072, 12288), (3072, 15360), (3072, 3072))
"""(out, in)."""

TOKENS = 4608
LEAST_DB = 12.0
"""Minimum SQNR of the output on normal inputs and weights, in any format."""


def main() -> None:
    arguments = parser(__doc__ or "")
    arguments.add_argument("--gpu", choices=GPUS, help="name of this GPU")
    arguments.add_argument("--write", type=Path, help="save the results in this table")
    arguments.add_argument("--tokens", type=int, default=TOKENS)
    arguments.add_argument(
        "--divide", type=int, default=1, help="divide the layers' dimensions by this, to try the benchmark"
    )
    arguments.add_argument("--repeats", type=int, default=20, help="calls of a layer at a time")
    args = arguments.parse_args()
    products = []
    machine = entered(args)
    names = [name for name in (BF16, *CANDIDATES) if supported(name, args.device)]
    for out, within in ((out // args.divide, within // args.divide) for out, within in SHAPES):
        x = torch.randn(1, args.tokens, within, device=args.device, dtype=torch.bfloat16)
        layers = {name: linear(name, (out, within), args.device) for name in names}
        for name, layer in layers.items():
            if name != BF16 and (kept := kept_db(layers[BF16](x), layer(x))) < LEAST_DB:
                raise SystemExit(
                    f"{name}: output of {kept:.1f} dB, expected at least {LEAST_DB:g}: its kernel is wrong"
                )
        calls = {name: partial(layer, x) for name, layer in layers.items()}
        taken = milliseconds(calls, args.rounds, args.repeats, args.device)
        products.append({"out": out, "in": within, "microseconds": {n: round(1e3 * t, 1) for n, t in taken.items()}})
    source = (
        f"benchmarks/step_cost.py in ComfyUI {machine['comfyui']}, comfy-kitchen {machine['comfy_kitchen']}, torch "
        f"{machine['torch']}, {datetime.datetime.now(datetime.timezone.utc).date()}"
    )
    found = {"device": machine["device"], "source": source, "tokens": args.tokens, "products": products}
    print(f"{found['device']}, {source}; {args.tokens} tokens, microseconds per call\n")
    rows = ((f"{p['in']} → {p['out']}", *(f"{p['microseconds'][name]:.0f}" for name in names)) for p in products)
    print(table(("in → out", *names), rows))
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if args.write:
        if args.gpu is None:
            raise SystemExit("--write needs --gpu")
        speeds = json.loads(args.write.read_text(encoding="utf-8"))
        args.write.write_text(json.dumps(speeds | {args.gpu: found}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
