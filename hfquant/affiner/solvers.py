"""The math of the affiner: sums over samples, closed-form solutions, maps over pixels. Tensors in, tensors out.

Predictions are grids `[B, C, H, W]`. A *cell* is a set of pixels with its own sums: a block of the grid, one pixel, or
the whole grid. Sums and solutions are float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

#: Keeps the relative weight finite if the real model predicts zeros.
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
        """Return the sums over both sets of samples."""
        return Moments(*(a + b for a, b in zip(self, other, strict=True)))

    def squared_error(self, scale: Tensor | float = 1.0, shift: Tensor | float = 0.0) -> Tensor:
        """Return the sum of `(scale q + shift - r)^2` in each cell; scale and shift are constant within cells."""
        crossed = scale * (scale * self.qq + 2 * shift * self.q - 2 * self.qr)
        return (crossed + shift * (shift * self.n - 2 * self.r) + self.rr).clamp_min(0)


def held_out_strength(folds: Sequence[Moments], maps: Sequence[tuple[Tensor, Tensor]]) -> float:
    """Return how much of a correction to apply, from 0 to 1, judged on samples that it was not fitted on.

    Each fold is judged with the map that was fitted on the other folds. Let G be the inner product of the correction
    with the error on the held-out samples, and D the squared norm of the correction. At strength s, the squared error
    changes by `s^2 D - 2 s G`: it is lowest at G / D and returns to its original value at 2 G / D. The latter is used,
    limited to at most 1, and to 0 if the maps do harm. The noise of a fit differs from step to step and averages out
    over a run, while its corrections add up, so a whole run gains most above the best strength for a single step.

    Args:
        folds: Sums of each fold, of blocks or of pixels.
        maps: K and b fitted without that fold, of the same shape.
    """
    along = across = 0.0
    for sums, (scale, shift) in zip(folds, maps, strict=True):
        delta = scale - 1
        along += float((delta * (sums.qr - sums.qq) + shift * (sums.r - sums.q)).sum())
        across += float((delta * (delta * sums.qq + 2 * shift * sums.q) + shift * shift * sums.n).sum())
    return min(max(2 * along / across, 0.0), 1.0) if across > 0 else 1.0


class BlockLayout(NamedTuple):
    """Layout of `h x w` blocks of `blocksize` pixels on a grid of `height x width`; the last blocks may be smaller."""

    height: int
    width: int
    blocksize: int

    @property
    def shape(self) -> tuple[int, int]:
        """Number of blocks down and across."""
        return -(-self.height // self.blocksize), -(-self.width // self.blocksize)


def moments(real: Tensor, quant: Tensor, blocksize: int | None) -> Moments:
    """Return the sums of one batch.

    Args:
        real: `[B, C, H, W]`, prediction of the full-precision model.
        quant: The same of the quantized model.
        blocksize: Side of the square blocks in pixels; None for one block over everything.
    """
    r, q = real.detach().double(), quant.detach().to(real.device).double()
    return Moments(*(_block_sums(x.sum(0), blocksize).cpu() for x in (torch.ones_like(r), q, r, q * q, q * r, r * r)))


def weights(sums: Moments, alpha: float) -> Tensor:
    """Return each cell's weight, `alpha / n + (1 - alpha) / (S(r^2) + eps)`, a blend of absolute and relative error."""
    return alpha / sums.n + (1 - alpha) / (sums.rr + EPS)


def solve_blocks(sums: Moments, alpha: float, lambda1: float, lambda2: float) -> tuple[Tensor, Tensor]:
    """Return the scale K and shift b of each block, `[C, h, w]`, that minimize :func:`objective`.

    The normal equations are written in `(K - 1, b)`, so equal predictions yield exactly the identity. So does a block
    whose equations do not determine K (constant predictions without a ridge).
    """
    a = weights(sums, alpha)
    p, cross, r = a * sums.qq + lambda1, a * sums.q, a * sums.n + lambda2
    u, v = a * (sums.qr - sums.qq), a * (sums.r - sums.q)
    # Eliminate b first; its pivot is always positive.
    pivot = p - cross * cross / r
    solvable = pivot > 1e-12 * p
    delta = torch.where(solvable, (u - cross * v / r) / torch.where(solvable, pivot, 1.0), 0.0)
    return 1 + delta, (v - cross * delta) / r


def solve_interpolated(
    sums: Moments, grid: BlockLayout, alpha: float, lambda1: float, lambda2: float
) -> tuple[Tensor, Tensor]:
    """Return K and b at block centers, `[C, h, w]`, that minimize the objective of the maps interpolated between them.

    All nodes of a channel are solved together, since each pixel lies between several nodes. Each pixel has the weight
    of its block in :func:`solve_blocks`, and each node has the ridge of a block.

    Args:
        sums: Sums of each pixel, `[C, H, W]`.
        grid: The blocks.
        alpha, lambda1, lambda2: As in :func:`objective`.
    """
    down, across = _shares(grid.height, grid.blocksize), _shares(grid.width, grid.blocksize)
    nodes = grid.shape[0] * grid.shape[1]
    a = _pixel_weights(sums, grid, alpha)

    def matrix(values: Tensor) -> Tensor:
        # Contracted from left to right, so that no intermediate exceeds the pixels times the nodes of one row and
        # column.
        product = torch.einsum("cpq,py,pz,qx,qw->cyxzw", values, down, down, across, across)
        return product.reshape(-1, nodes, nodes)

    def vector(values: Tensor) -> Tensor:
        return torch.einsum("cpq,py,qx->cyx", values, down, across).flatten(1)

    eye = torch.eye(nodes, dtype=torch.float64)
    cross = matrix(a * sums.q)
    top = torch.cat([matrix(a * sums.qq) + lambda1 * eye, cross], 2)
    normal = torch.cat([top, torch.cat([cross, matrix(a * sums.n) + lambda2 * eye], 2)], 1)
    right = torch.cat([vector(a * (sums.qr - sums.qq)), vector(a * (sums.r - sums.q))], 1).unsqueeze(2)
    factor, failed = torch.linalg.cholesky_ex(normal)
    solution = torch.cholesky_solve(right, factor)
    # Without a ridge, some nodes may be undetermined; then take the solution nearest the identity.
    for channel in failed.nonzero().flatten():
        solution[channel] = torch.linalg.lstsq(normal[channel], right[channel], driver="gelsd").solution
    delta, shift = solution.view(-1, 2, *grid.shape).unbind(1)
    return 1 + delta, shift


def limit(scale: Tensor, shift: Tensor, percentile: float, greater: bool, factor: float) -> tuple[Tensor, Tensor]:
    """Return the maps with some blocks pulled toward the identity.

    The threshold is the `percentile` of `|K - 1|` over all channels and blocks. Blocks above it (with `greater`,
    otherwise the others) get `K <- 1 + factor (K - 1)` and `b <- factor b`. With a factor in [0, 1], the objective of
    :func:`solve_blocks` stays at or below that of the identity, because it is convex in each block.
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
    grid: BlockLayout | None = None,
) -> float:
    """Return the objective `sum A S((K q + b - r)^2) + lambda1 sum (K - 1)^2 + lambda2 sum b^2`.

    Args:
        sums: Sums of each block, or with `grid` of each pixel.
        scale, shift: K and b of each block, or with `grid` at its nodes.
        alpha: See :func:`weights`.
        lambda1, lambda2: Ridge per block or node.
        grid: Interpolate the maps between the block centers of this grid.
    """
    if grid is None:
        error = weights(sums, alpha) * sums.squared_error(scale, shift)
    else:
        spread = (expand(x, grid, True) for x in (scale, shift))
        error = _pixel_weights(sums, grid, alpha) * sums.squared_error(*spread)
    return float(error.sum() + lambda1 * (scale - 1).square().sum() + lambda2 * shift.square().sum())


def expand(values: Tensor, grid: BlockLayout, interpolate: bool) -> Tensor:
    """Return values per pixel, `[C, H, W]`, from values per block, `[C, h, w]`.

    They are constant on blocks, or linear between block centers and constant beyond the outermost ones.
    """
    if interpolate:
        down, across = (_shares(n, grid.blocksize).to(values) for n in (grid.height, grid.width))
        return torch.einsum("yh,chw,xw->cyx", down, values, across)
    tall = values.repeat_interleave(grid.blocksize, 1)[:, : grid.height]
    return tall.repeat_interleave(grid.blocksize, 2)[:, :, : grid.width]


def _block_sums(values: Tensor, blocksize: int | None) -> Tensor:
    """Return sums over blocks, `[C, h, w]`, of pixel values, `[C, H, W]`."""
    if blocksize is None:
        return values.sum((1, 2), keepdim=True)
    if blocksize == 1:
        return values
    return F.avg_pool2d(values, blocksize, ceil_mode=True, count_include_pad=False, divisor_override=1)


def _pixel_weights(sums: Moments, grid: BlockLayout, alpha: float) -> Tensor:
    """Return the weight of each pixel's block, `[C, H, W]`, from sums of pixels."""
    return expand(weights(Moments(*(_block_sums(x, grid.blocksize) for x in sums)), alpha), grid, False)


def _shares(length: int, blocksize: int) -> Tensor:
    """Return the share of each block center in each pixel of a row, `[length, blocks]`; each row sums to 1."""
    edges = np.arange(0, length, blocksize)
    centres = (edges + np.minimum(edges + blocksize, length) - 1) / 2
    columns = [np.interp(np.arange(length), centres, one) for one in np.eye(len(centres))]
    return torch.from_numpy(np.stack(columns, 1))
