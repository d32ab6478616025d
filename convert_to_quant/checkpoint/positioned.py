"""Positional reads and writes, file locks, and fsync, with fallbacks for systems that lack them.

Windows has neither pread(2) nor pwrite(2): there a seek and the read or write share one lock for all files.
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

_RESERVED_NAME = re.compile(r"(con|prn|aux|nul|com[1-9¹²³]|lpt[1-9¹²³]|conin\$|conout\$) *(\..*)?", re.IGNORECASE)

OPEN_FLAGS = getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)
"""Flags for every open: binary mode, not inherited by child processes."""

MOST_BYTES = 1 << 30
"""Largest single read or write: Linux stops at 2 GiB, macOS fails beyond it."""

_POSITION = threading.Lock()
_NO_FSYNC = frozenset({errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP})


def pread(fd: int, count: int, offset: int) -> bytes:
    """Read up to `count` bytes at an offset; fewer at the end of the file."""
    if hasattr(os, "pread"):
        return os.pread(fd, count, offset)
    with _POSITION:
        os.lseek(fd, offset, os.SEEK_SET)
        return os.read(fd, count)


def read_at(fd: int, buffer: Any, offset: int) -> int:
    """Fill a writable, C-contiguous byte buffer from an offset; returns the bytes read before the end of the file."""
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
    """Write some of `data` at an offset; returns the number of bytes written."""
    if hasattr(os, "pwrite"):
        return os.pwrite(fd, data, offset)
    with _POSITION:
        os.lseek(fd, offset, os.SEEK_SET)
        return os.write(fd, data)


def write_at(fd: int, data: Any, offset: int) -> None:
    """Write all of `data`, C-contiguous, at an offset."""
    view = memoryview(data)
    view = view.cast("B") if view.nbytes else memoryview(b"")
    while view:
        written = pwrite(fd, view, offset)
        view, offset = view[written:], offset + written


def is_plain_on_windows(name: str) -> bool:
    """Whether Windows creates a file of exactly this name: it is not a device and has no trailing dot or space.

    >>> [is_plain_on_windows(name) for name in ("aux.safetensors", "COM1", "a.", "a ", "auxiliary", "com10.txt")]
    [False, False, False, False, True, True]
    """
    return not (_RESERVED_NAME.fullmatch(name) or name.endswith((".", " ")))


def close(fd: int) -> None:
    """Close a file that is already on disk or not wanted, so errors no longer matter."""
    with contextlib.suppress(OSError):
        os.close(fd)


@contextlib.contextmanager
def opened(path: Path, flags: int) -> Iterator[int]:
    """Open a file or folder for the duration of the context."""
    fd = os.open(path, flags | OPEN_FLAGS)
    try:
        yield fd
    finally:
        close(fd)


def sync(fd: int) -> None:
    """Flush a file to disk, if its file system supports fsync."""
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in _NO_FSYNC:
            raise


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries to disk, if the system allows it."""
    with contextlib.suppress(OSError), opened(folder, os.O_RDONLY) as fd:
        os.fsync(fd)


def lock(fd: int, *, shared: bool = False) -> None:
    """Lock a file until it is closed, exclusively or shared; does nothing on systems without locks.

    Raises:
        BlockingIOError: another process holds the lock.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        return
    fcntl.flock(fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)


def taken(fd: int, *, shared: bool = False) -> bool:
    """Whether another process has locked a file; otherwise it is now locked, where the drive supports locks."""
    try:
        lock(fd, shared=shared)
    except BlockingIOError:
        return True
    except OSError:
        pass
    return False
