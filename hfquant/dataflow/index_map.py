"""Functions on index maps and label maps (see :mod:`~hfquant.dataflow.tracker`) that preserve stride 0.

A map does not depend on a dimension with stride 0. The map of a [2, 4096, 12288] tensor whose values depend only on the
last dimension therefore stores just 12288 numbers.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


def squash(index: Tensor) -> Tensor:
    """Return the map with every dimension that it does not depend on reduced to size 1."""
    return index[tuple(slice(0, 1) if step == 0 else slice(None) for step in index.stride())]


def values(index: Tensor) -> list[int]:
    """Return the distinct numbers in a map, sorted."""
    return torch.unique(squash(index)).tolist()


def count(index: Tensor) -> int:
    """Return the number of distinct numbers in a map."""
    return len(torch.unique(squash(index)))


def same(a: Tensor, b: Tensor) -> bool:
    """Return whether two maps are equal and depend on the same dimensions."""
    return a is b or (a.shape == b.shape and squash(a).shape == squash(b).shape and torch.equal(squash(a), squash(b)))


def groups(before: torch.Size, after: torch.Size) -> list[tuple[slice, slice]]:
    """Split the dimensions of a reshape's input and output into the smallest groups of equal size."""
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
    """Reshape a map by groups of dimensions, so that groups that it does not depend on keep stride 0."""
    if not index.numel():
        return index.reshape(shape)
    keep, middle = [slice(None)] * index.ndim, list(shape)
    for ins, outs in groups(index.shape, shape):
        if not any(index.stride()[ins]):
            keep[ins] = [slice(0, 1)] * (ins.stop - ins.start)
            middle[outs] = [1] * (outs.stop - outs.start)
    return index[tuple(keep)].reshape(middle).expand(shape)


def merged_dims(before: torch.Size, after: torch.Size) -> tuple[int, tuple[int, ...]]:
    """Return the last dimension of ``after`` into which a reshape merged several, with their sizes, or ``(0, ())``.

    A batch merged with the dimensions after it does not count, unless no dimension follows the result.
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
    """Return ``index[key]``, of shape ``shape``, for a key with unknown values, or None if the values matter.

    They do not matter if the map depends only on its last dimension and the key leaves that dimension whole.
    """
    key = key if isinstance(key, tuple) else (key,)
    indexed = sum(i.ndim if isinstance(i, Tensor) and i.dtype == torch.bool else i is not None for i in key)
    if any(i is Ellipsis for i in key) or indexed >= index.ndim or any(index.stride()[:-1]):
        return None
    return index[(0,) * (index.ndim - 1)].expand(shape)


def cuts_of(hulls: Iterable[tuple[int, int]], size: int) -> frozenset[int]:
    """Return where to cut ``range(size)`` without cutting a hull: at the ends of each group of overlapping hulls.

    Interleaved pieces (per-head fused qkv, rotary halves) have overlapping hulls, so they are kept together.
    """
    cuts, end = set(), 0
    for low, high in sorted(hulls):
        if low >= end:
            cuts |= {low, end}
        end = max(end, high)
    return frozenset((cuts | {end}) - {0, size})
