"""Functions that run in the real ComfyUI's own process, for the tests in this folder; see `processes.py`.

Importing ComfyUI changes the process: it parses the command line, logs, sets torch's flags and creates folders. All
work uses ComfyUI's own functions: its loader, `apply_model` and its sampler. Only torchvision and torchaudio are
replaced if they are missing: ComfyUI imports both for models that no test runs.
"""

from __future__ import annotations

import logging
import os
import runpy
import sys
import types
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar
from unittest.mock import patch

if TYPE_CHECKING:
    from torch import Tensor

STAND_INS = ("torchvision", "torchaudio")


class StandIn(types.ModuleType):
    """A replacement for a missing package: any name can be imported from it and does nothing."""

    __path__: ClassVar[list[str]] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


class StandInFinder(MetaPathFinder, Loader):
    """Finds missing packages, last of all."""

    def find_spec(self, name: str, *_: Any) -> ModuleSpec | None:
        return ModuleSpec(name, self, is_package=True) if name.partition(".")[0] in STAND_INS else None

    def create_module(self, spec: ModuleSpec) -> types.ModuleType:
        return StandIn(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


FOREVER = ExitStack()
"""Contexts that last as long as the process."""


def start(tree: Path, work: Path, *flags: str) -> None:
    """Import ComfyUI as its own `main.py` would be started, with these flags."""
    os.environ["OMP_NUM_THREADS"] = "1"  # more are slower on a machine that has other work
    sys.argv = ["main.py", "--base-directory", str(work), *flags]
    sys.path.insert(0, str(tree))
    import comfy.options

    comfy.options.enable_args_parsing()
    sys.meta_path.append(StandInFinder())
    import comfy.sd
    import torch

    FOREVER.enter_context(torch.inference_mode())


def serve(tree: Path, work: Path, *flags: str) -> None:
    """Run ComfyUI's own `main.py`, server and all, until the process ends; what it says goes to a file."""
    os.environ["OMP_NUM_THREADS"] = "1"
    log = os.open(work / "log", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    script = str(tree / "main.py")
    sys.argv = [script, "--base-directory", str(work), *flags]
    sys.path.insert(0, str(tree))
    sys.meta_path.append(StandInFinder())
    runpy.run_path(script, run_name="__main__")


@contextmanager
def messages() -> Iterator[list[str]]:
    """Warnings inside a block, logged or by Python's warnings."""
    told: list[str] = []
    handler, root = logging.Handler(logging.WARNING), logging.getLogger()
    handler.emit = lambda record: told.append(record.getMessage())  # type: ignore[method-assign]
    root.addHandler(handler)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield told
    finally:
        root.removeHandler(handler)
        told += [str(warning.message) for warning in caught]


MODELS: dict[str, Any] = {}
"""Loaded models (ModelPatcher) by the test's names."""


def load(
    path: Path, key: str, loader: str = "diffusion_model", device: Mapping[str, bool] | None = None
) -> dict[str, Any]:
    """Load a model with one of ComfyUI's loaders, and say what became of every linear layer.

    The loaders are what stands behind its nodes "Load Diffusion Model" and "Load Checkpoint".

    `device` says what questions about the device are answered while the model loads: on a CPU ComfyUI computes in
    float32 whatever the file holds, and with {"should_use_bf16": true} it chooses what it would on a GPU.
    """
    import comfy.model_management
    import comfy.sd

    with ExitStack() as stack:
        told = stack.enter_context(messages())
        for question, answer in (device or {}).items():
            stack.enter_context(patch.object(comfy.model_management, question, return_value=answer))
        if loader == "diffusion_model":
            MODELS[key] = comfy.sd.load_diffusion_model(str(path))
        else:
            MODELS[key] = comfy.sd.load_checkpoint_guess_config(str(path), output_vae=False, output_clip=False)[0]
    model = MODELS[key].model
    return {
        "model": type(model).__name__,
        "dtype": str(model.get_dtype_inference()),
        "layers": {name: describe(module) for name, module in linears(MODELS[key])},
        "warnings": told,
    }


def describe(module: Any) -> dict[str, Any]:
    """One linear layer as ComfyUI holds it."""
    weight = module.weight
    stored = getattr(weight, "_qdata", None)
    factors = None if stored is None else weight._params.scale
    scale = getattr(module, "input_scale", None)
    return {
        "class": f"{type(module).__module__}.{type(module).__qualname__}",
        "quant_format": getattr(module, "quant_format", None),
        "weight_class": type(weight.data).__name__ if stored is None else type(weight).__name__,
        "weight_dtype": str(weight.dtype if stored is None else stored.dtype),
        "weight_shape": list(weight.shape),
        "weight_scale": None if factors is None or factors.numel() > 1 else factors.item(),
        "layout": getattr(weight, "_layout_cls", None),
        "stored": None if stored is None else shape_of(stored),
        "params": {} if stored is None else {name: shape_of(value) for name, value in vars(weight._params).items()},
        "input_scale": None if scale is None else scale.item(),
        "input_scale_dtype": None if scale is None else str(scale.dtype),
        "full_precision": getattr(module, "_full_precision_mm", None),
    }


def shape_of(value: Any) -> Any:
    """A tensor's dtype and shape, or a value."""
    return [str(value.dtype).removeprefix("torch."), *value.shape] if hasattr(value, "shape") else value


def weights(key: str) -> dict[str, Tensor]:
    """What ComfyUI dequantizes each quantized weight of a loaded model to, by layer."""
    return {
        name: module.weight.dequantize() for name, module in linears(MODELS[key]) if getattr(module, "quant_format", 0)
    }


def adapt(key: str, adapted: str, lora: Path, part: int | None = None) -> list[str]:
    """A loaded model with a LoRA: the warnings. `part` is how many bytes are loaded; the rest is cast in use."""
    import comfy.sd
    from comfy.utils import load_torch_file

    with messages() as said:
        patcher, _ = comfy.sd.load_lora_for_models(MODELS[key], None, load_torch_file(str(lora)), 1.0, 0.0)
    if part is not None:
        load_all = patcher.load
        patcher.load = lambda device=None, force_patch_weights=False, **_: load_all(device, part, force_patch_weights)
    MODELS[adapted] = patcher
    return said


def evaluate_without_kernels(**request: Any) -> tuple[dict[str, Tensor], list[str]]:
    """`evaluate` where the products of MXFP8 and NVFP4 fail in a way that kitchen foresees: it then multiplies what the
    codes of both sides mean. Its CPU kernels for them fail in a way that it does not foresee.
    """
    import comfy_kitchen

    missing = RuntimeError("no kernel for this product")
    with (
        patch.object(comfy_kitchen, "scaled_mm_mxfp8", side_effect=missing),
        patch.object(comfy_kitchen, "scaled_mm_nvfp4", side_effect=missing),
    ):
        found, told = evaluate(**request)
    return found, [warning for warning in told if str(missing) not in warning]


def evaluate(key: str, given: Mapping[str, Tensor], record: bool = False) -> tuple[dict[str, Tensor], list[str]]:
    """The predicted velocity of a loaded model, through `apply_model`, in one batch; and the warnings.

    Given: x [N, 16, H, W], sigma [N], context [N, T, C], y [N, V]. Found: velocity like x; with `record` also the
    input and output of every linear layer, as LAYER.in and LAYER.out.
    """
    import comfy.model_management

    patcher = MODELS[key]
    found: dict[str, Tensor] = {}
    with ExitStack() as stack:
        told = stack.enter_context(messages())
        comfy.model_management.load_models_gpu([patcher])
        if record:
            for name, module in linears(patcher):
                stack.callback(module.register_forward_hook(keep(found, name)).remove)
        denoised = patcher.model.apply_model(given["x"], given["sigma"], c_crossattn=given["context"], y=given["y"])
    found["velocity"] = (given["x"] - denoised) / given["sigma"].reshape(-1, 1, 1, 1)
    return found, told


def keep(found: dict[str, Any], name: str) -> Callable[..., None]:
    """A hook that keeps a layer's input and output."""

    def hook(_module: Any, inputs: tuple[Any, ...], output: Any) -> None:
        found[f"{name}.in"], found[f"{name}.out"] = inputs[0].clone(), output.clone()

    return hook


def sample(
    key: str, given: Mapping[str, Tensor], steps: int, cfg: float, by_hand: bool = False, part: int | None = None
) -> tuple[dict[str, Any], list[str]]:
    """Euler steps of ComfyUI's sampler from sigma 1 to 0; and the warnings.

    Given: x [N, 16, H, W] (the noise), context [N, T, C], y [N, V]. Found: latents like x, as the model sees them; with
    `by_hand` also the absmax of each linear layer's inputs, by hooks of this file; and the layers that were left out
    where only `part` bytes of the model may be loaded, so that the rest is cast when it is used.
    """
    import comfy.model_patcher

    patcher, absmax = MODELS[key], {}
    modules = dict(linears(patcher))
    with ExitStack() as stack:
        told = stack.enter_context(messages())
        if part is not None:
            load_all = comfy.model_patcher.ModelPatcher.load

            def load_part(self: Any, device_to: Any = None, force_patch_weights: bool = False, **_: Any) -> Any:
                return load_all(self, device_to, lowvram_model_memory=part, force_patch_weights=force_patch_weights)

            stack.enter_context(patch.object(comfy.model_patcher.ModelPatcher, "load", load_part))
        if by_hand:
            for name, module in modules.items():
                stack.callback(module.register_forward_hook(keep_absmax(absmax, name)).remove)
        result = euler(patcher, given, steps, cfg)
        left_out = [name for name, module in modules.items() if hasattr(module, "prev_comfy_cast_weights")]
    latents = patcher.model.process_latent_in(result).float()
    return {"latents": latents, "absmax": absmax, "left out": left_out}, told


def euler(patcher: Any, given: Mapping[str, Tensor], steps: int, cfg: float) -> Any:
    """What the sampler node does; the negative conditioning is zeros."""
    import comfy.sample
    import comfy.samplers
    import torch

    x, context, y = given["x"], given["context"], given["y"]
    return comfy.sample.sample_custom(
        patcher,
        x,
        cfg,
        comfy.samplers.sampler_object("euler"),
        1 - torch.arange(steps + 1) / steps,
        [[context, {"pooled_output": y}]],
        [[torch.zeros_like(context), {"pooled_output": torch.zeros_like(y)}]],
        torch.zeros_like(x),
        disable_pbar=True,
        seed=0,
    )


def on_two_devices(key: str, both: str) -> None:
    """What the node MultiGPU CFG Split gives; `cpu` and `cpu:0` are two devices to everything that compares them."""
    import torch

    MODELS[both] = MODELS[key].clone()
    copy = MODELS[both].deepclone_multigpu(torch.device("cpu", 0))
    copy.is_multigpu_base_clone = True
    MODELS[both].set_additional_models("multigpu", [copy])
    MODELS[both].match_multigpu_clones()
    MODELS["copy"] = copy


def linears(patcher: Any) -> list[tuple[str, Any]]:
    """Every linear layer of a loaded model."""
    return [(name, m) for name, m in patcher.model.diffusion_model.named_modules() if hasattr(m, "in_features")]


def keep_absmax(found: dict[str, float], name: str) -> Callable[..., None]:
    """A hook that keeps the largest |x| of a layer's inputs."""

    def hook(_module: Any, inputs: tuple[Any, ...], _output: Any) -> None:
        found[name] = max(found.get(name, 0.0), float(inputs[0].abs().amax()))

    return hook


def hooks(key: str) -> int:
    """How many hooks hang on a model's modules."""
    stores = ("_forward_pre_hooks", "_forward_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs")
    return sum(len(getattr(module, store)) for module in MODELS[key].model.modules() for store in stores)


RECORDERS: dict[str, Any] = {}
"""What our node Record Activations gave beside each MODEL."""


def record(key: str, recorded: str) -> None:
    """Our node Record Activations behind a loaded model; `recorded` names what it gives."""
    MODELS[recorded], RECORDERS[recorded] = give("RecordActivations", model=MODELS[key])


def give(kind: str, stats: str | None = None, **inputs: Any) -> Any:
    """What one of our nodes gives; `stats` is the name of a recorder."""
    from convert_to_quant.comfyui_nodes import nodes

    node = getattr(nodes, kind)()
    recorder = {} if stats is None else {"stats": RECORDERS[stats]}
    given = getattr(node, node.FUNCTION)(**recorder, **inputs)
    return given["result"] if isinstance(given, dict) else given


def renamed(layers: list[str]) -> dict[str, str]:
    """What ComfyUI calls the layers of a HunyuanVideo file."""
    import comfy.supported_models

    config = comfy.supported_models.HunyuanVideo({})
    files = {layer: config.process_unet_state_dict({f"{layer}.weight": None}) for layer in layers}
    return {layer: next(iter(file)).removesuffix(".weight") for layer, file in files.items()}


def diffusers_names(function: str, config: Mapping[str, int]) -> dict[str, list[Any]]:
    """Where ComfyUI puts the layers of a file in diffusers' layout: {name in the file: [its own, first row, row after
    the last]}, without rows where it is the whole layer."""
    import comfy.utils

    found: dict[str, Any] = {}
    for name, place in getattr(comfy.utils, function)(dict(config)).items():
        target, part = (place, None) if isinstance(place, str) else place[:2]
        if name.endswith(".weight") and target.endswith(".weight"):
            rows = [] if part is None else [part[1], part[1] + part[2]]
            found[name.removesuffix(".weight")] = [target.removesuffix(".weight"), *rows]
    return found


if __name__ == "__main__":  # for the script that makes images of the editor
    serve(Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:])
