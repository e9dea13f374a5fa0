"""The files of a calibration set: untrusted on read, written atomically, by one process at a time."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hfquant.calibration.batches import CalibrationError

INDEX = "index.json"
_MAX_INDEX = 256 << 20


class CalibSetError(CalibrationError):
    """A calibration set on disk is damaged or is not the requested one. The message names the file."""


@contextmanager
def exclusive(directory: Path) -> Iterator[None]:
    """Keep two processes from writing one set. The lock is released when the process ends, however it ends.

    Raises:
        RuntimeError: another process holds the lock.
    """
    try:
        import fcntl
    except ImportError:  # Windows has no such lock for directories
        yield
        return
    handle = os.open(directory, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RuntimeError(f"another process is writing the calibration set {directory}") from None
        yield
    finally:
        os.close(handle)


def open_file(path: Path, size: int | None) -> int:
    """Open a regular file of ``size`` bytes (None: an index, of any plausible size) and return its descriptor."""
    try:
        # Without O_NONBLOCK, opening a pipe would block until somebody writes to it.
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}, a file of this calibration set, is missing") from None
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.EMLINK, errno.ENXIO):
            raise
        raise CalibSetError(f"{path} is a link or a socket, not a file; copy the set with its files in place") from None
    found = os.fstat(handle)
    reason = None
    if not stat.S_ISREG(found.st_mode):
        reason = "is not a regular file"
    elif size is None and found.st_size > _MAX_INDEX:
        reason = f"has {found.st_size} bytes, too many for an index"
    elif size is not None and found.st_size != size:
        reason = f"has {found.st_size} bytes, {INDEX} says {size}: truncated or replaced"
    if reason is not None:
        os.close(handle)
        raise CalibSetError(f"{path} {reason}")
    return handle


def read_file(path: Path, size: int | None = None) -> bytes:
    """Return the content of a regular file of ``size`` bytes.

    Raises:
        FileNotFoundError: there is no such file.
        CalibSetError: it is a link, a pipe, a socket, a directory, or has another size.
    """
    with open(open_file(path, size), "rb") as file:
        return file.read()


def write_whole(path: Path, data: bytes) -> None:
    """Write a file atomically: it exists complete or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    # A leftover of a killed run, or a link that somebody placed there: replace it, never follow it.
    temporary.unlink(missing_ok=True)
    with open(temporary, "xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
