"""A double of the few interfaces of ComfyUI that our nodes use; `tests/comfyui` runs them in the real one.

Wrappers, clones and the order of calls are as in ComfyUI 0.33: a patcher keeps wrappers by kind and key and copies them
when it is cloned, all clones share one model, a guider runs OUTER_SAMPLE around a sampling, the model runs APPLY_MODEL
around each call and finds its wrappers in `transformer_options`. Its linear layers are no `nn.Linear`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

QKV, MLP, FINAL = "double_blocks.0.img_attn.qkv", "double_blocks.0.img_mlp.0", "final_layer.linear"
SHAPES = {QKV: (48, 16), MLP: (64, 16), FINAL: (16, 16)}


class CONST:
    """What marks flow models; others have `object` there."""


class CastLinear(nn.Module):
    """A linear layer as ComfyUI has them."""

    def __init__(self, out_features: int, in_features: int) -> None:
        super().__init__()
        self.out_features, self.in_features = out_features, in_features
        generator = torch.Generator().manual_seed(out_features)
        self.weight = nn.Parameter(torch.randn(out_features, in_features, generator=generator), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T.to(x.dtype)


class DiffusionModel(nn.Module):
    """Layers by dotted names. They all see the input, each at a magnitude of its own."""

    def __init__(self, shapes: Mapping[str, tuple[int, int]]) -> None:
        super().__init__()
        self.magnitudes = {name: 2.0**number for number, name in enumerate(shapes)}
        for name, shape in shapes.items():
            parent: nn.Module = self
            *above, last = name.split(".")
            for part in above:
                if not hasattr(parent, part):
                    parent.add_module(part, nn.Module())
                parent = getattr(parent, part)
            parent.add_module(last, CastLinear(*shape))

    def forward(self, x: Tensor) -> Tensor:
        for name, magnitude in self.magnitudes.items():
            y = self.get_submodule(name)(x * magnitude)
        return x + y[..., : x.shape[-1]].tanh()


@dataclass
class Executor:
    """Calls wrappers one inside the other."""

    original: Callable[..., Any]
    class_obj: Any
    wrappers: list[Callable[..., Any]]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self.wrappers:
            return self.original(*args, **kwargs)
        return self.wrappers[0](Executor(self.original, self.class_obj, self.wrappers[1:]), *args, **kwargs)


class Model:
    """ComfyUI's BaseModel."""

    def __init__(self, shapes: Mapping[str, tuple[int, int]], sampling: type) -> None:
        self.diffusion_model = DiffusionModel(shapes)
        self.model_sampling = sampling()

    def apply_model(
        self, x: Tensor, t: Tensor, c_concat: Any = None, c_crossattn: Any = None, control: Any = None,
        transformer_options: Mapping[str, Any] = {},
    ) -> Tensor:  # fmt: skip
        def call(x: Tensor, *_: Any) -> Any:
            return self.diffusion_model(x)

        wrappers = all_of(transformer_options["wrappers"].get("apply_model", {}))
        return Executor(call, self, wrappers)(x, t, c_concat, c_crossattn, control, transformer_options)


def all_of(by_key: Mapping[str, list[Any]]) -> list[Any]:
    return [wrapper for wrappers in by_key.values() for wrapper in wrappers]


class Patcher:
    """ComfyUI's ModelPatcher."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.wrappers: dict[str, dict[str, list[Any]]] = {}
        self.copies: list[Patcher] = []

    def get_additional_models_with_key(self, key: str) -> list[Patcher]:
        return self.copies if key == "multigpu" else []

    def clone(self) -> Patcher:
        twin = Patcher(self.model)
        twin.wrappers = {kind: {key: list(some) for key, some in by.items()} for kind, by in self.wrappers.items()}
        twin.copies = list(self.copies)
        return twin

    def add_wrapper_with_key(self, kind: str, key: str, wrapper: Any) -> None:
        self.wrappers.setdefault(kind, {}).setdefault(key, []).append(wrapper)

    def get_wrappers(self, kind: str, key: str) -> list[Any]:
        return self.wrappers.get(kind, {}).get(key, [])

    def remove_wrappers_with_key(self, kind: str, key: str) -> None:
        self.wrappers.get(kind, {}).pop(key, None)


class Guider:
    """Samples."""

    def __init__(self, patcher: Patcher, happen: Callable[[int], None] | None = None) -> None:
        self.model_patcher, self.happen = patcher, happen

    def sample(self, noise: Tensor, sigmas: tuple[float, ...] = (1.0, 0.5)) -> Tensor:
        return Executor(self._sample, self, all_of(self.model_patcher.wrappers.get("outer_sample", {})))(noise, sigmas)

    def _sample(self, noise: Tensor, sigmas: tuple[float, ...]) -> Tensor:
        x = noise
        for step, sigma in enumerate(sigmas):
            if self.happen is not None:
                self.happen(step)
            level = torch.full((len(x),), sigma)
            options = {"sigmas": level, "wrappers": self.model_patcher.wrappers}
            patchers = (self.model_patcher, *self.model_patcher.copies)
            parts = zip(x.chunk(len(patchers)), level.chunk(len(patchers)), patchers, strict=True)
            x = torch.cat([p.model.apply_model(part, at, transformer_options=options) for part, at, p in parts])
        return x


@dataclass
class ComfyUI:
    """The double."""

    root: Path
    modules: SimpleNamespace
    progress: list[tuple[str | None, int, int]]
    shapes = SHAPES
    guider = Guider
    EPS, CONST = object, CONST

    @staticmethod
    def model(shapes: Mapping[str, tuple[int, int]] = SHAPES, sampling: type = CONST) -> Patcher:
        """A MODEL."""
        return Patcher(Model(shapes, sampling))

    @staticmethod
    def hooks(patcher: Patcher) -> int:
        """Hooks on the model's modules."""
        return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in patcher.model.diffusion_model.modules())

    @property
    def models(self) -> Path:
        """The first folder of diffusion models."""
        return self.root / "models" / "diffusion_models"


@pytest.fixture
def comfyui(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ComfyUI:
    """ComfyUI's modules, and its folders."""
    folders = {
        "diffusion_models": [tmp_path / "models" / "diffusion_models", tmp_path / "other" / "unet"],
        "checkpoints": [tmp_path / "models" / "checkpoints"],
    }
    for folder in (*folders["diffusion_models"], *folders["checkpoints"], tmp_path / "input", tmp_path / "output"):
        folder.mkdir(parents=True)

    def get_filename_list(kind: str) -> list[str]:
        return [str(file.relative_to(root)) for root in folders[kind] for file in root.rglob("*") if file.is_file()]

    def get_full_path(kind: str, name: str) -> str | None:
        return next((str(root / name) for root in folders[kind] if (root / name).is_file()), None)

    progress: list[tuple[str | None, int, int]] = []

    class ProgressBar:
        """Keeps the node, what is done, and of what."""

        def __init__(self, total: int, node_id: str | None = None) -> None:
            self.total, self.node_id = total, node_id

        def update_absolute(self, value: int, total: int | None = None) -> None:
            progress.append((self.node_id, value, self.total if total is None else total))

    contents: dict[str, dict[str, Any]] = {
        "comfy": {"__path__": []},
        "comfy.patcher_extension": {
            "WrappersMP": SimpleNamespace(OUTER_SAMPLE="outer_sample", APPLY_MODEL="apply_model")
        },
        "comfy.model_sampling": {"CONST": CONST},
        "comfy.model_management": {
            "get_torch_device": lambda: torch.device("cpu"),
            "throw_exception_if_processing_interrupted": lambda: None,
        },
        "comfy.utils": {"ProgressBar": ProgressBar},
        "folder_paths": {
            "get_filename_list": get_filename_list,
            "get_full_path": get_full_path,
            "get_folder_paths": lambda kind: [str(root) for root in folders[kind]],
            "get_output_directory": lambda: str(tmp_path / "output"),
            "get_input_directory": lambda: str(tmp_path / "input"),
        },
        "server": {"PromptServer": SimpleNamespace(instance=None)},
    }
    for name, content in contents.items():
        module = ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    modules = SimpleNamespace(server=sys.modules["server"], model_management=sys.modules["comfy.model_management"])
    return ComfyUI(tmp_path, modules, progress)


@pytest.fixture
def noise() -> Tensor:
    """[2 images, 5 tokens, 16]."""
    return torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0))
