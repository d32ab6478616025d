"""Checkpoints, written so that a result is there whole or not at all.

An output is first an unnamed file in its folder (Linux's O_TMPFILE; elsewhere a temporary sibling). It gets its name
only after its last byte is on the disk, in one step that replaces an older file of that name. Whatever ends the process
before, kill -9 included, the unnamed file goes with it and the old file stays; a sibling that a kill left is removed by
the next write into that folder. Where the name is a symbolic link, the file that it leads to is made or replaced, and
the link stays. A pipe, device or socket is never replaced.

Several files cannot get their names in one step, so a sharded checkpoint is never replaced: an index that exists is
refused. Shards get their names first, over shards that no index names; the index, last, makes them a checkpoint.

Sizes are known before the first byte, so the header is written first and tensors follow in any order, from any thread,
each at its place. Copies from another checkpoint go through the kernel (copy_file_range) and never through Python.

Tensors are laid out by alignment, widest first, otherwise in the order given: readers that map files (the safetensors
library among them) need a float32 to begin at a multiple of 4.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import OutputError, StrPath
from ..telling import size
from . import positioned
from .header import DTYPE_BITS, TensorInfo, serialize_header, tensor_nbytes
from .positioned import MOST_BYTES, OPEN_FLAGS, WINDOWS, close, is_plain_on_windows, lock, opened, sync_folder, taken
from .reader import BIT_DTYPES, INDEX_SUFFIX, Checkpoint, CheckpointFile, special_kind

UNNAMED = Path("/proc/self/fd")
"""Where Linux shows open files; a file made with O_TMPFILE gets its name from its entry there."""

READ_BYTES = 1 << 24
"""What is read at a time where the kernel does not copy."""

_NO_TMPFILE = frozenset({errno.EOPNOTSUPP, errno.EISDIR, errno.ENOENT, errno.EINVAL})
_MISSING = frozenset({errno.ENOSYS, errno.EOPNOTSUPP})
_TEMPORARY = re.compile(r"\.convert_to_quant\.[0-9a-f]{16}\.tmp")


def _output_error(error: OSError, path: Path) -> OutputError:
    """One sentence for what the system said."""
    reasons = {
        errno.ENOSPC: "the disk is full",
        errno.EDQUOT: "the disk quota is used up",
        errno.EFBIG: "the file system allows no file that large",
        errno.EACCES: "no permission to write there" + (", or another program has it open" if WINDOWS else ""),
        errno.EROFS: "the file system is read-only",
        errno.ENOENT: f"the folder {path.parent} does not exist",
        errno.ENOTDIR: f"{path.parent} is not a folder",
        errno.EISDIR: "it is a folder",
        errno.ENXIO: "no program reads from this pipe",
        **dict.fromkeys(_MISSING, "its file system cannot rename or write at a position; use another"),
    }
    reason = reasons.get(error.errno or 0, error.strerror or str(error))
    return OutputError(f"cannot be written: {reason}", path=path)


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Say of what the system refuses, in one sentence, why the file cannot be written."""
    try:
        yield
    except OSError as error:
        raise _output_error(error, path) from None


def refuse_same_file(output: Path, inputs: Iterable[Path], *, hint: str | None = None) -> None:
    """Refuse an output that is one of the inputs, also through a symbolic or hard link.

    Raises:
        OutputError: `output` is one of `inputs`.
    """
    for path in inputs:
        if is_one_file(output, path):
            raise OutputError(f"the output is the same file as the input {path}", path=output, hint=hint)


def is_one_file(one: Path, other: Path) -> bool:
    """Whether two paths are one file, whatever they are called; neither need exist."""
    try:
        return os.path.realpath(one) == os.path.realpath(other) or one.samefile(other)
    except OSError:  # one of them does not exist, so they are two
        return False


def check_output(path: Path, *, stream: bool = False) -> None:
    """Refuse an output that cannot be written, or that writing would destroy. Call it before any work.

    Args:
        path: the output; a symbolic link stands for what it leads to.
        stream: accept a pipe or a character device too, which `write_bytes` then writes into.

    Raises:
        OutputError: it is a folder, a pipe, a device or a socket, or the index of a sharded checkpoint that exists, or
            its folder does not exist.
    """
    if WINDOWS and not stream and not is_plain_on_windows(path.name):
        raise OutputError(
            "cannot be written: Windows keeps this name for a device, or drops its last letter", path=path
        )
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        folder = Path(os.path.realpath(path)).parent if path.is_symlink() else path.parent
        if not folder.is_dir():
            raise OutputError(f"cannot be written: the folder {folder} does not exist", path=path) from None
        return
    except OSError as error:
        raise _output_error(error, path) from None
    if stat.S_ISDIR(mode):
        raise OutputError("cannot be written: it is a folder", path=path)
    special = special_kind(mode)
    if special and not (stream and _is_stream(mode)):
        raise OutputError(f"cannot be written: a file was expected, and this is {special}", path=path)
    if path.name.endswith(INDEX_SUFFIX):
        problem = "a sharded checkpoint is there already, and several files cannot be replaced in one step"
        raise OutputError(problem, path=path, hint="delete the index and its shards first, or name another output")


def rehearse(path: Path) -> list[str]:
    """Find out, before any work, whether a checked output can be written: write, name, replace and remove a small file.

    Args:
        path: the output.

    Returns:
        What a user should know of the folder: what was removed from it, and what it does not say.

    Raises:
        OutputError: the folder is not writable, or its file system lacks something that writing needs.
    """
    folder = Path(os.path.realpath(path)).parent
    notes = clear_left_overs(folder)
    if _free_bytes(folder) == 0:
        notes.append(f"the drive of {folder} reports no free space; writing is tried all the same")
    trial = _sibling(folder)
    try:
        with contextlib.closing(PendingFile(trial)) as first, contextlib.closing(PendingFile(trial)) as second:
            try:
                for pending in (first, second):
                    for offset in (1, 0):
                        pending.write(offset, b"\0")
                    pending.take_name()
            finally:
                trial.unlink(missing_ok=True)
    except OSError as error:
        raise _output_error(error, path) from None
    except OutputError as error:
        raise OutputError(error.problem, path=path) from None
    return notes


def clear_left_overs(folder: Path) -> list[str]:
    """Remove temporary files that killed runs left in a folder. Those of runs that go on are locked, and stay.

    Returns:
        A line for each that was removed.
    """
    try:
        with os.scandir(folder) as entries:
            names = sorted(entry.name for entry in entries if is_left_over(entry.name))
    except OSError:  # a folder that may not be listed, or that is not there
        return []
    lines = []
    for name in names:
        with contextlib.suppress(OSError):
            with opened(folder / name, os.O_RDWR | getattr(os, "O_NOFOLLOW", 0)) as fd:
                lock(fd)
                nbytes = os.fstat(fd).st_size
                if not WINDOWS:
                    (folder / name).unlink()
            if WINDOWS:  # which removes no open file, and so none of a run that goes on
                (folder / name).unlink()
            lines.append(f"removed {folder / name} ({nbytes:,} bytes), which an interrupted run left")
    return lines


def is_left_over(name: str) -> bool:
    """Whether a file bears the name of a temporary one."""
    return _TEMPORARY.fullmatch(name) is not None


def _sibling(folder: Path) -> Path:
    """A temporary file's name: short, whatever the output's."""
    return folder / f".convert_to_quant.{os.urandom(8).hex()}.tmp"


def _is_stream(mode: int) -> bool:
    return stat.S_ISFIFO(mode) or stat.S_ISCHR(mode)


class PendingFile:
    """A file that has no name until `commit`.

    Args:
        path: the name it will get; its folder must exist. A symbolic link is followed.
        like: the file whose owner and permissions it gets, as far as the system lets us; by default those of the file
            that it replaces.

    Raises:
        OutputError: the folder is missing or not writable, or `path` is a folder or a special file.
    """

    def __init__(self, path: Path, like: os.stat_result | None = None) -> None:
        self.path = path
        self._target = Path(os.path.realpath(path))
        self._temporary: Path | None = None
        check_output(path)
        clear_left_overs(self._target.parent)
        with _writing(path):
            self.fd = self._open(like)

    def _open(self, like: os.stat_result | None) -> int:
        if like is None and self._target.exists():
            like = self._target.stat()
        if like is None:
            return self._open_new(0o666)
        mode = stat.S_IMODE(like.st_mode) & 0o777
        fd = self._open_new(mode)
        for owner in (like.st_uid, -1):  # only root gives files away; a group may be one of ours
            with contextlib.suppress(AttributeError, OSError):  # no such call; or some drives know no owners
                os.fchown(fd, owner, like.st_gid)
                break
        with contextlib.suppress(AttributeError, OSError):
            os.fchmod(fd, mode)  # whatever the umask
        return fd

    def _open_new(self, mode: int) -> int:
        folder = self._target.parent
        if hasattr(os, "O_TMPFILE") and folder.is_dir() and UNNAMED.is_dir():
            try:
                fd = os.open(folder, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, mode)
                taken(fd)  # locks it, for the time when it bears a sibling's name
                return fd
            except OSError as error:
                if error.errno not in _NO_TMPFILE:
                    raise
        while True:
            self._temporary = _sibling(folder)
            fd = os.open(self._temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | OPEN_FLAGS, mode)
            if not taken(fd) and self._temporary.exists():
                return fd
            close(fd)  # before it was locked, another run took it for a left-over

    @property
    def place(self) -> Path:
        """Where the bytes can be read before the file has its name."""
        return self._temporary or UNNAMED / str(self.fd)

    def write(self, offset: int, buffer: Any) -> None:
        """Write all of a buffer at a byte offset. Safe from several threads.

        Raises:
            OutputError: the disk is full, or another system error.
        """
        with _writing(self.path):
            positioned.write_at(self.fd, buffer, offset)

    def copy(self, source: CheckpointFile, source_offset: int, offset: int, count: int) -> None:
        """Copy bytes from another open file, inside the kernel where it can.

        Raises:
            CheckpointError: the source cannot be read, or ended early.
            OutputError: the disk is full, or another system error.
        """
        while count:
            copied = _copy_once(source.fd, self.fd, min(count, MOST_BYTES), source_offset, offset)
            if copied == 0:  # the kernel could not, or the source ended; which side is at fault shows here
                data = source.read(source_offset, min(count, READ_BYTES))
                self.write(offset, data)
                copied = len(data)
            source_offset, offset, count = source_offset + copied, offset + copied, count - copied

    def sync(self) -> None:
        """Put the bytes on the disk.

        Raises:
            OutputError: the disk is full, or another system error.
        """
        with _writing(self.path):
            positioned.sync(self.fd)

    def commit(self) -> None:
        """Put the bytes on the disk and give the file its name, replacing an older regular file of that name.

        Raises:
            OutputError: the system refused.
        """
        with contextlib.closing(self):
            self.sync()
            self.take_name()
            sync_folder(self._target.parent)

    def take_name(self) -> None:
        """Give the file its name, replacing an older regular file of that name.

        Raises:
            OutputError: the system refused.
        """
        check_output(self.path)  # what bears the name may be another thing by now
        with _writing(self.path):
            if self._temporary is None:
                try:
                    _name_unnamed(self.fd, self._target)
                except FileExistsError:
                    self._temporary = _sibling(self._target.parent)
                    _name_unnamed(self.fd, self._temporary)
            if self._temporary is not None:
                if WINDOWS:  # which renames no open file; elsewhere the lock says that it is no left-over
                    self._close()
                self._temporary.replace(self._target)
                self._temporary = None

    def close(self) -> None:
        """Drop the file if it has not been committed. Harmless when repeated."""
        self._close()
        if self._temporary is not None:
            with contextlib.suppress(OSError):  # the next write into the folder removes it
                self._temporary.unlink()
            self._temporary = None

    def _close(self) -> None:
        if self.fd >= 0:
            close(self.fd)
            self.fd = -1


def _name_unnamed(fd: int, path: Path) -> None:
    """Give a file made with O_TMPFILE its name (open(2): linkat on its entry in /proc, links followed)."""
    with opened(UNNAMED, os.O_RDONLY) as entries:
        os.link(str(fd), path, src_dir_fd=entries, follow_symlinks=True)  # only with a dir_fd is this linkat(2)


def _copy_once(source_fd: int, target_fd: int, count: int, source_offset: int, offset: int) -> int:
    """Let the kernel copy up to `count` bytes, and return how many it was; 0 where it could not."""
    with contextlib.suppress(AttributeError, OSError):  # no such call; or whatever reading or writing says again
        return os.copy_file_range(source_fd, target_fd, count, source_offset, offset)
    return 0


def write_bytes(path: Path, content: bytes, *, stream: bool = False, like: os.stat_result | None = None) -> None:
    """Write a small file, whole or not at all.

    Args:
        path: the file.
        content: its bytes.
        stream: write into `path` where it is a pipe or a character device.
        like: see `PendingFile`.

    Raises:
        OutputError: it cannot be written.
    """
    check_output(path, stream=stream)
    if not (stream and path.exists() and _is_stream(path.stat().st_mode)):
        with contextlib.closing(PendingFile(path, like)) as pending:
            pending.write(0, content)
            pending.commit()
        return
    with _writing(path):
        # Opening a pipe that nobody reads would wait for ever; with O_NONBLOCK the system says so (ENXIO).
        fd = os.open(path, os.O_WRONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0) | OPEN_FLAGS)
        with os.fdopen(fd, "wb") as file:
            if hasattr(os, "O_NONBLOCK"):
                os.set_blocking(fd, True)
            file.write(content)


@dataclass(frozen=True)
class Spec:
    """A tensor to be written: its dtype in safetensors' spelling, and its shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        size = tensor_nbytes(self.dtype, self.shape)
        assert size is not None, "sub-byte tensors are only ever copied whole"
        return size

    @staticmethod
    def like(info: TensorInfo) -> Spec:
        """The spec of a tensor that exists."""
        return Spec(info.dtype, info.shape)


@dataclass(frozen=True)
class Entry:
    """A small tensor with its bytes.

    Attributes:
        spec: dtype and shape.
        data: the bytes, C order.
    """

    spec: Spec
    data: bytes

    @staticmethod
    def of(array: NDArray[Any], dtype: str | None = None) -> Entry:
        """Make an entry of an array.

        Args:
            array: any shape; bit patterns where numpy lacks the dtype (uint16 for "BF16", uint8 for FP8).
            dtype: safetensors' spelling; by default the one that has the array's own dtype.
        """
        if dtype is None:
            dtype = next((name for name, known in BIT_DTYPES.items() if np.dtype(known) == array.dtype), "none")
        assert dtype in DTYPE_BITS, f"safetensors has no {array.dtype}"
        assert DTYPE_BITS[dtype] == array.dtype.itemsize * 8, f"{array.dtype} holds no {dtype}"
        return Entry(Spec(dtype, array.shape), np.ascontiguousarray(array).tobytes())


def lay_out(specs: Mapping[str, Spec]) -> list[TensorInfo]:
    """Places in a data block: by alignment, widest first, else in the order given."""
    infos: list[TensorInfo] = []
    end = 0
    for name, spec in sorted(specs.items(), key=lambda item: -DTYPE_BITS[item[1].dtype]):
        infos.append(TensorInfo(name, spec.dtype, spec.shape, end, end + spec.nbytes))
        end += spec.nbytes
    return infos


class _OutputFile:
    """One safetensors file in the making."""

    def __init__(self, path: Path, specs: Mapping[str, Spec], metadata: Mapping[str, str]) -> None:
        infos = lay_out(specs)
        self.infos = {info.name: info for info in infos}
        self.written: dict[str, list[int]] = {name: [] for name in self.infos}  # bytes of each part, from any thread
        self.header = serialize_header(infos, metadata)
        self.data_start = len(self.header)
        self.total_bytes = self.data_start + (infos[-1].stop if infos else 0)
        self.pending = PendingFile(path)


def _free_bytes(folder: Path) -> int | None:
    """What the system says of a folder's drive; None where it does not know."""
    with contextlib.suppress(OSError):
        disk = shutil.disk_usage(folder)
        return disk.free if disk.total else None  # network drives say 0 for "unknown"
    return None


class CheckpointWriter:
    """Writes one checkpoint of one or more files. Use it as a context manager: leaving it without an error commits.

    Args:
        files: for each file its path and the tensors in it.
        metadata: the `__metadata__` of every file.
        index: where to write a shard index, for a checkpoint of several files.

    Raises:
        OutputError: a file cannot be made there, or the disk has no room.
    """

    def __init__(
        self, files: Sequence[tuple[Path, Mapping[str, Spec]]], metadata: Mapping[str, str], index: Path | None = None
    ) -> None:
        self._index = index
        self._files: list[_OutputFile] = []
        self._file_of: dict[str, _OutputFile] = {}
        with contextlib.ExitStack() as stack:
            for path, specs in files:
                file = _OutputFile(path, specs, metadata)
                stack.enter_context(contextlib.closing(file.pending))
                file.pending.write(0, file.header)
                self._files.append(file)
                self._file_of |= dict.fromkeys(specs, file)
            first, needed_bytes = files[0][0], sum(file.total_bytes for file in self._files)
            free_bytes = _free_bytes(first.parent)
            if free_bytes and free_bytes < needed_bytes:  # 0 may mean anything, and is tried
                sizes = f"it needs {size(needed_bytes)} and the disk has {size(free_bytes)} free"
                raise OutputError(f"cannot be written: {sizes}", path=first)
            self._stack = stack.pop_all()

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with self._stack:
            if kind is None:
                self._commit()

    def write(self, name: str, buffer: Any, offset_bytes: int = 0) -> None:
        """Write the bytes of a C-contiguous buffer into a tensor, from any thread."""
        file = self._file_of[name]
        info = file.infos[name]
        nbytes = memoryview(buffer).nbytes
        assert offset_bytes + nbytes <= info.nbytes, f"{name}: {offset_bytes} + {nbytes} > {info.nbytes}"
        if nbytes:
            file.pending.write(file.data_start + info.start + offset_bytes, buffer)
        file.written[name].append(nbytes)

    def copy(self, source: Checkpoint, names: Mapping[str, str]) -> None:
        """Copy tensors byte for byte, neighbours in one piece; `names` maps those of the output to the source's."""
        by_file: dict[tuple[CheckpointFile, _OutputFile], list[tuple[int, int, int]]] = {}
        for name, source_name in names.items():
            if source_name in source.computed:
                self.write(name, source.raw(source_name))
                continue
            file = self._file_of[name]
            info, source_info = file.infos[name], source.tensors[source_name]
            assert info.nbytes == source_info.nbytes, name
            source_file = source.file_of(source_name)
            start = source_file.header.data_start + source_info.start
            runs = by_file.setdefault((source_file, file), [])
            runs.append((start, file.data_start + info.start, info.nbytes))
            file.written[name].append(info.nbytes)
        for (source_file, file), runs in by_file.items():
            for start, offset, nbytes in _joined(runs):
                file.pending.copy(source_file, start, offset, nbytes)

    def reopen(self, path: Path) -> Checkpoint:
        """The output as a checkpoint, when all its tensors have been written but before it is committed.

        Args:
            path: what messages call it: the input, say, since no file bears the output's name yet.
        """
        files = [CheckpointFile(path, file.pending.place) for file in self._files]
        return Checkpoint(path, files, sharded=self._index is not None)

    def overwrite(self, file: int, offset: int, data: bytes) -> None:
        """Change bytes that were written already, at a position in a file of `reopen().files`, header included."""
        self._files[file].pending.write(offset, data)

    def _commit(self) -> None:
        for file in self._files:
            for name, info in file.infos.items():
                written = sum(file.written[name])
                assert written == info.nbytes, f"{name}: {written} of {info.nbytes} bytes written"
        for file in self._files:  # a disk that fills up late says so here, before any shard has its name
            file.pending.sync()
        if self._index is None:
            for file in self._files:
                file.pending.commit()
            return
        total = sum(info.nbytes for file in self._files for info in file.infos.values())
        weight_map = {name: file.pending.path.name for file in self._files for name in file.infos}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        named: list[Path] = []
        with _alone(self._index):
            check_output(self._index)  # no index may name the shards that are replaced
            try:
                for file in self._files:
                    file.pending.commit()
                    named.append(file.pending.path)
                write_bytes(self._index, json.dumps(index, indent=2, ensure_ascii=False).encode("utf-8"))
            except BaseException:
                if not os.path.lexists(self._index):
                    for path in named:
                        with contextlib.suppress(OSError):
                            path.unlink()
                raise


@contextlib.contextmanager
def _alone(index: Path) -> Iterator[None]:
    """Lock an index's folder against other writers of shards, where the system lets one."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            if taken(stack.enter_context(opened(index.parent, os.O_RDONLY))):
                problem = "another process is writing shards into this folder"
                raise OutputError(problem, path=index, hint="run the command again")
        yield


def _joined(runs: list[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
    """(source, target, count) runs with neighbours on both sides joined."""
    joined: list[tuple[int, int, int]] = []
    for source, target, count in sorted(runs):
        first, second, before = joined[-1] if joined else (-1, -1, 0)
        if (source, target) == (first + before, second + before):
            joined[-1] = (first, second, before + count)
        else:
            joined.append((source, target, count))
    return joined


def write_checkpoint(path: StrPath, entries: Mapping[str, Entry], metadata: Mapping[str, str] | None = None) -> None:
    """Write one small safetensors file, whole or not at all.

    Raises:
        OutputError: it cannot be written.
    """
    specs = {name: entry.spec for name, entry in entries.items()}
    with CheckpointWriter([(Path(path), specs)], metadata or {}) as writer:
        for name, entry in entries.items():
            writer.write(name, entry.data)


def output_files(
    output: Path, source: Checkpoint, place: Callable[[str], str], specs: Mapping[str, Spec]
) -> tuple[list[tuple[Path, Mapping[str, Spec]]], Path | None]:
    """Which file each tensor of an output goes into: shard for shard as the source has it, or one file.

    Args:
        output: a `.safetensors` path, or a `.safetensors.index.json` path for shards.
        source: the checkpoint that is being rewritten.
        place: output tensor -> a tensor of the source whose shard it follows.
        specs: all output tensors.

    Returns:
        What `CheckpointWriter` takes as files, and as index.
    """
    if not output.name.endswith(INDEX_SUFFIX):
        return [(output, specs)], None
    stem = output.name[: -len(INDEX_SUFFIX)]
    shards: dict[Path, dict[str, Spec]] = {file.path: {} for file in source.files}
    for name, spec in specs.items():
        shards[source.path_of(place(name))][name] = spec
    filled = [shard for shard in shards.values() if shard]
    names = (f"{stem}-{number:05}-of-{len(filled):05}.safetensors" for number in range(1, len(filled) + 1))
    return [(output.with_name(name), shard) for name, shard in zip(names, filled, strict=True)], output
