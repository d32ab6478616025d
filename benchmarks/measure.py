"""Measure what a command costs: wall-clock seconds and peak memory of its whole process tree.

Why it exists. A tool's cost is what its user waits for and what their machine must hold, start-up and child processes
included, so commands are measured from outside, as they are typed. Contenders alternate (A B, B A, A B, ...), so that a
machine that warms up or is shared slows all of them alike; the median over repeats is the figure, smallest and largest
are its spread.

Two figures for memory, because a checkpoint is mapped into memory:
    peak_rss_bytes      pages in memory, mapped files included (the kernel's own maximum for one process, and the
                        largest sum over the tree that sampling saw): an upper bound. The kernel may drop mapped pages.
    peak_private_bytes  anonymous pages only (heap and stacks): what cannot be dropped. Sampled, so a peak shorter than
                        the interval is missed. None where /proc does not tell.

Limits. Linux. The kernel carries the maximum of a process over from the one that started it, so this process must stay
small: big work around a measurement belongs into `in_fresh_process`. Pages shared by several processes count once each.

    python benchmarks/measure.py --repeats 5 -- COMMAND ...
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import math
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ParamSpec, TypeVar

SAMPLE_SECONDS = 0.01
"""Between two looks at the memory; one look costs about 0.1 ms."""

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
    """What one run of a command took."""

    seconds: float
    peak_rss_bytes: int
    peak_private_bytes: int | None
    exit_code: int
    output: str
    errors: str


@dataclass(frozen=True)
class Spread:
    """Repeats of one figure."""

    values: tuple[float, ...]

    @property
    def median(self) -> float:
        """The figure to quote."""
        return statistics.median(self.values)

    def as_dict(self, digits: int = 4) -> dict[str, object]:
        """Median, extremes and all values, rounded to `digits` significant digits."""

        def short(value: float) -> float:
            return value if value == 0 else round(value, digits - 1 - math.floor(math.log10(abs(value))))

        return {
            "median": short(self.median),
            "min": short(min(self.values)),
            "max": short(max(self.values)),
            "all": [short(value) for value in self.values],
        }


class CommandFailedError(RuntimeError):
    """A measured command exited with another code than 0: its time means nothing."""

    def __init__(self, command: Command, run: Run) -> None:
        tail = "\n".join((run.output + run.errors).splitlines()[-15:])
        super().__init__(f"exit code {run.exit_code} from {' '.join(command.arguments)}\n{tail}")


class _MemoryWatch(threading.Thread):
    """Samples the memory of a process and its descendants until told to stop."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.pid = pid
        self.peak_rss_bytes = 0
        self.peak_private_bytes: int | None = None
        self.ended = threading.Event()

    def run(self) -> None:
        while not self.ended.wait(SAMPLE_SECONDS):
            seen = [usage for pid in _tree(self.pid) if (usage := _memory(pid)) is not None]
            if seen:
                self.peak_rss_bytes = max(self.peak_rss_bytes, sum(rss for rss, _ in seen))
                self.peak_private_bytes = max(self.peak_private_bytes or 0, sum(private for _, private in seen))


def _tree(pid: int) -> list[int]:
    pids = [pid]
    for parent in pids:  # grows while it is walked: children of children
        for listing in Path(f"/proc/{parent}/task").glob("*/children"):
            pids += _children(listing)
    return pids


def _children(listing: Path) -> list[int]:
    try:
        return [int(child) for child in listing.read_text().split()]
    except OSError:  # the thread ended between listing and reading
        return []


def _memory(pid: int) -> tuple[int, int] | None:
    """Resident and anonymous bytes of one process; None where it has ended or /proc does not tell."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return None
    kib = {
        line.split(":")[0]: int(line.split()[1])
        for line in status.splitlines()
        if line.startswith(("VmRSS", "RssAnon"))
    }
    return (kib["VmRSS"] * 1024, kib["RssAnon"] * 1024) if len(kib) == 2 else None


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
        watch = _MemoryWatch(process.pid)
        watch.start()
        try:
            _, status, usage = os.wait4(process.pid, 0)
        except BaseException:  # interrupted: leave no child behind
            process.kill()
            process.wait()
            raise
        finally:
            watch.ended.set()
            watch.join()
        seconds = time.perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        errors.seek(0)
        return Run(
            seconds=seconds,
            peak_rss_bytes=max(usage.ru_maxrss * 1024, watch.peak_rss_bytes),
            peak_private_bytes=watch.peak_private_bytes,
            exit_code=process.returncode,
            output=output.read(),
            errors=errors.read(),
        )


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
    seconds: Spread
    peak_rss_bytes: int
    peak_private_bytes: int | None
    last: Run


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
            if done.exit_code != 0:
                raise CommandFailedError(contender.command, done)
            runs[contender.name].append(done)
            progress(
                f"{contender.name}: {contender.seconds_of(done):.3g} s, "
                f"{done.peak_rss_bytes / 1e6:,.0f} MB ({turn + 1} of {repeats})"
            )
    return [
        Measurement(
            contender=contender,
            seconds=Spread(tuple(contender.seconds_of(done) for done in runs[contender.name])),
            peak_rss_bytes=max(done.peak_rss_bytes for done in runs[contender.name]),
            peak_private_bytes=max(
                (done.peak_private_bytes for done in runs[contender.name] if done.peak_private_bytes is not None),
                default=None,
            ),
            last=runs[contender.name][-1],
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


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure a command: seconds and peak memory of its process tree.")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("command", nargs=argparse.REMAINDER, help="the command, after --")
    options = parser.parse_args()
    arguments = options.command[1:] if options.command[:1] == ["--"] else options.command
    if not arguments:
        parser.error("no command")
    contender = Contender(arguments[0], Command(arguments, Path.cwd()))
    try:
        (result,) = alternate([contender], options.repeats, progress=lambda line: print(line, file=sys.stderr))
    except CommandFailedError as error:
        sys.exit(str(error))
    print(
        json.dumps(
            {
                "command": arguments,
                "seconds": result.seconds.as_dict(),
                "peak_rss_bytes": result.peak_rss_bytes,
                "peak_private_bytes": result.peak_private_bytes,
                "machine": machine(),
            },
            indent=2,
        )
    )


if __name__ == "__main__":
    main()
