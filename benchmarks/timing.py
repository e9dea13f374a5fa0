"""Timing that the speed benchmarks share: rows that take turns, medians, and what machine it was."""

from __future__ import annotations

import math
import os
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.memory import status
from benchmarks.quality import environment

#: A row under test: runs the i-th call.
Run = Callable[[int], Any]


def interleaved(
    rows: Mapping[str, Run],
    seconds: float,
    turns: int = 3,
    shortest: float = 0.005,
    sync: Callable[[], None] = int,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """Return the median time of a call of each row, in seconds.

    Rows take turns, in another order each round, so that what else runs on the machine hits all of them alike. A turn
    is as many calls in a row as take ``shortest``, a whole number found in a first round that is not counted.

    Args:
        rows: what to time; already called once, where a first call costs more.
        seconds: rounds start until this much time is spent.
        turns: the least number of rounds, however long they take.
        shortest: the least length of a turn in seconds; 0 for one call.
        sync: waits for the device.
        clock: gives seconds.
    """
    calls: dict[str, int] = {}
    for name, run in rows.items():
        calls[name] = math.ceil(shortest / min(_time(run, 1, sync, clock) for _ in range(2))) if shortest else 1
    times: dict[str, list[float]] = {name: [] for name in rows}
    order, shuffle, done = list(rows), random.Random(0).shuffle, 0
    end = time.perf_counter() + seconds
    while done < turns or time.perf_counter() < end:
        shuffle(order)
        for name in order:
            times[name].append(_time(rows[name], calls[name], sync, clock))
        done += 1
    return {name: median(values) for name, values in times.items()}


@contextmanager
def watched() -> Iterator[list[float]]:
    """Give a list that at the end holds the share of all CPUs that other processes took; NaN where Linux is not."""
    share: list[float] = []
    others, start = _others(), time.perf_counter()
    yield share
    share.append((_others() - others) / ((time.perf_counter() - start) * (os.cpu_count() or 1)))


def _others() -> float:
    """Return the CPU seconds that the machine has spent outside of this process."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return math.nan
    user, nice, system, _, _, irq, softirq, steal = map(int, stat.read_text().split()[1:9])
    own = os.times()
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK") - own.user - own.system


def shares(values: Sequence[float]) -> str:
    """Return shares as text: a busy machine's medians are not to be believed."""
    return ", ".join(f"{max(value, 0):.0%}" if value == value else "unknown" for value in values)


def clock_of(device: str) -> Callable[[], float]:
    """Return the clock to measure by: CPU time on one thread of a CPU, which other processes do not lengthen."""
    return time.process_time if device == "cpu" and torch.get_num_threads() == 1 else time.perf_counter


def _time(run: Run, calls: int, sync: Callable[[], None], clock: Callable[[], float]) -> float:
    start = clock()
    for i in range(calls):
        run(i)
    sync()
    return (clock() - start) / calls


def peak_above(run: Run) -> float:
    """Return by how many bytes a call raises the process's resident memory at its peak; NaN where Linux is not.

    What earlier calls left in the allocator is given back first. Scratch that a kernel keeps between calls is not
    counted.
    """
    reset = Path("/proc/self/clear_refs")
    if not reset.exists():
        return math.nan
    import ctypes

    ctypes.CDLL(None).malloc_trim(0)
    reset.write_text("5")  # the high-water mark falls to what is resident now
    before = status(os.getpid())["VmRSS"]
    run(0)
    return status(os.getpid())["VmHWM"] - before


def machine() -> str:
    """Return the CPU, its flags, threads and versions as one line."""
    found = environment()
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    return f"{found['cpu']}, {torch.get_num_threads()} threads. {versions}."


def relative_error(y: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the norm of the difference over the norm of what was expected."""
    y, expected = y.float(), expected.float()
    return ((y - expected).norm() / expected.norm()).item()


def reason(error: Exception) -> str:
    """Return what to say of an error in a line."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:150]}"


def markdown(corner: str, columns: list[str], rows: Mapping[str, list[str]]) -> str:
    """Return a Markdown table, numbers to the right."""
    lines = [f"| {corner} | " + " | ".join(columns) + " |", "| --- |" + " ---: |" * len(columns)]
    lines += [f"| {name} | " + " | ".join(cells) + " |" for name, cells in rows.items()]
    return "\n".join(lines) + "\n"
