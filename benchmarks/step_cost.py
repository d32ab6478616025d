"""What a product of each format costs on the GPU at hand, in ComfyUI: the table behind `--speed`.

    COMFYUI_DIR=~/ComfyUI python benchmarks/step_cost.py [--gpu h100 --write convert_to_quant/speeds.json]

Each layer is ComfyUI's own class with random weights, called from Python as models call it: kernels of comfy-kitchen,
quantizing the input included. Microseconds per call, medians; formats run in turn. Shapes are Flux.1's, tokens those of
an image of 1024 × 1024 with its text. Formats that ComfyUI does not multiply natively here are left out.

`--write` puts the figures into the package's table, under the name that `--gpu` gives the card.
"""

from __future__ import annotations

import datetime
import json
from functools import partial
from pathlib import Path

import torch
from comfyui_layers import BF16, entered, kept_db, linear, milliseconds, parser, supported

from convert_to_quant.choose import CANDIDATES
from convert_to_quant.formats.record import GPUS

SHAPES = ((9216, 3072), (12288, 3072), (21504, 3072), (3072, 12288), (3072, 15360), (3072, 3072))
"""(out, in)."""

TOKENS = 4608
LEAST_DB = 12.0
"""Of the output, on normal inputs and weights, whatever the format: 4-bit products keep the least."""


def main() -> None:
    arguments = parser(__doc__ or "")
    arguments.add_argument("--gpu", choices=GPUS, help="which card this is")
    arguments.add_argument("--write", type=Path, help="put the figures into this table")
    arguments.add_argument("--tokens", type=int, default=TOKENS)
    arguments.add_argument("--divide", type=int, default=1, help="sides of the layers by this, to try the benchmark")
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
                raise SystemExit(f"{name} keeps {kept:.1f} dB of its output: it was not multiplied as it should be")
        calls = {name: partial(layer, x) for name, layer in layers.items()}
        taken = milliseconds(calls, args.rounds, args.repeats, args.device)
        products.append({"out": out, "in": within, "microseconds": {n: round(1e3 * t, 1) for n, t in taken.items()}})
    source = (
        f"benchmarks/step_cost.py in ComfyUI {machine['comfyui']}, comfy-kitchen {machine['comfy_kitchen']}, torch "
        f"{machine['torch']}, {datetime.datetime.now(datetime.timezone.utc).date()}"
    )
    found = {"device": machine["device"], "source": source, "tokens": args.tokens, "products": products}
    print(f"{found['device']}, {source}; {args.tokens} tokens, microseconds per call\n")
    print(f"| in → out | {' | '.join(names)} |\n|---|{'---|' * len(names)}")
    for product in products:
        cells = (f"{product['microseconds'][name]:.0f}" for name in names)
        print(f"| {product['in']} → {product['out']} | {' | '.join(cells)} |")
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if args.write:
        if args.gpu is None:
            raise SystemExit("--write needs --gpu")
        table = json.loads(args.write.read_text(encoding="utf-8"))
        args.write.write_text(json.dumps(table | {args.gpu: found}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
