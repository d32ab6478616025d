"""Shared by benchmarks of ComfyUI's speed: its linear layers in every format, with random weights."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import time
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from convert_to_quant.engines.comfyui import inprocess_tree as tree
from convert_to_quant.fidelity import sqnr_db
from convert_to_quant.formats import FORMATS
from convert_to_quant.formats.record import Format

BF16 = "bf16"
INPUT_ABSMAX = 5.5
"""Absmax of normal inputs, for static scales."""


def stored(weight_OI: Tensor, fmt: Format, full_precision: bool = False) -> dict[str, Tensor]:
    """Tensors of a quantized weight [out, in], by suffix without its dot, quantization config included."""
    shape = (weight_OI.shape[0], weight_OI.shape[1])
    sizes = {suffix: size for suffix, (_, size) in fmt.storage(shape, 0).items()}
    quantized = fmt.quantized(weight_OI.float())
    parts = {suffix: part.reshape(sizes.get(suffix, part.shape)) for suffix, part in quantized.items()}
    if fmt.static and not fmt.dynamic:
        parts[".input_scale"] = torch.tensor(INPUT_ABSMAX / fmt.codes.max)
    config = fmt.config(shape, 0)
    if full_precision and fmt.heeds_full_precision:
        config |= {"full_precision_matrix_mult": True}
    encoded = torch.tensor(list(json.dumps(config).encode()), dtype=torch.uint8)
    return {suffix[1:]: part for suffix, part in parts.items()} | {"comfy_quant": encoded}


def weights(shape: tuple[int, int], device: str, seed: int = 0) -> Tensor:
    """Normal weights of variance 1 / in, bfloat16 [out, in]."""
    generator = torch.Generator(device).manual_seed(seed)
    return (torch.randn(shape, generator=generator, device=device) / shape[1] ** 0.5).bfloat16()


def operations(name: str, device: str) -> Any:
    """ComfyUI's layer classes for a file of one format ("bf16" or ours)."""
    import comfy.ops

    config = None if name == BF16 else SimpleNamespace(quant_config={"mixed_ops": True})
    return comfy.ops.pick_operations(torch.bfloat16, torch.bfloat16, torch.device(device), model_config=config)


def linear(name: str, shape: tuple[int, int], device: str) -> Any:
    """A linear layer of ComfyUI, [out, in], without bias."""
    layer = operations(name, device).Linear(shape[1], shape[0], bias=False, device=device, dtype=torch.bfloat16)
    weight_OI = weights(shape, device)
    layer.load_state_dict({"weight": weight_OI} if name == BF16 else stored(weight_OI, FORMATS[name]))
    return layer


def supported(name: str, device: str) -> bool:
    """Whether ComfyUI has native matmuls in a format on a device."""
    import comfy.model_management as management

    asks = {"float8_e4m3fn": management.supports_fp8_compute, "nvfp4": management.supports_nvfp4_compute,
            "mxfp8": management.supports_mxfp8_compute}  # fmt: skip
    return name == BF16 or asks.get(FORMATS[name].marked, lambda _: True)(torch.device(device))


def kept_db(wanted: Tensor, found: Tensor) -> float:
    """Signal-to-error ratio in dB."""
    return float(sqnr_db(wanted[None], found[None]))


def milliseconds(calls: Mapping[str, Callable[[], Any]], rounds: int, repeats: int, device: str) -> dict[str, float]:
    """Median time of each call in milliseconds. Calls alternate, so that a warm GPU affects all alike."""

    def wait() -> None:
        if device != "cpu":
            torch.cuda.synchronize()

    taken: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds + 1):  # the first warms up
        for name, call in calls.items():
            wait()
            start = time.perf_counter()
            for _ in range(repeats):
                call()
            wait()
            if turn:
                taken[name].append((time.perf_counter() - start) / repeats * 1e3)
    return {name: sorted(some)[len(some) // 2] for name, some in taken.items()}


def parser(doc: str) -> argparse.ArgumentParser:
    """Options of these benchmarks."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--comfyui-dir", help="ComfyUI's folder (COMFYUI_DIR)")
    made.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    made.add_argument("--rounds", type=int, default=9, help="repeats of all formats")
    made.add_argument("--json", type=Path, help="write all results to this file")
    return made


def entered(args: argparse.Namespace) -> dict[str, str]:
    """Import ComfyUI's operations; returns versions and device."""
    folder = tree.folder_of(args.comfyui_dir)
    sys.path.insert(0, str(folder))
    sys.argv = ["main.py", *tree.FLAGS[args.device], *(["--supports-fp8-compute"] if args.device == "cpu" else [])]
    importlib.import_module("comfy.options").enable_args_parsing()
    importlib.import_module("comfy.ops")
    torch.set_grad_enabled(False)
    return {
        "device": torch.cuda.get_device_name() if args.device == "cuda" else "cpu",
        "comfyui": tree.version(folder), "comfy_kitchen": metadata.version("comfy-kitchen"), "torch": torch.__version__,
    }  # fmt: skip
