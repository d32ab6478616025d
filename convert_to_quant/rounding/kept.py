"""Second moments of layers' inputs on disk, beside the statistics of the same run: `observe --moments`.

They are too large for one tensor file that is written at once (34 GB for Flux.1), so each is a file of its own in the
folder STATS.moments, written as soon as it is known: a run that was stopped goes on with the others, and nothing ever
holds more than one. Layers that receive one input share a file.

    moments   float32 [n (n + 1) / 2]: of n inputs the upper triangle of Σ x xᵀ, row by row; 2 n (n + 1) bytes, which
              are 19 MB for 3,072 inputs and 472 MB for 15,360
    header    of each file, and of the statistics: which run it was, and which layers they are for

Merging adds them up in float32. Each sum rounds once, by 2⁻²⁴ of a value at most, in whatever order; rounding weights
adds far more in damping (`solver.DAMPING`).
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
    """What the moments of so many inputs take.

    >>> kept_bytes(3072)
    18880512
    """
    return 2 * inputs * (inputs + 1)


@dataclass
class KeptMoments:
    """The second moments beside one file of statistics.

    Attributes:
        statistics: path of that file.
        run: tells them from those of other runs.
        files: names in the folder, by layer.
    """

    statistics: Path
    run: str
    files: dict[str, str] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        """Where they are."""
        return self.statistics.with_name(self.statistics.name + ".moments")

    @staticmethod
    def of(statistics: Statistics) -> KeptMoments | None:
        """Those beside statistics that were loaded; None where none were kept.

        Raises:
            StatisticsError: what the header says of them is damaged.
        """
        assert statistics.path is not None
        return _said(statistics.metadata, statistics.path)

    def entry(self) -> dict[str, str]:
        """The entry of the statistics' header, or of one file's."""
        return {MOMENTS_KEY: json.dumps({"run": self.run, "layers": self.files})}

    def prepare(self, *, resume: bool) -> None:
        """Make the folder, and take out of it what is not of this run; or all of it, unless the run goes on.

        Raises:
            OutputError: the folder cannot be made, or its files removed.
        """
        try:
            self.folder.mkdir(exist_ok=True)
            for path in sorted(self.folder.glob("*.safetensors")):
                with open_checkpoint(path) as file:
                    said = _said(file.metadata, path)
                if resume and said is not None and said.run == self.run:
                    self.files |= said.files
                elif said is not None:
                    path.unlink()
        except OSError as error:
            raise OutputError(f"the folder cannot be used ({error.strerror})", path=self.folder) from None

    def write(self, layers: Sequence[str], moments_II: Float32) -> None:
        """Keep the moments of layers that share an input.

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
        """The moments of a layer, [in, in]; None where none were kept.

        Raises:
            CheckpointError: the file cannot be read.
            StatisticsError: it is of another run, or has not the layer's size.
        """
        if layer.name not in self.files:
            return None
        triangle = self._triangle(self.files[layer.name])
        size = layer.in_features
        if triangle.nbytes != kept_bytes(size):
            found = (isqrt(8 * len(triangle) + 1) - 1) // 2
            problem = f"moments of {size} inputs expected, found {found}"
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
            said = _said(file.metadata, path)
            info = file.tensors.get(TENSOR)
            if said is None or said.run != self.run or info is None or (info.dtype, len(info.shape)) != ("F32", 1):
                problem = f"not the second moments that {self.statistics.name} was observed with"
                raise StatisticsError(problem, path=path, hint=AGAIN)
            triangle: Float32 = file.bits(TENSOR)
        return triangle


def merge_moments(parts: Sequence[KeptMoments], output: Path, layers: Iterable[str]) -> KeptMoments:
    """Add moments up, beside a new file of statistics.

    Args:
        parts: of one model.
        output: the statistics' path.
        layers: those that are wanted, of which only what all parts have is kept.

    Raises:
        OutputError: they cannot be written, or would replace what is read.
        CheckpointError, StatisticsError: some cannot be read.
    """
    merged = KeptMoments(output, " + ".join(sorted(part.run for part in parts)))
    if any(part.folder.resolve() == merged.folder.resolve() for part in parts):
        raise OutputError("its second moments are an input", path=output, hint="name another output")
    merged.prepare(resume=False)
    shared: dict[tuple[str, ...], list[str]] = {}
    for layer in layers:
        if all(layer in part.files for part in parts):
            shared.setdefault(tuple(part.files[layer] for part in parts), []).append(layer)
    for names, together in shared.items():
        triangles = [part._triangle(name) for part, name in zip(parts, names, strict=True)]
        merged._write(together, reduce(np.add, triangles))
    return merged


def _said(metadata: Mapping[str, str], path: Path) -> KeptMoments | None:
    """What the header of a file says of second moments; None where it says nothing."""
    if MOMENTS_KEY not in metadata:
        return None

    def damaged(problem: str) -> StatisticsError:
        return StatisticsError(f"damaged: what its header says of second moments is {problem}", path=path, hint=AGAIN)

    said: Any = parse_json(metadata[MOMENTS_KEY], damaged)
    layers = said.get("layers") if isinstance(said, dict) else None
    if not isinstance(layers, dict) or not isinstance(said.get("run"), str):
        raise damaged("without its run or layers")
    if not all(isinstance(name, str) and Path(name).name == name for name in layers.values()):
        raise damaged("without names of files")
    return KeptMoments(path, said["run"], layers)
