"""Recording inside ComfyUI, through the two wrappers that it offers for this, and nothing else.

    model = recorder.attach(model)       a clone; ComfyUI's own model stays as it was
    ... ComfyUI samples with the clone ...
    statistics = recorder.statistics()

OUTER_SAMPLE stands around one whole sampling: hooks come on before it and leave with it, also when it ends in an
exception, is cancelled, or runs out of memory. All clones of a model share one tree of modules, so hooks that stayed
longer would see the work of others. APPLY_MODEL stands around each call of the model, and knows its noise level.
Copies of the model on further GPUs (MultiGPU Work Units) are models of their own, each run by its own thread: each has
a recording of its own, and they are merged.

Numbers are added up when a sampling is complete. One that failed or was cancelled adds nothing.

Hooks only read, so latents stay what they were, bit for bit. Names are the module names below `diffusion_model`, which
are the checkpoint's own layer names, save in families that ComfyUI renames while it loads them; see `naming`.

Limits. In an FP8 model on hardware that computes in FP8, inputs carry the error of the layers before them. Measured on
emoji models that scales of 1.0 break (hot 6 dB, cold 0 dB): calibrated from a run of the broken file itself they reach
27.6 and 28.0 dB, from a run of the original 28.2 and 28.5 dB (2026-11-22, tests/comfyui/test_nodes.py). Noise levels
are told only of flow models, whose sigma is in [0, 1]; elsewhere they are unknown.
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import CalibrationError, StatisticsError
from ..recorder import Recording, find_linears, module_shape, record, sample_modules
from ..stats import Statistics, merge

KEY = "convert_to_quant.record"
"""Under which ComfyUI keeps our wrappers. One recorder per model: the last one attached is the one that records."""

COPIES = "multigpu"
"""Under which a patcher keeps those of the model's copies on further GPUs."""

_TRANSFORMER_OPTIONS = 5
"""Where APPLY_MODEL's arguments have them: x, t, c_concat, c_crossattn, control, transformer_options."""


class Recorder:
    """Statistics that grow with every sampling of the models it is attached to.

    Args:
        before: statistics to go on from.

    Attributes:
        recording: which one this is; another recorder has another text.
        samplings: complete samplings that were added.
        files: where it was saved and when (see `folders.written_at`), by the name that was asked for.
    """

    def __init__(self, before: Statistics | None = None) -> None:
        self.recording = uuid.uuid4().hex
        self.samplings = 0
        self.files: dict[str, tuple[Path, int | None]] = {}
        self._total = before
        self._weights: Mapping[str, NDArray[np.float32]] = {}  # of the model that it is attached to
        self._recordings: dict[Any, Recording] = {}  # while it samples, by ComfyUI's BaseModel

    def attach(self, model: Any) -> Any:
        """A clone of a MODEL that records whenever it samples.

        Args:
            model: ComfyUI's ModelPatcher.

        Raises:
            CalibrationError: the model has no linear layers.
            StatisticsError: the statistics to go on from are another model's.
        """
        from comfy.patcher_extension import WrappersMP

        linears = find_linears(model.model.diffusion_model)
        if not linears:
            raise CalibrationError("the model has no linear layers to record")
        shapes = {name: module_shape(module) for name, module in linears.items()}
        self._weights = sample_modules(linears)
        total = self._total
        if total is not None and (
            total.fingerprint != Statistics.empty(shapes).fingerprint or total.other_weights(self._weights)
        ):
            raise StatisticsError(
                f"made for another model than this one, which has {len(shapes)} linear layers of its own",
                path=total.path,
                hint="go on from another file, or from none",
            )
        if model.get_wrappers(WrappersMP.OUTER_SAMPLE, KEY):
            logging.warning(
                "Record Activations: the MODEL comes from another Record Activations, which records nothing now; only "
                "the last one does"
            )
        clone = model.clone()
        for kind, wrapper in ((WrappersMP.OUTER_SAMPLE, self._sampling), (WrappersMP.APPLY_MODEL, self._call)):
            clone.remove_wrappers_with_key(kind, KEY)
            clone.add_wrapper_with_key(kind, KEY, wrapper)
        return clone

    def statistics(self) -> Statistics:
        """Everything that was seen so far.

        Raises:
            CalibrationError: nothing was.
        """
        if self._total is None:
            raise CalibrationError(
                "nothing was recorded yet",
                hint="a sampler has to run with the MODEL that Record Activations gives, and before this node",
            )
        return self._total

    def _sampling(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        """Around one sampling."""
        if self._recordings:  # a sampling inside of a sampling: its calls are seen already
            return executor(*args, **kwargs)
        patcher = executor.class_obj.model_patcher
        models = dict.fromkeys(part.model for part in (patcher, *patcher.get_additional_models_with_key(COPIES)))
        try:
            with ExitStack() as hooks:
                for model in models:
                    self._recordings[model] = hooks.enter_context(record(model.diffusion_model))
                result = executor(*args, **kwargs)
            noise = args[0] if args else kwargs["noise"]
            seen = merge(*(recording.statistics() for recording in self._recordings.values()))
        finally:
            self._recordings = {}
        seen = seen.replace(weights=self._weights).with_facts(int(noise.shape[0]), **_facts(patcher.model))
        self._total = seen if self._total is None else merge(self._total, seen)
        self.samplings += 1
        return result

    def _call(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        """Around one call of the model."""
        recording = self._recordings.get(executor.class_obj)
        if recording is not None:
            given = args[_TRANSFORMER_OPTIONS] if len(args) > _TRANSFORMER_OPTIONS else kwargs["transformer_options"]
            recording.at(given.get("sigmas") if _is_flow(executor.class_obj) else None)
        return executor(*args, **kwargs)


def _is_flow(model: Any) -> bool:
    """Whether the model's sigma is the share of noise, in [0, 1]."""
    from comfy.model_sampling import CONST

    return isinstance(model.model_sampling, CONST)


def _facts(model: Any) -> dict[str, object]:
    """Where statistics come from."""
    kinds = {_weights_kind(module) for module in find_linears(model.diffusion_model).values()}
    return {
        "engine": "comfyui",
        "model": type(model).__name__,
        "conditioning": "workflow",
        "weights": sorted(kinds),
    }


def _weights_kind(module: Any) -> str:
    """What a layer's weight is in: the format that its file names, or FP8 to which `weight_dtype` casts it."""
    dtype = module.weight.dtype
    cast = dtype.is_floating_point and dtype.itemsize == 1
    return getattr(module, "quant_format", None) or (str(dtype).removeprefix("torch.") if cast else "high precision")
