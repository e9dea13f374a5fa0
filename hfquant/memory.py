"""Memory of this machine: how much is free, and giving back what is not used."""

from __future__ import annotations

import ctypes
from contextlib import suppress

import psutil


def free_memory() -> int:
    """Return the bytes that this machine can still hand out."""
    return int(psutil.virtual_memory().available)


def release_free_memory() -> None:
    """Give pages that malloc keeps for later back to the system, where the C library can (glibc).

    Statistics that are replaced with every batch, and all that solving a layer takes, leave holes between what stays;
    they would come to more than is in use.
    """
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
