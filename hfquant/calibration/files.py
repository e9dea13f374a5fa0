"""The files of a calibration set: read without trust, written whole or not at all, by one process at a time."""

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
    """A calibration set on disk is damaged, or is not the one asked for. The message names the file."""


@contextmanager
def exclusive(directory: Path) -> Iterator[None]:
    """Keep two processes from writing one set. The lock goes with the process, however that ends.

    Raises:
        RuntimeError: another process holds it.
    """
    try:
        import fcntl
    except ImportError:  # Windows has no such lock on a directory
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
    """Open a regular file of ``size`` bytes (an index: of any sane size) and return its descriptor."""
    try:
        # A pipe would otherwise block until somebody writes to it.
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
        FileNotFoundError: it is not there.
        CalibSetError: it is a link, a pipe, a socket, a directory, or of another size.
    """
    with open(open_file(path, size), "rb") as file:
        return file.read()


def write_whole(path: Path, data: bytes) -> None:
    """Write a file that is there whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    # What a killed run left, or a link that somebody put there: it must be replaced, never followed.
    temporary.unlink(missing_ok=True)
    with open(temporary, "xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
