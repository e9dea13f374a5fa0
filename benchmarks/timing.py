"""Timing for the speed benchmarks: interleaved rows, medians, and a description of the machine."""

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

#: A row under test: performs the i-th call.
Run = Callable[[int], Any]


def interleaved(
    rows: Mapping[str, Run],
    seconds: float,
    turns: int = 3,
    shortest: float = 0.005,
    sync: Callable[[], None] = int,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """Return the median time per call of each row, in seconds.

    Rows take turns, in a new order each round, so that other load on the machine affects all of them alike. A turn is
    as many consecutive calls as take ``shortest``, a number found in a first round that is not counted.

    Args:
        rows: calls to time; already called once if a first call costs more.
        seconds: new rounds start until this much time has passed.
        turns: minimum number of rounds, however long they take.
        shortest: minimum length of a turn in seconds; 0 for one call.
        sync: function that waits for the device.
        clock: function that returns seconds.
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
    """Yield a list that at the end holds the share of all CPUs taken by other processes; NaN if not on Linux."""
    share: list[float] = []
    others, start = _others(), time.perf_counter()
    yield share
    share.append((_others() - others) / ((time.perf_counter() - start) * (os.cpu_count() or 1)))


def _others() -> float:
    """Return the CPU seconds that the machine has spent outside this process."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return math.nan
    user, nice, system, _, _, irq, softirq, steal = map(int, stat.read_text().split()[1:9])
    own = os.times()
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK") - own.user - own.system


def shares(values: Sequence[float]) -> str:
    """Return shares as text. If they are high, the medians are not reliable."""
    return ", ".join(f"{max(value, 0):.0%}" if value == value else "unknown" for value in values)


def clock_of(device: str) -> Callable[[], float]:
    """Return the clock to use: on one CPU thread CPU time, which other processes do not inflate, else wall time."""
    return time.process_time if device == "cpu" and torch.get_num_threads() == 1 else time.perf_counter


def _time(run: Run, calls: int, sync: Callable[[], None], clock: Callable[[], float]) -> float:
    start = clock()
    for i in range(calls):
        run(i)
    sync()
    return (clock() - start) / calls


def peak_above(run: Run) -> float:
    """Return the peak increase in the process's resident memory during a call, in bytes; NaN if not on Linux.

    Memory that earlier calls left in the allocator is returned to the system first. Scratch memory that a kernel keeps
    between calls is not counted.
    """
    reset = Path("/proc/self/clear_refs")
    if not reset.exists():
        return math.nan
    import ctypes

    ctypes.CDLL(None).malloc_trim(0)
    reset.write_text("5")  # resets the high-water mark to the current resident size
    before = status(os.getpid())["VmRSS"]
    run(0)
    return status(os.getpid())["VmHWM"] - before


def machine() -> str:
    """Return the CPU, its flags, threads and versions as one line."""
    found = environment()
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    return f"{found['cpu']}, {torch.get_num_threads()} threads. {versions}."


def relative_error(y: torch.Tensor, expected: torch.Tensor) -> float:
    """Return the norm of the difference over the norm of the expected output."""
    y, expected = y.float(), expected.float()
    return ((y - expected).norm() / expected.norm()).item()


def reason(error: Exception) -> str:
    """Return a one-line description of an error."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:150]}"


def markdown(corner: str, columns: list[str], rows: Mapping[str, list[str]]) -> str:
    """Return a Markdown table with right-aligned numbers."""
    lines = [f"| {corner} | " + " | ".join(columns) + " |", "| --- |" + " ---: |" * len(columns)]
    lines += [f"| {name} | " + " | ".join(cells) + " |" for name, cells in rows.items()]
    return "\n".join(lines) + "\n"
