"""ComfyUI's own models as an engine: what their layers receive while they sample from noise, without a server.

Why it exists. ComfyUI runs dozens of families that no engine of ours does, and it is what most files are made for. Its
loader finds the family, its sampler takes the steps, its classes make of a conditioning what a network wants; so here
is only what it is shown (`inprocess_conditions.py`), and on which layer of the file an input is written down.

How it works. The file is loaded as its nodes would load it. ComfyUI renames, splits and fuses tensors on the way; its
own functions are run once more on row numbers (`provenance.py`) to see which rows of which tensor of the file every
weight came from. Then it takes Euler steps from pure noise along the noise levels of the model's own schedule: sigma 1
to 0 in equal steps for flow models, as `engines.diffusers` takes them, and ComfyUI's "normal" schedule for others,
whose sigma s is told to the recorder as the share of noise s / (1 + s). One image at a time: not every model of
ComfyUI takes a batch.

Inputs are recorded clean: layers in FP8 compute in full precision, whatever the hardware and the file's scales.

Numbers. ComfyUI computes in float32 on a CPU, and in what it takes for the best on a GPU.

Limits. Layers outside of the diffusion model (text encoders in the same file) never run. Unlike other engines this one
needs the model's memory in ComfyUI's own way; it moves parts of a model that does not fit out of the GPU by itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ... import names
from ...checkpoint import Checkpoint
from ...errors import CalibrationError, LoraError, OptionError, UnsupportedModelError
from ...families.comfyui import IMAGE, SOUND, VIDEO, Conditions, Scene, measure
from ...families.running import Shapes
from ...layers import LayerTable, find_layers
from ...lora import Lora
from ...options import FRAMES, SAMPLES, SIDE_PIXELS, STEPS, TEXT_TOKENS
from ...recorder import find_linears, record
from ...telling import Advance, Progress
from .. import noise
from ..provenance import trace
from ..session import Observation, Session, Unit
from . import inprocess_tree as tree
from .inprocess_conditions import conditions_of, draw, wanted

PATCH_PIXELS = 16
"""What one token of an image covers along each side, for models whose latents have only a length."""


@dataclass(frozen=True)
class Size:
    """Size of a sample.

    Attributes:
        height, width: in pixels.
        frames: of a video, 1 for an image.
        text_tokens: length of a prompt.
    """

    height: int = SIDE_PIXELS
    width: int = SIDE_PIXELS
    frames: int = FRAMES
    text_tokens: int = TEXT_TOKENS


class Model:
    """A file that ComfyUI has loaded.

    Attributes:
        patcher: ComfyUI's ModelPatcher.
        family: name of its class of `comfy.model_base`.
        feeds: module of the network -> the file's layers that its input feeds.
        table: the file's layers.
    """

    def __init__(self, checkpoint: Checkpoint, table: LayerTable, patcher: Any) -> None:
        self.checkpoint = checkpoint
        self.table = table
        self.patcher = patcher
        self.family = type(patcher.model).__name__
        self._wants: Conditions = conditions_of(kind.__name__ for kind in type(patcher.model).__mro__)
        self.feeds = _feeds(checkpoint, table, patcher.model)

    @property
    def network(self) -> Any:
        """What is recorded."""
        return self.patcher.model.diffusion_model

    @property
    def is_flow(self) -> bool:
        """Whether its sigma is the share of noise, in [0, 1]."""
        from comfy.model_sampling import CONST

        return isinstance(self.patcher.model.model_sampling, CONST)

    def scene(self, size: Size) -> Scene:
        """The size of a sample in this model's latents.

        Raises:
            UnsupportedModelError: the network does not tell the size of everything that it is shown.
        """
        made = self.patcher.model.latent_format
        frames = 1 + math.ceil((size.frames - 1) / made.temporal_downscale_ratio)
        side, step = made.spacial_downscale_ratio, self._wants.multiple
        scene = Scene(
            self.network,
            self.patcher.model.model_config.unet_config,
            made.latent_channels,
            max(math.ceil(size.height / side / step) * step, self._wants.smallest),
            max(math.ceil(size.width / side / step) * step, self._wants.smallest),
            max(frames, self._wants.frames),
            math.ceil(size.height / PATCH_PIXELS) * math.ceil(size.width / PATCH_PIXELS),
            size.text_tokens,
        )
        with self._understood("measure"):
            wanted(self._wants, scene)
        return scene

    def latents(self, scene: Scene, seed: int, number: int) -> list[Tensor]:
        """Pure noise: the latents of one trajectory, several where a model makes images and sound."""
        made = self.patcher.model.latent_format
        usual = {1: SOUND, 2: IMAGE, 3: VIDEO}[made.latent_dimensions]
        batch = measure(self._wants.batch, scene)
        shapes = [tuple(measure(size, scene) for size in shape) for shape in self._wants.latents or (usual,)]
        drawn = [noise.latents((batch, *shape), seed, number * len(shapes) + turn) for turn, shape in enumerate(shapes)]
        return [values[0] for values in drawn]

    def conditioning(self, scene: Scene, way: noise.Conditioning, seed: int, number: int) -> dict[str, Any]:
        """What stands in for a prompt, as ComfyUI's nodes attach it."""
        return draw(self._wants, scene, way, seed, number, as_encoded=self._as_encoded)

    def sigmas(self, steps: int) -> Tensor:
        """The noise levels of a trajectory, and a last one where nothing is evaluated: [steps + 1]."""
        if self.is_flow:
            return 1 - torch.arange(steps + 1) / steps
        from comfy.samplers import calculate_sigmas

        with self._understood("schedule"):
            sigmas: Tensor = calculate_sigmas(self.patcher.model.model_sampling, "normal", steps)
        return sigmas

    def level(self, _: tuple[Any, ...], arguments: dict[str, Any]) -> Tensor | None:
        """The share of noise in a call of the network."""
        sigma: Tensor | None = arguments.get("transformer_options", {}).get("sigmas")
        return sigma if sigma is None or self.is_flow else sigma / (1 + sigma)

    def paint(
        self,
        latents: Sequence[Tensor],
        conditioning: Mapping[str, Any],
        sigmas: Tensor,
        *,
        patcher: Any = None,
        seed: int = 0,
        after_step: Callable[[], object] | None = None,
    ) -> Any:
        """Euler steps of ComfyUI's own sampler.

        Args:
            latents: see `latents`.
            conditioning: see `conditioning`.
            sigmas: see `sigmas`.
            patcher: the model with adapters.
            seed: for models that draw noise themselves.
            after_step: called after every evaluation.

        Returns:
            The sample, as ComfyUI gives it to a VAE.

        Raises:
            UnsupportedModelError: ComfyUI fails, and says why.
            CalibrationError: a layer does something to its input that the recorder does not know.
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
                callback=None if after_step is None else lambda *_: after_step(),
                disable_pbar=True,
                seed=seed,
            )

    def adapted(self, adapters: Sequence[Lora]) -> Any:
        """The model with adapters, through ComfyUI's own loader of them.

        Raises:
            LoraError: ComfyUI finds no place for any of a file's weights.
        """
        import comfy.sd
        import comfy.utils

        patcher = self.patcher
        for adapter in adapters:
            path = adapter.checkpoint.path
            with tree.understood("use an adapter on", path, self.family):
                tensors = comfy.utils.load_torch_file(str(path), safe_load=True)
                made, _ = comfy.sd.load_lora_for_models(patcher, None, tensors, adapter.strength, 0.0)
            if sum(map(len, made.patches.values())) == sum(map(len, patcher.patches.values())):
                raise LoraError(f"ComfyUI finds no place for it in this {self.family} model", path=path)
            patcher = made
        return patcher

    def _as_encoded(self, latents: Tensor) -> Tensor:
        """Latents as a VAE gives them, of latents as the network sees them; several images lie in channels."""
        channels = self.patcher.model.latent_format.latent_channels
        parts = [self.patcher.model.process_latent_out(part) for part in torch.split(latents, channels, dim=1)]
        return torch.cat(parts, dim=1).to(self.patcher.load_device)  # not every family moves them itself

    def _understood(self, doing: str) -> Any:
        return tree.understood(doing, self.checkpoint.path, self.family)


def load(checkpoint: Checkpoint, table: LayerTable | None = None) -> Model:
    """Load a file as ComfyUI's nodes do; inside `inprocess_tree.imported`.

    Args:
        checkpoint: the open checkpoint, in one file.
        table: its layers, where they are known already.

    Returns:
        The model.

    Raises:
        UnsupportedModelError: ComfyUI does not know it or cannot load it, or what it takes is not known here.
    """
    import comfy.sd

    if len(checkpoint.files) > 1:
        raise UnsupportedModelError(
            f"it is in {len(checkpoint.files)} files, and ComfyUI's loader reads one", path=checkpoint.path
        )
    table = find_layers(checkpoint) if table is None else table
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
                module._full_precision_mm = True  # type: ignore[assignment]  # as ComfyUI does with layers marked so
        return Model(checkpoint, table, patcher)


def _prefix(checkpoint: Checkpoint) -> str:
    """What ComfyUI takes for the prefix of the diffusion model's tensors; "" where they have none."""
    from comfy.model_detection import unet_prefix_from_state_dict

    prefix: str = unet_prefix_from_state_dict(dict.fromkeys(checkpoint.tensors))
    return prefix if any(name.startswith(prefix) for name in checkpoint.tensors) else ""


def _feeds(checkpoint: Checkpoint, table: LayerTable, model: Any) -> dict[str, list[str]]:
    """Which layers of the file every linear module of the network is made of, as ComfyUI's own functions tell."""
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
    return {module: layers for module, layers in feeds.items() if layers}


def _as_loaded(config: Any, shapes: Shapes, fed: dict[str, Tensor]) -> dict[str, Tensor]:
    """What ComfyUI's loader makes of tensors, by the network's names; only matrices whose rows it moved."""
    import comfy.utils
    from comfy import model_detection

    originals = {f"\0{name}": values for name, values in fed.items()}  # a tensor that is dropped is no error
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
    folder: Path,
    table: LayerTable | None = None,
    *,
    samples: int = SAMPLES,
    steps: int = STEPS,
    seed: int = 42,
    device: str = "cpu",
    size: Size | None = None,
    layers: Collection[str] | None = None,
    adapters: Sequence[Lora] = (),
    session: Session | None = None,
    progress: Progress | None = None,
    warn: Callable[[str], object] | None = None,
) -> Observation:
    """Run a checkpoint inside ComfyUI and record the inputs of its layers.

    Args:
        checkpoint: the open checkpoint.
        folder: ComfyUI's tree; see `inprocess_tree.folder_of`.
        table: its layers, where they are known already.
        samples: images; at least one for each of `noise.CONDITIONINGS`.
        steps: noise levels on the way from noise to image.
        seed: of all noise.
        device: "cpu", "cuda" or "cuda:N".
        size: of the images.
        layers: names of the layers to record; by default the quantized ones of the diffusion model, or all of its
            matrices where none is.
        adapters: LoRA files; ranges then cover the model with and without them.
        session: what saves, resumes and shares the run; by default it is made in one go.
        progress: called after every evaluation with what is done and what there is to do.
        warn: told what ComfyUI warned of.

    Returns:
        The observation.

    Raises:
        OptionError: fewer than one sample or step, or a device that ComfyUI cannot use.
        UnsupportedModelError: ComfyUI does not know the model or fails, or what it takes is not known here.
        CalibrationError: ComfyUI cannot be imported, a layer asked for does not exist or has no place in the model, or
            its inputs are not finite.
        LoraError: an adapter does not fit.
        StatisticsError: the session cannot be resumed.
    """
    for option, number in (("samples", samples), ("steps", steps)):
        if number < 1:
            raise OptionError(f"{option} should be at least 1, found {number}")
    with tree.imported(folder, device) as messages, torch.inference_mode():
        model = load(checkpoint, table)
        scene = model.scene(size or Size())
        variants = {False: model.patcher, **({True: model.adapted(adapters)} if adapters else {})}
        shapes, feeds = watched(model, layers)
        with record(model.network, shapes, feeds, model.level) as recording:

            def paint(way: noise.Conditioning, number: int, adapted: bool, tick: Advance) -> None:
                recording.at(None)
                latents = model.latents(scene, seed, number)
                recording.batch = len(latents[0])
                model.paint(
                    latents,
                    model.conditioning(scene, way, seed, number),
                    model.sigmas(steps),
                    patcher=variants[adapted],
                    seed=seed + number,
                    after_step=partial(tick, 1),
                )

            seen = (session or Session()).run(
                recording,
                [
                    Unit(
                        f"{way.name}{' adapted' * adapted}, {number}",
                        way.name,
                        1,
                        steps,
                        partial(paint, way, number, adapted),
                    )
                    for adapted in variants
                    for way, number in trajectories(samples)
                ],
                checkpoint.path,
                progress=progress,
                engine="comfyui",
                comfyui=tree.version(folder),
                family=model.family,
                conditioning="noise",
                seed=seed,
                steps=steps,
                lora=sorted(adapter.checkpoint.path.name for adapter in adapters),
            )
    if warn is not None:
        for text in messages.said:
            warn(text)
    return seen


def trajectories(samples: int) -> Iterator[tuple[noise.Conditioning, int]]:
    """How each image's conditioning is drawn: the ways in turn; those of one way stand together.

    >>> [(way.name, number) for way, number in trajectories(4)]
    [('silent', 0), ('silent', 3), ('loud channels', 1), ('strong', 2)]
    """
    count = max(samples, len(noise.CONDITIONINGS))
    for turn, way in enumerate(noise.CONDITIONINGS):
        for number in range(turn, count, len(noise.CONDITIONINGS)):
            yield way, number


def watched(
    model: Model, layers: Collection[str] | None = None
) -> tuple[dict[str, tuple[int, int]], dict[str, list[str]]]:
    """What to record, as `recorder.record` takes it.

    Args:
        model: the loaded model.
        layers: names of the file's layers; by default the diffusion model's quantized ones, or all of it where none is.

    Returns:
        {layer: (out, in)} and {module: the layers that its input feeds}.

    Raises:
        CalibrationError: a layer does not exist, or none has a place in the model.
    """
    known = model.table.shapes()
    fed = {layer for found in model.feeds.values() for layer in found}
    if layers is None:
        layers = list(model.table.diffusion) or [name for name in known if name in fed]
    unknown = [name for name in layers if name not in known]
    if unknown:
        raise CalibrationError(f"{len(unknown)} layers do not exist in the checkpoint", tensor=unknown[0])
    chosen = set(layers)
    feeds = {module: [layer for layer in found if layer in chosen] for module, found in model.feeds.items()}
    feeds = {module: found for module, found in feeds.items() if found}
    if not feeds:
        raise CalibrationError(
            f"none of its {len(chosen)} layers has a place in ComfyUI's {model.family}", path=model.checkpoint.path
        )
    return {name: known[name] for name in layers}, feeds
