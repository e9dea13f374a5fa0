"""Memory of this machine: how much is available, and how to release what is unused."""

from __future__ import annotations

import ctypes
from contextlib import suppress

import psutil


def free_memory() -> int:
    """Return the number of bytes of memory that are available on this machine."""
    return int(psutil.virtual_memory().available)


def release_free_memory() -> None:
    """Return free pages that malloc holds back to the system, if the C library can (glibc).

    Statistics that are replaced with every batch, and temporary tensors of solving a layer, leave holes between live
    allocations; these would add up to more than the memory in use.
    """
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
