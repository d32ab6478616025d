"""Our command line with ComfyUI in its own process, as a person runs it, and what a test asks of it besides.

ComfyUI is imported here by the package itself, not by the test.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import tiny_models
from driver import StandInFinder

if TYPE_CHECKING:
    from torch import Tensor

    from convert_to_quant.stats import Statistics

VARIABLE = "COMFYUI_DIR"
"""Names the tree to the tests; the package has to be told by a flag."""

TREE = Path(os.environ.get(VARIABLE, ".")).resolve()


def start() -> None:
    """What the process is like before anything is asked."""
    del os.environ[VARIABLE]
    os.environ["OMP_NUM_THREADS"] = "1"  # more are slower on a machine that has other work
    sys.dont_write_bytecode = False  # to leave no trace in ComfyUI's folder is for the package to see to
    sys.argv = ["a test"]
    sys.meta_path.append(StandInFinder())


def command(words: list[str]) -> tuple[int, str]:
    """Our command line: its exit code, and what it says."""
    from convert_to_quant.cli import main

    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        code = main(words)
    return code, said.getvalue()


def observe(model: Path, stats: Path, *words: object) -> tuple[int, str]:
    """The same: observe a model in ComfyUI."""
    return command(["observe", *map(str, (model, "-o", stats, "--engine", "comfyui", "--comfyui-dir", TREE, *words))])


@contextlib.contextmanager
def comfyui() -> Iterator[None]:
    """ComfyUI, for what a test does with it itself."""
    import torch

    from convert_to_quant.engines.comfyui import inprocess_tree

    with inprocess_tree.imported(TREE, "cpu"), torch.inference_mode():
        yield


def families() -> list[str]:
    """What ComfyUI can detect, in its order."""
    with comfyui():
        import comfy.supported_models

        return [kind.__name__ for kind in comfy.supported_models.models]


def tiny(name: str, folder: Path, images: int) -> tuple[int, str, list[str]]:
    """Observe a tiny model of a family; one picture has loud conditioning. The last is what ComfyUI took it for."""
    from convert_to_quant.engines import noise
    from convert_to_quant.engines.comfyui import inprocess

    path = folder / "tiny.safetensors"
    with comfyui():
        tiny_models.save(name, path)
    height, width, frames = tiny_models.MODELS[name].size
    detected = []
    load = inprocess.load

    def loaded(*args: Any, **kwargs: Any) -> Any:
        model = load(*args, **kwargs)
        detected.append(type(model.patcher.model.model_config).__name__)
        return model

    ways = noise.CONDITIONINGS if images > 1 else (noise.OUTLIERS,)
    with (
        comfyui(),
        tiny_models.assuming(name),
        patch.object(inprocess, "load", loaded),
        patch.object(noise, "CONDITIONINGS", ways),
    ):
        told = observe(
            path, folder / "stats.safetensors", "--samples", images, "--steps", 1, "--height", height, "--width", width,
            "--frames", frames, "--text-tokens", 12,
        )  # fmt: skip
    return *told, detected


def folded(name: str, folder: Path) -> tuple[dict[str, list[float]], Statistics, int]:
    """Record a tiny model whose MLP folds its activation into its second layer: in INT8, without a call of the layer.

    Returns:
        {layer: [absmax, calls]} of what such layers meet, what was recorded, and how often an INT8 product was taken.
    """
    from convert_to_quant.checkpoint import open_checkpoint
    from convert_to_quant.engines import noise
    from convert_to_quant.engines.comfyui import inprocess
    from convert_to_quant.layers import find_layers
    from convert_to_quant.options import ShownOptions
    from convert_to_quant.recorder import record

    path = folder / "tiny.safetensors"
    met: dict[Any, list[float]] = {}
    with contextlib.ExitStack() as stack:
        stack.enter_context(comfyui())
        tiny_models.save(name, path)
        make_int8(path, r"(ffn\.2|mlp\.fc2)$")
        import comfy.ops

        fold = comfy.ops.linear_input_act

        def folding(linear: Any, x: Any, input_act: str) -> Any:
            met.setdefault(linear, []).append(float(comfy.ops.INPUT_ACT_EAGER[input_act](x).abs().max()))
            return fold(linear, x, input_act)

        stack.enter_context(patch.object(comfy.ops, "linear_input_act", folding))
        kitchen = comfy.ops.quant_ops.ck
        product = stack.enter_context(patch.object(kitchen, "int8_linear", wraps=kitchen.int8_linear))
        stack.enter_context(tiny_models.assuming(name))
        checkpoint = stack.enter_context(open_checkpoint(path))
        model = inprocess.load(checkpoint, find_layers(checkpoint))
        height, width, frames = tiny_models.MODELS[name].size
        scene = model.scene(ShownOptions(height=height, width=width, frames=frames, text_tokens=12))
        conditioning = model.conditioning(scene, noise.OUTLIERS, 0, 0)
        with record(model.network) as recording:
            model.sample(model.latents(scene, 0, 0), conditioning, model.sigmas(2))
        names = {module: layer for layer, module in model.network.named_modules()}
        found = {names[linear]: [max(absmax), len(absmax)] for linear, absmax in met.items()}
        return found, recording.statistics(), product.call_count


def make_int8(path: Path, layers: str) -> None:
    """Make the weights of some layers INT8, one scale per row."""
    import torch
    from safetensors.torch import load_file, save_file

    tensors = load_file(path)
    for layer in [key.removesuffix(".weight") for key in tensors if re.search(layers, key.removesuffix(".weight"))]:
        weight = tensors[f"{layer}.weight"].float()
        scale = weight.abs().amax(1, keepdim=True) / 127
        tensors[f"{layer}.weight"] = (weight / scale).round().to(torch.int8)
        tensors[f"{layer}.weight_scale"] = scale
        tensors[f"{layer}.comfy_quant"] = torch.tensor(list(b'{"format": "int8_tensorwise"}'), dtype=torch.uint8)
    save_file(tensors, path)


def same_inputs(path: Path, given: Mapping[str, Tensor], steps: int) -> dict[str, float]:
    """The largest input of each layer while a model paints from given latents and prompts, on a device with FP8.

    Args:
        path: the model.
        given: x [N, 16, H, W] (the noise), context [N, T, C], y [N, V].
        steps: of each.
    """
    from convert_to_quant.checkpoint import open_checkpoint
    from convert_to_quant.engines.comfyui import inprocess
    from convert_to_quant.layers import find_layers
    from convert_to_quant.recorder import record

    with comfyui(), open_checkpoint(path) as checkpoint:
        import comfy.model_management

        with patch.object(comfy.model_management, "supports_fp8_compute", return_value=True):
            model = inprocess.load(checkpoint, find_layers(checkpoint))
        shapes, feeds = inprocess.watched(model)
        with record(model.network, shapes, feeds) as recording:
            for x, context, y in zip(*(given[name].split(1) for name in ("x", "context", "y")), strict=True):
                conditioning = {"cross_attn": context, "pooled_output": y, "guidance": None}
                model.sample([x], conditioning, model.sigmas(steps))
        seen = recording.statistics()
    return dict(zip(seen.names, seen.absmax.tolist(), strict=True))


def diffusers_layout(name: str, folder: Path) -> tuple[list[int], dict[str, str]]:
    """A tiny model in its own layout and in diffusers', both observed; which layer of the second is part of which."""
    from safetensors.torch import load_file, save_file

    native, other = folder / "native.safetensors", folder / "diffusers.safetensors"
    with comfyui():
        import comfy.utils

        tiny_models.save(name, native)
        tensors = load_file(native)
        function, sizes, synonyms = LAYOUTS[name]
        split, parts = {}, {}
        for key, place in getattr(comfy.utils, function)(dict(sizes)).items():
            target, offset, change = (place, None, None) if isinstance(place, str) else (*place, None)[:3]
            if target not in tensors or re.search(synonyms, key):
                continue
            rows = tensors[target] if offset is None else tensors[target].narrow(*offset)
            split[key] = (rows if change is None else change(rows)).contiguous().clone()
            if key.endswith(".weight") and rows.ndim == 2:
                parts[key.removesuffix(".weight")] = target.removesuffix(".weight")
        save_file(split, other)
    codes = []
    for path in (native, other):
        with comfyui(), tiny_models.assuming(name):
            size = ("--height", 64, "--width", 64, "--text-tokens", 5)
            codes.append(observe(path, path.with_suffix(".stats"), "--samples", 3, "--steps", 1, *size)[0])
    return codes, parts


LAYOUTS: Mapping[str, tuple[str, Mapping[str, int], str]] = {
    "Flux": ("flux_to_diffusers", {"depth": 1, "depth_single_blocks": 1, "hidden_size": 128},
             r"to_qkv_mlp_proj|linear_in|linear_out|single.*attn.to_out"),
    "SD3": ("mmdit_to_diffusers", {"depth": 1, "num_blocks": 1}, r"$^"),
    "AuraFlow": ("auraflow_to_diffusers", {"n_double_layers": 1, "n_layers": 2}, r"$^"),
}  # fmt: skip
"""ComfyUI's function that says what diffusers calls a tensor, what it asks, and other names that it would take too."""


def stopped(after: int, *words: Any) -> int:
    """`observe`, interrupted when so many trajectories are painted: its exit code."""
    from convert_to_quant.engines.comfyui import inprocess

    sample, left = inprocess.Model.sample, iter(range(after))

    def counted(*args: Any, **kwargs: Any) -> Any:
        if next(left, None) is None:
            raise KeyboardInterrupt
        return sample(*args, **kwargs)

    with patch.object(inprocess.Model, "sample", counted):
        return observe(*words)[0]


def left_behind() -> list[str]:
    """What is there of ComfyUI: modules of its server, its folder on the path, words on the command line."""
    modules = [name for name in ("server", "execution", "nodes", "folder_paths") if name in sys.modules]
    return [*modules, *(path for path in sys.path if path == str(TREE)), *sys.argv[1:]]
