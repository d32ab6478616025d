"""Atomic writing of checkpoints: an output is complete or does not exist.

An output starts as an unnamed file in its folder (Linux's O_TMPFILE; elsewhere a temporary sibling). Once all of it is
on disk it gets its name in one step, which replaces an older file of that name. If the process dies earlier, even by
kill -9, the unnamed file vanishes and the old file stays; a leftover sibling is removed by the next write into that
folder. A symbolic link stays, and its target is created or replaced. Pipes, devices and sockets are never replaced.

Several files cannot be named in one step, so a sharded checkpoint is never replaced: an existing index is refused.
Shards are named first, replacing shards that no index lists; the index comes last and makes them a checkpoint.

All sizes are known in advance, so the header is written first and tensors follow in any order, from any thread. Copies
from another checkpoint stay in the kernel (copy_file_range).

Tensors are laid out by alignment, widest first, otherwise in the given order: readers that memory-map files, such as
the safetensors library, need a float32 to begin at a multiple of 4.
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
"""Where Linux lists open files; a file made with O_TMPFILE gets its name through its entry there."""

READ_BYTES = 1 << 24
"""Bytes to read at a time where the kernel cannot copy."""

_NO_TMPFILE = frozenset({errno.EOPNOTSUPP, errno.EISDIR, errno.ENOENT, errno.EINVAL})
_TEMPORARY = re.compile(r"\.convert_to_quant\.[0-9a-f]{16}\.tmp")


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Turn system errors into an OutputError that says why a file cannot be written."""
    try:
        yield
    except OSError as error:
        unsupported = "its file system cannot rename files or write at an offset; use another"
        reasons = {
            errno.ENOENT: f"the folder {path.parent} does not exist",
            errno.ENOTDIR: f"{path.parent} is not a folder",
            errno.ENXIO: "no program reads from this pipe",
            errno.ENOSYS: unsupported,
            errno.EOPNOTSUPP: unsupported,
        }
        if WINDOWS:
            reasons[errno.EACCES] = "no permission, or another program has the file open"
        reason = reasons.get(error.errno or 0, error.strerror or str(error))
        raise OutputError(f"cannot be written: {reason}", path=path) from None


def refuse_same_file(output: Path, inputs: Iterable[Path], *, hint: str | None = None) -> None:
    """Raise an OutputError if the output is one of the inputs, also through a symbolic or hard link."""
    for path in inputs:
        if is_one_file(output, path):
            raise OutputError(f"the output is the same file as the input {path}", path=output, hint=hint)


def is_one_file(one: Path, other: Path) -> bool:
    """Whether two paths lead to the same file; neither has to exist."""
    try:
        return os.path.realpath(one) == os.path.realpath(other) or one.samefile(other)
    except OSError:  # one of them does not exist
        return False


def check_output(path: Path, *, stream: bool = False) -> None:
    """Refuse an output that cannot be written or must not be replaced. Call it before any work.

    Args:
        path: the output; symbolic links are followed.
        stream: also accept a pipe or a character device, for `write_bytes`.

    Raises:
        OutputError: it is a folder, pipe, device, socket, or the existing index of a sharded checkpoint, or its folder
            does not exist.
    """
    if WINDOWS and not stream and not is_plain_on_windows(path.name):
        problem = "cannot be written: Windows reserves this name for a device, or drops its last character"
        raise OutputError(problem, path=path)
    with _writing(path):
        try:
            mode = path.stat().st_mode
        except FileNotFoundError:
            folder = Path(os.path.realpath(path)).parent if path.is_symlink() else path.parent
            if not folder.is_dir():
                raise OutputError(f"cannot be written: the folder {folder} does not exist", path=path) from None
            return
    kind = special_kind(mode)
    if kind and not (stream and _is_stream(mode)):
        raise OutputError(f"cannot be written: {kind}, not a file", path=path)
    if path.name.endswith(INDEX_SUFFIX):
        problem = "a sharded checkpoint already exists here, and several files cannot be replaced in one step"
        raise OutputError(problem, path=path, hint="delete the index and its shards first, or choose another output")


def rehearse(path: Path) -> list[str]:
    """Check before any work that an output can be written: write, name, replace and remove a small file.

    Returns:
        Notes for the user: files that were removed, or a drive that does not report its free space.

    Raises:
        OutputError: the folder is not writable, or its file system lacks a required operation.
    """
    folder = Path(os.path.realpath(path)).parent
    notes = clear_left_overs(folder)
    if _free_bytes(folder) == 0:
        notes.append(f"the drive of {folder} reports no free space; trying to write anyway")
    trial = _sibling(folder)
    try:
        with (
            _writing(path),
            contextlib.closing(PendingFile(trial)) as first,
            contextlib.closing(PendingFile(trial)) as second,
        ):
            try:
                for pending in (first, second):
                    for offset in (1, 0):
                        pending.write(offset, b"\0")
                    pending.take_name()
            finally:
                trial.unlink(missing_ok=True)
    except OutputError as error:
        raise OutputError(error.problem, path=path) from None
    return notes


def clear_left_overs(folder: Path) -> list[str]:
    """Remove temporary files of killed runs from a folder, and return a line for each; active runs lock theirs."""
    names: list[str] = []
    with contextlib.suppress(OSError), os.scandir(folder) as entries:  # it may be missing or unreadable
        names = sorted(entry.name for entry in entries if is_left_over(entry.name))
    lines = []
    for path in (folder / name for name in names):
        with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
            if not WINDOWS:  # Windows refuses to remove open files, so it needs no lock and allows no open
                lock(stack.enter_context(opened(path, os.O_RDWR | getattr(os, "O_NOFOLLOW", 0))))
            nbytes = path.lstat().st_size
            path.unlink()
            lines.append(f"removed {path} ({nbytes:,} bytes), left by an interrupted run")
    return lines


def is_left_over(name: str) -> bool:
    """Whether a file name is that of a temporary file."""
    return _TEMPORARY.fullmatch(name) is not None


def _sibling(folder: Path) -> Path:
    """A new name for a temporary file, short even if the output's is long."""
    return folder / f".convert_to_quant.{os.urandom(8).hex()}.tmp"


def _is_stream(mode: int) -> bool:
    return stat.S_ISFIFO(mode) or stat.S_ISCHR(mode)


class PendingFile:
    """A file that gets its name in `commit`; every method raises an OutputError if the system refuses.

    Args:
        path: its name; the folder must exist, and a symbolic link is followed.
        like: the file whose owner and permissions it gets, as far as the system allows; by default the file that it
            replaces.
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
        for owner in (like.st_uid, -1):  # only root can change the owner, but the group may be one of ours
            with contextlib.suppress(AttributeError, OSError):  # no such call, or a drive without owners
                os.fchown(fd, owner, like.st_gid)
                break
        with contextlib.suppress(AttributeError, OSError):
            os.fchmod(fd, mode)  # regardless of the umask
        return fd

    def _open_new(self, mode: int) -> int:
        folder = self._target.parent
        if hasattr(os, "O_TMPFILE") and folder.is_dir() and UNNAMED.is_dir():
            try:
                fd = os.open(folder, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, mode)
                taken(fd)  # locks it, in case it needs a sibling's name later
                return fd
            except OSError as error:
                if error.errno not in _NO_TMPFILE:
                    raise
        while True:
            self._temporary = _sibling(folder)
            fd = os.open(self._temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | OPEN_FLAGS, mode)
            if not taken(fd) and self._temporary.exists():
                return fd
            close(fd)  # another run removed it as a leftover before it was locked

    @property
    def place(self) -> Path:
        """Where the bytes can be read before the file has its name."""
        return self._temporary or UNNAMED / str(self.fd)

    def write(self, offset: int, buffer: Any) -> None:
        """Write all of a buffer at a byte offset. Thread-safe."""
        with _writing(self.path):
            positioned.write_at(self.fd, buffer, offset)

    def copy(self, source: CheckpointFile, source_offset: int, offset: int, count: int) -> None:
        """Copy bytes from another open file, inside the kernel if possible."""
        while count:
            copied = _copy_once(source.fd, self.fd, min(count, MOST_BYTES), source_offset, offset)
            if copied == 0:  # the kernel cannot copy, or the source ended; this reports which side failed
                data = source.read(source_offset, min(count, READ_BYTES))
                self.write(offset, data)
                copied = len(data)
            source_offset, offset, count = source_offset + copied, offset + copied, count - copied

    def sync(self) -> None:
        """Flush the file to disk."""
        with _writing(self.path):
            positioned.sync(self.fd)

    def commit(self) -> None:
        """Flush the file to disk and name it, replacing an older regular file of that name."""
        with contextlib.closing(self):
            self.sync()
            self.take_name()
            sync_folder(self._target.parent)

    def take_name(self) -> None:
        """Name the file, replacing an older regular file of that name."""
        check_output(self.path)  # another kind of file may have taken the name meanwhile
        with _writing(self.path):
            if self._temporary is None:
                try:
                    _name_unnamed(self.fd, self._target)
                except FileExistsError:
                    self._temporary = _sibling(self._target.parent)
                    _name_unnamed(self.fd, self._temporary)
            if self._temporary is not None:
                if WINDOWS:  # Windows renames no open file; elsewhere the lock shows that it is no leftover
                    self._close()
                self._temporary.replace(self._target)
                self._temporary = None

    def close(self) -> None:
        """Drop the file unless it was committed; may be called twice."""
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
    """Name a file made with O_TMPFILE (open(2): linkat on its entry in /proc, following links)."""
    with opened(UNNAMED, os.O_RDONLY) as entries:
        os.link(str(fd), path, src_dir_fd=entries, follow_symlinks=True)  # this is linkat(2) only with a dir_fd


def _copy_once(source_fd: int, target_fd: int, count: int, source_offset: int, offset: int) -> int:
    """Let the kernel copy up to `count` bytes; returns how many it copied, 0 if it cannot."""
    with contextlib.suppress(AttributeError, OSError):  # no such call, or an error that read and write will repeat
        return os.copy_file_range(source_fd, target_fd, count, source_offset, offset)
    return 0


def write_bytes(path: Path, content: bytes, *, stream: bool = False, like: os.stat_result | None = None) -> None:
    """Write a small file atomically; with `stream`, write into a pipe or a character device of that name.

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
        # Opening a pipe without a reader would block; with O_NONBLOCK it fails (ENXIO).
        fd = os.open(path, os.O_WRONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0) | OPEN_FLAGS)
        with os.fdopen(fd, "wb") as file:
            if hasattr(os, "O_NONBLOCK"):
                os.set_blocking(fd, True)
            file.write(content)


@dataclass(frozen=True)
class Spec:
    """Dtype (as in a safetensors header) and shape of a tensor to be written."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        size = tensor_nbytes(self.dtype, self.shape)
        assert size is not None, "sub-byte tensors are only copied whole"
        return size

    @staticmethod
    def like(info: TensorInfo) -> Spec:
        """The spec of an existing tensor."""
        return Spec(info.dtype, info.shape)


@dataclass(frozen=True)
class Entry:
    """A small tensor with its bytes, in C order."""

    spec: Spec
    data: bytes

    @staticmethod
    def of(array: NDArray[Any], dtype: str | None = None) -> Entry:
        """Make an entry from an array, of bit patterns where numpy lacks the dtype (uint16 for "BF16")."""
        if dtype is None:
            dtype = next((name for name, known in BIT_DTYPES.items() if np.dtype(known) == array.dtype), "none")
        assert dtype in DTYPE_BITS, f"safetensors has no {array.dtype}"
        assert DTYPE_BITS[dtype] == array.dtype.itemsize * 8, f"{array.dtype} holds no {dtype}"
        return Entry(Spec(dtype, array.shape), np.ascontiguousarray(array).tobytes())


def lay_out(specs: Mapping[str, Spec]) -> list[TensorInfo]:
    """Lay tensors out in a data block: by alignment, widest first, otherwise in the given order."""
    infos: list[TensorInfo] = []
    end = 0
    for name, spec in sorted(specs.items(), key=lambda item: -DTYPE_BITS[item[1].dtype]):
        infos.append(TensorInfo(name, spec.dtype, spec.shape, end, end + spec.nbytes))
        end += spec.nbytes
    return infos


class _OutputFile:
    """One safetensors file in progress."""

    def __init__(self, path: Path, specs: Mapping[str, Spec], metadata: Mapping[str, str]) -> None:
        infos = lay_out(specs)
        self.infos = {info.name: info for info in infos}
        self.written: dict[str, list[int]] = {name: [] for name in self.infos}  # bytes of each part, from any thread
        self.header = serialize_header(infos, metadata)
        self.data_start = len(self.header)
        self.total_bytes = self.data_start + (infos[-1].stop if infos else 0)
        self.pending = PendingFile(path)


def _free_bytes(folder: Path) -> int | None:
    """Free bytes on a folder's drive; None if unknown."""
    with contextlib.suppress(OSError):
        disk = shutil.disk_usage(folder)
        return disk.free if disk.total else None  # network drives report 0 for "unknown"
    return None


class CheckpointWriter:
    """Writes one checkpoint of one or more files, as a context manager: leaving it without an exception commits.

    Args:
        files: the path of each file and its tensors.
        metadata: the `__metadata__` of every file.
        index: where to write the shard index of a checkpoint of several files.

    Raises:
        OutputError: a file cannot be created, or the disk has too little space.
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
            if free_bytes and free_bytes < needed_bytes:  # 0 is unreliable, so writing is tried
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
        """Write the bytes of a C-contiguous buffer into a tensor. Thread-safe."""
        file = self._file_of[name]
        info = file.infos[name]
        nbytes = memoryview(buffer).nbytes
        assert offset_bytes + nbytes <= info.nbytes, f"{name}: {offset_bytes} + {nbytes} > {info.nbytes}"
        if nbytes:
            file.pending.write(file.data_start + info.start + offset_bytes, buffer)
        file.written[name].append(nbytes)

    def copy(self, source: Checkpoint, names: Mapping[str, str]) -> None:
        """Copy tensors byte for byte; `names` maps those of the output to those of the source, in data order."""
        runs: list[list[Any]] = []
        end: object = None
        for name, source_name in names.items():
            if source_name in source.computed:
                self.write(name, source.raw(source_name))
                continue
            file, source_file = self._file_of[name], source.file_of(source_name)
            info, source_info = file.infos[name], source.tensors[source_name]
            assert info.nbytes == source_info.nbytes, name
            start, target = source_file.header.data_start + source_info.start, file.data_start + info.start
            if (source_file, file, start, target) == end:
                runs[-1][-1] += info.nbytes
            else:
                runs.append([source_file, file, start, target, info.nbytes])
            end = source_file, file, start + info.nbytes, target + info.nbytes
            file.written[name].append(info.nbytes)
        for source_file, file, start, target, nbytes in runs:
            file.pending.copy(source_file, start, target, nbytes)

    def reopen(self, path: Path) -> Checkpoint:
        """Open the complete but uncommitted output as a checkpoint, named `path` in messages."""
        files = [CheckpointFile(path, file.pending.place) for file in self._files]
        return Checkpoint(path, files, sharded=self._index is not None)

    def overwrite(self, file: int, offset: int, data: bytes) -> None:
        """Overwrite bytes at an offset in a file of `reopen().files`, header included."""
        self._files[file].pending.write(offset, data)

    def _commit(self) -> None:
        for file in self._files:
            for name, info in file.infos.items():
                written = sum(file.written[name])
                assert written == info.nbytes, f"{name}: {written} of {info.nbytes} bytes written"
        for file in self._files:  # a full disk is reported here, before any shard is named
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
            check_output(self._index)  # no index may list the shards that are replaced
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
    """Lock an index's folder against other writers of shards, if the system allows it."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            if taken(stack.enter_context(opened(index.parent, os.O_RDONLY))):
                problem = "another process is writing shards into this folder"
                raise OutputError(problem, path=index, hint="run the command again")
        yield


def write_checkpoint(path: StrPath, entries: Mapping[str, Entry], metadata: Mapping[str, str] | None = None) -> None:
    """Write one small safetensors file atomically; an OutputError if it cannot be written."""
    specs = {name: entry.spec for name, entry in entries.items()}
    with CheckpointWriter([(Path(path), specs)], metadata or {}) as writer:
        for name, entry in entries.items():
            writer.write(name, entry.data)


def output_files(
    output: Path, source: Checkpoint, place: Callable[[str], str], specs: Mapping[str, Spec]
) -> tuple[list[tuple[Path, Mapping[str, Spec]]], Path | None]:
    """Assign each tensor of an output to a file: the source's shards, or one file.

    Args:
        output: a `.safetensors` path, or a `.safetensors.index.json` path for shards.
        source: the checkpoint that is rewritten.
        place: output tensor -> the tensor of the source whose shard it joins.
        specs: all output tensors.

    Returns:
        The `files` and `index` arguments of `CheckpointWriter`.
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
