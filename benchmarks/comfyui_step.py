"""Time of one step of a model of Flux.1's width in ComfyUI, by format: is a mix as fast as its formats?

    COMFYUI_DIR=~/ComfyUI python benchmarks/comfyui_step.py --device cuda

The model is ComfyUI's Flux class with ComfyUI's layers, at Flux.1's width (3,072, 24 heads), with 4 of its 19 double
and 8 of its 38 single blocks; weights are random. Results are median milliseconds of one evaluation of a 1024 × 1024
image with 512 text tokens; models alternate. "Flux.1" is that times 19 / 4.

Blocks are in the format, modulations included (FP8 modulations compute in full precision, as we write them); all other
layers are in BF16. Mixes alternate formats from layer to layer, the worst case for caches and kernels.

Requirement: a mix of 8 bits is at most 5 % slower than the slowest of its formats. Exits with 1 otherwise.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from itertools import cycle
from typing import Any

import torch
from comfyui_layers import BF16, entered, kept_db, milliseconds, operations, parser, stored, supported, weights
from measure import table

from convert_to_quant.formats import FORMATS

MODELS: dict[str, Sequence[str]] = {
    BF16: (BF16,),
    **{name: (name,) for name in ("fp8", "int8", "int8-convrot", "w6a8", "w4a8", "mxfp8", "nvfp4")},
    "mix of FP8 and INT8 ConvRot": ("fp8", "int8-convrot"),
    "mix of FP8, INT8 ConvRot and W6A8": ("int8-convrot", "fp8", "int8-convrot", "w6a8"),
}
"""Name -> the formats of its layers, in turn."""

DEPTH = 19
AT_MOST = 1.05


def model(formats: Sequence[str], device: str, hidden: int, blocks: Sequence[int]) -> Any:
    """ComfyUI's Flux with random weights in some formats."""
    from comfy.ldm.flux.model import Flux

    ops = operations(BF16 if tuple(formats) == (BF16,) else formats[0], device)
    made = Flux(
        image_model="flux", in_channels=16, out_channels=16, vec_in_dim=768, context_in_dim=4096, hidden_size=hidden,
        mlp_ratio=4.0, num_heads=hidden // 128, depth=blocks[0], depth_single_blocks=blocks[1], axes_dim=[16, 56, 56],
        theta=10000, patch_size=2, qkv_bias=True, guidance_embed=True, txt_ids_dims=[], dtype=torch.bfloat16,
        device=device, operations=ops,
    )  # fmt: skip
    turn = cycle(formats)
    for number, (name, module) in enumerate(made.named_modules()):
        own = {key: torch.zeros_like(value) for key, value in module.named_parameters(recurse=False)}
        if hasattr(module, "in_features"):
            fmt = FORMATS.get(next(turn) if "_blocks." in name else BF16)
            weight_OI = weights((module.out_features, module.in_features), device, number)
            own |= (
                {"weight": weight_OI} if fmt is None else stored(weight_OI, fmt, full_precision=name.endswith(".lin"))
            )
        elif own:  # scales of norms
            own = {key: torch.ones_like(value) for key, value in own.items()}
        if own:
            module.load_state_dict(own)
    return made


def main() -> None:
    arguments = parser(__doc__ or "")
    arguments.add_argument("--blocks", type=int, nargs=2, default=(4, 8), help="double and single blocks")
    arguments.add_argument("--hidden", type=int, default=3072)
    arguments.add_argument("--side", type=int, default=128, help="height and width of the latents")
    arguments.add_argument("--text", type=int, default=512, help="tokens")
    args = arguments.parse_args()
    machine = entered(args)
    generator = torch.Generator(args.device).manual_seed(1)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=args.device).bfloat16()

    fed = {
        "x": noise(1, 16, args.side, args.side), "timestep": torch.full((1,), 0.7, device=args.device).bfloat16(),
        "context": noise(1, args.text, 4096), "y": noise(1, 768),
        "guidance": torch.full((1,), 3.5, device=args.device).bfloat16(),
    }  # fmt: skip
    used = {name: some for name, some in MODELS.items() if all(supported(each, args.device) for each in some)}
    calls, kept, wanted = {}, {}, None
    for name, formats in used.items():
        built = model(formats, args.device, args.hidden, args.blocks)
        calls[name] = partial(built, **fed)
        found = calls[name]()
        wanted = found if wanted is None else wanted
        kept[name] = kept_db(wanted, found)
    taken = milliseconds(calls, args.rounds, 1, args.device)
    print(", ".join(f"{name} {value}" for name, value in machine.items()) + f"; {args.blocks} blocks\n")
    rows = (
        (name, f"{ms:.1f}", f"{ms * DEPTH / args.blocks[0]:.0f}", f"{ms / taken[BF16]:.2f}", f"{kept[name]:.1f}")
        for name, ms in taken.items()
    )
    print(table(("layers in", "ms per step", "Flux.1, ms", "of BF16's time", "velocity, dB"), rows))
    ratios = {name: taken[name] / max(taken[each] for each in some) for name, some in used.items() if len(some) > 1}
    print()
    for name, ratio in ratios.items():
        print(f"The {name} takes {ratio:.3f} of the time of the slowest of its formats.")
    if args.json:
        args.json.write_text(json.dumps({"machine": machine, "ms": taken, "ratios": ratios}, indent=1) + "\n")
    if max(ratios.values(), default=0) > AT_MOST:
        raise SystemExit(f"a mix is more than {AT_MOST - 1:.0%} slower than the slowest of its formats")


if __name__ == "__main__":
    main()
