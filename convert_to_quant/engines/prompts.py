"""Conditioning from a model's own text encoders, instead of noise.

Ranges observed on noise are safe, but too wide where a text encoder's outputs are small. Prompt embeddings, from a
diffusers pipeline or elsewhere, give the true ranges. They are a safetensors file with one tensor per argument of the
pipeline, [prompts, ...] each.

Names are the pipeline's arguments (`prompt_embeds`, `pooled_prompt_embeds`, ...) or those of the transformer's
`forward`. Tensors of the empty prompt (`negative_prompt_embeds`, ...) count as further prompts. Masks and guidance are
optional.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ..checkpoint import Entry, open_checkpoint, write_checkpoint
from ..errors import CalibrationError, StrPath
from ..families.running import Geometry, Signal
from .denoiser import Denoiser

NEGATIVE = "negative_"

PIPELINE_NAMES: Mapping[str, tuple[str, ...]] = {
    "prompt_embeds": ("encoder_hidden_states", "cap_feats"),
    "pooled_prompt_embeds": ("pooled_projections",),
    "prompt_attention_mask": ("encoder_attention_mask",),
    "prompt_embeds_mask": ("encoder_attention_mask",),
    "image_embeds": ("encoder_hidden_states_image",),
}
"""Names of the arguments of transformers in pipelines."""


@dataclass(frozen=True)
class Prompts:
    """Conditioning of some prompts by name, each [prompts, ...]; `source` is their path, for messages.

    Once they are fitted to a model, the geometry has their own number of text tokens.
    """

    tensors: Mapping[str, Tensor]
    geometry: Geometry = field(default_factory=Geometry)
    source: StrPath | None = None

    @property
    def count(self) -> int:
        """Number of prompts."""
        return len(next(iter(self.tensors.values())))

    @staticmethod
    def load(path: StrPath) -> Prompts:
        """Read a safetensors file of prompt embeddings.

        Raises:
            CheckpointError: it cannot be read, or has tensors that are neither float nor integer.
        """
        with open_checkpoint(path) as file:
            tensors = {
                name: torch.from_numpy(file.float32(name) if "F" in info.dtype else file.bits(name))
                for name, info in file.tensors.items()
            }
        return Prompts(tensors, source=path)

    def save(self, path: StrPath) -> None:
        """Write a file that `load` reads: floats in float32, masks as integers.

        Raises:
            OutputError: the file cannot be written.
        """
        write_checkpoint(path, {
            name: Entry.of((value.float() if value.is_floating_point() else value.long()).cpu().numpy())
            for name, value in self.tensors.items()
        })  # fmt: skip

    def fitted(self, denoiser: Denoiser, geometry: Geometry) -> Prompts:
        """The same prompts by the names of a model's conditioning inputs, checked.

        Raises:
            CalibrationError: a tensor is unknown or missing, or its shape does not fit.
        """
        known = denoiser.signals(geometry)
        spellings = {name: name for name in known}
        spellings |= {alias: name for alias, names in PIPELINE_NAMES.items() for name in names if name in known}
        named: dict[str, Tensor] = {}
        negative: dict[str, Tensor] = {}
        for name, value in self.tensors.items():
            own = spellings.get(name.removeprefix(NEGATIVE))
            if own is None:
                raise self._error(f"the model does not accept this conditioning, only {', '.join(known)}", name)
            (negative if name.startswith(NEGATIVE) else named)[own] = value
        if not named:
            raise self._error("no prompts", next(iter(self.tensors), ""))
        longer = denoiser.signals(replace(geometry, text_tokens=geometry.text_tokens + 1))
        text_names = [name for name in named if known[name].shape != longer[name].shape]  # not the tokens of an image
        text = [named[name].shape[1] for name in text_names if named[name].ndim == 3]
        geometry = replace(geometry, text_tokens=text[0] if text else geometry.text_tokens)
        signals = denoiser.signals(geometry)
        complete = [self._complete(tensors, signals) for tensors in (named, negative) if tensors]
        return Prompts(
            {name: torch.cat([tensors[name] for tensors in complete]) for name in signals}, geometry, self.source
        )

    def _complete(self, tensors: Mapping[str, Tensor], signals: Mapping[str, Signal]) -> dict[str, Tensor]:
        count = len(next(iter(tensors.values())))
        complete = {}
        for name, signal in signals.items():
            if name in tensors:
                value = tensors[name]
            elif signal.kind == "noise":
                raise self._error(
                    f"missing; the model needs it as [prompts, {', '.join(map(str, signal.shape))}]", name
                )
            else:
                dtype = torch.int64 if signal.kind == "mask" else torch.float32
                value = torch.full((count, *signal.shape), signal.value, dtype=dtype)
            if tuple(value.shape) != (count, *signal.shape):
                raise self._error(f"shape {[count, *signal.shape]} was expected, found {list(value.shape)}", name)
            complete[name] = value
        return complete

    def _error(self, problem: str, tensor: str) -> CalibrationError:
        return CalibrationError(problem, path=self.source, tensor=tensor)
