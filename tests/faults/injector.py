"""Fails, cuts short, or kills a writer at every system call it makes, then inspects what is left.

    python tests/faults/injector.py [--all] [--jobs N] [WRITER ...]

Every run is a forked child with everything imported, in which the functions of `os` that writers call are replaced. The
n-th call raises an error (once, or from then on), writes half of the data, or is preceded by a SIGKILL. Two kinds of
drive are simulated: with unnamed files and copies inside the kernel, and without. After each run

- every output is the older file or the new one, to the byte, and so is a set of shards as its index shows it;
- a file changed in place is the old one, the new one, or has an undo file;
- every input is unchanged, and nothing else is in the folder except what a kill may leave;
- a command that failed said so in one line; one that did not fail did its work;
- the next run does its work and removes leftovers.

Prints one line of JSON per writer and drive: calls, runs, and problems, of which there should be none.
"""

from __future__ import annotations

import argparse
import errno
import fcntl
import gc
import itertools
import json
import multiprocessing
import os
import pathlib
import re
import shutil
import signal
import sys
import tempfile
import threading
import traceback
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

ERRORS = ("ENOSPC", "EIO", "EINTR", "EACCES")
KILL, SHORT, LASTING = "kill", "short", "lasting "
WRITES = {"write": 1, "pwrite": 1, "copy_file_range": 2}
"""Calls that may write less than requested, and the argument that limits how much."""

CALLS = ("open", *WRITES, "pread", "preadv", "fsync", "link", "replace", "unlink", "mkdir", "fchmod", "fchown",
         "scandir", "statvfs", "fstat", "close")  # fmt: skip
LEFT = re.compile(r"\.convert_to_quant\.[0-9a-f]{16}\.tmp|m-\d{5}-of-\d{5}\.safetensors")
"""Files that a kill may leave until the next run: temporary files, and shards without their index."""

POSIX_ONLY = (
    *("O_TMPFILE", "O_NOFOLLOW", "O_NONBLOCK", "O_NOCTTY", "O_CLOEXEC", "O_DIRECTORY", "copy_file_range", "link"),
    *("fchmod", "fchown", "chown", "pread", "preadv", "pwrite", "pwritev", "geteuid", "set_blocking"),
)


def taken_away(*names: str) -> None:
    """Remove functions and flags of `os` that a system lacks."""
    for name in names:
        if hasattr(os, name):
            delattr(os, name)


def refused(*names: str) -> None:
    """Let calls fail as on a drive that does not support them."""

    def refuse(*_arguments: Any, **_more: Any) -> Any:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    for name in names:
        _replace_call(name, refuse)


def as_on_windows() -> None:
    """Imitate Windows: open files cannot be renamed, replaced or removed, and folders cannot be opened."""
    from convert_to_quant.checkpoint import writer

    def guarded(real: Any) -> Any:
        def call(*arguments: Any, **more: Any) -> Any:
            held = {os.path.realpath(fd) for fd in Path("/proc/self/fd").iterdir()}
            if held & {os.path.realpath(path) for path in arguments[:2] if isinstance(path, (str, os.PathLike))}:
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
            return real(*arguments, **more)

        return call

    def opened(path: Any, flags: int, *more: Any, real: Any = os.open, **further: Any) -> int:
        if Path(path).is_dir():
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        fd: int = real(path, flags, *more, **further)
        return fd

    for name in ("rename", "replace", "unlink", "remove"):
        _replace_call(name, guarded(getattr(os, name)))
    _replace_call("open", opened)
    sys.modules["fcntl"] = None  # type: ignore[assignment]
    taken_away(*POSIX_ONLY)
    writer.WINDOWS = True


def _replace_call(name: str, value: Any) -> None:
    setattr(os, name, value)
    if hasattr(pathlib, "_NormalAccessor"):  # Python 3.10
        setattr(pathlib._NormalAccessor, name, staticmethod(value))


DRIVES = ("unnamed files", "named files")
LACKING = {
    "unnamed files": lambda: None,
    "named files": lambda: taken_away("O_TMPFILE", "copy_file_range"),
    "no owners, permissions and locks": lambda: (refused("fchown", "fchmod"), sys.modules.update(fcntl=None)),
    "Windows": as_on_windows,
    "no names for unnamed files": lambda: refused("link"),
    "no renaming": lambda: (taken_away("O_TMPFILE"), refused("replace")),
}
"""What a system or drive lacks. The first two are swept."""

Files = dict[str, bytes]


class Writer(NamedTuple):
    """A command that writes.

    Attributes:
        words: its command line.
        older: outputs that already exist.
        changed: the file that it changes in place.
        torn: whether that file is half changed at the start.
    """

    words: str
    older: tuple[str, ...] = ()
    changed: str | None = None
    torn: bool = False


OUT = "out.safetensors"
WRITERS = {
    "convert": Writer(f"-i bf16.safetensors -o {OUT}"),
    "convert over an older file": Writer(f"-i bf16.safetensors -o {OUT}", older=(OUT,)),
    "calibrate": Writer(f"-i fp8.safetensors -o {OUT} --actcal --actcal-engine layer --actcal-samples 2"),
    "patch to a new file": Writer(f"apply fp8.safetensors stats.safetensors -o {OUT}"),
    "patch in place": Writer("apply fp8.safetensors stats.safetensors --in-place", changed="fp8.safetensors"),
    "undo": Writer("apply fp8.safetensors stats.safetensors --in-place", changed="fp8.safetensors", torn=True),
    "shards": Writer("-i in.safetensors.index.json -o m.safetensors.index.json"),
    "statistics": Writer(f"merge stats.safetensors more.safetensors -o {OUT}", older=(OUT,)),
    "report": Writer(
        "report stats.safetensors fp8.safetensors -o r.html --png r.png --csv r.csv --json r.json", older=("r.csv",)
    ),
    "configuration": Writer(f"-i bf16.safetensors -o {OUT} --save-config c.toml --json j.json", older=("c.toml",)),
    "ComfyUI pack": Writer("comfyui install ."),
}


class Fault(NamedTuple):
    """A fault at a call: the name of an error, once or from then on; KILL; or SHORT."""

    what: str
    number: int


class Outcome(NamedTuple):
    """The end of a run: exit code, output, the calls it made, and the one hit by the fault."""

    code: int
    said: str
    calls: list[str]
    met: str | None


def make_inputs(folder: Path) -> None:
    """Small files of every kind that the writers read."""
    import numpy as np
    import torch

    from convert_to_quant.checkpoint import Entry, write_checkpoint
    from convert_to_quant.recorder import Recording

    names = ("blocks.0", "blocks.1")
    weights = {f"{name}.weight": Entry.of(np.full((16, 32), 0x3F80, np.uint16), "BF16") for name in names}
    write_checkpoint(folder / "bf16.safetensors", {**weights, "x": Entry.of(np.arange(9, dtype=np.float32))})
    for number, name in enumerate(weights, 1):
        write_checkpoint(folder / f"in-{number}.safetensors", {name: weights[name]})
    index = {"weight_map": {name: f"in-{number}.safetensors" for number, name in enumerate(weights, 1)}}
    (folder / "in.safetensors.index.json").write_text(json.dumps(index))
    recording = Recording(dict.fromkeys(names, (16, 32)), {name: [name] for name in names})
    for number in range(2):
        recording.observe(number, torch.full((1, 4, 32), 3.0 + number))
    for name in ("stats", "more"):
        recording.statistics(samples=1, engine="a test").save(folder / f"{name}.safetensors")
    (folder / "custom_nodes").mkdir()
    assert call(folder, ["-i", "bf16.safetensors", "-o", "fp8.safetensors"]).code == 0


def look(folder: Path) -> Files:
    """Every file of a folder by relative path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def lay(folder: Path, files: Files) -> None:
    """Reset a folder to these files; undo files refer to others by inode number."""
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "custom_nodes").mkdir(parents=True)
    for name, content in sorted(files.items()):  # an undo file comes after its file
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".undo"):
            record = json.loads(content.partition(b"\n")[2])
            for one in record["files"]:
                one["inode"] = (folder / one["name"]).stat().st_ino
            body = json.dumps(record).encode()
            path.write_bytes(f"{zlib.crc32(body):08x}\n".encode() + body)
        else:
            path.write_bytes(content)


def call(folder: Path, words: list[str], fault: Fault | None = None, drive: str = DRIVES[0]) -> Outcome:
    """Run a command in a child with a fault."""
    told, tell = os.pipe()
    with tempfile.TemporaryFile() as said:
        child = os.fork()
        if not child:
            code = 97
            try:
                os.close(told)
                os.chdir(folder)
                for number, stream in enumerate(("stdout", "stderr"), 1):
                    os.dup2(said.fileno(), number)
                    setattr(sys, stream, open(number, "w", buffering=1, closefd=False))  # noqa: SIM115
                code = run(words, fault, drive, tell)
            except BaseException:
                traceback.print_exc()
            os._exit(code)
        os.close(tell)
        with os.fdopen(told) as lines:
            heard = lines.read().splitlines()
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        said.seek(0)
        met = next((line[1:] for line in heard if line.startswith("!")), None)
        return Outcome(code, said.read().decode(), [line.lstrip("!") for line in heard], met)


def run(words: list[str], fault: Fault | None, drive: str, tell: int) -> int:
    """Replace the calls and run the command; in the child."""
    from convert_to_quant import cli

    count, guard, write = itertools.count(1), threading.Lock(), os.write
    kill, close = os.kill, os.close

    def replaced(name: str, real: Any) -> Any:
        def call(*arguments: Any, **more: Any) -> Any:
            with guard:
                number = next(count)
                hit = fault is not None and (
                    number == fault.number or (fault.what.startswith(LASTING) and number > fault.number)
                )
                write(tell, f"{'!' if hit else ''}{name}\n".encode())
            if not hit or fault is None:
                return real(*arguments, **more)
            if fault.what == KILL:
                kill(os.getpid(), signal.SIGKILL)
            if fault.what == SHORT:
                words = list(arguments)
                if (place := WRITES.get(name)) is not None:  # calls of threads may come in another order
                    data = words[place]
                    words[place] = max(1, data // 2) if isinstance(data, int) else data[: max(1, len(data) // 2)]
                return real(*words, **more)
            if name == "close":  # Linux closes the file even if it reports an error
                close(*arguments)
            number = getattr(errno, fault.what.removeprefix(LASTING))
            raise OSError(number, os.strerror(number))

        return call

    for name in CALLS:
        if hasattr(os, name):
            _replace_call(name, replaced(name, getattr(os, name)))
    fcntl.flock = replaced("flock", fcntl.flock)
    LACKING[drive]()
    code = cli.main(words)
    if fault is not None and fault.what == KILL and next(count) == fault.number:
        kill(os.getpid(), signal.SIGKILL)  # after the last call
    return code


def faults(calls: list[str], every: bool) -> Iterator[Fault]:
    """The faults tried at each call of a run: all, or a kill and the errors in turn."""
    for number, name in enumerate(calls, 1):
        yield Fault(KILL, number)
        if name in WRITES:
            yield Fault(SHORT, number)
        errors = [*ERRORS, *(LASTING + error for error in ERRORS)]
        first, then = number % len(ERRORS), number // len(ERRORS) % len(ERRORS)
        for error in errors if every else [ERRORS[first], *([LASTING + ERRORS[then]] if first == 0 else [])]:
            yield Fault(error, number)
    yield Fault(KILL, len(calls) + 1)


def sweep(name: str, drive: str, inputs: Files, place: str, every: bool) -> dict[str, Any]:
    """Every fault at every call of one writer."""
    folder, writer = Path(place, f"job-{os.getpid()}"), WRITERS[name]
    words = writer.words.split()
    old = start = {**inputs, **dict.fromkeys(writer.older, b"older")}

    def ran(fault: Fault | None = None) -> tuple[Outcome, Files]:
        lay(folder, start)
        return call(folder, words, fault, drive), look(folder)

    clean, good = ran()
    if writer.torn:
        edits = [number for number, one in enumerate(clean.calls, 1) if one == "pwrite"]
        killed, start = ran(Fault(KILL, edits[-1]))
        assert killed.code == -signal.SIGKILL
        assert f"{writer.changed}.undo" in start
        clean, good = ran()
    problems = [f"without a fault: exit code {clean.code}: {clean.said}"] if clean.code else []
    counts: Counter[str] = Counter()
    for fault in faults(clean.calls, every):
        ended, now = ran(fault)
        counts["kills" if fault.what == KILL else "faults"] += 1
        found = list(judged(writer, old, start, good, now, ended, fault))
        left = set(now) - set(start) - set(good)
        if not found and (left or (ended.code and (every or fault.number % 4 == 0))):
            after = call(folder, words, drive=drive)
            last = look(folder)
            if "m.safetensors.index.json" not in now or now == start:
                found += [f"the next run fails: {after.said}"] if after.code else []
                found += [f"the next run leaves {one}" for one in set(last) ^ set(good)]
                found += [f"the next run makes another {one}" for one in good if last.get(one, b"") != good[one]]
            counts["next runs"] += 1
        problems += [f"{fault.what} at call {fault.number} ({ended.met}): {one}" for one in found]
    return {
        "writer": name, "drive": drive, "calls": len(clean.calls), **counts, "problems": problems
    }  # fmt: skip


def judged(
    writer: Writer, old: Files, start: Files, good: Files, now: Files, ended: Outcome, fault: Fault
) -> Iterator[str]:
    """What is wrong after a run."""
    killed, undo, index = ended.code == -signal.SIGKILL, f"{writer.changed}.undo", "m.safetensors.index.json"
    done = all(now.get(name) == content for name, content in good.items())
    wrong = {
        "bad exit code": not killed and ended.code not in (0, 1),
        "a traceback": "Traceback" in ended.said,
        "failed without a message": ended.code == 1 and "error: " not in ended.said,
        "succeeded without doing its work": ended.code == 0 and not done,
        "the index exists, but not all of its shards": index in now and not done,
    }
    yield from (f"{what} ({ended.code}): {ended.said}" for what, found in wrong.items() if found)
    for name in {*start, *good} - {undo}:
        if now.get(name) not in (start.get(name), good.get(name), old.get(name)) and not (
            name == writer.changed and undo in now
        ):
            yield f"{name} is neither the old file nor the new one"
    excused = killed or fault.what.startswith(LASTING) or ended.met in ("unlink", "scandir", "flock", "open", "fstat")
    expected = {undo, *start, *(good if index in now or index not in good else ())}
    for name in set(now) - expected:
        if not (excused and LEFT.fullmatch(Path(name).name)):
            yield f"{name} is left behind"


def main() -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("writers", nargs="*", metavar="WRITER", help=", ".join(WRITERS))
    parser.add_argument("--all", action="store_true", help="every error at every call")
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="processes (2)")
    args = parser.parse_args()

    from convert_to_quant import cli
    from convert_to_quant.report import picture

    picture.png = lambda _: b"png" * 1000  # what is drawn is not what is written
    memory = "/dev/shm"  # where there is one, a disk need not be waited for
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as place:
        base = Path(place, "base")
        base.mkdir()
        make_inputs(base)
        inputs = look(base)
        lay(Path(place, "warm"), inputs)
        os.chdir(Path(place, "warm"))
        real, sys.stderr = sys.stderr, open(os.devnull, "w")  # noqa: SIM115, PTH123
        for writer in WRITERS.values():  # once here, so that every child finds everything imported
            cli.main(writer.words.split())
        sys.stderr = real
        gc.freeze()  # or collections in the children copy every page
        tasks = [(name, drive, inputs, place, args.all) for name in args.writers or WRITERS for drive in DRIVES]
        with multiprocessing.get_context("fork").Pool(args.jobs) as pool:
            for found in pool.starmap(sweep, tasks, chunksize=1):
                sys.stdout.write(f"{json.dumps(found)}\n")
    return 0


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    sys.exit(main())
