"""Undo files: the old bytes of an in-place change until it is complete.

While FILE is changed in place, `FILE.undo` beside it holds the old and the new bytes of every change. If nobody holds
FILE's lock, an interruption left the undo file, and FILE may be half old and half new. Such a checkpoint is refused
until a command with --in-place has restored the old bytes.

An undo file is untrusted input: it may come with a download or from another user. It is used only if

- it identifies each of its files by inode and size, and each belongs to the requested checkpoint: renaming a file does
  not separate it from its undo file, and a copy or download is never mistaken for the file;
- it belongs to us or to the owner of the file;
- it changes only whole input scales, whole comfy_quant tensors, and the header, whose other tensor entries stay the
  same: never a weight;
- every byte currently in the file is an old or a new one.
"""

from __future__ import annotations

import binascii
import contextlib
import errno
import json
import os
import shlex
import stat
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from .. import names
from ..errors import CheckpointError, HeaderError, OutputError
from ..untrusted import JSONError, parse_json
from .header import LENGTH_BYTES, MAX_HEADER_BYTES, header_length, parse_header
from .positioned import opened, pread, taken

UNDO_SUFFIX = ".undo"
MAX_UNDO_BYTES = 4 * MAX_HEADER_BYTES
"""More than the old and new bytes of any header in base64."""

BEYOND = "changes more than metadata, input scales and quantization configs"
_FORMAT = 2


@dataclass(frozen=True)
class Edit:
    """A replacement of bytes in a file.

    Attributes:
        file: index into `Checkpoint.files`.
        offset: byte offset in that file.
        data: the new bytes.
        old: the bytes before, of the same length.
    """

    file: int
    offset: int
    data: bytes
    old: bytes

    @property
    def undone(self) -> Edit:
        """The reverse edit."""
        return Edit(self.file, self.offset, self.old, self.data)

    def explains(self, found: bytes) -> bool:
        """Whether every byte found is the old or the new one, so this edit may have been partly applied."""
        return len(found) == len(self.old) == len(self.data) and all(
            byte in pair for byte, *pair in zip(found, self.old, self.data, strict=True)
        )


@dataclass(frozen=True)
class _Subject:
    """A file listed in an undo file: its name at the time, inode, and size in bytes."""

    name: str
    inode: int
    nbytes: int


@dataclass(frozen=True)
class Undo:
    """A parsed undo file; `check` decides whether to trust it.

    Attributes:
        path: the undo file.
        owner: user id of its owner.
        subjects: the files it is about, which `Edit.file` indexes.
        edits: the changes that were to be made.
    """

    path: Path
    owner: int
    subjects: list[_Subject]
    edits: list[Edit]

    def check(self, paths: Sequence[Path], fds: Sequence[int]) -> list[Edit]:
        """Validate the undo file against a checkpoint.

        Args:
            paths: the files of the checkpoint.
            fds: the same files, open.

        Returns:
            Edits that restore the old bytes; `Edit.file` indexes `paths`.

        Raises:
            OutputError: it is about other files, belongs to another user, or changes more than an in-place change can.
        """
        numbers = [self._number(subject, paths, fds) for subject in self.subjects]
        edits = []
        for position, number in enumerate(numbers):
            path, own = paths[number], [edit for edit in self.edits if edit.file == position]
            self._check_places(own, path, fds[number])
            for edit in own:
                if not edit.explains(pread(fds[number], len(edit.old), edit.offset)):
                    raise self._refusal(f"belongs to another file: the bytes at {edit.offset} do not match", path)
                edits.append(replace(edit.undone, file=number))
        return edits

    def _refusal(self, problem: str, path: Path) -> OutputError:
        hint = f"nothing was restored; check its contents, or remove it if {path.name} is a new file or a copy"
        return OutputError(f"the undo file {self.path.name} {problem}", path=path, hint=hint)

    def _number(self, subject: _Subject, paths: Sequence[Path], fds: Sequence[int]) -> int:
        """Index of a subject among the checkpoint's files; also checks its size and owner."""
        for number, (path, fd) in enumerate(zip(paths, fds, strict=True)):
            found = os.fstat(fd)
            if found.st_ino != subject.inode:
                continue
            if found.st_size != subject.nbytes:
                raise self._refusal("belongs to a file of another size", path)
            if hasattr(os, "geteuid") and self.owner not in (os.geteuid(), found.st_uid):
                raise self._refusal(f"belongs to another user, {self.owner}", path)
            return number
        raise self._refusal(f"belongs to another file, formerly called {subject.name}", paths[0])

    def _check_places(self, edits: Sequence[Edit], path: Path, fd: int) -> None:
        """Refuse edits of anything but metadata, input scales and comfy_quant tensors."""
        nbytes = os.fstat(fd).st_size
        try:
            length = header_length(pread(fd, LENGTH_BYTES, 0), nbytes, path)
            found = pread(fd, length, LENGTH_BYTES)
            texts = [
                text
                for edit in edits
                if (edit.offset, len(edit.old)) == (LENGTH_BYTES, length)
                for text in (edit.old, edit.data)
            ]
            headers = [parse_header(text, nbytes, path) for text in texts or [found]]
        except HeaderError as error:
            raise self._refusal(f"{BEYOND}: {error.problem}", path) from None
        with contextlib.suppress(HeaderError):  # half old and half new, it may be invalid
            headers.append(parse_header(found, nbytes, path))
        places = {(LENGTH_BYTES, length)}
        untouched = []
        for header in headers:
            changed = {name: info for name, info in header.tensors.items() if name.endswith(names.CHANGED_IN_PLACE)}
            places |= {(header.data_start + info.start, info.nbytes) for info in changed.values()}
            untouched.append({name: info for name, info in header.tensors.items() if name not in changed})
        if any(tensors != untouched[0] for tensors in untouched):
            raise self._refusal(f"{BEYOND}: the tensors in the header", path)
        for edit in edits:
            if (edit.offset, len(edit.old)) not in places:
                raise self._refusal(f"{BEYOND}: the {len(edit.old)} bytes at {edit.offset}", path)


def undo_path(path: Path) -> Path:
    """The path of a checkpoint's undo file: beside the real file, so it is found through every link."""
    return Path(os.path.realpath(path) + UNDO_SUFFIX)  # Path.resolve raises a RuntimeError on circular links


def undo_record(files: Iterable[tuple[Path, int]], edits: Iterable[Edit]) -> bytes:
    """The contents of an undo file, for the path and descriptor of every file of a checkpoint, and the edits."""

    def text(data: bytes) -> str:
        return binascii.b2a_base64(data, newline=False).decode("ascii")

    record = {
        "format": _FORMAT,
        "files": [
            {"name": path.name, "inode": found.st_ino, "bytes": found.st_size}
            for path, found in ((path, os.fstat(fd)) for path, fd in files)
        ],
        "changes": [[edit.file, edit.offset, text(edit.old), text(edit.data)] for edit in edits],
    }
    body = json.dumps(record).encode("ascii")
    return f"{zlib.crc32(body):08x}\n".encode("ascii") + body


def read_undo(path: Path) -> Undo:
    """Read an undo file.

    Raises:
        OutputError: it is unreadable, not a regular file, damaged, or from another version.
    """
    try:
        found = path.lstat()
        if not stat.S_ISREG(found.st_mode) or found.st_size > MAX_UNDO_BYTES:
            raise OutputError("the undo file cannot be read: not a regular file, or too large", path=path)
        # Follow no link, and wait for nobody at the other end of a pipe.
        with opened(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)) as fd:
            found = os.fstat(fd)  # it may have been replaced since
            content = pread(fd, min(found.st_size, MAX_UNDO_BYTES), 0)
    except OSError as error:
        raise OutputError(f"the undo file cannot be read: {error.strerror}", path=path) from None
    checksum, _, body = content.partition(b"\n")
    if checksum != f"{zlib.crc32(body):08x}".encode("ascii"):
        raise OutputError("the undo file is damaged; nothing was restored", path=path, hint="check its contents")
    try:
        record = parse_json(body, most_bytes=MAX_UNDO_BYTES)
        known = record["format"] == _FORMAT
        subjects = [_Subject(str(one["name"]), int(one["inode"]), int(one["bytes"])) for one in record["files"]]
        edits = [
            Edit(int(number), int(offset), binascii.a2b_base64(new), binascii.a2b_base64(old))
            for number, offset, old, new in record["changes"]
        ]
    except (JSONError, ValueError, KeyError, TypeError, OverflowError):
        known, subjects, edits = False, [], []
    inside = all(0 <= edit.file < len(subjects) and edit.offset >= 0 for edit in edits)
    if not (known and inside and len({subject.inode for subject in subjects}) == len(subjects)):
        raise OutputError("the undo file was not written by this version", path=path, hint="check its contents")
    return Undo(path, found.st_uid, subjects, edits)


def find_undo(path: Path, files: Iterable[Path]) -> Path | None:
    """The undo file that an interrupted change of a checkpoint left in its folder, even if the file was renamed.

    An undo file named after the checkpoint also counts, unless it is about another file of the folder.
    """
    beside = undo_path(path)
    own: set[int] = set()
    for file in files:
        with contextlib.suppress(OSError):
            own.add(file.stat().st_ino)
    try:
        with os.scandir(beside.parent) as entries:
            folder = {entry.name: entry.inode() for entry in entries}
    except OSError:  # the folder is missing or may not be listed
        return beside if os.path.lexists(beside) else None
    others = set(folder.values())
    for name in sorted(folder, key=lambda name: (name != beside.name, name)):
        if not name.endswith(UNDO_SUFFIX):
            continue
        about: set[int] = set()
        with contextlib.suppress(OutputError):
            about = {subject.inode for subject in read_undo(beside.with_name(name)).subjects}
        if own & about or (name == beside.name and not about & others):
            return beside.with_name(name)
    return None


def interrupted(path: Path, undo: Path) -> CheckpointError:
    """The error for a checkpoint that an interrupted change left with an undo file."""
    command = f"convert_to_quant -i {shlex.quote(str(path))} --actcal --in-place"
    return CheckpointError(
        f"an in-place change was interrupted and left it half done; the old bytes are in {undo}",
        path=path,
        hint=f"any command with --in-place restores them first, for example `{command}`",
    )


def refuse_unrecovered(path: Path, files: Sequence[Path]) -> None:
    """Refuse a checkpoint whose in-place change is in progress or was interrupted.

    Raises:
        CheckpointError: it has an undo file.
    """
    undo = find_undo(path, files)
    if undo is None:
        return
    if any(map(_is_locked, files)):
        raise CheckpointError("another process is changing this file", path=path, hint="wait until it has finished")
    if os.path.lexists(undo):  # the lock's last holder may have finished meanwhile
        raise interrupted(path, undo)


def _is_locked(path: Path) -> bool:
    """Whether another process holds the lock of an in-place change."""
    with contextlib.suppress(OSError), opened(path, os.O_RDONLY) as fd:
        return taken(fd, shared=True)
    return False


def refuse_undo_name(path: Path) -> None:
    """Refuse an in-place change whose undo file cannot have its name; call it before any work.

    Raises:
        OutputError: the name is too long, or taken by the undo file of another, renamed file.
    """
    undo = undo_path(path)
    try:
        undo.lstat()
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            return
        problem, hint = f"the name of its undo file, {undo.name}, is too long", "rename the checkpoint first"
    else:
        problem = f"its undo file would replace {undo.name}, which belongs to another file in this folder"
        hint = "change that file in place first to restore its old bytes"
    raise OutputError(problem, path=path, hint=hint)
