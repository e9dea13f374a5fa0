"""Memory of this machine and its GPUs: how much is available, and how to release what is unused."""

from __future__ import annotations

import ctypes
from contextlib import suppress
from pathlib import Path

import psutil
import torch

#: Limits of the control group (v2) that this process is in, as a container sees them.
_CGROUP = Path("/sys/fs/cgroup")


def free_memory(device: torch.device | None = None) -> int:
    """Return the number of bytes of memory that are available.

    Args:
        device: a GPU, whose memory limits what can be kept there; None for this machine, within its container's limit.
    """
    if device is not None and device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    free = int(psutil.virtual_memory().available)
    with suppress(OSError, ValueError, KeyError):  # no such file, or "max"
        limit, used = (int((_CGROUP / name).read_text()) for name in ("memory.max", "memory.current"))
        # Pages of files that were read count as used until something else needs them.
        counts = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
        free = min(free, max(limit - used + int(counts["inactive_file"]), 0))
    return free


def release_free_memory() -> None:
    """Return free pages that malloc holds back to the system, if the C library can (glibc).

    Statistics that are replaced with every batch, and temporary tensors of solving a layer, leave holes between live
    allocations; these would add up to more than the memory in use.
    """
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
