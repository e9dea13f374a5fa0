"""One option a layer, of the least harm in all within a budget: a multiple-choice knapsack.

A dynamic program solves it exactly up to the rounding of sizes; the linear relaxation bounds what any choice could
reach.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

#: Steps that a budget is cut into by the dynamic program.
_STEPS = 20_000


@dataclass(frozen=True)
class Option:
    """What one layer could become: its size and the harm that it does.

    Attributes:
        name: of the choice.
        bytes: of the layer's tensors.
        error: estimated harm to the model's output.
        relative: error of the layer's own output, relative to its square.
    """

    name: str
    bytes: int
    error: float
    relative: float


Table = Mapping[str, Sequence[Option]]


def cheapest(table: Table, limit: int, weigh: Callable[[str, Option], float]) -> dict[str, str]:
    """Return one option a layer of the least sum within the limit: a dynamic program over sizes rounded up.

    Args:
        table: options by layer.
        limit: bytes of all.
        weigh: harm of a layer's option.

    Raises:
        ValueError: even the smallest options take more.
    """
    least = sum(min(option.bytes for option in options) for options in table.values())
    if least > limit:
        raise ValueError(f"budget: {limit} bytes; the smallest choice of each layer takes {least} bytes in all")
    # Only what is above the smallest option is to be shared out.
    spare = limit - least
    unit = max(spare // _STEPS, 1)
    steps = spare // unit
    best = np.zeros(steps + 1)
    taken: list[np.ndarray] = []
    for name, options in table.items():
        base = min(option.bytes for option in options)
        rows = np.full((len(options), steps + 1), np.inf)
        for i, option in enumerate(options):
            extra = -(-(option.bytes - base) // unit)
            if extra <= steps:
                rows[i, extra:] = best[: steps + 1 - extra] + weigh(name, option)
        taken.append(rows.argmin(0))
        best = rows.min(0)
    chosen: dict[str, str] = {}
    left = steps
    for (name, options), row in zip(reversed(list(table.items())), reversed(taken), strict=True):
        option = options[int(row[left])]
        chosen[name] = option.name
        left -= -(-(option.bytes - min(o.bytes for o in options)) // unit)
    return {name: chosen[name] for name in table}


def relaxed(table: Table, limit: int) -> float:
    """Return the least sum of errors where layers may be split between options: a bound for every real choice."""
    total, steps = 0.0, []
    spare = float(limit)
    for options in table.values():
        hull: list[Option] = []
        for option in sorted(options, key=lambda o: (o.bytes, o.error)):
            if hull and option.error >= hull[-1].error:
                continue
            while len(hull) > 1 and _slope(hull[-2], hull[-1]) <= _slope(hull[-2], option):
                hull.pop()
            hull.append(option)
        total += hull[0].error
        spare -= hull[0].bytes
        steps += [(_slope(a, b), b.bytes - a.bytes) for a, b in pairwise(hull)]
    for gain, size in sorted(steps, reverse=True):
        part = min(1.0, max(spare, 0.0) / size)
        total -= part * gain * size
        spare -= part * size
    return total


def _slope(a: Option, b: Option) -> float:
    return (a.error - b.error) / max(b.bytes - a.bytes, 1)
