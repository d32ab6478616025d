"""Records layer inputs inside ComfyUI, through two of its wrappers.

    model = recorder.attach(model)       a clone; ComfyUI's own model stays as it was
    ... ComfyUI samples with the clone ...
    statistics = recorder.statistics()

OUTER_SAMPLE wraps a whole sampling. It adds the hooks and always removes them: after an error, a cancellation, or out
of memory. All clones of a model share their modules, so a hook left behind would record other samplings. APPLY_MODEL
wraps each evaluation and knows its noise level. Copies of the model on further GPUs (MultiGPU Work Units) run in their
own threads; each has its own recording, and these are merged.

Totals change when a sampling completes. A failed or cancelled sampling adds nothing.

Hooks only read, so latents stay bit-identical. Layer names are module names below `diffusion_model`. They equal the
checkpoint's names, except in families that ComfyUI renames while loading; see `naming`.

Limits. In an FP8 model on hardware that computes in FP8, inputs carry the error of the layers before them. Emoji models
that scales of 1.0 break (hot 6 dB, cold 0 dB) reach 27.6 and 28.0 dB if calibrated from a run of the broken file, and
28.2 and 28.5 dB from a run of the original (2026-11-22, tests/comfyui/test_nodes.py). Noise levels are known only for
flow models, whose sigma is in [0, 1].
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
"""Key of our wrappers in ComfyUI. A model has one recorder: the last one attached."""

COPIES = "multigpu"
"""A patcher's key for the model's copies on further GPUs."""

_TRANSFORMER_OPTIONS = 5
"""Position in APPLY_MODEL's arguments: x, t, c_concat, c_crossattn, control, transformer_options."""


class Recorder:
    """Accumulates statistics over the samplings of a model.

    Args:
        before: statistics to continue from.

    Attributes:
        recording: a unique id.
        files: requested name -> (path, `folders.written_at`) of the last save.
    """

    def __init__(self, before: Statistics | None = None) -> None:
        self.recording = uuid.uuid4().hex
        self.files: dict[str, tuple[Path, int | None]] = {}
        self._total = before
        self._weights: Mapping[str, NDArray[np.float32]] = {}  # of the model that it is attached to
        self._recordings: dict[Any, Recording] = {}  # while it samples, by ComfyUI's BaseModel

    def attach(self, model: Any) -> Any:
        """A clone of a MODEL (ComfyUI's ModelPatcher) that is recorded whenever it samples.

        Raises:
            CalibrationError: the model has no linear layers.
            StatisticsError: the statistics to continue from belong to another model.
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
                f"made for another model than this one, which has {len(shapes)} linear layers",
                path=total.path,
                hint="continue from another file, or from none",
            )
        if model.get_wrappers(WrappersMP.OUTER_SAMPLE, KEY):
            logging.warning(
                "Record Activations: the MODEL comes from another Record Activations node. Only the last one records."
            )
        clone = model.clone()
        for kind, wrapper in ((WrappersMP.OUTER_SAMPLE, self._sampling), (WrappersMP.APPLY_MODEL, self._call)):
            clone.remove_wrappers_with_key(kind, KEY)
            clone.add_wrapper_with_key(kind, KEY, wrapper)
        return clone

    def statistics(self) -> Statistics:
        """Everything recorded so far."""
        if self._total is None:
            raise CalibrationError(
                "nothing was recorded yet",
                hint="connect the MODEL of Record Activations to a sampler that runs before this node",
            )
        return self._total

    def _sampling(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        """Wraps one sampling."""
        if self._recordings:  # a nested sampling is already being recorded
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
        return result

    def _call(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        """Wraps one evaluation of the model."""
        recording = self._recordings.get(executor.class_obj)
        if recording is not None:
            given = args[_TRANSFORMER_OPTIONS] if len(args) > _TRANSFORMER_OPTIONS else kwargs["transformer_options"]
            recording.at(given.get("sigmas") if _is_flow(executor.class_obj) else None)
        return executor(*args, **kwargs)


def _is_flow(model: Any) -> bool:
    """Whether sigma is the fraction of noise, in [0, 1]."""
    from comfy.model_sampling import CONST

    return isinstance(model.model_sampling, CONST)


def _facts(model: Any) -> dict[str, object]:
    """Provenance of the statistics."""
    kinds = {_weights_kind(module) for module in find_linears(model.diffusion_model).values()}
    return {
        "engine": "comfyui",
        "model": type(model).__name__,
        "conditioning": "workflow",
        "weights": sorted(kinds),
    }


def _weights_kind(module: Any) -> str:
    """Format of a layer's weight: as its file declares it, or FP8 if `weight_dtype` cast it."""
    dtype = module.weight.dtype
    cast = dtype.is_floating_point and dtype.itemsize == 1
    return getattr(module, "quant_format", None) or (str(dtype).removeprefix("torch.") if cast else "high precision")
