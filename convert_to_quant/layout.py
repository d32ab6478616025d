"""A new checkpoint made of an old one: what is copied, what gets another name or mark, and what is made anew.

Everything is laid out before the first byte is written. What is not said to be made anew or dropped is copied byte for
byte, in the shard that it was in.
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
"""Where a tensor's bytes are from: they themselves, a tensor of the input, or a job that makes them."""
Tensors = Mapping[str, tuple[Spec, Source]]
Sink = Callable[[str, NDArray[Any], int], None]
"""Takes a part of a tensor: its name, or its suffix behind a layer's, the elements, the byte at which they begin."""
Job = tuple[int, Callable[[Sink], None]]
"""How many bytes of the input some work deals with, and the work."""


@dataclass(frozen=True)
class Layout:
    """Every tensor of an output: how large, and where from.

    Attributes:
        specs: dtype and shape of each.
        place: the tensor of the input whose shard it follows.
        small: bytes of those that are known.
        copied: names in the input of those that are copied.
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
    """Lay out a new checkpoint.

    Args:
        checkpoint: the input.
        made: what stands in the place of tensors of the input, by their names.
        dropped: what is left out.
        metadata: the header's.

    Raises:
        TensorError: two tensors would have one name.
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
    """The tensors that say what a layer's weight means: scales and a mark."""
    suffixes = (suffix for suffix in names.LAYER_SUFFIXES if suffix not in (names.WEIGHT, names.BIAS))
    return [layer + suffix for suffix in suffixes if layer + suffix in checkpoint]


def told(checkpoint: Checkpoint, table: LayerTable, layer: Layer | ForeignLayer) -> Config:
    """What a quantized layer's mark says, or should say where it has none.

    Raises:
        TensorError: it has no mark, and its tensors fit several formats.
    """
    way = table.marks.of(layer.name)
    return determined(checkpoint, layer.name).config if way.kind == "none" else way.config(layer.name)


def remark(
    checkpoint: Checkpoint, table: LayerTable, ways: Sequence[Way], besides: Collection[str] = ()
) -> tuple[dict[str, dict[str, tuple[Spec, Source]]], dict[str, Config], set[str]]:
    """Mark quantized layers in other ways: weights and scales as they are, with the names that these ask for.

    Args:
        checkpoint: where the layers are.
        table: all of them.
        ways: of marking; several that agree.
        besides: layers to leave out.

    Returns:
        What `lay_out` takes as made; what the marks say; and the tensors that have to go.

    Raises:
        TensorError: a layer has no mark, and its tensors fit several formats; or these ways cannot say what it is.
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
                problem = f"it is {layer.form}, which only a legacy marker can say"
                raise TensorError(problem, path=checkpoint.path, tensor=layer.name)
            continue
        config = told(checkpoint, table, layer)
        granularity = layer.granularity if isinstance(layer, Layer) else None
        if unable := ways[0].cannot(layer.name, config, granularity):
            raise TensorError(unable, path=checkpoint.path, tensor=layer.name)
        tensors: dict[str, tuple[Spec, Source]] = {}
        for name in (layer.weight.name, *beside(checkpoint, layer.name)):
            suffix = ways[0].spelled(name.removeprefix(layer.name))
            if suffix is not None and layer.name + suffix in tensors:
                problem = "the layer has this scale under another name as well"
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
    """Add what marks all layers at once beside the first of what is made; the metadata with what belongs there."""
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
    """Write a new checkpoint, whole or not at all.

    Args:
        checkpoint: the input.
        layout: of the output.
        output: a `.safetensors` path, or `.safetensors.index.json` to keep the input's shards.
        jobs: make the tensors that are neither known nor copied, side by side.
        progress: told how many input bytes were done.
        before_commit: called with the complete but still unnamed output, which it may read and change in place; if it
            raises, there is no output.
        threads: that do the jobs; plain ones by default.
        hint: what to do where the output is the input.

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
