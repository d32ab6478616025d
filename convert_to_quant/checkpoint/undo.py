"""Undo files: what a change in place keeps until it is complete.

`FILE.undo` stands beside FILE while FILE is changed in place, with the old and the new bytes of every place that
changes. One that stands there while nobody holds the file's lock was left by an interruption: some places are old and
some are new. Such a checkpoint is not read until a command that changes it in place has put the old bytes back.

An undo file is input like any other; it may have been downloaded with a model, or put there by another user. So it is
believed only where

- it knows every file that it is about by its inode number and size, and each is a file of the checkpoint that was asked
  for: a new name does not part a file from its undo file, and a copy or a download is never taken for the file;
- it belongs to us, or to the owner of the file;
- it is about a header whose tensors stay as they are, but that a mark may lose its end to an input scale, or about a
  whole input scale or mark, and never about a weight;
- every byte that is there now is an old one or a new one.
"""

from __future__ import annotations

import binascii
import contextlib
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
"""More than the old and the new bytes of any header take in base64."""
MAX_NAME_BYTES = 255
"""Of a file's name, on the usual file systems."""

_FORMAT = 2


@dataclass(frozen=True)
class Edit:
    """New bytes for a place in a file.

    Attributes:
        file: number of the file in `Checkpoint.files`.
        offset: byte position in that file.
        data: what goes there.
        old: what stands there before.
    """

    file: int
    offset: int
    data: bytes
    old: bytes

    @property
    def undone(self) -> Edit:
        """The edit that takes it back."""
        return Edit(self.file, self.offset, self.old, self.data)

    def explains(self, found: bytes) -> bool:
        """Whether this edit, complete, partial or not begun, leaves these bytes: each is the old or the new one."""
        return len(found) == len(self.old) == len(self.data) and all(
            byte in pair for byte, *pair in zip(found, self.old, self.data, strict=True)
        )


@dataclass(frozen=True)
class _Subject:
    """A file that an undo file is about: its name at the time, its inode number, and its size in bytes."""

    name: str
    inode: int
    nbytes: int


@dataclass(frozen=True)
class Undo:
    """An undo file that was read; see `check` for whether it may be believed.

    Attributes:
        path: the undo file.
        owner: user id of its owner.
        subjects: what it is about; the edits count in them.
        edits: what was to be done.
    """

    path: Path
    owner: int
    subjects: list[_Subject]
    edits: list[Edit]

    def check(self, paths: Sequence[Path], fds: Sequence[int]) -> list[Edit]:
        """What puts the old bytes back, if all of it may be believed.

        Args:
            paths: the files of a checkpoint.
            fds: the same files, open.

        Returns:
            Edits that count in `paths`.

        Raises:
            OutputError: it is about other files, is another user's, or is about places that no change in place touches.
        """
        numbers = [self._number(subject, paths, fds) for subject in self.subjects]
        edits = []
        for position, number in enumerate(numbers):
            path, own = paths[number], [edit for edit in self.edits if edit.file == position]
            self._check_places(own, path, fds[number])
            for edit in own:
                if not edit.explains(pread(fds[number], len(edit.old), edit.offset)):
                    problem = f"belongs to another file: it does not know the bytes at {edit.offset}"
                    raise self._refusal(problem, path, self._hint(path))
                edits.append(replace(edit.undone, file=number))
        return edits

    def _refusal(self, problem: str, path: Path, hint: str | None = None) -> OutputError:
        return OutputError(f"the undo file {self.path.name} {problem}", path=path, hint=hint)

    def _number(self, subject: _Subject, paths: Sequence[Path], fds: Sequence[int]) -> int:
        """Which of the files an undo file is about; it must be ours to believe about it."""
        for number, (path, fd) in enumerate(zip(paths, fds, strict=True)):
            found = os.fstat(fd)
            if found.st_ino != subject.inode:
                continue
            if found.st_size != subject.nbytes:
                raise self._refusal("belongs to a file of another size", path)
            if hasattr(os, "geteuid") and self.owner not in (os.geteuid(), found.st_uid):
                problem = f"belongs to another user, {self.owner}"
                raise self._refusal(problem, path, "check its contents and who put it there")
            return number
        problem = f"belongs to another file, formerly called {subject.name}"
        raise self._refusal(problem, paths[0], self._hint(paths[0]))

    def _hint(self, path: Path) -> str:
        return f"remove {self.path.name} if {path.name} is a new file or a copy"

    def _check_places(self, edits: Sequence[Edit], path: Path, fd: int) -> None:
        """Refuse edits of anything but metadata, input scales and marks."""
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
            raise self._beyond(path, error.problem) from None
        with contextlib.suppress(HeaderError):  # half old and half new, it may be no JSON
            headers.append(parse_header(found, nbytes, path))
        places = {(LENGTH_BYTES, length)}
        untouched = []
        for header in headers:
            changed = {name: info for name, info in header.tensors.items() if name.endswith(names.CHANGED_IN_PLACE)}
            places |= {(header.data_start + info.start, info.nbytes) for info in changed.values()}
            untouched.append({name: info for name, info in header.tensors.items() if name not in changed})
        if any(tensors != untouched[0] for tensors in untouched):
            raise self._beyond(path, "what the header says of tensors")
        for edit in edits:
            if (edit.offset, len(edit.old)) not in places:
                raise self._beyond(path, f"the {len(edit.old)} bytes at {edit.offset}")

    def _beyond(self, path: Path, why: str) -> OutputError:
        problem = f"changes more than metadata, input scales and marks: {why}"
        return self._refusal(problem, path, "nothing was restored; check its contents")


def undo_path(path: Path) -> Path:
    """Where the undo file of a checkpoint goes: beside the real file, so that it is found through every link to it."""
    real = Path(os.path.realpath(path))  # Path.resolve raises a RuntimeError on a circle of links
    name = real.name + UNDO_SUFFIX
    if len(os.fsencode(name)) > MAX_NAME_BYTES:  # found by what it is about all the same
        name = f".convert_to_quant.{zlib.crc32(os.fsencode(real.name)):016x}{UNDO_SUFFIX}"
    return real.with_name(name)


def undo_record(files: Iterable[tuple[Path, int]], edits: Iterable[Edit]) -> bytes:
    """The content of an undo file: path and open descriptor of every file of the checkpoint, and what will be done."""

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
        OutputError: it cannot be read, is a link or no file, is damaged, or is not one of this version's.
    """
    try:
        found = path.lstat()
        if not stat.S_ISREG(found.st_mode) or found.st_size > MAX_UNDO_BYTES:
            raise OutputError("the undo file cannot be read: it is no regular file, or too large for one", path=path)
        # No link is followed, and for the other end of a pipe nobody waits.
        with opened(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)) as fd:
            found = os.fstat(fd)  # which may be another one by now
            content = pread(fd, min(found.st_size, MAX_UNDO_BYTES), 0)
    except OSError as error:
        raise OutputError(f"the undo file cannot be read: {error.strerror}", path=path) from None
    checksum, _, body = content.partition(b"\n")
    if checksum != f"{zlib.crc32(body):08x}".encode("ascii"):
        raise OutputError("the undo file is damaged, so nothing was restored", path=path, hint="check its contents")
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
        raise OutputError("the undo file is not one of this version's", path=path, hint="check its contents")
    return Undo(path, found.st_uid, subjects, edits)


def find_undo(path: Path, files: Iterable[Path]) -> Path | None:
    """The undo file that an interrupted change of a checkpoint left in its folder, also under an older name.

    One that bears the checkpoint's own name counts as well, unless it is about another file of the folder.
    """
    beside = undo_path(path)
    own: set[int] = set()
    for file in files:
        with contextlib.suppress(OSError):
            own.add(file.stat().st_ino)
    try:
        with os.scandir(beside.parent) as entries:
            folder = {entry.name: entry.inode() for entry in entries}
    except OSError:  # a folder that may not be listed, or that is not there
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
    """The error that says what an undo file means for a checkpoint."""
    command = f"convert_to_quant -i {shlex.quote(str(path))} --actcal --in-place"
    return CheckpointError(
        f"an interrupted in-place change left it half done; the old bytes are in {undo}",
        path=path,
        hint=f"run any command with --in-place to restore them first, such as `{command}`",
    )


def refuse_unrecovered(path: Path, files: Sequence[Path]) -> None:
    """Refuse a checkpoint that is being changed in place, or that an interrupted change left half done.

    Raises:
        CheckpointError: there is an undo file for it.
    """
    undo = find_undo(path, files)
    if undo is None:
        return
    if any(map(_is_locked, files)):
        raise CheckpointError("another process is changing this file", path=path, hint="wait for it")
    if os.path.lexists(undo):  # whoever held the lock a moment ago may have finished
        raise interrupted(path, undo)


def _is_locked(path: Path) -> bool:
    """Whether another process holds the lock that a change in place takes."""
    with contextlib.suppress(OSError), opened(path, os.O_RDONLY) as fd:
        return taken(fd, shared=True)
    return False


def refuse_foreign_undo(path: Path) -> None:
    """Refuse a change in place whose undo file would replace that of another file.

    Raises:
        OutputError: an undo file of this name is about another file of the folder, which was renamed.
    """
    undo = undo_path(path)
    if os.path.lexists(undo):
        problem = f"its undo file would replace {undo.name}, which belongs to another file in this folder"
        raise OutputError(problem, path=path, hint="change that file in place first to restore its old bytes")
