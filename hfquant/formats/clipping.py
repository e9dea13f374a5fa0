"""The grid with the least squared error, used by ``clip="mse"``.

A smaller scale clips the largest weights of a block but represents the others in finer steps; a slightly larger one may
land closer to more of them. For a given scale, the zero point only decides how much is clipped at each end, so the best
one is near the one that clips both ends equally (NeUQI, arXiv 2505.17595, also searches both together). The search
therefore tries scales from coarse to fine, each with that zero point, and then the neighbors of the best pair. All sums
are elementwise, so results are the same on every CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate, groupby
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from hfquant.formats.grid import Grid

#: First scales to try, as steps of ``Grid.smaller`` below the scale that covers all weights.
COARSE = (-4, 0, 4, 8, 12, 16, 20, 28, 36)
#: Moves from the current best, tried in order: (steps, zero point).
FINE = ((-2, 0), (2, 0), (0, -1), (0, 1), (-1, 0), (1, 0))
#: Blocks with a larger scale keep it, since half a step beyond their largest weight might overflow float32.
HUGE_SCALE = 2.0**100
#: Number of weights on which all candidates are tried at once; these fit in a core's L2 cache.
CHUNK = 1 << 17


def least_error(
    weight: Tensor,
    widest: Grid,
    center: Tensor,
    importance: Tensor | None = None,
    over_rows: Callable[[Tensor], Tensor] | None = None,
) -> Grid:
    """Return the grid with the least weighted squared error that the search finds, never worse than ``widest``.

    Each weight's squared error is weighted by the square root of the weight's magnitude, since large weights tend to
    meet large inputs.

    Args:
        weight: [out, in], any float dtype.
        widest: the grid that covers the largest weights.
        center: [out, G] float32, middle of each block's range.
        importance: [in], additional weight of each column's squared error.
        over_rows: sums losses [out, G] over rows that share a scale; None if none do.
    """
    count = len(weight) if over_rows else max(CHUNK // weight.shape[1], 1)
    found = []
    for start in range(0, len(weight), count):
        rows = slice(start, start + count)
        w = weight[rows].float()
        weights = _root(w.abs())
        if importance is not None:
            weights *= importance
        parts = [
            _search(_blocks(w, columns), _blocks(weights, columns), part, center[rows, groups], over_rows)
            for groups, columns, part in _runs(widest.part(rows))
        ]
        found.append([torch.cat(values, 1) for values in zip(*parts, strict=True)])
    steps, zero_points = (torch.cat(values) for values in zip(*found, strict=True))
    return widest.smaller(steps, zero_points)


def _runs(grid: Grid) -> list[tuple[slice, tuple[int, int, int], Grid]]:
    """Return runs of equal-sized blocks: their slice, (first column, count, size), and their part of the grid."""
    runs = [(size, len(list(run))) for size, run in groupby(grid.columns)]
    firsts = accumulate((count for _, count in runs), initial=0)
    columns = accumulate((size * count for size, count in runs), initial=0)
    return [
        (slice(first, first + count), (column, count, size), grid.groups(slice(first, first + count)))
        for first, column, (size, count) in zip(firsts, columns, runs, strict=False)
    ]


def _blocks(values: Tensor, columns: tuple[int, int, int]) -> Tensor:
    """Return a run of column blocks of ``values`` [rows, in] as [size, rows, count], so that scales broadcast."""
    column, count, size = columns
    return values[:, column : column + count * size].unflatten(1, (count, size)).permute(2, 0, 1).contiguous()


def _search(
    w: Tensor, weights: Tensor, widest: Grid, center: Tensor, over_rows: Callable[[Tensor], Tensor] | None
) -> tuple[Tensor, Tensor]:
    """Return steps and zero points (0 if symmetric) of the best grid for blocks [size, rows, G], [rows, G] each."""
    form, asymmetric = widest.format, widest.zero_point is not None
    lowest, highest = -(2 ** (form.bits - 1)), 2 ** (form.bits - 1) - 1
    widest_scale = widest.scale
    assert widest_scale is not None
    # Weights and errors are in units of the widest grid's step, because squares of float32 extremes would overflow.
    counted = w / widest_scale
    best_steps = torch.zeros_like(widest_scale, dtype=torch.int32)
    best_zero = torch.zeros_like(widest_scale) if widest.zero_point is None else widest.zero_point.float()
    least = torch.full_like(widest_scale, torch.inf)

    def consider(steps: Tensor, zero: Tensor | None) -> None:
        """Adopt the grid that is ``steps`` smaller if it is better; without ``zero``, use the centered zero point."""
        nonlocal least, best_steps, best_zero
        scale = widest.smaller(steps).scale
        assert scale is not None
        share = scale / widest_scale
        if zero is None:
            zero = form.centered(center, scale)
        # Zero points are integers, so they can be added before rounding.
        x = (counted * share.reciprocal()).add_(zero)
        error = (x.round().clamp_(lowest, highest) if asymmetric else form.snap(x)).sub_(x).square_()
        loss = _sum(error.mul_(weights)) * share.square_()
        loss = over_rows(loss) if over_rows else loss
        better = loss < least
        least = torch.minimum(loss, least)
        best_steps = torch.where(better, steps, best_steps)
        best_zero = torch.where(better, zero, best_zero)

    consider(best_steps, best_zero)
    least = torch.where(widest_scale > HUGE_SCALE, torch.zeros_like(least), least)
    for step in COARSE:
        consider(torch.full_like(best_steps, step), None if asymmetric else best_zero)
    for step, shift in FINE:
        if asymmetric or step:
            consider(best_steps + step, (best_zero + shift).clamp_(lowest, highest))
    return best_steps, best_zero


def _root(values: Tensor) -> Tensor:
    """Return square roots, in place and identical on every CPU; ``torch.sqrt`` depends on the CPU's math library."""
    return values.rsqrt_().reciprocal_()


def _sum(values: Tensor) -> Tensor:
    """Return the sum over the first dimension, computed pairwise and in place, in an order set only by its size."""
    count = len(values)
    while count > 1:
        half, odd = divmod(count, 2)
        values[:half] += values[half : 2 * half]
        values[:odd] += values[count - odd : count]
        count = half
    return values[0]
