"""The maths of the affiner: sums over samples, closed-form solutions, maps over pixels. Tensors in, tensors out.

Predictions are grids `[B, C, H, W]`. A *cell* is the set of pixels that one pair of sums is kept for: a block of the
grid, one pixel, or the whole grid. Everything here is float64.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

#: Keeps the relative weight finite where the real model predicts zeros.
EPS = 1e-8


class Moments(NamedTuple):
    """Sums over the samples and pixels of each cell, float64 `[C, h, w]`; r is the real prediction, q the quantized."""

    n: Tensor
    q: Tensor
    r: Tensor
    qq: Tensor
    qr: Tensor
    rr: Tensor

    def __add__(self, other: Moments) -> Moments:  # type: ignore[override]
        """The sums over both sets of samples."""
        return Moments(*(a + b for a, b in zip(self, other, strict=True)))

    def squared_error(self, scale: Tensor | float = 1.0, shift: Tensor | float = 0.0) -> Tensor:
        """Sum of `(scale q + shift - r)^2` in each cell; scale and shift are constant within cells."""
        crossed = scale * (scale * self.qq + 2 * shift * self.q - 2 * self.qr)
        return (crossed + shift * (shift * self.n - 2 * self.r) + self.rr).clamp_min(0)


class Grid(NamedTuple):
    """How `h x w` blocks of `blocksize` pixels lie on a grid of `height x width`; the last ones may be smaller."""

    height: int
    width: int
    blocksize: int

    @property
    def shape(self) -> tuple[int, int]:
        """Blocks down and across."""
        return -(-self.height // self.blocksize), -(-self.width // self.blocksize)


def moments(real: Tensor, quant: Tensor, blocksize: int | None) -> Moments:
    """Sums over blocks of one batch.

    Args:
        real: `[B, C, H, W]`, what the full-precision model predicts.
        quant: The same of the quantized model.
        blocksize: Side of the square blocks in pixels; None for one block over everything.
    """
    r, q = real.detach().double(), quant.detach().to(real.device).double()

    def total(values: Tensor) -> Tensor:
        summed = values.sum(0)
        if blocksize is None:
            return summed.sum((1, 2), keepdim=True)
        if blocksize == 1:
            return summed
        return F.avg_pool2d(summed, blocksize, ceil_mode=True, count_include_pad=False, divisor_override=1)

    return Moments(*(total(x).cpu() for x in (torch.ones_like(r), q, r, q * q, q * r, r * r)))


def weights(sums: Moments, alpha: float) -> Tensor:
    """Weight of each cell, `alpha / n + (1 - alpha) / (S(r^2) + eps)`: absolute error blended with relative error."""
    return alpha / sums.n + (1 - alpha) / (sums.rr + EPS)


def solve_blocks(sums: Moments, alpha: float, lambda1: float, lambda2: float) -> tuple[Tensor, Tensor]:
    """Scale K and shift b of each block, `[C, h, w]`, that minimise :func:`objective`.

    The normal equations are written in `(K - 1, b)`, so equal predictions give exactly the identity, and so does a
    block whose equations leave K open (constant predictions without a ridge).
    """
    a = weights(sums, alpha)
    p, cross, r = a * sums.qq + lambda1, a * sums.q, a * sums.n + lambda2
    u, v = a * (sums.qr - sums.qq), a * (sums.r - sums.q)
    # b is eliminated first; its pivot is always positive.
    pivot = p - cross * cross / r
    solvable = pivot > 1e-12 * p
    delta = torch.where(solvable, (u - cross * v / r) / torch.where(solvable, pivot, 1.0), 0.0)
    return 1 + delta, (v - cross * delta) / r


def solve_interpolated(
    sums: Moments, grid: Grid, alpha: float, lambda1: float, lambda2: float
) -> tuple[Tensor, Tensor]:
    """K and b at block centres, `[C, h, w]`, such that the maps interpolated between them minimise the objective.

    All nodes of a channel are solved together, since each pixel lies between several. A pixel is weighted as its block
    is in :func:`solve_blocks`, and each node has the ridge of a block.

    Args:
        sums: Sums of each pixel, `[C, H, W]`.
        grid: The blocks.
        alpha, lambda1, lambda2: As in :func:`objective`.
    """
    channels, nodes = sums.q.shape[0], grid.shape[0] * grid.shape[1]
    index, share = _corners(grid)
    a = _spread(weights(_pooled(sums, grid), alpha), grid)
    pairs = (index[:, :, None] * nodes + index[:, None, :]).flatten()
    products = (share[:, :, None] * share[:, None, :]).flatten(1)

    def matrix(values: Tensor) -> Tensor:
        entries = (values.flatten(1)[:, :, None] * products).flatten(1)
        flat = torch.zeros(channels, nodes * nodes, dtype=torch.float64).index_add_(1, pairs, entries)
        return flat.view(channels, nodes, nodes)

    def vector(values: Tensor) -> Tensor:
        entries = (values.flatten(1)[:, :, None] * share).flatten(1)
        return torch.zeros(channels, nodes, dtype=torch.float64).index_add_(1, index.flatten(), entries)

    eye = torch.eye(nodes, dtype=torch.float64)
    cross = matrix(a * sums.q)
    top = torch.cat([matrix(a * sums.qq) + lambda1 * eye, cross], 2)
    normal = torch.cat([top, torch.cat([cross, matrix(a * sums.n) + lambda2 * eye], 2)], 1)
    right = torch.cat([vector(a * (sums.qr - sums.qq)), vector(a * (sums.r - sums.q))], 1).unsqueeze(2)
    factor, failed = torch.linalg.cholesky_ex(normal)
    solution = torch.cholesky_solve(right, factor)
    # Without a ridge some nodes may be left open: the solution nearest the identity then.
    for channel in failed.nonzero().flatten():
        solution[channel] = torch.linalg.lstsq(normal[channel], right[channel], driver="gelsd").solution
    delta, shift = solution.view(channels, 2, *grid.shape).unbind(1)
    return 1 + delta, shift


def solve_ptqd(sums: Moments) -> tuple[Tensor, Tensor]:
    """PTQD's correction (He et al., NeurIPS 2023, arXiv 2305.10657, section 3): one K, one b a channel.

    The quantization noise is split as `q - r = k r + rest`. The slope k of its linear regression on r removes the
    correlated part, `K = 1 / (1 + k)`; b takes the mean of what is left away. K is 1 where r is constant or 1 + k is
    not positive.

    Args:
        sums: Sums over the whole grid, `[C, 1, 1]`.
    """
    n, q, r, qr, rr = (x.sum() for x in (sums.n, sums.q, sums.r, sums.qr, sums.rr))
    variance, covariance = rr - r * r / n, qr - q * r / n
    scale = variance / covariance if bool(covariance > 1e-12 * rr) and bool(variance > 0) else torch.ones_like(n)
    scale = scale.expand_as(sums.n).clone()
    return scale, (sums.r - scale * sums.q) / sums.n


def solve_tac(sums: Moments) -> tuple[Tensor, Tensor]:
    """TAC-Diffusion's noise estimation reconstruction (Yao et al., ECCV 2024, arXiv 2407.03917): one K a channel.

    Least squares through the origin. Absolute and relative error, which the paper blends, have the same minimum here,
    as one K covers all pixels that share a weight.

    Args:
        sums: Sums over the whole grid, `[C, 1, 1]`.
    """
    scale = torch.where(sums.qq > 0, sums.qr / torch.where(sums.qq > 0, sums.qq, 1.0), 1.0)
    return scale, torch.zeros_like(scale)


def solve_bias(sums: Moments) -> tuple[Tensor, Tensor]:
    """The mean difference alone, K = 1: TAC-Diffusion's input bias correction when the sums are those of latents."""
    return torch.ones_like(sums.n), (sums.r - sums.q) / sums.n


def limit(scale: Tensor, shift: Tensor, percentile: float, greater: bool, factor: float) -> tuple[Tensor, Tensor]:
    """Pulls some blocks towards the identity.

    The threshold is the `percentile` of `|K - 1|` over all channels and blocks. Blocks above it (`greater`), or the
    others, get `K <- 1 + factor (K - 1)` and `b <- factor b`. With a factor in [0, 1] the objective of
    :func:`solve_blocks`, being convex in each block, stays at or below that of the identity.
    """
    distance = (scale - 1).abs()
    above = distance > torch.quantile(distance.flatten(), percentile / 100)
    strength = torch.where(above if greater else ~above, factor, 1.0).to(scale.dtype)
    return 1 + strength * (scale - 1), strength * shift


def objective(
    sums: Moments,
    scale: Tensor,
    shift: Tensor,
    alpha: float,
    lambda1: float,
    lambda2: float,
    grid: Grid | None = None,
) -> float:
    """What is minimised: `sum A S((K q + b - r)^2) + lambda1 sum (K - 1)^2 + lambda2 sum b^2`.

    Args:
        sums: Sums of each block, or with `grid` of each pixel.
        scale, shift: K and b of each block, or with `grid` at its nodes.
        alpha: See :func:`weights`.
        lambda1, lambda2: Ridge, a block or a node.
        grid: Maps are interpolated between the block centres of this grid.
    """
    if grid is None:
        error = weights(sums, alpha) * sums.squared_error(scale, shift)
    else:
        a = _spread(weights(_pooled(sums, grid), alpha), grid)
        error = a * sums.squared_error(expand(scale, grid, True), expand(shift, grid, True))
    return float(error.sum() + lambda1 * (scale - 1).square().sum() + lambda2 * shift.square().sum())


def expand(values: Tensor, grid: Grid, interpolate: bool) -> Tensor:
    """Values of blocks, `[C, h, w]`, to values of pixels, `[C, H, W]`: constant on blocks or linear between centres.

    Beyond the outermost centres the map is constant.
    """
    if not interpolate:
        return _spread(values, grid)
    down, across = (_interpolation(n, grid.blocksize).to(values) for n in (grid.height, grid.width))
    return torch.einsum("yh,chw,xw->cyx", down, values, across)


def _spread(values: Tensor, grid: Grid) -> Tensor:
    tall = values.repeat_interleave(grid.blocksize, 1)[:, : grid.height]
    return tall.repeat_interleave(grid.blocksize, 2)[:, :, : grid.width]


def _pooled(sums: Moments, grid: Grid) -> Moments:
    return Moments(
        *(F.avg_pool2d(x, grid.blocksize, ceil_mode=True, count_include_pad=False, divisor_override=1) for x in sums)
    )


def _interpolation(length: int, blocksize: int) -> Tensor:
    """Shares of the block centres in each pixel of a row, `[length, blocks]`; each row sums to 1."""
    left, share = _neighbours(length, blocksize)
    rows = torch.arange(length)
    matrix = torch.zeros(length, -(-length // blocksize), dtype=torch.float64)
    matrix.index_put_((rows, left[:, 0]), share[:, 0], accumulate=True)
    return matrix.index_put_((rows, left[:, 1]), share[:, 1], accumulate=True)


def _neighbours(length: int, blocksize: int) -> tuple[Tensor, Tensor]:
    """The two centres next to each pixel and their shares, `[length, 2]` each."""
    edges = torch.arange(0, length, blocksize)
    centres = (edges + (edges + blocksize).clamp_max(length) - 1).double() / 2
    pixels = torch.arange(length, dtype=torch.float64)
    right = torch.searchsorted(centres, pixels).clamp(max=len(centres) - 1)
    left = torch.where(centres[right] <= pixels, right, (right - 1).clamp_min(0))
    gap = centres[right] - centres[left]
    share = torch.where(gap > 0, (pixels - centres[left]) / torch.where(gap > 0, gap, 1.0), 0.0).clamp(0, 1)
    return torch.stack([left, right], 1), torch.stack([1 - share, share], 1)


def _corners(grid: Grid) -> tuple[Tensor, Tensor]:
    """The four nodes around each pixel and their shares, `[H W, 4]` each."""
    (rows, down), (columns, across) = (_neighbours(n, grid.blocksize) for n in (grid.height, grid.width))
    index = rows[:, None, :, None] * grid.shape[1] + columns[None, :, None, :]
    share = down[:, None, :, None] * across[None, :, None, :]
    return index.reshape(-1, 4), share.reshape(-1, 4)
