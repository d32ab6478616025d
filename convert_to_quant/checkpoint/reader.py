"""Checkpoints, opened lazily: one safetensors file, or the shards listed in an index.

Opening reads headers only and keeps the files open, so renaming or replacing them later has no effect. Data is read on
demand, a few rows of a tensor at a time, so memory use does not depend on the file size. Nothing is memory-mapped: some
file systems do not support it, and a mapped file that shrinks or whose disk fails kills the process without a message.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
import weakref
import zlib
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from ..errors import CheckpointError, HeaderError, PickleError, StrPath, TensorError
from ..formats import FLOAT_GRIDS
from ..formats.record import widen_bfloat16
from ..untrusted import MAX_BYTES, parse_json
from .header import LENGTH_BYTES, TensorInfo, header_length, parse_header
from .positioned import close, read_at
from .undo import refuse_unrecovered

INDEX_SUFFIX = ".safetensors.index.json"
SHARD_NAME = re.compile(r"(?P<stem>.+)-\d+-of-(?P<count>\d+)\.safetensors")
PICKLE_SUFFIXES = frozenset({".ckpt", ".pt", ".pth", ".bin", ".pkl"})
PICKLE_BEGINNINGS = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
"""A torch.save archive is a zip file; older ones are bare pickles of protocol 2 to 5.

A safetensors header of 640 bytes begins with \\x80\\x02 as well; there the byte after the length is `{`."""

BIT_DTYPES: dict[str, Any] = {
    "BOOL": np.bool_, "U8": np.uint8, "I8": np.int8, "U16": np.uint16, "I16": np.int16, "U32": np.uint32,
    "I32": np.int32, "U64": np.uint64, "I64": np.int64, "F16": np.float16, "F32": np.float32, "F64": np.float64,
    "C64": np.complex64, "BF16": np.uint16, "F8_E8M0": np.uint8, **dict.fromkeys(FLOAT_GRIDS, np.uint8),
}  # fmt: skip
"""The numpy dtype of a tensor's data. bfloat16 and FP8, which numpy lacks, are bit patterns."""

ALL_ROWS = slice(None)

FLOAT_DTYPES = frozenset({"BF16", "F16", "F32", "F64", *FLOAT_GRIDS})
INTEGER_DTYPES = frozenset({"U8", "I8", "U16", "I16", "U32", "I32", "U64", "I64"})


def identity(fd: int) -> tuple[int, int, int, int]:
    """Device, inode, size and modification time of an open file; equal if it is the same file, unchanged."""
    found = os.fstat(fd)
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def special_kind(mode: int) -> str | None:
    """What a path is by its `st_mode`: a folder, pipe, socket or device; None for a file."""
    kinds = {stat.S_IFREG: None, stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
    return kinds.get(stat.S_IFMT(mode), "a device")


def refuse_special(where: Path, path: Path) -> None:
    """Raise a CheckpointError, in which it is named `path`, unless a path is a file: opening a pipe would block."""
    with contextlib.suppress(OSError):  # reported when it is opened
        kind = special_kind(where.stat().st_mode)
        if kind is not None:
            raise CheckpointError(f"{kind}, not a file", path=path)


@contextlib.contextmanager
def _opening(where: Path, path: Path) -> Iterator[BinaryIO]:
    """Open a file, named `path` in messages, and turn system errors into a CheckpointError."""
    try:
        refuse_special(where, path)
        with where.open("rb") as file:
            yield file
    except FileNotFoundError:
        raise CheckpointError("no such file", path=path) from None
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error.strerror}", path=path) from None


class CheckpointFile:
    """One open safetensors file.

    Args:
        path: the file; also its name in messages.
        place: where to open it instead, for a file that has no name yet.

    Attributes:
        place: as given, or `path`.
        header: validated.
        identity: see `identity`.
        nbytes: size of the file.
        header_crc: CRC-32 of the header's JSON.
        fd: the open file.

    Raises:
        CheckpointError: the file is missing, unreadable, a pickle, or has an invalid header.
    """

    def __init__(self, path: Path, place: Path | None = None) -> None:
        self.path, self.place = path, place or path
        with _opening(self.place, path) as file:
            self.identity = _, _, self.nbytes, _ = identity(file.fileno())
            beginning, brace = file.read(LENGTH_BYTES), file.read(1)
            pickled = beginning.startswith(PICKLE_BEGINNINGS) and brace != b"{"
            if pickled or path.suffix.lower() in PICKLE_SUFFIXES:
                problem = "a pickled checkpoint; opening one runs the code in it, so it was not opened"
                raise PickleError(problem, path=path, hint="convert it to safetensors in a sandbox first")
            length = header_length(beginning, self.nbytes, path)
            text = (brace + file.read(length))[:length]
            self.header, self.header_crc = parse_header(text, self.nbytes, path), zlib.crc32(text)
            self.fd = os.dup(file.fileno())
        self._close = weakref.finalize(self, close, self.fd)

    def read(self, start: int, nbytes: int) -> NDArray[np.uint8]:
        """Read bytes at a file offset; a CheckpointError if the disk fails or the file has shrunk. Thread-safe."""
        content = np.empty(nbytes, np.uint8)
        try:
            found = read_at(self.fd, content, start)
        except OSError as error:
            raise CheckpointError(f"cannot be read: {error.strerror}", path=self.path) from None
        if found < nbytes:
            raise self._changed("the file shrank while it was read")
        return content

    def refuse_changed(self) -> None:
        """Raise a CheckpointError, after the work, if the file was modified since it was opened."""
        if identity(self.fd) != self.identity:
            raise self._changed("the file changed while it was read")

    def _changed(self, problem: str) -> CheckpointError:
        return CheckpointError(problem, path=self.path, hint="run the command again when nothing writes to it")

    def close(self) -> None:
        """Close the file; may be called twice."""
        self._close()
        self.fd = -1


class Checkpoint:
    """A checkpoint of one or more safetensors files, read as one table of tensors.

    Attributes:
        path: the path that was opened.
        files: the open files, in the index's order.
        tensors: header entries by name, file after file in data order.
        metadata: the files' `__metadata__`, merged; the first file wins.
        sharded: whether it was opened through an index.
        computed: tensors that subclasses compute when they are read, so their bytes cannot be copied from the files.
        rows_together: preferred multiple of rows to read at a time.
    """

    computed: Collection[str] = ()
    rows_together = 1

    def __init__(self, path: Path, files: list[CheckpointFile], sharded: bool) -> None:
        self.path = path
        self.files = files
        self.sharded = sharded
        self.tensors: dict[str, TensorInfo] = {}
        self.metadata: dict[str, str] = {}
        self._file_of: dict[str, CheckpointFile] = {}
        for file in files:
            for name, info in file.header.tensors.items():
                if name in self.tensors:
                    raise HeaderError(f"is also in {self.path_of(name).name}", path=file.path, tensor=name)
                self.tensors[name] = info
                self._file_of[name] = file
            self.metadata = {**file.header.metadata, **self.metadata}

    @property
    def size_bytes(self) -> int:
        """Total size of its files."""
        return sum(file.nbytes for file in self.files)

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __contains__(self, name: object) -> bool:
        return name in self.tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def refuse_changed(self) -> None:
        """See `CheckpointFile.refuse_changed`."""
        for file in self.files:
            file.refuse_changed()

    def close(self) -> None:
        """Close every file."""
        for file in self.files:
            file.close()

    def file_of(self, name: str) -> CheckpointFile:
        """The file that contains a tensor."""
        return self._file_of[name]

    def path_of(self, name: str) -> Path:
        """The path of the file that contains a tensor, for messages."""
        return self._file_of[name].path

    def raw(self, name: str, start: int = 0, stop: int | None = None) -> NDArray[np.uint8]:
        """A tensor's bytes, or those from `start` to `stop`, as fresh uint8 [bytes]."""
        info, file = self.tensors[name], self._file_of[name]
        return file.read(file.header.data_start + info.start + start, (info.nbytes if stop is None else stop) - start)

    def bits(self, name: str, rows: slice = ALL_ROWS) -> NDArray[Any]:
        """Some rows of a tensor, fresh, in the numpy dtype of `BIT_DTYPES`: FP8 as uint8 codes, for example.

        Raises:
            TensorError: numpy has no dtype for it (the 4- and 6-bit floats).
        """
        info = self.tensors[name]
        if info.dtype not in BIT_DTYPES:
            raise TensorError(f"{info.dtype} tensors are not supported", path=self.path_of(name), tensor=name)
        count = info.shape[0] if info.shape else 1
        start, stop, _ = rows.indices(count)
        row_bytes = info.nbytes // max(count, 1)
        raw = self.raw(name, start * row_bytes, stop * row_bytes)
        array: NDArray[Any] = raw.view(BIT_DTYPES[info.dtype]).reshape(info.shape and (stop - start, *info.shape[1:]))
        return array

    def float32(self, name: str) -> NDArray[np.float32]:
        """A tensor as a fresh float32 array of the same shape; a TensorError if it holds no floats."""
        info = self.tensors[name]
        if info.dtype not in FLOAT_DTYPES:
            raise TensorError(f"expected a float tensor, found {info.dtype}", path=self.path_of(name), tensor=name)
        return to_float32(self.bits(name), info.dtype)


def to_float32(bits: NDArray[Any], dtype: str) -> NDArray[np.float32]:
    """Convert an array returned by `Checkpoint.bits`, of a dtype in `FLOAT_DTYPES`, to fresh float32 of the same shape.

    All but float64 convert exactly; float64 is rounded, and overflows to infinity.
    """
    if dtype == "BF16":
        return widen_bfloat16(bits)
    if dtype in FLOAT_GRIDS:
        return FLOAT_GRIDS[dtype].decode(bits)
    with np.errstate(over="ignore", invalid="ignore"):  # float64 overflow; signaling NaNs
        return bits.astype(np.float32)


def open_checkpoint(path: StrPath) -> Checkpoint:
    """Open a `.safetensors` file, or the shards of a `.safetensors.index.json`; use it as a context manager.

    Raises:
        CheckpointError: a file is missing, unreadable, a pickle, or has an invalid header; the index is invalid or
            contradicts its shards; an in-place change is in progress or was interrupted.
    """
    path = Path(path)
    if path.is_dir():
        raise CheckpointError("a folder, not a file", path=path, hint=_suggested(path))
    weight_map = _weight_map(path)
    paths = checkpoint_files(path, weight_map)
    missing = [file.name for file in paths if weight_map and not file.exists()]
    if missing:
        hint = f"it is listed in {path.name}; {len(missing)} of {len(paths)} shards are missing: download them too"
        raise CheckpointError("no such file", path=path.with_name(missing[0]), hint=hint)
    refuse_unrecovered(path, paths)
    part = SHARD_NAME.fullmatch(path.name)
    if part and int(part["count"]) > 1 and path.exists():
        problem = f"one of {int(part['count'])} shards of a model, which is only read as a whole"
        raise CheckpointError(problem, path=path, hint=_suggested(path.parent, part["stem"]))
    checkpoint = Checkpoint(path, [CheckpointFile(file) for file in paths], sharded=bool(weight_map))
    for name, shard in weight_map.items():
        if name not in checkpoint or checkpoint.path_of(name).name != shard:
            raise CheckpointError(f"the index lists it in {shard}, which does not contain it", path=path, tensor=name)
    return checkpoint


def _suggested(folder: Path, stem: str = "*") -> str | None:
    """Which file of a folder to open instead, or what is missing there."""
    indexes, shards, files = (
        sorted(str(file.relative_to(folder)) for place in ("", "*/") for file in folder.glob(place + pattern))
        for pattern in (stem + INDEX_SUFFIX, stem + "-*-of-*.safetensors", "*.safetensors")
    )
    if indexes:
        return f"use {' or '.join(indexes[:3])}"
    if shards:
        index = SHARD_NAME.sub(rf"\g<stem>{INDEX_SUFFIX}", shards[0])
        return f"shards are read through their index: download {index} too, and use that"
    return f"use {' or '.join(files[:3])}" if files else None


def checkpoint_files(path: Path, weight_map: dict[str, str] | None = None) -> list[Path]:
    """The file itself, or the shards listed in an index, whose `weight_map` may have been read already."""
    shards = dict.fromkeys((_weight_map(path) if weight_map is None else weight_map).values())
    for shard in shards:
        # Only names in its own folder that a disk can store: no path, no "..", no NUL.
        too_long = len(shard.encode(errors="replace")) > 255
        if shard in ("", "..") or Path(shard).name != shard or "\0" in shard or too_long:
            raise CheckpointError(f"its shards should be files in its own folder, found {shard!r}", path=path)
    return [path.parent / shard for shard in shards] or [path]


def _weight_map(path: Path) -> dict[str, str]:
    """The weight_map of a shard index; empty for any other file."""
    if not path.name.endswith(INDEX_SUFFIX):
        return {}
    with _opening(path, path) as file:
        text = file.read(MAX_BYTES + 1)
    index = parse_json(text, lambda problem: CheckpointError(f"not a shard index: it is {problem}", path=path))
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not (isinstance(weight_map, dict) and weight_map and all(isinstance(v, str) for v in weight_map.values())):
        raise CheckpointError('not a shard index: "weight_map" should map tensor names to file names', path=path)
    return weight_map
