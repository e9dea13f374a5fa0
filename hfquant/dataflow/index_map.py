"""Plain functions on index maps and label maps (see :mod:`~hfquant.dataflow.tracker`) that keep stride 0.

A dimension with stride 0 is one that the map does not depend on. A map of a [2, 4096, 12288] tensor whose values depend
on the last dimension alone holds 12288 numbers.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


def squash(index: Tensor) -> Tensor:
    """Return the map with each dimension that it does not depend on cut to size 1."""
    return index[tuple(slice(0, 1) if step == 0 else slice(None) for step in index.stride())]


def values(index: Tensor) -> list[int]:
    """Return the different numbers in a map, sorted."""
    return torch.unique(squash(index)).tolist()


def count(index: Tensor) -> int:
    """Return how many different numbers a map holds."""
    return len(torch.unique(squash(index)))


def same(a: Tensor, b: Tensor) -> bool:
    """Return whether two maps say the same and depend on the same dimensions."""
    return a is b or (a.shape == b.shape and squash(a).shape == squash(b).shape and torch.equal(squash(a), squash(b)))


def groups(before: torch.Size, after: torch.Size) -> list[tuple[slice, slice]]:
    """Return the dimensions of a reshape's input and output in groups of equal size, as small as can be."""
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


def reshape(index: Tensor, shape: torch.Size) -> Tensor:
    """Reshape a map group by group of dimensions, so that groups that it does not depend on keep stride 0."""
    if not index.numel():
        return index.reshape(shape)
    keep, middle = [slice(None)] * index.ndim, list(shape)
    for ins, outs in groups(index.shape, shape):
        if not any(index.stride()[ins]):
            keep[ins] = [slice(0, 1)] * (ins.stop - ins.start)
            middle[outs] = [1] * (outs.stop - outs.start)
    return index[tuple(keep)].reshape(middle).expand(shape)


def merged_dims(before: torch.Size, after: torch.Size) -> tuple[int, tuple[int, ...]]:
    """Return the last dimension of ``after`` that a reshape merged out of several, and their sizes, or ``(0, ())``.

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


def expand_row(index: Tensor, key: Any, shape: torch.Size) -> Tensor | None:
    """Return ``index[key]``, of shape ``shape``, for a key of unknown values, or None where they matter.

    They do not where the map depends on its last dimension alone and the key leaves that one whole.
    """
    key = key if isinstance(key, tuple) else (key,)
    indexed = sum(i.ndim if isinstance(i, Tensor) and i.dtype == torch.bool else i is not None for i in key)
    if any(i is Ellipsis for i in key) or indexed >= index.ndim or any(index.stride()[:-1]):
        return None
    return index[(0,) * (index.ndim - 1)].expand(shape)


def cuts_of(hulls: Iterable[tuple[int, int]], size: int) -> frozenset[int]:
    """Return where to cut ``range(size)`` so that no cut falls inside a hull: the ends of overlapping hulls' groups.

    Interleaved pieces (per-head fused qkv, rotary halves) have overlapping hulls, so they stay together.
    """
    cuts, end = set(), 0
    for low, high in sorted(hulls):
        if low >= end:
            cuts |= {low, end}
        end = max(end, high)
    return frozenset((cuts | {end}) - {0, size})
