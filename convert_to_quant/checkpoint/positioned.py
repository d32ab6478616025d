"""Reading and writing at a position, locks, and fsync, on systems that have them and on those that have not.

Windows has neither pread(2) nor pwrite(2); there the position is set and used under one lock for all files. And it
keeps some names for itself, whatever they end in.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

WINDOWS = os.name == "nt"

_KEPT_NAME = re.compile(r"(con|prn|aux|nul|com[1-9¹²³]|lpt[1-9¹²³]|conin\$|conout\$) *(\..*)?", re.IGNORECASE)

OPEN_FLAGS = getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)
"""What every open needs: bytes as they are, and no inheritance."""

MOST_BYTES = 1 << 30
"""Of one call; Linux takes 2 GiB at most, macOS fails beyond."""

_POSITION = threading.Lock()
_NO_FSYNC = frozenset({errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP})


def pread(fd: int, count: int, offset: int) -> bytes:
    """Up to `count` bytes from a position; fewer at the end of the file."""
    if hasattr(os, "pread"):
        return os.pread(fd, count, offset)
    with _POSITION:
        os.lseek(fd, offset, os.SEEK_SET)
        return os.read(fd, count)


def read_at(fd: int, buffer: Any, offset: int) -> int:
    """Fill a writable, C-contiguous buffer of bytes from a position, and return how many there were before the end."""
    view = memoryview(buffer)
    done = 0
    while done < len(view):
        if hasattr(os, "preadv"):
            count = os.preadv(fd, [view[done : done + MOST_BYTES]], offset + done)
        else:
            content = pread(fd, min(len(view) - done, MOST_BYTES), offset + done)
            count = len(content)
            view[done : done + count] = content
        if not count:
            break
        done += count
    return done


def pwrite(fd: int, data: Any, offset: int) -> int:
    """Write some of `data` at a position, and return how many bytes it was."""
    if hasattr(os, "pwrite"):
        return os.pwrite(fd, data, offset)
    with _POSITION:
        os.lseek(fd, offset, os.SEEK_SET)
        return os.write(fd, data)


def write_at(fd: int, data: Any, offset: int) -> None:
    """Write all of `data`, C-contiguous, at a position."""
    view = memoryview(data)
    view = view.cast("B") if view.nbytes else memoryview(b"")
    while view:
        written = pwrite(fd, view, offset)
        view, offset = view[written:], offset + written


def is_plain_on_windows(name: str) -> bool:
    """Whether Windows makes a file of just this name, and opens no device and drops no ending.

    >>> [is_plain_on_windows(name) for name in ("aux.safetensors", "COM1", "a.", "a ", "auxiliary", "com10.txt")]
    [False, False, False, False, True, True]
    """
    return not (_KEPT_NAME.fullmatch(name) or name.endswith((".", " ")))


def close(fd: int) -> None:
    """Close a file whose bytes are on the disk, or not wanted: what the system says of it no longer matters."""
    with contextlib.suppress(OSError):
        os.close(fd)


@contextlib.contextmanager
def opened(path: Path, flags: int) -> Iterator[int]:
    """Open a file or folder for as long as it takes."""
    fd = os.open(path, flags | OPEN_FLAGS)
    try:
        yield fd
    finally:
        close(fd)


def sync(fd: int) -> None:
    """Put a file's bytes on the disk, where its file system knows how."""
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in _NO_FSYNC:
            raise


def sync_folder(folder: Path) -> None:
    """Put a folder's entries on the disk, where the system lets one."""
    with contextlib.suppress(OSError), opened(folder, os.O_RDONLY) as fd:
        os.fsync(fd)


def lock(fd: int, *, shared: bool = False) -> None:
    """Take a file for ourselves, or shared with other readers, until it is closed; nothing where there are no locks.

    Raises:
        BlockingIOError: another process has it.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        return
    fcntl.flock(fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)


def taken(fd: int, *, shared: bool = False) -> bool:
    """Whether another process has a file; else it is locked for us, where its drive knows locks."""
    try:
        lock(fd, shared=shared)
    except BlockingIOError:
        return True
    except OSError:
        pass
    return False
