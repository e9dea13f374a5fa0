"""Integer tensors that shadow others (see :mod:`~hfquant.dataflow.tracker`): plain functions that keep stride 0.

A dimension with stride 0 is one that the shadow does not depend on. A shadow of a [2, 4096, 12288] tensor whose values
depend on the last dimension alone holds 12288 numbers.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


def squash(shadow: Tensor) -> Tensor:
    """The shadow with each dimension that it does not depend on cut to size 1."""
    return shadow[tuple(slice(0, 1) if step == 0 else slice(None) for step in shadow.stride())]


def values(shadow: Tensor) -> list[int]:
    """The different numbers in a shadow, sorted."""
    return torch.unique(squash(shadow)).tolist()


def count(shadow: Tensor) -> int:
    """How many different numbers a shadow holds."""
    return len(torch.unique(squash(shadow)))


def groups(before: torch.Size, after: torch.Size) -> list[tuple[slice, slice]]:
    """The dimensions of a reshape's input and output in groups of equal size, as small as can be."""
    found: list[tuple[slice, slice]] = []
    i = j = 0
    while i < len(before) and j < len(after):
        start, size_in, size_out = (i, j), before[i], after[j]
        i, j = i + 1, j + 1
        while size_in != size_out:
            if size_in < size_out:
                i, size_in = i + 1, size_in * before[i]
            else:
                j, size_out = j + 1, size_out * after[j]
        found.append((slice(start[0], i), slice(start[1], j)))
    return found


def reshape(shadow: Tensor, shape: torch.Size) -> Tensor:
    """Reshape group by group of dimensions, so that groups that the shadow does not depend on keep stride 0."""
    if not shadow.numel():
        return shadow.reshape(shape)
    keep, middle = [slice(None)] * shadow.ndim, list(shape)
    for ins, outs in groups(shadow.shape, shape):
        if not any(shadow.stride()[ins]):
            keep[ins] = [slice(0, 1)] * (ins.stop - ins.start)
            middle[outs] = [1] * (outs.stop - outs.start)
    return shadow[tuple(keep)].reshape(middle).expand(shape)


def merged_dims(before: torch.Size, after: torch.Size) -> tuple[int, tuple[int, ...]]:
    """The last dimension of ``after`` that a reshape merged out of several, and their sizes; ``(0, ())`` for none.

    A batch merged with what follows it is left out, unless nothing follows the result.
    """
    if 0 in before:
        return 0, ()
    for ins, outs in reversed(groups(before, after)):
        sizes = tuple(n for n in before[ins] if n > 1)
        dims = [d for d in range(outs.start, outs.stop) if after[d] > 1]
        if len(sizes) > 1 and len(dims) == 1 and (ins.start > 0 or outs.stop == len(after)):
            return dims[0], sizes
    return 0, ()


def expand_row(shadow: Tensor, index: Any, shape: torch.Size) -> Tensor | None:
    """``shadow[index]`` for an index of unknown values: the last dimension must be all that matters, and left alone."""
    index = index if isinstance(index, tuple) else (index,)
    indexed = sum(i.ndim if isinstance(i, Tensor) and i.dtype == torch.bool else i is not None for i in index)
    if any(i is Ellipsis for i in index) or indexed >= shadow.ndim or any(shadow.stride()[:-1]):
        return None
    return shadow[(0,) * (shadow.ndim - 1)].expand(shape)


def cuts_of(hulls: Iterable[tuple[int, int]], size: int) -> frozenset[int]:
    """Where to cut ``range(size)`` so that no cut falls inside a hull: the ends of the hulls' overlapping groups.

    Interleaved pieces (per-head fused qkv, rotary halves) have overlapping hulls, so they stay together.
    """
    cuts, end = set(), 0
    for low, high in sorted(hulls):
        if low >= end:
            cuts |= {low, end}
        end = max(end, high)
    return frozenset((cuts | {end}) - {0, size})
