"""The layout of a new checkpoint: which tensors are copied, renamed, declared otherwise, or computed.

Everything is laid out before the first byte is written. A tensor that is neither replaced nor dropped is copied byte
for byte, into the same shard.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from . import names
from .checkpoint import Checkpoint, CheckpointWriter, Spec, output_files, refuse_same_file
from .errors import TensorError
from .layers import ForeignLayer, Layer, LayerTable, determined
from .marks import Config, Way
from .telling import Advance

WORKERS = min(8, os.cpu_count() or 1)

Source = bytes | str | None
"""A tensor's bytes, the input tensor to copy them from, or None if a job computes them."""
Tensors = Mapping[str, tuple[Spec, Source]]
Sink = Callable[[str, NDArray[Any], int], None]
"""Writes a part of a tensor: its name, or its suffix after a layer's name; the elements; their first byte."""
Job = tuple[int, Callable[[Sink], None]]
"""The number of input bytes of some work, and the work."""


@dataclass(frozen=True)
class Layout:
    """Every tensor of an output.

    Attributes:
        specs: dtypes and shapes.
        place: the input tensor whose shard it goes to.
        small: bytes of those known.
        copied: the input tensors to copy.
        metadata: of the header.
    """

    specs: dict[str, Spec] = field(default_factory=dict)
    place: dict[str, str] = field(default_factory=dict)
    small: dict[str, bytes] = field(default_factory=dict)
    copied: dict[str, str] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)


def lay_out(
    checkpoint: Checkpoint, made: Mapping[str, Tensors], dropped: Collection[str], metadata: Mapping[str, str]
) -> Layout:
    """Lay out a new checkpoint, in which `made` tensors replace those of the input, and `dropped` ones are left out.

    Raises:
        TensorError: two tensors would have the same name.
    """
    layout = Layout(metadata=dict(metadata))
    for place, info in checkpoint.tensors.items():
        kept: Tensors = {} if place in dropped else {place: (Spec.like(info), place)}
        for name, (spec, source) in made.get(place, kept).items():
            if name in layout.specs or (name in checkpoint and name not in dropped and name != place):
                raise TensorError("the input already has a tensor of this name", path=checkpoint.path, tensor=name)
            layout.specs[name], layout.place[name] = spec, place
            if isinstance(source, bytes):
                layout.small[name] = source
            elif source is not None:
                layout.copied[name] = source
    return layout


def beside(checkpoint: Checkpoint, layer: str) -> list[str]:
    """A layer's scales and comfy_quant tensor."""
    suffixes = (suffix for suffix in names.LAYER_SUFFIXES if suffix not in (names.WEIGHT, names.BIAS))
    return [layer + suffix for suffix in suffixes if layer + suffix in checkpoint]


def config_of(checkpoint: Checkpoint, table: LayerTable, layer: Layer | ForeignLayer) -> Config:
    """A quantized layer's config, guessed from its tensors if it has none.

    Raises:
        TensorError: it has no config, and its tensors fit several formats.
    """
    way = table.marks.of(layer.name)
    return determined(checkpoint, layer.name).config if way.kind == "none" else way.config(layer.name)


def remark(
    checkpoint: Checkpoint, table: LayerTable, ways: Sequence[Way], besides: Collection[str] = ()
) -> tuple[dict[str, dict[str, tuple[Spec, Source]]], dict[str, Config], set[str]]:
    """Declare quantized layers, except `besides`, in other conventions; weights and scales only change their names.

    Returns:
        `made` for `lay_out`, the configs, and the tensors to drop.

    Raises:
        TensorError: a layer has no config, and its tensors fit several formats; or the convention cannot express it.
    """
    made: dict[str, dict[str, tuple[Spec, Source]]] = {}
    configs: dict[str, Config] = {}
    dropped = table.marks.markers
    layers: list[Layer | ForeignLayer] = [*table.quantized.values(), *table.foreign.values()]
    for layer in layers:
        if layer.name in besides:
            continue
        if isinstance(layer, ForeignLayer) and not table.marks.kinds(layer.name):
            if layer.name in table.marks.legacy and ways[0].kind != "legacy":
                problem = f"it is {layer.form}, which only the legacy convention can declare"
                raise TensorError(problem, path=checkpoint.path, tensor=layer.name)
            continue
        config = config_of(checkpoint, table, layer)
        granularity = layer.granularity if isinstance(layer, Layer) else None
        if unable := ways[0].cannot(layer.name, config, granularity):
            raise TensorError(unable, path=checkpoint.path, tensor=layer.name)
        tensors: dict[str, tuple[Spec, Source]] = {}
        for name in (layer.weight.name, *beside(checkpoint, layer.name)):
            suffix = ways[0].spelled(name.removeprefix(layer.name))
            if suffix is not None and layer.name + suffix in tensors:
                problem = "the layer also has this scale under another name"
                raise TensorError(problem, path=checkpoint.path, tensor=name)
            if suffix is not None:
                tensors[layer.name + suffix] = (Spec.like(checkpoint.tensors[name]), name)
        for way in ways:
            tensors.update(way.beside(layer.name, config))
        made[layer.weight.name], configs[layer.name] = tensors, config
        dropped.update(beside(checkpoint, layer.name))
    return made, configs, dropped


def mark_once(
    made: Mapping[str, dict[str, tuple[Spec, Source]]],
    configs: Mapping[str, Config],
    ways: Sequence[Way],
    metadata: Mapping[str, str],
) -> dict[str, str]:
    """Add declarations for all layers at once to `made`; returns the metadata with theirs."""
    marked = dict(metadata)
    for way in ways:
        tensors, entries = way.once(configs)
        made[next(iter(made))].update(tensors)
        marked.update(entries)
    return marked


def write(
    checkpoint: Checkpoint,
    layout: Layout,
    output: Path,
    jobs: Iterable[Job] = (),
    *,
    progress: Advance | None = None,
    before_commit: Callable[[CheckpointWriter], None] | None = None,
    threads: AbstractContextManager[ThreadPoolExecutor] | None = None,
    hint: str | None = None,
) -> None:
    """Write a new checkpoint atomically.

    Args:
        checkpoint: the input.
        layout: of the output.
        output: a `.safetensors` path, or `.safetensors.index.json` to keep the input's shards.
        jobs: compute the tensors that are neither known nor copied, in parallel.
        progress: called with the number of input bytes done.
        before_commit: called with the complete output before it gets its name; may read it and change it in place. If
            it raises, there is no output.
        threads: run the jobs; `WORKERS` threads by default.
        hint: shown if the output is the input.

    Raises:
        OutputError: the output cannot be written, or is the input.
    """
    inputs = [checkpoint.path, *(file.path for file in checkpoint.files)]
    files, index = output_files(output, checkpoint, layout.place.__getitem__, layout.specs)
    for path in (output, *(path for path, _ in files)):
        refuse_same_file(path, inputs, hint=hint)
    with CheckpointWriter(files, layout.metadata, index) as writer:
        for name, data in layout.small.items():
            writer.write(name, data)

        def run(nbytes: int, work: Callable[[Sink], None]) -> None:
            work(writer.write)
            if progress is not None:
                progress(nbytes)

        with threads or ThreadPoolExecutor(WORKERS) as pool:
            running = [pool.submit(run, *job) for job in jobs]
            try:
                writer.copy(checkpoint, layout.copied)
                for job in running:
                    job.result()
            except BaseException:
                pool.shutdown(wait=True, cancel_futures=True)
                raise
        if progress is not None:
            progress(sum(layout.specs[name].nbytes for name in layout.copied))
        if before_commit is not None:
            before_commit(writer)
        checkpoint.refuse_changed()
