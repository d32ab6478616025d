"""Long observations: work in units that can stop at any moment, go on later, and be shared by several processes.

Why it exists. Running a large model takes minutes to hours, and machines get lost, cards get wanted by others, and one
card is slower than eight. Statistics are maxima and sums, so work that is cut into units adds up to the same in any
order, over any processes, and however often the run was stopped in between.

How it works. A `Unit` is a piece of work whose statistics depend on nothing but itself: some trajectories that run
together, under one kind of conditioning. A session runs the units that are not done yet. Every `save_every_seconds` it
writes what all finished units saw, and their names, into one partial file beside the output, whole or not at all. A
killed run loses the units since then, and does them again. The partial file is a statistics file itself, of what has
been seen so far; beside it, its header has the largest inputs per group of units, since what moves with the
conditioning follows from comparing groups.

With several processes (`distributed`) each takes every n-th unit and keeps a partial file of its own. At the end their
statistics are reduced; the first process writes.

A session goes on only with the options, the model and the number of processes that it was begun with: everything that
its caller puts into `options` is compared.

Limits. A unit is done again from its beginning, and must give the same bits then: the same machine, device and number
of threads do, others may differ in the last bits.
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
from numpy.typing import NDArray

from .. import __version__
from ..checkpoint import Checkpoint
from ..errors import CalibrationError, OutputError, StatisticsError, StrPath
from ..recorder import Recording, gather
from ..stats import Statistics, merge
from ..telling import Advance, Progress, advance
from ..trials import Trials
from ..untrusted import is_count, is_texts, parse_json
from . import noise

PARTIAL_SUFFIX = ".partial"
METADATA_KEY = "convert_to_quant.session"
SAVE_EVERY_SECONDS = 120.0

HASH_PREFIX = "sha256:"
SAMPLED_BYTES, SAMPLED_PLACES = 1 << 16, 32
"""What `fingerprint` reads of a file: this many bytes at each of these places, evenly spread."""

MOVES = 2.0
"""A layer depends on the conditioning if strong conditioning moves its range by this factor against none."""

Ranges = dict[str, NDArray[np.float32]]
"""Group of units -> the largest input of each layer, float32 [L]."""


@dataclass(frozen=True)
class Unit:
    """A piece of work.

    Attributes:
        name: what it is known by in the partial file; no two units of a run share it.
        group: units of one group are compared with those of others.
        samples: images that it runs the model for.
        cost: how much work it is, in any measure that the units share; for progress.
        run: does it, while the session records, and tells how much of the cost was done.
    """

    name: str
    group: str
    samples: int
    cost: int
    run: Callable[[Advance], None]


@dataclass(frozen=True)
class Observation:
    """What a run saw.

    Attributes:
        statistics: of every layer asked for, over everything that was run.
        trials: of formats, where they were asked for.
        moments: the entry of the statistics' header, where second moments were asked for.
    """

    statistics: Statistics
    trials: Trials | None = None
    moments: Mapping[str, str] = field(default_factory=dict)

    @property
    def conditioned(self) -> tuple[str, ...]:
        """Layers whose range moves with the noise in place of prompts; none after a run on prompts."""
        return self.statistics.provenance.get("depends_on_conditioning", ())

    @property
    def unvisited(self) -> tuple[str, ...]:
        """Layers that the model never ran, or that have no place in it."""
        names = self.statistics.names
        return tuple(name for name, visited in zip(names, self.statistics.visited, strict=True) if not visited)


@dataclass(frozen=True)
class Observed:
    """What units saw, as far as they have run.

    Attributes:
        statistics: of all of them.
        ranges: the largest inputs per group.
        done: names of the units.
    """

    statistics: Statistics
    ranges: Ranges = field(default_factory=dict)
    done: tuple[str, ...] = ()

    def plus(self, other: Observed) -> Observed:
        """What these and other units saw."""
        groups = {**self.ranges, **other.ranges}
        nothing = np.zeros(len(self.statistics.layers), np.float32)
        return Observed(
            merge(self.statistics, other.statistics),
            {group: np.maximum(self.ranges.get(group, nothing), other.ranges.get(group, nothing)) for group in groups},
            self.done + other.done,
        )

    @property
    def conditioned(self) -> tuple[str, ...]:
        """Layers whose range with strong conditioning is more than `MOVES` times that without any, or the reverse."""
        low, high = self.ranges[noise.SILENT.name], self.ranges[noise.STRONG.name]
        moves = (high > low * MOVES) | (low > high * MOVES)
        return tuple(name for name, moved in zip(self.statistics.names, moves, strict=True) if moved)


class Session:
    """One run, from its first unit to the output file. Without an output nothing is ever written.

    Args:
        output: the statistics file to make.
        options: everything that the statistics depend on, as JSON values.
        resume: go on with a run that was stopped.
        save_every_seconds: time between two partial files; 0 writes one after every unit.
        distributed: share the work with the other processes of the default torch.distributed group, all of which
            must do the same.

    Attributes:
        partials: where the processes keep what they have; none without an output.
        partial: the one of this process.

    Raises:
        OutputError: an unfinished run is there and `resume` was not asked for, or one of more or fewer processes.
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
        self.rank, self.processes = 0, 1
        if distributed:
            from torch.distributed import get_rank, get_world_size

            self.rank, self.processes = get_rank(), get_world_size()
        self.output = None if output is None else Path(output)
        self.partials: list[Path] = []
        if self.output is not None:
            places = [f"-{rank}-of-{self.processes}" for rank in range(self.processes)] if self.processes > 1 else [""]
            self.partials = [self.output.with_name(self.output.name + PARTIAL_SUFFIX + place) for place in places]
        self.partial = self.partials[self.rank] if self.partials else None
        self.options = parse_json(
            json.dumps({**(options or {}), "processes": self.processes, "tool_version": __version__})
        )
        self.resume = resume
        self.save_every_seconds = save_every_seconds
        if self.output is None:
            return
        found = set(self.output.parent.glob(glob.escape(self.output.name + PARTIAL_SUFFIX) + "*"))
        if strange := found - set(self.partials):
            raise OutputError(
                f"an unfinished run of another number of processes than {self.processes} is there",
                path=min(strange),
                hint="go on with as many processes as it had, or delete it",
            )
        if found and not self.resume:
            raise OutputError("an unfinished run is there", path=min(found), hint="--resume goes on, or delete it")

    def finished(self) -> Statistics | None:
        """The output, where `resume` was asked for and it is complete already.

        Raises:
            OutputError: an output is there that was made otherwise, and no unfinished run to go on with.
        """
        if not self.resume or self.output is None or not self.output.exists():
            return None
        statistics = Statistics.load(self.output)
        made_with = _session_of(statistics).get("options")
        if made_with == self.options:
            return statistics
        if not any(partial.exists() for partial in self.partials):
            raise OutputError(
                f"nothing to resume: a complete file is there, {_difference(made_with, self.options)}",
                path=self.output,
                hint="name another output, or leave --resume out to replace it",
            )
        return None

    def run(
        self,
        recording: Recording,
        units: Sequence[Unit],
        model: StrPath,
        *,
        progress: Progress | None = None,
        **facts: object,
    ) -> Observation:
        """Run what is not done yet.

        Args:
            recording: what watches the model; is cleared.
            units: the same in every process and at every resumption.
            model: the file that runs, for messages.
            progress: told after every tick, in units' cost.
            **facts: provenance of the statistics.

        Returns:
            What all units saw, those of other processes and of former runs included.

        Raises:
            StatisticsError: the partial file is damaged, or of another run.
            CalibrationError: inputs were not finite.
        """
        mine = units[self.rank :: self.processes]
        seen = self._begun(recording)
        done_names = set(seen.done)
        todo = [unit for unit in mine if unit.name not in done_names]
        total = sum(unit.cost for unit in mine)
        tick = advance(progress, total, total - sum(unit.cost for unit in todo))
        tick(0)
        recording.clear()
        pending: list[Unit] = []
        saved = time.monotonic()
        for number, unit in enumerate(todo, 1):
            unit.run(tick)
            pending.append(unit)
            is_last = number == len(todo)  # more may follow: trials, second moments
            is_due = self.partial is not None and (is_last or time.monotonic() - saved >= self.save_every_seconds)
            if is_due or is_last or todo[number].group != unit.group:
                found = recording.statistics(sum(unit.samples for unit in pending), **facts)
                seen = seen.plus(Observed(found, {unit.group: found.absmax}, tuple(done.name for done in pending)))
                recording.clear()
                pending = []
                _expect_finite(model, seen.statistics)
            if is_due:
                self._save(seen)
                saved = time.monotonic()
        seen = reduce(Observed.plus, gather(seen) if self.processes > 1 else [seen])
        if {noise.SILENT.name, noise.STRONG.name} <= seen.ranges.keys():
            return Observation(seen.statistics.with_facts(depends_on_conditioning=seen.conditioned))
        return Observation(seen.statistics)

    def finish(
        self, statistics: Statistics, trials: Trials | None = None, further: Mapping[str, str] | None = None
    ) -> None:
        """Write the output and remove the partial files; every process must call it.

        Args:
            statistics: of all processes.
            trials: the same, to stand beside them.
            further: entries of the header.

        Raises:
            OutputError: it cannot be written; the partial files stay.
        """
        assert self.output is not None
        if self.rank == 0:
            tensors, entries = ({}, {}) if trials is None else trials.entries()
            state = {METADATA_KEY: json.dumps({"options": self.options})}
            statistics.save(self.output, {**entries, **(further or {}), **state}, tensors)
        if self.processes > 1:
            from torch.distributed import barrier

            barrier()  # for the output, before the partial files go
        self.discard()

    def discard(self) -> None:
        """Remove the partial file of this process."""
        if self.partial is not None:
            self.partial.unlink(missing_ok=True)

    def _begun(self, recording: Recording) -> Observed:
        """What this process saw before it was stopped."""
        empty = Observed(Statistics.empty(recording.layers))
        if not self.resume or self.partial is None or not self.partial.exists():
            return empty
        statistics = Statistics.load(self.partial)
        state = _session_of(statistics)
        if state.get("options") != self.options:
            raise StatisticsError(
                f"cannot resume: {_difference(state.get('options'), self.options)}",
                path=self.partial,
                hint="use the options that it was begun with, or delete it",
            )
        if list(statistics.layers.items()) != list(recording.layers.items()):
            raise StatisticsError("cannot resume: it recorded other layers", path=self.partial, hint="delete it")
        ranges: Any = state.get("ranges")
        done: Any = state.get("done")
        size = len(statistics.layers)
        sound = isinstance(ranges, dict) and isinstance(done, list) and is_texts(done)
        if not sound or not all(_are_ranges(values, size) for values in ranges.values()):
            problem = "damaged: the session should hold what is done, and by group one range per layer"
            raise StatisticsError(problem, path=self.partial, hint="delete it")
        return Observed(
            statistics.replace(metadata={}, path=None),
            {group: np.array(values, np.float32) for group, values in ranges.items()},
            tuple(done),
        )

    def _save(self, seen: Observed) -> None:
        assert self.partial is not None
        state = {
            "options": self.options,
            "done": list(seen.done),
            # float32 as float64 in JSON comes back exactly
            "ranges": {group: absmax.tolist() for group, absmax in seen.ranges.items()},
        }
        seen.statistics.save(self.partial, {METADATA_KEY: json.dumps(state)})


def _expect_finite(model: StrPath, statistics: Statistics) -> None:
    """Refuse statistics of inputs that were not finite."""
    bad = [name for name, count in zip(statistics.names, statistics.nonfinite, strict=True) if count]
    if bad:
        raise CalibrationError(
            f"the inputs of {len(bad)} layers have infinities or NaN",
            path=model,
            tensor=bad[0],
            hint="try float32, or check the checkpoint's weights",
        )


def _are_ranges(values: Any, size: int) -> bool:
    return isinstance(values, list) and len(values) == size and all(type(v) is float or is_count(v) for v in values)


def _session_of(statistics: Statistics) -> dict[str, Any]:
    """What a session wrote into the header of its file; empty where none did."""
    state = parse_json(
        statistics.metadata.get(METADATA_KEY, "{}"),
        lambda problem: StatisticsError(f"damaged: the session is {problem}", path=statistics.path),
    )
    return state if isinstance(state, dict) else {}


def _difference(made_with: Any, asked_for: Mapping[str, Any]) -> str:
    """The first option that two runs differ in, in words."""
    if not isinstance(made_with, dict):
        return "which no session made"
    for name in sorted({*made_with, *asked_for}):
        was, is_now = made_with.get(name), asked_for.get(name)
        if was != is_now:
            said = name.replace("_", " ")
            if HASH_PREFIX in f"{was}{is_now}":
                return f"made with another {said}"
            was, is_now = ("unset" if value is None else value for value in (was, is_now))
            return f"made with {said} {was}, not {is_now}"
    return "made otherwise"


def fingerprint(*places: StrPath | Checkpoint) -> str:
    """Identity of what files hold, from their sizes and samples of their bytes; their own names and dates do not count.

    Args:
        *places: files, folders (all files in them, with their names there), or open checkpoints.

    Returns:
        `HASH_PREFIX` and SHA-256 in hexadecimal digits.
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
    """The files behind an argument of `fingerprint`, with the names that count."""
    if isinstance(place, Checkpoint):
        return [("", file.place) for file in place.files]
    path = Path(place)
    if not path.is_dir():
        return [("", path)]
    return [(str(file.relative_to(path)), file) for file in sorted(path.rglob("*")) if file.is_file()]
