"""Measure what a command costs: wall-clock seconds and peak memory.

Why it exists. A tool's cost is what its user waits for and what their machine must hold, start-up included, so commands
are measured from outside, as they are typed. Contenders alternate (A B, B A, A B, ...), so that a machine that warms up
or is shared slows all of them alike; the median over repeats is the figure, smallest and largest are its spread.

Memory is the kernel's own maximum of pages in memory, mapped files included: an upper bound, since the kernel may drop
mapped pages.

Limits. Linux. The kernel carries the maximum of a process over from the one that started it, so this process must stay
small: big work around a measurement belongs into `in_fresh_process`. Of child processes only the largest counts.
"""

from __future__ import annotations

import concurrent.futures
import json
import math
import multiprocessing
import os
import platform
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ParamSpec, TypeVar

_P = ParamSpec("_P")
_R = TypeVar("_R")


@dataclass(frozen=True)
class Command:
    """A command line and where it runs.

    Attributes:
        arguments: Program and arguments.
        directory: Working directory; a neutral one keeps a package of the same name from being imported by accident.
        environment: Variables, the whole of them.
    """

    arguments: Sequence[str]
    directory: Path
    environment: Mapping[str, str] = field(default_factory=lambda: dict(os.environ))


@dataclass(frozen=True)
class Run:
    """What one run of a command took, and said."""

    seconds: float
    peak_rss_bytes: int
    output: str
    errors: str


class CommandFailedError(RuntimeError):
    """A measured command exited with another code than 0: its time means nothing."""


def run(command: Command) -> Run:
    """Run a command once and measure it.

    Raises:
        CommandFailedError: It failed.
    """
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
        done = Run(seconds, usage.ru_maxrss * 1024, output.read(), errors.read())
    if process.returncode != 0:
        tail = "\n".join((done.output + done.errors).splitlines()[-15:])
        raise CommandFailedError(f"exit code {process.returncode} from {' '.join(command.arguments)}\n{tail}")
    return done


def summary(seconds: Sequence[float], digits: int = 4) -> dict[str, object]:
    """Median, extremes and all values, rounded to `digits` significant digits."""

    def short(value: float) -> float:
        return value if value == 0 else round(value, digits - 1 - math.floor(math.log10(abs(value))))

    return {
        "median": short(statistics.median(seconds)),
        "min": short(min(seconds)),
        "max": short(max(seconds)),
        "all": [short(value) for value in seconds],
    }


@dataclass(frozen=True)
class Contender:
    """One way to do a job.

    Attributes:
        name: Its name in the table.
        command: What is measured.
        prepare: Runs before each repeat, unmeasured: puts files back as they were.
        seconds_of: How long the run took; the default is its wall-clock time, start-up included.
    """

    name: str
    command: Command
    prepare: Callable[[], None] = lambda: None
    seconds_of: Callable[[Run], float] = lambda run: run.seconds


@dataclass(frozen=True)
class Measurement:
    """Repeats of one contender."""

    contender: Contender
    seconds: Sequence[float]
    peak_rss_bytes: int


def alternate(
    contenders: Sequence[Contender], repeats: int, progress: Callable[[str], None] = lambda _: None
) -> list[Measurement]:
    """Measure contenders in turns, in the other direction every second round.

    Args:
        contenders: What to compare.
        repeats: Rounds; every contender runs once in each.
        progress: Gets one line per run.

    Returns:
        One measurement per contender, in the order given; memory is the largest of its repeats.

    Raises:
        CommandFailedError: A command failed.
    """
    runs: dict[str, list[Run]] = {contender.name: [] for contender in contenders}
    for turn in range(repeats):
        for contender in contenders if turn % 2 == 0 else contenders[::-1]:
            contender.prepare()
            done = run(contender.command)
            runs[contender.name].append(done)
            progress(
                f"{contender.name}: {contender.seconds_of(done):.3g} s, "
                f"{done.peak_rss_bytes / 1e6:,.0f} MB ({turn + 1} of {repeats})"
            )
    return [
        Measurement(
            contender,
            [contender.seconds_of(done) for done in runs[contender.name]],
            max(done.peak_rss_bytes for done in runs[contender.name]),
        )
        for contender in contenders
    ]


def in_fresh_process(work: Callable[_P, _R], *args: _P.args, **kwargs: _P.kwargs) -> _R:
    """Call a function of an importable module in a new process, so that its memory stays out of this one."""
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn) as pool:
        return pool.submit(work, *args, **kwargs).result()


def machine() -> dict[str, object]:
    """The machine in words and numbers, for each row of results."""
    cpuinfo = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    models = [line.split(":", 1)[1].strip() for line in cpuinfo.splitlines() if line.startswith("model name")]
    return {
        "processor": models[0] if models else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": f"{platform.system()} {platform.release()}",
        "load_average": round(os.getloadavg()[0], 2),
    }


def versions(python: Path, packages: Sequence[str], directory: Path) -> dict[str, str]:
    """Versions of an interpreter and of packages in its environment; "none" for what is not installed."""
    question = (
        "import importlib.metadata as m, json, platform, sys\n"
        "def v(p):\n"
        "    try: return m.version(p)\n"
        "    except m.PackageNotFoundError: return 'none'\n"
        "print(json.dumps({'python': platform.python_version(), **{p: v(p) for p in sys.argv[1:]}}))"
    )
    answer = subprocess.run(
        [str(python), "-c", question, *packages], cwd=directory, check=True, capture_output=True, text=True
    ).stdout
    found: dict[str, str] = json.loads(answer)
    return found
