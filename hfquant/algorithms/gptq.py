"""GPTQ (arXiv 2210.17323): round column by column, compensating each error in the columns still to come."""

from __future__ import annotations

import logging
from dataclasses import replace
from itertools import accumulate
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from hfquant.algorithms.base import Rounding
from hfquant.formats import Grid, GridRule
from hfquant.statistics import LayerStats

logger = logging.getLogger(__name__)

#: Columns of a triangular matrix that are inverted at a time.
_PANEL = 256


class Gptq(Rounding):
    """Minimize ``(w - q) H (w - q)^T`` greedily for each row w.

    Each row keeps the better of GPTQ and round-to-nearest, so its loss never exceeds that of round-to-nearest.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"hessian"})
    needs_data: ClassVar[bool] = True
    needs_scale: ClassVar[bool] = True
    type: Literal["gptq"] = "gptq"
    block_size: int = Field(128, ge=1, description="Columns processed per block before later columns are updated.")
    damp: float = Field(
        0.01, gt=0.0, le=1.0, description="Share of the Hessian's mean diagonal that is added to its diagonal."
    )
    act_order: bool = Field(
        False, description="Process columns by decreasing Hessian diagonal, with scales fixed in advance."
    )
    group_size: int | None = Field(None, ge=1, description="The same as `weight_quant.group_size`.")

    def cost(self, in_features: int, out_features: int) -> float:
        """Return the cost of inverting the Hessian and sweeping the columns."""
        return float(in_features**3 + in_features**2 * out_features)

    def solve(self, weight: Tensor, rule: GridRule, stats: LayerStats | None, name: str) -> tuple[Tensor, Grid]:
        """Return codes [rows, in] and their grid."""
        assert stats is not None
        return self.swept(weight.float(), stats.hessian.float(), rule, name)

    def swept(self, w: Tensor, h: Tensor, rule: GridRule, name: str) -> tuple[Tensor, Grid]:
        """Return codes and grid of ``w`` [rows, in], with ``h`` [in, in] = sum x x^T up to a factor; both float32."""
        grid = rule.fit(w, h.diagonal())
        nearest = grid.quantize(w)
        inverse = _inverse_cholesky(h, self.damp, self.act_order)
        if inverse is None:
            logger.warning(
                "layer %r: its Hessian cannot be factorized even with full damping; weights are rounded to nearest",
                name,
            )
            return nearest, grid
        codes, refitted = self._sweep(w, inverse, rule, grid, h.diagonal())
        worse = _row_loss(w, nearest, grid, h) < _row_loss(w, codes, refitted, h)
        return torch.where(worse[:, None], nearest, codes), refitted.where(worse, grid)

    def _sweep(
        self, w: Tensor, inverse: tuple[Tensor, Tensor], rule: GridRule, grid: Grid, importance: Tensor
    ) -> tuple[Tensor, Grid]:
        """Make one pass over the columns in blocks.

        In natural order, a group's scale is refitted when the sweep reaches it, on weights that already include the
        compensation for earlier errors. With act_order, or if rows share a scale, the given grid is kept.
        """
        upper, order = inverse
        columns = rule.columns
        starts = list(accumulate(columns, initial=0))
        refit = rule.rows is None and not self.act_order and len(columns) > 1
        grid = grid.clone()
        group_of = torch.repeat_interleave(torch.arange(len(columns)), torch.tensor(columns)).tolist()
        visited = order.tolist()
        # Transposed, so that each column is contiguous in memory.
        work = w.T[order].contiguous()
        codes = torch.empty_like(work, dtype=rule.format.code_dtype)
        group, (scale, zero_point) = -1, grid.column(0)
        for start in range(0, len(work), self.block_size):
            end = min(start + self.block_size, len(work))
            errors = torch.empty_like(work[start:end])
            for j in range(start, end):
                if group_of[visited[j]] != group:
                    group = group_of[visited[j]]
                    if refit:
                        # The group's columns beyond this block have not received the block's errors yet.
                        last = starts[group + 1]
                        ahead = work[j:last].clone()
                        if last > end and j > start:
                            ahead[end - j :] -= upper[start:j, end:last].T @ errors[: j - start]
                        part = replace(rule, columns=(columns[group],))
                        grid.with_column(group, part.fit(ahead.T, importance[j:last], grid.scale_row))
                    scale, zero_point = grid.column(group)
                column = work[j]
                q = rule.format.quantize(column, scale, zero_point)
                codes[j] = q
                error = (column - rule.format.dequantize(q, scale, zero_point)) / upper[j, j]
                errors[j - start] = error
                if j + 1 < end:
                    work[j + 1 : end].addr_(upper[j, j + 1 : end], error, alpha=-1)
            if end < len(work):
                work[end:].addmm_(upper[start:end, end:].T, errors, alpha=-1)
        back = torch.empty_like(codes)
        back[order] = codes
        return back.T.contiguous(), grid


def _row_loss(w: Tensor, codes: Tensor, grid: Grid, h: Tensor) -> Tensor:
    error = w - grid.dequantize(codes)
    return ((error @ h) * error).sum(-1)


def _inverse_cholesky(h: Tensor, damp: float, act_order: bool) -> tuple[Tensor, Tensor] | None:
    """Return the upper Cholesky factor of the damped H^-1 and the order of the columns.

    Dead columns (inputs always zero) get a diagonal of 1 and are thus rounded to nearest. If the factorization fails,
    the damping grows tenfold. At most three float64 matrices of this size exist at a time: the Hessian of a wide layer
    takes gigabytes.
    """
    order = torch.arange(len(h), device=h.device)
    if act_order:
        order = h.diagonal().argsort(descending=True, stable=True)
        h = h[order][:, order]
    mean = h.diagonal().double().mean()
    if not mean > 0:
        h, mean = torch.zeros_like(h), torch.ones_like(mean)
    dead = h.diagonal() == 0
    while damp <= 1.0:
        # Reversed, H is L L^T, so H^-1 is U^T U with U the inverse of L, reversed back. This takes half the time of
        # inverting H and factorizing the inverse.
        damped = h.flip(0, 1).double()
        damped.diagonal().add_(damp * mean)
        damped.diagonal().masked_fill_(dead.flip(0), 1.0)
        factor, info = torch.linalg.cholesky_ex(damped)
        del damped
        if info == 0:
            upper = _inverse_triangular(factor)
            if upper.isfinite().all():
                return upper.float().flip(0, 1), order
        damp *= 10
    return None


def _inverse_triangular(lower: Tensor) -> Tensor:
    """Return the inverse of a lower triangular matrix, computing only its lower part."""
    size, inverse = len(lower), torch.zeros_like(lower)
    for start in range(0, size, _PANEL):
        width = min(_PANEL, size - start)
        right = torch.eye(size - start, width, dtype=lower.dtype, device=lower.device)
        panel = torch.linalg.solve_triangular(lower[start:, start:], right, upper=False)
        inverse[start:, start : start + width] = panel
    return inverse
