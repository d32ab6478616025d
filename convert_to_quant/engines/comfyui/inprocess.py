"""Engine that runs ComfyUI's own models in this process, without a server, and records their layer inputs.

ComfyUI runs dozens of families that our other engines do not. Its loader detects the family, its sampler takes the
steps, and its classes convert a conditioning to what the network needs. This module adds the inputs
(`inprocess_conditions.py`) and maps recorded modules to layers of the file.

The file is loaded as ComfyUI's nodes load it. ComfyUI renames, splits and fuses tensors; its functions run once more on
row numbers (`provenance.py`) to find which rows of which tensor each weight came from. Sampling takes Euler steps from
pure noise. Flow models use sigma 1 to 0 in equal steps, as in `engines.diffusers`. Others use ComfyUI's "normal"
schedule, and sigma s is recorded as the fraction of noise s / (1 + s). Images are sampled one at a time, since not
every model accepts a batch.

FP8 layers compute in full precision while recorded, whatever the hardware and the file's scales.

Precision. float32 on a CPU; ComfyUI's choice on a GPU.

Limits. Layers outside the diffusion model (text encoders in the same file) do not run. Memory is managed by ComfyUI,
which offloads parts of a model that does not fit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ... import names
from ...checkpoint import Checkpoint
from ...errors import CalibrationError, LoraError, UnsupportedModelError
from ...families.comfyui import IMAGE, SOUND, VIDEO, Conditions, Scene, measure
from ...families.running import Shapes
from ...layers import LayerTable
from ...lora import Lora
from ...options import SAMPLES, STEPS, RunOptions, ShownOptions
from ...recorder import find_linears, layers_to_record, record
from ...telling import Advance, Progress
from .. import noise, sizes
from ..provenance import trace
from ..session import Batch, Observation, Session
from . import inprocess_tree as tree
from .inprocess_conditions import conditions_of, draw, wanted

PATCH_PIXELS = 16
"""Pixels per token along each dimension, for models whose latents have only a length."""


class Model:
    """A file loaded by ComfyUI.

    Attributes:
        patcher: ComfyUI's ModelPatcher.
        family: name of its class in `comfy.model_base`.
        network: the recorded module.
        feeds: module of the network -> layers of the file with the same input.
        table: the file's layers.
    """

    def __init__(self, checkpoint: Checkpoint, table: LayerTable, patcher: Any) -> None:
        self.checkpoint = checkpoint
        self.table = table
        self.patcher = patcher
        self.family = type(patcher.model).__name__
        self.network = patcher.model.diffusion_model
        self._wants: Conditions = conditions_of(kind.__name__ for kind in type(patcher.model).__mro__)
        self.feeds = _feeds(checkpoint, table, patcher.model)

    @property
    def is_flow(self) -> bool:
        """Whether sigma is the fraction of noise, in [0, 1]."""
        from comfy.model_sampling import CONST

        return isinstance(self.patcher.model.model_sampling, CONST)

    def scene(self, shown: ShownOptions) -> Scene:
        """The size of a sample in this model's latents."""
        made = self.patcher.model.latent_format
        *pixels, frames, text_tokens = sizes.usual(shown.size)
        step = self._wants.multiple
        height, width = (
            max(math.ceil(side / made.spacial_downscale_ratio / step) * step, self._wants.smallest) for side in pixels
        )
        scene = Scene(
            self.network,
            self.patcher.model.model_config.unet_config,
            made.latent_channels,
            height,
            width,
            max(1 + math.ceil((frames - 1) / made.temporal_downscale_ratio), self._wants.frames),
            math.prod(math.ceil(side / PATCH_PIXELS) for side in pixels),
            text_tokens,
        )
        with self._understood("measure"):
            wanted(self._wants, scene)
        return scene

    def latents(self, scene: Scene, seed: int, number: int) -> list[Tensor]:
        """Pure noise: the latents of one trajectory; several tensors for a model of video and sound."""
        made = self.patcher.model.latent_format
        usual = {1: SOUND, 2: IMAGE, 3: VIDEO}[made.latent_dimensions]
        batch = measure(self._wants.batch, scene)
        shapes = [tuple(measure(size, scene) for size in shape) for shape in self._wants.latents or (usual,)]
        drawn = [noise.latents((batch, *shape), seed, number * len(shapes) + turn) for turn, shape in enumerate(shapes)]
        return [values[0] for values in drawn]

    def conditioning(self, scene: Scene, way: noise.Conditioning, seed: int, number: int) -> dict[str, Any]:
        """A random conditioning, in the form of ComfyUI's nodes."""
        return draw(self._wants, scene, way, seed, number, as_encoded=self._as_encoded)

    def sigmas(self, steps: int) -> Tensor:
        """Noise levels of a trajectory and the final level, [steps + 1]."""
        if self.is_flow:
            return 1 - torch.arange(steps + 1) / steps
        from comfy.samplers import calculate_sigmas

        with self._understood("schedule"):
            sigmas: Tensor = calculate_sigmas(self.patcher.model.model_sampling, "normal", steps)
        return sigmas

    def level(self, _: tuple[Any, ...], arguments: dict[str, Any]) -> Tensor | None:
        """The fraction of noise in an evaluation."""
        sigma: Tensor | None = arguments.get("transformer_options", {}).get("sigmas")
        return sigma if sigma is None or self.is_flow else sigma / (1 + sigma)

    def sample(
        self,
        latents: Sequence[Tensor],
        conditioning: Mapping[str, Any],
        sigmas: Tensor,
        *,
        patcher: Any = None,
        seed: int = 0,
        after_step: Callable[[], object] = lambda: None,
    ) -> Any:
        """Sample with ComfyUI's Euler sampler.

        Args:
            latents: see `latents`.
            conditioning: see `conditioning`.
            sigmas: see `sigmas`.
            patcher: the model with adapters.
            seed: for models that draw noise themselves.
            after_step: called after every evaluation.

        Returns:
            The sample, as ComfyUI passes it to a VAE.
        """
        from comfy.model_sampling import IMG_TO_IMG, IMG_TO_IMG_FLOW
        from comfy.nested_tensor import NestedTensor
        from comfy.samplers import CFGGuider, sampler_object

        start, empty = (
            parts[0] if len(parts) == 1 else NestedTensor(parts) for parts in (latents, [x * 0 for x in latents])
        )
        if isinstance(self.patcher.model.model_sampling, IMG_TO_IMG | IMG_TO_IMG_FLOW):  # it starts from an image
            start, empty = empty, self._as_encoded(latents[0])
        entries = dict(conditioning)
        cond = [[entries.pop("cross_attn", None), entries]]
        with self._understood("run"):
            guider = CFGGuider(patcher or self.patcher)
            guider.inner_set_conds({"positive": cond})
            guider.set_cfg(1.0)
            return guider.sample(
                start,
                empty,
                sampler_object("euler"),
                sigmas,
                callback=lambda *_: after_step(),
                disable_pbar=True,
                seed=seed,
            )

    def adapted(self, adapters: Sequence[Lora]) -> Any:
        """The model with adapters, applied by ComfyUI's loader."""
        import comfy.sd
        import comfy.utils

        patcher = self.patcher
        for adapter in adapters:
            path = adapter.checkpoint.path
            with tree.understood("use an adapter on", path, self.family):
                tensors = comfy.utils.load_torch_file(str(path), safe_load=True)
                made, _ = comfy.sd.load_lora_for_models(patcher, None, tensors, adapter.strength, 0.0)
            if sum(map(len, made.patches.values())) == sum(map(len, patcher.patches.values())):
                raise LoraError(f"ComfyUI cannot apply any of its weights to this {self.family} model", path=path)
            patcher = made
        return patcher

    def _as_encoded(self, latents: Tensor) -> Tensor:
        """The network's latents as a VAE outputs them; several images are stacked in channels."""
        channels = self.patcher.model.latent_format.latent_channels
        parts = [self.patcher.model.process_latent_out(part) for part in torch.split(latents, channels, dim=1)]
        return torch.cat(parts, dim=1).to(self.patcher.load_device)  # not every family moves them to the device

    def _understood(self, doing: str) -> Any:
        return tree.understood(doing, self.checkpoint.path, self.family)


def load(checkpoint: Checkpoint, table: LayerTable) -> Model:
    """Load a file as ComfyUI's nodes do. Call it inside `inprocess_tree.imported`."""
    import comfy.sd

    if len(checkpoint.files) > 1:
        raise UnsupportedModelError(
            f"it has {len(checkpoint.files)} files, and ComfyUI loads only single files", path=checkpoint.path
        )
    path = str(checkpoint.files[0].path)
    prefix = _prefix(checkpoint)
    whole = bool(prefix) and not all(name.startswith(prefix) for name in checkpoint.tensors)
    with tree.understood("load", checkpoint.path):
        if whole:
            patcher = comfy.sd.load_checkpoint_guess_config(path, output_vae=False, output_clip=False)[0]
        else:
            patcher = comfy.sd.load_diffusion_model(path)
        for module in find_linears(patcher.model.diffusion_model).values():
            if hasattr(module, "_full_precision_mm"):
                module._full_precision_mm = True  # type: ignore[assignment]  # as in layers declared full-precision
        return Model(checkpoint, table, patcher)


def _prefix(checkpoint: Checkpoint) -> str:
    """Prefix of the diffusion model's tensors, as ComfyUI detects it; "" if there is none."""
    from comfy.model_detection import unet_prefix_from_state_dict

    prefix: str = unet_prefix_from_state_dict(dict.fromkeys(checkpoint.tensors))
    return prefix if any(name.startswith(prefix) for name in checkpoint.tensors) else ""


def _feeds(checkpoint: Checkpoint, table: LayerTable, model: Any) -> dict[str, list[str]]:
    """Layers of the file that each linear module of the network is made of, traced through ComfyUI's functions."""
    prefix = _prefix(checkpoint)
    found = table.tensor_shapes(checkpoint)
    shapes = {name.removeprefix(prefix): shape for name, shape in found.items() if name.startswith(prefix)}
    with tree.understood("name the layers of", checkpoint.path, type(model).__name__):
        traced = trace(partial(_as_loaded, model.model_config, shapes), shapes)
    known = table.shapes()
    feeds = {}
    for module in find_linears(model.diffusion_model):
        tensors = dict.fromkeys(piece.tensor for piece in traced.get(module + names.WEIGHT, ()))
        feeds[module] = [layer for name in tensors if (layer := prefix + name.removesuffix(names.WEIGHT)) in known]
    return feeds


def _as_loaded(config: Any, shapes: Shapes, fed: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors as ComfyUI's loader converts them, by the network's names; only matrices of row numbers."""
    import comfy.utils
    from comfy import model_detection

    originals = {f"\0{name}": values for name, values in fed.items()}  # ComfyUI may drop tensors
    like = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    if model_detection.detect_unet_config(like, "") is None:
        converted = model_detection.convert_diffusers_mmdit(dict(fed), "")
        if converted is None:
            places = comfy.utils.unet_to_diffusers(config.unet_config)
            converted = {places[name]: values for name, values in fed.items() if name in places}
        fed = converted
    loaded = config.process_unet_state_dict(dict(fed))
    matrices = {
        name: values
        for name, values in loaded.items()
        if name.endswith(names.WEIGHT) and values.ndim == 2 and values.shape[1] == 1 and values.dtype == torch.int64
    }
    return {**matrices, **originals}


def observe(
    checkpoint: Checkpoint,
    table: LayerTable,
    folder: Path,
    shown: RunOptions,
    *,
    adapters: Sequence[Lora],
    session: Session,
    progress: Progress,
    warn: Callable[[str], object],
) -> Observation:
    """Run a checkpoint inside ComfyUI and record the inputs of its layers.

    Args:
        checkpoint: the open checkpoint.
        table: its layers; see `watched`.
        folder: ComfyUI's tree; see `inprocess_tree.folder_of`.
        shown: samples and sizes; at least one sample per kind of conditioning. Device: "cpu", "cuda" or "cuda:N".
        adapters: LoRA files. Ranges then cover the model with and without them.
        session: saves, resumes and shares the run.
        progress: called after every evaluation with evaluations done and in all.
        warn: called with ComfyUI's warnings.

    Raises:
        OptionError: ComfyUI cannot use the device.
        UnsupportedModelError: ComfyUI cannot run the model, or its inputs are unknown here.
        CalibrationError: ComfyUI cannot be imported, no layer is in the model, or inputs are not finite.
        LoraError: an adapter does not fit.
        StatisticsError: the session cannot be resumed.
    """
    samples, steps, seed = shown.samples or SAMPLES, shown.steps or STEPS, shown.seed
    with tree.imported(folder, shown.device) as messages, torch.inference_mode():
        model = load(checkpoint, table)
        scene = model.scene(shown)
        variants = {False: model.patcher, **({True: model.adapted(adapters)} if adapters else {})}
        shapes, feeds = watched(model)
        with record(model.network, shapes, feeds, model.level) as recording:

            def sample(batch: Batch, tick: Advance) -> None:
                (number,) = batch.numbers
                recording.at(None)
                latents = model.latents(scene, seed, number)
                recording.batch = len(latents[0])
                model.sample(
                    latents,
                    model.conditioning(scene, noise.way_of(number), seed, number),
                    model.sigmas(steps),
                    patcher=variants[batch.adapted],
                    seed=seed + number,
                    after_step=partial(tick, 1),
                )

            seen = session.run(
                recording,
                [
                    Batch(way, (number,), adapted)
                    for adapted in variants
                    for way, numbers in noise.ways(max(samples, len(noise.CONDITIONINGS))).items()
                    for number in numbers
                ],
                sample,
                checkpoint.path,
                steps=steps,
                progress=progress,
                engine="comfyui",
                comfyui=tree.version(folder),
                family=model.family,
                conditioning="noise",
                seed=seed,
                lora=sorted(adapter.checkpoint.path.name for adapter in adapters),
            )
    for text in messages.texts:
        warn(text)
    return seen


def watched(model: Model) -> tuple[dict[str, tuple[int, int]], dict[str, list[str]]]:
    """Arguments of `recorder.record`: the diffusion model's quantized layers, or all layers if none is quantized.

    Returns:
        {layer: (out, in)} and {module: layers with its input}.
    """
    known = model.table.shapes()
    layers = layers_to_record(known, model.table.diffusion, model.feeds)
    if not {layer for fed in model.feeds.values() for layer in fed}.intersection(layers):
        raise CalibrationError(
            f"none of its {len(layers)} layers is part of ComfyUI's {model.family} model", path=model.checkpoint.path
        )
    return {name: known[name] for name in layers}, model.feeds
