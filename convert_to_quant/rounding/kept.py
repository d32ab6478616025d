"""Second moments of layer inputs on disk, beside the statistics of the same run: `observe --moments`.

They are too large for one file (34 GB for Flux.1). So each is a file of its own in the folder STATS.moments, written as
soon as it is known: an interrupted run continues with the others, and only one is in memory. Layers with the same input
share a file.

    moments   float32 [n (n + 1) / 2]: for n inputs, the upper triangle of Σ x xᵀ, row by row; 2 n (n + 1) bytes, or
              19 MB for 3,072 inputs and 472 MB for 15,360
    header    of each file, and of the statistics: an identifier of the run, and the layers

Merging adds moments in float32. Each sum rounds once, by at most 2⁻²⁴ of a value; damping (`solver.DAMPING`) adds far
more.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from math import isqrt
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..checkpoint import Entry, open_checkpoint, write_checkpoint
from ..errors import OutputError, StatisticsError
from ..layers import Layer
from ..names import MOMENTS_KEY
from ..stats import Statistics
from ..untrusted import parse_json

Float32 = NDArray[np.float32]

TENSOR = "moments"
AGAIN = "observe the model again, with --moments"


def kept_bytes(inputs: int) -> int:
    """Size of the moments of a layer with this number of inputs.

    >>> kept_bytes(3072)
    18880512
    """
    return 2 * inputs * (inputs + 1)


@dataclass
class KeptMoments:
    """The second moments beside one file of statistics, of the run with that identifier: file names by layer."""

    statistics: Path
    run: str
    files: dict[str, str] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        """The folder of the files."""
        return self.statistics.with_name(self.statistics.name + ".moments")

    @staticmethod
    def of(statistics: Statistics) -> KeptMoments | None:
        """The moments beside loaded statistics; None if there are none.

        Raises:
            StatisticsError: their header entry is damaged.
        """
        assert statistics.path is not None
        return _parsed(statistics.metadata, statistics.path)

    def entry(self) -> dict[str, str]:
        """The header entry, of the statistics or of one file."""
        return {MOMENTS_KEY: json.dumps({"run": self.run, "layers": self.files})}

    def prepare(self, *, resume: bool) -> None:
        """Create the folder, and remove moments of other runs; with `resume` off, remove all.

        Raises:
            OutputError: the folder cannot be made, or its files removed.
        """
        try:
            self.folder.mkdir(exist_ok=True)
            for path in sorted(self.folder.glob("*.safetensors")):
                with open_checkpoint(path) as file:
                    found = _parsed(file.metadata, path)
                if resume and found is not None and found.run == self.run:
                    self.files |= found.files
                elif found is not None:
                    path.unlink()
        except OSError as error:
            raise OutputError(f"the folder cannot be used ({error.strerror})", path=self.folder) from None

    def write(self, layers: Sequence[str], moments_II: Float32) -> None:
        """Write the moments of layers that share an input.

        Raises:
            OutputError: they cannot be written.
        """
        self._write(layers, np.concatenate([row[number:] for number, row in enumerate(moments_II)]))

    def _write(self, layers: Sequence[str], triangle: Float32) -> None:
        files = dict.fromkeys(layers, f"{layers[0].replace('/', '_')}.safetensors")
        header = replace(self, files=files).entry()
        write_checkpoint(self.folder / files[layers[0]], {TENSOR: Entry.of(triangle)}, header)
        self.files |= files

    def read(self, layer: Layer) -> Float32 | None:
        """The moments of a layer, [in, in]; None if there are none.

        Raises:
            CheckpointError: the file cannot be read.
            StatisticsError: it belongs to another run, or has another size.
        """
        if layer.name not in self.files:
            return None
        triangle = self._triangle(self.files[layer.name])
        size = layer.in_features
        if triangle.nbytes != kept_bytes(size):
            found = (isqrt(8 * len(triangle) + 1) - 1) // 2
            problem = f"moments of {size} inputs were expected, found {found}"
            raise StatisticsError(problem, path=self.folder / self.files[layer.name], tensor=layer.name, hint=AGAIN)
        moments_II, start = np.empty((size, size), np.float32), 0
        for number in range(size):
            stop = start + size - number
            moments_II[number, number:] = moments_II[number:, number] = triangle[start:stop]
            start = stop
        return moments_II

    def _triangle(self, name: str) -> Float32:
        path = self.folder / name
        with open_checkpoint(path) as file:
            found = _parsed(file.metadata, path)
            info = file.tensors.get(TENSOR)
            if found is None or found.run != self.run or info is None or (info.dtype, len(info.shape)) != ("F32", 1):
                problem = f"not the second moments of {self.statistics.name}"
                raise StatisticsError(problem, path=path, hint=AGAIN)
            triangle: Float32 = file.bits(TENSOR)
        return triangle


def merge_moments(parts: Sequence[KeptMoments], output: Path, layers: Iterable[str]) -> KeptMoments:
    """Add up the moments of layers that all parts have, beside a new file of statistics.

    Raises:
        OutputError: they cannot be written, or would replace an input.
        CheckpointError, StatisticsError: some cannot be read.
    """
    merged = KeptMoments(output, " + ".join(sorted(part.run for part in parts)))
    if any(part.folder.resolve() == merged.folder.resolve() for part in parts):
        raise OutputError("the output's second moments are also an input", path=output, hint="name another output")
    merged.prepare(resume=False)
    shared: dict[tuple[str, ...], list[str]] = {}
    for layer in layers:
        if all(layer in part.files for part in parts):
            shared.setdefault(tuple(part.files[layer] for part in parts), []).append(layer)
    for names, together in shared.items():
        triangles = [part._triangle(name) for part, name in zip(parts, names, strict=True)]
        merged._write(together, reduce(np.add, triangles))
    return merged


def _parsed(metadata: Mapping[str, str], path: Path) -> KeptMoments | None:
    """The second moments in the header of a file; None if it has none."""
    if MOMENTS_KEY not in metadata:
        return None

    def damaged(problem: str) -> StatisticsError:
        return StatisticsError(f"damaged: its header entry for second moments is {problem}", path=path, hint=AGAIN)

    entry: Any = parse_json(metadata[MOMENTS_KEY], damaged)
    layers = entry.get("layers") if isinstance(entry, dict) else None
    if not isinstance(layers, dict) or not isinstance(entry.get("run"), str):
        raise damaged("without its run or layers")
    if not all(isinstance(name, str) and Path(name).name == name for name in layers.values()):
        raise damaged("without file names")
    return KeptMoments(path, entry["run"], layers)
