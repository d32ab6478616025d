"""Runs that can stop, resume, and be shared by several processes.

Statistics are maxima and sums, so a run is cut into batches whose order, processes and interruptions do not change the
result. A `Batch` is some images that run together under one kind of conditioning. A session runs the batches that are
not done yet. Every `save_every_seconds` it writes their statistics and names atomically into a partial file beside the
output; a killed run repeats the batches since then. The partial file is a statistics file. Its header also has the
largest inputs per group of batches, which show the layers that depend on the conditioning.

With several processes (`distributed`) each takes every n-th batch and has its own partial file. At the end the
statistics are merged, and the first process writes them. A session resumes only with the options, model and number of
processes that it began with.

Limits. A repeated batch must give the same bits, as it does on the same machine and device with as many threads.
"""

from __future__ import annotations

import glob
import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed
from numpy.typing import NDArray

from .. import __version__
from ..checkpoint import Checkpoint
from ..errors import CalibrationError, OutputError, StatisticsError, StrPath
from ..recorder import Recording, gather
from ..stats import Statistics, merge
from ..telling import Advance, Progress, advance, plural
from ..trials import Trials
from ..untrusted import is_texts, parse_json
from . import noise

PARTIAL_SUFFIX = ".partial"
METADATA_KEY = "convert_to_quant.session"
SAVE_EVERY_SECONDS = 120.0

HASH_PREFIX = "sha256:"
SAMPLED_BYTES, SAMPLED_PLACES = 1 << 16, 32
"""`fingerprint` reads this many bytes at each of these evenly spread places of a file."""

MOVES = 2.0
"""A layer depends on the conditioning if strong conditioning changes its range by more than this factor."""

Ranges = dict[str, NDArray[np.float32]]
"""Name of a conditioning -> the largest input of each layer, float32 [L]."""


@dataclass(frozen=True)
class Batch:
    """A unit of work: images that run together under one kind of conditioning, with adapters or without.

    Attributes:
        way: name of the conditioning.
        numbers: of the images in the run.
        adapted: whether the model has its adapters.
    """

    way: str
    numbers: Sequence[int]
    adapted: bool = False

    @property
    def name(self) -> str:
        """Unique in a run; the partial file lists it."""
        return f"{self.way}{' adapted' * self.adapted}, from {self.numbers[0]}"


@dataclass(frozen=True)
class Observation:
    """What a run observed: statistics of every requested layer, trials, and the header entry for second moments."""

    statistics: Statistics
    trials: Trials | None = None
    moments: Mapping[str, str] = field(default_factory=dict)

    @property
    def conditioned(self) -> tuple[str, ...]:
        """Layers whose range depends on the noise that replaces prompts; none after a run on prompts."""
        return self.statistics.provenance.get("depends_on_conditioning", ())

    @property
    def unvisited(self) -> tuple[str, ...]:
        """Layers that the model never ran, or does not have."""
        names = self.statistics.names
        return tuple(name for name, visited in zip(names, self.statistics.visited, strict=True) if not visited)


@dataclass(frozen=True)
class Observed:
    """What the finished batches observed, their largest inputs by conditioning, and their names."""

    statistics: Statistics
    ranges: Ranges = field(default_factory=dict)
    done: tuple[str, ...] = ()

    def plus(self, other: Observed) -> Observed:
        """The observations of both."""
        both = self.ranges, other.ranges
        ranges = {
            group: np.maximum.reduce([each[group] for each in both if group in each])
            for group in dict.fromkeys((*self.ranges, *other.ranges))
        }
        return Observed(merge(self.statistics, other.statistics), ranges, self.done + other.done)

    def facts(self) -> dict[str, object]:
        """Which layers depend on the conditioning, if the run compared any."""
        low, high = (self.ranges.get(way.name) for way in (noise.SILENT, noise.STRONG))
        if low is None or high is None:
            return {}
        moves = (high > low * MOVES) | (low > high * MOVES)
        return {"depends_on_conditioning": [n for n, moved in zip(self.statistics.names, moves, strict=True) if moved]}


class Session:
    """One run, from its first batch to the output file. Without an output it writes nothing.

    Args:
        output: path of the statistics file.
        options: everything that the statistics depend on, as JSON values.
        resume: continue an interrupted run.
        save_every_seconds: time between partial files; 0 writes one after every batch.
        distributed: share the work with the other processes of the default torch.distributed group. All of them must
            do the same.

    Attributes:
        partials: partial files of all processes; none without an output.
        partial: the one of this process.

    Raises:
        OutputError: an unfinished run exists, and `resume` is not set or it had another number of processes.
    """

    def __init__(
        self,
        output: StrPath | None = None,
        options: Mapping[str, Any] | None = None,
        *,
        resume: bool = False,
        save_every_seconds: float = SAVE_EVERY_SECONDS,
        distributed: bool = False,
    ) -> None:
        group = torch.distributed
        self.rank, self.processes = (group.get_rank(), group.get_world_size()) if distributed else (0, 1)
        self._gather: Callable[[Any], list[Any]] = gather if distributed else lambda own: [own]
        self.output = None if output is None else Path(output)
        self.partials: list[Path] = []
        self.partial: Path | None = None
        self.options = parse_json(
            json.dumps({**(options or {}), "processes": self.processes, "tool_version": __version__})
        )
        self.resume = resume
        self.save_every_seconds = save_every_seconds
        if self.output is None:
            return
        name = self.output.name + PARTIAL_SUFFIX
        places = [f"-{rank}-of-{self.processes}" for rank in range(self.processes)] if self.processes > 1 else [""]
        self.partials = [self.output.with_name(name + place) for place in places]
        self.partial = self.partials[self.rank]
        found = set(self.output.parent.glob(glob.escape(name) + "*"))
        if others := found - set(self.partials):
            raise OutputError(
                f"an unfinished run exists, with a number of processes other than {self.processes}",
                path=min(others),
                hint="resume it with the same number of processes, or delete it",
            )
        if found and not self.resume:
            raise OutputError("an unfinished run exists", path=min(found), hint="--resume continues it, or delete it")
        if distributed:  # or a slow process would find the partial file of a fast one
            group.barrier()

    def finished(self) -> Statistics | None:
        """The output, if `resume` is set and the output is already complete.

        Raises:
            OutputError: the output was made with other options, and there is no unfinished run.
        """
        if not self.resume or self.output is None or not self.output.exists():
            return None
        statistics = Statistics.load(self.output)
        made_with = _session_of(statistics).get("options")
        if made_with == self.options:
            return statistics
        if not any(partial.exists() for partial in self.partials):
            raise OutputError(
                f"nothing to resume: the file is complete and was {_difference(made_with, self.options)}",
                path=self.output,
                hint="name another output, or leave out --resume to replace it",
            )
        return None

    def run(
        self,
        recording: Recording,
        batches: Sequence[Batch],
        generate: Callable[[Batch, Advance], None],
        model: StrPath,
        *,
        steps: int = 1,
        progress: Progress | None = None,
        **facts: object,
    ) -> Observation:
        """Run the batches that are not done yet.

        Args:
            recording: records the model; is cleared.
            batches: the same in every process and at every resumption.
            generate: runs the model for a batch, and reports every step of every image.
            model: the file that runs, for messages.
            steps: of an image.
            progress: called with finished steps.
            **facts: provenance of the statistics.

        Returns:
            The observation of all batches, including other processes and earlier runs.

        Raises:
            StatisticsError: the partial file is damaged, or belongs to another run.
            CalibrationError: inputs are not finite.
        """
        mine = batches[self.rank :: self.processes]
        seen = self._begun(recording)
        todo = [batch for batch in mine if batch.name not in seen.done]
        total, left = (steps * sum(len(batch.numbers) for batch in some) for some in (mine, todo))
        tick = advance(progress, total, total - left)
        tick(0)
        saved = time.monotonic()
        for number, batch in enumerate(todo, 1):
            recording.clear()
            generate(batch, tick)
            found = recording.statistics(len(batch.numbers), steps=steps, **facts)
            _expect_finite(model, found)
            seen = seen.plus(Observed(found, {batch.way: found.absmax}, (batch.name,)))
            is_last = number == len(todo)  # trials and second moments may follow
            if self.partial is not None and (is_last or time.monotonic() - saved >= self.save_every_seconds):
                self._save(self.partial, seen)
                saved = time.monotonic()
        seen = reduce(Observed.plus, self._gather(seen))
        return Observation(seen.statistics.with_facts(**seen.facts()))

    def finish(
        self, statistics: Statistics, trials: Trials | None = None, further: Mapping[str, str] | None = None
    ) -> None:
        """Write statistics and trials of all processes and header entries; every process must call it.

        Raises:
            OutputError: the output cannot be written; the partial files stay.
        """
        assert self.output is not None
        if self.rank == 0:
            tensors, entries = ({}, {}) if trials is None else trials.entries()
            state = {METADATA_KEY: json.dumps({"options": self.options})}
            statistics.save(self.output, {**entries, **(further or {}), **state}, tensors)
        self._gather(None)  # waits for the output before the partial files go
        self.discard()

    def discard(self) -> None:
        """Remove the partial file of this process."""
        if self.partial is not None:
            self.partial.unlink(missing_ok=True)

    def _begun(self, recording: Recording) -> Observed:
        """What this process observed before it was interrupted."""
        if not self.resume or self.partial is None or not self.partial.exists():
            return Observed(Statistics.empty(recording.layers))
        statistics = Statistics.load(self.partial)
        state = _session_of(statistics)
        if state.get("options") != self.options:
            raise StatisticsError(
                f"cannot resume: {_difference(state.get('options'), self.options)}",
                path=self.partial,
                hint="use the options that the run began with, or delete it",
            )
        if list(statistics.layers.items()) != list(recording.layers.items()):
            raise StatisticsError("cannot resume: it recorded other layers", path=self.partial, hint="delete it")
        try:
            ranges = {group: np.array(values, np.float32) for group, values in state["ranges"].items()}
            sound = is_texts(state["done"]) and all(each.shape == (len(statistics.layers),) for each in ranges.values())
        except (ArithmeticError, AttributeError, KeyError, TypeError, ValueError):
            sound = False
        if not sound:
            problem = "damaged: the session should have the names of finished batches, and ranges of all layers"
            raise StatisticsError(problem, path=self.partial, hint="delete it")
        return Observed(statistics.replace(metadata={}, path=None), ranges, tuple(state["done"]))

    def _save(self, partial: Path, seen: Observed) -> None:
        # float32 values survive the float64 of JSON exactly.
        ranges = {group: absmax.tolist() for group, absmax in seen.ranges.items()}
        state = {"options": self.options, "done": list(seen.done), "ranges": ranges}
        seen.statistics.save(partial, {METADATA_KEY: json.dumps(state)})


def _expect_finite(model: StrPath, statistics: Statistics) -> None:
    """Refuse statistics of inputs that are not finite."""
    bad = [name for name, count in zip(statistics.names, statistics.nonfinite, strict=True) if count]
    if bad:
        raise CalibrationError(
            f"the inputs of {plural(len(bad), 'layer')} have infinities or NaN",
            path=model,
            tensor=bad[0],
            hint="try float32, or check the checkpoint's weights",
        )


def _session_of(statistics: Statistics) -> dict[str, Any]:
    """The session entry in the header of a statistics file; empty if there is none."""
    state = parse_json(
        statistics.metadata.get(METADATA_KEY, "{}"),
        lambda problem: StatisticsError(f"damaged: the session is {problem}", path=statistics.path),
    )
    return state if isinstance(state, dict) else {}


def _difference(made_with: Any, asked_for: Mapping[str, Any]) -> str:
    """The first option in which two runs differ, in words."""
    if not isinstance(made_with, dict):
        return "not made by a session"
    names = {*made_with, *asked_for}
    name = min((each for each in names if made_with.get(each) != asked_for.get(each)), default="options")
    was, wanted = ("unset" if each.get(name) is None else each[name] for each in (made_with, asked_for))
    title = name.replace("_", " ")
    return f"made with another {title}" if HASH_PREFIX in f"{was}{wanted}" else f"made with {title} {was}, not {wanted}"


def fingerprint(*places: StrPath | Checkpoint) -> str:
    """`HASH_PREFIX` and a SHA-256 of the sizes and samples of the bytes of files, without their own names and dates.

    A place is a file, a folder (all files in it, with their relative names), or an open checkpoint.
    """
    digest = hashlib.sha256()
    for place in places:
        for name, file in _files(place):
            size = file.stat().st_size
            digest.update(f"{name}\0{size}\0".encode())
            last = max(size - SAMPLED_BYTES, 0)
            with file.open("rb") as stream:
                for offset in sorted({last * number // (SAMPLED_PLACES - 1) for number in range(SAMPLED_PLACES)}):
                    stream.seek(offset)
                    digest.update(stream.read(SAMPLED_BYTES))
    return HASH_PREFIX + digest.hexdigest()


def _files(place: StrPath | Checkpoint) -> list[tuple[str, Path]]:
    """The files behind an argument of `fingerprint`, each with its relative name."""
    if isinstance(place, Checkpoint):
        return [("", file.place) for file in place.files]
    path = Path(place)
    if not path.is_dir():
        return [("", path)]
    return [(str(file.relative_to(path)), file) for file in sorted(path.rglob("*")) if file.is_file()]
