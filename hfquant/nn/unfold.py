"""A convolution as a product: its windows as rows, and the tiles in which they are processed.

A window's values are ordered [kernel positions, input channels], so column groups run along the channels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product

import torch
from torch import Tensor


def windows(x: Tensor, kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]) -> Tensor:
    """Return the input window of each output position of a convolution as a view, without copying.

    Args:
        x: [batch, channels, *spatial], padded.
        kernel, stride, dilation: of each spatial dimension.

    Returns:
        [batch, *output, *kernel, channels].

    Raises:
        ValueError: the kernel is larger than the input.
    """
    view, n = x, len(kernel)
    for d in range(n):
        span = (kernel[d] - 1) * dilation[d] + 1
        if span > x.shape[2 + d]:
            raise ValueError(f"a kernel that spans {span} does not fit a padded input of shape {tuple(x.shape)}")
        view = view.unfold(2 + d, span, stride[d])[..., :: dilation[d]]
    return view.permute(0, *range(2, 2 + 2 * n), 1)


def channels_last(x: Tensor) -> Tensor:
    """Return [batch, channels, *spatial] as contiguous [batch, *spatial, channels]; windows then read whole runs."""
    y = x.movedim(1, -1)
    return y if y.is_contiguous() else _transposed(x.flatten(2)).view(y.shape)


def channels_first(y: Tensor) -> Tensor:
    """Return [batch, *spatial, channels] as contiguous [batch, channels, *spatial]."""
    return _transposed(y.flatten(1, -2)).view(y.shape[0], y.shape[-1], *y.shape[1:-1])


def _transposed(x: Tensor) -> Tensor:
    """Return [batch, a, b] as contiguous [batch, b, a]."""
    if x.requires_grad or torch.compiler.is_compiling():
        return x.transpose(1, 2).contiguous()
    # torch transposes in blocks, two to four times as fast, only for single matrices.
    y = x.new_empty(x.shape[0], x.shape[2], x.shape[1])
    for matrix, out in zip(x, y, strict=True):
        out.copy_(matrix.t())
    return y


def tiles(sizes: Sequence[int], points: int) -> Iterator[tuple[slice, ...]]:
    """Yield, in order, the boxes that split a grid of ``sizes``, each of at most ``points`` points (or one)."""
    split, inner = len(sizes) - 1, 1
    while split > 0 and inner * sizes[split] <= points:
        inner *= sizes[split]
        split -= 1
    step = max(points // inner, 1)
    rest = [slice(0, size) for size in sizes[split + 1 :]]
    for outer in product(*(range(size) for size in sizes[:split])):
        for start in range(0, sizes[split], step):
            yield (*(slice(i, i + 1) for i in outer), slice(start, min(start + step, sizes[split])), *rest)


def draw(windows: Tensor, spatial: int, count: int, seed: int) -> Tensor:
    """Return up to ``count`` random windows of [batch, *output, *kernel, channels] as rows [rows, in]."""
    sizes = windows.shape[: 1 + spatial]
    total = sizes.numel()
    if total <= count:
        return windows.reshape(total, -1)
    chosen = torch.randperm(total, generator=torch.Generator().manual_seed(seed))[:count].sort().values
    index = torch.unravel_index(chosen.to(windows.device), sizes)
    return windows[index].flatten(1)


def ranges(x: Tensor, positions: int) -> tuple[Tensor, Tensor]:
    """Return bounds for each column of a convolution's rows without forming the rows.

    Args:
        x: [batch, channels, *spatial], padded.
        positions: number of kernel positions.

    Returns:
        Minimum and maximum, [2, positions * channels] float32 each: of every other pixel, and of the remaining ones.
    """
    pixels = x.float().flatten(2)
    halves = [pixels[..., i::2] if pixels.shape[-1] > 1 else pixels for i in range(2)]
    low = torch.stack([half.amin((0, 2)) for half in halves])
    high = torch.stack([half.amax((0, 2)) for half in halves])
    return low.repeat(1, positions), high.repeat(1, positions)
