"""One option per layer with the least total harm within a budget: a multiple-choice knapsack.

A dynamic program solves it exactly up to the rounding of sizes; the linear relaxation gives a bound for all choices.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

#: Number of steps into which the dynamic program divides a budget.
_STEPS = 20_000


@dataclass(frozen=True)
class Option:
    """An option for one layer, with its size and harm.

    Attributes:
        name: label of the choice.
        bytes: size of the layer's tensors.
        harm: estimated error that it causes at the model's output.
        relative: squared error of the layer's own output, relative to its squared norm.
    """

    name: str
    bytes: int
    harm: float
    relative: float


Table = Mapping[str, Sequence[Option]]


def cheapest(table: Table, limit: int, weigh: Callable[[str, Option], float]) -> dict[str, str]:
    """Return one option per layer with the least total harm within the limit, using sizes rounded up.

    Args:
        table: options by layer.
        limit: total bytes.
        weigh: returns the harm of a layer's option.

    Raises:
        ValueError: even the smallest options exceed the limit.
    """
    least = sum(min(option.bytes for option in options) for options in table.values())
    if least > limit:
        raise ValueError(f"budget: {limit} bytes is too small; the smallest choices of all layers take {least} bytes")
    # Only the bytes beyond the smallest options are allocated.
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
    """Return the least total error if layers could be split between options, a lower bound for any real choice."""
    total, steps = 0.0, []
    spare = float(limit)
    for options in table.values():
        hull: list[Option] = []
        for option in sorted(options, key=lambda o: (o.bytes, o.harm)):
            if hull and option.harm >= hull[-1].harm:
                continue
            while len(hull) > 1 and _slope(hull[-2], hull[-1]) <= _slope(hull[-2], option):
                hull.pop()
            hull.append(option)
        total += hull[0].harm
        spare -= hull[0].bytes
        steps += [(_slope(a, b), b.bytes - a.bytes) for a, b in pairwise(hull)]
    for gain, size in sorted(steps, reverse=True):
        part = min(1.0, max(spare, 0.0) / size)
        total -= part * gain * size
        spare -= part * size
    return total


def _slope(a: Option, b: Option) -> float:
    return (a.harm - b.harm) / max(b.bytes - a.bytes, 1)
