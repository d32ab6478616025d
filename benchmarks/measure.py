"""Measures commands: wall-clock seconds and peak memory.

Commands are measured from outside, start-up included, since that is what a user waits for. Contenders alternate (A B,
B A, A B, ...), so that a shared or warming machine affects all alike. Results are the median, smallest and largest.

Peak memory is the kernel's maximum of resident pages, mapped files included. It is an upper bound: the kernel may drop
mapped pages.

Limits. Linux only. A process starts with the maximum of its parent, so this process must stay small: do large work in
`in_fresh_process`. Of child processes only the largest counts.
"""

from __future__ import annotations

import concurrent.futures
import json
import multiprocessing
import os
import platform
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ParamSpec, TypeVar

_P = ParamSpec("_P")
_R = TypeVar("_R")


@dataclass(frozen=True)
class Command:
    """A command line."""

    arguments: Sequence[str]
    directory: Path
    environment: Mapping[str, str] = field(default_factory=lambda: dict(os.environ))


@dataclass(frozen=True)
class Run:
    """One run of a command, and its stdout."""

    seconds: float
    peak_rss_bytes: int
    output: str


class CommandFailedError(RuntimeError):
    """A measured command failed, so its time means nothing."""


def run(command: Command) -> Run:
    """Run a command once and measure it."""
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        started = time.perf_counter()
        process = subprocess.Popen(
            command.arguments,
            cwd=command.directory,
            env=dict(command.environment),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=errors,
        )
        try:
            _, status, usage = os.wait4(process.pid, 0)
        except BaseException:  # interrupted: leave no child behind
            process.kill()
            process.wait()
            raise
        seconds = time.perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        errors.seek(0)
        text = output.read()
        if process.returncode != 0:
            tail = "\n".join((text + errors.read()).splitlines()[-15:])
            raise CommandFailedError(f"exit code {process.returncode} from {' '.join(command.arguments)}\n{tail}")
    return Run(seconds, usage.ru_maxrss * 1024, text)


def summary(seconds: Sequence[float]) -> dict[str, object]:
    """Median, extremes and all values, to four significant digits."""
    values = [float(f"{value:.4g}") for value in seconds]
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "all": values}


@dataclass(frozen=True)
class Contender:
    """One way to do a job.

    Attributes:
        name: its name in the table.
        command: what is measured.
        prepare: called before each repeat, not measured.
        seconds_of: time of a run; by default its wall-clock time.
    """

    name: str
    command: Command
    prepare: Callable[[], None] = lambda: None
    seconds_of: Callable[[Run], float] = lambda run: run.seconds


@dataclass
class Measurement:
    """All repeats of one contender; memory is the largest of them."""

    contender: Contender
    seconds: list[float] = field(default_factory=list)
    peak_rss_bytes: int = 0


def alternate(contenders: Sequence[Contender], repeats: int, progress: Callable[[str], None]) -> list[Measurement]:
    """Measure contenders in turns, in reverse order every second round."""
    found = [Measurement(contender) for contender in contenders]
    for turn in range(repeats):
        for one in found if turn % 2 == 0 else found[::-1]:
            one.contender.prepare()
            done = run(one.contender.command)
            one.seconds.append(one.contender.seconds_of(done))
            one.peak_rss_bytes = max(one.peak_rss_bytes, done.peak_rss_bytes)
            memory = f"{done.peak_rss_bytes / 1e6:,.0f} MB"
            progress(f"{one.contender.name}: {one.seconds[-1]:.3g} s, {memory} ({turn + 1} of {repeats})")
    return found


def in_fresh_process(work: Callable[_P, _R], *args: _P.args, **kwargs: _P.kwargs) -> _R:
    """Call a function of an importable module in a new process, so that its memory stays out of this one."""
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn) as pool:
        return pool.submit(work, *args, **kwargs).result()


def machine() -> dict[str, object]:
    """The machine, for each row of results."""
    models = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return {
        "processor": models[0].split(": ", 1)[1] if models else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": f"{platform.system()} {platform.release()}",
        "load_average": round(os.getloadavg()[0], 2),
    }


def versions(python: Path, packages: Sequence[str], directory: Path) -> dict[str, str]:
    """Versions of an interpreter and of packages in its environment; "none" if a package is not installed."""
    question = (
        "import importlib.metadata as m, json, platform, sys\n"
        "found = {d.name.replace('-', '_'): d.version for d in m.distributions() if d.name}\n"
        "print(json.dumps({'python': platform.python_version(), **{p: found.get(p, 'none') for p in sys.argv[1:]}}))"
    )
    answer = subprocess.run(
        [str(python), "-c", question, *packages], cwd=directory, check=True, capture_output=True, text=True
    ).stdout
    found: dict[str, str] = json.loads(answer)
    return found


def table(heads: Sequence[str], rows: Iterable[Iterable[object]]) -> str:
    """A Markdown table."""
    return "\n".join(f"| {' | '.join(map(str, cells))} |" for cells in (heads, ["---"] * len(heads), *rows))
