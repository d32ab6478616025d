"""Our files in a real ComfyUI: fidelity, its layers against our simulation, and the cost of recording.

    python benchmarks/in_comfyui.py --comfyui-dir DIR [--device cuda] [--variants plain hot] [--json FILE]

Needs ComfyUI and its Python, and is meant for a GPU, where ComfyUI uses its FP8 kernels. Each variant of the emoji
model is converted, calibrated by `--actcal`, recorded in ComfyUI by our recorder on the 16-bit file and on the FP8 file
with scales of 1.0, and calibrated from these recordings.

Fidelity is the velocity SQNR along the original's trajectory, against ComfyUI's float32 run. Layers are compared on
ComfyUI's own inputs. Recorded and plain sampling alternate, after one of each. Latents must be bit-identical, and
ranges must equal those of plain hooks.

Limits. In bfloat16, which ComfyUI uses on a GPU, cold is a different network; it is not among the defaults.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from emoji_models import GUIDANCE, HELD_OUT_PROMPTS, LEVELS, guided_way, write_variant
from torch import Tensor

from convert_to_quant.checkpoint import open_checkpoint
from convert_to_quant.cli import main as command_line
from convert_to_quant.comfyui_nodes.recording import Recorder
from convert_to_quant.emoji import SIDE_TOKENS
from convert_to_quant.emoji.prompts import embed_all
from convert_to_quant.engines import noise
from convert_to_quant.engines.comfyui import inprocess_tree as tree
from convert_to_quant.engines.denoiser import load
from convert_to_quant.fidelity import sqnr_db
from convert_to_quant.recorder import find_linears

PROMPTS = HELD_OUT_PROMPTS[:4]
SEED = 7
REPEATS = 5
ARITHMETICS = ("comfyui", "comfyui_divide", "dequantize")


def to_latents(tokens: Tensor) -> Tensor:
    """The model's tokens [B, H/2 · W/2, 64] as ComfyUI's latents [B, 16, H, W]."""
    split = tokens.unflatten(1, (SIDE_TOKENS, SIDE_TOKENS)).unflatten(3, (-1, 2, 2))
    return split.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)


def way(original: Path) -> dict[str, Tensor]:
    """ComfyUI's inputs on the original's guided trajectory, at every noise level."""
    with open_checkpoint(original) as checkpoint:
        model = load(checkpoint, dtype=torch.float32)
        steps = list(guided_way(model, PROMPTS, seed=SEED))
    shown = {
        "x": torch.cat([to_latents(at.latents[: len(PROMPTS)]) for at in steps]),
        "sigma": torch.tensor([at.sigma for at in steps]).repeat_interleave(len(PROMPTS)),
    }
    context, pooled = (torch.from_numpy(part).repeat(LEVELS, *[1] * (part.ndim - 1)) for part in embed_all(PROMPTS))
    return {**shown, "context": context, "y": pooled}


def opened(path: Path, **options: Any) -> Any:
    """A file, loaded like Load Diffusion Model."""
    import comfy.sd

    return comfy.sd.load_diffusion_model(str(path), model_options=options)


def velocity(patcher: Any, states: Mapping[str, Tensor]) -> Tensor:
    """One evaluation of all states, float32 on the CPU."""
    import comfy.model_management

    comfy.model_management.load_models_gpu([patcher])
    fed = {name: value.to(patcher.load_device) for name, value in states.items()}
    denoised = patcher.model.apply_model(fed["x"], fed["sigma"], c_crossattn=fed["context"], y=fed["y"])
    found: Tensor = ((fed["x"] - denoised) / fed["sigma"].reshape(-1, 1, 1, 1)).float().cpu()
    return found


def sample(patcher: Any) -> Tensor:
    """Sample with Euler steps, like the sampler node."""
    import comfy.sample
    import comfy.samplers

    context, pooled = (torch.from_numpy(part) for part in embed_all(PROMPTS))
    start = torch.cat([noise.latents((SIDE_TOKENS**2, 64), SEED, number) for number in range(len(PROMPTS))])
    latents = to_latents(start)
    found: Tensor = comfy.sample.sample_custom(
        patcher,
        latents,
        GUIDANCE,
        comfy.samplers.sampler_object("euler"),
        1 - torch.arange(LEVELS + 1) / LEVELS,
        [[context, {"pooled_output": pooled}]],
        [[torch.zeros_like(context), {"pooled_output": torch.zeros_like(pooled)}]],
        torch.zeros_like(latents),
        disable_pbar=True,
        seed=0,
    )
    return found


def hooked(patcher: Any, see: Callable[[str, Tensor, Tensor], None], run: Callable[[], Tensor]) -> Tensor:
    """Run with a hook on every linear layer."""
    hooks = [
        module.register_forward_hook(lambda _, inputs, output, name=name: see(name, inputs[0], output))
        for name, module in find_linears(patcher.model.diffusion_model).items()
    ]
    try:
        return run()
    finally:
        for hook in hooks:
            hook.remove()


def recording(path: Path, output: Path) -> dict[str, Any]:
    """Record a sampling, compare it with plain hooks, and time it."""
    patcher = opened(path)
    ranges: dict[str, float] = {}

    def see(name: str, values: Tensor, _: Tensor) -> None:
        ranges[name] = max(ranges.get(name, 0.0), values.abs().amax().float().item())

    by_hand = hooked(patcher, see, lambda: sample(patcher))
    recorder = Recorder()
    recorded = recorder.attach(patcher)
    identical = torch.equal(sample(recorded), by_hand)
    seen = recorder.statistics()
    seen.save(output)
    seconds: dict[bool, list[float]] = {False: [], True: []}
    for _ in range(REPEATS):
        for watched, model in ((False, patcher), (True, recorded)):
            start = time.perf_counter()
            sample(model)  # synchronizes: its result is on the CPU
            seconds[watched].append(time.perf_counter() - start)
    return {
        "latents_identical": identical,
        "ranges_identical": dict(zip(seen.names, seen.absmax.tolist(), strict=True)) == ranges,
        "seconds": statistics.median(seconds[False]),
        "seconds_recorded": statistics.median(seconds[True]),
    }


def layers_agree(path: Path, states: Mapping[str, Tensor]) -> dict[str, dict[str, float]]:
    """SQNR of our arithmetics against ComfyUI's outputs, layer by layer on its inputs: worst and median."""
    patcher = opened(path)
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}

    def see(name: str, values: Tensor, output: Tensor) -> None:
        inputs[name], outputs[name] = values.to("cpu", copy=True), output.to("cpu", copy=True).float()

    few = {name: value[: len(PROMPTS)] for name, value in states.items()}
    hooked(patcher, see, lambda: velocity(patcher, few))
    found = {}
    with open_checkpoint(path) as checkpoint:
        for arithmetic in ARITHMETICS:
            model = load(checkpoint, dtype=next(iter(inputs.values())).dtype, arithmetic=arithmetic)
            figures = []
            for linear in model.linears.values():
                pieces = linear.stored.pieces
                theirs = torch.cat([outputs[layer.name][..., rows] for layer, rows in pieces], -1)
                figures.append(float(sqnr_db(theirs[None], linear(inputs[pieces[0][0].name])[None])))
            found[arithmetic] = {"worst_db": min(figures), "median_db": statistics.median(figures)}
    return found


def measure(variant: str, folder: Path, device: str) -> dict[str, Any]:
    """All results of one variant."""
    files = {name: folder / f"{variant}_{name}.safetensors" for name in ("original", "1.0", "--actcal")}
    write_variant(variant, files["original"])
    convert_to_quant("-i", files["original"], "-o", files["1.0"])
    convert_to_quant("-i", files["1.0"], "-o", files["--actcal"], "--actcal", "--actcal-device", device)
    states = way(files["original"])
    recordings = {}
    for source in ("original", "1.0"):
        made = f"recorded on {source}"
        files[made] = folder / f"{variant}_{made}.safetensors"
        observed = folder / f"{variant}_{source}_stats.safetensors"
        recordings[source] = recording(files[source], observed)
        convert_to_quant("apply", files["1.0"], observed, "-o", files[made])
    reference = velocity(opened(files["original"], dtype=torch.float32), states)
    fidelity_db = {
        name: float(sqnr_db(reference, velocity(opened(path), states)).mean()) for name, path in files.items()
    }
    return {
        "variant": variant,
        "velocity_sqnr_db": fidelity_db,
        "recording": recordings,
        "layers": layers_agree(files["--actcal"], states),
    }


def convert_to_quant(*words: str | Path) -> None:
    """Run our command line."""
    if command_line([*map(str, words), "--quiet"]):
        raise SystemExit(1)


def main() -> None:
    """Measure all variants."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--comfyui-dir", help="ComfyUI's folder (COMFYUI_DIR)")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--variants", nargs="+", default=["plain", "hot", "spiky"])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    folder = tree.folder_of(args.comfyui_dir)
    rows = []
    with tempfile.TemporaryDirectory() as work, tree.imported(folder, args.device), torch.inference_mode():
        import comfy.model_management as management

        machine = {
            "comfyui": tree.version(folder),
            "torch": torch.__version__,
            "device": torch.cuda.get_device_name() if args.device == "cuda" else "cpu",
            "fp8_products": management.supports_fp8_compute(management.get_torch_device()),
        }
        print(machine, file=sys.stderr)
        for variant in args.variants:
            rows.append(measure(variant, Path(work), args.device))
            print(json.dumps(rows[-1], indent=2), file=sys.stderr)
    if args.json:
        args.json.write_text(json.dumps({"machine": machine, "rows": rows}, indent=2) + "\n", encoding="utf-8")
    checks = [run[key] for row in rows for run in row["recording"].values() for key in run if key.endswith("identical")]
    if not all(checks):
        raise SystemExit("recording changed latents or missed a range")


if __name__ == "__main__":
    main()
