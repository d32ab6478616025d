"""A diffusers pipeline run on real prompts, to observe the inputs that a model's layers have in use.

Noise is a good substitute for prompts (`noise.py`), but only a text encoder shows the size of its own outputs, and only
a pipeline has its scheduler, guidance and negative prompt. diffusers loads the pipeline folder without network access
and without pickles, and generates an image per prompt at the scheduler's noise levels. To embed prompts only, just the
text encoders are loaded.

Inputs are recorded under the names of the checkpoint, if one is given: `provenance.py` traces each of its rows.
Otherwise they are recorded under both diffusers' and the authors' names (`families`), so that the statistics fit a
checkpoint of either kind.

Limits. The noise of image n depends on the seed and n, on any device, but what else the pipeline draws comes from its
own generator. A pipeline with two transformers is observed one transformer at a time (`component`).
"""

from __future__ import annotations

import importlib.util
import inspect
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import families
from ..checkpoint import Checkpoint
from ..errors import CalibrationError, OptionError, StrPath
from ..families.running import Signal
from ..options import STEPS, RunOptions
from ..recorder import find_linears, module_shape, record
from ..stats import Shape
from ..telling import Advance, Progress
from .denoiser import load as load_model
from .devices import find_device
from .diffusers import watched
from .prompts import NEGATIVE, Prompts
from .session import Batch, Observation, Session

COMPONENTS = ("transformer", "unet")
"""Names of the diffusion model in pipelines."""

NOT_ENCODERS = (*COMPONENTS, "transformer_2", "vae")
"""Large parts that embeddings do not need."""

TEXT_LENGTH = "max_sequence_length"
"""Argument of pipelines for the largest number of tokens of a prompt."""

MODEL_INDEX = "model_index.json"


def require_pipeline(folder: StrPath) -> Path:
    """The path of a pipeline folder.

    Raises:
        CalibrationError: it is not a pipeline folder.
    """
    path = Path(folder)
    if not path.is_dir():
        raise CalibrationError("no such folder", path=path, hint="name a diffusers pipeline; nothing is downloaded")
    if not (path / MODEL_INDEX).is_file():
        raise CalibrationError(f"not a diffusers pipeline: the folder has no {MODEL_INDEX}", path=path)
    return path


def load(folder: StrPath, device: str = "cpu", *, without: Sequence[str] = ()) -> Any:
    """Load a pipeline from its folder, in bfloat16 on a GPU and float32 on a CPU.

    Args:
        folder: with `model_index.json`.
        device: where to run it.
        without: parts to leave out, if it has them.

    Raises:
        CalibrationError: it is not a pipeline folder, or diffusers cannot load it.
        OptionError: an unusable device.
    """
    import diffusers

    path, where = require_pipeline(folder), find_device(device)
    dtype = torch.float32 if where.type == "cpu" else torch.bfloat16
    _hide_loading_bars()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # newer versions call it dtype, older ones know only this
            # Only the pipeline's own class can leave out optional parts.
            parts = diffusers.DiffusionPipeline.load_config(str(path))
            kind = getattr(diffusers, str(parts.get("_class_name")), diffusers.DiffusionPipeline)
            pipeline = kind.from_pretrained(
                str(path), local_files_only=True, use_safetensors=True, torch_dtype=dtype,
                **{name: None for name in without if name in parts},
            )  # fmt: skip
    except (OSError, ValueError, ImportError, AttributeError, KeyError, TypeError) as error:
        reason = str(error).strip().partition("\n")[0].rstrip()
        raise CalibrationError(f"diffusers cannot load it: {reason}", path=path) from error
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(where)


def _hide_loading_bars() -> None:
    """Turn off the progress bars of diffusers and transformers: only the command line prints."""
    for package in ("diffusers", "transformers"):
        if importlib.util.find_spec(package) is not None:
            importlib.import_module(f"{package}.utils.logging").disable_progress_bar()


def observe(
    folder: StrPath,
    prompts: Sequence[str],
    options: RunOptions,
    session: Session,
    *,
    checkpoint: Checkpoint | None = None,
    component: str | None = None,
    progress: Progress | None = None,
) -> Observation:
    """Generate images with a pipeline and record the inputs of its transformer's linear layers.

    Args:
        folder: of the pipeline.
        prompts: texts.
        options: number of images, at least one per prompt; steps of the scheduler; device. Sizes that are None are the
            pipeline's own.
        session: saves, resumes and shares the work. It does not write the output yet: see `Session.finish`.
        checkpoint: whose layer names to use; by default diffusers' and the authors' names both.
        component: the part of the pipeline to record; "transformer" or "unet" by default.
        progress: called after every step.

    Returns:
        The observation, of all processes.

    Raises:
        OptionError: no prompts, or an option or device that the pipeline cannot use.
        CalibrationError: the folder cannot be loaded, its transformer is not the checkpoint's model, or inputs are not
            finite.
        UnsupportedModelError: the checkpoint's layout is unknown.
        StatisticsError: the session cannot be resumed.
    """
    if not prompts:
        raise OptionError("no prompts")
    pipeline = load(folder, options.device)
    images, steps = max(options.samples or 0, len(prompts)), options.steps or STEPS
    asked = {
        "num_inference_steps": steps,
        "height": options.height,
        "width": options.width,
        "num_frames": options.frames,
        TEXT_LENGTH: options.text_tokens,
    }
    arguments: dict[str, Any] = {name: value for name, value in asked.items() if value is not None}
    known = inspect.signature(pipeline.__call__).parameters
    for name in arguments:
        if name not in known:
            raise OptionError(f"{type(pipeline).__name__} does not accept {name}")
    transformer = _component(pipeline, component, folder)
    shapes, feeds = _names_of(transformer, checkpoint, folder)
    with record(transformer, shapes, feeds, sigma=lambda *_: _sigma(pipeline.scheduler)) as recording:

        @torch.no_grad()
        def generate(batch: Batch, tick: Advance) -> None:
            (number,) = batch.numbers
            left = steps

            def step_done(*_: object) -> dict[str, Any]:
                nonlocal left
                left -= 1
                tick(1)
                return {}

            if "callback_on_step_end" in known:
                arguments["callback_on_step_end"] = step_done
            generator = torch.Generator().manual_seed(options.seed + number)
            pipeline(prompt=prompts[number % len(prompts)], generator=generator, output_type="latent", **arguments)
            tick(left)

        return session.run(
            recording,
            [Batch("prompts", (number,)) for number in range(images)],
            generate,
            folder,
            steps=steps,
            progress=progress,
            engine="pipeline",
            pipeline=type(pipeline).__name__,
            conditioning="prompts",
            seed=options.seed,
        )


Embeddings = dict[str, torch.Tensor]
"""One prompt's, by the names of the model's signals."""


@torch.no_grad()
def encode(
    folder: StrPath,
    prompts: Sequence[str],
    signals: Mapping[str, Signal],
    *,
    negative: bool = False,
    text_tokens: int | None = None,
    device: str = "cpu",
    progress: Progress | None = None,
) -> list[Prompts]:
    """Embed prompts with a pipeline's own text encoders, without loading its diffusion model.

    Pipelines return embeddings in different orders and without names; each is recognized by its width. A text loses its
    padding if the model has no mask input.

    Args:
        folder: of the pipeline.
        prompts: texts.
        signals: the conditioning inputs of the model, by name.
        negative: embed the empty prompt as well.
        text_tokens: largest number of tokens of a prompt; the pipeline's own default if None.
        device: where to run.
        progress: called after every prompt.

    Returns:
        The prompts in order, grouped by length, under the names of `signals` (the empty prompt's with the prefix
        `NEGATIVE`), on the CPU.

    Raises:
        OptionError: an option or device that the pipeline cannot use.
        CalibrationError: the folder cannot be loaded, or its text encoders give no embeddings of the model's width.
    """
    pipeline = load(folder, device, without=NOT_ENCODERS)
    if not callable(getattr(pipeline, "encode_prompt", None)):
        raise CalibrationError(f"{type(pipeline).__name__} has no encode_prompt", path=folder)
    known = inspect.signature(pipeline.encode_prompt).parameters
    if text_tokens is not None and TEXT_LENGTH not in known:
        raise OptionError(f"{type(pipeline).__name__} does not accept {TEXT_LENGTH}")
    required = {name for name, one in known.items() if one.default is one.empty and one.kind != one.VAR_KEYWORD}
    at_once = "do_classifier_free_guidance" in known  # such pipelines return an empty prompt of their own

    def embed(text: str) -> tuple[Embeddings, Embeddings]:
        given = {
            "prompt": text, "device": device, TEXT_LENGTH: text_tokens, "do_classifier_free_guidance": negative,
        }  # fmt: skip
        passed = required | {name for name in known.keys() & given if given[name] is not None}
        return _by_signal(pipeline.encode_prompt(**{name: given.get(name) for name in passed}), signals)

    empty = embed("")[0] if negative and not at_once else {}
    alike: dict[tuple[torch.Size, ...], list[Embeddings]] = {}
    for number, text in enumerate(prompts):
        found, opposite = embed(text)
        for name, signal in signals.items():
            if signal.kind == "noise" and name not in found:
                raise CalibrationError(
                    f"its text encoders give no embeddings of {signal.shape[-1]} channels, which the model needs",
                    path=folder,
                    tensor=name,
                    hint="name the folder of the model's own pipeline",
                )
        if negative:
            found |= {NEGATIVE + name: value for name, value in (opposite or empty).items()}
        alike.setdefault(tuple(value.shape for value in found.values()), []).append(found)
        if progress is not None:
            progress(number + 1, len(prompts))

    def joined(rows: Sequence[Embeddings]) -> Embeddings:
        return {
            name: value if name.startswith(NEGATIVE) else torch.cat([row[name] for row in rows])
            for name, value in rows[0].items()
        }

    return [Prompts(joined(rows), source=folder) for rows in alike.values()]


def _by_signal(outputs: Sequence[Any], signals: Mapping[str, Signal]) -> tuple[Embeddings, Embeddings]:
    """The embeddings of one prompt from `encode_prompt`, by signal: with the prompt, and without it.

    If two outputs fit a name, the first is with the prompt, as in all pipelines of diffusers. Texts are cut to their
    mask if the model has no mask input.
    """
    found: tuple[Embeddings, Embeddings] = ({}, {})
    masks = []
    for output in outputs:
        value = torch.stack(list(output)) if isinstance(output, (list, tuple)) and output else output  # one per prompt
        if not isinstance(value, torch.Tensor) or len(value) != 1:
            continue
        for name, signal in signals.items():
            shaped = signal.kind == "noise" and value.ndim == len(signal.shape) + 1
            if shaped and value.is_floating_point() and value.shape[-1] == signal.shape[-1]:
                next((names for names in found if name not in names), {})[name] = value.cpu()
                break
        else:
            masks += [value.cpu()] if value.ndim == 2 else []
    taken = next((name for name, signal in signals.items() if signal.kind == "mask"), None)
    for names, mask in zip(found, masks, strict=False):
        text = next((name for name, value in names.items() if value.shape[:-1] == mask.shape), None)
        if text is not None and taken is not None:
            names[taken] = mask.long()
        elif text is not None:
            names[text] = names[text][:, mask[0].bool()]
    return found


def _component(pipeline: Any, component: str | None, folder: StrPath) -> nn.Module:
    """The part of a pipeline to record."""
    choices = (component,) if component is not None else COMPONENTS
    parts = {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)}
    for name in choices:
        if name in parts:
            return parts[name]
    raise OptionError(f"{folder}: the pipeline has no {' or '.join(choices)}", hint=f"it has {', '.join(parts)}")


def _names_of(
    transformer: nn.Module, checkpoint: Checkpoint | None, folder: StrPath
) -> tuple[dict[str, Shape], dict[str, list[str]]]:
    """Shapes of the layers to record, and which of them each module feeds."""
    modules = {name: module_shape(module) for name, module in find_linears(transformer).items()}
    if checkpoint is None:
        both = families.checkpoint_layers(modules, type(transformer).__name__)
        fed = {name: {name: shape, **dict(both.get(name, ()))} for name, shape in modules.items()}
        shapes = {layer: shape for layers in fed.values() for layer, shape in layers.items()}
        return shapes, {name: list(layers) for name, layers in fed.items()}
    model = load_model(checkpoint)
    wanted = {name: (linear.out_features, linear.in_features) for name, linear in model.linears.items()}
    if modules != wanted:
        raise CalibrationError(
            f"the pipeline's {type(transformer).__name__} is not the model of {checkpoint.path}",
            path=folder,
            tensor=min(modules.items() ^ wanted.items())[0],
            hint="name the pipeline's own checkpoint, or none",
        )
    return watched(model)


def _sigma(scheduler: Any) -> float | None:
    """The scheduler's current noise level; None if it has none."""
    sigmas: Mapping[int, Any] | None = getattr(scheduler, "sigmas", None)
    if sigmas is None:
        return None
    index = scheduler.step_index
    return float(sigmas[scheduler.begin_index or 0 if index is None else index])
